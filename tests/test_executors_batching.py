"""How much is out at once, and which worker is next: bounds of what may be, and a plain schedule beside it."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_executors_scheduling import FakeArchive, FakeClient, FakeFuture, entry, hints_of, scheduler
from wsi_gradcam.executors.dask.batching import (
    BATCH_S,
    BATCHES_PER_SLOT,
    LAST_PARTS,
    LAST_PER_SLOT,
    LEAST_S,
    Backlogs,
    BatchLimits,
    Rates,
    RemainingWork,
    RunningSlide,
)
from wsi_gradcam.executors.dask.plugins import TaskBatch
from wsi_gradcam.executors.dask.workers import Pools
from wsi_gradcam.run.types import Task
from wsi_gradcam.run.workload import EXPLAIN, STITCH, explain_job

SECONDS = st.floats(0.0, 1e6)


def window(model_s: float, other_s: float = math.inf, slots: int = 1) -> BatchLimits:
    return BatchLimits.of(Pools(model_s, other_s), Pools(slots, slots))


@given(SECONDS, SECONDS, st.integers(0, 500))
def test_workers_never_starve_and_no_order_is_more_than_its_part(model_s: float, other_s: float, slots: int) -> None:
    found, each = window(model_s, other_s, slots), max(1, slots)
    assert found.ahead == BATCHES_PER_SLOT * each
    for model in (True, False):
        assert LAST_PER_SLOT * each <= found.batches.of(model) <= BATCHES_PER_SLOT * each
        assert LEAST_S <= found.seconds.of(model) <= BATCH_S
    assert found.seconds.model <= max(LEAST_S, model_s / each / LAST_PARTS)


@pytest.mark.parametrize(
    ("left_s", "seconds", "batches"),
    [(math.inf, BATCH_S, 4), (24.0, 3.0, 4), (12.0, 1.5, 4), (3.0, 0.375, 4), (2.4, 0.3, 2), (0.0, LEAST_S, 2)],
)
def test_orders_become_small_and_then_few(left_s: float, seconds: float, batches: int) -> None:
    """For each of ten workers; other work is only cut up when there is nothing else to come."""
    found = window(10 * left_s, slots=10)
    assert found.seconds.model == pytest.approx(seconds)
    assert found.batches.model == 10 * batches
    assert (found.seconds.other, found.batches.other) == (BATCH_S, 40)
    assert window(10 * left_s, 10 * 2.0, 10).seconds.other == 1.0


@pytest.mark.parametrize(("slide_s", "slides"), [(60.0, 4), (3.0, 4), (0.75, 4), (0.5, 6), (0.2, 15), (0.02, 64)])
def test_the_smaller_slides_are_the_more_are_planned_ahead(slide_s: float, slides: int) -> None:
    """Three seconds of work for each slot, up to sixty-four slides; unknown ones are taken for large."""
    found = BatchLimits.of(Pools(math.inf, math.inf), Pools(4, 1), slide_s)
    assert found.ahead == 4 * slides
    rates = Rates()
    remaining = RemainingWork(rates, range(100))
    assert remaining.limits([], Pools(4, 1)).ahead == 4 * BATCHES_PER_SLOT
    rates.learn(EXPLAIN, slide_s / 2)
    remaining.slide_begun()
    remaining.slide_planned(planned(2))
    assert remaining.limits([], Pools(4, 1)).ahead == 4 * slides


def planned(spans: int) -> RunningSlide:
    """A slide whose plan is made."""
    running = RunningSlide(explain_job(entry(0), 0.01), 0)
    running.phases = deque(
        deque((0, Task(stage, entry(0), (i,))) for i in range(count))
        for stage, count in [(EXPLAIN, spans), (STITCH, 3)]
    )
    return running


def test_what_is_left_is_what_is_known_and_slides_like_those_before() -> None:
    rates = Rates()
    rates.learn(EXPLAIN, 0.5)
    rates.learn(STITCH, 2.0)
    remaining = RemainingWork(rates, range(10))
    assert remaining.left_s([]) == Pools(math.inf, math.inf)
    first, second = planned(4), planned(8)
    for running in (first, second):
        remaining.slide_begun()
        remaining.slide_planned(running)
    out = first.next_batch(rates, 1.0)
    assert len(out.tasks) == 2
    remaining.sent(out.tasks)
    assert remaining.left_s([first, second]).model == pytest.approx((8 * 6 + 12) * 0.5)
    assert remaining.left_s([first, second], 8 * 6 * 0.5).model < math.inf
    assert remaining.left_s([first, second], 8 * 6 * 0.5 - 0.1).model == math.inf
    for _ in range(8):
        remaining.slide_begun()
    assert astuple(remaining.left_s([first, second])) == pytest.approx((12 * 0.5, 6 * 2.0))
    remaining.returned(out.tasks)
    assert astuple(remaining.left_s([first, second])) == pytest.approx((10 * 0.5, 6 * 2.0))


def test_what_is_left_of_slides_that_nobody_has_counted_is_not_known() -> None:
    rates = Rates()
    remaining = RemainingWork(rates, iter(range(10)))
    remaining.slide_begun()
    remaining.slide_planned(planned(4))
    assert remaining.left_s([]).model == math.inf
    remaining.no_more_slides()
    assert remaining.left_s([]) == Pools(0.0, 0.0)


class Clock:
    """Time, as it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.floats(0.01, 10.0), min_size=1, max_size=60), st.integers(1, 6))
def test_whoever_is_free_first_gets_the_next_order(seconds: list[float], workers: int) -> None:
    """Each batch is done in the time that is expected: never is one idle while another has a second batch to begin."""
    clock = Clock()
    backlogs, slots = Backlogs(clock), {str(i): 1 for i in range(workers)}
    free_at = dict.fromkeys(slots, 0.0)
    ends: list[tuple[float, str]] = []
    for number, order_s in enumerate(seconds):
        if len(ends) == 2 * workers:
            clock.now, key = min(ends)
            ends.remove((clock.now, key))
            backlogs.remove(key)
        worker = backlogs.soonest(slots)
        assert max(free_at[worker], clock.now) == pytest.approx(min(max(end, clock.now) for end in free_at.values()))
        backlogs.add(str(number), worker, order_s)
        free_at[worker] = max(free_at[worker], clock.now) + order_s
        ends.append((free_at[worker], str(number)))


def test_a_worker_that_does_two_at_once_gets_twice_as_much() -> None:
    backlogs = Backlogs(Clock())
    for number in range(9):
        backlogs.add(str(number), backlogs.soonest({"a": 1, "b": 2}), 1.0)
    assert backlogs.soonest({"a": 1, "b": 2}) == "a"
    assert sum(worker == "b" for worker in backlogs._at.values()) == 6


def test_a_worker_that_hangs_is_not_the_first_choice() -> None:
    """What it has waits, however long."""
    clock = Clock()
    backlogs, slots = Backlogs(clock), {"hangs": 1, "works": 1}
    for number in range(3):
        backlogs.add(f"h{number}", "hangs", 1.0)
    clock.now = 1000.0
    assert backlogs.soonest(slots) == "works"
    backlogs.add("w", "works", 1.0)
    assert backlogs.soonest(slots) == "works"


def test_what_was_never_dealt_may_be_taken_away() -> None:
    backlogs = Backlogs(Clock())
    backlogs.remove("unknown")
    assert backlogs.soonest({"a": 1}) == "a"


def gpus(*addresses: str) -> dict[str, Any]:
    """What a scheduler tells of workers with a GPU each, and of one without."""
    told = {address: {"nthreads": 4, "resources": {"GPU": 1, "CPU": 3}, "status": "running"} for address in addresses}
    return {**told, "cpu": {"nthreads": 4, "resources": {"CPU": 4}, "status": "running"}}


def test_gpus_are_given_alike_and_new_ones_soon_as_much() -> None:
    """Of spans that take as long as is guessed, each an batch; workers that are gone get no more."""
    client = FakeClient(1, FakeArchive([8] * 40, set(), set()).perform, random.Random(0), BATCH_S)
    client.told = gpus("a", "b")
    asked: list[str] = []
    submit = client.submit

    def watched(_: Any, batch: TaskBatch, **options: Any) -> FakeFuture:
        if batch.tasks[0].stage.name != "explain":
            assert options["workers"] is None
            return submit(_, batch, **options)
        (worker,) = options["workers"]
        has = Counter(future.options["workers"][0] for future in client.waiting if future.options["workers"])
        there = set("ab") if len(asked) < 50 else set("abc") if len(asked) < 150 else set("bc")
        assert worker in there
        assert has[worker] == min(has[other] for other in there)
        asked.append(worker)
        if len(asked) in (50, 150):
            client.told = gpus(*("abc" if len(asked) == 50 else "bc"))
            made._workers = made._ask_workers()
        return submit(_, batch, **options)

    client.submit = watched  # type: ignore[assignment,method-assign]
    made = scheduler(client, "cuda")
    assert {record.status for record in made.run(map(entry, range(40)))} == {"ok"}
    assert len(asked) == 40 * 8
    assert set(asked[50:80]) == set("abc")


@pytest.mark.parametrize(("device", "hints"), [("cuda", False), ("cpu", True)])
def test_nothing_is_asked_for_where_hints_bind_or_dask_keeps_orders_back(device: str, hints: bool) -> None:
    client = FakeClient(1, FakeArchive([4] * 4, set(), set()).perform, random.Random(0))
    client.told = gpus("a", "b")
    made = scheduler(client, device)
    made._hints = hints
    asked = hints_of(client)
    list(made.run(map(entry, range(4))))
    assert len(asked) > 4 * 4
    assert set(asked) == {None}
