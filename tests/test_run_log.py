"""A run's log: whole lines of JSON in whole parts."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.errors import StoreError
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.run import report as run_log
from wsi_gradcam.run.report import LOG, LONGEST, RunLog
from wsi_gradcam.system.processes import PeriodicTimer


def lines(out: Path) -> list[dict[str, Any]]:
    """What a log holds, part after part."""
    return [json.loads(line) for part in sorted((out / LOG).iterdir()) for line in part.read_bytes().splitlines()]


@given(st.lists(st.one_of(st.none(), st.text(max_size=60)), max_size=60))
def test_nothing_is_lost_or_said_twice(tmp_path_factory: pytest.TempPathFactory, steps: list[str | None]) -> None:
    out = tmp_path_factory.mktemp("out")
    log = RunLog(storage_path(out), "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log, "PART_BYTES", 500)
        for step in steps:
            if step is None:
                log.flush()
            else:
                log.add("said", text=step)
        log.flush()
        texts = [step for step in steps if step is not None]
        assert [line["text"] for line in lines(out)] == texts if texts else not (out / LOG).exists()
        if texts:
            names = sorted(part.name for part in (out / LOG).iterdir())
            assert names == [f"run-{i:05d}.jsonl" for i in range(len(names))]
            sizes = [(out / LOG / name).stat().st_size for name in names]
            assert all(500 <= size < 1500 for size in sizes[:-1]), "only the last part may be short"


def test_a_line_tells_when_and_how_grave(tmp_path: Path) -> None:
    log = RunLog(storage_path(tmp_path), "run")
    log.add("slide failed", "error", slide="a\udcff\n.svs", index=[3], cause="x" * 5000)
    log.flush()
    (line,) = lines(tmp_path)
    assert abs((datetime.now().astimezone() - datetime.fromisoformat(line["time"])).total_seconds()) < 60
    assert line["time"].endswith("Z")
    assert (line["level"], line["event"], line["run"], line["index"]) == ("error", "slide failed", "run", [3])
    assert line["slide"] == "a\udcff\n.svs"
    assert line["cause"] == "x" * LONGEST + "..."


def test_a_part_that_is_full_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "PART_BYTES", 1)
    log = RunLog(storage_path(tmp_path), "run")
    log.add("one")
    log.flush()
    before = (tmp_path / LOG / "run-00000.jsonl").stat().st_mtime_ns
    log.add("two")
    log.flush()
    log.flush()
    assert (tmp_path / LOG / "run-00000.jsonl").stat().st_mtime_ns == before
    assert [line["event"] for line in lines(tmp_path)] == ["one", "two"]


def test_what_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise StoreError("full")

    log = RunLog(storage_path(tmp_path), "run")
    log.add("one")
    with monkeypatch.context() as patch:
        patch.setattr(LocalPath, "write", refuse)
        with pytest.raises(StoreError):
            log.flush()
    log.add("two")
    log.flush()
    assert [line["event"] for line in lines(tmp_path)] == ["one", "two"]


def test_a_ticker_calls_until_it_ends() -> None:
    calls: list[int] = []
    with PeriodicTimer(0.01, lambda: calls.append(len(calls)), "test"):
        while len(calls) < 3:
            pass
    count = len(calls)
    assert calls == list(range(count))
