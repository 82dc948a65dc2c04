"""What a scheduler does for a run by itself: hints are hints, and what a client that was killed has left is removed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from distributed import Scheduler, SchedulerPlugin


class Caretaker(SchedulerPlugin):
    """Looks after a run.

    An order that asks for a worker (`workers=[address]`) goes there if it can, and is then as free as any other. Dask
    itself would keep it from all others for ever: one sent to a worker that is gone would wait, and none could be
    taken over by workers that are idle. Its `allow_other_workers` is no help: it forgets resources too, and lets
    what wants a GPU go where none is; and what finds no worker at all is not given to one that comes later.

    When the run's client is gone, however it went, its plugin is taken from all workers, and this one goes too.
    """

    def __init__(self, run: str, client: str) -> None:
        self.name = f"{run}-caretaker"
        self._run, self._client = run, client
        self._scheduler: Any = None

    async def start(self, scheduler: Scheduler) -> None:
        """Called on the scheduler when this comes there."""
        self._scheduler = scheduler

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        """Called on the scheduler for each task that was placed, or could not be."""
        if finish not in ("processing", "no-worker") or not isinstance(key, str) or self._run not in key:
            return
        task = self._scheduler.tasks[key]
        if task.worker_restrictions:
            task.worker_restrictions = None
            if finish == "no-worker":
                self._scheduler.loop.add_callback(self._place, key)

    def _place(self, key: str) -> None:
        """Have a worker looked for again; where there is none, Dask looks when one comes."""
        task = self._scheduler.tasks.get(key)
        if task is not None and task.state == "no-worker":
            self._scheduler.transitions({key: "processing"}, stimulus_id=self.name)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Called on the scheduler when a client leaves, or its connection ends."""
        if client == self._client:
            scheduler.loop.add_callback(self._clean_up, scheduler)

    async def _clean_up(self, scheduler: Scheduler) -> None:
        with suppress(ValueError):  # removed already
            await scheduler.unregister_worker_plugin(comm=None, name=self._run)
        with suppress(ValueError):
            scheduler.remove_plugin(self.name)
