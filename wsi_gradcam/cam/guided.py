"""ReLU with another backward pass: for the method that must fail the audit, and to see past units that are off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from wsi_gradcam.errors import LayerError

RELUS = {torch.ops.aten.relu.default: torch.inf, torch.ops.aten.relu6.default: 6.0}
LEAK = 0.1


class GuidedRelu(torch.autograd.Function):
    """max(x, 0), at most `ceiling`, whose backward passes a gradient only where it and x's slope are positive.

    Springenberg 2014, "Striving for simplicity", arXiv 1412.6806, section 3.4.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, ceiling: float) -> Tensor:
        """max(x, 0), at most `ceiling`."""
        ctx.save_for_backward((value > 0) & (value < ceiling))
        return value.clamp(min=0, max=ceiling)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The positive part of the gradient where x has a slope."""
        (sloped,) = ctx.saved_tensors
        return gradients[0].clamp(min=0) * sloped, None


def guided_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with every ReLU guided; changes `graph`.

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
        """The gradient, a part of it where x has no slope."""
        (sloped,) = ctx.saved_tensors
        return torch.where(sloped, gradients[0], LEAK * gradients[0]), None


def leaky_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with the backward of every ReLU leaky; changes `graph`, if it has any."""
    _rewire(graph, leaky_relu)
    return graph


def _rewire(graph: fx.GraphModule, relu: Callable[[Tensor, float], Tensor]) -> int:
    """Calls `relu` in place of every ReLU, and tells how many there were."""
    relus = {node: ceiling for node in graph.graph.nodes if (ceiling := _ceiling(node)) is not None}
    for node, ceiling in relus.items():
        node.target, node.args, node.kwargs = relu, (node.args[0], ceiling), {}
    graph.recompile()
    return len(relus)


def _ceiling(node: fx.Node) -> float | None:
    """The largest value of a ReLU; None for other operators. ReLU6 is traced as a hardtanh from 0 on."""
    if node.target is torch.ops.aten.hardtanh.default and node.args[1:2] in ((0,), (0.0,)):
        return float(node.args[2]) if len(node.args) > 2 else 1.0  # type: ignore[arg-type]
    return RELUS.get(node.target)  # type: ignore[call-overload, no-any-return]


def guided_relu(value: Tensor, ceiling: float) -> Tensor:
    """max(x, 0), at most `ceiling`, with the guided backward pass."""
    return GuidedRelu.apply(value, ceiling)  # type: ignore[no-any-return]


def leaky_relu(value: Tensor, ceiling: float) -> Tensor:
    """max(x, 0), at most `ceiling`, with the leaky backward pass."""
    return LeakyBackwardRelu.apply(value, ceiling)  # type: ignore[no-any-return]
