"""Workers on this machine: what each is given. No GPU is here: lists of devices are made up, nothing runs on one."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pickle
import socket
import ssl
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import dask
import psutil
import pytest
from dask.system import CPU_COUNT
from distributed import Client, Security
from distributed.comm.core import connect
from distributed.core import rpc
from distributed.system import MEMORY_LIMIT

from tests.runs import SMALL, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam.errors import WorkerError
from wsi_gradcam.executors import SerialExecutor, open_executor
from wsi_gradcam.executors.dask import DaskExecutor
from wsi_gradcam.executors.dask import workers as dask_workers
from wsi_gradcam.executors.dask.workers import Workers
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.run.plan import plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.run.workload import ExplainWorkload


class FakeCluster:
    """Stands in for a cluster, and keeps what it was made with."""

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        routes = [dask.config.get(f"distributed.{part}.http.routes") for part in ("scheduler", "worker")]
        terminate = dask.config.get("distributed.worker.memory.terminate")
        self.made.append({**options, "terminate": terminate, "routes": routes})

    def __enter__(self) -> FakeCluster:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What clusters are made with."""
    FakeCluster.made = []
    monkeypatch.setattr(dask_workers, "SpecCluster", FakeCluster)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return FakeCluster.made


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs, as its driver's tool tells it."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n2\\n3\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def start(workers: int, device: str) -> None:
    with dask_workers.local_cluster(workers, device):
        pass


def test_cores_and_memory_are_shared(made: list[dict[str, Any]]) -> None:
    start(4, "cpu")
    (cluster,) = made
    assert len(cluster["workers"]) == 4
    for options in (worker["options"] for worker in cluster["workers"].values()):
        assert (options["nthreads"], options["memory_limit"]) == (2, MEMORY_LIMIT // 4)
        assert "resources" not in options
    assert cluster["terminate"] == 0.95
    assert dask.config.get("distributed.worker.memory.pause") is not False  # only while the cluster is there


@pytest.mark.usefixtures("four_gpus")
def test_each_worker_has_a_gpu_of_its_own(made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_workers, "find_spec", lambda name: None)
    start(3, "cuda")
    workers = [worker["options"] for worker in made[0]["workers"].values()][:3]
    assert [worker["env"] for worker in workers] == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(3)]
    assert all(worker["resources"] == {"GPU": 1} for worker in workers)
    assert all(worker["nthreads"] == 4 for worker in workers)
    assert all(worker["memory_limit"] == MEMORY_LIMIT // 2 // 3 for worker in workers)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("cores", "count"), [(1, 1), (8, 2), (16, 5)])
def test_helpers_plan_and_stitch_beside_a_gpu(
    cores: int, count: int, made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of one thread, which see no GPU: Python's own work would keep the threads of a GPU from running."""
    monkeypatch.setattr(dask_workers, "find_spec", lambda name: None)
    monkeypatch.setattr(dask_workers.helpers, "__defaults__", (cores,))
    start(1, "cuda")
    (gpu, *helpers) = [worker["options"] for worker in made[0]["workers"].values()]
    assert len(helpers) == count
    for options in helpers:
        assert (options["nthreads"], options["resources"]) == (1, {"CPU": 1})
        assert options["env"] == {"CUDA_VISIBLE_DEVICES": ""}
        assert options["memory_limit"] == MEMORY_LIMIT // 2 // count
    assert gpu["memory_limit"] + count * helpers[0]["memory_limit"] <= MEMORY_LIMIT
    info = {str(i): {**o, "status": "running"} for i, o in enumerate((gpu, *helpers))}
    found = Workers.of(info, "cuda")
    assert (found.slots.model, found.slots.other) == (4, count)
    assert set(found.able.model) == {"0"}
    assert "0" not in found.able.other


@pytest.mark.usefixtures("four_gpus")
def test_dask_cuda_is_used_where_it_is_installed(made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("dask_cuda")
    module.LocalCUDACluster = FakeCluster
    monkeypatch.setitem(sys.modules, "dask_cuda", module)
    monkeypatch.setattr(dask_workers, "find_spec", lambda name: name)
    start(2, "cuda")
    (options,) = made
    assert options["CUDA_VISIBLE_DEVICES"] == ["0", "1"]
    assert (options["resources"], options["threads_per_worker"]) == ({"GPU": 1, "CPU": 3}, 7)
    assert (options["protocol"], options["security"].require_encryption) == ("tls", True)
    assert options["routes"] == [[], []]
    assert options["dashboard_address"] is None


@pytest.mark.usefixtures("four_gpus", "made")
def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(WorkerError, match=r"--workers 5 .*but there are 4 \(0, 1, 2, 3\); use --workers 4"):
        start(5, "cuda")


@pytest.mark.usefixtures("made")
def test_no_gpu_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(WorkerError, match="no NVIDIA GPU is found here"):
        start(1, "cuda")


@pytest.mark.parametrize(
    ("given", "gpus"),
    [
        ("2,0", ["2", "0"]),
        ("", []),
        ("-1", []),
        ("1,-1,2", ["1"]),
        ("GPU-8932f937, MIG-4a", ["GPU-8932f937", "MIG-4a"]),
    ],
)
def test_the_environment_says_which_gpus_may_be_used(
    given: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert dask_workers.visible_gpus() == gpus


@pytest.mark.usefixtures("four_gpus")
def test_a_named_device_stays_as_it_is(made: list[dict[str, Any]]) -> None:
    """With --device cuda:1 all workers share that one."""
    start(2, "cuda:1")
    workers = [worker["options"] for worker in made[0]["workers"].values()]
    assert [worker["resources"] for worker in workers[:2]] == [{"GPU": 1}] * 2
    assert not any("env" in worker for worker in workers[:2])


def torch_threads(task: Any) -> int:
    """On a worker."""
    import torch

    return torch.get_num_threads()


@pytest.mark.skipif(CPU_COUNT < 2, reason="needs two cores")
def test_the_model_has_the_threads_that_it_is_given(tmp_path: Path) -> None:
    """Dask's nannies give their workers one thread of everything, and torch believes some of that."""
    write_marker_slide(tmp_path / "a.tif", 200, 200, mpp=0.25, markers=[], marker_px=16)
    slides, settings, executor = find_slides([tmp_path / "a.tif"]), make_settings(**SMALL), DaskExecutor(1, None, 2)
    try:
        facts = SerialExecutor().examine(toy_spec("marker"), settings, slides)
        plan = plan_run(tmp_path / "out", toy_spec("marker"), facts, settings)
        assert [record.status for record in executor.run(ExplainWorkload(plan), slides, lambda *_: None)] == ["ok"]
        assert executor._client.submit(torch_threads, 0).result() == 2
    finally:
        executor.close()


# --- what other users of this machine can do -------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """A local cluster of two workers on a machine where another user was first at the folder for temporary files."""

    client: Client
    addresses: tuple[str, ...]
    temporary: Path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    temporary = tmp_path_factory.mktemp("temporary")
    planted = temporary / "dask-scratch-space"
    planted.mkdir()
    planted.chmod(0o777)
    (planted / "planted_by_a_stranger.py").write_text("raise SystemExit", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)
        with dask_workers.local_cluster(2, "cpu") as cluster, Client(cluster, set_as_default=False) as client:
            client.wait_for_workers(2)
            workers = client.scheduler_info(n_workers=-1)["workers"]
            nannies = [worker["nanny"] for worker in workers.values()]
            yield Shared(client, (cluster.scheduler_address, *workers, *nannies), temporary)


async def asked(address: str, arguments: dict[str, Any]) -> Any:
    """What a scheduler, worker or nanny answers to who it is."""
    async with asyncio.timeout(20):
        comm = await connect(address, timeout=5, **arguments)
        try:
            await comm.write({"op": "identity", "reply": True})
            return await comm.read()
        finally:
            comm.abort()


def without_certificate() -> dict[str, Any]:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return {"ssl_context": context}


def with_own_certificate() -> dict[str, Any]:
    arguments = Security.temporary().get_connection_args("client")
    arguments["ssl_context"].verify_mode = ssl.CERT_NONE
    return dict(arguments)


REFUSED = r"(?i)closed|reset|certificate|alert|timed out|broken pipe|EOF|before comm was established"
STRANGERS = {"tcp": dict[str, Any], "tls": without_certificate, "tls with another key": with_own_certificate}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_are_not_answered(shared: Shared, stranger: str) -> None:
    """Neither by the scheduler, nor by workers, nor by nannies."""
    assert len(shared.addresses) == 5
    for address in shared.addresses:
        tried = address.replace("tls://", f"{stranger[:3]}://")
        with pytest.raises(OSError, match=REFUSED):
            asyncio.run(asked(tried, STRANGERS[stranger]()))


async def run_there(address: str, arguments: dict[str, Any], name: str, file: Path) -> None:
    """Have a scheduler, worker or nanny make a file, as Dask's clients run functions; `name` is of its function."""
    call = {"function": pickle.dumps(Path.touch), "args": pickle.dumps((file,)), "kwargs": None}
    async with asyncio.timeout(20), rpc(address, connection_args=arguments, timeout=5) as there:
        await getattr(there, name)(**call)


FUNCTIONS = ("run_function", "run", "run", "run", "run")  # of the scheduler, two workers, two nannies


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers_run_nothing(shared: Shared, stranger: str, tmp_path: Path) -> None:
    for address, name in zip(shared.addresses, FUNCTIONS, strict=True):
        tried = address.replace("tls://", f"{stranger[:3]}://")
        with pytest.raises(OSError, match=REFUSED):
            asyncio.run(run_there(tried, STRANGERS[stranger](), name, tmp_path / "ran"))
    assert not (tmp_path / "ran").exists()
    assert len(shared.client.run(os.getpid)) == 2  # all are still there


def test_who_has_the_key_runs_what_strangers_cannot(shared: Shared, tmp_path: Path) -> None:
    arguments = shared.client.security.get_connection_args("client")
    for number, (address, name) in enumerate(zip(shared.addresses, FUNCTIONS, strict=True)):
        asyncio.run(run_there(address, arguments, name, tmp_path / str(number)))
        assert (tmp_path / str(number)).exists()


def test_who_has_the_key_is_answered(shared: Shared) -> None:
    arguments = shared.client.security.get_connection_args("client")
    kinds = [asyncio.run(asked(address, arguments))["type"] for address in shared.addresses]
    assert kinds == ["UnseenScheduler", "UnseenWorker", "UnseenWorker", "Nanny", "Nanny"]


def test_nothing_else_listens(shared: Shared) -> None:
    """No HTTP server, whose pages name slides, and which knows no password."""
    listening = {
        connection.laddr
        for process in family()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    served = {urlsplit(address) for address in shared.addresses}
    assert {(url.hostname, url.port) for url in served} <= {(place.ip, place.port) for place in listening}
    started = {place.port for place in listening} - {url.port for url in served}
    for port in started:  # of other tests' servers, if any: none of it is Dask's
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as one:
            one.settimeout(2)
            one.sendall(b"GET /info/main/workers.html HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" not in one.recv(64)
    assert shared.client.scheduler_info()["services"] == {}


def family() -> list[psutil.Process]:
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


def test_the_key_is_in_no_command_line_environment_or_file(shared: Shared) -> None:
    secret = shared.client.security.tls_worker_key.splitlines()[1]
    assert len(secret) == 64
    for process in family():
        with suppress(psutil.NoSuchProcess):
            assert secret not in " ".join(process.cmdline())
            assert secret not in " ".join(process.environ().values())
    for path in shared.temporary.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


def can_import(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def test_modules_of_strangers_are_not_found(shared: Shared) -> None:
    name = "planted_by_a_stranger"
    assert not can_import(name)
    assert not any(shared.client.run(can_import, name).values())
    assert not any(shared.client.run(can_import, name, nanny=True).values())
    own = [path for path in shared.temporary.glob("wsi-gradcam-*") if path.is_dir()]
    assert [path.stat().st_mode & 0o777 for path in own] == [0o700]


def test_a_run_has_no_dashboard_to_tell_of() -> None:
    executor = DaskExecutor(1)
    try:
        assert executor.dashboard == ""
    finally:
        executor.close()


@pytest.mark.parametrize(
    ("device", "scheduler", "workers"), [("cuda", None, 1), ("cpu", None, None), ("cuda", "tcp://a:1", None)]
)
def test_a_gpu_has_a_worker_of_its_own_also_where_none_was_asked_for(
    device: str, scheduler: str | None, workers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int | None, str | None]] = []

    class Asked:
        def __init__(self, workers: int | None, scheduler: str | None, *_: object) -> None:
            asked.append((workers, scheduler))

        def close(self) -> None:
            """Close nothing."""

    monkeypatch.setattr("wsi_gradcam.executors.dask.DaskExecutor", Asked)
    with open_executor(None, scheduler, make_settings(device=device), None, None) as executor:
        assert isinstance(executor, SerialExecutor) == (device == "cpu")
    assert asked == ([] if device == "cpu" else [(workers, scheduler)])
