"""Model files: what they say is what is used, and what cannot be right is refused on one line."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.spec import ModelSpec, bundled, read_spec

FULL = {
    "name": "oral",
    "source": "timm:resnet18",
    "weights": "oral.safetensors",
    "sha256": "a" * 64,
    "classes": ["other", "tumour"],
    "patch_px": [224, 192],
    "mpp": 0.5,
    "mean": [0.7, 0.55, 0.7],
    "std": [0.15, 0.18, 0.15],
    "scale": 1.0,
    "stain": {"method": "macenko", "target": "reference.png"},
    "transform": {"resize": 256, "crop": [224, 192], "interpolation": "bicubic"},
    "output": "logits",
    "layer": "layer4",
    "activation": "sigmoid",
    "license": "Apache-2.0",
    "provenance": {"data": ["a", 1]},
}


def write(folder: Path, values: object) -> Path:
    path = folder / "model.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def refused(path: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        read_spec(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_key_of_a_model_file_arrives(tmp_path: Path) -> None:
    spec = read_spec(str(write(tmp_path, FULL)))
    assert spec.model_dump(mode="json") == FULL
    assert spec.folder == tmp_path
    assert set(FULL) | {"folder"} == set(ModelSpec.model_fields)


def test_weights_lie_beside_the_model_file(tmp_path: Path) -> None:
    assert read_spec(str(write(tmp_path, FULL))).weights_path == tmp_path / "oral.safetensors"
    assert read_spec(str(write(tmp_path, {**FULL, "weights": "/w/x.pt"}))).weights_path == Path("/w/x.pt")
    assert read_spec(str(write(tmp_path, {**FULL, "weights": "random"}))).weights_path is None


def test_the_name_is_the_files_unless_given(tmp_path: Path) -> None:
    assert read_spec(str(write(tmp_path, {"source": "timm:resnet18"}))).name == "model"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"patch_px": 224}, (224, 224)), ({"patch_px": [10, 20]}, (10, 20))],
)
def test_a_square_patch_needs_one_number(given: dict[str, Any], expected: tuple[int, int], tmp_path: Path) -> None:
    assert read_spec(str(write(tmp_path, {**FULL, **given}))).patch_px == expected


def test_class_names_may_look_like_numbers(tmp_path: Path) -> None:
    assert read_spec(str(write(tmp_path, {**FULL, "classes": [0, 1.5, "x"]}))).classes == ("0", "1.5", "x")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"clases": ["a"]}, "clases: unknown key, check the spelling"),
        ({"folder": "/elsewhere"}, "folder: unknown key"),
        ({1: 2}, "1"),
        ({"classes": []}, "class names must be given"),
        ({"classes": ["a", "a"]}, "each one different"),
        ({"classes": "tumour"}, "classes"),
        ({"classes": [False, True]}, "quote them"),
        ({"classes": ["a", None]}, "None is not a name"),
        ({"patch_px": 0}, "patch_px"),
        ({"patch_px": [224]}, "patch_px"),
        ({"patch_px": -224}, "(given: -224)"),
        ({"mpp": 0}, "mpp"),
        ({"mpp": float("inf")}, "mpp"),
        ({"mpp": float("nan")}, "mpp"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean"),
        ({"std": [0.1, 0.1, 0]}, "std.2"),
        ({"scale": 0}, "scale"),
        ({"mean": [0.5, 1.5, 0.5]}, "less than or equal to 1"),
        ({"scale": 255, "mean": [178, 256, 178], "std": [30, 30, 30]}, "less than or equal to 255"),
        ({"transform": {"resise": 3}}, "transform.resise: unknown key"),
        ({"transform": {"interpolation": "cubic"}}, "transform.interpolation"),
        ({"transform": {"crop_rounds": False}}, "transform.crop_rounds: unknown key"),
        ({"sha256": "a" * 63}, "sha256"),
        ({"activation": "relu"}, "activation"),
        ({"source": ""}, "source"),
        ({"name": ""}, "name"),
    ],
)
def test_what_cannot_be_right_is_refused_by_key(change: dict[Any, Any], problem: str, tmp_path: Path) -> None:
    path = write(tmp_path, {**FULL, **change})
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert problem in message


def test_a_missing_source_is_named_without_repeating_the_file(tmp_path: Path) -> None:
    message = refused(write(tmp_path, {"provenance": "x" * 1000}))
    assert "source: Field required" in message
    assert len(message) < 300


@pytest.mark.parametrize("text", ["", "just words", "- a\n- b", "a: [", "a: b: c", "\t- x", "null"])
def test_what_is_no_mapping_is_no_model_file(text: str, tmp_path: Path) -> None:
    assert "model.yaml: " in refused(write(tmp_path, text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a YAML file" in refused(tmp_path / "model.yaml")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    path = write(tmp_path, f"source: !!python/object/apply:os.mkdir ['{made}']\n")
    assert "not a YAML file" in refused(path)
    assert not made.exists()
    yaml.unsafe_load(path.read_text())
    assert made.exists()  # it would have


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in refused(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("source", "kind", "runs_code"),
    [
        ("timm:resnet18", "timm", False),
        ("torchvision:vgg16", "torchvision", False),
        ("torchscript:m.pt", "torchscript", True),
        ("export:m.pt2", "export", True),
        ("wsinfer:folder", "wsinfer", True),
        ("hf:folder", "hf", False),
        ("my_package.models:build", "function", True),
    ],
)
def test_a_source_alone_is_a_specification(source: str, kind: str, runs_code: bool) -> None:
    spec = read_spec(source)
    assert spec == ModelSpec(name=source, source=source)
    assert (spec.kind, spec.runs_code) == (kind, runs_code)
    assert spec.argument == (source if kind == "function" else source.partition(":")[2])


def test_colours_of_0_to_255_have_a_scale(tmp_path: Path) -> None:
    spec = read_spec(str(write(tmp_path, {**FULL, "scale": 255, "mean": [178, 140, 178], "std": [38, 46, 38]})))
    assert (spec.scale, spec.mean) == (255, (178, 140, 178))


def archive(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ts", ".torchscript"])
def test_a_torchscript_archive_is_known_by_what_is_in_it(suffix: str, tmp_path: Path) -> None:
    path = archive(tmp_path / f"net{suffix}", "net/data.pkl", "net/constants.pkl", "net/code/__torch__.py")
    spec = read_spec(str(path))
    assert (spec.name, spec.source, spec.source_path) == ("net", f"torchscript:{path}", path)


def test_an_exported_program_is_known_by_its_ending(tmp_path: Path) -> None:
    path = archive(tmp_path / "net.pt2", "x")
    assert read_spec(str(path)).source == f"export:{path}"


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_weights_alone_are_no_model(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    message = refused(tmp_path / "w.pt")
    assert "is not a TorchScript program" in message
    assert "'weights: w.pt'" in message


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["config.json", "torchscript_model.pt"], "wsinfer"),
        (["config.json", "model.safetensors"], "hf"),
        (["config.json", "model-00001-of-00002.safetensors"], "hf"),
        (["config.json", "torchscript_model.pt", "model.safetensors"], "wsinfer"),
    ],
)
def test_a_folder_is_known_by_what_is_in_it(files: list[str], kind: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    spec = read_spec(str(tmp_path))
    assert (spec.name, spec.source) == (tmp_path.name, f"{kind}:{tmp_path}")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([], "the folder has no config.json, so it is not a model"),
        (["model.safetensors"], "the folder has no config.json, so it is not a model"),
        (["config.json", "pytorch_model.bin"], "weights in pickles (.bin, .pt, .pth) are not loaded"),
    ],
)
def test_a_folder_without_a_model_says_what_is_missing(files: list[str], problem: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).touch()
    message = refused(tmp_path)
    assert message.startswith(f"{tmp_path}: ")
    assert problem in message


def test_the_folder_one_stands_in_is_a_model_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert (read_spec(".").name, read_spec(".").source) == (tmp_path.name, "hf:.")


def test_bundled_models_are_known_by_name() -> None:
    assert bundled()
    for name in bundled():
        spec = read_spec(name)
        assert spec.name == name
        assert spec.weights_path is not None
        assert spec.weights_path.is_file()


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    message = refused("resnet18")
    forms = ["timm:NAME", "torchvision:NAME", "torchscript:FILE", "export:FILE", "wsinfer:FOLDER", "hf:FOLDER"]
    assert all(name in message for name in [*bundled(), *forms, "module:function", ".yaml"])


@given(st.text(max_size=8))
def test_whatever_is_typed_is_a_specification_or_a_model_error(text: str) -> None:
    try:
        told = read_spec(text).source
    except ModelError as error:
        told = str(error)
    assert text in told or text in bundled()


@pytest.mark.parametrize("values", [{"mean": [178, 140, 178]}, {"std": [38, 46, 38]}, {"std": [0, 0.1, 0.1]}])
def test_colours_of_0_to_255_are_refused(values: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"source": "a:b", **values}))
    with pytest.raises(ModelError, match=r"less than or equal to 1|greater than 0"):
        read_spec(str(path))
