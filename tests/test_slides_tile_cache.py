"""Tiles are decoded once, by one thread, kept up to a size, and errors are nobody's tiles."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from wsi_gradcam.slides.tile_cache import TileCache

Tile = npt.NDArray[np.uint8]


def tile(value: int, size: int = 100) -> Tile:
    return np.full(size, value, np.uint8)


class Decoder:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def get(self, cache: TileCache, key: int, size: int = 100) -> Tile:
        def decode() -> Tile:
            self.asked.append(key)
            return tile(key, size)

        return cache.get(key, decode)


def test_what_was_used_last_is_kept() -> None:
    cache, decoder = TileCache(300), Decoder()
    for key in (1, 2, 3, 1, 4, 1, 3, 2):
        assert np.array_equal(decoder.get(cache, key), tile(key))
    assert decoder.asked == [1, 2, 3, 4, 2]  # 4 drove out 2, and not 1, which had been used since


def test_a_tile_larger_than_the_cache_is_still_given() -> None:
    cache, decoder = TileCache(50), Decoder()
    assert len(decoder.get(cache, 1)) == 100
    decoder.get(cache, 2)
    decoder.get(cache, 1)
    assert decoder.asked == [1, 2, 1]


def test_threads_share_one_decoding() -> None:
    cache, begun, go = TileCache(1000), threading.Event(), threading.Event()
    asked = []

    def decode() -> Tile:
        asked.append(1)
        begun.set()
        assert go.wait(10)
        return tile(7)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(cache.get, "a", decode)
        assert begun.wait(10)
        others = [pool.submit(cache.get, "a", decode) for _ in range(3)]
        go.set()
        assert all(f.result(10) is first.result(10) for f in others)
    assert asked == [1]


def test_other_tiles_do_not_wait() -> None:
    cache, begun, go = TileCache(1000), threading.Event(), threading.Event()

    def slow() -> Tile:
        begun.set()
        assert go.wait(10)
        return tile(1)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get, "slow", slow)
        assert begun.wait(10)
        assert cache.get("fast", lambda: tile(2))[0] == 2
        go.set()
        assert first.result(10)[0] == 1


def test_an_error_is_told_to_all_who_wait_and_then_forgotten() -> None:
    cache, begun, go = TileCache(1000), threading.Event(), threading.Event()

    def fail() -> Tile:
        begun.set()
        assert go.wait(10)
        raise OSError("damaged")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get, "a", fail)
        assert begun.wait(10)
        second = pool.submit(cache.get, "a", fail)
        go.set()
        for future in (first, second):
            with pytest.raises(OSError, match="damaged"):
                future.result(10)
    assert cache.get("a", lambda: tile(3))[0] == 3
