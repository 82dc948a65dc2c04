"""Images in, logits and maps out: prediction and explanation in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.cam.layers import evaluating
from wsi_gradcam.cam.methods import METHODS, PROBING, Probe
from wsi_gradcam.cam.targets import Target, classes_of, finer_score, make_score
from wsi_gradcam.cam.trunks import exact
from wsi_gradcam.errors import LayerError, TargetError, is_out_of_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.cam.methods import Score
    from wsi_gradcam.cam.program import Pass, Program

T = TypeVar("T")
AnyTarget = Target | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeatureTargets:
    """Targets of an encoder, other ones for each patch: the features weighed with coefficients, <c_i, E(x_i)>.

    With coefficients that a slide-level model has for a patch, the gradient of that is the gradient of its answer.

    Attributes:
        coefficients: float32 [n, T, D].
    """

    coefficients: NDArray[np.float32]

    def rows(self, start: int, stop: int) -> list[Callable[[Tensor], Tensor]]:
        """Return the scores of the patches from `start` to `stop`; 0 for those that only fill up a batch."""
        part = self.coefficients[start:stop]
        filled = torch.from_numpy(np.pad(part, ((0, stop - start - len(part)), (0, 0), (0, 0))))
        return [partial(_weighed, filled[:, t]) for t in range(filled.shape[1])]


def _weighed(coefficients: Tensor, features: Tensor) -> Tensor:
    return (features * coefficients.to(features.device)).sum(dim=1)


# Gradients of several targets in one backward pass: 37 ms against 71 one by one (16 targets), held in memory at once.
TARGETS_AT_ONCE = 16


@dataclass(frozen=True)
class Explained:
    """A batch's result.

    Attributes:
        logits: float32 [B, K].
        cams: by method, raw and signed float32 [B, T, h, w]: on the layer's grid, or on the input's pixels.
    """

    logits: Tensor
    cams: dict[str, Tensor]


@torch.enable_grad()  # also for a caller under no_grad
def explain_batch(
    program: Program, images: Tensor, targets: Sequence[AnyTarget], methods: Sequence[str] = ("gradcam",)
) -> Explained:
    """Return logits and CAMs of normalised float32 `images` [B, 3, H, W].

    The trunk runs once, whatever the number of targets and methods; logits are explained, not probabilities, whose
    gradient vanishes where the model is sure. float32 is IEEE float32, also on a GPU, see `exact`.

    Raises:
        LayerError: no such layer, or a method that cannot explain this model.
        TargetError: a target that is no function of the logits.
    """
    with exact(images.device):
        return _explain(program, images, targets, methods)


def _explain(program: Program, images: Tensor, targets: Sequence[AnyTarget], methods: Sequence[str]) -> Explained:
    done = program.forward(images)
    scores = [make_score(target, done.logits) for target in targets]
    plain = [m for m in methods if METHOD_INFO[m].asks == "gradient" and m != "finercam"]
    finer = [m for m in methods if m == "finercam"]
    jobs = [(score, plain) for score in scores if plain]
    jobs += [(_finer(target, done.logits), finer) for target in targets if finer]
    maps = _gradient_maps(program, done, jobs)
    perturbing = [m for m in methods if METHOD_INFO[m].asks == "model"]
    if perturbing:
        probe = _probe(program, images, done)
        maps.update({method: [PROBING[method](probe, score) for score in scores] for method in perturbing})
    return Explained(done.logits.detach(), {m: torch.stack(maps[m], dim=1).detach() for m in methods})


def fuse(maps: Sequence[Tensor], scale: str) -> Tensor:
    """Return the mean of several layers' maps, float32 [B, h, w] each, on the finest grid.

    Maps whose sum is in logits keep that: cells that become smaller take their part of the value.
    """
    if len(maps) == 1:
        return maps[0]
    height, width = max((m.shape[1], m.shape[2]) for m in maps)
    total = torch.zeros_like(F.interpolate(maps[0][:, None], (height, width)))
    for m in maps:
        larger = F.interpolate(m[:, None], (height, width), mode="bilinear", align_corners=False)
        total += larger * (m[0].numel() / (height * width) if scale == "cells" else 1.0)
    return total[:, 0] / len(maps)


def pool_to_layer_grid(maps: Tensor, method: str, shape: tuple[int, int]) -> Tensor:
    """Return maps float32 [..., h, w] of a method on the layer's grid of `shape`, as a run stores them.

    Maps of the input's pixels are summed over the cells of that grid (averaged, for methods whose sums mean nothing),
    so that the methods of a run compare cell by cell and no pixels are stored; others are returned as they are.
    """
    info = METHOD_INFO[method]
    if info.grid == "layer":
        return maps
    pooled = F.adaptive_avg_pool2d(maps, shape)
    cell_px = maps.shape[-2] * maps.shape[-1] / (shape[0] * shape[1])
    return pooled * cell_px if info.scale == "cells" else pooled


def largest_that_fits(make: Callable[[int], T], count: int, device: torch.device) -> tuple[T, int]:
    """Return what `make` makes for `count` images, or for half as many as often as memory does not hold them.

    And for how many that was.
    """
    while True:
        try:
            return make(count), count
        except Exception as error:
            if count < 2 or not any(e is not None and is_out_of_memory(e) for e in (error, error.__cause__)):
                raise
        count = -(-count // 2)
        free_memory(device)


def device_of(module: nn.Module) -> torch.device:
    """Return where a network is; the CPU for one without parameters."""
    return next(iter(module.parameters()), torch.empty(0)).device


def activation_bytes(module: nn.Module, image: Tensor) -> int:
    """Return the largest input plus output of any layer for one image [1, 3, H, W], in bytes."""
    largest = 0

    def record(part: nn.Module, args: tuple[Any, ...], output: object) -> None:
        nonlocal largest
        tensors = [t for t in (*args, output) if isinstance(t, Tensor)]
        largest = max(largest, sum(t.numel() * t.element_size() for t in tensors))

    handles = [part.register_forward_hook(record) for part in module.modules() if not list(part.children())]
    try:
        with evaluating(module), torch.no_grad():
            module(image)
    finally:
        for handle in handles:
            handle.remove()
    return largest


def free_memory(device: torch.device) -> None:
    """Return memory of a device that torch keeps for later tensors."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def _gradient_maps(
    program: Program, done: Pass, jobs: Sequence[tuple[Score, Sequence[str]]]
) -> dict[str, list[Tensor]]:
    """Return the maps [B, h, w] of each method, in the order of the jobs: a score and the methods that explain it."""
    maps: dict[str, list[Tensor]] = {}
    layouts = [layer.layout for layer in program.layers]
    activations = [layout.to_map(value.detach()) for layout, value in zip(layouts, done.values, strict=True)]
    found = gradients(done.logits, [score for score, _ in jobs], done.values)
    for gradient, (_, methods) in zip(found, jobs, strict=True):
        spatial = [layout.to_map(g) for layout, g in zip(layouts, gradient, strict=True)]
        for method in methods:
            parts = [METHODS[method](A, g) for A, g in zip(activations, spatial, strict=True)]
            maps.setdefault(method, []).append(fuse(parts, METHOD_INFO[method].scale))
    return maps


def gradients(logits: Tensor, scores: Sequence[Score], values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield, for each score [B] of `logits`, the gradients with respect to each of `values`.

    Images of a batch must not influence each other, which evaluation mode ensures.
    """
    for start in range(0, len(scores), TARGETS_AT_ONCE):
        some = scores[start : start + TARGETS_AT_ONCE]
        singles = [score(logits).sum() for score in some]
        if not all(single.requires_grad for single in singles):
            raise TargetError(
                "a target does not depend on the logits it is given, or hides how: use torch functions alone"
            )
        sums = torch.stack(singles)
        for found in _gradients_batched(sums, values) or _gradients_in_turn(sums, values):
            yield [_or_zeros(g, v) for g, v in zip(found, values, strict=True)]


def _gradients_batched(sums: Tensor, values: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """Return the gradients of all sums in one backward pass; none if that is no gain or not possible."""
    if len(sums) == 1:
        return []
    each = torch.eye(len(sums), device=sums.device, dtype=sums.dtype)
    try:
        found = torch.autograd.grad(sums, values, each, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:  # the backward pass of a network's own operator need not know several gradients at once
        return []
    return [[None if g is None else g[i] for g in found] for i in range(len(sums))]


def _gradients_in_turn(sums: Tensor, values: Sequence[Tensor]) -> Iterator[Sequence[Tensor | None]]:
    for single in sums:
        yield torch.autograd.grad(single, values, retain_graph=True, allow_unused=True)


def _or_zeros(gradient: Tensor | None, value: Tensor) -> Tensor:
    return torch.zeros_like(value) if gradient is None else gradient


def _finer(target: AnyTarget, logits: Tensor) -> Score:
    if not isinstance(target, Target) or not target.is_class:
        raise TargetError("finercam compares a class with those most like it: give a class as the target")
    return finer_score(logits, classes_of(target, logits))


def _probe(program: Program, images: Tensor, done: Pass) -> Probe:
    if len(program.layers) > 1:
        raise LayerError("methods that run the model again explain one layer; give one --layer")
    layout, value = program.layers[0].layout, done.values[0].detach()
    return Probe(
        images=images.detach(),
        activation=layout.to_map(value),
        predict=program.predict,
        resume=lambda maps: done.resume(layout.put(value, maps)),
        differentiable=program.differentiable,
        guided=program.guided,
    )
