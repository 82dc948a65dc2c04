"""What is measured of the model round its maps: how far they carry, where they are blind, what the answer hangs on.

Each function gives numbers by name for the patches of a piece, see `wsi_gradcam.audit.measured`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from wsi_gradcam.audit.asked import explained_classes, on_grid
from wsi_gradcam.audit.measured import EXPENSIVE, HIDDEN_MASKS, INTEGRATED, MASKED, STEPS
from wsi_gradcam.audit.measures.likeness import spearman
from wsi_gradcam.audit.measures.locality import completeness_gap, finite_steps, hiding_changes, infidelity
from wsi_gradcam.audit.measures.plausibility import PLAUSIBILITY, chance
from wsi_gradcam.audit.measures.removal import blurred, mean_colour, replace_by
from wsi_gradcam.audit.measures.saturation import leaky_maps, saturation
from wsi_gradcam.audit.measures.shortcuts import cover, glass_patches, masking, mass_on
from wsi_gradcam.audit.measures.suspects import GIVEN, suspects
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.errors import ModelError

if TYPE_CHECKING:
    from wsi_gradcam.audit.asked import Asked
    from wsi_gradcam.audit.folder import Numbers


def locality(asked: Asked) -> Numbers:
    """Finite steps, infidelity and completeness; nothing where not deep."""
    if not asked.deep:
        return {}
    images, subject, aim = asked.images, asked.subject, asked.aim
    others = blurred(images)
    masks = hidden_squares(images.shape[2:], HIDDEN_MASKS, asked.seed)
    empty = aim.logit(subject.answers(torch.zeros_like(images)))
    whole = aim.logit(aim.logits)
    found: Numbers = {}
    for name, map_ in asked.maps.items():
        steps = finite_steps(subject, images, aim, map_, others, STEPS)
        for part in ("promised", "actual", "worth", "reach"):
            found[f"locality/{name}/{part}"] = getattr(steps, part)
        changes = hiding_changes(subject, images, aim, map_, masks.to(images.device), replace_by(images, others))
        found[f"locality/{name}/infidelity"] = infidelity(*changes, normalise=True)
        found[f"locality/{name}/moved"] = (changes[1] ** 2).mean(axis=1)
    if len(subject.program.layers) == 1:  # the reference, in logits and complete by definition
        reference = subject.maps(images, aim, INTEGRATED)
        gap = completeness_gap(reference, whole, empty)
        found[f"locality/{INTEGRATED}/completeness_gap"] = gap
        found[f"locality/{INTEGRATED}/score_change"] = (whole - empty).double().cpu().numpy()
        pooled = on_grid(reference, INTEGRATED, asked.grid).float().cpu().numpy()
        for name, map_ in asked.maps.items():
            found[f"locality/{name}/like_integrated_gradients"] = spearman(map_.float().cpu().numpy(), pooled)
    return found


def hidden_squares(size: torch.Size | tuple[int, ...], count: int, seed: int) -> torch.Tensor:
    """Squares of a quarter of a patch's side at random places, bool [count, H, W]."""
    height, width = size
    random = np.random.default_rng(seed)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        y, x = random.integers(0, height - height // 4 + 1), random.integers(0, width - width // 4 + 1)
        mask[y : y + height // 4, x : x + width // 4] = True
    return masks


def saturated(asked: Asked) -> Numbers:
    """Where the gradient is blind, and what a backward pass that leaks through ReLUs would show."""
    if explained_classes(asked.aim) is None:
        return {}
    numbers = saturation(asked.subject, asked.images, asked.aim)
    names = ("saturated", "gradient_ratio", "silent", "dead_share")
    found: Numbers = {f"saturation/{name}": getattr(numbers, name) for name in names}
    if not asked.deep:
        return found
    for name, map_ in asked.maps.items():
        if METHOD_INFO[name].grid == "layer" and name not in EXPENSIVE:
            try:
                leaky = leaky_maps(asked.subject, asked.images, asked.aim, name)
            except ModelError:  # several layers, a network that cannot be cut: told by its absence
                break
            found[f"leaky/{name}"] = leaky.float().cpu().numpy()
            found[f"saturation/{name}/like_leaky"] = spearman(map_.float().cpu().numpy(), found[f"leaky/{name}"])
    return found


def shortcuts(asked: Asked) -> Numbers:
    """Attribution on suspects, and what hiding them does, against equal areas elsewhere."""
    images = asked.images
    replace = replace_by(images, mean_colour(images))
    found: Numbers = {}
    data = asked.data
    given = {f"{name.replace('/', '-')}{GIVEN}": masks for name, masks in data.regions.items()}
    for suspect, masks in (suspects(data.raw, asked.audit.run.mpp, data.background) | given).items():
        share = masks.mean(axis=(1, 2))
        found[f"shortcuts/{suspect}/share"] = share
        shown = asked.input_masks(masks)
        some = (share > MASKED[0]) & (share < MASKED[1])
        usable = shown & some[:, None, None]
        if usable.any():
            hiding = masking(asked.subject, images, asked.aim, usable, replace, seed=asked.seed)
            for part in ("change", "size", "control_size", "flips", "control_flips"):
                found[f"shortcuts/{suspect}/{part}"] = getattr(hiding, part)
        for name, map_ in asked.maps.items():
            mass, area = mass_on(map_.float().cpu().numpy(), shown)
            found[f"shortcuts/{suspect}/{name}/mass"] = np.where(share > 0, mass, np.nan)
            found[f"shortcuts/{suspect}/area"] = np.where(share > 0, area, np.nan)
    return found


def glass(asked: Asked) -> Numbers:
    """What the model calls bare glass of the slide: the share of some patches of it by class, [1, K]."""
    rgb = glass_patches(asked.data.background, asked.audit.run.patch_px, len(asked.images), asked.seed)
    logits = asked.subject.answers(asked.subject.images(rgb)).float().cpu().numpy()
    if logits.shape[1] == 1:
        return {"slide/glass_called": (logits > 0).mean(axis=0, keepdims=True)}
    called = np.bincount(logits.argmax(axis=1), minlength=logits.shape[1]) / len(logits)
    return {"slide/glass_called": called[None]}


def plausibility(asked: Asked) -> Numbers:
    """Whether maps, and controls, look where the annotation says."""
    if asked.data.annotated is None:
        return {}
    shown = asked.input_masks(asked.data.annotated)
    cells = cover(shown, asked.grid)
    masks = cells >= 0.5
    found: Numbers = {"plausibility/share": cells.mean(axis=(1, 2)), "plausibility/chance": chance(masks)}
    for name, map_ in (asked.maps | asked.controls).items():
        values = np.ascontiguousarray(map_.float().cpu().numpy())
        for kind, measure in PLAUSIBILITY.items():
            found[f"plausibility/{name}/{kind}"] = measure(values, masks)
    return found
