"""The bag of a slide: the feature vectors of its patches, read in blocks, and the position of each patch.

Files from other programs state their geometry in many ways, and some state it wrongly. A file's claims are compared
with the slide's size and with the lattice of its own coordinates; whatever contradicts these, or is missing, is refused
with the flag that settles it. Nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from wsi_gradcam.errors import ConfigError, FeatureError, quoted
from wsi_gradcam.tissue.masks import Shares

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from numpy.typing import NDArray

    from wsi_gradcam.slides import SlideInfo

Pair = tuple[float, float]
PATCH_UM, UNIT, AXES, NAME = "--feature-patch-um", "--feature-unit", "--feature-axes", "--feature-name"
MICROMETRES = frozenset({"um", "µm", "μm", "micron", "microns", "micrometer", "micrometre"})
PIXELS = frozenset({"px", "pixel", "pixels"})
NEIGHBOURS = 3  # pairs, from which on a lattice is trusted
STEP_PX = 1.5  # by which rounding may move neighbours apart
MOST_GAPS = 4  # patches left out between the nearest two in a row
NEARLY, ENOUGH = 0.1, 20  # px from an integer, and number of patches that is conclusive
NOMINAL = 0.02  # share by which a nominal magnification and a pixel size may differ


@dataclass(frozen=True)
class SlideFrame:
    """The slide to which features belong.

    Attributes:
        id: as in its `SlideEntry`.
        shape: (height, width) of level 0 in px.
        mpp: (y, x) micrometres per level-0 px; None if unknown.
        downsamples: those of its levels as (y, x), finest first.
    """

    id: str
    shape: tuple[int, int]
    mpp: Pair | None
    downsamples: tuple[Pair, ...] = ((1.0, 1.0),)

    @classmethod
    def of(cls, slide_id: str, info: SlideInfo) -> Self:
        """Return the frame of an open slide."""
        factors = tuple((level.downsample_y, level.downsample_x) for level in info.levels)
        return cls(slide_id, (info.height, info.width), info.mpp, factors)


@dataclass(frozen=True)
class Settled:
    """The user's statements for what files leave out or have wrong; None if there is none.

    Attributes:
        patch_um: side of a patch in micrometres, `--feature-patch-um`.
        unit: unit of the coordinates, "px" of level 0 or "um", `--feature-unit`.
        axes: order of a coordinate's numbers, "xy" or "yx", `--feature-axes`.
        name: which of several features in a file, `--feature-name`.
    """

    patch_um: float | None = None
    unit: str | None = None
    axes: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.patch_um is not None and not 0 < self.patch_um < np.inf:
            raise ConfigError(f"{PATCH_UM} is {self.patch_um:g}, expected the side of a patch in micrometres")
        for flag, value, known in ((UNIT, self.unit, ("px", "um")), (AXES, self.axes, ("xy", "yx"))):
            if value is not None and value not in known:
                raise ConfigError(f"{flag} is {quoted(value)}, expected {' or '.join(known)}")


@dataclass(frozen=True)
class Claims:
    """The claims of files about the positions of patches. Pairs are (x, y) or (width, height), as in the files.

    Attributes:
        format: format of the files, in words.
        unit: unit of coordinates and sides, "px" of level 0 or "um"; None if not stated.
        sides: possible (width, height) of a patch, float64 [2] or [N, 2], most likely first.
        overlap: share of its side that a patch has in common with its neighbour; None if not stated.
        nominal_um: side of a patch if its magnification is taken literally.
        slide_px: (width, height) of the slide.
        mpp: micrometres per level-0 pixel of the slide.
        square_mpp: whether micrometres were computed from the width of a pixel alone.
        side_unit: unit of sides, if it is not that of coordinates.
        by_columns: whether its program orders patches by x, and those with the same x by y.
        beyond_px: how far outside the slide patches may lie.
    """

    format: str
    unit: str | None = None
    sides: tuple[NDArray[np.float64], ...] = ()
    overlap: float | None = None
    nominal_um: float | None = None
    slide_px: tuple[int, int] | None = None
    mpp: float | None = None
    square_mpp: bool = False
    side_unit: str | None = None
    by_columns: bool = False
    beyond_px: float = 0.0


@dataclass(frozen=True)
class FeatureBag:
    """The patches of a slide.

    Attributes:
        features: [N, D], float16 or float32; read in blocks (`FeatureRows`, or a Zarr array).
        boxes: float64 [N, 4] as y, x, height, width, level-0 px of the slide.
        source: the format and file from which they come.
        notes: a line about each thing that a user should know.
        digest: changes when the files or the positions of patches do.
    """

    features: Any
    boxes: NDArray[np.float64]
    source: str
    notes: tuple[str, ...] = ()
    digest: str = field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.boxes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the files."""
        with suppress(AttributeError):  # a Zarr array has nothing to release
            self.features.close()


def place_patches(
    path: object,
    coordinates: NDArray[np.float64],
    claims: Claims,
    slide: SlideFrame,
    settled: Settled,
    tissue: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Return the boxes of patches, float64 [N, 4] as in `FeatureBag`, and notes.

    Args:
        path: the file, for messages.
        coordinates: those of the top left corners, float64 [N, 2], in the file's order and unit.
        claims: what the file says about them.
        slide: the slide.
        settled: what the user says.
        tissue: mask of the whole slide, to find out which order of axes puts patches on tissue.

    Raises:
        FeatureError: the geometry is ambiguous, contradicts itself, or is not this slide's.
    """
    if not np.isfinite(coordinates).all():
        bad = int(np.argmin(np.isfinite(coordinates).all(axis=1)))
        raise FeatureError(f"{path}: the coordinates of patch {bad:,} are not finite; create the features again")
    _check_known(path, coordinates, claims, settled)
    _check_slide(path, claims, slide, settled)
    notes: list[str] = []
    scale = _scale(path, settled.unit or claims.unit, claims, slide, notes)
    xy = coordinates / scale
    if settled.axes == "yx":
        xy = xy[:, ::-1]
    if claims.square_mpp and scale[0] != 1:
        _note_pixels(xy, claims, scale[0], notes)
    if claims.by_columns and settled.axes is None and _by_rows(xy):
        notes.append(
            f"its patches are in another order than {claims.format} writes them, as if x and y were swapped; if the "
            f"map does not lie on the tissue, use {AXES} yx"
        )
    sides = _sides(path, xy, claims, slide, settled, notes)
    boxes = np.concatenate([xy[:, ::-1], np.broadcast_to(sides[..., ::-1], xy.shape)], axis=1)
    _check_inside(path, boxes, claims, slide, settled, notes)
    if tissue is not None and settled.axes is None:
        check_on_tissue(path, boxes, slide.id, slide.shape, tissue)
    if repeated := len(boxes) - len(np.unique(boxes, axis=0)):
        notes.append(f"{repeated:,} patches occur more than once")
    return boxes, tuple(notes)


def steps(xy: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Return the distance between neighbours along x and y, None if too few are in the same row or column.

    >>> steps(np.array([[x, y] for x in (0.0, 512.0, 1024.0) for y in (0.0, 512.0)]))
    (512.0, 512.0)
    """
    return _step(xy[:, 0], xy[:, 1]), _step(xy[:, 1], xy[:, 0])


def _step(along: NDArray[np.float64], across: NDArray[np.float64]) -> float | None:
    across = np.round(across)
    order = np.lexsort((along, across))
    apart = np.diff(along[order])[np.diff(across[order]) == 0]
    apart = apart[apart > 0.5]
    if len(apart) < NEIGHBOURS:
        return None
    values, counts = np.unique(np.round(apart), return_counts=True)
    near = apart[np.abs(apart - values[np.argmax(counts)]) <= 1]
    return float(near.mean()) if len(near) >= max(NEIGHBOURS, 0.3 * len(apart)) else None


def _check_known(path: object, coordinates: NDArray[np.float64], claims: Claims, settled: Settled) -> None:
    """Refuse coordinates whose unit or size is neither in the file nor given."""
    missing = []
    if settled.unit is None and claims.unit is None:
        missing.append(f"the unit of the coordinates ({UNIT} px or um)")
    if settled.patch_um is None and not claims.sides:
        missing.append(f"the side of a patch ({PATCH_UM} with its micrometres)")
    if missing:
        apart = next((f"; neighbours are {step:g} apart" for step in steps(coordinates) if step), "")
        raise FeatureError(
            f"{path}: {claims.format} without {' and '.join(missing)}: the file does not state this{apart}; give "
            f"{'these flags' if len(missing) > 1 else 'this flag'}"
        )


def _check_slide(path: object, claims: Claims, slide: SlideFrame, settled: Settled) -> None:
    """Refuse features that state a different slide size."""
    height, width = slide.shape
    if claims.slide_px in (None, (width, height)):
        return
    stated = "{} x {} px".format(*claims.slide_px or ())
    if claims.slide_px == (height, width):
        if settled.axes is None:
            raise FeatureError(
                f"{path}: made from a slide of {stated} (width x height), but {slide.id} has {width} x {height}: the "
                f"axes are swapped; use {AXES} xy or yx"
            )
        return
    raise FeatureError(
        f"{path}: made from a slide of {stated}, but {slide.id} has {width} x {height}; give the slide that they were "
        "made from"
    )


def _scale(path: object, unit: str | None, claims: Claims, slide: SlideFrame, notes: list[str]) -> NDArray[np.float64]:
    """Return the size of a level-0 pixel in the file's units, float64 (x, y)."""
    if unit == "px":
        return np.ones(2)
    mpp_y, mpp_x = _mpp(path, slide, "coordinates in micrometres")
    if claims.square_mpp and abs(mpp_y - mpp_x) > 1e-6 * mpp_x:
        notes.append(f"its micrometres are taken as {claims.format} makes them: {mpp_x:g} per pixel along both axes")
        mpp_y = mpp_x
    return np.array([mpp_x, mpp_y])


def _mpp(path: object, slide: SlideFrame, what: str) -> Pair:
    if slide.mpp is None:
        raise FeatureError(f"{path}: {what}, but {slide.id} has no known pixel size; give it with --mpp")
    return slide.mpp


def _sides(
    path: object, xy: NDArray[np.float64], claims: Claims, slide: SlideFrame, settled: Settled, notes: list[str]
) -> NDArray[np.float64]:
    """Return (width, height) of patches in level-0 px, float64 [2] or [N, 2]."""
    if settled.patch_um is not None:
        mpp_y, mpp_x = _mpp(path, slide, f"{PATCH_UM} is given")
        side = np.array([settled.patch_um / mpp_x, settled.patch_um / mpp_y])
        _note_gaps(side, steps(xy), notes)
        return side
    scale = _scale(path, claims.side_unit or claims.unit or settled.unit, claims, slide, [])
    possible = [np.asarray(side, np.float64) / scale for side in claims.sides]
    if not all(np.isfinite(side).all() and (side > 0).all() for side in possible):
        raise FeatureError(f"{path}: the size of its patches is implausible; give their side with {PATCH_UM}")
    apart = steps(xy)
    if claims.overlap is None and _alike(possible):  # neighbours may be any distance apart
        _note_gaps(possible[0], apart, notes)
        return possible[0]
    ranks = {i: rank for i, side in enumerate(possible) if (rank := _gaps(side, apart, claims.overlap or 0.0))}
    fitting = [possible[i] for i in sorted(ranks, key=lambda i: (ranks[i], i))]
    if fitting and (any(apart) or _alike(fitting)):
        if fitting[0] is not possible[0]:
            notes.append(
                f"patches are {_width(fitting[0]):g} level-0 px wide according to their spacing; {_stated(possible)}"
            )
        _note_magnification(claims, slide, fitting[0], apart, notes)
        return fitting[0]
    if claims.nominal_um and slide.mpp and not fitting:
        real = np.array([claims.nominal_um / slide.mpp[1], claims.nominal_um / slide.mpp[0]])
        if _gaps(real, apart, claims.overlap or 0.0):
            notes.append(
                f"patches are {real[0]:.1f} level-0 px wide according to their spacing and the slide's pixel size; "
                f"{_stated(possible)}, from a rounded magnification"
            )
            return real
    raise FeatureError(_disagreement(path, possible, apart, claims))


def _stated(possible: list[NDArray[np.float64]]) -> str:
    return f"the file says {_width(possible[0]):g}"


def _disagreement(
    path: object, possible: list[NDArray[np.float64]], apart: Sequence[float | None], claims: Claims
) -> str:
    sizes = " or ".join(dict.fromkeys(f"{_width(side):g}" for side in possible))
    overlap = f" overlapping by {claims.overlap:.3g} of their side" if claims.overlap else ""
    found = next((f"neighbours are {step:g} px apart" for step in apart if step), "their spacing does not tell which")
    return f"{path}: patches of {sizes} level-0 px{overlap}, but {found}; give their true side with {PATCH_UM}"


def _width(side: NDArray[np.float64]) -> float:
    return float(side[..., 0].flat[0])


def _alike(sides: list[NDArray[np.float64]]) -> bool:
    return all(np.abs(side - sides[0]).max() <= STEP_PX for side in sides)


def _gaps(side: NDArray[np.float64], apart: Sequence[float | None], overlap: float) -> int:
    """Return by how many patch sizes neighbours are apart, at most; 0 if it is not an integer."""
    if side.ndim > 1:
        side = np.median(side, axis=0)
    times = [_times(step, size * (1 - overlap)) for step, size in zip(apart, side, strict=True) if step]
    return max(times, default=1) if all(times) else 0


def _times(step: float, expected: float) -> int:
    times = max(1, round(step / max(expected, 1e-9)))
    return times if times <= MOST_GAPS and abs(step - times * expected) <= STEP_PX * times else 0


def _note_gaps(side: NDArray[np.float64], apart: Sequence[float | None], notes: list[str]) -> None:
    if (step := max(filter(None, apart), default=0.0)) > _width(side) + STEP_PX:
        notes.append(f"neighbours are {step:g} px apart and patches {_width(side):g} px wide: nothing covers the gaps")


def _note_magnification(
    claims: Claims, slide: SlideFrame, side: NDArray[np.float64], apart: Sequence[float | None], notes: list[str]
) -> None:
    """Note a size from a rounded magnification that no lattice confirms."""
    if claims.nominal_um is None or slide.mpp is None or any(apart):
        return
    real = claims.nominal_um / slide.mpp[1]
    if abs(real / _width(side) - 1) > NOMINAL:
        notes.append(
            f"patches are {_width(side):g} level-0 px wide according to the file; by the slide's pixel size they would "
            f"be {real:.1f}, and there are too few neighbours to decide; {PATCH_UM} settles it"
        )


def _by_rows(xy: NDArray[np.float64]) -> bool:
    """Return whether patches follow one another along x, and hardly any along y."""
    along_x, along_y = ((np.diff(xy[:, axis]) > 0) & (np.diff(xy[:, 1 - axis]) == 0) for axis in (0, 1))
    return bool(along_x.sum() > max(NEIGHBOURS, 10 * along_y.sum()))


def _note_pixels(xy: NDArray[np.float64], claims: Claims, mpp: float, notes: list[str]) -> None:
    """Note micrometres that do not match the slide's pixels: some start at integers, from areas of 1,024 px."""
    tiles = max(1, int(claims.beyond_px * mpp // _width(claims.sides[0]))) if claims.sides else 1
    whole = np.abs(xy - np.round(xy)) < NEARLY
    if len(xy) >= ENOUGH and tiles <= 2 and (whole.mean(axis=0) < 0.7 / tiles).any():
        notes.append(
            f"its coordinates are not whole pixels of {mpp:g} um: they were made with another pixel size, or shifted; "
            "compare the map with the slide, and give the pixel size that they were made with as --mpp"
        )


def _check_inside(
    path: object, boxes: NDArray[np.float64], claims: Claims, slide: SlideFrame, settled: Settled, notes: list[str]
) -> None:
    """Refuse patches that lie entirely outside the slide."""
    outside = _outside(boxes, slide.shape)
    if not outside.any():
        return
    if not _outside(boxes, slide.shape, claims.beyond_px).any():
        notes.append(
            f"{int(outside.sum()):,} patches lie outside the slide, as {claims.format} leaves some at its edges"
        )
        return
    bad = int(np.argmax(outside))
    (y, x), (height, width) = boxes[bad, :2], slide.shape
    where = f"{path}: patch {bad:,} at x {x:g}, y {y:g} lies outside {slide.id} of {width} x {height} px"
    if settled.axes is None and not _outside(boxes[:, [1, 0, 3, 2]], slide.shape).any():
        raise FeatureError(f"{where}, and inside with x and y swapped; use {AXES} xy or yx")
    raise FeatureError(
        f"{where}; give the slide that the features were made from, or the unit of the coordinates with {UNIT} px or um"
    )


def _outside(boxes: NDArray[np.float64], shape: tuple[int, int], beyond: float = 0.0) -> NDArray[np.bool_]:
    low, high = boxes[:, :2] + boxes[:, 2:] <= -beyond, boxes[:, :2] >= np.array(shape) + beyond
    return np.asarray((low | high).any(axis=1))


# Tissue in fewer than half of all patches, and in many more if they are read the other way round.
LEAST_TISSUE, MORE_TISSUE = 0.5, 0.3


def check_on_tissue(
    path: object, boxes: NDArray[np.float64], name: str, shape: tuple[int, int], tissue: NDArray[np.bool_]
) -> None:
    """Refuse coordinates that lie on glass as they stand and on tissue with x and y swapped.

    Args:
        path: the file, for messages.
        boxes: as in `FeatureBag`.
        name, shape: those of the slide.
        tissue: mask of the whole slide.

    Raises:
        FeatureError: the message says which flag settles it.
    """
    swapped = boxes[:, [1, 0, 3, 2]]
    if not len(boxes) or _outside(swapped, shape).any():
        return
    scale = np.array(tissue.shape) / np.array(shape)
    shares = Shares(tissue)
    here, there = (
        float(shares.of(np.concatenate([b[:, :2] * scale, (b[:, :2] + b[:, 2:]) * scale], axis=1)).mean())
        for b in (boxes, swapped)
    )
    if here < LEAST_TISSUE and there > here + MORE_TISSUE:
        raise FeatureError(
            f"{path}: {here:.0%} of its patches lie on tissue of {name}, and {there:.0%} with x and y swapped; use "
            f"{AXES} xy or yx"
        )
