"""Feature files written as the programs that make them write them, on slides with one patch that differs.

Facts of the formats are those of TRIDENT's `trident/IO.py` and `WSIPatcher.py`, CLAM's `wsi_core/WholeSlideImage.py`
and `extract_features_fp.py`, STAMP's `preprocessing/tiling.py` and `__init__.py`, AtlasPatch's `services/extraction.py`
and `storage.py`, and the `artifacts.py` and `tiling/io.py` of slide2vec and hs2p.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from wsi_gradcam.mil.features import SlideFrame

Xy = NDArray[np.int64]
DIMENSIONS = 8
MPP = 0.2627
MARK = 7.0  # the first number of the marked patch's vector; 0 in all others


@dataclass(frozen=True)
class Made:
    """What was written.

    Attributes:
        folder: of the features.
        xy: where patches really lie, level-0 px.
        side: of a patch, as it was really read, level-0 px.
        marked: the number of the patch that differs.
    """

    folder: Path
    xy: Xy
    side: float
    marked: int


def frame(height: int = 9_000, width: int = 14_000, mpp: float = MPP) -> SlideFrame:
    """Return a slide that is no square."""
    return SlideFrame("a.svs", (height, width), (mpp, mpp), ((1.0, 1.0), (4.0, 4.0)))


def vectors(count: int, marked: int, dtype: Any = np.float32) -> NDArray[Any]:
    """Return features [N, D], of which one says where the marker is."""
    found = np.random.default_rng(0).normal(size=(count, DIMENSIONS)).astype(dtype)
    found[:, 0] = 0
    found[marked, 0] = MARK
    return found


def lattice(slide: SlideFrame, step: float, columns: int = 12, rows: int = 9, begin: tuple[int, int] = (0, 0)) -> Xy:
    """Return x, y of patches that begin inside the slide, column by column, as most programs order them."""
    xs = [round(begin[0] + i * step) for i in range(columns)]
    ys = [round(begin[1] + i * step) for i in range(rows)]
    found = [(x, y) for x in xs for y in ys if x < slide.shape[1] and y < slide.shape[0] and (x + y) % 5 != 3]
    return np.array(found, np.int64)


def _growing(file: h5py.File, name: str, data: NDArray[Any], rows: int, marks: Mapping[str, Any] | None = None) -> None:
    shape = data.shape
    dataset = file.create_dataset(
        name, shape=shape, maxshape=(None, *shape[1:]), chunks=(rows, *shape[1:]), dtype=data.dtype
    )
    dataset[:] = data
    for key, value in (marks or {}).items():
        dataset.attrs[key] = value


def trident(folder: Path, slide: SlideFrame, *, overlap: int = 0, batched: bool = False) -> Made:
    """256 px at 20x of a slide whose magnification was rounded to 40x."""
    assert slide.mpp is not None
    magnification = 40
    down = (10 / 20) / (10 / magnification)
    side, shared = round(256 * down), round(overlap * down)

    def along(i: int) -> int:  # the second patch does not overlap the first: so it is written
        return i * side - shared * max(i - 1, 0)

    xy = np.array([(along(i), along(j)) for i in range(13) for j in range(9)], np.int64)
    xy = xy[(xy[:, 0] < slide.shape[1]) & (xy[:, 1] < slide.shape[0]) & (xy.sum(axis=1) % 7 != 3)]
    marks = {
        "patch_size": 256,
        "patch_size_level0": 256 * magnification // 20,
        "level0_magnification": magnification,
        "target_magnification": 20,
        "overlap": overlap,
        "name": "a",
        "savetodir": "out",
        "level0_width": slide.shape[1],
        "level0_height": slide.shape[0],
    }
    features = vectors(len(xy), 40)
    place = folder / "20x_256px" / "features_uni_v1"
    place.mkdir(parents=True)
    with h5py.File(place / "a.h5", "w") as file:
        _growing(file, "features", features[None] if batched else features, 1, {"name": "a", "encoder": "uni_v1"})
        _growing(file, "coords", xy, 1, marks)
    (place.parent / "patches").mkdir()
    with h5py.File(place.parent / "patches" / "a_patches.h5", "w") as file:
        _growing(file, "coords", xy, 1, marks)
    return Made(folder, xy, side, 40)


def clam_patches(path: Path, slide: SlideFrame, xy: Xy, size: int, level: int = 0, **more: Any) -> None:
    """Write where patches lie, as CLAM's `create_patches_fp.py` does."""
    factor = slide.downsamples[level][1]
    stored = (int(slide.shape[1] / factor), int(slide.shape[0] / factor))
    marks = {
        "patch_size": size,
        "patch_level": level,
        "downsample": (factor, factor),
        "downsampled_level_dim": stored,
        "level_dim": stored,
        "name": "a",
        "save_path": "out",
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        _growing(file, "coords", xy, 32, marks)


def clam(folder: Path, slide: SlideFrame, *, overlap: int = 0, level: int = 0, only: str = "") -> Made:
    """256 px of a level, from contours with lattices of their own."""
    factor = round(slide.downsamples[level][1])
    step = (256 - overlap) * factor
    two = lattice(slide, step, 5, 6, (301, 77)), lattice(slide, step, 4, 5, (5_113 if level == 0 else 7_013, 2_221))
    xy = np.concatenate(two)
    features = vectors(len(xy), 11)
    clam_patches(folder / "patches" / "a.h5", slide, xy, 256, level)
    if only != "pt":
        (folder / "h5_files").mkdir()
        with h5py.File(folder / "h5_files" / "a.h5", "w") as file:
            _growing(file, "features", features, 32)
            _growing(file, "coords", xy.astype(np.int32), 32)
    if only != "h5":
        (folder / "pt_files").mkdir()
        torch.save(torch.from_numpy(features), folder / "pt_files" / "a.pt")
    return Made(folder, xy, 256 * factor, 11)


def stamp(folder: Path, slide: SlideFrame, *, side_um: float = 256.0, old: bool = False) -> Made:
    """Tiles of areas of 1,024 px at most, each a whole number of pixels; micrometres by the width of a pixel."""
    assert slide.mpp is not None
    mpp = slide.mpp[1]
    tiles = max(int(1024 * mpp // side_um), 1)
    side = math.ceil(side_um / mpp)
    where, micrometres = [], []
    for y in range(0, slide.shape[0], side * tiles):
        for x in range(0, slide.shape[1], side * tiles):
            for j in range(tiles):
                for i in range(tiles):
                    where.append((x + i * side, y + j * side))
                    micrometres.append((x * mpp + i * side_um, y * mpp + j * side_um))
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / "a.h5", "w") as file:
        file["coords"] = np.array(micrometres, np.float32)
        file["feats"] = vectors(len(where), 23, np.float16)
        file.attrs["stamp_version"] = "2.0.1" if old else "2.3.0"
        file.attrs["extractor"] = "uni2"
        file.attrs["unit"] = "um"
        file.attrs["tile_size" if old else "tile_size_um"] = side_um
        if not old:
            file.attrs["tile_size_px"] = 224
            file.attrs["feat_type"] = "tile"
    return Made(folder, np.array(where, np.int64), side, 23)


def atlas(
    folder: Path, slide: SlideFrame, *, overlap: int = 0, level: int = 0, names: tuple[str, ...] = ("uni_v1",)
) -> Made:
    """256 px at 10x of 40x; width and height in the rows are pixels of the level that is read."""
    side, step = 1024, (256 - overlap) * 4
    xy = lattice(slide, step, begin=(130, 61))
    read = round(side / slide.downsamples[level][1])
    rows = np.concatenate([xy, np.full((len(xy), 2), read), np.full((len(xy), 1), level)], axis=1).astype(np.int32)
    (folder / "patches").mkdir(parents=True)
    with h5py.File(folder / "patches" / "a.h5", "w") as file:
        _growing(file, "coords", rows, 8192)
        _growing(file, "passports", np.array([b"a__x0"] * len(xy), "S160"), 8192)
        for key, value in {
            "patch_size": 256,
            "patch_size_level0": 256 * 40 // 10,
            "level0_magnification": 40,
            "target_magnification": 10,
            "overlap": overlap,
            "level0_width": slide.shape[1],
            "level0_height": slide.shape[0],
            "wsi_path": "/slides/a.svs",
            "num_patches": len(xy),
        }.items():
            file.attrs[key] = value
        for number, name in enumerate(names):
            data = vectors(len(xy), 31)[:, : DIMENSIONS - number]
            _growing(file.require_group("features"), name, data, 32)
    return Made(folder, xy, side, 31)


def slide2vec(
    folder: Path, slide: SlideFrame, *, overlap: float = 0.0, old: bool = False, packed: bool = False
) -> Made:
    """224 px at 0.5 um, as near to it as the slide's pixels allow."""
    side = round(224 * 0.5 / MPP)
    step = round(side * (1 - overlap))
    xy = lattice(slide, step, begin=(40, 20))
    features = vectors(len(xy), 17)
    (folder / "tiles").mkdir(parents=True)
    (folder / "tile_embeddings").mkdir()
    numbers = np.arange(len(xy), dtype=np.int32)
    if packed:
        np.savez_compressed(folder / "tile_embeddings" / "a.npz", features=features, tile_index=numbers)
    else:
        torch.save(torch.from_numpy(features), folder / "tile_embeddings" / "a.pt")
    about = {"sample_id": "a", "artifact_type": "tile_embeddings", "num_tiles": len(xy), "tile_size_lv0": side}
    (folder / "tile_embeddings" / "a.meta.json").write_text(json.dumps(about))
    x, y = ("x_lv0", "y_lv0") if old else ("x", "y")
    arrays: dict[str, Any] = {"tile_index": numbers, x: xy[:, 0], y: xy[:, 1]}
    np.savez_compressed(folder / "tiles" / "a.coordinates.npz", **arrays)
    tiling = {"tile_size_lv0": side, "step_px_lv0": step, "overlap": overlap, "n_tiles": len(xy)}
    if old:
        described: dict[str, Any] = {"sample_id": "a", "tile_size_lv0": side, "overlap": overlap}
    else:
        described = {
            "slide": {"dimensions": [slide.shape[1], slide.shape[0]], "base_spacing_um": MPP},
            "tiling": tiling,
            "artifact": {"coordinate_space": "level0_px", "tile_order": "x_then_y"},
        }
    (folder / "tiles" / "a.coordinates.meta.json").write_text(json.dumps(described))
    return Made(folder, xy, side, 17)


WRITERS: dict[str, Callable[[Path, SlideFrame], Made]] = {
    "trident": trident,
    "trident, overlap": lambda folder, slide: trident(folder, slide, overlap=64),
    "trident, one batch": lambda folder, slide: trident(folder, slide, batched=True),
    "clam": clam,
    "clam, overlap": lambda folder, slide: clam(folder, slide, overlap=128),
    "clam, second level": lambda folder, slide: clam(folder, slide, level=1),
    "clam, h5": lambda folder, slide: clam(folder, slide, only="h5"),
    "clam, pt": lambda folder, slide: clam(folder, slide, only="pt"),
    "stamp": stamp,
    "stamp 2.0": lambda folder, slide: stamp(folder, slide, old=True),
    "stamp, small tiles": lambda folder, slide: stamp(folder, slide, side_um=112.0),
    "atlas": atlas,
    "atlas, overlap": lambda folder, slide: atlas(folder, slide, overlap=64),
    "atlas, second level": lambda folder, slide: atlas(folder, slide, level=1),
    "slide2vec": slide2vec,
    "slide2vec, overlap": lambda folder, slide: slide2vec(folder, slide, overlap=0.25),
    "slide2vec, old": lambda folder, slide: slide2vec(folder, slide, old=True),
    "slide2vec, npz": lambda folder, slide: slide2vec(folder, slide, packed=True),
}
