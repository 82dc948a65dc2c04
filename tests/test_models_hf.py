"""Folders as on the Hugging Face hub: the library's own logits and preprocessing, no pickles, no foreign code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from wsi_gradcam.errors import MissingExtraError, ModelError
from wsi_gradcam.models.load import Model, load_model
from wsi_gradcam.models.spec import ModelSpec, Resizing, read_spec


def load(folder: Path, **values: Any) -> Model:
    return load_model(ModelSpec(**{"name": "toy", "source": f"hf:{folder}", **values}))


def refused(folder: Path, **values: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_json(path: Path, **values: Any) -> None:
    """Set keys; None takes one away."""
    changed = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))


def picture(side: int, seed: int = 0) -> tuple[Tensor, Image.Image]:
    rgb = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return torch.from_numpy(rgb)[None], Image.fromarray(rgb)


# transformers

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViTImageProcessor", {"size": {"height": 64, "width": 64}}),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}}),
    "convnext large": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    "bit": ("BitImageProcessor", {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}),
    "odd": ("BitImageProcessor", {"size": {"shortest_edge": 75}, "crop_size": {"height": 64, "width": 64}}),
    "efficientnet": ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}}),
    "offset": (
        "EfficientNetImageProcessor",
        {"size": {"height": 64, "width": 64}, "rescale_offset": True, "rescale_factor": 1 / 127.5},
    ),
    "no rescale": ("ViTImageProcessor", {"size": {"height": 64, "width": 64}, "do_rescale": False}),
}


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the extra 'hf' is not installed")


@pytest.fixture
def folder(transformers: Any, tmp_path: Path) -> Path:
    """A tiny untrained ResNet with three named classes, as save_pretrained writes it."""
    return save(transformers, "ResNet", tmp_path, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])


def save(transformers: Any, kind: str, folder: Path, processor: str = "vit", **values: Any) -> Path:
    torch.manual_seed(1)
    labels = {"id2label": {0: "stroma", 1: "tumour", 2: "necrosis"}}
    config = getattr(transformers, f"{kind}Config")(**{**labels, **values})
    network = transformers.AutoModelForImageClassification.from_config(config)
    for name, value in network.named_parameters():
        if "classifier" in name:
            torch.nn.init.normal_(value)  # so that logits differ
    bars = transformers.utils.logging
    bars.disable_progress_bar()
    network.save_pretrained(folder)
    bars.enable_progress_bar()
    name, arguments = PROCESSORS[processor]
    getattr(transformers, name)(**arguments).save_pretrained(folder)
    return folder


def by_transformers(transformers: Any, folder: Path, image: Image.Image) -> tuple[Tensor, Tensor]:
    """What the library itself makes of a picture: the network's input, and the logits."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    network = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return pixels, network(pixels).logits


SMALL: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "ConvNext": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "ViT": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 64,
    },
    "Swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 64},
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_folder_of_transformers_gives_its_logits(kind: str, transformers: Any, tmp_path: Path) -> None:
    save(transformers, kind, tmp_path, **SMALL[kind])
    model = load_model(str(tmp_path))
    assert (model.source, model.runs_code) == (f"hf:{tmp_path}", False)
    assert (model.classes, model.patch_px, model.input_px) == (("stroma", "tumour", "necrosis"), (64, 64), (64, 64))
    rgb, image = picture(64)
    pixels, logits = by_transformers(transformers, tmp_path, image)
    torch.testing.assert_close(model.prepare(rgb), pixels, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.module(model.prepare(rgb)), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_patches_of_another_size_are_treated_as_the_processor_does(
    processor: str, transformers: Any, tmp_path: Path
) -> None:
    save(transformers, "ResNet", tmp_path, processor, **SMALL["ResNet"])
    model = load(tmp_path, patch_px=90)
    rgb, image = picture(90)
    pixels, logits = by_transformers(transformers, tmp_path, image)
    assert pixels.shape[2:] == model.input_px
    torch.testing.assert_close(model.prepare(rgb), pixels, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.module(model.prepare(rgb)), logits, atol=1e-4, rtol=1e-4)


def test_patches_of_the_input_are_neither_resized_nor_cropped(transformers: Any, tmp_path: Path) -> None:
    save(transformers, "ResNet", tmp_path, "bit", **SMALL["ResNet"])
    model = load(tmp_path)
    assert (model.patch_px, model.input_px, model.view) == ((64, 64), (64, 64), (0, 0, 64, 64))
    assert model.transform.resize_px is None
    # They are what the processor cuts out of a patch of 72 px without resizing it.
    rgb, image = picture(72)
    pixels, _ = by_transformers(transformers, tmp_path, image)
    torch.testing.assert_close(model.prepare(rgb[:, 4:68, 4:68]), pixels, atol=1e-5, rtol=1e-5)


def test_the_specification_goes_first(folder: Path) -> None:
    model = load(folder, patch_px=80, transform=Resizing(crop=64), mean=[0.1] * 3, classes=["a", "b", "c"])
    assert (model.input_px, model.transform.resize_px, model.mean) == ((64, 64), None, (0.1, 0.1, 0.1))
    assert (model.classes, model.std) == (("a", "b", "c"), (0.5, 0.5, 0.5))


def test_a_problem_with_many_labels_is_a_sigmoid(transformers: Any, tmp_path: Path) -> None:
    save(transformers, "ResNet", tmp_path, problem_type="multi_label_classification", **SMALL["ResNet"])
    assert load(tmp_path).activation == "sigmoid"
    assert load(tmp_path, activation="softmax").activation == "softmax"


def test_classes_of_one_name_are_told_apart(transformers: Any, tmp_path: Path) -> None:
    save(transformers, "ResNet", tmp_path, id2label={0: "crane", 1: "b", 2: "crane"}, **SMALL["ResNet"])
    assert load(tmp_path).classes == ("crane (0)", "b", "crane (2)")


def test_the_checksum_is_of_the_weights(folder: Path) -> None:
    assert "has sha256" in refused(folder, sha256="0" * 64)


def test_loading_says_nothing_and_leaves_settings_alone(
    transformers: Any, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = transformers.utils.logging
    before = (log.get_verbosity(), log.is_progress_bar_enabled())
    load(folder)
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_missing_are_not_left_untrained(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = {key: value for key, value in load_file(path).items() if "classifier" not in key}
    save_file(state, path, metadata={"format": "pt"})
    message = refused(folder)
    assert "the weights do not fit: 2 missing or of another shape: classifier" in message


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    change_json(folder / "config.json", id2label={"0": "a", "1": "b"})
    assert str(folder) in refused(folder)


def test_code_in_a_folder_is_not_run(folder: Path) -> None:
    touched = folder / "touched"
    (folder / "own.py").write_text(f"from pathlib import Path\nPath({str(touched)!r}).touch()\n")
    change_json(
        folder / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"},
    )
    assert "transformers cannot load it as an image classifier" in refused(folder)
    assert not touched.exists()


def test_pickled_weights_are_not_even_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "no *.safetensors in" in refused(folder)
    with pytest.raises(ModelError, match=r"nor \*\.safetensors \(Hugging Face\) lies beside config\.json"):
        read_spec(str(folder))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": None, "architectures": None}, "neither a timm 'architecture' nor a transformers 'model_type'"),
        ({"model_type": "bert"}, "cannot load it as an image classifier"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantised weights"),
    ],
)
def test_a_folder_that_is_no_classifier_is_refused(change: dict[str, Any], problem: str, folder: Path) -> None:
    change_json(folder / "config.json", **change)
    assert problem in refused(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refused(folder)


def test_without_a_processor_the_colours_must_be_said(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    assert "so its normalisation is unknown" in refused(folder, patch_px=64)
    model = load(folder, patch_px=64, mean=[0.5] * 3, std=[0.2] * 3)
    assert (model.mean, model.std) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def test_a_processor_that_does_more_is_refused(transformers: Any, tmp_path: Path) -> None:
    save(transformers, "ResNet", tmp_path, **SMALL["ResNet"])
    transformers.MobileViTImageProcessor(size={"shortest_edge": 72}, crop_size=64).save_pretrained(tmp_path)
    assert "MobileViTImageProcessor does more than resize, crop and normalise" in refused(tmp_path)


def test_the_extra_is_named_where_transformers_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"not installed: pip install 'wsi-gradcam\[hf\]'"):
        load_model(read_spec(str(folder)))


@pytest.mark.parametrize("weights", ["w.pt", "random"])
def test_weights_from_elsewhere_are_refused(weights: str, folder: Path) -> None:
    assert "the weights are in the folder" in refused(folder, weights=weights)


def test_the_digest_tells_the_weights_and_the_processor(folder: Path) -> None:
    first = load(folder).digest
    change_json(folder / "preprocessor_config.json", image_mean=[0.4, 0.5, 0.5])
    second = load(folder).digest
    state = load_file(folder / "model.safetensors")
    state["classifier.1.bias"] += 1e-4
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert len({first, second, load(folder).digest}) == 3


# timm


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    """A tiny timm network with two outputs, as timm's push_to_hf_hub writes it."""
    torch.manual_seed(2)
    network = timm.create_model("test_convnext", num_classes=2)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": "test_convnext",
        "num_classes": 2,
        "pretrained_cfg": {
            "input_size": [3, 64, 64],
            "crop_pct": 0.9,
            "crop_mode": "center",
            "interpolation": "bicubic",
            "mean": [0.4, 0.5, 0.6],
            "std": [0.2, 0.3, 0.1],
            "num_classes": 2,
            "label_names": ["other", "tumour"],
            "license": "apache-2.0",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def by_timm(folder: Path, image: Image.Image) -> tuple[Tensor, Tensor]:
    config = json.loads((folder / "config.json").read_text())
    arguments = config.get("model_args", {})
    network = timm.create_model(config["architecture"], num_classes=config["num_classes"], **arguments).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    data: Any = timm.data
    pixels = data.create_transform(**data.resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"]))(image)[None]
    with torch.no_grad():
        return pixels, network(pixels)


def test_a_folder_of_timm_gives_its_logits(timm_folder: Path) -> None:
    model = load_model(str(timm_folder))
    assert (model.classes, model.license, model.runs_code) == (("other", "tumour"), "apache-2.0", False)
    assert (model.patch_px, model.input_px) == ((64, 64), (64, 64))
    rgb, image = picture(71)  # 64 / 0.9: timm resizes nothing and cuts out the middle
    pixels, logits = by_timm(timm_folder, image)
    torch.testing.assert_close(model.prepare(rgb[:, 4:68, 4:68]), pixels, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.module(pixels), logits)


@pytest.mark.parametrize(
    "change", [{}, {"interpolation": "bilinear", "crop_pct": 1.0}, {"crop_mode": "squash"}, {"crop_pct": 0.5}]
)
def test_patches_of_another_size_are_treated_as_timm_does(change: dict[str, Any], timm_folder: Path) -> None:
    config = json.loads((timm_folder / "config.json").read_text())
    change_json(timm_folder / "config.json", pretrained_cfg={**config["pretrained_cfg"], **change})
    model = load(timm_folder, patch_px=100)
    rgb, image = picture(100)
    pixels, logits = by_timm(timm_folder, image)
    torch.testing.assert_close(model.prepare(rgb), pixels, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.module(model.prepare(rgb)), logits, atol=1e-4, rtol=1e-4)


def test_arguments_of_a_timm_model_are_used(timm_folder: Path) -> None:
    network = timm.create_model("test_convnext", num_classes=2, depths=(1, 1, 1, 1))
    save_file(network.state_dict(), timm_folder / "model.safetensors")
    assert " missing: " in refused(timm_folder) or " unexpected: " in refused(timm_folder)
    change_json(timm_folder / "config.json", model_args={"depths": [1, 1, 1, 1]})
    assert load(timm_folder).classes == ("other", "tumour")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda f: change_json(f / "config.json", architecture="resnet1"),
            "the installed timm has no architecture 'resnet1'",
        ),
        (lambda f: change_json(f / "config.json", num_classes=3), "outputs, the network 3"),
        (lambda f: change_json(f / "config.json", model_args={"nonsense": 1}), "nonsense"),
        (lambda f: (f / "config.json").write_text("[]"), "expected a mapping"),
        (lambda f: (f / "config.json").write_text("{"), "not a JSON file"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"x" * 100),
            "weights, but its *.safetensors have only 100 bytes",
        ),
        (lambda f: (f / "model.safetensors").rename(f / "x.bin"), "no *.safetensors"),
    ],
)
def test_a_damaged_folder_of_timm_is_a_clear_error(
    damage: Callable[[Path], object], problem: str, timm_folder: Path
) -> None:
    damage(timm_folder)
    message = refused(timm_folder)
    assert problem in message
    assert str(timm_folder) in message


def test_several_weights_are_not_chosen_from(timm_folder: Path) -> None:
    (timm_folder / "a.safetensors").write_bytes((timm_folder / "model.safetensors").read_bytes())
    load(timm_folder)
    (timm_folder / "model.safetensors").rename(timm_folder / "b.safetensors")
    assert "2 *.safetensors and none called model.safetensors" in refused(timm_folder)
