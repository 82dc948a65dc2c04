"""Names follow the kinds that had them, and what two models look at is compared slide by slide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from wsi_gradcam.audit.findings import Verdict
from wsi_gradcam.evidence import EvidenceFolder
from wsi_gradcam.evidence.clusters import Choice, Kinds, Trial
from wsi_gradcam.evidence.comparing import OtherEvidence, carry_names, compare_evidence, directions, kept_names
from wsi_gradcam.evidence.findings import Evidence, Facts, find
from wsi_gradcam.evidence.tables import Tally
from wsi_gradcam.io.paths import storage_path

SLIDES = 12


def kinds_of(centres: np.ndarray, sides: str = "") -> Kinds:
    """Kinds whose directions these are; the sides by their first letters."""
    unit = (centres / np.linalg.norm(centres, axis=1, keepdims=True)).astype(np.float32)
    named = tuple("against" if side == "a" else "for" for side in (sides or "f" * len(unit)))
    return Kinds(np.eye(unit.shape[1], dtype=np.float32), unit, cast(Any, named), (0.0, 0.0), (0.0,) * len(unit))


@pytest.fixture
def before() -> Kinds:
    return kinds_of(np.eye(6)[:3])


@pytest.fixture
def now() -> Kinds:
    """The third and the first come before a new one; the second is gone, and the third has changed somewhat."""
    return kinds_of(np.array([[0, 0, 1.0, 0.7, 0, 0], [1.0, 0.1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]]))


def test_names_follow_what_kinds_consist_of(before: Kinds, now: Kinds) -> None:
    kept = kept_names(directions(before), directions(now), {1: "nuclei", 2: "ink", 3: "stroma"})
    assert [(one.name, one.now, one.is_sure) for one in kept] == [
        ("nuclei", 2, True),
        ("ink", None, False),
        ("stroma", 1, False),
    ]


def test_a_kind_of_the_other_side_or_of_another_layer_has_no_name(before: Kinds) -> None:
    other = replace(before, sides=("against", "against", "against"))
    wider = kinds_of(np.eye(7)[:3])
    for kinds in (other, wider):
        (kept,) = kept_names(directions(before), directions(kinds), {1: "nuclei"})
        assert kept.now is None


def test_the_file_of_names_follows_the_numbers(tmp_path: Path, before: Kinds, now: Kinds) -> None:
    folder = EvidenceFolder(storage_path(tmp_path))
    assert carry_names(folder, before) == {}
    text = "1: nuclei\n2: ink\n3: stroma\n"
    (tmp_path / "names.yaml").write_text(text, encoding="utf-8")
    assert carry_names(folder, before) == {1: "nuclei", 2: "ink", 3: "stroma"}
    expected = {1: "stroma (unsure)", 2: "nuclei"}
    assert carry_names(folder, now) == expected
    written = (tmp_path / "names.yaml").read_text(encoding="utf-8")
    assert '# was 2, and no cluster is like it now: "ink"' in written
    assert carry_names(folder, now) == expected
    (tmp_path / "names.yaml").write_text(text, encoding="utf-8")  # as if killed before it was written
    assert carry_names(folder, now) == expected
    (tmp_path / "names.yaml").write_text("1: stroma\n", encoding="utf-8")  # what the user writes stays
    assert carry_names(folder, now) == {1: "stroma"}
    assert carry_names(folder, before) == {3: "stroma (unsure)"}


def evidence_of(kinds: Kinds, model: str) -> Evidence:
    """Evidence of kinds that have equal shares."""
    k = len(kinds)
    each = np.full((SLIDES, k), 1.0)
    mass = np.stack([each[:, [s == side for s in kinds.sides]].sum(axis=1) for side in ("for", "against")], axis=1)
    slides = np.array([f"{i}.tif" for i in range(SLIDES)])
    sums = Tally(slides, mass, each.sum(axis=1), each, each, {}, np.zeros(k), 40, 10)
    choice = Choice(kinds, {"for": (Trial(kinds.sides.count("for"), 1.0, 1.0),), "against": ()})
    facts = Facts(model, model, "run", "layer", "tumour", 0, 10, SLIDES, Verdict("sanity", "holds", "learned"))
    return find(sums, choice, {}, facts)


def test_what_a_model_has_begun_to_look_at_and_what_it_has_dropped(before: Kinds) -> None:
    """Of both models kind 1 lies on the same places; kind 2 here lies where there nothing speaks, and the other way."""
    here_of, there_of = evidence_of(kinds_of(np.eye(6)[:2]), "new"), evidence_of(kinds_of(np.eye(6)[:2]), "old")
    compared = {}
    for number in range(SLIDES):
        here, there = np.zeros((2, 2, 3, 4))
        here[0, 1, 1], here[0, 2, 3] = 60 + number, 40
        there[0, 1, 1], there[0, 2, 3] = 50, 50 - number
        here[0, 2, 0] = 1000  # where the other has not looked
        compared[f"{number}.tif"] = {"here": here, "there": there}
    other = OtherEvidence(cast(Any, SimpleNamespace(out="old-results")), there_of, {}, "", "")
    found = compare_evidence(compared, here_of, other)
    told = {(row.cluster, row.there): row.change for row in found.rows}
    assert told == {(1, 1): "more", (2, None): "begun", (None, 1): "more", (None, 2): "dropped"}
    assert found.words == [
        "new looks more at cluster 1: 62% of its evidence for tumour lies there, and 53% of that of old.",
        "new has begun to look at cluster 2: 38% of its evidence for tumour lies there, and 0% of that of old.",
        "new has dropped cluster 2 of old: 0% of its evidence for tumour lies there, and 47% of that of old.",
    ]


def test_nothing_is_said_of_few_slides() -> None:
    of = evidence_of(kinds_of(np.eye(6)[:1]), "new")
    here = np.zeros((2, 2, 3))
    here[0, 1, 1] = 1.0
    other = OtherEvidence(cast(Any, SimpleNamespace(out="old-results")), of, {}, "", "")
    found = compare_evidence({"a.tif": {"here": here, "there": here}}, of, other)
    assert [row.p for row in found.rows] == [None, None]
    assert "fewer than six slides" in found.words[0]
