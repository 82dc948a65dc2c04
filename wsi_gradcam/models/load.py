"""A specification -> a network in evaluation mode, with all that was left open filled in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.sources import Built, function, timm, torchvision
from wsi_gradcam.models.spec import RANDOM, ModelSpec, read_spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wsi_gradcam.models.activation import Activation

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Model:
    """A network ready to explain patches.

    Attributes:
        name: how results name it.
        module: float32 [B, 3, H, W], normalised -> logits [B, K]; in evaluation mode, parameters frozen.
        classes: K names.
        patch_px: (height, width) of the input.
        mpp: micrometres per input pixel; None when not known.
        mean, std: of RGB in 0..1.
        activation: softmax, sigmoid or none.
        layer: the layer to explain where the specification names one.
        digest: sha256 of weights and of everything above that changes results.
    """

    name: str
    source: str
    module: nn.Module
    classes: tuple[str, ...]
    patch_px: tuple[int, int]
    mpp: float | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    activation: Activation
    layer: str | None
    license: str | None
    digest: str

    def normalise(self, rgb: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], ((rgb / 255) - mean) / std, on the same device."""
        mean = torch.tensor(self.mean, device=rgb.device) * 255
        std = torch.tensor(self.std, device=rgb.device) * 255
        return ((rgb.float() - mean) / std).permute(0, 3, 1, 2).contiguous()


def load_model(spec: ModelSpec | str | PathLike[str], device: str = "cpu") -> Model:
    """The model of a specification, or of whatever `--model` takes, on `device`.

    Raises:
        ModelError: no such source, weights that do not fit, a wrong checksum, an output of the wrong shape.
    """
    spec = spec if isinstance(spec, ModelSpec) else read_spec(fspath(spec))
    built = _build(spec)
    if (path := spec.weights_path) is not None:
        _load_weights(built.module, path, spec)
    module = built.module.eval().requires_grad_(False)
    patch_px = spec.patch_px or built.patch_px
    if patch_px is None:
        raise ModelError(f"{spec.name}: the input size is not known; add 'patch_px: 224' to the model file")
    classes = spec.classes or built.classes or ()
    outputs = _count_outputs(spec.name, module, patch_px)
    if classes and len(classes) != outputs:
        raise ModelError(f"{spec.name}: {len(classes)} classes are named, but the model has {outputs} outputs")
    if outputs == 1 and spec.activation == "softmax":
        raise ModelError(
            f"{spec.name}: the softmax of a single output is always 1; add 'activation: sigmoid' (or none) and one "
            "class name to the model file"
        )
    resolved = Model(
        name=spec.name,
        source=spec.source,
        module=module.to(_device(device)),
        classes=classes or tuple(str(i) for i in range(outputs)),
        patch_px=patch_px,
        mpp=spec.mpp,
        mean=spec.mean or built.mean or IMAGENET_MEAN,
        std=spec.std or built.std or IMAGENET_STD,
        activation=spec.activation,
        layer=spec.layer,
        license=spec.license,
        digest="",
    )
    return Model(**{**resolved.__dict__, "digest": _digest(resolved, built.code_digest)})


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).splitlines()[0]
        raise ModelError(f"device {name!r} cannot be used here: {cause}; try --device cpu") from error
    return device


def _build(spec: ModelSpec) -> Built:
    kind, _, argument = spec.source.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # untrained weights are the same in every process
        if kind == "timm":
            return timm.build(argument, spec)
        if kind == "torchvision":
            return torchvision.build(argument, spec)
        return function.build(spec.source, spec)


def _load_weights(module: nn.Module, path: Path, spec: ModelSpec) -> None:
    if not path.is_file():
        raise ModelError(f"{spec.name}: no weights file {path}; paths are relative to the model file, or {RANDOM!r}")
    if spec.sha256 and (found := _sha256(path)) != spec.sha256.lower():
        raise ModelError(f"{spec.name}: {path} has sha256 {found}, expected {spec.sha256}; fetch the right file")
    state = _state_dict(path)
    own = module.state_dict().keys()
    if not state.keys() & own:  # training with DataParallel or DDP puts a prefix before each name
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ModelError(f"{spec.name}: {path} does not fit {spec.source}: {lines[:400]}") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name. Pickles are read by torch's restricted unpickler only: no code can run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise struct, index, unicode and many other errors
        raise ModelError(
            f"{path}: not a plain state dict ({type(error).__name__}); objects in pickles are never loaded; save "
            "model.state_dict() with safetensors.torch.save_file"
        ) from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise ModelError(f"{path}: expected a state dict of tensors, found a {type(state).__name__} of other things")
    return state


def _count_outputs(name: str, module: nn.Module, patch_px: tuple[int, int]) -> int:
    try:
        with torch.no_grad():
            output = module(torch.zeros(2, 3, *patch_px))
    except Exception as error:  # the model's own code may raise anything
        raise ModelError(
            f"{name}: fails on a batch of shape (2, 3, {patch_px[0]}, {patch_px[1]}): {type(error).__name__}: {error}"
        ) from error
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"{name}: returns a {type(output).__name__}, expected a tensor of shape (batch, classes)")
    if output.ndim != 2 or len(output) != 2:
        raise ModelError(
            f"{name}: returns shape {tuple(output.shape)} for a batch of 2, expected (2, classes); "
            "wrap the model so that it returns one logit per class"
        )
    return int(output.shape[1])


def _digest(model: Model, code: str) -> str:
    about = [
        model.source,
        model.classes,
        model.patch_px,
        model.mpp,
        model.mean,
        model.std,
        model.activation,
        code,
    ]
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(model.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
