"""Saturation: where is a gradient blind because the model, or a unit, cannot go further?

A probability near 0 or 1 hardly changes, so its gradient is nearly 0 although the evidence is strongest there; that of
the logit is not. A ReLU that is off passes nothing, also where a little more would switch it on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wsi_gradcam.audit.measures.subject import Aim, Subject
from wsi_gradcam.cam.engine import gradients
from wsi_gradcam.cam.methods import Score
from wsi_gradcam.cam.program import SplitProgram, cut_at
from wsi_gradcam.cam.tap import leaky_graph
from wsi_gradcam.cam.targets import Target, classes_of
from wsi_gradcam.cam.trunks import make_trunk
from wsi_gradcam.errors import LayerError, TargetError

# dp/ds = p (1 - p) is then below 1 % of its largest value, 1/4.
SATURATED = 0.0025


@dataclass(frozen=True, eq=False)
class Saturation:
    """How saturated the model is on P patches.

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
    """How saturated the model is on images [P, 3, H, W]; the target must be a class.

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
    of_logit, of_probability = torch.cat(sizes).double().cpu().numpy().T
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
    """The maps [P, h, w] with a backward that leaks through the ReLUs behind the layer: what they hide.

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
    """The class's probability as a function of logits, with a graph."""
    assert isinstance(aim.target, Target)
    classes = classes_of(aim.target, aim.logits[rows])[:, None]

    def share(logits: Tensor) -> Tensor:
        if aim.activation == "softmax":
            logits = logits.softmax(dim=1)
        elif aim.activation == "sigmoid":
            logits = logits.sigmoid()
        return logits.gather(1, classes)[:, 0]

    return share
