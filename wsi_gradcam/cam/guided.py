"""ReLU with another backward pass, for the method that must fail the audit's sanity check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from wsi_gradcam.errors import LayerError

RELUS = {torch.ops.aten.relu.default: torch.inf, torch.ops.aten.relu6.default: 6.0}


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
    relus = {node: ceiling for node in graph.graph.nodes if (ceiling := _ceiling(node)) is not None}
    if not relus:
        raise LayerError("guided backprop is defined for ReLU, and this model has none; use gradient or smoothgrad")
    for node, ceiling in relus.items():
        node.target, node.args, node.kwargs = guided_relu, (node.args[0], ceiling), {}
    graph.recompile()
    return graph


def _ceiling(node: fx.Node) -> float | None:
    """The largest value of a ReLU; None for other operators. ReLU6 is traced as a hardtanh from 0 on."""
    if node.target is torch.ops.aten.hardtanh.default and node.args[1:2] in ((0,), (0.0,)):
        return float(node.args[2]) if len(node.args) > 2 else 1.0  # type: ignore[arg-type]
    return RELUS.get(node.target)  # type: ignore[call-overload, no-any-return]


def guided_relu(value: Tensor, ceiling: float) -> Tensor:
    """max(x, 0), at most `ceiling`, with the guided backward pass."""
    return GuidedRelu.apply(value, ceiling)  # type: ignore[no-any-return]
