"""Saturation: is the gradient blind, because the probability or a unit cannot go further?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.estimates import Estimate
from wsi_gradcam.audit.findings import HALF, Findings, Verdict, interval_p, percent
from wsi_gradcam.audit.measurements import stored
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.vocabulary import EXPENSIVE, Measure, Words, method_title
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.batch import Batch
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.schema import Metrics

    Floats = NDArray[np.float64]

ALIKE = 0.9  # rank correlation from which maps are taken for nearly the same

SATURATED = Measure("saturated", "patches with a saturated probability", "share", of="model")
SILENT = Measure("silent", "patches without any gradient", "share", of="model")
GRADIENT_RATIO = Measure("gradient_ratio", "gradient of the probability over that of the logit", "ratio", of="model")
DEAD_CHANNELS = Measure("dead_channels", "dead channels of a patch", "share", of="model")
LIKE_LEAKY = Measure("like_leaky", "likeness to the map with a leaky backward", "rank correlation")


@dataclass(frozen=True, kw_only=True, eq=False)
class Saturation:
    """Saturation of the model on patches, [N] each: see `measures.gradients.Saturation`.

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


def measure(batch: Batch) -> Saturation | None:
    """Measure saturation, and the maps that a backward pass that leaks through ReLUs would show."""
    if batch.aim.classes is None:
        return None
    from wsi_gradcam.audit.measures.gradients import saturation
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
    from wsi_gradcam.audit.measures.gradients import leaky_maps

    found: dict[str, NDArray[np.float32]] = {}
    for name in batch.methods:
        if METHOD_INFO[name].grid == "layer" and name not in EXPENSIVE:
            try:
                maps = leaky_maps(batch.subject, batch.images, batch.aim, name)
            except ModelError:  # several layers, a network that cannot be cut: told by its absence
                break
            found[name] = maps.float().cpu().numpy()
    return found


def assess(findings: Findings, scope: Scope) -> None:
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


QUESTION = Question(
    Words(
        title="Where is the gradient blind?",
        how="Where a model is very sure, its probability hardly changes any more, and the gradient of the probability "
        "is nearly zero although the evidence is strongest there. The maps of this archive explain the logit, which "
        "does not saturate so. Units that are off pass no gradient either; a map whose backward pass leaks through "
        "them stands beside.",
        not_proven="A model without saturation may still be wrong.",
        source="definitions: wsi_gradcam.audit.measures.gradients",
    ),
    measure,
    assess,
    measures=(SATURATED, SILENT, GRADIENT_RATIO, DEAD_CHANNELS, LIKE_LEAKY),
    remarks=remarks,
    untested=untested,
    no_numbers="the target is no class, and has no probability",
)
