"""The window of batches in flight, without a cluster: every slide ends, little waits, crash_trials run alone."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import pytest
from distributed import KilledWorker
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_gradcam.errors import SlideReadError, StoreError, WorkerError
from wsi_gradcam.executors.dask import scheduling
from wsi_gradcam.executors.dask.batching import BATCHES_PER_SLOT, MOST_AHEAD
from wsi_gradcam.executors.dask.plugins import BatchResult, TaskBatch
from wsi_gradcam.executors.dask.scheduling import SlideScheduler
from wsi_gradcam.executors.dask.workers import MissingWorkerTimer, Workers
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.results.manifest import SlideOutcome, SlideStatus
from wsi_gradcam.run import failures
from wsi_gradcam.run.types import FatalError, Performed, Planned, Processed, SlideJob, SlideRecord, Task
from wsi_gradcam.run.workload import EXPLAIN, explain_job, perform_job
from wsi_gradcam.system.isolation import Stopping

Perform = Callable[[Task], Any]


class FakeFuture:
    """An batch on its way, as `FakeClient` was asked for it."""

    def __init__(self, batch: TaskBatch, key: str, options: dict[str, Any]) -> None:
        self.batch, self.key, self.options = batch, key, options


class FakeClient:
    """Client, mail and workers in one: does batches by a function, in an order of its own; a task takes `task_s`."""

    status = "running"

    def __init__(self, threads: int, perform: Perform, dice: random.Random, task_s: float = 2.0) -> None:
        self.threads, self.perform, self.dice, self.task_s = threads, perform, dice, task_s
        self.waiting: list[FakeFuture] = []
        self.keys: list[str] = []
        self.batches: list[TaskBatch] = []
        self.most = 0
        self.cancelled = 0
        self.told: dict[str, Any] = {"tcp://a:1": {"nthreads": threads, "resources": {}, "status": "running"}}

    def submit(self, _: Any, batch: TaskBatch, key: str, pure: bool, priority: int, **options: Any) -> FakeFuture:
        future = FakeFuture(batch, key, options)
        self.waiting.append(future)
        self.keys.append(key)
        self.batches.append(batch)
        self.most = max(self.most, len(self.waiting))
        return future

    def cancel(self, futures: list[Any]) -> None:
        self.cancelled += len(futures)
        self.waiting = [future for future in self.waiting if future not in futures]

    def run(self, *_: Any, **__: Any) -> None:
        """Workers are told to stop: what waits is dropped."""
        for future in self.waiting:
            future.batch = TaskBatch("stopped", ())

    def subscribe_topic(self, _: str, note: Callable[[Any], None]) -> None:
        self.note = note

    def unsubscribe_topic(self, _: str) -> None:
        """Nothing more is told."""

    def watch(self, future: FakeFuture) -> None:
        """All are."""

    def collect(self, wait_s: float) -> list[tuple[FakeFuture, BatchResult | BaseException]]:
        if not self.waiting:
            return []
        future = self.waiting.pop(self.dice.randrange(len(self.waiting)))
        answer = BatchResult("tcp://a:1")
        for task in future.batch.tasks:
            try:
                answer.results.append(Performed(self.perform(task), self.task_s))
            except (KilledWorker, CancelledError) as error:
                for _ in range(2 * future.batch.alone):
                    self.note((0.0, {"alone": future.key}))
                return [(future, error)]
            except Exception as error:
                answer.error, answer.may_succeed = error, failures.is_transient(error)
                break
        return [(future, answer)]


def entry(number: int) -> SlideEntry:
    return SlideEntry(f"{number}", f"/{number}")


def killed() -> KilledWorker:
    return KilledWorker(task="x", last_worker=None, allowed_failures=1)  # type: ignore[arg-type]


class FakeArchive:
    """Slides of some spans and blocks; checks that a phase begins when the one before is whole."""

    def __init__(self, spans: list[int], bad: set[tuple[int, int]], poison: set[tuple[int, int]]) -> None:
        self.spans, self.bad, self.poison = spans, bad, poison
        self.done: Counter[tuple[str, str, int]] = Counter()
        self.active: set[str] = set()
        self.most_active = 0

    def perform(self, task: Task) -> Any:
        slide = int(task.slide.id)
        self.active.add(task.slide.id)
        self.most_active = max(self.most_active, len(self.active))
        spans = self.spans[slide]
        if task.stage.name == "plan":
            return Planned(10 * spans, 10 * spans, list(range(spans)), [[0, 1, 2], [0, 1], [0]])
        if task.stage.name == "explain" and (slide, task.index[0]) in self.poison:
            raise killed()
        if task.stage.name == "explain" and (slide, task.index[0]) in self.bad:
            raise ValueError("bad patch")
        level = task.index[0] if task.stage.name == "coarsen" else 0
        before, count = {
            "explain": (("plan", 0), 0),
            "stitch": (("explain", 0), spans),
            "finish": (("coarsen", 2), 1),
            "coarsen": (("coarsen", 1), 2) if level == 2 else (("stitch", 0), 3),
        }[task.stage.name]
        assert self.done[(task.slide.id, *before)] == count, f"{task} too early"
        self.done[task.slide.id, task.stage.name, level] += 1
        if task.stage.name == "finish":
            self.active.discard(task.slide.id)
            return SlideOutcome(SlideStatus.OK, 10 * spans, 0, "")
        return Processed(10)


class FakeWorkload:
    """Explains slides without a run."""

    name, patches = "explain", None
    run: Any = None

    def job(self, slide: SlideEntry) -> SlideJob:
        return explain_job(slide, max_unreadable=0.01)


def scheduler(client: FakeClient, device: str = "cpu", wait_s: float = 60.0) -> SlideScheduler:
    made: Any = SlideScheduler(
        client,  # type: ignore[arg-type]
        "run",
        FakeWorkload(),
        lambda task, result: None,
        lambda: Workers.of(client.told, device),
        MissingWorkerTimer(wait_s),
    )
    made._collector = client
    found: SlideScheduler = made
    return found


@settings(max_examples=80, deadline=None)
@given(
    spans=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    threads=st.integers(1, 5),
    task_s=st.sampled_from([0.001, 0.3, 1.0, 5.0]),
    data=st.data(),
)
def test_every_slide_ends_and_little_is_in_flight(
    spans: list[int], threads: int, task_s: float, data: st.DataObject
) -> None:
    places = [(slide, span) for slide, count in enumerate(spans) for span in range(count)]
    chosen = st.sets(st.sampled_from(places), max_size=4) if places else st.just(set())
    bad, poison = data.draw(chosen), data.draw(chosen)
    archive = FakeArchive(spans, bad, poison)
    client = FakeClient(threads, archive.perform, random.Random(data.draw(st.integers())), task_s)
    records = list(scheduler(client).run(map(entry, range(len(spans)))))
    assert sorted(int(record.slide.id) for record in records) == list(range(len(spans)))
    assert {int(r.slide.id) for r in records if r.status == "failed"} == {slide for slide, _ in bad | poison}
    assert client.most <= 3 * threads * BATCHES_PER_SLOT  # for the model, to plan, and others
    assert not client.waiting
    assert len(set(client.keys)) == len(client.keys)


def test_serial_and_flow_make_the_same_records() -> None:
    spans, bad = [3, 0, 5, 1], {(2, 1)}
    client = FakeClient(2, FakeArchive(spans, bad, set()).perform, random.Random(0))
    found = {r.slide.id: (r.status, r.error, r.patches) for r in scheduler(client).run(map(entry, range(4)))}
    reference = FakeArchive(spans, bad, set()).perform
    expected = [perform_job(explain_job(entry(i), 0.01), lambda task, then: reference(task)) for i in range(4)]
    assert found == {r.slide.id: (r.status, r.error, r.patches) for r in expected}


def test_several_slides_are_in_flight() -> None:
    archive = FakeArchive([2] * 10, set(), set())
    client = FakeClient(4, archive.perform, random.Random(0))
    list(scheduler(client).run(map(entry, range(10))))
    assert archive.most_active >= 3


def test_quick_tasks_travel_together_and_slow_ones_alone() -> None:
    """Spans of a GPU take a fraction of a second; blocks of coarse levels less."""
    sizes = {}
    for task_s in (0.1, 5.0):
        client = FakeClient(1, FakeArchive([40] * 20, set(), set()).perform, random.Random(0), task_s)
        list(scheduler(client).run(map(entry, range(20))))
        explained = [len(batch.tasks) for batch in client.batches if batch.tasks[0].stage.name == "explain"]
        sizes[task_s] = sum(explained) / len(explained)
    assert sizes[5.0] == 1
    assert sizes[0.1] > 8


def test_the_last_work_is_shared_by_all() -> None:
    """One slide, quick spans, many workers: no batch takes more than its share."""
    client = FakeClient(8, FakeArchive([64], set(), set()).perform, random.Random(0), 0.05)
    list(scheduler(client).run([entry(0)]))
    assert max(len(batch.tasks) for batch in client.batches if batch.tasks[0].stage.name == "explain") <= 64 / 8


def test_slides_are_drawn_as_they_are_needed() -> None:
    """An archive of any size is never begun all at once."""
    drawn: list[int] = []

    def endless() -> Iterator[SlideEntry]:
        for number in range(10**9):
            drawn.append(number)
            yield entry(number)

    client = FakeClient(2, FakeArchive([1] * 200, set(), set()).perform, random.Random(0))
    records = scheduler(client).run(endless())
    finished = [next(records) for _ in range(5)]
    assert len(drawn) <= 5 + 2 * MOST_AHEAD
    records.close()  # type: ignore[attr-defined]
    assert client.cancelled > 0
    assert all(isinstance(record, SlideRecord) for record in finished)


def test_slides_come_out_in_the_order_in_which_they_went_in() -> None:
    """Workers do the oldest first, as they are told to by priority; here: the one that waits longest."""

    class Fair(random.Random):
        def randrange(self, *_: Any) -> int:
            return 0

    client = FakeClient(2, FakeArchive([6] * 30, set(), set()).perform, Fair())
    found = [int(record.slide.id) for record in scheduler(client).run(map(entry, range(30)))]
    assert all(abs(place - slide) <= 6 for place, slide in enumerate(found))


def test_a_suspect_runs_alone_and_may_succeed() -> None:
    """The task that a dying worker took along is not blamed when it works by itself."""
    archive, blamed = FakeArchive([4, 4], set(), set()), Counter[Task]()

    def perform(task: Task) -> Any:
        if task.slide.id == "1" and task.stage.name == "explain":
            blamed[task] += 1
            if blamed[task] == 1:
                raise killed()
        return archive.perform(task)

    client = FakeClient(2, perform, random.Random(0))
    records = list(scheduler(client).run(map(entry, range(2))))
    assert [record.status for record in records] == ["ok", "ok"]
    alone = [batch for batch in client.batches if batch.alone]
    assert {batch.tasks[0].slide.id for batch in alone} == {"1"}
    assert all(len(batch.tasks) == 1 for batch in alone)


def test_a_suspect_that_never_began_is_not_convicted_at_once() -> None:
    """Its worker died of what was at work before it: of another trial, on a machine with one worker."""
    archive, blamed = FakeArchive([4, 4], set(), set()), Counter[Task]()

    def perform(task: Task) -> Any:
        if task.slide.id == "1" and task.stage.name == "explain":
            blamed[task] += 1
            if blamed[task] <= 3:
                raise killed()
        return archive.perform(task)

    client = FakeClient(2, perform, random.Random(0))
    records = scheduler(client).run(map(entry, range(2)))
    client.note = lambda event: None
    assert [record.status for record in records] == ["ok", "ok"]


def test_suspects_do_not_stop_the_others() -> None:
    """Of many workers, those that are not at a trial go on."""
    archive = FakeArchive([3] * 40, set(), {(0, 1)})
    client = FakeClient(8, archive.perform, random.Random(0))
    together: list[int] = []
    submit = client.submit

    def watched(_: Any, batch: TaskBatch, **options: Any) -> FakeFuture:
        if batch.alone:
            together.append(len(client.waiting))
        return submit(_, batch, **options)

    client.submit = watched  # type: ignore[assignment,method-assign]
    records = {record.slide.id: record for record in scheduler(client).run(map(entry, range(40)))}
    assert "workers died repeatedly on 'explain 1' alone" in records["0"].error
    assert [slide for slide, record in records.items() if record.status != "ok"] == ["0"]
    assert together
    assert min(together) > 8


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause before another attempt."""
    for module in (failures, scheduling):
        monkeypatch.setattr(module, "PAUSES_S", (0.0, 0.0))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("times", "status"), [(1, "ok"), (2, "ok"), (3, "failed")])
def test_what_may_pass_is_tried_again(times: int, status: str, caplog: pytest.LogCaptureFixture) -> None:
    archive, left = FakeArchive([4, 4], set(), set()), Counter({0: times})

    def perform(task: Task) -> Any:
        if task == Task(EXPLAIN, entry(1), (2,)) and left[0]:
            left[0] -= 1
            raise ConnectionResetError("the file server is away")
        return archive.perform(task)

    client = FakeClient(2, perform, random.Random(0), 0.1)
    client.told["tcp://b:1"] = client.told["tcp://a:1"]
    records = {r.slide.id: r for r in scheduler(client).run(map(entry, range(2)))}
    assert (records["0"].status, records["1"].status) == ("ok", status)
    assert [line.count("1: explain 2: ConnectionResetError: the file server is away") for line in caplog.messages] == [
        1
    ] * min(times, 2)
    assert archive.done["1", "explain", 0] == 4 - (status == "failed") or status == "failed"


@pytest.mark.usefixtures("hasty")
def test_another_attempt_goes_elsewhere_if_it_can() -> None:
    def perform(task: Task) -> Any:
        raise ConnectionResetError("the file server is away")

    client = FakeClient(2, perform, random.Random(0))
    client.told["tcp://b:1"] = client.told["tcp://a:1"]
    asked = hints_of(client)
    (record,) = scheduler(client).run([entry(0)])
    assert record.status == "failed"
    assert asked == [None, ["tcp://b:1"], ["tcp://b:1"]]


def test_what_will_not_pass_is_not_tried_again() -> None:
    seen = Counter[Task]()

    def perform(task: Task) -> Any:
        seen[task] += 1
        raise SlideReadError("damaged")

    (record,) = scheduler(FakeClient(1, perform, random.Random(0))).run([entry(0)])
    assert (record.status, record.error, set(seen.values())) == ("failed", "damaged", {1})


@pytest.mark.parametrize("error", [StoreError("disk full"), WorkerError("gone")])
def test_errors_of_the_whole_run_stop_it(error: Exception) -> None:
    def perform(task: Task) -> Any:
        if task.stage.name == "explain":
            raise error
        return Planned(10, 10, [0], [[0]])

    with pytest.raises(FatalError) as caught:
        list(scheduler(FakeClient(2, perform, random.Random(0))).run(map(entry, range(3))))
    assert caught.value.cause is error
    with pytest.raises(FatalError):
        perform_job(explain_job(entry(0), 0.01), lambda task, then: perform(task))


def test_a_lost_connection_ends_the_run() -> None:
    def perform(task: Task) -> Any:
        raise CancelledError

    with pytest.raises(FatalError, match="the connection to the Dask scheduler is lost"):
        list(scheduler(FakeClient(2, perform, random.Random(0))).run([entry(0)]))


def test_workers_that_dropped_the_run_end_it() -> None:
    client = FakeClient(1, FakeArchive([1], set(), set()).perform, random.Random(0))
    records = scheduler(client).run([entry(0)])
    submit = client.submit

    def dropped(_: Any, batch: TaskBatch, **options: Any) -> FakeFuture:
        return submit(_, TaskBatch("run", ()), **options)

    client.submit = dropped  # type: ignore[assignment,method-assign]
    with pytest.raises(FatalError, match="dropped the run"):
        list(records)


def test_a_memory_error_is_tried_again_and_then_told(hasty: None) -> None:
    def perform(task: Task) -> Any:
        raise MemoryError

    (record,) = scheduler(FakeClient(1, perform, random.Random(0))).run([entry(0)])
    assert "not enough memory on a worker; give it more, or lower --batch-size" in record.error


def test_stopping_finishes_what_is_begun_and_begins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Stopping()
    monkeypatch.setattr(scheduling, "STOP", stop)
    archive = FakeArchive([3] * 50, set(), set())
    client = FakeClient(2, archive.perform, random.Random(0))
    records = scheduler(client).run(map(entry, range(50)))
    finished = [next(records)]
    stop.signal = signal.SIGTERM
    sent = len(client.batches)
    with pytest.raises(FatalError, match="stopped by SIGTERM; run the same command again to continue"):
        finished += list(records)
    assert len(client.batches) == sent
    assert not client.waiting
    assert len(finished) < 10


@pytest.mark.usefixtures("fast_look")
def test_what_waits_for_workers_that_declared_cpu_goes_to_the_others() -> None:
    archive = FakeArchive([2], set(), set())
    client = FakeClient(2, archive.perform, random.Random(0))
    client.told["tcp://c:1"] = {"nthreads": 4, "resources": {"CPU": 4}, "status": "running"}
    collect = client.collect

    def received(wait_s: float) -> list[tuple[FakeFuture, BatchResult | BaseException]]:
        if any(future.options["resources"] == {"CPU": 1} for future in client.waiting):
            client.told.pop("tcp://c:1", None)
            return []
        return collect(wait_s)

    client.collect = received  # type: ignore[method-assign]
    (record,) = scheduler(client).run([entry(0)])
    assert record.status == "ok"
    assert client.cancelled == 1


@pytest.mark.usefixtures("fast_look")
def test_no_worker_for_too_long_ends_the_run(caplog: pytest.LogCaptureFixture) -> None:
    client = FakeClient(2, FakeArchive([2], set(), set()).perform, random.Random(0))
    waiting = scheduler(client, wait_s=0.05)
    client.told = {}
    client.collect = lambda wait_s: []  # type: ignore[method-assign]
    with pytest.raises(
        FatalError, match=r"waited 0\.05 s: there are no workers; start some with 'dask worker ADDRESS'"
    ):
        list(waiting.run([entry(0)]))
    assert caplog.messages == ["waiting up to 0.05 s: there are no workers; start some with 'dask worker ADDRESS'"]


@pytest.fixture
def fast_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are looked at in every turn."""
    monkeypatch.setattr(scheduling, "WORKERS_POLLED_S", 0.0)


def hints_of(client: FakeClient) -> list[Any]:
    """The workers that batches ask for from now on, one an batch."""
    asked: list[Any] = []
    submit = client.submit

    def watched(_: Any, batch: TaskBatch, **options: Any) -> FakeFuture:
        asked.append(options["workers"])
        return submit(_, batch, **options)

    client.submit = watched  # type: ignore[assignment,method-assign]
    return asked
