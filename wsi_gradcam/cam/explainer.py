"""The model in a process: `examine` chooses layer, batch size and engine, and `Explainer` explains patches."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from wsi_gradcam.cam.auto import (
    Fidelity,
    choice_key,
    choose,
    likeness,
    make_program,
    read_choice,
    reuse_choice,
    store_choice,
)
from wsi_gradcam.cam.engine import (
    AnyTarget,
    FeatureTargets,
    Lane,
    activation_bytes,
    device_of,
    explain_batch,
    find_batch_size,
    free_memory,
    gradients,
    largest_that_fits,
    pool_to_layer_grid,
)
from wsi_gradcam.cam.facts import AUTO, METHOD_INFO, Choice, Layer, ModelFacts
from wsi_gradcam.cam.layers import candidate_layers, check_layer, evaluating, find_layer, probe_images
from wsi_gradcam.cam.program import Program, trace_operators
from wsi_gradcam.cam.targets import PREDICTED, Target
from wsi_gradcam.cam.trunks import exact
from wsi_gradcam.errors import LayerError, ModelError, WsiGradcamError, is_out_of_memory, one_line
from wsi_gradcam.models.graph import with_points
from wsi_gradcam.models.load import load_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.models.load import Model
    from wsi_gradcam.models.spec import ModelSpec


CANCELLING = 1e-4  # share of the terms of a sum; rounding leaves 1e-6
MAX_CHOICE_PATCHES = 64  # patches whose maps are compared
FEW = 2  # patches that are timed if a batch would take long


@dataclass(frozen=True)
class Request:
    """The requirements of a run on a model.

    Attributes:
        layer: one name, or several joined by "+"; None: the model file's, else detected.
        methods: all must be able to explain the model.
        engine, precision: `auto` or a name.
        batch_size: `auto` or a number.
        choice: the earlier choice if a run is continued.
    """

    layer: str | None = None
    methods: tuple[str, ...] = ("gradcam",)
    engine: str = "eager"
    precision: str = "float32"
    batch_size: int | str = 32
    choice: Choice | None = None

    @property
    def needs_patches(self) -> bool:
        """True if the choice of the engine needs patches of the run."""
        return self.choice is None and AUTO in (self.engine, self.precision)


@dataclass(frozen=True)
class Examined:
    """A model ready for a run.

    Attributes:
        facts: for planning.
        program: the program that explains it.
        at_once: the most images that fit into memory, up to a batch.
    """

    facts: ModelFacts
    program: Program
    at_once: int


def examine(model: Model, request: Request = Request(), patches: Tensor | None = None) -> Examined:
    """Return the facts of `model` and its program, tested on `patches`, uint8 [B, H, W, 3], or else on noise.

    Raises:
        LayerError: no layer can be tapped, or a method cannot explain it.
        ModelError: the output is not finite, or the tap changes it.
        EngineError: the requested engine or precision is not available.
    """
    with exact(device_of(model.module)):
        return _examine(model, request, patches)


def _examine(model: Model, request: Request, patches: Tensor | None) -> Examined:
    device = device_of(model.module)
    noise = probe_images(model.input_px).to(device)
    _check_finite(model, noise)
    module, layers, traced = locate_layers(model.module, request.layer or model.layer, noise)
    images = noise if patches is None or len(patches) < 2 else model.prepare(patches.to(device))
    batch_size = request.batch_size
    if isinstance(batch_size, str):
        batch_size = find_batch_size(module, layers, noise)
    images = _repeated(images, batch_size * max(1, min(MAX_CHOICE_PATCHES, len(images)) // batch_size))
    key = [model.digest, [layer.name for layer in layers], batch_size, request.engine, request.precision]

    def chosen(count: int) -> tuple[Choice, Program]:
        if request.choice is not None:
            engine, precision = request.choice.engine, request.choice.precision
            found = request.choice, make_program(module, layers, engine, precision, images[:count])
        elif AUTO in (request.engine, request.precision):
            found = _chosen(choice_key(device, *key), module, layers, request, images, count)
        else:
            found = choose(module, layers, request.engine, request.precision, images, count)
        check_methods(model.name, found[1], request.methods, _repeated(noise, count))
        return found

    (choice, program), at_once = largest_that_fits(chosen, batch_size, device)
    shapes = [(layer.layout.height, layer.layout.width) for layer in layers]
    facts = ModelFacts(
        name=model.name,
        source=model.source,
        digest=model.digest,
        license=model.license,
        classes=model.classes,
        activation=model.activation,
        patch_px=model.patch_px,
        view=model.view,
        mpp=model.mpp,
        mean=model.mean,
        std=model.std,
        layers=layers,
        traced=traced,
        cam_shape=max(shapes),
        parameters=sum(p.numel() for p in model.module.parameters()),
        activation_bytes=activation_bytes(model.module, noise[:1]),
        batch_size=batch_size,
        choice=choice,
        stain=model.stain,
        notes=model.notes,
    )
    return Examined(facts, program, at_once)


def _chosen(
    key: str, module: nn.Module, layers: tuple[Layer, ...], request: Request, images: Tensor, batch_size: int
) -> tuple[Choice, Program]:
    """Return the choice that this machine made earlier, or make it now."""
    before = read_choice(key)
    program = None if before is None else reuse_choice(before, module, layers, images, batch_size)
    if before is not None and program is not None:
        return before, program
    choice, program = choose(module, layers, request.engine, request.precision, images, batch_size)
    store_choice(key, choice)
    return choice, program


def prepare_program(model: Model, facts: ModelFacts, batch_size: int | None = None) -> Program:
    """Return the program that `examine` chose, rebuilt in another process, for other batch sizes if necessary.

    Raises:
        EngineError: this machine cannot run it.
    """
    noise = probe_images(model.input_px).to(device_of(model.module))
    module = traced_module(model.module, noise) if facts.traced else model.module
    images = _repeated(noise, batch_size or facts.batch_size)
    return make_program(module, facts.layers, facts.choice.engine, facts.choice.precision, images)


def explainable_layers(model: Model, facts: ModelFacts) -> list[Layer]:
    """Return the layers whose output contains a map, in the order in which they run; not all are self-tested."""
    noise = probe_images(model.input_px).to(device_of(model.module))
    module = traced_module(model.module, noise) if facts.traced else model.module
    return [Layer(candidate.name, candidate.layout) for candidate in candidate_layers(module, noise)[0]]


def traced_module(module: nn.Module, images: Tensor) -> nn.Module:
    """Return the network as a graph whose operators are layers: for networks without modules to hook."""
    with evaluating(module):
        return with_points(trace_operators(module, images))


def locate_layers(module: nn.Module, wanted: str | None, images: Tensor) -> tuple[nn.Module, tuple[Layer, ...], bool]:
    """Return the module to tap, its layers to explain, and whether it is the network's traced graph.

    `wanted` is one name, several joined by "+", or None for the layer to be found. If the network itself has no such
    layer, its operators are tried, for networks that call functions instead of modules.

    Raises:
        LayerError: there is no such layer.
    """
    try:
        return module, _layers(module, wanted, images), False
    except LayerError:
        try:
            graph = traced_module(module, images)
        except ModelError:
            graph = None
        with suppress(LayerError):
            if graph is not None:
                return graph, _layers(graph, wanted, images), True
        raise


def _layers(module: nn.Module, wanted: str | None, images: Tensor) -> tuple[Layer, ...]:
    names = [find_layer(module, images)] if wanted is None else [name.strip() for name in wanted.split("+")]
    if len(set(names)) != len(names):
        raise LayerError(f"layer {wanted!r} names a layer twice")
    return tuple(Layer(name, check_layer(module, name, images)) for name in names)


def _check_finite(model: Model, images: Tensor) -> None:
    with evaluating(model.module), torch.no_grad():
        output = model.module(images)
    if not torch.isfinite(output).all():
        raise ModelError(f"{model.name}: gives NaN or infinite values on noise images; check its weights")


def check_methods(name: str, program: Program, methods: Sequence[str], images: Tensor) -> None:
    """Check now, rather than after hours, that every method works with the model called `name`.

    Those that run the model hundreds of times work with any model at one layer; guided backprop does not.

    Raises:
        LayerError: a method does not work with it.
    """
    perturbing = [method for method in methods if METHOD_INFO[method].asks == "model"]
    if perturbing and len(program.layers) > 1:
        raise LayerError(f"{name}: {', '.join(perturbing)} can explain one layer only; give one --layer")
    for method in [m for m in methods if METHOD_INFO[m].asks == "gradient" or m == "guided_backprop"]:
        cams = explain_batch(program, images, [Target(PREDICTED)], [method]).cams[method]
        if not torch.isfinite(cams).all():
            raise LayerError(f"{name}: {method} gives NaN or infinite values on noise images")
    if "cam" in methods:
        _check_linear(name, program, images)
    if "hirescam" in methods:
        _check_not_cancelling(name, program, images)


def _check_linear(name: str, program: Program, images: Tensor) -> None:
    """Check that the gradient is the same for every image, like CAM's weights of a linear layer."""
    done = program.forward(images)
    ((gradient,),) = gradients(done.logits, [lambda logits: logits[:, 0]], done.values)
    size = float(gradient.abs().max())
    if not torch.allclose(gradient[:1].expand_as(gradient), gradient, rtol=0, atol=1e-4 * size):
        raise LayerError(
            f"{name}: cam is defined only for global average pooling followed by one linear layer, but here the "
            "gradient depends on the image; use gradcam"
        )


def _check_not_cancelling(name: str, program: Program, images: Tensor) -> None:
    """Check that HiResCAM's sum over channels, g A, does not cancel.

    It is 0 in every cell if a normalisation of each cell on its own follows: a factor common to all channels then
    changes nothing. In a transformer, this is the case before the last attention.
    """
    done = program.forward(images)
    (found,) = gradients(done.logits, [lambda logits: logits.amax(dim=1)], done.values)
    for layer, value, gradient in zip(program.layers, done.values, found, strict=True):
        terms = layer.layout.to_map(value.detach() * gradient)
        largest = float(terms.abs().sum(dim=1).max())
        if largest > 0 and float(terms.sum(dim=1).abs().max()) <= CANCELLING * largest:
            raise LayerError(
                f"{name}: hirescam is 0 at layer {layer.name!r} (up to rounding) because a normalisation follows; use "
                "gradcam, or give that normalisation as the layer (such as blocks.11.norm1)"
            )


def _repeated(images: Tensor, count: int) -> Tensor:
    """Return `count` of the images, repeated as often as needed."""
    return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]


LOG = logging.getLogger("wsi_gradcam")
Targets = Sequence[Target] | FeatureTargets
Found = tuple["NDArray[np.float32]", "NDArray[np.float32]"]
IN_FLIGHT = 2  # batches of a span that a GPU has been given besides the one whose results are being stored


class Explainer:
    """A loaded model with the program that explains it.

    Attributes:
        at_once: the most patches in a forward pass: `facts.batch_size`, or fewer once memory did not hold that many.
    """

    def __init__(self, model: Model, facts: ModelFacts, program: Program, at_once: int | None = None) -> None:
        self.facts = facts
        self.model = model
        self.at_once = at_once or facts.batch_size
        self._program = program
        self._lock = threading.Lock()  # a tap is a hook on the module: one pass at a time
        self._device = device_of(model.module)
        self._lane = Lane(self._device)

    @classmethod
    def examine(cls, model: Model, request: Request, patches: Callable[[Model], NDArray[np.uint8] | None]) -> Explainer:
        """Return an explainer for a request; `patches` gives some of the run's, if the choice needs them."""
        sample = patches(model) if request.needs_patches else None
        examined = examine(model, request, None if sample is None else torch.from_numpy(sample))
        return cls(model, examined.facts, examined.program, examined.at_once)

    @classmethod
    def load(cls, spec: ModelSpec, facts: ModelFacts, device: str) -> Explainer:
        """Load the run's explainer in another process than the one that examined the model.

        Raises:
            ModelError: the model is not the same here, or cannot be run.
        """
        model = load_model(spec, device)
        if model.digest != (facts.bag.encoder if facts.bag else facts.digest):
            raise ModelError(
                f"{spec.name}: this worker loaded a different model from the one the run began with; use the same "
                "model files and packages everywhere"
            )
        where = device_of(model.module)
        program, at_once = largest_that_fits(lambda n: prepare_program(model, facts, n), facts.batch_size, where)
        return cls(model, facts, program, at_once)

    @property
    def input_px(self) -> tuple[int, int]:
        """(height, width) of the network's input, after resizing."""
        return self.model.input_px

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """Return an array for a batch of patches, from which they are sent to the device without another copy."""
        return self._lane.empty(shape)

    def resized(self, patch: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a patch uint8 [H, W, 3] resized as the model does it, for threads that read patches."""
        return self.model.transform.resized(patch)

    def layers(self) -> list[Layer]:
        """Return the layers that could be explained, in the order in which they run."""
        return explainable_layers(self.model, self.facts)

    def refused_methods(self) -> dict[str, str]:
        """Return the reason for each method that a run of this model would refuse, by the same check."""
        images, refused = probe_images(self.model.input_px).to(self._device), {}
        for method in METHOD_INFO:
            try:
                with self._lock:
                    check_methods(self.facts.name, self._program, [method], images)
            except WsiGradcamError as error:
                refused[method] = one_line(error)
        return refused

    @property
    def in_flight(self) -> int:
        """The number of batches that may be started before the results of the first are requested."""
        return IN_FLIGHT if self._device.type == "cuda" else 0

    def explain(self, rgb: NDArray[np.uint8], targets: Targets, methods: Sequence[str]) -> Found:
        """Return (logits [n, K], raw maps [n, methods x targets, h, w]) of patches uint8 [n, H, W, 3], float32.

        Patches may be resized already. Fewer than a batch are padded: for another size torch chooses other kernels,
        whose sums differ in the last bit with the number of threads (DenseNet-121, 7 patches). If memory does not
        suffice for a batch, halves are tried, and the size that fits is used from then on.
        """
        return self.begin(rgb, targets, methods)()

    def begin(self, rgb: NDArray[np.uint8], targets: Targets, methods: Sequence[str]) -> Callable[[], Found]:
        """Begin to explain patches; the returned function waits for the results, which are those of `explain`.

        A GPU works in the meantime; on a CPU the results are ready at once.
        """
        count = len(rgb)
        staged = self._lane.staged(rgb, max(count, self.facts.batch_size))
        parts = self._in_parts(staged, count, targets, methods)

        def found(_held: Tensor = staged) -> Found:  # the patches may still be on their way
            logits, maps = zip(*(part() for part in parts), strict=True)
            if len(parts) > 1:
                logits, maps = (np.concatenate(logits),), (np.concatenate(maps),)
            return logits[0][:count], maps[0][:count]

        return found

    def _on_device(self, rgb: Tensor, targets: Sequence[AnyTarget], methods: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return logits and maps, all on the device of the patches, without copies to or from the host."""
        images = self.model.prepare(rgb)  # while the network may be at work for another thread
        with self._lock:
            explained = explain_batch(self._program, images, targets, methods)
        shape = self.facts.cam_shape
        maps = [pool_to_layer_grid(explained.cams[method], method, shape) for method in methods]
        maps = maps or [explained.logits.new_zeros(len(explained.logits), 0, *shape)]
        return explained.logits.float(), torch.cat(maps, dim=1).float()

    def begin_weighed(
        self, rgb: NDArray[np.uint8], coefficients: NDArray[np.float32], methods: Sequence[str]
    ) -> Callable[[], Found]:
        """Begin features E(x_i) [n, D] and raw maps [n, methods x T, h, w] of <c_i, E(x_i)>, for given c [n, T, D]."""
        return self.begin(rgb, FeatureTargets(coefficients), methods)

    def features(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the outputs of an encoder for patches uint8 [n, H, W, 3], float32 [n, D]; see `explain`."""
        return self.explain(rgb, (), ())[0]

    def likeness(self, reference: NDArray[np.uint8], rgb: NDArray[np.uint8]) -> Fidelity:
        """Compare maps of patches uint8 [n, H, W, 3] with those of another version of them, the reference."""
        size = self.at_once
        count = size * -(-len(rgb) // size)

        def images(patches: NDArray[np.uint8]) -> Tensor:
            return _repeated(self.model.prepare(torch.from_numpy(patches).to(self._device)), count)

        with self._lock:
            return likeness(self._program, images(reference), images(rgb), size)

    def rate(self, targets: Sequence[Target], methods: Sequence[str], budget_s: float = 3.0) -> float:
        """Return patches explained per second, timed on noise: on a batch, or on a few patches if that takes long."""
        size = min(FEW, self.facts.batch_size)
        self._timed(size, targets, methods)  # the first call sets things up
        seconds = self._timed(size, targets, methods)
        if seconds * self.facts.batch_size <= budget_s * size:
            size, seconds = self.facts.batch_size, self._timed(self.facts.batch_size, targets, methods)
        return size / seconds

    def _timed(self, count: int, targets: Sequence[Target], methods: Sequence[str]) -> float:
        """Return the seconds that `count` patches take at once."""
        noise = np.random.default_rng(0).integers(0, 256, (count, *self.facts.patch_px, 3), np.uint8)
        started = time.perf_counter()
        for part in self._in_parts(self._lane.staged(noise, count), count, targets, methods):
            part()
        return time.perf_counter() - started

    def _in_parts(
        self, rgb: Tensor, count: int, targets: Targets, methods: Sequence[str]
    ) -> list[Callable[[], tuple[NDArray[Any], ...]]]:
        """Begin to explain the first `count` patches or a few more, in parts that fit into memory."""
        begun = []
        done, wanted = 0, self.at_once
        while done < count:
            part = rgb[done : done + self.at_once]
            explained = self._begun(part, targets, methods, done)
            if explained is None:
                self.at_once = min(self.at_once, -(-len(part) // 2))  # another thread may have found this out as well
                free_memory(self._device)
            else:
                begun.append(explained)
                done += len(part)
        if self.at_once < wanted:
            LOG.info("out of memory with %d patches at once; using at most %d from now on", wanted, self.at_once)
        return begun

    def _begun(
        self, rgb: Tensor, targets: Targets, methods: Sequence[str], first: int
    ) -> Callable[[], tuple[NDArray[Any], ...]] | None:
        """Queue all work for the patches from `first` on; return None if memory is too small.

        By then, nothing from the attempt is held any longer, as it would be while the error is being handled.
        """
        send = self._lane.send
        try:
            of = targets.rows(first, first + len(rgb), send) if isinstance(targets, FeatureTargets) else targets
            return self._lane.fetch(*self._on_device(send(rgb), of, methods))
        except Exception as error:
            if not is_out_of_memory(error) or len(rgb) < 2:
                raise
        return None
