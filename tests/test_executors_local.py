"""Workers on this machine: what each is given. No GPU is here: lists of devices are made up, nothing runs on one."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import dask
import pytest
from dask.system import CPU_COUNT
from distributed.system import MEMORY_LIMIT

from tests.runs import SMALL, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam.errors import WorkerError
from wsi_gradcam.executors.dask import DaskExecutor, local
from wsi_gradcam.executors.serial import SerialExecutor
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.run.plan import plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.run.workload import ExplainWorkload


class FakeCluster:
    """Stands in for a cluster, and keeps what it was made with."""

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        self.made.append({**options, "terminate": dask.config.get("distributed.worker.memory.terminate")})

    def __enter__(self) -> FakeCluster:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What clusters are made with."""
    FakeCluster.made = []
    monkeypatch.setattr(local, "LocalCluster", FakeCluster)
    monkeypatch.setattr(local, "SpecCluster", FakeCluster)
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
    with local.local_cluster(workers, device):
        pass


def test_cores_and_memory_are_shared(made: list[dict[str, Any]]) -> None:
    start(4, "cpu")
    (options,) = made
    assert (options["n_workers"], options["threads_per_worker"]) == (4, 2)
    assert options["memory_limit"] == MEMORY_LIMIT // 4
    assert options["terminate"] == 0.95
    assert "resources" not in options
    assert dask.config.get("distributed.worker.memory.pause") is not False  # only while the cluster is there


@pytest.mark.usefixtures("four_gpus")
def test_each_worker_has_a_gpu_of_its_own(made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "find_spec", lambda name: None)
    start(3, "cuda")
    workers = [worker["options"] for worker in made[0]["workers"].values()]
    assert [worker["env"] for worker in workers] == [{"CUDA_VISIBLE_DEVICES": str(i)} for i in range(3)]
    assert all(worker["resources"] == {"GPU": 1, "CPU": 3} for worker in workers)
    assert all(worker["nthreads"] == 4 for worker in workers)
    assert all(worker["memory_limit"] == MEMORY_LIMIT // 3 for worker in workers)


@pytest.mark.usefixtures("four_gpus")
def test_dask_cuda_is_used_where_it_is_installed(made: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("dask_cuda")
    module.LocalCUDACluster = FakeCluster
    monkeypatch.setitem(sys.modules, "dask_cuda", module)
    monkeypatch.setattr(local, "find_spec", lambda name: name)
    start(2, "cuda")
    (options,) = made
    assert options["CUDA_VISIBLE_DEVICES"] == ["0", "1"]
    assert options["resources"] == {"GPU": 1, "CPU": 3}


@pytest.mark.usefixtures("four_gpus", "made")
def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(WorkerError, match=r"--workers 5 .*but there are 4 \(0, 1, 2, 3\); give --workers 4"):
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
    assert local.visible_gpus() == gpus


@pytest.mark.usefixtures("four_gpus")
def test_a_named_device_stays_as_it_is(made: list[dict[str, Any]]) -> None:
    """With --device cuda:1 all workers share that one."""
    start(2, "cuda:1")
    (options,) = made
    assert options["n_workers"] == 2
    assert options["resources"] == {"GPU": 1, "CPU": 3}


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
