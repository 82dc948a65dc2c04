"""Collecting the results of batches, many at a time."""

from __future__ import annotations

import queue
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from wsi_gradcam.executors.dask.plugins import BatchResult

if TYPE_CHECKING:
    from distributed import Client, Future

FETCH_S = 10.0  # for results of workers that may be gone with them


class ResultCollector:
    """Waits for futures, and fetches the results of all that are done in one request.

    A request for each costs 3 ms, which is too much for a GPU cluster.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()

    def watch(self, future: Future[Any]) -> None:
        """Collect the result of a future once it is done."""
        future.add_done_callback(self._done.put)

    def collect(self, wait_s: float) -> list[tuple[Future[Any], BatchResult | BaseException]]:
        """Return the futures that are done, with their result or Dask's error; waits a while for the first."""
        collected: list[tuple[Future[Any], BatchResult | BaseException]] = []
        finished = []
        for future in self._arrived(wait_s):
            if future.status == "finished":
                finished.append(future)
            elif future.status == "error":
                collected.append((future, future.exception()))
            elif future.status == "pending":  # its result was lost with a worker, and is computed again
                self.watch(future)
            else:
                collected.append((future, CancelledError(future.key)))
        return collected + self._fetched(finished)

    def _arrived(self, wait_s: float) -> list[Future[Any]]:
        arrived: list[Future[Any]] = []
        with suppress(queue.Empty):
            arrived.append(self._done.get(timeout=wait_s))
            while True:
                arrived.append(self._done.get_nowait())
        return arrived

    def _fetched(self, futures: list[Future[Any]]) -> list[tuple[Future[Any], BatchResult | BaseException]]:
        """Return results; futures whose result cannot be had now are watched again."""
        gather = partial(self._client.gather, asynchronous=True)
        found: dict[int, BatchResult | None] = {}
        if futures:
            with suppress(TimeoutError):
                found = self._client.sync(gather, dict(enumerate(futures)), errors="skip", callback_timeout=FETCH_S)
        results: list[tuple[Future[Any], BatchResult | BaseException]] = []
        for number, future in enumerate(futures):
            result = found.get(number)
            if result is None:
                self.watch(future)
            else:
                results.append((future, result))
        return results
