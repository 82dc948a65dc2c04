"""What planning learns of a model is true, and a model that cannot be explained is refused here."""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch
from torch import nn

from tests.toy_models import PooledLinear
from wsi_gradcam.cam.examine import examine
from wsi_gradcam.errors import LayerError, ModelError
from wsi_gradcam.models.load import Model, load_model
from wsi_gradcam.models.spec import ModelSpec


@pytest.fixture
def model() -> Model:
    return load_model(ModelSpec(name="toy", source="tests.toy_models:pooled_linear", patch_px=(32, 48), mpp=0.5))


def test_facts_are_the_models(model: Model) -> None:
    facts = examine(model)
    assert (facts.layer, facts.channels, facts.cam_shape) == ("features", 12, (4, 6))
    assert facts.parameters == 3 * 8 * 25 + 8 + 8 * 12 * 9 + 12 + 12 * 2 + 2
    for field in ("name", "source", "digest", "license", "classes", "activation", "patch_px", "mpp", "mean", "std"):
        assert getattr(facts, field) == getattr(model, field)


def test_activation_bytes_are_the_largest_input_plus_output(model: Model) -> None:
    first, second = 4 * (3 * 32 * 48 + 8 * 8 * 12), 4 * (8 * 8 * 12 * 2)
    assert first > second
    assert examine(model).activation_bytes == first


@pytest.mark.parametrize(
    ("given", "specified", "used"), [("features.0", "features.1", "features.0"), (None, "features.1", "features.1")]
)
def test_a_layer_given_goes_before_the_specifications(
    given: str | None, specified: str, used: str, model: Model
) -> None:
    facts = examine(dataclasses.replace(model, layer=specified), given)
    assert facts.layer == used
    assert facts.cam_shape == (8, 12)


def test_a_wrong_layer_is_refused(model: Model) -> None:
    with pytest.raises(LayerError, match="it has features, fc"):
        examine(model, "layer4")


def test_weights_that_are_not_numbers_are_named_as_such(model: Model) -> None:
    with torch.no_grad():
        cast(PooledLinear, model.module).fc.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="toy: gives NaN or infinite values"):
        examine(model)


def test_a_model_without_parameters_can_be_examined(model: Model) -> None:
    class Means(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Tanh()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return cast(torch.Tensor, self.features(images)).mean(dim=(2, 3))

    facts = examine(dataclasses.replace(model, module=Means()))
    assert (facts.parameters, facts.layer) == (0, "features")
