"""The executors agree byte by byte; workers and schedulers may die; little is in flight."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client, KilledWorker
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runs import ROOT, SMALL, differing, rows_of, stored, toy_file, toy_spec
from tests.synthetic import truncate, write_marker_slide
from tests.toy_models import POISON
from wsi_gradcam import stages
from wsi_gradcam.api import Listener, explain
from wsi_gradcam.config import make_settings
from wsi_gradcam.errors import ConfigError, StoreError, WorkerError
from wsi_gradcam.executors import dask as dask_executor
from wsi_gradcam.executors.dask import TASKS_PER_THREAD, DaskExecutor, _Flow, _perform_here
from wsi_gradcam.inputs import SlideEntry
from wsi_gradcam.plan import plan_run
from wsi_gradcam.stages import Context, Pending, Task, examine_model
from wsi_gradcam.validation import validate
from wsi_gradcam.workflow import FatalError, SlideRecord, drive, slide_job


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good slides, one of them in a folder, one of glass, one cut short."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "more").mkdir()
    write_marker_slide(folder / "a.tif", 500, 700, mpp=0.25, markers=[(330, 330)], marker_px=16)
    write_marker_slide(folder / "more" / "a.tif", 390, 500, mpp=0.25, markers=[], marker_px=16, seed=1)
    write_marker_slide(folder / "glass.tif", 400, 400, mpp=0.25, markers=[], marker_px=16, glass_px=200)
    truncate(folder / "a.tif", folder / "cut.tif", 0.5)
    return folder


@pytest.fixture(scope="module")
def serial(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive's results, computed in this process."""
    out = tmp_path_factory.mktemp("serial")
    explain(archive, toy_spec("poisoned"), out, **SMALL)
    statuses = {name: row["status"] for name, row in rows_of(out).items()}
    assert statuses == {"a.tif": "ok", "cut.tif": "failed", "glass.tif": "no_tissue", "more/a.tif": "ok"}
    return out


@contextmanager
def process(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """`dask ARGUMENTS`, in another folder than the tests'."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    started = subprocess.Popen(
        [sys.executable, "-m", "dask", *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield started
    finally:
        started.kill()
        started.wait(10)


@contextmanager
def scheduler(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A Dask scheduler and its address."""
    file = folder / "scheduler.json"
    with process(
        folder, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)
    ) as started:
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text(encoding="utf-8").strip():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield started, json.loads(file.read_text(encoding="utf-8"))["address"]


def worker(address: str, threads: int = 1) -> list[str]:
    return [
        "worker", address, "--nthreads", str(threads), "--no-dashboard", "--no-nanny", "--host", "127.0.0.1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a scheduler with a worker of one thread and one of three."""
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        _, address = stack.enter_context(scheduler(folder))
        for threads in (1, 3):
            stack.enter_context(process(folder, *worker(address, threads)))
        yield address


def test_two_workers_leave_the_same_bytes(archive: Path, serial: Path, tmp_path: Path) -> None:
    outcome = explain(archive, toy_spec("poisoned"), tmp_path, **SMALL, workers=2)
    assert [record.slide.id for record in outcome.failed] == ["cut.tif"]
    assert differing(tmp_path, serial) == []


def test_a_cluster_leaves_the_same_bytes(
    archive: Path, serial: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model file is named from this folder, where the workers are not."""
    toy_file(tmp_path, "poisoned")
    monkeypatch.chdir(tmp_path)
    explain(archive, "poisoned.yaml", "out", **SMALL, scheduler=cluster)
    assert differing(tmp_path / "out", serial) == []


def test_a_cluster_continues_what_was_begun_here(archive: Path, serial: Path, cluster: str, tmp_path: Path) -> None:
    explain(archive / "more", toy_spec("poisoned"), tmp_path / "half", **SMALL)
    shutil.copytree(tmp_path / "half" / "a.tif", tmp_path / "out" / "more" / "a.tif")
    (tmp_path / "out" / "more" / "a.tif" / "manifest" / "done.json").unlink()
    explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL, scheduler=cluster)
    # The name in the OME-Zarr is the slide's id of the first run; everything else is as if made at once.
    assert set(differing(tmp_path / "out", serial)) <= {"more/a.tif/heatmap.ome.zarr/zarr.json"}


def test_nothing_stays_on_the_workers(archive: Path, cluster: str, tmp_path: Path) -> None:
    explain(archive / "more", toy_spec("poisoned"), tmp_path, **SMALL, scheduler=cluster)
    with Client(cluster, set_as_default=False) as client:
        plugins = client.run(lambda dask_worker: [name for name in dask_worker.plugins if name.startswith("wsi")])
    assert list(plugins.values()) == [[], []]


class KillsWorkers(Listener):
    """Kills a worker process of this process when so many spans are done."""

    def __init__(self, moments: set[int]) -> None:
        self.moments, self.done, self.killed = moments, 0, 0

    def task_done(self, task: Task, result: Any) -> None:
        self.done += task.stage == "explain"
        if task.stage == "explain" and self.done in self.moments:
            family = psutil.Process().children(recursive=True)
            workers = [p for p in family if any("spawn_main" in part for part in p.cmdline())]
            random.Random(self.done).choice(workers).send_signal(signal.SIGKILL)
            self.killed += 1


def test_workers_that_are_killed_are_replaced(archive: Path, serial: Path, tmp_path: Path) -> None:
    listener = KillsWorkers({1, 6})
    explain(archive, toy_spec("poisoned"), tmp_path, **SMALL, workers=2, listener=listener)
    assert listener.killed == 2
    assert differing(tmp_path, serial) == []


def test_a_patch_that_kills_workers_costs_its_slide_alone(
    archive: Path, serial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one worker, tasks of other slides wait beside the poison and die with it."""
    monkeypatch.setenv(POISON, "always")
    outcome = explain(archive, toy_spec("poisoned"), tmp_path, **SMALL, workers=1)
    errors = {record.slide.id: record.error for record in outcome.failed}
    assert set(errors) == {"a.tif", "cut.tif"}
    assert errors["a.tif"].startswith(f"{archive}/a.tif: workers died repeatedly on 'explain ")
    assert "--batch-size" in errors["a.tif"]
    assert {name.split("/")[0] for name in differing(tmp_path, serial)} == {"a.tif", "slides.csv"}
    monkeypatch.delenv(POISON)
    explain(archive, toy_spec("poisoned"), tmp_path, **SMALL)
    assert differing(tmp_path, serial) == []


def test_a_model_that_kills_workers_is_told(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POISON, "load")
    with pytest.raises(WorkerError, match="workers died while they loaded the model; give them more memory"):
        explain(archive, toy_spec("deadly"), tmp_path / "out", **SMALL, workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:1", "nonsense", "tcp://127.0.0.1:port"])
def test_no_scheduler_there(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(dask_executor, "NO_WORKER_S", 1)
    with pytest.raises(WorkerError, match=f"no Dask scheduler answers at {address}: .*; check the address"):
        explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL, scheduler=address)
    assert not (tmp_path / "out").exists()


def test_no_worker_there(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_executor, "NO_WORKER_S", 1)
    with scheduler(tmp_path) as (_, address), pytest.raises(WorkerError, match="'dask worker ADDRESS'") as caught:
        explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL, scheduler=address)
    assert address in str(caught.value)
    assert not (tmp_path / "out").exists()


class Calls(Listener):
    """Calls a function when the first span is done."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function: Callable[[], None] | None = function

    def task_done(self, task: Task, result: Any) -> None:
        if task.stage == "explain" and self.function is not None:
            function, self.function = self.function, None
            function()


@pytest.mark.parametrize("victim", ["scheduler", "worker"])
def test_a_cluster_that_dies_stops_the_run_and_loses_nothing(
    archive: Path, serial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    monkeypatch.setattr(dask_executor, "NO_WORKER_S", 3)
    with scheduler(tmp_path) as (boss, address), process(tmp_path, *worker(address)) as hand:
        listener = Calls((boss if victim == "scheduler" else hand).kill)
        with pytest.raises(WorkerError, match="run the same command again, nothing finished is lost"):
            explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL, scheduler=address, listener=listener)
    explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL)
    assert differing(tmp_path / "out", serial) == []


def test_a_full_disk_on_a_worker_stops_the_run(archive: Path, cluster: str, tmp_path: Path) -> None:
    """A file stands where a slide's folder should be: no other slide would fare better in such an OUT."""
    (tmp_path / "glass.tif").touch()
    with pytest.raises(StoreError, match=r"glass\.tif: a file stands .*choose another --out"):
        explain(archive, toy_spec("poisoned"), tmp_path, **SMALL, scheduler=cluster)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"workers": 0}, "workers is 0, expected 1 or more"),
        ({"workers": -2}, "workers is -2, expected 1 or more"),
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, "give one of them"),
    ],
)
def test_impossible_places_are_refused(archive: Path, tmp_path: Path, where: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        explain(archive, toy_spec("poisoned"), tmp_path, **SMALL, **where)


def test_a_task_is_small_on_the_wire() -> None:
    entry = SlideEntry("a/long/" * 20 + "slide.svs", "/an/archive/of/slides/" * 20 + "slide.svs")
    task = Task("explain", entry, (123456,))
    sent = pickle.dumps((_perform_here, "wsi-gradcam-12345678", task))
    assert len(sent) < 2000
    assert pickle.loads(sent) == (_perform_here, "wsi-gradcam-12345678", task)


# --- the window of tasks in flight, without a cluster --------------------------------------------------------------


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
        future = FakeFuture(lambda: self.perform(task))
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


# --- what a process keeps ------------------------------------------------------------------------------------------


class FakeSlide:
    """A slide that knows whether it is open."""

    def __init__(self, path: str, *_: Any) -> None:
        self.path, self.open = path, True

    def close(self) -> None:
        self.open = False


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    spec = toy_spec("poisoned")
    run = plan_run(tmp_path, spec, examine_model(spec, make_settings(**SMALL), []).facts, make_settings(**SMALL))
    monkeypatch.setattr(stages, "open_entry", FakeSlide)
    return Context(run)


def test_a_slide_in_use_is_never_closed(context: Context) -> None:
    """Threads of a worker work on different slides."""
    with context.slide(entry(0)) as first, context.slide(entry(1)) as second:
        with context.slide(entry(0)) as again:
            assert again is first
        assert first.open  # type: ignore[attr-defined]
        assert second.open  # type: ignore[attr-defined]


def test_the_last_slide_stays_open_for_the_next_task(context: Context) -> None:
    with context.slide(entry(0)) as first:
        pass
    with context.slide(entry(0)) as again:
        assert again is first
    with context.slide(entry(1)):
        assert not first.open  # type: ignore[attr-defined]


def test_close_releases_the_slides(context: Context) -> None:
    with pytest.raises(KeyError), context.slide(entry(0)) as slide:
        raise KeyError
    context.close()
    assert not slide.open  # type: ignore[attr-defined]


def test_a_worker_with_another_model_refuses(context: Context) -> None:
    from wsi_gradcam.errors import ModelError

    object.__setattr__(context.run, "spec", toy_spec("other_linear"))
    with pytest.raises(ModelError, match="loaded another model than the one the run began with"):
        context.model()


def test_the_executor_closes_its_cluster_when_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    monkeypatch.setattr(Client, "wait_for_workers", _times_out)
    with pytest.raises(WorkerError, match="no Dask worker joined the local cluster"):
        DaskExecutor(workers=1)
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    assert not [child for child in left if any("spawn_main" in part for part in child.cmdline())]


def _times_out(*_: Any, **__: Any) -> None:
    raise TimeoutError("no worker")


def test_results_are_valid(serial: Path) -> None:
    assert validate(serial) == []
    assert stored(serial / "a.tif", "logits").any()
