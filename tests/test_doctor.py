"""What `wsi-gradcam doctor` finds: here, in the folder of the results, and on workers; each failure is a real one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from distributed import Client, LocalCluster

from tests import cli_runs
from tests.cli_runs import Run, only_error
from tests.runs import ROOT, toy_file
from wsi_gradcam import doctor
from wsi_gradcam.cam import auto as remembered
from wsi_gradcam.doctor import FAIL, OK, WARN, Check, checks, worst
from wsi_gradcam.doctor.checks import examine
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.patch_store import PatchStore
from wsi_gradcam.slides import openslide_reader
from wsi_gradcam.system import processes

run = cli_runs.run  # a fixture


def by_name(checks: Iterator[Check]) -> dict[str, Check]:
    found: dict[str, Check] = {}
    for one in checks:
        assert one.name not in found or one.status != OK
        found[one.name] = one
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks of this process."""
    monkeypatch.setattr("wsi_gradcam.doctor.checks.check_machine", lambda: iter(()))


# --- this process ----------------------------------------------------------------------------------------------------


def test_a_good_machine_passes_and_is_left_as_it_was(run: Run, tmp_path: Path) -> None:
    code, out, err = run("doctor", "--out", tmp_path / "new" / "out", "--model", toy_file(tmp_path, "pooled_linear"))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert not [line for line in lines if line.startswith("fail")]
    assert f"  ok  torch: {metadata.version('torch')}" in lines
    assert "  ok  codec jpeg2000: a tile was decoded" in lines
    assert "  ok  model: pooled_linear loads" in lines
    assert "  ok  OUT: arrays: written and read back" in lines
    assert [path.name for path in tmp_path.iterdir()] == ["pooled_linear.yaml"]


def test_json_says_the_same(run: Run, quick: None, tmp_path: Path) -> None:
    code, out, _ = run("doctor", "--out", tmp_path, "--json")
    told = json.loads(out)
    assert (code, [Check(**one).name for one in told["checks"]][:2]) == (0, ["OUT: arrays", "OUT: rename"])
    assert told["status"] in (OK, WARN)


def test_wrong_usage_is_told_before_any_check(run: Run, tmp_path: Path) -> None:
    code, out, err = run("doctor", "--out", "https://host/out")
    assert (code, out) == (2, "")
    assert "expected a folder, or s3://BUCKET/KEY" in only_error(err)
    code, out, err = run("doctor", "--model", tmp_path / "none.yaml")
    assert (code, out) == (2, "")
    assert "none.yaml" in only_error(err)


@pytest.mark.parametrize(
    ("installed", "status", "mend"),
    [("0.1", FAIL, "pip install 'torch>=2.6'"), (None, FAIL, "pip install 'torch>=2.6'"), ("99.0rc1", OK, "")],
)
def test_versions_are_compared_with_what_the_package_asks_for(
    installed: str | None, status: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "version_of", lambda name: installed)
    (found,) = checks._package("torch")
    assert (found.status, found.mend) == (status, mend)


@pytest.mark.parametrize("name", doctor.OPTIONAL)
def test_packages_of_extras_may_be_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "version_of", lambda name: None)
    (found,) = checks._package(name)
    extra, needed_for = doctor.OPTIONAL[name]
    assert found.status == OK
    assert found.found == f"not installed; {needed_for}"
    assert found.mend == f"pip install 'wsi-gradcam[{extra}]', if you want it"
    brought = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(requirement.startswith(f"{name}>=") for requirement in brought[extra])


def test_an_old_python_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    (found,) = checks._python()
    assert (found.status, found.mend) == (FAIL, "create an environment with Python >=3.11")


def test_every_package_that_is_checked_is_one_that_is_asked_for() -> None:
    asked = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in (*doctor.PACKAGES, *doctor.OPTIONAL):
        assert f'"{name}>=' in asked


def test_threads_beyond_the_cores_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    (found,) = checks._cpu()
    assert (found.status, found.mend) == (WARN, "more threads than cores are slow: --torch-threads 1")


def test_what_the_processor_can_do_is_read_from_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor: 0\nflags\t: fpu amx_bf16 sse avx512_bf16\n", encoding="utf-8")
    assert doctor.low_precision(tmp_path / "cpuinfo") == ["avx512_bf16", "amx_bf16"]
    (tmp_path / "cpuinfo").write_text("Features: neon\n", encoding="utf-8")
    assert doctor.low_precision(tmp_path / "cpuinfo") == []
    assert doctor.low_precision(tmp_path / "none") == []
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processes.cores() == os.cpu_count()


def test_gpus_are_named_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda n: SimpleNamespace(name="L4", total_memory=24 << 30)
    )
    monkeypatch.setattr(torch.cuda, "device", lambda n: ExitStack())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    cuda, mps = checks._gpu()
    assert (cuda.status, cuda.found) == (OK, "cuda:0 L4, 24.0 GiB, bfloat16: no")
    assert (mps.status, mps.found) == (OK, "mps, bfloat16: yes")


@pytest.mark.parametrize(("built", "told"), [("13.0", "built for CUDA 13.0"), (None, "built without CUDA")])
def test_a_driver_without_a_gpu_for_torch_is_told(
    built: str | None, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable() -> bool:
        warnings.warn("the driver is\n too old", stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(checks, "NVIDIA", tmp_path)
    (found,) = checks._gpu()
    assert found.status == WARN
    assert told in found.found
    assert found.found.endswith("the driver is too old")
    monkeypatch.setattr(checks, "NVIDIA", tmp_path / "none")
    (found,) = checks._gpu()
    assert (found.status, found.found) == (OK, "none; the model runs on the CPU")


def test_a_codec_that_is_missing_fails_and_the_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*data: Any, **options: Any) -> None:
        raise imagecodecs.DelayedImportError("zstd_decode")

    monkeypatch.setattr(tifffile.TIFF.DECOMPRESSORS, "_codecs", {})  # decoders found before are kept there
    monkeypatch.setattr(imagecodecs, "zstd_decode", missing)
    found = {codec: worst(doctor.run_check(codec, checks._codec, codec)) for codec in checks.CODECS}
    assert {codec: status for codec, status in found.items() if status != OK} == {"zstd": FAIL}


def test_a_codec_that_decodes_wrongly_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = imagecodecs.lzw_decode
    monkeypatch.setattr(tifffile.TIFF.DECOMPRESSORS, "_codecs", {})
    monkeypatch.setattr(imagecodecs, "lzw_decode", lambda data, **options: bytes(len(decode(data, **options))))
    (found,) = checks._codec("lzw")
    assert (found.status, found.found) == (FAIL, "decoded values are off by up to 189 from the true values")


def test_openslide_really_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = checks._openslide()
    assert (found.status, found.found) == (OK, f"library {openslide_reader.library_version()}, a slide was read")
    white = np.full((64, 64, 3), 255, np.uint8)
    monkeypatch.setattr(openslide_reader.OpenSlideSlide, "read_level", lambda *arguments: white)
    (found,) = checks._openslide()
    assert (found.status, found.found.rpartition(" ")[2]) == (FAIL, "wrong")


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(remembered, "cache_file", lambda: tmp_path / "file" / "engines.json")
    (found,) = checks._choices()
    assert found.status == WARN
    assert "XDG_CACHE_HOME" in found.mend


def test_a_broken_installation_does_not_stop_the_other_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = by_name(checks.check_machine())
    assert (found["CPU"].status, found["GPU"].status, found["codec zstd"].status) == (FAIL, FAIL, OK)
    assert "torch" in found["CPU"].found


def test_a_model_that_does_not_load_fails(run: Run, quick: None, tmp_path: Path) -> None:
    code, out, _ = run("doctor", "--model", toy_file(tmp_path, "gone", source="tests.toy_models:gone"))
    assert code == 1
    assert out.startswith("fail  model: ")


# --- the folder of the results ---------------------------------------------------------------------------------------


def test_an_out_below_a_file_fails(run: Run, quick: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, _ = run("doctor", "--out", tmp_path / "file" / "out")
    assert code == 1
    assert out.startswith("fail  OUT: ")
    assert "there is a file where a folder is needed" in out
    assert (tmp_path / "file").exists()


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that even root cannot write")
def test_an_out_that_is_read_only_fails(quick: None) -> None:
    (found,) = examine(out="/sys/wsi-gradcam")
    assert found.status == FAIL
    assert found.found.startswith("/sys/wsi-gradcam: cannot write: ")


def test_what_is_there_already_stays(quick: None, tmp_path: Path) -> None:
    (tmp_path / "slides.csv").write_text("a row", encoding="utf-8")
    assert {one.status for one in examine(out=str(tmp_path))} <= {OK, WARN}
    assert [path.name for path in tmp_path.iterdir()] == ["slides.csv"]
    assert (tmp_path / "slides.csv").read_text(encoding="utf-8") == "a row"


def test_a_store_that_forgets_fails(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatchStore, "write_span", lambda *arguments: None)
    assert by_name(examine(out=str(tmp_path)))["OUT: arrays"].status == FAIL


def test_a_full_disk_fails_with_its_mend(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    found = by_name(examine(out=str(tmp_path)))["OUT"]
    assert found.status == FAIL
    assert "the disk is full; free space" in found.found


def test_renames_that_are_seen_in_the_old_file_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks._rename(tmp_path).status == OK
    monkeypatch.setattr(os, "replace", lambda source, target: shutil.copyfile(source, target))
    assert checks._rename(tmp_path).status == WARN


def test_file_systems_without_locks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    assert checks._locks(tmp_path).status == OK
    monkeypatch.setattr("fcntl.flock", unknown)
    assert checks._locks(tmp_path).found == "no locks: OSError: [Errno 95] not supported"
    monkeypatch.setattr("fcntl.flock", lambda *arguments: None)
    assert (checks._locks(tmp_path).status, checks._locks(tmp_path).found) == (WARN, "a file could be locked twice")


class Usage(NamedTuple):
    free: int


@pytest.mark.parametrize(
    ("gib", "inodes", "left", "status", "found"),
    [
        (100, 10**9, 10**8, OK, "100.0 GiB free, room for 100,000,000 more files"),
        (1, 10**9, 10**8, WARN, "1.0 GiB free, room for 100,000,000 more files"),
        (100, 10**9, 10, WARN, "100.0 GiB free, room for 10 more files"),
        (100, 0, 0, OK, "100.0 GiB free"),  # btrfs and many network file systems do not count files
    ],
)
def test_little_space_is_told(
    gib: int, inodes: int, left: int, status: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(gib << 30))
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_files=inodes, f_favail=left))
    one = checks._space(tmp_path)
    assert (one.status, one.found) == (status, found)


def worker(**changes: Any) -> doctor.WorkerFacts:
    """The environment of a worker that differs from this process in some values."""
    return cast(doctor.WorkerFacts, {**doctor.facts(), "out": "", "model": "", **changes})


# --- the cluster -----------------------------------------------------------------------------------------------------


@contextmanager
def dask_cluster(**options: Any) -> Iterator[str]:
    """A scheduler in this process, and workers in processes of their own unless told otherwise."""
    values = {"n_workers": 1, "threads_per_worker": 2, "memory_limit": 0, "host": "127.0.0.1", **options}
    with LocalCluster(**values, dashboard_address="127.0.0.1:0", silence_logs=50) as started:
        yield str(started.scheduler_address)


@contextmanager
def foreign_worker(address: str, at: Path, *arguments: str, **environment: str) -> Iterator[None]:
    """A worker that a user started, with other files or packages."""
    with subprocess.Popen(
        [sys.executable, "-m", "dask", "worker", address, "--no-nanny", "--no-dashboard", *arguments],
        cwd=at,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            with Client(address, set_as_default=False) as client:
                client.wait_for_workers(1, timeout=60)
            yield
        finally:
            process.kill()


def test_a_good_cluster_passes(run: Run, quick: None, tmp_path: Path) -> None:
    with dask_cluster(n_workers=2) as address:
        out = tmp_path / "out"
        code, told, _ = run("doctor", "--scheduler", address, "--out", out, "--model", "oral-tumour", "--json")
    checks = {one["name"]: (one["status"], one["found"]) for one in json.loads(told)["checks"]}
    assert code == 0
    assert checks["workers"] == (OK, "2 workers, 4 threads, no memory limits, resource GPU on 0")
    assert checks["workers' versions"] == (OK, "the same as here on all 2")
    assert checks["workers' OUT"] == (OK, "read and written by all 2")
    assert checks["workers' model"] == (OK, "oral-tumour loads on all 2")
    assert not out.exists()


def test_workers_with_other_files_of_the_program_are_named(quick: None, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "wsi_gradcam", tmp_path / "wsi_gradcam", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "wsi_gradcam" / "stitch.py").open("a", encoding="utf-8") as file:
        file.write("# another version\n")
    with dask_cluster(n_workers=0) as address, foreign_worker(address, tmp_path, PYTHONPATH=str(tmp_path)):
        found = by_name(examine(scheduler=address))["workers' versions"]
    assert found.status == FAIL
    here, there = (doctor.files_digest(at / "wsi_gradcam")[:12] for at in (ROOT, tmp_path))
    assert found.found.endswith(f": files of wsi_gradcam {there} (here {here})")
    assert "constraints.txt" in found.mend


def test_workers_with_another_version_of_a_package_are_named(quick: None, tmp_path: Path) -> None:
    (tmp_path / "zarr-3.0.1.dist-info").mkdir()
    (tmp_path / "zarr-3.0.1.dist-info" / "METADATA").write_text("Name: zarr\nVersion: 3.0.1\n", encoding="utf-8")
    paths = os.pathsep.join((str(tmp_path), str(ROOT)))
    with dask_cluster(n_workers=0) as address, foreign_worker(address, tmp_path, PYTHONPATH=paths):
        found = by_name(examine(scheduler=address))["workers' versions"]
    assert found.status == FAIL
    assert found.found.endswith(f": zarr 3.0.1 (here {metadata.version('zarr')})")


def test_workers_without_the_program_are_named(quick: None, tmp_path: Path) -> None:
    (tmp_path / "wsi_gradcam.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    with dask_cluster(n_workers=0) as address, foreign_worker(address, tmp_path, PYTHONPATH=str(tmp_path)):
        found = by_name(examine(scheduler=address))
    assert found["workers' answers"].status == FAIL
    assert "not here" in found["workers' answers"].found
    assert "workers' versions" not in found


def test_a_model_only_this_machine_knows_fails(quick: None, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "only_here.py").write_text(
        "from tests.toy_models import pooled_linear as build\n", encoding="utf-8"
    )
    spec = toy_file(tmp_path, "mine", source="only_here:build")
    with dask_cluster() as address, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path / "code")
        found = by_name(examine(scheduler=address, model=str(spec)))
    assert (found["model"].status, found["workers' model"].status) == (OK, FAIL)
    assert "only_here" in found["workers' model"].found


def test_weak_workers_are_told(quick: None) -> None:
    with dask_cluster(
        threads_per_worker=1, memory_limit="500MiB", resources={"GPU": 1}, processes=False, protocol="tcp://"
    ) as address:
        checks = list(examine(scheduler=address))
    found = {(one.name, one.status): one.found for one in checks}
    assert found["workers", OK] == "1 workers, 1 threads, 0.5 GiB or more each, resource GPU on 1"
    assert found["workers", WARN] == "some have only one thread"
    assert found["workers' memory", WARN].endswith(": 0.5 GiB")
    assert found["workers' GPUs", WARN].endswith(": has resource GPU, but torch finds no GPU")
    assert worst(checks) == WARN


def test_an_out_that_cannot_be_written_is_told_once(quick: None, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with dask_cluster(processes=False, protocol="tcp://") as address:
        checks = list(examine(out=str(tmp_path / "file"), scheduler=address))
    assert [one.name for one in checks if one.status == FAIL] == ["OUT"]
    assert "workers" in {one.name for one in checks}


def test_a_cluster_without_workers_fails(quick: None) -> None:
    with dask_cluster(n_workers=0) as address:
        checks = list(examine(scheduler=address))
    assert [(one.name, one.status) for one in checks] == [("scheduler", OK), ("workers", FAIL)]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://host", "tcp://no.such.host.invalid:8786"])
def test_a_dead_scheduler_fails_in_time(address: str, run: Run, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from wsi_gradcam.executors import dask as dask_executor

    ask: Callable[..., Any] = dask_executor.ask_workers
    monkeypatch.setattr(dask_executor, "ask_workers", lambda *arguments: ask(*arguments, timeout_s=1))
    code, out, _ = run("doctor", "--scheduler", address)
    assert code == 1
    assert out.startswith(f"fail  scheduler: no Dask scheduler answers at {address}: ")


def test_a_folder_of_the_same_name_elsewhere_is_not_shared(tmp_path: Path) -> None:
    assert "No such file" in doctor.inspect_worker(storage_path(tmp_path / "probe"), "token", None)["out"]
    (tmp_path / "probe").write_text("other", encoding="utf-8")
    assert (
        "does not contain what was written"
        in doctor.inspect_worker(storage_path(tmp_path / "probe"), "token", None)["out"]
    )
    blind = checks._shared(storage_path(tmp_path), {"tcp://a": worker(out="No such file")}, 0)
    assert (blind.status, blind.found) == (FAIL, "tcp://a: No such file")
    workers = {f"tcp://{n}": worker(pid=n) for n in range(3)}
    unseen = checks._shared(storage_path(tmp_path), workers, 2)
    assert (unseen.status, unseen.found) == (FAIL, "files of 1 workers cannot be seen here")


def test_what_must_be_equal_between_processes() -> None:
    here = doctor.facts()
    torch_version = f"{(here['versions']['torch'] or '').partition('+')[0]}+cu999"
    other = worker(python=here["python"] + "1", host="elsewhere", versions={**here["versions"], "torch": torch_version})
    assert doctor.differences(here, other) == {}
    other["versions"]["openvino"] = None
    assert list(doctor.differences(here, other)) == ["openvino"]
    assert checks._versions({"tcp://a": other}).status == WARN
    other["python"] = "3.99.1"
    assert checks._versions({"tcp://a": other}).status == FAIL


def test_many_workers_with_one_trouble_are_not_all_listed() -> None:
    found = checks._problem("name", WARN, {f"tcp://{n}": "bad" for n in range(8)}, "mend")
    assert found.found.endswith("tcp://4: bad; and 3 more")


def test_checks_are_ranked() -> None:
    ok, warn, fail = (Check("a", status, "found") for status in (OK, WARN, FAIL))
    assert worst([ok, fail, warn]) == FAIL
    assert worst([warn, ok]) == WARN
    assert worst([]) == OK
    assert doctor.format_check(Check("a", FAIL, "found", "mend")) == "fail  a: found -> mend"
