"""The layer to explain, and a forward pass that is cheap up to it and differentiable after it.

It is the last activation that is still spatial and that the whole output passes through. The trunk runs without a
graph; the layer's output becomes a leaf; the head runs with a graph. The gradient of any scalar of the output with
respect to the leaf is the head's alone, even if skips bypass the layer. Of several layers, the one that runs first is
the leaf, and everything after it is part of the graph.

ReLUs can get a different backward pass: for guided backprop, which must fail the audit, and to see past inactive units.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from wsi_gradcam.cam.facts import Layout, find_layout
from wsi_gradcam.errors import LayerError, ModelError, one_line
from wsi_gradcam.models.graph import Pooled
from wsi_gradcam.models.outputs import LogitsOf, named_layers

if TYPE_CHECKING:
    from collections.abc import Iterator


TOLERANCE = 1e-5  # share of the largest logit; float32 sums in another order stay well below it
MAX_CANDIDATES = 40
# A patch embedding is a map too: explaining it would say nothing about what a transformer whose tokens are not found
# does with it. It ends at 0.00 to 0.07 of the modules that run (0.33 after a convolutional stem), a LeNet's last map at
# 0.42.
MIN_DEPTH = 0.4

# Pooling and reshaping produce no activations of their own: the one before is finer or the same.
PASSIVE = (
    nn.Identity,
    nn.Flatten,
    nn.Dropout,
    nn.Dropout2d,
    nn.AvgPool2d,
    nn.MaxPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.LPPool2d,
    nn.Upsample,
    Pooled,
)


@dataclass(frozen=True)
class Candidate:
    """A module that ran once and gave a map.

    Attributes:
        layout: the layout of the map in its output.
        passive: whether pooling or reshaping made it.
        depth: how many modules without children had finished by then.
    """

    name: str
    layout: Layout
    passive: bool
    depth: int


def probe_images(patch_px: tuple[int, int]) -> Tensor:
    """Return two fixed noise images, float32 [2, 3, H, W], for tests of a model's structure."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, *patch_px, generator=generator)


def find_layer(module: nn.Module, images: Tensor) -> str:
    """Return the name of the layer to explain.

    Modules are tried from the last that ran to the first. The choice is the first whose output is a map of more than
    one cell with the image's proportions, was not made by pooling, and *dominates* the model's output: with another
    image's output put in its place, the model answers as for that other image, so nothing bypasses it. In a transformer
    whose head reads the class token, that is the input of the last block: after it, no gradient reaches the image's
    tokens.

    Raises:
        LayerError: there is none.
    """
    candidates, leaves = candidate_layers(module, images)
    late = [c for c in candidates if not c.passive and c.depth >= MIN_DEPTH * leaves]
    for candidate in reversed(late[-MAX_CANDIDATES:]):
        if dominates(module, candidate.name, images):
            return candidate.name
    raise LayerError(
        f"no layer in the later part of {_type_of(module)} is a spatial map (channels first or last, or tokens) that "
        "the whole output passes through; give one with --layer, or 'layer:' in the model file"
    )


def candidate_layers(module: nn.Module, images: Tensor) -> tuple[list[Candidate], int]:
    """Return the modules that run once and give a map, as they finish, and the number of runs of leaf modules."""
    calls: dict[str, int] = {}
    found: dict[str, Candidate] = {}
    pooled: set[int] = set()  # storages that a passive module returned; containers return the same one
    grids: set[int] = set()  # storages of maps with two axes: tokens that only view one add nothing
    flat: set[tuple[int, int]] = set()  # shapes of such maps with cells in one axis, which are not tokens
    leaves_done = 0
    kept: list[Tensor] = []  # storages stay alive, so that addresses are not used twice

    def recorder(name: str) -> Callable[[nn.Module, Any, object], None]:
        def record(part: nn.Module, args: Any, output: object) -> None:
            nonlocal leaves_done
            leaves_done += not any(True for _ in part.children())
            calls[name] = calls.get(name, 0) + 1
            layout = find_layout(output, images) if isinstance(output, Tensor) else None
            if layout is None or not isinstance(output, Tensor):
                return
            kept.append(output)
            address = output.data_ptr()
            if isinstance(part, PASSIVE) and not any(isinstance(a, Tensor) and a.data_ptr() == address for a in args):
                pooled.add(address)
            if output.ndim == 4:
                grids.add(address)
                flat.add((layout.channels, layout.height * layout.width))
            elif address in grids or (tuple(output.shape[1:]) in flat and output.shape[1] != output.shape[2]):
                return
            found[name] = Candidate(name, layout, isinstance(part, PASSIVE) or address in pooled, leaves_done)

        return record

    handles = [part.register_forward_hook(recorder(name)) for name, part in named_layers(module).items()]
    try:
        with evaluating(module), torch.no_grad():
            module(images)
    finally:
        for handle in handles:
            handle.remove()
    order = sorted(found.values(), key=lambda c: list(calls).index(c.name))
    return [c for c in order if calls[c.name] == 1], leaves_done


@torch.enable_grad()
def dominates(module: nn.Module, layer: str, images: Tensor) -> bool:
    """Return whether exchanging the layer's outputs for two images exchanges the model's outputs."""
    with tapped(module, layer) as tap:
        try:
            output = tap.forward(module, images).detach()
            layout = find_layout(tap.value(), images)
            tap.replacement = tap.value().detach().flip(0)
            exchanged = tap.forward(module, images)
            # An output that is constant on noise would pass any exchange: it must also react to the map.
            (gradient,) = torch.autograd.grad(exchanged.sum(), tap.value())
        except (LayerError, RuntimeError):
            return False
    reacts = layout is not None and bool(layout.to_map(gradient).any())
    return reacts and _same(exchanged.detach(), output.flip(0))


@torch.enable_grad()
def check_layer(module: nn.Module, layer: str, images: Tensor) -> Layout:
    """Return the layout of a layer's map, after the self-test: head(trunk(x)) equals model(x), with a gradient.

    Raises:
        LayerError: no such layer, not a map, or one that the output does not depend on.
        ModelError: the tapped model's output differs from the plain one's.
    """
    with evaluating(module), torch.no_grad():
        plain = module(images)
    with tapped(module, layer) as tap:
        output = tap.forward(module, images)
        activation = tap.value()
        layout = find_layout(activation, images)
        if layout is None:
            raise LayerError(
                f"layer {layer!r} has output of shape {tuple(activation.shape)} for {len(images)} images, expected a "
                "map with the image's proportions (channels first or last, or tokens); choose another with --layer"
            )
        if not _depends(output, activation, layout, layer):
            raise LayerError(
                f"the model's output does not depend on the map of layer {layer!r}; choose another with --layer"
            )
    output = output.detach()
    if not _same(output, plain):
        raise ModelError(
            f"reading layer {layer!r} changes the model's output by {float((output - plain).abs().max()):.2g}; the "
            "model is not the same function on every call"
        )
    return layout


def _depends(output: Tensor, activation: Tensor, layout: Layout, layer: str) -> bool:
    if not output.requires_grad:
        return False
    try:
        (gradient,) = torch.autograd.grad(output.sum(), activation, allow_unused=True)
    except RuntimeError as error:  # the model overwrites in place something that a backward pass needs
        raise LayerError(f"the model cannot be differentiated after layer {layer!r}: {one_line(error)}") from error
    # After a transformer's last attention, only the class token is read: the map's gradient is zero throughout.
    return gradient is not None and (layout.axes != "bnk" or bool(layout.to_map(gradient).any()))


def _same(a: Tensor, b: Tensor) -> bool:
    scale = float(b.abs().max()) or 1.0
    return bool(torch.isfinite(a).all()) and float((a - b).abs().max()) <= TOLERANCE * scale


def _type_of(module: nn.Module) -> str:
    return type(module.network if isinstance(module, LogitsOf) else module).__name__


class Tap:
    """A tap: the outputs of the tapped layers in the last forward pass.

    Attributes:
        values: each layer's output, part of the head's graph, as it was before any later in-place operation.
        replacement: if set, the head gets this instead of the output of the only layer.
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
            raise LayerError(f"layer {layer!r} runs more than once per forward pass; choose a module that runs once")
        value = output if self.replacement is None else self.replacement
        if torch.is_inference(value):  # a network that switches inference mode on by itself
            value = value.clone()
        self.values[layer] = value if value.requires_grad else value.detach().requires_grad_(True)
        torch.set_grad_enabled(True)
        # A copy: a later in-place operation (an in-place ReLU) would change the leaf, which autograd forbids, and which
        # would make the activation's value depend on what follows.
        return self.values[layer].clone()


@contextmanager
def tapped(module: nn.Module, *layers: str) -> Iterator[Tap]:
    """Tap `layers` of `module` in evaluation mode; hooks are removed and modes restored in any case.

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
