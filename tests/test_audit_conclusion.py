"""The conclusion of an audit follows from the typed verdicts, over all their combinations, and no verdict is lost."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.test_audit_report import metrics
from tests.test_audit_verdict import interval, pair
from wsi_gradcam.audit.findings import Outcome, Verdict
from wsi_gradcam.audit.metrics import KINDS, conclusion
from wsi_gradcam.audit.questions.faithfulness import BACKGROUND, BLUR, MAIN, with_baselines
from wsi_gradcam.audit.questions.gradients import STEPS, follows, gradient_predicts
from wsi_gradcam.audit.schema import ConclusionRow, RunFacts, SampleFacts, VerdictRow

OUTCOMES: tuple[Outcome | None, ...] = ("holds", "fails", "unclear", None)
RUN: RunFacts = metrics().run.model_copy(update={"target": "tumour"})
SAMPLE: SampleFacts = metrics().sample.model_copy(update={"slides": 12})
BELIEVED, NOT_BELIEVED = "can be believed where it is hot", "cannot be believed"


def verdict(question: str, outcome: Outcome, **keys: Any) -> VerdictRow:
    values: dict[str, Any] = {
        "measures": [],
        "of": "x",
        "asked": "?",
        "words": "Never read.",
        "p": None,
        "p_adjusted": None,
    }
    return VerdictRow(question=question, outcome=outcome, evidence=[], **values, **keys)


def concluded(*rows: VerdictRow, run: RunFacts = RUN, sample: SampleFacts = SAMPLE) -> ConclusionRow:
    found = conclusion(rows, run, sample)
    assert found.words.startswith("On ")
    assert found.words.endswith(".")
    assert ". " not in found.words
    assert "  " not in found.words
    assert ":;" not in found.words.replace(" ", "")
    return found


def test_the_sentence_of_a_good_audit_names_what_is_unclear() -> None:
    good = [
        verdict("faithfulness", "holds", method="gradcam"),
        verdict("sanity", "holds"),
        verdict("sanity", "holds", method="gradcam"),
        verdict("stability", "holds", change="jpeg"),
        verdict("shortcuts", "unclear", suspect="glass"),
        verdict("shortcuts", "unclear", suspect="border"),
    ]
    assert concluded(*good).words == (
        "On these 12 slides, the map of tumour (Grad-CAM) can be believed where it is hot; "
        "the influence of bare glass and the patch border is unclear."
    )
    assert concluded(*good[:4], verdict("shortcuts", "holds", suspect="glass")).words.endswith("where it is hot.")


def test_belief_follows_from_faithfulness_and_sanity_in_all_combinations() -> None:
    for faithful, learned, sane, plausible in product(OUTCOMES, repeat=4):
        rows = [
            verdict(question, outcome, **({} if method is None else {"method": method}))
            for question, method, outcome in (
                ("faithfulness", "gradcam", faithful),
                ("sanity", None, learned),
                ("sanity", "gradcam", sane),
                ("plausibility", "gradcam", plausible),
            )
            if outcome is not None
        ]
        found = concluded(*rows)
        failing = "fails" in (faithful, learned, sane)
        assert found.outcome == ("fails" if failing else "holds" if faithful == "holds" else "unclear")
        assert (BELIEVED in found.words) == (found.outcome == "holds")
        assert (NOT_BELIEVED in found.words) == (found.outcome == "fails")
        assert ("it is unclear whether" in found.words) == (found.outcome == "unclear")
        assert ("matches the annotation" in found.words) == (plausible == "holds")
        assert ("does not match the annotation" in found.words) == (plausible == "fails")
        assert ("the match with the annotation" in found.words) == (plausible == "unclear")
        assert ("does not depend on what the map shows" in found.words) == (faithful == "fails")
        assert ("has not learned" in found.words) == (learned == "fails")
        assert ("stays the same when the weights" in found.words) == (sane == "fails")
        assert ("dependence of the map on training" in found.words) == (sane == "unclear")
        assert ("what the model has learned" in found.words) == (learned == "unclear")
        assert ("dependence on training" in found.words) == (learned is None and sane is None)
        assert "stability and the influence of artefacts were not tested" in found.words.replace(
            ", stability", "stability"
        )


OTHERS = [
    *(
        ({"question": q, **({"method": "gradcam"} if of_map else {})}, kind.failing, kind.noun)
        for (q, of_map), kind in KINDS.items()
        if kind.failing
    ),
    ({"question": "shortcuts", "suspect": "pen"}, "depends on ink", "the influence of ink"),
    ({"question": "shortcuts", "suspect": "ruler (given)"}, "depends on “ruler”", "the influence of “ruler”"),
    (
        {"question": "shortcuts", "label": "tumour"},
        "bare glass is called tumour",
        "whether bare glass is called tumour",
    ),
    ({"question": "stability", "change": "stain"}, "changes under stain variation", "the influence of stain variation"),
    ({"question": "stability", "change": "half"}, "the loss of half of the patches", "the loss of half of the patches"),
    (
        {"question": "stability", "change": "jpeg", "method": "gradcam"},
        "the map changes under JPEG compression",
        "the stability of the map under JPEG compression",
    ),
]


@pytest.mark.parametrize(("keys", "failing", "noun"), OTHERS)
@pytest.mark.parametrize("faithful", ["holds", "fails", "unclear"])
def test_whatever_fails_or_is_unclear_is_named_and_what_holds_is_not(
    keys: dict[str, Any], failing: str, noun: str, faithful: Outcome
) -> None:
    first = verdict("faithfulness", faithful, method="gradcam")

    def words(outcome: Outcome) -> str:
        return concluded(first, verdict(outcome=outcome, **keys)).words

    assert failing in words("fails")
    assert f"{noun} is unclear" in words("unclear")
    assert failing not in words("holds")
    assert noun not in words("holds")


def test_other_methods_do_not_speak_for_the_first() -> None:
    rows = [verdict("faithfulness", "holds", method="gradcam"), verdict("faithfulness", "fails", method="edges")]
    assert concluded(*rows).outcome == "holds"
    assert concluded(*rows, run=RUN.model_copy(update={"methods": ["edges", "gradcam"]})).outcome == "fails"


@pytest.mark.parametrize(
    ("run", "sample", "begins"),
    [
        ({}, {"slides": 1}, "On this slide, "),
        ({"target": "predicted"}, {}, "On these 12 slides, it is unclear whether the map of the predicted class"),
        ({"run_digest": ""}, {"patches": 40}, "On these 40 patches, "),
        ({"run_digest": "", "unit": "slide"}, {}, "On these 12 slides, "),
    ],
)
def test_the_sentence_says_what_it_is_about(run: dict[str, Any], sample: dict[str, Any], begins: str) -> None:
    found = concluded(run=RUN.model_copy(update=run), sample=SAMPLE.model_copy(update=sample))
    assert found.words.startswith(begins)
    assert "was not tested" in found.words


def test_a_baseline_that_is_called_by_the_class_needs_another_that_confirms() -> None:
    holds = Verdict("?", "holds", "It holds.", {"random": pair(1.0, 0.001)})
    falls, rises, open_ = pair(-2.0, 0.001), pair(1.0, 0.001), interval(-1.0, 1.0)
    assert open_.high > 0
    gain, none = pair(1.0, 0.001), pair(0.1, 0.5)
    assert with_baselines(holds, {MAIN: falls, BACKGROUND: rises}, {MAIN: gain, BACKGROUND: none}) is holds
    assert with_baselines(holds, {}, {}) is holds
    sure = with_baselines(holds, {MAIN: rises, BLUR: rises, BACKGROUND: falls}, {BLUR: none, BACKGROUND: gain})
    assert sure.outcome == "holds"
    assert "with the slide's glass, which does, the map also beats noise" in sure.words
    doubt = with_baselines(holds, {MAIN: rises, BACKGROUND: falls}, {BACKGROUND: none})
    assert doubt.outcome == "unclear"
    assert "with the slide's glass, which does, the map is not distinguished from noise" in doubt.words
    alone = with_baselines(holds, {MAIN: rises, BLUR: rises}, {BLUR: gain})
    assert alone.outcome == "holds"
    assert "the curves cannot fall" in alone.words
    fails = Verdict("?", "fails", "It fails.", {})
    assert with_baselines(fails, {MAIN: rises}, {}) is fails


def test_locality_never_holds_or_fails_against_its_chart() -> None:
    steps = np.array(STEPS)
    assert follows(steps, 0.8 * steps)
    assert not follows(steps, -steps)
    assert not follows(steps, np.where(steps > 0, -steps, steps))  # one side alone
    good, bad = interval(0.2, 0.9), interval(-0.9, -0.2)
    outcomes = {
        (name, agrees): gradient_predicts(worth, agrees).outcome
        for name, worth in (("good", good), ("bad", bad), ("open", interval(-0.2, 0.2)))
        for agrees in (True, False)
    }
    assert outcomes == {
        ("good", True): "holds",
        ("good", False): "unclear",
        ("bad", True): "unclear",
        ("bad", False): "fails",
        ("open", True): "unclear",
        ("open", False): "unclear",
    }
