"""Limits of gradients: finite steps, and places where the model, or a unit, cannot go further.

A gradient tells of an infinitely small step. Two models may agree in value and gradient on every patch, so that all
their maps are equal, and part at the next step: one stays on a plateau, the other falls off a cliff. No gradient shows
that; a finite step does.

A probability near 0 or 1 hardly changes, so its gradient is nearly 0 although the evidence is strongest there; that of
the logit is not. A ReLU that is off passes nothing, also where a little more would switch it on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_gradcam.audit.measures.removal import Replace, answers_without
from wsi_gradcam.audit.measures.subject import Aim, Subject, enlarge
from wsi_gradcam.cam.engine import gradients
from wsi_gradcam.cam.layers import leaky_graph
from wsi_gradcam.cam.methods import Score
from wsi_gradcam.cam.program import SplitProgram, cut_at
from wsi_gradcam.cam.targets import Target, classes_of
from wsi_gradcam.cam.trunks import make_trunk
from wsi_gradcam.errors import LayerError, TargetError

Numbers = NDArray[np.float64]
STEPS = (-1.0, -0.5, -0.25, -0.1, -0.05, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, eq=False)
class FiniteSteps:
    """Steps along (positive) and against the map: promised by the gradient and actual changes, for P patches.

    Attributes:
        steps: [S] ascending, without 0; -1 is the highest place of the map replaced altogether.
        promised: [P, S] change of the explained scalar, step times slope.
        actual: [P, S].
    """

    steps: Numbers
    promised: Numbers
    actual: Numbers

    @property
    def worth(self) -> Numbers:
        """(moved - missed) / (moved + missed), [P], of the side (along, against) where it is lower.

        moved is the sum over the side's steps of actual², missed that of (actual - promised)². 1: the promise is kept;
        0: it is worth as much as promising no change; -1: nothing moves. NaN where nothing was promised either.
        """
        return np.fmin(*(self._worth(side) for side in (self.steps > 0, self.steps < 0)))

    def _worth(self, side: NDArray[np.bool_]) -> Numbers:
        missed, moved = ((values[:, side] ** 2).sum(axis=1) for values in (self.departure, self.actual))
        total = moved + missed
        kept: Numbers = np.divide(moved - missed, total, out=np.full(len(total), np.nan), where=total > 0)
        return kept

    @property
    def departure(self) -> Numbers:
        """[P, S] actual less promised, in logits: below 0 on the far side of a cliff."""
        return self.actual - self.promised

    @property
    def reach(self) -> Numbers:
        """[P] the largest step, either way, up to which all steps come nearer to the promise than to no change."""
        found = np.zeros(len(self.actual))
        kept = np.abs(self.departure) < np.abs(self.actual)
        for size in np.unique(np.abs(self.steps)):
            inside = np.abs(self.steps) <= size
            found = np.where(kept[:, inside].all(axis=1), size, found)
        return found


def finite_steps(
    subject: Subject, images: Tensor, aim: Aim, maps: Tensor, others: Tensor, steps: Sequence[float] = STEPS
) -> FiniteSteps:
    """Return steps of images [P, 3, H, W] along and against maps [P, h, w].

    x(t) = x + t m ⊙ (x - x'), where m is the positive part of the enlarged map over its largest value, and x' is
    `others`, what is there when nothing is: a blurred patch, a colour. So t = -1 takes away what the map shows, and
    t = 1 shows it twice as strongly. The promise is t <ds/dx, m ⊙ (x - x')>, from one backward pass of the network.
    """
    weight = enlarge(maps.float(), (images.shape[2], images.shape[3])).clamp(min=0)[:, None]
    largest = weight.amax(dim=(2, 3), keepdim=True)
    way = weight / torch.where(largest > 0, largest, 1.0) * (images - others)
    slope = (input_gradient(subject, images, aim) * way).sum(dim=(1, 2, 3)).cpu().double().numpy()
    answers = torch.stack([subject.answers(images + step * way) for step in steps], dim=1)
    actual = aim.logit(answers) - aim.logit(aim.logits)[:, None]
    sizes = np.array(steps, np.float64)
    return FiniteSteps(sizes, slope[:, None] * sizes, actual.cpu().double().numpy())


@torch.enable_grad()
def input_gradient(subject: Subject, images: Tensor, aim: Aim) -> Tensor:
    """Return ds/dx [P, 3, H, W] of the explained scalar, in float32."""
    found: list[Tensor] = []
    for start in range(0, len(images), subject.batch_size):
        rows = slice(start, start + subject.batch_size)
        leaf = images[rows].detach().clone().requires_grad_(True)
        score = aim.score(rows)(subject.program.differentiable(leaf)).sum()
        found += torch.autograd.grad(score, leaf)
    return torch.cat(found)


def infidelity(promised: Numbers, actual: Numbers, normalise: bool = False) -> Numbers:
    """Return mean over R perturbations of (promised - actual)² [P], both changes [P, R] (Yeh 2019, arXiv 1901.09392).

    `promised` is the sum of the map over what is perturbed, times how much; `actual` is the score before less after.
    Normalised, the map may first be multiplied by the factor that serves it best: for maps that are in no unit.
    """
    scale = np.ones((len(promised), 1))
    if normalise:
        size = (promised**2).sum(axis=1, keepdims=True)
        product = (promised * actual).sum(axis=1, keepdims=True)
        scale = np.divide(product, size, out=np.zeros_like(size), where=size > 0)
    missed: Numbers = ((scale * promised - actual) ** 2).mean(axis=1)
    return missed


def hiding_changes(
    subject: Subject, images: Tensor, aim: Aim, maps: Tensor, masks: Tensor, replace: Replace
) -> tuple[Numbers, Numbers]:
    """Return (promised, actual) changes [P, R] of hiding each of `masks` bool [R, H, W], for `infidelity`.

    A map of cells promises what lies on the mask of it, each cell in the part that is covered.
    """
    cells = torch.stack([enlarge(mask[None].float(), (maps.shape[1], maps.shape[2]))[0] for mask in masks])
    promised = torch.einsum("phw,rhw->pr", maps.cpu().double(), cells.cpu().double())
    everywhere = [mask.expand(len(images), -1, -1) for mask in masks]
    answers = torch.stack([answers_without(subject, replace, mask) for mask in everywhere], dim=1)
    actual = aim.logit(aim.logits)[:, None] - aim.logit(answers)
    return promised.numpy(), actual.cpu().double().numpy()


def completeness_gap(maps: Tensor, whole: Tensor, baseline: Tensor) -> Numbers:
    """Return sum of maps [P, h, w] less (score of the patch less that of the baseline), [P], in logits; 0 is complete.

    Integrated Gradients are, but for the rule of their integral (Sundararajan 2017, arXiv 1703.01365); Grad-CAM is with
    global average pooling and a linear layer, against the bias.
    """
    gap: Numbers = (maps.cpu().double().sum(dim=(1, 2)) - (whole - baseline).cpu().double()).numpy()
    return gap


# dp/ds = p (1 - p) is then below 1 % of its largest value, 1/4.
SATURATED = 0.0025


@dataclass(frozen=True, eq=False)
class Saturation:
    """Saturation of the model on P patches.

    Attributes:
        saturated: [P] 1 where the class's probability is within `SATURATED` of 0 or 1, else 0.
        gradient_ratio: [P] size of the probability's gradient at the layer over the logit's; NaN where that is 0.
        silent: [P] 1 where the logit's own gradient is 0 everywhere: no gradient method can show anything.
        dead: bool [K] channels of the layer that are 0 on all cells of all P patches.
        dead_share: [P] share of the channels that are 0 on all cells of the patch.
    """

    saturated: NDArray[np.float64]
    gradient_ratio: NDArray[np.float64]
    silent: NDArray[np.float64]
    dead: NDArray[np.bool_]
    dead_share: NDArray[np.float64]


def saturation(subject: Subject, images: Tensor, aim: Aim) -> Saturation:
    """Return the model's saturation on images [P, 3, H, W]; the target must be a class.

    Dead channels mean something behind a ReLU only: another activation is 0 nowhere.

    Raises:
        TargetError: the target is no class, which alone has a probability.
    """
    probability = aim.probability(aim.logits)
    if probability is None:
        raise TargetError("saturation is of a class's probability, and the target is no class; give a class")
    layout = subject.program.layers[0].layout
    sizes, off = [], []
    for start in range(0, len(images), subject.batch_size):
        rows = slice(start, start + subject.batch_size)
        with torch.enable_grad():
            done = subject.program.forward(images[rows])
            found = gradients(done.logits, [aim.score(rows), _share(aim, rows)], done.values[:1])
            sizes.append(torch.stack([g[0].detach().flatten(1).norm(dim=1) for g in found], dim=1))
        off.append((layout.to_map(done.values[0].detach()) == 0).flatten(2).all(dim=2))
    of_logit, of_probability = torch.cat(sizes).cpu().double().numpy().T
    dead: NDArray[np.bool_] = torch.cat(off).cpu().numpy()
    always: NDArray[np.bool_] = np.logical_and.reduce(dead, axis=0)
    near = np.minimum(probability.cpu().numpy(), 1 - probability.cpu().numpy())
    return Saturation(
        (near < SATURATED).astype(np.float64),
        np.divide(of_probability, of_logit, out=np.full(len(of_logit), np.nan), where=of_logit > 0),
        (of_logit == 0).astype(np.float64),
        always,
        dead.mean(axis=1),
    )


def leaky_maps(subject: Subject, images: Tensor, aim: Aim, method: str = "gradcam") -> Tensor:
    """Return the maps [P, h, w] with a backward that leaks through the ReLUs behind the layer: what they hide.

    They are the plain maps where no ReLU follows. Predictions are unchanged.

    Raises:
        LayerError: several layers are explained together.
        EngineError: the network cannot be cut at the layer.
    """
    if len(subject.program.layers) > 1:
        raise LayerError("the leaky map is of one layer; give one --layer")
    (layer,) = subject.program.layers
    batch = images[: subject.batch_size]
    trunk, head = cut_at(subject.program.module, layer.name, batch)
    eager = make_trunk(trunk, "eager", "float32", batch)
    program = SplitProgram(subject.program.module, layer, eager, leaky_graph(head))
    return replace(subject, program=program).maps(images, aim, method)


def _share(aim: Aim, rows: slice) -> Score:
    """Return the class's probability as a function of logits, with a graph."""
    assert isinstance(aim.target, Target)
    classes = classes_of(aim.target, aim.logits[rows])[:, None]

    def share(logits: Tensor) -> Tensor:
        if aim.activation == "softmax":
            logits = logits.softmax(dim=1)
        elif aim.activation == "sigmoid":
            logits = logits.sigmoid()
        return logits.gather(1, classes)[:, 0]

    return share
