"""In one process: while the model works on a slide, the next one is planned and its first patches are read."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.runs import SMALL, differing, toy_spec
from tests.synthetic import strip_mpp, write_marker_slide
from wsi_gradcam import executors
from wsi_gradcam.api import explain
from wsi_gradcam.run.context import Context, perform
from wsi_gradcam.run.types import Task
from wsi_gradcam.slides.patch_reader import PatchReader
from wsi_gradcam.system.isolation import CRASHES

PATIENCE_S = 30


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with slides a.tif, b.tif (no mpp) and c.tif."""
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate(("a.tif", "b.tif", "c.tif")):
        write_marker_slide(folder / name, 390, 500, mpp=0.25, markers=[], marker_px=16, seed=seed)
    strip_mpp((folder / "b.tif").rename(folder / "whole"), folder / "b.tif")
    return folder


class Watcher:
    """Stands in for `perform`, and tells what ran in which thread; a slide's model waits for the plan of the next."""

    def __init__(self, waits: dict[str, str]) -> None:
        self.threads: dict[tuple[str, str], str] = {}
        self.planned = {name: threading.Event() for name in ("a.tif", "b.tif", "c.tif")}
        self._waits = waits

    def __call__(self, context: Context[Any], task: Task, upcoming: Task | None = None) -> Any:
        self.threads.setdefault((task.stage.name, task.slide.id), threading.current_thread().name)
        if task.stage.name == "explain" and task.slide.id in self._waits:
            assert self.planned[self._waits[task.slide.id]].wait(PATIENCE_S), "the next slide is not planned meanwhile"
        try:
            return perform(context, task, upcoming)
        finally:
            if task.stage.name == "plan":
                self.planned[task.slide.id].set()


def test_the_next_slide_is_planned_and_read_while_the_model_works(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    read_ahead = PatchReader.read_ahead

    def told(reader: PatchReader, yx: Any) -> None:
        if threading.current_thread().name.startswith("plan"):
            begun.append(Path(reader._slide.info.path).name)
        read_ahead(reader, yx)

    explain([slides / "a.tif", slides / "c.tif"], toy_spec("slow_linear"), tmp_path / "plain", **SMALL)
    watcher = Watcher({"a.tif": "c.tif"})
    monkeypatch.setattr(executors, "perform", watcher)
    monkeypatch.setattr(PatchReader, "read_ahead", told)
    outcome = explain([slides / "a.tif", slides / "c.tif"], toy_spec("slow_linear"), tmp_path / "out", **SMALL)
    assert [record.status for record in outcome.records] == ["ok", "ok"]
    assert watcher.threads["plan", "a.tif"] == threading.main_thread().name
    assert watcher.threads["plan", "c.tif"].startswith("plan")
    assert begun == ["c.tif"]
    assert differing(tmp_path / "out", tmp_path / "plain") == []


def test_a_slide_that_cannot_be_planned_fails_in_its_turn(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "perform", Watcher({"a.tif": "b.tif"}))
    outcome = explain(slides, toy_spec("slow_linear"), tmp_path / "out", **SMALL)
    assert [(record.slide.id, record.status) for record in outcome.records] == [
        ("a.tif", "ok"),
        ("b.tif", "failed"),
        ("c.tif", "ok"),
    ]
    assert "--mpp" in outcome.failed[0].error


def test_slides_are_opened_one_at_a_time_where_one_of_two_has_ended_a_process(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = Watcher({})
    monkeypatch.setattr(executors, "perform", watcher)
    monkeypatch.setattr(CRASHES, "one_at_a_time", True)
    explain(slides, toy_spec("slow_linear"), tmp_path / "out", **SMALL)
    assert set(watcher.threads.values()) == {threading.main_thread().name}


def test_a_slide_that_has_ended_a_process_is_not_opened(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CRASHES, "causes", {str(slides / "a.tif"): "a.tif: SIGSEGV ended the process"})
    outcome = explain([slides / "a.tif", slides / "c.tif"], toy_spec("slow_linear"), tmp_path / "out", **SMALL)
    assert {record.slide.id: record.error for record in outcome.records} == {
        "a.tif": "a.tif: SIGSEGV ended the process",
        "c.tif": "",
    }
