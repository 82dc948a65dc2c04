"""Models of a module that the caller holds: copied, checked, and told apart by what they are."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_models_load import Fail, left_training
from tests.toy_models import pooled_linear
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import model_of


def test_a_live_module_is_copied_and_left_as_it_was() -> None:
    network = left_training()
    model = model_of(network, patch_px=32, mpp=0.5, classes=["a", "b"], mean=[0.5] * 3, std=[0.2] * 3, layer="0")
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.module(images), left_training().eval()(images))
    assert (model.name, model.classes, model.mpp, model.layer) == ("Sequential", ("a", "b"), 0.5, "0")
    assert (model.patch_px, model.mean, model.std) == ((32, 32), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert not model.runs_code


def test_the_digest_of_a_live_module_is_of_its_class_and_weights() -> None:
    torch.manual_seed(0)
    network = pooled_linear()
    first = model_of(network, patch_px=32).digest
    assert model_of(network, patch_px=32, name="x").digest == first
    assert model_of(nn.Sequential(network), patch_px=32).digest != first
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-4
    assert model_of(network, patch_px=32).digest != first


@pytest.mark.parametrize(
    ("network", "values", "problem"),
    [
        (pooled_linear(), {"patch_px": 0}, "patch_px"),
        (pooled_linear(), {"patch_px": 32, "activation": "relu"}, "activation"),
        (pooled_linear(), {"patch_px": 32, "mean": [178, 140, 178]}, "scale: 255"),
        (pooled_linear(), {"patch_px": 32, "classes": ["a"]}, "1 classes are named, but the model has 2 outputs"),
        (Fail(), {"patch_px": 32}, "Fail: fails on a batch of shape (2, 3, 32, 32): ValueError: only gray"),
    ],
)
def test_a_live_module_that_cannot_be_used_is_refused(network: nn.Module, values: Any, problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        model_of(network, **values)
    assert problem in str(caught.value)


def test_a_live_module_that_cannot_be_copied_is_refused() -> None:
    network: Any = pooled_linear()
    network.lock = threading.Lock()
    with pytest.raises(ModelError, match="cannot be copied"):
        model_of(network, patch_px=32)
