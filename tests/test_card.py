"""A model's card: its numbers are those of the tables and of the audit's records, and it is of the run's own model."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from tests.feature_formats import MPP, trident
from tests.runs import SMALL, rows_of, toy_file, toy_spec
from tests.synthetic import write_gigapixel_slide, write_marker_slide
from tests.test_mil_given_features import ON_FEATURES, frame_of, write_aggregator
from tests.test_mil_runs import BAG, CLASSES, write_model
from wsi_gradcam import audit_run, card, explain, write_card
from wsi_gradcam.card import performance
from wsi_gradcam.errors import ModelError, ResultError, StoreError
from wsi_gradcam.results.run import open_result

SLIDES = 14


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model files, and `out`: a run over slides of two sites, half of which show the marker, audited."""
    folder = tmp_path_factory.mktemp("card")
    rows = []
    for number in range(SLIDES):
        path = folder / f"{number:02}.tif"
        markers = [(32, 32)] if number % 2 else []
        write_marker_slide(path, 64, 128, mpp=0.25, markers=markers, marker_px=64)
        rows.append((path, "marker" if number % 2 else "other", "Aarhus" if number < 7 else "B|<b>*rest*"))
    with (folder / "slides.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("slide", "label", "site"), *rows])
    out = folder / "out"
    outcome = explain(folder / "slides.csv", toy_spec("marker", layer=None), out, target="marker", **SMALL)
    assert not outcome.failed
    audit_run(out, patches=4, only=("saturation",), trust_code=True)
    toy_file(folder, "marker", layer=None)
    toy_file(folder, "pooled_linear")
    return folder


def cells(text: str) -> list[list[str]]:
    """The cells of a Markdown file's tables, where no `|` is escaped."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def test_the_card_says_how_well_labels_are_told(made: Path, tmp_path: Path) -> None:
    text, page = (path.read_text(encoding="utf-8") for path in write_card(made / "marker.yaml", made / "out", tmp_path))
    rows = {tuple(row[:2]): row[2:] for row in cells(text)}
    found = performance.roc(np.array([0.0] * 7 + [0.5] * 7), np.array([False] * 7 + [True] * 7))
    assert rows["share of the patches given to it", "all"] == ["7 / 7", "1.000", performance.interval_text(found)]
    assert rows["share of the patches given to it", "Aarhus"] == ["3 / 4", "1.000", "–"]
    assert "### marker against the rest" in text
    assert "### other against the rest" not in text
    assert "Brier" not in text, "scores of a patch model are no probabilities of the slide"
    assert "| Aarhus |  | marker | 3 |" in text
    assert "<polyline" in page
    assert "http" not in page.replace("http-equiv", "")


def test_names_of_strangers_are_text_in_both_forms(made: Path, tmp_path: Path) -> None:
    text, page = (path.read_text(encoding="utf-8") for path in write_card(made / "marker.yaml", made / "out", tmp_path))
    assert r"B\|\<b\>\*rest\*" in text
    assert "<b>*rest*" not in text + page
    assert "B|&lt;b&gt;*rest*" in page


def test_the_audits_records_are_the_cards_words(made: Path, tmp_path: Path) -> None:
    path, _ = write_card(made / "marker.yaml", made / "out", tmp_path)
    text = path.read_text(encoding="utf-8")
    metrics = card.make_card(open_result(made / "out"), facts(made)).audit
    assert metrics is not None
    assert metrics.verdicts
    for verdict in metrics.verdicts:
        heading = card.HEADINGS[verdict.outcome].format("patches")
        assert card._escaped(verdict.words) in text.partition(f"### {heading}\n")[2].partition("\n#")[0]
    assert f"The audit examined {metrics.sample.patches} patches of {metrics.sample.slides} slide" in text


def facts(made: Path, name: str = "marker") -> Any:
    """What is known of the run's model once it is loaded."""
    return card._same_model(str(made / f"{name}.yaml"), open_result(made / "out"), trust_code=True)


def test_another_model_gets_no_card_of_this_run(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not the model that .* was made with \(marker, digest"):
        write_card(made / "pooled_linear.yaml", made / "out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_code_needs_permission(made: Path, tmp_path: Path, asking: None) -> None:
    with pytest.raises(ModelError, match="trust"):
        write_card(made / "marker.yaml", made / "out", tmp_path)
    assert len(write_card(made / "marker.yaml", made / "out", tmp_path, trust_code=True)) == 2


def test_a_card_is_not_written_over_unless_told(made: Path, tmp_path: Path) -> None:
    path, _ = write_card(made / "marker.yaml", made / "out", tmp_path)
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(ResultError, match="already exists; use --overwrite"):
        write_card(made / "marker.yaml", made / "out", tmp_path)
    assert path.read_text(encoding="utf-8") == "mine"
    write_card(made / "marker.yaml", made / "out", tmp_path, overwrite=True)
    assert path.read_text(encoding="utf-8") != "mine"


def test_an_audit_of_other_results_is_refused_and_none_is_said(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    metrics = out / "audit" / "metrics.json"
    digest = open_result(out).record.run_digest
    metrics.write_text(metrics.read_text(encoding="utf-8").replace(digest, "0" * 64), encoding="utf-8")
    with pytest.raises(ResultError, match="its audit is of different results"):
        write_card(made / "marker.yaml", out, tmp_path)
    metrics.write_text("{}", encoding="utf-8")
    with pytest.raises(StoreError, match="damaged or of another version"):
        write_card(made / "marker.yaml", out, tmp_path)
    shutil.rmtree(out / "audit")
    path, _ = write_card(made / "marker.yaml", out, tmp_path)
    assert "The explanations of this run were not audited." in path.read_text(encoding="utf-8")


def test_without_labels_nothing_is_said_of_being_right(made: Path, tmp_path: Path) -> None:
    outcome = explain(made / "00.tif", toy_spec("marker", layer=None), tmp_path / "out", target="marker", **SMALL)
    assert not outcome.failed
    path, _ = write_card(made / "marker.yaml", tmp_path / "out", tmp_path)
    assert "The list of slides has no labels" in path.read_text(encoding="utf-8")


def test_curve_and_area_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    truth = random.random(60) < 0.4
    scores = np.round(truth + random.normal(0, 0.8, 60), 1)  # with ties
    found = performance.roc(scores, truth)
    assert found.auroc == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert np.allclose(found.curve, np.stack([false, true], axis=1))
    assert performance.roc([*scores, np.nan], [*truth, True]) == found


def test_the_interval_holds_the_true_area_as_often_as_it_says() -> None:
    """Normal scores one and a half deviations apart: the true area is 0.856."""
    random, hits, draws = np.random.default_rng(1), 0, 400
    for _ in range(draws):
        scores = np.concatenate([random.normal(1.5, 1, 12), random.normal(0, 1, 20)])
        interval = performance.roc(scores, np.arange(32) < 12).interval
        assert interval is not None
        hits += interval[0] <= 0.8556 <= interval[1]
    assert 0.92 <= hits / draws <= 0.99


def test_the_interval_of_a_perfect_score_is_no_point() -> None:
    low, high = performance.auroc_interval(1.0, 8, 8)
    assert 0.6 < low < 0.9
    assert high == pytest.approx(1.0)
    assert performance.auroc_interval(1.0, 80, 80)[0] > low


def test_bins_of_a_calibration_have_equal_numbers_and_none_too_few() -> None:
    values = np.linspace(0, 1, 30)
    bins = performance.calibration(values, values > 0.5)
    assert [found.slides for found in bins] == [6] * 5
    assert [found.observed for found in bins] == [0, 0, 0.5, 1, 1]
    assert performance.calibration(values[:11], values[:11] > 0.5) == ()


def test_what_the_model_looks_at_is_said_where_it_was_asked(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made / "out", out)
    found = {"model_digest": open_result(out).record.model.digest, "target": "marker", "patches": 1200, "slides": 14}
    found |= {"worth_sorting": True, "learned": "it tells patches apart", "findings": [{"words": "Ink *decides*."}]}
    place = out / "evidence" / "evidence.json"
    place.parent.mkdir()
    place.write_text(json.dumps(found), encoding="utf-8")
    path, page = write_card(made / "marker.yaml", out, tmp_path)
    part = path.read_text(encoding="utf-8").partition("## What it looks at\n")[2].partition("\n#")[0]
    assert part.split("\n")[1:-1] == [
        "- Explained target: marker, on 1,200 patches of 14 slides.",
        r"- Ink \*decides\*.",
    ]
    assert "<li>Ink *decides*.</li>" in page.read_text(encoding="utf-8")
    place.write_text(json.dumps(found | {"worth_sorting": False}), encoding="utf-8")
    assert "it tells patches apart" in write_card(made / "marker.yaml", out, tmp_path, overwrite=True)[0].read_text()
    place.write_text(json.dumps(found | {"model_digest": "other"}), encoding="utf-8")
    with pytest.raises(ResultError, match="evidence is from another model"):
        write_card(made / "marker.yaml", out, tmp_path, overwrite=True)
    place.write_text("{}", encoding="utf-8")
    with pytest.raises(StoreError, match="damaged"):
        write_card(made / "marker.yaml", out, tmp_path, overwrite=True)


# --- slide-level models ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `slides.yaml`, a slide-level model, and `out`: its run over slides of two sites, audited.

    One slide is of glass alone, so that the model has no answer for it.
    """
    folder = tmp_path_factory.mktemp("of slides")
    rows = []
    for number in range(SLIDES):
        path = folder / f"{number:02}.tif"
        markers = [(32, 32 * number)] if number % 2 else []
        write_marker_slide(path, 96, 32 * (number + 3), mpp=0.25, markers=markers, marker_px=32, seed=number)
        rows.append((path, CLASSES[number % 2], "Aarhus" if number < 7 else "Bonn", f"p{number // 2}"))
    blank = folder / "blank.tif"
    write_gigapixel_slide(blank, 512, 512, mpp=0.25, tissue_fraction=0.0)
    with (folder / "slides.csv").open("w", newline="", encoding="utf-8") as file:
        columns = ("slide", "label", "site", "patient")
        csv.writer(file).writerows([columns, *rows, (blank, CLASSES[0], "Bonn", "p0")])
    outcome = explain(folder / "slides.csv", write_model(folder), folder / "out", target="tumour", **BAG)
    assert not outcome.failed
    audit_run(folder / "out", slides=8, only=("faithfulness",), trust_code=True)
    return folder


def answers(folder: Path) -> tuple[list[float], list[bool], list[str]]:
    """The probabilities of tumour, whether it is that, and the sites, of slides with an answer, from slides.csv."""
    rows = [row for row in rows_of(folder / "out").values() if row["slide_probability_tumour"]]
    probabilities = [float(row["slide_probability_tumour"]) for row in rows]
    return probabilities, [row["label"] == "tumour" for row in rows], [row["site"] for row in rows]


def test_a_slide_level_card_has_the_slides_own_probabilities(of_slides: Path, tmp_path: Path) -> None:
    path, page = write_card(of_slides / "slides.yaml", of_slides / "out", tmp_path)
    text, shown = path.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    rows = {tuple(row[:2]): row[2:] for row in cells(text)}
    probabilities, truth, sites = map(np.array, answers(of_slides))
    assert len(truth) == SLIDES
    for site, chosen in (("all", truth >= 0), ("Aarhus", sites == "Aarhus"), ("Bonn", sites == "Bonn")):
        here, there = truth[chosen], probabilities[chosen]
        area = f"{roc_auc_score(here, there):.3f}"
        assert rows["the slide's probability", site][:2] == [f"{here.sum()} / {(~here).sum()}", area]
        brier, mean = np.mean((there - here) ** 2), there.mean()
        assert [site, f"{mean:.3f}", f"{here.mean():.3f}", f"{brier:.3f}"] in cells(text)
        assert f'<td data-name="Brier score">{brier:.3f}</td>' in shown
    assert text.count("1 slide without any explained patch: not counted.") == 1
    assert "share of the patches" not in text
    assert [row[2] for row in cells(text)[-3:]] == ["---", "7", "7"], "bins of the calibration"


def test_a_slide_level_card_describes_both_parts_and_the_audit_by_slides(of_slides: Path, tmp_path: Path) -> None:
    path, page = write_card(of_slides / "slides.yaml", of_slides / "out", tmp_path)
    for text in (path.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")):
        for words in (
            "slide-level model (bags of patches)",
            "probabilities of classes that exclude each other, for the whole slide",
            "feature vectors of 12 numbers, one for each patch",
            "32 x 32 px at 0.5 um per pixel",
            "the 15 slides are from 7 patients: intervals are too narrow",
        ):
            assert words in text
        assert "patches do not tell" not in text
        assert "is derived from its patches" not in text
    metrics = card.make_card(open_result(of_slides / "out"), facts(of_slides, "slides")).audit
    assert metrics is not None
    assert f"The audit examined {metrics.sample.slides} slides with {metrics.sample.patches} patches;" in text
    headings = set(card.verdicts(card.make_card(open_result(of_slides / "out"), facts(of_slides, "slides"))))
    assert headings <= {"What holds", "What fails", "What these slides do not tell"}


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "hazard", "none"])
def test_what_labels_say_of_an_answer_depends_on_what_it_is(activation: str, of_slides: Path, tmp_path: Path) -> None:
    """Of two classes that exclude each other one is shown; of independent ones both; of survival none."""
    result = open_result(of_slides / "out")
    found, why = performance.performance_of([slide for slide in result if slide.is_finished], result, activation)
    assert [each.label for each in found] == {"softmax": ["tumour"], "hazard": []}.get(activation, list(CLASSES))
    assert bool(why) == (activation == "hazard")
    assert all(bool(each.bins) == (activation != "none") == bool(each.calibrated) for each in found)


def test_a_card_of_given_features_promises_no_pixels(tmp_path: Path) -> None:
    slide = tmp_path / "a.tif"
    write_gigapixel_slide(slide, 9_000, 14_000, mpp=MPP, tissue_fraction=1.0, blobs=1)
    trident(tmp_path / "features", frame_of(slide))
    model = write_aggregator(tmp_path / "model")
    outcome = explain(slide, model, tmp_path / "out", features=tmp_path / "features", **ON_FEATURES)
    assert not outcome.failed
    text = write_card(model, tmp_path / "out", tmp_path)[0].read_text(encoding="utf-8")
    assert "- **source**: features made elsewhere, abmil" in text
    assert "- **aggregator's parameters**: " in text
    assert "um per pixel" not in text.partition("## Data")[0]
    assert "explained at layer" not in text
