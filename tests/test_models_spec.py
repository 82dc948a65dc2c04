"""Model files: what they say is what is used, and what cannot be right is refused on one line."""

from __future__ import annotations

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
        ({"classes": ["a", "a"]}, "differ from each other"),
        ({"classes": "tumour"}, "classes"),
        ({"classes": [False, True]}, "quote them"),
        ({"classes": ["a", None]}, "None is no name"),
        ({"patch_px": 0}, "patch_px"),
        ({"patch_px": [224]}, "patch_px"),
        ({"patch_px": -224}, "(given: -224)"),
        ({"mpp": 0}, "mpp"),
        ({"mpp": float("inf")}, "mpp"),
        ({"mpp": float("nan")}, "mpp"),
        ({"mean": [0.5, 0.5]}, "mean"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean"),
        ({"std": [0.1, 0.1, 0]}, "std.2"),
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


@pytest.mark.parametrize("source", ["timm:resnet18", "torchvision:vgg16", "my_package.models:build"])
def test_a_source_alone_is_a_specification(source: str) -> None:
    assert read_spec(source) == ModelSpec(name=source, source=source)


def test_bundled_models_are_known_by_name() -> None:
    assert bundled()
    for name in bundled():
        spec = read_spec(name)
        assert spec.name == name
        assert spec.weights_path is not None
        assert spec.weights_path.is_file()


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    message = refused("resnet18")
    assert all(name in message for name in [*bundled(), "timm:NAME", ".yaml"])


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
