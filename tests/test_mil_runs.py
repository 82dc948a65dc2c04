"""Runs of slide-level models: the chain down to the pixel is the gradient of the slide's answer, on any executor."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from torch import Tensor, nn

from tests import toy_models
from tests.doomed import CHANGES, is_by_clock
from tests.runs import SMALL, contents, rows_of, start, stored, toy_values
from tests.synthetic import MarkerSlide, corrupt_tile, write_marker_slide
from wsi_gradcam.api import explain, validate
from wsi_gradcam.errors import ConfigError, ModelError
from wsi_gradcam.results.run import open_result
from wsi_gradcam.slides import open_slide, read_region

FEATURES, VALUES, HIDDEN = 12, 8, 6
CLASSES = ("normal", "tumour")
BAG: dict[str, Any] = {**SMALL, "method": "gradcam,hirescam", "bag_method": "gradient_x_input,one_removed"}


def state() -> dict[str, Tensor]:
    """The state dict of a gated attention MIL, untrained."""
    random = torch.Generator().manual_seed(3)
    sizes = {
        "patch_embed.0": (VALUES, FEATURES),
        "global_attn.attention_a.0": (HIDDEN, VALUES),
        "global_attn.attention_b.0": (HIDDEN, VALUES),
        "global_attn.attention_c": (1, HIDDEN),
        "classifier": (2, VALUES),
    }
    layers: dict[str, Tensor] = {}
    for name, (outputs, inputs) in sizes.items():
        layers[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random) * 2 / inputs**0.5
        layers[f"{name}.bias"] = torch.randn(outputs, generator=random) / 3
    return layers


def answer(layers: dict[str, Tensor], features: Tensor) -> Tensor:
    """The logits of a bag, in plain torch on the names of the state dict."""

    def linear(name: str, x: Tensor) -> Tensor:
        return nn.functional.linear(x, layers[f"{name}.weight"].double(), layers[f"{name}.bias"].double())

    values = linear("patch_embed.0", features).relu()
    gated = linear("global_attn.attention_a.0", values).tanh() * linear("global_attn.attention_b.0", values).sigmoid()
    weights = linear("global_attn.attention_c", gated).softmax(dim=0)
    return linear("classifier", (weights * values).sum(dim=0))


def write_model(folder: Path, **changes: Any) -> Path:
    """A model file of a slide-level model, with its weights beside it."""
    folder.mkdir(exist_ok=True)
    torch.save(state(), folder / "abmil.pt")
    encoder = {key: value for key, value in toy_values("encoder").items() if key not in ("name", "classes")}
    values = {
        "name": "toy slides",
        "encoder": encoder,
        "aggregator": {"source": "abmil", "weights": "abmil.pt"},
        "classes": list(CLASSES),
        **changes,
    }
    path = folder / "slides.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> MarkerSlide:
    """A small slide, all tissue, of 6 x 8 patches."""
    folder = tmp_path_factory.mktemp("slide")
    return write_marker_slide(folder / "whole.tif", 360, 500, mpp=0.25, markers=[(100, 200)], marker_px=16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide-level model."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def out(slide: MarkerSlide, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its results."""
    out = tmp_path_factory.mktemp("run") / "out"
    outcome = explain(slide.path, model, out, trust_code=True, **BAG)
    assert [record.status for record in outcome.records] == ["ok"], outcome.records
    return out


def patches(slide: MarkerSlide, folder: Path) -> Tensor:
    """All patches of a slide as the encoder sees them."""
    opened = open_slide(slide.path)
    try:
        rgb = [read_region(opened, y, x, 32, 32, 0.5) for x, y in stored(folder, "xy").tolist()]
    finally:
        opened.close()
    return torch.from_numpy(np.stack(rgb)).permute(0, 3, 1, 2).float() / 255


def test_the_chain_is_the_gradient_of_the_slides_answer(slide: MarkerSlide, out: Path) -> None:
    """What each patch's map is made of equals one graph over the whole bag."""
    folder = out / "whole.tif"
    torch.manual_seed(0)
    encoder = toy_models.encoder().eval()
    maps = encoder.features(patches(slide, folder)).detach().double().requires_grad_()  # type: ignore[operator]
    features = maps.mean(dim=(2, 3))
    logits = answer(state(), features)
    found = stored(folder, "cam")
    for number in range(2):
        (gradient,) = torch.autograd.grad(logits[number], maps, retain_graph=True)
        gradcam = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1)
        hirescam = (gradient * maps).sum(dim=1)
        for at, expected in ((number, gradcam.detach()), (2 + number, hirescam.detach())):
            np.testing.assert_allclose(found[:, at], expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    table = pq.read_table(folder / "patches.parquet").to_pandas()
    for number, name in enumerate(CLASSES):
        (weights,) = torch.autograd.grad(logits[number], features, retain_graph=True)
        relevance = (weights * features).sum(dim=1).detach().numpy()
        scale = np.abs(relevance).max()
        np.testing.assert_allclose(table[f"gradient_x_input_relevance_{name}"], relevance, atol=1e-5 * scale, rtol=0)
        # The encoder ends in global average pooling: the mean of a patch's map is its relevance.
        np.testing.assert_allclose(table[f"cam_mean_{name}"], relevance, atol=1e-5 * scale, rtol=0)


def test_the_slide_has_its_answer_in_the_table(slide: MarkerSlide, out: Path) -> None:
    """Logits and probabilities of the slide are columns of slides.csv."""
    torch.manual_seed(0)
    features = toy_models.encoder().eval()(patches(slide, out / "whole.tif")).detach().double()
    logits = answer(state(), features)
    row = rows_of(out)["whole.tif"]
    shares = logits.softmax(dim=0)
    for number, name in enumerate(CLASSES):
        assert float(row[f"slide_logit_{name}"]) == pytest.approx(float(logits[number]), rel=1e-4)
        assert float(row[f"slide_probability_{name}"]) == pytest.approx(float(shares[number]), rel=1e-4)
    alone = answer(state(), features[:1])
    table = pq.read_table(out / "whole.tif" / "patches.parquet").to_pandas()
    assert table["logit_tumour"][0] == pytest.approx(float(alone[1]), rel=1e-4)
    assert table["attention"].sum() == pytest.approx(1, abs=1e-5)


def test_the_heatmap_shows_relevance_and_attention(out: Path) -> None:
    """They are channels, with one value a patch."""
    result = open_result(out)["whole.tif"]
    labels = [channel.label for channel in result.channels]
    assert labels == [
        *(f"{method}: {name}" for method in ("gradcam", "hirescam") for name in CLASSES),
        *(f"probability: {name}" for name in CLASSES),
        *(f"relevance: {name}" for name in CLASSES),
        "attention",
    ]
    weights = pq.read_table(out / "whole.tif" / "patches.parquet").to_pandas()["attention"]
    assert float(result.heatmap("attention").max()) == pytest.approx(weights.max(), rel=1e-3)
    assert result.channel("attention").unit == "arbitrary"
    assert result.channel("relevance: tumour").unit == "logit"
    assert validate(out) == []


def test_the_same_command_has_nothing_to_do(slide: MarkerSlide, model: Path, out: Path) -> None:
    """A finished run is finished."""
    before = contents(out)
    outcome = explain(slide.path, model, out, trust_code=True, **BAG)
    assert [record.skipped for record in outcome.records] == [True]
    assert contents(out) == before


def test_workers_leave_the_same_bytes(slide: MarkerSlide, model: Path, out: Path, tmp_path: Path) -> None:
    """Two processes encode, aggregate and explain as one does."""
    explain(slide.path, model, tmp_path / "out", workers=2, trust_code=True, **BAG)
    assert contents(tmp_path / "out") == contents(out)


@pytest.mark.parametrize("kind", ["features", "spans"])  # records of the first pass, and of the second
def test_a_run_killed_in_either_pass_continues(
    kind: str, slide: MarkerSlide, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command ends with the same bytes."""
    changed: list[str] = []

    def noted(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **more: Any) -> Any:
            if not is_by_clock(*given):
                changed.append(str(given))
            return real(*given, **more)

        return called

    with monkeypatch.context() as patched:
        for name in CHANGES:
            patched.setattr(os, name, noted(getattr(os, name)))
        explain(slide.path, model, tmp_path / "whole", trust_code=True, **SMALL)
    second = [number for number, paths in enumerate(changed) if f"manifest/{kind}/" in paths][1]
    process = start([Path(slide.path)], str(model), tmp_path / "out", die_at_change=second + 1)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    records = list((tmp_path / "out" / "whole.tif" / "manifest" / kind).iterdir())
    assert 0 < len(records) < 4  # spans
    assert not (tmp_path / "out" / "whole.tif" / "manifest" / "done.json").exists()
    explain(slide.path, model, tmp_path / "out", trust_code=True, **SMALL)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_unreadable_patch_is_no_part_of_the_bag(model: Path, tmp_path: Path) -> None:
    """It has no relevance, and the answer is that of the others."""
    wide = write_marker_slide(tmp_path / "wide.tif", 130, 1100, mpp=0.25, markers=[(100, 200)], marker_px=16)
    damaged = tmp_path / "damaged.tif"
    corrupt_tile(wide.path, damaged, 1, 0, 1)
    outcome = explain(damaged, model, tmp_path / "out", trust_code=True, max_unreadable=1.0, **BAG)
    (record,) = outcome.records
    assert record.unreadable > 0
    table = pq.read_table(tmp_path / "out" / "damaged.tif" / "patches.parquet").to_pandas()
    missing = table["status"] == "unreadable"
    assert 0 < missing.sum() == record.unreadable < len(table)
    assert table.loc[missing, "attention"].isna().all()
    assert table["attention"].sum() == pytest.approx(1, abs=1e-5)
    torch.manual_seed(0)
    features = toy_models.encoder().eval()(patches(wide, tmp_path / "out" / "damaged.tif")).detach().double()
    logits = answer(state(), features[torch.from_numpy(~missing.to_numpy())])
    row = rows_of(tmp_path / "out")["damaged.tif"]
    assert float(row["slide_logit_tumour"]) == pytest.approx(float(logits[1]), rel=1e-4)
    assert validate(tmp_path / "out") == []


def test_a_slide_without_a_readable_patch_has_no_answer(slide: MarkerSlide, model: Path, tmp_path: Path) -> None:
    """It fails, and says why."""
    damaged = tmp_path / "damaged.tif"
    corrupt_tile(slide.path, damaged, 1, 0, 0)
    (record,) = explain(damaged, model, tmp_path / "out", trust_code=True, max_unreadable=1.0, **BAG).records
    assert record.status == "failed"
    assert "none of its patches can be read, so a slide-level model has no answer" in record.error


def test_what_cannot_be_is_refused(slide: MarkerSlide, model: Path, tmp_path: Path) -> None:
    """Before anything is encoded, with the mend."""
    wrong = {**SMALL, "bag_method": "one_removed"}
    with pytest.raises(ConfigError, match="--bag-method integrated_gradients,one_removed"):
        explain(slide.path, model, tmp_path / "a", trust_code=True, **wrong)
    with pytest.raises(ConfigError, match="did you mean"):
        explain(slide.path, model, tmp_path / "b", trust_code=True, **{**SMALL, "bag_method": "lrp,one_remved"})
    longer = write_model(tmp_path / "longer", encoder={**toy_values("pooled_linear"), "classes": None})
    with pytest.raises(ModelError, match="gives 2 features, but the aggregator takes 12"):
        explain(slide.path, longer, tmp_path / "c", trust_code=True, **SMALL)


@pytest.mark.usefixtures("asking")
def test_an_encoder_that_is_code_needs_permission(slide: MarkerSlide, model: Path, tmp_path: Path) -> None:
    """As any model that is code."""
    with pytest.raises(ModelError, match="--trust-code"):
        explain(slide.path, model, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()


def test_features_that_float16_does_not_hold_are_refused(slide: MarkerSlide, tmp_path: Path) -> None:
    """They would be infinite; float32 holds them."""
    loud = {key: value for key, value in toy_values("loud_encoder").items() if key not in ("name", "classes")}
    model = write_model(tmp_path / "loud", encoder=loud)
    settings = {**SMALL, "feature_precision": "float16"}
    (record,) = explain(slide.path, model, tmp_path / "out", trust_code=True, **settings).records
    assert record.status == "failed"
    assert "infinite in float16" in record.error
    assert "--feature-precision float32" in record.error
