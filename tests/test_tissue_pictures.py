"""Pictures of labels as masks: PNG and TIFF in the forms that programs write, values as classes, shape and memory."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from tests.test_tissue_annotations_regions import png
from wsi_gradcam.errors import AnnotationError, ConfigError
from wsi_gradcam.tissue.annotations import check_ending, find_mask, read_regions
from wsi_gradcam.tissue.annotations.areas import covers

Mask = NDArray[np.bool_]
SIZE = (60, 90)
LABELS = np.zeros(SIZE, np.uint8)
LABELS[10:30, 10:40], LABELS[30:50, 50:80] = 1, 2
BINARY = (LABELS > 0).astype(np.uint8)


def mask(path: Path, *include: str, exclude: tuple[str, ...] = (), slide_px: tuple[int, int] = SIZE) -> Mask:
    regions = read_regions(path, "s.svs", include, exclude)
    assert regions is not None
    return regions.mask(slide_px, SIZE)


def written(path: Path, array: NDArray[Any], **options: Any) -> Path:
    """Write an array as PNG by Pillow or as TIFF by tifffile."""
    if path.suffix == ".png":
        path.write_bytes(png(array))
    else:
        tifffile.imwrite(path, array, **{"metadata": None, **options})
    return path


def palette_png(path: Path, colours: list[tuple[int, int, int]], array: NDArray[np.uint8], **options: Any) -> Path:
    image = Image.fromarray(array).convert("L")
    image.putpalette([value for colour in colours for value in colour])
    image.save(path, **options)
    return path


TIFFS: dict[str, dict[str, Any]] = {
    "one strip": {},
    "strips, deflate": {"compression": "zlib", "rowsperstrip": 7},
    "tiles, LZW": {"compression": "lzw", "tile": (16, 32)},
    "tiles, deflate, predictor": {"compression": "zlib", "predictor": True, "tile": (32, 32)},
    "tiles, PackBits, big-endian": {"compression": "packbits", "tile": (16, 16), "byteorder": ">"},
    "tiles, zstd, BigTIFF": {"compression": "zstd", "tile": (16, 16), "bigtiff": True},
    "tiles": {"tile": (16, 16)},
}


@pytest.mark.parametrize("options", TIFFS.values(), ids=TIFFS)
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32])
class TestForms:
    def test_one_value_beside_zero_is_a_mask(self, tmp_path: Path, options: dict[str, Any], kind: type) -> None:
        for value in (1, 255):
            path = written(tmp_path / "a.tif", (BINARY * value).astype(kind), **without_float(options, kind))
            np.testing.assert_array_equal(mask(path), BINARY > 0)

    def test_several_values_are_classes(self, tmp_path: Path, options: dict[str, Any], kind: type) -> None:
        path = written(tmp_path / "a.tiff", LABELS.astype(kind), **without_float(options, kind))
        for value in (1, 2):
            np.testing.assert_array_equal(mask(path, str(value)), value == LABELS)
        with pytest.raises(AnnotationError, match=r"a\.tiff: has the values 0, 1, 2, so it shows several classes"):
            mask(path)


def without_float(options: dict[str, Any], kind: type) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "predictor"} if kind is np.float32 else options


class TestValues:
    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    def test_classes_are_chosen_by_value(self, tmp_path: Path, name: str) -> None:
        path = written(tmp_path / name, LABELS)
        np.testing.assert_array_equal(mask(path, "1", "2"), LABELS > 0)
        np.testing.assert_array_equal(mask(path, exclude=("1",)), LABELS == 2)
        np.testing.assert_array_equal(mask(path, "0"), LABELS == 0)
        np.testing.assert_array_equal(mask(written(path, BINARY), exclude=("1",)), BINARY == 0)
        with pytest.raises(AnnotationError, match="no pixel is 3; there are 0, 1, 2"):
            mask(written(path, LABELS), "3")

    def test_two_values_of_which_none_is_zero_are_two_classes(self, tmp_path: Path) -> None:
        with pytest.raises(AnnotationError, match="has the values 1, 2, so it shows several classes"):
            mask(written(tmp_path / "a.png", BINARY + 1))

    @pytest.mark.parametrize("value", [0, 7])
    def test_one_value_is_all_or_nothing(self, tmp_path: Path, value: int) -> None:
        assert (mask(written(tmp_path / "a.png", np.full(SIZE, value, np.uint8))) == (value > 0)).all()

    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    def test_sixteen_bits_are_kept(self, tmp_path: Path, name: str) -> None:
        path = written(tmp_path / name, LABELS.astype(np.uint16) * 300)
        np.testing.assert_array_equal(mask(path, "600"), LABELS == 2)

    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    def test_a_photograph_or_a_lossy_mask_is_refused(self, tmp_path: Path, name: str) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
        with pytest.raises(AnnotationError, match="more than 1,000 values, like a photograph"):
            mask(written(tmp_path / name, noise))

    def test_jpeg_in_tiff_is_refused_and_other_endings_are_told(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tif"
        written(path, BINARY * 255, compression="jpeg", tile=(32, 32))
        with pytest.raises(AnnotationError, match="compressed as JPEG, which may change values; save it as PNG, or"):
            mask(path)
        (tmp_path / "a.jpg").write_bytes(b"")
        endings = r"\.png \.tif \.tiff \.geojson \.json \.xml"
        with pytest.raises(
            ConfigError, match=rf"a\.jpg: neither annotations nor a mask; .*{endings}, because JPEG changes"
        ):
            check_ending(tmp_path / "a.jpg")

    def test_fractions_are_no_labels(self, tmp_path: Path) -> None:
        with pytest.raises(AnnotationError, match="has fractions"):
            mask(written(tmp_path / "a.tif", np.full(SIZE, 0.5, np.float32)))


class TestColours:
    RED, GREEN = (255, 0, 0), (0, 128, 0)

    def test_numbers_of_a_palette(self, tmp_path: Path) -> None:
        for colours in ([(0, 0, 0), self.RED, self.GREEN], [(255, 255, 255), self.RED, self.GREEN]):
            for bits in (2, 8):
                path = palette_png(tmp_path / "a.png", colours, LABELS, bits=bits)
                np.testing.assert_array_equal(mask(path, "2"), LABELS == 2)
                with pytest.raises(AnnotationError, match="has the values 0, 1, 2"):
                    mask(path)

    def test_black_is_out_whatever_its_number(self, tmp_path: Path) -> None:
        path = palette_png(tmp_path / "a.png", [(255, 255, 255), (0, 0, 0)], 1 - BINARY)
        np.testing.assert_array_equal(mask(path), BINARY > 0)

    def test_transparent_numbers_are_out(self, tmp_path: Path) -> None:
        path = palette_png(tmp_path / "a.png", [self.GREEN, self.RED], BINARY, transparency=bytes([0, 255]))
        np.testing.assert_array_equal(mask(path), BINARY > 0)
        path = palette_png(tmp_path / "a.png", [self.GREEN, self.RED], 1 - BINARY, transparency=1)
        assert not mask(path).any()

    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    def test_colours_are_classes(self, tmp_path: Path, name: str) -> None:
        colours = np.array([(0, 0, 0), self.RED, self.GREEN], np.uint8)
        path = written(tmp_path / name, colours[LABELS])
        np.testing.assert_array_equal(mask(path, "#ff0000"), LABELS == 1)
        with pytest.raises(AnnotationError, match="has the values 0, #008000, #ff0000"):
            mask(path)
        np.testing.assert_array_equal(mask(written(path, colours[BINARY])), BINARY > 0)
        np.testing.assert_array_equal(mask(written(path, np.repeat(LABELS[..., None], 3, 2)), "2"), LABELS == 2)

    def test_what_alpha_hides_is_out(self, tmp_path: Path) -> None:
        rgba = np.dstack([np.full((*SIZE, 3), 200, np.uint8), BINARY * 90])
        np.testing.assert_array_equal(mask(written(tmp_path / "a.png", rgba)), BINARY > 0)
        path = written(tmp_path / "a.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
        np.testing.assert_array_equal(mask(path), BINARY > 0)

    def test_colours_of_sixteen_bits(self, tmp_path: Path) -> None:
        """Pillow drops the lower half of each, so that 1 becomes black."""
        rows = b"".join(b"\0" + np.repeat(LABELS[y, :, None], 3, 1).astype(">u2").tobytes() for y in range(SIZE[0]))
        head = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, 2, 0, 0, 0)
        parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        np.testing.assert_array_equal(mask(tmp_path / "a.png", "2"), LABELS == 2)


class TestOneBit:
    @pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
    def test_by_tifffile(self, tmp_path: Path, photometric: str) -> None:
        """With white as zero, zero is what is in."""
        stored = BINARY > 0 if photometric == "minisblack" else BINARY == 0
        for options in ({}, {"tile": (16, 16), "compression": "zlib"}):
            path = written(tmp_path / "a.tif", stored, photometric=photometric, **options)
            np.testing.assert_array_equal(mask(path), BINARY > 0)

    @pytest.mark.parametrize("compression", [None, "group3", "group4", "tiff_ccitt", "packbits", "tiff_lzw"])
    def test_by_pillow(self, tmp_path: Path, compression: str | None) -> None:
        options = {} if compression is None else {"compression": compression}
        Image.fromarray(BINARY * 255).convert("1").save(tmp_path / "a.tif", **options)
        np.testing.assert_array_equal(mask(tmp_path / "a.tif"), BINARY > 0)

    def test_png(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png(BINARY * 255, "1"))
        np.testing.assert_array_equal(mask(tmp_path / "a.png", "1"), BINARY > 0)


def pyramid(path: Path, levels: list[NDArray[np.uint8]], sub: bool = False, **options: Any) -> Path:
    """Write levels as ASAP and libvips do, as pages marked as reductions, or as SubIFDs."""
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for i, level in enumerate(levels):
            more = {"subifds": len(levels) - 1} if sub and not i else {"subfiletype": int(i > 0)}
            tiff.write(level, **{"tile": (64, 64), "compression": "lzw", "metadata": None, **more, **options})
    return path


def mean(array: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    h, w = array.shape
    means: NDArray[np.uint8] = (
        array.reshape(h // factor, factor, w // factor, factor).mean((1, 3)).round().astype(np.uint8)
    )
    return means


class TestPyramids:
    FINE = LABELS.repeat(32, 0).repeat(32, 1)  # 1920 x 2880

    @pytest.mark.parametrize("sub", [False, True])
    def test_a_fitting_level_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sub: bool) -> None:
        levels = [self.FINE, self.FINE[8::16, 8::16], self.FINE[16::32, 16::32]]
        path = pyramid(tmp_path / "a.tif", levels, sub)
        read: list[int] = []
        from wsi_gradcam.tissue.annotations import regions

        monkeypatch.setattr(regions.TiffPixels, "blocks", spy(regions.TiffPixels.blocks, read))
        np.testing.assert_array_equal(mask(path, "2", slide_px=(1920, 2880)), LABELS == 2)
        assert 2 in read

    def test_a_level_of_means_is_not_trusted(self, tmp_path: Path) -> None:
        """Between 0 and 2 the mean is 1: a rim of a class that is not there."""
        shifted = np.roll(np.where(self.FINE == 2, 2, 0).astype(np.uint8), (8, 8), (0, 1))
        path = pyramid(tmp_path / "a.tif", [shifted, mean(shifted, 16)])
        assert (mean(shifted, 16) == 1).any()
        with pytest.raises(AnnotationError, match="no pixel is 1; there are 0, 2"):
            mask(path, "1", slide_px=(1920, 2880))
        assert mask(path, slide_px=(1920, 2880)).sum() == pytest.approx(600, abs=60)

    def test_a_pyramid_of_a_binary_mask_by_means(self, tmp_path: Path) -> None:
        fine = np.roll((self.FINE > 0) * np.uint8(255), (5, 5), (0, 1))
        path = pyramid(tmp_path / "a.tif", [fine, mean(fine, 4), mean(fine, 32)])
        assert mask(path, slide_px=(1920, 2880)).sum() == pytest.approx(BINARY.sum(), rel=0.05)

    def test_a_padded_level_is_left_out(self, tmp_path: Path) -> None:
        padded = np.zeros((192, 192), np.uint8)
        padded[:120, :180] = self.FINE[8::16, 8::16]
        path = pyramid(tmp_path / "a.tif", [self.FINE, padded])
        np.testing.assert_array_equal(mask(path, "1", slide_px=(1920, 2880)), LABELS == 1)

    def test_several_pictures_are_refused(self, tmp_path: Path) -> None:
        tifffile.imwrite(tmp_path / "a.tif", np.stack([BINARY, BINARY, BINARY]), photometric="minisblack")
        with pytest.raises(AnnotationError, match="several images of one size"):
            mask(tmp_path / "a.tif")

    def test_a_tile_left_out_is_background(self, tmp_path: Path) -> None:
        path = written(tmp_path / "a.tif", BINARY, tile=(16, 16), compression="zlib")
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tags = tiff.pages.first.tags
            for name in ("TileOffsets", "TileByteCounts"):
                values = list(tags[name].value)
                values[0] = 0
                tags[name].overwrite(values)
        expected = BINARY > 0
        expected[:16, :16] = False
        np.testing.assert_array_equal(mask(path), expected)


def spy(function: Any, read: list[int]) -> Any:
    def blocks(self: Any, level: int) -> Any:
        read.append(level)
        return function(self, level)

    return blocks


class TestDamage:
    @pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
    def test_a_mask_that_is_cut_short_is_refused(self, tmp_path: Path, kept: float) -> None:
        noise = np.random.default_rng(0).integers(0, 2, (600, 900), np.uint8)
        data = written(tmp_path / "a.tif", noise, tile=(64, 64), compression="zlib").read_bytes()
        (tmp_path / "a.tif").write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(AnnotationError, match=r"a\.tif: .*(damaged|not a TIFF).*write it again"):
            mask(tmp_path / "a.tif", slide_px=(600, 900))

    @pytest.mark.parametrize("data", [b"", b"II*\0", b"\x89PNG\r\n\x1a\n" + bytes(50)])
    def test_what_is_no_tiff_is_refused(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.tif").write_bytes(data)
        with pytest.raises(AnnotationError, match=r"a\.tif: not a TIFF, or damaged"):
            mask(tmp_path / "a.tif")

    def test_hostile_files_are_refused_in_one_line(self, shared_data: Path) -> None:
        for file in sorted((shared_data / "slides/hostile/image-tiff-fuzz").iterdir()):
            try:
                mask(file, slide_px=(151, 157))
            except AnnotationError as error:
                assert "\n" not in str(error)  # noqa: PT017


class TestShape:
    @pytest.mark.parametrize("size", [(60, 90), (6, 9), (6, 10), (120, 180), (1, 2), (13, 20), (60, 89)])
    def test_another_resolution_covers_the_same(self, size: tuple[int, int]) -> None:
        assert covers(size, SIZE)
        assert covers(SIZE, size)

    @pytest.mark.parametrize("size", [(90, 60), (60, 80), (9, 6), (60, 92), (30, 43), (600, 880)])
    def test_another_shape_is_refused_with_both_sizes(self, tmp_path: Path, size: tuple[int, int]) -> None:
        assert not covers(size, SIZE)
        for name in ("a.png", "a.tif"):
            path = written(tmp_path / name, np.ones(size, np.uint8))
            with pytest.raises(
                AnnotationError, match=rf"{size[1]} x {size[0]} px .*(the slide's|a slide of) 90 x 60 px"
            ):
                mask(path)

    @pytest.mark.parametrize("size", [(741, 555), (742, 555), (2967, 2220), (185, 138), (186, 139), (92, 69)])
    def test_levels_of_a_real_slide_are_its_shape(self, size: tuple[int, int]) -> None:
        assert covers(size, (2967, 2220))
        assert not covers(size[::-1], (2967, 2220))


def test_the_slide_is_no_mask_of_itself(tmp_path: Path) -> None:
    written(tmp_path / "s.tif", BINARY)
    assert find_mask(tmp_path, "s.tif", str(tmp_path / "s.tif")) is None
    assert find_mask(tmp_path, "s.tif") == tmp_path / "s.tif"
    written(tmp_path / "s.png", BINARY)
    assert find_mask(tmp_path, "s.tif", str(tmp_path / "s.tif")) == tmp_path / "s.png"
    with pytest.raises(AnnotationError, match=re.escape("s.png, s.tif are all masks")):
        find_mask(tmp_path, "s.tif")


GIGAPIXELS = """
import resource, sys
from pathlib import Path
from wsi_gradcam.tissue.annotations import read_regions
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[2]), int(sys.argv[2])))
regions = read_regions(Path(sys.argv[1]), "s.svs")
size = int(sys.argv[3]), int(sys.argv[4])
found = regions.mask(size, (size[0] // 32, size[1] // 32))
cut = regions.drawn(size).cut(regions.drawn(size).names, (4096.0, 4096.0, 448.0, 448.0), (64, 64))
print(int(found.sum()), int(cut.sum()))
"""


def test_a_mask_of_gigapixels_is_read_in_bounded_memory(tmp_path: Path) -> None:
    """32,768 x 49,152 px without a pyramid, 1.6 GB as bytes; a process of 700 MB reads it."""
    path, size = tmp_path / "a.tif", (32768, 49152)

    def tiles() -> Any:
        for row in range(64):
            for column in range(96):
                inside = 8 <= row < 16 and 8 <= column < 24
                yield np.full((512, 512), 255 if inside else 0, np.uint8)

    tifffile.imwrite(path, tiles(), shape=size, dtype=np.uint8, tile=(512, 512), compression="zlib", metadata=None)
    command = [sys.executable, "-c", GIGAPIXELS, str(path), str(700 << 20), *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(8 * 16 * 16 * 16), str(64 * 64)]


def test_a_large_strip_is_read_by_its_rows(tmp_path: Path) -> None:
    """One strip of 100 million pixels, as arrays are written by default."""
    path = tmp_path / "a.tif"
    stored = tifffile.memmap(path, shape=(10_000, 10_000), dtype=np.uint8, metadata=None)
    stored[2500:5000, 2500:5000] = 1
    stored.flush()
    found = read_regions(path, "s.svs")
    assert found is not None
    reduced = found.mask((10_000, 10_000), (100, 100))
    assert reduced.sum() == 625
    assert reduced[25:50, 25:50].all()


def test_a_tiff_that_is_finer_than_its_slide_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """One tile in a file may stand for a million of them."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((512, 512), np.uint8), tile=(64, 64), compression="zlib")
    assert read_regions(tmp_path / "a.tif", "a").drawn((256, 256)).known == ("0",)  # type: ignore[union-attr]
    with pytest.raises(AnnotationError, match=r"512 x 512 px .* over a slide of 200 x 200 px; a mask cannot be finer"):
        read_regions(tmp_path / "a.tif", "a").drawn((200, 200))  # type: ignore[union-attr]
