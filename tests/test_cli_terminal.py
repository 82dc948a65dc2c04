"""What progress says: how fast it goes, who is busy, what is tried again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.test_run_progress import Clock, entry, explained, planned, record
from wsi_gradcam.cli.terminal import MAX_WORKERS_LISTED, Lines, pace
from wsi_gradcam.run.progress import Progress
from wsi_gradcam.run.types import Performed, Task
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
        "7.svs: explain 3 is tried again: its worker died",
        "[1/2] 7.svs: failed, 1.0 s: died",
        "mind the gap",
    ]
    assert (lines.progress.retries, lines.progress.slides_done) == (1, 2)
