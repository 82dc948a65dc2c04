"""The stain that a model file asks for: its forms, its target, and that results depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.runs import toy_file, toy_spec
from tests.test_tissue_stain import OTHER, concentrations, stained
from tests.toy_models import marker
from wsi_gradcam.cli.output import model_info
from wsi_gradcam.errors import ModelError
from wsi_gradcam.models.load import load_model, model_of
from wsi_gradcam.models.spec import ModelSpec, read_spec
from wsi_gradcam.tissue.stain import PUBLISHED, Macenko, Reinhard, measure

STAINS = {"stains": [[0.65, 0.7, 0.29], [0.22, 0.93, 0.3]], "concentrations": [1.4, 0.8]}
LAB = {"mean": [60.0, 20.0, -10.0], "std": [15.0, 8.0, 5.0]}


def target_of(stain: Any) -> Any:
    return load_model(toy_spec("marker", stain=stain)).stain


def refused(stain: Any) -> str:
    from wsi_gradcam.models.spec import _validated

    with pytest.raises(ModelError) as caught:
        _validated({"name": "m", "source": "timm:resnet18", "stain": stain}, Path(), "m.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("m.yaml: stain")
    return message


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "reference.png"
    Image.fromarray(stained(concentrations(), OTHER.stains).reshape(100, 200, 3)).save(path)
    return path


@pytest.mark.parametrize("stain", [None, "none", {"method": "none"}])
def test_none_is_none(stain: Any) -> None:
    assert ModelSpec(name="m", source="timm:resnet18", stain=stain).stain is None


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_method_alone_has_a_published_target(method: str) -> None:
    assert target_of(method) == target_of({"method": method}) == PUBLISHED[method]


def test_numbers_are_taken_as_given() -> None:
    assert target_of({"method": "macenko", "target": STAINS}) == OTHER
    assert target_of({"method": "reinhard", "target": LAB}) == Reinhard((60.0, 20.0, -10.0), (15.0, 8.0, 5.0))


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_picture_beside_the_model_file_is_measured(picture: Path, method: str) -> None:
    file = toy_file(picture.parent, "marker", stain={"method": method, "target": picture.name})
    found = load_model(file).stain
    assert found == measure(np.asarray(Image.open(picture)).reshape(-1, 3), method)
    if isinstance(found, Macenko):
        np.testing.assert_allclose(found.stains, OTHER.stains, atol=0.04)


def test_a_large_picture_is_measured_on_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsi_gradcam.models.staining.MEASURED_PX", 6000)
    rgb = stained(concentrations(), OTHER.stains)
    Image.fromarray(rgb.reshape(100, 200, 3)).save(tmp_path / "a.png")
    file = toy_file(tmp_path, "marker", stain={"method": "reinhard", "target": "a.png"})
    assert load_model(file).stain == measure(rgb[::4], "reinhard")


def test_another_stain_is_another_model(picture: Path) -> None:
    digests = [
        load_model(toy_spec("marker", folder=picture.parent, stain=stain)).digest
        for stain in (
            None,
            "macenko",
            "reinhard",
            {"method": "macenko", "target": STAINS},
            {"method": "macenko", "target": picture.name},
        )
    ]
    assert len(set(digests)) == 5
    assert load_model(toy_spec("marker", stain="none")).digest == digests[0]
    assert load_model(toy_spec("marker", stain={"method": "macenko"})).digest == digests[1]


def test_another_picture_of_the_same_name_is_another_model(picture: Path) -> None:
    spec = toy_spec("marker", folder=picture.parent, stain={"method": "reinhard", "target": picture.name})
    before = load_model(spec).digest
    Image.fromarray(stained(concentrations() * 1.2, OTHER.stains).reshape(100, 200, 3)).save(picture)
    assert load_model(spec).digest != before


def test_networks_in_python_code_have_one_too() -> None:
    values: dict[str, Any] = {"patch_px": 32, "mpp": 0.5}
    model = model_of(marker(), stain="macenko", **values)
    assert model.stain == PUBLISHED["macenko"]
    assert model.digest != model_of(marker(), **values).digest


def test_info_shows_it(tmp_path: Path) -> None:
    plain = model_info(str(toy_file(tmp_path, "marker")), None)
    assert plain["stain"] == "as it is"
    info = model_info(str(toy_file(tmp_path, "marker", stain={"method": "reinhard", "target": LAB})), None)
    assert info["stain"] == "reinhard, to mean [60.0, 20.0, -10.0], std [15.0, 8.0, 5.0]"


@pytest.mark.parametrize(
    ("stain", "message"),
    [
        ("macenco", "stain.method: should be 'none', 'macenko' or 'reinhard' (given: 'macenco')"),
        ({"target": "a.png"}, "stain.method: Field required"),
        ({"method": "macenko", "targets": "a.png"}, "stain.targets: unknown key, check the spelling"),
        ({"method": "none", "target": "a.png"}, "method none takes no target"),
        ({"method": "macenko", "target": LAB}, "the target's keys are not those of macenko: stains, concentrations"),
        ({"method": "reinhard", "target": STAINS}, "the target's keys are not those of reinhard: mean, std"),
        ({"method": "macenko", "target": {"stains": STAINS["stains"]}}, "concentrations: Field required"),
        ({"method": "macenko", "target": {**STAINS, "stains": [[0.6, 0.7, 0.3], [0.3, 0.35, 0.15]]}}, "two different"),
        ({"method": "macenko", "target": {**STAINS, "stains": [[0, 0, 0], [0.3, 0.35, 0.15]]}}, "two different"),
        ({"method": "macenko", "target": {**STAINS, "stains": [[-0.1, 0.7, 0.3], [0.3, 0.3, 0.1]]}}, "greater than"),
        ({"method": "macenko", "target": {**STAINS, "concentrations": [0, 1]}}, "greater than 0"),
        ({"method": "reinhard", "target": {**LAB, "std": [10, 0, 5]}}, "greater than 0"),
        ({"method": "reinhard", "target": {**LAB, "mean": [float("nan"), 0, 5]}}, "finite number"),
        ({"method": "reinhard", "target": {**LAB, "mean": [150, 0, 5]}}, "less than or equal to 100"),
        ({"method": "reinhard", "target": 3}, "stain.target"),
        (7, "stain"),
    ],
)
def test_what_cannot_be_meant_is_refused(stain: Any, message: str) -> None:
    assert message in refused(stain)


def test_an_unusable_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(name: str) -> str:
        with pytest.raises(ModelError) as caught:
            load_model(toy_spec("marker", folder=tmp_path, stain={"method": "macenko", "target": name}))
        assert str(tmp_path / name) in str(caught.value)
        return str(caught.value)

    assert "no such stain target; paths are relative to the model file" in message("missing.png")
    (tmp_path / "text.png").write_text("not a picture")
    assert "not an image (UnidentifiedImageError)" in message("text.png")
    rgb = stained(concentrations(), OTHER.stains).reshape(100, 200, 3)
    Image.fromarray(rgb).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:20_000])
    assert "not an image" in message("cut.png")
    Image.fromarray(rgb).convert("L").save(tmp_path / "gray.png")
    assert "200 x 100 px, L; expected 8-bit RGB" in message("gray.png")
    Image.fromarray(np.full_like(rgb, 250)).save(tmp_path / "glass.png")
    assert "no target for macenko: only 0 of 20000 pixels are stained" in message("glass.png")
    monkeypatch.setattr("wsi_gradcam.models.staining.MAX_TARGET_PX", 10_000)
    assert "of at most 10000 px" in message("good.png")


def test_a_model_file_says_it_in_one_word(tmp_path: Path) -> None:
    file = toy_file(tmp_path, "marker", stain="macenko")
    assert "stain: macenko" in file.read_text(encoding="utf-8")
    spec = read_spec(str(file))
    assert spec.stain is not None
    assert (spec.stain.method, spec.stain.target) == ("macenko", None)
