"""Tiles that would unpack to gigabytes are refused by what their own headers say; no decoder sees them."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from tests.limits import little_memory
from wsi_gradcam.errors import SlideFormatError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide
from wsi_gradcam.slides.tiff_streams import MAX_SCANS, check_jpeg, stream_check

SIDE = 64
MEMORY = 64 << 20  # more than a tile needs, and a hundredth of what a bomb does
RGB = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def replaced(data: bytes, at: int, layout: str, *values: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, at, *values)
    return bytes(changed)


def jpeg(pixels: Any = RGB) -> bytes:
    return bytes(imagecodecs.jpeg_encode(pixels, level=90))


def jpeg2000(container: str = "j2k") -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(RGB, codecformat=container))


def huge_jpeg2000(data: bytes) -> bytes:
    siz = data.index(b"\xff\x4f\xff\x51") + 8
    return replaced(data, siz, ">8I", 60_000, 60_000, 0, 0, 60_000, 60_000, 0, 0)


def fine_jpeg2000() -> bytes:
    """As large as its tile, but in layers of precincts of a pixel: a packet for each."""
    data = jpeg2000()
    at = data.index(b"\xff\x52") + 2
    (length,) = struct.unpack_from(">H", data, at)
    levels = data[at + 7]
    cod = bytearray(data[at : at + length])
    cod[2] |= 1
    cod += bytes(levels + 1)
    struct.pack_into(">H", cod, 0, len(cod))
    struct.pack_into(">H", cod, 4, 65_535)
    return data[:at] + bytes(cod) + data[at + length :]


def jpeg_xl(*fields: tuple[int, int]) -> bytes:
    """A header of JPEG XL: (value, bits), from the lowest bit on."""
    bits = place = 0
    for value, count in fields:
        bits |= value << place
        place += count
    return b"\xff\x0a" + bits.to_bytes(40, "little")


HUGE_XL = [(0, 1), (3, 2), (59_999, 30), (1, 3)]  # not small; height by 30 bits; as wide
BOMBS: dict[str, tuple[str, bytes]] = {
    "jpeg": ("jpeg", replaced(jpeg(), jpeg().index(b"\xff\xc0") + 5, ">HH", 65_500, 65_500)),
    "jpeg, wide": ("jpeg", replaced(jpeg(), jpeg().index(b"\xff\xc0") + 5, ">HH", 0, 65_500)),
    "jpeg in many scans": ("jpeg", jpeg().replace(b"\xff\xc0", b"\xff\xc2") + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * 5000),
    "jpeg of two frames": ("jpeg", jpeg()[:2] + b"\xff\xc3\0\x11\x08\xff\xdc\xff\xdc\3" + bytes(9) + jpeg()[2:]),
    "jpeg 2000": ("jpeg2000", huge_jpeg2000(jpeg2000())),
    "jpeg 2000 in boxes": ("jpeg2000", huge_jpeg2000(jpeg2000("jp2"))),
    "jpeg 2000 of Aperio": ("aperio_jp2000_ycbc", huge_jpeg2000(jpeg2000())),
    "jpeg 2000 in dust": ("jpeg2000", fine_jpeg2000()),
    "jpeg 2000 in tiles": (
        "jpeg2000",
        replaced(jpeg2000(), 8, ">8I", SIDE, SIDE, 0, 0, 1, 1, 0, 0),
    ),
    "jpeg xl": ("jpegxl", jpeg_xl(*HUGE_XL)),
    "jpeg xl in boxes": (
        "jpegxl",
        b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\0jxlc" + jpeg_xl(*HUGE_XL),
    ),
    "jpeg xl of many channels": (
        "jpegxl",
        jpeg_xl((1, 1), (7, 5), (1, 3), (0, 1), (0, 1), (0, 1), (0, 2), (0, 1), (3, 2), (4000, 12)),
    ),
    "jpeg xl, a film": ("jpegxl", jpeg_xl((1, 1), (7, 5), (1, 3), (0, 1), (1, 1), (0, 3), (0, 1), (0, 1), (1, 1))),
    "webp": ("webp", replaced(bytes(imagecodecs.webp_encode(RGB, lossless=False)), 26, "<HH", 16_383, 16_383)),
    "webp, lossless": ("webp", replaced(bytes(imagecodecs.webp_encode(RGB, lossless=True)), 21, "<I", (1 << 28) - 1)),
    "png": ("png", replaced(bytes(imagecodecs.png_encode(RGB)), 16, ">II", 60_000, 60_000)),
    "png with texts": ("png", bytes(imagecodecs.png_encode(RGB)) + b"zTXt" * 100),
    "lzma": ("lzma", lzma.compress(bytes(40 << 20))),
    "lzma dictionary": (
        "lzma",
        lzma.compress(RGB.tobytes(), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 28}]),
    ),
    "deflate": ("deflate", zlib.compress(bytes(40 << 20))),
    "zstd": ("zstd", bytes(imagecodecs.zstd_encode(bytes(40 << 20)))),
    "packbits": ("packbits", b"\x81\0" * 16_000),
}
SAID = {"deflate": "Deflate", "zstd": "Zstd", "packbits": "TOO_SMALL", "lzma": "more than 12,288 bytes in the tile"}
SAID |= {
    "jpeg in many scans": f"5001 scans, expected at most {MAX_SCANS}",
    "jpeg of two frames": "several frames",
    "jpeg 2000 in dust": "more than a tile of a slide has",
    "jpeg 2000 in tiles": "of 4,096 tiles, .* more than a tile of a slide has",
    "jpeg xl, a film": "several images",
    "png with texts": "more text than a tile has",
    "lzma dictionary": "[Mm]emory",
}


def write(path: Path, compression: str, data: bytes, shape: tuple[int, ...] = RGB.shape, **options: Any) -> Path:
    """A slide of one tile that holds `data`."""
    options = {"photometric": "rgb", "tile": (SIDE, SIDE), "metadata": None, **options}
    tifffile.imwrite(path, iter([data]), shape=shape, dtype=np.uint8, compression=compression, **options)
    return path


def read(path: Path) -> npt.NDArray[np.uint8]:
    slide = open_slide(path, 0.5, "tiff")
    try:
        return slide.read_level(0, Region(0, 0, slide.info.height, slide.info.width))
    finally:
        slide.close()


@pytest.mark.parametrize("name", BOMBS)
def test_a_tile_that_is_larger_than_it_says_is_not_decoded(name: str, tmp_path: Path) -> None:
    compression, data = BOMBS[name]
    path = write(tmp_path / "a.tif", compression, data)
    with little_memory(MEMORY), pytest.raises(SlideReadError, match=SAID.get(name, "the compressed image has")):
        read(path)


def test_a_jpeg_xr_is_refused_by_its_own_header() -> None:
    data = bytes(imagecodecs.jpegxr_encode(RGB))
    at = data.index(b"WMPHOTO\0")
    page: Any = type("Page", (), {"compression": 34934, "jpegtables": None, "dtype": np.dtype("u1")})
    check = stream_check(page, (SIDE, SIDE), 3)
    assert check is not None
    check(data)
    layout = ">HH" if data[at + 10] & 0x80 else ">II"
    with pytest.raises(ValueError, match=r"compressed image has 60000 x 60000 px"):
        check(replaced(data, at + 12, layout, 59_999, 59_999))


@pytest.mark.parametrize("compression", [34887, 65000, 48124, 99, 34663])
def test_codecs_that_cannot_be_bounded_are_refused(compression: int) -> None:
    page: Any = type("Page", (), {"compression": compression, "jpegtables": None, "dtype": np.dtype("u1")})
    with pytest.raises(
        SlideFormatError, match=r"tiles are compressed with .*; convert it to JPEG, JPEG 2000 or deflate"
    ):
        stream_check(page, (SIDE, SIDE), 3)


LOSSLESS: dict[str, Callable[[Any], bytes]] = {
    "jpegxl": lambda pixels: bytes(imagecodecs.jpegxl_encode(pixels)),
    "webp": lambda pixels: bytes(imagecodecs.webp_encode(pixels, lossless=True)),
    "png": lambda pixels: bytes(imagecodecs.png_encode(pixels)),
    "jpeg2000": lambda pixels: bytes(imagecodecs.jpeg2k_encode(pixels)),
    "aperio_jp2000_rgb": lambda pixels: bytes(imagecodecs.jpeg2k_encode(pixels, codecformat="j2k")),
    "lzma": lambda pixels: lzma.compress(pixels.tobytes()),
    "deflate": lambda pixels: zlib.compress(pixels.tobytes()),
    "zstd": lambda pixels: bytes(imagecodecs.zstd_encode(pixels.tobytes())),
}


@pytest.mark.parametrize("compression", LOSSLESS)
def test_sound_tiles_are_read(compression: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", compression, LOSSLESS[compression](RGB))
    assert np.array_equal(read(path), RGB)


@pytest.mark.parametrize("options", [{}, {"level": 50}, {"optimize": True}, {"subsampling": "420"}])
def test_jpegs_are_read_whatever_their_tables_and_their_edges(options: dict[str, Any], tmp_path: Path) -> None:
    data = bytes(imagecodecs.jpeg_encode(RGB, **options))
    expected = imagecodecs.jpeg_decode(data)
    assert np.array_equal(read(write(tmp_path / "a.tif", "jpeg", data, photometric="ycbcr")), expected)
    # some writers cut the last tiles of rows and columns
    cut = bytes(imagecodecs.jpeg_encode(RGB[:40, :50], **options))
    path = write(tmp_path / "b.tif", "jpeg", cut, (40, 50, 3), photometric="ycbcr")
    assert np.array_equal(read(path), imagecodecs.jpeg_decode(cut))


def test_a_tile_that_begins_like_a_sound_one_is_looked_at_too() -> None:
    page: Any = type("Page", (), {"compression": 7, "jpegtables": None, "dtype": np.dtype("u1")})
    check = stream_check(page, (SIDE, SIDE), 3)
    assert check is not None
    for data in (jpeg(), jpeg(255 - RGB)):
        check(data)
    with pytest.raises(ValueError, match="65500 x 65500"):
        check(BOMBS["jpeg"][1])
    check(jpeg())


def test_what_a_jpeg_says_is_found_behind_anything_that_may_stand_before_it() -> None:
    data = jpeg()
    noise = b"\xff\xe1\0\x10" + b"\xff\xc0\0\x11\x08\xff\xff\xff\xff\3" + bytes(4)  # a segment with a picture in it
    found = check_jpeg(data[:2] + noise + b"\0\0\xff\xff" + data[2:])
    assert (found.height, found.width, found.samples) == (SIDE, SIDE, 3)
    assert imagecodecs.jpeg_decode(data[:2] + noise + b"\0\0\xff\xff" + data[2:]).shape == RGB.shape


def test_tables_with_a_picture_in_them_are_refused() -> None:
    page: Any = type("Page", (), {"compression": 7, "jpegtables": BOMBS["jpeg"][1], "dtype": np.dtype("u1")})
    with pytest.raises(SlideFormatError, match="its JPEG tables contain an image"):
        stream_check(page, (SIDE, SIDE), 3)


def test_tiles_of_many_samples_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(
            iter([zlib.compress(bytes(100))]),
            shape=(4096, 4096, 40),
            dtype=np.uint8,
            tile=(4096, 4096),
            photometric="rgb",
            extrasamples=[0] * 37,
            compression="deflate",
            metadata=None,
        )
    with little_memory(MEMORY), pytest.raises(SlideFormatError, match=r"4096 x 4096 px of 40 bytes, expected at most"):
        open_slide(tmp_path / "a.tif", 0.5, "tiff")


def test_large_tiles_become_rgb_some_rows_at_a_time(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 65_536, (1500, 1000, 3), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", rowsperstrip=1500, compression="deflate")
    assert np.array_equal(read(tmp_path / "a.tif"), ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8))
