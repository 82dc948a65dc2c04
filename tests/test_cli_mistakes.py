"""Mistakes, bad slides and full disks on the command line: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import cli_runs
from tests.cli_runs import SMALL_FLAGS, Run, only_error
from tests.runs import contents, differing, rows_of
from tests.synthetic import set_resolution, strip_mpp, truncate
from wsi_gradcam.cli.main import COMMANDS, main

run, made, finished = cli_runs.run, cli_runs.made, cli_runs.finished  # fixtures


# --- nothing could start: exit code 2 and one line ------------------------------------------------------------------

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such slide": (["{slides}/none.svs"], r"{slides}/none\.svs: does not exist, .*check the path"),
    "misspelt slide": (["{slides}/aa.tif"], r"{slides}/aa\.tif: does not exist, .*did you mean a\.tif.*\?"),
    "empty folder": (
        ["{made}/empty"],
        r"{made}/empty: no slides in this folder; .*\.svs .*give the folder with the slides",
    ),
    "folder of pictures": (
        ["{made}/pictures"],
        r"{made}/pictures: no slides in this folder; .*pictures must be named, as in '{made}/pictures/\*\.PNG'",
    ),
    "out is the archive": (
        ["--out", "{slides}"],
        r"{slides}/a\.tif: is where the slide's own results would be; choose another --out, such as {slides}/results",
    ),
    "no such class": (["--target", "tumor"], r"target 'tumor' is not a class .*expected one of other, marker"),
    "no such index": (["--target", "2"], r"target '2' is not a class .*an index below 2"),
    "no such layer": (["--layer", "layer4"], r"no layer 'layer4'; it has features, fc"),
    "layer without a map": (["--layer", "fc"], r"layer 'fc' has output of shape .* expected a map"),
    "wrong shape": (["--model", "{made}/wrong_shape.yaml"], r"wrong_shape: returns shape .* expected \(2, classes\)"),
    "no network": (
        ["--model", "{made}/not_a_module.yaml"],
        r"does not return a network; expected a function that returns a torch\.nn\.Module",
    ),
    "no function": (["--model", "{made}/gone.yaml"], r"'tests\.toy_models' has no function 'gone'"),
    "class count": (["--model", "{made}/three_classes.yaml"], r"3 classes are named, but the model has 2 outputs"),
    "model mpp": (["--model", "{made}/mpp_unknown.yaml"], r"micrometres per pixel .*--patch-mpp"),
    "no such model": (["--model", "resnet"], r"resnet: no such model; expected a model file"),
    "no such model file": (["--model", "{made}/none.yaml"], r"none\.yaml: cannot be read: .*check the path"),
    "unknown model key": (["--model", "{made}/unknown_key.yaml"], r"unknown_key\.yaml: layr: unknown key"),
    "method": (["--method", "magic"], r"method 'magic' is not known; expected one of cam, gradcam"),
    "reader": (["--reader", "magic"], r"reader 'magic' is not known; expected one of auto, openslide"),
    "overlap": (["--overlap", "1"], r"overlap: .*less than 1"),
    "overlap and stride": (["--overlap", "0.5", "--stride-px", "16"], r"overlap and stride_px .* give only one"),
    "span": (["--span-patches", "10", "--batch-size", "4"], r"span_patches is 10, expected a multiple of batch_size 4"),
    "heatmap stride": (["--heatmap-stride", "12"], r"heatmap_stride is 12, expected a power of two"),
    "mpp text": (["--mpp", "fine"], r"--mpp is 'fine', expected a number such as 0\.25, or Y,X"),
    "mpp count": (["--mpp", "1,2,3"], r"mpp: .*at most 2 items"),
    "device": (["--device", "nonsense"], r"device 'nonsense' cannot be used here: .*try --device cpu"),
    "workers": (["--workers", "0"], r"workers is 0, expected 1 or more"),
    "workers of a dry run": (["--workers", "0", "--dry-run"], r"workers is 0, expected 1 or more"),
    "out below a file": (["--out", "{made}/file/out"], r"{made}/file/out.*choose another --out"),
    "out is a file": (["--out", "{made}/file"], r"{made}/file.*choose another --out"),
    "out in /proc": (["--out", "/proc/out"], r"/proc/out/claim\.json: cannot write: .*"),
    "another object store": (["--out", "gs://bucket/out"], r"gs://bucket/out: .*expected .*s3://"),
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
    command = "wsi-gradcam explain slides/ --model oral-tumour --out results/"
    assert only_error(err) == f"{missing} is missing; give it here or in the --config file, as in: {command}"


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
        "explain",
        "--config",
        config,
        "--model",
        made / "pooled_linear.yaml",
        *([] if "out" in text else ["--out", tmp_path / "out"]),
        *([] if "slide" in text else [made / "slides"]),
    )
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


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("audit {} --only faithfulnes", "faithfulness"),
        ("audit {} --fail-on stabilty", "stability"),
        ("export {} --to pngs", "png"),
    ],
)
def test_misspelt_questions_and_formats_are_recognised(line: str, meant: str, run: Run, finished: Path) -> None:
    code, _, err = run(*(part.format(finished) for part in line.split()))
    assert code == 2
    assert f"did you mean {meant}" in only_error(err)


@pytest.mark.parametrize("command", ["audit", "view", "export --to png", "status", "validate", "card oral-tumour"])
def test_a_place_without_results_is_answered_with_what_makes_or_is_them(
    command: str, run: Run, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "outer/notes").mkdir(parents=True)
    (tmp_path / "outer/notes/a.txt").write_text("notes", encoding="utf-8")
    name, *flags = command.split()
    first, rest = (flags, []) if name == "card" else ([], flags)
    code, _, err = run(name, *first, tmp_path / "none", *rest)
    assert code == 2
    mend = f"check the path, or create them: wsi-gradcam explain SLIDES --model MODEL --out {tmp_path}/none"
    assert only_error(err) == f"{tmp_path}/none: does not exist or is empty, expected results of explain; {mend}"
    code, _, err = run(name, *first, tmp_path / "outer", *rest)
    assert code == 2
    none = f"{tmp_path}/outer: has no run.yaml, so it is not a result"
    assert only_error(err) == f"{none}; give the --out of an explain command"
    (tmp_path / "outer/results").symlink_to(finished)
    code, _, err = run(name, *first, tmp_path / "outer", *rest)
    assert code == 2
    assert only_error(err) == f"{none}; did you mean {tmp_path}/outer/results?"


def test_info_of_nothing(run: Run, tmp_path: Path) -> None:
    code, _, err = run("info", tmp_path / "none.svs")
    assert code == 2
    assert "does not exist" in only_error(err)
    code, _, err = run("info")
    assert code == 2
    assert "nothing to describe; give slide files, results, or --model" in only_error(err)


# What argparse does not take: one line, with what may be meant or a command that works.
SLIPS = {
    "": "COMMAND is missing, as in: wsi-gradcam demo; all commands: wsi-gradcam --help",
    "explan a.tif": "explan: no such command; did you mean explain?",
    "frobnicate": f"frobnicate: no such command; expected one of {', '.join(COMMANDS)}",
    "explain a.tif --methd gradcam": "--methd: no such flag; did you mean --method or --bag-method?",
    "explain a.tif --modle=oral-tumour": "--modle: no such flag; did you mean --model?",
    "explain a.tif -m oral-tumour": "-m: no such flag; see wsi-gradcam explain --help",
    "view out --prt 1": "--prt: no such flag; did you mean --port?",
    "audit out out2": "out2: one argument too many; expected wsi-gradcam audit OUT [options]",
    "explain a.tif --window gauss": "--window is 'gauss', expected one of hann, uniform",
    "explain a.tif --engine openvno": (
        "--engine is 'openvno', expected one of auto, eager, compile, cudagraphs, openvino; did you mean openvino?"
    ),
    "explain a.tif --workers two": "--workers is 'two', expected a whole number",
    "explain a.tif --min-tissue much": "--min-tissue is 'much', expected a number",
    "explain a.tif --workers 1 --scheduler x": "--workers and --scheduler exclude each other; give one of them",
    "card my-model.yaml": "OUT is missing, as in: wsi-gradcam card my-model.yaml results/",
    "card": "MODEL and OUT are missing, as in: wsi-gradcam card my-model.yaml results/",
    "export out": "--to is missing, as in: wsi-gradcam export results/ --to qupath",
    "export out --to": "--to needs a value, as in: wsi-gradcam export results/ --to qupath",
    "view out --port": "--port needs a value; see wsi-gradcam view --help",
}


@pytest.mark.parametrize("line", SLIPS)
def test_a_slip_of_the_hand_is_told_in_one_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"error: {SLIPS[line]}\n")


def test_a_method_that_is_written_otherwise_is_found(run: Run, made: Path, tmp_path: Path) -> None:
    given = [made / "slides", "--model", made / "pooled_linear.yaml", "--out", tmp_path / "out"]
    code, _, err = run("explain", *given, "--method", "grad-cam")
    assert code == 2
    assert "did you mean gradcam" in only_error(err)


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
    not_a_slide: r"bad\.tif: not a slide that OpenSlide can read.* expected Aperio",
    cut_short: r"bad\.tif: ",
    without_mpp: r"bad\.tif: the file has no openslide\.mpp-.; give the micrometres per pixel, such as --mpp 0.25",
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
    others = {name for name in differing(out, finished) if not name.startswith("bad.tif/")}
    assert others == {"slides.csv", "slides.jsonl"}  # which have paths
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
        f"{made}/slides/a.tif: the model gives NaN or infinite values for the patch at level-0 x 192, y 192; "
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
        rf"error: {tmp_path}/.*: cannot write: the disk is full; free space and run the same command again; "
        "nothing finished is lost",
        last,
    )
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

    monkeypatch.setattr("wsi_gradcam.run.stitching.draw_overview", interrupted)
    code, _, err = run(
        "explain", made / "slides", "--model", made / "pooled_linear.yaml", "--out", tmp_path, *SMALL_FLAGS
    )
    assert code == 130
    assert err.splitlines()[-1] == "stopped; run the same command again to continue; nothing finished is lost"
