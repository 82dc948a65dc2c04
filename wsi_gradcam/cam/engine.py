"""From images to logits and maps: prediction and explanation in one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.cam.layers import evaluating
from wsi_gradcam.cam.methods import METHODS, PROBING, Probe
from wsi_gradcam.cam.program import EagerProgram
from wsi_gradcam.cam.targets import PREDICTED, Target, classes_of, finer_score, make_score
from wsi_gradcam.cam.trunks import exact
from wsi_gradcam.errors import LayerError, TargetError, is_out_of_memory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.cam.facts import Layer
    from wsi_gradcam.cam.methods import Score
    from wsi_gradcam.cam.program import Pass, Program

T = TypeVar("T")
AnyTarget = Target | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FeatureTargets:
    """Targets of an encoder, different for each patch: the features weighted with coefficients, <c_i, E(x_i)>.

    With the coefficients of a slide-level model, the gradient of this is the gradient of the slide's answer.

    Attributes:
        coefficients: float32 [n, T, D].
    """

    coefficients: NDArray[np.float32]

    def rows(self, start: int, stop: int, send: Callable[[Tensor], Tensor]) -> list[Callable[[Tensor], Tensor]]:
        """Return the scores of the patches from `start` to `stop`; 0 for those that only pad a batch.

        `send` puts coefficients where the features will be, before anything is computed there.
        """
        part = self.coefficients[start:stop]
        filled = send(torch.from_numpy(np.pad(part, ((0, stop - start - len(part)), (0, 0), (0, 0)))))
        return [partial(_weighed, filled[:, t]) for t in range(filled.shape[1])]


def _weighed(coefficients: Tensor, features: Tensor) -> Tensor:
    return (features * coefficients).sum(dim=1)


# Gradients of several targets in one backward pass: 37 ms instead of 71 one by one (16 targets), all in memory at once.
TARGETS_AT_ONCE = 16


@dataclass(frozen=True)
class Explained:
    """The result for a batch.

    Attributes:
        logits: float32 [B, K].
        cams: by method, raw and signed, float32 [B, T, h, w]: on the layer's grid, or on the input's pixels.
    """

    logits: Tensor
    cams: dict[str, Tensor]


@torch.enable_grad()  # even if the caller is under no_grad
def explain_batch(
    program: Program, images: Tensor, targets: Sequence[AnyTarget], methods: Sequence[str] = ("gradcam",)
) -> Explained:
    """Return logits and CAMs of normalised float32 `images` [B, 3, H, W].

    The trunk runs once, whatever the number of targets and methods; logits are explained, not probabilities, whose
    gradient vanishes where the model is certain. float32 is IEEE float32, on a GPU too, see `exact`.

    Raises:
        LayerError: no such layer, or a method that cannot explain this model.
        TargetError: a target that does not depend on the logits.
    """
    with exact(images.device):
        return _explain(program, images, targets, methods)


def _explain(program: Program, images: Tensor, targets: Sequence[AnyTarget], methods: Sequence[str]) -> Explained:
    plain = [m for m in methods if METHOD_INFO[m].asks == "gradient" and m != "finercam"]
    finer = [m for m in methods if m == "finercam"]
    with exact(images.device, tf32=program.tf32):
        done = program.forward(images)
        scores = [make_score(target, done.logits) for target in targets]
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

    Maps whose sum is in logits keep that sum: smaller cells get a share of the value.
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
    """Return what `make` makes for `count` images, halved until memory suffices, and the number of images.

    The number is halved each time that memory runs out.
    """
    while True:
        try:
            return make(count), count
        except Exception as error:
            if count < 2 or not any(e is not None and is_out_of_memory(e) for e in (error, error.__cause__)):
                raise
        count = -(-count // 2)
        free_memory(device)


# Powers of two, so that a span of 256 patches consists of whole batches. With fewer than 16, eager float32 can depend
# on the number of threads (1 x 1 convolutions), and runs would not agree.
MIN_BATCH, MAX_BATCH = 16, 256
MIN_GAIN = 1.05  # doubling the batch must gain at least this much
MEMORY_SHARE = 0.5  # share of the free memory


def find_batch_size(module: nn.Module, layers: tuple[Layer, ...], images: Tensor) -> int:
    """Return a batch size, doubled as long as that increases speed and fits into half of the free memory.

    `images` [B, 3, H, W] are examples of the input. It is found with eager float32, the hungriest program.
    """
    program = EagerProgram(module, layers)
    best, best_rate = MIN_BATCH, 0.0
    size = MIN_BATCH
    while size <= MAX_BATCH and _fits(module, images, size):
        try:
            rate = size / _seconds(program, images[:1].expand(size, *images.shape[1:]).contiguous())
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            break
        if rate < MIN_GAIN * best_rate:
            break
        best, best_rate, size = size, rate, size * 2
    return best


def _fits(module: nn.Module, images: Tensor, size: int) -> bool:
    """Return whether a batch is likely to fit: a few of its largest layers at once, three to be safe."""
    return 3 * size * activation_bytes(module, images[:1]) <= MEMORY_SHARE * _free_bytes(images.device)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _seconds(program: EagerProgram, images: Tensor) -> float:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        explain_batch(program, images, [Target(PREDICTED)])
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a network; the CPU if it has no parameters."""
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


class Lane:
    """Copies of patches to a device, and of results back. On CUDA, neither waits for work in progress on the device.

    Patches are in pinned memory, which torch reuses, and are copied on a stream of their own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an uninitialised array on the host, in pinned memory if the device is CUDA."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._stream is not None).numpy()

    def staged(self, rgb: NDArray[np.uint8], count: int) -> Tensor:
        """Return `count` patches on the host, uint8 [count, H, W, 3]: those given, and zeros; without a copy if it can.

        An array that `empty` made and that contains a whole batch is used as it is.
        """
        whole = len(rgb) == count and rgb.flags.c_contiguous and rgb.flags.writeable
        if whole and (self._stream is None or torch.from_numpy(rgb).is_pinned()):
            return torch.from_numpy(rgb)
        filled = self.empty((count, *rgb.shape[1:]))
        filled[: len(rgb)], filled[len(rgb) :] = rgb, 0
        return torch.from_numpy(filled)

    def send(self, staged: Tensor) -> Tensor:
        """Return the staged data, or part of it, on the device; work that is queued from now on finds it there."""
        if self._stream is None:
            return staged.to(self._device)
        with torch.cuda.stream(self._stream):
            there = staged.to(self._device, non_blocking=True)
        now = torch.cuda.current_stream(self._device)
        now.wait_stream(self._stream)
        there.record_stream(now)
        return there

    def fetch(self, *tensors: Tensor) -> Callable[[], tuple[NDArray[Any], ...]]:
        """Begin to copy results from the device; the returned function waits for them and returns them as arrays."""
        if self._stream is None:
            found = tuple(tensor.cpu().numpy() for tensor in tensors)
            return lambda: found
        here = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        # A waiting thread leaves its core to those that read.
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))

        def waited() -> tuple[NDArray[Any], ...]:
            done.synchronize()
            return tuple(tensor.numpy() for tensor in here)

        return waited


def free_memory(device: torch.device) -> None:
    """Release memory of a device that torch keeps for later tensors."""
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
                "a target does not depend on its logits, or not differentiably; use only torch functions in it"
            )
        sums = torch.stack(singles)
        for found in _gradients_batched(sums, values) or _gradients_in_turn(sums, values):
            yield [_or_zeros(g, v) for g, v in zip(found, values, strict=True)]


def _gradients_batched(sums: Tensor, values: Sequence[Tensor]) -> list[list[Tensor | None]]:
    """Return the gradients of all sums in one backward pass; none if that is not possible or gains nothing."""
    if len(sums) == 1:
        return []
    each = torch.eye(len(sums), device=sums.device, dtype=sums.dtype)
    try:
        found = torch.autograd.grad(sums, values, each, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:  # the backward pass of a network's custom operator may not support several gradients at once
        return []
    return [[None if g is None else g[i] for g in found] for i in range(len(sums))]


def _gradients_in_turn(sums: Tensor, values: Sequence[Tensor]) -> Iterator[Sequence[Tensor | None]]:
    for single in sums:
        yield torch.autograd.grad(single, values, retain_graph=True, allow_unused=True)


def _or_zeros(gradient: Tensor | None, value: Tensor) -> Tensor:
    return torch.zeros_like(value) if gradient is None else gradient


def _finer(target: AnyTarget, logits: Tensor) -> Score:
    if not isinstance(target, Target) or not target.is_class:
        raise TargetError("finercam compares a class with the most similar ones; give a class as the target")
    return finer_score(logits, classes_of(target, logits))


def _probe(program: Program, images: Tensor, done: Pass) -> Probe:
    if len(program.layers) > 1:
        raise LayerError("methods that run the model again can explain only one layer; give one --layer")
    layout, value = program.layers[0].layout, done.values[0].detach()
    return Probe(
        images=images.detach(),
        activation=layout.to_map(value),
        predict=program.predict,
        resume=lambda maps: done.resume(layout.put(value, maps)),
        differentiable=program.differentiable,
        guided=program.guided,
    )
