"""Whole slides written as pyramidal TIFFs that OpenSlide opens.

Axis order is y, x; sizes are (height, width); pixels are those of level 0 unless a name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tifffile

from wsi_gradcam.errors import ConfigError, MppError

GLASS_RGB = (243, 242, 245)
STRIP_PX = 256  # rows painted or shrunk at a time, so that temporaries stay at tens of MB

Compression = Literal["jpeg", "deflate"]
Image = npt.NDArray[Any]
Rgb = npt.NDArray[np.uint8]


def write_slide(
    path: str | Path,
    level0: Rgb,
    *,
    mpp: float | tuple[float, float],
    tile_px: int = 256,
    levels: int | None = None,
    downsample: int | Sequence[int] = 2,
    background: tuple[int, int, int] = GLASS_RGB,
    compression: Compression | None = "jpeg",
    quality: int = 90,
) -> Path:
    """Write a tiled pyramidal TIFF that OpenSlide opens as `generic-tiff`, and return its path.

    Levels are top-level pages, all but the first marked as reduced; a level of downsample d has
    ceil(height / d) x ceil(width / d) pixels, each the mean of the level-0 pixels under it. The resolution
    tags hold the mpp. The file takes its name only when it is whole; equal input gives equal bytes.

    Args:
        path: the file to write; an existing one is replaced.
        level0: [height, width, 3] uint8 RGB.
        mpp: micrometres per pixel of level 0, one number or (y, x).
        tile_px: side of a tile, a multiple of 16 (TIFF 6.0, section 15).
        levels: how many levels, level 0 included; None stops when a level fits into 2 x 2 tiles.
        downsample: the factor from each level to the next, or the downsample of every further level against
            level 0, such as (4, 16) or (3, 7).
        background: RGB of the padding in tiles that reach over the edge.
        compression: "jpeg" (YCbCr 4:2:0, lossy), "deflate" or None (both lossless).
        quality: of JPEG, 1..100.

    Raises:
        ConfigError: for an image, tile size, compression or pyramid that cannot be written.
        MppError: for an mpp that is not finite and positive.
    """
    path = Path(path)
    resolution = _resolution(path, mpp)
    _check_image(path, level0, tile_px, compression)
    factors = _downsamples(level0.shape[:2], tile_px, levels, downsample)
    options: dict[str, Any] = {
        "tile": (tile_px, tile_px),
        "dtype": np.uint8,
        "photometric": "rgb",
        "compression": compression,
        "compressionargs": {"level": quality} if compression == "jpeg" else None,
        "resolutionunit": "CENTIMETER",
        "metadata": None,
        "software": "wsi_gradcam",
    }
    part = path.with_name(path.name + ".part")
    try:
        with tifffile.TiffWriter(part, bigtiff=level0.nbytes > 2**31) as writer:
            for factor, level in zip(factors, _pyramid(level0, factors), strict=True):
                writer.write(
                    _tiles(level, tile_px, background),
                    shape=level.shape,
                    subfiletype=int(factor > 1),
                    resolution=(resolution[0] / factor, resolution[1] / factor),
                    **options,
                )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def shrink(image: Image, factor: int) -> Image:
    """Return the mean of each block of factor x factor px, rounded half up, [ceil(h / factor), ceil(w / factor), ...].

    Blocks cut by the bottom or right edge are the mean of the pixels they have. uint8 in, uint8 out.

    >>> shrink(np.array([[0, 10, 7], [20, 30, 9]], np.uint8), 2)
    array([[15,  8]], dtype=uint8)
    """
    height, width = image.shape[:2]
    out = np.empty((-(-height // factor), -(-width // factor), *image.shape[2:]), np.uint8)
    columns = np.arange(0, width, factor)
    column_counts = np.minimum(width - columns, factor).reshape(-1, *[1] * (image.ndim - 2))
    step = max(1, STRIP_PX // factor)
    for y in range(0, len(out), step):
        block = image[y * factor : (y + step) * factor]
        rows = np.arange(0, len(block), factor)
        row_counts = np.minimum(len(block) - rows, factor).reshape(-1, *[1] * (image.ndim - 1))
        sums = np.add.reduceat(block, rows, axis=0, dtype=np.uint32)
        sums = np.add.reduceat(sums, columns, axis=1)
        counts = (row_counts * column_counts).astype(np.uint32)
        out[y : y + step] = (sums + counts // 2) // counts
    return out


def _pyramid(level0: Rgb, factors: Sequence[int]) -> Iterator[Rgb]:
    """Yield each level, made from the one before if the factors divide, else from level 0."""
    level, done = level0, 1
    yield level
    for factor in factors[1:]:
        level = shrink(level, factor // done) if factor % done == 0 else shrink(level0, factor)
        done = factor
        yield level


def _tiles(level: Rgb, tile_px: int, background: tuple[int, int, int]) -> Iterator[Rgb]:
    """Yield the level's tiles [tile_px, tile_px, 3] in row order, padded with the background colour."""
    for y in range(0, level.shape[0], tile_px):
        for x in range(0, level.shape[1], tile_px):
            block = level[y : y + tile_px, x : x + tile_px]
            tile = np.empty((tile_px, tile_px, 3), np.uint8)
            if block.shape != tile.shape:
                tile[:] = background
            tile[: block.shape[0], : block.shape[1]] = block
            yield tile


def _resolution(path: Path, mpp: float | tuple[float, float]) -> tuple[float, float]:
    """Return pixels per centimetre in TIFF's order (x, y)."""
    mpp_y, mpp_x = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    if not all(math.isfinite(value) and value > 0 for value in (mpp_y, mpp_x)):
        raise MppError(f"{path}: mpp is {mpp}; expected finite micrometres per pixel above 0, such as 0.5")
    return 1e4 / mpp_x, 1e4 / mpp_y


def _check_image(path: Path, level0: Rgb, tile_px: int, compression: str | None) -> None:
    if level0.ndim != 3 or level0.shape[2] != 3 or level0.dtype != np.uint8 or 0 in level0.shape:
        raise ConfigError(
            f"{path}: level 0 is {level0.dtype} {list(level0.shape)}; expected uint8 RGB [height, width, 3]"
        )
    if tile_px < 16 or tile_px % 16:
        raise ConfigError(f"{path}: tile_px is {tile_px}; TIFF needs a multiple of 16, such as 256")
    if compression not in ("jpeg", "deflate", None):
        raise ConfigError(f"{path}: compression is {compression!r}; expected 'jpeg', 'deflate' or None")


def _downsamples(
    size: tuple[int, ...], tile_px: int, levels: int | None, downsample: int | Sequence[int]
) -> tuple[int, ...]:
    """Return the downsample of every level against level 0, starting with 1."""
    longest = max(size)
    if isinstance(downsample, int):
        if downsample < 2:
            raise ConfigError(f"downsample is {downsample}; expected at least 2 from level to level")
        if levels is None:
            levels = 1
            while longest / downsample ** (levels - 1) > 2 * tile_px:
                levels += 1
        factors = tuple(downsample**level for level in range(levels))
    else:
        factors = (1, *downsample)
        if levels not in (None, len(factors)):
            raise ConfigError(
                f"levels is {levels} but downsample gives {len(factors) - 1} besides level 0; omit levels"
            )
    if not factors or list(factors) != sorted(set(factors)) or factors[-1] > longest:
        raise ConfigError(
            f"the levels' downsamples are {factors} for a slide of {size[0]} x {size[1]} px; expected "
            f"them to grow from 1 to at most {longest}"
        )
    return factors
