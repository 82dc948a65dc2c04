"""Runs that are killed go on where they stopped, and end with the same bytes; nothing is ever mixed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.doomed import CHANGES, is_by_clock
from tests.runs import SMALL, differing, rows_of, start, toy_spec
from tests.synthetic import strip_mpp, write_marker_slide
from wsi_gradcam.api import RunListener, explain
from wsi_gradcam.errors import ResumeError, StoreError
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.results.manifest import Manifest, SlideDone
from wsi_gradcam.results.run_files import check_same_run, read_run
from wsi_gradcam.results.slide_tables import read_slides
from wsi_gradcam.results.validation import validate
from wsi_gradcam.run.context import Context, perform
from wsi_gradcam.run.examining import examine_model
from wsi_gradcam.run.plan import RunPlan, plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.run.stages import explain_span, plan_slide
from wsi_gradcam.run.stitching import finish_slide
from wsi_gradcam.run.types import Performed, Planned, SlideRecord, Task
from wsi_gradcam.run.workload import COARSEN, PLAN, STITCH, ExplainWorkload

KILLED = -signal.SIGKILL


class Counter(RunListener):
    """Counts what was computed."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.left: list[int] = []

    def task_done(self, task: Task, performed: Performed) -> None:
        self.tasks.append(task)
        if isinstance(performed.result, Planned):
            self.left.append(performed.result.left)

    def spans(self) -> set[tuple[str, int]]:
        """(slide, span) of what was explained."""
        return {(task.slide.id, task.index[0]) for task in self.tasks if task.stage.name == "explain"}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two slides: 88 and 56 patches, 8 and 5 spans."""
    folder = tmp_path_factory.mktemp("slides")
    sizes = {"a.tif": (500, 700), "b.tif": (390, 500)}
    return [
        write_marker_slide(folder / name, *size, mpp=0.25, markers=[], marker_px=16, seed=size[0]).path
        for name, size in sizes.items()
    ]


@pytest.fixture(scope="module")
def undisturbed(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run that nobody stopped."""
    out = tmp_path_factory.mktemp("undisturbed")
    explain(slides, toy_spec("slow_linear"), out, **SMALL)
    return out


def finished_spans(out: Path) -> set[tuple[str, int]]:
    """(slide, span) of the spans that the manifests record."""
    return {(path.parts[-4], int(path.stem)) for path in out.glob("*/manifest/spans/*.json")}


def resumed(slides: list[Path], out: Path) -> Counter:
    """Runs to the end in this process."""
    counter = Counter()
    explain(slides, toy_spec("slow_linear"), out, **SMALL, listener=counter)
    return counter


ALL_SPANS = {("a.tif", i) for i in range(8)} | {("b.tif", i) for i in range(5)}


@pytest.mark.disk
def test_a_kill_at_random_moments_costs_only_what_was_missing(
    slides: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    dice = random.Random(7)
    finished: set[tuple[str, int]] = set()
    stamps: dict[Path, int] = {}
    for wanted in (0, 2, 5, 10):  # spans finished before the kill
        process = start(slides, "slow_linear", tmp_path, slowness_s=0.1)
        while process.is_alive() and len(finished_or_done(tmp_path)) < wanted:
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == KILLED, "it was not done yet"
        assert finished <= finished_or_done(tmp_path)
        assert stamps.items() <= written(tmp_path).items(), "what was finished is not written again"
        finished, stamps = finished_or_done(tmp_path), written(tmp_path)
    assert resumed(slides, tmp_path).spans() == ALL_SPANS - finished
    assert stamps.items() <= written(tmp_path).items()
    assert differing(tmp_path, undisturbed) == []


def written(out: Path) -> dict[Path, int]:
    """When the CAMs of finished spans were written, in nanoseconds."""
    files = [out / slide / "cams.zarr" / "cam" / "c" / str(span) / "0/0/0" for slide, span in finished_or_done(out)]
    return {file: file.stat().st_mtime_ns for file in files}


def finished_or_done(out: Path) -> set[tuple[str, int]]:
    """Finished spans, also of slides whose manifest is folded."""
    folded = {path.parts[-3] for path in out.glob("*/manifest/done.json")}
    return finished_spans(out) | {span for span in ALL_SPANS if span[0] in folded}


@pytest.fixture(scope="module")
def alone(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The results of the first slide alone, and how often making them put a file in place or deleted one."""
    out, calls = tmp_path_factory.mktemp("one"), 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += not is_by_clock(*args)
            return function(*args, **kwargs)

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, counted(getattr(os, name)))
        explain(slides[:1], toy_spec("slow_linear"), out, **SMALL)
    return out, calls


def died_at(slides: list[Path], change: int, out: Path) -> bool:
    process = start(slides, "slow_linear", out, die_at_change=change)
    process.join(60)
    assert process.exitcode in (0, KILLED)
    return bool(process.exitcode == KILLED)


@pytest.mark.disk
# In hundredths of all changes of files: run.yaml and templates, spans, blocks, table and overview, done, folding.
@pytest.mark.parametrize("share", [0, 1, 3, 8, 20, 40, 60, 80, 85, 90, 93, 96, 98, 99])
def test_a_kill_at_any_change_of_a_file_is_healed(
    slides: list[Path], alone: tuple[Path, int], tmp_path: Path, share: int
) -> None:
    expected, changes = alone
    assert changes > 60
    assert died_at(slides[:1], changes * share // 100, tmp_path)
    before = finished_or_done(tmp_path)
    assert resumed(slides[:1], tmp_path).spans() == {span for span in ALL_SPANS if span[0] == "a.tif"} - before
    assert differing(tmp_path, expected) == []


def test_nothing_is_computed_twice(slides: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    outcome = explain(slides, toy_spec("slow_linear"), tmp_path, **SMALL, listener=(counter := Counter()))
    assert [task.stage for task in counter.tasks] == [PLAN, PLAN]
    assert counter.left == [0, 0]
    assert all(record.skipped for record in outcome.records)
    assert (tmp_path / "slides.csv").read_bytes() == (undisturbed / "slides.csv").read_bytes()  # with the seconds
    assert differing(tmp_path, undisturbed) == []


def test_a_lost_slides_csv_is_made_again(slides: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "slides.csv").unlink()
    resumed(slides, tmp_path)
    assert differing(tmp_path, undisturbed) == []


def test_a_slide_that_moved_keeps_its_results_and_gets_its_new_path(
    slides: list[Path], undisturbed: Path, tmp_path: Path
) -> None:
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(undisturbed, out)
    moved.mkdir()
    paths = [Path(shutil.copy(path, moved / path.name)) for path in slides]
    assert resumed(paths, out).spans() == set()
    assert [row["path"] for row in rows_of(out).values()] == [str(path) for path in paths]
    assert rows_of(out)["a.tif"]["seconds"] == rows_of(undisturbed)["a.tif"]["seconds"]


def test_more_slides_later_are_added(slides: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    resumed(slides[:1], tmp_path)
    assert set(rows_of(tmp_path)) == {"a.tif"}
    assert {slide for slide, _ in resumed(slides[1:], tmp_path).spans()} == {"b.tif"}
    assert differing(tmp_path, undisturbed) == []


@pytest.mark.parametrize(
    ("model", "settings", "named"),
    [
        ("other_linear", {}, "model: "),
        ("slow_linear", {"overlap": 0.5}, "overlap: 0.0 there, 0.5 now"),
        ("slow_linear", {"heatmap_stride": 16}, "heatmap_stride: 8 there, 16 now"),
        ("slow_linear", {"target": "marker"}, "target: "),
    ],
)
def test_other_results_are_refused_and_untouched(
    slides: list[Path], undisturbed: Path, tmp_path: Path, model: str, settings: dict[str, Any], named: str
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ResumeError, match=r"holds results of another model or configuration .*--overwrite") as caught:
        explain(slides, toy_spec(model), tmp_path, **{**SMALL, **settings})
    assert named in str(caught.value)
    assert differing(tmp_path, undisturbed) == []


def test_overwrite_replaces_everything(slides: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    explain(slides, toy_spec("other_linear"), tmp_path, **{**SMALL, "overlap": 0.5})
    explain(slides, toy_spec("slow_linear"), tmp_path, **SMALL, overwrite=True)
    assert differing(tmp_path, undisturbed) == []


def test_a_replaced_slide_is_refused_alone(slides: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    out, archive = tmp_path / "out", tmp_path / "archive"
    shutil.copytree(undisturbed, out)
    archive.mkdir()
    shutil.copy(slides[0], archive / "a.tif")
    write_marker_slide(archive / "b.tif", 390, 500, mpp=0.25, markers=[(50, 50)], marker_px=16)
    outcome = explain(archive, toy_spec("slow_linear"), out, **SMALL)
    (failed,) = outcome.failed
    assert failed.slide.id == "b.tif"
    assert "holds results of a different file from" in failed.error
    assert "--overwrite" in failed.error
    assert rows_of(out)["a.tif"]["status"] == "ok"
    again = explain(archive, toy_spec("slow_linear"), out, **SMALL, overwrite=True)
    assert [record.skipped for record in again.records] == [False, False]  # --overwrite makes all again
    assert validate(out) == []


@pytest.mark.parametrize("damage", ["{", "{}", '{"slide_px": 3}'])
@pytest.mark.parametrize("name", ["plan.json", "done.json"])
def test_a_damaged_manifest_stops_one_slide(
    slides: list[Path], undisturbed: Path, tmp_path: Path, name: str, damage: str
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "a.tif" / "manifest" / name
    path.write_text(damage, encoding="utf-8")
    outcome = explain(slides, toy_spec("slow_linear"), tmp_path, **SMALL)
    statuses = {record.slide.id: record.status for record in outcome.records}
    assert statuses == {"a.tif": "failed", "b.tif": "ok"}
    assert "manifest" in outcome.failed[0].error
    explain(slides, toy_spec("slow_linear"), tmp_path, **SMALL, overwrite=True)
    assert differing(tmp_path, undisturbed) == []


def test_finishing_twice_keeps_the_record(slides: list[Path], alone: tuple[Path, int], tmp_path: Path) -> None:
    """A cluster does a task again when the worker that did it dies before it could tell."""
    shutil.copytree(alone[0], tmp_path, dirs_exist_ok=True)
    spec, settings = toy_spec("slow_linear"), make_settings(**SMALL)
    run = plan_run(tmp_path, spec, examine_model(spec, settings, []).facts, settings)
    (entry,) = find_slides(slides[:1])
    outcome = finish_slide(Context(ExplainWorkload(run)), entry)
    record = json.loads((tmp_path / "a.tif" / "manifest" / "done.json").read_bytes())
    assert SlideDone.from_json(record).outcome == outcome
    assert (outcome.patches, len(record["spans"])) == (88, 8)
    assert differing(tmp_path, alone[0]) == []


def test_a_span_that_is_finished_is_not_explained_again(slides: list[Path], tmp_path: Path) -> None:
    """Nor is its slide read: as above."""
    spec, settings = toy_spec("slow_linear"), make_settings(**SMALL)
    run = plan_run(tmp_path, spec, examine_model(spec, settings, []).facts, settings)
    (entry,) = find_slides(slides[:1])
    context = Context(ExplainWorkload(run))
    plan_slide(context, entry)
    assert explain_span(context, entry, 0).patches == SMALL["span_patches"]
    stored = tmp_path / "a.tif" / "cams.zarr" / "cam" / "c" / "0/0/0/0"
    before = stored.stat().st_mtime_ns
    context.patches = None  # type: ignore[method-assign, assignment]
    assert explain_span(context, entry, 0).patches == SMALL["span_patches"]
    assert stored.stat().st_mtime_ns == before
    with pytest.raises(TypeError):
        explain_span(context, entry, 1)


@pytest.mark.disk
def test_leftovers_of_killed_writes_are_removed(slides: list[Path], alone: tuple[Path, int], tmp_path: Path) -> None:
    (tmp_path / f"run.yaml.{'0123' * 8}.partial").write_bytes(b"half")
    (tmp_path / "a.tif" / "manifest").mkdir(parents=True)
    (tmp_path / "a.tif" / "manifest" / f"plan.json.{'0123' * 8}.partial").write_bytes(b"half")
    (tmp_path / "a.tif" / f"overview.png.{'0123' * 8}.partial").write_bytes(b"half")
    resumed(slides[:1], tmp_path)
    assert differing(tmp_path, alone[0]) == []


@pytest.mark.parametrize("text", ["a: [", "- 1", "run_digest: x", "\xff"])
def test_a_damaged_run_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=r"run\.yaml: .*--out"):
        read_run(path)


@pytest.mark.parametrize("text", ["nonsense", "id,path\na,b\n", "\x00\n\n"])
def test_a_damaged_slides_csv_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "slides.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StoreError, match=r"slides\.csv: damaged; delete it"):
        read_slides(path)


def test_a_folder_in_the_place_of_slides_csv_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be read: Is a directory; choose another --out"):
        read_slides(tmp_path)


def test_an_empty_slides_csv_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "slides.csv"
    path.touch()
    assert read_slides(path) == {}


def test_no_run_yet_is_no_mismatch(tmp_path: Path) -> None:
    spec = toy_spec("slow_linear")
    run = plan_run(tmp_path, spec, examine_model(spec, make_settings(**SMALL), []).facts, make_settings(**SMALL))
    check_same_run(tmp_path / "run.yaml", run)
    assert not list(tmp_path.iterdir())


def test_work_of_another_run_never_enters_a_finished_slide(slides: list[Path], tmp_path: Path) -> None:
    """A process of an old run, still busy when --overwrite begins a new one, finishes a span of it."""
    old, new = (
        Context(ExplainWorkload(run_of("slow_linear", tmp_path))),
        Context(ExplainWorkload(run_of("other_linear", tmp_path), overwrite=True)),
    )
    (entry,) = find_slides(slides[:1])
    perform(old, Task(PLAN, entry))
    plan_slide(new, entry)
    with pytest.raises(ResumeError, match="another run has started there"):
        explain_span(old, entry, 0)
    stale = Manifest(tmp_path / "a.tif" / "manifest")
    new_plan = stale.plan()
    assert new_plan is not None
    stale.write_plan(replace(new_plan, run_digest=old.run.digest()))  # it looked before the new plan came
    explain_span(old, entry, 0)
    stale.write_plan(new_plan)
    for span in range(1, len(new.plan(entry).spans)):
        explain_span(new, entry, span)
    for level, shape in enumerate(new.plan(entry).level_shapes):
        assert len(new.plan(entry).blocks(level)) == 1, shape
        perform(new, Task(COARSEN, entry, (level, 0)) if level else Task(STITCH, entry, (0,)))
    with pytest.raises(ResumeError, match="1 spans of the slide were overwritten by another process"):
        finish_slide(new, entry)
    outcome = explain(slides[:1], toy_spec("other_linear"), tmp_path / "clean", **SMALL)
    assert not outcome.failed
    again = plan_slide(Context(ExplainWorkload(new.run)), entry)
    assert again.spans == [0]
    assert sum(map(len, again.blocks)) == len(new.plan(entry).level_shapes)


def test_overwrite_makes_a_damaged_slide_anew(slides: list[Path], undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / "a.tif" / "patches.parquet").unlink()
    assert validate(out)
    explain(slides, toy_spec("slow_linear"), out, **SMALL, overwrite=True)
    assert validate(out) == []
    assert differing(out, undisturbed) == []


@pytest.mark.disk  # the twin in the store is made again by the run within the run
def test_runs_that_share_an_out_one_after_the_other_keep_each_others_rows(slides: list[Path], tmp_path: Path) -> None:
    class Meddler(RunListener):
        def slide_done(self, record: SlideRecord) -> None:
            with pytest.raises(ResumeError, match="is at work there; wait until it is done"):
                explain(slides[1:], toy_spec("slow_linear"), tmp_path, **SMALL)

    explain(slides[:1], toy_spec("slow_linear"), tmp_path, **SMALL, listener=Meddler())
    explain(slides[1:], toy_spec("slow_linear"), tmp_path, **SMALL)
    explain(slides[:1], toy_spec("slow_linear"), tmp_path, **SMALL)
    assert {name: row["status"] for name, row in rows_of(tmp_path).items()} == {"a.tif": "ok", "b.tif": "ok"}


def test_an_out_with_nothing_but_failures_takes_other_settings(tmp_path: Path) -> None:
    slide = write_marker_slide(tmp_path / "a.tif", 390, 500, mpp=0.25, markers=[], marker_px=16).path
    strip_mpp(slide, tmp_path / "bare.tif")
    out = tmp_path / "out"
    assert explain(tmp_path / "bare.tif", toy_spec("slow_linear"), out, **SMALL).failed
    assert not explain(tmp_path / "bare.tif", toy_spec("slow_linear"), out, **SMALL, mpp=0.25).failed


@pytest.mark.parametrize("name", ["densenet121", pytest.param("vgg11", marks=pytest.mark.slow)])
def test_the_number_of_threads_does_not_change_a_bit(slides: list[Path], tmp_path: Path, name: str) -> None:
    """DenseNet with a short last batch and VGG's large matrices are where torch's sums depend on it."""
    script = (
        "import sys; from pathlib import Path; from wsi_gradcam.api import explain;"
        "from wsi_gradcam.models.spec import ModelSpec\n"
        "name = sys.argv[4]\n"
        "spec = ModelSpec(name=name, source='torchvision:' + name, weights='random', classes=('a', 'b'),"
        " patch_px=(64, 64), mpp=0.5)\n"
        "assert not explain(sys.argv[1], spec, sys.argv[2], batch_size=16, span_patches=16,"
        " torch_threads=int(sys.argv[3])).failed\n"
    )
    for threads in (1, 2):
        subprocess.run(
            [sys.executable, "-c", script, str(slides[0]), str(tmp_path / str(threads)), str(threads), name], check=True
        )
    assert differing(tmp_path / "1", tmp_path / "2") == ["run.yaml"]  # which names the threads


def run_of(name: str, out: Path) -> RunPlan:
    spec, settings = toy_spec(name), make_settings(**SMALL)
    return plan_run(out, spec, examine_model(spec, settings, []).facts, settings)
