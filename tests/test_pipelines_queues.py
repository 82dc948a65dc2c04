"""Recipes for PBS, LSF, Grid Engine and HTCondor: what they would submit, and how they read what these answer.

None of the four can be started here; SLURM can, and what it shows of the code that all share is in
`test_pipelines_slurm`. Answers are as the manuals of the four describe them.
"""

from __future__ import annotations

import importlib
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clusters import printed
from tests.runs import ROOT
from tests.test_pipelines_cluster import option

ASKED = ("--gpus", "2", "--account", "lab", "--memory", "8GiB", "--cpus", "4", "--time", "1:30:00")
MARKS = {"pbs": "#PBS ", "lsf": "#BSUB ", "sge": "#$ "}
QUEUES = [*MARKS, "htcondor"]


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their shared module."""
    monkeypatch.syspath_prepend(str(ROOT / "pipelines"))
    return importlib.import_module("queues")


def system(queues: Any, name: str) -> Any:
    """The system of a recipe."""
    module = importlib.import_module(name)
    return next(
        kind()
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, queues.System) and kind is not queues.System
    )


def submitted(name: str, at: Path, *arguments: str) -> list[str]:
    """The lines of what a recipe would submit."""
    status, text, said = printed(name, at, *arguments)
    assert status == 0, said
    assert list(at.iterdir()) == []
    return text.splitlines()


def directives(name: str, at: Path, *arguments: str) -> set[str]:
    """The directives of the job script."""
    mark = MARKS[name]
    return {line.removeprefix(mark) for line in submitted(name, at, *arguments) if line.startswith(mark)}


def test_pbs_is_asked_for_a_chunk(tmp_path: Path) -> None:
    assert directives("pbs", tmp_path, *ASKED, "--queue", "gpuq", "--directive=-m n") == {
        "-N wsi-gradcam",
        "-q gpuq",
        "-A lab",
        "-l select=1:ncpus=4:mem=8192mb:ngpus=2",
        "-l walltime=01:30:00",
        "-j oe",
        f'-o "{tmp_path}/pbs-logs/wsi-gradcam-RUN-1.log"',
        "-r n",
        "-m n",
    }
    assert "-l nodes=1:ppn=4:gpus=2" in directives("pbs", tmp_path, "--resources", "nodes=1:ppn=4:gpus=2")


def test_lsf_is_asked_in_minutes(tmp_path: Path) -> None:
    assert directives("lsf", tmp_path, *ASKED, "--queue", "gpu") == {
        "-J wsi-gradcam",
        "-q gpu",
        '-P "lab"',
        "-n 4",
        '-R "span[hosts=1]"',
        "-M 8589935",  # kB, which LSF takes where lsf.conf says nothing
        "-W 01:30",
        f'-o "{tmp_path}/lsf-logs/wsi-gradcam-RUN-1.log"',
        "-rn",
        '-gpu "num=2"',
    }


def test_grid_engine_is_asked_for_memory_a_core(tmp_path: Path) -> None:
    assert directives("sge", tmp_path, *ASKED, "--queue", "gpu.q", "--pe", "threads") == {
        "-N wsi-gradcam",
        "-q gpu.q",
        "-P lab",
        "-l h_vmem=2048M,gpu=2",
        "-l h_rt=01:30:00",
        "-cwd",
        "-j y",
        "-pe threads 4",
        f'-o "{tmp_path}/sge-logs/wsi-gradcam-RUN-1.log"',
        "-r n",
    }
    assert "-l m_mem_free=2048M,ngpus=1" in directives(
        "sge", tmp_path, "--gpus", "1", "--resources", "m_mem_free=MBM,ngpus=GPUS"
    )


def test_htcondor_is_asked_for_all_in_a_submit_description(tmp_path: Path) -> None:
    lines = submitted("htcondor", tmp_path, *ASKED, "--directive", "Requirements = HasFileTransfer")
    values = dict(line.split(" = ", 1) for line in lines if " = " in line)
    log = f"{tmp_path}/htcondor-logs/wsi-gradcam-RUN-1.log"
    wanted = {
        "RequestCpus": "4",
        "RequestGpus": "2",
        "MY.DaskWorkerMemory": str(8 * 2**30),
        "accounting_group": "lab",
        "Output": log,
        "Error": log,
        "Requirements": "HasFileTransfer",
        "Executable": "/bin/sh",
    }
    assert {key: values[key] for key in wanted} == wanted
    assert lines[-1] == "Queue"
    assert "$(" not in values["Arguments"]  # which HTCondor would replace


@pytest.mark.parametrize("name", QUEUES)
def test_workers_are_started_as_slurms_are(tmp_path: Path, name: str) -> None:
    line = next(line for line in submitted(name, tmp_path, *ASKED) if "--nthreads" in line)
    worker = shlex.split(line.partition("EXIT; ")[2].rstrip("'\"") if name == "htcondor" else line)
    assert worker[:3] == [sys.executable, str(ROOT / "pipelines/each_gpu.py"), "2"]
    assert (option(worker, "--nthreads"), option(worker, "--memory-limit")) == ("7", "0")
    assert (option(worker, "--resources"), option(worker, "--lifetime")) == ("GPU=1,CPU=3", "4500s")
    assert Path(option(worker, "--tls-key")).parent.parent == tmp_path


@pytest.mark.parametrize("name", QUEUES)
def test_a_command_that_is_not_there_is_named(queues: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(queues.QueueError, match=r"q?submit|sub: there is no such command here"):
        queues.asked(system(queues, name).submit, "")


PBS = """\
Job Id: 12.head
    Job_Name = wsi-gradcam
    job_state = Q
    comment = Not Running: Insufficient amount of resource: ngpus (R: 2 A: 0
\t T: 4)

Job Id: 13.head
    Job_Name = wsi-gradcam
    job_state = R

Job Id: 14.head
    job_state = F
    Exit_status = 271
"""
LSF = "12|PEND|-|Job requirements for reserving resource (ngpus_physical) not satisfied\n13|RUN|-|-\n14|EXIT|137|-\n"
SGE = """\
job-ID  prior   name       user         state submit/start at     queue                          slots ja-task-ID
-----------------------------------------------------------------------------------------------------------------
     12 0.00000 wsi-gradca me           qw    11/30/2026 08:00:00                                    4
     13 0.55500 wsi-gradca me           r     11/30/2026 08:00:00 gpu.q@node1                        4
     15 0.00000 wsi-gradca me           Eqw   11/30/2026 08:00:00                                    4
"""
HTCONDOR = "12, 1, undefined\n13, 2, undefined\n14, 3, undefined\n15, 5, Cannot access /home/me, as it is away\n"
PBS_WHY = "Not Running: Insufficient amount of resource: ngpus (R: 2 A: 0 T: 4)"
LSF_WHY = "Job requirements for reserving resource (ngpus_physical) not satisfied"


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("pbs", PBS, {"12.head": ("waits", PBS_WHY), "13.head": ("runs", ""), "14.head": ("over", "exit status 271")}),
        ("lsf", LSF, {"12": ("waits", LSF_WHY), "13": ("runs", ""), "14": ("over", "EXIT, exit status 137")}),
        ("sge", SGE, {"12": ("waits", ""), "13": ("runs", ""), "15": ("waits", "Eqw: it could not be started")}),
        (
            "htcondor",
            HTCONDOR,
            {
                "12": ("waits", ""),
                "13": ("runs", ""),
                "14": ("over", ""),
                "15": ("waits", "held: Cannot access /home/me, as it is away"),
            },
        ),
    ],
)
def test_answers_are_read(queues: Any, name: str, text: str, told: dict[str, tuple[str, str]]) -> None:
    found = system(queues, name).answer(text)
    assert found.keys() == told.keys()
    for number, (state, words) in told.items():
        assert found[number].state == state
        assert found[number].words.startswith(words)
        assert bool(found[number].words) == bool(words)


@pytest.mark.parametrize(
    ("name", "answer", "number"),
    [
        ("pbs", "12.head.cluster\n", "12.head.cluster"),
        ("lsf", "Job <12> is submitted to queue <gpu>.\n", "12"),
        ("sge", "12\n", "12"),
        ("htcondor", "Submitting job(s).\n1 job(s) submitted to cluster 12.\n", "12"),
    ],
)
def test_ids_of_jobs_are_read(queues: Any, name: str, answer: str, number: str) -> None:
    found = queues.re.search(system(queues, name).job_id, answer)
    assert found
    assert found[1] == number


@pytest.mark.parametrize(
    ("name", "words"), [("pbs", "qstat: Unknown Job Id 12.head"), ("lsf", "Job <12> is not found"), ("slurm", "")]
)
def test_jobs_that_the_queue_has_forgotten_are_no_error(queues: Any, name: str, words: str) -> None:
    forgotten = system(queues, name).forgotten
    command = ["sh", "-c", f"echo others; echo '{words}' >&2; exit 1"]
    if words:
        assert queues.asked(command, forgotten=forgotten) == "others\n"
    else:
        with pytest.raises(queues.QueueError, match="sh: others"):
            queues.asked(command, forgotten=forgotten)


# --- a worker for each GPU -------------------------------------------------------------------------------------------

SHOW = "import os, sys; print(sys.argv[1:], os.environ['CUDA_VISIBLE_DEVICES'])"
STAY = "import sys, time; print('ready', flush=True); time.sleep(60)"


def each_gpu(count: int, code: str, devices: str | None = None) -> subprocess.Popen[str]:
    """The launcher, with a program in place of the worker."""
    environment = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    command = [sys.executable, str(ROOT / "pipelines/each_gpu.py"), str(count), "-c", code, "--name", "7"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize(
    ("devices", "seen"), [("2,5", ["2", "5"]), ("GPU-aa,MIG-bb", ["GPU-aa", "MIG-bb"]), (None, ["0", "1"])]
)
def test_each_worker_sees_its_own_gpu(devices: str | None, seen: list[str]) -> None:
    with each_gpu(2, SHOW, devices) as process:
        out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    shown = sorted(line for line in out.splitlines() if line.startswith("["))
    assert shown == [f"['--name', '7.{number}'] {device}" for number, device in enumerate(seen)]


def test_another_number_of_gpus_than_asked_for_is_refused() -> None:
    with each_gpu(4, SHOW, "0,1") as process:
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "expected 4 GPUs, and CUDA_VISIBLE_DEVICES is '0,1'" in said


def test_workers_end_with_their_job() -> None:
    with each_gpu(2, STAY) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(4)]
        assert lines.count("ready") == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
