"""Decoded tiles, kept while neighbouring patches are likely to ask for them again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Tile = NDArray[np.uint8]


class TileCache:
    """The tiles that were used last, up to a number of bytes. Safe for threads: a tile is decoded by one of them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._tiles: OrderedDict[Hashable, Tile] = OrderedDict()
        self._making: dict[Hashable, Future[Tile]] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, decode: Callable[[], Tile]) -> Tile:
        """The tile `key`, decoded now unless it is kept or being decoded; not to be written to.

        What `decode` raises is raised here too, also in threads that wait for it, and is not kept.
        """
        with self._lock:
            if (kept := self._tiles.get(key)) is not None:
                self._tiles.move_to_end(key)
                return kept
            waiting = self._making.get(key)
            if waiting is None:
                made: Future[Tile] = Future()
                self._making[key] = made
        if waiting is not None:
            return waiting.result()
        try:
            tile = decode()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            made.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, tile)
        made.set_result(tile)
        return tile

    def _keep(self, key: Hashable, tile: Tile) -> None:
        self._tiles[key] = tile
        self._bytes += tile.nbytes
        while self._bytes > self._max_bytes and len(self._tiles) > 1:
            _, oldest = self._tiles.popitem(last=False)
            self._bytes -= oldest.nbytes
