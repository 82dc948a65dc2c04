"""All ways of the triangle filter give the bytes that Pillow gives."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.runs import ROOT
from wsi_gradcam.slides import triangle_filter
from wsi_gradcam.slides.triangle_filter import Span, frame_px, resample

COMPILED = triangle_filter._passes()
triangle_filter._COUNT = itertools.count(triangle_filter.FEW)  # not for few pictures
PLAIN = (triangle_filter._sum_columns, triangle_filter._sum_rows)


def by_pillow(pixels: NDArray[np.uint8], rows: Span, columns: Span) -> NDArray[np.uint8]:
    box = (columns.start, rows.start, columns.stop, rows.stop)
    return np.asarray(Image.fromarray(pixels).resize((columns.size, rows.size), Image.Resampling.BILINEAR, box=box))


def picture(rows: Span, columns: Span, seed: int) -> NDArray[np.uint8]:
    """Noise, or pictures that are white and black only, which rounding could push beyond 255."""
    rng = np.random.default_rng(seed)
    shape = (rows.length, columns.length, 3)
    return rng.integers(0, 256, shape, np.uint8) if seed % 3 else 255 * rng.integers(0, 2, shape, np.uint8)


@st.composite
def spans(draw: st.DrawFn, largest: int = 60) -> Span:
    size, factor = draw(st.integers(1, largest)), draw(st.floats(0.4, 9))
    start = draw(st.one_of(st.just(0.0), st.floats(0, 4)))
    stop = start + size * factor
    length = int(np.ceil(stop)) + draw(st.integers(0, 4))
    return Span(length, start, min(stop, length), size)


def test_numba_is_installed() -> None:
    assert COMPILED is not None


@given(spans(), spans(), st.integers(0, 99))
@settings(max_examples=300)
def test_any_part_to_any_size_is_as_by_pillow(rows: Span, columns: Span, seed: int) -> None:
    pixels = picture(rows, columns, seed)
    np.testing.assert_array_equal(resample(pixels, rows, columns), by_pillow(pixels, rows, columns))


@given(spans(4), spans(4), st.integers(0, 99))
@settings(max_examples=30)
def test_the_passes_are_right_before_they_are_compiled(rows: Span, columns: Span, seed: int) -> None:
    if min(rows.length - triangle_filter._taps(rows), columns.length - triangle_filter._taps(columns)) < 0:
        return
    pixels = picture(rows, columns, seed)
    first = triangle_filter._rows_first(rows, columns)
    found = triangle_filter._by_passes(pixels, rows, columns, PLAIN, first)
    np.testing.assert_array_equal(found, by_pillow(pixels, rows, columns))


@pytest.mark.parametrize("power", [2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 5), (31, 64), (224, 224), (40, 3)])
def test_powers_of_two_are_as_by_pillow(power: int, height: int, width: int) -> None:
    rows, columns = (Span(power * (n + 1), power / 2, power * n + power / 2, n) for n in (height, width))
    assert rows.power == columns.power == power
    pixels = picture(rows, columns, power + height)
    expected = by_pillow(pixels, rows, columns)
    np.testing.assert_array_equal(resample(pixels, rows, columns), expected)
    if not triangle_filter._rows_first(rows, columns):
        assert frame_px(rows, columns) == power // 2


@pytest.mark.parametrize("power", [2, 4, 8])
def test_a_process_that_feeds_a_gpu_uses_the_compiled_passes(power: int, monkeypatch: pytest.MonkeyPatch) -> None:
    axis = Span(41 * power, power / 2, 40.5 * power, 40)
    pixels = picture(axis, axis, power)
    assert frame_px(axis, axis) == power // 2
    framed = np.pad(pixels, ((power // 2,) * 2, (power // 2,) * 2, (0, 0)), constant_values=77)
    by_torch = triangle_filter.shrink_framed(framed, power // 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert frame_px(axis, axis) == 0
    np.testing.assert_array_equal(resample(pixels, axis, axis), by_torch)
    np.testing.assert_array_equal(by_torch, by_pillow(pixels, axis, axis))
    monkeypatch.setattr(triangle_filter, "_passes", lambda: None)  # without numba
    assert frame_px(axis, axis) == power // 2


WITHOUT: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "torch": lambda patch: patch.delitem(sys.modules, "torch"),
    "numba": lambda patch: patch.setattr(triangle_filter, "_passes", lambda: None),
}


@pytest.mark.parametrize("missing", WITHOUT)
@pytest.mark.parametrize("factor", [2.0, 1.978])
def test_a_machine_without_a_library_gives_the_same(
    missing: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    margin = 1 if factor == 2 else 1.25
    axis = Span(int(np.ceil(40 * factor + 2 * margin)), margin, margin + 40 * factor, 40)
    pixels = picture(axis, axis, 1)
    expected = resample(pixels, axis, axis)
    WITHOUT[missing](monkeypatch)
    np.testing.assert_array_equal(resample(pixels, axis, axis), expected)


def test_numba_is_not_loaded_for_few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def passes() -> object:
        asked.append(True)
        return COMPILED

    monkeypatch.setattr(triangle_filter, "_passes", passes)
    monkeypatch.setattr(triangle_filter, "_COUNT", itertools.count())
    axis = Span(58, 1.25, 56.0, 40)
    found = [resample(picture(axis, axis, 1), axis, axis) for _ in range(triangle_filter.FEW)]
    assert not asked
    np.testing.assert_array_equal(resample(picture(axis, axis, 1), axis, axis), found[0])
    assert asked == [True]


def test_numba_that_cannot_be_imported_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert triangle_filter._passes.__wrapped__() is None


def test_a_folder_that_keeps_nothing_costs_compiling_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    njit = numba.njit

    def refusing(**options: Any) -> Any:
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    monkeypatch.setattr(numba, "njit", refusing)
    assert all(map(callable, triangle_filter._passes.__wrapped__() or [None]))


WHILE_TORCH_LOADS = """
import threading
from wsi_gradcam.executors.dask.plugins import use_threads
from wsi_gradcam.slides.triangle_filter import Span, frame_px

over = threading.Event()

def load():
    import torch
    over.set()

threading.Thread(target=load).start()
span = Span(64, 0, 64, 32)
while not over.is_set():
    assert frame_px(span, span) in (0, 1)
    use_threads(1)
"""


def test_another_thread_may_be_loading_torch() -> None:
    """As in a worker that loads its model while it plans the next slide."""
    ended = subprocess.run([sys.executable, "-c", WHILE_TORCH_LOADS], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
