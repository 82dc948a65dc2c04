"""Runs, audits and exports that are killed, meet each other, fill the disk or lose OUT: the next command mends it."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.audits import QUICK, metrics_in, pieces_in
from tests.made_results import Made, make, steps
from tests.runs import ROOT, SMALL, differing, rows_of, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam import audit_run
from wsi_gradcam.api import explain
from wsi_gradcam.audit import stages
from wsi_gradcam.audit.plan import write_arrays
from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import ResumeError, StoreError
from wsi_gradcam.export import OF_HEATMAPS, Exported, export
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.manifest import Manifest
from wsi_gradcam.run import stitching
from wsi_gradcam.run.claims import AUDIT, CLAIM, Claim, Holder
from wsi_gradcam.run.status import RunState, observe
from wsi_gradcam.system.processes import Process, this_process

ASK: dict[str, Any] = {**QUICK, "only": ["saturation"]}


@pytest.fixture(autouse=True)
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_gradcam.audit.running.write_reports", lambda *given: None)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for number in range(4):
        write_marker_slide(folder / f"{number}.tif", 140, 140, mpp=0.25, markers=[(60, 60)], marker_px=16, seed=number)
    return folder


@pytest.fixture(scope="module")
def undisturbed(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    explain(slides, toy_spec("pooled_linear"), out, **SMALL)
    return out


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Results to be exported, made without a model."""
    return make(tmp_path / "out", {f"{n}.svs": Made((900, 1300), steps((57, 82), seed=n)) for n in range(2)})


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
def test_neither_a_run_nor_an_audit_begins_while_an_audit_works(slides: Path, copy: Path, overwrite: bool) -> None:
    before = files(copy)
    with Claim(storage_path(copy), "another", print, AUDIT):
        with pytest.raises(ResumeError, match=r"audit another on .* is at work there"):
            explain(slides, toy_spec("pooled_linear"), copy, overwrite=overwrite, **SMALL)
        with pytest.raises(ResumeError, match=r"audit another on .* is at work there"):
            audit_run(copy, overwrite=overwrite, **ASK)
        assert {name: data for name, data in files(copy).items() if name != CLAIM} == before
    assert audit_run(copy, **ASK).failed == ()


def test_no_audit_begins_while_a_run_works(copy: Path) -> None:
    with Claim(storage_path(copy), "another", print), pytest.raises(ResumeError, match="run another on"):
        audit_run(copy, **ASK)
    assert not (copy / "audit").exists()


def test_during_an_audit_a_run_is_refused_and_status_shows_both(
    slides: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def looked(place: Any, numbers: Any) -> None:
        if not seen:
            (both,) = observe(copy)
            (alone,) = observe(copy / "audit")
            assert both.audit is not None
            seen.extend([both.state, both.audit.state, alone.state])
            with pytest.raises(ResumeError, match="is at work there"):
                explain(slides, toy_spec("pooled_linear"), copy, overwrite=True, **SMALL)
        write_arrays(place, numbers)

    monkeypatch.setattr(stages, "write_arrays", looked)
    assert audit_run(copy, **ASK).failed == ()
    assert seen == [RunState.FINISHED, RunState.RUNNING, RunState.RUNNING]
    assert not list(copy.rglob(CLAIM))


@pytest.mark.parametrize("place", [".", "audit"])
def test_a_claim_of_a_killed_audit_is_taken_over(slides: Path, copy: Path, place: str) -> None:
    """That of an older version lies in OUT/audit."""
    gone = Process(this_process().host, 2**22 + 5, this_process().boot, "1")
    (copy / place).mkdir(exist_ok=True)
    (copy / place / CLAIM).write_bytes(Holder("killed", gone, "2026-01-01T00:00:00Z", work=AUDIT).to_bytes())
    assert audit_run(copy, **ASK).failed == ()
    explain(slides, toy_spec("pooled_linear"), copy, **SMALL)
    assert not list(copy.rglob(CLAIM))


def killed_audit(out: Path, change: int) -> int:
    """Audits in a process that kills itself when it changes a file for the `change`-th time; returns how it ended."""
    script = (
        "from tests.doomed import _die_at\n"
        "import wsi_gradcam.audit.running as running\n"
        "from wsi_gradcam import audit_run\n"
        "running.write_reports = lambda *given: None\n"
        f"_die_at({change})\n"
        f"audit_run({str(out)!r}, trust_code=True, **{ASK!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, timeout=300, check=False)
    return ran.returncode


def test_an_audit_killed_at_any_change_goes_on_to_the_same(copy: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(copy, tmp_path / "whole"))
    audit_run(whole, **ASK)
    for change in (1, 3, 5, 8):
        out = Path(shutil.copytree(copy, tmp_path / f"killed-{change}"))
        assert killed_audit(out, change) == -signal.SIGKILL
        audit_run(out, **ASK)
        assert (pieces_in(out), metrics_in(out)) == (pieces_in(whole), metrics_in(whole))
        assert not [path for path in out.rglob("*") if ".partial" in path.name]


EXPORT = (
    "import sys\n"
    "from wsi_gradcam.cli.main import main\n"
    "print('ready', flush=True)\n"
    "sys.exit(main(['export', sys.argv[1], '--to', sys.argv[2], '--dest', sys.argv[3], '--window', 'slide']))\n"
)


def exporting(out: Path, to: str, dest: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", EXPORT, str(out), to, str(dest)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("to", ["deepzoom", "ome-zarr-0.4", "geojson"])
def test_an_export_that_was_killed_is_gone_on_with(made: Path, tmp_path: Path, to: str) -> None:
    """At four random times each; the same command ends well, and all is as without the kill."""
    export(made, to, tmp_path / "whole", window="slide")
    expected, dice = files(tmp_path / "whole"), random.Random(to)
    for number in range(4):
        dest = tmp_path / f"dest-{number}"
        with exporting(made, to, dest) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            begun = time.monotonic()
            while not list(dest.glob(".export.*")) and process.poll() is None and time.monotonic() - begun < 60:
                time.sleep(0.001)
            time.sleep(dice.uniform(0, 0.25))
            process.kill()
        if list(dest.glob(".export.*")):  # it had not ended
            assert main(["export", str(made), "--to", to, "--dest", str(dest), "--window", "slide"]) == 0
        assert files(dest) == expected


def test_an_export_killed_in_the_middle_of_any_file_leaves_nothing_behind(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that it had finished is not written again, and its half-written file is deleted."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from wsi_gradcam.export import export, job\n"
        "replace, left = job._replace, [3]\n"
        "def dying(*given):\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(*given)\n"
        "job._replace = dying\n"
        "export(sys.argv[1], 'geojson', sys.argv[2], window='slide')\n"
    )
    dest = tmp_path / "dest"
    ran = subprocess.run(
        [sys.executable, "-c", script, str(made), str(dest)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert ran.returncode == -signal.SIGKILL
    assert len([name for name in files(dest) if name.endswith(".partial")]) == 2  # a file and the journal
    first = {path: path.stat().st_mtime_ns for path in dest.glob("0.svs*") if not path.name.endswith(".partial")}
    assert {each.error for each in export(made, "geojson", dest, window="slide")} == {""}
    assert len(first) == 2
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert [name for name in files(dest) if name.endswith(".partial")] == []
    assert {each.error != "" for each in export(made, "geojson", dest, window="slide")} == {True}  # as ever


def test_an_export_at_work_is_not_cleared_up(made: Path, tmp_path: Path) -> None:
    dest = tmp_path / "dest"

    def meanwhile(done: Exported) -> None:
        partials = [name for name in files(dest) if name.endswith(".partial")]
        assert {each.error for each in export(made, "png", dest, [done.slide], size=64)} == {""}
        assert [name for name in files(dest) if name.endswith(".partial")] == partials != []

    assert {each.error for each in export(made, "geojson", dest, window="slide", listener=meanwhile)} == {""}


@pytest.mark.parametrize("to", OF_HEATMAPS)
def test_equal_exports_have_equal_bytes(made: Path, tmp_path: Path, to: str) -> None:
    found = []
    for _ in range(2):
        done = export(made, to, tmp_path / "dest")
        found.append(files(tmp_path / "dest") if not any(each.error for each in done) else {"": str(done).encode()})
        shutil.rmtree(tmp_path / "dest")
        time.sleep(0.01)
    assert "" not in found[0]
    assert found[0] == found[1]


def full(*given: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("to", OF_HEATMAPS)
def test_a_full_disk_ends_an_export_with_1(
    made: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When the first file would be put in place; afterwards the same command ends well."""
    command = ["export", str(made), "--to", to, "--dest", str(tmp_path / "dest")]
    with monkeypatch.context() as patch:
        patch.setattr("wsi_gradcam.export.job._replace", full)
        assert main(command) == 1
    assert "the disk is full; free space and run the same command again" in capsys.readouterr().err
    assert main(command) == 0
    assert not [path for path in (tmp_path / "dest").rglob("*") if ".partial" in path.name]


def test_a_folder_that_cannot_be_written_is_wrong_usage(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert main(["export", str(made), "--to", "png", "--dest", str(tmp_path / "file" / "dest")]) == 2


@pytest.mark.parametrize("at", [0, 3, 7, 12, 20])
def test_a_full_disk_ends_a_run_and_the_next_finishes_it(
    slides: Path, undisturbed: Path, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is met; no slide counts as failed."""
    out, left, replace = tmp_path / "out", [at], os.replace

    def filling(*given: Any, **named: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            full()
        replace(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", filling)
        with pytest.raises(StoreError, match="the disk is full"):
            explain(slides, toy_spec("pooled_linear"), out, **SMALL)
    explain(slides, toy_spec("pooled_linear"), out, **SMALL)
    assert differing(out, undisturbed) == []


@pytest.mark.parametrize("moment", ["complete", "draw_overview", "read_mask", "_refuse_foreign", "digest_of"])
@pytest.mark.parametrize("part", ["out", "slide"])
def test_out_that_is_deleted_ends_the_run_and_no_slide_fails_for_good(
    slides: Path, undisturbed: Path, tmp_path: Path, moment: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the work, wherever; the same command makes all."""
    out = tmp_path / "out"
    owner: Any = Manifest if moment == "complete" else stitching
    call, calls = getattr(owner, moment), [0]

    def deleting(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            shutil.rmtree(out if part == "out" else out / "1.tif", ignore_errors=True)
        return call(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, deleting)
        with pytest.raises(StoreError) if part == "out" else suppress(StoreError):
            explain(slides, toy_spec("pooled_linear"), out, **SMALL)
    if (out / "slides.csv").exists():
        assert [row["tried"] for row in rows_of(out).values() if row["tried"]] == []
    outcome = explain(slides, toy_spec("pooled_linear"), out, **SMALL)
    assert outcome.failed == ()
    assert differing(out, undisturbed) == []


def test_a_journal_of_a_stranger_deletes_nothing_elsewhere(made: Path, tmp_path: Path) -> None:
    dest, mark = tmp_path / "dest", "0" * 32
    dest.mkdir()
    victim = tmp_path / f"mine.{mark}.partial"
    victim.write_text("mine")
    lines = [{"process": {}}, {"begun": "../mine"}, {"begun": str(tmp_path / "mine")}, {"begun": 3}, {"ended": True}]
    (dest / f".export.{mark}.partial").write_text("\n".join(map(json.dumps, lines)) + "\n{")
    assert {each.error for each in export(made, "png", dest, size=64)} == {""}
    assert victim.read_text() == "mine"
