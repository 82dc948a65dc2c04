"""Short runs of `tests.chaos`: what is killed is started again, and the results are those of an undisturbed run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import chaos
from tests.chaos_journal import BEGUN, DONE
from tests.kills import kill_command
from tests.runs import differing


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chaos.write_archive(tmp_path_factory.mktemp("chaos") / "archive", 6)


@pytest.fixture(scope="module")
def expected(archive: Path) -> Path:
    return chaos.undisturbed(archive.parent / "expected", archive)


def test_whatever_is_killed_the_results_are_the_same(
    tmp_path: Path, archive: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "BETWEEN_S", (0.5, 3.0))
    found = chaos.try_out(tmp_path / "run", archive, expected, kills=4, seed=3)
    assert found.problems == []
    assert found.spans > 0
    assert {name.split("-")[0] for name in found.killed} & {"worker", "scheduler", "client"}


def test_what_differs_from_the_undisturbed_run_is_named(tmp_path: Path, expected: Path) -> None:
    out = shutil.copytree(expected, tmp_path / "out")
    assert differing(out, expected) == []
    wrong = chaos.problems(out, expected)
    assert len(wrong) == 1, wrong
    assert "poison.tif should have failed" in wrong[0]
    table = out / "whole-1.tif/patches.parquet"
    table.write_bytes(table.read_bytes()[:-1])
    assert "whole-1.tif/patches.parquet differs" in chaos.problems(out, expected)


def test_a_span_begun_after_its_record_was_there_is_named(tmp_path: Path) -> None:
    lines = [
        (BEGUN, "a", 0, 1.0),
        (DONE, "a", 0, 2.0),
        (BEGUN, "a", 1, 1.5),
        (BEGUN, "a", 1, 2.5),
        (BEGUN, "a", 0, 3.0),
    ]
    journal = tmp_path / "journal"
    journal.write_text("\n".join(json.dumps([*line, 1]) for line in lines), encoding="utf-8")
    assert chaos.computed_twice(journal) == ["a 0"]


@pytest.mark.parametrize(
    "command", ["export", *(pytest.param(name, marks=pytest.mark.slow) for name in ("explain", "audit", "evidence"))]
)
def test_a_command_that_is_killed_makes_the_same_bytes(tmp_path: Path, command: str) -> None:
    """`make proofs` kills each a hundred times, in an object store too."""
    assert kill_command(command, tmp_path / "kills", kills=3, seed=1, tell=lambda text: None) == []
