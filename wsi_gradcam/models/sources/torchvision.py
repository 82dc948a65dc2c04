"""`torchvision:NAME`: the models of torchvision, with published weights unless the specification names others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.sources import Built

if TYPE_CHECKING:
    from wsi_gradcam.models.spec import ModelSpec


def build(name: str, spec: ModelSpec) -> Built:
    """The torchvision model `name`, with as many outputs as the specification has classes."""
    from torchvision.models import get_model, get_model_weights

    try:
        published = get_model_weights(name).DEFAULT
    except ValueError as error:
        raise ModelError(f"torchvision:{name}: torchvision has no such model; see torchvision.models") from error
    transform = published.transforms()
    if not hasattr(transform, "crop_size"):
        raise ModelError(f"torchvision:{name}: not a classifier of images, expected one such as torchvision:resnet18")
    arguments: dict[str, Any] = {"weights": published if spec.weights is None else None}
    if spec.weights is not None and spec.classes is not None:
        arguments["num_classes"] = len(spec.classes)
    try:
        module = get_model(name, **arguments)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"torchvision:{name}: the published weights cannot be had ({type(error).__name__}: {error}); "
            "name a file with 'weights:' in a model file, or use 'weights: random' for an untrained network"
        ) from error
    side = transform.crop_size[0]
    classes = tuple(published.meta["categories"]) if spec.classes is None else None
    mean, std = tuple(transform.mean), tuple(transform.std)
    return Built(module, classes, patch_px=(side, side), mean=mean, std=std)
