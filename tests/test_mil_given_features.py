"""Runs on features that were made elsewhere: each format, from its file to the marker in the heatmap."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zarr

from tests.feature_formats import DIMENSIONS, MARK, MPP, WRITERS, Made, trident
from tests.runs import SMALL, Heatmap, contents, rows_of, stored, toy_file, toy_values
from tests.synthetic import write_gigapixel_slide, write_marker_slide
from wsi_gradcam.api import explain, preview, validate
from wsi_gradcam.errors import ConfigError, FeatureError, ModelError, StoreError
from wsi_gradcam.export import export
from wsi_gradcam.mil.features import SlideFrame
from wsi_gradcam.results.run import open_result
from wsi_gradcam.run import bags, workload
from wsi_gradcam.slides import open_slide

STRIDE = 16
CLASSES = ("normal", "tumour")
ON_FEATURES: dict[str, Any] = {"bag_method": "gradient_x_input,one_removed", "heatmap_stride": STRIDE}


def write_aggregator(folder: Path, length: int = DIMENSIONS, **changes: Any) -> Path:
    """A model file of an aggregator alone: the mean of the first number of all patches is the logit of tumour."""
    folder.mkdir(exist_ok=True)
    classifier = torch.zeros(2, length)
    classifier[1, 0] = 1
    state = {
        "attention.0.weight": torch.zeros(3, length),
        "attention.0.bias": torch.zeros(3),
        "attention.2.weight": torch.zeros(1, 3),
        "attention.2.bias": torch.zeros(1),
        "classifier.weight": classifier,
        "classifier.bias": torch.zeros(2),
    }
    torch.save(state, folder / "abmil.pt")
    values = {
        "name": "first number",
        "aggregator": {"source": "abmil", "weights": "abmil.pt"},
        "classes": list(CLASSES),
        **changes,
    }
    path = folder / "slides.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide that is no square, all tissue, of a small file."""
    path = tmp_path_factory.mktemp("slide") / "a.tif"
    write_gigapixel_slide(path, 9_000, 14_000, mpp=MPP, tissue_fraction=1.0, blobs=1)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aggregator alone."""
    return write_aggregator(tmp_path_factory.mktemp("model"))


def frame_of(path: Path) -> SlideFrame:
    """The slide as writers of features see it."""
    opened = open_slide(path)
    try:
        return SlideFrame.of(path.name, opened.info)
    finally:
        opened.close()


def assert_marked(folder: Path, made: Made, side: tuple[float, float] | None = None) -> None:
    """The relevance of tumour lies where the marked patch does, to a pixel of the heatmap, and nowhere else."""
    heatmap = Heatmap(folder)
    image = heatmap.level(0, "relevance: tumour")
    rows, columns = np.nonzero(image)
    found = np.array([rows.min(), rows.max() + 1, columns.min(), columns.max() + 1]) * STRIDE
    x, y = made.xy[made.marked]
    height, width = side or (made.side, made.side)
    np.testing.assert_allclose(found, [y, y + height, x, x + width], atol=STRIDE)
    assert (image >= 0).all()


@pytest.mark.parametrize("kind", WRITERS)
def test_the_marker_lies_in_the_heatmap_where_the_patch_does(
    kind: str, slide: Path, model: Path, tmp_path: Path
) -> None:
    made = WRITERS[kind](tmp_path / "features", frame_of(slide))
    outcome = explain(slide, model, tmp_path / "out", features=tmp_path / "features", **ON_FEATURES)
    assert [record.status for record in outcome.records] == ["ok"], outcome.records
    assert_marked(tmp_path / "out" / "a.tif", made)
    assert validate(tmp_path / "out") == []
    row = rows_of(tmp_path / "out")["a.tif"]
    assert float(row["slide_logit_tumour"]) == pytest.approx(MARK / len(made.xy), rel=1e-5)


def test_a_slide_whose_pixels_are_no_squares(slide: Path, model: Path, tmp_path: Path) -> None:
    """Patches that were read as squares of level-0 pixels stay those, whatever the micrometres along each axis."""
    made = trident(tmp_path / "features", frame_of(slide))
    mpp = (MPP, 0.25)
    given = {"features": tmp_path / "features", "mpp": mpp, "replace_mpp": True, **ON_FEATURES}
    assert [r.status for r in explain(slide, model, tmp_path / "out", **given).records] == ["ok"]
    assert_marked(tmp_path / "out" / "a.tif", made)
    assert validate(tmp_path / "out") == []


def test_swapped_axes_are_refused_until_they_are_settled(slide: Path, model: Path, tmp_path: Path) -> None:
    """The slide fails with the flag that settles it; the same command with the flag explains it."""
    made = WRITERS["atlas"](tmp_path / "features", frame_of(slide))
    with h5py.File(tmp_path / "features" / "patches" / "a.h5", "a") as file:
        file["coords"][:, :2] = made.xy[:, ::-1]
    given = {"features": tmp_path / "features", **ON_FEATURES}
    (record,) = explain(slide, model, tmp_path / "out", **given).records
    assert record.status == "failed"
    assert "--feature-axes xy or yx" in record.error
    (record,) = explain(slide, model, tmp_path / "out", feature_axes="yx", **given).records
    assert record.status == "ok", record.error
    assert_marked(tmp_path / "out" / "a.tif", made)


@pytest.fixture(scope="module")
def features(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features by TRIDENT's rules, of patches that overlap."""
    folder = tmp_path_factory.mktemp("features")
    trident(folder, frame_of(slide), overlap=64)
    return folder


@pytest.fixture(scope="module")
def out(slide: Path, model: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results from features alone."""
    out = tmp_path_factory.mktemp("run") / "out"
    explain(slide, model, out, features=features, span_patches=32, **ON_FEATURES)
    return out


def test_what_there_is_of_a_run_on_features_alone(out: Path) -> None:
    """Channels of patches, the columns of the table, and pictures."""
    result = open_result(out)
    (found,) = result
    assert [channel.label for channel in found.channels] == [
        *(f"probability: {name}" for name in CLASSES),
        *(f"relevance: {name}" for name in CLASSES),
        "attention",
    ]
    assert [channel.active for channel in found.store.channels] == [False, False, True, False, False]
    table = found.patches
    assert table["gradient_x_input_relevance_tumour"].idxmax() == table["one_removed_relevance_tumour"].idxmax() == 40
    assert table["attention"].sum() == pytest.approx(1, abs=1e-5)
    assert found.patch_image(3).shape == (256, 256, 3)
    assert found.cams(3).shape[0] == 0
    assert found._repr_png_() is not None
    assert "relevance: tumour" in found._repr_html_()
    about = json.loads(pq.read_schema(out / "a.tif" / "patches.parquet").metadata[b"wsi_gradcam"])
    assert about["patch_level0_px"] == [512, 512]
    assert "coefficients" not in zarr.open_group(out / "a.tif" / "features.zarr", mode="r")
    assert sorted(result.windows()) == sorted(channel.label for channel in found.channels)
    result.folder.display.remove()


@pytest.mark.parametrize("to", ["png", "geojson", "tiff", "qupath"])
def test_exports_of_a_run_on_features_alone(to: str, out: Path, tmp_path: Path) -> None:
    """As of any other."""
    (done,) = export(out, to, tmp_path, window="slide")
    assert not done.error
    assert done.paths


@pytest.mark.slow
def test_workers_leave_the_same_bytes(slide: Path, model: Path, features: Path, out: Path, tmp_path: Path) -> None:
    """Each opens the features for itself."""
    explain(slide, model, tmp_path / "out", features=features, span_patches=32, workers=2, **ON_FEATURES)
    assert contents(tmp_path / "out") == contents(out)


def test_features_alone_read_no_pixel_of_a_patch(
    slide: Path, model: Path, features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the header and thumbnails is asked of the slide."""

    def read(*_: object) -> None:
        raise AssertionError("pixels of a patch were read")

    monkeypatch.setattr("wsi_gradcam.slides.patch_reader.read_region", read)
    monkeypatch.setattr("wsi_gradcam.run.examining.read_region", read)
    explain(slide, model, tmp_path / "out", features=features, **ON_FEATURES)
    assert rows_of(tmp_path / "out")["a.tif"]["status"] == "ok"


def test_the_same_command_goes_on_where_it_was_stopped(
    slide: Path, model: Path, features: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop at any stage the results are the same."""
    given = {"features": features, "span_patches": 32, **ON_FEATURES}
    for stage in ("import_span", "aggregate_bag", "answer_span"):
        with monkeypatch.context() as patched:
            calls = iter([False, True])
            whole = getattr(bags, stage)

            def stopped(*arguments: Any, whole: Any = whole, calls: Any = calls) -> Any:
                if next(calls, True) or whole is bags.aggregate_bag:
                    raise StoreError("disk full")
                return whole(*arguments)

            stages = {"import_span": "IMPORT", "aggregate_bag": "AGGREGATE", "answer_span": "ANSWER"}
            name = stages[stage]
            patched.setattr(workload, name, dataclasses.replace(getattr(workload, name), function=stopped))
            with pytest.raises(StoreError, match="disk full"):
                explain(slide, model, tmp_path / "out", **given)
    explain(slide, model, tmp_path / "out", **given)
    assert contents(tmp_path / "out") == contents(out)


def test_other_features_are_not_mixed_in(slide: Path, model: Path, tmp_path: Path) -> None:
    """Results are those of the features that they were made of."""
    trident(tmp_path / "features", frame_of(slide))
    given = {"features": tmp_path / "features", **ON_FEATURES}
    explain(slide, model, tmp_path / "out", **given)
    (path,) = (tmp_path / "features").rglob("features_*/a.h5")
    with h5py.File(path, "a") as file:
        file["features"][...] = 1
    (record,) = explain(slide, model, tmp_path / "out", **given).records
    assert record.status == "failed"
    assert "holds results of different features from TRIDENT" in record.error
    (record,) = explain(slide, model, tmp_path / "out", overwrite=True, **given).records
    assert record.status == "ok"


@pytest.mark.parametrize(
    ("settings", "error", "problem"),
    [
        ({}, ModelError, "give existing features with --features"),
        ({"features": "/nowhere"}, FeatureError, "/nowhere: no such folder of features"),
        ({"features": "s3://bucket/features"}, ConfigError, "copy them there"),
        ({"feature_unit": "px"}, ConfigError, "give their folder with --features"),
        ({"features": ".", "overlap": 0.5}, ConfigError, "features determine the patches; leave out overlap"),
        ({"features": ".", "method": "none,gradcam"}, ConfigError, "none stands alone"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_begins(
    settings: dict[str, Any], error: type[Exception], problem: str, slide: Path, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=problem):
        explain(slide, model, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_features_and_none_are_of_slide_level_models(slide: Path, tmp_path: Path) -> None:
    patch_model = toy_file(tmp_path, "encoder")
    for settings, problem in (
        ({"features": tmp_path}, "slide-level models"),
        ({"method": "none"}, "only for slide-level models"),
    ):
        with pytest.raises(ConfigError, match=problem):
            explain(slide, patch_model, tmp_path / "out", **settings)


def test_a_slide_without_features_fails_and_the_others_do_not(slide: Path, model: Path, tmp_path: Path) -> None:
    """It is looked at again by the next command: its features may have come."""
    other = tmp_path / "slides" / "b.tif"
    other.parent.mkdir()
    other.symlink_to(slide)
    trident(tmp_path / "features", frame_of(slide))
    given = {"features": tmp_path / "features", **ON_FEATURES}
    records = {r.slide.id: r for r in explain([slide, other], model, tmp_path / "out", **given).records}
    assert [records[name].status for name in ("a.tif", "b.tif")] == ["ok", "failed"]
    assert "no features of b.tif; expected a file such as b.h5" in records["b.tif"].error
    estimates = preview([slide, other], model, tmp_path / "new", **given)
    assert ([e.slide.id for e in estimates.estimates], len(estimates.errors)) == (["a.tif"], 1)
    for path in list((tmp_path / "features").rglob("*a*.h5")):
        path.with_name(path.name.replace("a", "b", 1)).write_bytes(path.read_bytes())
    explain([slide, other], model, tmp_path / "out", **given)
    assert rows_of(tmp_path / "out")["b.tif"]["status"] == "ok"


# --- with an encoder, down to the pixel ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small slide with a marker."""
    path = tmp_path_factory.mktemp("small") / "whole.tif"
    write_marker_slide(path, 360, 500, mpp=0.25, markers=[(100, 200)], marker_px=16)
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide-level model with an encoder."""
    return write_seeing(tmp_path_factory.mktemp("seeing"))


def write_seeing(folder: Path, **changes: Any) -> Path:
    encoder = {key: value for key, value in toy_values("encoder").items() if key not in ("name", "classes")}
    return write_aggregator(folder, 12, encoder={**encoder, **changes})


def write_given(folder: Path, out: Path, change: float = 0.0, side: int = 64) -> Path:
    """The features of a run's slide as a file of TRIDENT's."""
    group: Any = zarr.open_group(out / "whole.tif" / "features.zarr", mode="r")
    features = group["features"][:]
    random = np.random.default_rng(0).normal(size=features.shape).astype(np.float32)
    xy = stored(out / "whole.tif", "xy")
    folder.mkdir()
    with h5py.File(folder / "whole.h5", "w") as file:
        file["features"] = features * (1 - change) + change * random
        file["coords"] = xy
        marks = {"patch_size": side // 2, "patch_size_level0": side, "level0_magnification": 40}
        file["coords"].attrs.update({**marks, "target_magnification": 20, "overlap": 0})
    return folder


def test_pixels_are_explained_where_features_were_made(small: Path, seeing: Path, tmp_path: Path) -> None:
    """With our own features as if they were another's, maps and relevance are those of our own run."""
    settings = {**SMALL, "bag_method": "gradient_x_input"}
    explain(small, seeing, tmp_path / "own", **settings)
    features = write_given(tmp_path / "features", tmp_path / "own")
    (record,) = explain(small, seeing, tmp_path / "out", features=features, **settings).records
    assert (record.status, record.error) == ("ok", "")
    one, other = (open_result(tmp_path / name)["whole.tif"] for name in ("own", "out"))
    assert [c.label for c in one.channels] == [c.label for c in other.channels]
    for channel in one.channels:
        np.testing.assert_array_equal(one.heatmap(channel).values, other.heatmap(channel).values)
    columns = ["gradient_x_input_relevance_tumour", "attention", "cam_mean_tumour", "blur", "tissue"]
    np.testing.assert_array_equal(one.patches[columns], other.patches[columns])
    assert validate(tmp_path / "out") == []
    explain(small, seeing, tmp_path / "two", features=features, workers=2, **settings)
    assert contents(tmp_path / "two") == contents(tmp_path / "out")


def test_features_of_another_encoder_are_told(small: Path, seeing: Path, tmp_path: Path) -> None:
    explain(small, seeing, tmp_path / "own", **SMALL)
    features = write_given(tmp_path / "features", tmp_path / "own", change=0.9)
    (record,) = explain(small, seeing, tmp_path / "out", features=features, **SMALL).records
    assert record.status == "ok"
    assert "its features are not those that the encoder computes for these patches" in record.error
    assert rows_of(tmp_path / "out")["whole.tif"]["error"] == record.error


def test_patches_that_the_encoder_does_not_see_are_refused(small: Path, seeing: Path, tmp_path: Path) -> None:
    """Their size is named, and both ways out; a size by a rounded magnification is read as it was made."""
    explain(small, seeing, tmp_path / "own", **SMALL)
    features = write_given(tmp_path / "features", tmp_path / "own")
    coarse = write_seeing(tmp_path / "coarse", mpp=1.0)
    (record,) = explain(small, coarse, tmp_path / "out", features=features, **SMALL).records
    assert record.status == "failed"
    assert "features of patches of 16 x 16 um, but the encoder sees 32 x 32 um (32 px at 1)" in record.error
    assert "--patch-mpp" in record.error
    (record,) = explain(small, coarse, tmp_path / "out", features=features, method="none", **SMALL).records
    assert record.status == "ok"
    near = write_seeing(tmp_path / "near", mpp=0.54)
    (record,) = explain(small, near, tmp_path / "near_out", features=features, **SMALL).records
    assert record.status == "ok"
    assert record.error == "patches are read at the resolution of the features, 0.5 um/px, not at 0.54"
    assert open_result(tmp_path / "near_out")["whole.tif"].plan.footprint == (64, 64)


def test_own_features_without_pixels(small: Path, seeing: Path, tmp_path: Path) -> None:
    """An encoder and `--method none`: what patches are worth, and no second look at the slide."""
    (record,) = explain(small, seeing, tmp_path / "out", method="none", **SMALL).records
    assert record.status == "ok"
    labels = [channel.label for channel in open_result(tmp_path / "out")["whole.tif"].channels]
    assert labels[2:] == ["relevance: normal", "relevance: tumour", "attention"]
    assert validate(tmp_path / "out") == []


def test_float16_that_cannot_hold_them_is_told(slide: Path, model: Path, tmp_path: Path) -> None:
    trident(tmp_path / "features", frame_of(slide))
    (path,) = (tmp_path / "features").rglob("features_*/a.h5")
    with h5py.File(path, "a") as file:
        file["features"][5] = 1e6
    given = {"features": tmp_path / "features", "feature_precision": "float16", **ON_FEATURES}
    (record,) = explain(slide, model, tmp_path / "out", **given).records
    assert record.status == "failed"
    assert "infinite in float16; use --feature-precision float32" in record.error
