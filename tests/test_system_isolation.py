"""A slide that ends the process costs that slide alone; signals reach the process that works."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import mortal
from tests.runs import ROOT, SMALL, differing, flags, rows_of, toy_file
from tests.synthetic import write_marker_slide
from tests.toy_models import SLOWNESS_S
from wsi_gradcam.api import explain
from wsi_gradcam.errors import SlideError
from wsi_gradcam.system.isolation import MAX_CRASHES_IN_A_ROW, CrashLog

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="commands guard themselves on Linux only")
WITHIN_S = 60.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `healthy` with slides a.tif and z.tif, `mixed` with two deadly ones between, and a model."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("healthy", "mixed"):
        (folder / name).mkdir()
    for name, seed in (("a.tif", 1), ("z.tif", 2)):
        slide = write_marker_slide(folder / "healthy" / name, 390, 500, mpp=0.25, markers=[], marker_px=16, seed=seed)
        shutil.copy(slide.path, folder / "mixed" / name)
    for name in ("deadly-1.tif", "deadly-2.tif"):
        shutil.copy(folder / "healthy" / "a.tif", folder / "mixed" / name)
    toy_file(folder, "slow_linear")
    return folder


def arguments(made: Path, slides: str, out: Path, *more: str) -> list[str]:
    """Of a command that explains a folder of slides with the toy model."""
    model = made / "slow_linear.yaml"
    return [
        "explain",
        str(made / slides),
        "--trust-code",
        "--model",
        str(model),
        "--out",
        str(out),
        *flags(SMALL),
        *more,
    ]


def begun(given: list[str], **environment: str) -> subprocess.Popen[str]:
    """The command, running."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.mortal", *given],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def working(process: subprocess.Popen[str], out: Path) -> psutil.Process:
    """The child that does the work, once it has finished a span."""
    until = time.monotonic() + WITHIN_S
    while time.monotonic() < until:
        if any(out.glob("*/manifest/spans/*.json")):
            (child,) = psutil.Process(process.pid).children()
            return child
        time.sleep(0.02)
    raise AssertionError(f"no span within {WITHIN_S} s")


@pytest.mark.parametrize("name", ["SIGSEGV", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_slides_that_end_the_process_fail_and_the_others_are_explained(made: Path, tmp_path: Path, name: str) -> None:
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    process = begun(arguments(made, "mixed", out), **{mortal.SIGNAL: name})
    printed, said = process.communicate(timeout=4 * WITHIN_S)
    assert process.returncode == 1, said
    rows = rows_of(out)
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.tif": "ok",
        "deadly-1.tif": "failed",
        "deadly-2.tif": "failed",
        "z.tif": "ok",
    }
    for slide in ("deadly-1.tif", "deadly-2.tif"):
        assert f"{slide}: {name} ended the process" in rows[slide]["error"]
        assert "--reader" in rows[slide]["error"]
        assert f"{slide}: {name} ended the process" in said
    assert "2 failed, 2 ok" in printed
    explain(made / "healthy", str(made / "slow_linear.yaml"), undisturbed, **SMALL)
    for slide in ("a.tif", "z.tif"):
        assert differing(out / slide, undisturbed / slide) == []


@pytest.mark.slow
def test_finished_slides_are_not_overwritten_again(made: Path, tmp_path: Path) -> None:
    """`--overwrite` holds for the whole command, not for each process of it."""
    out = tmp_path / "out"
    explain(made / "healthy", str(made / "slow_linear.yaml"), out, **SMALL)
    process = begun(arguments(made, "mixed", out, "--overwrite"))
    _, said = process.communicate(timeout=4 * WITHIN_S)
    assert process.returncode == 1, said
    left = [int(n) for n in re.findall(r"^a\.tif: \d+ patches, (\d+) to do$", said, re.MULTILINE)]
    assert left[0] > 0
    assert left[-1] == 0


def test_a_death_that_no_slide_explains_stops_the_run(made: Path, tmp_path: Path) -> None:
    process = begun(arguments(made, "healthy", tmp_path / "out"), **{mortal.MODEL: "1"})
    _, said = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 1
    assert "SIGSEGV ended the process while no slide was open" in said


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_command_stops_the_work(made: Path, tmp_path: Path, sent: signal.Signals, code: int) -> None:
    out = tmp_path / "out"
    process = begun(arguments(made, "healthy", out), **{SLOWNESS_S: "0.1"})
    child = working(process, out)
    process.send_signal(sent)
    _, said = process.communicate(timeout=WITHIN_S)
    assert process.returncode == code, said
    assert (
        said.splitlines()[-1]
        == f"stopped by {sent.name}; run the same command again to continue; nothing finished is lost"
    )
    assert not child.is_running()
    assert not (out / "a.tif" / "overview.png").exists()


def test_no_work_goes_on_without_the_command(made: Path, tmp_path: Path) -> None:
    """Killed outright it passes nothing on; the same command may be run again at once."""
    out = tmp_path / "out"
    process = begun(arguments(made, "healthy", out), **{SLOWNESS_S: "0.1"})
    child = working(process, out)
    process.kill()
    process.communicate(timeout=WITHIN_S)
    psutil.wait_procs([child], timeout=5)
    assert not child.is_running()


def test_the_process_that_waits_is_small(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = begun(arguments(made, "healthy", out), **{SLOWNESS_S: "0.1"})
    child = working(process, out)
    waiting = psutil.Process(process.pid).memory_info().rss
    process.kill()
    process.communicate(timeout=WITHIN_S)
    psutil.wait_procs([child], timeout=5)
    assert waiting < 36 << 20  # with numpy alone it would be more


def told(*names: str) -> list[tuple[str, str]]:
    """Notes: `a` is opened, `-a` finished."""
    return [("finished", name[1:]) if name.startswith("-") else ("opened", name) for name in names]


def test_the_only_open_slide_is_to_blame() -> None:
    watch = CrashLog()
    assert "continuing without it" in watch.record_crash(told("a", "b", "-a", "-b", "c"), "SIGSEGV")
    assert watch.causes.keys() == {"c"}
    assert watch.finished_before == {"a", "b"}
    with pytest.raises(SlideError, match="c: SIGSEGV ended the process"):
        watch.opening("c")


def test_of_two_open_slides_none_is_blamed_until_one_is_alone() -> None:
    watch = CrashLog()
    assert "one slide at a time" in watch.record_crash(told("a", "b"), "SIGBUS")
    assert (watch.causes, watch.one_at_a_time) == ({}, True)
    watch.record_crash(told("a", "-a", "b"), "SIGBUS")
    assert watch.causes.keys() == {"b"}
    assert not watch.one_at_a_time


def test_slides_opened_for_a_look_are_not_blamed_later() -> None:
    """Some are opened first to choose an engine; the last ones opened are in work."""
    watch = CrashLog(one_at_a_time=True)
    watch.record_crash(told("a", "b", "a"), "SIGSEGV")
    assert watch.causes.keys() == {"a"}


def test_nothing_is_blamed_where_nothing_was_in_work() -> None:
    watch = CrashLog()
    assert watch.record_crash(told("a", "-a"), "SIGSEGV") == ""
    assert watch.causes == {}


def test_a_command_that_dies_again_and_again_ends() -> None:
    """A machine that ends every process is not the fault of a thousand slides."""
    code = (
        "import os; from wsi_gradcam.system.isolation import CRASHES, supervise; supervise();"
        "CRASHES.opening(f'{len(CRASHES.causes)}.svs'); os.kill(os.getpid(), 11)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S)
    assert done.returncode == 1
    assert done.stderr.count("continuing without it") == MAX_CRASHES_IN_A_ROW + 1
    assert "stopped; run the same command again" in done.stderr


def test_notes_are_told_only_where_somebody_waits(tmp_path: Path) -> None:
    CrashLog().opening("a")  # nobody does
    with (tmp_path / "notes").open("w+b") as notes:
        watch: Any = CrashLog(descriptor=notes.fileno())
        watch.opening("a\n\u00e4")
        watch.finished("a\n\u00e4")
        notes.seek(0)
        assert len(notes.readlines()) == 2
