"""What `GradCAM` refuses, in words that say how to mend it, and odd things that it does not refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import split_models
from tests.split_models import Split, curved, pictures, plain, pooled
from wsi_gradcam import GradCAM
from wsi_gradcam.cam.program import EagerProgram
from wsi_gradcam.errors import ConfigError, LayerError, ModelError, TargetError, WsiGradcamError

network, images = split_models.network, split_models.images  # fixtures


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"images are \(2, 3, 32, 32\) torch.uint8, expected normalised"),
        (torch.zeros(3, 32, 32), r"images are \(3, 32, 32\) torch.float32, expected"),
        (torch.zeros(0, 3, 32, 32), r"images are \(0, 3, 32, 32\)"),
        (np.zeros((2, 3, 32, 32), np.float32), "images are ndarray"),
        (torch.zeros(2, 4, 32, 24), r"fails on images of shape \(4, 32, 24\).*to have 3 channels, but got 4 channels"),
        (torch.zeros(2, 3, 2, 2), r"fails on images of shape \(3, 2, 2\)"),
    ],
)
def test_wrong_images_are_refused(given: Any, problem: str, network: Split) -> None:
    with pytest.raises(ModelError, match=problem):
        plain(network)(given)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"method": "gradcan"}, "method 'gradcan' is not known; expected one of cam, gradcam"),
        ({"method": "gradcam,gradcam"}, "contains duplicates"),
        ({"method": []}, "is empty"),
        (
            {"engine": "quantum"},
            "engine 'quantum' is not known; expected one of auto, eager, compile, cudagraphs, openvino",
        ),
        ({"precision": "int8"}, "precision 'int8' is not known; expected one of auto, float32"),
        ({"batch_size": 0}, "batch_size 0 is too small"),
    ],
)
def test_wrong_options_are_refused_at_once(options: dict[str, Any], problem: str, network: Split) -> None:
    with pytest.raises(ConfigError, match=problem):
        plain(network, **options)


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        ("cat", "target 'cat' is not a class of the model"),
        (4, "target '4' is not a class"),
        (-1, "target '-1' is not a class"),
        ([], "targets is empty"),
        ([0, lambda logits: logits], "<lambda>: returned shape"),
        (lambda logits: logits.detach()[:, 0], "does not depend on its logits"),
    ],
)
def test_wrong_targets_are_refused(targets: Any, problem: str, network: Split, images: Tensor) -> None:
    with pytest.raises(TargetError, match=problem):
        plain(network)(images, targets)


def test_a_wrong_number_of_classes_is_refused(network: Split, images: Tensor) -> None:
    with pytest.raises(TargetError, match="3 classes are named, but the model has 4 outputs"):
        plain(network, classes=["a", "b", "c"])(images, "c")


@pytest.mark.parametrize("layer", [None, "features"])
def test_weights_that_are_not_numbers_are_refused_as_such(layer: str | None, network: Split, images: Tensor) -> None:
    with torch.no_grad():
        network.features[0].weight[0, 0, 0, 0] = torch.nan  # type: ignore[index]
    with pytest.raises(ModelError, match="gives NaN or infinite values on noise images; check its weights"):
        plain(network, layer=layer)(images)


def test_an_image_that_is_not_a_number_has_a_map_of_its_own(network: Split, images: Tensor) -> None:
    broken = images.clone()
    broken[1, 0, 3, 3] = torch.nan
    found, expected = plain(network)(broken, 1), plain(network)(images, 1)
    assert found.logits[1].isnan().all()
    assert found.cams[1].isnan().any()
    others = [0, 2, 3, 4]
    assert torch.equal(found.cams[others], expected.cams[others])


def test_a_layer_that_is_zero_gives_maps_of_zeros() -> None:
    network = pooled()
    with torch.no_grad():
        for parameter in network.features.parameters():
            parameter.zero_()
    methods = "gradcam,gradcam++,hirescam,layercam,xgradcam,eigencam,finercam,cam"
    found = plain(network, method=methods)(pictures(3), [0, "predicted"])
    for maps in found.by_method.values():
        assert torch.equal(maps, torch.zeros(3, 2, 4, 3))
    assert torch.isfinite(found.logits).all()


def test_a_wrong_layer_is_refused_with_those_that_are_like_it(network: Split, images: Tensor) -> None:
    with pytest.raises(LayerError, match=r"no layer 'feature'; did you mean features"):
        plain(network, layer="feature")(images)


def test_a_network_without_logits_is_refused(images: Tensor) -> None:
    with pytest.raises(ModelError, match=r"returns shape \(2, 4, 30, 22\) for a batch of 2, expected \(2, classes\)"):
        GradCAM(nn.Conv2d(3, 4, 3))(images)


def test_a_network_made_under_inference_mode_is_refused(images: Tensor) -> None:
    with torch.inference_mode():
        network = curved()
    with pytest.raises(
        ModelError, match=r"created under torch.inference_mode, which rules out gradients; create it outside"
    ):
        plain(network)(images)


def test_a_lack_of_memory_says_what_to_do(network: Split, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    explain = plain(network)
    explain(images[:1])
    monkeypatch.setattr(EagerProgram, "forward", fail)
    with pytest.raises(ModelError, match="out of memory with 5 images at once; give GradCAM a smaller batch_size"):
        explain(images)


def test_all_that_is_refused_can_be_caught_as_one() -> None:
    assert issubclass(ConfigError, WsiGradcamError)
    assert issubclass(TargetError, ValueError)
