"""`timm:NAME`: the models of timm, with published weights unless the specification names others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.sources import Built

if TYPE_CHECKING:
    from wsi_gradcam.models.spec import ModelSpec


def build(name: str, spec: ModelSpec) -> Built:
    """The timm model `name`, with as many outputs as the specification has classes."""
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name[:6]}*")[:5]
        raise ModelError(f"timm:{name}: timm has no such model; near names: {', '.join(near) or 'none'}")
    if spec.weights is None and not timm.is_model_pretrained(name):
        # timm would warn in its log and go on with random weights.
        raise ModelError(
            f"timm:{name}: there are no published weights; name a file with 'weights:' in a model file, or use "
            "'weights: random' for an untrained network"
        )
    outputs: dict[str, Any] = {}
    if spec.weights is not None and spec.classes is not None:  # timm would put a random head on published weights
        outputs["num_classes"] = len(spec.classes)
    try:
        module = timm.create_model(name, pretrained=spec.weights is None, **outputs)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"timm:{name}: the published weights cannot be had ({type(error).__name__}: {error}); "
            "name a file with 'weights:' in a model file, or use 'weights: random' for an untrained network"
        ) from error
    config: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]  # set by timm, not declared
    _, height, width = config["input_size"]
    return Built(module, patch_px=(height, width), mean=tuple(config["mean"]), std=tuple(config["std"]))
