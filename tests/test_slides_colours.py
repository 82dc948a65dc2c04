"""Every way to store colours in a TIFF that has a definition comes out as what Pillow or arithmetic says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from wsi_gradcam.errors import SlideFormatError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide

Rgb = npt.NDArray[np.uint8]
SIZE = (70, 90)


@pytest.fixture
def picture() -> Rgb:
    """Smooth colours with all values."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.stack([3 * y % 256, 2 * x + y, 255 - 2 * x], axis=-1).astype(np.uint8)


def read(path: Path) -> Rgb:
    slide = open_slide(path, 0.5, "tiff")
    try:
        assert (slide.info.height, slide.info.width) == SIZE
        return slide.read_level(0, Region(0, 0, *SIZE))
    finally:
        slide.close()


def write(path: Path, data: npt.NDArray[Any], **options: Any) -> Path:
    tifffile.imwrite(path, data, **{"tile": (32, 48), "metadata": None, **options})
    return path


@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "zstd", "packbits"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_rgb_is_itself(compression: str | None, planar: str, picture: Rgb, tmp_path: Path) -> None:
    data = picture if planar == "contig" else np.moveaxis(picture, 2, 0)
    path = write(tmp_path / "a.tif", data, photometric="rgb", planarconfig=planar, compression=compression)
    assert np.array_equal(read(path), picture)


@pytest.mark.parametrize("rows", [1, 7, 64, 200])
def test_strips_are_tiles(rows: int, picture: Rgb, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", picture, tile=None, rowsperstrip=rows, photometric="rgb", compression="lzw")
    assert np.array_equal(read(path), picture)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_gray_is_repeated(photometric: str, dtype: type[np.unsignedinteger[Any]], picture: Rgb, tmp_path: Path) -> None:
    gray = picture[..., 0]
    stored = gray.astype(dtype) * (257 if dtype is np.uint16 else 1)
    found = read(write(tmp_path / "a.tif", stored, photometric=photometric))
    expected = gray if photometric == "minisblack" else 255 - gray
    assert np.array_equal(found, np.repeat(expected[..., None], 3, axis=2))


def test_sixteen_bits_are_scaled_and_rounded(tmp_path: Path) -> None:
    values = np.zeros((*SIZE, 3), np.uint16)
    values[0, :6, 0] = [0, 128, 129, 32896, 65406, 65535]
    found = read(write(tmp_path / "a.tif", values, photometric="rgb"))
    assert found[0, :6, 0].tolist() == [round(v / 257) for v in (0, 128, 129, 32896, 65406, 65535)]


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 256, SIZE, dtype=np.uint8)
    colours = rng.integers(0, 256, (3, 256)).astype(np.uint16)
    found = read(write(tmp_path / "a.tif", index, photometric="palette", colormap=colours * 257))
    assert np.array_equal(found, colours.T[index])


def test_cmyk_is_as_pillow_has_it(tmp_path: Path) -> None:
    inks = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), dtype=np.uint8)
    found = read(write(tmp_path / "a.tif", inks, photometric="separated"))
    expected = np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"))
    assert int(np.abs(found.astype(int) - expected).max()) <= 1


@pytest.mark.parametrize(("kind", "expected"), [("unassalpha", [152, 162, 172]), ("assocalpha", [177, 197, 217])])
def test_alpha_lies_on_white(kind: str, expected: list[int], tmp_path: Path) -> None:
    """(50, 70, 90) covering 128 / 255: over white, unless it was multiplied before."""
    values = np.broadcast_to(np.array([50, 70, 90, 128], np.uint8), (*SIZE, 4))
    found = read(write(tmp_path / "a.tif", values.copy(), photometric="rgb", extrasamples=[kind]))
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_other_extra_samples_are_left_out(picture: Rgb, tmp_path: Path) -> None:
    values = np.dstack([picture, np.full(SIZE, 9, np.uint8)])
    assert np.array_equal(
        read(write(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unspecified"])), picture
    )


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        (np.zeros(SIZE, np.float32), {"photometric": "minisblack"}, "32 bits, IEEEFP, expected unsigned 8 or 16 bits"),
        (np.zeros(SIZE, np.int16), {"photometric": "minisblack"}, "16 bits, INT, expected unsigned 8 or 16 bits"),
        (np.zeros(SIZE, np.uint32), {"photometric": "minisblack"}, "32 bits, UINT, expected unsigned 8 or 16 bits"),
        (np.zeros(SIZE, bool), {"photometric": "minisblack"}, "1 bits"),
        (
            np.zeros((*SIZE, 3), np.uint8),
            {"photometric": "cielab"},
            "3 samples of CIELAB are not a supported colour space",
        ),
    ],
)
def test_what_has_no_colours_is_refused(data: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", data, **options)
    with pytest.raises(SlideFormatError, match=f"a.tif: .*{said}"):
        open_slide(path, 0.5, "tiff")
