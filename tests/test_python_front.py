"""What Python users try first works, or says what is wanted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import wsi_gradcam
from tests.made_results import Made, make, steps
from wsi_gradcam.errors import ConfigError, LayerError, ModelError, UnknownNameError
from wsi_gradcam.models.load import model_of
from wsi_gradcam.models.spec import ModelSpec, bundled, read_spec
from wsi_gradcam.results.run import Result, open_result
from wsi_gradcam.run.settings import make_settings


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    made = Made((500, 700), steps((32, 44)))
    return open_result(make(tmp_path_factory.mktemp("made") / "out", {"a.svs": made, "in/b.svs": made}))


def test_the_package_lists_its_public_names() -> None:
    assert dir(wsi_gradcam) == sorted(wsi_gradcam.__all__)
    assert all(hasattr(wsi_gradcam, name) for name in dir(wsi_gradcam))


def test_slides_are_had_by_id_and_by_number(result: Result) -> None:
    assert [result[i].id for i in (0, 1, -1, np.int64(1))] == ["a.svs", "in/b.svs", "in/b.svs", "in/b.svs"]  # type: ignore[index]
    assert result.heatmap("tumour", 1).equals(result["in/b.svs"].heatmap("tumour"))
    with pytest.raises(UnknownNameError, match="no slide 2; there are 2, counted from 0"):
        _ = result[2]
    for wrong in (None, 1.0, True, slice(1)):
        with pytest.raises(UnknownNameError, match="expected its id or its number"):
            _ = result[wrong]  # type: ignore[index]
    with pytest.raises(UnknownNameError, match=r"did you mean a\.svs"):
        _ = result["a.sv"]


def test_channels_are_had_by_label_class_number_and_as_they_are(result: Result) -> None:
    slide = result[0]
    for channel in slide.channels:
        expected = slide.heatmap(channel.label)
        assert slide.heatmap(channel).equals(expected)
        assert slide.heatmap(channel.number).equals(expected)
        assert slide.heatmap(channel.number - len(slide.channels)).equals(expected)
        assert result[1].channel(channel) == result[1].channel(channel.label)
    with pytest.raises(UnknownNameError, match="no channel 3; there are 3, counted from 0"):
        slide.heatmap(3)
    with pytest.raises(UnknownNameError, match="no channel None; expected its label, its class or its number"):
        slide.heatmap(None)  # type: ignore[arg-type]


def test_a_layer_is_a_name_or_the_module_itself() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    images = torch.randn(2, 3, 16, 16)
    named, given = (wsi_gradcam.GradCAM(net, layer, engine="eager", precision="float32") for layer in ("0", net[0]))
    assert torch.equal(named(images, 1).cams, given(images, 1).cams)
    assert model_of(net, patch_px=16, layer=net[1]).layer == "1"
    for wrong in (nn.ReLU(), 7, [net[0]]):
        with pytest.raises(LayerError, match=r"expected a name of its named_modules\(\)"):
            wsi_gradcam.GradCAM(net, wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected the name of a module"):
        make_settings(layer=net[0])


def test_names_of_models_and_keys_are_suggested(tmp_path: Path) -> None:
    for wrong in ("oral-tumor", "oral_tumour", "Oral-Tumour", "ihc_dab"):
        with pytest.raises(ModelError, match=f"did you mean ({'|'.join(bundled())})"):
            read_spec(wrong)
    for key in ("clases", "patch_size", "Layer", "sorce", "activtion"):
        path = tmp_path / "m.yaml"
        path.write_text(f"source: timm:resnet18\n{key}: 1\n", encoding="utf-8")
        with pytest.raises(ModelError, match=f"{key}: unknown key, check the spelling: did you mean") as caught:
            read_spec(str(path))
        assert str(caught.value).split("did you mean ")[1].split("?")[0].split(" or ")[0] in ModelSpec.model_fields
    with pytest.raises(ConfigError, match="overlp: unknown key, check the spelling: did you mean overlap"):
        make_settings(overlp=0.5)
