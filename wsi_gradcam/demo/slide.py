"""Whole slides written as pyramidal TIFFs that OpenSlide opens, and layouts of small images on them.

A layout arranges the pixels of an image on a canvas like pieces of tissue. It paints the micrograph, its truth mask and
a map of its quadrants alike, so that whatever is measured on the slide can be traced to a part of the micrograph.

Axis order is y, x; sizes are (height, width); pixels are those of level 0 unless a name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tifffile

from wsi_gradcam.errors import ConfigError, MppError

GLASS_RGB = (243, 242, 245)
STRIP_PX = 256  # rows painted or downsampled at a time, so that temporaries stay at tens of MB

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

    Levels are top-level pages, all but the first marked as reduced; a level of downsample d has ceil(height / d) x
    ceil(width / d) pixels, each the mean of the level-0 pixels under it. The resolution tags hold the mpp. The file
    gets its name only when it is complete; equal input gives equal bytes.

    Args:
        path: the file to write; an existing one is replaced.
        level0: [height, width, 3] uint8 RGB.
        mpp: micrometres per pixel of level 0, one number or (y, x).
        tile_px: side of a tile, a multiple of 16 (TIFF 6.0, section 15).
        levels: number of levels, including level 0; None stops when a level fits into 2 x 2 tiles.
        downsample: the factor from each level to the next, or the downsample of every further level against
            level 0, such as (4, 16) or (3, 7).
        background: RGB of the padding in tiles that reach over the edge.
        compression: "jpeg" (YCbCr 4:2:0, lossy), "deflate" or None (both lossless).
        quality: JPEG quality, 1..100.

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

    Blocks that are cut off by the bottom or right edge are the mean of the pixels they have. uint8 in, uint8 out.

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


GLASS_NOISE = 1.5  # standard deviation in grey levels; enough that glass is never a flat colour
GRID_PX = 16  # spacing of the nodes that define a piece's outline


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of tissue: a box on the canvas, an outline in it and a mirror tiling of the source under it.

    Attributes:
        top, left, height, width: the box, px; boxes of one layout do not overlap.
        turned: whether the source is turned a quarter anticlockwise. (A mirror tiling contains the other orientations.)
        phase: (y, x) px by which the mirror tiling is shifted.
        depth_px: [ceil(height / GRID_PX) + 1, ceil(width / GRID_PX) + 1] float32 at nodes GRID_PX apart;
            about the distance to the outline, positive inside.
    """

    top: int
    left: int
    height: int
    width: int
    turned: bool
    phase: tuple[int, int]
    depth_px: npt.NDArray[np.float32]

    def source(self, image: Image) -> tuple[Image, npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Return the image in its orientation [h, w, ...], and its visible rows [height] and columns [width]."""
        image = np.rot90(image) if self.turned else image
        rows = mirrored(np.arange(self.height) + self.phase[0], image.shape[0])
        columns = mirrored(np.arange(self.width) + self.phase[1], image.shape[1])
        return image, rows, columns

    def cover(self, y: int, rows: int, edge_px: float) -> npt.NDArray[np.float32]:
        """Return the share of tissue in pixels of the box's rows y to y + rows, [rows, width] float32 in 0..1."""
        depth = _between_nodes(self.depth_px, np.arange(y, y + rows))
        depth = _between_nodes(depth.T, np.arange(self.width)).T
        cover: npt.NDArray[np.float32] = np.clip(depth / np.float32(edge_px) + np.float32(0.5), 0, 1)
        return cover


@dataclass(frozen=True, eq=False)
class Layout:
    """A mapping of the pixels of a source image to a slide's canvas.

    Inside a piece copies of the source are mirrored at their borders, so that there are no seams.

    Attributes:
        size: (height, width) of the canvas, px.
        source_size: (height, width) of the images it paints, px.
        pieces: the pieces of tissue; the rest is glass.
        edge_px: over how many pixels tissue fades into glass when painted softly.
    """

    size: tuple[int, int]
    source_size: tuple[int, int]
    pieces: tuple[Piece, ...]
    edge_px: float = 12.0

    def paint(self, image: Image, background: npt.ArrayLike, *, soft: bool = False) -> Image:
        """Return a canvas [height, width, ...] of the image's dtype: the image on pieces, background elsewhere.

        Args:
            image: [h, w] or [h, w, c] of the layout's `source_size`, any dtype.
            background: a value or a colour [c].
            soft: fade into the background over `edge_px`, as a picture needs; otherwise each pixel is entirely the
                image's (where tissue covers at least half of it) or the background's, as labels need.

        Raises:
            ConfigError: if the image does not have the layout's source size.
        """
        canvas = np.empty((*self.size, *image.shape[2:]), image.dtype)
        canvas[:] = np.asarray(background, image.dtype)
        self.paint_onto(canvas, image, soft=soft)
        return canvas

    def paint_onto(self, canvas: Image, image: Image, *, soft: bool = False) -> None:
        """Paint the pieces over a canvas [height, width, ...] in place; see `paint`."""
        if image.shape[:2] != self.source_size:
            raise ConfigError(
                f"the image is {list(image.shape)}; this layout paints images of {self.source_size[1]} x "
                f"{self.source_size[0]} px, so resize it or plan a layout for its size"
            )
        for piece in self.pieces:
            source, rows, columns = piece.source(image)
            box = canvas[piece.top : piece.top + piece.height, piece.left : piece.left + piece.width]
            for y in range(0, piece.height, STRIP_PX):
                strip = box[y : y + STRIP_PX]
                cover = piece.cover(y, len(strip), self.edge_px)
                if cover.any():
                    _cover(strip, source[rows[y : y + STRIP_PX, None], columns], cover, soft)

    def tissue(self) -> npt.NDArray[np.bool_]:
        """Return where the canvas is tissue, bool [height, width]."""
        return self.paint(np.ones(self.source_size, np.bool_), False)


def lay_out(
    micrograph: Rgb, size: tuple[int, int] = (8192, 8192), *, glass_px: int | None = None, seed: int = 0
) -> tuple[Rgb, Layout]:
    """Return a slide's level 0, [height, width, 3] uint8, made from a micrograph, and its layout.

    Pieces of tissue with irregular, soft outlines lie on light, slightly noisy glass.

    Args:
        micrograph: [h, w, 3] uint8 RGB.
        size, glass_px, seed: see `plan_layout`.
    """
    layout = plan_layout((micrograph.shape[0], micrograph.shape[1]), size, glass_px=glass_px, seed=seed)
    return paint_slide(layout, micrograph, seed), layout


def paint_slide(layout: Layout, image: Rgb, seed: int = 0) -> Rgb:
    """Return a slide's level 0, [height, width, 3] uint8: the layout's pieces of the image on glass."""
    slide = glass(layout.size, np.random.default_rng(seed))
    layout.paint_onto(slide, image, soft=True)
    return slide


def plan_layout(
    source_size: tuple[int, int], size: tuple[int, int], *, glass_px: int | None = None, seed: int = 0
) -> Layout:
    """Return a layout of one large and two small pieces, each with an outline of its own.

    Args:
        source_size: (height, width) of the images to paint, px.
        size: (height, width) of the canvas, px.
        glass_px: least width of the glass along the canvas's border and around each piece; None means 1/32 of the
            shorter side.
        seed: equal seeds give equal layouts.

    Raises:
        ConfigError: if the canvas is too small for its pieces and their glass.
    """
    height, width = size
    glass_px = min(size) // 32 if glass_px is None else glass_px
    if glass_px < 0 or min(height // 2, width // 3) < 2 * glass_px + 4 * GRID_PX:
        raise ConfigError(
            f"size is {width} x {height} px with glass_px {glass_px}; a piece needs {4 * GRID_PX} px between the "
            "glass, so enlarge the slide or reduce the glass"
        )
    rng = np.random.default_rng(seed)
    split_x, split_y = round(width * 0.68), round(height * 0.56)
    boxes = (
        (0, 0, height, split_x),
        (0, split_x, split_y, width - split_x),
        (split_y, split_x, height - split_y, width - split_x),
    )
    pieces = tuple(_plan_piece(box, bool(k % 2), source_size, glass_px, rng) for k, box in enumerate(boxes))
    return Layout(size, source_size, pieces)


def plan_cores(count: int, side_px: int, size: tuple[int, int]) -> Layout:
    """Return a layout of pieces in a row, like the cores of a tissue microarray, each with a crop of its own.

    The images that it paints are the crops side by side, (side_px, count * side_px). A core is a square with rounded
    corners that leaves out the crop's outermost pixels.

    Raises:
        ConfigError: if the canvas has no room for them.
    """
    gap_x, gap_y = (size[1] - count * side_px) // (count + 1), (size[0] - side_px) // 2
    if min(gap_x, gap_y) < 0:
        raise ConfigError(
            f"size is {size[0]} x {size[1]} px; {count} cores of {side_px} px side by side need a larger one"
        )
    nodes = (np.arange(-(-side_px // GRID_PX) + 1) * GRID_PX - side_px / 2) / (side_px / 2)
    rounded = (np.abs(nodes[:, None]) ** 6 + np.abs(nodes) ** 6) ** (1 / 6)
    depth_px = ((0.985 - rounded) * side_px / 2).astype(np.float32)
    pieces = (
        Piece(gap_y, gap_x + k * (side_px + gap_x), side_px, side_px, False, (0, k * side_px), depth_px)
        for k in range(count)
    )
    return Layout(size, (side_px, count * side_px), tuple(pieces))


def quadrants(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return the quadrant of each pixel, [height, width]: 0 top left, 1 top right, 2 bottom left, 3 bottom right.

    >>> quadrants((2, 2))
    array([[0, 1],
           [2, 3]], dtype=uint8)
    """
    height, width = size
    lower = np.arange(height) >= height // 2
    right = np.arange(width) >= width // 2
    return (2 * lower[:, None] + right).astype(np.uint8)


def mirrored(index: npt.NDArray[np.intp], length: int) -> npt.NDArray[np.intp]:
    """Return indices into an axis of this length that is repeated endlessly, with every second copy mirrored.

    >>> mirrored(np.arange(-2, 7), 3).tolist()
    [1, 0, 0, 1, 2, 2, 1, 0, 0]
    """
    phase = index % (2 * length)
    return np.minimum(phase, 2 * length - 1 - phase)


def _plan_piece(
    box: tuple[int, int, int, int], turned: bool, source_size: tuple[int, int], glass_px: int, rng: np.random.Generator
) -> Piece:
    """Return a piece that fills its (top, left, height, width) box with a wavy ellipse."""
    top, left, height, width = box
    y = np.arange(-(-height // GRID_PX) + 1)[:, None] * GRID_PX
    x = np.arange(-(-width // GRID_PX) + 1) * GRID_PX
    border_px = np.minimum(np.minimum(y, height - y), np.minimum(x, width - x)) - glass_px
    inside_px = (height / 2 - glass_px, width / 2 - glass_px)
    radius_y, radius_x = 0.85 * inside_px[0], 0.85 * inside_px[1]  # leaves room for the waves
    shorter = min(radius_y, radius_x)
    ellipse_px = (1 - np.hypot((y - height / 2) / radius_y, (x - width / 2) / radius_x)) * shorter
    waves_px = sum(
        _waves(border_px.shape, wavelength * shorter / GRID_PX, rng) * amplitude * shorter
        for wavelength, amplitude in ((0.3, 0.08), (0.06, 0.025))
    )
    depth_px = np.minimum(ellipse_px + waves_px, border_px).astype(np.float32)
    phase = (int(rng.integers(2 * source_size[0])), int(rng.integers(2 * source_size[1])))
    return Piece(top, left, height, width, turned, phase, depth_px)


def _waves(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return white noise smoothed with a Gaussian of `sigma` nodes, with mean 0 and standard deviation 1."""
    frequency_y, frequency_x = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    gaussian = np.exp(-2 * (np.pi * sigma) ** 2 * (frequency_y**2 + frequency_x**2))
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * gaussian, shape)
    scaled: npt.NDArray[np.float64] = (noise - noise.mean()) / noise.std()
    return scaled


def _between_nodes(nodes: npt.NDArray[np.float32], at_px: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    """Return rows of values linearly interpolated between rows of nodes that are GRID_PX apart."""
    before, beyond = np.divmod(at_px, GRID_PX)
    weight = (beyond / GRID_PX).astype(np.float32)[:, None]
    values: npt.NDArray[np.float32] = nodes[before] * (1 - weight) + nodes[before + 1] * weight
    return values


def _cover(canvas: Image, tissue: Image, cover: npt.NDArray[np.float32], soft: bool) -> None:
    """Paint tissue [h, w, ...] over the canvas in place, by its share `cover` [h, w]; see `Layout.paint`."""
    cover = cover.reshape(*cover.shape, *[1] * (canvas.ndim - 2))
    if soft:
        mixed = canvas + (tissue.astype(np.float32) - canvas) * cover
        canvas[:] = np.rint(mixed) if np.issubdtype(canvas.dtype, np.integer) else mixed
    else:
        np.copyto(canvas, tissue, where=cover >= 0.5)


def glass(size: tuple[int, int], rng: np.random.Generator) -> Rgb:
    """Return empty glass [height, width, 3]: one noisy patch repeated, as noise for every pixel takes seconds."""
    noisy = np.rint(rng.normal(GLASS_RGB, GLASS_NOISE, (STRIP_PX, STRIP_PX, 3)))
    patch = np.clip(noisy, 0, 255).astype(np.uint8)
    glass = np.empty((*size, 3), np.uint8)
    columns = mirrored(np.arange(size[1]), STRIP_PX)
    for y in range(0, size[0], STRIP_PX):
        strip = glass[y : y + STRIP_PX]
        strip[:] = patch[: len(strip), columns]
    return glass
