"""Clusters as they are: which workers do what, what a dead client leaves, what travels, and signals."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed import Client, LocalCluster, wait
from tornado.web import Application

from tests.clusters import process, scheduler, worker
from tests.runs import ROOT, SMALL, differing, flags, rows_of, toy_file, toy_spec
from tests.synthetic import write_marker_slide
from tests.toy_models import SLOWNESS_S
from wsi_gradcam.api import RunListener, explain
from wsi_gradcam.errors import WorkerError
from wsi_gradcam.executors.dask import DaskExecutor, ask_workers
from wsi_gradcam.executors.dask.plugins import BatchResult, RunSchedulerPlugin
from wsi_gradcam.executors.dask.scheduling import ResultCollector, SlideScheduler
from wsi_gradcam.executors.dask.workers import Pools, Workers
from wsi_gradcam.run.types import Task

WITHIN_S = 120.0


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two slides of 8 x 10 patches."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("a.tif", "b.tif")):
        write_marker_slide(folder / name, 500, 640, mpp=0.25, markers=[], marker_px=16, seed=seed)
    return folder


@pytest.fixture(scope="module")
def serial(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their results, computed in this process."""
    out = tmp_path_factory.mktemp("serial")
    explain(slides, toy_spec("slow_linear"), out, **SMALL)
    return out


def told(**workers: dict[str, float]) -> dict[str, Any]:
    """What a scheduler says of workers with 2 threads and these resources."""
    return {name: {"nthreads": 2, "resources": has, "status": "running"} for name, has in workers.items()}


def test_spans_want_gpus_and_the_rest_cpus_where_some_declare_that() -> None:
    found = Workers.of(told(g={"GPU": 1}, h={"GPU": 1}, c={"CPU": 4}, plain={}), "cuda")
    assert found.needs == Pools({"GPU": 0.25}, {"CPU": 1})  # four share a GPU
    assert found.able == Pools({"g": 2, "h": 2}, {"c": 2})
    assert found.slots == Pools(4, 2)
    assert found.missing == ""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_cpu_workers_any_does_the_rest(device: str) -> None:
    found = Workers.of(told(g={"GPU": 1}, plain={}), device)
    assert found.needs.other == {}
    assert found.slots == Pools(4 if device == "cpu" else 2, 4)


def test_what_lacks_is_named_with_its_mend() -> None:
    address = "tcp://10.0.0.1:8786"
    nobody = Workers.of({}, "cuda", address).missing
    assert nobody == f"there are no workers; start some with 'dask worker {address} --resources GPU=1'"
    bare = Workers.of(told(a={}, b={"CPU": 4}), "cuda", address).missing
    assert "--device cuda needs workers that declare a GPU, but none of the 2" in bare
    assert f"'dask worker {address} --resources GPU=1'" in bare
    paused = {"a": {"nthreads": 1, "resources": {}, "status": "paused"}}
    assert "paused for lack of memory" in Workers.of(paused, "cpu").missing


def test_no_gpu_worker_is_an_error_and_not_a_hang(slides: Path, tmp_path: Path) -> None:
    with scheduler(tmp_path) as (_, address), process(tmp_path, *worker(address)):
        started = time.monotonic()
        with pytest.raises(WorkerError, match=r"'dask worker .* --resources GPU=1'"):
            explain(
                slides,
                toy_spec("slow_linear"),
                tmp_path / "out",
                **SMALL,
                device="cuda",
                scheduler=address,
                wait_for_workers=3,
            )
    assert time.monotonic() - started < WITHIN_S


def test_workers_that_declare_a_gpu_and_have_none_are_named(slides: Path, tmp_path: Path) -> None:
    """No machine of the tests has one."""
    with scheduler(tmp_path) as (_, address), process(tmp_path, *worker(address, resources="GPU=1")):
        with pytest.raises(
            WorkerError, match=r"worker tcp://.* declares a GPU, but --device cuda cannot be used there"
        ):
            explain(slides, toy_spec("slow_linear"), tmp_path / "out", **SMALL, device="cuda", scheduler=address)
        _, answers = ask_workers(address, os.getpid)
        assert len(answers) == 1


class Watches(RunListener):
    """Calls a function when so many spans are done."""

    def __init__(self, spans: int, function: Any) -> None:
        self.spans, self.function = spans, function

    def task_done(self, task: Task, result: Any) -> None:
        self.spans -= task.stage.name == "explain"
        if task.stage.name == "explain" and self.spans == 0:
            self.function()


def test_stages_run_on_the_workers_they_want_and_orders_are_small(
    slides: Path, serial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back what the scheduler holds of each task, and which worker it gave it to; workers come while it runs."""
    done_by: dict[str, set[str]] = defaultdict(set)
    sizes: list[int] = []
    take, send = SlideScheduler._take, SlideScheduler._send

    def taken(self: SlideScheduler, sent: Any, answer: Any) -> None:
        for task in sent.tasks:
            done_by[task.stage.name].add(answer.worker)
        take(self, sent, answer)

    def sent_and_read_back(self: SlideScheduler, sent: Any) -> None:
        before = set(self._sent)
        send(self, sent)
        (future,) = set(self._sent) - before
        until = time.monotonic() + WITHIN_S
        while not (size := self._client.run_on_scheduler(payload_bytes, future.key)):
            assert time.monotonic() < until
        sizes.append(size)

    monkeypatch.setattr(SlideScheduler, "_take", taken)
    monkeypatch.setattr(SlideScheduler, "_send", sent_and_read_back)
    with ExitStack() as stack:
        _, address = stack.enter_context(scheduler(tmp_path))
        stack.enter_context(process(tmp_path, *worker(address, resources="CPU=1")))
        stack.enter_context(process(tmp_path, *worker(address)))

        def join() -> None:
            stack.enter_context(process(tmp_path, *worker(address)))

        explain(
            slides, toy_spec("slow_linear"), tmp_path / "out", **SMALL, scheduler=address, listener=Watches(2, join)
        )
    assert done_by["plan"] == done_by["stitch"] == done_by["finish"]
    assert len(done_by["plan"]) == 1
    assert len(done_by["explain"]) >= 2
    assert 0 < max(sizes) < 10_000
    assert len(sizes) > 8
    assert differing(tmp_path / "out", serial) == []


def payload_bytes(key: str, dask_scheduler: Any) -> int:
    """On the scheduler: the size of a task as it travels; 0 until it is known."""
    task = dask_scheduler.tasks.get(key)
    return 0 if task is None else len(pickle.dumps(task.run_spec))


def test_a_client_that_is_killed_leaves_nothing_behind(slides: Path, tmp_path: Path) -> None:
    toy_file(tmp_path, "slow_linear")
    with (
        scheduler(tmp_path) as (_, address),
        process(tmp_path, *worker(address)),
        Client(address, set_as_default=False) as client,
    ):
        arguments = ["explain", str(slides), "--trust-code", "--model", str(tmp_path / "slow_linear.yaml")]
        arguments += ["--out", str(tmp_path / "out"), *flags(SMALL), "--scheduler", address]
        command = begun(arguments, 0.05)
        until = time.monotonic() + WITHIN_S
        while not any((tmp_path / "out").glob("*/manifest/spans/*.json")):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert any(kept(client))
        command.kill()
        command.communicate()
        while any(kept(client)) or client.run_on_scheduler(plugins_left):
            assert time.monotonic() < until
            time.sleep(0.1)


def begun(arguments: list[str], slowness_s: float) -> subprocess.Popen[str]:
    """The command, running, with a model that takes its time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), SLOWNESS_S: str(slowness_s)}
    return subprocess.Popen(
        [sys.executable, "-m", "wsi_gradcam.cli", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kept(client: Client) -> list[str]:
    """Names of the runs that workers keep."""
    found = client.run(lambda dask_worker: [name for name in dask_worker.plugins if name.startswith("wsi")])
    return [name for names in found.values() for name in names]


def plugins_left(dask_scheduler: Any) -> list[str]:
    """On the scheduler: what it keeps of runs."""
    return [name for name in (*dask_scheduler.plugins, *dask_scheduler.worker_plugins) if name.startswith("wsi")]


@pytest.mark.skipif(sys.platform != "linux", reason="commands guard themselves on Linux only")
@pytest.mark.parametrize(
    ("sent", "code", "where"),
    [(signal.SIGINT, 130, "group"), pytest.param(signal.SIGTERM, 143, "command", marks=pytest.mark.slow)],
)
def test_a_signal_stops_a_run_on_workers(
    slides: Path, serial: Path, tmp_path: Path, sent: signal.Signals, code: int, where: str
) -> None:
    """Ctrl-C reaches all processes of a terminal's group, `kill` one."""
    out = tmp_path / "out"
    toy_file(tmp_path, "slow_linear")
    arguments = [
        "explain",
        str(slides),
        "--trust-code",
        "--model",
        str(tmp_path / "slow_linear.yaml"),
        "--out",
        str(out),
    ]
    command = begun([*arguments, *flags(SMALL), "--workers", "1"], 0.3)
    until = time.monotonic() + WITHIN_S
    while not any(out.glob("*/manifest/spans/*.json")):
        assert time.monotonic() < until
        time.sleep(0.05)
    family = psutil.Process(command.pid).children(recursive=True)
    if where == "group":
        os.killpg(command.pid, sent)
    else:
        command.send_signal(sent)
    _, said = command.communicate(timeout=WITHIN_S)
    assert command.returncode == code, said
    assert said.splitlines()[-1].startswith(f"stopped by {sent.name}; run the same command again to continue")
    assert "Traceback" not in said
    psutil.wait_procs(family, timeout=10)
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    explain(slides, str(tmp_path / "slow_linear.yaml"), out, **SMALL)
    assert differing(out, serial, model_moved=True) == []
    assert {row["status"] for row in rows_of(out).values()} == {"ok"}


def test_waiting_for_less_than_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="wait_for_workers is -1, expected a number of seconds, 0 or more"):
        DaskExecutor(scheduler="tcp://127.0.0.1:1", wait_s=-1)


def test_a_scheduler_that_cannot_look_after_a_run_gets_no_hints(
    slides: Path, serial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They would bind there."""

    def refused(self: RunSchedulerPlugin, protocol: Any) -> Any:
        raise TypeError("cannot travel")

    understood: list[bool] = []
    run = SlideScheduler.run

    def noted(self: SlideScheduler, *arguments: Any) -> Any:
        understood.append(self._hints)
        return run(self, *arguments)

    monkeypatch.setattr(SlideScheduler, "run", noted)
    explain(slides, toy_spec("slow_linear"), tmp_path / "usual", **SMALL, workers=1)
    monkeypatch.setattr(RunSchedulerPlugin, "__reduce_ex__", refused)
    explain(slides, toy_spec("slow_linear"), tmp_path / "out", **SMALL, workers=1)
    assert understood == [True, False]
    assert "the scheduler cannot monitor the run (TypeError: cannot travel)" in caplog.messages
    assert differing(tmp_path / "out", serial) == []


def test_a_dashboard_is_told_of_where_the_scheduler_has_one() -> None:
    """Its HTTP server alone, which answers whether it is well, is none."""
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        executor = DaskExecutor(scheduler=cluster.scheduler_address)
        server = cluster.scheduler.http_application
        try:
            server.applications.clear()  # as with --no-dashboard, whether or not bokeh is installed
            assert executor.dashboard == ""
            server.add_application(Application())
            assert executor.dashboard.endswith(f":{cluster.scheduler.http_server.port}/status")
        finally:
            executor.close()


CALLS = 1000
CHURN_S = 60  # until workers have come and gone, on a machine that is busy with other things


def test_a_result_that_is_lost_with_its_worker_is_computed_again() -> None:
    """One that died between the end of a task and the fetching of its result."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        future, collector = client.submit(BatchResult, "of nobody", pure=False), ResultCollector(client)
        wait(future)
        cluster.scale(0)
        until = time.monotonic() + WITHIN_S
        while future.status != "lost" and time.monotonic() < until:
            time.sleep(0.01)
        assert future.status == "lost"
        collector.watch(future)
        assert [collector.collect(0.05) for _ in range(10)] == [[]] * 10
        cluster.scale(1)
        found: list[Any] = []
        while not found and time.monotonic() < until:
            found = collector.collect(0.1)
    assert [(each is future, type(result)) for each, result in found] == [(True, BatchResult)]


def test_workers_that_are_there_are_never_said_to_be_missing() -> None:
    """Others come and go meanwhile, and the client's own refresh, which leaves workers out, is as busy as it can be."""
    busy = {"distributed.client.scheduler-info-interval": "1ms"}
    with (
        dask.config.set(busy),
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
    ):
        executor, over = DaskExecutor(scheduler=cluster.scheduler_address), threading.Event()

        def churn() -> None:
            while not over.wait(0.05):
                cluster.scale(3)
                over.wait(0.2)
                cluster.scale(1)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            found = [executor.workers()]
            until = time.monotonic() + CHURN_S
            while len(found) < CALLS or (len({each.addresses for each in found}) <= 2 and time.monotonic() < until):
                found.append(executor.workers())
        finally:
            over.set()
            thread.join()
            executor.close()
    assert [workers for workers in found if workers.missing] == []
    assert len({workers.addresses for workers in found}) > 2  # they did come and go


@pytest.mark.slow
def test_a_scheduler_that_is_gone_while_workers_are_waited_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not waited for as long as workers would be."""
    with scheduler(tmp_path) as (started, address):
        threading.Timer(1.0, started.kill).start()
        began = time.monotonic()
        with pytest.raises(WorkerError, match="the connection to the Dask scheduler is lost; restart it"):
            DaskExecutor(scheduler=address, wait_s=86_400)
        assert time.monotonic() - began < WITHIN_S
