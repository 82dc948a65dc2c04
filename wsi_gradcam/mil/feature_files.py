"""Files of feature vectors: those of TRIDENT, CLAM, STAMP, AtlasPatch and slide2vec are read, the first two written.

A format is recognised by a file's content. Files are untrusted: none of their code runs, links that lead out of a file
are not followed, and their claims are compared with their content before it is read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import (
    ConfigError,
    DocumentError,
    FeatureError,
    MissingExtraError,
    from_extra,
    is_out_of_memory,
    one_line,
)
from wsi_gradcam.io.documents import MAX_BYTES, open_zip, read_json
from wsi_gradcam.io.local import check_regular, read_file
from wsi_gradcam.io.paths import StoragePathLike, storage_path
from wsi_gradcam.mil.feature_arrays import (
    COORDINATES,
    H5,
    MAX_ALIKE,
    NUMPY,
    TORCH,
    FeatureFolder,
    FeatureRows,
    Marks,
    h5_coordinates,
    h5_dataset,
    h5_node,
    h5_rows,
    names_of,
    numpy_rows,
    numpy_vector,
    torch_rows,
)
from wsi_gradcam.mil.features import (
    MICROMETRES,
    NAME,
    PIXELS,
    Claims,
    FeatureBag,
    Settled,
    SlideFrame,
    place_patches,
)
from wsi_gradcam.slides.base import content_digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

STAMP_EDGE_PX = 1024  # px of the areas that STAMP cuts into tiles; those at the slide's edges may reach beyond
BLOCK = 4096  # patches that are copied at a time


def open_features(
    place: FeatureFolder | str | os.PathLike[str],
    slide: SlideFrame,
    *,
    patch_um: float | None = None,
    unit: str | None = None,
    axes: str | None = None,
    name: str | None = None,
    dimensions: int | None = None,
    tissue: NDArray[np.bool_] | None = None,
) -> FeatureBag:
    """Open the features of a slide; they stay in their file until they are needed.

    Args:
        place: a folder of features, or a file; a `FeatureFolder` for many slides.
        slide: the slide to which they belong.
        patch_um, unit, axes, name: see `Settled`.
        dimensions: the required length of feature vectors; if files contain several, those of this length are used.
        tissue: mask of the whole slide, see `place_patches`.

    Raises:
        FeatureError: there are no such features, or several, or they are damaged, or their positions on the slide are
            unknown.
        ConfigError: a setting makes no sense.
    """
    settled = Settled(patch_um, unit, axes, name)
    folder = place if isinstance(place, FeatureFolder) else FeatureFolder(place)
    files = folder.files_of(slide.id)
    if len(files) > MAX_ALIKE:
        raise FeatureError(f"{folder.place}: {len(files)} files are named like {slide.id}; give a smaller folder")
    with ExitStack() as opened:
        parts = [part for file in files for part in _look(file, slide, settled, opened)]
        chosen = _with_features(folder, slide, parts, settled, dimensions)
        placed = _with_coordinates(chosen, parts)
        assert chosen.features is not None
        assert placed.coordinates is not None
        boxes, notes = place_patches(placed.path, placed.coordinates, placed.claims, slide, settled, tissue)
        source = f"{placed.claims.format}, {chosen.path}"
        digest = _digest((chosen.path, placed.path), boxes)
        opened.pop_all()
    for part in parts:
        if part.features is not None and part.path != chosen.path:
            part.features.close()
    return FeatureBag(chosen.features, boxes, source, notes, digest)


@dataclass(frozen=True)
class _Part:
    """Features, coordinates, or both, of a file."""

    path: Path
    features: FeatureRows | None = None
    coordinates: NDArray[np.float64] | None = None
    claims: Claims = field(default_factory=lambda: Claims("coordinates"))
    name: str = ""
    problem: str = ""


def _with_features(
    folder: FeatureFolder, slide: SlideFrame, parts: Sequence[_Part], settled: Settled, dimensions: int | None
) -> _Part:
    """Return the one part with the intended features."""
    found = [part for part in parts if part.features is not None and settled.name in (None, part.name or None)]
    if not found:
        named = f" named {settled.name}" if settled.name else ""
        known = ", ".join(part.name or part.problem for part in parts if part.name or part.problem)[:200]
        raise FeatureError(
            f"{parts[0].path if parts else folder.place}: no features{named} of "
            f"{slide.id}{f', but {known}' if known else ''}; expected features [N, D] beside coords [N, 2]"
        )
    if dimensions is not None:
        fitting = [part for part in found if part.features is not None and part.features.shape[1] == dimensions]
        if not fitting:
            sizes = ", ".join(str(part.features.shape[1]) for part in found if part.features is not None)
            raise FeatureError(f"{found[0].path}: features of {sizes} dimensions, but the model takes {dimensions}")
        found = fitting
    if len(found) > 1 and len({part.path.parent.parent for part in found}) == 1:  # CLAM writes h5 and pt
        twins = {part.path.parent.name for part in found} == {"h5_files", "pt_files"}
        found = [part for part in found if part.path.suffix in H5] if twins else found
    if len(found) > 1:
        inside = len({part.path for part in found}) == 1
        shown = ", ".join(part.name if inside else str(part.path) for part in found)[:400]
        how = f"choose with {NAME}" if inside else "give the folder of only one"
        raise FeatureError(f"{slide.id}: several sets of features ({shown}); {how}")
    return found[0]


def _with_coordinates(chosen: _Part, parts: Sequence[_Part]) -> _Part:
    """Return the part that has the positions of the chosen features' patches, their own coordinates first."""
    assert chosen.features is not None
    count = len(chosen.features)
    placed = [part for part in parts if part.coordinates is not None]
    placed.sort(key=lambda part: (part.path != chosen.path, not part.claims.sides))
    if not placed:
        raise FeatureError(
            f"{chosen.path}: features without the coordinates of their patches; expected coords beside them, or the "
            "file of coordinates in the same folder (patches/NAME.h5 of CLAM or TRIDENT)"
        )
    fitting = [part for part in placed if part.coordinates is not None and len(part.coordinates) == count]
    if not fitting or (placed[0].path == chosen.path and placed[0] is not fitting[0]):
        rows = len(placed[0].coordinates) if placed[0].coordinates is not None else 0
        raise FeatureError(f"{placed[0].path}: {rows:,} coordinates for {count:,} feature vectors; create them again")
    first = fitting[0]
    same = [part for part in fitting if np.array_equal(_numbers(part), _numbers(first))]
    if len(same) < len(fitting) and first.path != chosen.path:
        raise FeatureError(
            f"{chosen.path}: {len(fitting)} files contradict each other about the positions of its patches; keep one"
        )
    telling = next((part for part in same if part.claims.sides), first)
    return first if first.claims.sides else replace(telling, coordinates=first.coordinates)


def _numbers(part: _Part) -> NDArray[np.float64]:
    return part.coordinates if part.coordinates is not None else np.zeros((0, 2))


def _digest(paths: Collection[Path], boxes: NDArray[np.float64]) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(boxes).tobytes())
    for path in dict.fromkeys(paths):
        digest.update(content_digest(path).encode())
    return digest.hexdigest()[:32]


def _look(path: Path, slide: SlideFrame, settled: Settled, opened: ExitStack) -> Iterator[_Part]:
    """Yield the parts of a file; `opened` releases it."""
    try:
        check_regular(path)
        if path.suffix.lower() in H5:
            parts = list(_look_h5(path, slide, opened))
        elif path.suffix.lower() == TORCH:
            parts = [_Part(path, torch_rows(path))]
        else:
            parts = [_look_numpy(path, opened)]
    except (FeatureError, MissingExtraError):
        raise
    except DocumentError as error:
        raise FeatureError(f"{path}: what lies beside it cannot be read: {one_line(error)}") from error
    except Exception as error:  # damaged files raise struct, index, unicode, zlib and many other errors
        if is_out_of_memory(error):
            raise
        raise FeatureError(f"{path}: cannot be read: {one_line(error)}; is it damaged? create it again") from error
    yield from parts


# HDF5


def _look_h5(path: Path, slide: SlideFrame, opened: ExitStack) -> Iterator[_Part]:
    with from_extra("features", f"{path}: HDF5"):
        import h5py

    file = h5py.File(path, "r", locking=False)
    opened.callback(file.close)
    columns = h5_coordinates(path, file)
    marks = Marks([file, *([file["coords"]] if columns is not None else [])])
    claims = _claims(columns, marks, slide)
    coordinates = None if columns is None else columns[:, :2]
    kind = marks.text("feat_type")
    features = list(_h5_features(path, file))
    of_slide = kind not in ("", "tile") or any(len(dataset.shape) == 1 for _, dataset in features)
    if not features or of_slide:
        file.close()
        yield _Part(path, None, coordinates, claims, problem=f"features of a {kind or 'slide'}" if features else "")
        return
    for name, dataset in features:
        yield _Part(path, h5_rows(path, dataset, file.close), coordinates, claims, name)


def _h5_features(path: Path, file: Any) -> Iterator[tuple[str, Any]]:
    """Yield the datasets of features and their names, which are "" if a file has only one."""
    import h5py

    for name in ("features", "feats"):
        if name not in file:
            continue
        node = h5_node(path, file, name)
        if isinstance(node, h5py.Dataset):
            yield "", h5_dataset(path, node)
            return
        for inner in sorted(node)[:MAX_ALIKE]:
            if isinstance(dataset := h5_node(path, node, inner), h5py.Dataset):
                yield inner, h5_dataset(path, dataset)
        return


def _claims(columns: NDArray[np.float64] | None, marks: Marks, slide: SlideFrame) -> Claims:
    """Return what attributes claim, by the rules of the format that has such attributes."""
    if columns is None:
        return Claims("coordinates")
    if "tile_size_um" in marks or ("tile_size" in marks and marks.text("unit").lower() in MICROMETRES):
        return _stamp(marks)
    if columns.shape[1] == 5 or "patch_size_level0" in marks or "level0_magnification" in marks:
        return _trident(columns, marks, slide)
    if "patch_level" in marks:
        return _clam(marks, slide)
    return Claims("coordinates", _unit(marks))


def _unit(marks: Marks) -> str | None:
    unit = marks.text("unit").strip().lower()
    return "um" if unit in MICROMETRES else "px" if unit in PIXELS else None


def _square(*sides: float | None) -> tuple[NDArray[np.float64], ...]:
    return tuple(np.array([side, side], np.float64) for side in sides if side)


def _stamp(marks: Marks) -> Claims:
    side = marks.number("tile_size_um") or marks.number("tile_size")
    unit = (_unit(marks) or "um") if not marks.text("unit") or _unit(marks) else None
    return Claims("STAMP", unit, _square(side), overlap=0.0, square_mpp=True, side_unit="um", beyond_px=STAMP_EDGE_PX)


def _trident(columns: NDArray[np.float64], marks: Marks, slide: SlideFrame) -> Claims:
    """Return the claims of TRIDENT, and of AtlasPatch, which has its attributes elsewhere."""
    size, level0, target = (marks.number(n) for n in ("patch_size", "level0_magnification", "target_magnification"))
    by_magnification = size * level0 / target if size and level0 and target else None
    sides = _square(marks.number("patch_size_level0"), by_magnification)
    if columns.shape[1] == 5:
        sides = _of_rows(columns, slide, sides)
    overlap, nominal = marks.number("overlap"), size * 10 / target if size and target else None
    share = overlap / size if size and overlap is not None and overlap < size else None
    width, height = marks.number("level0_width"), marks.number("level0_height")
    return Claims(
        "AtlasPatch" if columns.shape[1] == 5 else "TRIDENT",
        _unit(marks) or "px",
        sides,
        share,
        nominal,
        (int(width), int(height)) if width and height else None,
    )


def _of_rows(
    columns: NDArray[np.float64], slide: SlideFrame, stated: tuple[NDArray[np.float64], ...]
) -> tuple[NDArray[np.float64], ...]:
    """Return the possible sizes of patches if each has (width, height) in pixels of the level it was read from."""
    levels = columns[:, 4].astype(int)
    known = len(columns) > 0 and levels.min() >= 0 and levels.max() < len(slide.downsamples)
    if not known or (stated and levels.any()):  # sizes in coarser pixels are rounded: stated ones are truer
        return stated
    factors = np.array(slide.downsamples)[levels][:, ::-1]
    sides = columns[:, 2:4] * factors
    uneven = (sides != sides[0]).any()
    return (sides,) if uneven else (*stated, sides[0])


def _clam(marks: Marks, slide: SlideFrame) -> Claims:
    size, factors = marks.number("patch_size"), marks.numbers("downsample")
    factor = np.array((*factors, *factors)[:2]) if factors else None
    side = None if size is None or factor is None else size * factor
    # By which some versions multiply the size, while in others it is already multiplied.
    again = marks.number("custom_downsample") or 1.0
    sides = () if side is None else (side,) if again == 1 else (side, side * again)
    stated, pixels = marks.numbers("downsampled_level_dim"), None
    if len(stated) == 2 and factor is not None:
        whole, actual = np.array(stated) * factor, np.array(slide.shape[::-1])
        near = np.abs(whole - actual) <= 2 * factor  # in whole pixels of the level
        pixels = (int(actual[0]), int(actual[1])) if near.all() else (round(whole[0]), round(whole[1]))
    return Claims("CLAM", "px", sides, slide_px=pixels, by_columns=True)


# NumPy


def _look_numpy(path: Path, opened: ExitStack) -> _Part:
    """Return the features or the coordinates in a file of slide2vec."""
    with open_zip(path) as archive:
        names = {info.filename.removesuffix(".npy") for info in archive.infolist()[:MAX_ALIKE]}
        x, y = (next((n for n in (axis, f"{axis}_lv0") if n in names), None) for axis in "xy")
        if x and y:
            xy = np.stack([numpy_vector(path, archive, x), numpy_vector(path, archive, y)], axis=1)
            side = numpy_vector(path, archive, "tile_size_lv0") if "tile_size_lv0" in names else None
            return _Part(path, None, xy, _slide2vec(path, side, len(xy)))
        if "features" not in names:
            raise FeatureError(f"{path}: neither features nor coordinates x and y; expected files of slide2vec")
        return _Part(path, numpy_rows(path, archive, opened))


def _slide2vec(path: Path, side: NDArray[np.float64] | None, count: int) -> Claims:
    """Return the claims of the descriptions beside the coordinates and beside the features."""
    about: dict[str, Any] = {}
    stem = path.name.removesuffix(NUMPY)
    name = stem.removesuffix(COORDINATES)
    root = path.parent.parent
    for place in (root / "tile_embeddings" / f"{name}.meta.json", path.parent / f"{stem}.meta.json"):
        if place.is_file():
            about |= _flat(read_json(read_file(place, MAX_BYTES)))
    sides = () if side is None else (np.repeat(np.broadcast_to(side, (count,))[:, None], 2, axis=1),)
    size, step, overlap = (_positive(about.get(key)) for key in ("tile_size_lv0", "step_px_lv0", "overlap"))
    share = 1 - step / size if step and size else overlap
    return Claims(
        "slide2vec",
        "px" if about.get("coordinate_space", "level0_px") == "level0_px" else None,
        sides or _square(size),
        share if share is not None and 0 <= share < 1 else None,
        slide_px=_pair(about.get("dimensions")),
        by_columns=True,
    )


def _flat(value: Any) -> dict[str, Any]:
    """Return the entries of a document and of its sections."""
    if not isinstance(value, dict):
        return {}
    return value | {key: each for inner in value.values() if isinstance(inner, dict) for key, each in inner.items()}


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else None


def _pair(value: Any) -> tuple[int, int] | None:
    match value:
        case [int(width), int(height)] if width > 0 and height > 0:
            return width, height
    return None


# Exports


def write_trident(
    place: StoragePathLike,
    features: Any,
    boxes: NDArray[np.float64],
    slide: SlideFrame,
    *,
    patch_px: int,
    stride_px: int,
    mpp: float,
    encoder: str,
) -> None:
    """Write features as TRIDENT does, atomically and with the same bytes each time.

    Magnifications are 10 um divided by the actual pixel size, not rounded, so that readers that compute the size of
    patches from them get the true one.

    Args:
        place: the file.
        features: [N, D], read by slices.
        boxes: float64 [N, 4] as in `FeatureBag`.
        slide: the slide, of known pixel size.
        patch_px, stride_px: side of a patch, and distance to the next, in the encoder's pixels.
        mpp: micrometres per pixel of the encoder.
        encoder: its name.

    Raises:
        ConfigError: patches are not squares of one size, as the format requires.
        StoreError: the file cannot be written.
    """
    side = _one_side(boxes, "TRIDENT")
    name = names_of(slide.id)[0]
    marks = {
        "patch_size": patch_px,
        "patch_size_level0": round(side),
        "level0_magnification": _whole(patch_px and side * 10 / (patch_px * mpp)),
        "target_magnification": _whole(10 / mpp),
        "overlap": patch_px - stride_px,
        "name": name,
        "savetodir": "",
        "level0_width": slide.shape[1],
        "level0_height": slide.shape[0],
    }
    about = {"name": name, "savetodir": "", "encoder": encoder}
    _write(place, features, boxes, np.dtype(np.int64), features.dtype, {"features": about, "coords": marks})


def write_clam(place: StoragePathLike, features: Any, boxes: NDArray[np.float64], slide: SlideFrame) -> None:
    """Write features as CLAM does, in float32, atomically and with the same bytes each time.

    CLAM keeps the positions of patches in a separate file. Here both are in one file, which it reads as either.

    Args, Raises: as for `write_trident`.
    """
    side = round(_one_side(boxes, "CLAM"))
    size = slide.shape[::-1]
    marks = {
        "patch_size": side,
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        "downsampled_level_dim": size,
        "level_dim": size,
        "name": names_of(slide.id)[0],
        "save_path": "",
    }
    _write(place, features, boxes, np.dtype(np.int32), np.dtype(np.float32), {"coords": marks})


def _one_side(boxes: NDArray[np.float64], format_name: str) -> float:
    sides = boxes[:, 2:]
    if len(sides) and np.abs(sides - sides[0, 0]).max() > 1:
        raise ConfigError(
            f"{format_name}'s files support only square patches of one size, which these are not; use the other format"
        )
    return float(sides[0, 0]) if len(sides) else 0.0


def _whole(value: float) -> float | int:
    return round(value) if abs(value - round(value)) < 1e-6 else value


def _write(
    place: StoragePathLike,
    features: Any,
    boxes: NDArray[np.float64],
    integer: np.dtype[Any],
    real: np.dtype[Any],
    marks: Mapping[str, Mapping[str, Any]],
) -> None:
    with from_extra("features", f"{place}: HDF5"):
        import h5py

    count, dimensions = features.shape
    with tempfile.TemporaryFile() as scratch:  # HDF5 seeks back and forth in it
        with h5py.File(scratch, "w") as file:
            rows = file.create_dataset(
                "features", (count, dimensions), real, maxshape=(None, dimensions), chunks=(32, dimensions)
            )
            for start in range(0, count, BLOCK):
                rows[start : start + BLOCK] = features[start : start + BLOCK]
            xy = np.round(boxes[:, 1::-1]).astype(integer)
            places = file.create_dataset("coords", (count, 2), integer, maxshape=(None, 2), chunks=(32, 2))
            places[...] = xy
            for name, dataset in (("features", rows), ("coords", places)):
                for key, value in marks.get(name, {}).items():
                    dataset.attrs[key] = value
        scratch.seek(0)
        with storage_path(place).atomic_writer() as target:
            shutil.copyfileobj(scratch, target, 1 << 20)
