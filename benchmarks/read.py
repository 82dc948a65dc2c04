"""Patches read per second: ours, OpenSlide, tifffile's zarr store, fastslide, and the bare decoding of the tiles.

One slide of real tissue in tiles of 256 px, in JPEG and in JPEG 2000; 256 patches of 256 px in working order, on the
grid of the tiles (aligned) and off it (unaligned), at the slide's own mpp and resampled by 2 and by 1.37. Every side
begins each turn with an open file and empty caches, and works in as many threads. They take turns; a figure is the
median over the rounds, a ratio is our patches per second over theirs.

| ratio | theirs |
|---|---|
| `fast_over_openslide_CODEC_GRID` | `read_region`, without alpha; resampled by Pillow as ours |
| `fast_over_aszarr_CODEC_GRID` | `tifffile.imread(aszarr=True)` through zarr, at the slide's own mpp |
| `fast_over_fastslide_CODEC_GRID` | the package fastslide where it is installed, at the slide's own mpp |
| `fast_over_bare_decode_CODEC_GRID` | each tile that the patches touch, decoded once and thrown away: the limit |

Ratios whose names end in `_scaled` are of `--decode scaled`, at another mpp than the slide's own.

`ms_per_patch` says where a patch's time goes: disk, decode, filter, and the rest, which is Python and copies of pixels.

On a machine that others use too, `--clock cpu` counts the seconds that this process computes.

`--slide FILE` measures a slide of your own instead, in TIFF, in patches of the size of its tiles. It should have no
level of half its size, which would be read instead of its first.

    python benchmarks/read.py [--threads 1] [--rounds 7] [--clock wall] [--slide FILE] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
import torch  # noqa: F401 - as in `explain`, which resamples by it
import zarr
from numpy.typing import NDArray
from PIL import Image
from skimage.data import immunohistochemistry

sys.path.insert(0, str(Path(__file__).parents[1]))
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide, read_region, with_reductions
from wsi_gradcam.slides import resample as resample_module
from wsi_gradcam.slides.base import LocalFile
from wsi_gradcam.slides.tiff_levels import TiffLevel, tiff_levels

TILE_PX = 256
MPP = 0.25
CODECS = {"jpeg": "jpeg", "jpeg2000": "aperio_jp2000_rgb"}
GRIDS = {"aligned": 0, "unaligned": 100}
SCALES = {"": 1.0, "_by_2": 2.0, "_by_1.37": 1.37}

Place = tuple[int, int]
Read = Callable[[int, int], NDArray[np.uint8]]
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Case:
    """Patches of a slide: level-0 (y, x) of their corners, level-0 px per patch px, their side, and the slide's mpp."""

    path: Path
    places: list[Place]
    scale: float
    px: int = TILE_PX
    mpp: float = MPP

    @property
    def side(self) -> int:
        """Side of a patch in level-0 px, rounded up."""
        return int(np.ceil(self.px * self.scale))


def write_slide(path: Path, codec: str, side: int) -> None:
    """Tissue of `side` px, mirrored from scikit-image's micrograph, in one level that all sides can read."""
    micrograph = immunohistochemistry()
    pair = np.concatenate([micrograph, micrograph[:, ::-1]], axis=1)
    four = np.concatenate([pair, pair[::-1]])
    repeats = -(-side // len(four))
    description = f"Aperio Image Library v1.0.0\n{side}x{side} (256x256)|AppMag = 40|MPP = {MPP}"
    tifffile.imwrite(
        path,
        np.tile(four, (repeats, repeats, 1))[:side, :side],
        tile=(TILE_PX, TILE_PX),
        photometric="rgb",
        compression=CODECS[codec],
        compressionargs={"level": 85} if codec == "jpeg" else {"level": 40},
        description=description,
        metadata=None,
    )


@contextmanager
def ours(case: Case) -> Iterator[Read]:
    """The reader that `explain` uses."""
    slide = open_slide(case.path)
    slide.read_level(0, Region(0, 0, 1, 1))
    try:
        yield lambda y, x: read_region(slide, y, x, case.px, case.px, case.mpp * case.scale)
    finally:
        slide.close()


@contextmanager
def ours_scaled(case: Case) -> Iterator[Read]:
    """The same with `--decode scaled`."""
    slide = with_reductions(open_slide(case.path))
    slide.read_level(0, Region(0, 0, 1, 1))
    try:
        yield lambda y, x: read_region(slide, y, x, case.px, case.px, case.mpp * case.scale)
    finally:
        slide.close()


@contextmanager
def by_openslide(case: Case) -> Iterator[Read]:
    """OpenSlide, as most pipelines use it."""
    with openslide.OpenSlide(case.path) as slide:

        def read(y: int, x: int) -> NDArray[np.uint8]:
            pixels = slide.read_region((x, y), 0, (case.side, case.side)).convert("RGB")
            if case.scale != 1:
                box = (0, 0, case.px * case.scale, case.px * case.scale)
                pixels = pixels.resize((case.px, case.px), Image.Resampling.BILINEAR, box=box)
            return np.asarray(pixels)

        yield read


@contextmanager
def by_aszarr(case: Case) -> Iterator[Read]:
    """tifffile's own view of a file as an array; it keeps no tiles."""
    store = tifffile.imread(case.path, aszarr=True, series=0, level=0)
    try:
        array: Any = zarr.open(store, mode="r")
        yield lambda y, x: np.asarray(array[y : y + case.px, x : x + case.px])
    finally:
        store.close()


@contextmanager
def by_fastslide(case: Case) -> Iterator[Read]:
    """A rival in C++."""
    slide = importlib.import_module("fastslide").FastSlide.from_file_path(str(case.path))
    yield lambda y, x: np.asarray(slide.read_region((x, y), 0, (case.px, case.px)).numpy())


def bare_decode(case: Case, threads: int, clock: Clock) -> float:
    """Seconds to decode each tile that the patches touch, once."""
    with tifffile.TiffFile(case.path) as file:
        level = tiff_levels(file)[0]
    wanted = {
        at for y, x in case.places for at in level.tiles_of(_inside(Region(y, x, case.side, case.side), level.shown_px))
    }
    handle = os.open(case.path, os.O_RDONLY)

    def decode(at: Place) -> None:
        (index,) = level.pieces(*at)
        data = os.pread(handle, int(level.counts[index]), int(level.offsets[index]))
        level.decode_piece(data, index, jpegtables=level.jpegtables)

    try:
        with ThreadPoolExecutor(threads) as pool:
            started = clock()
            list(pool.map(decode, sorted(wanted)))
            return clock() - started
    finally:
        os.close(handle)


def _inside(region: Region, size: tuple[int, int]) -> Region:
    return region.intersect(Region(0, 0, *size))


SIDES: dict[str, Callable[[Case], Any]] = {
    "fast": ours,
    "scaled": ours_scaled,
    "openslide": by_openslide,
    "aszarr": by_aszarr,
    "fastslide": by_fastslide,
}


def seconds(side: str, case: Case, threads: int, clock: Clock) -> float:
    """Seconds that a side takes for all patches."""
    if side == "bare_decode":
        return bare_decode(case, threads, clock)
    with SIDES[side](case) as read, ThreadPoolExecutor(threads) as pool:
        started = clock()
        for patch in pool.map(lambda place: read(*place), case.places):
            assert patch.shape == (case.px, case.px, 3)
        return clock() - started


def sides_of(case: Case) -> list[str]:
    """The sides that can read a case."""
    plain = ["aszarr", *(["fastslide"] if find_spec("fastslide") else [])]
    return ["fast", "openslide", *(plain if case.scale == 1 else ["scaled"]), "bare_decode"]


def measure(case: Case, rounds: int, threads: int, clock: Clock) -> dict[str, float]:
    """Median patches per second of each side, taking turns, every other round backwards."""
    sides = sides_of(case)
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for i in range(rounds + 1):
        for side in sides if i % 2 == 0 else sides[::-1]:
            rate = len(case.places) / seconds(side, case, threads, clock)
            if i:  # the first round warms up
                rates[side].append(rate)
    return {side: statistics.median(values) for side, values in rates.items()}


@contextmanager
def timed(
    where: Any, name: str, spent: defaultdict[str, float], part: str, clock: Clock = time.perf_counter
) -> Iterator[None]:
    """Count the seconds that a function takes, by replacing it in the place where it is called from."""
    function = getattr(where, name)

    def counting(*args: Any, **options: Any) -> Any:
        started = clock()
        try:
            return function(*args, **options)
        finally:
            spent[part] += clock() - started

    setattr(where, name, counting)
    try:
        yield
    finally:
        setattr(where, name, function)


def parts(case: Case, side: str) -> dict[str, float]:
    """Milliseconds that a patch takes by part, in one thread, and the share that holds Python's lock.

    `disk`, `decode` and `filter` release it, but for a few microseconds each; the rest, copies of pixels among it,
    does not.
    """
    spent: defaultdict[str, float] = defaultdict(float)
    with (
        SIDES[side](case) as read,
        timed(TiffLevel, "decode", spent, "decode"),
        timed(LocalFile, "read_many", spent, "disk"),
        timed(resample_module, "resample", spent, "filter"),
        timed(resample_module, "shrink_framed", spent, "filter"),
    ):
        started = time.perf_counter()
        for place in case.places:
            read(*place)
        total = time.perf_counter() - started
    rest = total - sum(spent.values())
    found = {part: 1000 * value / len(case.places) for part, value in {**spent, "python": rest, "total": total}.items()}
    return {**found, "share_with_lock": rest / total}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures."""
    found: dict[str, Any] = {"ratios": {}, "patches_per_s": {}, "ms_per_patch": {}, "identical_to_openslide": {}}
    found["settings"] = {"threads": arguments.threads, "rounds": arguments.rounds, "tile_px": TILE_PX}
    found["settings"] |= {"clock": arguments.clock}
    for name, case in of_slide(arguments.slide) if arguments.slide else made(folder, 3 if arguments.quick else 16):
        rates = measure(case, arguments.rounds, arguments.threads, CLOCKS[arguments.clock])
        found["patches_per_s"][name] = rates
        theirs = {side: rate for side, rate in rates.items() if side not in ("fast", "scaled")}
        found["ratios"] |= {f"fast_over_{side}_{name}": rates["fast"] / rate for side, rate in theirs.items()}
        found["ms_per_patch"][name] = parts(case, "fast")
        if "scaled" in rates:
            found["ratios"] |= {f"fast_over_{side}_{name}_scaled": rates["scaled"] / r for side, r in theirs.items()}
            found["ms_per_patch"][f"{name}_scaled"] = parts(case, "scaled")
        if case.scale == 1:
            found["identical_to_openslide"][name] = _identical(case)
        print(name, {side: round(rate) for side, rate in rates.items()}, file=sys.stderr, flush=True)
    return found


def made(folder: Path, across: int) -> Iterator[tuple[str, Case]]:
    """Yield the cases of the slides that are made here, `across` by `across` patches each, with their names."""
    for codec in CODECS:
        path = folder / f"{codec}.svs"
        write_slide(path, codec, TILE_PX * (2 * across + 2))
        for grid, offset in GRIDS.items():
            for label, scale in SCALES.items():
                step = int(TILE_PX * scale)
                places = [(offset + step * r, offset + step * c) for r in range(across) for c in range(across)]
                yield f"{codec}_{grid}{label}", Case(path, places, scale)


def of_slide(path: Path) -> Iterator[tuple[str, Case]]:
    """Yield the cases of a slide in TIFF: patches of the size of its tiles, at most 16 by 16 from its middle."""
    with tifffile.TiffFile(path) as file:
        level = tiff_levels(file)[0]
    slide = open_slide(path)
    mpp = slide.info.mpp_yx[0]
    slide.close()
    px = level.tile_px[0]
    for grid, offset in GRIDS.items():
        for label, scale in SCALES.items():
            step = int(px * scale)
            inside = [(side - offset) // step for side in level.shown_px]
            counts = [min(16, count) for count in inside]
            first = [offset + step * ((count - kept) // 2) for count, kept in zip(inside, counts, strict=True)]
            places = [(first[0] + step * r, first[1] + step * c) for r in range(counts[0]) for c in range(counts[1])]
            yield f"slide_{grid}{label}", Case(path, places, scale, px, mpp)


def _identical(case: Case) -> bool:
    with ours(case) as fast, by_openslide(case) as slow:
        return all(np.array_equal(fast(*place), slow(*place)) for place in case.places)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="that read at once, on every side (default 1)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what counts the seconds (default wall)")
    parser.add_argument("--slide", type=Path, help="read this slide (TIFF) instead of the two that are made")
    parser.add_argument("--quick", action="store_true", help="few patches, one round: does it run?")
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds = 1
    with tempfile.TemporaryDirectory() as folder:
        found = run(arguments, Path(folder))
    print(json.dumps(found, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
