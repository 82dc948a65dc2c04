"""Graphs that serve batches of any size, where a network wrote the size of a batch into them.

`x.view(x.size(0), -1)` becomes `view(x, [2, -1])` when the operators are recorded for two images, and a program
exported without a dynamic batch holds the number it was exported with.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import ShapeProp

from wsi_gradcam.errors import ModelError, one_line
from wsi_gradcam.models.graph import agree, fixed_batch, trace

if TYPE_CHECKING:
    from collections.abc import Callable

VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
)
EXPAND = torch.ops.aten.expand.default


def any_batch(call: Callable[[Tensor], Tensor], images: Tensor) -> fx.GraphModule:
    """The operators that `call` runs, for batches of any size; `images` are two examples.

    Raises:
        ModelError: the call cannot be followed, or it answers for batches of one size only.
    """
    try:
        graph = trace(call, images)
    except ModelError:
        graph = trace(call, images, read_values=True)
    more = torch.cat([images, images[:1].flip(3), 10 * images[:1], torch.zeros_like(images[:1])])
    try:
        if fixed_batch(graph) is not None:
            free_batch(graph, images)
        same = agree(graph, call, more)
    except Exception as error:  # a wrong guess may fail in any way
        raise ModelError(
            f"the model answers for batches of {len(images)} images only: {one_line(error)[:200]}"
        ) from error
    if not same:
        raise ModelError(
            f"the model answers for batches of {len(images)} images only, or chooses its path by what a picture shows"
        )
    graph.meta["fixed_batch"] = None
    return graph


def free_batch(graph: fx.GraphModule, images: Tensor) -> None:
    """Replace the number of images in the sizes that views and expansions of a graph are given, in place.

    A guess from the shapes that come up for `images`, of which there are as many as the graph was made for, and for
    another number of them: what the graph then gives must be checked.
    """
    with torch.no_grad():
        ShapeProp(graph).propagate(images)
        (batch,) = (node for node in graph.graph.nodes if node.op == "placeholder")
        for node in list(graph.graph.nodes):
            if node.op == "get_attr" and str(node.target).startswith("_folded"):
                _free_constant(graph, node, batch, len(images))
            elif node.target is EXPAND and _grows(node, len(images)):
                _free_expansion(graph, node, batch)
        graph.recompile()
        _ViewFreeing(graph, len(images)).run(images[:1].expand(2 if len(images) == 3 else 3, -1, -1, -1))
    graph.recompile()


class _ViewFreeing(fx.Interpreter):
    """Runs a graph with another number of images than before, and changes the sizes of views on the way.

    Of each value it knows the axis that holds the images, and how many elements of what lies outside of them a step
    from image to image skips: 1 for [B, ...], 17 for tokens [17, B, ...] and for those as rows [17 B, ...].
    """

    def __init__(self, graph: fx.GraphModule, count: int) -> None:
        super().__init__(graph)
        self._count = count
        self._outer: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target in VIEWS and n.args[0] in self._outer:
            outer = self._outer[n.args[0]]  # type: ignore[index]
            n.args = (n.args[0], _free_sizes(outer, _shape(n)))
            self._outer[n] = outer
            return super().run_node(n)
        value = super().run_node(n)
        if isinstance(value, Tensor) and (axis := _moved(_shape(n), tuple(value.shape))) is not None:
            before = _shape(n)
            same = [
                self._outer[s]
                for s in n.all_input_nodes
                if s in self._outer and _shape(s)[: axis + 1] == before[: axis + 1]
            ]
            pure = before[axis] == self._count
            self._outer[n] = math.prod(before[:axis]) if pure or not same else same[0]
        return value


def _moved(before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """The axis whose length depends on the number of images."""
    return next((i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), None)


def _free_sizes(outer: int, sizes: tuple[int, ...]) -> list[int]:
    """The sizes of a view with -1 for the axis that holds the images, `outer` elements of the axes before them.

    >>> _free_sizes(17, (17, 4, 8)), _free_sizes(17, (34, 16)), _free_sizes(1, (2, 900))
    ([17, -1, 8], [-1, 16], [-1, 900])
    """
    before = [math.prod(sizes[:i]) for i in range(len(sizes))]
    axis = next((i for i, n in enumerate(before) if n == outer or n < outer < n * sizes[i]), 0)
    return [-1 if i == axis else size for i, size in enumerate(sizes)]


def _free_expansion(graph: fx.GraphModule, node: fx.Node, batch: fx.Node) -> None:
    with graph.graph.inserting_before(node):
        size: Any = graph.graph.call_function(torch.ops.aten.sym_size.int, (batch, 0))
        node.args = (node.args[0], [size, *_sizes(node)[1:]])


def _free_constant(graph: fx.GraphModule, node: fx.Node, batch: fx.Node, count: int) -> None:
    """A class token that `graph.trace` has already expanded to `count` equal rows."""
    value: Tensor = getattr(graph, str(node.target))
    if count < 2 or value.ndim < 2 or len(value) != count or not torch.equal(value, value[:1].expand_as(value)):
        return
    setattr(graph, str(node.target), value[:1].clone())
    with graph.graph.inserting_after(node):
        size: Any = graph.graph.call_function(torch.ops.aten.sym_size.int, (batch, 0))
    with graph.graph.inserting_after(size):
        rows = graph.graph.call_function(EXPAND, (node, [size, *[-1] * (value.ndim - 1)]))
    node.replace_all_uses_with(rows, delete_user_cb=lambda user: user is not rows)


def _grows(node: fx.Node, count: int) -> bool:
    """Whether an expansion makes a row an image out of one, as of a class token."""
    source = _shape(node.args[0])
    return _sizes(node)[0] == count and source[:1] == (1,) and len(source) == len(_sizes(node))


def _sizes(node: fx.Node) -> list[Any]:
    return list(node.args[1])  # type: ignore[arg-type]


def _shape(node: Any) -> tuple[int, ...]:
    found = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(getattr(found, "shape", ()))
