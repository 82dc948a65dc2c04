"""A network that Python code holds explains slides as a model file does, in the process that holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests import toy_models
from tests.runs import CLASSES, SMALL, Heatmap, toy_spec
from tests.synthetic import MarkerSlide, write_marker_slide
from wsi_gradcam import explain, load_model, model_of
from wsi_gradcam.api import preview
from wsi_gradcam.errors import ConfigError, ResumeError
from wsi_gradcam.models.load import Model


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> MarkerSlide:
    folder = tmp_path_factory.mktemp("slide")
    return write_marker_slide(folder / "a.tif", 300, 400, mpp=0.25, markers=[(100, 200)], marker_px=16)


def network() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return toy_models.pooled_linear()


def live(module: Any = None, **changes: Any) -> Model:
    values = {"mean": [0.0] * 3, "std": [1.0] * 3, "patch_px": 32, "mpp": 0.5, "classes": CLASSES, "layer": "features"}
    return model_of(module or network(), **{**values, **changes})


def test_it_gives_what_the_model_file_gives(slide: MarkerSlide, tmp_path: Path) -> None:
    explain(slide.path, live(name="mine"), tmp_path / "live", **SMALL)
    explain(slide.path, toy_spec("pooled_linear"), tmp_path / "file", **SMALL)
    found, expected = (Heatmap(tmp_path / run / "a.tif") for run in ("live", "file"))
    for label in expected.labels:
        np.testing.assert_array_equal(found.level(0, label), expected.level(0, label))
    run = yaml.safe_load((tmp_path / "live/run.yaml").read_text())
    assert run["model"]["name"] == "mine"
    assert run["model"]["source"].startswith("live:")


def test_a_run_is_continued_with_the_same_weights_only(slide: MarkerSlide, tmp_path: Path) -> None:
    explain(slide.path, live(), tmp_path, **SMALL)
    (again,) = explain(slide.path, live(), tmp_path, **SMALL).records
    assert again.skipped
    trained = network()
    with torch.no_grad():
        trained.fc.bias += 1
    with pytest.raises(ResumeError, match="another model"):
        explain(slide.path, live(trained), tmp_path, **SMALL)


def test_a_model_that_was_loaded_before_can_be_given(slide: MarkerSlide, tmp_path: Path) -> None:
    (record,) = explain(slide.path, load_model(toy_spec("pooled_linear")), tmp_path, **SMALL).records
    assert record.status == "ok"


def test_it_can_be_previewed(slide: MarkerSlide, tmp_path: Path) -> None:
    (estimate,) = preview(slide.path, live(), tmp_path, **SMALL).estimates
    assert estimate.patches == 35
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"workers": 1}, "a loaded model exists only in this process; for workers, give what they can load themselves"),
        ({"scheduler": "tcp://127.0.0.1:1"}, "a loaded model exists only in this process"),
        ({"patch_px": 64}, "patch_px of a loaded model is fixed; pass it to load_model or model_of"),
    ],
)
def test_what_it_cannot_do_is_refused(slide: MarkerSlide, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        explain(slide.path, live(), tmp_path, **{**SMALL, **options})
    assert not list(tmp_path.iterdir())
