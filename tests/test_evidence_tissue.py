"""A shortcut on real tissue: a model that took it is flagged, and one that did not is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import SHARED_DATA
from tests.planted_tissue import found, models, write_archive
from wsi_gradcam.cli.main import main as command

if TYPE_CHECKING:
    from wsi_gradcam.evidence.findings import Evidence

pytestmark = [
    pytest.mark.slow,  # two minutes of processor time
    pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is not there"),
]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Evidence]]:
    """The bundled network trained further, on crops of which those of a site bear ink and on some that do at random."""
    folder = tmp_path_factory.mktemp("tissue")
    listed = write_archive(folder / "slides", "pen")
    made = models(SHARED_DATA, "pen", steps=60)
    return folder, {name: found(folder, listed, name, model, skip_labels=True) for name, model in made.items()}


def test_ink_over_the_tumour_of_a_site_is_the_first_finding(evidence: tuple[Path, dict[str, Evidence]]) -> None:
    first = evidence[1]["pen"].findings[0]
    kind = evidence[1]["pen"].kinds[first.cluster - 1]
    assert first.kind == "shortcut"
    assert kind.shortcut
    assert "looks like a shortcut" in first.words
    assert "site south" in first.words
    assert "of it lies on pen" in first.words
    assert kind.name == "ink"
    assert kind.suspects["pen"] > 0.7
    assert kind.covering is not None
    assert kind.covering.difference.high is not None
    assert kind.covering.difference.high < 0


def test_a_model_that_saw_no_ink_is_not_flagged(evidence: tuple[Path, dict[str, Evidence]]) -> None:
    honest = evidence[1]["honest"]
    assert honest.worth_sorting
    assert honest.shortcuts == []
    assert all(finding.kind != "suspect" for finding in honest.findings)


def test_the_command_fails_on_it(
    evidence: tuple[Path, dict[str, Evidence]], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, status in (("pen", 1), ("honest", 0)):
        asked = [
            "evidence",
            str(evidence[0] / name),
            "--trust-code",
            "--skip-labels",
            "--fail-on",
            "shortcut",
            "--json",
        ]
        assert command(asked) == status
        assert bool(json.loads(capsys.readouterr().out)["failed_on"]) == bool(status)
