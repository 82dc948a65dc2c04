"""The window of tasks in flight, without a cluster: every slide ends, little waits, suspects run alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import KilledWorker
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_gradcam.errors import StoreError, WorkerError
from wsi_gradcam.executors.dask import TASKS_PER_THREAD, _Flow
from wsi_gradcam.inputs import SlideEntry
from wsi_gradcam.stages import Pending, Performed, Task
from wsi_gradcam.workflow import FatalError, SlideRecord, drive, slide_job


class FakeFuture:
    """A future of `FakeClient`; done when the test says so."""

    def __init__(self, perform: Callable[[], Any]) -> None:
        self._perform = perform
        self._result: Any = None
        self._error: BaseException | None = None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Nobody calls back: the client stands in for the queue."""

    def complete(self) -> None:
        try:
            self._result = self._perform()
        except Exception as error:
            self._error = error

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> Any:
        return self._result


class FakeClient:
    """Performs tasks by a function, in the order that the test chooses."""

    status = "running"

    def __init__(self, threads: int, perform: Callable[[Task], Any], dice: random.Random) -> None:
        self.threads, self.perform, self.dice = threads, perform, dice
        self.waiting: list[FakeFuture] = []
        self.keys: list[str] = []
        self.most = 0
        self.cancelled = 0

    def nthreads(self) -> dict[str, int]:
        return {"worker": self.threads}

    def submit(self, function: Any, name: str, task: Task, key: str, pure: bool, priority: int) -> FakeFuture:
        future = FakeFuture(lambda: Performed(self.perform(task)))
        self.waiting.append(future)
        self.keys.append(key)
        self.most = max(self.most, len(self.waiting))
        return future

    def cancel(self, futures: list[Any]) -> None:
        self.cancelled += len(futures)

    def put(self, future: FakeFuture) -> None:
        """Nobody calls."""

    def get(self, timeout: float) -> FakeFuture:
        """The next future that is done, in place of a queue: any of those that wait."""
        future = self.waiting.pop(self.dice.randrange(len(self.waiting)))
        future.complete()
        return future


def entry(number: int) -> SlideEntry:
    return SlideEntry(f"{number}", f"/{number}")


class FakeArchive:
    """Slides of some spans and blocks; checks that a phase begins when the one before is whole."""

    def __init__(self, spans: list[int], bad: set[tuple[int, int]], poison: set[tuple[int, int]]) -> None:
        self.spans, self.bad, self.poison = spans, bad, poison
        self.done: Counter[tuple[str, str]] = Counter()
        self.active: set[str] = set()
        self.most_active = 0

    def perform(self, task: Task) -> Any:
        slide = int(task.slide.id)
        self.active.add(task.slide.id)
        self.most_active = max(self.most_active, len(self.active))
        spans = self.spans[slide]
        if task.stage == "plan":
            return Pending(10 * spans, 10 * spans, list(range(spans)), [[0, 1], [0]], None)
        if task.stage == "explain" and (slide, task.index[0]) in self.poison:
            raise KilledWorker(task="x", last_worker=None, allowed_failures=1)  # type: ignore[arg-type]
        if task.stage == "explain" and (slide, task.index[0]) in self.bad:
            raise ValueError("bad patch")
        expected = {
            "explain": {}, "stitch": {"explain": spans}, "coarsen": {"stitch": 2}, "finish": {"coarsen": 1},
        }[task.stage]  # fmt: skip
        assert all(self.done[task.slide.id, stage] == count for stage, count in expected.items())
        self.done[task.slide.id, task.stage] += 1
        if task.stage == "finish":
            self.active.discard(task.slide.id)
            return {"status": "ok", "patches": 10 * spans, "unreadable": 0, "cause": ""}
        return 10


def flow(client: FakeClient) -> _Flow:
    made = _Flow(client, "run", 0.01, lambda task, result: None)  # type: ignore[arg-type]
    made._done = client  # type: ignore[assignment]
    return made


@settings(max_examples=60, deadline=None)
@given(
    spans=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    threads=st.integers(1, 5),
    data=st.data(),
)
def test_every_slide_ends_and_little_is_in_flight(spans: list[int], threads: int, data: st.DataObject) -> None:
    places = [(slide, span) for slide, count in enumerate(spans) for span in range(count)]
    chosen = st.sets(st.sampled_from(places), max_size=4) if places else st.just(set())
    bad, poison = data.draw(chosen), data.draw(chosen)
    archive = FakeArchive(spans, bad, poison)
    client = FakeClient(threads, archive.perform, random.Random(data.draw(st.integers())))
    records = list(flow(client).run(map(entry, range(len(spans)))))
    assert sorted(int(record.slide.id) for record in records) == list(range(len(spans)))
    assert {int(r.slide.id) for r in records if r.status == "failed"} == {slide for slide, _ in bad | poison}
    assert client.most <= threads * TASKS_PER_THREAD
    assert not client.waiting
    assert len(set(client.keys)) == len(client.keys)


def test_serial_and_flow_make_the_same_records() -> None:
    spans, bad = [3, 0, 5, 1], {(2, 1)}
    client = FakeClient(2, FakeArchive(spans, bad, set()).perform, random.Random(0))
    found = {r.slide.id: (r.status, r.error, r.patches) for r in flow(client).run(map(entry, range(4)))}
    reference = FakeArchive(spans, bad, set()).perform
    expected = [drive(slide_job(entry(i), 0.01), lambda task, then: reference(task)) for i in range(4)]
    assert found == {r.slide.id: (r.status, r.error, r.patches) for r in expected}


def test_several_slides_are_in_flight() -> None:
    archive = FakeArchive([2] * 10, set(), set())
    client = FakeClient(4, archive.perform, random.Random(0))
    list(flow(client).run(map(entry, range(10))))
    assert archive.most_active >= 3


def test_slides_are_drawn_as_they_are_needed() -> None:
    """An archive of any size is never begun all at once."""
    drawn: list[int] = []

    def endless() -> Iterator[SlideEntry]:
        for number in range(10**9):
            drawn.append(number)
            yield entry(number)

    client = FakeClient(2, FakeArchive([1] * 100, set(), set()).perform, random.Random(0))
    records = flow(client).run(endless())
    finished = [next(records) for _ in range(5)]
    assert len(drawn) < 5 + 4 + 6
    records.close()  # type: ignore[attr-defined]
    assert client.cancelled > 0
    assert all(isinstance(record, SlideRecord) for record in finished)


def test_a_suspect_runs_alone_and_may_succeed() -> None:
    """The task that a dying worker took along is not blamed when it works by itself."""
    archive, blamed, beside = FakeArchive([4, 4], set(), set()), Counter[Task](), []

    def perform(task: Task) -> Any:
        if task.slide.id == "1" and task.stage == "explain":
            blamed[task] += 1
            if blamed[task] == 1:
                raise KilledWorker(task="x", last_worker=None, allowed_failures=1)  # type: ignore[arg-type]
            beside.append(len(client.waiting))
        return archive.perform(task)

    client = FakeClient(2, perform, random.Random(0))
    records = list(flow(client).run(map(entry, range(2))))
    assert [record.status for record in records] == ["ok", "ok"]
    assert beside == [0, 0, 0, 0]


@pytest.mark.parametrize("error", [StoreError("disk full"), WorkerError("gone")])
def test_errors_of_the_whole_run_stop_it(error: Exception) -> None:
    def perform(task: Task) -> Any:
        if task.stage == "explain":
            raise error
        return Pending(10, 10, [0], [[0]], None)

    with pytest.raises(FatalError) as caught:
        list(flow(FakeClient(2, perform, random.Random(0))).run(map(entry, range(3))))
    assert caught.value.cause is error
    with pytest.raises(FatalError):
        drive(slide_job(entry(0), 0.01), lambda task, then: perform(task))
