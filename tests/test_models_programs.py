"""TorchScript files, exported programs and WSInfer folders: what they declare, and what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T

from tests.programs import FORMS, save_program, small
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import Model, load_model
from wsi_gradcam.models.spec import ModelSpec, read_spec


def images(count: int = 2, side: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(5))


def load(source: str, **values: Any) -> Model:
    return load_model(ModelSpec(**{"name": "toy", "source": source, "patch_px": 32, **values}))


def refused(source: str, **values: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(source, **values)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.fixture(params=["torchscript", "export"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A source and its file."""
    form = {"torchscript": "script", "export": "export"}[request.param]
    path = save_program(small(), images(), form, tmp_path)
    return f"{request.param}:{path}", path


def test_the_file_says_what_the_model_is(saved: tuple[str, Path]) -> None:
    source, path = saved
    model = load(source)
    assert torch.equal(model.module(images()), small()(images()))
    assert model.runs_code
    assert model.classes == ("0", "1")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load(source, sha256=digest).digest == model.digest
    assert f"has sha256 {digest}, expected {'0' * 64}" in refused(source, sha256="0" * 64)


@pytest.mark.parametrize("form", FORMS)
def test_the_parameters_are_those_of_the_network(form: str, tmp_path: Path) -> None:
    path = save_program(small(), images(), form, tmp_path)
    model = load(f"{'export' if path.suffix == '.pt2' else 'torchscript'}:{path}")
    assert sum(p.numel() for p in model.module.parameters()) == sum(p.numel() for p in small().parameters())
    assert not any(p.requires_grad for p in model.module.parameters())


def test_the_digest_is_of_the_content_wherever_it_lies(saved: tuple[str, Path], tmp_path: Path) -> None:
    source, path = saved
    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copy(path, tmp_path / "elsewhere" / f"other{path.suffix}"))
    kind = source.partition(":")[0]
    assert load(f"{kind}:{copy}").digest == load(source).digest
    first = load(source).digest
    form = {"torchscript": "trace", "export": "export"}[kind]
    assert load(f"{kind}:{save_program(small(seed=1), images(), form, tmp_path)}").digest != first


def test_files_lie_beside_the_model_file(saved: tuple[str, Path]) -> None:
    source, path = saved
    file = path.parent / "described.yaml"
    file.write_text(f"source: {source.partition(':')[0]}:{path.name}\npatch_px: 32\nclasses: [a, b]\n")
    assert load_model(str(file)).classes == ("a", "b")


@pytest.mark.parametrize("values", [{"weights": "w.pt"}, {"weights": "random"}])
def test_weights_from_elsewhere_are_refused(saved: tuple[str, Path], values: Any) -> None:
    assert "the weights are in the file; leave out 'weights:" in refused(saved[0], **values)


def test_a_missing_file_is_named(saved: tuple[str, Path]) -> None:
    source, path = saved
    path.unlink()
    assert f"{path} cannot be read: No such file" in refused(source)


@pytest.mark.parametrize("damage", ["empty", "half", "text", "middle"])
def test_a_damaged_file_is_a_clear_error(saved: tuple[str, Path], damage: str) -> None:
    source, path = saved
    raw = bytearray(path.read_bytes())
    if damage == "middle":
        raw[len(raw) // 4 : len(raw) // 2] = bytes(len(raw) // 2 - len(raw) // 4)
    content: Any = {"empty": b"", "half": raw[: len(raw) // 2], "text": b"hello", "middle": raw}[damage]
    path.write_bytes(content)
    message = refused(source)
    assert str(path) in message
    assert "damaged" in message


@pytest.mark.parametrize(
    ("channels", "words"), [(1, "takes images of 1 channel, but"), (4, "takes images of 4 channels, but")]
)
@pytest.mark.parametrize("form", ["script", "trace", "frozen", "export"])
def test_a_wrong_number_of_channels_is_named(channels: int, words: str, form: str, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    path = save_program(module, images(channels=channels), form, tmp_path)
    message = refused(f"{'export' if path.suffix == '.pt2' else 'torchscript'}:{path}")
    assert words in message
    assert "RGB" in message


def test_a_patch_size_that_the_program_cannot_take_is_named(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)).eval()
    script = save_program(module, images(), "script", tmp_path)
    message = refused(f"torchscript:{script}", patch_px=48)
    assert (
        "fails on a batch of shape (2, 3, 48, 48): RuntimeError: mat1 and mat2 shapes cannot be multiplied" in message
    )
    assert "patch_px" in message
    exported = save_program(module, images(), "export", tmp_path)
    assert "was exported for images of (32, 32) px, but would see (48, 48)" in refused(
        f"export:{exported}", patch_px=48
    )


def test_the_input_size_of_an_exported_program_is_known(tmp_path: Path) -> None:
    path = save_program(small(), images(side=40), "export", tmp_path)
    assert load_model(str(path)).patch_px == (40, 40)
    script = save_program(small(), images(), "script", tmp_path)
    with pytest.raises(ModelError, match="add 'patch_px: 224'"):
        load_model(str(script))


def test_a_program_may_see_less_than_the_patch(saved: tuple[str, Path]) -> None:
    model = load(saved[0], patch_px=96, transform={"resize": 40, "crop": 32})
    assert (model.patch_px, model.input_px) == ((96, 96), (32, 32))
    assert model.view == pytest.approx((4 * 96 / 40, 4 * 96 / 40, 32 * 96 / 40, 32 * 96 / 40))


class Training(nn.Module):
    """Dropout and batch normalisation that stay as they were when it was saved."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.conv, self.part, self.head = nn.Conv2d(3, 4, 3), part, nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.part(self.conv(images))
        return self.head(maps.mean(dim=(2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("part", [nn.Dropout(), nn.BatchNorm2d(4)], ids=["dropout", "batch norm"])
def test_a_program_left_in_training_mode(part: nn.Module, tmp_path: Path) -> None:
    module = Training(part).train()
    scripted = load(f"torchscript:{save_program(module, images(), 'script', tmp_path)}")
    assert torch.equal(scripted.module(images()), module.eval()(images()))  # the mode is a flag, so it is put right
    traced = save_program(module.train(), images(), "trace", tmp_path)
    message = refused(f"torchscript:{traced}")  # the mode is written into the program
    assert "random" in message or "training mode" in message


# Security: what is in a pickle stays there.


class Evil:
    """Unpickling it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


def replace_record(path: Path, name: str, content: bytes) -> None:
    """Another content for a file in an archive."""
    with zipfile.ZipFile(path) as archive:
        files = {info.filename: archive.read(info) for info in archive.infolist()}
    assert any(key.endswith(name) for key in files), list(files)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, value in files.items():
            archive.writestr(key, content if key.endswith(name) else value)


@pytest.mark.parametrize("wrap", [pickle.dumps, "torch"])
def test_objects_in_an_exported_program_are_not_made(wrap: Any, tmp_path: Path) -> None:
    path, touched = save_program(small(), images(), "export", tmp_path), tmp_path / "touched"
    if wrap == "torch":
        torch.save((Evil(touched),), tmp_path / "evil")
        content = (tmp_path / "evil").read_bytes()
    else:
        content = wrap(Evil(touched))
    replace_record(path, "data/sample_inputs/model.pt", content)
    assert "pickled objects (never loaded)" in refused(f"export:{path}")
    assert not touched.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011  # PyTorch would have made it, whatever it does then
        torch.export.load(path)
    assert touched.exists()


def test_pickled_weights_in_an_exported_program_are_not_made(tmp_path: Path) -> None:
    path, touched = save_program(small(), images(), "export", tmp_path), tmp_path / "touched"
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("model_weights_config.json")]
        config = json.loads(archive.read(name))
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    torch.save(Evil(touched), tmp_path / "evil")
    replace_record(path, "model_weights_config.json", json.dumps(config).encode())
    replace_record(path, first["path_name"], (tmp_path / "evil").read_bytes())
    assert "pickled objects (never loaded)" in refused(f"export:{path}")
    assert not touched.exists()


@pytest.mark.parametrize(
    "name", ["data/constants/opaque_obj_0", "data/constants/custom_obj_0", "data/aotinductor/m.so"]
)
def test_an_exported_program_with_other_things_in_it_is_refused_unread(name: str, tmp_path: Path) -> None:
    path = save_program(small(), images(), "export", tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{archive.namelist()[0].split('/')[0]}/{name}", b"x")
    message = refused(f"export:{path}")
    assert name in message
    assert "never loaded" in message


@pytest.mark.parametrize(
    "save", [lambda value, path: torch.save(value, path), lambda v, p: p.write_bytes(pickle.dumps(v))]
)
def test_a_pickled_model_is_no_torchscript(save: Callable[[object, Path], object], tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / "model.pt"
    save({"model": Evil(touched)}, path)
    assert "not a TorchScript program" in refused(f"torchscript:{path}")
    with pytest.raises(ModelError, match=r"is not a TorchScript program; weights alone need a model file \(\.yaml\)"):
        read_spec(str(path))
    assert not touched.exists()


# WSInfer


@pytest.fixture
def config(shared_data: Path) -> dict[str, Any]:
    """The configuration of a real model: patches of 350 px at 0.25 mpp, resized to 224."""
    path = shared_data / "wsinfer" / "wsinfer" / "config_breast-tumor-resnet34.tcga-brca.json"
    values: dict[str, Any] = json.loads(path.read_text())
    return values


def wsinfer_folder(folder: Path, config: Any, classes: int = 2, side: int = 224) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    save_program(small(classes), images(side=side), "trace", folder).rename(folder / "torchscript_model.pt")
    return folder


def test_a_folder_of_wsinfer_is_a_model_in_one_word(config: dict[str, Any], tmp_path: Path) -> None:
    folder = wsinfer_folder(tmp_path, config)
    model = load_model(str(folder))
    assert (model.name, model.source, model.runs_code) == (tmp_path.name, f"wsinfer:{folder}", True)
    assert (model.classes, model.activation) == (("Other", "Tumor"), "softmax")
    assert (model.patch_px, model.input_px, model.mpp) == ((350, 350), (224, 224), 0.25)
    assert (model.mean, model.std) == ((0.7238, 0.5716, 0.6779), (0.112, 0.1459, 0.1089))
    assert model.view == (0, 0, 350, 350)
    # As wsinfer.modellib does it: torchvision's transforms of a PIL image, by name.
    rng = np.random.default_rng(0)
    rgb = torch.from_numpy(rng.integers(0, 256, (3, 350, 350, 3), np.uint8))
    steps = [getattr(T, step["name"])(**step.get("arguments", {})) for step in config["transform"]]
    expected = torch.stack([T.Compose(steps)(Image.fromarray(patch.numpy())) for patch in rgb])
    assert torch.equal(model.prepare(rgb), expected)
    with torch.no_grad():
        assert torch.allclose(model.module(model.prepare(rgb)), small()(expected), atol=1e-6)
    assert model.digest == load_model(f"wsinfer:{folder}").digest


def test_the_configuration_is_part_of_the_digest(config: dict[str, Any], tmp_path: Path) -> None:
    first = load_model(str(wsinfer_folder(tmp_path, config))).digest
    config["transform"][0]["arguments"]["size"] = 192
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(str(tmp_path)).digest != first


def test_one_class_of_wsinfer_is_a_sigmoid(config: dict[str, Any], tmp_path: Path) -> None:
    folder = wsinfer_folder(tmp_path, {**config, "num_classes": 1, "class_names": ["Tumor"]}, classes=1)
    assert load_model(str(folder)).activation == "sigmoid"
    assert load_model(ModelSpec(name="m", source=f"wsinfer:{folder}", activation="none")).activation == "none"


def test_without_resize_and_normalize_the_patch_goes_in_as_it_is(config: dict[str, Any], tmp_path: Path) -> None:
    folder = wsinfer_folder(tmp_path, {**config, "transform": [{"name": "ToTensor"}], "patch_size_pixels": 32}, side=32)
    model = load_model(str(folder))
    assert (model.input_px, model.mean, model.std) == ((32, 32), (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("arguments", "input_px"),
    [
        ({"size": [192]}, (192, 192)),
        ({"size": [160, 128], "interpolation": 3, "antialias": True}, (160, 128)),
        ({"size": 96, "interpolation": "nearest", "max_size": None}, (96, 96)),
    ],
)
def test_all_ways_to_say_resize(arguments: Any, input_px: Any, config: dict[str, Any], tmp_path: Path) -> None:
    config["transform"][0]["arguments"] = arguments
    assert load_model(str(wsinfer_folder(tmp_path, config))).input_px == input_px


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"transform": [{"name": "Scale"}]}, "transform.0.name: should be 'Resize', 'ToTensor' or 'Normalize'"),
        ({"transform": [{"name": "Resize", "arguments": {"size": 224, "fill": 0}}]}, "Resize has no argument 'fill'"),
        ({"transform": [{"name": "ToTensor"}, {"name": "Resize"}]}, "expected Resize (optional), ToTensor, Normalize"),
        ({"transform": []}, "the transform steps (none) are not supported"),
        ({"num_classes": 3}, "num_classes is 3, but there are 2 class_names"),
        ({"class_names": ["a", "a"]}, "class_names should all differ"),
        ({"class_names": None}, "class_names"),
        ({"spacing_um_px": 0}, "spacing_um_px"),
        ({"spacing_um_px": float("inf")}, "spacing_um_px"),
        ({"patch_size_pixels": -1}, "patch_size_pixels"),
    ],
)
def test_a_configuration_that_cannot_be_right_is_refused(
    change: dict[str, Any], problem: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = wsinfer_folder(tmp_path, {**config, **change})
    message = refused(f"wsinfer:{folder}")
    assert message.startswith(f"{folder / 'config.json'}: not a WSInfer configuration: ")
    assert problem in message


@pytest.mark.parametrize(
    ("step", "arguments", "problem"),
    [
        (0, {"size": 0}, "greater than 0"),
        (0, {"size": "big"}, "size of Resize"),
        (0, {"size": 224, "interpolation": "cubic"}, "not supported"),
        (0, {"size": 224, "max_size": 300}, "not supported"),
        (2, {"mean": [0.5, 0.5], "std": [0.5] * 3}, "mean of Normalize should be three numbers"),
        (2, {"mean": [0.5] * 3, "std": [0.5, 0, 0.5]}, "std of Normalize should be three numbers"),
    ],
)
def test_arguments_that_cannot_be_right_are_refused(
    step: int, arguments: Any, problem: str, config: dict[str, Any], tmp_path: Path
) -> None:
    config["transform"][step]["arguments"] = arguments
    assert problem in refused(f"wsinfer:{wsinfer_folder(tmp_path, config)}")


def test_keys_that_wsinfer_does_not_know_are_tolerated(config: dict[str, Any], tmp_path: Path) -> None:
    folder = wsinfer_folder(tmp_path, {**config, "license": "Apache-2.0", "authors": ["x"], "spec_version": "1.1"})
    assert load_model(str(folder)).license == "Apache-2.0"


@pytest.mark.parametrize("text", ["", "[1]", "{", "null", '"x"'])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    assert str(tmp_path / "config.json") in refused(f"wsinfer:{wsinfer_folder(tmp_path, text)}")


@pytest.mark.parametrize("name", ["config.json", "torchscript_model.pt"])
def test_a_folder_that_lacks_a_file_is_refused(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    folder = wsinfer_folder(tmp_path, config)
    (folder / name).unlink()
    assert f"{folder / name} cannot be read: No such file" in refused(f"wsinfer:{folder}")
    with pytest.raises(ModelError, match=r"config\.json cannot be read|neither torchscript_model\.pt"):
        load_model(str(folder))


def test_a_model_file_may_read_other_patches_for_a_folder(config: dict[str, Any], tmp_path: Path) -> None:
    wsinfer_folder(tmp_path, config)
    (tmp_path / "m.yaml").write_text("source: 'wsinfer:.'\npatch_px: 700\nmpp: 0.125\n")
    model = load_model(str(tmp_path / "m.yaml"))
    assert (model.patch_px, model.input_px, model.mpp) == ((700, 700), (224, 224), 0.125)
