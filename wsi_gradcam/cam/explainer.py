"""The model at work in a process: patches in, logits and maps out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wsi_gradcam.cam.engine import explain_batch, pool_to_layer_grid
from wsi_gradcam.cam.examine import Request, examine, explainable_layers, is_out_of_memory, prepare_program
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import load_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsi_gradcam.cam.facts import Layer, ModelFacts
    from wsi_gradcam.cam.program import Program
    from wsi_gradcam.cam.targets import Target
    from wsi_gradcam.models.load import Model
    from wsi_gradcam.models.spec import ModelSpec

LOG = logging.getLogger("wsi_gradcam")


class Explainer:
    """A loaded model with the program that explains it."""

    def __init__(self, model: Model, facts: ModelFacts, program: Program) -> None:
        self.facts = facts
        self.model = model
        self._program = program
        self._lock = threading.Lock()  # a tap is a hook on the module: one pass at a time
        self._device = next(iter(model.module.parameters()), torch.empty(0)).device

    @classmethod
    def examine(cls, model: Model, request: Request, patches: Callable[[Model], NDArray[np.uint8] | None]) -> Explainer:
        """Return an explainer for a request; `patches` gives some of the run's, if the choice needs them."""
        sample = patches(model) if request.needs_patches else None
        examined = examine(model, request, None if sample is None else torch.from_numpy(sample))
        return cls(model, examined.facts, examined.program)

    @classmethod
    def load(cls, spec: ModelSpec, facts: ModelFacts, device: str) -> Explainer:
        """Load the run's explainer in another process than the one that examined the model.

        Raises:
            ModelError: the model is not the same here, or cannot be run.
        """
        model = load_model(spec, device)
        if model.digest != facts.digest:
            raise ModelError(
                f"{spec.name}: this worker loaded another model than the one the run began with; make the model's "
                "files and packages the same everywhere"
            )
        return cls(model, facts, prepare_program(model, facts))

    @property
    def input_px(self) -> tuple[int, int]:
        """(height, width) that the network sees of a patch, resized."""
        return self.model.input_px

    def layers(self) -> list[Layer]:
        """Return the layers that could be explained, in the order in which they run."""
        return explainable_layers(self.model, self.facts)

    def explain(
        self, rgb: NDArray[np.uint8], targets: Sequence[Target], methods: Sequence[str]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return (logits [n, K], raw maps [n, methods x targets, h, w]) of patches uint8 [n, H, W, 3], float32.

        Fewer patches than a batch are filled up: for another size torch chooses other kernels, whose sums differ in
        the last bit with the number of threads (DenseNet-121, 7 patches). Where memory does not suffice for a
        batch, its halves are tried.
        """
        count, missing = len(rgb), self.facts.batch_size - len(rgb)
        full = np.pad(rgb, ((0, missing), (0, 0), (0, 0), (0, 0)))
        images = self.model.prepare(torch.from_numpy(full).to(self._device))
        with self._lock:
            logits, maps = self._halving(images, targets, methods)
        return logits[:count].float().cpu().numpy(), maps[:count].float().cpu().numpy()

    def _halving(self, images: Tensor, targets: Sequence[Target], methods: Sequence[str]) -> tuple[Tensor, Tensor]:
        try:
            explained = explain_batch(self._program, images, targets, methods)
        except Exception as error:
            if not is_out_of_memory(error) or len(images) < 2:
                raise
        else:
            shape = self.facts.cam_shape
            maps = [pool_to_layer_grid(explained.cams[method], method, shape) for method in methods]
            return explained.logits, torch.cat(maps, dim=1)
        LOG.warning("out of memory with %d patches at once, trying %d", len(images), len(images) // 2)
        if images.is_cuda:
            torch.cuda.empty_cache()
        parts = [self._halving(part, targets, methods) for part in torch.split(images, -(-len(images) // 2))]
        return torch.cat([logits for logits, _ in parts]), torch.cat([maps for _, maps in parts])
