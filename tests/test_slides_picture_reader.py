"""Plain pictures are slides of one level whose mpp must be given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.runs import SMALL, rows_of, toy_spec
from tests.synthetic import PINK
from wsi_gradcam.api import explain
from wsi_gradcam.errors import MppError, SlideFormatError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide, picture_reader

SIZE = (60, 90)


@pytest.fixture
def rgb() -> Any:
    return np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def pixels(path: Path) -> Any:
    slide = open_slide(path, 0.5)
    found = slide.read_level(0, Region(-1, -1, slide.info.height + 2, slide.info.width + 2))
    assert (found[0] == 255).all()
    assert (found[:, -1] == 255).all()
    slide.close()
    return found[1:-1, 1:-1]


def test_a_png_is_itself(rgb: Any, tmp_path: Path) -> None:
    Image.fromarray(rgb).save(tmp_path / "a.png", dpi=(72, 72))
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), rgb)
    with pytest.raises(MppError, match=r"a\.png: an image file does not state its pixel size; give .*--mpp"):
        _ = open_slide(tmp_path / "a.png").info.mpp_yx


def test_a_jpeg_is_turned_as_its_camera_says(rgb: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rgb).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    np.testing.assert_array_equal(pixels(tmp_path / "a.jpg"), np.rot90(upright, -1))


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(mode: str, rgb: Any, tmp_path: Path) -> None:
    gray = np.where(rgb[..., 0] < 128, 0, 255).astype(np.uint8)
    expected = np.repeat(gray[..., None], 3, axis=2)
    if mode == "I;16":
        picture = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(expected).convert(mode)
    if mode in ("LA", "RGBA"):
        picture.putalpha(Image.fromarray(np.full(SIZE, 255, np.uint8)))
        picture.putpixel((4, 3), (0,) * len(picture.getbands()))
        expected[3, 4] = 255
    picture.save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), expected)


def test_a_jpeg_of_inks_is_shown(rgb: Any, tmp_path: Path) -> None:
    Image.fromarray(rgb).resize((9, 6)).resize((90, 60)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    np.testing.assert_array_equal(pixels(tmp_path / "a.jpg"), expected)


def test_too_large_a_picture_is_refused_before_it_is_decoded(
    rgb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(rgb).save(tmp_path / "a.png")
    monkeypatch.setattr(picture_reader, "MAX_PX", 60 * 90 - 1)
    with pytest.raises(SlideFormatError, match=r"90 x 60 px; expected at most 5,399 px: convert it to a tiled TIFF"):
        open_slide(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_picture_cut_short_is_refused(name: str, rgb: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    Image.fromarray(rgb).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SlideFormatError, match=f"{name}: damaged or truncated"):
        open_slide(path)


def test_pictures_are_explained(rgb: Any, tmp_path: Path) -> None:
    pink = np.tile(np.array(PINK, np.uint8) - rgb // 16, (4, 4, 1))
    Image.fromarray(pink).save(tmp_path / "a.png")
    explain(tmp_path / "a.png", toy_spec("pooled_linear"), tmp_path / "out", mpp=0.5, **SMALL)
    assert rows_of(tmp_path / "out")["a.png"]["status"] == "ok"


def test_what_was_read_is_the_callers_own(rgb: Any, tmp_path: Path) -> None:
    Image.fromarray(rgb).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png", 0.5)
    slide.read_level(0, Region(0, 0, *SIZE))[:] = 0
    np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, *SIZE)), rgb)
