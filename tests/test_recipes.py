"""The recipes of docs/architecture.md do what they promise: `tests.toys`, registered as they say, by the front door."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from tests import planted, toys
from tests.runs import SMALL, Heatmap, rows_of, stored, toy_spec
from tests.synthetic import truncate, write_marker_slide
from tests.toy_models import PooledLinear, pooled_linear
from wsi_gradcam import GradCAM, audit_images, explain, open_slide, validate
from wsi_gradcam.audit.schema import QUESTIONS
from wsi_gradcam.cam.facts import METHOD_INFO
from wsi_gradcam.cam.methods import METHODS
from wsi_gradcam.errors import ConfigError, SlideFormatError
from wsi_gradcam.geometry import Region
from wsi_gradcam.slides.opening import OPENERS

MPP = 0.5  # the toy models' own: no reader resamples
SIZE = (100, 130)


# --- a reader --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in step 4 of its recipe."""
    monkeypatch.setitem(OPENERS, "toy", toys.ToySlide)


@pytest.fixture
def slides(tmp_path: Path) -> tuple[Path, Path]:
    """The same pixels as a TIFF file and as a toy."""
    made = write_marker_slide(tmp_path / "a.tif", *SIZE, mpp=MPP, markers=[(44, 52)], marker_px=24, downsamples=())
    toys.write_toy_slide(tmp_path / "a.npz", made.level0, MPP)
    return made.path, tmp_path / "a.npz"


@pytest.mark.usefixtures("reader")
def test_a_toy_slide_has_the_pixels_of_the_tiff(slides: tuple[Path, Path], tmp_path: Path) -> None:
    tiff, toy = open_slide(slides[0]), open_slide(slides[1], reader="toy")
    assert (toy.info.vendor, toy.info.mpp, toy.info.levels) == ("toy", tiff.info.mpp, tiff.info.levels)
    beyond = Region(-3, 100, SIZE[0] + 9, SIZE[1])
    np.testing.assert_array_equal(toy.read_level(0, beyond), tiff.read_level(0, beyond))
    assert open_slide(slides[1], 0.25, reader="toy").info.mpp == (0.25, 0.25)
    truncate(slides[1], tmp_path / "cut.npz", 0.5)
    with pytest.raises(SlideFormatError, match=r"cut\.npz: no toy slide, or damaged"):
        open_slide(tmp_path / "cut.npz", reader="toy")


@pytest.mark.usefixtures("reader")
def test_a_toy_slide_is_explained_as_the_tiff_is_and_a_damaged_one_fails_alone(
    slides: tuple[Path, Path], tmp_path: Path
) -> None:
    truncate(slides[1], tmp_path / "cut.npz", 0.5)
    explain(slides[0], toy_spec("marker"), tmp_path / "tiff", **SMALL)
    explain([slides[1], tmp_path / "cut.npz"], toy_spec("marker"), tmp_path / "toy", reader="toy", **SMALL)
    rows = rows_of(tmp_path / "toy")
    assert {name: row["status"] for name, row in rows.items()} == {"a.npz": "ok", "cut.npz": "failed"}
    assert "cut.npz: no toy slide, or damaged" in rows["cut.npz"]["error"]
    assert validate(tmp_path / "toy") == []
    tiff, toy = tmp_path / "tiff" / "a.tif", tmp_path / "toy" / "a.npz"
    for name in ("cam", "logits"):
        np.testing.assert_array_equal(stored(toy, name), stored(tiff, name))
    shown = Heatmap(toy).level(0, "gradcam: marker")
    np.testing.assert_array_equal(shown, Heatmap(tiff).level(0, "gradcam: marker"))
    assert [(axis.min(), axis.max()) for axis in (shown > 4).nonzero()] == [(4, 6), (5, 7)]  # 32..55, 40..63 px


@pytest.mark.usefixtures("reader")
def test_a_reader_of_files_is_told_to_know_no_urls() -> None:
    with pytest.raises(SlideFormatError, match="reader 'toy' reads only files; expected auto, tiff, ome-zarr, or copy"):
        open_slide("https://host/a.npz", reader="toy")


def test_without_its_line_in_the_table_a_reader_is_refused(slides: tuple[Path, Path], tmp_path: Path) -> None:
    message = "reader 'toy' is not known; expected one of auto, openslide, tiff, ome-zarr, picture"
    with pytest.raises(ConfigError, match=message):
        open_slide(slides[1], reader="toy")
    with pytest.raises(ConfigError, match=message):
        explain(slides[1], toy_spec("marker"), tmp_path / "out", reader="toy", **SMALL)
    assert not (tmp_path / "out").exists()


# --- a method --------------------------------------------------------------------------------------------------------


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in steps 1 and 3 of its recipe."""
    monkeypatch.setitem(METHODS, "absgradcam", toys.absgradcam)
    monkeypatch.setitem(METHOD_INFO, "absgradcam", toys.ABSGRADCAM)


def signed() -> PooledLinear:
    """`pooled_linear` of which maps have both signs."""
    torch.manual_seed(2)
    return cast(PooledLinear, pooled_linear())


@pytest.mark.usefixtures("method")
def test_grad_cam_of_images_knows_a_toy_method() -> None:
    images = torch.rand(3, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    found = GradCAM(signed(), layer="features", method=["gradcam", "absgradcam"])(images, targets=[0, 1])
    plain = found.by_method["gradcam"]
    assert bool((plain < 0).any())
    assert bool((plain > 0).any())
    torch.testing.assert_close(found.by_method["absgradcam"], plain.abs(), rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("method")
def test_a_toy_method_is_a_channel_and_a_column(slides: tuple[Path, Path], tmp_path: Path) -> None:
    spec = toy_spec("pooled_linear")
    explain(slides[0], spec, tmp_path / "out", method="gradcam,absgradcam", target="marker", **SMALL)
    assert validate(tmp_path / "out") == []
    folder = tmp_path / "out" / "a.tif"
    heatmap = Heatmap(folder)
    assert heatmap.labels[:2] == ["gradcam: marker", "absgradcam: marker"]
    plain, absolute = stored(folder, "cam").swapaxes(0, 1)
    assert np.abs(plain).max() > 0
    np.testing.assert_allclose(absolute, np.abs(plain), rtol=1e-5, atol=1e-7)
    shown = heatmap.level(0, "absgradcam: marker")
    assert shown.min() >= 0
    assert shown.max() > 0
    table = pq.read_table(folder / "patches.parquet").to_pydict()
    np.testing.assert_allclose(table["absgradcam_mean_marker"], absolute.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(table["absgradcam_max_marker"], absolute.max(axis=(1, 2)), rtol=1e-5)


def test_without_its_line_in_the_table_a_method_is_refused(slides: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method 'absgradcam' is not known"):
        explain(slides[0], toy_spec("marker"), tmp_path / "out", method="absgradcam", **SMALL)


# --- a question of the audit -----------------------------------------------------------------------------------------


@pytest.fixture
def question(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in step 5 of its recipe."""
    monkeypatch.setitem(QUESTIONS, "brightness", "tests.toys")


def light_meter() -> nn.Module:
    """Calls tumour what is bright, and sees nothing else."""
    network = PooledLinear(nn.AvgPool2d(4), 3)
    with torch.no_grad():
        network.fc.weight[:] = torch.tensor([[0.0] * 3, [20.0] * 3])
        network.fc.bias.zero_()
    return network


def audited(network: nn.Module, **changes: Any) -> Any:
    rgb = planted.patches(24, 5, "all").rgb
    return audit_images(rgb, planted.as_model(network), target="tumour", **{"only": ["brightness"], **changes})


@pytest.mark.usefixtures("question")
@pytest.mark.parametrize(
    ("network", "outcome", "share"), [(light_meter, "fails", 1.0), (planted.marker_only, "holds", 0.0)]
)
def test_a_toy_question_is_answered(network: Any, outcome: str, share: float, tmp_path: Path) -> None:
    found = audited(network(), report=tmp_path / "report.html")
    (estimate,), (verdict,) = found.estimates, found.verdicts
    assert (estimate.question, estimate.measure, estimate.value, estimate.patches) == ("brightness", "moved", share, 24)
    assert (verdict.question, verdict.of, verdict.outcome) == ("brightness", "model", outcome)
    assert verdict.measures == ["moved"]
    assert verdict.p_adjusted < 0.05
    assert {row.what for row in found.not_tested} == set(QUESTIONS) - {"brightness"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (toys.QUESTION.words.title, toys.QUESTION.words.how, verdict.words, toys.MOVED.what, verdict.asked):
        assert text in page
    assert "Share of the patches moved by less light" in page


@pytest.mark.usefixtures("question")
def test_a_toy_question_stands_with_the_others_in_the_order_of_the_table() -> None:
    found = audited(planted.marker_only(), only=["brightness", "plausibility"])
    assert found.run.questions == ["plausibility", "brightness"]


def test_without_its_line_in_the_table_a_question_is_refused() -> None:
    with pytest.raises(ConfigError, match="'brightness' is not one of the audit's questions"):
        audited(planted.marker_only())
