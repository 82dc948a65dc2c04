"""`validate` finds every kind of damage, names the slide and the place, and is silent on a good result."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from tests.runs import SMALL, toy_spec
from tests.synthetic import write_marked_pair
from wsi_gradcam.api import explain
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.results.validation import Finding, validate

SETTINGS = {**SMALL, "heatmap_stride": 2, "batch_size": 16, "span_patches": 64}  # two levels on a small slide


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the slides `slides/a.tif`, `slides/b.tif` and their results `out`."""
    folder = tmp_path_factory.mktemp("good")
    write_marked_pair(folder / "slides", 300, 400)
    explain(folder / "slides", toy_spec("pooled_linear"), folder / "out", **SETTINGS)
    return folder


@pytest.fixture
def damaged(good: Path, tmp_path: Path) -> Path:
    """A copy of the results, to be damaged."""
    return Path(shutil.copytree(good / "out", tmp_path / "out"))


def flip(path: Path) -> None:
    """Inverts a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """Changes a JSON file."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def scale(attributes: Any, level: int, axis: int, factor: float) -> None:
    dataset = attributes["attributes"]["ome"]["multiscales"][0]["datasets"][level]
    dataset["coordinateTransformations"][0]["scale"][axis] *= factor


def table(folder: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = folder / "patches.parquet"
    pq.write_table(change(pq.read_table(path)), path)


def other_value(folder: Path, name: str, place: tuple[int, ...], value: float) -> None:
    """Writes a value with zarr itself: nothing is unreadable, it is only wrong."""
    array: Any = zarr.open_group(folder, mode="r+")[name]
    array[place] = value


def with_first(rows: pa.Table, column: str, value: Any) -> pa.Table:
    values = [value, *rows[column].to_pylist()[1:]]
    return rows.set_column(rows.column_names.index(column), column, pa.array(values, rows.schema.field(column).type))


# Each: what is done to the folder of a slide, and what is said about it.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bits of CAMs": (lambda f: flip(f / "cams.zarr/cam/c/0/0/0/0"), ""),
    "bits of logits": (lambda f: flip(f / "cams.zarr/logits/c/0/0"), ""),
    "a CAM": (lambda f: other_value(f / "cams.zarr", "cam", (3, 1, 2, 2), 0.5), "span 0 (patches 0 to "),
    "a logit": (lambda f: other_value(f / "cams.zarr", "logits", (3, 0), 9.0), "span 0 (patches 0 to "),
    "a status": (lambda f: other_value(f / "cams.zarr", "status", (3,), 2), "span 0 (patches 0 to "),
    "a position": (lambda f: other_value(f / "cams.zarr", "xy", (3, 0), 7), "other positions"),
    "a share of tissue": (lambda f: other_value(f / "cams.zarr", "tissue", (3,), 0.1), "other shares of tissue"),
    "a lost span": (lambda f: (f / "cams.zarr/cam/c/0/0/0/0").unlink(), "span 0 (patches 0 to "),
    "bits at level 0": (lambda f: flip(f / "heatmap.ome.zarr/0/c/1/0/0"), ""),
    "bits at level 1": (lambda f: flip(f / "heatmap.ome.zarr/1/c/0/0/0"), ""),
    "a pixel at level 0": (lambda f: other_value(f / "heatmap.ome.zarr", "0", (2, 9, 9), 3.0), "level 0 of heatmap"),
    "a pixel at level 1": (lambda f: other_value(f / "heatmap.ome.zarr", "1", (3, 9, 9), 3.0), "level 1 of heatmap"),
    "a lost shard": (lambda f: (f / "heatmap.ome.zarr/1/c/3/0/0").unlink(), "level 1 of heatmap.ome.zarr, block 0"),
    "a flag": (lambda f: other_value(f / "heatmap.ome.zarr/labels/coverage", "1", (9, 9), 4), "level 1 of heatmap"),
    "a lost label": (lambda f: shutil.rmtree(f / "heatmap.ome.zarr/labels/coverage"), "not valid OME-Zarr"),
    "all labels lost": (lambda f: shutil.rmtree(f / "heatmap.ome.zarr/labels"), ""),
    "a lost level": (lambda f: shutil.rmtree(f / "heatmap.ome.zarr/1"), "not valid OME-Zarr"),
    "the scale": (lambda f: edit(f / "heatmap.ome.zarr/zarr.json", lambda a: scale(a, 0, 1, 1.01)), "level 0 of heat"),
    "a level's scale": (lambda f: edit(f / "heatmap.ome.zarr/zarr.json", lambda a: scale(a, 1, 2, 0.5)), "level 1 of"),
    "the label's scale": (
        lambda f: edit(f / "heatmap.ome.zarr/labels/coverage/zarr.json", lambda a: scale(a, 1, 0, 1.01)),
        "level 1 of label coverage",
    ),
    "a shift": (
        lambda f: edit(
            f / "heatmap.ome.zarr/zarr.json",
            lambda a: a["attributes"]["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"].append(
                {"type": "translation", "translation": [0.0, 1.0, 1.0]}
            ),
        ),
        "expected only the scale",
    ),
    "the axes": (
        lambda f: edit(
            f / "heatmap.ome.zarr/zarr.json", lambda a: a["attributes"]["ome"]["multiscales"][0]["axes"].pop()
        ),
        "not valid OME-Zarr",
    ),
    "a level not named": (
        lambda f: edit(
            f / "heatmap.ome.zarr/zarr.json", lambda a: a["attributes"]["ome"]["multiscales"][0]["datasets"].pop()
        ),
        "names 1 levels, expected 2",
    ),
    "a lost row": (lambda f: table(f, lambda t: t.slice(1)), "patches.parquet has "),
    "rows swapped": (lambda f: table(f, lambda t: t.take([1, 0, *range(2, t.num_rows)])), "other positions"),
    "a logit in the table": (lambda f: table(f, lambda t: with_first(t, "logit_marker", 5.0)), "of marker"),
    "a status in the table": (lambda f: table(f, lambda t: with_first(t, "status", "unreadable")), "status"),
    "a CAM's mean": (lambda f: table(f, lambda t: with_first(t, "cam_mean_other", 5.0)), "parquet differs"),
    "a lost table": (lambda f: (f / "patches.parquet").unlink(), ""),
    "a lost overview": (lambda f: (f / "overview.png").unlink(), "overview.png is missing"),
    "bits of the overview": (lambda f: flip(f / "overview.png"), "overview.png differs from what was made"),
    "a lost mask": (lambda f: (f / "tissue.png").unlink(), "tissue.png is missing"),
    "not finished": (lambda f: (f / "manifest/done.json").unlink(), "is not finished"),
    "not planned": (lambda f: (f / "manifest/plan.json").unlink(), "is not finished"),
    "all lost": (lambda f: shutil.rmtree(f), "is not finished"),
    "a span not recorded": (
        lambda f: edit(f / "manifest/done.json", lambda d: d["spans"].popitem()),
        "in the manifest",
    ),
    "a block not recorded": (lambda f: edit(f / "manifest/done.json", lambda d: d["blocks"].popitem()), "level 1 of"),
    "the run": (lambda f: edit(f / "manifest/plan.json", lambda p: p.update(run_digest="x")), "another model or conf"),
    "the slide's size": (lambda f: edit(f / "manifest/plan.json", lambda p: p.update(slide_px=[900, 400])), "levels"),
    "a pixel more": (
        lambda f: edit(f / "manifest/plan.json", lambda p: p.update(slide_px=[300, 399])),
        "expected 399 x 300",
    ),
    "the manifest": (lambda f: (f / "manifest/plan.json").write_text("{"), "plan.json: damaged"),
    "the record": (lambda f: (f / "manifest/done.json").write_text("{}"), "done.json has no status"),
}


def test_a_good_result_is_silent(good: Path) -> None:
    assert validate(good / "out") == []


def test_there_are_two_levels(good: Path) -> None:
    """Otherwise the tests of damage at level 1 would prove nothing."""
    assert (good / "out/a.tif/heatmap.ome.zarr/1/c/3/0/0").exists()
    assert not (good / "out/a.tif/heatmap.ome.zarr/2").exists()


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_blamed_on_its_slide_alone(damaged: Path, name: str) -> None:
    change, said = DAMAGE[name]
    change(damaged / "b.tif")
    findings = validate(damaged)
    assert {finding.slide for finding in findings} == {"b.tif"}
    assert any(said in finding.problem for finding in findings)
    assert all("\n" not in finding.problem for finding in findings)


def test_a_replaced_slide_is_found(good: Path, damaged: Path, tmp_path: Path) -> None:
    slides = Path(shutil.copytree(good / "slides", tmp_path / "slides"))
    again = explain(slides, toy_spec("pooled_linear"), damaged, **SETTINGS)  # as the docs say of slides that moved
    assert [record.skipped for record in again.records] == [True, True]
    assert validate(damaged) == []
    flip(slides / "a.tif")
    assert validate(damaged) == [Finding("a.tif", f"{slides}/a.tif is not the file that was explained")]
    (slides / "a.tif").unlink()
    assert validate(damaged) == [
        Finding("a.tif", f"{slides}/a.tif: does not exist, expected a slide file; check the path")
    ]


def test_a_slide_that_was_only_begun_is_found(good: Path, damaged: Path) -> None:
    """A killed run leaves no row in slides.csv."""
    lines = (damaged / "slides.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (damaged / "slides.csv").write_text("".join(line for line in lines if not line.startswith("b.tif")))
    (damaged / "more").mkdir()
    (damaged / "b.tif").rename(damaged / "more" / "b.tif")
    unfinished = "is not finished; run the same explain command again"
    assert validate(damaged) == [Finding("more/b.tif", unfinished), Finding("b.tif", unfinished)]


def test_a_run_that_was_killed_at_once_is_found(damaged: Path) -> None:
    (damaged / "slides.csv").unlink()
    findings = validate(damaged)
    assert findings[0] == Finding("", "slides.csv is missing or empty; run explain again to finish")
    assert {finding.slide for finding in findings} == {"", "a.tif", "b.tif"}


def test_failed_slides_are_told_by_the_run_not_here(good: Path, tmp_path: Path) -> None:
    slides = Path(shutil.copytree(good / "slides", tmp_path / "slides"))
    (slides / "c.tif").touch()
    outcome = explain(slides, toy_spec("pooled_linear"), tmp_path / "out", **SETTINGS)
    assert [record.slide.id for record in outcome.failed] == ["c.tif"]
    assert validate(tmp_path / "out") == []


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist or is empty, expected results"):
        validate(tmp_path)
    with pytest.raises(ConfigError, match=r"does not exist or is empty, expected results"):
        validate(tmp_path / "none")
