"""Files of features: which belong to a slide, and the arrays of HDF5, PyTorch and NumPy in them.

Files are untrusted, so the claims of arrays are checked before they are read. No code in a file runs, links that lead
out of it are not followed, and nothing is unpacked beyond a limit. Feature vectors stay in their file until they are
needed.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import FeatureError, as_text, canonical, one_line, quoted
from wsi_gradcam.io.documents import open_zip
from wsi_gradcam.io.urls import is_url, redact_url

if TYPE_CHECKING:
    from numpy.typing import NDArray

H5, TORCH, NUMPY = (".h5", ".hdf5"), ".pt", ".npz"
ENDINGS = (*H5, TORCH, NUMPY)
COORDINATES, PATCHES = ".coordinates", "_patches"  # what slide2vec and TRIDENT add to the names of coordinate files
DOUBLE = (".ome",)  # before the ending of a slide
MAX_FILES = 1_000_000
MAX_ALIKE = 64  # files that are examined for a slide
MAX_PATCHES = 2_000_000
MAX_DIMENSIONS = 1 << 16
MAX_CHUNK_BYTES = 1 << 28  # bytes of an HDF5 chunk, unpacked
MAX_TENSOR_PICKLE = 1 << 20  # bytes besides the numbers of a tensor
COPY_BYTES = 1 << 20
MAX_UNPACKED, MOST_PACKED = 1 << 28, 100  # bytes compressed to under a hundredth: features are like noise
# gzip, shuffle, checksums, LZF; others would be loaded from plugins
FILTERS = frozenset({1, 2, 3, 32000})


class FeatureRows:
    """Feature vectors [N, D] as float16 or float32, read from their file on demand.

    Slices, numbers and lists of patch numbers are accepted; each block is checked as it is read.
    """

    ndim = 2

    def __init__(
        self,
        path: object,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        read: Callable[[int, int], NDArray[Any]],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        count, dimensions = shape
        if count > MAX_PATCHES or not 1 <= dimensions <= MAX_DIMENSIONS:
            raise FeatureError(
                f"{path}: features of {count:,} x {dimensions:,}, expected at most {MAX_PATCHES:,} patches x "
                f"{MAX_DIMENSIONS:,} numbers; they are damaged, or not features"
            )
        self.shape = shape
        self.dtype = np.dtype(np.float16) if dtype.itemsize == 2 and dtype.kind == "f" else np.dtype(np.float32)
        self._path, self._read, self._close = path, read, close

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[Any]:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._block(start, max(start, stop))[::step] if step > 0 else self[np.arange(start, stop, step)]
        numbers = np.asarray(key)
        if numbers.ndim == 0:
            number = range(len(self))[int(numbers)]
            row: NDArray[Any] = self._block(number, number + 1)[0]
            return row
        return np.stack([self[int(n)] for n in numbers]) if len(numbers) else self._block(0, 0)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        whole: NDArray[Any] = np.asarray(self._block(0, len(self)), dtype or self.dtype)
        return whole

    def close(self) -> None:
        """Release the file."""
        self._close()

    def _block(self, start: int, stop: int) -> NDArray[Any]:
        try:
            with np.errstate(over="ignore"):  # from float64: infinite, which is reported below
                block = np.asarray(self._read(start, stop)).astype(self.dtype, copy=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise FeatureError(
                f"{self._path}: features cannot be read: {one_line(error)}; create them again"
            ) from error
        if block.shape != (stop - start, self.shape[1]):
            raise FeatureError(f"{self._path}: the file is truncated at patch {start:,}; create the features again")
        if not (fine := np.isfinite(block).all(axis=1)).all():
            bad = start + int(np.argmin(fine))
            raise FeatureError(f"{self._path}: features of patch {bad:,} are not finite; create them again")
        return block


# Names


class FeatureFolder:
    """The files of features in a folder and below it, or one file.

    Args:
        place: the folder or file.
        ids: those of all slides of the run: if two have the same name, files are distinguished by their folders too.

    Raises:
        FeatureError: it does not exist, or is not a folder on a disk.
    """

    def __init__(self, place: str | os.PathLike[str], ids: Collection[str] = ()) -> None:
        if is_url(os.fspath(place)):
            raise FeatureError(f"{redact_url(os.fspath(place))}: features are read from a local disk; copy them there")
        self.place = Path(place)
        if not self.place.exists():
            raise FeatureError(f"{self.place}: no such folder of features; check the path")
        self._by_stem: dict[str, list[Path]] = {}
        if self.place.is_dir():
            for file in _files(self.place):
                self._by_stem.setdefault(_stem(file.name), []).append(file)
        counts = Counter(name for each in set(ids) for name in names_of(each))
        self._shared = {name for name, count in counts.items() if count > 1}

    def files_of(self, slide_id: str) -> list[Path]:
        """Return the files with a slide's name, from the folder of the same name if there are any in it.

        Raises:
            FeatureError: there is none, or it is unclear which slide they belong to.
        """
        if not self.place.is_dir():
            return [self.place]
        names = names_of(slide_id)
        inside = PurePosixPath(canonical(slide_id)).parent.parts
        found: list[Path] = []
        for name in names:
            files = self._by_stem.get(name, [])
            near = [file for file in files if inside and self._folders(file)[-len(inside) :] == inside]
            if near or (files and name not in self._shared):
                return sorted(near or files)
            found += files
        if found:
            mend = f"put those of {slide_id} into a folder {'/'.join(inside)}, or" if inside else "of this slide"
            raise FeatureError(f"{found[0]}: several slides are named {names[0]}; {mend} name them {names[-1]}.h5")
        raise FeatureError(f"{self.place}: no features of {slide_id}; expected a file such as {names[0]}.h5")

    def _folders(self, file: Path) -> tuple[str, ...]:
        return tuple(canonical(as_text(part)) for part in file.relative_to(self.place).parent.parts)


def _files(folder: Path) -> Iterator[Path]:
    count = 0
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in names:
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                if (count := count + 1) > MAX_FILES:
                    raise FeatureError(
                        f"{folder}: more than {MAX_FILES:,} files; give the folder that contains only the features"
                    )
                yield Path(place, name)


def _stem(name: str) -> str:
    stem = canonical(as_text(Path(name).stem))
    return stem.removesuffix(COORDINATES).removesuffix(PATCHES)


def names_of(slide_id: str) -> list[str]:
    """Return the names that a slide's features may have, most likely first."""
    last = PurePosixPath(canonical(slide_id)).name
    stem = PurePosixPath(last).stem
    bare = PurePosixPath(stem).stem if PurePosixPath(stem).suffix.lower() in DOUBLE else stem
    return list(dict.fromkeys((bare, stem, last)))


# HDF5


def h5_node(path: Path, group: Any, name: str) -> Any:
    """Return what a group contains under a name, in the file itself."""
    import h5py

    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise FeatureError(f"{path}: {quoted(name)} is an external link, which is not followed; copy it into the file")
    return group[name]


def h5_dataset(path: Path, dataset: Any) -> Any:
    """Return a dataset after checking what it is and how it is stored, without reading it."""
    name = quoted(PurePosixPath(dataset.name).name)
    if dataset.dtype.kind not in "fiu":
        raise FeatureError(f"{path}: {name} holds {dataset.dtype}, expected numbers")
    if dataset.is_virtual or dataset.external:
        raise FeatureError(f"{path}: {name} is stored in other files, which are not read; copy it into this one")
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    if unknown := set(filters) - FILTERS:
        raise FeatureError(f"{path}: {name} is compressed with filter {min(unknown)}; use gzip or no compression")
    itemsize = dataset.dtype.itemsize
    if dataset.chunks is None:
        stored = dataset.id.get_storage_size() >= dataset.size * itemsize
    else:
        if filters and math.prod(dataset.chunks) * itemsize > MAX_CHUNK_BYTES:
            raise FeatureError(f"{path}: {name} is stored in chunks of {dataset.chunks}; make them smaller")
        expected = math.prod(-(-side // chunk) for side, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        stored = dataset.id.get_num_chunks() >= expected
    if not stored:
        raise FeatureError(f"{path}: {name} declares {dataset.shape}, but is incomplete; create it again")
    return dataset


def h5_rows(path: Path, dataset: Any, close: Callable[[], None]) -> FeatureRows:
    """Return the rows of a dataset, which their `close` releases."""
    shape, axis = _two_axes(path, dataset.shape)
    if dataset.dtype.kind != "f":
        raise FeatureError(f"{path}: features are {dataset.dtype}, expected floating point numbers")

    def read(start: int, stop: int) -> NDArray[Any]:
        rows = slice(start, stop)
        found: NDArray[Any] = dataset[rows] if axis is None else dataset[(0, rows) if axis == 0 else (rows, 0)]
        return found.astype(found.dtype.newbyteorder("="), copy=False)

    return FeatureRows(path, shape, dataset.dtype, read, close)


def h5_coordinates(path: Path, file: Any) -> NDArray[np.float64] | None:
    """Read `coords`, float64 [N, 2] as x, y, or [N, 5] with width, height and level."""
    if "coords" not in file:
        return None
    dataset = h5_node(path, file, "coords")
    shape: tuple[int, ...] = getattr(dataset, "shape", ())
    inner = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(inner) != 2 or inner[1] not in (2, 5) or inner[0] > MAX_PATCHES:
        raise FeatureError(
            f"{path}: coords of {' x '.join(map(str, shape))}, expected [N, 2], or [N, 5] as AtlasPatch writes them, "
            f"of up to {MAX_PATCHES:,} patches"
        )
    with np.errstate(invalid="ignore"):  # from damaged ones: not finite, which is reported when patches are placed
        return np.asarray(h5_dataset(path, dataset)[()], np.float64).reshape(inner)


class Marks:
    """Attributes of a file and of its coordinates, which take precedence; only numbers and short texts."""

    def __init__(self, nodes: Sequence[Any]) -> None:
        self._nodes = nodes[::-1]

    def __contains__(self, name: str) -> bool:
        return any(name in node.attrs for node in self._nodes)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Return up to two numbers; () if there are none."""
        value = self._value(name)
        if value is None or np.asarray(value).dtype.kind not in "fiub":
            return ()
        return tuple(float(number) for number in np.ravel(value)[:2])

    def number(self, name: str) -> float | None:
        """Return a finite, non-negative number."""
        found = self.numbers(name)
        return found[0] if found and math.isfinite(found[0]) and found[0] >= 0 else None

    def text(self, name: str) -> str:
        """Return a text; "" if there is none."""
        value = self._value(name)
        if not isinstance(value, str | bytes):
            return ""
        return (value.decode(errors="replace") if isinstance(value, bytes) else value)[:80]

    def _value(self, name: str) -> Any:
        for node in self._nodes:
            if name in node.attrs:
                found = node.attrs.get_id(name)
                short = math.prod(found.shape or ()) <= 4 and (found.dtype.kind != "O" or found.shape == ())
                value = node.attrs[name] if short else None
                return value if isinstance(value, np.ndarray | np.number | np.bool_ | str | bytes) else None
        return None


def _two_axes(path: Path, shape: Sequence[int]) -> tuple[tuple[int, int], int | None]:
    """Return (N, D) of features, and which axis of length 1 to drop: [1, N, D] and [N, 1, D] occur, too."""
    match shape:
        case count, dimensions:
            return (count, dimensions), None
        case 1, count, dimensions:
            return (count, dimensions), 0
        case count, 1, dimensions:
            return (count, dimensions), 1
    what = "one vector of a whole slide" if len(shape) == 1 else f"an array of {' x '.join(map(str, shape))}"
    raise FeatureError(f"{path}: {what}, expected features of patches [N, D]")


# PyTorch


def torch_rows(path: Path) -> FeatureRows:
    """Return the features in a PyTorch file: a tensor, or one under the name of features in a dict."""
    import torch

    from wsi_gradcam.models.sources import saved_problem

    if not zipfile.is_zipfile(path):
        raise FeatureError(f"{path}: not a file of PyTorch 1.6 or later; write it again with torch.save of the tensor")
    if problem := saved_problem(path, MAX_TENSOR_PICKLE):
        raise FeatureError(f"{path}: {problem}; write it again with torch.save of the tensor")
    with open_zip(path) as archive:
        if damaged := archive.testzip():
            raise FeatureError(
                f"{path}: the checksum of {quoted(damaged)} in it is wrong; it is damaged: create it again"
            )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged pickles raise struct, index, unicode and many other errors
        raise FeatureError(
            f"{path}: not a plain tensor ({type(error).__name__}); write it again with torch.save of the tensor"
        ) from error
    tensor = (
        next((found[key] for key in ("features", "feats") if key in found), None) if isinstance(found, dict) else found
    )
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
        raise FeatureError(f"{path}: has no tensor of floating point numbers; expected features [N, D]")
    shape, axis = _two_axes(path, tuple(tensor.shape))
    if not tensor.is_contiguous() or tensor.numel() * tensor.element_size() > path.stat().st_size:
        raise FeatureError(
            f"{path}: claims {shape[0]:,} x {shape[1]:,} numbers, which it does not contain; create it again"
        )
    rows = tensor if axis is None else tensor.squeeze(axis)
    half = tensor.dtype == torch.float16

    def read(start: int, stop: int) -> NDArray[Any]:
        block = rows[start:stop]
        return (block if half else block.float()).numpy()

    return FeatureRows(path, shape, np.dtype(np.float16 if half else np.float32), read)


# NumPy


@contextmanager
def _member(
    path: Path, archive: zipfile.ZipFile, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """Provide (stream of the numbers, shape, type) of an array, which must not contain objects."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > MAX_UNPACKED and info.file_size > MOST_PACKED * info.compress_size:
        raise FeatureError(
            f"{path}: {name} is {info.file_size:,} bytes in {info.compress_size:,}, which is not plausible for "
            "features; create it again"
        )
    with archive.open(info) as stream:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        version = np.lib.format.read_magic(stream)
        if version not in read:
            raise FeatureError(f"{path}: {name} is of an unknown version of NumPy's format")
        shape, by_columns, dtype = read[version](stream)
        if dtype.kind not in "fiu" or (by_columns and len(shape) > 1):
            raise FeatureError(f"{path}: {name} holds {quoted(str(dtype))}, expected plain numbers, row by row")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > info.file_size:
            raise FeatureError(f"{path}: {name} claims {shape}, which the file does not contain; create it again")
        yield stream, shape, dtype


def numpy_vector(path: Path, archive: zipfile.ZipFile, name: str) -> NDArray[np.float64]:
    """Read a number for each patch, or one for all."""
    with _member(path, archive, name) as (stream, shape, dtype):
        if len(shape) > 1 or math.prod(shape) > MAX_PATCHES:
            raise FeatureError(f"{path}: {name} has shape {shape}, expected a number for each patch")
        data = stream.read(math.prod(shape) * dtype.itemsize)
        stream.read(1)  # at the end the checksum is compared
    return np.frombuffer(data, dtype, count=math.prod(shape)).astype(np.float64)


def numpy_rows(path: Path, archive: zipfile.ZipFile, opened: ExitStack) -> FeatureRows:
    """Return features through a temporary file, because compressed ones can only be read from first to last."""
    with _member(path, archive, "features") as (stream, stored, dtype):
        shape, _ = _two_axes(path, stored)
        if dtype.kind != "f":
            raise FeatureError(f"{path}: features are {dtype}, expected floating point numbers")
        size = math.prod(shape) * dtype.itemsize
        if shutil.disk_usage(tempfile.gettempdir()).free < size:
            raise FeatureError(
                f"{path}: no {size:,} bytes for a temporary file; free some, or write features as h5 or pt"
            )
        file = opened.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - open as long as the features are
        left = size
        while left and (data := stream.read(min(left, COPY_BYTES))):
            file.write(data)
            left -= len(data)
        stream.read(1)  # at the end the checksum is compared
    if left:
        raise FeatureError(f"{path}: the features are truncated; create them again")
    file.flush()
    rows: NDArray[Any] = np.memmap(file, dtype, "r", shape=shape) if size else np.zeros(shape, dtype)
    return FeatureRows(path, shape, dtype, lambda start, stop: rows[start:stop], file.close)
