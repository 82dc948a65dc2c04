"""The promises of a whole run: markers found where they are, values in logits, nothing lost at edges and levels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from captum.attr import LayerGradCam

from tests import toy_models
from tests.runs import SMALL, Heatmap, contents, rows_of, stored, toy_spec
from tests.synthetic import MarkerSlide, corrupt_tile, write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.errors import as_text
from wsi_gradcam.results.slide_tables import read_slides
from wsi_gradcam.results.validation import validate

MARKER_PX = 24
SIZE = (2300, 2900)
# One in the first patch, one on a patch's corner, some anywhere, one that ends 2 px before the bottom right.
MARKERS = ((14, 14), (512, 640), (801, 1907), (1499, 333), (1733, 1405), (2286, 2886))
UNALIGNED = (3, 7)  # no level of the slide is a power of two smaller than level 0


SLIDE_PX = (360, 500)


@dataclass(frozen=True)
class MarkerRun:
    """A run of the marker model, and where its markers' centres are in micrometres, (y, x) each."""

    heatmap: Heatmap
    truth_um: npt.NDArray[np.float64]
    marker_um: float


@pytest.fixture(
    scope="module",
    params=[(0.25, 0.5, 0.0), (0.25, 1.0, 0.5), (0.25, 0.73, 0.0), (0.25, 0.73, 0.5), ((0.25, 0.31), 0.5, 0.5)],
    ids=str,
)
def marker_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MarkerRun:
    """Runs by (slide mpp, model mpp, overlap)."""
    slide_mpp, model_mpp, overlap = request.param
    folder = tmp_path_factory.mktemp("marked")
    slide = write_marker_slide(
        folder / "a.tif", *SIZE, mpp=slide_mpp, markers=MARKERS, marker_px=MARKER_PX, downsamples=UNALIGNED
    )
    spec = toy_spec("marker", mpp=model_mpp, patch_px=64)
    explain(slide.path, spec, folder / "out", overlap=overlap, heatmap_stride=8, min_tissue=0.0)
    mpp = np.array(slide_mpp) * np.ones(2)
    truth_um = np.array([((t + b) / 2, (le + r) / 2) for t, le, b, r in slide.boxes()]) * mpp
    return MarkerRun(Heatmap(folder / "out" / "a.tif"), truth_um, MARKER_PX * mpp.max())


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> MarkerSlide:
    """A small slide, all tissue."""
    return write_marker_slide(
        tmp_path_factory.mktemp("slide") / "whole.tif",
        *SLIDE_PX,
        mpp=0.25,
        markers=[(100, 200), (350, 490)],
        marker_px=16,
    )


@pytest.fixture(scope="module")
def glassy_slide(tmp_path_factory: pytest.TempPathFactory) -> MarkerSlide:
    """A small slide with glass around the tissue."""
    return write_marker_slide(
        tmp_path_factory.mktemp("slide") / "glassy.tif", 1500, 1300, mpp=0.25, markers=[], marker_px=16, glass_px=300
    )


@pytest.fixture(scope="module")
def plain_run(slide: MarkerSlide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pooled_linear` on patches of slide pixels; the folder of the slide's results."""
    out = tmp_path_factory.mktemp("plain")
    explain(slide.path, toy_spec("pooled_linear", mpp=0.25), out, **SMALL)
    return out / slide.path.name


@pytest.mark.parametrize("level", range(3))
def test_peaks_lie_on_the_markers(marker_run: MarkerRun, level: int) -> None:
    assert len(marker_run.heatmap.datasets) == 3
    image, scale = marker_run.heatmap.level(level, "gradcam: marker"), marker_run.heatmap.scale_um(level)
    centres_um = _centres_um(image.shape, scale)
    for y_um, x_um in marker_run.truth_um:
        off = np.abs(centres_um - (y_um, x_um)) / scale  # in heatmap pixels
        near = np.where((off < 6).all(axis=2), image, -np.inf)
        peak = np.unravel_index(int(near.argmax()), image.shape)
        assert image[peak] > 0.2 * image.max()
        assert (off[peak] <= 1).all()


@pytest.mark.parametrize("level", range(3))
def test_it_is_dark_elsewhere(marker_run: MarkerRun, level: int) -> None:
    image, scale = marker_run.heatmap.level(level, "gradcam: marker"), marker_run.heatmap.scale_um(level)
    centres_um = _centres_um(image.shape, scale)
    away_um = np.min([np.abs(centres_um - truth).max(axis=2) for truth in marker_run.truth_um], axis=0)
    # Half a marker, and what the model's and the heatmap's pixels smear.
    assert np.abs(image[away_um > marker_run.marker_um + 2 * scale.max()]).max() < 0.02 * image.max()


@pytest.mark.parametrize("level", range(3))
def test_there_is_no_systematic_shift(marker_run: MarkerRun, level: int) -> None:
    image, scale = marker_run.heatmap.level(level, "gradcam: marker"), marker_run.heatmap.scale_um(level)
    offsets = [_centroid(image, truth / scale - 0.5) for truth in marker_run.truth_um[1:-1]]
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.2  # of a heatmap pixel


def test_each_level_is_the_mean_of_the_one_before(marker_run: MarkerRun) -> None:
    images = [marker_run.heatmap.level(level, "gradcam: marker") for level in range(3)]
    for level, (fine, coarse) in enumerate(pairwise(images)):
        np.testing.assert_array_equal(marker_run.heatmap.scale_um(level + 1), 2 * marker_run.heatmap.scale_um(level))
        assert coarse.shape == (-(-fine.shape[0] // 2), -(-fine.shape[1] // 2))
        inner = fine[: fine.shape[0] // 2 * 2, : fine.shape[1] // 2 * 2]
        means = inner.reshape(inner.shape[0] // 2, 2, -1, 2).mean(axis=(1, 3))
        np.testing.assert_allclose(coarse[: len(means), : means.shape[1]], means, rtol=1e-4, atol=1e-6)


def _centres_um(shape: tuple[int, ...], scale_um: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(y, x) of all pixels' centres, from the scale alone."""
    centres: npt.NDArray[np.float64] = (np.moveaxis(np.mgrid[: shape[0], : shape[1]], 0, -1) + 0.5) * scale_um
    return centres


def _centroid(image: npt.NDArray[np.float32], truth: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where the values around a pixel position have their centre of mass, seen from it, in heatmap px."""
    y, x = np.round(truth).astype(int)
    weights = np.maximum(image[y - 5 : y + 6, x - 5 : x + 6], 0).astype(np.float64)
    places = np.mgrid[y - 5 : y + 6, x - 5 : x + 6]
    centre: npt.NDArray[np.float64] = (places * weights).sum(axis=(1, 2)) / weights.sum() - truth
    return centre


@pytest.mark.parametrize(
    ("changes", "mpp"),
    [
        ({"window": "hann"}, 0.5),
        ({"window": "uniform"}, 0.5),
        ({"window": "hann", "overlap": 0.4}, 0.5),
        ({"window": "uniform", "overlap": 0.4}, 0.5),
        ({"window": "hann"}, 0.73),  # patches begin anywhere in a pixel of the heatmap
        ({"window": "hann", "heatmap_stride": 2}, 0.73),
    ],
)
def test_a_constant_cam_gives_a_constant_heatmap(
    slide: MarkerSlide, tmp_path: Path, changes: dict[str, Any], mpp: float
) -> None:
    explain(slide.path, toy_spec("constant", mpp=mpp), tmp_path, **{**SMALL, **changes})
    heatmap = Heatmap(tmp_path / slide.path.name)
    for level in range(len(heatmap.datasets)):
        explained = heatmap.flags(level) & 2 > 0
        assert explained.all()  # the whole slide is tissue, also where the last patches reach beyond it
        image = heatmap.level(level, "gradcam: other")
        np.testing.assert_allclose(image, 2 * toy_models.CONSTANT, rtol=1e-5)


def test_coverage_ends_where_tissue_does(glassy_slide: MarkerSlide, tmp_path: Path) -> None:
    settings = {**SMALL, "min_tissue": 0.5}
    explain(glassy_slide.path, toy_spec("constant"), tmp_path, **settings)
    folder = tmp_path / glassy_slide.path.name
    table, heatmap = pq.read_table(folder / "patches.parquet"), Heatmap(folder)
    covered = np.zeros(heatmap.flags(0).shape, bool)
    for y, x in zip(table["y"].to_pylist(), table["x"].to_pylist(), strict=True):
        covered[y // 8 : y // 8 + 8, x // 8 : x // 8 + 8] = True
    assert 0 < covered.sum() < 0.9 * covered.size
    np.testing.assert_array_equal(heatmap.flags(0) & 2 > 0, covered)
    for level in range(len(heatmap.datasets)):
        image, explained = heatmap.level(level, "gradcam: other"), heatmap.flags(level) & 2 > 0
        np.testing.assert_allclose(image[explained], 2 * toy_models.CONSTANT, rtol=1e-5)
        assert (image[~explained] == 0).all()


@pytest.mark.parametrize("heatmap_stride", [8, 16, 4])
def test_the_mean_of_the_map_and_the_bias_are_the_logit(
    slide: MarkerSlide, tmp_path: Path, heatmap_stride: int
) -> None:
    """Cells of 16 level-0 px: as fine as the heatmap's pixels, or a whole number of times coarser."""
    explain(slide.path, toy_spec("pooled_linear"), tmp_path, **{**SMALL, "heatmap_stride": heatmap_stride})
    folder, side = tmp_path / slide.path.name, 64 // heatmap_stride
    table, heatmap = pq.read_table(folder / "patches.parquet"), Heatmap(folder)
    _, _, bias = _weights()
    checked = 0
    for number, name in enumerate(("other", "marker")):
        image = heatmap.level(0, f"gradcam: {name}")
        for y, x, logit in zip(*(table[c].to_pylist() for c in ("y", "x", f"logit_{name}")), strict=True):
            if y + 64 <= SLIDE_PX[0] and x + 64 <= SLIDE_PX[1]:
                part = image[y // heatmap_stride :, x // heatmap_stride :][:side, :side]
                assert float(part.mean()) + float(bias[number]) == pytest.approx(logit, abs=1e-4)
                checked += 1
    assert checked == 2 * (SLIDE_PX[0] // 64) * (SLIDE_PX[1] // 64)


def _weights() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The network that every process builds: `load` seeds the generator with 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = toy_models.pooled_linear()
    return network.eval(), network.fc.weight.detach(), network.fc.bias.detach()


def test_cams_equal_captum_on_patches_read_independently(slide: MarkerSlide, plain_run: Path) -> None:
    network, _, _ = _weights()
    xy = stored(plain_run, "xy")
    padded = np.pad(slide.level0, ((0, 32), (0, 32), (0, 0)), constant_values=255)
    patches = np.stack([padded[y : y + 32, x : x + 32] for x, y in xy.tolist()])
    images = torch.from_numpy(patches).permute(0, 3, 1, 2) / 255
    np.testing.assert_allclose(stored(plain_run, "logits"), network(images).detach(), rtol=1e-4, atol=1e-6)
    captum = LayerGradCam(network, network.get_submodule("features"))
    cams = stored(plain_run, "cam")
    for target in range(2):
        expected = captum.attribute(images, target).detach().numpy()[:, 0]
        np.testing.assert_allclose(cams[:, target], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_patches_cover_the_slide_once(plain_run: Path) -> None:
    places = {(y, x) for x, y in stored(plain_run, "xy").tolist()}
    assert places == {(y, x) for y in range(0, SLIDE_PX[0], 32) for x in range(0, SLIDE_PX[1], 32)}


def test_the_table_agrees_with_the_patch_store(plain_run: Path) -> None:
    table = pq.read_table(plain_run / "patches.parquet")
    logits, cams = stored(plain_run, "logits"), stored(plain_run, "cam")
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    assert set(table["status"].to_pylist()) == {"ok"}
    for i, name in enumerate(("other", "marker")):
        np.testing.assert_array_equal(table[f"logit_{name}"], logits[:, i])
        np.testing.assert_allclose(table[f"probability_{name}"], shares[:, i], rtol=1e-5)
        cells = cams[:, i] * cams.shape[2] * cams.shape[3]
        np.testing.assert_allclose(table[f"cam_mean_{name}"], cells.mean(axis=(1, 2)), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(table[f"cam_max_{name}"], cells.max(axis=(1, 2)), rtol=1e-6)


def test_probability_maps_show_the_patch_probability(plain_run: Path) -> None:
    table, heatmap = pq.read_table(plain_run / "patches.parquet"), Heatmap(plain_run)
    image = heatmap.level(0, "probability: marker")
    for y, x, share in zip(*(table[c].to_pylist() for c in ("y", "x", "probability_marker")), strict=True):
        np.testing.assert_allclose(image[y // 8 : y // 8 + 4, x // 8 : x // 8 + 4], share, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"batch_size": 12}, {"batch_size": 2}, {"span_patches": 24}])
def test_batch_and_span_do_not_change_the_heatmap(
    slide: MarkerSlide, plain_run: Path, tmp_path: Path, changes: dict[str, int]
) -> None:
    explain(slide.path, toy_spec("pooled_linear", mpp=0.25), tmp_path, **{**SMALL, **changes})
    found, expected = Heatmap(tmp_path / slide.path.name), Heatmap(plain_run)
    assert found.labels == expected.labels
    for label in expected.labels:
        np.testing.assert_allclose(found.level(0, label), expected.level(0, label), rtol=1e-4, atol=1e-6)


def test_reader_threads_change_nothing(slide: MarkerSlide, plain_run: Path, tmp_path: Path) -> None:
    explain(slide.path, toy_spec("pooled_linear", mpp=0.25), tmp_path, **SMALL, reader_threads=5)
    found, expected = contents(tmp_path), contents(plain_run.parent)
    assert {name for name in expected if found[name] != expected[name]} == {"run.yaml"}


def test_torch_threads_are_set(slide: MarkerSlide, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        explain(slide.path, toy_spec("pooled_linear"), tmp_path, **SMALL, torch_threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_run_yaml_tells_what_was_done(plain_run: Path) -> None:
    run = yaml.safe_load((plain_run.parent / "run.yaml").read_text(encoding="utf-8"))
    assert run["settings"]["heatmap_stride"] == 8
    assert run["model"]["classes"] == ["other", "marker"]
    assert run["model"]["layer"] == "features"
    assert [target["label"] for target in run["targets"]] == ["other", "marker"]
    assert run["versions"]["torch"] == torch.__version__.split("+")[0]


def test_targets_choose_the_channels(slide: MarkerSlide, tmp_path: Path) -> None:
    explain(slide.path, toy_spec("marker"), tmp_path, **SMALL, target=("predicted", "1"))
    heatmap = Heatmap(tmp_path / slide.path.name)
    assert heatmap.labels == ["gradcam: predicted", "gradcam: marker", "probability: predicted", "probability: marker"]
    assert heatmap.level(0, "probability: predicted").min() >= 0.5  # the larger one of two


def test_a_slide_without_tissue_says_so(tmp_path: Path) -> None:
    glass = write_marker_slide(tmp_path / "glass.tif", 700, 700, mpp=0.25, markers=[], marker_px=16, glass_px=350)
    outcome = explain(glass.path, toy_spec("pooled_linear"), tmp_path / "out", **SMALL)
    assert not outcome.failed
    row = rows_of(tmp_path / "out")["glass.tif"]
    assert (row["status"], row["patches"], row["error"]) == ("no_tissue", "0", "")
    assert validate(tmp_path / "out") == []
    heatmap = Heatmap(tmp_path / "out" / "glass.tif")
    assert not heatmap.level(0, "gradcam: marker").any()
    assert pq.read_table(tmp_path / "out" / "glass.tif" / "patches.parquet").num_rows == 0


def test_an_unreadable_tile_costs_its_patches_and_no_more(tmp_path: Path) -> None:
    clean = write_marker_slide(
        tmp_path / "clean.tif", 1024, 1536, mpp=0.25, markers=[(100, 200)], marker_px=16, downsamples=(4, 8)
    )
    corrupt_tile(clean.path, tmp_path / "torn.tif", 0, 1, 2)  # level-0 y 256 to 512, x 512 to 768
    settings = {**SMALL, "batch_size": 32, "span_patches": 256, "max_unreadable": 0.5}
    explain([clean.path, tmp_path / "torn.tif"], toy_spec("pooled_linear", mpp=0.25), tmp_path / "out", **settings)
    good, torn = tmp_path / "out" / "clean.tif", tmp_path / "out" / "torn.tif"
    table = pq.read_table(torn / "patches.parquet").to_pandas()
    lost = table["y"].between(256, 511) & table["x"].between(512, 767)
    assert lost.sum() == 64
    assert (table["status"][lost] == "unreadable").all()
    assert table["cause"][lost].str.contains(r"torn\.tif: level 0, x 512, y 256, 256 x 256 px cannot be decoded").all()
    assert (table["status"][~lost] == "ok").all()
    assert table["cause"][~lost].isna().all()
    assert table.filter(regex="^(logit|probability|cam)_")[lost].isna().all(axis=None)
    np.testing.assert_array_equal(stored(torn, "cam")[~lost], stored(good, "cam")[~lost])
    whole, holed = Heatmap(good), Heatmap(torn)
    hole = np.zeros(whole.flags(0).shape, bool)
    hole[32:64, 64:96] = True
    for label in whole.labels:
        np.testing.assert_array_equal(holed.level(0, label), np.where(hole, 0, whole.level(0, label)))
    np.testing.assert_array_equal(holed.flags(0) & 4 > 0, hole)
    assert not (holed.flags(0)[hole] & 2).any()
    row = rows_of(tmp_path / "out")["torn.tif"]
    assert (row["status"], row["unreadable"]) == ("ok", "64")
    assert row["error"].startswith("64 of 1536 patches are unreadable: ")
    assert validate(tmp_path / "out") == []


def test_too_many_unreadable_patches_are_a_failure(tmp_path: Path) -> None:
    clean = write_marker_slide(tmp_path / "clean.tif", 600, 800, mpp=0.25, markers=[], marker_px=16, downsamples=(4, 8))
    corrupt_tile(clean.path, tmp_path / "torn.tif", 0, 1, 2)
    out, spec = tmp_path / "out", toy_spec("pooled_linear", mpp=0.25)
    (record,) = explain(tmp_path / "torn.tif", spec, out, **SMALL).failed
    assert record.error.startswith("64 of 475 patches are unreadable: ")
    assert record.error.endswith("; more than --max-unreadable 0.01")
    again = explain(tmp_path / "torn.tif", spec, out, **SMALL, max_unreadable=0.2)
    assert [(r.status, r.skipped) for r in again.records] == [("ok", True)]  # nothing is computed for the change


@pytest.mark.parametrize("model", ["pooled_linear", "other_linear"])
def test_display_windows_run_from_zero_to_a_high_quantile(slide: MarkerSlide, tmp_path: Path, model: str) -> None:
    explain(slide.path, toy_spec(model), tmp_path, **SMALL)
    heatmap = Heatmap(tmp_path / slide.path.name)
    windows = {channel["label"]: channel["window"] for channel in heatmap.ome["omero"]["channels"]}
    ends = []
    for name in ("other", "marker"):
        values, window = heatmap.level(0, f"gradcam: {name}"), windows[f"gradcam: {name}"]
        ends.append(window["end"])
        assert window["start"] == 0
        assert window["end"] == pytest.approx(max(np.quantile(values, 0.995), 1.0), rel=1e-5)  # never below a logit
        assert window["min"] == pytest.approx(min(0.0, float(values.min())))
        assert window["max"] == pytest.approx(max(float(values.max()), window["end"]))
        probability = windows[f"probability: {name}"]
        assert (probability["start"], probability["end"]) == (0, 1)
    assert (max(ends) > 1) == (model == "other_linear")


@pytest.mark.parametrize("name", ["a$\\frac{$.tif", "slide [b] %s.tif", "胃.tif"])
def test_any_file_name_will_do(slide: MarkerSlide, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(slide.path.read_bytes())
    outcome = explain(path, toy_spec("pooled_linear"), tmp_path / "out", **SMALL)
    assert [record.error for record in outcome.records] == [""]
    assert validate(tmp_path / "out") == []


def test_a_name_that_is_not_unicode_stops_nothing(slide: MarkerSlide, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"\xff.tif")
    for path in (tmp_path / "in" / name, tmp_path / "in" / "good.tif"):
        path.symlink_to(slide.path)
    explain(tmp_path / "in", toy_spec("pooled_linear"), tmp_path / "out", **SMALL)
    rows = read_slides(tmp_path / "out" / "slides.csv")
    assert set(rows) == {as_text(name), "good.tif"}
    assert rows["good.tif"]["status"] == "ok"
