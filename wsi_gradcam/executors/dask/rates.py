"""How many tasks go to a worker at once: enough to be worth the way, few enough to share the work."""

from __future__ import annotations

# A task costs the scheduler, the client and the way together some 2 ms: a thousandth of this. Small ones, such as
# spans on a GPU (0.2 s) or blocks of coarse levels, travel together.
ORDER_S = 2.0
MOST = 64  # tasks in an order: some 3 kB
WEIGHT = 0.2  # of the newest


class Rates:
    """Seconds that a task of a stage takes, learned from those that are done."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def learn(self, stage: str, seconds: float) -> None:
        """A task is done."""
        known = self._seconds.get(stage, seconds)
        self._seconds[stage] = known + WEIGHT * (seconds - known)

    def seconds(self, stage: str) -> float:
        """What a task is expected to take; before one is done, as much as an order may."""
        return self._seconds.get(stage, ORDER_S)
