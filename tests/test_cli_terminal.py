"""What progress says: how fast it goes, who is busy, what is tried again."""

from __future__ import annotations

import ast
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, SMALL, flags, toy_file
from tests.synthetic import write_marker_slide
from tests.test_run_progress import Clock, entry, explained, planned, record
from wsi_gradcam.cli import terminal
from wsi_gradcam.cli.main import main
from wsi_gradcam.cli.terminal import MAX_WORKERS_LISTED, Lines, pace
from wsi_gradcam.run.progress import Progress
from wsi_gradcam.run.types import Part, Performed, Task
from wsi_gradcam.run.workload import EXPLAIN


def at_work(workers: int) -> Progress:
    """After 100 s in which each worker has explained 200 of 1,000 patches, half of the time at work."""
    clock = Clock()
    progress = Progress(clock)
    progress.begin(3, readers=2)
    planned(progress, 0, 1000)
    clock.now += 100
    for number in range(workers):
        explained(progress, 0, 200, f"host:{number}", seconds=100, model_s=50, read_s=20)
    return progress


def test_the_pace_of_one_process() -> None:
    progress = at_work(1)
    assert pace(progress).startswith("2 patches/s, model busy 50%, reading 10%, about 23 min ")
    assert pace(progress, whole=True).startswith("0/3 slides, 200 patches, 2 patches/s, ")
    assert "host" not in pace(progress, whole=True)


def test_the_pace_of_each_worker_of_a_few() -> None:
    progress = at_work(2)
    assert pace(progress, whole=True).endswith(", workers host:0 2/s, host:1 2/s")
    assert "workers" not in pace(progress)


def test_a_pass_of_several_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.progress = at_work(1)
    lines.part_began(Part(2, 3, "sorting cells"), 3, 480)
    assert capsys.readouterr().err == "pass 2 of 3, sorting cells: 3 slides, 480 patches\n"
    lines.part_began(Part(1, 3, "measuring"), 3, None)
    assert capsys.readouterr().err == "pass 1 of 3, measuring: 3 slides\n"
    lines.part_began(Part(2, 3, "sorting cells"), 3, 480)
    explained(lines.progress, 0, 120, "host:0", seconds=100)
    assert pace(lines.progress, whole=True).startswith("pass 2 of 3, sorting cells: 120 of 480 patches, ")


def test_many_workers_are_counted() -> None:
    assert pace(at_work(MAX_WORKERS_LISTED + 1), whole=True).endswith(f", {MAX_WORKERS_LISTED + 1} workers")


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert pace(Progress(Clock())) == "0 patches/s, about 0 s left"


def test_what_is_tried_again_is_told_and_what_has_failed_before_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    lines.progress.begin(2)
    task = Task(EXPLAIN, entry(7), (3,))
    lines.task_failed(task, Performed(None, error="its worker died", again=True))
    lines.task_failed(task, Performed(None, error="its worker died"))
    lines.slide_done(record(7, "failed", "died"))
    lines.slide_done(replace(record(8, "failed", "no slide", skipped=True), lasting=True))
    lines.message("mind the gap")
    assert capsys.readouterr().err.splitlines() == [
        "7.svs: explain 3 is being retried: its worker died",
        "[1/2] 7.svs: failed, 1.0 s: died",
        "mind the gap",
    ]
    assert (lines.progress.retries, lines.progress.slides_done) == (1, 2)


# --- what files say is shown as text, and moves no cursor ------------------------------------------------------------

EVIL = "\x1b[31m\x1b]0;title\x07\x9b2J\r\u202e[bold]\nok: valid\u2066"
# What a terminal obeys, or hides. Lines end, and progress bars (of a terminal alone) have sequences of their own.
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of slides whose names are attacks, one of them broken, and a model of classes of such names."""
    folder = tmp_path_factory.mktemp("evil")
    (folder / f"slides{EVIL}").mkdir()
    slides = folder / f"slides{EVIL}" / "inner"
    slides.mkdir()
    write_marker_slide(slides / f"a{EVIL}.tif", 200, 200, mpp=0.25, markers=[(100, 100)], marker_px=16)
    (slides / f"b{EVIL}.tif").write_bytes(b"no slide")
    toy_file(folder, "pooled_linear", classes=[f"one{EVIL}", f"two{EVIL}"])
    return folder


def explaining(evil: Path, *more: str) -> list[str]:
    model = ["--model", str(evil / "pooled_linear.yaml"), "--out", str(evil / f"out{EVIL}")]
    return ["explain", str(evil / f"slides{EVIL}"), *model, *flags({**SMALL, "target": f"one{EVIL}"}), *more]


COMMANDS: dict[str, Callable[[Path, str], list[str]]] = {
    "explain": lambda evil, out: explaining(evil),
    "dry run": lambda evil, out: explaining(evil, "--dry-run"),
    "again": lambda evil, out: explaining(evil, "--retry-failed"),
    "another run": lambda evil, out: explaining(evil, "--overlap", "0.5"),
    "status": lambda evil, out: ["status", out],
    "validate": lambda evil, out: ["validate", out],
    "audit": lambda evil, out: ["audit", out, "--patches", "2", "--only", "saturation"],
    "export": lambda evil, out: ["export", out, "--to", "png"],
    "export of none": lambda evil, out: ["export", out, "--to", "png", "--slide", f"none{EVIL}"],
    "info": lambda evil, out: ["info", *map(str, (evil / f"slides{EVIL}" / "inner").glob("a*"))],
    "info of none": lambda evil, out: ["info", str(evil / f"none{EVIL}")],
    "info of a model": lambda evil, out: ["info", "--model", str(evil / "pooled_linear.yaml")],
    "doctor": lambda evil, out: ["doctor", "--out", out, "--model", str(evil / "pooled_linear.yaml")],
    "view": lambda evil, out: ["view", f"{out}/none{EVIL}"],
    "flags": lambda evil, out: ["export", out, "--to", f"png{EVIL}"],
    "usage": lambda evil, out: ["status", out, f"--wrong{EVIL}"],
}


def test_no_command_obeys_names_of_files(evil: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, arguments in COMMANDS.items():
        with suppress(SystemExit):  # of wrong usage
            main(arguments(evil, str(evil / f"out{EVIL}")))
        said = capsys.readouterr()
        assert said.out + said.err
        assert not OBEYED.search(said.out + said.err), f"{name}: {(said.out + said.err)!r}"
        assert "\nok: valid" not in said.out + said.err, name
    assert logging.lastResort is not None
    warning = logging.LogRecord("wsi_gradcam", logging.WARNING, "", 0, "of a stranger: %s", (EVIL,), None)
    assert not OBEYED.search(logging.lastResort.format(warning))


def test_a_terminal_shows_names_as_they_are(evil: Path) -> None:
    """On a terminal there are progress bars, whose library understands [bold] in text, and sequences of its own."""
    here, there = pty.openpty()
    command = [sys.executable, "-m", "wsi_gradcam.cli", *explaining(evil, "--overwrite"), "--trust-code"]
    environment = {**os.environ, "COLUMNS": "2000", "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=there, stdout=there, stderr=there, env=environment, cwd=ROOT) as process:
        os.close(there)
        said = b""
        while data := _read(here):
            said += data
    os.close(here)
    shown = said.decode(errors="surrogateescape")
    assert process.returncode == 1, shown
    assert "a\\x1b[31m\\x1b]0;title\\x07\\x9b2J\\r\\u202e[bold]\\nok: valid" in shown.replace("/b\\x", "/a\\x")
    for attack in ("\x1b[31m", "\x1b]0;", "\x07", "\x9b", "\u202e", "\u2066", "\nok: valid"):
        assert attack not in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # its other end is closed
        return b""


def test_commands_print_through_one_door() -> None:
    """`print` is for JSON alone, which writes all but ASCII out."""
    for path in (ROOT / "wsi_gradcam" / "cli").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print":
                assert path.name == "__init__.py" or "json.dumps" in ast.unparse(call), f"{path}: {ast.unparse(call)}"


def test_in_a_notebook_progress_is_a_bar_that_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a browser: what would be displayed is recorded, and names of slides are text in it."""
    shown: list[str] = []

    class Handle:
        def update(self, html: Any) -> None:
            shown.append(html.data)

    def display(html: Any, display_id: bool) -> Handle:
        assert display_id
        shown.append(html.data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("wsi_gradcam.cli.terminal.in_notebook", lambda: True)
    with terminal.progress() as listener:
        assert isinstance(listener, terminal.NotebookBar)
        assert 'value="0" max="1"' in shown[-1]
        listener.progress = at_work(1)
        listener.message("<b>a.svs</b>: remark")
        assert 'value="200" max="3000"' in shown[-1], "three slides, of which one is planned, are taken to be alike"
        assert "2 patches/s, model busy 50%" in shown[-1]
        assert "&lt;b&gt;a.svs&lt;/b&gt;: remark" in shown[-1]
        for number in range(20):
            listener.message(f"line {number}")
    assert shown[-1].count("<div>") == terminal.NOTEBOOK_LINES


def test_a_program_that_has_imported_ipython_is_no_notebook() -> None:
    import IPython

    assert IPython.get_ipython() is None
    assert not terminal.in_notebook()
