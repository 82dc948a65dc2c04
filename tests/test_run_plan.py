"""Plans: what identifies a run, what a slide's work is cut into, and estimates that agree with what is made."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from tests.slides_in_memory import ArraySlide
from wsi_gradcam.cam.facts import BagFacts, Choice, Layer, Layout, ModelFacts, Trial
from wsi_gradcam.cam.targets import Target
from wsi_gradcam.errors import ConfigError, ModelError, MppError, StoreError, TargetError
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.models.spec import ModelSpec
from wsi_gradcam.results.heatmap import SHARD, Channel, HeatmapStore
from wsi_gradcam.results.manifest import SlidePlan
from wsi_gradcam.results.patch_store import PatchStore
from wsi_gradcam.run.plan import RunPlan, estimate, memory_estimate, plan_run, plan_slide
from wsi_gradcam.run.settings import NOT_IN_IDENTITY, Settings, make_settings
from wsi_gradcam.tissue import Patches
from wsi_gradcam.tissue.masks import TISSUE_RULE

FACTS = ModelFacts(
    name="toy",
    source="tests:toy",
    digest="d" * 64,
    license=None,
    classes=("other", "tumour", "stroma"),
    activation="softmax",
    patch_px=(32, 64),
    mpp=0.5,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    view=(0.0, 0.0, 32.0, 64.0),
    layers=(Layer("features", Layout("bkhw", 12, 4, 8)),),
    traced=False,
    cam_shape=(4, 8),
    parameters=1000,
    activation_bytes=1 << 16,
    batch_size=32,
    choice=Choice("eager", "float32"),
)
SPEC = ModelSpec(name="toy", source="tests:toy")
ENTRY = SlideEntry("a", "/slides/a.svs")
PLAN = SlidePlan("s", "r", (1000, 900), (0.25, 0.3), (128.0, 213.3), (0.0, 0.0, 128.0, 213.3), 1000, 256, 16)


def run_of(facts: ModelFacts = FACTS, **settings: Any) -> RunPlan:
    return plan_run(Path("out"), SPEC, facts, make_settings(**settings))


# Every setting with a value that is not its default.
CHANGES: dict[str, Any] = {
    "target": ("tumour",),
    "method": ("hirescam",),
    "layer": "features",
    "mpp": (0.25, 0.25),
    "replace_mpp": True,
    "patch_mpp": 1.0,
    "patch_px": (32, 32),
    "overlap": 0.5,
    "stride_px": 16,
    "min_tissue": 0.2,
    "tissue": "everything",
    "mask": Path("/masks").absolute(),
    "include": ("tumour",),
    "exclude": ("artefact",),
    "mask_frame": "slide",
    "outlines": "drawn",
    "allow_upsampling": True,
    "heatmap_stride": 8,
    "window": "uniform",
    "batch_size": 16,
    "span_patches": 512,
    "device": "cuda",
    "engine": "openvino",
    "precision": "bfloat16",
    "reader": "openslide",
    "trust_objective": True,
    "channels": (2, 1, 0),
    "decode": "scaled",
    "bag_method": ("lrp",),
    "feature_precision": "float16",
    "bag_baseline": "mean",
    "features": Path("/features").absolute(),
    "feature_patch_um": 112.0,
    "feature_unit": "um",
    "feature_axes": "yx",
    "feature_name": "uni_v1",
    "allow_hosts": ("*.example.org",),
    "reader_threads": 7,
    "torch_threads": 3,
    "isolate": True,
    "isolate_memory": 4096,
    "isolate_seconds": 120.0,
    "max_unreadable": 0.5,
}


def test_every_setting_is_tried_here() -> None:
    assert set(CHANGES) == set(Settings.model_fields)
    assert all(
        getattr(make_settings(**{key: value}), key) != getattr(Settings(), key) for key, value in CHANGES.items()
    )


FOUND_OUT = {"layer", "engine", "precision", "batch_size"}  # what counts is what was found, not what was asked


@pytest.mark.parametrize("key", sorted(set(CHANGES) - NOT_IN_IDENTITY - FOUND_OUT))
def test_a_setting_that_changes_results_changes_the_digest(key: str) -> None:
    assert run_of(**{key: CHANGES[key]}).digest() != run_of().digest()


@pytest.mark.parametrize("key", sorted(NOT_IN_IDENTITY))
def test_a_setting_that_changes_speed_or_slides_alone_does_not(key: str) -> None:
    assert run_of(**{key: CHANGES[key]}).digest() == run_of().digest()


def test_how_tiles_are_decoded_counts_as_chosen() -> None:
    scaled = replace(FACTS, choice=replace(FACTS.choice, decode="scaled"))
    assert run_of(scaled).digest() != run_of().digest()
    assert "decode" not in run_of(decode="auto").identity()["settings"]  # as in runs of older versions


def test_how_bags_are_explained_counts_for_slide_level_models() -> None:
    bags = replace(FACTS, bag=BagFacts("encoder", 12, ("attention",)))
    plain = run_of(bags).digest()
    assert plain != run_of().digest()
    assert run_of(bags, bag_method="lrp").digest() != plain
    assert run_of(bags, feature_precision="float16").digest() != plain
    assert not {"bag_method", "feature_precision"} & set(run_of().identity()["settings"])  # as in older versions


def test_the_layer_counts_as_found_however_it_was_named() -> None:
    assert run_of(layer="features").digest() == run_of().digest()
    other = (replace(FACTS.layers[0], name="other"),)
    assert run_of(replace(FACTS, layers=other)).digest() != run_of().digest()


def test_engine_precision_and_batch_size_count_as_found_however_they_were_asked_for() -> None:
    asked = run_of(engine="eager", precision="float32", batch_size="auto")
    assert asked.digest() == run_of().digest()
    for choice in (Choice("openvino", "float32"), Choice("eager", "bfloat16")):
        assert run_of(replace(FACTS, choice=choice)).digest() != run_of().digest()
    assert run_of(replace(FACTS, batch_size=16)).digest() != run_of().digest()


def test_how_engines_did_in_trials_does_not_count() -> None:
    trials = (Trial("openvino", "float32", 3.5),)
    assert run_of(replace(FACTS, choice=replace(FACTS.choice, trials=trials))).digest() == run_of().digest()


def test_a_span_must_hold_whole_batches_of_the_size_that_was_found() -> None:
    with pytest.raises(ConfigError, match="span_patches is 48, expected a multiple of the batch size 32"):
        run_of(batch_size="auto", span_patches=48)


def test_every_method_explains_every_target() -> None:
    run = run_of(method="gradcam,eigencam", target=["tumour", "tumour-other", "predicted"])
    assert [m.label for m in run.maps] == [
        f"{method}: {target}"
        for method in ("gradcam", "eigencam")
        for target in ("tumour", "tumour-other", "predicted")
    ]
    assert [m.factor for m in run.maps] == [32] * 3 + [1] * 3
    assert [t.label for t in run.probabilities] == ["tumour", "predicted"]


def test_the_model_counts() -> None:
    assert run_of(replace(FACTS, digest="e" * 64)).digest() != run_of().digest()


def test_targets_count_as_what_they_mean() -> None:
    assert run_of(target=["1"]).digest() == run_of(target=["tumour"]).digest()
    assert run_of(target=["all"]).digest() == run_of().digest()
    assert run_of(target=["1", "2"]).digest() != run_of(target=["2", "1"]).digest()


def test_a_worker_gets_the_same_run() -> None:
    run = run_of(target=["predicted"], mpp=0.3)
    sent = pickle.loads(pickle.dumps(run))
    assert sent == run
    assert sent.digest() == run.digest()


@pytest.mark.parametrize(
    ("facts", "settings", "error", "problem"),
    [
        (FACTS, {"method": "gradcan"}, ConfigError, "method 'gradcan' is not known; expected one of cam, gradcam"),
        (FACTS, {"target": ["cat"]}, TargetError, "target 'cat' is not a class"),
        (
            replace(FACTS, mpp=None),
            {},
            ModelError,
            "give them, for example with --patch-mpp 0.5, or as 'mpp: 0.5' in the model file",
        ),
    ],
)
def test_a_run_that_cannot_be_is_refused(
    facts: ModelFacts, settings: dict[str, Any], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        run_of(facts, **settings)


def test_the_patches_mpp_is_the_models_unless_given() -> None:
    assert run_of().mpp == 0.5
    assert run_of(patch_mpp=1).mpp == 1.0
    assert run_of(replace(FACTS, mpp=None), patch_mpp=2).mpp == 2.0


def test_a_run_explains_what_was_asked() -> None:
    assert run_of(target=["2", "predicted"]).targets == (Target("stroma", 2), Target("predicted", None))


# Slides


@given(
    st.builds(
        SlidePlan,
        st.text(),
        st.text(),
        st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
        st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
        st.tuples(st.floats(1, 10**4), st.floats(1, 10**4)),
        st.tuples(*[st.floats(0, 10**4)] * 2, *[st.floats(0.01, 10**4)] * 2),
        st.integers(0, 10**6),
        st.integers(1, 10**4),
        st.sampled_from([1, 16, 64]),
    )
)
def test_a_plan_comes_back_from_json_exactly(plan: SlidePlan) -> None:
    assert SlidePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "change", [{"stride": None}, {"more": 1}, {"slide_px": 3}], ids=["missing key", "unknown key", "no pair"]
)
def test_a_plan_of_another_version_is_refused(change: dict[str, Any]) -> None:
    values = {key: value for key, value in {**PLAN.to_json(), **change}.items() if value is not None}
    with pytest.raises(StoreError, match="not a plan of this version"):
        SlidePlan.from_json(values)


@given(st.integers(0, 2000), st.integers(1, 300))
def test_spans_hold_every_patch_once_in_order(patches: int, span: int) -> None:
    spans = replace(PLAN, patches=patches, span=span).spans
    assert [i for first, end in spans for i in range(first, end)] == list(range(patches))
    assert all(first % span == 0 and 0 < end - first <= span for first, end in spans)


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.sampled_from([4, 16]))
def test_the_heatmap_covers_the_slide_and_no_pixel_more(height: int, width: int, stride: int) -> None:
    rows, columns = replace(PLAN, slide_px=(height, width), stride=stride).heatmap_px
    assert (rows - 1) * stride < height <= rows * stride
    assert (columns - 1) * stride < width <= columns * stride


def test_blocks_are_the_stores_blocks(tmp_path: Path) -> None:
    plan = replace(PLAN, slide_px=(2 * SHARD + 2, SHARD - 5), stride=1)
    store = HeatmapStore.create(tmp_path / "h.ome.zarr", "n", plan.heatmap_px, (1, 1), [Channel("a")], {})
    assert store.shapes == plan.level_shapes
    assert [store.blocks(i) for i in range(len(store.shapes))] == [plan.blocks(i) for i in range(len(store.shapes))]


@pytest.fixture
def slide() -> ArraySlide:
    """Tissue on the left half of glass, at 0.25 mpp: patches cover 64 x 128 level-0 px."""
    rng = np.random.default_rng(0)
    level0 = np.full((1024, 2048, 3), 245, np.uint8)
    level0[:, :1024] = rng.integers(-15, 16, (1024, 1024, 1)) + np.array([190, 80, 150])
    return ArraySlide([level0, level0[::16, ::16].copy()], mpp=(0.25, 0.25))


def test_a_slides_plan_follows_slide_model_and_settings(slide: ArraySlide) -> None:
    run = run_of(overlap=0.5, span_patches=64)
    plan, patches, mask = plan_slide(slide, run)
    assert plan == SlidePlan(
        "0",
        run.digest(),
        (1024, 2048),
        (0.25, 0.25),
        (64.0, 128.0),
        (0.0, 0.0, 64.0, 128.0),
        len(patches.yx),
        run.settings.span_patches,
        16,
        tissue_rule=TISSUE_RULE,
        bounds=(),
    )
    left = mask[:, : mask.shape[1] // 2]
    assert left.mean() > 0.9
    assert mask.sum() - left.sum() <= 2 * len(mask)  # an edge of up to two pixels
    assert set(patches.yx[:, 0].tolist()) == set(range(0, 1024 - 63, 32))
    assert set(patches.yx[:, 1].tolist()) == set(range(0, int(patches.yx[:, 1].max()) + 1, 64))
    assert 1024 - 128 <= patches.yx[:, 1].max() <= 1024 + 64


def test_planning_reads_no_full_resolution(slide: ArraySlide) -> None:
    plan_slide(slide, run_of())
    assert slide.reads
    assert {level for level, _ in slide.reads} == {1}


def test_a_plan_of_an_older_version_is_of_the_first_rule_for_tissue() -> None:
    values = {key: value for key, value in PLAN.to_json().items() if key != "tissue_rule"}
    assert SlidePlan.from_json(json.loads(json.dumps(values))).tissue_rule == 1


def test_a_heatmap_pixel_larger_than_a_patch_is_refused(slide: ArraySlide) -> None:
    with pytest.raises(ConfigError, match="choose a smaller --heatmap-stride"):
        plan_slide(slide, run_of(heatmap_stride=128))


def test_a_slide_without_mpp_cannot_be_planned(slide: ArraySlide) -> None:
    with pytest.raises(MppError, match="--mpp"):
        plan_slide(ArraySlide(slide.levels, mpp=None), run_of())


# Estimates


@pytest.mark.parametrize("targets", [["tumour"], ["all", "predicted"]])
def test_bytes_are_as_estimated(targets: list[str], tmp_path: Path) -> None:
    run = run_of(target=targets)
    plan = replace(PLAN, slide_px=(16_000, 20_000), footprint=(64.0, 128.0), patches=250 * 157, stride=8)
    none = np.zeros(plan.patches, np.float32)
    patches = Patches(np.zeros((plan.patches, 2), np.int64), none, none, none)
    PatchStore.create(tmp_path / "c.zarr", patches, plan.span, 3, len(run.targets), FACTS.cam_shape, {})
    channels = [Channel(str(i)) for i in range(2 * len(run.targets))]
    HeatmapStore.create(tmp_path / "h.zarr", "n", plan.heatmap_px, (1, 1), channels, {})
    arrays = [zarr.open_array(path.parent, mode="r") for path in tmp_path.rglob("zarr.json") if is_array(path)]
    assert len(arrays) == 8 + 2 * len(plan.level_shapes)
    found = estimate(ENTRY, plan, run)
    assert found.store_bytes == pytest.approx(sum(array.nbytes for array in arrays), rel=0.005)


def is_array(path: Path) -> bool:
    return bool(json.loads(path.read_text())["node_type"] == "array")


def test_bytes_follow_the_patches_not_the_slide() -> None:
    small = estimate(ENTRY, PLAN, run_of())
    large = estimate(ENTRY, replace(PLAN, slide_px=(10**6, 10**6)), run_of())
    assert estimate(ENTRY, replace(PLAN, patches=0), run_of()).store_bytes == 0
    assert large.store_bytes < 1000 * (4 * (3 * 32 + 3) + 25) + 1000 * 2 * 128 * 214 / 256 * 25
    assert small.store_bytes < large.store_bytes  # the small heatmap holds less than a thousand patches cover


def test_tasks_are_as_planned() -> None:
    plan = replace(PLAN, slide_px=(100_000, 40_000), patches=1000, span=256)
    found = estimate(ENTRY, plan, run_of())
    assert (found.patches, found.spans) == (1000, 4)
    # 6250 x 2500 px in shards of 2048, half of it, and one block for each of four more levels
    assert found.blocks == 4 * 2 + 2 + 4


def test_memory_depends_on_the_batch_and_not_on_the_slide() -> None:
    run = run_of(replace(FACTS, activation_bytes=1 << 24))
    huge = replace(PLAN, slide_px=(10**6, 10**6), patches=10**6)
    assert estimate(ENTRY, huge, run).memory_bytes == estimate(ENTRY, PLAN, run).memory_bytes == memory_estimate(run)
    double = run_of(replace(FACTS, activation_bytes=1 << 24, batch_size=64))
    assert memory_estimate(double) - memory_estimate(run) == 32 * (2 * (1 << 24) + 3 * 3 * 4 * 32 * 64)


@pytest.mark.parametrize(
    ("vendor", "path", "told"),
    [
        ("mirax", "a.mrxs", True),
        ("hamamatsu", "a.vms", True),
        ("hamamatsu", "a.ndpi", False),
        ("aperio", "a.svs", False),
    ],
)
def test_formats_whose_tiles_are_not_looked_at_say_so(vendor: str, path: str, told: bool) -> None:
    slide = ArraySlide([np.full((600, 800, 3), (200, 120, 180), np.uint8)], mpp=(0.5, 0.5))
    slide._info = replace(slide.info, vendor=vendor, path=path)
    plan, _, _ = plan_slide(slide, run_of())
    assert any("checked only by OpenSlide" in note for note in plan.notes) is told
