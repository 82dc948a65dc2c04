"""Names of everything below OUT/audit, and the files of numbers there."""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import StoreError
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import open_zip, read_json
from wsi_gradcam.io.zarr_stores import ZARR_CONTENTS
from wsi_gradcam.results.run_files import MARK, folder_name
from wsi_gradcam.results.seals import LISTING, Seal, seal_of
from wsi_gradcam.run.status import AUDIT as AUDIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from wsi_gradcam.io.paths import StoragePath

PIECES, REPORT = "pieces", "report.html"
ENDING, DIGITS = ".npz", 12
# Of a slide's folder, but for the image of its spread.
CONTENTS = re.compile(
    rf"({re.escape(REPORT)}|spread\.json|{PIECES}/[0-9a-f]{{{DIGITS}}}-[0-9]+{re.escape(ENDING)})(\.[0-9a-f]{{32}}\.partial)?"
)

Arrays = dict[str, "NDArray[Any]"]


@dataclass(frozen=True)
class AuditFolder:
    """OUT/audit. The file of a batch is named by the audit's digest: those of another audit are as good as none."""

    place: StoragePath

    @property
    def plan(self) -> StoragePath:
        """The audit's settings and sample, written before work begins."""
        return self.place / "plan.json"

    @property
    def metrics(self) -> StoragePath:
        """All numbers and verdicts, written at the end."""
        return self.place / "metrics.json"

    @property
    def report(self) -> StoragePath:
        """The page of the archive."""
        return self.place / REPORT

    @property
    def listing(self) -> StoragePath:
        """The sha256 of all other files, written just before the metrics."""
        return self.place / LISTING

    def path_of(self, slide_id: str) -> str:
        """Return the path of a slide's folder from here: as `folder_name` says, or as an older version has named it."""
        name = folder_name(slide_id)
        may_be_old = name != slide_id and not slide_id.partition("/")[0].endswith(MARK)  # which may be another's by now
        return slide_id if may_be_old and not self._holds(name) and self._holds(slide_id) else name

    def _holds(self, path: str) -> bool:
        return (self.place / path / PIECES).exists() or (self.place / path / REPORT).is_file()

    def slide(self, slide_id: str) -> StoragePath:
        """Return the folder of a slide."""
        return self.place / self.path_of(slide_id)

    def forget(self, slide_id: str) -> None:
        """Delete all that an audit has written of a slide; files that are not ours stay."""
        self.spread(slide_id).remove_files(ZARR_CONTENTS)
        self.slide(slide_id).remove_files(CONTENTS)

    def remove_partial_files(self, slides: Iterable[str]) -> None:
        """Delete files that killed audits of these slides have left half-written."""
        self.place.remove_partial_files(recursive=False)
        for slide_id in slides:
            self.slide(slide_id).remove_partial_files()

    def slide_report(self, slide_id: str) -> StoragePath:
        """Return the page of a slide."""
        return self.slide(slide_id) / REPORT

    def batch(self, slide_id: str, digest: str, number: int) -> StoragePath:
        """Return the file of a batch's measurements."""
        return self.slide(slide_id) / PIECES / f"{digest[:DIGITS]}-{number:04d}{ENDING}"

    def spread(self, slide_id: str) -> StoragePath:
        """Return the OME-Zarr image of where overlapping patches of a slide disagree."""
        return self.slide(slide_id) / "spread.ome.zarr"

    def spread_means(self, slide_id: str) -> StoragePath:
        """Return the file of its means; written when the image is whole."""
        return self.slide(slide_id) / "spread.json"

    @property
    def is_listed(self) -> bool:
        """True of an audit whose files are listed in the end; older versions, whose plan has no seal, did not."""
        return seal_of(self.plan.read()) is not Seal.MISSING

    def read_plan(self) -> dict[str, Any] | None:
        """Return the plan as it was written; None where there is none.

        Raises:
            StoreError: it is damaged.
        """
        return _json(self.plan)

    def read_spread(self, slide_id: str) -> dict[str, Any] | None:
        """Return the means of a slide's spread; None where it was not made.

        Raises:
            StoreError: they are damaged.
        """
        return _json(self.spread_means(slide_id))

    def read_metrics(self) -> dict[str, Any] | None:
        """Return the metrics; None where there are none.

        Raises:
            StoreError: they are damaged.
        """
        return _json(self.metrics)


def _json(place: StoragePath) -> dict[str, Any] | None:
    try:
        values = read_json(place.read(SMALL_BYTES))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(place) from error
    if not isinstance(values, dict):
        raise _damaged(place)
    return values


def write_arrays(place: StoragePath, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: arrays[name] for name in sorted(arrays)})  # type: ignore[arg-type]
    place.write(buffer.getvalue())


def read_arrays(place: StoragePath) -> Arrays:
    """Return the arrays that `write_arrays` wrote.

    Raises:
        StoreError: it is damaged.
        FileNotFoundError: there is none.
    """
    data = place.read(MAX_ARRAYS_BYTES)
    try:
        with open_zip(io.BytesIO(data)) as file:
            members = file.infolist()
            if len(members) > MAX_ARRAYS or sum(member.file_size for member in members) > MAX_ARRAYS_BYTES:
                raise _damaged(place)
            return {member.filename.removesuffix(".npy"): _array(file, member) for member in members}
    except _DAMAGE as error:
        raise _damaged(place) from error


# Of the arrays of a batch of patches, unpacked; usual ones have some hundred kilobytes.
MAX_ARRAYS, MAX_ARRAYS_BYTES = 1 << 14, 1 << 28
_DAMAGE = (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _array(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """Return an array of an .npz; raises a ValueError where its header claims more than the member holds.

    Numpy makes room for what the header says before it reads on.
    """
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("packed as no .npz is")
    data = io.BytesIO(file.read(member))
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[np.lib.format.read_magic(data)](data)
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"an array of {shape} in {member.file_size} bytes")
    data.seek(0)
    found: NDArray[Any] = np.lib.format.read_array(data, allow_pickle=False)
    return found


def _damaged(place: StoragePath) -> StoreError:
    return StoreError(f"{place}: damaged; delete it and run the same audit again, or use --overwrite")
