"""What is measured of maps: do they follow the model, what it has learned, and the patch?

Each function gives numbers by name for the patches of a piece, see `wsi_gradcam.audit.measured`.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from wsi_gradcam.audit.measured import (
    BACKGROUND,
    BLUR,
    CURVE_FRACTIONS,
    EXPENSIVE,
    GUIDED,
    MAIN,
    ORDERS,
    REPEATS,
    ROAD,
    ROAD_FRACTIONS,
    SMOOTH,
    STRONG_NOISE,
)
from wsi_gradcam.audit.measures.controls import RANDOM
from wsi_gradcam.audit.measures.faithfulness import Curves, removal_curves
from wsi_gradcam.audit.measures.removal import Replace, blurred, mean_colour, replace_by, replace_by_neighbours
from wsi_gradcam.audit.measures.sanity import DRAWS, Order, random_answers, randomisation, staying_maps
from wsi_gradcam.audit.measures.stability import CHANGES, as_strong_noise, moves, shift_change
from wsi_gradcam.audit.patch_data import SHIFT
from wsi_gradcam.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from wsi_gradcam.audit.asked import Asked
    from wsi_gradcam.audit.folder import Numbers


def faithfulness(asked: Asked) -> Numbers:
    """Curves of deletion and insertion, of every map with the first baseline; with the others, where deep."""
    images, subject = asked.images, asked.subject
    every = asked.maps | asked.controls
    found = _curves(asked, every, MAIN, replace_by(images, mean_colour(images)), CURVE_FRACTIONS)
    if not asked.deep:
        return found
    some = asked.maps | {RANDOM: asked.controls[RANDOM]}
    glass = subject.colour(asked.data.background)
    model = subject.model
    grain = images.new_tensor(model.std)[:, None, None].reciprocal() * (0.01 * model.transform.scale)
    others: dict[str, tuple[Replace, tuple[float, ...]]] = {
        BLUR: (replace_by(images, blurred(images)), CURVE_FRACTIONS),
        BACKGROUND: (replace_by(images, glass), CURVE_FRACTIONS),
        ROAD: (replace_by_neighbours(images, grain, asked.seed), ROAD_FRACTIONS),
    }
    for name, (replace, fractions) in others.items():
        found |= _curves(asked, some, name, replace, fractions)
    return found


def _curves(
    asked: Asked, maps: dict[str, Tensor], baseline: str, replace: Replace, fractions: tuple[float, ...]
) -> Numbers:
    curves = removal_curves(asked.subject, asked.images, asked.aim, maps, replace, torch.tensor(fractions), asked.seed)
    return {
        f"faithfulness/{baseline}/{name}/{kind}": values
        for name, curve in curves.items()
        for kind, values in _parts(curve).items()
    }


def _parts(curve: Curves) -> Numbers:
    parts = {
        "deletion": curve.deletion,
        "insertion": curve.insertion,
        "deletion_probability": curve.deletion_probability,
        "insertion_probability": curve.insertion_probability,
    }
    return {name: values.numpy() for name, values in parts.items() if values is not None}


def sanity(asked: Asked) -> Numbers:
    """Likeness to maps of models whose weights were made random, stage by stage and altogether; nothing if not deep.

    The answers of random copies stand beside, to tell whether the model has learned anything; and guided
    backpropagation, which must fail, where the model has it.
    """
    if not asked.deep:
        return {}
    others = random_answers(asked.subject, asked.images, seed=asked.seed)
    found: Numbers = {"sanity/answers": others.transpose(0, 1).float().cpu().numpy()}
    for method in asked.audit.run.settings.method:
        dear = method in EXPENSIVE
        for order in () if dear else ORDERS:
            found |= _randomised(asked, method, order)  # type: ignore[arg-type]
        found |= _draws(asked, method, DRAWS // 2 if dear else DRAWS)
        if not dear:
            found |= _smooth(asked, method)
    if GUIDED not in asked.audit.run.settings.method:
        with suppress(ModelError):  # no ReLU, several layers: what could not be tested is told by its absence
            found |= _draws(asked, GUIDED, DRAWS // 2)
    return found


def _randomised(asked: Asked, method: str, order: Order) -> Numbers:
    stages = randomisation(asked.subject, asked.images, asked.aim, method, order, seed=asked.seed)
    start = f"sanity/{method}/{order}"
    found = {
        f"{start}/{name}": np.stack([stage.likeness[name] for stage in stages], axis=1) for name in stages[0].likeness
    }
    for name in ("resembles", "constant", "complexity"):
        found[f"{start}/{name}"] = np.stack([getattr(stage, name) for stage in stages], axis=1).astype(np.float64)
    return found


def _draws(asked: Asked, method: str, draws: int) -> Numbers:
    stays = staying_maps(asked.subject, asked.images, asked.aim, method, draws, asked.seed)
    return {f"sanity/{method}/draws": stays.T}


def _smooth(asked: Asked, method: str) -> Numbers:
    """All weights random, maps averaged over noisy copies of the patch."""
    (stage,) = randomisation(
        asked.subject, asked.images, asked.aim, method, "independent", 1, samples=SMOOTH, seed=asked.seed
    )
    return {f"sanity/{method}/smooth/spearman": stage.likeness["spearman"]}


def stability(asked: Asked) -> Numbers:
    """How far answers and maps move with noise, stain, JPEG, and the grid of patches."""
    found: Numbers = {}
    cheap = [method for method in asked.audit.run.settings.method if method not in EXPENSIVE]
    asking = cheap or ["gradcam"]  # answers move whatever the method
    moving = partial(moves, asked.subject, asked.data.rgb, asked.aim, repeats=REPEATS, seeds=asked.data.seeds)
    for name, change in CHANGES.items():
        for method in asking:
            moved = moving(change, method)
            if method in cheap:
                found[f"stability/{name}/{method}/map_change"] = moved.map_change
                found[f"stability/{name}/{method}/other_patch"] = _others(moved.other_patch, asked.data.count)
            found[f"stability/{name}/logit_change"] = moved.logit_change
            found[f"stability/{name}/flips"] = moved.flips
        if name != "noise":
            control = moving(as_strong_noise(change), asking[0])
            found[f"stability/{STRONG_NOISE} {name}/logit_change"] = control.logit_change
            found[f"stability/{STRONG_NOISE} {name}/flips"] = control.flips
    offset = (asked.audit.run.patch_px[0] // SHIFT, asked.audit.run.patch_px[1] // SHIFT)
    target_of = partial(asked.subject.aim, target=asked.audit.target)
    if (wide := asked.data.wide) is None:
        return found
    for shown in cheap:
        found[f"stability/shift/{shown}/map_change"] = shift_change(asked.subject, wide, target_of, offset, shown)
    return found


def _others(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Changes to the map of another patch; where there is one patch alone, the others are its copies."""
    return values if count > 1 else np.full_like(values, np.nan)
