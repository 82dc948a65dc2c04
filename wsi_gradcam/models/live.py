"""A network that Python code holds, as a model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from torch import nn

from wsi_gradcam.errors import ModelError, one_line
from wsi_gradcam.models.load import Model, finish
from wsi_gradcam.models.sources import Built
from wsi_gradcam.models.spec import ModelSpec, Resizing, explain_validation

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from wsi_gradcam.models.activation import Activation


def model_of(
    module: nn.Module,
    *,
    name: str | None = None,
    patch_px: int | tuple[int, int],
    mpp: float | None = None,
    classes: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scale: float | None = None,
    stain: str | Mapping[str, Any] | None = None,
    transform: Resizing | None = None,
    activation: Activation = "softmax",
    layer: str | None = None,
    output: str | int | None = None,
    device: str = "cpu",
) -> Model:
    """A model of a copy of `module` as it is now: in evaluation mode, frozen, in float32. `module` stays as it is.

    The other arguments are the keys of a model file. Without mean and std colours are normalised as for ImageNet.

    Raises:
        ModelError: it does not take RGB of this size, gives something else than logits, or cannot be copied.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Conv2d(4, 2, 1))
    >>> model = model_of(net, patch_px=32, classes=["stroma", "tumour"])
    >>> model.module(model.prepare(torch.zeros(5, 32, 32, 3, dtype=torch.uint8))).shape
    torch.Size([5, 2])
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    values = {
        "patch_px": patch_px,
        "mpp": mpp,
        "classes": classes,
        "mean": mean,
        "std": std,
        "scale": scale,
        "stain": stain,
        "transform": transform,
        "layer": layer,
        "output": output,
        "activation": activation,
    }
    try:
        spec = ModelSpec.model_validate({"name": name or type(module).__name__, "source": f"live:{kind}", **values})
    except ValidationError as error:
        raise ModelError(f"{kind}: {explain_validation(error)}") from error
    try:
        built = Built(copy.deepcopy(module))
    except Exception as error:  # modules may hold anything
        raise ModelError(
            f"{kind}: cannot be copied ({one_line(error)}); load a state dict into a new module and give that"
        ) from error
    return finish(spec, built, device)
