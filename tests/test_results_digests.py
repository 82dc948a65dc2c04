"""All that a result means is covered by a digest: whatever is changed, swapped, lost or added, `validate` names it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
import zarr

from tests.made_results import changed, leaves
from tests.runs import SMALL, toy_spec
from tests.synthetic import write_marked_pair
from wsi_gradcam import audit_run, open_result
from wsi_gradcam.api import explain
from wsi_gradcam.cli.main import main
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results import validation
from wsi_gradcam.results.run_files import RunFolder
from wsi_gradcam.results.seals import KEY
from wsi_gradcam.results.slide_tables import COLUMNS, record_slides
from wsi_gradcam.results.validation import check, validate

SETTINGS = {**SMALL, "heatmap_stride": 2, "batch_size": 16, "span_patches": 64, "overlap": 0.5}
AUDIT: dict[str, Any] = {"patches": 16, "seed": 3, "only": ("stability",), "trust_code": True}
SEED = 24
FLIPS = int(os.environ.get("WSI_GRADCAM_TEST_FLIPS", "130"))
EDITS = int(os.environ.get("WSI_GRADCAM_TEST_EDITS", "150"))
LOG = re.compile(r"(audit/)?log/.*|(.*/)?\.lock")  # covered by nothing: docs/results.md says so


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides `a.tif` and `b.tif`, explained and audited in `out`, whose display windows were asked for."""
    folder = tmp_path_factory.mktemp("good")
    write_marked_pair(folder / "slides", 200, 264)
    explain(folder / "slides", toy_spec("pooled_linear"), folder / "out", **SETTINGS)
    open_result(folder / "out").windows()
    audit_run(folder / "out", **AUDIT)
    return folder


@pytest.fixture(scope="module")
def shared_copy(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose files are changed one at a time, and put back."""
    return Path(shutil.copytree(good / "out", tmp_path_factory.mktemp("copy") / "out"))


@pytest.fixture
def out(good: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(good / "out", tmp_path / "out"))


def files_in(out: Path) -> list[str]:
    names = (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    return sorted(name for name in names if not LOG.fullmatch(name))


def told(out: Path) -> list[str]:
    return [f"{finding.slide}: {finding.problem}" for finding in validate(out)]


def noticed(out: Path, name: str) -> bool:
    """Whether anything is said of a result in which this file has changed.

    Nothing is looked for once something was found, nor in the other slides than the one that the file is of.
    """
    check_slide = validation.__dict__["_check"]

    def first(slide: str, folder: Any, run: Any, old: list[str]) -> Iterator[str]:
        is_of_another = not name.startswith(f"{slide}/") and any(name.startswith(f"{each}/") for each in run.rows)
        if not run.findings and not is_of_another:
            yield from islice(check_slide(slide, folder, run, old), 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_check", first)
        return bool(told(out))


def unnoticed(out: Path, name: str, data: bytes) -> bool:
    """Whether nothing is said with these bytes in a file, which gets its own back."""
    path = out / name
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        return not noticed(out, name)
    finally:
        path.write_bytes(before)


def same_values(out: Path, name: str, data: bytes) -> bool:
    """Whether an array has the same values with these bytes in a chunk: the last ones of a Zstd frame may be any."""
    array, is_chunk, _ = name.partition("/c/")
    if not is_chunk:
        return False
    before, kept = zarr.open_array(out / array, mode="r")[...], (out / name).read_bytes()
    (out / name).write_bytes(data)
    try:
        return np.array_equal(before, zarr.open_array(out / array, mode="r")[...], equal_nan=True)
    finally:
        (out / name).write_bytes(kept)


def test_a_good_result_is_silent(good: Path) -> None:
    assert not any(noticed(good / "out", name) for name in ("run.yaml", "a.tif/overview.png", "b.tif/overview.png"))
    found = check(good / "out")
    assert (found.findings, found.notes, found.failed) == ([], [], [])


def test_the_result_has_every_kind_of_file(good: Path) -> None:
    """Otherwise the tests below would prove little."""
    names = "\n".join(files_in(good / "out"))
    for part in ("run.yaml", "slides.jsonl", "display.json", "run.html", "audit/files.json", "spread.ome.zarr/0/c/"):
        assert part in names
    assert "cams.zarr/tissue/c/0" in names
    assert "heatmap.ome.zarr/labels/coverage/0/c" in names


def test_flipped_bytes_of_any_file_are_noticed(shared_copy: Path) -> None:
    draw, names = random.Random(SEED), files_in(shared_copy)
    silent = []
    for number in range(FLIPS):
        name = names[number % len(names)] if number < len(names) else draw.choice(names)
        data = bytearray((shared_copy / name).read_bytes())
        place, other = draw.randrange(len(data)), draw.randrange(1, 256)
        data[place] ^= other
        if unnoticed(shared_copy, name, bytes(data)) and not same_values(shared_copy, name, bytes(data)):
            silent.append((name, place, other))
    assert silent == []
    assert told(shared_copy) == []


def test_files_cut_short_or_emptied_are_noticed(shared_copy: Path) -> None:
    draw = random.Random(SEED)
    for name in files_in(shared_copy):
        data = (shared_copy / name).read_bytes()
        kept = draw.choice([0, len(data) // 2, len(data) - 1])
        assert not unnoticed(shared_copy, name, data[:kept]), (name, kept)


def test_lost_files_are_noticed(shared_copy: Path) -> None:
    # Results that were never asked for have none; an audit without numbers is one that is not finished.
    silent = {"display.json", "status.json", "audit/status.json"}
    for name in files_in(shared_copy):
        path = shared_copy / name
        data = path.read_bytes()
        path.unlink()
        if name == "run.yaml":
            assert main(["validate", str(shared_copy)]) == 2
        else:
            assert noticed(shared_copy, name) is (name not in silent), name
        path.write_bytes(data)


def written(name: str, value: Any) -> bytes:
    """As the package writes it, so that nothing but the value is another."""
    if name.endswith(".yaml"):
        return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode()
    if name.endswith(".jsonl"):
        return b"".join(json.dumps(line).encode() + b"\n" for line in value)
    return json.dumps(value, indent=1, sort_keys=name.endswith("done.json")).encode()


def read(path: Path) -> Any:
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_bytes())
    return (
        [json.loads(s) for s in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else json.loads(path.read_bytes())
    )


def edits_of(out: Path) -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """Each value of each JSON and YAML file: changed, not a number, gone."""
    for name in files_in(out):
        if name.endswith((".json", ".yaml", ".jsonl")):
            for way in leaves(read(out / name)):
                yield from ((name, way, kind) for kind in ("other", "nan", "gone"))


def test_any_value_in_json_and_yaml_that_is_changed_or_gone_is_noticed(shared_copy: Path) -> None:
    """All of them in the long form (WSI_GRADCAM_TEST_EDITS=0), here some of each file."""
    by_file: dict[str, list[tuple[tuple[Any, ...], str]]] = {}
    for name, way, kind in edits_of(shared_copy):
        by_file.setdefault(name, []).append((way, kind))
    draw, most = random.Random(SEED), max(1, EDITS // len(by_file)) if EDITS else None
    silent = []
    for name, edits in by_file.items():
        value = read(shared_copy / name)
        for way, kind in edits if most is None else draw.sample(edits, min(most, len(edits))):
            if way == (KEY,) and kind == "gone" and name in WITHOUT_SEAL:
                continue
            if unnoticed(shared_copy, name, written(name, changed(value, way, kind))):
                silent.append((name, way, kind))
    assert silent == []


# A file whose seal is gone, with nothing else changed, is as one that an older version wrote.
WITHOUT_SEAL = {"run.yaml", "display.json", "status.json", "audit/status.json"}


def cells_of(out: Path) -> Iterator[tuple[int, int]]:
    lines = (out / "slides.csv").read_text().splitlines()
    yield from ((row, column) for row in range(len(lines)) for column in range(len(COLUMNS)))


def with_cell(out: Path, row: int, column: int, text: str) -> bytes:
    lines = [line.split(",") for line in (out / "slides.csv").read_text().splitlines()]
    lines[row][column] = text
    return "".join(",".join(cells) + "\n" for cells in lines).encode()


def test_any_cell_of_slides_csv_that_is_changed_is_noticed(shared_copy: Path) -> None:
    for row, column in cells_of(shared_copy):
        for text in ("7", "nan", "failed"):
            assert not unnoticed(shared_copy, "slides.csv", with_cell(shared_copy, row, column, text)), (row, column)


def swap(first: Path, second: Path) -> None:
    aside = first.with_name(f"{first.name}.aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def with_array(out: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Changes the values of an array with zarr itself: nothing is unreadable, it is only wrong."""
    array: Any = zarr.open_array(out / name, mode="r+")
    array[...] = change(np.array(array[...]))


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = read(path)
    change(value)
    path.write_bytes(written(path.name, value))


def omero(out: Path) -> Any:
    return lambda change: edit(
        out / "b.tif/heatmap.ome.zarr/zarr.json", lambda a: change(a["attributes"]["ome"]["omero"]["channels"])
    )


def swap_labels(channels: list[Any]) -> None:
    channels[0]["label"], channels[1]["label"] = channels[1]["label"], channels[0]["label"]


# What the issue names, and more of its kind: what is done to OUT, and the file that must be named.
MEANT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "labels of channels swapped": (lambda o: omero(o)(swap_labels), "heatmap.ome.zarr/zarr.json"),
    "channels swapped": (lambda o: omero(o)(lambda c: c.reverse()), "heatmap.ome.zarr/zarr.json"),
    "values of channels swapped": (lambda o: with_array(o, "b.tif/heatmap.ome.zarr/0", lambda v: v[::-1]), "level 0"),
    "a window": (lambda o: omero(o)(lambda c: c[0]["window"].update(end=7.5)), "heatmap.ome.zarr/zarr.json"),
    "a window of NaN": (lambda o: omero(o)(lambda c: c[0]["window"].update(end=float("nan"))), "heatmap.ome.zarr"),
    "the order of maps": (
        lambda o: edit(o / "b.tif/cams.zarr/zarr.json", lambda a: a["attributes"]["maps"].reverse()),
        "cams.zarr/zarr.json",
    ),
    "pen": (lambda o: with_array(o, "b.tif/cams.zarr/pen", lambda v: v + 0.5), "pen of cams.zarr"),
    "glass": (lambda o: with_array(o, "b.tif/cams.zarr/glass", lambda v: 1 - v), "glass of cams.zarr"),
    "mpp of the model": (lambda o: edit(o / "run.yaml", lambda r: r["model"].update(mpp=0.6)), "run.yaml"),
    "mean": (lambda o: edit(o / "run.yaml", lambda r: r["model"].update(mean=[0.5] * 3)), "run.yaml"),
    "activation": (lambda o: edit(o / "run.yaml", lambda r: r["model"].update(activation="sigmoid")), "run.yaml"),
    "footprint": (lambda o: edit(o / "b.tif/manifest/plan.json", lambda p: p.update(footprint=[60, 60])), "plan.json"),
    "view": (lambda o: edit(o / "b.tif/manifest/plan.json", lambda p: p.update(view=[1, 1, 60, 60])), "plan.json"),
    "heatmaps of two slides swapped": (
        lambda o: swap(o / "a.tif/heatmap.ome.zarr", o / "b.tif/heatmap.ome.zarr"),
        "heatmap.ome.zarr",
    ),
    "patch stores of two slides swapped": (lambda o: swap(o / "a.tif/cams.zarr", o / "b.tif/cams.zarr"), "cams.zarr"),
    "pictures of two slides swapped": (lambda o: swap(o / "a.tif/overview.png", o / "b.tif/overview.png"), "overview"),
    "tables of two slides swapped": (lambda o: swap(o / "a.tif/patches.parquet", o / "b.tif/patches.parquet"), "parq"),
    "records of two slides swapped": (lambda o: swap(o / "a.tif/manifest", o / "b.tif/manifest"), "results of a.tif"),
    "two slides swapped": (lambda o: swap(o / "a.tif", o / "b.tif"), "results of a.tif"),
    "spreads of two slides swapped": (
        lambda o: swap(*sorted((o / "audit").glob("*.tif/spread.json"))),
        "audit/a.tif/spread.json",
    ),
    "a lost chunk": (lambda o: (o / "b.tif/heatmap.ome.zarr/0/c/0/0/0").unlink(), "level 0 of heatmap.ome.zarr"),
    "a lost chunk of known values": (lambda o: (o / "b.tif/cams.zarr/tissue/c/0").unlink(), "tissue"),
    "a chunk beyond the array": (
        lambda o: shutil.copy(o / "b.tif/cams.zarr/tissue/c/0", o / "b.tif/cams.zarr/tissue/c/1"),
        "cams.zarr/tissue/c/1 is not a file of these results",
    ),
    "a file that is not ours": (lambda o: (o / "b.tif/notes.txt").touch(), "notes.txt is not a file of these results"),
    "an array that is not ours": (
        lambda o: shutil.copytree(o / "b.tif/cams.zarr/pen", o / "b.tif/cams.zarr/more"),
        "cams.zarr/more/zarr.json is not a file",
    ),
    "a file more in the audit": (lambda o: (o / "audit/b.tif/more.npz").touch(), "audit/b.tif/more.npz is not a file"),
    "a line of slides.jsonl lost": (
        lambda o: edit(o / "slides.jsonl", lambda lines: lines.pop()),
        "b.tif: is not in slides.jsonl",
    ),
    "a row of slides.csv lost": (
        lambda o: (o / "slides.csv").write_bytes(b"".join((o / "slides.csv").read_bytes().splitlines(True)[:2])),
        "b.tif: is not finished",
    ),
    "a slide lost": (lambda o: shutil.rmtree(o / "b.tif"), "b.tif: is not finished"),
    "deep JSON": (lambda o: (o / "b.tif/manifest/done.json").write_text("[" * 100_000), "b.tif: "),
    "deep YAML": (lambda o: (o / "run.yaml").write_text("[" * 5_000), "run.yaml"),
    "a plan of wrong types": (
        lambda o: edit(o / "b.tif/manifest/plan.json", lambda p: p.update(patches="many", span=0, slide_px=[None, {}])),
        "plan.json",
    ),
    "a record of wrong types": (
        lambda o: edit(o / "b.tif/manifest/done.json", lambda d: d.update(spans=[1], blocks=3, status=[])),
        "done.json",
    ),
    "huge patches": (
        lambda o: edit(o / "b.tif/manifest/plan.json", lambda p: p.update(patches=10**15, span=10**9)),
        "plan.json",
    ),
    "a huge array": (
        lambda o: edit(o / "b.tif/cams.zarr/cam/zarr.json", lambda a: a["shape"].__setitem__(2, 10**9)),
        "cams.zarr/cam/zarr.json",
    ),
}


@pytest.mark.parametrize("name", MEANT)
def test_what_a_result_means_is_noticed_and_named(out: Path, name: str) -> None:
    change, named = MEANT[name]
    change(out)
    problems = told(out)
    assert any(named in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_values_that_agree_with_run_yaml_alone_are_noticed_by_the_slides(good: Path, out: Path, tmp_path: Path) -> None:
    """Whoever seals run.yaml again does not mend what each slide's record says of it."""
    from wsi_gradcam.results.seals import BLANK, sealed

    values = {**read(out / "run.yaml"), KEY: BLANK}
    values["model"]["std"] = [0.5, 0.5, 0.5]
    (out / "run.yaml").write_bytes(sealed(written("run.yaml", values)))
    said = "was made with another model or other targets than run.yaml states"
    assert told(out) == [f"a.tif: {said}", f"b.tif: {said}"]


def as_of_an_older_version(out: Path) -> Path:
    """Takes away what older versions did not write."""
    for name in ("run.yaml", "display.json", "status.json", "audit/status.json", "audit/plan.json"):
        edit(out / name, lambda values: values.pop(KEY))
    for page in ("run.html", "audit/run.html"):
        (out / page).write_bytes((out / page).read_bytes().split(b"\n", 1)[1])
    edit(out / "slides.jsonl", lambda lines: [line.pop(KEY) for line in lines].clear())
    rows = (out / "slides.csv").read_text().splitlines()
    (out / "slides.csv").write_text("".join(f"{row.rpartition(',')[0]}\n" for row in rows))
    (out / "audit/files.json").unlink()
    for slide in ("a.tif", "b.tif"):

        def old(values: dict[str, Any]) -> None:
            for key in (KEY, "arrays", "slide", "made_with"):
                del values[key]
            values["files"] = {name: digest for name, digest in values["files"].items() if "/" not in name}

        edit(out / slide / "manifest/done.json", old)
    return out


def test_an_old_result_is_valid_and_told_in_one_line(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(as_of_an_older_version(out))]) == 0
    assert capsys.readouterr().out == (
        f"{out}: valid\nnote: files of the run, the audit, 2 of 2 slides: made by an older version, which stored "
        "fewer digests, so it was checked only against other files\n"
    )


def test_an_old_result_goes_on_with_nothing_to_do(good: Path, out: Path) -> None:
    as_of_an_older_version(out)
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    again = explain(good / "slides", toy_spec("pooled_linear"), out, **SETTINGS)
    assert [record.skipped for record in again.records] == [True, True]
    audit_run(out, **AUDIT)
    rewritten = {name for name in files_in(out) if before.get(name) != (out / name).read_bytes()}
    assert rewritten - {"audit/metrics.json"} == {
        "run.yaml",
        "slides.csv",
        "run.html",
        "status.json",
        "audit/run.html",
        "audit/status.json",
    }
    assert check(out).findings == []
    assert len(check(out).notes) == 1


# Of old results, what follows from something else.
FOLLOWS = {
    "labels of channels swapped",
    "channels swapped",
    "values of channels swapped",
    "a window of NaN",
    "mpp of the model",
    "footprint",
    "view",
    "heatmaps of two slides swapped",
    "patch stores of two slides swapped",
    "pictures of two slides swapped",
    "tables of two slides swapped",
    "two slides swapped",
    "a lost chunk",
    "a slide lost",
    "huge patches",
}


@pytest.mark.parametrize("name", sorted(FOLLOWS))
def test_what_follows_from_other_files_is_noticed_in_old_results(out: Path, name: str) -> None:
    MEANT[name][0](as_of_an_older_version(out))
    assert told(out) != []


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("status", "no_tissue"),
        ("status", "failed"),
        ("patches", "7"),
        ("unreadable", "1"),
        ("mpp_y", "0.5"),
        ("mpp_x", "nan"),
        ("slide_digest", "0" * 32),
        ("model_digest", "0" * 64),
        ("label", "tumour"),
        ("site", "north"),
    ],
)
def test_cells_of_old_results_that_follow_from_manifests_are_noticed(out: Path, column: str, text: str) -> None:
    as_of_an_older_version(out)
    (out / "slides.csv").write_bytes(with_cell(out, 2, COLUMNS.index(column), text))
    assert any(problem.startswith("b.tif: slides.csv ") for problem in told(out))


@pytest.mark.parametrize("way", [("run_digest",), ("identity", "settings", "overlap"), ("settings", "overlap")])
def test_the_identity_in_an_old_run_yaml_is_checked(out: Path, way: tuple[str, ...]) -> None:
    as_of_an_older_version(out)
    value = read(out / "run.yaml")
    (out / "run.yaml").write_bytes(written("run.yaml", changed(value, way, "other")))
    assert any(problem.startswith(": run.yaml: ") for problem in told(out))


def test_a_sample_in_an_old_plan_of_an_audit_is_checked(out: Path) -> None:
    as_of_an_older_version(out)
    edit(out / "audit/plan.json", lambda plan: plan["samples"]["a.tif"]["patches"].reverse())
    assert told(out) == [": audit/plan.json: the sample is not that of identity"]


def test_an_audit_that_is_not_finished_is_told_and_no_damage(out: Path) -> None:
    for name in ("metrics.json", "files.json", "report.html"):
        (out / "audit" / name).unlink()
    found = check(out)
    assert found.findings == []
    assert found.notes == ["the audit is not finished, so it was not checked; run the same audit command again"]


def test_a_run_that_goes_on_with_other_threads_and_names_stays_valid(good: Path, out: Path) -> None:
    explain(good / "slides", toy_spec("pooled_linear"), out, **{**SETTINGS, "reader_threads": 1, "max_unreadable": 0.5})
    assert validate(out) == []


def test_a_record_is_written_after_the_last_change_to_what_it_covers(good: Path) -> None:
    folder = RunFolder(storage_path(good / "out")).slide("a.tif")
    record = json.loads((good / "out/a.tif/manifest/done.json").read_bytes())
    assert set(record["files"]) == set(folder.covered())
    assert set(record["arrays"]) == {"xy", "tissue", "pen", "glass"}


def test_a_slide_that_was_never_begun_and_has_left_the_archive_is_not_missed(good: Path, out: Path) -> None:
    (good / "slides/c.tif").touch()
    entries = [SlideEntry(f"{name}.tif", str(good / f"slides/{name}.tif")) for name in "abc"]
    record_slides(out / "slides.jsonl", entries)
    assert told(out) == ["c.tif: is not finished; run the same explain command again"]
    (good / "slides/c.tif").unlink()
    assert told(out) == []
