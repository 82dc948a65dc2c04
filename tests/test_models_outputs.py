"""Which of a network's outputs are the logits, and their shape."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.toy_models import pooled_linear
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import Model, model_of
from wsi_gradcam.models.outputs import LogitsOf, as_rows, find_output, named_layers, pick

K2, K3, MAPS, EMBEDDING = torch.ones(4, 2), torch.ones(4, 3), torch.ones(4, 8, 5, 5), torch.ones(4, 8)
Heads = namedtuple("Heads", "features logits aux")  # as torchvision's GoogLeNetOutputs


@dataclass
class Output:
    """As transformers without its dict."""

    logits: Tensor
    hidden: Tensor


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (K2, None),
        ({"logits": K2}, "logits"),
        (OrderedDict(embedding=EMBEDDING, out=K2, aux=K3), "out"),
        ({"embedding": EMBEDDING, "logits": K2, "out": K3}, "logits"),
        ({"maps": MAPS, "anything": K2}, "anything"),
        ((K2, MAPS), 0),
        ((MAPS, K2), 1),
        ([MAPS, None, K3], 2),
        ((K2, K2.clone()), 0),
        (Heads(MAPS, K2, K3), "logits"),
        (Output(K2, MAPS), "logits"),
        ({"logits": torch.ones(4), "maps": MAPS}, "logits"),
        ({"a": torch.ones(4, 2, dtype=torch.int64), "b": K3}, "b"),
    ],
)
def test_the_logits_are_found(outputs: Any, expected: str | int | None) -> None:
    found = find_output(outputs, 4)
    assert found == expected
    if found is not None:
        assert pick(outputs, found).shape[0] == 4


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ((K2, K3), ["tuple", "0 (2 columns), 1 (3 columns)", "output:"]),
        ({"a": K2, "b": K2}, ["dict", "a (2 columns), b (2 columns)", "output:"]),
        ((MAPS,), ["tuple", "expected a tensor of shape (batch, classes)", "wrap the model"]),
        ("text", ["str", "wrap the model"]),
        (None, ["NoneType", "wrap the model"]),
        ({}, ["dict", "wrap the model"]),
        ({"logits": MAPS}, ["dict", "wrap the model"]),
    ],
)
def test_what_is_not_clear_is_refused_with_the_choices(outputs: Any, words: list[str]) -> None:
    with pytest.raises(ModelError) as caught:
        find_output(outputs, 4)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("shape", "count", "expected"),
    [
        ((4, 2), 4, (4, 2)),
        ((4,), 4, (4, 1)),
        ((4, 3, 1, 1), 4, (4, 3)),
        ((), 1, (1, 1)),
        ((3,), 1, (1, 3)),
        ((1,), 1, (1, 1)),
        ((1, 3, 1, 1), 1, (1, 3)),
        ((4, 3, 2, 2), 4, (4, 3, 2, 2)),
        ((3,), 4, (3,)),
        ((1, 2), 4, (1, 2)),
        ((1, 3, 1, 1), 4, (1, 3, 1, 1)),
    ],
)
def test_shapes_become_rows_where_that_is_clear(shape: tuple[int, ...], count: int, expected: tuple[int, ...]) -> None:
    values = torch.rand(shape)
    rows = as_rows(values, count)
    assert rows.shape == expected
    assert torch.equal(rows.flatten(), values.flatten())


@pytest.mark.parametrize("output", [2, -4, "2x", "logit", "0 "])
def test_an_output_that_is_not_there_is_refused(output: str | int) -> None:
    with pytest.raises(ModelError, match="returns 0 to 1; set 'output:'"):
        pick((K2, K3), output)
    with pytest.raises(ModelError, match="returns a, b; set 'output:'"):
        pick({"a": K2, "b": K3}, output)


class Then(nn.Module):
    """A network whose logits are handed on in some other form."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = pooled_linear()
        self.change = change

    def forward(self, images: Tensor) -> Any:
        return self.change(self.net(images))


def model(change: Callable[[Tensor], Any], **values: Any) -> Model:
    torch.manual_seed(4)
    return model_of(Then(change), patch_px=32, **values)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (lambda logits: {"logits": logits, "x": logits + 1}, {}),
        (lambda logits: (logits, logits[:, :1]), {"output": 0}),
        (lambda logits: {"a": logits + 1, "b": logits}, {"output": "b"}),
        (lambda logits: logits[:, :, None, None], {}),
    ],
)
def test_a_model_gives_the_logits_whatever_else_there_is(change: Callable[[Tensor], Any], values: Any) -> None:
    images = torch.rand(3, 3, 32, 32)
    plain, wrapped = model(lambda logits: logits), model(change, **values)
    assert torch.equal(plain.module(images), wrapped.module(images))
    assert named_layers(wrapped.module).keys() == named_layers(plain.module).keys()
    assert isinstance(wrapped.module, LogitsOf)


@pytest.mark.parametrize("squeeze", [lambda logits: logits[:, 0], lambda logits: logits[:, :1].squeeze()])
def test_a_single_logit_without_its_axis_has_one_class(squeeze: Callable[[Tensor], Any]) -> None:
    found = model(squeeze, activation="sigmoid", classes=["tumour"])
    expected = model(lambda logits: logits)
    for count in (1, 2, 5):
        images = torch.rand(count, 3, 32, 32)
        assert torch.equal(found.module(images), expected.module(images)[:, :1])


def test_multi_label_heads_have_their_classes() -> None:
    found = model(lambda logits: logits, activation="sigmoid", classes=["necrosis", "mitosis"])
    assert (found.classes, found.activation) == (("necrosis", "mitosis"), "sigmoid")


def test_two_heads_are_refused_and_either_can_be_chosen() -> None:
    with pytest.raises(ModelError, match=r"0 \(2 columns\), 1 \(1 columns\); choose with 'output:'"):
        model(lambda logits: (logits, logits[:, :1]))
    one = model(lambda logits: (logits, logits[:, :1]), output=1, activation="sigmoid")
    two = model(lambda logits: (logits, logits[:, :1]), output=0)
    assert (len(one.classes), len(two.classes)) == (1, 2)
    assert one.digest != two.digest
