"""A ruler printed on a slide measures right through every reader at every mpp, and all readers show the same.

A limit: OpenSlide reads a level whose factor is not whole for it, which is wherever the sizes of the levels do not
divide, by interpolating between pixels; see `test_openslide_interpolates_where_sizes_do_not_divide`. No other reader
does, and `auto` takes OpenSlide only for files that no other reader shows rightly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from tests.formats import Written, pyramid, write_formats
from tests.oracles import triangle_resample
from tests.synthetic import tissue_texture
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import Slide, open_slide, read_region, thumbnail

Rgb = npt.NDArray[np.uint8]
Sizes = dict[str, tuple[int, int]]

FACTORS = (4, 16)
SIZES: Sizes = {"even": (4352, 4608), "cut": (4303, 4573)}  # of the second no side divides by a factor
OWN_MPP = {"even": (0.25, 0.25), "cut": (0.31, 0.25)}
READERS = ("openslide", "tiff", "ome-tiff", "ome-zarr 0.4", "ome-zarr 0.5", "picture")
MPPS = (0.25, 0.5, 0.73, 1.0, 4.0)

# Along each axis two dark marks on a bright band: level-0 px where they begin. They are as long as the band is wide.
MARKS = ((131, 4163), (158, 4398))
MARK_PX = 32  # whole pixels of each level wide, so that a level's means keep its centre
BAND = (1900, 2200)
BRIGHT, DARK = 230, 40

LENGTH_ERROR = 0.001
# Of a level-0 pixel, at steps up to that of the first coarse level; in proportion beyond. Measured: 0.016 from rounding
# to 8 bits, 0.02 where pixels are enlarged.
POSITION_PX = 0.03
OPENSLIDE_PX = 0.5  # it takes whole level-0 pixels as the place of a region in any level


class Case(NamedTuple):
    """A slide of `SIZES`, and the mpp that is given on opening: None leaves it to the file."""

    name: str
    given: tuple[float, float] | None

    @property
    def mpp(self) -> tuple[float, float]:
        return self.given or OWN_MPP[self.name]


CASES = (Case("even", None), Case("cut", (0.25, 0.25)), Case("cut", None))


class Archive:
    """The slides in all formats."""

    def __init__(self, folder: Path) -> None:
        self.levels: dict[str, list[Rgb]] = {}
        self.files: dict[str, dict[str, Written]] = {}
        for name, size in SIZES.items():
            (folder / name).mkdir()
            level0 = with_rulers(size)
            self.levels[name] = pyramid(level0, FACTORS)
            self.files[name] = write_formats(folder / name, level0, OWN_MPP[name], FACTORS)

    def open(self, case: Case, reader: str) -> Slide:
        path, name = self.files[case.name][reader]
        return open_slide(path, case.mpp if name == "picture" else case.given, name)


def with_rulers(size: tuple[int, int]) -> Rgb:
    """Tissue with a band along each axis, on which its marks are."""
    texture = tissue_texture(512, np.random.default_rng(5))
    level0 = np.tile(texture, (9, 9, 1))[: size[0], : size[1]].copy()
    level0[:, slice(*BAND)] = level0[slice(*BAND)] = BRIGHT
    for first in MARKS[0]:
        level0[first : first + MARK_PX, slice(*BAND)] = DARK
    for first in MARKS[1]:
        level0[slice(*BAND), first : first + MARK_PX] = DARK
    return level0


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return Archive(tmp_path_factory.mktemp("ruler"))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.name} {case.mpp}")
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module", params=READERS)
def slide(request: pytest.FixtureRequest, archive: Archive, case: Case) -> Iterator[Slide]:
    opened = archive.open(case, request.param)
    yield opened
    opened.close()


def steps(case: Case, mpp: float) -> tuple[float, float]:
    """(y, x) level-0 pixels per pixel."""
    return mpp / case.mpp[0], mpp / case.mpp[1]


def factor_of(case: Case, mpp: float) -> int:
    """Of the level that pixels come from."""
    return max((factor for factor in FACTORS if factor <= 1.01 * min(steps(case, mpp))), default=1)


def interpolates(slide: Slide, case: Case, mpp: float) -> bool:
    """Whether OpenSlide reads this and is not exact."""
    return slide.info.vendor == "generic-tiff" and case.name == "cut" and factor_of(case, mpp) > 1


def profile(slide: Slide, axis: int, start: float, length: float, case: Case, mpp: float) -> npt.NDArray[np.float64]:
    """How dark the band is along an axis from level-0 `start` on, over `length` level-0 px."""
    count, across = math.ceil(length / steps(case, mpp)[axis]), 2030.6
    place, size = ((start, across), (count, 4)) if axis == 0 else ((across, start), (4, count))
    pixels = read_region(slide, *place, *size, mpp)
    dark: npt.NDArray[np.float64] = BRIGHT - pixels.mean(axis=(1 - axis, 2))
    return dark


def centre(dark: npt.NDArray[np.float64]) -> float:
    """Where the dark lies, in pixels from the beginning of the first: the centroid."""
    return float((dark * (np.arange(len(dark)) + 0.5)).sum() / dark.sum())


@pytest.mark.parametrize("mpp", MPPS)
@pytest.mark.parametrize("axis", [0, 1])
def test_marks_are_where_they_are_and_as_far_apart(slide: Slide, case: Case, axis: int, mpp: float) -> None:
    """Each mark in a patch of its own, which begins anywhere in a pixel."""
    step, found = steps(case, mpp)[axis], []
    limit = POSITION_PX * max(1, step / FACTORS[0]) + OPENSLIDE_PX * interpolates(slide, case, mpp)
    for first, shift in zip(MARKS[axis], (0.37, 0.81), strict=True):
        start = first - 70 - shift
        found.append(start + step * centre(profile(slide, axis, start, 172, case, mpp)))
        assert abs(found[-1] - (first + MARK_PX / 2)) < limit
    measured_um = (found[1] - found[0]) * slide.info.mpp_yx[axis]
    true_um = (MARKS[axis][1] - MARKS[axis][0]) * case.mpp[axis]
    assert abs(measured_um / true_um - 1) < LENGTH_ERROR


@pytest.mark.parametrize("mpp", MPPS)
@pytest.mark.parametrize("axis", [0, 1])
def test_pixels_of_one_region_are_as_large_as_asked_for(slide: Slide, case: Case, axis: int, mpp: float) -> None:
    """Both marks in one long region: their distance in pixels is that in um, divided by the mpp asked for."""
    start = MARKS[axis][0] - 70.4
    dark = profile(slide, axis, start, MARKS[axis][1] - MARKS[axis][0] + 172, case, mpp)
    half = len(dark) // 2
    apart = half + centre(dark[half:]) - centre(dark[:half])
    true_um = (MARKS[axis][1] - MARKS[axis][0]) * case.mpp[axis]
    assert abs(apart * mpp / true_um - 1) < LENGTH_ERROR / 10


def places(size: tuple[int, int]) -> list[tuple[float, float]]:
    """(y, x) level-0 px: inside, across the edges and corners, and outside."""
    bottom, right = size
    return [
        (700, 900),
        (2600.4, 3001.7),
        (1850, 2150),
        (-20.5, 600),
        (bottom - 31, 800),
        (640, -13),
        (500.25, right - 40.75),
        (-9, -11),
        (-17, right - 21),
        (bottom - 12.5, -6),
        (bottom - 23, right - 19),
        (bottom + 500, 60),
    ]


@pytest.mark.parametrize("mpp", MPPS)
def test_all_readers_show_the_same(archive: Archive, case: Case, mpp: float) -> None:
    """Where they have the same pixels to show; and what they show is right."""
    slides = {reader: archive.open(case, reader) for reader in READERS}
    shown = [
        slide
        for reader, slide in slides.items()
        if not interpolates(slide, case, mpp) and (reader != "picture" or factor_of(case, mpp) == 1)
    ]
    factor, size = factor_of(case, mpp), (48, 56)
    scale = steps(case, mpp)[0] / factor, steps(case, mpp)[1] / factor
    assert len(shown) >= 4
    for y, x in places(SIZES[case.name]):
        patches = np.stack([read_region(slide, y, x, *size, mpp) for slide in shown]).astype(int)
        assert np.ptp(patches, axis=0).max() <= 1
        level = archive.levels[case.name][(1, *FACTORS).index(factor)]
        expected = triangle_resample(level, (y / factor, x / factor), scale, size, (255, 255, 255))
        assert np.abs(patches[0] - expected).max() <= 3
    for slide in slides.values():
        slide.close()


def test_thumbnails_are_the_same(archive: Archive, case: Case) -> None:
    slides = [archive.open(case, reader) for reader in READERS[1:-1]]
    thumbs = [thumbnail(slide, 8.0, 2048).rgb.astype(int) for slide in slides]
    for one, other in pairwise(thumbs):
        assert np.abs(one - other).max() <= 1
    for slide in slides:
        slide.close()


def test_openslide_interpolates_where_sizes_do_not_divide(archive: Archive) -> None:
    """Off by less than half a level-0 pixel on each axis, which is what its whole level-0 coordinates allow.

    A pixel is then a mean of neighbours, in which those beside and below weigh up to 0.5 / factor each: on this tissue
    up to 21 gray levels off at factor 4, 1.2 in the mean, and 5 and 0.3 at factor 16. No other
    request gives the pixels themselves: its factor is the mean of both axes' (3.9982 here), and the next level-0
    pixel that falls on a whole pixel of the level can be hundreds of pixels away.
    """
    known, exact = archive.open(CASES[1], "openslide"), archive.open(CASES[1], "tiff")
    worst = []
    for number, factor in enumerate(FACTORS, 1):
        level = exact.info.levels[number]
        whole = Region(0, 0, level.height, level.width)
        truth = archive.levels["cut"][number]
        np.testing.assert_array_equal(exact.read_level(number, whole), truth)
        around = np.pad(truth, ((1, 1), (1, 1), (0, 0)), constant_values=255).astype(int)
        shifted = [around[dy : dy + level.height, dx : dx + level.width] for dy in range(3) for dx in range(3)]
        contrast = np.max([np.abs(part - truth) for part in shifted], axis=0)
        for y in range(0, level.height - 30, 60):
            for x in range(0, level.width - 30, 60):
                part = Region(y, x, 30, 30)
                apart = np.abs(known.read_level(number, part).astype(int) - truth[part.slices])
                assert (apart <= 2 * 0.5 / factor * contrast[part.slices] + 2).all()
                worst.append(apart.max())
    assert 1 < max(worst) <= 255 // 4
    known.close()
    exact.close()


def test_openslide_is_exact_where_sizes_divide(archive: Archive) -> None:
    known = archive.open(CASES[0], "openslide")
    for number, level in enumerate(archive.levels["even"]):
        np.testing.assert_array_equal(known.read_level(number, Region(0, 0, *level.shape[:2])), level)
    known.close()
