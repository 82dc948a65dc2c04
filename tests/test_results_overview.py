"""The overview lies right over the thumbnail, and one bad tile does not cost it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from tests.synthetic import corrupt_tile, write_marker_slide
from tests.test_results_table import FACTS
from wsi_gradcam.geometry import Region
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.results.display import unit_of, window_end
from wsi_gradcam.results.heatmap import EXPLAINED, Channel, HeatmapStore
from wsi_gradcam.results.manifest import SlidePlan
from wsi_gradcam.results.overview import UNREADABLE_GRAY, _panels, _probabilities, _scaled, _thumbnail, round_length
from wsi_gradcam.run.plan import plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.slides import open_slide


def plan_of(slide_px: tuple[int, int], stride: int) -> SlidePlan:
    return SlidePlan("", "", slide_px, (0.25, 0.25), (64.0, 64.0), (0.0, 0.0, 64.0, 64.0), 1, 256, stride)


@pytest.mark.parametrize("slide_px", [(1601, 1601), (3201, 2417), (1615, 4000), (700, 333)])
@pytest.mark.parametrize("shape", [(97, 143), (160, 160), (12, 20)])
def test_overlays_lie_where_the_heatmap_says(tmp_path: Path, slide_px: tuple[int, int], shape: tuple[int, int]) -> None:
    """Each heatmap pixel holds its own centre's place; read back, a thumbnail's pixel must find its own."""
    plan = plan_of(slide_px, 16)
    store = HeatmapStore.create(tmp_path / "h", "h", plan.heatmap_px, (4.0, 4.0), [Channel("y"), Channel("x")], {})
    for level, (height, width) in enumerate(plan.level_shapes):
        step, whole = 16 * 2**level, Region(0, 0, height, width)
        y, x = (np.mgrid[:height, :width] + 0.5) * step
        store.write(level, 0, whole, y.astype(np.float32))
        store.write(level, 1, whole, x.astype(np.float32))
        store.write_flags(level, whole, np.where(x > slide_px[1] / 2, EXPLAINED, 0).astype(np.uint8))
    covered, (found_y, found_x) = _scaled(store, plan, [0, 1], shape)
    pitch_y, pitch_x = slide_px[0] / shape[0], slide_px[1] / shape[1]
    true_y, true_x = (np.mgrid[: shape[0], : shape[1]] + 0.5) * np.array([pitch_y, pitch_x])[:, None, None]
    step = 16 * 2 ** max((i for i, (h, _) in enumerate(plan.level_shapes) if h >= shape[0]), default=0)
    assert np.abs(found_y - true_y).max() <= step / 2 + 1e-3  # inside the heatmap pixel that is shown
    assert np.abs(found_x - true_x).max() <= step / 2 + 1e-3
    np.testing.assert_array_equal(covered, found_x > slide_px[1] / 2)


def test_an_unreadable_tile_is_gray_and_the_rest_is_there(tmp_path: Path) -> None:
    good = write_marker_slide(
        tmp_path / "good.tif", 1024, 1536, mpp=(0.25, 0.3), markers=[(700, 900)], marker_px=60, downsamples=(8,)
    )
    corrupt_tile(good.path, tmp_path / "torn.tif", 0, 1, 2)
    with_tile, slide = open_slide(good.path), open_slide(tmp_path / "torn.tif")
    try:
        expected, found = _thumbnail(with_tile), _thumbnail(slide)
    finally:
        with_tile.close()
        slide.close()
    assert found.shape == expected.shape
    gray = (found == UNREADABLE_GRAY).all(axis=2)
    y, x = np.argwhere(gray).T
    step_y, step_x = 1024 / found.shape[0], 1536 / found.shape[1]
    assert 256 - 33 * step_y <= y.min() * step_y <= 256
    assert 512 <= (y.max() + 1) * step_y <= 512 + 33 * step_y
    assert 512 - 33 * step_x <= x.min() * step_x <= 512
    assert 768 <= (x.max() + 1) * step_x <= 768 + 33 * step_x
    np.testing.assert_allclose(found[~gray].astype(int), expected[~gray].astype(int), atol=2)


@pytest.mark.parametrize("methods", [("gradcam",), ("gradcam", "hirescam"), ("gradcam", "hirescam", "layercam")])
@pytest.mark.parametrize("target", ["tumour", "all", "tumour-other"])
@pytest.mark.parametrize("aspect", [0.2, 1.0, 3.0])
def test_each_probability_is_shown_once(methods: tuple[str, ...], target: str, aspect: float) -> None:
    """However many methods explain a class, and none for a contrast; each has a panel of its own."""
    facts = replace(FACTS, classes=("other", "tumour"))
    settings = make_settings(target=target, method=methods)
    run = plan_run(Path("out"), ModelSpec(name="toy", source="tests:toy"), facts, settings)
    maps = run.maps[:3]
    found = _probabilities(run, maps)
    shown = {shown.target for shown in maps if shown.target.is_class}
    assert {run.probabilities[number - len(run.maps)] for number in found} == shown
    assert len(found) == len(shown)
    figure, panels = _panels(len(maps), len(found), aspect)
    assert len(panels) == 1 + len(maps) + len(found)
    boxes = [axes.get_position() for axes in figure.axes]
    assert len(boxes) == 2 * len(panels) - 1  # the slide has no colour bar
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= 1
        assert 0 <= box.y0 < box.y1 <= 1
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_a_map_of_logits_lost_has_a_window_of_its_own() -> None:
    """Of occlusion a hundredth of a logit is a lot, of Grad-CAM nothing."""
    assert unit_of("occlusion: tumour") != unit_of("gradcam: tumour") == "logit"
    assert window_end(0.02, unit_of("occlusion: tumour")) == 0.02
    assert window_end(0.02, unit_of("gradcam: tumour")) == 1.0


@pytest.mark.parametrize(("length", "shown"), [(730, 500), (500, 500), (499, 200), (0.19, 0.1), (1.0, 1.0), (99, 50)])
def test_scale_bars_haveround_lengths(length: float, shown: float) -> None:
    assert round_length(length) == pytest.approx(shown)
