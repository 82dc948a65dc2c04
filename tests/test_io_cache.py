"""Values are made once, by one thread, and kept up to a size; resources are closed once nobody uses them."""

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

from wsi_gradcam.io.cache import Cache, ResourcePool

Tile = npt.NDArray[np.uint8]
TileCache = Cache[object, Tile]


def tile_cache(maxsize: int) -> TileCache:
    return Cache(maxsize, lambda tile: tile.nbytes)


def tile(value: int, size: int = 100) -> Tile:
    return np.full(size, value, np.uint8)


def get(cache: TileCache, key: object, decode: Callable[[], Tile]) -> Tile:
    return cache.get(key, decode)


class Decoder:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def get(self, cache: TileCache, key: int, size: int = 100) -> Tile:
        def decode() -> Tile:
            self.asked.append(key)
            return tile(key, size)

        return get(cache, key, decode)


def test_what_was_used_last_is_kept() -> None:
    cache, decoder = tile_cache(300), Decoder()
    for key in (1, 2, 3, 1, 4, 1, 3, 2):
        assert np.array_equal(decoder.get(cache, key), tile(key))
    assert decoder.asked == [1, 2, 3, 4, 2]  # 4 drove out 2, and not 1, which had been used since


def test_a_value_larger_than_the_cache_is_still_given_and_drives_nothing_out() -> None:
    cache, decoder = tile_cache(250), Decoder()
    for key, size in ((1, 100), (2, 251), (1, 100), (2, 251)):
        assert len(decoder.get(cache, key, size)) == size
    assert decoder.asked == [1, 2, 2]
    assert cache.currsize == 100


def test_without_sizes_values_are_counted_and_can_be_put_in_and_dropped() -> None:
    cache: Cache[str, int] = Cache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.peek("a") == 1
    cache.put("c", 3)  # drives out b, which was used before a
    assert [cache.peek(key) for key in "abc"] == [1, None, 3]
    cache.discard("a")
    cache.discard("a")
    assert [cache.peek(key) for key in "ac"] == [None, 3]


def test_bytes_are_kept_too() -> None:
    cache: Cache[int, bytes] = Cache(8, len)
    asked: list[int] = []

    def make(keys: list[int]) -> list[bytes]:
        asked.extend(keys)
        return [bytes([key] * 4) for key in keys]

    for keys in ([1, 2], [2, 1], [3], [1], [2], []):
        assert cache.get_many(keys, make) == [bytes([key] * 4) for key in keys]
    assert asked == [1, 2, 3, 2]


def test_only_what_is_missing_is_made_in_one_call_and_each_once() -> None:
    cache = tile_cache(10_000)
    calls: list[list[object]] = []

    def make(keys: list[object]) -> list[Tile]:
        calls.append(keys)
        return [tile(int(str(key))) for key in keys]

    cache.get_many([2, 4], make)
    found = cache.get_many([1, 2, 3, 1, 4], make)
    assert [int(each[0]) for each in found] == [1, 2, 3, 1, 4]
    assert calls == [[2, 4], [1, 3]]


def test_threads_share_one_decoding() -> None:
    cache, begun, go = tile_cache(1000), threading.Event(), threading.Event()
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
    cache, begun, go = tile_cache(1000), threading.Event(), threading.Event()

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
    cache, begun, go = tile_cache(1000), threading.Event(), threading.Event()

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
    cache = tile_cache(1000)
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
    cache = tile_cache(1000)
    with pytest.raises(ValueError, match="shorter"):
        cache.get_many(["a", "b"], lambda keys: [tile(1)])
    assert get(cache, "b", lambda: tile(2))[0] == 2


wanted = st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=4, max_size=24)


@given(wanted)
def test_threads_that_want_each_others_tiles_make_each_once_and_end(batches: list[list[int]]) -> None:
    cache = tile_cache(1 << 20)
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


class Resource:
    """Remembers that it was closed."""

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def test_few_resources_stay_open_and_none_in_use_is_closed() -> None:
    made = {key: Resource() for key in range(5)}
    pool: ResourcePool[int, Resource] = ResourcePool(2, Resource.close)
    with pool.borrow(0, lambda: made[0]) as used:
        for key in (1, 2, 3, 4):
            with pool.borrow(key, lambda key=key: made[key]):  # type: ignore[misc]
                assert not made[key].closed
        assert used is made[0]
        assert not used.closed
    assert [key for key, resource in made.items() if not resource.closed] == [0, 4]
    with pool.borrow(4, Resource) as again:
        assert again is made[4]
        pool.close()
        assert not again.closed
        assert made[0].closed
    pool.close()
    assert all(resource.closed for resource in made.values())


def test_a_resource_is_opened_once_for_many_threads() -> None:
    pool: ResourcePool[str, Resource] = ResourcePool(1, Resource.close)
    opened: list[Resource] = []
    barrier = threading.Barrier(8)

    def open_() -> Resource:
        opened.append(Resource())
        return opened[-1]

    def use(_: int) -> bool:
        barrier.wait(10)
        with pool.borrow("a", open_) as resource:
            return resource.closed

    with ThreadPoolExecutor(8) as threads:
        assert not any(threads.map(use, range(8)))
    assert len(opened) == 1


def test_a_resource_that_does_not_open_may_be_asked_for_again() -> None:
    pool: ResourcePool[str, Resource] = ResourcePool(1, Resource.close)

    def fail() -> Resource:
        raise OSError("damaged")

    with pytest.raises(OSError, match="damaged"), pool.borrow("a", fail):
        pass
    with pool.borrow("a", Resource) as resource:
        assert not resource.closed
