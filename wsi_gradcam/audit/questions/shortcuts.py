"""Does the answer depend on ink, glass, blur or patch borders? And what is bare glass called?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.findings import ALPHA, ENOUGH, HALF, Findings, Verdict, capitalised, percent
from wsi_gradcam.audit.measurements import Comparison, Estimate, estimate, stored
from wsi_gradcam.audit.questions import Question, Scope
from wsi_gradcam.audit.schema import (
    BLUR,
    BORDER,
    GLASS,
    PEN,
    Figure,
    IntervalsFigure,
    Measure,
    Unit,
    Words,
    method_title,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.audit.batch import Batch
    from wsi_gradcam.audit.measurements import Measurements
    from wsi_gradcam.audit.schema import EstimateRow, Metrics

    Floats = NDArray[np.float64]

GIVEN = " (given)"  # ending of the names of suspects that somebody has drawn
SUSPECT_WORDS = {PEN: "ink", GLASS: "bare glass", BLUR: "blurred areas", BORDER: "the patch border"}
HIDEABLE = (0.02, 0.9)  # shares of a patch between which a suspect can be hidden, and as much elsewhere

SHOWN = Measure("suspect_shown", "patches that show it", "share", of="{suspect}")
AREA = Measure("suspect_area", "share of the area", "share", of="{suspect}")
ATTRIBUTION = Measure(
    "attribution_on_suspect", "share of the positive attribution", "share", of="{suspect}, {method}", against=AREA.what
)
LOGIT_CHANGE = Measure("logit_change", "change of the logit", "logits", "{suspect}", "an equal area elsewhere")
CHANGED_ANSWERS = Measure("changed_answers", "changed answers", "share", "{suspect}", "an equal area elsewhere")
GLASS_CALLED = Measure(
    "glass_called",
    "bare glass called so",
    "share",
    of="glass, {label}",
    evidence="bare glass called {label}",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Shortcuts:
    """Suspects on patches, [N] each by suspect: see `measures.shortcuts`.

    Attributes:
        share: share of the patch.
        area: share of the area covered by maps; NaN if the suspect is not shown.
        mass: share of the positive attribution on the suspect, by method; NaN likewise.
        change, size: change of the explained scalar without the suspect, signed and absolute; NaN if it cannot be
            hidden.
        flips: 1 if another class is predicted without it.
        control_size, control_flips: the same for equal areas elsewhere.
    """

    share: Mapping[str, Floats] = stored("shortcuts/{}/share")
    area: Mapping[str, Floats] = stored("shortcuts/{}/area")
    mass: Mapping[str, Mapping[str, Floats]] = stored("shortcuts/{}/{}/mass")
    change: Mapping[str, Floats] = stored("shortcuts/{}/change")
    size: Mapping[str, Floats] = stored("shortcuts/{}/size")
    flips: Mapping[str, Floats] = stored("shortcuts/{}/flips")
    control_size: Mapping[str, Floats] = stored("shortcuts/{}/control_size")
    control_flips: Mapping[str, Floats] = stored("shortcuts/{}/control_flips")


@dataclass(frozen=True, kw_only=True, eq=False)
class GlassCalls:
    """Classes predicted for a slide's bare glass: the share [K] of patches of it by class."""

    called: Floats = stored("slide/glass_called")


def measure(batch: Batch) -> Shortcuts:
    """Measure attribution on suspects, and the effects of hiding them, against equal areas elsewhere."""
    from wsi_gradcam.audit.measures.removal import mean_colour, replace_by
    from wsi_gradcam.audit.measures.shortcuts import Masking, masking, mass_on, suspects

    images, data = batch.images, batch.data
    replace = replace_by(images, mean_colour(images))
    share: dict[str, Floats] = {}
    area: dict[str, Floats] = {}
    mass: dict[str, dict[str, Floats]] = {}
    hiding: dict[str, Masking] = {}
    given = {f"{name.replace('/', '-')}{GIVEN}": masks for name, masks in data.regions.items()}
    for suspect, masks in (suspects(data.raw, batch.mpp, data.background) | given).items():
        share[suspect] = masks.mean(axis=(1, 2))
        shown, is_there = batch.input_masks(masks), share[suspect] > 0
        usable = shown & ((share[suspect] > HIDEABLE[0]) & (share[suspect] < HIDEABLE[1]))[:, None, None]
        if usable.any():
            hiding[suspect] = masking(batch.subject, images, batch.aim, usable, replace, seed=batch.seed)
        mass[suspect] = {}
        for name, map_ in batch.map_arrays.items():
            on_it, covered = mass_on(map_, shown)
            mass[suspect][name] = np.where(is_there, on_it, np.nan)
            area[suspect] = np.where(is_there, covered, np.nan)
    return Shortcuts(
        share=share,
        area=area,
        mass=mass,
        change={name: one.change for name, one in hiding.items()},
        size={name: one.size for name, one in hiding.items()},
        flips={name: one.flips for name, one in hiding.items()},
        control_size={name: one.control_size for name, one in hiding.items()},
        control_flips={name: one.control_flips for name, one in hiding.items()},
    )


def measure_slide(batch: Batch) -> GlassCalls:
    """Measure the classes predicted for bare glass of the slide."""
    from wsi_gradcam.audit.measures.shortcuts import glass_patches

    rgb = glass_patches(batch.data.background, batch.patch_px, len(batch.images), batch.seed)
    logits = batch.subject.answers(batch.subject.images(rgb)).float().cpu().numpy()
    if logits.shape[1] == 1:
        return GlassCalls(called=(logits > 0).mean(axis=0))
    return GlassCalls(called=np.bincount(logits.argmax(axis=1), minlength=logits.shape[1]) / len(logits))


def assess(findings: Findings, scope: Scope) -> None:
    """Add the effects of hiding suspects, and the calls of bare glass; verdicts on suspects, and the positive class."""
    if (found := findings.measurements.of(Shortcuts)) is not None:
        for suspect in found.share:
            _add_suspect(findings, suspect, found, scope)
            if suspect in found.size:
                _add_hiding(findings, suspect, found)
    _add_glass(findings, scope)


def _add_suspect(findings: Findings, suspect: str, found: Shortcuts, scope: Scope) -> None:
    """Add where a suspect is, and the attribution on it."""
    share = found.share[suspect]
    is_there = share > 0
    findings.estimate(SHOWN, np.where(np.isnan(share), np.nan, is_there.astype(np.float64)), suspect=suspect)
    area = findings.measurements.only(is_there).estimate(found.area[suspect][is_there])
    findings.add(AREA, area, suspect=suspect)
    for method in scope.methods:
        on_it = found.mass[suspect][method]
        if findings.estimate(ATTRIBUTION, on_it, suspect=suspect, method=method).patches:
            of_area = found.area[suspect]
            findings.compare(ATTRIBUTION, on_it, of_area, suspect=suspect, method=method, control="share_of_area")


def _add_hiding(findings: Findings, suspect: str, found: Shortcuts) -> None:
    """Add the effects of hiding a suspect."""
    sizes, flips = (
        (found.size[suspect], found.control_size[suspect]),
        (found.flips[suspect], found.control_flips[suspect]),
    )
    drop = findings.compare(LOGIT_CHANGE, *sizes, suspect=suspect, control="equal_area")
    changed = findings.compare(CHANGED_ANSWERS, *flips, suspect=suspect, control="equal_area")
    if drop.difference.patches:
        verdict = free_of(suspect_words(suspect), drop, changed)
        is_finding, measures = verdict.outcome == "fails", (LOGIT_CHANGE, CHANGED_ANSWERS)
        findings.conclude(suspect, verdict, changed.p, *measures, is_finding=is_finding, suspect=suspect)


def _add_glass(findings: Findings, scope: Scope) -> None:
    """Add the classes predicted for bare glass, averaged over slides."""
    by_slide = findings.measurements.of_slides(GlassCalls)
    slides = np.array(list(by_slide), object).astype(np.str_)
    for number, label in enumerate(scope.classes if by_slide else ()):
        values = np.array([one.called[number] for one in by_slide.values()], np.float64)
        called = estimate(values, slides, None, findings.measurements.seed)
        findings.add(GLASS_CALLED, called, label=label)
        if label == scope.positive:
            findings.conclude("glass alone", quiet_on_glass(label, called), np.nan, GLASS_CALLED, label=label)


def suspect_words(suspect: str) -> str:
    """Return the words for a suspect in a sentence.

    >>> suspect_words("pen"), suspect_words("ruler (given)")
    ('ink', '“ruler”')
    """
    return SUSPECT_WORDS.get(suspect, f"“{suspect.removesuffix(GIVEN)}”")


def free_of(suspect: str, drop: Comparison, flips: Comparison, unit: Unit = "patch") -> Verdict:
    """Return whether the answer is independent of a suspect region: the effect of hiding it, against equal areas.

    Args:
        suspect: in words, such as "ink".
        drop: size of the logit's change when the suspect is hidden, against equal areas.
        flips: whether the predicted class changes (0 or 1), against its share for equal areas.
        unit: a patch in which it is hidden, or a slide from which patches with it are removed.
    """
    units, hiding = ("patches", "hiding") if unit == "patch" else ("slides", "removing")
    as_much, whose = f"{hiding} an equal area elsewhere", "" if unit == "patch" else "slide's "
    question = f"Is the {whose}answer independent of {suspect}?"
    evidence = {"change of the logit": drop, "changed answers": flips}
    if flips.p < ALPHA and flips.difference.value > 0:
        share = percent(flips.difference.value)
        words = f"{capitalised(hiding)} {suspect} changes the answer for {share} more of the {units} than {as_much}."
        return Verdict(question, "fails", words, evidence)
    if drop.p < ALPHA and drop.difference.value > 0:
        words = f"{capitalised(hiding)} {suspect} moves the logit more than {as_much}, but seldom changes the answer."
        return Verdict(question, "unclear", words, evidence)
    if drop.difference.patches < ENOUGH:
        words = f"Too few {units} ({drop.difference.patches}) show {suspect} and have an equal area elsewhere."
        return Verdict(question, "unclear", words, evidence)
    return Verdict(
        question, "holds", f"{capitalised(hiding)} {suspect} changes the answer no more than {as_much}.", evidence
    )


def quiet_on_glass(name: str, called: Estimate) -> Verdict:
    """Return whether bare glass is not given a class: the share of glass patches that are predicted as `name`.

    Args:
        name: a class of tissue, such as "tumour".
    """
    question = f"Is bare glass called something other than {name}?"
    evidence = {f"glass called {name}": called}
    share = percent(called.value)
    if called.low > HALF:
        words = f"{share} of the patches of bare glass are called {name}: it is the class given by default."
        return Verdict(question, "fails", words, evidence)
    if called.high < HALF:
        return Verdict(question, "holds", f"{share} of the patches of bare glass are called {name}.", evidence)
    return Verdict(question, "unclear", f"About half of the patches of bare glass are called {name}.", evidence)


def figures(metrics: Metrics) -> list[Figure]:
    """Return a figure of the attribution on each suspect beside its share of the area, its value by chance."""
    rows: list[tuple[str, EstimateRow]] = []
    for row in metrics.estimates:
        if row.suspect is None or row.value is None:
            continue
        suspect = suspect_words(row.suspect)
        if row.measure == AREA.name:
            rows.append((f"{suspect}: its area (control)", row.model_copy(update={"control": "share_of_area"})))
        elif row.measure == ATTRIBUTION.name:
            rows.append((f"{suspect}: {method_title(row.method or '')}", row))
    axis = "share of the positive attribution; gray: share of the area"
    return [IntervalsFigure(rows, axis, "Attribution on suspects", left=0.0)] if rows else []


def untested(data: Measurements, scope: Scope) -> list[tuple[str, str]]:
    """Return bare glass, if no class is the positive one."""
    if scope.positive:
        return []
    why = "which class is the positive one is not known; name it with --target"
    return [("whether bare glass is called a class of tissue", why)]


QUESTION = Question(
    Words(
        title="Does the answer depend on ink, glass, blur or patch borders?",
        how="Attribution on such a region is a correlation. Hiding the region is an experiment: if the answer changes "
        "more than when an equal area is hidden elsewhere, the region is a cause of the answer.",
        not_proven="Only suspects that are detected or given (--regions) are tested, and detection misses some; folds "
        "and rulers are not detected. Shortcuts that look like tissue, such as a stain used by one hospital only, are "
        "not among them: compare sites and scanners below.",
        source="a masking intervention with equal-area controls, see wsi_gradcam.audit.measures.shortcuts",
    ),
    measure,
    assess,
    measures=(SHOWN, AREA, ATTRIBUTION, LOGIT_CHANGE, CHANGED_ANSWERS, GLASS_CALLED),
    figures=figures,
    untested=untested,
    measure_slide=measure_slide,
)
