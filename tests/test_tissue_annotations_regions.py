"""Masks drawn as pictures, and which part of a slide a file, its classes and a folder say is to be explained."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.test_tissue_annotations import feature, written
from wsi_gradcam.errors import AnnotationError, ConfigError
from wsi_gradcam.tissue.annotations import Regions, check_mask, read_regions
from wsi_gradcam.tissue.annotations.areas import resize_mask


def png(mask: Any, mode: str | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(mask))
    (image.convert(mode) if mode else image).save(buffer, "PNG", **options)
    return buffer.getvalue()


def read(data: bytes) -> NDArray[np.bool_]:
    """What is in by a PNG as large as its slide."""
    size = struct.unpack(">II", data[16:24].ljust(8, b"\1"))[::-1]
    return Regions(Path("a.png"), data).mask(size, size)


class TestPictures:
    MASK = np.random.default_rng(0).random((300, 7)) < 0.4

    @pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P"])
    def test_what_is_not_black_is_in(self, mode: str) -> None:
        found = read(png(self.MASK.astype(np.uint8) * 255, mode))
        np.testing.assert_array_equal(found, self.MASK)

    def test_any_value_counts(self) -> None:
        np.testing.assert_array_equal(read(png(self.MASK.astype(np.uint8))), self.MASK)
        np.testing.assert_array_equal(read(png(self.MASK.astype(np.uint16) * 256)), self.MASK)

    def test_what_is_transparent_is_out(self) -> None:
        rgba = np.full((2, 2, 4), 255, np.uint8)
        rgba[0, 0, 3] = 0
        assert read(png(rgba)).tolist() == [[False, True], [True, True]]

    @given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
    def test_a_finer_or_coarser_picture_covers_the_same(self, height: int, width: int, factor: int) -> None:
        mask = np.random.default_rng(height).random((height, width)) < 0.5
        fine = mask.repeat(factor, 0).repeat(factor, 1)
        np.testing.assert_array_equal(resize_mask(mask, fine.shape), fine)
        np.testing.assert_array_equal(resize_mask(fine, mask.shape), mask)

    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (b"", "not a PNG"),
            (b"GIF89a" + bytes(40), "not a PNG"),
            (png(MASK)[:60], "damaged"),
            (png(MASK)[:40] + b"\0" * 40, "damaged"),
            (
                png(MASK)[:16] + struct.pack(">II", 60_000, 60_000) + png(MASK)[24:],
                "60000 x 60000 px, expected at most",
            ),
        ],
    )
    def test_what_is_no_mask_is_refused(self, data: bytes, problem: str) -> None:
        with pytest.raises(AnnotationError, match=rf"a\.png: .*{problem}"):
            read(data)

    def test_a_text_bomb_is_refused(self) -> None:
        text = zlib.compress(bytes(80 << 20))
        chunk = b"zTXt" + b"a\0\0" + text
        data = png(self.MASK)
        bomb = data[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
        with pytest.raises(AnnotationError, match=r"a\.png: damaged"):
            read(bomb)


SIZE = (100, 200)


def corner(x: float, name: str) -> dict[str, Any]:
    """A square of 40 px from (0, x) on."""
    return feature([[(x, 0), (x + 40, 0), (x + 40, 40), (x, 40)]], name)


class TestRegions:
    DRAWN = json.dumps([corner(0, "tumour"), corner(100, "stroma"), corner(20, "fold")]).encode()

    def columns(self, include: tuple[str, ...] = (), exclude: tuple[str, ...] = (), **changes: Any) -> list[int]:
        """Which tens of columns are in, in the first row."""
        given = {"path": Path("a.json"), "data": self.DRAWN, "include": include, "exclude": exclude, **changes}
        mask = Regions(**given).mask(SIZE, (10, 20))
        return [int(i) for i in np.flatnonzero(mask[0])]

    def test_everything_in_the_file_is_in(self) -> None:
        assert self.columns() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13]

    def test_what_is_excluded_is_out_also_where_it_lies_on_others(self) -> None:
        assert self.columns(exclude=("fold",)) == [0, 1, 10, 11, 12, 13]

    def test_only_what_is_included_is_in(self) -> None:
        assert self.columns(include=("stroma",)) == [10, 11, 12, 13]
        assert self.columns(include=("tumour", "stroma"), exclude=("fold",)) == [0, 1, 10, 11, 12, 13]

    def test_where_only_what_is_to_exclude_was_drawn_the_rest_of_the_slide_is_in(self) -> None:
        drawn = json.dumps(corner(100, "fold")).encode()
        assert self.columns(exclude=("fold",), data=drawn) == [i for i in range(20) if not 10 <= i < 14]

    def test_a_name_that_is_nowhere_is_refused(self) -> None:
        for include, exclude in ((("tumor",), ()), ((), ("tumor",))):
            with pytest.raises(
                AnnotationError, match="no annotation is called 'tumor'; there are 'fold', 'stroma', 'tumour'"
            ):
                self.columns(include, exclude)

    def test_of_a_folder_not_every_file_has_every_class(self) -> None:
        assert self.columns(include=("stroma", "x"), exclude=("y",), shared=True) == [10, 11, 12, 13]
        assert self.columns(exclude=("y",), shared=True) == self.columns()
        with pytest.raises(AnnotationError, match="no annotation is called 'x'"):
            self.columns(include=("x",), shared=True)

    def test_a_picture_covers_the_slide_and_has_no_classes(self) -> None:
        picture = png(np.repeat([[0, 255, 255, 0]], 2, axis=0).astype(np.uint8))
        assert self.columns(path=Path("a.PNG"), data=picture) == list(range(5, 15))
        assert self.columns(include=("255",), path=Path("a.PNG"), data=picture) == list(range(5, 15))
        with pytest.raises(AnnotationError, match="no pixel is x; there are 0, 255"):
            self.columns(include=("x",), path=Path("a.png"), data=picture)

    def test_the_digest_is_of_the_content(self, tmp_path: Path) -> None:
        first, second = (
            read_regions(written(tmp_path / name, corner(0, "a")), "s.svs") for name in ("a.json", "b.json")
        )
        other = read_regions(written(tmp_path / "c.json", corner(1, "a")), "s.svs")
        assert first is not None
        assert second is not None
        assert other is not None
        assert first.digest == second.digest != other.digest

    @pytest.mark.parametrize("name", ["s.svs.geojson", "s.xml", "case/s.png", "case/s.svs.json"])
    def test_the_slides_file_in_a_folder(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        written(path, "")
        written(tmp_path / "other.json", "")
        found = read_regions(tmp_path, "case/s.svs")
        assert found is not None
        assert (found.path, found.shared) == (path, True)

    def test_no_file_or_two_for_a_slide(self, tmp_path: Path) -> None:
        with pytest.raises(
            AnnotationError, match=r"no mask for slide s\.svs; expected s with one of the endings \.png"
        ):
            read_regions(tmp_path, "s.svs")
        written(tmp_path / "s.xml", "")
        written(tmp_path / "s.png", "")
        with pytest.raises(AnnotationError, match=r"s\.png, s\.xml are all masks for slide s\.svs"):
            read_regions(tmp_path, "s.svs")

    def test_no_mask_is_all_of_the_slide(self) -> None:
        assert read_regions(None, "s.svs") is None

    @pytest.mark.parametrize(
        ("mask", "include", "slides", "problem"),
        [
            (None, ["a"], 1, "give the mask with --mask"),
            ("none.png", [], 1, "none.png: does not exist"),
            ("a.png", [], 2, "a.png: one file of --mask for 2 slides; give a folder"),
        ],
    )
    def test_what_no_slide_can_fulfil(
        self, tmp_path: Path, mask: str | None, include: list[str], slides: int, problem: str
    ) -> None:
        written(tmp_path / "a.png", "")
        with pytest.raises(ConfigError, match=re.escape(problem)):
            check_mask(None if mask is None else tmp_path / mask, include, [], slides)

    def test_what_may_be_given(self, tmp_path: Path) -> None:
        check_mask(None, [], [], 5)
        check_mask(tmp_path, ["a"], ["b"], 5)
        check_mask(written(tmp_path / "a.png", ""), [], [], 1)
