"""Opening: paths that are no slides, and real slides of several vendors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from wsi_gradcam.errors import MppError, SlideError, SlideFormatError, SlideNotFoundError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide, read_region, thumbnail

# Size (height, width) and mpp (y, x) as the data's MANIFEST.tsv tells them.
REAL = {
    "slides/aperio/CMU-1-Small-Region.svs": ("aperio", (2967, 2220), (0.499, 0.499)),
    "slides/dicom/gcp-multi_frame_jpeg_camelyon_challenge_image/gcp-multi_frame_jpeg_camelyon_challenge_image.dcm": (
        "dicom",
        (700, 1152),
        (28.968, 28.969),
    ),
    "slides/dicom/highdicom-sm_image/highdicom-sm_image.dcm": ("dicom", (50, 50), (0.499, 0.499)),
}
EDITORS_DPI = [
    "slides/tiff/image-tiff-tiled-rgb-u8.tif",
    "slides/tiff/large_image-test_orient0.tif",
    "slides/tiff/large_image-yb10kx5k.zstd.tiff",
]
REFUSED = {
    "slides/dicom/highdicom-sm_image_jpegls/highdicom-sm_image_jpegls.dcm": "Unsupported transfer syntax.*convert it",
    "slides/hostile/histolab-broken.svs": "convert it",
    "slides/ome-tiff/viv-multi-channel.ome.tif": "3 separate channels",
    "slides/ome-tiff/viv-fixture-multi-channel.ome.tif": "3 separate channels",
}
# What OpenSlide does not read; none of them tells its mpp.
ONLY_OURS = {
    "slides/ome-tiff/multifile/multifile-Z1.ome.tiff": (24, 18),
    "slides/tiff/image-tiff-minisblack-1c-16b.tiff": (151, 157),
    "slides/tiff/image-tiff-palette-1c-8b.tiff": (151, 157),
    "slides/tiff/image-tiff-planar-rgb-u8.tif": (499, 374),
}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SlideNotFoundError, match=r"gone\.svs: does not exist, .*check the path"):
        open_slide(tmp_path / "gone.svs")


def test_a_folder_is_no_slide(tmp_path: Path) -> None:
    with pytest.raises(SlideNotFoundError, match="is a folder, expected a slide file"):
        open_slide(tmp_path)


def test_a_path_may_be_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.svs"):
        open_slide(f"{tmp_path}/gone.svs")


@pytest.mark.parametrize("name", REAL)
def test_real_slides_open_with_their_size_and_mpp(shared_data: Path, name: str) -> None:
    vendor, size, mpp = REAL[name]
    slide = open_slide(shared_data / name)
    info = slide.info
    slide.close()
    assert (info.vendor, (info.height, info.width)) == (vendor, size)
    assert info.mpp_yx == pytest.approx(mpp)


@pytest.mark.parametrize("name", REAL)
def test_real_slides_read_the_same_coarse_as_fine(shared_data: Path, name: str) -> None:
    slide = open_slide(shared_data / name)
    mpp = slide.info.mpp_yx
    fine = read_region(slide, 0, 0, 48, 48, mpp).astype(float)
    coarse = read_region(slide, 0, 0, 6, 6, (8 * mpp[0], 8 * mpp[1]))
    slide.close()
    means = fine.reshape(6, 8, 6, 8, 3).mean(axis=(1, 3))
    # The triangle is twice as wide as the box, so single pixels differ where the picture changes.
    assert np.abs(coarse - means)[1:-1, 1:-1].mean() < 8


def test_the_real_slide_is_pink_and_white(shared_data: Path) -> None:
    slide = open_slide(shared_data / "slides/aperio/CMU-1-Small-Region.svs")
    thumb = thumbnail(slide, 8.0, 2048).rgb
    slide.close()
    assert thumb.shape == (185, 138, 3)
    red, green, blue = (float(c) for c in thumb.reshape(-1, 3).mean(axis=0))
    assert green < blue < 255
    assert green < red < 255


@pytest.mark.parametrize("name", EDITORS_DPI)
def test_dots_per_inch_of_image_editors_are_no_mpp(shared_data: Path, name: str) -> None:
    slide = open_slide(shared_data / name)
    with pytest.raises(MppError, match=r"openslide\.mpp-y is 352\..*--mpp"):
        _ = slide.info.mpp_yx
    slide.close()


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_can_show_is_refused(shared_data: Path, name: str) -> None:
    with pytest.raises(SlideFormatError, match=f"{Path(name).name}: .*{REFUSED[name]}"):
        open_slide(shared_data / name)


@pytest.mark.parametrize("name", ONLY_OURS)
def test_pictures_that_openslide_does_not_read_are_what_tifffile_reads(shared_data: Path, name: str) -> None:
    slide = open_slide(shared_data / name)
    height, width = ONLY_OURS[name]
    assert (slide.info.height, slide.info.width) == (height, width)
    with pytest.raises(MppError, match="--mpp"):
        _ = slide.info.mpp_yx
    found = slide.read_level(0, Region(0, 0, height, width))
    slide.close()
    with tifffile.TiffFile(shared_data / name, _multifile=False) as file:
        page: Any = file.pages[0]
        raw = page.asarray()
        if page.colormap is not None:
            expected = np.moveaxis(page.colormap >> 8, 0, -1)[raw]
        elif raw.ndim == 3:
            expected = np.moveaxis(raw, 0, -1)
        else:
            gray = np.round(raw / 257) if raw.dtype == np.uint16 else raw
            expected = np.repeat(gray[..., None], 3, axis=2)
    np.testing.assert_array_equal(found, expected)


def outcome(path: Path) -> str:
    """What comes of reading a little of every level: "" or our error's message; any other error is raised."""
    try:
        slide = open_slide(path, mpp=0.5)
        read_region(slide, 0, 0, 32, 32, 0.5)
        slide.read_level(len(slide.info.levels) - 1, Region(0, 0, 32, 32))
        slide.close()
    except SlideError as error:
        return str(error)
    return ""


def test_hostile_files_are_refused_by_name_never_a_crash(shared_data: Path) -> None:
    files = sorted((shared_data / "slides" / "hostile").rglob("*.*"))
    messages = {file: outcome(file) for file in files}
    assert sum(message != "" for message in messages.values()) > 20
    assert all(str(file) in message for file, message in messages.items() if message)
