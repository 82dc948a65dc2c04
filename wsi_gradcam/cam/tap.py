"""One forward pass that is cheap up to a layer and differentiable behind it.

The trunk runs without a graph; the layer's output becomes a leaf; the head runs with a graph. The gradient of
any scalar of the output with respect to the leaf is the head's alone, also where skips bypass the layer. Of several
layers the one that runs first is the leaf, and what follows it is part of the graph.

ReLUs can get another backward pass: for guided backprop, which must fail the audit, and to see past units that are off.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from wsi_gradcam.errors import LayerError
from wsi_gradcam.models.outputs import named_layers

if TYPE_CHECKING:
    from collections.abc import Iterator


class Tap:
    """The outputs of tapped layers in the last forward pass.

    Attributes:
        values: each layer's output, part of the head's graph, as it was before any later in-place operation.
        replacement: when set, the head gets this instead of the output of the only layer.
    """

    def __init__(self, layers: tuple[str, ...]) -> None:
        self.layers = layers
        self.values: dict[str, Tensor] = {}
        self.replacement: Tensor | None = None

    def forward(self, module: nn.Module, images: Tensor) -> Tensor:
        """Return the module's output for `images` [B, 3, H, W], differentiable with respect to `values`.

        Raises:
            LayerError: a layer does not run, runs twice, or gives no tensor.
        """
        self.values = {}
        with torch.no_grad():  # the hook switches gradients on; leaving this block restores the caller's mode
            output: Tensor = module(images)
        for layer in self.layers:
            if layer not in self.values:
                raise LayerError(f"layer {layer!r} is not used in the forward pass; choose another with --layer")
        return output

    def value(self) -> Tensor:
        """Return the output of the only layer."""
        (value,) = self.values.values()
        return value

    def hook(self, layer: str, output: object) -> Tensor:
        """Return the value that the head gets instead of `output`: the graph begins here."""
        if not isinstance(output, Tensor):
            raise LayerError(f"layer {layer!r} returns a {type(output).__name__}, expected a tensor")
        if layer in self.values:
            raise LayerError(f"layer {layer!r} runs more than once in a pass; choose a module that runs once")
        value = output if self.replacement is None else self.replacement
        if torch.is_inference(value):  # a network that switches inference mode on by itself
            value = value.clone()
        self.values[layer] = value if value.requires_grad else value.detach().requires_grad_(True)
        torch.set_grad_enabled(True)
        # A copy: a later in-place operation (inplace ReLU) would change the leaf, which autograd forbids and
        # which would make the activation's value depend on what follows.
        return self.values[layer].clone()


@contextmanager
def tapped(module: nn.Module, *layers: str) -> Iterator[Tap]:
    """Tap `layers` of `module` in evaluation mode; hooks and modes are restored in any case.

    Raises:
        LayerError: no such layer.
    """
    parts = [find_module(module, layer) for layer in layers]
    tap = Tap(layers)
    handles = []
    with evaluating(module):
        try:
            for layer, part in zip(layers, parts, strict=True):
                handles.append(part.register_forward_hook(_hook(tap, layer)))  # all are removed
            yield tap
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode, and each part back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


def find_module(module: nn.Module, layer: str) -> nn.Module:
    """Return the submodule called `layer`.

    Raises:
        LayerError: no such layer.
    """
    parts = named_layers(module)
    if layer not in parts:
        near = get_close_matches(layer, parts, n=5, cutoff=0.5)
        meant = f"did you mean {', '.join(near)}?" if near else f"it has {_some(parts)}"
        raise LayerError(f"the model has no layer {layer!r}; {meant}; 'wsi-gradcam info --model' lists them")
    return parts[layer]


def _hook(tap: Tap, layer: str) -> Any:
    def hook(module: nn.Module, args: Any, output: object) -> Tensor:
        return tap.hook(layer, output)

    return hook


def _some(modules: dict[str, nn.Module], most: int = 12) -> str:
    names = [name for name in modules if name.count(".") == 0]
    return ", ".join(names[-most:]) or "none"


RELUS = {torch.ops.aten.relu.default: torch.inf, torch.ops.aten.relu6.default: 6.0}
LEAK = 0.1


class GuidedRelu(torch.autograd.Function):
    """max(x, 0), at most `ceiling`, whose backward passes a gradient only where it and x's slope are positive.

    Springenberg 2014, "Striving for simplicity", arXiv 1412.6806, section 3.4.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, ceiling: float) -> Tensor:
        """Return max(x, 0), at most `ceiling`."""
        ctx.save_for_backward((value > 0) & (value < ceiling))
        return value.clamp(min=0, max=ceiling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the positive part of the gradient where x has a slope."""
        (sloped,) = ctx.saved_tensors
        return gradients[0].clamp(min=0) * sloped, None


def guided_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with every ReLU guided; changes `graph`.

    Raises:
        LayerError: there is no ReLU in it.
    """
    if not _rewire(graph, guided_relu):
        raise LayerError("guided backprop is defined for ReLU, and this model has none; use gradient or smoothgrad")
    return graph


class LeakyBackwardRelu(GuidedRelu):
    """max(x, 0), at most `ceiling`, whose backward lets `LEAK` of the gradient pass where x has no slope."""

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient, a part of it where x has no slope."""
        (sloped,) = ctx.saved_tensors
        return torch.where(sloped, gradients[0], LEAK * gradients[0]), None


def leaky_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with the backward of every ReLU leaky; changes `graph`, if it has any."""
    _rewire(graph, leaky_relu)
    return graph


def _rewire(graph: fx.GraphModule, relu: Callable[[Tensor, float], Tensor]) -> int:
    """Call `relu` in place of every ReLU, and return how many there were."""
    relus = {node: ceiling for node in graph.graph.nodes if (ceiling := _ceiling(node)) is not None}
    for node, ceiling in relus.items():
        node.target, node.args, node.kwargs = relu, (node.args[0], ceiling), {}
    graph.recompile()
    return len(relus)


def _ceiling(node: fx.Node) -> float | None:
    """Return the largest value of a ReLU; None for other operators. ReLU6 is traced as a hardtanh from 0 on."""
    if node.target is torch.ops.aten.hardtanh.default and node.args[1:2] in ((0,), (0.0,)):
        return float(node.args[2]) if len(node.args) > 2 else 1.0  # type: ignore[arg-type]
    return RELUS.get(node.target)  # type: ignore[call-overload, no-any-return]


def guided_relu(value: Tensor, ceiling: float) -> Tensor:
    """Return max(x, 0), at most `ceiling`, with the guided backward pass."""
    return GuidedRelu.apply(value, ceiling)  # type: ignore[no-any-return]


def leaky_relu(value: Tensor, ceiling: float) -> Tensor:
    """Return max(x, 0), at most `ceiling`, with the leaky backward pass."""
    return LeakyBackwardRelu.apply(value, ceiling)  # type: ignore[no-any-return]
