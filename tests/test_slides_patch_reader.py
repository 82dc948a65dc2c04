"""Batches of patches: order, content, reading ahead, unreadable patches, and threads that end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracles import crop
from tests.slides_in_memory import BACKGROUND, ArraySlide, read_batches
from wsi_gradcam.errors import MppError, SlideFormatError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides import patch_reader
from wsi_gradcam.slides.patch_reader import Batch, PatchReader

LEVEL0 = np.random.default_rng(2).integers(0, 256, (60, 80, 3), np.uint8)
MPP = 0.5


def slide(bad: Region | None = None) -> ArraySlide:
    return ArraySlide([LEVEL0], (MPP, MPP), bad)


def places(count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(count).integers(-5, 60, (count, 2))


def until(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within some seconds."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


def reader_threads() -> int:
    return sum(thread.name.startswith("read") for thread in threading.enumerate())


@given(st.integers(0, 23), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_patches_come_in_order_whatever_the_batch_and_threads(count: int, batch_size: int, threads: int) -> None:
    yx = places(count)
    batches = list(read_batches(slide(), yx, (7, 9), MPP, batch_size, threads))
    assert [batch.start for batch in batches] == list(range(0, count, batch_size))
    assert [len(batch.rgb) for batch in batches] == [min(batch_size, count - b.start) for b in batches]
    for batch in batches:
        assert batch.causes == {}
        for patch, (y, x) in zip(batch.rgb, yx[batch.start :].tolist(), strict=False):
            np.testing.assert_array_equal(patch, crop(LEVEL0, y, x, 7, 9, BACKGROUND))


def test_reads_at_the_mpp_asked_for() -> None:
    (batch,) = read_batches(slide(), np.array([[0, 0]]), (15, 20), 4 * MPP, 1, 1)
    means = LEVEL0.reshape(15, 4, 20, 4, 3).mean(axis=(1, 3))
    assert np.abs(batch.rgb[0] - means).mean() < 25
    assert batch.rgb[0].std() < LEVEL0.std() / 2


def test_an_unreadable_patch_is_told_with_its_cause_and_the_rest_is_kept() -> None:
    yx = np.array([[0, 0], [30, 40], [10, 0], [32, 42], [50, 60]])
    batches = list(read_batches(slide(Region(33, 43, 2, 2)), yx, (8, 8), MPP, 3, 2))
    assert [sorted(batch.causes) for batch in batches] == [[1], [0]]
    assert "memory: level 0, Region(y=30, x=40" in batches[0].causes[1]
    for batch in batches:
        for i, patch in enumerate(batch.rgb):
            y, x = yx[batch.start + i].tolist()
            expected = np.zeros((8, 8, 3)) if i in batch.causes else crop(LEVEL0, y, x, 8, 8, BACKGROUND)
            np.testing.assert_array_equal(patch, expected)


@pytest.mark.parametrize(("most_bytes", "expected"), [(1 << 20, 3), (4 * 75 * 2, 2), (1, 1)])
def test_some_batches_are_read_ahead_and_of_large_ones_one(
    most_bytes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_reader, "MAX_AHEAD_BYTES", most_bytes)
    source = slide()
    batches = read_batches(source, places(36), (5, 5), MPP, 4, 2)
    for consumed in range(1, 10):
        next(batches)
        ahead = min(36, 4 * (consumed + expected))
        assert until(lambda ahead=ahead: len(source.reads) == ahead)  # type: ignore[misc]
        time.sleep(0.01)
        assert len(source.reads) == ahead
    assert list(batches) == []


def test_nothing_is_read_before_it_is_asked_for() -> None:
    source = slide()
    batches = read_batches(source, places(20), (5, 5), MPP, 4, 2)
    assert source.reads == []
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_threads_than_asked_for(threads: int) -> None:
    batches = read_batches(slide(), places(40), (5, 5), MPP, 20, threads)
    next(batches)
    assert 1 <= reader_threads() <= threads
    list(batches)
    assert reader_threads() == 0


def test_threads_end_when_the_caller_stops_early() -> None:
    batches = read_batches(slide(), places(30), (5, 5), MPP, 4, 3)
    next(batches)
    assert reader_threads() > 0
    batches.close()  # type: ignore[attr-defined]
    assert reader_threads() == 0


class SlowSlide(ArraySlide):
    def read_level(self, level: int, region: Region) -> npt.NDArray[np.uint8]:
        time.sleep(0.01)
        return super().read_level(level, region)


def test_what_was_read_ahead_is_not_waited_for_when_the_caller_stops() -> None:
    source = SlowSlide([LEVEL0], (MPP, MPP))
    batches = read_batches(source, places(100), (5, 5), MPP, 50, 1)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(source.reads) < 75


class VanishedSlide(ArraySlide):
    def read_level(self, level: int, region: Region) -> npt.NDArray[np.uint8]:
        raise SlideFormatError("gone.svs: vanished")


@pytest.mark.parametrize(
    ("source", "error"), [(VanishedSlide([LEVEL0]), SlideFormatError), (ArraySlide([LEVEL0], None), MppError)]
)
def test_what_is_wrong_with_the_whole_slide_is_raised_and_threads_end(
    source: ArraySlide, error: type[Exception]
) -> None:
    with pytest.raises(error):
        list(read_batches(source, places(9), (5, 5), MPP, 2, 2))
    assert reader_threads() == 0


def test_a_batch_is_the_callers_own() -> None:
    first, second = read_batches(slide(), np.array([[0, 0], [0, 0]]), (5, 5), MPP, 1, 1)
    first.rgb[:] = 0
    np.testing.assert_array_equal(second.rgb[0], LEVEL0[:5, :5])
    assert isinstance(first, Batch)


def test_the_first_batch_of_what_follows_is_read_ahead() -> None:
    source = slide()
    first, second = places(6), places(7)
    with closing(PatchReader(source, (5, 5), MPP, 4, 2)) as reader:
        list(reader.batches(first, second))
        assert until(lambda: len(source.reads) == 10)
        found = list(reader.batches(second))
    assert len(source.reads) == 13  # nothing was read twice
    for batch in found:
        for patch, (y, x) in zip(batch.rgb, second[batch.start :].tolist(), strict=False):
            np.testing.assert_array_equal(patch, crop(LEVEL0, y, x, 5, 5, BACKGROUND))
    assert reader_threads() == 0


def test_the_threads_that_read_treat_the_patches_too() -> None:
    where: set[str] = set()

    def halved(patch: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], float]:
        where.add(threading.current_thread().name)
        return patch[::2, ::2], float(patch[0, 0, 0])

    yx = places(9)
    with closing(PatchReader(slide(), (6, 8), MPP, 4, 2, halved)) as reader:
        batches = list(reader.batches(yx))
    assert all(name.startswith("read") for name in where)
    for batch in batches:
        assert batch.rgb.shape[1:] == (3, 4, 3)
        for patch, measure, (y, x) in zip(batch.rgb, batch.measures, yx[batch.start :].tolist(), strict=False):
            whole = crop(LEVEL0, y, x, 6, 8, BACKGROUND)
            np.testing.assert_array_equal(patch, whole[::2, ::2])
            assert measure == whole[0, 0, 0]


def test_a_batch_of_which_nothing_can_be_read_has_the_size_of_treated_patches() -> None:
    source = slide(Region(0, 0, 60, 80))
    yx = np.array([[0, 0], [3, 3]])
    with closing(PatchReader(source, (6, 8), MPP, 4, 2, lambda patch: (patch[:3, :3], 1.0))) as reader:
        (batch,) = reader.batches(yx)
    assert batch.rgb.shape == (2, 3, 3, 3)
    assert np.isnan(batch.measures).all()
    assert sorted(batch.causes) == [0, 1]


def test_what_follows_otherwise_than_expected_is_read_anew() -> None:
    source = slide()
    first, expected, other = places(4), places(5), places(6)
    with closing(PatchReader(source, (5, 5), MPP, 4, 2)) as reader:
        list(reader.batches(first, expected))
        (batch, _) = reader.batches(other)
    y, x = other[0].tolist()
    np.testing.assert_array_equal(batch.rgb[0], crop(LEVEL0, y, x, 5, 5, BACKGROUND))


def test_a_read_ahead_that_failed_is_told_where_it_is_due() -> None:
    source = slide(Region(33, 43, 2, 2))
    first, second = np.array([[0, 0]]), np.array([[30, 40]])
    with closing(PatchReader(source, (8, 8), MPP, 4, 1)) as reader:
        (fine,) = reader.batches(first, second)
        (bad,) = reader.batches(second)
    assert (fine.causes, sorted(bad.causes)) == ({}, [0])


def test_patches_are_put_into_arrays_that_the_caller_makes() -> None:
    """Such as pinned memory, from which they travel to a GPU: nothing is copied once more."""
    made: list[npt.NDArray[np.uint8]] = []

    def empty(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        made.append(np.full(shape, 77, np.uint8))
        return made[-1]

    with closing(PatchReader(slide(Region(33, 43, 2, 2)), (8, 8), MPP, 2, 2, empty=empty)) as reader:
        batches = list(reader.batches(np.array([[0, 0], [30, 40], [10, 0]])))
    assert {id(batch.rgb) for batch in batches} == set(map(id, made))
    np.testing.assert_array_equal(batches[0].rgb[0], LEVEL0[:8, :8])
    assert not batches[0].rgb[1].any()  # unreadable


def test_threads_that_read_several_slides_stay_when_one_is_closed() -> None:
    with ThreadPoolExecutor(2, thread_name_prefix="read") as pool:
        first, second = SlowSlide([LEVEL0], (MPP, MPP)), slide()
        with closing(PatchReader(first, (5, 5), MPP, 4, 2, pool=pool)) as reader:
            next(reader.batches(places(40)))
        begun = len(first.reads)
        assert begun < 40  # what was read ahead is cancelled, and what had begun has ended
        with closing(PatchReader(second, (5, 5), MPP, 4, 2, pool=pool)) as reader:
            (batch,) = reader.batches(places(3))
        assert len(first.reads) == begun
        assert len(batch.rgb) == 3
    assert reader_threads() == 0


def test_orders_that_share_a_slide_keep_each_its_own_first_batch() -> None:
    source = slide()
    spans = [places(count) for count in (3, 4, 5)]
    with closing(PatchReader(source, (5, 5), MPP, 8, 2)) as reader:
        for span in spans:
            reader.read_ahead(span)
        for span in reversed(spans):
            (batch,) = reader.batches(span)
            assert len(batch.rgb) == len(span)
    assert len(source.reads) == 3 + 4 + 5  # nothing was read twice


def test_a_thread_is_handed_some_patches_at_a_time_where_there_are_enough_for_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patch_reader, "MOST_AT_ONCE", 3)
    yx, bad = places(40), Region(33, 43, 2, 2)
    with (
        closing(PatchReader(slide(bad), (8, 8), MPP, 20, 2)) as some,
        closing(PatchReader(slide(bad), (8, 8), MPP, 20, 40)) as one,
    ):
        found, expected = list(some.batches(yx)), list(one.batches(yx))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.rgb, b.rgb)
        assert a.causes == b.causes
