"""How many tasks go to a worker at once: enough to be worth the way, few enough to share the work."""

from __future__ import annotations

from collections.abc import Iterable

from wsi_gradcam.run.types import Stage, Task
from wsi_gradcam.run.workload import COARSEN, FINISH, STITCH

# An order costs the scheduler, the client and the way together some 2 ms, and a GPU its first patches' reading, some
# 30 ms: a hundredth of this. Small tasks, such as spans on a GPU (0.2 s) or blocks of coarse levels, travel together.
ORDER_S = 3.0
MOST = 64  # tasks in an order: some 3 kB
WEIGHT = 0.2  # of the newest
LEAST_S = 0.2  # less is not worth the way, even where workers wait
# Until one is done; what a span takes, which is a hundred times more on some devices than on others, is not guessed.
GUESSED_S = {STITCH.name: 0.2, COARSEN.name: 0.1, FINISH.name: 0.5}


class Rates:
    """Seconds that a task of a stage takes, learned from those that are done."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def learn(self, stage: Stage, seconds: float) -> None:
        """A task is done."""
        known = self._seconds.get(stage.name, seconds)
        self._seconds[stage.name] = known + WEIGHT * (seconds - known)

    def seconds(self, stage: Stage) -> float:
        """What a task is expected to take."""
        return self._seconds.get(stage.name, GUESSED_S.get(stage.name, ORDER_S))

    def of(self, tasks: Iterable[Task]) -> float:
        """What some tasks are expected to take, one after the other."""
        return sum(self.seconds(task.stage) for task in tasks)
