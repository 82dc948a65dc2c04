"""Slides whose pixels are known, damaged within their tiles: what is shown is what was written, or nothing is.

Each case is made from its number and a seed: a picture, a codec, a container, and one of truncated tiles, planes of
colours or stains, levels of whole tiles, and tiles left out; or a slide in the format of a scanner (`tests.vendors`).
`tests.fuzz` runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from tests.vendors import WRITERS, spoil
from wsi_gradcam.errors import SlideContentError, SlideError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import Slide, open_slide, read_region

Rgb = npt.NDArray[np.uint8]
Random = np.random.Generator

MPP, SPARE = 0.5, 2  # gray levels beyond the codec's own error
APERIO = "Aperio Image Library v1\n9x9 (9x9)|AppMag = 20|MPP = 0.5"
CODECS: dict[str, dict[str, Any]] = {
    "none": {},
    "jpeg": {"compression": "jpeg", "compressionargs": {"level": 90}},
    "jpeg 4:4:4": {"compression": "jpeg", "compressionargs": {"level": 75}, "subsampling": (1, 1)},
    "jpeg rgb": {"compression": "jpeg", "compressionargs": {"outcolorspace": "rgb"}},
    "jpeg planes": {"compression": "jpeg", "planarconfig": "separate"},
    "jpeg 2000": {"compression": "jpeg2000"},
    "jpeg 2000 lossy": {"compression": "jpeg2000", "compressionargs": {"level": 40, "reversible": False}},
    "33003": {"compression": "aperio_jp2000_ycbc"},
    "33005": {"compression": "aperio_jp2000_rgb"},
    "webp": {"compression": "webp", "compressionargs": {"level": 80, "lossless": False}},
    "webp lossless": {"compression": "webp", "compressionargs": {"lossless": True}},
    "jpeg xl": {"compression": "jpegxl"},
    "jpeg xl lossy": {"compression": "jpegxl", "compressionargs": {"distance": 1.0}},
    "png": {"compression": "png"},
    "deflate": {"compression": "deflate"},
    "deflate predictor": {"compression": "deflate", "predictor": True},
    "lzw": {"compression": "lzw"},
    "lzw predictor": {"compression": "lzw", "predictor": True},
    "zstd": {"compression": "zstd"},
    "zstd planes": {"compression": "zstd", "planarconfig": "separate"},
    "packbits": {"compression": "packbits"},
    "lzma": {"compression": "lzma"},
}
ANY_BYTES = ("none",)  # whose zeros may be what was written
ZSTD = b"\x28\xb5\x2f\xfd"
ZEROS = 300  # at the end of a tile, more than docs/slides.md says are let pass


@dataclass
class Truth:
    """What a file shows.

    Attributes:
        levels: RGB of each.
        off: by how much a sound one differs, as tifffile decodes it.
        tile_px: (height, width).
        bad: places of the tiles without sound data, (level, row, column).
        refused: the whole file is to be refused.
        options: of `open_slide`.
    """

    levels: list[Rgb]
    off: list[int]
    tile_px: tuple[int, int]
    bad: set[tuple[int, int, int]] = field(default_factory=set)
    refused: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def picture(rng: Random, height: int, width: int) -> Rgb:
    """Something smooth, with some grain."""
    small = rng.integers(40, 250, (max(2, height // 12), max(2, width // 12), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-3, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


def write(path: Path, rng: Random, codec: str, factors: list[int]) -> Truth:
    """A slide in tiles of a codec, with levels of every `factor`th pixel."""
    size = (int(rng.integers(150, 420)), int(rng.integers(150, 420)))
    tile = (int(rng.integers(3, 9)) * 16, int(rng.integers(3, 9)) * 16)
    levels = [np.ascontiguousarray(picture(rng, *size)[::factor, ::factor]) for factor in (1, *factors)]
    options: dict[str, Any] = {"photometric": "rgb", "tile": tile, **CODECS[codec]}
    ome, order = path.name.endswith(".ome.tif"), cast(Any, str(rng.choice(["<", ">"])))
    with tifffile.TiffWriter(path, ome=ome, bigtiff=bool(rng.integers(2)), byteorder=order) as out:
        for number, level in enumerate(levels):
            data = np.moveaxis(level, -1, 0) if "planarconfig" in options else level
            more: dict[str, Any] = {"metadata": None, "subfiletype": int(number > 0)}
            if ome and not number:
                axes = "SYX" if "planarconfig" in options else "YXS"
                more = {"metadata": {"axes": axes, "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}, "subifds": len(factors)}
            if path.suffix == ".svs":
                more["description"] = APERIO
            pixels_per_cm = 10_000 / MPP / (1, *factors)[number]
            out.write(data, resolution=(pixels_per_cm,) * 2, resolutionunit="CENTIMETER", **options, **more)
    with tifffile.TiffFile(path) as file:
        off = [_error(page, level) for page, level in zip(pages_of(file), levels, strict=True)]
    return Truth(levels, off, tile)


def _error(page: Any, level: Rgb) -> int:
    found = page.asarray()
    shown = np.moveaxis(found, 0, -1) if found.shape != level.shape else found
    return int(np.abs(shown.astype(int) - level).max())


def pages_of(file: tifffile.TiffFile) -> list[Any]:
    """The pages of the levels, also those in SubIFDs."""
    first: Any = file.pages[0]
    return [first, *first.pages] if first.subifds else list(file.pages)


def put(path: Path, level: int, index: int, change: Callable[[bytes], bytes | tuple[int, int]]) -> None:
    """Change the data of a piece in place, or its offset and count."""
    with tifffile.TiffFile(path, mode="r+") as file:
        page = pages_of(file)[level]
        offset, count = int(page.dataoffsets[index]), int(page.databytecounts[index])
        file.filehandle.seek(offset)
        changed = change(file.filehandle.read(count))
        if isinstance(changed, bytes):
            file.filehandle.seek(offset)
            file.filehandle.write(changed)
            changed = offset, len(changed)
        for name, value in zip(("TileOffsets", "TileByteCounts"), changed, strict=True):
            tag = page.tags[name]
            values = list(tag.value) if isinstance(tag.value, tuple) else [tag.value]
            values[index] = value
            tag.overwrite(values)


def shorter(data: bytes, share: float) -> bytes:
    """Data that stop."""
    return data[: max(1, int(len(data) * share))]


def zeros(data: bytes, share: float) -> bytes:
    """Data whose rest was never written; where Zstandard keeps bytes as they are, nobody can tell."""
    if data.startswith(ZSTD) and len(imagecodecs.zstd_decode(data)) <= len(data):
        return shorter(data, share)
    kept = min(int(len(data) * share), len(data) - ZEROS)
    return data[:kept] + bytes(len(data) - kept) if kept > 0 else shorter(data, share)


def early_end(data: bytes, share: float) -> bytes:
    """Data with JPEG's end in the middle."""
    return shorter(data, share)[:-2] + b"\xff\xd9"


def truncated(path: Path, rng: Random) -> Truth:
    codec = str(rng.choice(list(CODECS)))
    truth = write(path, rng, codec, [2, 4][: int(rng.integers(3))])
    for _ in range(int(rng.integers(1, 4))):
        level = int(rng.integers(len(truth.levels)))
        rows, columns = grid(truth, level)
        tile = int(rng.integers(rows * columns))
        planes = 3 if "planarconfig" in CODECS[codec] else 1
        if (level, *divmod(tile, columns)) in truth.bad:
            continue
        ways = (
            [shorter, shorter] + ([] if codec in ANY_BYTES else [zeros]) + ([early_end] if codec[:4] == "jpeg" else [])
        )
        way, share = ways[int(rng.integers(len(ways)))], float(rng.uniform(0.02, 0.97))
        put(path, level, tile + rows * columns * int(rng.integers(planes)), partial(way, share=share))
        truth.bad.add((level, *divmod(tile, columns)))
    return truth


def sparse(path: Path, rng: Random) -> Truth:
    codec = str(rng.choice([name for name, options in CODECS.items() if "planarconfig" not in options]))
    truth = write(path, rng, codec, [2][: int(rng.integers(2))])
    rows, columns = grid(truth, 0)
    share = float(rng.choice([0.1, 0.5, 0.9, 1.0], p=[0.4, 0.3, 0.2, 0.1]))
    left_out = np.flatnonzero(rng.random(rows * columns) < share)
    truth.refused = len(left_out) == rows * columns
    for tile in left_out.tolist():
        row, column = divmod(tile, columns)
        put(path, 0, tile, lambda data: (0, 0))
        y, x = row * truth.tile_px[0], column * truth.tile_px[1]
        truth.levels[0][y : y + truth.tile_px[0], x : x + truth.tile_px[1]] = 255
    if not truth.refused and rng.integers(2):
        tile = int(rng.choice(np.setdiff1d(np.arange(rows * columns), left_out)))
        lost: tuple[int, int] = ((5000, 0), (0, 700), (path.stat().st_size + 9, 500))[int(rng.integers(3))]
        put(path, 0, tile, lambda data: lost)
        truth.bad.add((0, *divmod(tile, columns)))
        tiles = sum(rows * columns for rows, columns in (grid(truth, level) for level in range(len(truth.levels))))
        # As a file that was cut short, or of no data at all.
        truth.refused = (lost[0] > 5000 and tiles < 100) or (not lost[1] and len(left_out) == rows * columns - 1)
    return truth


NAMES = {
    "colours": (["Red", "Green", "Blue"], ["R", "G", "B"], ["red channel", "green channel", "blue channel"]),
    "stains": (["DAPI", "FITC", "Cy3"], ["Hoechst", "CD3", "CD8", "PanCK"], ["a", "b"], ["Red", "DAPI", "Blue"]),
}


def planes(path: Path, rng: Random) -> Truth:
    """Channels in pictures of their own, in any order, named as colours or as stains, some of them chosen."""
    kind = str(rng.choice(list(NAMES)))
    names = list(NAMES[kind][int(rng.integers(len(NAMES[kind])))])
    order = rng.permutation(len(names))
    size = (int(rng.integers(100, 300)), int(rng.integers(100, 300)))
    whole = picture(rng, *size)
    channels = [whole[..., i % 3] if kind == "colours" or i < 3 else 255 - whole[..., 0] for i in range(len(names))]
    metadata = {
        "axes": "CYX",
        "PhysicalSizeX": MPP,
        "PhysicalSizeY": MPP,
        "Channel": {"Name": [names[i] for i in order]},
    }
    options: dict[str, Any] = {
        "photometric": "minisblack",
        "compression": (None, "deflate", "zstd", "lzw")[int(rng.integers(4))],
    }
    tile = (64, 96) if rng.integers(2) else None
    tifffile.imwrite(path, np.array([channels[i] for i in order]), ome=True, tile=tile, metadata=metadata, **options)
    chosen = tuple(int(i) for i in rng.integers(0, len(names), 3)) if rng.integers(2) else None
    shown = np.dstack([channels[order[i]] for i in chosen]) if chosen else whole
    truth = Truth([np.ascontiguousarray(shown)], [0], (64, 96))
    truth.refused, truth.options = kind == "stains" and chosen is None, {"channels": chosen}
    return truth


def grid(truth: Truth, level: int) -> tuple[int, int]:
    """(rows, columns) of a level's tiles."""
    height, width = truth.levels[level].shape[:2]
    return -(-height // truth.tile_px[0]), -(-width // truth.tile_px[1])


def wrong(path: Path, truth: Truth) -> Iterator[str]:
    """What a slide shows that it should not, or does not show."""
    try:
        slide = open_slide(path, **truth.options)
    except SlideError as error:
        if not truth.refused:
            yield f"is refused: {error}"
        elif not isinstance(error, SlideContentError) and not truth.bad:
            yield f"is refused as damaged: {error}"
        return
    if truth.refused:
        yield "is not refused"
    with closing(slide):
        if [(level.height, level.width) for level in slide.info.levels] != [part.shape[:2] for part in truth.levels]:
            yield f"has other levels: {slide.info.levels}"
            return
        for level in range(len(truth.levels)):
            yield from wrong_tiles(slide, truth, level)


def wrong_tiles(slide: Slide, truth: Truth, level: int) -> Iterator[str]:
    rows, columns = grid(truth, level)
    for row in range(rows):
        for column in range(columns):
            y, x = row * truth.tile_px[0], column * truth.tile_px[1]
            expected = truth.levels[level][y : y + truth.tile_px[0], x : x + truth.tile_px[1]]
            try:
                found = slide.read_level(level, Region(y, x, *cast("tuple[int, int]", expected.shape[:2])))
            except SlideReadError as error:
                if (level, row, column) not in truth.bad:
                    yield f"a sound tile is unreadable: {error}"
                continue
            off = int(np.abs(found.astype(int) - expected).max())
            if off > truth.off[level] + SPARE:
                yield f"level {level}, row {row}, column {column} is off by {off}, the codec by {truth.off[level]}"


def padded(path: Path, rng: Random) -> Truth:
    """Levels filled up to whole tiles; told by resolution tags or not."""
    factor = int(rng.choice([2, 4, 8]))
    size = tuple(int(rng.integers(900, 1500)) for _ in range(2))
    whole, tile = picture(rng, *cast("tuple[int, int]", size)), int(rng.choice([64, 128, 256]))
    reduced = np.asarray(Image.fromarray(whole).reduce(factor))
    fill, both = int(rng.choice([0, 255])), bool(rng.integers(2))
    says = bool(rng.integers(2))
    with tifffile.TiffWriter(path) as out:
        for number, part in enumerate((whole, reduced)):
            pad = [(0, -n % tile if number or both else 0) for n in part.shape[:2]]
            data = np.pad(part, [*pad, (0, 0)], constant_values=fill)
            unit: dict[str, Any] = {}
            if says or not number:
                pixels_per_cm = 10_000 / MPP / (factor if number else 1)
                unit = {"resolution": (pixels_per_cm,) * 2, "resolutionunit": "CENTIMETER"}
            out.write(
                data,
                tile=(tile, tile),
                photometric="rgb",
                subfiletype=number,
                compression="zstd",
                metadata=None,
                **unit,
            )
    return Truth([whole, reduced], [0, 0], (tile, tile), options={"factor": factor})


def wrong_places(path: Path, truth: Truth) -> Iterator[str]:
    """Where what is shown at a level's mpp is not level 0 made smaller."""
    whole, factor = truth.levels[0], truth.options["factor"]
    height, width = whole.shape[:2]
    with closing(open_slide(path)) as slide:
        for y, x in ((0, 0), (height // 2, width // 3), (height - 64 * factor, width - 64 * factor)):
            y, x = max(0, y // factor * factor), max(0, x // factor * factor)
            rows, columns = (min(64, (side - at) // factor) for side, at in ((height, y), (width, x)))
            found = read_region(slide, y, x, rows, columns, MPP * factor)
            part = Image.fromarray(whole[y : y + rows * factor, x : x + columns * factor])
            off = np.abs(found.astype(int) - np.asarray(part.reduce(factor))).mean()
            if off > 6:
                yield f"y {y}, x {x} at 1/{factor} is off by {off:.1f} on the mean: something else is shown there"


def scanner_case(rng: Random, folder: Path) -> Iterator[str]:
    """What is shown of a slide in a scanner's format, some of whose tiles were damaged, and was not written."""
    folder.mkdir()
    kind = str(rng.choice(list(WRITERS)))
    path, places = WRITERS[kind](folder)
    with closing(open_slide(path, MPP)) as slide:
        shown = {(level, region): slide.read_level(level, region) for level, region in patches(slide, rng)}
    for place in rng.choice(len(places), int(rng.integers(1, 4)), replace=False):
        way = (zeros, end_and_zeros)[int(rng.integers(2)) * ("2000" not in kind)]
        spoil(places[place], partial(way, share=float(rng.uniform(0.2, 0.9))))
    with closing(open_slide(path, MPP)) as slide:
        for (level, region), expected in shown.items():
            with suppress(SlideReadError):
                if not np.array_equal(slide.read_level(level, region), expected):
                    yield f"{path}: level {level}, {region} shows what was not written"


def end_and_zeros(data: bytes, share: float) -> bytes:
    """Data of the same length with JPEG's end in the middle. (Where a part is lost, 4 % of 4:2:0 decode to as much.)"""
    return early_end(data, share).ljust(len(data), bytes(1))


def patches(slide: Slide, rng: Random) -> Iterator[tuple[int, Region]]:
    for number, level in enumerate(slide.info.levels):
        whole = Region(0, 0, level.height, level.width)
        for y in range(-int(rng.integers(99)), level.height, 99):
            for x in range(-int(rng.integers(99)), level.width, 99):
                yield number, Region(y, x, 99, 99).intersect(whole)


ENDINGS = ("a.tif", "a.svs", "a.ome.tif")
SCANNERS = 0.03  # of the cases


def truth_case(number: int, seed: int, folder: Path) -> list[str]:
    """What is wrong in how a case is dealt with; nothing where all is well."""
    if (scanned := np.random.default_rng([seed, number, 18])).random() < SCANNERS:
        return [*scanner_case(scanned, folder / str(number))]
    rng = np.random.default_rng([seed, number, 17])
    kind = str(rng.choice(["truncated", "sparse", "planes", "padded"], p=[0.6, 0.2, 0.15, 0.05]))
    name = "a.ome.tif" if kind == "planes" else "a.tif" if kind == "padded" else str(rng.choice(ENDINGS))
    path = folder / str(number) / name
    path.parent.mkdir()
    make = {"truncated": truncated, "sparse": sparse, "planes": planes, "padded": padded}[kind]
    truth = make(path, rng)
    found = wrong_places(path, truth) if kind == "padded" else wrong(path, truth)
    return [f"{kind} {path}: {problem}" for problem in found]
