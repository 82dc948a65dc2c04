"""The SLURM recipe: what it would submit; and whole runs, and what goes wrong, on a real SLURM of this machine.

Bounds in seconds are for a machine that is busy with other tests; alone most are met in a tenth.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.clusters import printed
from tests.runs import ROOT
from tests.slurm import (
    CONTROLLER,
    CORES,
    GPUS,
    HAS_SLURM,
    NODES,
    Slurm,
    differences,
    driver,
    explaining,
    made_slides,
    ours,
    slurm,
)
from tests.test_pipelines_cluster import option, recipe

SLIDES = 4
REFUSED_S, ENDED_S, STOPPED_S, RUN_S = 60, 120, 40, 400

real = pytest.mark.skipif(not HAS_SLURM, reason="SLURM is not installed: apt-get install slurmctld slurmd slurm-client")

# --- the script ------------------------------------------------------------------------------------------------------


def script(at: Path, *arguments: str) -> tuple[dict[str, str], list[str]]:
    """Directives of the job script, and the words of the worker's command."""
    status, text, said = printed("slurm", at, *arguments)
    assert status == 0, said
    lines = text.splitlines()
    given = [line.removeprefix("#SBATCH ").replace("=", " ").partition(" ") for line in lines if "#SBATCH" in line]
    return {name: value for name, _, value in given}, shlex.split(next(line for line in lines if "--nthreads" in line))


def test_the_script_asks_for_what_a_gpu_worker_needs(tmp_path: Path) -> None:
    asked = ["--partition=gpu", "--gres=gpu:1", "--account=lab", "--hours=8", "--memory=12GiB", "--cpus=6"]
    more = ["--qos=long", "--constraint=a100|h100", "--directive=--nice=10", "--directive=--mail-type=FAIL"]
    directives, worker = script(tmp_path, *asked, *more)
    assert directives == {
        "-J": "wsi-gradcam",
        "-p": "gpu",
        "-A": "lab",
        "-n": "1",
        "--cpus-per-task": "6",
        "--mem": "12G",
        "-t": "08:00:00",
        "--gres": "gpu:1",
        "--qos": "long",
        "--constraint": "a100|h100",
        "--nice": "10",
        "--mail-type": "FAIL",
        "--no-requeue": "",
        "--output": f'"{tmp_path}/slurm-logs/wsi-gradcam-%j.log"',
    }
    assert worker[:3] == [sys.executable, "-m", "distributed.cli.dask_worker"]
    assert option(worker, "--nthreads") == "7"
    assert option(worker, "--memory-limit") == "0"
    assert option(worker, "--resources") == "GPU=1,CPU=3"
    assert option(worker, "--lifetime") == f"{8 * 3600 - 900}s"
    assert "--nanny" in worker
    key = Path(option(worker, "--tls-key"))
    assert (key.name, key.parent.parent) == ("key.pem", tmp_path)
    assert option(worker, "--tls-ca-file") == option(worker, "--tls-cert") == str(key.parent / "certificate.pem")
    assert any(word.startswith("tls://") for word in worker)


def test_printing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    done = recipe("slurm", tmp_path / "here", "--print")
    assert done.returncode == 0
    assert done.stdout.startswith("#!/usr/bin/env bash")
    assert list((tmp_path / "here").iterdir()) == []
    assert not list((tmp_path / "home").rglob("jobqueue.yaml"))


def test_a_worker_without_a_gpu_promises_none(tmp_path: Path) -> None:
    directives, worker = script(tmp_path, "--gres", "lscratch:100")
    assert not {"-p", "-A", "--qos"} & directives.keys()
    assert "--resources" not in worker
    assert option(worker, "--nthreads") == "2"
    assert directives["-t"] == "04:00:00"


@pytest.mark.parametrize(
    ("given", "told", "lifetime"),
    [
        ("0:30:00", "00:30:00", "1350s"),
        ("90", "01:30:00", "4500s"),
        ("10:30", "00:10:30", "473s"),
        ("1-12", "36:00:00", f"{36 * 3600 - 900}s"),
        ("2-0:30", "48:30:00", f"{48 * 3600 + 900}s"),
    ],
)
def test_times_are_read_as_slurm_does(tmp_path: Path, given: str, told: str, lifetime: str) -> None:
    directives, worker = script(tmp_path, "--time", given)
    assert (directives["-t"], option(worker, "--lifetime")) == (told, lifetime)


def test_each_gpu_of_a_job_has_a_worker(tmp_path: Path) -> None:
    for given, count in (("gpu:4", 4), ("gpu:a100:2,lscratch:10", 2), ("gpu:h100=3", 3)):
        worker = script(tmp_path, "--gres", given)[1]
        assert worker[:3] == [sys.executable, str(ROOT / "pipelines/each_gpu.py"), str(count)]


def test_paths_with_spaces_are_kept_whole(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    worker = script(tmp_path / "a b", "--python", "/opt/my env/python")[1]
    assert worker[0] == "/opt/my env/python"
    assert Path(option(worker, "--tls-key")).parent.parent == tmp_path / "a b"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--hours", "0"), "expected a whole number of 1 or more"),
        (("--minimum", "0"), "expected a whole number of 1 or more"),
        (("--minimum", "3"), "--minimum 3 is more than --workers 2"),
        (("--workers", "-3"), "expected a whole number of 1 or more"),
        (("--memory", "lots"), "expected an amount of memory such as 8GiB, not 'lots'"),
        (("--time", "soon"), "expected a time such as 0:30:00"),
        (("--time", "0:0:10"), "expected a time of a minute or more"),
        (("--gres", "gpu:1 --exclusive"), "expected names and numbers"),
        (("--directive=--nice\n--hold",), "expected one line"),
        (("--time", "90", "--hours", "2"), "not allowed with"),
    ],
)
def test_jobs_that_cannot_be_are_refused(tmp_path: Path, wrong: tuple[str, ...], told: str) -> None:
    status, text, said = printed("slurm", tmp_path, *wrong)
    assert (status, text) == (2, "")
    assert told in said


# --- a real SLURM ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(autouse=True)
def emptied(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends what a test has left, whatever became of it."""
    yield
    if "cluster" in request.fixturenames:
        running: Slurm = request.getfixturevalue("cluster")
        (running.folder / "refuse").unlink(missing_ok=True)
        running.said("scancel", "--me")
        running.wait_until_idle(60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides, a model, and its results in this process."""
    return made_slides(tmp_path_factory.mktemp("made"), SLIDES)


@contextmanager
def occupied(running: Slurm) -> Iterator[None]:
    """All cores of all nodes are taken by others' jobs."""
    for _ in NODES:
        running.said("sbatch", "-n", str(CORES), "-J", "other", "-o", "/dev/null", "--wrap", "sleep 600")
    while sorted(running.jobs().values()) != ["RUNNING"] * len(NODES):
        time.sleep(0.1)
    yield
    running.said("scancel", "--me", "-n", "other")


def ever(running: Slurm) -> int:
    """The id of the newest job of all."""
    lines = running.said("squeue", "-h", "-t", "all", "-o", "%i").split()
    return max(map(int, lines), default=0)


def left_behind(at: Path) -> list[str]:
    """Files that a run has left beside its results and logs."""
    return sorted(path.name for path in at.iterdir() if path.name not in {"said", "out", "slurm-logs"})


@real
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (("--partition", "nonesuch"), "Invalid partition name specified"),
        (("--memory", "900GiB"), "Memory specification can not be satisfied"),
        (("--constraint", "nonesuch"), "Invalid feature specification"),
        (("--gres", "gpu:99"), "Requested node configuration is not available"),
    ],
)
def test_a_first_submission_that_fails_ends_with_the_queues_words(
    cluster: Slurm, made: Path, tmp_path: Path, wrong: tuple[str, str], told: str
) -> None:
    with driver(cluster, tmp_path, *wrong, *explaining(made, tmp_path / "out")) as run:
        assert run.wait(REFUSED_S) == 2
        assert "slurm.py: error: sbatch: error: " in run.said
        assert told in run.said
        assert "Traceback" not in run.said
    assert left_behind(tmp_path) == []
    assert ours(cluster) == {}


@real
def test_without_sbatch_it_says_so(cluster: Slurm, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slurm, "environment", {**cluster.environment, "PATH": str(tmp_path)})
    with driver(cluster, tmp_path / "at", *explaining(made, tmp_path / "out")) as run:
        assert run.wait(REFUSED_S) == 2
        assert "sbatch: there is no such command here" in run.said.splitlines()[-1]


@real
@pytest.mark.parametrize("wrong", [("--model", "nonsense"), ("--patch-px", "none"), ("--nonsense",)])
def test_arguments_are_checked_before_anything_is_submitted(
    cluster: Slurm, made: Path, tmp_path: Path, wrong: tuple[str, ...]
) -> None:
    before = ever(cluster)
    with driver(cluster, tmp_path, *explaining(made, tmp_path / "out"), *wrong) as run:
        assert run.wait(REFUSED_S) == 2
    assert ever(cluster) == before
    assert left_behind(tmp_path) == []


@real
def test_jobs_that_can_never_run_are_told_and_end_the_run(cluster: Slurm, made: Path, tmp_path: Path) -> None:
    with driver(cluster, tmp_path, "--partition", "short", *explaining(made, tmp_path / "out")) as run:
        assert run.wait(ENDED_S) == 2
        assert "the jobs can never run: PartitionTimeLimit (its time is above the partition's limit" in run.said
    assert ours(cluster) == {}


@real
def test_jobs_that_die_at_once_end_the_run_with_their_log(cluster: Slurm, made: Path, tmp_path: Path) -> None:
    wrong = ("--workers", "1", "--python", "/nonesuch/python")
    with driver(cluster, tmp_path, *wrong, *explaining(made, tmp_path / "out")) as run:
        assert run.wait(ENDED_S) == 2
        assert run.said.count("/nonesuch/python: No such file or directory") == 3  # once a job
        assert run.said.count("has ended without a worker: FAILED, NonZeroExitCode\n") == 3
        assert "slurm.py: error: 3 jobs in a row ended like this" in run.said
    assert ours(cluster) == {}


@real
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_while_jobs_wait_cancels_them(
    cluster: Slurm, made: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    with occupied(cluster), driver(cluster, tmp_path, *explaining(made, tmp_path / "out")) as run:
        run.until(lambda: "in the queue: Resources" in run.said or "in the queue: Priority" in run.said)
        assert list(ours(cluster).values()) == ["PENDING"] * 2
        run.process.send_signal(number)
        assert run.wait(STOPPED_S) == status
        assert ours(cluster) == {}
        assert left_behind(tmp_path) == []


@real
def test_jobs_that_are_cancelled_while_they_wait_are_told_and_replaced(
    cluster: Slurm, made: Path, tmp_path: Path
) -> None:
    with driver(cluster, tmp_path, "--workers", "1", *explaining(made, tmp_path / "out")) as run:
        with occupied(cluster):
            run.until(lambda: ours(cluster))
            (first,) = ours(cluster)
            cluster.said("scancel", first)
            run.until(lambda: f"job {first} has ended without a worker: CANCELLED" in run.said)
            run.until(lambda: ours(cluster))
            assert first not in ours(cluster)
        assert run.wait(RUN_S) == 0, run.said
    assert differences(tmp_path / "out", made / "serial") == []
    assert ours(cluster) == {}


@pytest.mark.slow
@real
def test_a_later_submission_that_is_refused_is_tried_again(cluster: Slurm, made: Path, tmp_path: Path) -> None:
    with driver(cluster, tmp_path, "--workers", "1", *explaining(made, tmp_path / "out"), slowness_s=0.3) as run:
        run.until(lambda: ours(cluster))
        (first,) = ours(cluster)
        (cluster.folder / "refuse").touch()
        cluster.said("scancel", first)
        run.until(lambda: "a job was not accepted (sbatch: error: no more than one job for you; " in run.said)
        (cluster.folder / "refuse").unlink()
        assert run.wait(RUN_S) == 0, run.said
    assert differences(tmp_path / "out", made / "serial") == []
    assert ours(cluster) == {}


@pytest.mark.slow
@real
def test_workers_that_die_while_the_controller_is_away_are_replaced(cluster: Slurm, made: Path, tmp_path: Path) -> None:
    with driver(cluster, tmp_path, *explaining(made, tmp_path / "out"), slowness_s=0.5) as run:
        run.until(lambda: (tmp_path / "out/slides.csv").exists())
        cluster.kill(CONTROLLER)
        try:
            for process in cluster.steps():
                with suppress(psutil.Error):
                    process.kill()
            run.until(lambda: "the queue does not list its jobs (" in run.said)
        finally:
            cluster.start(CONTROLLER)
        run.until(lambda: "the queue answers again" in run.said)
        assert run.wait(RUN_S) == 0, run.said
        assert re.search(r"job \d+ has ended", run.said)
    assert differences(tmp_path / "out", made / "serial") == []
    assert ours(cluster) == {}


@pytest.mark.slow
@real
def test_a_node_that_crashes_costs_its_job_alone(cluster: Slurm, made: Path, tmp_path: Path) -> None:
    """Its slurmd and its workers are killed at once; SLURM believes for a while that the job runs."""
    with driver(cluster, tmp_path, "--cpus", str(CORES), *explaining(made, tmp_path / "out"), slowness_s=0.5) as run:
        run.until(lambda: (tmp_path / "out/slides.csv").exists())
        try:
            cluster.crash(NODES[0])
            assert run.wait(RUN_S) == 0, run.said
        finally:
            cluster.start(NODES[0])
            cluster.wait_for_nodes()
    assert differences(tmp_path / "out", made / "serial") == []


@pytest.mark.slow
@real
def test_a_driver_that_is_killed_leaves_no_job_for_long(cluster: Slurm, made: Path, tmp_path: Path) -> None:
    with driver(cluster, tmp_path, *explaining(made, tmp_path / "out"), slowness_s=0.5) as run:
        run.until(lambda: (tmp_path / "out/slides.csv").exists())
        run.process.kill()
        run.process.wait()
        cluster.wait_until_idle(STOPPED_S)


@pytest.mark.slow
@real
def test_a_job_of_four_gpus_has_four_workers_each_bound_to_its_own(cluster: Slurm, made: Path, tmp_path: Path) -> None:
    """The GPUs are fake, as far as SLURM is concerned real."""
    out = tmp_path / "out"
    with driver(
        cluster, tmp_path, "--workers", "1", "--gres", f"gpu:{GPUS}", *explaining(made, out), slowness_s=0.3
    ) as run:
        run.until(lambda: len(bound(cluster)) == GPUS)
        assert sorted(bound(cluster)) == [(number, str(number)) for number in range(GPUS)]
        assert len(ours(cluster)) == 1
        assert run.wait(RUN_S) == 0, run.said
    assert differences(out, made / "serial") == []
    assert ours(cluster) == {}


def bound(running: Slurm) -> list[tuple[int, str]]:
    """The number of each worker in its job, and the GPUs that its own process, below the nanny, sees."""
    found = []
    for process in running.steps():
        with suppress(psutil.Error, ValueError):
            words = process.cmdline()
            number = int(words[words.index("--name") + 1].partition(".")[2])  # that of the launcher has none
            workers = [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]
            found += [(number, worker.environ()["CUDA_VISIBLE_DEVICES"]) for worker in workers]
    return found


# Jobs are tended by this program itself, with work that comes and goes, in place of `explain`.
TENDING = """\
import sys, time
import certificates, queues, slurm
from distributed import Client
given, _ = queues.parsed(slurm.Slurm(), "")
def until(what):
    end = time.monotonic() + float(sys.stdin.readline())
    while not what():
        assert time.monotonic() < end
        jobs.tend()
        time.sleep(0.2)
if __name__ == "__main__":
    with (
        certificates.made_for_this_run("") as key,
        queues.scheduler(given) as cluster,
        queues.Jobs(slurm.Slurm(), given, cluster, key) as jobs,
        Client(cluster, set_as_default=False) as client,
    ):
        workers = lambda: len(client.scheduler_info(n_workers=-1)["workers"])
        for step in ("one", "two", "one"):
            work = client.map(time.sleep, [5] * 200, pure=False) if step == "two" else []
            until(lambda: workers() == (2 if step == "two" else 1))
            print(step, flush=True)
            client.cancel(work)
"""


@real
def test_there_are_as_many_jobs_as_there_is_work_for(cluster: Slurm, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TENDING, "--minimum", "1", "--workers", "2", "--cpus", "1", "--memory", "1GiB"]
    environment = {**cluster.environment, "PYTHONPATH": f"{ROOT}/pipelines:{ROOT}"}
    done = subprocess.run(
        command,
        input=f"{ENDED_S}\n" * 3,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=4 * ENDED_S,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line in ("one", "two")] == ["one", "two", "one"]
    assert ours(cluster) == {}
