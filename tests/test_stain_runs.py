"""Whole runs with a stain: one fit a slide, kept with its plan, the same whoever works and however often it stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.runs import SMALL, differing, rows_of, stored, toy_spec
from tests.slides_in_memory import ArraySlide
from tests.synthetic import corrupt_tile, write_marker_slide
from tests.test_tissue_stain import OTHER, concentrations, stained
from wsi_gradcam.api import explain, preview
from wsi_gradcam.demo.slide import write_slide
from wsi_gradcam.errors import ResumeError, SlideReadError, StainError, StoreError
from wsi_gradcam.geometry import Region
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.results.manifest import SlidePlan
from wsi_gradcam.results.validation import validate
from wsi_gradcam.run import examining
from wsi_gradcam.run.examining import fit_stain, sample_patches, sample_tissue
from wsi_gradcam.run.settings import Settings
from wsi_gradcam.slides import open_slide, read_region
from wsi_gradcam.tissue.masks import slide_masks
from wsi_gradcam.tissue.stain import PUBLISHED, StainFit, apply

Rgb = npt.NDArray[np.uint8]
MACENKO = PUBLISHED["macenko"]


def two_stains(side_px: int, only: int | None = None) -> Rgb:
    """Tissue of two stains, or only one of them, with grains of 4 px."""
    amounts = concentrations((side_px // 4) ** 2)
    if only is not None:
        amounts[:, 1 - only] = 0
        amounts += [[0.5 - 0.5 * only, 0.5 * only]]
    rgb = stained(amounts, OTHER.stains).reshape(side_px // 4, side_px // 4, 3)
    return rgb.repeat(4, axis=0).repeat(4, axis=1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of tissue, one of a single stain, one of glass."""
    folder = tmp_path_factory.mktemp("archive")
    write_marker_slide(folder / "a.tif", 500, 700, mpp=0.25, markers=[], marker_px=16)
    write_slide(folder / "b.tif", two_stains(400), mpp=0.25, tile_px=256, downsample=(2, 4), compression="deflate")
    one = two_stains(400, only=0)
    write_slide(folder / "one.tif", one, mpp=0.25, tile_px=256, downsample=(2, 4), compression="deflate")
    write_marker_slide(folder / "glass.tif", 400, 400, mpp=0.25, markers=[], marker_px=16, glass_px=200)
    return folder


def spec(stain: Any = "macenko") -> Any:
    return toy_spec("pooled_linear", stain=stain)


@pytest.fixture(scope="module")
def serial(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive's results, computed in this process."""
    out = tmp_path_factory.mktemp("serial")
    explain(archive, spec(), out, **SMALL)
    return out


def test_a_slide_without_a_stain_fails_alone(archive: Path, serial: Path) -> None:
    rows = rows_of(serial)
    assert {name: row["status"] for name, row in rows.items()} == {
        "a.tif": "ok",
        "b.tif": "ok",
        "glass.tif": "no_tissue",
        "one.tif": "failed",
    }
    error = rows["one.tif"]["error"]
    assert error.startswith(
        f"{archive / 'one.tif'}: its stain cannot be normalised by macenko: (nearly) a single stain"
    )
    assert "leave this slide out" in error
    assert validate(serial) == []
    found = preview(archive, spec(), serial, **SMALL)
    assert [entry.id for entry, _ in found.errors] == ["one.tif"]


def test_the_network_sees_normalised_patches(archive: Path, serial: Path) -> None:
    """The logits are those of patches that were read and changed by hand."""
    import torch

    from wsi_gradcam.models.load import load_model

    model = load_model(spec())
    fit = StainFit.from_json(json.loads((serial / "b.tif" / "manifest" / "plan.json").read_text())["stain"])
    slide = open_slide(archive / "b.tif")
    patches = np.stack(
        [read_region(slide, y, x, 32, 32, 0.5) for y, x in stored(serial / "b.tif", "xy")[:, ::-1].tolist()]
    )
    slide.close()
    logits = model.module(model.prepare(torch.from_numpy(apply(fit, patches)))).numpy()
    np.testing.assert_allclose(stored(serial / "b.tif", "logits"), logits, atol=1e-5)
    plain = model.module(model.prepare(torch.from_numpy(patches))).numpy()
    assert np.abs(plain - logits).max() > 3e-3


def test_the_slides_own_stain_is_kept_with_its_plan(serial: Path) -> None:
    plan = json.loads((serial / "b.tif" / "manifest" / "plan.json").read_text())
    fit = StainFit.from_json(plan["stain"])
    assert fit.target == MACENKO
    np.testing.assert_allclose(fit.slide.to_json()["stains"], OTHER.stains, atol=0.06)
    assert json.loads((serial / "glass.tif" / "manifest" / "plan.json").read_text())["stain"] is None


@pytest.mark.slow
def test_two_workers_leave_the_same_bytes(archive: Path, serial: Path, tmp_path: Path) -> None:
    explain(archive, spec(), tmp_path, **SMALL, workers=2)
    assert differing(tmp_path, serial) == []


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_continued_run_keeps_the_fit_and_ends_with_the_same_bytes(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    explain(archive / "b.tif", spec(method), whole, **SMALL)
    shutil.copytree(whole, half)
    (half / "b.tif" / "manifest" / "done.json").unlink()
    monkeypatch.setattr("wsi_gradcam.run.plan.fit_stain", lambda *_: pytest.fail("it is measured once"))
    explain(archive / "b.tif", spec(method), half, **SMALL)
    assert differing(half, whole) == []


def test_another_stain_is_another_run(archive: Path, serial: Path) -> None:
    for stain in (None, "reinhard"):
        with pytest.raises(ResumeError):
            explain(archive, spec(stain), serial, **SMALL)


def test_unreadable_patches_are_recorded_as_ever(archive: Path, tmp_path: Path) -> None:
    slide = tmp_path / "bad.tif"
    corrupt_tile(archive / "a.tif", slide, 1, 0, 1)
    outcome = explain(slide, spec(), tmp_path / "out", **SMALL, max_unreadable=1.0)
    (record,) = outcome.records
    assert record.status == "ok"
    assert 0 < record.unreadable < record.patches


# --- the sample ------------------------------------------------------------------------------------------------------


def half_glass(bad: Region | None = None) -> ArraySlide:
    pixels = np.full((1024, 1024, 3), 245, np.uint8)
    pixels[:, :512] = two_stains(1024)[:, :512]
    return ArraySlide([pixels], (0.5, 0.5), bad)


def test_tissue_is_sampled_evenly_and_each_time_alike() -> None:
    slide = half_glass()
    mask = np.zeros((128, 128), bool)
    mask[:, :60] = True
    first, second = (sample_tissue(half_glass(), mask, 0.5) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (examining.STAIN_PLACES * examining.STAIN_PX**2, 3)
    sample_tissue(slide, mask, 0.5)
    rows = np.array([region.y + region.height / 2 for _, region in slide.reads])
    np.testing.assert_allclose(np.histogram(rows, 4, (0, 1024))[0], examining.STAIN_PLACES / 4, atol=2)
    assert all(region.x + region.width / 2 < 60 * 8 for _, region in slide.reads)


def test_the_sample_is_like_the_whole() -> None:
    slide, mask = half_glass(), np.zeros((128, 128), bool)
    mask[:, :64] = True
    for method, target in PUBLISHED.items():
        sampled = fit_stain(slide, mask, 0.5, target).slide.to_json()
        whole = fit_stain(half_glass(), np.ones((16, 16), bool), 0.5, target).slide.to_json()
        for key in sampled.keys() - {"method"}:
            np.testing.assert_allclose(sampled[key], whole[key], rtol=0.05, atol=0.02, err_msg=method)


def test_what_cannot_be_read_is_left_out() -> None:
    mask = np.ones((128, 128), bool)
    partly = sample_tissue(half_glass(Region(0, 0, 512, 1024)), mask, 0.5)
    assert 0 < len(partly) < examining.STAIN_PLACES * examining.STAIN_PX**2 * 0.6
    with pytest.raises(SlideReadError, match="cannot be decoded"):
        sample_tissue(half_glass(Region(0, 0, 1024, 1024)), mask, 0.5)


def test_no_tissue_is_no_stain() -> None:
    """Where all of a slide of glass is to be explained."""
    with pytest.raises(StainError, match="only 0 of 0 pixels"):
        fit_stain(half_glass(), np.zeros((8, 8), bool), 0.5, MACENKO)


def test_a_damaged_fit_is_a_damaged_plan(serial: Path) -> None:
    plan = json.loads((serial / "b.tif" / "manifest" / "plan.json").read_text())
    assert SlidePlan.from_json(plan).to_json() == {**plan, **{k: tuple(v) for k, v in plan.items() if type(v) is list}}
    for stain in (3, {}, {**plan["stain"], "slide": {"method": "macenko", "stains": [1], "concentrations": [1, 2]}}):
        with pytest.raises(StoreError, match="not a plan of this version"):
            SlidePlan.from_json({**plan, "stain": stain})


def test_a_slide_without_a_stain_is_named() -> None:
    slide = ArraySlide([np.full((256, 256, 3), 120, np.uint8)], (0.5, 0.5))
    with pytest.raises(StainError, match=r"^memory: "):
        fit_stain(slide, np.ones((8, 8), bool), 0.5, MACENKO)


def test_patches_for_choices_are_normalised_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "open_entry", lambda entry, settings: half_glass())
    entries, settings = [SlideEntry("a", "a")], Settings(min_tissue=0.5)
    plain = sample_patches(entries, settings, (32, 32), 0.5, 6)
    normalised = sample_patches(entries, settings, (32, 32), 0.5, 6, MACENKO)
    assert plain is not None
    assert normalised is not None
    fit = fit_stain(half_glass(), slide_masks(half_glass()).tissue, 0.5, MACENKO)
    np.testing.assert_array_equal(normalised, apply(fit, plain))
    assert np.abs(normalised.astype(int) - plain).mean() > 5
