"""OME-Zarr images (OME-NGFF 0.4 and 0.5) as slides, in folders and at URLs.

So are the collections of images that bioformats2raw writes (layout 3): the first image is the slide, if the others are
small (labels, macros, thumbnails).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import takewhile
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from wsi_gradcam.errors import (
    SlideAccessError,
    SlideContentError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
    SlideReadError,
    StoreError,
    one_line,
    quoted,
)
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.io.zarr_stores import SLIDES, LocalSlideStore, bounded
from wsi_gradcam.slides.base import (
    Channel,
    SlideInfo,
    check_mpp,
    check_not_dark,
    make_levels,
    pad_with_background,
    shown_channels,
)
from wsi_gradcam.slides.remote import RemoteZarr
from wsi_gradcam.slides.tiff_levels import MAX_XML, significant_bits
from wsi_gradcam.slides.tiff_metadata import OneOfSeveral, ome_mpp, ome_names, slide_of
from wsi_gradcam.slides.tiff_samples import eight_bits, full_scale

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rgb = NDArray[np.uint8]
    from wsi_gradcam.slides.base import Channels

    Key = tuple[int, int, int]  # level, row, column

WHITE = (255, 255, 255)
UM_PER_UNIT = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
BYTES_IN_DIGEST = 1 << 22  # bytes of the coarsest level
CHUNKS_IN_DIGEST = 4  # versions of remote chunks, of each level
CACHE_BYTES = 32 << 20
MANY_CHUNKS_PX = 1 << 22  # larger ones are unpacked one at a time
MAX_CHANNELS = 64  # channels of one image
WAITING_THREADS = 8  # chunks of one region that are fetched at once
# Limits on what a file may claim.
MAX_LEVELS = 64
MAX_CHUNKS = 1 << 24  # of a level
MAX_CHUNKS_COARSEST = 1 << 17  # chunks, all of which are read for a thumbnail
FEW_CHUNKS, SMALL_CHUNK_PX = 1 << 10, 1 << 12  # if a level has more chunks, they may not be smaller
MAX_CHUNK_PX, THIN_PX = 1 << 24, 1 << 9  # thinner ones may not be larger than `MANY_CHUNKS_PX`
GOLDEN = 0.618033988749895  # its multiples spread evenly, not along an axis
SPARSE_PX, LOOKED_AT = 1 << 28, 256  # of the chunks of a larger coarsest level, one in this many must exist


class OmeZarrSlide:
    """A `Slide` in an OME-Zarr image of one picture in colour or grey, in a folder or at a URL."""

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
            group: Any = zarr.open_group(store, mode="r")
            self._xml, self._number = b"", 0
            self._images: tuple[str, ...] = ()
            if _is_collection(group):
                self._xml = _ome_xml(place)
                series = _series(group, ome_names(self._xml))
                self._images = tuple(map(str, series))
                group = group[slide_of(series, self._path)]
            self._scales = _multiscales(group)
            self._levels = _opened(group, store, self._scales["datasets"])
            self._axes = [axis["name"] for axis in self._scales["axes"]]
            self._check()
            self._shown = self._shown_channels(group, channels)
            self._cache = Cache(max(CACHE_BYTES, 3 * max(map(self._most_px, self._levels))), attrgetter("nbytes"))
            self._check_there(self._levels[-1])
            if mpp is None and not self._xml and not self._mpp()[0]:
                self._xml, self._number = _xml_above(place)
            told = (self._xml, self._number) if self._xml else _xml_above(place)
            self._full = full_scale(self._levels[0].dtype.itemsize * 8, significant_bits(*told))
            self._info = self._described(mpp)
            if not self._full:
                check_not_dark(self, self._some_places(), chosen=channels is not None)
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
            SlideAccessError: a remote image can no longer be reached.
        """
        return pad_with_background(region, self._info.levels[level], WHITE, partial(self._pixels, level))

    def close(self) -> None:
        """Stop the threads that fetch; nothing else is held open."""
        if self._pool is not None:
            self._pool.shutdown()

    def _pixels(self, level: int, region: Region) -> Rgb:
        chunks = self._chunks(level, region)
        rgb = np.empty((region.height, region.width, 3), np.uint8)
        # Large ones one after another: each takes as much memory as it unpacks to.
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
                    f"{self._where(level, region)} has no data: a chunk is missing from the file, or is all black"
                )
        return rgb

    def _made(self, keys: list[Key]) -> list[Rgb | Exception]:
        """Return decoded chunks, or the errors of those that cannot be decoded."""
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
        except Exception as error:  # codecs raise many kinds of errors
            raise SlideReadError(f"{self._where(level, region)} cannot be decoded: {one_line(error)}") from error
        left = [axis for axis in self._axes if axis in wanted]
        # Axes may be in any order; pixels are cut out and pasted as y, x, colour.
        order = [left.index("y"), left.index("x"), *([left.index("c")] if "c" in left else [])]
        values = values.transpose(order) if "c" in left else values.transpose(order)[..., None]
        if self._shown is not None:
            values = values[..., list(self._shown)]
        try:
            scaled = eight_bits(values, self._full)
        except ValueError as error:
            raise SlideReadError(f"{self._where(level, region)} has {error}") from error
        rgb = np.repeat(scaled, 3, axis=2) if scaled.shape[2] == 1 else scaled
        return np.ascontiguousarray(rgb.astype(np.uint8, copy=False))

    def _where(self, level: int, region: Region) -> str:
        return f"{self._path}: level {level}, x {region.x}, y {region.y}, {region.width} x {region.height} px"

    def _chunk_px(self, level: int) -> tuple[int, int]:
        """Return (height, width) of a chunk; of the inner ones, if there are shards."""
        chunks = self._levels[level].chunks
        return int(chunks[self._axes.index("y")]), int(chunks[self._axes.index("x")])

    def _chunk_region(self, level: int, row: int, column: int) -> Region:
        (height, width), size = self._chunk_px(level), self._info.levels[level]
        return Region(row * height, column * width, height, width).intersect(Region(0, 0, size.height, size.width))

    def _chunks(self, level: int, region: Region) -> dict[Key, Region]:
        """Return the chunks that a region touches, and the region's parts in them."""
        height, width = self._chunk_px(level)
        rows = range(region.y // height, ceil_div(region.bottom, height))
        columns = range(region.x // width, ceil_div(region.right, width))
        return {(level, r, c): self._chunk_region(level, r, c).intersect(region) for r in rows for c in columns}

    def _most_px(self, level: Any) -> int:
        """Return how many pixels a chunk of a level can show.

        Raises:
            SlideFormatError: more than may be unpacked, or in too thin a strip.
        """
        y, x = (self._axes.index(axis) for axis in "yx")
        height, width = (min(level.chunks[axis], level.shape[axis]) for axis in (y, x))
        if height * width > (MAX_CHUNK_PX if min(height, width) >= THIN_PX else MANY_CHUNKS_PX):
            raise SlideFormatError(f"level {level.path} has chunks of {width} x {height} px; {SLIDES.mend}")
        return int(height * width)

    def _some_places(self) -> list[tuple[int, Region]]:
        """Return small parts of the coarsest level, in its middle and towards the first corner."""
        level, at = self._info.levels[-1], [(y, x) for y in (2, 1, 0) for x in (2, 1, 0)]
        size = min(256, ceil_div(level.height, 4)), min(256, ceil_div(level.width, 4))
        places = [Region(level.height * y // 4, level.width * x // 4, *size) for y, x in at]
        return [(len(self._levels) - 1, place) for place in places]

    def _check(self) -> None:
        array = self._levels[0]
        sizes = dict(zip(self._axes, array.shape, strict=True))
        once = {axis for axis in sizes if self._axes.count(axis) == 1 and (axis in ("y", "x", "c") or sizes[axis] == 1)}
        if not {"y", "x"} <= once or once != sizes.keys():
            raise SlideContentError(f"the image has axes {quoted(sizes)}, expected y, x and colours")
        if sizes.get("c", 1) > MAX_CHANNELS:
            raise SlideContentError(f"{sizes['c']:,} channels, expected at most {MAX_CHANNELS}")
        if array.dtype not in (np.uint8, np.uint16):
            what = "expected unsigned 8 or 16 bits: heatmaps, for example, are not slides"
            raise SlideContentError(f"values of {array.dtype}, {what}")

    def _shown_channels(self, group: Any, chosen: Channels | None) -> Channels | None:
        """Return the channels that are red, green and blue; None for one grey picture."""
        count = dict(zip(self._axes, self._levels[0].shape, strict=True)).get("c", 1)
        if count == 1:
            return None
        attributes: Mapping[str, Any] = group.attrs.asdict()
        said = attributes.get("ome", attributes).get("omero", {}).get("channels", [])
        described = [Channel(str(channel.get("label", "")), _colour(channel.get("color"))) for channel in said]
        return shown_channels(count, described if len(described) == count else [], chosen, plain=True)

    def _described(self, mpp: tuple[float, float] | None) -> SlideInfo:
        y, x = self._axes.index("y"), self._axes.index("x")
        found, problem = (mpp, "") if mpp is not None else self._either_mpp()
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
            images=self._images,
        )

    def _spacing(self, dataset: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return the size of a level's pixels (y, x), in any unit; None if it is not stated."""
        scales = [transform["scale"] for transform in _scalings(self._scales, dataset)]
        if not scales:
            return None
        y, x = (float(math.prod(scale[self._axes.index(axis)] for scale in scales)) for axis in "yx")
        return y, x

    def _either_mpp(self) -> tuple[tuple[float, float] | None, str]:
        """Return the mpp from the scales, or from the OME-XML beside the image; the two must not disagree."""
        by_scale, problem = self._mpp()
        by_xml, _ = ome_mpp(self._xml, self._number) if self._xml else (None, "")
        if by_scale is None or by_xml is None:
            return (by_scale, "") if by_scale else (by_xml, "") if by_xml else (None, problem)
        if any(abs(a - b) > MPP_ROUNDED * b for a, b in zip(by_scale, by_xml, strict=True)):
            told = " and ".join(f"{y:g}, {x:g}" for y, x in (by_scale, by_xml))
            return None, f"its scales and its OME-XML state different pixel sizes (y, x: {told} um); give --mpp"
        return by_scale, ""

    def _mpp(self) -> tuple[tuple[float, float] | None, str]:
        values = []
        for name in "yx":
            number = self._axes.index(name)
            unit = self._scales["axes"][number].get("unit")
            if unit not in UM_PER_UNIT:
                return None, f"axis {name} has unit {quoted(unit)}; give the micrometres per pixel, such as --mpp 0.25"
            steps = [t["scale"][number] for t in _scalings(self._scales, self._scales["datasets"][0])]
            value = float(np.prod(steps)) * UM_PER_UNIT[unit]
            if problem := check_mpp(value, f"the scale of axis {name}"):
                return None, problem
            values.append(value)
        return (values[0], values[1]), ""

    def _digest(self) -> str:
        """Return a digest of the metadata and of some pixels or, for a remote image, the versions of some chunks."""
        digest = hashlib.sha256(json.dumps(self._scales, sort_keys=True, default=str).encode())
        for level in self._levels:
            digest.update(f"{level.shape} {level.dtype} {level.chunks}".encode())
        if self._remote is not None and self._pool is not None:
            names = self._sample_objects()
            for name, identity in zip(names, self._pool.map(self._remote.identity, names), strict=True):
                digest.update(f"{name} {identity}".encode())
            return digest.hexdigest()[:32]
        coarsest = self._levels[-1]  # it represents the rest, as in OpenSlide's hash
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
        """Raise a SlideFormatError for a vast level without chunks: filling it in takes long, too."""
        count = math.prod(_grid(level))
        if level.size <= SPARSE_PX:
            return
        names = {_chunk_name(level, int(i * GOLDEN % 1 * count)) for i in range(LOOKED_AT)}
        if self._remote is None or self._pool is None:
            there = any((Path(self._path) / name).exists() for name in names)
        else:
            there = any(found != "missing" for found in self._pool.map(self._remote.identity, names))
        if not there:
            raise SlideFormatError(f"none of {len(names)} chunks examined exists; copy the image again from its source")


def _grid(level: Any) -> list[int]:
    """Return the number of chunks, or shards, along each axis."""
    return [ceil_div(n, size) for n, size in zip(level.shape, level.shards or level.chunks, strict=True)]


def _chunk_name(level: Any, number: int) -> str:
    """Return the name of the file of a level's chunk or shard of this number."""
    place = tuple(int(i) for i in np.unravel_index(number, _grid(level)))
    return f"{level.path}/{level.metadata.encode_chunk_key(place)}"


def _multiscales(group: Any) -> dict[str, Any]:
    attributes: Mapping[str, Any] = group.attrs.asdict()
    if "wsi_gradcam" in attributes:
        raise SlideFormatError("a heatmap made by wsi_gradcam, not a slide; give the slide it was made from")
    if "image-label" in attributes.get("ome", attributes):
        raise SlideFormatError("the labels of an image, not an image; give the image that they belong to")
    found = attributes.get("ome", attributes).get("multiscales")
    if not found:
        raise SlideFormatError("a Zarr group without multiscales, expected an OME-Zarr image")
    scales: dict[str, Any] = found[0]
    return scales


def _opened(group: Any, store: LocalSlideStore | RemoteZarr, datasets: Any) -> list[Any]:
    """Return the levels' arrays, whose chunks are now safe to read.

    Raises:
        SlideFormatError: they claim more than any slide's image has.
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
                f"level {number} of {tuple(level.shape)} px in {count:,} chunks of {tuple(level.chunks)}, expected at "
                f"most {most:,} of {SMALL_CHUNK_PX:,} px and more; {SLIDES.mend}"
            )
    return levels


def _colour(text: object) -> tuple[int, int, int] | None:
    try:
        red, green, blue = bytes.fromhex(str(text))
    except ValueError:
        return None
    return red, green, blue


# From bioformats2raw (OME-NGFF 0.4 and 0.5, section "bioformats2raw.layout").
LAYOUT, LAYOUT_VERSION = "bioformats2raw.layout", 3
OME_XML = "OME/METADATA.ome.xml"
MAX_SERIES = 256
MPP_ROUNDED = 0.01


def _ome(group: Any) -> Mapping[str, Any]:
    attributes: Mapping[str, Any] = group.attrs.asdict()
    found: Mapping[str, Any] = attributes.get("ome", attributes)
    return found


def _is_collection(group: Any) -> bool:
    """Return True for a group of images as bioformats2raw writes it.

    Raises:
        SlideFormatError: it has another layout, or is a plate of wells.
    """
    about = _ome(group)
    if "plate" in about:
        raise SlideFormatError("a plate of wells, expected one image; give a field by its path, such as .../A/1/0")
    if LAYOUT not in about or "multiscales" in about:
        return False
    if about[LAYOUT] != LAYOUT_VERSION:
        raise SlideFormatError(f"bioformats2raw layout {about[LAYOUT]}, expected {LAYOUT_VERSION}; convert it again")
    return True


def _series(group: Any, names: Sequence[str]) -> list[OneOfSeveral]:
    """Return the images of a collection.

    Raises:
        SlideFormatError: there is none, or there are more than any slide has.
    """
    paths = _series_paths(group)
    if not paths or len(paths) > MAX_SERIES:
        raise SlideFormatError(f"a collection of {len(paths) or 'no'} images, expected 1 to {MAX_SERIES}")
    told = names if len(names) == len(paths) else [""] * len(paths)
    return [_one_of_series(group, path, name) for path, name in zip(paths, told, strict=True)]


def _series_paths(group: Any) -> list[str]:
    """Return the paths of the images: as listed, else numbers from 0 on."""
    listed = _ome(group["OME"]).get("series") if "OME" in group else None
    if listed is None:
        return [str(number) for number in takewhile(lambda number: str(number) in group, range(MAX_SERIES + 1))]
    if not all(isinstance(path, str) and path and not {"", ".", ".."} & set(path.split("/")) for path in listed):
        raise SlideFormatError(f"a list of images {quoted(listed)[:80]}, expected paths in the collection")
    return list(listed)


def _one_of_series(group: Any, path: str, name: str) -> OneOfSeveral:
    try:
        image = group[path]
        scales = _multiscales(image)
        axes = [axis["name"] for axis in scales["axes"]]
        y, x = axes.index("y"), axes.index("x")
        shape = image[scales["datasets"][0]["path"]].shape
        steps = [t["scale"] for t in _scalings(scales, scales["datasets"][0])]
        known = bool(steps) and scales["axes"][y].get("unit") in UM_PER_UNIT
        spacing = (float(math.prod(s[y] for s in steps)), float(math.prod(s[x] for s in steps))) if known else None
        return OneOfSeveral(path, name or str(scales.get("name") or ""), (int(shape[y]), int(shape[x])), spacing)
    except SlideAccessError:
        raise
    except Exception:  # metadata may be anything
        return OneOfSeveral(path, name, None, None)


def _ome_xml(place: Path | RemoteZarr) -> bytes:
    """Return the OME-XML of a collection; empty if there is none."""
    if not isinstance(place, Path):
        return place.small_file(OME_XML, MAX_XML)
    path = place / OME_XML
    return path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_XML else b""


def _xml_above(place: Path | RemoteZarr) -> tuple[bytes, int]:
    """Return the OME-XML of the collection that contains an image, and its number there; empty if it stands alone."""
    above = place.resolve().parent if isinstance(place, Path) else place.parent()
    name = place.resolve().name if isinstance(place, Path) else place.name.rstrip("/").rpartition("/")[2]
    try:
        group = zarr.open_group(above, mode="r")
        return (_ome_xml(above), _series_paths(group).index(name)) if _is_collection(group) else (b"", 0)
    except Exception:  # there is none, or it cannot be read: it then says nothing about the pixel size
        return b"", 0


def _scalings(scales: Mapping[str, Any], dataset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    both = [*dataset.get("coordinateTransformations", ()), *scales.get("coordinateTransformations", ())]
    return [transform for transform in both if transform.get("type") == "scale"]
