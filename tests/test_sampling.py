"""Patches for choices: real, evenly over the tissue, the same each time, whatever the archive is like."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.slides_in_memory import ArraySlide
from wsi_gradcam import sampling
from wsi_gradcam.config import Settings
from wsi_gradcam.errors import SlideFormatError
from wsi_gradcam.geometry import Region
from wsi_gradcam.inputs import SlideEntry
from wsi_gradcam.sampling import SLIDES_TRIED, sample_patches

Rgb = npt.NDArray[np.uint8]
SETTINGS = Settings(min_tissue=0.5)
PATCH, MPP = (32, 48), 1.0  # 64 x 96 level-0 px


def tissue(height: int, width: int, left: int = 0) -> Rgb:
    """Stained from the column `left` on, where the colour tells the place; glass before it."""
    pixels = np.full((height, width, 3), (250, 240, 230), np.uint8)
    y, x = np.mgrid[:height, left:width]
    pixels[:, left:] = np.stack([140 + y * 60 // height, 60 + x * 60 // width, 150 + 0 * y], axis=-1)
    return pixels


class Archive:
    """Slides in memory, in place of those on disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slides: dict[str, ArraySlide | Exception] = {}
        self.opened: list[str] = []
        monkeypatch.setattr(sampling, "open_entry", self.open)

    def open(self, entry: SlideEntry, settings: Settings) -> ArraySlide:
        self.opened.append(entry.path)
        slide = self.slides[entry.path]
        if isinstance(slide, Exception):
            raise slide
        return slide

    def entries(self) -> Sequence[SlideEntry]:
        return [SlideEntry(name, name) for name in self.slides]

    def sample(self, count: int, settings: Settings = SETTINGS) -> Rgb | None:
        return sample_patches(self.entries(), settings, PATCH, MPP, count)


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> Archive:
    return Archive(monkeypatch)


def test_patches_are_the_slides_at_the_mpp_asked_for(archive: Archive) -> None:
    pixels = tissue(640, 960)
    archive.slides["a"] = slide = ArraySlide([pixels])
    found = archive.sample(8)
    assert found is not None
    assert found.shape == (8, 32, 48, 3)
    assert found.dtype == np.uint8
    places = []
    for patch in found:  # each is, but for its rim, the mean of each 2 x 2 px of some patch of the grid
        errors = {}
        for y, x in itertools.product(range(0, 640, 64), range(0, 960, 96)):
            here = pixels[y : y + 64, x : x + 96].astype(float).reshape(32, 2, 48, 2, 3).mean(axis=(1, 3))
            errors[y, x] = float(np.abs(here - patch)[1:-1, 1:-1].max())
        assert min(errors.values()) <= 3
        places.append(min(errors, key=errors.__getitem__))
    assert len(set(places)) == 8
    assert {y < 320 for y, _ in places} == {x < 480 for _, x in places} == {True, False}
    assert slide.closed


def test_only_tissue_is_taken(archive: Archive) -> None:
    archive.slides["a"] = ArraySlide([tissue(640, 960, left=480)])
    found = archive.sample(1000)
    assert found is not None
    assert len(found) == 10 * 5
    assert found[..., 1].max() < 200


def test_the_same_archive_gives_the_same_patches(archive: Archive) -> None:
    archive.slides["a"] = ArraySlide([tissue(640, 960)])
    first, second = archive.sample(20), archive.sample(20)
    assert first is not None
    assert second is not None
    assert np.array_equal(first, second)
    assert len(np.unique(first, axis=0)) == 20


def test_the_first_slide_that_can_be_read_is_used(archive: Archive) -> None:
    archive.slides = {
        "broken": SlideFormatError("not a slide"),
        "glass": ArraySlide([np.full((640, 960, 3), 245, np.uint8)]),
        "good": ArraySlide([tissue(640, 960)]),
        "never": SlideFormatError("not reached"),
    }
    found = archive.sample(4)
    assert found is not None
    assert len(found) == 4
    assert archive.opened == ["broken", "glass", "good"]
    assert all(slide.closed for slide in archive.slides.values() if isinstance(slide, ArraySlide) and slide.reads)


def test_slides_without_a_resolution_are_passed_over(archive: Archive) -> None:
    archive.slides = {"a": ArraySlide([tissue(640, 960)], mpp=None), "b": ArraySlide([tissue(640, 960)])}
    assert archive.sample(4) is not None
    assert archive.opened == ["a", "b"]
    first = archive.slides["a"]
    assert isinstance(first, ArraySlide)
    assert first.closed


def test_regions_that_cannot_be_decoded_are_left_out(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "tissue_mask", lambda slide: np.ones((10, 10), bool))
    whole = ArraySlide([tissue(640, 960)])
    archive.slides["a"] = ArraySlide([tissue(640, 960)], bad=Region(0, 0, 320, 960))
    found = archive.sample(1000)
    archive.slides["a"] = whole
    expected = archive.sample(1000)
    assert found is not None
    assert expected is not None
    assert len(expected) == 100
    # The filter of a patch at the edge of what is bad reads a few pixels of it.
    assert len(found) == 40
    assert np.array_equal(found, expected[60:])


def test_an_archive_without_a_readable_patch_gives_none(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "tissue_mask", lambda slide: np.ones((10, 10), bool))
    archive.slides["a"] = ArraySlide([tissue(640, 960)], bad=Region(0, 0, 640, 960))
    assert archive.sample(4) is None
    archive.slides = {}
    assert archive.sample(4) is None


def test_only_the_first_slides_are_tried(archive: Archive) -> None:
    archive.slides = {str(i): SlideFormatError("broken") for i in range(9)}
    assert archive.sample(4) is None
    assert archive.opened == [str(i) for i in range(SLIDES_TRIED)]


def test_a_real_slide(shared_data: Path) -> None:
    entry = SlideEntry("cmu", str(shared_data / "slides" / "aperio" / "CMU-1-Small-Region.svs"))
    found = sample_patches([entry], Settings(), (64, 64), 0.5, 12)
    assert found is not None
    assert found.shape == (12, 64, 64, 3)
    assert np.median(found.std(axis=(1, 2, 3))) > 20  # no glass
