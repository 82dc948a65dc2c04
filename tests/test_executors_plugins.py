"""Hints on real schedulers: an batch goes where it asks to, and is never kept from others for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from distributed import Client, KilledWorker, Scheduler, Worker, get_worker

from wsi_gradcam.executors.dask.plugins import RunSchedulerPlugin

RUN, GPU = "run-1", {"GPU": 1.0}
WITHIN_S = 20.0
GONE = "tcp://127.0.0.1:1"


class Place:
    """A scheduler with a scheduler_plugin, a client, and workers that come when they are called."""

    def __init__(self, stack: AsyncExitStack, boss: Any, client: Any) -> None:
        self.stack, self.boss, self.client = stack, boss, client
        self.sent = 0

    async def worker(self, resources: dict[str, float] | None = None, threads: int = 1) -> Any:
        """A new one."""
        return await self.stack.enter_async_context(
            Worker(self.boss.address, nthreads=threads, resources=resources, dashboard=False, memory_limit=0)
        )

    def submit(self, hint: str, seconds: float = 0.0, run: str = RUN, **options: Any) -> Any:
        """Work that tells where it was done."""
        self.sent += 1
        return self.client.submit(
            where, seconds, key=f"wsi-explain-{run}-0-{self.sent}", pure=False, workers=[hint], **options
        )

    async def until(self, state: str, future: Any) -> None:
        """Wait until the scheduler has put a task into a state."""
        deadline = time.monotonic() + WITHIN_S
        while (task := self.boss.tasks.get(future.key)) is None or task.state != state:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


def where(seconds: float) -> str:
    """On a worker: its address, after a while."""
    time.sleep(seconds)
    return str(get_worker().address)


@asynccontextmanager
async def place() -> AsyncIterator[Place]:
    """Everything in this process."""
    async with AsyncExitStack() as stack:
        boss = await stack.enter_async_context(Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0"))
        client = await stack.enter_async_context(Client(boss.address, asynchronous=True, set_as_default=False))
        await client.register_plugin(RunSchedulerPlugin(RUN, client.id))
        yield Place(stack, boss, client)


def on_a_cluster(test: Callable[[Place], Awaitable[None]]) -> Callable[[], None]:
    """Run a test with a `Place` of its own, within a bound."""

    async def run() -> None:
        async with place() as there:
            await asyncio.wait_for(test(there), WITHIN_S)

    def tried() -> None:
        asyncio.run(run())

    tried.__name__, tried.__doc__ = test.__name__, test.__doc__
    return tried


@on_a_cluster
async def test_an_order_goes_where_it_asks_to(there: Place) -> None:
    workers = [await there.worker() for _ in range(3)]
    for worker in workers:
        futures = [there.submit(worker.address) for _ in range(3)]
        assert await there.client.gather(futures) == [worker.address] * 3


@on_a_cluster
async def test_an_order_for_a_worker_that_is_gone_goes_to_another(there: Place) -> None:
    worker = await there.worker()
    assert await there.submit(GONE) == worker.address


@on_a_cluster
async def test_an_order_for_a_worker_that_is_gone_waits_for_any_that_comes(there: Place) -> None:
    future = there.submit(GONE)
    await there.until("no-worker", future)
    worker = await there.worker()
    assert await future == worker.address


@on_a_cluster
async def test_orders_of_a_worker_that_dies_are_done_when_another_comes(there: Place) -> None:
    """All workers are preempted at once, and come back under other addresses."""
    first = await there.worker()
    futures = [there.submit(first.address, 0.3) for _ in range(4)]
    for future in futures:
        await there.until("processing", future)
    await there.boss.remove_worker(first.address, stimulus_id="died")
    second = await there.worker()
    assert set(await there.client.gather(futures)) == {second.address}


@on_a_cluster
async def test_a_task_that_kills_every_worker_is_still_counted(there: Place) -> None:
    """Deaths are Dask's to count: an batch keeps its key, wherever it goes."""
    there.boss.allowed_failures = 1
    first = await there.worker()
    future = there.submit(first.address, 0.5)
    await there.until("processing", future)
    await there.boss.remove_worker(first.address, stimulus_id="died")
    second = await there.worker()
    await there.until("processing", future)
    await there.boss.remove_worker(second.address, stimulus_id="died")
    with pytest.raises(KilledWorker):
        await future


@on_a_cluster
async def test_a_worker_that_joins_takes_over_what_waits_elsewhere(there: Place) -> None:
    first = await there.worker(GPU)
    futures = [there.submit(first.address, 0.2, resources=GPU) for _ in range(10)]
    await futures[0]
    second = await there.worker(GPU)
    assert set(await there.client.gather(futures)) == {first.address, second.address}


@on_a_cluster
async def test_what_wants_a_gpu_never_goes_where_none_is(there: Place) -> None:
    await there.worker({"CPU": 4.0}, threads=4)
    first = await there.worker(GPU)
    futures = [there.submit(address, 0.1, resources=GPU) for address in (first.address, GONE, first.address)]
    await futures[0]
    await there.boss.remove_worker(first.address, stimulus_id="died")
    second = await there.worker(GPU)
    assert set(await there.client.gather(futures[1:])) <= {first.address, second.address}


@on_a_cluster
async def test_others_tasks_keep_their_restrictions(there: Place) -> None:
    await there.worker()
    future = there.submit(GONE, run="another")
    await there.until("no-worker", future)
    await asyncio.sleep(0.1)
    assert there.boss.tasks[future.key].worker_restrictions == {GONE}
