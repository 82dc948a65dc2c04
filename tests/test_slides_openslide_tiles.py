"""Damage inside tiles of the formats that OpenSlide reads: whatever is shown equals what was written."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest

from tests.vendors import WRITERS, Places, spoil, write_aperio, write_dicom, write_leica, write_philips
from wsi_gradcam.errors import SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide, openslide_tiles
from wsi_gradcam.slides.openslide_reader import OpenSlideSlide
from wsi_gradcam.slides.tiff_levels import TiffLevel

PATCH = 64
Shown = dict[tuple[int, Region], npt.NDArray[np.uint8]]


def opened(path: Path) -> OpenSlideSlide:
    slide = open_slide(path, 0.5, "openslide")
    assert isinstance(slide, OpenSlideSlide)
    return slide


def patches(slide: OpenSlideSlide) -> Iterator[tuple[int, Region]]:
    """All of each level, off the grids of tiles."""
    for number, level in enumerate(slide.info.levels):
        whole = Region(0, 0, level.height, level.width)
        for y in range(-9, level.height, PATCH):
            for x in range(-13, level.width, PATCH):
                yield number, Region(y, x, PATCH, PATCH).intersect(whole)


def shown(slide: OpenSlideSlide) -> Shown:
    return {(level, region): slide.read_level(level, region) for level, region in patches(slide)}


def zeros(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def noise(data: bytes) -> bytes:
    """Half of the data is something else; its end stays."""
    begin, end = len(data) // 4, len(data) * 3 // 4
    return data[:begin] + np.random.default_rng(3).integers(0, 255, end - begin, np.uint8).tobytes() + data[end:]


def some(places: Places) -> Places:
    """A few tiles, of each level and file."""
    return [
        places[index] for index in sorted({0, len(places) // 3, len(places) // 2, len(places) - 2, len(places) - 1})
    ]


def refused(slide: OpenSlideSlide, expected: Shown) -> int:
    """The number of patches that are refused; all others show what was written."""
    count = 0
    for (level, region), pixels in expected.items():
        try:
            np.testing.assert_array_equal(slide.read_level(level, region), pixels)
        except SlideReadError as error:
            assert "cannot be decoded" in str(error)  # noqa: PT017
            count += 1
    return count


@pytest.mark.parametrize("kind", WRITERS)
def test_no_damaged_tile_is_shown(kind: str, tmp_path: Path) -> None:
    path, places = WRITERS[kind](tmp_path)
    with closing(opened(path)) as slide:
        assert slide.info.vendor == kind.partition(",")[0]
        expected = shown(slide)
    for place in some(places):
        for how in (zeros, noise) if "2000" not in kind else (zeros,):  # bits within a part of JPEG 2000 are not seen
            data = spoil(place, how)
            with closing(opened(path)) as slide:
                assert 0 < refused(slide, expected) < len(expected)
            spoil(place, lambda _, data=data: data)  # type: ignore[misc]
    with closing(opened(path)) as slide:
        assert refused(slide, expected) == 0


@pytest.mark.parametrize("kind", ["leica", "ventana", "trestle", "philips, padded", "dicom, sparse"])
def test_a_damaged_tile_costs_its_own_place_alone(kind: str, tmp_path: Path) -> None:
    """A tile, and for a level that OpenSlide interpolates a px around it."""
    path, places = WRITERS[kind](tmp_path)
    with closing(opened(path)) as slide:
        level = slide.info.levels[0]
        whole = slide.read_level(0, Region(0, 0, level.height, level.width)).copy()
    spoil(places[0], noise)
    bad = np.zeros(whole.shape[:2], np.bool_)
    with closing(opened(path)) as slide:
        for y in range(0, level.height, 16):
            for x in range(0, level.width, 16):
                region = Region(y, x, 16, 16).intersect(Region(0, 0, level.height, level.width))
                try:
                    np.testing.assert_array_equal(slide.read_level(0, region), whole[region.slices])
                except SlideReadError:
                    bad[region.slices] = True
    ys, xs = np.nonzero(bad)
    assert 0 < np.ptp(ys) < 160
    assert 0 < np.ptp(xs) < 160


def test_each_tile_is_decoded_once_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, places = write_leica(tmp_path)
    decoded = []
    decode = TiffLevel.decode

    def counted(level: TiffLevel, pieces: list[int], data: list[bytes]) -> npt.NDArray[np.uint8]:
        tile = decode(level, pieces, data)
        decoded.append(tile.shape)
        return tile

    monkeypatch.setattr(TiffLevel, "decode", counted)
    with closing(opened(path)) as slide:
        for _ in range(3):
            shown(slide)
    assert decoded == [(16, 16, 3)] * len(places)


def test_threads_find_the_same_spoil(tmp_path: Path) -> None:
    path, places = write_philips(tmp_path)
    with closing(opened(path)) as slide:
        expected = shown(slide)
    spoil(places[5], zeros)
    with closing(opened(path)) as slide, ThreadPoolExecutor(4) as pool:
        counts = [*pool.map(lambda _: refused(slide, expected), range(4))]
    assert len(set(counts)) == 1
    assert counts[0] > 0


def test_a_slide_of_ours_that_openslide_must_read_is_judged_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where our own reader shows other pixels."""
    path, places = write_aperio(tmp_path)
    monkeypatch.setattr("wsi_gradcam.slides.opening._compare", lambda *_: 1 / 0)
    with closing(open_slide(path)) as slide:
        assert isinstance(slide, OpenSlideSlide)
        expected = shown(slide)
    spoil(places[5], noise)
    with closing(opened(path)) as slide:
        assert refused(slide, expected) > 0


def test_tiles_that_cannot_be_found_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, places = write_leica(tmp_path)
    spoil(places[0], noise)
    monkeypatch.setattr(openslide_tiles, "MAX_XML", 10)
    with closing(opened(path)) as slide, caplog.at_level(logging.WARNING, "wsi_gradcam"):
        slide.read_level(0, Region(100, 132, 64, 64))
        slide.read_level(0, Region(100, 132, 64, 64))
    (record,) = caplog.records
    assert "a.scn: its tiles are checked only by OpenSlide, which shows some damaged ones: " in record.getMessage()


def test_other_files_beside_a_series_of_dicom_are_passed_over(tmp_path: Path) -> None:
    path, places = write_dicom(tmp_path)
    (tmp_path / "notes.dcm").write_bytes(b"no DICOM" * 99)
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    with closing(opened(path)) as slide:
        expected = shown(slide)
    spoil(places[-1], zeros)
    with closing(opened(path)) as slide:
        assert refused(slide, expected) > 0


def test_headers_of_dicom_are_read_within_bounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of files beside a slide, one is packed, and one has many empty items, of which each takes a kilobyte."""
    monkeypatch.setattr(openslide_tiles, "MAX_HEAD", 1 << 18)
    path, _ = write_dicom(tmp_path)
    packed = pydicom.dcmread(path)
    packed.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    packed.PixelData = bytes(1 << 26)
    packed.save_as(tmp_path / "bomb.dcm", enforce_file_format=True)
    many = pydicom.dcmread(path)
    many.SOPInstanceUID += ".9"
    many.ContributingEquipmentSequence = [pydicom.Dataset()] * 60_000
    many.save_as(tmp_path / "items.dcm", enforce_file_format=True)
    tracemalloc.start()
    with caplog.at_level(logging.WARNING, "wsi_gradcam"):
        judge = openslide_tiles.TileJudge(path, "dicom", [(384, 512), (192, 256)])
        judge.check(0, Region(0, 0, 9, 9), 0)
        judge.close()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caplog.records == []
    assert most < 24 << 20
