"""What is kept is bounded, made once, and never closed while someone uses it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import anyio
import numpy as np
import pytest

from tests.slides_in_memory import ArraySlide
from wsi_gradcam.errors import SlideFormatError
from wsi_gradcam.viewer.app import BoundedThreads
from wsi_gradcam.viewer.memo import Memo
from wsi_gradcam.viewer.responses import BusyError, DisconnectedError
from wsi_gradcam.viewer.slides_open import OpenSlides

PIXEL = np.zeros((1, 1, 3), np.uint8)


def test_the_oldest_go_when_there_is_no_room() -> None:
    memo, made = Memo(100), []

    def get(key: str) -> bytes:
        return memo.get(key, lambda: made.append(key) or b"x" * 40, len)  # type: ignore[func-returns-value]

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)
    assert made == ["a", "b", "c", "b"]
    assert memo.bytes == 80


def test_what_is_larger_than_all_room_is_not_kept() -> None:
    memo = Memo(10)
    assert memo.get("a", lambda: b"x" * 11, len) == b"x" * 11
    assert memo.bytes == 0


def test_what_many_want_is_made_once() -> None:
    memo, made = Memo(1000), []

    def make() -> bytes:
        made.append(1)
        time.sleep(0.05)
        return b"x"

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: memo.get("key", make, len), range(64)))
    assert found == [b"x"] * 64
    assert len(made) == 1


def test_an_error_is_raised_and_forgotten() -> None:
    memo = Memo(10)

    def fail() -> bytes:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            memo.get("a", fail, len)
    assert memo.get("a", lambda: b"x", len) == b"x"
    assert not memo._making


def test_few_slides_stay_open_and_none_in_use_is_closed() -> None:
    slides = {str(i): ArraySlide([PIXEL]) for i in range(5)}
    opened = OpenSlides(2)
    with opened.borrow("0", lambda: slides["0"]) as used:
        for key in "1234":
            with opened.borrow(key, lambda key=key: slides[key]):  # type: ignore[misc]
                pass
        assert not slides["0"].closed
        assert used is slides["0"]
    assert sum(not slide.closed for slide in slides.values()) == 2
    opened.close()
    assert all(slide.closed for slide in slides.values())


def test_a_slide_is_opened_once_for_many_threads() -> None:
    opened, count, lock = OpenSlides(2), [], threading.Lock()

    def opener() -> ArraySlide:
        with lock:
            count.append(1)
        time.sleep(0.05)
        return ArraySlide([PIXEL])

    def use(_: int) -> bool:
        with opened.borrow("a", opener) as slide:
            return bool(slide.info)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(40)))
    assert len(count) == 1


def test_a_slide_that_does_not_open_may_be_asked_for_again() -> None:
    opened = OpenSlides(2)

    def fail() -> ArraySlide:
        raise SlideFormatError("broken")

    with pytest.raises(SlideFormatError), opened.borrow("a", fail):
        pass
    with opened.borrow("a", lambda: ArraySlide([PIXEL])) as slide:
        assert slide.info.height == 1


async def _never() -> bool:
    return False


async def _always() -> bool:
    return True


def test_too_much_work_is_refused_and_unwanted_work_not_done() -> None:
    done: list[str] = []

    def take(name: str) -> str:
        time.sleep(0.02)
        done.append(name)
        return name

    async def all_of_it() -> list[str]:
        work, found = BoundedThreads(1, max_waiting=3), []

        async def one(number: int) -> None:
            try:
                found.append(await work.run(_always if number == 1 else _never, lambda: take(str(number))))
            except (BusyError, DisconnectedError) as error:
                found.append(type(error).__name__)

        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(one, number)
        return [*found, await work.run(_never, lambda: "free again")]

    found = anyio.run(all_of_it)
    assert found[-1] == "free again"
    assert found.count("BusyError") == 2
    assert found.count("DisconnectedError") == 1
    assert sorted(done) == sorted(set(done))
    assert len(done) == 2
