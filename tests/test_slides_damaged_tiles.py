"""Tiles of every codec whose data stop half way, end in zeros or hold something else: never shown as whole ones."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from tests.servers import web_server
from wsi_gradcam.errors import SlideContentError, SlideFormatError, SlideReadError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import open_slide
from wsi_gradcam.slides.tiff_reader import TiffSlide
from wsi_gradcam.slides.tiff_streams import stream_check

Rgb = npt.NDArray[np.uint8]
SIDE, ROW, COLUMN = 128, 1, 2
TILE = Region(ROW * SIDE, COLUMN * SIDE, SIDE, SIDE)

CODECS: dict[str, dict[str, Any]] = {
    "none": {},
    "jpeg": {"compression": "jpeg"},
    "jpeg, rgb": {"compression": "jpeg", "compressionargs": {"outcolorspace": "rgb"}},
    "jpeg, planes": {"compression": "jpeg", "planarconfig": "separate"},
    "jpeg 2000": {"compression": "jpeg2000"},
    "aperio 33003": {"compression": "aperio_jp2000_ycbc"},
    "aperio 33005": {"compression": "aperio_jp2000_rgb"},
    "webp": {"compression": "webp", "compressionargs": {"level": 80, "lossless": False}},
    "webp, lossless": {"compression": "webp", "compressionargs": {"lossless": True}},
    "jpeg xl": {"compression": "jpegxl"},
    "deflate": {"compression": "deflate"},
    "deflate, predictor": {"compression": "deflate", "predictor": True},
    "lzw": {"compression": "lzw"},
    "zstd": {"compression": "zstd"},
    "packbits": {"compression": "packbits"},
    "lzma": {"compression": "lzma"},
    "png": {"compression": "png"},
}
KEPT = {"half": 0.5, "most": 0.9, "a tenth": 0.1}


def picture() -> Rgb:
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(60, 250, (60, 80, 3), dtype=np.uint8))
    return np.asarray(small.resize((512, 384), Image.Resampling.BICUBIC))


def write(path: Path, name: str) -> Path:
    data = picture()
    if CODECS[name].get("planarconfig"):
        data = np.moveaxis(data, -1, 0)
    tifffile.imwrite(
        path, data, tile=(SIDE, SIDE), photometric="rgb", metadata=None, resolution=(2e4, 2e4), **CODECS[name]
    )
    return path


def change(path: Path, how: Callable[[bytes], bytes]) -> None:
    """Put other bytes in the place of a tile's own, with a count of their own, not more of them."""
    with tifffile.TiffFile(path, mode="r+") as file:
        page = cast(tifffile.TiffPage, file.pages[0])
        index, counts = ROW * 4 + COLUMN, [int(count) for count in page.databytecounts]
        file.filehandle.seek(page.dataoffsets[index])
        found = file.filehandle.read(counts[index])
        changed = how(found)
        assert 0 < len(changed) <= len(found)
        file.filehandle.seek(page.dataoffsets[index])
        file.filehandle.write(changed)
        counts[index] = len(changed)
        page.tags["TileByteCounts"].overwrite(counts)


def assert_refused_there_alone(path: Path, expected: Rgb, reader: str = "auto") -> None:
    with closing(open_slide(path, reader=reader)) as slide:
        with pytest.raises(SlideReadError, match=r"level 0, x .*, y .* px cannot be decoded: "):
            slide.read_level(0, TILE)
        np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, SIDE, 512)), expected[:SIDE])


def shown(path: Path, mpp: float | None = None) -> Rgb:
    with closing(open_slide(path, mpp)) as slide:
        return slide.read_level(0, Region(0, 0, slide.info.height, slide.info.width))


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_opens_and_shows_what_was_written(name: str, tmp_path: Path) -> None:
    with closing(open_slide(write(tmp_path / "a.tif", name))) as slide:
        assert isinstance(slide, TiffSlide)
        found = slide.read_level(0, Region(0, 0, 384, 512))
    off = np.abs(found.astype(int) - picture())
    assert off.max() <= 90
    assert off.mean() < 5


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", CODECS)
def test_a_tile_that_stops_half_way_is_unreadable(name: str, kept: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", name)
    expected = shown(path)
    change(path, lambda data: data[: int(len(data) * KEPT[kept])])
    assert_refused_there_alone(path, expected)


@pytest.mark.parametrize("name", CODECS)
def test_a_strip_that_stops_half_way_is_unreadable(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    data = np.moveaxis(picture(), -1, 0) if CODECS[name].get("planarconfig") else picture()
    tifffile.imwrite(path, data, rowsperstrip=64, photometric="rgb", metadata=None, **CODECS[name])
    expected = shown(path, 0.5)
    assert np.abs(expected.astype(int) - picture()).mean() < 5
    with tifffile.TiffFile(path, mode="r+") as file:
        page = cast(tifffile.TiffPage, file.pages[0])
        page.tags["StripByteCounts"].overwrite([int(n) // (1 + (i == 3)) for i, n in enumerate(page.databytecounts)])
    with closing(open_slide(path, 0.5)) as slide:
        np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 192, 512)), expected[:192])
        with pytest.raises(SlideReadError, match=r"x 0, y 192, 512 x 64 px cannot be decoded"):
            slide.read_level(0, Region(180, 0, 20, 20))


@pytest.mark.parametrize("name", [name for name in CODECS if name not in ("none", "packbits", "jpeg, planes")])
def test_a_tile_that_ends_in_zeros_is_unreadable(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", name)
    expected = shown(path)
    change(path, lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert_refused_there_alone(path, expected)


def garbage(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + np.random.default_rng(0).bytes(200) + data[middle + 200 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "garbage": garbage,
    "an early end": lambda data: data[: len(data) // 2] + b"\xff\xd9",
    "an early end, and the rest": lambda data: data[: len(data) // 2] + b"\xff\xd9" + data[len(data) // 2 + 2 :],
    "a marker": lambda data: data[: len(data) // 2] + b"\xff\xd3" + data[len(data) // 2 + 2 :],
    "a part is lost": lambda data: data[: len(data) // 2] + data[len(data) // 2 + 300 :],
}


@pytest.mark.parametrize("reader", ["auto", "tiff"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["jpeg", "jpeg, rgb", "jpeg, planes"])
def test_what_libjpeg_warns_of_is_unreadable(name: str, damage: str, reader: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", name)
    expected = shown(path)
    change(path, DAMAGES[damage])
    assert_refused_there_alone(path, expected, reader)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_picture_is_refused(damage: str, tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(picture()).save(data, "JPEG", quality=90)
    (tmp_path / "a.jpg").write_bytes(data.getvalue())
    open_slide(tmp_path / "a.jpg", 0.5).close()
    (tmp_path / "b.jpg").write_bytes(DAMAGES[damage](data.getvalue()))
    with pytest.raises(SlideFormatError, match=r"b.jpg: damaged or truncated .*; copy the image again"):
        open_slide(tmp_path / "b.jpg", 0.5)


@pytest.mark.parametrize("kind", ["progressive", "gray", "restarts", "cmyk"])
def test_other_jpegs_are_judged_too(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"progressive": {"progressive": True}, "restarts": {"restart_marker_blocks": 4}}
    image = Image.fromarray(picture()[:SIDE, :SIDE]).convert({"gray": "L", "cmyk": "CMYK"}.get(kind, "RGB"))
    made = io.BytesIO()
    image.save(made, "JPEG", quality=90, **options.get(kind, {}))
    for number, data in enumerate((made.getvalue(), made.getvalue()[: len(made.getvalue()) * 2 // 3])):
        tifffile.imwrite(
            tmp_path / f"{number}.tif",
            iter([data]),
            shape=np.asarray(image).shape,
            dtype=np.uint8,
            tile=(SIDE, SIDE),
            photometric={"gray": "minisblack", "cmyk": "separated"}.get(kind, "ycbcr"),
            compression="jpeg",
            metadata=None,
        )
    assert shown(tmp_path / "0.tif").shape == (SIDE, SIDE, 3)
    with closing(open_slide(tmp_path / "1.tif", 0.5)) as slide, pytest.raises(SlideReadError, match="Premature end"):
        slide.read_level(0, Region(0, 0, SIDE, SIDE))


def test_an_rgb_jpeg_that_says_it_is_ycbcr_is_read_as_the_tiff_says(tmp_path: Path) -> None:
    """As OpenSlide and tifffile do."""
    data = bytearray(imagecodecs.jpeg8_encode(picture()[:SIDE, :SIDE], colorspace="rgb", outcolorspace="rgb"))
    data[data.index(b"Adobe") + 11] = 1
    tifffile.imwrite(
        tmp_path / "a.tif",
        iter([bytes(data)]),
        shape=(SIDE, SIDE, 3),
        dtype=np.uint8,
        tile=(SIDE, SIDE),
        photometric="rgb",
        compression="jpeg",
        compressionargs={"outcolorspace": "rgb"},
        metadata=None,
    )
    np.testing.assert_array_equal(shown(tmp_path / "a.tif"), tifffile.imread(tmp_path / "a.tif"))
    assert int(np.abs(shown(tmp_path / "a.tif").astype(int) - picture()[:SIDE, :SIDE]).max()) < 90


@pytest.mark.parametrize("left_out", [1, 40, 2000])
def test_a_jpeg_xr_that_ends_before_it_says_is_unreadable(left_out: int) -> None:
    data = bytes(imagecodecs.jpegxr_encode(picture()[:SIDE, :SIDE]))
    page: Any = type("Page", (), {"compression": 34934, "jpegtables": None, "dtype": np.dtype("u1")})
    check = stream_check(page, (SIDE, SIDE), 3)
    assert check is not None
    check(data)
    check(bytes(imagecodecs.jpegxr_encode(np.dstack([picture()[:SIDE, :SIDE], picture()[:SIDE, :SIDE, 0]]))))
    with pytest.raises(ValueError, match=f"ends {left_out:,} bytes before its stated end"):
        check(data[:-left_out])


@pytest.mark.parametrize("level", [1, 3, 9])
def test_noise_that_zstd_stores_as_it_is_may_end_in_zeros(level: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    pixels[-2:] = pixels[126:128] = 0
    packed: dict[str, Any] = {"compression": "zstd", "compressionargs": {"level": level}}
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(SIDE, SIDE), photometric="rgb", metadata=None, **packed)
    np.testing.assert_array_equal(shown(tmp_path / "a.tif", 0.5), pixels)


@pytest.mark.parametrize("value", [0, 128, 243, 255])
@pytest.mark.parametrize("name", CODECS)
def test_flat_tiles_are_sound(name: str, value: int, tmp_path: Path) -> None:
    """Their data are short, and may end in some zeros."""
    flat = np.full((256, 256, 3), value, np.uint8)
    options = {key: item for key, item in CODECS[name].items() if key != "planarconfig"}
    tifffile.imwrite(tmp_path / "a.tif", flat, tile=(256, 256), photometric="rgb", metadata=None, **options)
    assert int(np.abs(shown(tmp_path / "a.tif").astype(int) - value).max()) <= 1


# --- tiles that were left out ---


def sparse(path: Path, left_out: list[int], *, offset: int = 0, level: int = 0, **options: Any) -> Rgb:
    """Write a slide in tiles, of which some have no data; return what it shows."""
    whole = picture().copy()
    with tifffile.TiffWriter(path) as writer:
        for part in (whole, whole[::2, ::2]):
            writer.write(
                part,
                tile=(SIDE, SIDE),
                photometric="rgb",
                metadata=None,
                subfiletype=int(part is not whole),
                resolution=(2e4, 2e4),
                **options,
            )
    with tifffile.TiffFile(path, mode="r+") as file:
        page = cast(tifffile.TiffPage, file.pages[level])
        for name, values, nothing in (
            ("TileByteCounts", page.databytecounts, 0),
            ("TileOffsets", page.dataoffsets, offset),
        ):
            page.tags[name].overwrite([nothing if i in left_out else int(v) for i, v in enumerate(values)])
    for index in left_out:
        y, x = index // 4 * SIDE, index % 4 * SIDE
        whole[y : y + SIDE, x : x + SIDE] = 255
    return whole


@pytest.mark.parametrize("reader", ["auto", "tiff", "openslide"])
@pytest.mark.parametrize("codec", [None, "deflate", "jpeg"])
def test_tiles_that_were_left_out_are_glass(codec: Any, reader: str, tmp_path: Path) -> None:
    expected = sparse(tmp_path / "a.tif", [0, 5, 6, 11], compression=codec)
    with closing(open_slide(tmp_path / "a.tif", reader=reader)) as slide:
        found = slide.read_level(0, Region(0, 0, 384, 512))
        assert int(np.abs(found.astype(int) - expected).max()) <= (60 if codec == "jpeg" else 0)
        assert (found[:SIDE, :SIDE] == 255).all()
        assert not slide.info.levels[1].problem


def test_remote_tiles_are_left_out_and_damaged_too(tmp_path: Path) -> None:
    expected = sparse(tmp_path / "a.tif", [0, 5, 6, 11], compression="deflate")
    change(write(tmp_path / "b.tif", "jpeg"), lambda data: data[: len(data) // 2])
    sparse(tmp_path / "c.tif", list(range(12)), compression="deflate")
    with web_server(tmp_path) as server:
        with closing(open_slide(f"{server.url}/a.tif")) as slide:
            np.testing.assert_array_equal(slide.read_level(0, Region(0, 0, 384, 512)), expected)
        with closing(open_slide(f"{server.url}/b.tif")) as slide, pytest.raises(SlideReadError, match="Premature end"):
            slide.read_level(0, TILE)
        with pytest.raises(SlideContentError, match=r"c.tif: none of its 12 tiles has data"):
            open_slide(f"{server.url}/c.tif")


def test_a_tile_that_was_lost_is_no_glass(tmp_path: Path) -> None:
    sparse(tmp_path / "a.tif", [5], offset=5000, compression="deflate")
    for reader in ("auto", "tiff", "openslide"):
        with (
            closing(open_slide(tmp_path / "a.tif", reader=reader)) as slide,
            pytest.raises(SlideReadError, match="a tile is missing"),
        ):
            slide.read_level(0, Region(SIDE, SIDE, 9, 9))


def test_a_slide_of_no_tiles_is_no_glass(tmp_path: Path) -> None:
    sparse(tmp_path / "a.tif", list(range(12)), compression="deflate")
    for reader in ("auto", "tiff"):
        with pytest.raises(SlideContentError, match=r"a.tif: none of its 12 tiles has data"):
            open_slide(tmp_path / "a.tif", reader=reader)


def test_a_level_of_no_tiles_is_not_believed(tmp_path: Path) -> None:
    sparse(tmp_path / "a.tif", [0, 1, 2, 3], level=1, compression="deflate")
    with closing(open_slide(tmp_path / "a.tif")) as slide:
        assert slide.info.levels[1].problem == "all of its tiles are missing"


# --- colours of JPEG 2000 ---


@pytest.mark.parametrize("ending", ["svs", "tif"])
@pytest.mark.parametrize("reversible", [False, True])
def test_a_stream_that_says_it_is_rgb_is_believed(reversible: bool, ending: str, tmp_path: Path) -> None:
    """Aperio's codec 33003 says YCbCr; of this one OpenSlide makes (189, 239, 26)."""
    flat = np.full((256, 256, 3), (200, 30, 120), np.uint8)
    about = {"description": "Aperio Image Library v1\n256x256 (128x128)|MPP = 0.5"} if ending == "svs" else {}
    path = tmp_path / f"a.{ending}"
    more: dict[str, Any] = {"compressionargs": {"reversible": reversible, "mct": True}, **about}
    tifffile.imwrite(
        path, flat, tile=(SIDE, SIDE), photometric="rgb", compression="aperio_jp2000_ycbc", metadata=None, **more
    )
    assert int(np.abs(shown(path).astype(int) - (200, 30, 120)).max()) <= 1
    with pytest.raises(SlideContentError, match="OpenSlide shows it in the wrong colours"):
        open_slide(path, reader="openslide")


@pytest.mark.parametrize("compression", ["aperio_jp2000_ycbc", "jpeg2000"])
def test_a_stream_that_says_nothing_is_what_the_tiff_says(compression: str, tmp_path: Path) -> None:
    ycc = np.asarray(Image.fromarray(picture()[:SIDE, :SIDE]).convert("YCbCr"))
    data = bytes(imagecodecs.jpeg2k_encode(ycc, codecformat="j2k", reversible=True, mct=False))
    assert struct.unpack_from(">H", data)[0] == 0xFF4F
    tifffile.imwrite(
        tmp_path / "a.tif",
        iter([data]),
        shape=ycc.shape,
        dtype=np.uint8,
        tile=(SIDE, SIDE),
        photometric="ycbcr",
        compression=compression,
        metadata=None,
    )
    assert int(np.abs(shown(tmp_path / "a.tif").astype(int) - picture()[:SIDE, :SIDE]).max()) <= 3
