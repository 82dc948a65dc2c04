"""The command line as users meet it: what it prints, its exit codes, and one clear line for every mistake."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress

from tests.runs import SMALL, command, contents, differing, flags, rows_of, toy_file, toy_spec
from tests.synthetic import set_resolution, strip_mpp, truncate, write_marker_slide
from wsi_gradcam import __version__, report
from wsi_gradcam.api import Outcome, explain, preview
from wsi_gradcam.cli import SETTINGS, main
from wsi_gradcam.config import Settings
from wsi_gradcam.errors import StoreError
from wsi_gradcam.inputs import SlideEntry
from wsi_gradcam.report import Bars, Lines, print_outcome, progress
from wsi_gradcam.workflow import SlideRecord

Run = Callable[..., tuple[int, str, str]]
SMALL_FLAGS = flags(SMALL)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`wsi-gradcam ARGUMENTS` in this process: exit code, standard output, standard error."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with slides `a.tif` (a marker) and `b.tif` (none), and model files."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "slides").mkdir()
    write_marker_slide(folder / "slides" / "a.tif", 390, 500, mpp=0.25, markers=[(200, 200)], marker_px=16)
    write_marker_slide(folder / "slides" / "b.tif", 250, 300, mpp=0.25, markers=[], marker_px=16, seed=2)
    for name in ("pooled_linear", "other_linear", "wrong_shape", "pair", "not_a_module", "not_a_number"):
        toy_file(folder, name)
    toy_file(folder, "gone", source="tests.toy_models:gone")
    toy_file(folder, "mpp_unknown", source="tests.toy_models:pooled_linear", mpp=None)
    toy_file(folder, "three_classes", source="tests.toy_models:pooled_linear", classes=["a", "b", "c"])
    toy_file(folder, "unknown_key", source="tests.toy_models:pooled_linear", layr="features")
    (folder / "empty").mkdir()
    (folder / "file").write_text("a file", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished(made: Path) -> Path:
    """The results of both slides."""
    out = made / "finished"
    explain(made / "slides", str(made / "pooled_linear.yaml"), out, **SMALL)
    return out


def only_error(err: str) -> str:
    """The one line that standard error holds, without its "error: "."""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# --- nothing could start: exit code 2 and one line ------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such slide": (["{slides}/none.svs"], r"{slides}/none\.svs: does not exist, .*check the path"),
    "empty folder": (["{made}/empty"], r"{made}/empty: no slides in this folder; expected files ending in .*\.svs"),
    "no such class": (["--target", "tumor"], r"target 'tumor' is not a class .*expected one of other, marker"),
    "no such index": (["--target", "2"], r"target '2' is not a class .*an index below 2"),
    "no such layer": (["--layer", "layer4"], r"no layer 'layer4'; it has features, fc"),
    "layer without a map": (["--layer", "fc"], r"layer 'fc' has output of shape .* expected a map"),
    "wrong shape": (["--model", "{made}/wrong_shape.yaml"], r"wrong_shape: returns shape .* expected \(2, classes\)"),
    "no network": (["--model", "{made}/not_a_module.yaml"], r"returned a int, expected a torch\.nn\.Module"),
    "no function": (["--model", "{made}/gone.yaml"], r"'tests\.toy_models' has no function 'gone'"),
    "class count": (["--model", "{made}/three_classes.yaml"], r"3 classes are named, but the model has 2 outputs"),
    "model mpp": (["--model", "{made}/mpp_unknown.yaml"], r"micrometres per pixel .*--patch-mpp"),
    "no such model": (["--model", "resnet"], r"resnet: no such model; expected a model file"),
    "no such model file": (["--model", "{made}/none.yaml"], r"none\.yaml: cannot be read: .*check the path"),
    "unknown model key": (["--model", "{made}/unknown_key.yaml"], r"unknown_key\.yaml: layr: unknown key"),
    "method": (["--method", "magic"], r"method 'magic' is not known; expected one of cam, gradcam"),
    "overlap": (["--overlap", "1"], r"overlap: .*less than 1"),
    "overlap and stride": (["--overlap", "0.5", "--stride-px", "16"], r"overlap and stride_px .* give one of them"),
    "span": (["--span-patches", "10", "--batch-size", "4"], r"span_patches is 10, expected a multiple of batch_size 4"),
    "heatmap stride": (["--heatmap-stride", "12"], r"heatmap_stride is 12, expected a power of two"),
    "mpp text": (["--mpp", "fine"], r"--mpp is 'fine', expected a number such as 0\.25, or Y,X"),
    "mpp count": (["--mpp", "1,2,3"], r"mpp: .*at most 2 items"),
    "device": (["--device", "nonsense"], r"device 'nonsense' cannot be used here: .*try --device cpu"),
    "workers": (["--workers", "0"], r"workers is 0, expected 1 or more"),
    "out below a file": (["--out", "{made}/file/out"], r"{made}/file/out.*choose another --out"),
    "out is a file": (["--out", "{made}/file"], r"{made}/file.*choose another --out"),
    "out in /proc": (["--out", "/proc/out"], r"/proc/out/run\.yaml: cannot write: .*"),
    "object store": (["--out", "s3://bucket/out"], r"s3://bucket/out: object stores cannot be written yet"),
    "no such config": (["--config", "{made}/none.yaml"], r"none\.yaml: cannot be read: No such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_in_one_line(run: Run, made: Path, tmp_path: Path, name: str) -> None:
    extra, pattern = MISTAKES[name]
    places = {"made": str(made), "slides": str(made / "slides")}
    arguments = [text.format(**places) for text in extra]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    if "--model" not in arguments:
        arguments += ["--model", str(made / "pooled_linear.yaml")]
    if not extra[0].startswith("{"):
        arguments.append(str(made / "slides"))
    small = [] if name == "span" else SMALL_FLAGS[: -len(extra)] if name == "heatmap stride" else SMALL_FLAGS
    code, out, err = run("explain", *small, *arguments)
    assert code == 2
    assert out == ""
    assert re.search(pattern.format(**places), only_error(err))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["--model", "m", "--out", "o"], "SLIDE"),
        (["slide", "--out", "o"], "--model"),
        (["slide", "--model", "m"], "--out"),
    ],
)
def test_what_is_missing_is_named(run: Run, arguments: list[str], missing: str) -> None:
    code, _, err = run("explain", *arguments)
    assert code == 2
    assert only_error(err) == f"{missing} is missing; give it on the command line or in the --config file"


CONFIGS = {
    "overlp: 0.5": r"unknown key 'overlp'; did you mean overlap\?",
    "zzz: 1": r"unknown key 'zzz'; expected one of slide, model",
    "overlap: [": r"not a YAML file",
    "- overlap": r"expected keys and values",
    "overlap: lots": r"overlap: ",
    "slide: 3": r"slide is 3, expected a path or a list of paths",
    "slide: [3]": r"slide is \[3\], expected a path or a list of paths",
    "out: [a]": r"out is \['a'\], expected text",
    "workers: two": r"workers is 'two', expected a whole number",
    "workers: true": r"workers is True, expected a whole number",
    "\x07: 1": r"not a YAML file",
}


@pytest.mark.parametrize("text", CONFIGS)
def test_a_mistake_in_a_config_file_is_told_in_one_line(run: Run, made: Path, tmp_path: Path, text: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text, encoding="utf-8")
    code, _, err = run(
        "explain", "--config", config, "--model", made / "pooled_linear.yaml",
        *([] if "out" in text else ["--out", tmp_path / "out"]), *([] if "slide" in text else [made / "slides"]),
    )  # fmt: skip
    assert code == 2
    assert re.search(CONFIGS[text], only_error(err))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_out_is_told_in_one_line(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Root may write anywhere, so the operating system's answer is played."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        code, _, err = run(
            "explain", made / "slides", "--model", made / "pooled_linear.yaml", "--out", tmp_path / "out", *SMALL_FLAGS
        )
    assert code == 2
    assert re.search(rf"{tmp_path}/out/run\.yaml: cannot write: .*choose another --out", only_error(err))
    assert not contents(tmp_path)


def test_results_of_another_model_are_refused(run: Run, made: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    code, _, err = run(
        "explain", made / "slides", "--model", made / "other_linear.yaml", "--out", tmp_path, *SMALL_FLAGS
    )
    assert code == 2
    assert re.search(r"holds results of another model .*choose another --out.* --overwrite", only_error(err))
    assert differing(tmp_path, finished) == []


def test_validate_and_info_of_nothing(run: Run, tmp_path: Path) -> None:
    code, _, err = run("validate", tmp_path)
    assert code == 2
    assert "no run.yaml there, expected a folder that 'wsi-gradcam explain' made" in only_error(err)
    code, _, err = run("info", tmp_path / "none.svs")
    assert code == 2
    assert "does not exist" in only_error(err)
    code, _, err = run("info")
    assert code == 2
    assert "nothing to show; give slide files, or --model" in only_error(err)


def test_unknown_flags_and_commands_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["explain", "--nonsense"], ["nonsense"], [], ["explain", "--workers", "1", "--scheduler", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "--nonsense" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"wsi-gradcam {__version__}\n"


# --- some slides failed: exit code 1 --------------------------------------------------------------------------------


def not_a_slide(good: Path, path: Path) -> None:
    path.write_text("not a slide", encoding="utf-8")


def cut_short(good: Path, path: Path) -> None:
    truncate(good, path, 0.4)


def without_mpp(good: Path, path: Path) -> None:
    strip_mpp(good, path)


def with_screen_mpp(good: Path, path: Path) -> None:
    set_resolution(good, path, 72, 72, unit=2)


BAD: dict[Callable[[Path, Path], None], str] = {
    not_a_slide: r"bad\.tif: not a slide that OpenSlide reads.* expected Aperio",
    cut_short: r"bad\.tif: ",
    without_mpp: r"bad\.tif: the file has no openslide\.mpp-.; give the micrometres per pixel with --mpp",
    with_screen_mpp: r"bad\.tif: openslide\.mpp-. is 352\.\d*, expected .*with --mpp",
}


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_slide_is_named_and_the_others_are_finished(
    run: Run, made: Path, finished: Path, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    shutil.copytree(made / "slides", slides)
    damage(slides / "a.tif", slides / "bad.tif")
    code, printed, err = run("explain", slides, "--model", made / "pooled_linear.yaml", "--out", out, *SMALL_FLAGS)
    assert code == 1
    assert printed == f"1 failed, 2 ok; results in {out}\n"
    row = rows_of(out)["bad.tif"]
    assert re.search(BAD[damage], row["error"])
    assert (row["status"], row["patches"]) == ("failed", "0")
    (line,) = (line for line in err.splitlines() if line.startswith("[3/3] bad.tif: failed, "))
    assert line.endswith(row["error"])
    assert "Traceback" not in err
    assert {name for name in differing(out, finished) if not name.startswith("bad.tif/")} == {"slides.csv"}
    assert {name: rows_of(out)[name]["status"] for name in ("a.tif", "b.tif")} == {"a.tif": "ok", "b.tif": "ok"}


def test_missing_mpp_is_mended_by_the_flag(run: Run, made: Path, finished: Path, tmp_path: Path) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    strip_mpp(made / "slides" / "b.tif", slides / "b.tif")
    arguments = ["--model", made / "pooled_linear.yaml", "--out", tmp_path / "out", *SMALL_FLAGS]
    code, _, _ = run("explain", slides, *arguments, "--mpp", "0.25")
    assert code == 0
    assert differing(tmp_path / "out" / "b.tif" / "cams.zarr", finished / "b.tif" / "cams.zarr") == []


def test_a_model_that_gives_nan_names_the_patch(run: Run, made: Path, tmp_path: Path) -> None:
    code, _, err = run(
        "explain", made / "slides", "--model", made / "not_a_number.yaml", "--out", tmp_path, *SMALL_FLAGS
    )
    assert code == 1
    rows = rows_of(tmp_path)
    assert rows["b.tif"]["status"] == "ok"
    assert rows["a.tif"]["error"] == (
        f"{made}/slides/a.tif: the model gives NaN or infinite values for the patch at level-0 y 192, x 192; "
        "check its weights and normalisation"
    )
    assert "Traceback" not in err


def test_a_slide_whose_name_looks_like_markup(
    run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x[").mkdir()
    (tmp_path / "x[" / "b].tif").write_text("no slide", encoding="utf-8")
    (tmp_path / "y[red].tif").write_text("no slide", encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "300")
    code, _, err = run("explain", tmp_path, "--model", made / "pooled_linear.yaml", "--out", tmp_path / "out")
    assert code == 1
    listed = err.split("failed:\n")[1].splitlines()
    assert len(listed) == 1  # one cause, one line
    assert listed[0].startswith("  x[/b].tif, y[red].tif: not a slide")


# --- the disk is full ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [3, 30, 60, 80, 95])
def test_a_full_disk_stops_the_run_and_loses_nothing(
    run: Run, made: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    left, replace = written, os.replace

    def filling(*arguments: Any) -> None:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left -= 1
        replace(*arguments)

    arguments = ["explain", made / "slides", "--model", made / "pooled_linear.yaml", "--out", tmp_path, *SMALL_FLAGS]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", filling)
        code, _, err = run(*arguments)
    assert code == 1
    last = err.splitlines()[-1]
    assert re.fullmatch(
        rf"error: {tmp_path}/.*: cannot write: the disk is full; free space and run the same command again, "
        "nothing finished is lost", last
    )  # fmt: skip
    assert sum("error" in line for line in err.splitlines()) == 1
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cam/c/**/*") if path.is_file()}
    recorded = {path.parts[-4] + path.stem for path in tmp_path.glob("*/manifest/spans/*.json")}
    code, _, _ = run(*arguments)
    assert code == 0
    assert differing(tmp_path, finished) == []
    for path, stamp in stamps.items():
        if path.parts[-8] + f"{int(path.parts[-4]):06d}" in recorded:
            assert path.stat().st_mtime_ns == stamp


def test_ctrl_c_says_how_to_go_on(run: Run, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wsi_gradcam.finish.draw_overview", interrupted)
    code, _, err = run(
        "explain", made / "slides", "--model", made / "pooled_linear.yaml", "--out", tmp_path, *SMALL_FLAGS
    )
    assert code == 130
    assert err.splitlines()[-1] == "stopped; run the same command again to go on where it stopped"


# --- what is printed -------------------------------------------------------------------------------------------------


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
    (tmp_path / "slides.txt").touch()
    failed = command("explain", tmp_path / "slides.txt", *arguments[1:], *SMALL_FLAGS)
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


def test_a_dry_run_names_slides_that_cannot_be_planned(run: Run, made: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    shutil.copy(made / "slides" / "b.tif", tmp_path / "slides")
    (tmp_path / "slides" / "bad.tif").touch()
    arguments = [
        "explain", tmp_path / "slides", "--model", made / "pooled_linear.yaml", "--out", tmp_path / "out", "--dry-run",
    ]  # fmt: skip
    code, printed, err = run(*arguments)
    assert code == 1
    assert re.fullmatch(r"cannot be planned: bad\.tif: .*bad\.tif: not a slide .*\n", err)
    assert "1 slides" in printed
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
        "a.tif": ("ok", 56), "b.tif": ("ok", 20),
    }  # fmt: skip
    assert run("validate", tmp_path, "--json") == (0, "[]\n", "")
    (tmp_path / "a.tif" / "overview.png").unlink()
    code, printed, _ = run("validate", tmp_path, "--json")
    assert code == 1
    assert json.loads(printed) == [{"slide": "a.tif", "problem": "overview.png is missing"}]
    code, printed, _ = run("validate", tmp_path)
    assert (code, printed) == (1, "a.tif: overview.png is missing\n1 problems found\n")


def test_info_of_slides_and_models(run: Run, made: Path) -> None:
    code, printed, _ = run("info", made / "slides" / "a.tif", "--model", made / "pooled_linear.yaml", "--json")
    assert code == 0
    slide, model = json.loads(printed)
    assert slide["size"] == "390 x 500 px"
    assert slide["mpp (y, x)"] == "0.25, 0.25 um"
    assert model["layer"] == "features (12 x 4 x 4)"
    assert model["classes"] == "other, marker"
    assert model["parameters"] == f"{3 * 8 * 25 + 8 + 8 * 12 * 9 + 12 + 12 * 2 + 2:,}"
    code, printed, _ = run("info", made / "slides" / "a.tif")
    assert code == 0
    assert re.search(r"^ +size  390 x 500 px$", printed, re.MULTILINE)


def test_info_tells_an_unusable_mpp(run: Run, made: Path, tmp_path: Path) -> None:
    strip_mpp(made / "slides" / "a.tif", tmp_path / "a.tif")
    _, printed, _ = run("info", tmp_path / "a.tif")
    assert "unusable: the file has no openslide.mpp-" in printed


# --- configuration ---------------------------------------------------------------------------------------------------


def test_flags_override_the_config_file(run: Run, made: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    values = {
        "slide": str(made / "slides" / "b.tif"), "model": str(made / "pooled_linear.yaml"), "out": "never",
        "heatmap-stride": 16, "overlap": 0.5, "batch_size": 2, "target": "other", "min_tissue": None,
        "scheduler": "tcp://127.0.0.1:1",
    }  # fmt: skip
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    code, _, err = run(
        "explain", "--config", config, "--out", tmp_path / "out", "--overlap", "0", "--target", "marker", "--target",
        "predicted", "--mpp", "0.25,0.3", "--workers", "1",
    )  # fmt: skip
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


def test_every_setting_is_a_flag() -> None:
    assert {name.replace("-", "_") for name, _, _ in SETTINGS} | {"target"} == set(Settings.model_fields)


# --- progress --------------------------------------------------------------------------------------------------------


def test_lines_count_patches_and_slides(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slides").mkdir()
    for name in ("a.tif", "b.tif"):
        shutil.copy(made / "slides" / name, tmp_path / "slides")
    (tmp_path / "slides" / "c.tif").touch()
    spec = toy_spec("pooled_linear")
    lines = Lines()
    explain(tmp_path / "slides", spec, tmp_path / "out", **SMALL, listener=lines)
    assert (lines.slides, lines.slides_done, lines.patches, lines.patches_done) == (3, 3, 76, 76)
    manifest = tmp_path / "out" / "a.tif" / "manifest"
    shutil.rmtree(tmp_path / "out" / "b.tif")
    (manifest / "done.json").unlink()
    (manifest / "spans").mkdir()
    for span in (0, 4):  # 12 and 8 patches
        (manifest / "spans" / f"{span:06d}.json").write_text('{"digest": "", "causes": {}}', encoding="utf-8")
    capsys.readouterr()
    lines = Lines()
    explain(tmp_path / "slides", spec, tmp_path / "out", **SMALL, listener=lines)
    assert (lines.slides_done, lines.patches, lines.patches_done) == (3, 56, 56)
    assert "a.tif: 56 patches, 36 to do" in capsys.readouterr().err.splitlines()
    assert lines.rate() > 0


def test_lines_tell_the_rate_now_and_then(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "LINE_EVERY_S", 0.0)
    explain(made / "slides" / "b.tif", toy_spec("pooled_linear"), tmp_path, **SMALL, listener=Lines())
    assert re.search(r"^12 patches, \d+ patches/s$", capsys.readouterr().err, re.MULTILINE)


def test_bars_reach_their_ends_and_tell_failures(made: Path, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    shutil.copy(made / "slides" / "b.tif", tmp_path / "slides")
    (tmp_path / "slides" / "c[x].tif").touch()
    console = Console(file=StringIO(), width=300, force_terminal=False)
    with Progress("{task.fields[rate]}", console=console) as progress_bars:
        bars = Bars(progress_bars)
        explain(tmp_path / "slides", toy_spec("pooled_linear"), tmp_path / "out", **SMALL, listener=bars)
        found = {task.description: (task.completed, task.total) for task in progress_bars.tasks}
    assert found == {"slides": (2, 2), "patches": (20, 20)}
    assert isinstance(console.file, StringIO)
    assert "[2/2] c[x].tif: failed" in console.file.getvalue()
    assert "[1/2]" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("terminal", "quiet", "kind"), [(True, False, Bars), (False, False, Lines), (True, True, report.Quiet)]
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
        SlideRecord(SlideEntry(str(i), f"/{i}"), status, "why" if status == "failed" else "", 1, 0, 1.0)
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

    monkeypatch.setattr("wsi_gradcam.api.write_run", full)
    code, _, err = run("explain", made / "slides", "--model", made / "pooled_linear.yaml", "--out", tmp_path)
    assert (code, only_error(err)) == (2, "the disk is full")
    assert not list(tmp_path.iterdir())
