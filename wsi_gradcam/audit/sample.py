"""Which slides and patches are audited: drawn once, in two steps, so that each patch stands for known others.

First slides, where there are more than the patches suffice for, by site, scanner and label; then patches of each, by
the class that was predicted for them and, with annotations, by whether an annotation's border runs through them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from wsi_gradcam.audit.annotated import annotated_slide
from wsi_gradcam.audit.estimates import stratified_sample
from wsi_gradcam.audit.plan import PIECE, AuditSettings, SlideSample, deep_patches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.inputs.find import SlideEntry
    from wsi_gradcam.results.slide import SlideResult

PARTLY = (0.02, 0.98)  # shares of a patch between which an annotation tells where a map should look
FEWEST = 2  # of each stratum of a slide


@dataclass(frozen=True)
class Candidate:
    """A slide that could be audited: its results, what is told of it, and how many patches it has."""

    slide: SlideResult
    entry: SlideEntry
    patches: int


def draw(candidates: Sequence[Candidate], settings: AuditSettings) -> dict[str, SlideSample]:
    """The sample by slide id, in the order of ids; the same for the same seed."""
    chosen, stands_for = _slides(candidates, settings)
    each = -(-settings.patches // max(1, len(chosen)))
    samples = {}
    for candidate, weight in zip(chosen, stands_for, strict=True):
        found = _patches(candidate, settings, each, weight)
        if found.patches:
            samples[candidate.slide.id] = found
    return deepened(samples, settings)


def _slides(candidates: Sequence[Candidate], settings: AuditSettings) -> tuple[list[Candidate], list[float]]:
    """The slides, and how many each stands for."""
    wanted = max(1, settings.patches // PIECE)
    ordered = sorted(candidates, key=lambda one: one.slide.id)
    if len(ordered) <= wanted:
        return ordered, [1.0] * len(ordered)
    groups = [f"{c.entry.site}|{c.entry.scanner}|{c.entry.label}" for c in ordered]
    if len(set(groups)) > wanted // 2:  # too many kinds to have each
        groups = [""] * len(ordered)
    rows, weights = stratified_sample(groups, wanted, settings.seed)
    return [ordered[row] for row in rows.tolist()], weights.tolist()


def _patches(candidate: Candidate, settings: AuditSettings, count: int, stands_for: float) -> SlideSample:
    slide = candidate.slide
    classes = slide.classes
    table = slide.table(["y", "x", "status", *(f"logit_{name}" for name in classes)])
    readable = np.flatnonzero(table.column("status").to_numpy(zero_copy_only=False) == "ok")
    yx = np.stack([table.column(axis).to_numpy() for axis in ("y", "x")], axis=1)[readable]
    if not len(readable):
        return SlideSample((), (), (), (), 0)
    logits = np.stack([table.column(f"logit_{name}").to_numpy(zero_copy_only=False) for name in classes], axis=1)
    strata = _strata(slide, settings, yx, logits[readable], classes)
    name = slide.id.encode("utf-8", "backslashreplace")  # what no encoding knows seeds too
    drawn = [f"{name.decode()}|{stratum}" for stratum in strata]
    rows, weights = stratified_sample(drawn, count, settings.seed, FEWEST)
    order = np.random.default_rng([settings.seed, *name]).permutation(len(rows))
    rows, weights = rows[order], weights[order]
    return SlideSample(
        tuple(readable[rows].tolist()),
        tuple((y, x) for y, x in yx[rows].tolist()),
        tuple((weights * stands_for).tolist()),
        tuple(strata[row] for row in rows.tolist()),
        0,
    )


def _strata(
    slide: SlideResult,
    settings: AuditSettings,
    yx: NDArray[np.int64],
    logits: NDArray[np.float32],
    classes: Sequence[str],
) -> list[str]:
    predicted = logits.argmax(axis=1) if logits.shape[1] > 1 else (logits[:, 0] > 0).astype(np.int64)
    names = list(classes) if len(classes) > 1 else [f"not {classes[0]}", classes[0]]
    strata = [names[number] for number in predicted.tolist()]
    found = annotated_slide(settings.annotations, slide.id, settings.include, slide.size_px)
    if found is None:
        return strata
    shares = found.shares(yx, slide.plan.view)
    partly = (shares > PARTLY[0]) & (shares < PARTLY[1])
    return [f"{name}, partly annotated" if part else name for name, part in zip(strata, partly.tolist(), strict=True)]


def deepened(samples: Mapping[str, SlideSample], settings: AuditSettings) -> dict[str, SlideSample]:
    """The samples with pieces for what is slow, dealt out to the slides in a random order, one at a time."""
    names = list(samples)
    order = [names[i] for i in np.random.default_rng(settings.seed).permutation(len(names)).tolist()]
    left, given = deep_patches(settings.patches), Counter[str]()
    while left > 0:
        before = left
        for name in order:
            if left > 0 and given[name] < samples[name].pieces:
                part = samples[name].piece(given[name])
                given[name] += 1
                left -= part.stop - part.start
        if left == before:  # all are deep
            break
    return {name: replace(sample, deep=given[name]) for name, sample in samples.items()}
