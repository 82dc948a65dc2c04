"""Checkpoints as people have them: nested, prefixed, of wrapped networks, with more in them than weights."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.programs import save_program, small
from tests.toy_models import pooled_linear
from wsi_gradcam import GradCAM
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import Model, load_model, model_of
from wsi_gradcam.models.spec import ModelSpec, read_spec

State = dict[str, Tensor]


class Deep(nn.Module):
    """A backbone of some depth with batch normalisation, and a head."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.fc = nn.Linear(6, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(images)).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def deep() -> nn.Module:
    return Deep()


class Wrapping(nn.Module):
    """A network that holds the one that was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Deep()

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)  # type: ignore[no-any-return]


def wrapping() -> nn.Module:
    return Wrapping()


def compiled() -> nn.Module:
    network = Deep()
    network.block = torch.compile(network.block)  # type: ignore[assignment]
    return torch.compile(network)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(11)
    network = Deep()
    network(torch.randn(16, 3, 32, 32))  # moves the statistics
    return network.state_dict()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def load(folder: Path, name: str = "w.pt", **values: Any) -> Model:
    given = {"name": "toy", "source": f"{__name__}:deep", "patch_px": 32, "weights": name, "folder": folder, **values}
    return load_model(ModelSpec(**{key: value for key, value in given.items() if value is not None}).trusting())


def holds(model: Model, state: State) -> bool:
    found = model.module.state_dict()
    return all(torch.equal(found[name], value) for name, value in state.items())


PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.",
    "net.",
    "model._orig_mod.",
    "backbone.",
    "classifier.0.network.",
    "stem.",  # the name of one of its own parts
    "fc.",
    "weird-name.7.",
]
NESTINGS: list[Callable[[State], Any]] = [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    lambda s: {"model_state_dict": s},
    lambda s: {"state_dict_ema": s, "epoch": 1},
    lambda s: {"model": s, "args": {"lr": 0.1}},
    lambda s: {"net": s, "acc": 0.9},
    lambda s: {"weights": s},
    lambda s: {"params": s},
    lambda s: {"ema": {"model": s}},
    lambda s: {"checkpoint": {"ema": {"shadow": s}}},
    lambda s: {"teacher": s},
    lambda s: {"my_own_key": s, "epoch": torch.tensor(3)},
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", ["pt", "ckpt", "safetensors"])
def test_one_prefix_is_stripped_and_told(prefix: str, form: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"w.{form}"
    given = prefixed(prefix, state)
    if form == "safetensors":
        save_file(given, path)
    else:
        torch.save({"state_dict": given} if form == "ckpt" else given, path)
    model = load(tmp_path, path.name)
    assert holds(model, state)
    plain = prefix.replace("_orig_mod.", "")
    assert not plain or any(repr(plain) in note for note in model.notes)


@pytest.mark.parametrize("nest", NESTINGS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_nested_state_dicts_are_found(nest: Callable[[State], Any], prefix: str, state: State, tmp_path: Path) -> None:
    torch.save(nest(prefixed(prefix, state)), tmp_path / "w.pt")
    assert holds(load(tmp_path), state)


def test_digests_are_those_of_the_plain_weights(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"state_dict": prefixed("model.", state)}, tmp_path / "lightning.ckpt")
    plain = load(tmp_path, "plain.pt")
    assert load(tmp_path, "lightning.ckpt").digest == plain.digest
    assert plain.notes == ()


def test_wrappers_inside_a_name_are_left_out(state: State, tmp_path: Path) -> None:
    given = {name.replace("stem.", "stem._orig_mod."): value for name, value in state.items()}
    torch.save({"state_dict": prefixed("model.", given)}, tmp_path / "w.pt")
    assert holds(load(tmp_path), state)


def test_a_head_beside_the_backbone(state: State, tmp_path: Path) -> None:
    given = {name if name.startswith("fc") else f"backbone.{name}": value for name, value in state.items()}
    torch.save({"state_dict": given}, tmp_path / "w.pt")
    assert holds(load(tmp_path), state)


def test_parts_in_dicts_of_their_own(state: State, tmp_path: Path) -> None:
    parts: dict[str, State] = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    torch.save(parts, tmp_path / "w.pt")
    assert holds(load(tmp_path), state)


def test_a_network_that_wraps_the_one_that_was_saved(state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": prefixed("model.", state)}, tmp_path / "w.pt")
    assert holds(load(tmp_path, source=f"{__name__}:wrapping"), prefixed("encoder.", state))


def test_what_lies_beside_the_prefix_is_left_out_and_named(state: State, tmp_path: Path) -> None:
    more = {"criterion.weight": torch.ones(2), "train_acc.total": torch.tensor(3)}
    torch.save({"state_dict": {**prefixed("model.", state), **more}}, tmp_path / "w.pt")
    model = load(tmp_path)
    assert holds(model, state)
    assert any("not used" in note and "criterion.weight, train_acc.total" in note for note in model.notes)


@pytest.mark.parametrize(
    ("make", "chosen", "unused"),
    [
        (lambda a, b: {"model_ema": b, "model": a}, "model", "model_ema"),
        (lambda a, b: {"state_dict_ema": b, "state_dict": a}, "state_dict", "state_dict_ema"),
        (lambda a, b: {"ema": {"model": b}, "net": a}, "net", "ema.model"),
        (lambda a, b: {"state_dict": {**prefixed("ema_model.", b), **prefixed("model.", a)}}, "model", "ema_model"),
        (lambda a, b: {"state_dict": {**prefixed("net.ema.", b), **prefixed("net.", a)}}, "net", "net.ema"),
        (lambda a, b: {"best": b, "state_dict": a}, "state_dict", "best"),
    ],
)
def test_plain_weights_are_taken_before_averages(
    make: Callable[[State, State], Any], chosen: str, unused: str, state: State, tmp_path: Path
) -> None:
    torch.save(make(state, other(state)), tmp_path / "w.pt")
    model = load(tmp_path)
    assert holds(model, state)
    (note,) = [note for note in model.notes if "also holds" in note]
    assert chosen in note.split("also holds")[0]
    assert unused in note.split("also holds")[1]


def test_of_two_that_may_be_meant_none_is_guessed(state: State, tmp_path: Path) -> None:
    torch.save({"first": state, "second": other(state)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="contains several sets of weights that fit, first and second; save only"):
        load(tmp_path)
    torch.save({"first": state, "second": dict(state)}, tmp_path / "w.pt")
    assert holds(load(tmp_path), state)


def test_old_checkpoints_lack_the_counters_of_training_steps(state: State, tmp_path: Path) -> None:
    old = OrderedDict((k, v) for k, v in state.items() if "num_batches_tracked" not in k)
    for prefix in ("", "module."):
        torch.save(prefixed(prefix, old), tmp_path / "w.pt")
        assert holds(load(tmp_path), old)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "w.pt")
    assert load(tmp_path).module.state_dict()["fc.weight"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("fc")},
            ["2 missing: fc.weight, fc.bias", "no trained head"],
        ),
        (
            lambda s: {k.replace("fc.", "head."): v for k, v in s.items()},
            ["2 missing: fc.weight, fc.bias", "2 unexpected: head.weight, head.bias"],
        ),
        (
            lambda s: prefixed("model.", {k.replace("fc.", "head."): v for k, v in s.items()}),
            ["2 missing: fc.weight, fc.bias", "unexpected: model.head.weight, model.head.bias"],
        ),
        (
            lambda s: {**s, "stem.0.weight": torch.ones(4, 3, 7, 7)},
            ["1 of another shape: stem.0.weight (4, 3, 7, 7) for (4, 3, 3, 3)"],
        ),
        (lambda s: {"conv.weight": torch.ones(3)}, ["none of its names occurs in the network", "it has conv.weight"]),
        (
            lambda s: {**s, "fc.weight": torch.ones(5, 6), "fc.bias": torch.ones(5)},
            ["the checkpoint has 5 outputs, the network 2"],
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[State], State], words: list[str], state: State, tmp_path: Path
) -> None:
    torch.save({"state_dict": change(state)}, tmp_path / "w.pt")
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_another_number_of_classes_is_told_in_these_words(state: State, tmp_path: Path) -> None:
    import timm

    weights = timm.create_model("resnet10t", num_classes=5).state_dict()
    torch.save({"state_dict": prefixed("model.", weights)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="the checkpoint has 5 outputs, the model file lists 3 classes"):
        load(tmp_path, source="timm:resnet10t", classes=["a", "b", "c"])
    with pytest.raises(ModelError, match="the checkpoint has 5 outputs, the network 1000; list the 5 classes"):
        load(tmp_path, source="timm:resnet10t")


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (Path("x"), "pathlib."),
        (np.float64(0.5), "multiarray.scalar"),
        (Deep(), "Deep"),
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_the_object_in_a_pickle_that_is_refused_is_named(
    extra: object, name: str, new: bool, state: State, tmp_path: Path
) -> None:
    torch.save({"state_dict": state, "extra": extra}, tmp_path / "w.pt", _use_new_zipfile_serialization=new)
    with pytest.raises(ModelError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert name in message
    assert "objects in pickles are never loaded" in message
    assert "safetensors.torch.save_file(model.state_dict()" in message


def test_compiled_networks_are_unwrapped(state: State, tmp_path: Path) -> None:
    torch.save(prefixed("_orig_mod.", state), tmp_path / "w.pt")
    model = load(tmp_path, source=f"{__name__}:compiled")
    assert list(model.module.state_dict()) == list(state)
    assert holds(model, state)


def _parallel_of_compiled(network: nn.Module) -> nn.Module:
    return nn.DataParallel(cast(nn.Module, torch.compile(network)))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, _parallel_of_compiled])
def test_live_networks_are_unwrapped(wrap: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(3)
    plain = pooled_linear().eval()
    images = torch.randn(2, 3, 32, 32)
    found = GradCAM(wrap(plain), layer="features")(images)
    assert torch.equal(found.cams, GradCAM(plain, layer="features")(images).cams)
    assert model_of(wrap(plain), name="n", patch_px=32).digest == model_of(plain, name="n", patch_px=32).digest


@pytest.mark.parametrize("form", ["script", "export-dynamic"])
@pytest.mark.parametrize("folder", ["", "sub/"])
def test_a_source_that_is_a_file_works_as_on_the_command_line(form: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    images = torch.randn(2, 3, 32, 32)
    path = save_program(small(), images, form, tmp_path / folder)
    (tmp_path / "m.yaml").write_text(f"source: {folder}{path.name}\npatch_px: 32\n", encoding="utf-8")
    model = load_model(read_spec(str(tmp_path / "m.yaml")), trust_code=True)
    assert torch.allclose(model.module(images), small()(images), atol=1e-5)
    assert model.digest == load_model(read_spec(str(path)).model_copy(update={"patch_px": (32, 32)}).trusting()).digest


def test_a_source_that_is_a_missing_file_or_weights_alone_is_refused(state: State, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("source: net.pt\npatch_px: 32\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"no file .*net\.pt; paths are relative to the model file"):
        read_spec(str(tmp_path / "m.yaml"))
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(ModelError, match="is not a TorchScript program; weights alone need a model file"):
        read_spec(str(tmp_path / "m.yaml"))
