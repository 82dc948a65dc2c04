"""The command line as users meet it: what it prints, how it is configured, how it tells progress."""

from __future__ import annotations

import json
import re
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress as RichProgress

from tests import cli_runs
from tests.cli_runs import SMALL_FLAGS, Run, only_error
from tests.runs import SMALL, command, differing, rows_of, toy_spec
from tests.synthetic import strip_mpp
from wsi_gradcam import __version__
from wsi_gradcam.api import Outcome, explain, preview
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.cli import terminal
from wsi_gradcam.cli.main import main
from wsi_gradcam.cli.output import print_outcome
from wsi_gradcam.cli.terminal import Bars, Lines, Quiet, progress
from wsi_gradcam.errors import StoreError
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.results.manifest import SlideStatus
from wsi_gradcam.run.settings import Settings
from wsi_gradcam.run.types import SlideRecord

run, made, finished = cli_runs.run, cli_runs.made, cli_runs.finished  # fixtures


# --- what is printed -------------------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"wsi-gradcam {__version__}\n"


def test_the_real_command_from_beginning_to_end(made: Path, finished: Path, tmp_path: Path) -> None:
    arguments = [
        str(made / "slides"),
        "--model",
        str(made / "pooled_linear.yaml"),
        "--out",
        str(tmp_path),
        *SMALL_FLAGS,
    ]
    done = command("explain", *arguments, *SMALL_FLAGS)
    assert (done.returncode, done.stdout) == (0, f"2 ok; results in {tmp_path}\n")
    assert differing(tmp_path, finished) == []
    lines = done.stderr.splitlines()
    assert lines[0] == "2 slides, model pooled_linear, layer features, targets other, marker"
    assert "a.tif: 56 patches, 56 to do" in lines
    assert re.fullmatch(r"\[2/2\] b\.tif: ok, \d+\.\d s", lines[-1])
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.dat").touch()
    failed = command("explain", tmp_path / "kept" / "notes.dat", *arguments[1:], *SMALL_FLAGS)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    wrong = command("explain", made / "none.svs", *arguments[1:], *SMALL_FLAGS)
    assert wrong.returncode == 2
    assert "none.svs: does not exist" in only_error(wrong.stderr)
    valid = command("validate", finished)
    assert (valid.returncode, valid.stdout, valid.stderr) == (0, f"{finished}: valid\n", "")


def test_a_dry_run_writes_nothing_and_counts_right(run: Run, made: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["explain", made / "slides", "--model", made / "pooled_linear.yaml", "--out", out, *SMALL_FLAGS]
    code, printed, _ = run(*arguments, "--dry-run", "--json")
    assert code == 0
    assert not list(tmp_path.iterdir())
    planned = {row["slide"]: row for row in json.loads(printed)["slides"]}
    for name, spans in (("a.tif", 5), ("b.tif", 2)):
        done = json.loads((finished / name / "manifest" / "done.json").read_bytes())
        row = planned[name]
        assert row["patches"] == int(rows_of(finished)[name]["patches"])
        assert row["spans"] == len(done["spans"]) == spans
        assert row["blocks"] == len(done["blocks"])
        stores = [finished / name / store for store in ("cams.zarr", "heatmap.ome.zarr")]
        arrays = sum(f.stat().st_size for s in stores for f in s.rglob("*") if f.is_file() and f.name != "zarr.json")
        assert 0.5 * arrays < row["store_bytes"] < 10 * arrays
    code, printed, err = run(*arguments, "--dry-run")
    assert code == 0
    assert err == ""
    assert not list(tmp_path.iterdir())
    assert "a.tif" in printed
    assert "2 slides, 76 patches" in printed
    assert re.search(
        r"about .* for the 76 remaining patches, at .* patches/s: measured just now .* float32", flat(printed)
    )


def test_a_dry_run_estimates_the_time(run: Run, made: Path, finished: Path, tmp_path: Path) -> None:
    """Of what is left: at the rate of the slides that are there, else as measured; and it says which."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    arguments = [
        "explain",
        made / "slides",
        "--model",
        made / "pooled_linear.yaml",
        *SMALL_FLAGS,
        "--dry-run",
        "--json",
    ]
    told = json.loads(run(*arguments, "--out", tmp_path / "none")[1])["time"]
    assert (told["patches"], told["seconds"]) == (76, pytest.approx(76 / told["patches_per_s"], abs=0.1))
    assert told["basis"].startswith("measured just now")
    rows = rows_of(out)
    patches, seconds = (sum(float(row[name]) for row in rows.values()) for name in ("patches", "seconds"))
    told = json.loads(run(*arguments, "--out", out)[1])["time"]
    assert (told["patches"], told["seconds"]) == (0, 0)  # all is there
    assert told["patches_per_s"] == pytest.approx(patches / seconds)
    assert told["basis"].startswith("the rate of the 76 patches already in ")


def flat(printed: str) -> str:
    """Text in one line."""
    return " ".join(printed.split())


def test_a_dry_run_names_slides_that_cannot_be_planned(run: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    shutil.copy(made / "slides" / "b.tif", tmp_path / "slides")
    (tmp_path / "slides" / "bad.tif").touch()
    arguments = [
        "explain",
        tmp_path / "slides",
        "--model",
        made / "pooled_linear.yaml",
        "--out",
        tmp_path / "out",
        "--dry-run",
    ]
    code, printed, err = run(*arguments)
    assert code == 1
    assert re.fullmatch(r"cannot be planned: bad\.tif: .*bad\.tif: not a slide .*\n", err)
    assert "1 slide, " in printed
    code, printed, _ = run(*arguments, "--json")
    assert code == 1
    assert list(json.loads(printed)["errors"]) == ["bad.tif"]


def test_preview_survives_what_readers_raise(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("wsi_gradcam.api.make_plan", broken)
    found = preview(made / "slides", toy_spec("pooled_linear"), tmp_path / "out")
    assert [error for _, error in found.errors] == ["ZeroDivisionError: two lines"] * 2


def test_json_of_a_run_and_of_validate(run: Run, made: Path, tmp_path: Path) -> None:
    arguments = ["explain", made / "slides", "--model", made / "pooled_linear.yaml", "--out", tmp_path, *SMALL_FLAGS]
    code, printed, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    records = json.loads(printed)
    assert records["out"] == str(tmp_path)
    assert {r["slide"]["id"]: (r["status"], r["patches"]) for r in records["slides"]} == {
        "a.tif": ("ok", 56),
        "b.tif": ("ok", 20),
    }
    assert run("validate", tmp_path, "--json") == (0, "[]\n", "")
    (tmp_path / "a.tif" / "overview.png").unlink()
    code, printed, _ = run("validate", tmp_path, "--json")
    assert code == 1
    assert json.loads(printed) == [{"slide": "a.tif", "problem": "overview.png is missing"}]
    code, printed, _ = run("validate", tmp_path)
    assert (code, printed) == (1, "a.tif: overview.png is missing\n1 problem found\n")


def test_info_of_slides_and_models(run: Run, made: Path) -> None:
    code, printed, _ = run("info", made / "slides" / "a.tif", "--model", made / "pooled_linear.yaml", "--json")
    assert code == 0
    slide, model = json.loads(printed)
    assert slide["size"] == "500 x 390 px"
    assert slide["mpp (x, y)"] == "0.25, 0.25 um"
    assert model["layer"] == "features (12 x 4 x 4)"
    assert model["classes"] == "other, marker"
    assert model["parameters"] == f"{3 * 8 * 25 + 8 + 8 * 12 * 9 + 12 + 12 * 2 + 2:,}"
    code, printed, _ = run("info", made / "slides" / "a.tif")
    assert code == 0
    assert re.search(r"^ +size  500 x 390 px$", printed, re.MULTILINE)


def test_info_lists_the_methods_that_explain_takes(run: Run, made: Path, tmp_path: Path) -> None:
    """A ViT has no ReLU and reads a class token: of the methods some do not suit it, and `explain` refuses those."""
    model = tmp_path / "vit.yaml"
    model.write_text("source: tests.toy_models:tokens\npatch_px: 32\nmpp: 0.5\n", encoding="utf-8")
    code, printed, _ = run("info", "--model", model, "--json")
    assert code == 0
    (found,) = json.loads(printed)
    listed = found["methods"].split(", ")
    refused = {key.removeprefix("not "): reason for key, reason in found.items() if key.startswith("not ")}
    assert set(listed) | set(refused) == set(METHOD_INFO)
    assert {"cam", "guided_backprop"} <= set(refused)
    assert {"gradcam", "occlusion"} <= set(listed)
    for method in METHOD_INFO:
        options = ["--out", tmp_path / method, "--method", method, "--dry-run", *SMALL_FLAGS]
        code, _, err = run("explain", made / "slides" / "a.tif", "--model", model, *options)
        assert (code == 0) == (method in listed), (method, err)
        assert method in listed or refused[method] in err


def test_info_tells_an_unusable_mpp(run: Run, made: Path, tmp_path: Path) -> None:
    strip_mpp(made / "slides" / "a.tif", tmp_path / "a.tif")
    _, printed, _ = run("info", tmp_path / "a.tif")
    assert "unusable: the file has no openslide.mpp-" in printed


# --- configuration ---------------------------------------------------------------------------------------------------


def test_flags_override_the_config_file(run: Run, made: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    values = {
        "slide": str(made / "slides" / "b.tif"),
        "model": str(made / "pooled_linear.yaml"),
        "out": "never",
        "heatmap-stride": 16,
        "overlap": 0.5,
        "batch_size": 2,
        "target": "other",
        "min_tissue": None,
        "scheduler": "tcp://127.0.0.1:1",
    }
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    code, _, err = run(
        "explain",
        "--config",
        config,
        "--out",
        tmp_path / "out",
        "--overlap",
        "0",
        "--target",
        "marker",
        "--target",
        "predicted",
        "--mpp",
        "0.25,0.3",
        "--workers",
        "1",
    )
    assert code == 0, err
    settings = yaml.safe_load((tmp_path / "out" / "run.yaml").read_text(encoding="utf-8"))["settings"]
    assert settings["heatmap_stride"] == 16
    assert settings["overlap"] == 0
    assert settings["batch_size"] == 2
    assert settings["target"] == ["marker", "predicted"]
    assert settings["mpp"] == [0.25, 0.3]
    assert settings["min_tissue"] == Settings().min_tissue


def test_a_scheduler_flag_replaces_the_config_files_workers(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("workers: 2", encoding="utf-8")
    seen: list[Any] = []

    def noted(*arguments: Any, **options: Any) -> Outcome:
        seen.append((options["workers"], options["scheduler"]))
        return Outcome(tmp_path, ())

    monkeypatch.setattr("wsi_gradcam.api.explain", noted)
    arguments = ["explain", made, "--model", "m", "--out", tmp_path, "--config", config]
    run(*arguments)
    run(*arguments, "--scheduler", "tcp://x:1")
    run(*arguments, "--workers", "5")
    assert seen == [(2, None), (None, "tcp://x:1"), (5, None)]


# --- progress --------------------------------------------------------------------------------------------------------


def test_lines_count_patches_and_slides(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slides").mkdir()
    for name in ("a.tif", "b.tif"):
        shutil.copy(made / "slides" / name, tmp_path / "slides")
    (tmp_path / "slides" / "c.tif").touch()
    spec = toy_spec("pooled_linear")
    lines = Lines()
    explain(tmp_path / "slides", spec, tmp_path / "out", **SMALL, listener=lines)
    assert (lines.progress.slides, lines.progress.slides_done, lines.progress.patches, lines.progress.patches_done) == (
        3,
        3,
        76,
        76,
    )
    manifest = tmp_path / "out" / "a.tif" / "manifest"
    shutil.rmtree(tmp_path / "out" / "b.tif")
    (manifest / "done.json").unlink()
    (manifest / "spans").mkdir()
    for span in (0, 4):  # 12 and 8 patches
        (manifest / "spans" / f"{span:06d}.json").write_text('{"digest": "", "causes": {}}', encoding="utf-8")
    capsys.readouterr()
    lines = Lines()
    explain(tmp_path / "slides", spec, tmp_path / "out", **SMALL, listener=lines)
    assert (lines.progress.slides_done, lines.progress.patches, lines.progress.patches_done) == (3, 56, 56)
    assert "a.tif: 56 patches, 36 to do" in capsys.readouterr().err.splitlines()
    assert lines.progress.rate() > 0


def test_lines_tell_the_rate_now_and_then(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    explain(made / "slides" / "b.tif", toy_spec("pooled_linear"), tmp_path, **SMALL, listener=Lines())
    pace = r"^0/1 slides, 12 patches, \d+ patches/s, model busy \d+%, reading \d+%, about \d s left$"
    assert re.search(pace, capsys.readouterr().err, re.MULTILINE)


def test_bars_reach_their_ends_and_tell_failures(made: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    shutil.copy(made / "slides" / "b.tif", tmp_path / "slides")
    (tmp_path / "slides" / "c[x].tif").touch()
    console = Console(file=StringIO(), width=300, force_terminal=False)
    with RichProgress("{task.fields[rate]}", console=console) as progress_bars:
        bars = Bars(progress_bars)
        explain(tmp_path / "slides", toy_spec("pooled_linear"), tmp_path / "out", **SMALL, listener=bars)
        found = {task.description: (task.completed, task.total) for task in progress_bars.tasks}
    assert found == {"slides": (2, 2), "patches": (20, 20)}
    assert isinstance(console.file, StringIO)
    assert "[2/2] c[x].tif: failed" in console.file.getvalue()
    assert "[1/2]" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("terminal", "quiet", "kind"), [(True, False, Bars), (False, False, Lines), (True, True, Quiet)]
)
def test_progress_suits_where_it_goes(monkeypatch: pytest.MonkeyPatch, terminal: bool, quiet: bool, kind: type) -> None:
    monkeypatch.setattr("sys.stderr", TerminalOrNot(terminal))
    with progress(quiet) as listener:
        assert type(listener) is kind


class TerminalOrNot(StringIO):
    """A stream that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_the_end_counts_statuses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    records = [
        SlideRecord(SlideEntry(str(i), f"/{i}"), SlideStatus(status), "why" if status == "failed" else "", 1, 0, 1.0)
        for i, status in enumerate(["ok", "no_tissue", "failed", "ok"])
    ]
    print_outcome(Outcome(tmp_path, tuple(records)), as_json=False)
    printed = capsys.readouterr()
    assert printed.out == f"1 failed, 1 no tissue, 2 ok; results in {tmp_path}\n"
    assert "why" in printed.err


def test_errors_before_anything_began_are_not_failures(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr("wsi_gradcam.run.driver.write_run", full)
    code, _, err = run("explain", made / "slides", "--model", made / "pooled_linear.yaml", "--out", tmp_path)
    assert (code, only_error(err)) == (2, "the disk is full")
    assert not list(tmp_path.iterdir())


def test_json_shows_no_secrets_of_urls(capsys: pytest.CaptureFixture[str]) -> None:
    entry = SlideEntry("a.svs", "https://host/a.svs", url="https://me:secret@host/a.svs?signature=hidden")
    print_outcome(Outcome(Path("out"), (SlideRecord(entry, SlideStatus.OK, "", 1, 0, 1.0),)), as_json=True)
    printed = capsys.readouterr().out
    assert "https://host/a.svs" in printed
    assert "secret" not in printed
    assert "hidden" not in printed
