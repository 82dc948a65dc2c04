"""`timm:NAME` and `torchvision:NAME`: with published weights unless the specification names others."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.errors import ModelError, did_you_mean, from_extra
from wsi_gradcam.io.urls import allowed_hosts, refusal
from wsi_gradcam.models.sources import Built

if TYPE_CHECKING:
    from torch import nn

    from wsi_gradcam.models.spec import ModelSpec


def build_timm(spec: ModelSpec) -> Built:
    """Build a model of timm, with as many outputs as the specification has classes.

    Raises:
        ModelError: timm has no such model, or its published weights cannot be had.
    """
    with from_extra("timm", spec.source):
        import timm

    name = spec.argument
    if not timm.is_model(name.split(".")[0]):
        near = did_you_mean(name, timm.list_models()) or f"timm.list_models('*{name[:6]}*') in Python lists some"
        raise ModelError(f"timm:{name}: timm has no such model; {near}")
    if spec.weights is None and not timm.is_model_pretrained(name):
        # timm would warn in its log and go on with random weights.
        raise ModelError(
            f"timm:{name}: there are no published weights; name a file with 'weights:' in a model file, or use "
            "'weights: random' for an untrained network"
        )
    if spec.weights is None:
        _check_network(spec, timm.get_pretrained_cfg(name))
    outputs: dict[str, Any] = {"num_classes": 0} if spec.is_encoder else {}
    if spec.weights is not None and spec.classes is not None:  # timm would put a random head on published weights
        outputs["num_classes"] = len(spec.classes)
    try:
        module = timm.create_model(name, pretrained=spec.weights is None, **outputs)
    except (OSError, RuntimeError) as error:
        raise _no_weights(spec, f"{type(error).__name__}: {error}") from error
    config: dict[str, Any] = module.pretrained_cfg  # type: ignore[assignment]  # set by timm, not declared
    _, height, width = config["input_size"]
    return Built(module, patch_px=(height, width), mean=tuple(config["mean"]), std=tuple(config["std"]))


def _check_network(spec: ModelSpec, config: Any) -> None:
    """Refuse at once where the hub's name is not known: its client would try again for 50 s.

    Raises:
        ModelError: the weights are neither here nor can be had.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    repository = getattr(config, "hf_hub_id", None)
    if any(
        repository and isinstance(try_to_load_from_cache(str(repository), file), str)
        for file in ("model.safetensors", "pytorch_model.bin")
    ):
        return
    _check_allowed(spec, constants.ENDPOINT if repository else str(getattr(config, "url", "")))
    if not repository or not host or urllib.request.getproxies():  # fetched from elsewhere, or by another way
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise _no_weights(spec, f"cannot reach {host}: {error}") from error


def _check_allowed(spec: ModelSpec, url: str) -> None:
    """Raise a ModelError where weights would be fetched from a host that is not to be asked."""
    if allowed_hosts() and url and (why := refusal(url)):
        raise _no_weights(spec, why)


def _no_weights(spec: ModelSpec, cause: str) -> ModelError:
    return ModelError(
        f"{spec.source}: the published weights are not available ({cause}); name a file with 'weights:' in a model "
        "file, or use 'weights: random' for an untrained network"
    )


def build_torchvision(spec: ModelSpec) -> Built:
    """Build a model of torchvision, with as many outputs as the specification has classes.

    Raises:
        ModelError: torchvision has no such classifier, or its published weights cannot be had.
    """
    from torch.hub import get_dir

    with from_extra("timm", spec.source):
        from torchvision.models import get_model, get_model_weights, list_models

    name = spec.argument
    try:
        published = get_model_weights(name).DEFAULT
    except ValueError as error:
        near = did_you_mean(name, list_models()) or "see torchvision.models"
        raise ModelError(f"torchvision:{name}: torchvision has no such model; {near}") from error
    transform = published.transforms()
    if not hasattr(transform, "crop_size"):
        raise ModelError(f"torchvision:{name}: not a classifier of images, expected one such as torchvision:resnet18")
    arguments: dict[str, Any] = {"weights": published if spec.weights is None else None}
    if spec.weights is not None and spec.classes is not None:
        arguments["num_classes"] = len(spec.classes)
    if spec.weights is None and not (Path(get_dir()) / "checkpoints" / Path(published.url).name).is_file():
        _check_allowed(spec, published.url)
    try:
        module = get_model(name, **arguments)
    except (OSError, RuntimeError) as error:
        raise _no_weights(spec, f"{type(error).__name__}: {error}") from error
    side = transform.crop_size[0]
    classes = tuple(published.meta["categories"]) if spec.classes is None else None
    mean, std = tuple(transform.mean), tuple(transform.std)
    return Built(module, classes, patch_px=(side, side), mean=mean, std=std)


HEADS = ("fc", "classifier", "heads", "head")  # of torchvision's networks


def without_head(built: Built, spec: ModelSpec) -> Built:
    """Return the network that gives what a library's classifier puts into its last linear layer: features.

    A network from elsewhere stays as it is, and gives features itself.

    Raises:
        ModelError: its last layer is none that can be left off.
    """
    module = built.module
    if spec.kind in ("timm", "hf"):
        module.reset_classifier(0)  # type: ignore[operator]  # of timm's networks
    elif spec.kind == "torchvision":
        _leave_off(spec, module)
    return replace(built, classes=None)


def _leave_off(spec: ModelSpec, module: nn.Module) -> None:
    from torch import nn

    for name in HEADS:
        head = getattr(module, name, None)
        if isinstance(head, nn.Linear):
            setattr(module, name, nn.Identity())
            return
        if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            head[-1] = nn.Identity()
            return
    raise ModelError(
        f"{spec.source}: does not end in a linear layer, so it gives no features as it is; write a function that "
        "returns a network which does"
    )
