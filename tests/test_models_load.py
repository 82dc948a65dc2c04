"""Loading: weights that fit and are the right ones, no code from pickles, a digest that says what was loaded."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.toy_models import other_linear, pooled_linear
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import IMAGENET_MEAN, IMAGENET_STD, Model, load_model
from wsi_gradcam.models.spec import ModelSpec, bundled

SOURCE = "tests.toy_models:pooled_linear"
State = dict[str, Tensor]


def spec(folder: Path = Path(), **values: Any) -> ModelSpec:
    return ModelSpec(**{"name": "toy", "source": SOURCE, "patch_px": 32, "folder": folder, **values})


@pytest.fixture(scope="module")
def state() -> State:
    """Weights of a `pooled_linear` that are not those it begins with."""
    torch.manual_seed(123)
    return other_linear().state_dict()


def save(path: Path, value: object) -> Path:
    if path.suffix == ".safetensors":
        assert isinstance(value, dict)
        save_file(value, path)
    else:
        torch.save(value, path)
    return path


def same_weights(model: Model, state: State) -> bool:
    found = model.module.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def refused(given: ModelSpec) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(given)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_weights_come_from_the_file(name: str, state: State, tmp_path: Path) -> None:
    save(tmp_path / name, state)
    assert same_weights(load_model(spec(tmp_path, weights=name)), state)
    assert not same_weights(load_model(spec()), state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model_state_dict": state},
        lambda state: {"module." + name: value for name, value in state.items()},
        lambda state: {"state_dict": {"module." + name: value for name, value in state.items()}},
    ],
    ids=["state_dict", "model", "model_state_dict", "module.", "nested module."],
)
def test_checkpoints_of_training_scripts_are_understood(
    wrap: Callable[[State], object], state: State, tmp_path: Path
) -> None:
    save(tmp_path / "w.pt", wrap(state))
    assert same_weights(load_model(spec(tmp_path, weights="w.pt")), state)


def test_a_prefix_in_safetensors_is_understood(state: State, tmp_path: Path) -> None:
    save(tmp_path / "w.safetensors", {"module." + name: value for name, value in state.items()})
    assert same_weights(load_model(spec(tmp_path, weights="w.safetensors")), state)


class Wrapped(nn.Module):
    """A network whose own part is called `module`, as DataParallel's is."""

    def __init__(self) -> None:
        super().__init__()
        self.module = pooled_linear()

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.module(images)
        return output


def wrapped() -> nn.Module:
    return Wrapped()


def test_a_network_with_a_part_called_module_keeps_its_names(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = Wrapped().state_dict()
    save(tmp_path / "w.pt", state)
    given = spec(tmp_path, weights="w.pt", source=f"{__name__}:wrapped")
    assert same_weights(load_model(given), state)


class Evil:
    """Unpickling it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("plain", [True, False], ids=["pickle", "torch"])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_code_in_a_pickle_does_not_run(plain: bool, suffix: str, tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / f"evil{suffix}"
    evil = {"fc.weight": Evil(touched)}
    path.write_bytes(pickle.dumps(evil)) if plain else torch.save(evil, path)
    message = refused(spec(tmp_path, weights=path.name))
    assert "objects in pickles are never loaded" in message
    assert not touched.exists()
    pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)
    assert touched.exists()  # it would have


@pytest.mark.parametrize(
    "value",
    [[1, 2], {"a": 1}, {"state_dict": {"a": [1]}}, {1: torch.ones(1)}, torch.ones(3), None],
    ids=["list", "numbers", "nested", "numbered", "tensor", "none"],
)
def test_what_is_no_state_dict_is_refused(value: object, tmp_path: Path) -> None:
    save(tmp_path / "w.pt", value)
    assert "w.pt: expected a state dict of tensors, found a" in refused(spec(tmp_path, weights="w.pt"))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript:UserWarning")
def test_a_torchscript_file_is_no_state_dict(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(pooled_linear(), torch.zeros(1, 3, 32, 32)), tmp_path / "w.pt")  # type: ignore[no-untyped-call]
    assert "not a plain state dict" in refused(spec(tmp_path, weights="w.pt"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(["w.pt", "old.pt", "w.safetensors"]))
def test_a_damaged_file_is_a_model_error_and_nothing_else(
    data: st.DataObject, name: str, state: State, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "old.pt":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        save(path, state)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 400) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw) - 1)))])
    message = str(path)
    try:
        load_model(spec(tmp_path, weights=name))
    except ModelError as error:
        message = str(error)
    assert str(path) in message


def test_the_checksum_is_checked(state: State, tmp_path: Path) -> None:
    path = save(tmp_path / "w.safetensors", state)
    true = hashlib.sha256(path.read_bytes()).hexdigest()
    assert same_weights(load_model(spec(tmp_path, weights=path.name, sha256=true.upper())), state)
    message = refused(spec(tmp_path, weights=path.name, sha256="0" * 64))
    assert all(part in message for part in (str(path), true, "0" * 64, "download the right file"))


def test_a_wrong_checksum_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"nonsense")
    assert "has sha256" in refused(spec(tmp_path, weights="w.pt", sha256="0" * 64))


@pytest.mark.parametrize("name", ["none.safetensors", "none.pt", ".", "sub/none.pt"])
def test_missing_weights_are_refused(name: str, tmp_path: Path) -> None:
    assert f"no weights file {tmp_path / name}" in refused(spec(tmp_path, weights=name))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: {**state, "extra": torch.ones(1)}, "extra"),
        (lambda state: {name: value for name, value in state.items() if name != "fc.bias"}, "fc.bias"),
        (lambda state: {**state, "fc.weight": torch.ones(3, 12)}, "the checkpoint has 3 outputs, the network 2"),
        (
            lambda state: {"a": torch.ones(1)},
            "none of its names occurs in the network: it has a, expected features.0.weight",
        ),
    ],
    ids=["extra", "missing", "size", "other"],
)
def test_weights_of_another_network_are_refused(
    change: Callable[[State], State], problem: str, state: State, tmp_path: Path
) -> None:
    path = save(tmp_path / "w.safetensors", change(state))
    message = refused(spec(tmp_path, weights="w.safetensors"))
    assert f"{path} does not fit {SOURCE}" in message
    assert problem in message


def test_class_names_must_be_as_many_as_outputs() -> None:
    assert load_model(spec(classes=["a", "b"])).classes == ("a", "b")
    assert "3 classes are named, but the model has 2 outputs" in refused(spec(classes=["a", "b", "c"]))


def test_classes_without_names_are_numbered() -> None:
    assert load_model(spec()).classes == ("0", "1")


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("tests.toy_models:wrong_shape", r"returns shape (2, 2, 15, 15) for a batch of 2, expected (2, classes)"),
        (f"{__name__}:maps", "returns a tuple, expected a tensor of shape (batch, classes)"),
        (
            "tests.toy_models:not_a_module",
            "not_a_module() does not return a network; expected a function that returns a",
        ),
        (f"{__name__}:flattened", "returns shape (4,)"),
        (f"{__name__}:averaged", "returns shape (1, 2) for a batch of 2"),
        (f"{__name__}:choosy", "fails on a batch of shape (2, 3, 32, 32): ValueError: only gray"),
    ],
)
def test_a_network_with_another_output_is_refused(source: str, problem: str) -> None:
    assert problem in refused(spec(source=source))


class Fail(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise ValueError("only gray")


def choosy() -> nn.Module:
    return Fail()


class Averaged(Wrapped):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mean(dim=0, keepdim=True)


def averaged() -> nn.Module:
    return Averaged()


class Maps(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return images, None


def maps() -> nn.Module:
    return Maps()


def flattened() -> nn.Module:
    return nn.Sequential(pooled_linear(), nn.Flatten(0))


def test_an_unknown_input_size_is_refused_with_the_mend() -> None:
    assert "add 'patch_px: 224'" in refused(spec(patch_px=None))


@pytest.mark.parametrize("device", ["cuda:77", "gpu", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ModelError, match="try --device cpu"):
        load_model(spec(), device)


def test_a_loaded_network_is_frozen_and_in_evaluation_mode() -> None:
    module = load_model(spec()).module
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


def conv(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def gray() -> nn.Module:
    return conv(1)


def four() -> nn.Module:
    return conv(4)


@pytest.mark.parametrize(("source", "words"), [("gray", "images of 1 channel, but"), ("four", "images of 4 channels,")])
def test_a_network_of_other_channels_is_refused(source: str, words: str) -> None:
    message = refused(spec(source=f"{__name__}:{source}"))
    assert words in message
    assert "patches are RGB" in message


@pytest.mark.parametrize("where", ["features.0.weight", "fc.bias"])
def test_weights_that_are_no_numbers_are_refused(where: str, state: State, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in state.items()}
    state[where].view(-1)[1] = float("nan")
    save(tmp_path / "w.pt", state)
    message = refused(spec(tmp_path, weights="w.pt"))
    assert f"1 of {state[where].numel()} values of {where} are NaN" in message


def left_training() -> nn.Module:
    """Dropout and batch normalisation, as training left them."""
    torch.manual_seed(7)
    parts = [nn.Conv2d(3, 8, 8), nn.BatchNorm2d(8), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = nn.Sequential(*parts, nn.Linear(8, 2))
    network(torch.rand(16, 3, 32, 32))
    return network.train()


def test_a_network_left_in_training_mode_is_put_right() -> None:
    images = torch.rand(4, 3, 32, 32)
    found = load_model(spec(source=f"{__name__}:left_training")).module(images)
    assert torch.equal(found, left_training().eval()(images))
    assert not torch.allclose(found, left_training()(images))


class InBatches(Wrapped):
    """Says of an image something else in other company."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images - images.mean(dim=0))


def in_batches() -> nn.Module:
    return InBatches()


def test_a_network_whose_answer_depends_on_the_batch_is_refused() -> None:
    assert "answers differently for an image alone and in a batch" in refused(spec(source=f"{__name__}:in_batches"))


def halved() -> nn.Module:
    return pooled_linear().half()


def test_weights_of_half_precision_become_float32() -> None:
    module = load_model(spec(source=f"{__name__}:halved")).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("weights", [None, "random"])
def test_a_checksum_without_a_file_is_refused(weights: str | None) -> None:
    assert "sha256 is that of a weights file, but there is no 'weights:'" in refused(
        spec(source="timm:resnet18", weights=weights, sha256="0" * 64)
    )


def test_normalisation_is_the_formula() -> None:
    model = load_model(spec(mean=[0.7, 0.5, 0.6], std=[0.1, 0.2, 0.3]))
    rgb = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = model.prepare(rgb)
    assert (found.dtype, found.shape) == (torch.float32, (2, 3, 4, 5))
    for b, y, x, c in np.ndindex(2, 4, 5, 3):
        expected = (int(rgb[b, y, x, c]) / 255 - model.mean[c]) / model.std[c]
        assert float(found[b, c, y, x]) == pytest.approx(expected, abs=1e-5)


def test_colours_of_0_to_255_go_in_as_they_are() -> None:
    rgb = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    model = load_model(spec(scale=255))
    assert torch.equal(model.prepare(rgb), rgb.permute(0, 3, 1, 2).float())
    assert load_model(spec(scale=255, mean=[128] * 3, std=[64] * 3)).prepare(rgb).abs().max() <= 2


def test_patches_are_resized_and_cropped_as_the_model_file_says() -> None:
    model = load_model(spec(patch_px=[100, 80], transform={"resize": 40, "crop": 32}))
    assert (model.patch_px, model.input_px) == ((100, 80), (32, 32))
    rgb = torch.randint(0, 256, (2, 100, 80, 3), dtype=torch.uint8)
    assert model.module(model.prepare(rgb)).shape == (2, 2)
    assert model.view == pytest.approx((9 * 2.0, 4 * 2.0, 64, 64))


def test_without_a_word_normalisation_is_imagenets() -> None:
    model = load_model(spec())
    assert (model.mean, model.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_bundled_models_load_with_their_checksums() -> None:
    for name in bundled():
        assert load_model(name).classes


# The digest: results are continued only where it is the same.


def test_the_digest_is_stable() -> None:
    assert load_model(spec()).digest == load_model(spec(name="other name", license="MIT", layer="features")).digest


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.5, 0.5, 0.5]},
        {"std": [0.5, 0.5, 0.5]},
        {"mpp": 0.25},
        {"patch_px": 40},
        {"classes": ["a", "b"]},
        {"activation": "none"},
        {"scale": 255.0},
        {"transform": {"resize": 40}},
        {"transform": {"crop": 24}},
        {"transform": {"resize": 40, "interpolation": "bicubic"}},
        {"source": "tests.toy_models:other_linear"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_tells_what_changes_results(change: dict[str, Any]) -> None:
    assert load_model(spec(**change)).digest != load_model(spec()).digest


def test_the_digest_tells_one_weight(state: State, tmp_path: Path) -> None:
    changed = {name: value.clone() for name, value in state.items()}
    changed["features.2.weight"][3, 2, 1, 0] += 1e-6
    digests = set()
    for i, values in enumerate((state, changed)):
        save(tmp_path / f"{i}.safetensors", values)
        digests.add(load_model(spec(tmp_path, weights=f"{i}.safetensors")).digest)
    assert len(digests) == 2


def test_the_digest_is_the_same_from_either_file_format(state: State, tmp_path: Path) -> None:
    digests = {
        load_model(spec(tmp_path, weights=save(tmp_path / name, state).name)).digest
        for name in ("w.pt", "w.safetensors")
    }
    assert len(digests) == 1


def test_untrained_weights_are_the_same_in_every_process() -> None:
    code = f"""if True:
        import torch
        from wsi_gradcam.models.load import load_model
        from wsi_gradcam.models.spec import ModelSpec
        torch.manual_seed(99)
        print(load_model(ModelSpec(name="toy", source={SOURCE!r}, patch_px=32), trust_code=True).digest)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch.rand(7)
    assert load_model(spec()).digest == done.stdout.strip()


def test_untrained_weights_are_the_same_in_threads_that_load_at_once() -> None:
    loaded = spec()
    with ThreadPoolExecutor(4) as pool:
        digests = {model.digest for model in pool.map(lambda _: load_model(loaded), range(16))}
    assert digests == {load_model(loaded).digest}


def test_loading_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    load_model(spec())
    assert torch.equal(torch.rand(3), expected)


def test_the_softmax_of_one_output_is_refused() -> None:
    spec = ModelSpec(
        name="one", source="torchvision:resnet18", weights="random", classes=("tumour",), patch_px=(32, 32)
    )
    with pytest.raises(ModelError, match="activation: sigmoid"):
        load_model(spec)
    assert load_model(spec.model_copy(update={"activation": "sigmoid"})).classes == ("tumour",)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("ihc-dab", "17e16e93e7117357d28f897496b91722831e6ebfc43b509c3c2aed3d3d6f54fc"),
        ("oral-tumour", "2c4b7dc68f1401631b2854ff7e754b0cb7a22d35b3f8b8daaa52ed8651e3d8e6"),
    ],
)
def test_bundled_models_keep_their_digests(name: str, digest: str) -> None:
    """Every character of `zoo/nets.py` counts: after a change, results that were made before cannot be continued."""
    assert load_model(name).digest == digest
