"""The other sides of `benchmarks/explain.py`: libraries that explain the same patches, or only predict them.

Each maker gives sides by name; libraries are imported here and nowhere else.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsi_gradcam.cam.explainer import locate_layers
from wsi_gradcam.cam.facts import Layer
from wsi_gradcam.cam.trunks import _ov, low_precisions  # not `import openvino`, which reports itself to its maker

Run = Callable[[], int]
"""A side's turn: explains, or only predicts, some patches and returns how many."""


@dataclass(frozen=True)
class Case:
    """A network with its patches, as every side gets them."""

    name: str
    module: nn.Module
    layer: str
    patches: Tensor
    batch_size: int
    copies: list[nn.Module] = field(default_factory=list)

    @property
    def images(self) -> Tensor:
        """The batch that is timed."""
        return self.patches[: self.batch_size]

    def located(self) -> tuple[nn.Module, tuple[Layer, ...]]:
        """The parts of our programs."""
        module, layers, _ = locate_layers(self.module, self.layer, self.patches[:2])
        return module, layers

    def own(self) -> tuple[nn.Module, nn.Module]:
        """A copy of the network, for a library that leaves hooks in it, and its layer."""
        module = copy.deepcopy(self.module)
        self.copies.append(module)
        return module, module.get_submodule(self.layer)


def forward_side(case: Case) -> dict[str, Run]:
    """PyTorch as it is."""

    def run() -> int:
        with torch.inference_mode():
            return len(case.module(case.images))

    return {"forward": run}


def openvino_sides(case: Case) -> dict[str, Run]:
    """The whole network in OpenVINO, one batch at a time, and several at once as OpenVINO likes best."""
    ov = _ov()
    core = ov.Core()
    model = ov.convert_model(case.module, example_input=case.images[:2], input=[list(case.images.shape)])
    precision = "bf16" if "bfloat16" in low_precisions("openvino", torch.device("cpu")) else "f32"
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    single = core.compile_model(model, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"}).create_infer_request()
    queue = ov.AsyncInferQueue(core.compile_model(model, "CPU", {**options, "PERFORMANCE_HINT": "THROUGHPUT"}))
    images = case.images.numpy()
    logits: list[Any] = []
    queue.set_callback(lambda request, _: logits.append(np.array(request.get_output_tensor().data)))

    def latency() -> int:
        single.infer([images], share_inputs=True)
        return len(np.array(single.get_output_tensor().data))

    def throughput() -> int:
        logits.clear()
        for _ in range(2 * len(queue)):
            queue.start_async([images], share_inputs=True)
        queue.wait_all()
        return sum(map(len, logits))

    return {"openvino_latency": latency, "openvino_throughput": throughput}


def gradcam_side(case: Case) -> dict[str, Run]:
    """The package pytorch-grad-cam; left to itself it explains the predicted class."""
    module, layer = case.own()
    explain = importlib.import_module("pytorch_grad_cam").GradCAM(module, [layer])
    return {"gradcam": lambda: len(explain(case.images, targets=None))}


def captum_sides(case: Case) -> dict[str, Run]:
    """LayerGradCam, after a forward pass for the class, and with the class known."""
    module, layer = case.own()
    method = importlib.import_module("captum.attr").LayerGradCam(module, layer)
    with torch.inference_mode():
        known = module(case.images).argmax(dim=1).tolist()

    def run() -> int:
        with torch.inference_mode():
            classes = module(case.images).argmax(dim=1).tolist()
        return len(method.attribute(case.images, target=classes))

    return {"captum": run, "captum_class_known": lambda: len(method.attribute(case.images, target=known))}


def torchcam_side(case: Case) -> dict[str, Run]:
    """torch-cam, whose extractor explains the pass before it."""
    module, _ = case.own()
    extract = importlib.import_module("torchcam.methods").GradCAM(module, case.layer)

    def run() -> int:
        scores = module(case.images)
        return len(extract(scores.argmax(dim=1).tolist(), scores)[0])

    return {"torchcam": run}


OTHERS: dict[str, Callable[[Case], dict[str, Run]]] = {
    "openvino": openvino_sides,
    "forward": forward_side,
    "gradcam": gradcam_side,
    "captum": captum_sides,
    "torchcam": torchcam_side,
}
