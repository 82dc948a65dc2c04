"""A scheduler outlives clients: what one that was killed has left on the workers is removed."""

from __future__ import annotations

from contextlib import suppress

from distributed import Scheduler, SchedulerPlugin


class Caretaker(SchedulerPlugin):
    """Takes a run's plugin from all workers when its client is gone, however it went, and then goes too."""

    def __init__(self, run: str, client: str) -> None:
        self.name = f"{run}-caretaker"
        self._run, self._client = run, client

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Called on the scheduler when a client leaves, or its connection ends."""
        if client == self._client:
            scheduler.loop.add_callback(self._clean_up, scheduler)

    async def _clean_up(self, scheduler: Scheduler) -> None:
        with suppress(ValueError):  # removed already
            await scheduler.unregister_worker_plugin(comm=None, name=self._run)
        with suppress(ValueError):
            scheduler.remove_plugin(self.name)
