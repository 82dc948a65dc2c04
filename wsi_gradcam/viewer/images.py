"""Images of slides and heatmaps as the page gets them: encoded tiles, patches and thumbnails, with their caches.

Among them is the spread of overlapping patches' maps, stored by an audit: channels that show where a slide's map is
unsure.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from wsi_gradcam.audit.folder import AUDIT, AuditFolder
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import NotShownError, ResultError, StoreError, TileError, WsiGradcamError, one_line
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.results.channels import ChannelInfo
from wsi_gradcam.results.heatmap import CHUNK, COLOURS, EXPLAINED, TISSUE, UNREADABLE, HeatmapStore
from wsi_gradcam.slides import read_region, thumbnail
from wsi_gradcam.viewer.security import check_inside, check_tree
from wsi_gradcam.viewer.tiles import (
    TilePyramid,
    ValueScale,
    chunks_touching,
    encode_jpeg,
    encode_values,
    pixel_at,
    slide_pyramid,
    slide_tile,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.results.heatmap import Channel
    from wsi_gradcam.results.slide import SlideResult
    from wsi_gradcam.slides import Slide
    from wsi_gradcam.viewer.archive import Archive, ServedSlide

    Layer: TypeAlias = "ServedSlide | Spread"
    Stored: TypeAlias = "SlideResult | SpreadImage"

LARGEST = 1e38  # that float32 holds, with room for what is around a range
CHUNK_BYTES = 96 << 20
IMAGE_BYTES = 128 << 20
COVERAGE = -1  # in place of a channel's number
THUMBNAIL_PX = 384
PATCH_QUALITY = 92


class Images:
    """Encodes images; those used last are kept."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._heatmaps = HeatmapReader()
        self._cache: Cache[tuple[object, ...], bytes] = Cache(IMAGE_BYTES, len)

    def slide_tile(self, slide: ServedSlide, level: int, row: int, column: int) -> bytes:
        """Return a tile of the slide as JPEG."""

        def encode(opened: Slide) -> bytes:
            return slide_tile(opened, slide_pyramid(opened.info), level, row, column)

        return self._from_slide(slide, ("slide", level, row, column), encode)

    def heatmap_tile(self, layer: Layer, channel: int, level: int, row: int, column: int, smooth: bool) -> bytes:
        """Return a tile of a channel of a heatmap, or of its spread, as PNG; see `HeatmapReader.tile`."""

        def encode() -> bytes:
            return self._heatmaps.tile(layer, channel, level, row, column, smooth)

        if not layer.is_final:
            return encode()
        return self._cache.get((layer.key, layer.version, smooth, channel, level, row, column), encode)

    def patch(self, slide: ServedSlide, number: int) -> bytes:
        """Return a patch as the model saw it, before the model's own transform, as JPEG."""
        model = self._archive.result.record.model

        def encode(opened: Slide) -> bytes:
            if not 0 <= number < slide.result.plan.patches:
                raise NotShownError(f"no patch {number}; there are {slide.result.plan.patches}, counted from 0")
            (y, x), (height, width) = slide.result.patch_yx(number), model.patch_px
            return encode_jpeg(read_region(opened, y, x, height, width, slide.result.patch_mpp), PATCH_QUALITY)

        return self._from_slide(slide, ("patch", number), encode)

    def thumbnail(self, slide: ServedSlide) -> bytes:
        """Return the whole slide, no side longer than 384 px, as JPEG."""
        return self._from_slide(
            slide, ("thumbnail",), lambda opened: encode_jpeg(thumbnail(opened, 0.0, THUMBNAIL_PX).rgb)
        )

    def _from_slide(self, slide: ServedSlide, image: tuple[object, ...], encode: Callable[[Slide], bytes]) -> bytes:
        def read() -> bytes:
            with self._archive.borrow_slide(slide) as opened:
                return encode(opened)

        return self._cache.get((slide.key, slide.version, *image), read)


@dataclass(frozen=True)
class PointValues:
    """The values of a heatmap at a point: a value a channel, None where it was not explained, and its coverage."""

    values: list[float | None] | None
    tissue: bool
    explained: bool
    unreadable: bool


class HeatmapReader:
    """Reads heatmaps and spreads of all slides; decoded chunks are kept up to `max_bytes`."""

    def __init__(self, max_bytes: int = CHUNK_BYTES) -> None:
        self._chunks: Cache[tuple[object, ...], NDArray[Any]] = Cache(max_bytes, lambda chunk: chunk.nbytes)

    def tile(self, layer: Layer, channel: int, level: int, row: int, column: int, smooth: bool = True) -> bytes:
        """Return a tile of a channel as PNG, see `encode_values`.

        Levels finer than the stored ones are interpolated if `smooth`, else they repeat the stored pixels.

        Raises:
            TileError: there is no such tile or channel.
        """
        info, region = find_channel(layer.result, channel), heatmap_pyramid(layer.result).region(level, row, column)
        stored = level - finer_levels(layer.result)
        if stored < 0:
            return encode_values(*self._enlarge(layer, channel, region, 1 << -stored, smooth), channel_scale(info))
        values, flags = self.read(layer, channel, stored, region), self.read(layer, COVERAGE, stored, region)
        return encode_values(values, flags, channel_scale(info))

    def at(self, layer: Layer, y: float, x: float) -> PointValues | None:
        """Return all channels' values over level-0 (y, x); None outside the heatmap."""
        result = layer.result
        pixel = pixel_at(y, x, result.stride_px, result.levels[0])
        if pixel is None:
            return None
        region = Region(*pixel, 1, 1)
        bits = int(self.read(layer, COVERAGE, 0, region)[0, 0])
        values = [float(self.read(layer, channel.number, 0, region)[0, 0]) for channel in result.channels]
        return PointValues(
            values=[round(value, 6) if bits & EXPLAINED else None for value in values],
            tissue=bool(bits & TISSUE),
            explained=bool(bits & EXPLAINED),
            unreadable=bool(bits & UNREADABLE),
        )

    def read(self, layer: Layer, channel: int, level: int, region: Region) -> NDArray[Any]:
        """Return values of a channel, float32, or of the coverage, uint8, in a region of a level [h, w]."""
        parts = chunks_touching(region, CHUNK)
        if len(parts) == 1:
            return _crop(self._chunk(layer, channel, level, *parts[0]), *parts[0], region)
        out = np.zeros((region.height, region.width), np.uint8 if channel == COVERAGE else np.float32)
        for row, column in parts:
            inside = region.intersect(Region(row * CHUNK, column * CHUNK, CHUNK, CHUNK))
            target = Region(inside.y - region.y, inside.x - region.x, inside.height, inside.width)
            out[target.slices] = _crop(self._chunk(layer, channel, level, row, column), row, column, inside)
        return out

    def _enlarge(
        self, layer: Layer, channel: int, region: Region, factor: int, smooth: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return values and coverage of a region of the heatmap's level 0 enlarged by `factor`.

        Smooth values are interpolated from pixel centre to pixel centre, coverage is not; pixels that were not
        explained do not contribute to their neighbours' values.
        """
        source = _with_margin(region, factor, *layer.result.levels[0])
        values, flags = self.read(layer, channel, 0, source), self.read(layer, COVERAGE, 0, source)
        rows = np.arange(region.y, region.bottom) // factor - source.y
        columns = np.arange(region.x, region.right) // factor - source.x
        nearest = rows[:, None], columns
        if not smooth:
            return values[nearest], flags[nearest]
        return _interpolate(values, (flags & EXPLAINED) > 0, region, source, factor), flags[nearest]

    def _chunk(self, layer: Layer, channel: int, level: int, row: int, column: int) -> NDArray[Any]:
        result, key = layer.result, (layer.key, layer.version, channel, level, row, column)

        def read() -> NDArray[Any]:
            whole = Region(0, 0, *result.levels[level])
            region = Region(row * CHUNK, column * CHUNK, CHUNK, CHUNK).intersect(whole)
            if channel == COVERAGE:
                return result.read_coverage(level, region)
            return result.read(result.channels[channel], level, region)

        return self._chunks.get(key, read) if layer.is_final else read()


def finer_levels(result: Stored) -> int:
    """Return the number of levels finer than the stored ones, down to one pixel per level-0 pixel of the slide.

    Browsers enlarge each tile by itself, which shows as seams between tiles where a pixel covers many of the screen.
    """
    return result.stride_px.bit_length() - 1


def heatmap_pyramid(result: Stored) -> TilePyramid:
    """Return the tiles of a slide's heatmap: its own levels below the finer ones."""
    height, width = result.levels[0]
    finer = finer_levels(result)
    return TilePyramid(height << finer, width << finer, len(result.levels) + finer)


def find_channel(result: Stored, number: int) -> ChannelInfo:
    """Return a channel by its number.

    Raises:
        TileError: there is no such channel.
    """
    if not 0 <= number < len(result.channels):
        raise TileError(f"no channel {number}; there are {len(result.channels)}, counted from 0")
    return result.channels[number]


def channel_scale(channel: ChannelInfo) -> ValueScale:
    """Return the scale in which tiles hold the values of a channel.

    Raises:
        NotShownError: the metadata say no range of float32 numbers.
    """
    if not (abs(channel.minimum) < LARGEST and abs(channel.maximum) < LARGEST):
        raise NotShownError(f"channel {channel.number}: its range is no pair of numbers; try `validate`")
    return ValueScale.around(channel.minimum, channel.maximum)


def _crop(chunk: NDArray[Any], row: int, column: int, region: Region) -> NDArray[Any]:
    y, x = region.y - row * CHUNK, region.x - column * CHUNK
    return chunk[y : y + region.height, x : x + region.width]


def _with_margin(region: Region, factor: int, height: int, width: int) -> Region:
    """Return the pixels of a level that a region of the enlarged level needs, with a margin of one for smoothing."""
    y, x = max(0, region.y // factor - 1), max(0, region.x // factor - 1)
    bottom, right = min(height, ceil_div(region.bottom, factor) + 1), min(width, ceil_div(region.right, factor) + 1)
    return Region(y, x, bottom - y, right - x)


def _interpolate(
    values: NDArray[np.float32], known: NDArray[np.bool_], region: Region, source: Region, factor: int
) -> NDArray[np.float32]:
    """Return the values in `source`, enlarged by `factor`, in `region`: means weighted by what is known [h, w]."""
    y, x = region.y / factor - source.y, region.x / factor - source.x
    box = (x, y, region.right / factor - source.x, region.bottom / factor - source.y)

    def resize(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        image = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(image.resize((region.width, region.height), Image.Resampling.BILINEAR, box=box), np.float32)

    if known.all():
        return resize(values)
    weights = known.astype(np.float32)
    return np.asarray(
        resize(np.where(known, values, np.float32(0))) / np.maximum(resize(weights), np.float32(1e-6)), np.float32
    )


T = TypeVar("T")
SPREAD = "spread"
MAX_OPEN = 64
DAMAGED = "its spread cannot be read"


class SpreadImage:
    """The stored spread, read as a heatmap is; it aligns with the heatmap of the slide, level by level."""

    def __init__(self, slide: SlideResult, store: HeatmapStore, check: Callable[[], None]) -> None:
        """Describe the channels; `check` raises if the opened image has been replaced meanwhile.

        Raises:
            ResultError: the spread belongs to another heatmap.
        """
        about, plan = store.attributes["wsi_gradcam"], slide.plan
        known = (plan.run_digest, plan.slide_digest, plan.level_shapes)
        if (about["run"], about["slide"], store.shapes) != known:
            raise ResultError("the slide was explained anew since its audit; audit it again to see the spread")
        unit = METHOD_INFO[about["method"]].unit
        self.channels = tuple(_describe(i, channel, unit) for i, channel in enumerate(store.channels))
        self.levels, self.stride_px = slide.levels, slide.stride_px
        self._store, self._check = store, check

    def read(self, channel: ChannelInfo, level: int, region: Region) -> NDArray[np.float32]:
        """Return values of a channel, float32 [height, width]; 0 where fewer than two patches cover a pixel.

        Raises:
            ResultError: the image is damaged.
            NotShownError: the slide is being audited again.
        """
        return _checked(lambda: self._store.read(level, channel.number, region), self._check)

    def read_coverage(self, level: int, region: Region) -> NDArray[np.uint8]:
        """Return the bits of each pixel, 2 where several patches cover it. Raises as `read`."""
        return _checked(lambda: self._store.read_flags(level, region), self._check)


@dataclass(frozen=True)
class Spread:
    """The spread of a slide, to be shown as its heatmap is.

    Attributes:
        key: of the slide.
        version: changes with the slide's version and with the spread.
        digest: of the spread's files; part of addresses.
    """

    key: str
    version: str
    digest: str
    result: SpreadImage

    @property
    def is_final(self) -> bool:
        """Return True: a spread with this digest does not change."""
        return True


class Spreads:
    """Finds and opens spreads; those used last stay open. No file is touched for slides that nobody views."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._open: Cache[tuple[str, str, str], Spread] = Cache(MAX_OPEN)

    def of(self, slide: ServedSlide) -> Spread | None:
        """Return the spread of a slide; None if no audit has made one.

        Raises:
            WsiGradcamError: it is damaged, belongs to another heatmap, or a link leads out of OUT.
        """
        digest = self._digest(slide)
        return None if digest is None else self.with_digest(slide, digest)

    def with_digest(self, slide: ServedSlide, digest: str) -> Spread:
        """Return the spread of a slide with the digest in an address.

        Raises:
            NotShownError: the slide has another spread, or none.
            WsiGradcamError: as `of`.
        """
        return self._open.get((slide.key, slide.version, digest), lambda: self._read(slide, digest))

    def _read(self, slide: ServedSlide, digest: str) -> Spread:
        folder, result = self._folder, slide.result

        def check() -> None:
            # An audit that starts again removes the plan first, and writes the means last.
            if not folder.plan.is_file() or self._digest(slide) != digest:
                raise NotShownError("the slide is, or was, audited anew; load the page again")

        place = folder.spread(result.id)
        check_tree(self._archive.out, place)
        image = _checked(lambda: SpreadImage(result, HeatmapStore(place, read_only=True), check), check)
        return Spread(slide.key, f"{slide.version} {SPREAD} {digest}", digest, image)

    def _digest(self, slide: ServedSlide) -> str | None:
        """Return a digest of the means, which are written once the image is complete; None if there are none."""
        slide_id = slide.result.id
        check_inside(self._archive.out, self._folder.spread_means(slide_id))
        means = self._folder.read_spread(slide_id)
        return None if means is None else hashlib.sha256(json.dumps(means, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def _folder(self) -> AuditFolder:
        return AuditFolder(self._archive.out / AUDIT)


def _checked(read: Callable[[], T], check: Callable[[], None]) -> T:
    """Return what `read` returns if the check passes afterwards: files that are being removed look empty.

    Raises:
        ResultError: the files are damaged.
    """
    try:
        return read()
    except Exception as error:  # zarr and its codecs raise many kinds
        if isinstance(error, WsiGradcamError) and not isinstance(error, StoreError):
            raise
        raise ResultError(f"{DAMAGED} ({one_line(error)}); audit the run again with --overwrite") from error
    finally:
        check()


def _describe(number: int, channel: Channel, unit: str) -> ChannelInfo:
    if not all(map(math.isfinite, (channel.minimum, channel.maximum, channel.start, channel.end))):
        raise ValueError(f"{channel.label}: a window that is not finite")
    return ChannelInfo(
        number,
        channel.label,
        SPREAD,
        channel.label.removeprefix(f"{SPREAD}: "),
        unit,
        channel.minimum,
        channel.maximum,
        (channel.start, channel.end),
        COLOURS[number % len(COLOURS)],
    )
