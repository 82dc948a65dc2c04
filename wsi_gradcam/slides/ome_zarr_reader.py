"""OME-Zarr images (OME-NGFF 0.4 and 0.5) as slides, in folders and behind URLs."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import ObjectStore

from wsi_gradcam.errors import (
    SlideAccessError,
    SlideContentError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
    SlideReadError,
    StoreError,
    one_line,
)
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.io.urls import redact_url
from wsi_gradcam.io.zarr_stores import SLIDES, LocalSlideStore, SlideLimits, bounded, check_count
from wsi_gradcam.slides.base import Channel, SlideInfo, check_mpp, make_levels, pad_with_background, shown_channels
from wsi_gradcam.slides.remote import KEPT_BYTES, access_error, folder_store, probe

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    Request = tuple[str, ByteRequest | None]
    Rgb = NDArray[np.uint8]
    from wsi_gradcam.slides.base import Channels

    Key = tuple[int, int, int]  # level, row, column

WHITE = (255, 255, 255)
UM_PER_UNIT = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
BYTES_IN_DIGEST = 1 << 22  # bytes of the coarsest level
CHUNKS_IN_DIGEST = 4  # versions of remote chunks, of each level
CACHE_BYTES = 32 << 20
MANY_CHUNKS_PX = 1 << 22  # of larger ones only one is unpacked at a time
MAX_CHANNELS = 64  # stains of one tissue
WAITING_THREADS = 8  # chunks of one region that are fetched at once
# Bounds on what a file may claim.
MAX_LEVELS = 64
MAX_CHUNKS = 1 << 24  # of a level
MAX_CHUNKS_COARSEST = 1 << 17  # all of which are read for a thumbnail
FEW_CHUNKS, SMALL_CHUNK_PX = 1 << 10, 1 << 12  # a level of more chunks may not have them smaller
MAX_CHUNK_PX, THIN_PX = 1 << 24, 1 << 9  # thinner ones may not be larger than `MANY_CHUNKS_PX`
GOLDEN = 0.618033988749895  # its multiples spread evenly, along no axis
SPARSE_PX, LOOKED_AT = 1 << 28, 256  # of the chunks of a larger coarsest level, one of so many must be there


class RemoteZarr(SlideLimits, ObjectStore[Any]):
    """A Zarr store behind a URL that caches its latest reads and distinguishes network errors from damage."""

    def __init__(self, url: str) -> None:
        super().__init__(folder_store(url), read_only=True)
        self.name = redact_url(url)
        self._cache_of_reads: Cache[Request, bytes] = Cache(KEPT_BYTES, len)
        self._sizes: dict[str, int] = {}
        self._pending: dict[Request, asyncio.Task[bytes | None]] = {}

    def identity(self, key: str) -> str:
        """Return size and version of an object, or "missing".

        Raises:
            SlideAccessError: the server does not answer.
        """
        try:
            size, version, _ = probe(self.store, key)
        except FileNotFoundError:
            return "missing"
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        return f"{size} {version}"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object, or a range of it; None where there is none.

        All calls come in zarr's own thread, so that nothing needs a lock.

        Raises:
            SlideAccessError: the server does not answer.
        """
        request = key, byte_range
        data = self._cache_of_reads.peek(request)
        if data is None:
            if request not in self._pending:
                task = self._pending[request] = asyncio.ensure_future(self._fetched(key, byte_range))
                task.add_done_callback(lambda _: self._pending.pop(request))
            data = await asyncio.shield(self._pending[request])
            if data is None:
                return None
            self._cache_of_reads.put(request, data)
        self.count(key, len(data))
        return prototype.buffer.from_bytes(data)

    async def _fetched(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        try:
            if isinstance(
                byte_range, SuffixByteRequest
            ):  # many a web server knows only ranges from one byte to another
                if key not in self._sizes:
                    self._sizes[key], *_ = await asyncio.to_thread(probe, self.store, key)
                size = self._sizes[key]
                byte_range = RangeByteRequest(max(0, size - byte_range.suffix), size)
            if byte_range is None:
                result = await self.store.get_async(key)
                check_count(f"{self.name}/{key}", result.meta["size"], None, self.most(key), self.mend)
                return bytes(await result.bytes_async())
            check_count(f"{self.name}/{key}", sys.maxsize, byte_range, self.most(key), self.mend)
            found = await super().get(key, default_buffer_prototype(), byte_range)
        except FileNotFoundError:
            return None
        except StoreError:
            raise
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        return None if found is None else found.to_bytes()


class OmeZarrSlide:
    """A `Slide` in an OME-Zarr image of one picture in colour or gray, in a folder or behind a URL."""

    def __init__(
        self,
        place: Path | RemoteZarr,
        mpp: tuple[float, float] | None = None,
        trust_objective: bool = False,
        channels: Channels | None = None,
    ) -> None:
        self._remote = None if isinstance(place, Path) else place
        self._path = str(place) if isinstance(place, Path) else place.name
        self._cache: Cache[Key, Rgb]
        self._pool = None if self._remote is None else ThreadPoolExecutor(WAITING_THREADS, "chunk")
        try:
            store = LocalSlideStore(place, read_only=True) if isinstance(place, Path) else place
            group = zarr.open_group(store, mode="r")
            self._scales = _multiscales(group)
            self._levels = _opened(group, store, self._scales["datasets"])
            self._axes = [axis["name"] for axis in self._scales["axes"]]
            self._check()
            self._shown = self._shown_channels(group, channels)
            self._cache = Cache(max(CACHE_BYTES, 3 * max(map(self._most_px, self._levels))), attrgetter("nbytes"))
            self._check_there(self._levels[-1])
            self._info = self._described(mpp)
        except SlideAccessError:
            raise
        except SlideError as error:
            raise type(error)(f"{self._path}: {error}") from error
        except Exception as error:  # metadata may be anything
            if self._remote is not None and isinstance(error, FileNotFoundError):
                raise SlideNotFoundError(f"{self._path}: no Zarr group there; check the URL") from error
            raise SlideFormatError(
                f"{self._path}: not an OME-Zarr image that can be read ({one_line(error)[:200]}); expected OME-NGFF "
                "0.4, 0.5"
            ) from error

    @property
    def info(self) -> SlideInfo:
        """The slide's metadata."""
        return self._info

    def read_level(self, level: int, region: Region) -> Rgb:
        """Return the pixels of `region` of `level` as RGB uint8 [height, width, 3]; outside the slide: white.

        Raises:
            SlideReadError: a chunk cannot be decoded, or is missing where zarr would fill in black.
            SlideAccessError: a remote image cannot be reached any more.
        """
        return pad_with_background(region, self._info.levels[level], WHITE, partial(self._pixels, level))

    def close(self) -> None:
        """Stop the threads that fetch; nothing else is held open."""
        if self._pool is not None:
            self._pool.shutdown()

    def _pixels(self, level: int, region: Region) -> Rgb:
        chunks = self._chunks(level, region)
        rgb = np.empty((region.height, region.width, 3), np.uint8)
        # Large ones one after the other: each takes what it unpacks to.
        at_once = len(chunks) if math.prod(self._chunk_px(level)) <= MANY_CHUNKS_PX else 1
        keys = list(chunks)
        for first in range(0, len(keys), at_once):
            some = keys[first : first + at_once]
            for key, tile in zip(some, self._cache.get_many(some, self._made), strict=True):
                chunk, part = self._chunk_region(*key), chunks[key]
                place = Region(part.y - region.y, part.x - region.x, part.height, part.width)
                rgb[place.slices] = tile[Region(part.y - chunk.y, part.x - chunk.x, part.height, part.width).slices]
        for part in chunks.values():
            if not rgb[Region(part.y - region.y, part.x - region.x, part.height, part.width).slices].any():
                raise SlideReadError(
                    f"{self._where(level, region)} has no data: a chunk is missing in the file, or black throughout"
                )
        return rgb

    def _made(self, keys: list[Key]) -> list[Rgb | Exception]:
        """Return decoded chunks, or the errors of those that cannot be."""
        return list(map(self._chunk, keys) if self._pool is None else self._pool.map(self._chunk, keys))

    def _chunk(self, key: Key) -> Rgb | Exception:
        try:
            return self._converted(key[0], self._chunk_region(*key))
        except SlideError as error:
            return error

    def _converted(self, level: int, region: Region) -> Rgb:
        """Return a region in RGB."""
        wanted = {"y": slice(region.y, region.bottom), "x": slice(region.x, region.right), "c": slice(None)}
        try:
            values = np.asarray(self._levels[level][tuple(wanted.get(axis, 0) for axis in self._axes)])
        except SlideError:
            raise
        except Exception as error:  # codecs raise many kinds
            raise SlideReadError(f"{self._where(level, region)} cannot be decoded: {one_line(error)}") from error
        left = [axis for axis in self._axes if axis in wanted]
        # Axes may be in any order; pixels are cut and pasted as y, x, colour.
        order = [left.index("y"), left.index("x"), *([left.index("c")] if "c" in left else [])]
        values = values.transpose(order) if "c" in left else values.transpose(order)[..., None]
        if self._shown is not None:
            values = values[..., list(self._shown)]
        scaled = values if values.dtype == np.uint8 else (values.astype(np.uint32) + 128) // 257
        rgb = np.repeat(scaled, 3, axis=2) if scaled.shape[2] == 1 else scaled
        return np.ascontiguousarray(rgb.astype(np.uint8, copy=False))

    def _where(self, level: int, region: Region) -> str:
        return f"{self._path}: level {level}, y {region.y}, x {region.x}, {region.height} x {region.width} px"

    def _chunk_px(self, level: int) -> tuple[int, int]:
        """Return (height, width) of a chunk, the inner one where there are shards."""
        chunks = self._levels[level].chunks
        return int(chunks[self._axes.index("y")]), int(chunks[self._axes.index("x")])

    def _chunk_region(self, level: int, row: int, column: int) -> Region:
        (height, width), size = self._chunk_px(level), self._info.levels[level]
        return Region(row * height, column * width, height, width).intersect(Region(0, 0, size.height, size.width))

    def _chunks(self, level: int, region: Region) -> dict[Key, Region]:
        """Return the chunks that a region touches, and its parts in them."""
        height, width = self._chunk_px(level)
        rows = range(region.y // height, ceil_div(region.bottom, height))
        columns = range(region.x // width, ceil_div(region.right, width))
        return {(level, r, c): self._chunk_region(level, r, c).intersect(region) for r in rows for c in columns}

    def _most_px(self, level: Any) -> int:
        """Return how many pixels a chunk of a level can show.

        Raises:
            SlideFormatError: more than are unpacked, or in too thin a strip.
        """
        y, x = (self._axes.index(axis) for axis in "yx")
        height, width = (min(level.chunks[axis], level.shape[axis]) for axis in (y, x))
        if height * width > (MAX_CHUNK_PX if min(height, width) >= THIN_PX else MANY_CHUNKS_PX):
            raise SlideFormatError(f"level {level.path} has chunks of {height} x {width} px; {SLIDES.mend}")
        return int(height * width)

    def _check(self) -> None:
        array = self._levels[0]
        sizes = dict(zip(self._axes, array.shape, strict=True))
        if not {"y", "x"} <= sizes.keys() or any(sizes[axis] != 1 for axis in sizes.keys() - {"y", "x", "c"}):
            raise SlideContentError(f"an image of axes {sizes}, expected one picture of y, x and colours")
        if sizes.get("c", 1) > MAX_CHANNELS:
            raise SlideContentError(f"{sizes['c']:,} channels, expected up to {MAX_CHANNELS}")
        if array.dtype not in (np.uint8, np.uint16):
            raise SlideContentError(
                f"values of {array.dtype}, expected 8 or 16 bits without sign: heatmaps, for one, are no slides"
            )

    def _shown_channels(self, group: Any, chosen: Channels | None) -> Channels | None:
        """Return the channels that are red, green and blue; None for one picture in gray."""
        count = dict(zip(self._axes, self._levels[0].shape, strict=True)).get("c", 1)
        if count == 1:
            return None
        attributes: Mapping[str, Any] = group.attrs.asdict()
        said = attributes.get("ome", attributes).get("omero", {}).get("channels", [])
        described = [Channel(str(channel.get("label", "")), _colour(channel.get("color"))) for channel in said]
        return shown_channels(count, described if len(described) == count else [], chosen, plain=True)

    def _described(self, mpp: tuple[float, float] | None) -> SlideInfo:
        y, x = self._axes.index("y"), self._axes.index("x")
        found, problem = (mpp, "") if mpp is not None else self._mpp()
        return SlideInfo(
            path=self._path,
            levels=make_levels(
                [(level.shape[y], level.shape[x]) for level in self._levels],
                [self._spacing(dataset) for dataset in self._scales["datasets"]],
                [self._chunk_px(level) for level in range(len(self._levels))],
            ),
            mpp=found,
            mpp_problem=problem,
            vendor="ome-zarr",
            background=WHITE,
            bounds=None,
            digest=self._digest(),
        )

    def _spacing(self, dataset: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return the size of a level's pixels (y, x), in any unit; None where it is not told."""
        scales = [transform["scale"] for transform in _scalings(self._scales, dataset)]
        if not scales:
            return None
        y, x = (float(math.prod(scale[self._axes.index(axis)] for scale in scales)) for axis in "yx")
        return y, x

    def _mpp(self) -> tuple[tuple[float, float] | None, str]:
        values = []
        for name in "yx":
            number = self._axes.index(name)
            unit = self._scales["axes"][number].get("unit")
            if unit not in UM_PER_UNIT:
                return None, f"axis {name} has unit {unit!r}; give the micrometres per pixel with --mpp"
            steps = [t["scale"][number] for t in _scalings(self._scales, self._scales["datasets"][0])]
            value = float(np.prod(steps)) * UM_PER_UNIT[unit]
            if problem := check_mpp(value, f"the scale of axis {name}"):
                return None, problem
            values.append(value)
        return (values[0], values[1]), ""

    def _digest(self) -> str:
        """Return a digest of the metadata and of some pixels or, of a remote image, of the versions of some chunks."""
        digest = hashlib.sha256(json.dumps(self._scales, sort_keys=True, default=str).encode())
        for level in self._levels:
            digest.update(f"{level.shape} {level.dtype} {level.chunks}".encode())
        if self._remote is not None and self._pool is not None:
            names = self._sample_objects()
            for name, identity in zip(names, self._pool.map(self._remote.identity, names), strict=True):
                digest.update(f"{name} {identity}".encode())
            return digest.hexdigest()[:32]
        coarsest = self._levels[-1]  # it stands for the rest, as in OpenSlide's hash
        height, width = (coarsest.shape[self._axes.index(axis)] for axis in "yx")
        rows = max(1, BYTES_IN_DIGEST // max(1, coarsest.nbytes // height))
        cut = {"y": slice(rows), "x": slice(max(1, BYTES_IN_DIGEST * height * width // coarsest.nbytes))}
        digest.update(np.asarray(coarsest[tuple(cut.get(axis, slice(None)) for axis in self._axes)]).tobytes())
        return digest.hexdigest()[:32]

    def _sample_objects(self) -> list[str]:
        """Return the names of a few chunks or shards of each level, from its first to its last."""
        found = []
        for level in self._levels:
            shares = np.linspace(0, math.prod(_grid(level)) - 1, CHUNKS_IN_DIGEST)
            found += [_chunk_name(level, number) for number in np.unique(shares.astype(int))]
        return found

    def _check_there(self, level: Any) -> None:
        """Raise a SlideFormatError for a vast level without chunks: to fill it in takes long, too."""
        count = math.prod(_grid(level))
        if level.size <= SPARSE_PX:
            return
        names = {_chunk_name(level, int(i * GOLDEN % 1 * count)) for i in range(LOOKED_AT)}
        if self._remote is None or self._pool is None:
            there = any((Path(self._path) / name).exists() for name in names)
        else:
            there = any(found != "missing" for found in self._pool.map(self._remote.identity, names))
        if not there:
            raise SlideFormatError(f"none of {len(names)} of its chunks is there; copy the image again from its source")


def _grid(level: Any) -> list[int]:
    """Return how many chunks, or shards, there are along each axis."""
    return [ceil_div(n, size) for n, size in zip(level.shape, level.shards or level.chunks, strict=True)]


def _chunk_name(level: Any, number: int) -> str:
    """Return the name of the file of a level's chunk or shard of this number."""
    place = tuple(int(i) for i in np.unravel_index(number, _grid(level)))
    return f"{level.path}/{level.metadata.encode_chunk_key(place)}"


def _multiscales(group: Any) -> dict[str, Any]:
    attributes: Mapping[str, Any] = group.attrs.asdict()
    if "wsi_gradcam" in attributes:
        raise SlideFormatError("a heatmap that wsi_gradcam made, a result and no slide; give the slide that it shows")
    if "image-label" in attributes.get("ome", attributes):
        raise SlideFormatError("labels of an image, and no image; give the image that they belong to")
    found = attributes.get("ome", attributes).get("multiscales")
    if not found:
        raise SlideFormatError("a Zarr group without multiscales, expected an OME-Zarr image")
    scales: dict[str, Any] = found[0]
    return scales


def _opened(group: Any, store: LocalSlideStore | RemoteZarr, datasets: Any) -> list[Any]:
    """Return the levels' arrays, whose chunks may from now on be read.

    Raises:
        SlideFormatError: they claim more than any image of a slide.
    """
    if not isinstance(datasets, list) or not 0 < len(datasets) <= MAX_LEVELS:
        found = f"{len(datasets):,} levels" if isinstance(datasets, list) else "no list of levels"
        raise SlideFormatError(f"{found}, expected 1 to {MAX_LEVELS}; {SLIDES.mend}")
    levels = []
    for dataset in datasets:
        try:
            level = bounded(group[dataset["path"]], f"level {dataset['path']!r}"[:60], SLIDES)
        except StoreError as error:
            raise SlideFormatError(str(error)) from error
        store.allow(level)
        levels.append(level)
    for number, level in enumerate(levels):
        grid = [ceil_div(n, size) for n, size in zip(level.shape, level.chunks, strict=True)]
        count, chunk_px = math.prod(grid), math.prod(level.chunks)
        most = MAX_CHUNKS_COARSEST if number == len(levels) - 1 else MAX_CHUNKS
        if count > most or (count > FEW_CHUNKS and chunk_px < SMALL_CHUNK_PX):
            raise SlideFormatError(
                f"level {number} of {tuple(level.shape)} px in {count:,} chunks of {tuple(level.chunks)}, expected "
                f"up to {most:,} of {SMALL_CHUNK_PX:,} px and more; {SLIDES.mend}"
            )
    return levels


def _colour(text: object) -> tuple[int, int, int] | None:
    try:
        red, green, blue = bytes.fromhex(str(text))
    except ValueError:
        return None
    return red, green, blue


def _scalings(scales: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    both = [*dataset.get("coordinateTransformations", ()), *scales.get("coordinateTransformations", ())]
    return [transform for transform in both if transform.get("type") == "scale"]
