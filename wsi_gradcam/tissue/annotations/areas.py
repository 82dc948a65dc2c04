"""Areas that people drew on slides, as outlines in level-0 pixels or as label pictures, and masks of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from wsi_gradcam.errors import AnnotationError, canonical
from wsi_gradcam.geometry import Region, ceil_div
from wsi_gradcam.tissue.quality import fill, fill_small, is_small

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from wsi_gradcam.tissue.quality import Corners, Placed

    Box = tuple[float, float, float, float]
    Block = tuple[Region, NDArray[Any], frozenset[int]]  # a part of a picture, its labels, and the set of them

# Plain Python values take about twenty times the bytes of their JSON: this keeps a file below a gigabyte in memory.
MAX_BYTES = 32 << 20
MAX_COORDINATE_PX = 1e8  # no slide is larger: anything beyond is not a pixel coordinate


@dataclass(frozen=True, eq=False)
class Area:
    """A closed shape that somebody drew on a slide.

    Attributes:
        name: the name of its class, as shown by the program that drew it, in Unicode normalisation form C; "" if none.
        outline: float64 [n, 2] of (y, x) in level-0 px; the last point is joined to the first.
        holes: outlines of the parts that are cut out; they may reach beyond the area.
        groups: other names by which it may be chosen, such as those of the groups that contain it.
    """

    name: str
    outline: NDArray[np.float64]
    holes: tuple[NDArray[np.float64], ...] = ()
    groups: tuple[str, ...] = ()

    def is_of(self, names: Collection[str]) -> bool:
        """Return whether one of the names refers to it."""
        return self.name in names or any(group in names for group in self.groups)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", canonical(self.name))


@dataclass(frozen=True, eq=False)
class Annotations:
    """The areas in a file.

    Attributes:
        areas: in the order of the file.
        ignored: the number of shapes that enclose nothing, by type, such as {"Point": 3}.
    """

    areas: tuple[Area, ...]
    ignored: dict[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, each once, sorted."""
        return tuple(sorted({area.name for area in self.areas}))

    @property
    def known(self) -> tuple[str, ...]:
        """The names of the classes and of their groups, each once, sorted."""
        return tuple(sorted({name for area in self.areas for name in (area.name, *area.groups)}))


def make_annotations(path: Path, areas: Iterable[Area], ignored: Iterable[str]) -> Annotations:
    """Return the annotations of a file.

    Raises:
        AnnotationError: there is no area among them.
    """
    found = Annotations(tuple(areas), dict(Counter(ignored)))
    if not found.areas:
        what = ", ".join(f"{count} {kind}" for kind, count in sorted(found.ignored.items()))
        raise AnnotationError(
            f"{path}: holds {what + ', which enclose nothing' if what else 'no annotation'}; expected polygons"
        )
    return found


def make_outline(path: Path, what: str, points: Any) -> NDArray[np.float64]:
    """Return the outline float64 [n, 2] of (y, x) from points of (x, y), as all formats have them.

    Raises:
        AnnotationError: fewer than three points, or numbers that cannot be pixels.
    """
    try:
        flat = (float(point[axis]) for point in points for axis in (0, 1))
        xy = np.fromiter(flat, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise AnnotationError(f"{path}: {what} has points that are not pairs of numbers; expected x and y") from error
    if len(xy) < 3:
        raise AnnotationError(f"{path}: {what} has {len(xy)} points, expected 3 or more")
    if not bool(np.isfinite(xy).all()) or float(np.abs(xy).max()) > MAX_COORDINATE_PX:
        raise AnnotationError(f"{path}: {what} has coordinates that are not level-0 pixels of any slide")
    return xy[:, ::-1].copy()


def ellipse(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the outline of the ellipse in the bounding box of `corners`."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    centre, radius = (low + high) / 2, (high - low) / 2
    angle = np.linspace(0, 2 * math.pi, 180, endpoint=False)
    outline: NDArray[np.float64] = centre + radius * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return outline


def box(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the outline of the bounding box of `corners`."""
    (top, left), (bottom, right) = corners.min(axis=0), corners.max(axis=0)
    return np.array([(top, left), (top, right), (bottom, right), (bottom, left)])


# Pixels of all outlines, with the costs of each row crossing and of each outline: about five seconds.
MAX_WORK, CROSSING_WORK, OUTLINE_WORK, SMALL_WORK = 4e9, 20, 1e5, 1e4


def rasterise(
    areas: Sequence[Area], slide_px: tuple[float, float], shape: tuple[int, int], source: str = "annotations"
) -> NDArray[np.bool_]:
    """Return the pixels of a mask over a slide that lie in any of the areas, bool [h, w].

    A pixel is in an area if its centre lies inside the outline and in no hole. An outline that crosses itself contains
    everything that it surrounds. If an area is too small to contain any centre, the pixel in its middle counts, so that
    nothing that was drawn on the slide is lost.

    Args:
        areas: in level-0 px.
        slide_px: (height, width) of level 0, which the mask covers.
        shape: (h, w) of the mask.
        source: the name used in errors.

    Raises:
        AnnotationError: there are more or larger areas than people draw.
    """
    mask = np.zeros(shape, np.bool_)
    scale = np.array([shape[0] / slide_px[0], shape[1] / slide_px[1]])
    work = 0.0
    small: list[Placed] = []
    for area, (top, left, bottom, right) in zip(areas, _boxes(areas, scale, shape), strict=True):
        outline, box = area.outline * scale, (top, left, bottom, right)
        if bottom <= top or right <= left:  # outside the slide
            continue
        holes = list(_visible(area.holes, scale, box))
        work += sum(_work(*part) for part in [(outline, box), *holes])
        if work > MAX_WORK:
            raise AnnotationError(f"{source}: its outlines cover the slide too many times; reduce the number of areas")
        if not holes and is_small(outline, box):
            small.append((outline, box))
        else:
            mask[top:bottom, left:right] |= _inside(outline, holes, (top, left), (bottom - top, right - left))
    hit = fill_small(small, mask)
    for outline, (top, left, bottom, right) in (small[number] for number in np.nonzero(~hit)[0]):
        mask[tuple(np.clip(outline.mean(axis=0), (top, left), (bottom - 1, right - 1)).astype(int))] = True
    return mask


def _visible(holes: Sequence[NDArray[np.float64]], scale: NDArray[np.float64], box: Corners) -> Iterator[Placed]:
    """Yield the holes, in mask pixels, that contain a pixel centre in a box, and the part of the box each can touch."""
    if not holes:
        return
    starts = np.cumsum([0, *map(len, holes[:-1])])
    points = np.concatenate(holes) * scale
    low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    first = np.clip(np.ceil(low - 0.5), box[:2], box[2:]).astype(int)
    last = np.clip(np.ceil(high - 0.5), box[:2], box[2:]).astype(int)
    for number in np.nonzero((last > first).all(axis=1))[0].tolist():
        (top, left), (bottom, right) = first[number].tolist(), last[number].tolist()
        yield holes[number] * scale, (top, left, bottom, right)


def _work(outline: NDArray[np.float64], box: Corners) -> float:
    top, left, bottom, right = box
    if is_small(outline, box):
        return SMALL_WORK
    return OUTLINE_WORK + (bottom - top) * (right - left) + CROSSING_WORK * _crossings(outline, top, bottom)


def _boxes(areas: Sequence[Area], scale: NDArray[np.float64], shape: tuple[int, int]) -> list[Corners]:
    """Return (top, left, bottom, right) of the pixels that each outline can touch."""
    if not areas:
        return []
    lengths = [len(area.outline) for area in areas]
    starts, points = np.cumsum([0, *lengths[:-1]]), np.concatenate([area.outline for area in areas]) * scale
    low = np.clip(np.floor(np.minimum.reduceat(points, starts)), 0, shape).astype(int)
    high = np.clip(np.ceil(np.maximum.reduceat(points, starts)), 0, shape).astype(int)
    return [(top, left, bottom, right) for top, left, bottom, right in np.hstack([low, high]).tolist()]


def _crossings(outline: NDArray[np.float64], top: int, bottom: int) -> float:
    return float(np.abs(np.diff(np.clip(outline[:, 0], top, bottom))).sum()) + len(outline)


def _inside(
    outline: NDArray[np.float64], holes: Sequence[Placed], corner: tuple[int, int], size: tuple[int, int]
) -> NDArray[np.bool_]:
    """Return the inside of an outline without holes, all in mask pixels; the result begins at `corner`."""
    inside = fill(outline - corner, size)
    if not inside.any():
        inside[tuple(np.clip(outline.mean(axis=0) - corner, 0, np.array(size) - 1).astype(int))] = True
    cut, (y, x) = np.zeros(size, np.bool_), corner
    moved = [(hole - corner, (box[0] - y, box[1] - x, box[2] - y, box[3] - x)) for hole, box in holes]
    fill_small([part for part in moved if is_small(*part)], cut)
    for hole, (top, left, bottom, right) in (part for part in moved if not is_small(*part)):
        below = cut[top:bottom, left:right]
        below |= fill(hole - (top, left), below.shape)
    inside &= ~cut
    return inside


MAX_MASK_PX = 64_000_000  # pixels of a picture that is held as a whole: a slide of 128,000 px at a sixteenth
REDUCED_PX = 1 << 24  # pixels to which a larger picture is summed up
NAMES_PX = 1 << 30  # most pixels of the level on which labels are searched for: a few seconds
MAX_LABELS, LISTED = 1000, 12
BACKGROUND = 0  # the label for black and for fully transparent pixels
TINY = 1e-6
PLACES = 64  # number of places at which a pyramid level is compared with the finest one
WRITE_ANEW = "save it as PNG, or as a tiled TIFF with LZW or Deflate"


# How far a size may be below and above the exact one: rounded down, up, or to the nearest, several times over.
ROUNDINGS = ((TINY, 1.0), (1.0, TINY), (0.75, 0.75))


def covers(picture_px: tuple[int, int], slide_px: tuple[int, int]) -> bool:
    """Return whether two (height, width) have the same proportions, up to rounding to whole pixels of the smaller one.

    >>> covers((742, 555), (2967, 2220)), covers((555, 742), (2967, 2220))
    (True, False)
    """
    small, large = sorted((picture_px, slide_px), key=sum)
    for below, above in ROUNDINGS:
        factors = [((n - below) / full, (n + above) / full) for n, full in zip(small, large, strict=True)]
        if max(low for low, _ in factors) < min(high for _, high in factors):
            return True
    return False


class Drawn(Protocol):
    """Classes drawn on a slide."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, each once."""

    @property
    def known(self) -> tuple[str, ...]:
        """The names that can be chosen; for a picture, also that of the background."""

    def listed(self) -> str:
        """Return the known names, for a message."""

    def mask(self, names: Collection[str], shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return where classes are, bool [h, w] over the whole slide."""

    def cut(self, names: Collection[str], box: Box, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return where classes are in a box (y, x, height, width) of level 0, bool `shape`."""


class Shapes:
    """Annotations on a slide.

    Raises:
        AnnotationError: all lie outside the slide.
    """

    def __init__(self, path: Path, found: Annotations, slide_px: tuple[int, int]) -> None:
        self._path, self._found, self._slide_px = path, found, slide_px
        self.check(found.names)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, sorted."""
        return self._found.names

    def names_without(self, names: Collection[str]) -> frozenset[str]:
        """Return the names of classes with areas that none of `names` refers to."""
        return frozenset(area.name for area in self._found.areas if not area.is_of(names))

    @property
    def known(self) -> tuple[str, ...]:
        """The names of the classes and of their groups, sorted."""
        return self._found.known

    def listed(self) -> str:
        """Return the names of the classes and of their groups, for a message."""
        return ", ".join(map(repr, self.known))

    def check(self, names: Collection[str]) -> None:
        """Refuse classes whose areas all lie outside the slide."""
        areas = self.areas_of(names)
        if not areas:
            return
        low, high = self.extent(names)
        beside = [(a.outline.max(axis=0) <= 0).any() or (a.outline.min(axis=0) >= self._slide_px).any() for a in areas]
        if all(beside):
            raise AnnotationError(
                f"{self._path}: is outside the slide: its areas reach from x {low[1]:g} to {high[1]:g} and from y "
                f"{low[0]:g} to {high[0]:g}, the slide to x {self._slide_px[1]} and y {self._slide_px[0]} px; expected "
                "level-0 pixels of this slide, not micrometres, another level or another slide"
            )

    def extent(self, names: Collection[str]) -> tuple[list[float], list[float]]:
        """Return the least and greatest (y, x) of classes, level-0 px."""
        points = np.concatenate([area.outline for area in self.areas_of(names)])
        return points.min(axis=0).tolist(), points.max(axis=0).tolist()

    def mask(self, names: Collection[str], shape: tuple[int, int], times: float = 1.0) -> NDArray[np.bool_]:
        """Return where classes are, bool [h, w] over the whole slide, with coordinates multiplied by `times`."""
        slide_px = (self._slide_px[0] / times, self._slide_px[1] / times)
        return rasterise(self.areas_of(names), slide_px, shape, str(self._path))

    def cut(self, names: Collection[str], box: Box, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return where classes are in a box (y, x, height, width) of level 0, bool `shape`."""
        origin, end = np.array(box[:2]), np.array(box[:2]) + np.array(box[2:])
        near = [
            replace(area, outline=area.outline - origin, holes=tuple(hole - origin for hole in area.holes))
            for area in self.areas_of(names)
            if (area.outline.max(axis=0) > origin).all() and (area.outline.min(axis=0) < end).all()
        ]
        return rasterise(near, (max(1, round(box[2])), max(1, round(box[3]))), shape, str(self._path))

    def areas_of(self, names: Collection[str]) -> list[Area]:
        """Return the areas that one of `names` refers to."""
        return [area for area in self._found.areas if area.is_of(names)]


class Pixels(Protocol):
    """The pixels of a picture as labels: grey values, palette indices, or colours.

    Attributes:
        sizes: (height, width) of its levels, finest first.
        name: names a label.
    """

    sizes: list[tuple[int, int]]
    name: Callable[[int], str]

    def blocks(self, level: int) -> Iterator[Block]:
        """Yield all parts of a level."""

    def read(self, level: int, region: Region) -> NDArray[Any]:
        """Return the labels in a region of a level, integers [height, width]."""


class LabelPicture:
    """A picture over a whole slide whose pixels give their class. Class names are the values.

    Raises:
        AnnotationError: its proportions are not the slide's; from any method, the file is damaged.
    """

    def __init__(self, path: Path, pixels: Pixels, slide_px: tuple[int, int]) -> None:
        self._path, self._pixels, self._slide_px = path, pixels, slide_px
        self._levels: dict[int, bool] = {0: True}
        (height, width), (full_height, full_width) = pixels.sizes[0], slide_px
        if not covers(pixels.sizes[0], slide_px):
            raise AnnotationError(
                f"{path}: {width} x {height} px (width x height) do not have the proportions of the slide's "
                f"{full_width} x {full_height} px: it is rotated, cropped or of another slide; expected the whole slide"
            )

    @cached_property
    def labels(self) -> dict[str, int]:
        """The labels that occur, by name, in the order of the labels, including the background."""
        small = [i for i, size in enumerate(self._pixels.sizes) if math.prod(size) <= NAMES_PX and self._is_true(i)]
        found: set[int] = set()
        for _, _, labels in self._pixels.blocks(small[0] if small else self._level_for((1, 1))):
            found |= labels
            if len(found) > MAX_LABELS:
                raise AnnotationError(
                    f"{self._path}: has more than {MAX_LABELS:,} values, like a photograph or a mask saved with lossy "
                    f"compression; expected a value for each class: {WRITE_ANEW}"
                )
        return {self._pixels.name(label): label for label in sorted(found)}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes: all values that occur, except the background."""
        return tuple(name for name, label in self.labels.items() if label != BACKGROUND)

    @property
    def known(self) -> tuple[str, ...]:
        """The names of all values that occur."""
        return tuple(self.labels)

    def listed(self) -> str:
        """Return the values that occur, for a message."""
        more = f" and {len(self.labels) - LISTED} more" if len(self.labels) > LISTED else ""
        return ", ".join(self.known[:LISTED]) + more

    def mask(self, names: Collection[str], shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return where classes are, bool [h, w] over the whole slide: where they have at least half of a pixel."""
        chosen = self._chosen(names)
        level = self._level_for(shape)
        size = self._pixels.sizes[level]
        factor = 1 if math.prod(size) <= MAX_MASK_PX else math.ceil(math.sqrt(math.prod(size) / REDUCED_PX))
        if factor == 1:
            found = np.zeros(size, np.bool_)
            for region, labels in self._blocks_with(level, chosen):
                found[region.slices] = np.isin(labels, list(chosen))
            return resize_mask(found, shape)
        counts = np.zeros((ceil_div(size[0], factor), ceil_div(size[1], factor)), np.uint32)
        for region, labels in self._blocks_with(level, chosen):
            _add(counts, region, np.isin(labels, list(chosen)), factor)
        full = [np.minimum(factor, length - np.arange(0, length, factor)) for length in size]
        shares = (counts * 255.0 / (full[0][:, None] * full[1])).astype(np.uint8)
        return np.asarray(Image.fromarray(shares).resize(shape[::-1], Image.Resampling.BOX)) > 127

    def cut(self, names: Collection[str], box: Box, shape: tuple[int, int]) -> NDArray[np.bool_]:
        """Return classes in a box (y, x, height, width) of level 0, bool `shape`, by the nearest pixels.

        False outside the slide.
        """
        level = self._level_for(
            tuple(math.ceil(n * s / b) for n, s, b in zip(shape, self._slide_px, box[2:], strict=True))
        )
        at, inside = [], []
        for axis, size in enumerate(self._pixels.sizes[level]):
            places = (box[axis] + (np.arange(shape[axis]) + 0.5) * box[2 + axis] / shape[axis]) / self._slide_px[axis]
            place = np.floor(places * size).astype(np.int64)
            inside.append((place >= 0) & (place < size))
            at.append(np.clip(place, 0, size - 1))
        (top, left), (bottom, right) = ([int(end(a)) for a in at] for end in (np.min, np.max))
        labels = self._pixels.read(level, Region(top, left, bottom - top + 1, right - left + 1))
        found = np.isin(labels[at[0][:, None] - top, at[1] - left], list(self._chosen(names)))
        return found & inside[0][:, None] & inside[1]

    def _chosen(self, names: Collection[str]) -> frozenset[int]:
        return frozenset(self.labels[name] for name in names if name in self.labels)

    def _blocks_with(self, level: int, chosen: frozenset[int]) -> Iterator[tuple[Region, NDArray[Any]]]:
        return ((region, labels) for region, labels, found in self._pixels.blocks(level) if found & chosen)

    def _level_for(self, shape: tuple[int, ...]) -> int:
        """Return the coarsest level that is as fine as `shape` over the slide and agrees with the finest."""
        sizes = self._pixels.sizes
        fine = [i for i, size in enumerate(sizes) if size[0] >= shape[0] and size[1] >= shape[1]]
        return next((i for i in reversed(fine) if self._is_true(i)), 0)

    def _is_true(self, level: int) -> bool:
        """Return whether a level was reduced without mixing labels: 0 and 2 must not make a 1 along borders."""
        if level not in self._levels:
            self._levels[level] = all(self._is_there(level, *place) for place in self._borders(level))
        return self._levels[level]

    def _borders(self, level: int) -> list[tuple[int, int, int]]:
        """Return up to `PLACES` (y, x, label) at label borders in a level, spread evenly over it."""
        found: list[tuple[int, int, int]] = []
        for region, labels, there in self._pixels.blocks(level):
            if len(there) > 1:
                y, x = np.nonzero(labels[:, 1:] != labels[:, :-1])
                some = np.unique(np.linspace(0, len(y) - 1, min(len(y), PLACES)).astype(int))
                found += [
                    (region.y + a, region.x + b, int(labels[a, b])) for a, b in zip(y[some], x[some], strict=True)
                ]
        some = np.unique(np.linspace(0, len(found) - 1, min(len(found), PLACES)).astype(int))
        return [found[i] for i in some]

    def _is_there(self, level: int, y: int, x: int, label: int) -> bool:
        """Return whether a level's label is found in the finest level too, in the same place or a pixel away."""
        spans = []
        for place, size, full in zip((y, x), self._pixels.sizes[level], self._pixels.sizes[0], strict=True):
            start, end = math.floor(place * full / size) - 1, math.ceil((place + 1) * full / size) + 1
            spans.append((max(0, start), min(full, end)))
        (top, bottom), (left, right) = spans
        return bool((self._pixels.read(0, Region(top, left, bottom - top, right - left)) == label).any())


def _add(counts: NDArray[np.uint32], region: Region, inside: NDArray[np.bool_], factor: int) -> None:
    """Add the pixels of a region to the cells of `factor` x `factor` pixels that contain them."""
    starts = []
    for start, length in ((region.y, region.height), (region.x, region.width)):
        first = start // factor
        starts.append(np.maximum(np.arange(first, ceil_div(start + length, factor)) * factor - start, 0))
    sums = np.add.reduceat(np.add.reduceat(inside.astype(np.uint32), starts[0], axis=0), starts[1], axis=1)
    y, x = region.y // factor, region.x // factor
    counts[y : y + sums.shape[0], x : x + sums.shape[1]] += sums


def resize_mask(mask: NDArray[np.bool_], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask at another size: a pixel is in the mask if at least half of its area is."""
    gray = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
    return np.asarray(gray.resize((shape[1], shape[0]), Image.Resampling.BOX)) > 127
