"""Files that claim more than they hold are refused before a C library believes them."""

from __future__ import annotations

import struct
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from tests.fuzz import fuzz, tags
from wsi_gradcam.errors import SlideFormatError
from wsi_gradcam.slides import open_slide
from wsi_gradcam.slides.base import LocalFile
from wsi_gradcam.slides.tiff_metadata import check_tiff


def check(path: Path) -> None:
    with closing(LocalFile(path)) as file:
        check_tiff(file)


@pytest.fixture(params=[("<", False), (">", False), ("<", True)], ids=str)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    order, big = request.param
    made = tmp_path / "a.tif"
    with tifffile.TiffWriter(made, bigtiff=big, byteorder=order) as writer:
        for size in (64, 32):
            picture = np.full((size, size, 3), 200, np.uint8)
            writer.write(picture, tile=(32, 32), photometric="rgb", metadata=None, subfiletype=int(size == 32))
    return made


def change(path: Path, tag: int, *, count: int | None = None, value: int | None = None, directory: int = 0) -> None:
    data = bytearray(path.read_bytes())
    found = [
        (order, at, size)
        for order, at, size in tags(bytes(data))
        if struct.unpack_from(order + "H", data, at)[0] == tag
    ]
    order, at, size = found[directory]
    word, start = ("I", 4) if size == 12 else ("Q", 4)
    if count is not None:
        struct.pack_into(order + word, data, at + start, count)
    if value is not None:
        struct.pack_into(order + "H", data, at + 2, 4)
        struct.pack_into(order + "I", data, at + start + struct.calcsize(word), value)
    path.write_bytes(data)


def test_a_sound_file_passes(path: Path) -> None:
    check(path)
    slide = open_slide(path, 0.5)
    assert [level.height for level in slide.info.levels] == [64, 32]
    slide.close()


@pytest.mark.parametrize("directory", [0, 1])
def test_more_values_than_bytes_are_refused(path: Path, directory: int) -> None:
    change(path, 258, count=1 << 30, directory=directory)
    with pytest.raises(
        SlideFormatError, match=rf"a\.tif: .*tag 258 of directory {directory} claims 1,073,741,824 values"
    ):
        open_slide(path)


def test_tiles_beyond_all_measure_are_refused(path: Path) -> None:
    change(path, 322, value=1 << 20)
    change(path, 323, value=1 << 12)
    with pytest.raises(
        SlideFormatError, match=r"tiles of 1048576 x 4096 px, expected at most 33,554,432 px, in directory 0"
    ):
        open_slide(path)


@pytest.mark.parametrize("tag", [256, 257])
@pytest.mark.parametrize("directory", [0, 1])
def test_sizes_beyond_the_tiles_are_refused(path: Path, tag: int, directory: int) -> None:
    """A damaged width of millions would have C libraries look for tiles that nobody listed."""
    change(path, tag, value=1 << 22, directory=directory)
    with pytest.raises(
        SlideFormatError, match=rf"a.tif: damaged TIFF: \d tiles, expected .* in directory {directory};"
    ):
        check(path)


def test_colours_as_facsimile_are_refused(path: Path) -> None:
    """One changed number: the decoder would make black and white of them."""
    for directory in (0, 1):
        change(path, 259, value=2, directory=directory)
    with pytest.raises(SlideFormatError, match="8-bit samples with fax compression"):
        open_slide(path, 0.5, "tiff")


def test_a_tile_larger_than_the_file_is_refused(path: Path) -> None:
    with tifffile.TiffFile(path) as file:
        tag: Any = file.pages[0].tags["TileByteCounts"]  # type: ignore[union-attr]
        order, place, kind = file.byteorder, tag.valueoffset, {3: "H", 4: "I", 16: "Q"}[tag.dtype]
    data = bytearray(path.read_bytes())
    struct.pack_into(order + kind, data, place, 60_000)
    path.write_bytes(data)
    with pytest.raises(SlideFormatError, match=r"a tile of 60,000 bytes in directory 0, more than the file's"):
        open_slide(path)


@pytest.mark.parametrize("keep", [3, 9, 15, 40, 200])
def test_what_is_cut_short_is_not_walked_beyond_its_end(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    check(path)


def test_directories_in_a_circle_are_refused(path: Path) -> None:
    with tifffile.TiffFile(path) as file:
        first, place = file.pages[0].offset, file.pages.next_page_offset
        order, size = file.byteorder, file.tiff.offsetsize
    assert place is not None
    data = bytearray(path.read_bytes())
    struct.pack_into(order + {4: "I", 8: "Q"}[size], data, place, first)
    path.write_bytes(data)
    with pytest.raises(SlideFormatError, match=r"a.tif: damaged TIFF: directory 1 points back to an earlier one; copy"):
        check(path)


def write_large_ndpi(path: Path, following: list[int]) -> None:
    """A sparse file of 5 GiB whose directories lie beyond 4 GiB, with 64 bits for their places, as Hamamatsu's are."""
    places = [(1 << 32) + 1024 * (i + 1) for i in range(len(following))]
    with path.open("wb") as file:
        file.write(b"II*\0" + struct.pack("<Q", places[0]))
        for place, after in zip(places, following, strict=True):
            file.seek(place)
            # Of the counts of bytes in a strip only the lower half of the place is here: it would be read elsewhere.
            file.write(struct.pack("<H", 1) + struct.pack("<HHII", 279, 4, 1000, 1 << 20))
            file.write(struct.pack("<Q", places[after] if after >= 0 else 0))
        file.truncate(5 << 30)


def test_directories_beyond_4_gib_are_found_as_hamamatsu_writes_them(tmp_path: Path) -> None:
    write_large_ndpi(tmp_path / "a.ndpi", [1, 2, -1])
    check(tmp_path / "a.ndpi")
    write_large_ndpi(tmp_path / "b.ndpi", [1, 2, 0])
    with pytest.raises(SlideFormatError, match="directory 2 points back to an earlier one"):
        check(tmp_path / "b.ndpi")


def test_slides_damaged_in_many_ways_are_read_or_refused() -> None:
    """The short form; `make proofs` runs ten thousand."""
    assert fuzz(300, seed=5) == []


def test_a_tile_that_is_too_large_is_found_below_a_directory_too(tmp_path: Path) -> None:
    picture = np.full((64, 64, 3), 200, np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(picture, tile=(32, 32), photometric="rgb", metadata=None, subifds=1)
        writer.write(picture[::2, ::2], tile=(32, 32), photometric="rgb", metadata=None, subfiletype=1)
    check(tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        page: Any = file.pages[0]
        below = page.pages[0].tags["TileWidth"].offset
    data = bytearray((tmp_path / "a.tif").read_bytes())
    struct.pack_into("<HII", data, below + 2, 4, 1, 1 << 30)
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(
        SlideFormatError, match=r"a.tif: damaged TIFF: tiles of 1073741824 x 32 px, .* in directory 1; copy"
    ):
        check(tmp_path / "a.tif")
