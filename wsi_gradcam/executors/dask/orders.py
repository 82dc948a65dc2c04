"""Orders to workers and their answers, collected many at a time."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from wsi_gradcam.executors.dask.plugin import Answer, Order, perform_order

if TYPE_CHECKING:
    from distributed import Client, Future

FETCH_S = 10.0  # for answers of workers that may be gone with them


class Mail:
    """Waits for futures, and fetches the answers of all that are done with one question.

    Asking for each by itself costs 3 ms, which a GPU cluster has not.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()

    def letter(self, order: Order) -> tuple[Callable[[Order], Answer], Order]:
        """What to submit."""
        return perform_order, order

    def expect(self, future: Future[Any]) -> None:
        """Have a future among the next that are received."""
        future.add_done_callback(self._done.put)

    def receive(self, wait_s: float) -> list[tuple[Future[Any], Answer | BaseException]]:
        """All that are done, with the answer, or what Dask says instead; waits a while for the first."""
        received: list[tuple[Future[Any], Answer | BaseException]] = []
        finished = []
        for future in self._arrived(wait_s):
            if future.status == "finished":
                finished.append(future)
            elif future.status == "error":
                received.append((future, future.exception()))
            elif future.status == "pending":  # its answer was lost with a worker, and is made again
                self.expect(future)
            else:
                received.append((future, CancelledError(future.key)))
        return received + self._fetched(finished)

    def _arrived(self, wait_s: float) -> list[Future[Any]]:
        arrived: list[Future[Any]] = []
        with suppress(queue.Empty):
            arrived.append(self._done.get(timeout=wait_s))
            while True:
                arrived.append(self._done.get_nowait())
        return arrived

    def _fetched(self, futures: list[Future[Any]]) -> list[tuple[Future[Any], Answer | BaseException]]:
        """Answers; of those that cannot be had now, the futures are expected again."""
        gather = partial(self._client.gather, asynchronous=True)
        found: dict[int, Answer | None] = {}
        if futures:
            with suppress(TimeoutError):
                found = self._client.sync(gather, dict(enumerate(futures)), errors="skip", callback_timeout=FETCH_S)
        answers: list[tuple[Future[Any], Answer | BaseException]] = []
        for number, future in enumerate(futures):
            answer = found.get(number)
            if answer is None:
                self.expect(future)
            else:
                answers.append((future, answer))
        return answers
