"""A model prepared for being explained at a layer: whole, with hooks, or cut into a trunk and a head."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from wsi_gradcam.cam.layers import evaluating, find_module, guided_graph, tapped
from wsi_gradcam.errors import EngineError, LayerError
from wsi_gradcam.models.graph import any_batch, fixed_batch, split, trace, with_few_rows

if TYPE_CHECKING:
    from torch import fx

    from wsi_gradcam.cam.facts import Layer
    from wsi_gradcam.cam.trunks import Trunk

# Marks the layer's output in a traced graph: an operator of its own, which nothing can mistake or optimise away.
_LIBRARY = torch.library.Library("wsi_gradcam", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("cut(Tensor value) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("cut", lambda value: value.clone(), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Pass:
    """A forward pass, ready for gradients.

    Attributes:
        logits: float32 [B, K], with a graph back to `values`.
        values: each layer's output, float32.
        resume: output of the only layer -> logits [B, K], without a graph.
    """

    logits: Tensor
    values: tuple[Tensor, ...]
    resume: Callable[[Tensor], Tensor]


class Program(Protocol):
    """A model as the engine needs it.

    Attributes:
        layers: the layers that are explained.
        tf32: whether its head and the gradient may be computed in TF32, because the trunk is less exact than float32.
    """

    layers: tuple[Layer, ...]
    tf32: bool

    def forward(self, images: Tensor) -> Pass:
        """Return the pass for normalised float32 images [B, 3, H, W]."""

    def predict(self, images: Tensor) -> Tensor:
        """Return logits [B, K] without a graph, the fast way."""

    def differentiable(self, images: Tensor) -> Tensor:
        """Return logits [B, K] with a graph back to `images`, in float32."""

    def guided(self, images: Tensor) -> Tensor:
        """Return logits as `differentiable` does, but ReLU's backward also clips negative gradients."""


class EagerProgram:
    """The network as it is, tapped by hooks: for any network and any number of layers, in float32."""

    tf32 = False

    def __init__(self, module: nn.Module, layers: tuple[Layer, ...]) -> None:
        for layer in layers:
            find_module(module, layer.name)
        self.module = module
        self.layers = layers
        self._guided: fx.GraphModule | None = None

    def forward(self, images: Tensor) -> Pass:
        """See `Program`."""
        with tapped(self.module, *(layer.name for layer in self.layers)) as tap:
            logits = tap.forward(self.module, images)
            values = tuple(tap.values[layer.name] for layer in self.layers)
        return Pass(logits, values, lambda value: self._resume(images, value))

    def predict(self, images: Tensor) -> Tensor:
        """See `Program`."""
        with evaluating(self.module), torch.no_grad():
            return self.module(images)  # type: ignore[no-any-return]

    @torch.enable_grad()
    def differentiable(self, images: Tensor) -> Tensor:
        """See `Program`."""
        with evaluating(self.module):
            return self.module(images)  # type: ignore[no-any-return]

    @torch.enable_grad()
    def guided(self, images: Tensor) -> Tensor:
        """See `Program`.

        Raises:
            LayerError: the network has no ReLU.
        """
        if self._guided is None:
            with evaluating(self.module):
                self._guided = guided_graph(trace_operators(self.module, images.detach()))
        return self._guided(images)  # type: ignore[no-any-return]

    def _resume(self, images: Tensor, value: Tensor) -> Tensor:
        (layer,) = self.layers
        with tapped(self.module, layer.name) as tap:
            tap.replacement = value
            return tap.forward(self.module, images).detach()


class SplitProgram(EagerProgram):
    """The network cut in two: the trunk on any engine, the head in float32 with exact gradients, or in TF32.

    If the cut network accepts only one batch size, others are explained by the network as it is.
    """

    def __init__(self, module: nn.Module, layer: Layer, trunk: Trunk, head: fx.GraphModule, tf32: bool = False) -> None:
        super().__init__(module, (layer,))
        self.tf32 = tf32
        self._trunk = trunk
        self._head = head
        self._size = fixed_batch(head)

    def forward(self, images: Tensor) -> Pass:
        """See `Program`."""
        if self._size not in (None, len(images)):
            return super().forward(images)
        with torch.no_grad():
            value, *others = self._trunk(images)
        value = value.detach().requires_grad_(True)  # its own tensor: if a skip passes the same one, that is not a leaf
        with torch.enable_grad():
            logits = self._head(value, *others)

        def resume(new: Tensor) -> Tensor:
            with torch.no_grad():
                return self._head(new, *others)  # type: ignore[no-any-return]

        return Pass(logits, (value,), resume)

    def predict(self, images: Tensor) -> Tensor:
        """See `Program`."""
        if self._size not in (None, len(images)):
            return super().predict(images)
        with torch.no_grad():
            return self._head(*self._trunk(images))  # type: ignore[no-any-return]


def cut_at(module: nn.Module, layer: str, images: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a network at a layer's output into trunk and head: `head(*trunk(images)) == module(images)`.

    The head computes only the tokens that its output depends on, see `with_few_rows`.

    Raises:
        EngineError: the network cannot be cut, with the reason.
    """

    def mark(part: nn.Module, args: object, output: Tensor) -> Tensor:
        return torch.ops.wsi_gradcam.cut(output)  # type: ignore[no-any-return]

    handle = find_module(module, layer).register_forward_hook(mark)
    try:
        with evaluating(module):
            graph = trace_operators(module, images)
    except (ValueError, LayerError) as error:  # ModelError is a ValueError
        raise EngineError(f"the model cannot be split at layer {layer!r}: {error}") from error
    finally:
        handle.remove()
    marks = [node for node in graph.graph.nodes if node.target is torch.ops.wsi_gradcam.cut.default]
    if len(marks) != 1:
        raise EngineError(f"the model cannot be split at layer {layer!r}: it runs {len(marks)} times")
    (cut,) = marks
    source = cut.args[0]
    trunk, head = split(graph, cut)
    # The trunk ends in the marked value itself: other engines do not know the marker.
    _unmark(trunk)
    assert source is not None
    return trunk, with_few_rows(head)


def trace_operators(module: nn.Module, images: Tensor) -> fx.GraphModule:
    """Trace the network's operators, if possible for batches of any size; its weights take no gradients.

    Raises:
        ModelError: it cannot be traced.
    """
    graph = trace(module, images)
    if fixed_batch(graph) is not None:
        with suppress(Exception):  # freeing the batch size is a guess, which may fail in any way
            graph = any_batch(module, images[:2])
    for name, parameter in list(graph.named_parameters(recurse=False)):  # they are the network's own
        delattr(graph, name)
        graph.register_buffer(name, parameter.detach())
    return graph


def _unmark(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.wsi_gradcam.cut.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
