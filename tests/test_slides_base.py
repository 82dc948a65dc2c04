"""Levels, mpp limits and the content digest."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.slides_in_memory import ArraySlide
from wsi_gradcam.errors import MppError
from wsi_gradcam.slides.base import LARGEST_MPP, SMALLEST_MPP, check_mpp, content_digest, make_levels


@given(
    st.integers(1, 200_000),
    st.integers(1, 200_000),
    st.lists(st.integers(0, 9), max_size=4),
    st.sampled_from([math.floor, math.ceil]),
)
def test_powers_of_two_are_found_whichever_way_the_writer_rounds(
    height: int, width: int, powers: list[int], rounding: Any
) -> None:
    factors = [2**p for p in powers if 2**p * 8 <= max(height, width)]
    sizes = [(max(1, rounding(height / f)), max(1, rounding(width / f))) for f in factors]
    # A side of a pixel or two says next to nothing of its factor; the other side then must.
    if min(height, width) >= 2 * max(factors, default=1):
        found = make_levels([(height, width), *sizes])[1:]
        assert [(level.downsample_y, level.downsample_x) for level in found] == [(f, f) for f in factors]


@pytest.mark.parametrize("factor", [3, 5, 7, 10])
@pytest.mark.parametrize("rounding", [math.floor, math.ceil])
def test_other_whole_factors_are_found_on_large_levels(factor: int, rounding: Any) -> None:
    (_, level) = make_levels([(9001, 7003), (rounding(9001 / factor), rounding(7003 / factor))])
    assert (level.downsample_y, level.downsample_x) == (factor, factor)


def test_a_factor_that_is_not_whole_is_the_ratio_of_each_axis() -> None:
    (_, level) = make_levels([(1000, 2000), (400, 900)])
    assert (level.downsample_y, level.downsample_x) == (2.5, 2000 / 900)


def test_axes_may_shrink_differently() -> None:
    (_, level) = make_levels([(1000, 2000), (500, 500)])
    assert (level.downsample_y, level.downsample_x) == (2.0, 4.0)


@given(st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=5))
def test_any_sizes_give_finite_downsamples_that_explain_them(sizes: list[tuple[int, int]]) -> None:
    levels = make_levels(sizes)
    assert (levels[0].downsample_y, levels[0].downsample_x) == (1.0, 1.0)
    for level in levels:
        for full, reduced, down in (
            (sizes[0][0], level.height, level.downsample_y),
            (sizes[0][1], level.width, level.downsample_x),
        ):
            assert abs(full / down - reduced) <= 1 or reduced > full


@pytest.mark.parametrize("mpp", [0.0, -0.0, -0.499, math.nan, math.inf, -math.inf, 9999.0, 352.78, 1e-9])
def test_impossible_mpp_is_named_with_the_mend(mpp: float) -> None:
    problem = check_mpp(mpp, "openslide.mpp-x")
    assert problem.startswith("openslide.mpp-x is ")
    assert f"{mpp:g}" in problem
    assert "--mpp" in problem


@pytest.mark.parametrize("mpp", [SMALLEST_MPP, 0.1214, 0.25, 0.499, 1, 28.969, LARGEST_MPP])
def test_mpp_of_scanners_and_thumbnails_passes(mpp: float) -> None:
    assert check_mpp(mpp, "openslide.mpp-x") == ""


def test_using_a_missing_mpp_names_slide_and_mend() -> None:
    slide = ArraySlide([np.zeros((4, 4, 3), np.uint8)], mpp=None)
    with pytest.raises(MppError, match=r"^memory: no mpp; give it with --mpp$"):
        _ = slide.info.mpp_yx


class TestDigest:
    def test_is_the_same_for_a_copy_under_another_name(self, tmp_path: Path) -> None:
        original = tmp_path / "a.svs"
        original.write_bytes(bytes(range(256)) * 100)
        shutil.copyfile(original, tmp_path / "b.tiff")
        assert content_digest(original) == content_digest(tmp_path / "b.tiff")

    @pytest.mark.parametrize("size", [1, 1000, 4 << 20])
    @pytest.mark.parametrize("place", [0.0, 0.37, 1.0])
    def test_sees_any_byte_of_a_small_file(self, tmp_path: Path, size: int, place: float) -> None:
        path = tmp_path / "slide"
        content = bytearray(size)
        path.write_bytes(content)
        before = content_digest(path)
        content[round(place * (size - 1))] ^= 1
        path.write_bytes(content)
        assert content_digest(path) != before

    @pytest.mark.parametrize("place", [0, 1000, (64 << 20) - 1, (64 << 20) - 60_000])
    def test_sees_head_and_tail_of_a_large_file(self, tmp_path: Path, place: int) -> None:
        path = tmp_path / "slide"
        with path.open("wb") as file:
            file.truncate(64 << 20)
        before = content_digest(path)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert content_digest(path) != before

    def test_sees_a_rewritten_middle_of_a_large_file(self, tmp_path: Path) -> None:
        path = tmp_path / "slide"
        with path.open("wb") as file:
            file.truncate(64 << 20)
        before = content_digest(path)
        with path.open("r+b") as file:
            file.seek(20 << 20)
            file.write(b"x" * (2 << 20))
        assert content_digest(path) != before

    def test_sees_the_length(self, tmp_path: Path) -> None:
        path = tmp_path / "slide"
        digests = set()
        for size in (0, 1, (64 << 20), (64 << 20) + 1):
            with path.open("wb") as file:
                file.truncate(size)
            digests.add(content_digest(path))
        assert len(digests) == 4

    def test_sees_what_else_it_is_told_and_where_it_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "slide"
        path.write_bytes(b"slide")
        told: list[tuple[str, ...]] = [(), ("",), ("ab",), ("a", "b"), ("b", "a")]
        assert len({content_digest(path, *extra) for extra in told}) == len(told)

    def test_reads_little_of_a_huge_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "slide"
        with path.open("wb") as file:
            file.truncate(1 << 36)
        read = _count_reads(monkeypatch)
        content_digest(path)
        assert 0 < sum(read) <= 4 << 20


def _count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads through `Path.open` from here on."""
    sizes: list[int] = []

    class Counting(io.FileIO):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(-1 if size is None else size)
            sizes.append(len(data or b""))
            return data or b""

    monkeypatch.setattr(Path, "open", lambda path, mode="r": Counting(path, mode.replace("b", "")))
    return sizes
