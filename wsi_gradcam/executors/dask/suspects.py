"""Tasks that workers died of, or beside: which of them is to blame."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import replace
from typing import Any

from wsi_gradcam.executors.dask.running import Sent

# A task that was begun alone in its process so often, and each time the process died, has killed it.
DEATHS_ALONE = 2
MOST_TRIALS = 4  # of a task whose workers always die before it begins


class Suspects:
    """Orders that are to be tried again, each task by itself.

    Dask blames all tasks of a worker that dies. One so blamed too often is run again while nothing else of the run
    is at work in its process: if that kills workers too, it is the culprit. Few run so at once.

    Attributes:
        waiting: those that are not sent yet.
    """

    def __init__(self) -> None:
        self.waiting: deque[Sent] = deque()
        self._begun: Counter[str] = Counter()

    def note(self, event: tuple[float, Any]) -> None:
        """A worker has begun what is alone."""
        self._begun[event[1]["alone"]] += 1

    def convicted(self, sent: Sent, key: str) -> bool:
        """Whether an order that workers died of is the cause; else it waits for another trial."""
        begun = sent.begun + self._begun.pop(key, 0)
        if sent.alone and (begun >= DEATHS_ALONE or sent.trials >= MOST_TRIALS):
            return True
        again = [sent.rest(0)] if sent.alone else sent.singly()
        self.waiting += [replace(suspect, trials=sent.trials + 1, begun=begun) for suspect in again]
        return False
