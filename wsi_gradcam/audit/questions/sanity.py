"""Does the map depend on what the model has learned, and has it learned anything?

Weights are randomised, and maps and answers are compared with those of the trained model, see
`wsi_gradcam.audit.measures.sanity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import Findings, Verdict, interval_p, percent
from wsi_gradcam.audit.measurements import Estimate, estimate, stored
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.schema import (
    EXPENSIVE,
    GUIDED,
    RESEMBLING,
    CurvesFigure,
    Figure,
    IntervalsFigure,
    Measure,
    Unit,
    Words,
    row_title,
)
from wsi_gradcam.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from wsi_gradcam.audit.batch import Batch
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.measures.sanity import Order
    from wsi_gradcam.audit.schema import Metrics

    Floats = NDArray[np.float64]

ORDERS: tuple[Order, ...] = ("top_down", "bottom_up", "independent")
SMOOTH = 8  # noisy copies of a patch in smooth randomisation
STAYING = 0.25  # share of the maps: a quarter that ignores the model is too many; by chance it is zero
RARE = 0.02  # saying that an untrained model has learned something is the worst error of all
COPIES = "random copies"

STAYING_MAPS = Measure("staying_maps", "maps that stay the same with random weights", "share")
ANSWER_SPREAD = Measure("answer_spread", "spread of the answers", "logits", of="model")
RANDOM_ANSWER_SPREAD = Measure(
    "random_answer_spread",
    "spread of the answers",
    "logits",
    of=COPIES,
    evidence="spread of the answers with random weights",
)
SMOOTHED = Measure("smoothed_spearman", "spearman with all weights random, averaged maps", "correlation")


@dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """Similarity of maps to those of the trained model, [N, stages] each: see `measures.sanity.Stage`."""

    complexity: Floats
    constant: Floats
    hog: Floats
    resembles: Floats
    spearman: Floats
    spearman_absolute: Floats
    ssim: Floats


STAGES = {part.name: Measure(part.name, f"{part.name}, {{order}}") for part in fields(Stages)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Sanity:
    """Maps and answers with random weights.

    Attributes:
        answers: [N, draws, K] logits of random copies of the model.
        draws: [N, draws] maps that stay, by method: see `measures.sanity.staying_maps`.
        stages: by method and order.
        smoothed: [N] rank correlation with all weights random, maps averaged over noisy copies, by method.
    """

    answers: NDArray[np.float32] = stored("sanity/answers")
    draws: Mapping[str, Floats] = stored("sanity/{}/draws")
    stages: Mapping[str, Mapping[str, Stages]] = stored("sanity/{}/{}", Stages, (None, ORDERS))
    smoothed: Mapping[str, Floats] = stored("sanity/{}/smooth/spearman")


def measure(batch: Batch) -> Sanity | None:
    """Measure the similarity to maps of models with random weights, by stage and in all; None if not in depth.

    It also measures the answers of random copies, which show whether the model has learned anything, and guided
    backpropagation, which must fail, if the model supports it.
    """
    if not batch.in_depth:
        return None
    from wsi_gradcam.audit.measures.sanity import DRAWS, random_answers

    answers = random_answers(batch.subject, batch.images, seed=batch.seed)
    cheap = [method for method in batch.methods if method not in EXPENSIVE]
    draws = {name: _draws(batch, name, DRAWS if name in cheap else DRAWS // 2) for name in batch.methods}
    if GUIDED not in batch.methods:
        with suppress(ModelError):  # no ReLU, several layers: its absence shows that it could not be tested
            draws[GUIDED] = _draws(batch, GUIDED, DRAWS // 2)
    return Sanity(
        answers=answers.transpose(0, 1).float().cpu().numpy(),
        draws=draws,
        stages={method: {order: _stages(batch, method, order) for order in ORDERS} for method in cheap},
        smoothed={method: _smoothed(batch, method) for method in cheap},
    )


def _draws(batch: Batch, method: str, draws: int) -> Floats:
    from wsi_gradcam.audit.measures.sanity import staying_maps

    return staying_maps(batch.subject, batch.images, batch.aim, method, draws, batch.seed).T


def _stages(batch: Batch, method: str, order: Order) -> Stages:
    from wsi_gradcam.audit.measures.sanity import randomisation

    stages = randomisation(batch.subject, batch.images, batch.aim, method, order, seed=batch.seed)
    likeness = {name: np.stack([stage.likeness[name] for stage in stages], axis=1) for name in stages[0].likeness}
    return Stages(
        **likeness,
        resembles=np.stack([stage.resembles for stage in stages], axis=1),
        constant=np.stack([stage.constant for stage in stages], axis=1).astype(np.float64),
        complexity=np.stack([stage.complexity for stage in stages], axis=1),
    )


def _smoothed(batch: Batch, method: str) -> Floats:
    from wsi_gradcam.audit.measures.sanity import randomisation

    (stage,) = randomisation(
        batch.subject, batch.images, batch.aim, method, "independent", 1, samples=SMOOTH, seed=batch.seed
    )
    return stage.likeness["spearman"]


def answer_spread(logits: NDArray[np.floating]) -> Floats:
    """Return how much the evidence of patches differs: its standard deviation [...] over logits [..., P, K].

    Evidence is the logits minus their mean over the classes, on which no probability depends, for all classes together.
    For a single logit, it is the logit.
    """
    values = np.asarray(logits, np.float64)
    if values.shape[-1] > 1:
        values = values - values.mean(axis=-1, keepdims=True)
    spread: Floats = np.sqrt(values.var(axis=-2).sum(axis=-1))
    return spread


def share_staying(draws: Floats) -> Floats:
    """Return the mean [N] of maps that stay over draws [N, draws]; NaN if no draw shows it."""
    known = np.isfinite(draws)
    total: Floats = np.where(known, draws, 0).sum(axis=1)
    mean: Floats = np.divide(total, known.sum(axis=1), out=np.full(len(draws), np.nan), where=known.any(axis=1))
    return mean


def assess(findings: Findings, scope: Scope) -> None:
    """Add the similarity to maps of randomised models, a verdict for each method, and one on what was learned."""
    data = findings.measurements
    if (found := data.of(Sanity)) is None:
        return
    _add_answers(findings, found)
    for method, draws in found.draws.items():
        staying = estimate_of_draws(draws, data)
        findings.add(STAYING_MAPS, staying, draws=True, method=method)
        if method in scope.methods:
            p = interval_p(staying, STAYING)
            findings.conclude(method, depends_on_weights(staying), p, STAYING_MAPS, method=method)
    for method in scope.methods:
        stages = found.stages.get(method, {})
        for order in ORDERS:
            if order in stages:
                _add_stages(findings, method, order, stages[order])
        if method in found.smoothed:
            findings.estimate(SMOOTHED, found.smoothed[method], method=method)


def _add_answers(findings: Findings, found: Sanity) -> None:
    """Add whether the model's answers distinguish these patches better than those of its random copies."""
    data = findings.measurements
    own = float(answer_spread(data.patches.logits))
    others = answer_spread(np.moveaxis(found.answers, 1, 0))
    patches, slides = len(data), len(set(data.slides.tolist()))
    low, middle, high = np.quantile(others, [0.025, 0.5, 0.975]).tolist()
    findings.add(ANSWER_SPREAD, Estimate(own, np.nan, np.nan, patches, slides, 0, "patch"), draws=True)
    of_copies = Estimate(middle, low, high, patches, slides, 0, "patch")
    findings.add(RANDOM_ANSWER_SPREAD, of_copies, draws=True, control="random_weights")
    verdict = has_learned(own, others)
    findings.conclude("model", verdict, np.nan, ANSWER_SPREAD, RANDOM_ANSWER_SPREAD, is_finding=False)


def estimate_of_draws(draws: Floats, data: Measurements) -> Estimate:
    """Return the share of maps that stay; the unit is the draw of weights."""
    patches, count = draws.shape
    numbers = np.repeat(np.arange(count)[None], patches, axis=0)
    weights = np.repeat(data.weights[:, None], count, axis=1)
    return estimate(draws.ravel(), numbers.ravel(), weights.ravel(), data.seed)


def _add_stages(findings: Findings, method: str, order: str, stages: Stages) -> None:
    for name, one in STAGES.items():
        values = getattr(stages, name)
        x = (np.arange(values.shape[1]) + 1) / values.shape[1]
        x_name = "stage" if order == "independent" else "share of the layers that are random"
        findings.curve(one, (x_name, name), x.tolist(), values, False, method=method, order=order)


def depends_on_weights(staying: Estimate) -> Verdict:
    """Return whether the map depends on what the model has learned: the share of maps that stay with random weights.

    Those that flip into their opposite are subtracted, see `wsi_gradcam.audit.measures.sanity.staying_maps`: 0 is
    chance.
    """
    question = "Does the map depend on what the model has learned?"
    evidence = {"maps that stay the same": staying}
    share = percent(max(0.0, staying.value))
    if staying.low > STAYING:
        words = (
            f"With random weights {share} of the maps stay the same beyond chance: they show the image, not the model."
        )
        return Verdict(question, "fails", words, evidence)
    if staying.high < STAYING:
        words = f"With random weights the maps change; {share} stay the same beyond chance."
        return Verdict(question, "holds", words, evidence)
    words = f"With random weights about {share} of the maps stay the same beyond chance."
    return Verdict(question, "unclear", words, evidence)


def has_learned(spread: float, of_random: ArrayLike, unit: Unit = "patch") -> Verdict:
    """Return whether answers to these patches, or slides, differ more than those of random copies of the model.

    Args:
        spread: `answer_spread` of the model.
        of_random: [draws] the same for its copies with random weights; with fewer than 49, nothing can be said.
    """
    units = "patches" if unit == "patch" else "slides"
    question = f"Has the model learned to tell these {units} apart?"
    others = np.asarray(of_random, np.float64)
    p = float((1 + (others >= spread).sum()) / (1 + len(others)))
    middle = float(np.median(others)) if len(others) else float("nan")
    evidence = {"spread of its answers": spread, "with random weights": middle, "p": p}
    if 1 / (1 + len(others)) > RARE:
        return Verdict(question, "unclear", f"Too few copies with random weights ({len(others)}) to tell.", evidence)
    if p <= RARE:
        words = f"Its answers vary more from {unit} to {unit} than those of copies with random weights."
        return Verdict(question, "holds", words, evidence)
    words = "Its answers vary no more than those of copies with random weights: it is untrained, or made for other"
    words = f"{words} {units}."
    return Verdict(question, "fails", words, evidence)


def figures(metrics: Metrics) -> list[Figure]:
    """Return figures of the similarity as layers become random, and of the maps that stay."""
    description = "Likeness of maps to those of the trained model as layers become random, from the head down"
    found: list[Figure] = []
    for name, title, y_name, chance in (
        ("spearman", "rank correlation with the trained model's map", "rank correlation", 0.0),
        (
            "resembles",
            "maps closer to the trained model's than 95% of permutations",
            "share of the patches",
            1 - RESEMBLING,
        ),
    ):
        lines = [
            (row_title(row), row.model_copy(update={"y_name": y_name}))
            for row in metrics.curves
            if row.measure == STAGES[name].name and row.order == "top_down" and any(y is not None for y in row.y)
        ]
        if lines:
            found.append(CurvesFigure([(title, lines)], f"{description}: {title}", reference=chance))
    rows = [
        (f"{row_title(row)} (should fail)" if row.method == GUIDED else row_title(row), row)
        for row in metrics.estimates
        if row.measure == STAYING_MAPS.name
    ]
    if rows:
        axis = "share of maps that stay the same, minus those that are inverted"
        found.append(IntervalsFigure(rows, axis, "Maps that stay the same with random weights", reference=STAYING))
    return found


def untested(data: Measurements, scope: Scope) -> list[tuple[str, str]]:
    """Return guided backpropagation, if the model does not support it."""
    found = data.of(Sanity)
    if found is not None and GUIDED in found.draws:
        return []
    why = "the model has no ReLU, or several layers are explained"
    return [("guided backpropagation as the negative control", why)]


QUESTION = Question(
    Words(
        title="Does the map depend on what the model has learned?",
        how="The model's weights are replaced by random ones, and the map is computed again. If it stays the same, it "
        "shows the image and not the model. Each random network is paired with its opposite, so that agreement by "
        "chance cancels out. Guided backpropagation, which is known to draw edges whatever a model has learned, is the "
        "negative control: it should fail. The model's answers are also compared with those of random copies: if they "
        "vary no more, the model has learned nothing about such patches.",
        not_proven="The test finds maps that ignore the model. It cannot say which of two methods that pass is better.",
        source="Adebayo 2018 (arXiv 1810.03292); Hedström 2024 (arXiv 2401.06465); that it ranks nothing: Binder 2022 "
        "(arXiv 2211.12486)",
    ),
    measure,
    assess,
    measures=(STAYING_MAPS, ANSWER_SPREAD, RANDOM_ANSWER_SPREAD, SMOOTHED, *STAGES.values()),
    figures=figures,
    untested=untested,
    in_depth=True,
)
