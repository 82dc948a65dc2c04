"""Which layer to explain: the last activation that is still spatial and that the whole output passes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wsi_gradcam.cam.tap import tapped
from wsi_gradcam.errors import LayerError, ModelError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

TOLERANCE = 1e-5  # of the largest logit; float32 sums in another order stay well below
MOST_TRIED = 40
# A transformer's last map is its patch embedding: explaining that would say nothing of what the model does with it.
# It ends at 0.00 to 0.07 of the modules that run (0.33 behind a convolutional stem), a LeNet's last map at 0.42.
EARLY = 0.4

# Pooling and reshaping give no activations of their own: the one before is finer or the same.
PASSIVE = (
    nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.LPPool2d, nn.Upsample,
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A module that ran once and gave a map.

    Attributes:
        shape: [channels, h, w] of the map.
        passive: whether pooling or reshaping made it.
        depth: how many modules without children had finished by then.
    """

    name: str
    shape: tuple[int, int, int]
    passive: bool
    depth: int


def probe_images(patch_px: tuple[int, int]) -> Tensor:
    """Two fixed pictures of noise, float32 [2, 3, H, W], for tests of a model's structure."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *patch_px, generator=generator)


def find_layer(module: nn.Module, images: Tensor) -> str:
    """Name of the layer to explain.

    Modules are tried from the last that ran to the first. Taken is the first whose output is a map of more than
    one cell with the picture's proportions, was not made by pooling, and *dominates* the model's output: with
    another picture's map put in its place, the model answers as for that other picture, so nothing bypasses it.

    Raises:
        LayerError: there is none.
    """
    candidates, leaves = candidate_layers(module, images)
    late = [c for c in candidates if not c.passive and c.depth >= EARLY * leaves]
    for candidate in reversed(late[-MOST_TRIED:]):
        if dominates(module, candidate.name, images):
            return candidate.name
    raise LayerError(
        f"no layer in the later part of {type(module).__name__} is a spatial map (batch, channels, h, w) that the "
        "whole output passes through; name one with --layer, or 'layer:' in the model file"
    )


def candidate_layers(module: nn.Module, images: Tensor) -> tuple[list[Candidate], int]:
    """Modules that run once and return a map [B, K, h, w], in the order in which they finish; and how many
    runs of modules without children a pass has.
    """
    calls: dict[str, int] = {}
    found: dict[str, Candidate] = {}
    pooled: set[int] = set()  # storages that a passive module returned; containers return the same one
    leaves_done = 0
    kept: list[Tensor] = []  # storages stay alive, so that addresses are not used twice

    def recorder(name: str) -> Callable[[nn.Module, Any, object], None]:
        def record(part: nn.Module, args: Any, output: object) -> None:
            nonlocal leaves_done
            leaves_done += not any(True for _ in part.children())
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, Tensor) and _is_map(output, images):
                kept.append(output)
                unchanged = any(isinstance(a, Tensor) and a.data_ptr() == output.data_ptr() for a in args)
                if isinstance(part, PASSIVE) and not unchanged:
                    pooled.add(output.data_ptr())
                _, channels, height, width = output.shape
                passive = isinstance(part, PASSIVE) or output.data_ptr() in pooled
                found[name] = Candidate(name, (channels, height, width), passive, leaves_done)

        return record

    handles = [part.register_forward_hook(recorder(name)) for name, part in module.named_modules() if name]
    try:
        with torch.no_grad():
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    order = sorted(found.values(), key=lambda c: list(calls).index(c.name))
    return [c for c in order if calls[c.name] == 1], leaves_done


@torch.enable_grad()
def dominates(module: nn.Module, layer: str, images: Tensor) -> bool:
    """Whether the output for one picture becomes the other's when the layer's maps are exchanged."""
    with tapped(module, layer) as tap:
        try:
            output = tap.forward(module, images).detach()
            assert tap.activation is not None  # Tap.forward raises otherwise
            tap.replacement = tap.activation.detach().flip(0)
            exchanged = tap.forward(module, images)
            # An output that is constant on noise would pass any exchange: it must also react to the layer.
            (gradient,) = torch.autograd.grad(exchanged.sum(), tap.activation)
        except (LayerError, RuntimeError):
            return False
    return _same(exchanged.detach(), output.flip(0)) and bool(gradient.any())


@torch.enable_grad()
def check_layer(module: nn.Module, layer: str, images: Tensor) -> tuple[int, int, int]:
    """[channels, h, w] of the layer, after the self-test: head(trunk(x)) equals model(x), with a gradient.

    Raises:
        LayerError: no such layer, not a map, or one that the output does not depend on.
        ModelError: the tapped model gives another output than the plain one.
    """
    with torch.no_grad():
        plain = module(images)
    with tapped(module, layer) as tap:
        output = tap.forward(module, images)
        activation = tap.activation
        assert activation is not None  # Tap.forward raises otherwise
        if not _is_map(activation, images):
            raise LayerError(
                f"layer {layer!r} has output of shape {tuple(activation.shape)} for {len(images)} pictures, expected "
                "a map (batch, channels, h, w) of the picture's proportions; choose another with --layer"
            )
        if not _depends(output, activation, layer):
            raise LayerError(f"the model's output does not depend on layer {layer!r}; choose another with --layer")
    output = output.detach()
    if not _same(output, plain):
        raise ModelError(
            f"tapping layer {layer!r} changes the model's output by {float((output - plain).abs().max()):.2g}; "
            "the model is not the same function on every call"
        )
    _, channels, height, width = activation.shape
    return channels, height, width


def _depends(output: Tensor, activation: Tensor, layer: str) -> bool:
    if not output.requires_grad:
        return False
    try:
        (gradient,) = torch.autograd.grad(output.sum(), activation, allow_unused=True)
    except RuntimeError as error:  # the model overwrites in place what a backward pass needs
        raise LayerError(f"the model cannot be differentiated behind layer {layer!r}: {one_line(error)}") from error
    return gradient is not None


def _is_map(output: Tensor, images: Tensor) -> bool:
    if output.ndim != 4 or len(output) != len(images) or output.shape[2] * output.shape[3] < 2:
        return False
    # [B, h, w, K] tensors of Swin-like models also have four axes: a map has the picture's proportions.
    proportion = images.shape[2] / images.shape[3]
    return abs(output.shape[2] - output.shape[3] * proportion) <= max(1.0, proportion)


def _same(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().max()) or 1.0
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= TOLERANCE * scale
