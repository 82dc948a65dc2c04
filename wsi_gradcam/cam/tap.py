"""One forward pass that is cheap up to a layer and differentiable behind it.

The trunk runs without a graph; the layer's output becomes a leaf; the head runs with a graph. The gradient of
any scalar of the output with respect to the leaf is the head's alone, also where skips bypass the layer.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wsi_gradcam.errors import LayerError

if TYPE_CHECKING:
    from collections.abc import Iterator


class Tap:
    """What a tapped layer gave in the last forward pass.

    Attributes:
        activation: the layer's output [B, K, h, w] as a leaf that requires grad, before any later in-place
            operation; None before the first pass.
        replacement: when set, the head gets this instead of the layer's output.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.activation: Tensor | None = None
        self.replacement: Tensor | None = None

    def forward(self, module: nn.Module, images: Tensor) -> Tensor:
        """The module's output for `images` [B, 3, H, W], differentiable with respect to `activation`."""
        self.activation = None
        with torch.no_grad():  # the hook switches gradients on; leaving this block restores the caller's mode
            output: Tensor = module(images)
        if self.activation is None:
            raise LayerError(f"layer {self.layer!r} is not used in the forward pass; choose another with --layer")
        return output

    def hook(self, module: nn.Module, args: tuple[Any, ...], output: object) -> Tensor:
        """Forward hook: cut the graph here."""
        if not isinstance(output, Tensor):
            raise LayerError(f"layer {self.layer!r} returns a {type(output).__name__}, expected a tensor")
        if self.activation is not None:
            raise LayerError(f"layer {self.layer!r} runs more than once in a pass; choose a module that runs once")
        value = output if self.replacement is None else self.replacement
        self.activation = value.detach().requires_grad_(True)
        torch.set_grad_enabled(True)
        # A copy: a later in-place operation (inplace ReLU) would change the leaf, which autograd forbids and
        # which would make the activation's value depend on what follows.
        return self.activation.clone()


@contextmanager
def tapped(module: nn.Module, layer: str) -> Iterator[Tap]:
    """Taps `layer` of `module`, put in evaluation mode; hooks and modes are restored whatever happens.

    Raises:
        LayerError: no such layer.
    """
    modules = dict(module.named_modules())
    if layer not in modules or not layer:
        raise LayerError(f"the model has no layer {layer!r}; it has {_some(modules)}")
    tap = Tap(layer)
    modes = [(part, part.training) for part in module.modules()]
    handle = modules[layer].register_forward_hook(tap.hook)
    try:
        module.eval()
        yield tap
    finally:
        handle.remove()
        for part, training in modes:
            part.training = training


def gradients(scalars: Tensor, activation: Tensor) -> Iterator[Tensor]:
    """Gradient of each column of `scalars` [B, T] with respect to `activation`: T tensors [B, K, h, w].

    Images of a batch must not influence each other, which evaluation mode ensures.
    """
    count = scalars.shape[1]
    for target in range(count):
        (gradient,) = torch.autograd.grad(
            scalars[:, target].sum(), activation, retain_graph=target + 1 < count, allow_unused=True
        )
        yield torch.zeros_like(activation) if gradient is None else gradient


def _some(modules: dict[str, nn.Module], most: int = 12) -> str:
    names = [name for name in modules if name and name.count(".") == 0]
    return ", ".join(names[-most:]) or "none"
