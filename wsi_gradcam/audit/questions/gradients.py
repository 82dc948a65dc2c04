"""What gradients cannot tell: how far their promises are kept (locality), and where they are blind (saturation)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import HALF, Findings, Verdict, interval_p, percent
from wsi_gradcam.audit.measurements import Estimate, optional, stored
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.vocabulary import EXPENSIVE, INTEGRATED, CurvesFigure, Figure, Measure, Words, method_title
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from wsi_gradcam.audit.batch import Batch
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.schema import Metrics

    Floats = NDArray[np.float64]

STEPS = (-1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0)  # along a map
HIDDEN_SQUARES = 8

WORTH = Measure("worth", "worth of the promise", "-1 to 1")
REACH = Measure("reach", "reach of the promise", "of the patch's contrast")
PROMISED, ACTUAL = Measure("promised", "promised"), Measure("actual", "actual")
INFIDELITY = Measure("infidelity", "infidelity, best scaled", "logits²")
NO_PROMISE = Measure("infidelity_of_nothing", "infidelity of promising nothing", "logits²")
LIKE_INTEGRATED = Measure("like_integrated_gradients", "likeness to Integrated Gradients", "rank correlation")
COMPLETENESS_GAP = Measure("completeness_gap", "gap of completeness", "logits")
COMPLETENESS_SUM = Measure("completeness_sum", "what its values should sum to", "logits")

ALIKE = 0.9  # rank correlation from which maps are taken for nearly the same

SATURATED = Measure("saturated", "patches with a saturated probability", "share", of="model")
SILENT = Measure("silent", "patches without any gradient", "share", of="model")
GRADIENT_RATIO = Measure("gradient_ratio", "gradient of the probability over that of the logit", "ratio", of="model")
DEAD_CHANNELS = Measure("dead_channels", "dead channels of a patch", "share", of="model")
LIKE_LEAKY = Measure("like_leaky", "likeness to the map with a leaky backward", "rank correlation")


@dataclass(frozen=True, kw_only=True, eq=False)
class Locality:
    """Steps along maps, by method: what they do, and what was promised; see `measures.changes`.

    Attributes:
        promised, actual: [N, steps] changes of the explained scalar.
        worth, reach: [N], see `FiniteSteps`.
        infidelity: [N] of hiding squares, the map scaled best.
        moved: [N] the infidelity of a map that promises nothing.
        like_integrated: [N] rank correlation with Integrated Gradients.
        completeness_gap: [N] of Integrated Gradients, in logits; None with several layers.
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
    """Measure finite steps, infidelity and completeness; None where not in depth."""
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
    """Add the effects of finite steps, against the gradient's promise, and a verdict for each method."""
    if (found := findings.measurements.of(Locality)) is None:
        return
    axes = ("step along the map", "change of the logit")
    for method in scope.methods:
        if method not in found.worth:
            continue
        worth = findings.estimate(WORTH, found.worth[method], method=method)
        findings.conclude(method, promises_kept(worth), interval_p(worth, 0.0), WORTH, method=method)
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


def promises_kept(worth: Estimate) -> Verdict:
    """Return whether the logit moves as the gradient promises when the picture really changes: `FiniteSteps.worth`.

    0 is what promising no change at all is worth.
    """
    question = "Does the model do what its gradient promises?"
    evidence = {"worth of the promise": worth}
    if worth.low > 0:
        words = "Real changes along the map move the answer about as the map promises."
        return Verdict(question, "holds", words, evidence)
    if worth.high < 0:
        words = (
            "Real changes along the map move the answer otherwise than it promises: it tells of the nearest step only."
        )
        return Verdict(question, "fails", words, evidence)
    return Verdict(question, "unclear", "The map's promise is not told apart from promising no change.", evidence)


def locality_figures(metrics: Metrics) -> list[Figure]:
    """Return actual and promised changes, a panel a method."""
    steps = (PROMISED.name, ACTUAL.name)
    curves = [row for row in metrics.curves if row.measure in steps and any(y is not None for y in row.y)]
    methods = list(dict.fromkeys(row.method for row in curves))
    if not methods:
        return []
    panels = []
    for method in methods:
        title = method_title(method or "")
        panels.append((title, [(f"{title}: {row.what}", row) for row in curves if row.method == method]))
    description = "What steps along the map do, against what the gradient promises"
    return [CurvesFigure(panels, description, reference=0.0, reference_name="no change (control)")]


LOCALITY = Question(
    Words(
        title="How far does the map's story carry?",
        how="A gradient tells of an infinitely small change. Here what the map shows is really made weaker and "
        "stronger, step by step, and the answer is held against what the gradient had promised. Where the two part, "
        "the map is right about the nearest step only: two models may have equal maps and do different things next.",
        not_proven="Only steps along the map are tried. A promise that is kept there may be broken elsewhere.",
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
        leaky: [N, h, w] maps with a backward that leaks through ReLUs, by method.
        like_leaky: [N] rank correlation of the plain maps with them.
    """

    saturated: Floats = stored("saturation/saturated")
    gradient_ratio: Floats = stored("saturation/gradient_ratio")
    silent: Floats = stored("saturation/silent")
    dead_share: Floats = stored("saturation/dead_share")
    leaky: Mapping[str, NDArray[np.float32]] = stored("leaky/{}")
    like_leaky: Mapping[str, Floats] = stored("saturation/{}/like_leaky")


def measure_saturation(batch: Batch) -> Saturation | None:
    """Measure saturation, and the maps that a backward pass that leaks through ReLUs would show."""
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
            except ModelError:  # several layers, a network that cannot be cut: told by its absence
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
    """Return whether gradients can see: shares of the patches with a saturated probability, and with a silent logit.

    Args:
        saturated, silent: of the fields of `Saturation`.
    """
    question = "Can a gradient see what the model uses?"
    evidence = {"saturated": saturated, "silent": silent}
    if silent.low > HALF:
        words = f"On {percent(silent.value)} of the patches even the logit has no gradient: the map shows nothing."
        return Verdict(question, "fails", words, evidence)
    if saturated.low > HALF:
        share = percent(saturated.value)
        words = f"On {share} of the patches the probability is saturated: only the logit can be explained by gradients."
        return Verdict(question, "fails", words, evidence)
    if saturated.high < HALF and silent.high < HALF:
        words = f"The probability is saturated on {percent(saturated.value)} of the patches."
        return Verdict(question, "holds", words, evidence)
    return Verdict(question, "unclear", "On about half of the patches the probability is saturated.", evidence)


def remarks(metrics: Metrics) -> list[str]:
    """Return sentences on the maps with a leaky backward."""
    found = []
    for row in metrics.estimates:
        if row.measure == LIKE_LEAKY.name and row.patches and row.value is not None:
            title = method_title(row.method or "")
            leaky = f"The map of {title} with a leaky backward (rank correlation {row.value:.2f})"
            found.append(
                f"{leaky} is another: units that are off hold back evidence, which this map does not show."
                if row.value < ALIKE
                else f"{leaky} is nearly the same: hardly anything is hidden by units that are off."
            )
    return found


def untested(data: Measurements, scope: Scope) -> list[tuple[str, str]]:
    """Return leaky maps, where the network has none."""
    found = data.of(Saturation)
    if not scope.is_class or (found is not None and found.like_leaky):
        return []
    return [("maps with a leaky backward", "the network cannot be cut at one layer")]


SATURATION = Question(
    Words(
        title="Where is the gradient blind?",
        how="Where a model is very sure, its probability hardly changes any more, and the gradient of the probability "
        "is nearly zero although the evidence is strongest there. The maps of this archive explain the logit, which "
        "does not saturate so. Units that are off pass no gradient either; a map whose backward pass leaks through "
        "them stands beside.",
        not_proven="A model without saturation may still be wrong.",
        source="definitions: wsi_gradcam.audit.measures.changes",
    ),
    measure_saturation,
    assess_saturation,
    measures=(SATURATED, SILENT, GRADIENT_RATIO, DEAD_CHANNELS, LIKE_LEAKY),
    remarks=remarks,
    untested=untested,
    no_numbers="the target is no class, and has no probability",
)
