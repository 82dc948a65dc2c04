"""Every command ends with the right status and one line, leaves no thread, and minds closed and full streams."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image

from tests import cli_runs
from tests.audits import QUICK
from tests.cli_runs import SMALL_FLAGS, Run
from tests.runs import ROOT
from wsi_gradcam import audit_run, open_result
from wsi_gradcam.cli.main import COMMANDS

run, made, finished = cli_runs.run, cli_runs.made, cli_runs.finished  # fixtures

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors and cores as Linux has them")


@pytest.fixture(scope="module")
def audited(finished: Path) -> Path:
    """The results with a finished audit, and a mask of them with the values 0 and 1."""
    audit_run(finished, **{**QUICK, "patches": 8, "only": ["saturation"]})
    height, width = open_result(finished)["a.tif"].size_px
    values = np.zeros((height, width), np.uint8)
    values[:, : width // 2] = 1
    Image.fromarray(values).save(finished.parent / "mask.png")
    return finished


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A port that is in use."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        yield bound.getsockname()[1]


# Arguments, and the status: 2 where nothing could start, 1 where the work failed.
FAILURES: dict[str, tuple[str, int]] = {
    "explain nothing": ("explain", 2),
    "explain a slide that is not there": ("explain {made}/none.tif --model {model} --out {new}", 2),
    "explain a class that is not there": ("explain {made}/slides --model {model} --out {new} --target tumor", 2),
    "explain where another run's results are": ("explain {made}/slides --model {other} --out {out} {small}", 2),
    "explain a slide that is none": ("explain {made}/bad.tif --model {model} --out {new} {small}", 1),
    "encode a slide that is not there": ("encode {made}/none.tif --model {model} --out {new}", 2),
    "audit nothing": ("audit {made}/none", 2),
    "evidence of nothing": ("evidence {made}/none", 2),
    "evidence of a class that was not explained": ("evidence {out} --target nothing", 2),
    "evidence with a model that is another": ("evidence {out} --model {other}", 2),
    "audit with a value that no mask has": ("audit {out} --annotations {made}/mask.png --include 2", 2),
    "audit with another seed": ("audit {out} --patches 8 --only saturation --seed 4", 2),
    "audit a class that was not explained": ("audit {out} --target nothing", 2),
    "audit with a model that is another": ("audit {out} --model {other} --overwrite", 2),
    "audit with no such question": ("audit {out} --only why", 2),
    "audit on workers, with a mistake": ("audit {out} --annotations {made}/mask.png --include 2 --workers 2", 2),
    "export nothing": ("export {made}/none --to png", 2),
    "export no such slide": ("export {out} --to png --slide none", 2),
    "export below a file": ("export {out} --to png --dest {made}/file", 2),
    "export no such channel": ("export {out} --to png --channel none", 2),
    "view nothing": ("view {made}/none", 2),
    "view at a port in use": ("view {out} --port {port}", 2),
    "view with slides that are not there": ("view {out} --slides {made}/none", 2),
    "validate nothing": ("validate {made}/none", 2),
    "status of nothing": ("status {made}/none", 2),
    "info about nothing": ("info", 2),
    "info about a slide that is none": ("info {made}/bad.tif", 2),
    "info about no such model": ("info --model none", 2),
    "demo of a slide that is not there": ("demo {made}/none.tif --out {new}", 2),
    "card of another model": ("card {other} {out} --dest {new}", 2),
    "card of nothing": ("card {model} {made}/none --dest {new}", 2),
    "doctor of a model that is not there": ("doctor --model none", 2),
}
THEIRS = ("zarr_io", "asyncio_")  # Zarr's own, which it ends when Python does


def arguments_of(name: str, made: Path, out: Path, port: int, new: Path) -> list[str]:
    places = {"made": made, "model": made / "pooled_linear.yaml", "other": made / "other_linear.yaml"}
    small = " ".join(SMALL_FLAGS)
    return FAILURES[name][0].format(**places, out=out, port=port, new=new, small=small).split()


@pytest.fixture(autouse=True, scope="module")
def bad(made: Path) -> None:
    (made / "bad.tif").write_bytes(b"no slide")


def threads() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if not one.name.startswith(THEIRS)}


def test_all_commands_are_tried() -> None:
    assert {text.split()[0] for text, _ in FAILURES.values()} == set(COMMANDS)


@pytest.mark.parametrize("name", FAILURES)
def test_a_command_that_fails_leaves_no_thread(
    run: Run, made: Path, audited: Path, port: int, tmp_path: Path, name: str
) -> None:
    before = threads()
    code, out, err = run(*arguments_of(name, made, audited, port, tmp_path / "new"))
    assert code == FAILURES[name][1]
    assert threads() - before == set()
    if FAILURES[name][1] == 2:
        assert [line[:7] for line in err.splitlines()] == ["error: "]
        assert "Traceback" not in out


def ended(*arguments: str, **streams: int | IO[bytes] | None) -> subprocess.CompletedProcess[bytes]:
    """Run `wsi-gradcam ARGUMENTS` on one core."""
    process: subprocess.CompletedProcess[bytes] = subprocess.run(
        ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-m", "wsi_gradcam.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "WSI_GRADCAM_TRUST_CODE": "1"},
        timeout=120,
        check=False,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},  # type: ignore[call-overload]
    )
    return process


@pytest.mark.parametrize(
    "name",
    [
        "audit with a value that no mask has",
        "audit with another seed",
        "audit with a model that is another",
        "explain where another run's results are",
        "export no such channel",
        "view at a port in use",
    ],
)
def test_a_command_that_fails_ends_on_one_core_with_its_status(
    made: Path, audited: Path, port: int, tmp_path: Path, name: str
) -> None:
    for _ in range(3 if "mask" in name else 1):
        process = ended(*arguments_of(name, made, audited, port, tmp_path / "new"))
        assert process.returncode == FAILURES[name][1], process.stderr
        assert {line[:7] for line in process.stderr.splitlines()} == {b"error: "}


def scripted(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True, check=False)


def test_reading_a_table_starts_no_thread(finished: Path) -> None:
    """Those of Arrow are never ended, and aborted processes that ended soon after a table was read."""
    script = (
        "import os, sys\n"
        "import pyarrow, pandas\n"
        "from wsi_gradcam import open_result\n"
        "slide = open_result(sys.argv[1])['a.tif']\n"
        "slide.plan\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "slide.table(), slide.patches, list(slide.table_batches(2))\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    process = scripted(script, finished)
    assert process.stdout == "0\n", process.stderr


ABORTS = """
import atexit, ctypes, os, sys, threading
from wsi_gradcam.cli.main import main
at_exit = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)(lambda status, given: os.abort())
ctypes.CDLL(None).on_exit(at_exit, None)
atexit.register(print, "last words")
threading.Timer(0.5, print, ["a thread's"]).start()
main()
"""


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["explain"], 2), (["info", "/none"], 2)])
def test_libraries_that_abort_at_the_end_change_no_status(arguments: list[str], status: int) -> None:
    """A library's destructor, here a function of ours, calls abort(); what Python does at the end is done before."""
    process = scripted(ABORTS, *arguments)
    assert process.returncode == status
    assert process.stdout.endswith("last words\n")
    assert "a thread's\n" in process.stdout


# --- streams that are closed, unread or full -------------------------------------------------------------------------

CLOSED: dict[str, tuple[int, ...]] = {"in": (0,), "out": (1,), "error": (2,), "out and error": (1, 2), "all": (0, 1, 2)}
SHUT = [name if name in ("in", "all") else pytest.param(name, marks=pytest.mark.slow) for name in CLOSED]


def closing(descriptors: tuple[int, ...], arguments: list[str], **environment: str) -> int:
    script = " ".join([*(f"'{each}'" for each in arguments), *(f"{number}>&-" for number in descriptors)])
    command = ["sh", "-c", f"exec '{sys.executable}' -m wsi_gradcam.cli {script}"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False, timeout=120).returncode


@pytest.mark.parametrize("name", SHUT)
def test_explaining_with_closed_streams_is_explaining(made: Path, tmp_path: Path, name: str) -> None:
    arguments = [str(made / "slides"), "--model", str(made / "pooled_linear.yaml"), "--out", str(tmp_path / "out")]
    assert closing(CLOSED[name], ["explain", *arguments, *SMALL_FLAGS, "--trust-code"]) == 0
    assert {slide.status for slide in open_result(tmp_path / "out")} == {"ok"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"patches, " in path.read_bytes()[:200]]


@pytest.mark.parametrize("name", SHUT)
def test_other_commands_work_with_closed_streams(audited: Path, made: Path, tmp_path: Path, name: str) -> None:
    dest = tmp_path / "dest"
    assert closing(CLOSED[name], ["export", str(audited), "--to", "png", "--dest", str(dest), "--window", "slide"]) == 0
    assert len(list(dest.rglob("*.png"))) >= 2
    assert closing(CLOSED[name], ["info", str(made / "slides" / "a.tif"), "--json"]) == 0
    assert closing(CLOSED[name], ["audit", str(audited), "--seed", "-1"]) == 2


def printing(audited: Path, made: Path, tmp_path: Path) -> list[list[str]]:
    """Commands that print."""
    out, slide, model = str(audited), str(made / "slides" / "a.tif"), str(made / "pooled_linear.yaml")
    return [
        ["explain", slide, "--model", model, "--out", str(tmp_path / "out"), *SMALL_FLAGS],
        ["explain", slide, "--model", model, "--out", str(tmp_path / "out"), *SMALL_FLAGS, "--dry-run"],
        ["audit", out, "--patches", "8", "--only", "saturation", "--seed", "3", "--json"],
        ["export", out, "--to", "png", "--dest", str(tmp_path / "dest"), "--window", "slide", "--overwrite"],
        ["info", slide],
        ["status", out],
        ["validate", out],
        ["view", out, "--port", "0"],
        ["--version"],
        ["explain", "--help"],
    ]


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
def test_a_pipe_that_nobody_reads_ends_as_a_signal_would(
    audited: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbuffered: str
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    for arguments in printing(audited, made, tmp_path)[:: 3 if unbuffered else 1]:
        read, write = os.pipe()
        os.close(read)
        process = ended(*arguments, stdout=write)
        os.close(write)
        assert (arguments[0], process.returncode) == (arguments[0], 141)
        assert b"Traceback" not in process.stderr
        assert b"Broken" not in process.stderr
    assert {slide.status for slide in open_result(tmp_path / "out")} == {"ok"}
    assert unbuffered or list((tmp_path / "dest").rglob("*.png"))


def test_a_full_disk_at_standard_output_is_told_in_one_line(audited: Path, made: Path, tmp_path: Path) -> None:
    for arguments in printing(audited, made, tmp_path)[::2]:
        with Path("/dev/full").open("wb") as full:
            process = ended(*arguments, stdout=full)
        lines = process.stderr.decode().splitlines()
        assert (arguments[0], process.returncode) == (arguments[0], 1)
        assert lines[-1] == "error: cannot write to standard output: No space left on device; redirect it elsewhere"
        assert not [line for line in lines[:-1] if "rror" in line]
    assert {slide.status for slide in open_result(tmp_path / "out")} == {"ok"}


def test_errors_keep_their_status_where_nobody_reads_them(audited: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    assert ended("audit", str(audited), "--seed", "4", stdout=write, stderr=write).returncode == 2
    os.close(write)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_the_terminal_does_not_have_are_escaped(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    shutil.copy(made / "slides" / "a.tif", tmp_path / "Schnitt \N{GREEK SMALL LETTER MU}.tif")
    process = ended("info", str(tmp_path / "Schnitt \N{GREEK SMALL LETTER MU}.tif"))
    assert process.returncode == 0, process.stderr
    assert b"Schnitt \\u03bc.tif" in process.stdout
