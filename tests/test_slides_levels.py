"""Levels whose sizes do not tell their factors: filled up to whole tiles, or enlarged to a rounder size."""

from __future__ import annotations

import logging
import warnings
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr
from PIL import Image

from tests.synthetic import tissue_texture
from tests.vendors import half, tissue, write_dicom, write_philips
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import Slide, open_slide, read_region
from wsi_gradcam.slides.base import make_levels

Rgb = npt.NDArray[np.uint8]
SIZE, TILE, FACTORS = (2304, 2048), 256, (1, 2, 4, 8)
MARK, MARK_PX, MAGENTA = (1900, 1500), 96, (255, 0, 255)
MPP = 0.25


@pytest.fixture(scope="module")
def picture() -> Rgb:
    coarse = tissue_texture(512, np.random.default_rng(3))
    fine = np.asarray(Image.fromarray(coarse).resize((2304, 2304), Image.Resampling.BICUBIC)).copy()
    y, x = MARK
    fine[y : y + MARK_PX, x : x + MARK_PX] = MAGENTA
    return fine[: SIZE[0], : SIZE[1]]


def shrunk(picture: Rgb, factor: int, stretch: float = 1.0) -> Rgb:
    """A level of the picture; its content may be stretched, as by a writer that rounds sizes and not places."""
    height, width = (side // factor for side in picture.shape[:2])
    size = round(width * stretch), round(height * stretch)
    small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))[:height, :width]
    return np.pad(small, [(0, height - small.shape[0]), (0, width - small.shape[1]), (0, 0)], mode="edge")


def padded(level: Rgb, colour: int) -> Rgb:
    missing = [(0, -side % TILE) for side in level.shape[:2]]
    return np.pad(level, [*missing, (0, 0)], constant_values=colour)


def levels_of(picture: Rgb, *, stretch: float = 1.0, colour: int | None = 0) -> list[Rgb]:
    found = [shrunk(picture, f, stretch if f > 1 else 1.0) for f in FACTORS]
    return found if colour is None else [padded(level, colour) for level in found]


def write_tiff(path: Path, levels: list[Rgb], *, tags: bool) -> Path:
    with tifffile.TiffWriter(path) as writer:
        for factor, level in zip(FACTORS, levels, strict=True):
            px = MPP * (factor if tags else 1) / 1e4
            writer.write(
                level,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="deflate",
                subfiletype=int(factor > 1),
                resolution=(1 / px, 1 / px),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def write_zarr(path: Path, levels: list[Rgb], *, tags: bool) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=3)
    datasets: list[Any] = []
    for number, (factor, level) in enumerate(zip(FACTORS, levels, strict=True)):
        array = group.create_array(str(number), shape=level.shape, chunks=(TILE, TILE, 3), dtype="uint8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            array[:] = level
        scale = [MPP * (factor if tags else 1)] * 2 + [1.0]
        transforms = [{"type": "scale", "scale": scale}]
        datasets.append({"path": str(number), "coordinateTransformations": transforms})
    axes: list[Any] = [{"name": n, "type": "space", "unit": "micrometer"} for n in "yx"] + [
        {"name": "c", "type": "channel"}
    ]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    return path


def opened(path: Path, levels: list[Rgb], reader: str, *, tags: bool) -> Slide:
    write = write_zarr if reader == "ome-zarr" else write_tiff
    return open_slide(
        write(path / "a.zarr" if reader == "ome-zarr" else path / "a.tif", levels, tags=tags), MPP, reader
    )


def place_of_mark(slide: Slide, mpp: float) -> tuple[float, float]:
    """The mark's centre in level-0 px, as it is read at an mpp."""
    step = mpp / MPP
    height, width = (int(side / step) for side in SIZE)
    pixels = read_region(slide, 0, 0, height, width, mpp).astype(int)
    ys, xs = np.nonzero((pixels[..., 0] > 200) & (pixels[..., 1] < 70) & (pixels[..., 2] > 200))
    return (float(ys.mean()) + 0.5) * step, (float(xs.mean()) + 0.5) * step


@pytest.mark.parametrize("reader", ["auto", "tiff", "openslide", "ome-zarr"])
@pytest.mark.parametrize("tags", [True, False])
@pytest.mark.parametrize("mpp", [0.5, 1.0, 2.0])
def test_what_lies_on_a_padded_level_is_shown_where_it_is(
    picture: Rgb, reader: str, tags: bool, mpp: float, tmp_path: Path
) -> None:
    with closing(opened(tmp_path, levels_of(picture), reader, tags=tags)) as slide:
        found = place_of_mark(slide, mpp)
        assert found == pytest.approx((MARK[0] + MARK_PX / 2, MARK[1] + MARK_PX / 2), abs=mpp / MPP)
        # nor is there anything but glass beyond the slide, whatever the tiles were filled with
        beyond = read_region(slide, SIZE[0] + 8, 100, 16, 16, mpp)
        assert beyond.min() == 255


@pytest.mark.parametrize("reader", ["tiff", "openslide", "ome-zarr"])
def test_the_size_of_pixels_tells_the_factor(picture: Rgb, reader: str, tmp_path: Path) -> None:
    with closing(opened(tmp_path, levels_of(picture), reader, tags=True)) as slide:
        found = [(level.height, level.width, level.downsample_y, level.downsample_x) for level in slide.info.levels]
        assert found == [(2304, 2048, 1, 1), (1152, 1024, 2, 2), (576, 512, 4, 4), (288, 256, 8, 8)]
        assert not any(level.problem for level in slide.info.levels)


@pytest.mark.parametrize("stretch", [0.997, 1.004])
@pytest.mark.parametrize("reader", ["tiff", "openslide", "ome-zarr"])
def test_a_factor_that_is_a_little_off_is_found_by_content(
    picture: Rgb, reader: str, stretch: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All sizes and tags say 2, 4 and 8."""
    levels = levels_of(picture, stretch=stretch, colour=None)
    with closing(opened(tmp_path, levels, reader, tags=True)) as slide, caplog.at_level(logging.WARNING):
        assert place_of_mark(slide, 0.5) == pytest.approx((1948, 1548), abs=1.0)
    assert "level 1 is replaced by finer ones" in caplog.text


def test_levels_that_fit_are_used_without_a_word(
    picture: Rgb, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    levels = levels_of(picture, colour=None)
    with closing(opened(tmp_path, levels, "tiff", tags=True)) as slide, caplog.at_level(logging.WARNING):
        for number, mpp in ((1, 0.5), (2, 1.0)):
            np.testing.assert_array_equal(
                read_region(slide, 0, 0, 200, 200, mpp), slide.read_level(number, Region(0, 0, 200, 200))
            )
    assert not caplog.records


def test_a_flat_level_of_uncertain_factor_is_not_used(tmp_path: Path) -> None:
    """Nothing tells its factor, so nothing is taken from it."""
    flat = [padded(np.full((2304 // f, 2048 // f, 3), 250 - 10 * f, np.uint8), 0) for f in FACTORS]
    with closing(opened(tmp_path, flat, "tiff", tags=False)) as slide:
        assert [bool(level.problem) for level in slide.info.levels] == [False, True, True, True]
        assert read_region(slide, 0, 0, 100, 100, 1.0).min() == 240


@pytest.mark.parametrize("reader", ["tiff", "openslide"])
def test_whole_tiles_may_look_like_a_whole_factor(reader: str, tmp_path: Path) -> None:
    """A square slide's level of 1/16 in one tile has the size of 1/8; tags or content tell."""
    texture = tissue_texture(512, np.random.default_rng(8))
    square = np.asarray(Image.fromarray(texture).resize((2048, 2048), Image.Resampling.BICUBIC))
    for tags in (True, False):
        path = tmp_path / f"{tags}.tif"
        with tifffile.TiffWriter(path) as writer:
            for factor in (1, 16):
                px = MPP * (factor if tags else 1) / 1e4
                writer.write(
                    padded(shrunk(square, factor), 0),
                    tile=(TILE, TILE),
                    photometric="rgb",
                    compression="deflate",
                    subfiletype=int(factor > 1),
                    resolution=(1 / px, 1 / px),
                    resolutionunit="CENTIMETER",
                    metadata=None,
                )
        with closing(open_slide(path, MPP, reader)) as slide:
            found = read_region(slide, 0, 0, 128, 128, 16 * MPP).astype(int)
        assert np.abs(found - shrunk(square, 16)).mean() < 3


def test_tags_that_cannot_be_true_are_no_tags() -> None:
    sizes = [(4096, 4096), (1024, 1024)]
    for spacings in (
        [(1.0, 1.0), (1.0, 1.0)],
        [(1.0, 1.0), (0.0, 0.0)],
        [(1.0, 1.0), (4.01, 4.01)],
        [None, (4.0, 4.0)],
    ):
        (_, level) = make_levels(sizes, spacings, [(TILE, TILE)] * 2)
        assert (level.downsample_y, level.downsample_x, level.problem) == (4.0, 4.0, "")


@pytest.mark.parametrize("kind", ["philips", "dicom"])
def test_padded_levels_of_scanners_are_where_they_belong(kind: str, tmp_path: Path) -> None:
    """Philips' XML tells each level's pixel size; of DICOM OpenSlide takes the factor of the sizes."""
    whole = tissue(384, 512)
    if kind == "philips":
        path, _ = write_philips(tmp_path, padded=88)
    else:
        small = np.pad(half(whole), ((0, 64), (0, 0), (0, 0)))
        path, _ = write_dicom(tmp_path, levels=(whole, small))
    with closing(open_slide(path)) as slide:
        assert slide.info.mpp == (0.5, 0.5)
        for by in (2, 4):
            found = read_region(slide, 64, 64, 256 // by, 256 // by, 0.5 * by).astype(int)
            expected, first = half(whole, by).astype(int), 64 // by
            off = {
                (y, x): np.abs(found - expected[y : y + 256 // by, x : x + 256 // by]).mean()
                for y in range(first - 2, first + 3)
                for x in range(first - 2, first + 3)
            }
            assert min(off, key=lambda place: off[place]) == (first, first)
