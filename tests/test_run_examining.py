"""Patches for choices: real, evenly over the tissue, the same each time, whatever the archive is like."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.slides_in_memory import ArraySlide
from wsi_gradcam.errors import SlideFormatError
from wsi_gradcam.geometry import Region
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.run import examining
from wsi_gradcam.run.examining import SLIDES_TRIED, sample_patches
from wsi_gradcam.run.settings import Settings
from wsi_gradcam.tissue.masks import SlideMasks

Rgb = npt.NDArray[np.uint8]
SETTINGS = Settings(min_tissue=0.5)
PATCH, MPP = (32, 48), 1.0  # 64 x 96 level-0 px


def tissue(height: int, width: int, left: int = 0) -> Rgb:
    """Stained from the column `left` on, where the colour tells the place; glass before it."""
    pixels = np.full((height, width, 3), (250, 240, 230), np.uint8)
    y, x = np.mgrid[:height, left:width]
    pixels[:, left:] = np.stack([140 + y * 60 // height, 60 + x * 60 // width, 150 + 0 * y], axis=-1)
    return pixels


def all_tissue(slide: object) -> SlideMasks:
    mask = np.ones((10, 10), np.bool_)
    return SlideMasks(np.zeros((10, 10, 3), np.uint8), mask, ~mask, ~mask)


class Archive:
    """Slides in memory, in place of those on disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slides: dict[str, ArraySlide | Exception] = {}
        self.opened: list[str] = []
        monkeypatch.setattr(examining, "open_entry", self.open)

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


def square(name: str, top: int, left: int, bottom: int, right: int) -> dict[str, object]:
    ring = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    about = {"classification": {"name": name}}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": about}


REGIONS = [square("tumour", 64, 96, 320, 480), square("stroma", 384, 480, 512, 768), square("fold", 64, 96, 128, 288)]
TUMOUR = {(y, x) for y in range(64, 320, 64) for x in range(96, 480, 96)}
STROMA = {(y, x) for y in range(384, 512, 64) for x in range(480, 768, 96)}
FOLD = {(64, 96), (64, 192)}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, TUMOUR | STROMA),
        ({"include": ("stroma",)}, STROMA),
        ({"exclude": ("fold",)}, TUMOUR - FOLD | STROMA),
        ({"include": ("tumour",), "exclude": ("fold",)}, TUMOUR - FOLD),
    ],
    ids=["all", "include", "exclude", "both"],
)
def test_only_what_the_mask_says_is_taken(
    chosen: dict[str, tuple[str, ...]], expected: set[tuple[int, int]], archive: Archive, tmp_path: Path
) -> None:
    """As a run does: the red and green of a patch tell where it is from."""
    mask = tmp_path / "regions.geojson"
    mask.write_text(json.dumps({"type": "FeatureCollection", "features": REGIONS}), encoding="utf-8")
    pixels = tissue(640, 960)
    archive.slides["a"] = ArraySlide([pixels])
    found = archive.sample(1000, Settings(min_tissue=0.9, mask=mask, **chosen))
    assert found is not None
    places = set()
    for patch in found:
        red, green = (float(patch[..., c].mean()) for c in (0, 1))
        y = min(range(0, 640, 64), key=lambda y: abs(pixels[y : y + 64, 0, 0].mean() - red))
        places.add((y, min(range(0, 960, 96), key=lambda x: abs(pixels[0, x : x + 96, 1].mean() - green))))
    assert places == expected
    assert len(found) == len(expected)


def test_a_mask_in_a_folder_is_the_slides_own(
    archive: Archive, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A slide that has none is passed over, and that is told."""
    features = {"type": "FeatureCollection", "features": REGIONS}
    (tmp_path / "b.geojson").write_text(json.dumps(features), encoding="utf-8")
    archive.slides = {"a.tif": ArraySlide([tissue(640, 960)]), "b.tif": ArraySlide([tissue(640, 960)])}
    with caplog.at_level("INFO", "wsi_gradcam"):
        found = archive.sample(1000, Settings(min_tissue=0.9, mask=tmp_path, include=("stroma",)))
    assert found is not None
    assert len(found) == len(STROMA)
    (line,) = caplog.messages
    assert line.startswith("engines are not compared on a.tif: ")


@pytest.mark.parametrize(("what", "count"), [("auto", 5), ("with-pen", 10), ("everything", 15)])
def test_what_counts_as_tissue_is_taken(
    what: str, count: int, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    stained, ink = np.zeros((10, 15), np.bool_), np.zeros((10, 15), np.bool_)
    stained[:, :5], ink[:, 5:10] = True, True
    masks = SlideMasks(np.zeros((10, 15, 3), np.uint8), stained, ink, np.zeros_like(ink))
    monkeypatch.setattr(examining, "slide_masks", lambda slide: masks)
    archive.slides["a"] = ArraySlide([tissue(640, 1440)])
    found = archive.sample(1000, Settings(min_tissue=0.5, tissue=what))
    assert found is not None
    assert len(found) == 10 * count


def test_the_same_archive_gives_the_same_patches(archive: Archive) -> None:
    archive.slides["a"] = ArraySlide([tissue(640, 960)])
    first, second = archive.sample(20), archive.sample(20)
    assert first is not None
    assert second is not None
    assert np.array_equal(first, second)
    assert len(np.unique(first, axis=0)) == 20


def test_the_first_slide_that_can_be_read_is_used(archive: Archive, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "wsi_gradcam")
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
    assert caplog.messages == [
        "engines are not compared on broken: not a slide",
        "engines are not compared on glass: it has no readable patch to explain",
    ]
    assert all(slide.closed for slide in archive.slides.values() if isinstance(slide, ArraySlide) and slide.reads)


def test_slides_without_a_resolution_are_passed_over(archive: Archive) -> None:
    archive.slides = {"a": ArraySlide([tissue(640, 960)], mpp=None), "b": ArraySlide([tissue(640, 960)])}
    assert archive.sample(4) is not None
    assert archive.opened == ["a", "b"]
    first = archive.slides["a"]
    assert isinstance(first, ArraySlide)
    assert first.closed


def test_regions_that_cannot_be_decoded_are_left_out(
    archive: Archive, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examining, "slide_masks", all_tissue)
    whole = ArraySlide([tissue(640, 960)])
    archive.slides["a"] = ArraySlide([tissue(640, 960)], bad=Region(0, 0, 320, 960))
    with caplog.at_level("INFO", "wsi_gradcam"):
        found = archive.sample(1000)
    archive.slides["a"] = whole
    expected = archive.sample(1000)
    assert found is not None
    assert expected is not None
    assert len(expected) == 100
    # The filter of a patch at the edge of what is bad reads a few pixels of it.
    assert len(found) == 40
    assert np.array_equal(found, expected[60:])
    lost = [
        line
        for line in caplog.messages
        if line.startswith("engines are compared on noise, without a patch: memory: level 0, ")
    ]
    assert len(lost) == 60


def test_an_archive_without_a_readable_patch_gives_none(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "slide_masks", all_tissue)
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
