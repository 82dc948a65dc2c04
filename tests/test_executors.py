"""The executors agree byte by byte; workers and schedulers may die."""

from __future__ import annotations

import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client

from tests.clusters import process, scheduler, worker
from tests.runs import SMALL, differing, rows_of, stored, toy_file, toy_spec
from tests.synthetic import truncate, write_marker_slide
from tests.toy_models import POISON
from wsi_gradcam.api import RunListener, explain
from wsi_gradcam.errors import ConfigError, StoreError, WorkerError
from wsi_gradcam.executors import dask as dask_executor
from wsi_gradcam.executors.dask import DaskExecutor
from wsi_gradcam.executors.dask import workers as dask_workers
from wsi_gradcam.executors.dask.batching import MAX_TASKS
from wsi_gradcam.executors.dask.plugins import TaskBatch, perform_batch
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.results.validation import validate
from wsi_gradcam.run.types import Performed, Task
from wsi_gradcam.run.workload import EXPLAIN


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
    assert differing(tmp_path / "out", serial, model_moved=True) == []


def test_a_cluster_continues_what_was_begun_here(archive: Path, serial: Path, cluster: str, tmp_path: Path) -> None:
    explain(archive / "more", toy_spec("poisoned"), tmp_path / "half", **SMALL)
    shutil.copytree(tmp_path / "half" / "a.tif", tmp_path / "out" / "more" / "a.tif")
    (tmp_path / "out" / "more" / "a.tif" / "manifest" / "done.json").unlink()
    explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL, scheduler=cluster)
    # The name in the OME-Zarr is the slide's id of the first run; everything else but its digest is as if made at once.
    assert set(differing(tmp_path / "out", serial)) <= {
        "more/a.tif/heatmap.ome.zarr/zarr.json",
        "more/a.tif/manifest/done.json",
    }


def test_nothing_stays_on_the_workers(archive: Path, cluster: str, tmp_path: Path) -> None:
    explain(archive / "more", toy_spec("poisoned"), tmp_path, **SMALL, scheduler=cluster)
    with Client(cluster, set_as_default=False) as client:
        plugins = client.run(lambda dask_worker: [name for name in dask_worker.plugins if name.startswith("wsi")])
    assert list(plugins.values()) == [[], []]


class KillsWorkers(RunListener):
    """Kills a worker process of this process when so many spans are done."""

    def __init__(self, moments: set[int]) -> None:
        self.moments, self.done, self.killed = moments, 0, 0

    def task_done(self, task: Task, performed: Performed) -> None:
        self.done += task.stage.name == "explain"
        if task.stage.name == "explain" and self.done in self.moments:
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


def test_a_worker_that_eats_the_machine_is_replaced(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once; its span is tried again, and nobody waits for a paused worker."""
    explain(archive / "a.tif", toy_spec("hungry"), tmp_path / "serial", **SMALL)
    monkeypatch.setenv(POISON, str(tmp_path / "eaten"))
    monkeypatch.setattr(dask_workers, "MEMORY_LIMIT", 3 << 29)
    outcome = explain(archive / "a.tif", toy_spec("hungry"), tmp_path / "out", **SMALL, workers=1)
    assert (tmp_path / "eaten").exists()
    assert [record.status for record in outcome.records] == ["ok"]
    assert differing(tmp_path / "out", tmp_path / "serial") == []


@pytest.mark.slow
def test_a_model_that_kills_workers_is_told(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(POISON, "load")
    with pytest.raises(WorkerError, match="workers died while loading the model; give them more memory"):
        explain(archive, toy_spec("deadly"), tmp_path / "out", **SMALL, workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:1", "nonsense", "tcp://127.0.0.1:port"])
def test_no_scheduler_there(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(dask_executor, "NO_WORKER_S", 1)
    with pytest.raises(WorkerError, match=f"no Dask scheduler answers at {address}: .*; check the address"):
        explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL, scheduler=address)
    assert not (tmp_path / "out").exists()


def test_no_worker_there(archive: Path, tmp_path: Path) -> None:
    with (
        scheduler(tmp_path) as (_, address),
        pytest.raises(WorkerError, match="waited 1 s: there are no workers") as caught,
    ):
        explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL, scheduler=address, wait_for_workers=1)
    assert f"'dask worker {address}'" in str(caught.value)
    assert not (tmp_path / "out").exists()


class Calls(RunListener):
    """Calls a function when the first span is done."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function: Callable[[], None] | None = function

    def task_done(self, task: Task, performed: Performed) -> None:
        if task.stage.name == "explain" and self.function is not None:
            function, self.function = self.function, None
            function()


@pytest.mark.parametrize("victim", ["scheduler", "worker"])
def test_a_cluster_that_dies_stops_the_run_and_loses_nothing(
    archive: Path, serial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    monkeypatch.setattr(dask_executor, "WAIT_S", 3)
    with scheduler(tmp_path) as (boss, address), process(tmp_path, *worker(address)) as hand:
        listener = Calls((boss if victim == "scheduler" else hand).kill)
        with pytest.raises(WorkerError, match="run the same command again; nothing finished is lost"):
            explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL, scheduler=address, listener=listener)
    explain(archive, toy_spec("poisoned"), tmp_path / "out", **SMALL)
    assert differing(tmp_path / "out", serial) == []


def test_a_full_disk_on_a_worker_stops_the_run(archive: Path, cluster: str, tmp_path: Path) -> None:
    """A file stands where a slide's folder should be: no other slide would fare better in such an OUT."""
    (tmp_path / "glass.tif").touch()
    with pytest.raises(StoreError, match=r"glass\.tif: there is a file .*choose another --out"):
        explain(archive, toy_spec("poisoned"), tmp_path, **SMALL, scheduler=cluster)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"workers": 0}, "workers is 0, expected 1 or more"),
        ({"workers": -2}, "workers is -2, expected 1 or more"),
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, "give only one"),
    ],
)
def test_impossible_places_are_refused(archive: Path, tmp_path: Path, where: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        explain(archive, toy_spec("poisoned"), tmp_path, **SMALL, **where)


def test_an_order_is_small_on_the_wire() -> None:
    """As many tasks as one ever holds, of a slide with a long name."""
    entry = SlideEntry("a/long/" * 20 + "slide.svs", "/an/archive/of/slides/" * 20 + "slide.svs")
    batch = TaskBatch("wsi-gradcam-12345678", tuple(Task(EXPLAIN, entry, (100_000 + i,)) for i in range(MAX_TASKS)))
    sent = pickle.dumps((perform_batch, batch))
    assert len(sent) < 10_000
    assert pickle.loads(sent) == (perform_batch, batch)


def test_the_executor_closes_its_cluster_when_nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    monkeypatch.setattr(dask_executor.DaskExecutor, "_wait", _times_out)
    with pytest.raises(TimeoutError):
        DaskExecutor(workers=1)
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    assert not [child for child in left if any("spawn_main" in part for part in child.cmdline())]


def _times_out(*_: Any, **__: Any) -> None:
    raise TimeoutError("no worker")


def test_results_are_valid(serial: Path) -> None:
    assert validate(serial) == []
    assert stored(serial / "a.tif", "logits").any()
