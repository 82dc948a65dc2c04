"""Tiles are made once, by one thread, kept up to a size; an error is its own tile's, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.slides.tile_cache import TileCache

Tile = npt.NDArray[np.uint8]
Cache = TileCache[object, Tile]


def tile(value: int, size: int = 100) -> Tile:
    return np.full(size, value, np.uint8)


def get(cache: Cache, key: object, decode: Callable[[], Tile]) -> Tile:
    (found,) = cache.get_many([key], lambda keys: [decode()])
    return found


class Decoder:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def get(self, cache: Cache, key: int, size: int = 100) -> Tile:
        def decode() -> Tile:
            self.asked.append(key)
            return tile(key, size)

        return get(cache, key, decode)


def test_what_was_used_last_is_kept() -> None:
    cache, decoder = Cache(300), Decoder()
    for key in (1, 2, 3, 1, 4, 1, 3, 2):
        assert np.array_equal(decoder.get(cache, key), tile(key))
    assert decoder.asked == [1, 2, 3, 4, 2]  # 4 drove out 2, and not 1, which had been used since


def test_a_tile_larger_than_the_cache_is_still_given() -> None:
    cache, decoder = Cache(50), Decoder()
    assert len(decoder.get(cache, 1)) == 100
    decoder.get(cache, 2)
    decoder.get(cache, 1)
    assert decoder.asked == [1, 2, 1]


def test_bytes_are_kept_too() -> None:
    cache: TileCache[int, bytes] = TileCache(8)
    asked: list[int] = []

    def make(keys: list[int]) -> list[bytes]:
        asked.extend(keys)
        return [bytes([key] * 4) for key in keys]

    for keys in ([1, 2], [2, 1], [3], [1], [2], []):
        assert cache.get_many(keys, make) == [bytes([key] * 4) for key in keys]
    assert asked == [1, 2, 3, 2]


def test_only_what_is_missing_is_made_in_one_call_and_each_once() -> None:
    cache: Cache = Cache(10_000)
    calls: list[list[object]] = []

    def make(keys: list[object]) -> list[Tile]:
        calls.append(keys)
        return [tile(int(str(key))) for key in keys]

    cache.get_many([2, 4], make)
    found = cache.get_many([1, 2, 3, 1, 4], make)
    assert [int(each[0]) for each in found] == [1, 2, 3, 1, 4]
    assert calls == [[2, 4], [1, 3]]


def test_threads_share_one_decoding() -> None:
    cache, begun, go = Cache(1000), threading.Event(), threading.Event()
    asked = []

    def decode() -> Tile:
        asked.append(1)
        begun.set()
        assert go.wait(10)
        return tile(7)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(get, cache, "a", decode)
        assert begun.wait(10)
        others = [pool.submit(get, cache, "a", decode) for _ in range(3)]
        go.set()
        assert all(f.result(10) is first.result(10) for f in others)
    assert asked == [1]


def test_other_tiles_do_not_wait() -> None:
    cache, begun, go = Cache(1000), threading.Event(), threading.Event()

    def slow() -> Tile:
        begun.set()
        assert go.wait(10)
        return tile(1)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(get, cache, "slow", slow)
        assert begun.wait(10)
        assert get(cache, "fast", lambda: tile(2))[0] == 2
        go.set()
        assert first.result(10)[0] == 1


def test_an_error_is_told_to_all_who_wait_and_then_forgotten() -> None:
    cache, begun, go = Cache(1000), threading.Event(), threading.Event()

    def fail() -> Tile:
        begun.set()
        assert go.wait(10)
        raise OSError("damaged")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(get, cache, "a", fail)
        assert begun.wait(10)
        second = pool.submit(get, cache, "a", fail)
        go.set()
        for future in (first, second):
            with pytest.raises(OSError, match="damaged"):
                future.result(10)
    assert get(cache, "a", lambda: tile(3))[0] == 3


def test_the_error_of_one_tile_leaves_the_others_whole() -> None:
    cache: Cache = Cache(1000)
    calls: list[list[object]] = []

    def make(keys: list[object]) -> list[Tile | Exception]:
        calls.append(keys)
        return [OSError("damaged") if key == "bad" else tile(1) for key in keys]

    for _ in range(2):
        with pytest.raises(OSError, match="damaged"):
            cache.get_many(["good", "bad", "fine"], make)
    assert cache.get_many(["good", "fine"], make)
    assert calls == [["good", "bad", "fine"], ["bad"]]


def test_too_few_tiles_are_an_error_and_block_nobody() -> None:
    cache: Cache = Cache(1000)
    with pytest.raises(ValueError, match="shorter"):
        cache.get_many(["a", "b"], lambda keys: [tile(1)])
    assert get(cache, "b", lambda: tile(2))[0] == 2


wanted = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=4, max_size=24)


@given(wanted)
def test_threads_that_want_each_others_tiles_make_each_once_and_end(batches: list[list[int]]) -> None:
    cache: Cache = Cache(1 << 20)
    made: Counter[object] = Counter()
    lock = threading.Lock()

    def make(keys: list[object]) -> list[Tile]:
        with lock:
            made.update(keys)
        return [tile(int(str(key))) for key in keys]

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cache.get_many, batch, make) for batch in batches]
        for batch, future in zip(batches, futures, strict=True):
            assert [int(each[0]) for each in future.result(20)] == batch
    assert set(made.values()) == {1}
