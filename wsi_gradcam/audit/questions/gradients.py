"""The limits of gradients: how far their prediction holds (locality), and where they vanish (saturation)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import HALF, Findings, Verdict, interval_p, percent
from wsi_gradcam.audit.measurements import Estimate, optional, stored
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.schema import EXPENSIVE, INTEGRATED, CurvesFigure, Figure, Measure, Words, method_title
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from wsi_gradcam.audit.batch import Batch
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.schema import Metrics

    Floats = NDArray[np.float64]

STEPS = (-1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0)  # steps along a map
HIDDEN_SQUARES = 8

# The names of measures are those in metrics.json, which never change; their words are for readers.
WORTH = Measure("worth", "agreement with the gradient's prediction", "-1 to 1")
REACH = Measure("reach", "largest step that the gradient predicts", "of the patch's contrast")
PROMISED, ACTUAL = Measure("promised", "predicted"), Measure("actual", "actual")
INFIDELITY = Measure("infidelity", "infidelity, optimally scaled", "logits²")
NO_PROMISE = Measure("infidelity_of_nothing", "infidelity of a map of zeros", "logits²")
LIKE_INTEGRATED = Measure("like_integrated_gradients", "similarity to Integrated Gradients", "rank correlation")
COMPLETENESS_GAP = Measure("completeness_gap", "completeness gap", "logits")
COMPLETENESS_SUM = Measure("completeness_sum", "expected sum of the values", "logits")

ALIKE = 0.9  # rank correlation from which on maps count as nearly the same

SATURATED = Measure("saturated", "patches with a saturated probability", "share", of="model")
SILENT = Measure("silent", "patches without any gradient", "share", of="model")
GRADIENT_RATIO = Measure(
    "gradient_ratio", "gradient of the probability relative to that of the logit", "ratio", of="model"
)
DEAD_CHANNELS = Measure("dead_channels", "inactive channels of a patch", "share", of="model")
LIKE_LEAKY = Measure("like_leaky", "similarity to the map with leaky gradients", "rank correlation")


@dataclass(frozen=True, kw_only=True, eq=False)
class Locality:
    """Steps along maps, by method: their effects, and what the gradient predicts; see `measures.changes`.

    Attributes:
        promised, actual: [N, steps] changes of the explained scalar.
        worth, reach: [N], see `FiniteSteps`.
        infidelity: [N] infidelity of hiding squares, with the map optimally scaled.
        moved: [N] the infidelity of a map of zeros.
        like_integrated: [N] rank correlation with Integrated Gradients.
        completeness_gap: [N] that of Integrated Gradients, in logits; None with several layers.
        score_change: [N] what they should sum to.
    """

    promised: Mapping[str, Floats] = stored("locality/{}/promised")
    actual: Mapping[str, Floats] = stored("locality/{}/actual")
    worth: Mapping[str, Floats] = stored("locality/{}/worth")
    reach: Mapping[str, Floats] = stored("locality/{}/reach")
    infidelity: Mapping[str, Floats] = stored("locality/{}/infidelity")
    moved: Mapping[str, Floats] = stored("locality/{}/moved")
    like_integrated: Mapping[str, Floats] = stored("locality/{}/like_integrated_gradients")
    completeness_gap: Floats | None = optional(f"locality/{INTEGRATED}/completeness_gap")
    score_change: Floats | None = optional(f"locality/{INTEGRATED}/score_change")


def measure_locality(batch: Batch) -> Locality | None:
    """Measure finite steps, infidelity and completeness; None unless in depth."""
    if not batch.in_depth:
        return None
    import torch

    from wsi_gradcam.audit.measures.changes import completeness_gap, finite_steps, hiding_changes, infidelity
    from wsi_gradcam.audit.measures.removal import blurred, replace_by
    from wsi_gradcam.audit.measures.sanity import spearman
    from wsi_gradcam.cam.engine import pool_to_layer_grid

    images, subject, aim = batch.images, batch.subject, batch.aim
    others = blurred(images)
    squares = hidden_squares((images.shape[2], images.shape[3]), HIDDEN_SQUARES, batch.seed).to(images.device)
    steps = {name: finite_steps(subject, images, aim, map_, others, STEPS) for name, map_ in batch.maps.items()}
    hidden = {
        name: hiding_changes(subject, images, aim, map_, squares, replace_by(images, others))
        for name, map_ in batch.maps.items()
    }
    gap = change = None
    like: dict[str, Floats] = {}
    if len(subject.program.layers) == 1:  # the reference, in logits and complete by definition
        reference = subject.maps(images, aim, INTEGRATED)
        whole, empty = aim.logit(aim.logits), aim.logit(subject.answers(torch.zeros_like(images)))
        gap, change = completeness_gap(reference, whole, empty), (whole - empty).cpu().double().numpy()
        pooled = pool_to_layer_grid(reference, INTEGRATED, batch.grid).float().cpu().numpy()
        like = {name: spearman(map_, pooled) for name, map_ in batch.map_arrays.items()}
    return Locality(
        promised={name: one.promised for name, one in steps.items()},
        actual={name: one.actual for name, one in steps.items()},
        worth={name: one.worth for name, one in steps.items()},
        reach={name: one.reach for name, one in steps.items()},
        infidelity={name: infidelity(*changes, normalise=True) for name, changes in hidden.items()},
        moved={name: (actual**2).mean(axis=1) for name, (_, actual) in hidden.items()},
        like_integrated=like,
        completeness_gap=gap,
        score_change=change,
    )


def hidden_squares(size: tuple[int, int], count: int, seed: int) -> Tensor:
    """Return squares of a quarter of a patch's side at random places, bool [count, H, W]."""
    import torch

    height, width = size
    random = np.random.default_rng(seed)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        y, x = random.integers(0, height - height // 4 + 1), random.integers(0, width - width // 4 + 1)
        mask[y : y + height // 4, x : x + width // 4] = True
    return masks


def assess_locality(findings: Findings, scope: Scope) -> None:
    """Add the effects of finite steps, against the gradient's prediction, and a verdict for each method."""
    if (found := findings.measurements.of(Locality)) is None:
        return
    axes = ("step along the map", "change of the logit")
    for method in scope.methods:
        if method not in found.worth:
            continue
        worth = findings.estimate(WORTH, found.worth[method], method=method)
        promised, actual = (findings.measurements.mean(part[method]) for part in (found.promised, found.actual))
        verdict = gradient_predicts(worth, follows(promised, actual))
        findings.conclude(method, verdict, interval_p(worth, 0.0), WORTH, method=method)
        findings.estimate(REACH, found.reach[method], method=method)
        findings.curve(PROMISED, axes, STEPS, found.promised[method], True, method=method)
        findings.curve(ACTUAL, axes, STEPS, found.actual[method], True, method=method)
        findings.estimate(INFIDELITY, found.infidelity[method], method=method)
        findings.estimate(NO_PROMISE, found.moved[method], method=method)
        if method in found.like_integrated:
            findings.estimate(LIKE_INTEGRATED, found.like_integrated[method], method=method)
    if found.completeness_gap is not None and found.score_change is not None:
        findings.estimate(COMPLETENESS_GAP, np.abs(found.completeness_gap), method=INTEGRATED)
        findings.estimate(COMPLETENESS_SUM, np.abs(found.score_change), method=INTEGRATED)


def follows(promised: Floats, actual: Floats) -> bool:
    """Return whether mean curves [steps] agree: on both sides of 0, the prediction beats predicting no change.

    These are the curves in the report, in which patches with large changes count most.
    """
    steps = np.array(STEPS)
    missed, moved = (actual - promised) ** 2, actual**2
    return all(bool(missed[side].sum() < moved[side].sum()) for side in (steps < 0, steps > 0))


def gradient_predicts(worth: Estimate, mean_follows: bool | None = None) -> Verdict:
    """Return whether the logit changes as the gradient predicts when the image is changed: `FiniteSteps.worth`.

    Predicting no change at all scores 0. A verdict must agree with the curves that the report shows beside it.

    Args:
        mean_follows: what `follows` says about the mean curves; None if they are not known.
    """
    question = "Does the model respond as its gradient predicts?"
    evidence = {"agreement with the prediction": worth}
    if worth.low > 0 and mean_follows is not False:
        words = (
            "When what the map marks is weakened or strengthened, the answer changes about as the gradient predicts."
        )
        return Verdict(question, "holds", words, evidence)
    if worth.high < 0 and mean_follows is not True:
        words = (
            "When what the map marks is weakened or strengthened, the answer does not change as the gradient predicts: "
            "the map shows where the model is sensitive, not how much the answer would change."
        )
        return Verdict(question, "fails", words, evidence)
    if worth.low > 0:
        words = (
            "On most patches the answer changes as the gradient predicts, but the mean curves differ: a few patches "
        )
        return Verdict(question, "unclear", f"{words}with large changes do not follow the prediction.", evidence)
    if worth.high < 0:
        words = "On most patches the answer does not change as the gradient predicts, but the mean curves agree: a few "
        return Verdict(question, "unclear", f"{words}patches with large changes follow the prediction.", evidence)
    words = "These patches do not show whether the gradient predicts the answer better than expecting no change."
    return Verdict(question, "unclear", words, evidence)


def locality_figures(metrics: Metrics) -> list[Figure]:
    """Return figures of actual and predicted changes, with one panel for each method."""
    steps = (PROMISED.name, ACTUAL.name)
    curves = [row for row in metrics.curves if row.measure in steps and any(y is not None for y in row.y)]
    methods = list(dict.fromkeys(row.method for row in curves))
    if not methods:
        return []
    panels = []
    for method in methods:
        title = method_title(method or "")
        panels.append((title, [(f"{title}: {row.what}", row) for row in curves if row.method == method]))
    description = "What steps along the map do, compared with the gradient's prediction"
    return [CurvesFigure(panels, description, reference=0.0, reference_name="no change (control)")]


LOCALITY = Question(
    Words(
        title="How far does the gradient's prediction hold?",
        how="A gradient describes an infinitely small change. Here, what the map marks is actually weakened and "
        "strengthened, step by step, and the change of the answer is compared with the gradient's prediction. Where "
        "the two diverge, the map shows where the model is sensitive, but not how much the answer would change: two "
        "models with equal maps may respond differently to a larger change.",
        not_proven="Only steps along the map are tried. A prediction that holds there may fail elsewhere.",
        source="Yeh 2019 (arXiv 1901.09392); Sundararajan 2017 (arXiv 1703.01365)",
    ),
    measure_locality,
    assess_locality,
    measures=(
        *(WORTH, REACH, PROMISED, ACTUAL, INFIDELITY, NO_PROMISE),
        *(LIKE_INTEGRATED, COMPLETENESS_GAP, COMPLETENESS_SUM),
    ),
    figures=locality_figures,
    in_depth=True,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Saturation:
    """Saturation of the model on patches, [N] each: see `measures.changes.Saturation`.

    Attributes:
        leaky: [N, h, w] maps with gradients that leak through inactive ReLUs, by method.
        like_leaky: [N] rank correlation of the plain maps with them.
    """

    saturated: Floats = stored("saturation/saturated")
    gradient_ratio: Floats = stored("saturation/gradient_ratio")
    silent: Floats = stored("saturation/silent")
    dead_share: Floats = stored("saturation/dead_share")
    leaky: Mapping[str, NDArray[np.float32]] = stored("leaky/{}")
    like_leaky: Mapping[str, Floats] = stored("saturation/{}/like_leaky")


def measure_saturation(batch: Batch) -> Saturation | None:
    """Measure saturation, and the maps that leaky gradients, which pass inactive ReLUs too, would show."""
    if batch.aim.classes is None:
        return None
    from wsi_gradcam.audit.measures.changes import saturation
    from wsi_gradcam.audit.measures.sanity import spearman

    found = saturation(batch.subject, batch.images, batch.aim)
    leaky = _leaky_maps(batch) if batch.in_depth else {}
    return Saturation(
        saturated=found.saturated,
        gradient_ratio=found.gradient_ratio,
        silent=found.silent,
        dead_share=found.dead_share,
        leaky=leaky,
        like_leaky={name: spearman(batch.map_arrays[name], map_) for name, map_ in leaky.items()},
    )


def _leaky_maps(batch: Batch) -> dict[str, NDArray[np.float32]]:
    from wsi_gradcam.audit.measures.changes import leaky_maps

    found: dict[str, NDArray[np.float32]] = {}
    for name in batch.methods:
        if METHOD_INFO[name].grid == "layer" and name not in EXPENSIVE:
            try:
                maps = leaky_maps(batch.subject, batch.images, batch.aim, name)
            except ModelError:  # with several layers, or a network that cannot be cut, it is missing
                break
            found[name] = maps.float().cpu().numpy()
    return found


def assess_saturation(findings: Findings, scope: Scope) -> None:
    """Add saturation, and one verdict."""
    if (found := findings.measurements.of(Saturation)) is None:
        return
    saturated = findings.estimate(SATURATED, found.saturated)
    silent = findings.estimate(SILENT, found.silent)
    findings.estimate(GRADIENT_RATIO, found.gradient_ratio)
    findings.estimate(DEAD_CHANNELS, found.dead_share)
    for method in scope.methods:
        if method in found.like_leaky:
            findings.estimate(LIKE_LEAKY, found.like_leaky[method], method=method)
    worse = max((saturated, silent), key=lambda one: one.value)
    findings.conclude("model", not_saturated(saturated, silent), interval_p(worse, HALF), SATURATED, SILENT)


def not_saturated(saturated: Estimate, silent: Estimate) -> Verdict:
    """Return whether gradients can show the evidence: shares of patches with saturated probability or silent logit.

    Args:
        saturated, silent: estimates of these fields of `Saturation`.
    """
    question = "Can gradients show what the model uses?"
    evidence = {"saturated": saturated, "silent": silent}
    if silent.low > HALF:
        words = f"On {percent(silent.value)} of the patches even the logit has no gradient: the map is empty there."
        return Verdict(question, "fails", words, evidence)
    if saturated.low > HALF:
        share = percent(saturated.value)
        words = f"On {share} of the patches the probability is saturated: gradients can explain only the logit there."
        return Verdict(question, "fails", words, evidence)
    if saturated.high < HALF and silent.high < HALF:
        words = f"The probability is saturated on {percent(saturated.value)} of the patches."
        return Verdict(question, "holds", words, evidence)
    return Verdict(question, "unclear", "The probability is saturated on about half of the patches.", evidence)


def remarks(metrics: Metrics) -> list[str]:
    """Return sentences about the maps with leaky gradients."""
    found = []
    for row in metrics.estimates:
        if row.measure == LIKE_LEAKY.name and row.patches and row.value is not None:
            title = method_title(row.method or "")
            leaky = f"With leaky gradients, which pass inactive units too, the {title} map is"
            found.append(
                f"{leaky} different (rank correlation {row.value:.2f}): inactive units hide evidence from it."
                if row.value < ALIKE
                else f"{leaky} nearly the same (rank correlation {row.value:.2f}): inactive units hide hardly anything."
            )
    return found


def untested(data: Measurements, scope: Scope) -> list[tuple[str, str]]:
    """Return leaky maps, if the network has none."""
    found = data.of(Saturation)
    if not scope.is_class or (found is not None and found.like_leaky):
        return []
    return [("maps with leaky gradients", "the network cannot be split at one layer")]


SATURATION = Question(
    Words(
        title="Where do gradients vanish?",
        how="Where a model is very sure, its probability hardly changes any more, and the gradient of the probability "
        "is nearly zero although the evidence is strongest there. The maps of this run explain the logit, which does "
        "not saturate. Inactive units (ReLUs at zero) pass no gradient either; a second map with leaky gradients, "
        "which pass them, is compared with the first.",
        not_proven="A model without saturation may still be wrong.",
        source="definitions: wsi_gradcam.audit.measures.changes",
    ),
    measure_saturation,
    assess_saturation,
    measures=(SATURATED, SILENT, GRADIENT_RATIO, DEAD_CHANNELS, LIKE_LEAKY),
    remarks=remarks,
    untested=untested,
    no_numbers="the target is not a class and has no probability",
)
