"""The plan of an audit: its settings, its sample, and everything its numbers depend on. Small and picklable."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from wsi_gradcam.audit.schema import ATTENTION, BAG_QUESTIONS, QUESTIONS, SINGLE, Unit, questions_of
from wsi_gradcam.errors import ConfigError, StoreError, did_you_mean
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import open_zip, read_json
from wsi_gradcam.io.zarr_stores import ZARR_CONTENTS
from wsi_gradcam.results.run_files import MARK, folder_name
from wsi_gradcam.results.seals import LISTING, Seal, seal_of
from wsi_gradcam.run.status import AUDIT as AUDIT
from wsi_gradcam.tissue.annotations import check_ending

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from wsi_gradcam.cam.targets import Target
    from wsi_gradcam.io.paths import StoragePath
    from wsi_gradcam.run.plan import RunPlan


PIECES, REPORT = "pieces", "report.html"
ENDING, DIGITS = ".npz", 12
# Of a slide's folder, except for the image of its spread.
CONTENTS = re.compile(
    rf"({re.escape(REPORT)}|spread\.json|{PIECES}/[0-9a-f]{{{DIGITS}}}-[0-9]+{re.escape(ENDING)})(\.[0-9a-f]{{32}}\.partial)?"
)

Arrays = dict[str, "NDArray[Any]"]


@dataclass(frozen=True)
class AuditFolder:
    """OUT/audit. Files of batches have the audit's digest in their names: those of other audits are ignored."""

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
        """Return the relative path of a slide's folder: that of `folder_name`, or that of an older version."""
        name = folder_name(slide_id)
        may_be_old = name != slide_id and not slide_id.partition("/")[0].endswith(MARK)  # may now be another's
        return slide_id if may_be_old and not self._holds(name) and self._holds(slide_id) else name

    def _holds(self, path: str) -> bool:
        return (self.place / path / PIECES).exists() or (self.place / path / REPORT).is_file()

    def slide(self, slide_id: str) -> StoragePath:
        """Return the folder of a slide."""
        return self.place / self.path_of(slide_id)

    def forget(self, slide_id: str) -> None:
        """Delete everything that an audit wrote about a slide; other people's files stay."""
        self.spread(slide_id).remove_files(ZARR_CONTENTS)
        self.slide(slide_id).remove_files(CONTENTS)

    def remove_partial_files(self, slides: Iterable[str]) -> None:
        """Delete files that killed audits of these slides left half-written."""
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
        """Return the OME-Zarr image that shows where overlapping patches of a slide disagree."""
        return self.slide(slide_id) / "spread.ome.zarr"

    def spread_means(self, slide_id: str) -> StoragePath:
        """Return the file of its means, which is written when the image is complete."""
        return self.slide(slide_id) / "spread.json"

    @property
    def is_listed(self) -> bool:
        """True for an audit whose files are listed at the end; older versions, whose plans have no seal, did not."""
        return seal_of(self.plan.read()) is not Seal.MISSING

    def read_plan(self) -> dict[str, Any] | None:
        """Return the plan as it was written; None if there is none.

        Raises:
            StoreError: it is damaged.
        """
        return _json(self.plan)

    def read_spread(self, slide_id: str) -> dict[str, Any] | None:
        """Return the means of a slide's spread; None if it was not made.

        Raises:
            StoreError: they are damaged.
        """
        return _json(self.spread_means(slide_id))

    def read_metrics(self) -> dict[str, Any] | None:
        """Return the metrics; None if there are none.

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
    """Write named arrays; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: arrays[name] for name in sorted(arrays)})  # type: ignore[arg-type]
    place.write(buffer.getvalue())


def read_arrays(place: StoragePath) -> Arrays:
    """Return the arrays that `write_arrays` wrote.

    Raises:
        StoreError: it is damaged.
        FileNotFoundError: it does not exist.
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


# Of the arrays of a batch of patches, unpacked; normally a few hundred kilobytes.
MAX_ARRAYS, MAX_ARRAYS_BYTES = 1 << 14, 1 << 28
_DAMAGE = (ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _array(file: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """Return an array from an .npz; raises a ValueError if its header claims more than the member contains.

    NumPy allocates what the header says before it reads on.
    """
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("compressed in a way that .npz files are not")
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


Frame = Literal["auto", "slide", "bounds"]  # of a drawing
FORMAT = 1  # of the numbers; increased when old ones must not be continued
# All batches have this size, padded if necessary: for other sizes torch chooses other kernels, whose sums differ in the
# last bit with the number of threads.
BATCH_SIZE = 8
PATCHES = 200
SLIDES = 200  # of slide-level models
FEWEST_DEEP = 48  # patches with slow measurements too: enough for a verdict, from 6 slides if there are
DEEP_SHARE = 10


@dataclass(frozen=True)
class AuditSettings:
    """The settings of an audit. Each field is a flag of `wsi-gradcam audit`, and its description is the flag's help."""

    patches: Annotated[int, Field(description="approximate number of patches, over all slides")] = PATCHES
    seed: Annotated[int, Field(description="seed of the sample and all random numbers")] = 0
    only: Annotated[
        tuple[str, ...],
        Field(
            description=f"answer only some of {', '.join(QUESTIONS)}; for slide-level models "
            f"{', '.join(BAG_QUESTIONS)} (default: all)"
        ),
    ] = tuple(QUESTIONS)
    target: Annotated[
        str,
        Field(
            description="which of the run's targets to audit (default: each patch's predicted class if all classes "
            "were explained, else the first target)"
        ),
    ] = ""
    annotations: Annotated[
        Path | None,
        Field(description="areas that show the target's class: a file, or a folder with one file per slide"),
    ] = None
    include: Annotated[
        tuple[str, ...], Field(description="annotation classes of `annotations` to use (default: all)")
    ] = ()
    regions: Annotated[
        Path | None,
        Field(
            description="the same for regions that should not affect the answer, such as rulers, folds and pen; each "
            "class is tested"
        ),
    ] = None
    mask_frame: Annotated[
        Frame,
        Field(
            description="what both were drawn on: the whole slide, or its scanned part; auto: whichever places them on "
            "tissue, refused if both could"
        ),
    ] = "auto"

    slides: Annotated[int, Field(description="for slide-level models: approximate number of slides")] = SLIDES

    def __post_init__(self) -> None:
        for name in ("patches", "slides"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected 0 or more")
        check_questions(self.only)
        if self.mask_frame not in (frames := get_args(Frame)):
            raise ConfigError(f"mask_frame is {self.mask_frame!r}, expected one of {', '.join(frames)}")
        if self.include and self.annotations is None:
            raise ConfigError("include chooses classes of annotations; give their file or folder as well")
        for path in (self.annotations, self.regions):
            if path is not None and not path.exists():
                raise ConfigError(f"{path}: does not exist, expected a file or a folder; check the path")
            if path is not None:
                check_ending(path)

    def asks(self, question: str) -> bool:
        """Return whether a question is asked."""
        return question in self.only

    def to_json(self) -> dict[str, Any]:
        """Return plain values, with questions in their order."""
        known = {**QUESTIONS, **BAG_QUESTIONS}
        values = {**asdict(self), "only": [name for name in known if name in self.only]}
        for name in ("annotations", "regions"):
            values[name] = None if values[name] is None else str(values[name])
        if self.mask_frame == "auto":  # as in audits of older versions
            del values["mask_frame"]
        return {**values, "include": list(self.include)}


def check_questions(names: Sequence[str], unit: Unit | None = None) -> None:
    """Raise ConfigError for a name that is not a question, or not one about patches, or about slides."""
    known = {**QUESTIONS, **BAG_QUESTIONS} if unit is None else questions_of(unit)
    for name in names:
        if name not in known:
            what = "" if unit is None else {"patch": " of patches", "slide": " of slide-level models"}[unit]
            mend = did_you_mean(name, known) or f"expected some of {', '.join(known)}"
            raise ConfigError(f"{name!r} is not one of the audit's questions{what}; {mend}")


def asked_questions(only: Sequence[str], unit: Unit) -> tuple[str, ...]:
    """Return the questions asked, in the order of the report; all if none are named.

    Raises:
        ConfigError: one is not a question about patches, or about slides.
    """
    check_questions(only)
    check_questions(only, unit)
    return tuple(name for name in questions_of(unit) if not only or name in only)


@dataclass(frozen=True)
class SlideSample:
    """The patches of a slide that are audited.

    Attributes:
        patches: their numbers in the slide's table, in a random order determined by the seed.
        yx: level-0 px of their top left corners.
        weights: the number of patches of the archive that each stands for.
        strata: the stratum from which each was drawn.
        deep: the first batches, this many of them, are measured in depth.
    """

    patches: tuple[int, ...]
    yx: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]
    strata: tuple[str, ...]
    deep: int

    @property
    def batches(self) -> int:
        """The number of batches."""
        return -(-len(self.patches) // BATCH_SIZE)

    def batch(self, number: int) -> slice:
        """Return the places of a batch's patches."""
        return slice(number * BATCH_SIZE, min((number + 1) * BATCH_SIZE, len(self.patches)))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SlideSample:
        """Return the sample from its plain values; other values raise KeyError or TypeError."""
        return cls(
            tuple(values["patches"]),
            tuple((y, x) for y, x in values["yx"]),
            tuple(values["weights"]),
            tuple(values["strata"]),
            int(values["deep"]),
        )


@dataclass(frozen=True, kw_only=True)
class AuditScope:
    """Everything an audit's numbers depend on; known before the model is loaded.

    Attributes:
        run_digest: that of the run whose results are audited.
        settings: of the audit.
        target: what is audited, one of the run's targets or each patch's predicted class.
        samples: by slide id.
        annotation_digests, region_digests: sha256 of the slides' files of annotations and regions, by slide id.
        unit: what questions are about; if it is the slide, the sample of a slide is the slide itself, as if it were one
            patch.
    """

    run_digest: str
    settings: AuditSettings
    target: Target
    samples: Mapping[str, SlideSample]
    annotation_digests: Mapping[str, str]
    region_digests: Mapping[str, str]
    unit: Unit = "patch"

    def audit_identity(self) -> dict[str, Any]:
        """Return everything the numbers depend on: the content of annotations and regions, not their paths."""
        settings = self.settings.to_json()
        del settings["annotations"], settings["regions"], settings["patches" if self.unit == "slide" else "slides"]
        if self.unit == "slide":  # as in audits of older versions else
            settings["unit"] = self.unit
        sample = json.dumps({name: one.to_json() for name, one in sorted(self.samples.items())}, sort_keys=True)
        return {
            "format": FORMAT,
            "run": self.run_digest,
            **settings,
            "target": self.target.label,
            "annotations": dict(sorted(self.annotation_digests.items())),
            "regions": dict(sorted(self.region_digests.items())),
            "sample": hashlib.sha256(sample.encode()).hexdigest(),
        }

    def audit_digest(self) -> str:
        """Return the sha256 of `audit_identity()`."""
        return hashlib.sha256(json.dumps(self.audit_identity(), sort_keys=True).encode()).hexdigest()

    def planned(self, run: RunPlan, target: Target) -> AuditPlan:
        """Return the plan of this audit, with the run's plan for this model, and its own target."""
        return AuditPlan(
            run=run, **{field.name: getattr(self, field.name) for field in fields(self)} | {"target": target}
        )


@dataclass(frozen=True, kw_only=True)
class AuditPlan(AuditScope):
    """The plan of an audit; it is sent to workers once.

    Attributes:
        run: the audited run. Its model runs eagerly in float32, whatever the run used.
        bag_methods: for a slide-level model, those whose relevances are audited, if they are not the run's.
    """

    run: RunPlan
    bag_methods: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose maps are audited; for a slide-level model its bag methods, single patches and attention."""
        if self.unit == "patch":
            return self.run.settings.method
        bag = self.run.facts.bag
        assert bag is not None
        return self.bag_methods or (*self.run.settings.bag_method, SINGLE, *([ATTENTION] if bag.attention else []))


def deep_patches(patches: int) -> int:
    """Return the total number of patches measured in depth; a few more are possible."""
    return max(FEWEST_DEEP, patches // DEEP_SHARE)


def patch_seeds(seed: int, slide: str, patches: Sequence[int]) -> list[int]:
    """Return a seed for each patch that depends only on the audit's seed, the slide's id and the patch's number."""
    texts = (f"{seed}/{slide}/{patch}" for patch in patches)
    return [int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:6]) for text in texts]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
