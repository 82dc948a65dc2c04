"""The demo on a small layout, and the models that come along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import mannwhitneyu

from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.facts import Layer
from wsi_gradcam.cam.layers import check_layer
from wsi_gradcam.cam.program import EagerProgram
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.cli.main import main
from wsi_gradcam.demo import run as demo
from wsi_gradcam.demo.run import HELD_OUT, dab_positive, majority, micrograph, roc_auc
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.models.load import Model, load_model
from wsi_gradcam.models.spec import ZOO, bundled
from wsi_gradcam.results.heatmap import HeatmapStore
from wsi_gradcam.results.run_files import RunFolder
from wsi_gradcam.results.validation import validate
from wsi_gradcam.slides import open_slide


@pytest.fixture(scope="module", params=["oral-tumour", "ihc-dab"])
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(request.param)


def cut(rgb: np.ndarray, side: int) -> torch.Tensor:
    """All whole patches of a picture, uint8 [n, side, side, 3], row by row."""
    rows, columns = rgb.shape[0] // side, rgb.shape[1] // side
    cells = rgb[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return torch.from_numpy(np.ascontiguousarray(cells.transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)))


def test_the_demo_agrees_with_the_stain_and_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SIDE_PX", 2048)
    assert main(["demo", "--stain", "ihc", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "held-out quadrant" in printed
    assert "overview.png" in printed
    assert f"wsi-gradcam view {tmp_path / 'ihc-dab'}" in printed
    assert validate(tmp_path / "ihc-dab") == []
    again = demo.make_ihc_example(tmp_path)
    found = demo.agreement(again.out.slide(demo.SLIDE_NAME), again)
    assert found is not None
    assert min(found.auc["gradcam: positive"]) > 0.97
    assert min(found.auc["probability: positive"]) > 0.93


def test_the_demo_agrees_with_the_pathologists_outlines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("faithfulness (gradcam)", "plausibility (gradcam)", "report.html", "overview.png"):
        assert text in printed
    assert validate(tmp_path / "oral-cancer") == []
    example = demo.make_he_example(tmp_path / "again")
    slide = open_slide(example.slide)
    slide.close()
    assert max(slide.info.width, slide.info.height) >= 8000
    assert len(slide.info.levels) > 3
    assert slide.info.mpp_yx == (0.25, 0.25)
    assert (tmp_path / demo.HE_NAME).read_bytes() == example.slide.read_bytes()
    found = demo.agreement(RunFolder(storage_path(tmp_path / "oral-cancer")).slide(demo.HE_NAME), example)
    assert found is not None
    assert found.auc["gradcam: tumour"][0] > 0.9
    assert found.auc["probability: tumour"][0] > 0.93


def test_no_crop_of_the_demo_is_of_the_training_data() -> None:
    card = (ZOO / "oral-tumour.md").read_text(encoding="utf-8")
    trained = next(line for line in card.splitlines() if line.startswith("- Trained on:"))
    assert not [name for name in demo.UNSEEN if name in trained]
    assert sorted(path.name for path in demo.CROPS.glob("*.jpg")) == sorted(
        f"{name}-{kind}.jpg" for name in demo.UNSEEN for kind in ("mask", "tissue")
    )
    assert sum(path.stat().st_size for path in demo.CROPS.iterdir()) <= 1_500_000


def test_the_demo_explains_a_given_slide(tmp_path: Path, shared_data: Path) -> None:
    slide = shared_data / "slides/aperio/CMU-1-Small-Region.svs"
    assert main(["demo", str(slide), "--out", str(tmp_path)]) == 0
    folder = RunFolder(storage_path(tmp_path / "oral-tumour")).slide(slide.name)
    assert folder.overview.is_file()
    assert validate(tmp_path / "oral-tumour") == []
    assert HeatmapStore(folder.heatmap).shapes[0] == (-(-2967 // 16), -(-2220 // 16))


def test_bundled_models_are_small_and_described() -> None:
    assert bundled() == ["ihc-dab", "oral-tumour"]
    for name in bundled():
        assert (ZOO / f"{name}.safetensors").stat().st_size < 4_000_000
        card = (ZOO / f"{name}.md").read_text(encoding="utf-8").lower()
        assert all(word in card for word in ("licen", "split", "auc", "calibration", "limits"))


def test_cams_of_the_bundled_models_add_up_to_the_logits(model: Model) -> None:
    images = torch.randn(4, 3, *model.patch_px, generator=torch.Generator().manual_seed(1))
    assert model.layer is not None
    targets = [Target(name, i) for i, name in enumerate(model.classes)]
    layer = Layer(model.layer, check_layer(model.module, model.layer, images))
    explained = explain_batch(EagerProgram(model.module, (layer,)), images, targets)
    logits, cams = explained.logits, explained.cams["gradcam"]
    linear = [part for part in model.module.modules() if isinstance(part, torch.nn.Linear)][-1]
    torch.testing.assert_close(cams.sum(dim=(2, 3)) + linear.bias, logits, rtol=1e-4, atol=1e-4)


def test_glass_is_no_tumour_and_not_positive(model: Model) -> None:
    glass = torch.full((1, *model.patch_px, 3), 244, dtype=torch.uint8)
    probabilities = model.module(model.prepare(glass)).softmax(dim=1)
    assert float(probabilities[0, 1]) < 0.05


def test_ihc_model_knows_the_quadrant_it_never_saw() -> None:
    model = load_model("ihc-dab")
    side = model.patch_px[0]
    positive = cut(np.repeat(dab_positive(micrograph())[HELD_OUT][..., None], 3, axis=2).astype(np.uint8), side)
    truth = positive[..., 0].float().mean(dim=(1, 2)).numpy() > 0.5
    scores = model.module(model.prepare(cut(micrograph()[HELD_OUT], side))).softmax(dim=1)[:, 1].numpy()
    assert roc_auc(scores, truth) > 0.95


def test_oral_model_tells_tumour_from_the_rest(shared_data: Path) -> None:
    """On crops it was trained on: this guards the shipped weights; its card has cross-validated figures."""
    model = load_model("oral-tumour")
    scores, truths = [], []
    for path in sorted((shared_data / "tiles/ocdc_tumour_masks/images").glob("*.jpg")):
        rgb = np.asarray(Image.open(path).convert("RGB"))
        mask = np.asarray(Image.open(path.parents[1] / "masks" / path.name).convert("L")) > 127
        shares = cut(np.repeat(mask[..., None], 3, axis=2).astype(np.uint8), model.patch_px[0])[..., 0]
        truths.append(shares.float().mean(dim=(1, 2)).numpy() > 0.5)
        patches = model.prepare(cut(rgb, model.patch_px[0]))
        scores.append(model.module(patches).softmax(dim=1)[:, 1].numpy())
    assert roc_auc(np.concatenate(scores), np.concatenate(truths)) > 0.97


def test_roc_auc_equals_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 8, 200).astype(np.float32)  # many ties
    truth = rng.random(200) < 0.3
    expected = mannwhitneyu(scores[truth], scores[~truth]).statistic / (truth.sum() * (~truth).sum())
    assert roc_auc(scores, truth) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(roc_auc(scores, np.zeros(200, np.bool_)))


def test_majority_counts_cells_that_are_cut_by_the_edge() -> None:
    mask = np.zeros((5, 4), np.bool_)
    mask[:2, :2] = True
    mask[4, 2:] = True
    assert majority(mask, 2).tolist() == [[True, False], [False, False], [False, False]]
    assert majority(np.ones((4, 4), np.bool_), 2).all()
