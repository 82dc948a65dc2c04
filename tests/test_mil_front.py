"""What slide-level models answer is where users look: pictures, pages, commands and Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure

from tests.cli_runs import Run, run
from tests.runs import SMALL, rows_of, toy_file
from tests.synthetic import MarkerSlide
from tests.test_mil_runs import BAG, CLASSES, FEATURES, model, out, slide
from tests.viewer_runs import client
from wsi_gradcam.api import explain, validate
from wsi_gradcam.doctor import FAIL, OK
from wsi_gradcam.doctor.checks import examine
from wsi_gradcam.errors import ResultError
from wsi_gradcam.export import OF_FEATURES, OF_HEATMAPS, export
from wsi_gradcam.io.paths import storage_path
from wsi_gradcam.results.run import open_result
from wsi_gradcam.run.status import read_status

__all__ = ["model", "out", "run", "slide"]  # fixtures
NAME = "whole.tif"


def shares(out: Path) -> dict[str, float]:
    """The answer in slides.csv."""
    return {name: float(rows_of(out)[NAME][f"slide_probability_{name}"]) for name in CLASSES}


def test_a_slides_answer_is_had_in_python(out: Path) -> None:
    found = open_result(out)[NAME]
    assert found.slide_probabilities == shares(out)
    assert found.slide_logits["tumour"] == float(rows_of(out)[NAME]["slide_logit_tumour"])
    assert found.answer.startswith(max(CLASSES, key=shares(out).__getitem__))
    assert found.answer in found._repr_html_()


def test_a_bag_is_labelled_arrays(out: Path) -> None:
    """Products of features and coefficients are relevance, as the table has it."""
    found = open_result(out)[NAME]
    table = found.patches
    assert found.features.dims == ("patch", "feature")
    assert found.features.shape == (len(table), FEATURES)
    assert found.relevance.sizes == {"patch": len(table), "bag_method": 2, "target": 2}
    one = found.relevance.sel(bag_method="one_removed", target="normal")
    np.testing.assert_array_equal(one.values, table["one_removed_relevance_normal"])
    products = (found.coefficients.sel(target="tumour") * found.features).sum("feature").values
    np.testing.assert_allclose(products, table["gradient_x_input_relevance_tumour"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.attention.sel(head="attention").values, table["attention"])
    np.testing.assert_array_equal(found.relevance["y"].values, table["y"])
    assert found.relevance.attrs["units"] == "logit"


def test_a_run_of_patches_has_no_bag(slide: MarkerSlide, tmp_path: Path) -> None:
    explain(slide.path, toy_file(tmp_path, "pooled_linear"), tmp_path / "out", trust_code=True, **SMALL)
    found = open_result(tmp_path / "out")[NAME]
    assert (found.slide_logits, found.slide_probabilities, found.answer) == ({}, {}, "")
    with pytest.raises(ResultError, match="slide-level models have them"):
        _ = found.features


def test_the_picture_says_the_answer(
    slide: MarkerSlide, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **about: told.append(text))
    explain(slide.path, model, tmp_path / "out", trust_code=True, **BAG)
    (text,) = told
    assert text.startswith(f"{NAME}: {open_result(tmp_path / 'out')[NAME].answer}\n")
    assert "Grad-CAM, HiResCAM of gradient x input" in text


def test_maps_of_many_patches_are_not_dark(out: Path) -> None:
    """A slide's logit is shared by its patches: one logit a patch would leave nothing to be seen."""
    found = open_result(out)[NAME]
    for label in ("gradcam: tumour", "relevance: tumour"):
        channel = found.channel(label)
        top = float(np.quantile(found.heatmap(label).values[found.coverage().values & 2 > 0], 0.995))
        end = max(top, 1 / found.plan.patches) if top > 0 else 1 / found.plan.patches
        assert channel.window == pytest.approx((0.0, end), rel=1e-5)
        low, high = open_result(out).windows()[label]
        assert validate(out) == []  # display.json too
        assert low == 0.0
        assert high == pytest.approx(end, rel=0.02)


def test_the_viewer_shows_and_sorts_by_the_answer(out: Path) -> None:
    with client(out) as viewer:
        assert viewer.get("/api/run").json()["slide_level"] is True
        (card,) = viewer.get("/api/slides", params={"sort": "answer:tumour", "order": "down"}).json()["slides"]
        assert {each["label"]: each["probability"] for each in card["answer"]} == shares(out)
        assert viewer.get(f"/api/slides/{card['key']}").json()["answer"] == card["answer"]


def test_info_tells_of_results_and_of_all_parts_of_a_model(out: Path, model: Path, run: Run) -> None:
    code, told, _ = run("info", out, "--json")
    (found,) = json.loads(told)
    assert code == 0
    assert found["bag methods"] == "gradient_x_input, one_removed"
    assert found[f"answer {NAME}"] == open_result(out)[NAME].answer
    code, told, _ = run("info", "--model", model, "--trust-code", "--json")
    (about,) = json.loads(told)
    assert code == 0
    assert about["aggregator's weights"] == "abmil.pt"
    assert about["features"] == f"{FEATURES} of each patch"
    assert about["self-test"] == "head(trunk(x)) equals model(x)"
    assert "shapley" in about["bag methods"]


def test_doctor_knows_slide_level_models(model: Path, tmp_path: Path) -> None:
    def found(path: Path) -> tuple[str, str]:
        (check,) = [c for c in examine(model=str(path), trust_code=True) if c.name == "model"]
        return check.status, check.found

    assert found(model) == (OK, "toy slides loads")
    values = yaml.safe_load(model.read_text(encoding="utf-8"))
    values["encoder"]["source"] = "tests.toy_models:pooled_linear"
    torch.save(torch.load(model.parent / "abmil.pt", weights_only=True), tmp_path / "abmil.pt")
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    status, text = found(tmp_path / "wrong.yaml")
    assert status == FAIL
    assert "gives 2 features, but the aggregator takes 12" in text


def test_patches_of_both_passes_are_counted(slide: MarkerSlide, out: Path, run: Run) -> None:
    status = read_status(storage_path(out))
    assert status is not None
    patches = status.numbers.patches
    count = open_result(out)[NAME].plan.patches
    assert (patches.done, patches.expected, patches.encoded) == (count, count, count)
    assert sum(status.numbers.throughput.patches) == 2 * count
    assert f"{count} encoded" in run("status", out)[1]
    assert "patches encoded" in (out / "run.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("to", [*OF_HEATMAPS, *OF_FEATURES])
def test_results_are_exported(out: Path, tmp_path: Path, to: str) -> None:
    """In each format, with the channels that only slide-level models have."""
    channels = ("relevance: tumour", "attention", "gradcam: tumour")
    done = export(open_result(out), to, tmp_path / "dest", channel=channels)
    assert [each.error for each in done] == [""]
    assert all(path.exists() for each in done for path in each.paths)
    assert done[0].paths
