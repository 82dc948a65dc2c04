"""Any network as a flat graph of operators: eager module, TorchScript or exported program.

The graph can be tapped at every operator (`with_points`) and cut in two (`split`), which neither TorchScript nor
compiled programs allow. It accepts batches of any size if possible (`any_batch`): `x.view(x.size(0), -1)` becomes
`view(x, [2, -1])` when the operators are recorded for two images, and a program exported without a dynamic batch
contains the number with which it was exported.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from wsi_gradcam.errors import ModelError, one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


TOLERANCE = 1e-5  # share of the largest logit; other kernels sum in a different order


def trace(call: Callable[[Tensor], Tensor], images: Tensor, *, read_values: bool = False) -> fx.GraphModule:
    """Return the operators that `call` runs for `images`, as a graph without in-place operations.

    It is traced with two images first, and used if it also works for three: it then accepts batches of any size.
    Otherwise the graph is fixed to the size of `images`, see `fixed_batch`.

    With `read_values`, the call may turn tensors into Python numbers, which the graph then contains: programs from
    `torch.jit.trace` compute sizes in this way. Whether they were sizes must be checked with other images.

    Raises:
        ModelError: the call cannot be traced, or the graph answers differently, for example if random numbers or the
            image content decide what is computed.
    """
    sample = images[:1].expand(2, *images.shape[1:]).contiguous() if len(images) < 2 else images[:2]
    third = torch.cat([sample, sample[:1].flip(3)])
    for batch, checked in ((sample, third), (images, images)):
        graph = _traced(call, batch, read_values)
        if agree(graph, call, checked):
            graph.meta["fixed_batch"] = len(batch) if checked is images else None
            return graph
    raise ModelError(
        "the model cannot be traced operator by operator: its graph gives other outputs than the model; is it random, "
        "or does its control flow depend on the image?"
    )


def fixed_batch(graph: fx.GraphModule) -> int | None:
    """Return the only number of images that the graph accepts; None if it accepts any."""
    size: int | None = graph.meta["fixed_batch"]
    return size


def agree(graph: Callable[[Tensor], Tensor], call: Callable[[Tensor], Tensor], images: Tensor) -> bool:
    """Return whether both give the same for `images`; False also if the graph fails on them."""
    with torch.no_grad():
        expected = call(images)
        try:
            found = graph(images)
        except (RuntimeError, ValueError, AssertionError):
            return False
    scale = float(expected.abs().max()) or 1.0
    return found.shape == expected.shape and float((found - expected).abs().max()) <= TOLERANCE * scale


def with_points(graph: fx.GraphModule) -> fx.GraphModule:
    """Return the graph with each operator's result passed through a submodule with its name, for hooks."""
    for node in [n for n in graph.graph.nodes if n.op == "call_function"]:
        name = _point_name(graph, node)
        graph.add_submodule(name, Pooled() if _pools(node) else Point())
        with graph.graph.inserting_after(node):
            point = graph.graph.call_module(name, (node,))
        node.replace_all_uses_with(point, delete_user_cb=lambda user, point=point: user is not point)
    graph.recompile()
    return graph


class Point(nn.Module):
    """Passes on what an operator returned."""

    def forward(self, value: Any) -> Any:
        """Return the value itself."""
        return value


class Pooled(Point):
    """Passes on what a pooling operator returned."""


def split(graph: fx.GraphModule, cut: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return trunk and head of a graph: `head(*trunk(images)) == graph(images)`.

    The head is everything that depends on `cut`; the trunk returns the cut's value first, then whatever else the head
    needs, for example if a skip bypasses the cut.
    """
    nodes = list(graph.graph.nodes)
    behind = {cut}
    for node in nodes:
        if node.op != "output" and behind.intersection(node.all_input_nodes):
            behind.add(node)
    (result,) = (node.args[0] for node in nodes if node.op == "output")
    if result not in behind:
        raise ModelError(f"the output does not depend on {cut.name}")
    head_nodes = [node for node in nodes if node in behind and node is not cut]
    inputs = [a for node in head_nodes for a in node.all_input_nodes if a not in behind and a.op != "get_attr"]
    crossing = [cut, *dict.fromkeys(inputs)]
    needed = _ancestors(crossing)
    trunk_nodes = [node for node in nodes if node in needed or node.op == "placeholder"]
    trunk = _copy(graph, [], trunk_nodes, tuple(crossing))
    constants = [a for node in head_nodes for a in node.all_input_nodes if a.op == "get_attr"]
    head = _copy(graph, crossing, [*dict.fromkeys(constants), *head_nodes], result)
    return trunk, head


def _traced(call: Callable[[Tensor], Tensor], images: Tensor, read_values: bool) -> fx.GraphModule:
    try:
        # TorchScript's own optimiser would fuse operators into ones that cannot be differentiated here.
        with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            graph = make_fx(lambda batch: call(batch), pre_dispatch=True, _error_on_data_dependent_ops=not read_values)(
                images
            )
    except Exception as error:  # the model's own code may raise anything
        raise ModelError(f"the model cannot be traced operator by operator: {one_line(error)}") from error
    for node in list(graph.graph.nodes):  # a backbone wrapped in no_grad: the head after it must have gradients
        if node.target is torch._C._set_grad_enabled:
            graph.graph.erase_node(node)
    _fold_constants(graph, images.new_empty(0))
    _remove_mutations(graph)
    return graph


def _fold_constants(graph: fx.GraphModule, like: Tensor) -> None:
    """Compute once whatever does not depend on the images, such as attention masks, often filled in place.

    `x.new_zeros(shape)` uses only the type and device of x, which `like` has too.
    """
    values: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        makes_new = node.op == "call_function" and node.name.startswith("new_")
        if node.op == "get_attr":
            values[node] = getattr(graph, node.target)
        elif makes_new or (node.op == "call_function" and all(source in values for source in node.all_input_nodes)):
            arguments, options = fx.map_arg((node.args, node.kwargs), lambda source: values.get(source, like))
            values[node] = node.target(*arguments, **options)
    folded = [node for node in values if node.op != "get_attr" and isinstance(values[node], Tensor)]
    for i, node in enumerate(folded):
        if not all(user in values for user in node.users):
            graph.register_buffer(f"_folded{i}", values[node].detach())
            with graph.graph.inserting_before(node):
                constant = graph.graph.get_attr(f"_folded{i}")
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)
    for node in reversed(list(graph.graph.nodes)):
        if node in values and not node.users:
            graph.graph.erase_node(node)


def _remove_mutations(graph: fx.GraphModule) -> None:
    """Turn `relu_(x)` into `relu(x)`, and let everything that used x afterwards use the result."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    for node in list(order):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        changed = node.args[0]
        assert isinstance(changed, fx.Node)
        node.target = _without_mutation(node.target)
        place = order[node]
        changed.replace_all_uses_with(node, delete_user_cb=partial(_is_behind, order, place))
    graph.recompile()


def _is_behind(order: dict[fx.Node, int], place: int, user: fx.Node) -> bool:
    return order[user] > place


def _without_mutation(operator: torch._ops.OpOverload) -> torch._ops.OpOverload:
    namespace, _, name = operator._schema.name.partition("::")
    try:
        packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"))
        return getattr(packet, operator._overloadname)  # type: ignore[no-any-return]
    except AttributeError as error:
        raise ModelError(
            f"the model changes a tensor in place by {operator}, which has no out-of-place form"
        ) from error


def _point_name(graph: fx.GraphModule, node: fx.Node) -> str:
    """Return the name that users see: `relu__3`, once `relu_`, is `relu_3`, unless there is such a node already."""
    taken = {other.name for other in graph.graph.nodes} | set(graph._modules)
    plain = node.name.replace("__", "_").removesuffix("_")
    return node.name if plain in taken - {node.name} else plain


def _pools(node: fx.Node) -> bool:
    return "pool" in str(node.target) or "upsample" in str(node.target)


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _copy(graph: fx.GraphModule, inputs: list[fx.Node], nodes: list[fx.Node], output: Any) -> fx.GraphModule:
    copy = fx.Graph()
    made = {node: copy.placeholder(node.name) for node in inputs}
    for node in inputs:
        made[node].meta = dict(node.meta)
    for node in nodes:
        made[node] = copy.node_copy(node, lambda source: made[source])
    copy.output(fx.map_arg(output, lambda source: made[source]))
    part = fx.GraphModule(graph, copy)
    part.meta["fixed_batch"] = fixed_batch(graph)
    return part


VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
)
EXPAND = torch.ops.aten.expand.default


def any_batch(call: Callable[[Tensor], Tensor], images: Tensor) -> fx.GraphModule:
    """Return the operators that `call` runs, for batches of any size; `images` are two examples.

    Raises:
        ModelError: the call cannot be traced, or it works only for batches of one size.
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
            f"the model answers for batches of {len(images)} images only, or its control flow depends on the image"
        )
    graph.meta["fixed_batch"] = None
    return graph


def free_batch(graph: fx.GraphModule, images: Tensor) -> None:
    """Replace the number of images in the sizes given to views and expansions of a graph, in place.

    This is a guess from the shapes that occur for `images`, as many as the graph was made for, and for a different
    number of them: the results of the graph must then be checked.
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
        _ViewFreeing(graph, len(images)).run(images[:1].repeat(2 if len(images) == 3 else 3, 1, 1, 1))
    graph.recompile()


class _ViewFreeing(fx.Interpreter):
    """Runs a graph with another number of images than before, and changes the sizes of views on the way.

    For each value, it knows the axis of the images, and how many outer elements it has per image: 1 for [B, ...], 17
    for tokens [17, B, ...] and for those as rows [17 B, ...].
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
    """Return the axis whose length depends on the number of images."""
    return next((i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), None)


def _free_sizes(outer: int, sizes: tuple[int, ...]) -> list[int]:
    """Return the sizes of a view with -1 for the axis of images, which follows `outer` elements.

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
    """Expand again a class token that `trace` has already expanded to `count` equal rows."""
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
    """Return whether an expansion makes a row for each image from a single one, as for a class token."""
    source = _shape(node.args[0])
    return _sizes(node)[0] == count and source[:1] == (1,) and len(source) == len(_sizes(node))


def _sizes(node: fx.Node) -> list[Any]:
    return list(node.args[1])  # type: ignore[arg-type]


def _shape(node: Any) -> tuple[int, ...]:
    found = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(getattr(found, "shape", ()))


def with_few_rows(graph: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that computes no more tokens than its output reads, for the same output; changes `graph`.

    A transformer's head often reads only the class token: in its last block, all tokens are keys and values, but only
    that one needs to be a query and to pass through the projection and the perceptron. The selection of a part of an
    axis is moved ahead of the operators that treat each place along the axis separately. `meta["spared"]` is the number
    of linear layers that have less to do.
    """
    spared = 0
    for node in list(graph.graph.nodes):
        if node.target is aten.dropout.default and not node.args[2]:  # does nothing, but is kept as if it were random
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        if node.target is aten.select.int and isinstance(node.args[2], int) and _ndim(node.args[0]):
            spared += _Rows(graph, node).take()
    graph.graph.eliminate_dead_code()
    graph.recompile()
    graph.meta["spared"] = spared
    return graph


aten = torch.ops.aten
EACH_ALONE = (aten.gelu.default, aten.relu.default, aten.silu.default, aten.clone.default, aten.contiguous.default)
TWO_TENSORS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
RESHAPES = (aten.view.default, aten.reshape.default)


class _Rows:
    """One place along an axis of a value, picked by `select`, computed from as little as possible."""

    def __init__(self, graph: fx.GraphModule, select: fx.Node) -> None:
        self._graph = graph.graph
        self._select = select
        self._made: dict[tuple[fx.Node, int], fx.Node] = {}
        self._spared = 0

    def take(self) -> int:
        """Let the selected place be computed alone if that saves work in linear layers, and return in how many."""
        arguments: Any = self._select.args
        source, axis, index = arguments[:3]
        self._index = index % _shape_of(source)[axis]
        with self._graph.inserting_before(self._select):
            row = self._row(source, axis % _ndim(source))
        if self._spared:
            self._select.args = (row, axis, 0)
        return self._spared

    def _row(self, node: fx.Node, axis: int) -> fx.Node:
        """Return the node that computes `node` only at the place, with an axis of length 1."""
        if (node, axis) not in self._made:
            arguments = self._arguments(node, axis) if node.op == "call_function" else None
            if arguments is None:
                made = self._graph.call_function(aten.slice.Tensor, (node, axis, self._index, self._index + 1))
            else:
                made = self._graph.call_function(node.target, tuple(arguments), node.kwargs)  # type: ignore[arg-type]
                self._spared += node.target is aten.linear.default
            self._made[node, axis] = made
        return self._made[node, axis]

    def _arguments(self, node: fx.Node, axis: int) -> list[Any] | None:
        """Return the arguments that compute `node` only at the place; None if it mixes places."""
        arguments: list[Any] = list(node.args)
        last = _ndim(node) - 1
        source: Any = arguments[0] if arguments else None
        if node.target in TWO_TENSORS:
            return [self._aligned(one, node, axis) for one in arguments[:2]] + arguments[2:]
        if node.target in EACH_ALONE:
            place: int | None = axis
        elif node.target is aten.linear.default:
            place = axis if axis < last else None
        elif node.target is aten.layer_norm.default:
            place = axis if axis <= last - len(arguments[1]) else None
        elif node.target is aten.scaled_dot_product_attention.default:
            plain = not any(arguments[3:6]) and not node.kwargs.get("is_causal") and axis == last - 1
            place = axis if plain and node.kwargs.get("attn_mask") is None else None
        elif node.target is aten.transpose.int:
            swapped = {arguments[1] % (last + 1): arguments[2], arguments[2] % (last + 1): arguments[1]}
            place = swapped.get(axis, axis) % (last + 1)
        elif node.target in RESHAPES:
            place = _same_axis(_shape_of(source), _shape_of(node), axis)
            arguments[1] = [1 if i == axis else size for i, size in enumerate(arguments[1])]
        else:
            place = None
        return None if place is None else [self._row(source, place), *arguments[1:]]

    def _aligned(self, one: Any, node: fx.Node, axis: int) -> Any:
        """Return one of two operands that are broadcast."""
        own = axis - (_ndim(node) - _ndim(one)) if isinstance(one, fx.Node) else -1
        return one if own < 0 or _shape_of(one)[own] == 1 else self._row(one, own)


def _same_axis(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Return the axis of `before` that a view to `after` keeps as its `axis`; None if it does not.

    >>> _same_axis((2, 197, 3, 64), (2, 197, 192), 1), _same_axis((2, 14, 14, 8), (2, 196, 8), 1)
    (1, None)
    """
    for i, size in enumerate(before):
        if size == after[axis] and math.prod(before[:i]) == math.prod(after[:axis]):
            return i
    return None


def _shape_of(node: Any) -> tuple[int, ...]:
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(found.shape) if isinstance(found, Tensor) else ()


def _ndim(node: Any) -> int:
    return len(_shape_of(node))
