"""Networks and methods on a GPU that is not there, in a process of its own: `python -m tests.fake_gpu`.

Every tensor is a fake one of PyTorch's that says it is on a GPU and holds no values; operators of two devices fail as
they would there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.split_models import curved, pooled
from wsi_gradcam.cam.explainer import Explainer, locate_layers
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.cam.layers import probe_images
from wsi_gradcam.cam.program import EagerProgram, SplitProgram, cut_at
from wsi_gradcam.cam.targets import PREDICTED, Target
from wsi_gradcam.cam.trunks import _eager, in_precision, lowered
from wsi_gradcam.models import transform
from wsi_gradcam.models.load import Model, load_model, model_of

BATCH = 4
GPU = torch.device("privateuseone", 0)  # its name before it is registered
# `cam` asks for a value in the middle, to refuse a head that it is not defined for: a fake tensor has none.
GRADIENT = [name for name, info in METHOD_INFO.items() if info.asks == "gradient" and name != "cam"]
# And guided backpropagation first makes a graph of the network, whose values are compared with the network's.
PROBING = [name for name, info in METHOD_INFO.items() if info.asks == "model" and name != "guided_backprop"]
TARGETS = (Target("b", 1), Target(PREDICTED))
CONTRAST = (Target("a-b", 0, 1), Target("a", 0))


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators that take a tensor of one device and give one of another, and those that give float64."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.between: Counter[tuple[str, str, str]] = Counter()
        self.float64: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                for device in given - {tensor.device.type}:
                    self.between[name, device, tensor.device.type] += 1
                self.float64[name] += tensor.dtype == torch.float64 and tensor.device.type != "cpu"
        return found


def on_gpu(mode: FakeTensorMode, module: nn.Module) -> Any:
    """A copy of a network whose tensors say that they are on a GPU."""
    with unset_fake_temporarily():
        module = copy.deepcopy(module)

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)
        return nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found

    for part in module.modules():
        tensors: list[dict[str, Any]] = [part._parameters, part._buffers, vars(part)]
        for values in tensors:
            for name, value in list(values.items()):
                if isinstance(value, Tensor):
                    values[name] = fake(value)
        if isinstance(part, fx.GraphModule):  # traced on the CPU here; traced on a GPU it names that
            for node in part.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": GPU}
            part.recompile()
    return module


class Graph:
    """A graph that is moved to a GPU when it is first used: before, its tensors have values."""

    def __init__(self, mode: FakeTensorMode, graph: fx.GraphModule) -> None:
        self._mode, self._graph = mode, graph
        self._moved: Any = None

    def __call__(self, batch: Tensor) -> Any:
        if self._moved is None:
            self._moved = on_gpu(self._mode, self._graph)
        return self._moved(batch)


def of_module(module: nn.Module, side: int, layer: str) -> Model:
    return model_of(module, patch_px=side, layer=layer)


def timm_model(name: str, side: int, layer: str, **options: Any) -> Callable[[], Model]:
    return lambda: of_module(timm.create_model(name, num_classes=3, **options), side, layer)


NETWORKS: dict[str, Callable[[], Model]] = {
    "oral-tumour": lambda: load_model("oral-tumour"),
    "ihc-dab": lambda: load_model("ihc-dab"),
    "pooled": lambda: model_of(pooled(), patch_px=(32, 24), layer="features"),
    "curved": lambda: model_of(curved(), patch_px=(32, 24), layer="features"),
    "resnet18": lambda: of_module(torchvision.models.resnet18(num_classes=3), 64, "layer4"),
    "resnet50": lambda: of_module(torchvision.models.resnet50(num_classes=3), 64, "layer4"),
    "convnext": timm_model("convnext_atto", 64, "stages"),
    "vit": timm_model("vit_tiny_patch16_224", 64, "blocks.2", img_size=64, depth=4),
    "registers": timm_model("vit_small_patch14_reg4_dinov2", 56, "blocks.1", img_size=56, depth=3),
    "swin": timm_model("swin_tiny_patch4_window7_224", 56, "layers.2", img_size=56, depths=(1, 1, 1, 1)),
    "efficientnet-lite": timm_model("efficientnet_lite0", 64, "blocks"),
}
SMALL = ("pooled", "curved")  # those that methods which run the model a hundred times and more are tried on


def explainers(mode: FakeTensorMode, model: Model) -> dict[str, Explainer]:
    """The explainer of a model in each precision, on a GPU that is not there."""
    noise = probe_images(model.input_px)
    module, layers, _ = locate_layers(model.module, model.layer, noise)
    layout = layers[0].layout
    facts: Any = SimpleNamespace(batch_size=BATCH, cam_shape=(layout.height, layout.width))
    graph, head = cut_at(module, layers[0].name, noise)
    trunks: dict[str, Any] = {"float32": _eager(Graph(mode, graph), "float32", noise)}  # type: ignore[arg-type]
    for precision in ("tf32", "bfloat16", "float16"):  # `make_trunk` refuses TF32 on what is no GPU of NVIDIA
        trunks[precision] = in_precision(Graph(mode, lowered(graph, precision)), precision)
    whole, head = on_gpu(mode, module), on_gpu(mode, head)
    moved = dataclasses.replace(model, module=whole)
    with mode:
        programs: dict[str, EagerProgram] = {"float32": EagerProgram(whole, layers)}
        for precision, made in trunks.items():
            programs[f"split {precision}"] = SplitProgram(whole, layers[0], made, head)
    return {name: Explainer(moved, facts, program) for name, program in programs.items()}


def explained(
    mode: FakeTensorMode, explainer: Explainer, methods: Sequence[str], targets: Sequence[Target] = TARGETS
) -> Copies:
    """Explains a batch, and returns what was copied."""
    copies = Copies()
    with mode, copies:
        rgb = torch.empty(BATCH, *explainer.model.patch_px, 3, dtype=torch.uint8, device=GPU)
        logits, maps = explainer._on_device(rgb, targets, methods)
    assert (logits.device, maps.device) == (GPU, GPU)
    assert (logits.dtype, maps.dtype) == (torch.float32, torch.float32)
    assert maps.shape == (BATCH, len(methods) * len(targets), *explainer.facts.cam_shape)
    return copies


def tried(name: str, mode: FakeTensorMode) -> dict[str, Any]:
    """What was copied while a network was explained by the methods of the gradient, in all precisions."""
    copies: Counter[str] = Counter()
    for explainer in explainers(mode, NETWORKS[name]()).values():
        explained(mode, explainer, ["gradcam"], CONTRAST)  # the numbers of the model's transform are copied once
        copies.update(map(" ".join, explained(mode, explainer, GRADIENT).between.elements()))
    return dict(copies)


def tried_methods(name: str, mode: FakeTensorMode) -> dict[str, Any]:
    """How many copies each method makes, and whether it takes float64."""
    explainer = explainers(mode, NETWORKS[name]())["float32"]
    explained(mode, explainer, ["gradcam"])
    found = {}
    for method in (*GRADIENT, *PROBING):
        copies = explained(mode, explainer, [method], TARGETS[:1])
        found[method] = [copies.between.total(), copies.float64.total()]
    return found


def mixed(mode: FakeTensorMode) -> str:
    """What is said where tensors of two devices meet."""
    try:
        with mode:
            torch.empty(3, device=GPU) * torch.ones(3)
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    """Print what was found, as JSON: of each network, of each method, and of devices that meet."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("gpu")
    torch.autograd.set_multithreading_enabled(False)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in NETWORKS:
        found[name] = noted(partial(tried, name))
    for name in SMALL:
        found[f"methods of {name}"] = noted(partial(tried_methods, name))
    found["mixed"] = noted(mixed)
    print(json.dumps(found))


def noted(run: Callable[[FakeTensorMode], Any]) -> Any:
    """The result, or the end of the traceback."""
    transform._constant.cache_clear()
    try:
        return run(FakeTensorMode(allow_non_fake_inputs=False))
    except Exception:
        return traceback.format_exc()[-2000:]


if __name__ == "__main__":
    main()
