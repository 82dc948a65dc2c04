"""patches.parquet: a row a patch, columns as documented, nothing made up for patches that could not be read."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.toy_models import PooledLinear, pooled_linear
from wsi_gradcam.cam.engine import explain_batch
from wsi_gradcam.cam.facts import Choice, Layer, Layout, ModelFacts
from wsi_gradcam.cam.program import EagerProgram
from wsi_gradcam.errors import StoreError
from wsi_gradcam.models.spec import Activation, ModelSpec
from wsi_gradcam.results import patch_store
from wsi_gradcam.results.manifest import SlidePlan
from wsi_gradcam.results.patch_store import OK, UNREADABLE, PatchStore, SpanData, write_table
from wsi_gradcam.run.plan import RunPlan, plan_run
from wsi_gradcam.run.settings import make_settings
from wsi_gradcam.tissue import Patches

CLASSES = ("other", 'in situ / "№ 1", a=b')
CAUSE = "tile (3, 4) cannot be decoded: “broken”, line\nbreak"
SPAN, COUNT = 4, 10
BAD = 6  # the patch that cannot be read
FACTS = ModelFacts(
    name="toy",
    source="tests:toy",
    digest="d",
    license=None,
    classes=CLASSES,
    activation="softmax",
    patch_px=(32, 32),
    mpp=0.5,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    view=(0.0, 0.0, 32.0, 32.0),
    layers=(Layer("features", Layout("bkhw", 12, 4, 4)),),
    traced=False,
    cam_shape=(4, 4),
    parameters=0,
    activation_bytes=0,
    batch_size=32,
    choice=Choice("eager", "float32"),
)


@pytest.fixture(scope="module")
def network() -> PooledLinear:
    torch.manual_seed(2)
    return cast(PooledLinear, pooled_linear().eval())


def run_of(activation: Activation = "softmax") -> RunPlan:
    spec = ModelSpec(name="toy", source="tests:toy")
    settings = make_settings(target=["all", "predicted"])
    return plan_run(Path("out"), spec, replace(FACTS, activation=activation), settings)


def plan_of(run: RunPlan, count: int = COUNT) -> SlidePlan:
    return SlidePlan("s", run.digest(), (1000, 1000), (0.5, 0.5), (32.0, 32.0), (0.0, 0.0, 32.0, 32.0), count, SPAN, 16)


def store_of(path: Path, run: RunPlan, network: PooledLinear, count: int = COUNT) -> PatchStore:
    """A filled store with what the network says of noise; one patch is unreadable."""
    yx = np.stack([np.arange(count) * 11, 90_000 - np.arange(count)], axis=1)
    share = np.linspace(0.1, 1, count, dtype=np.float32)
    patches = Patches(yx, share, share[::-1].copy(), 1 - share)
    store = PatchStore.create(path, patches, SPAN, len(CLASSES), len(run.targets), FACTS.cam_shape, {})
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for start in range(0, count, SPAN):
        explained = explain_batch(EagerProgram(network, FACTS.layers), images[start : start + SPAN], run.targets)
        logits, cams = explained.logits, explained.cams["gradcam"]
        blur = np.arange(start, start + len(logits), dtype=np.float32)
        data = SpanData(logits.numpy().copy(), cams.numpy().copy(), np.full(len(logits), OK, np.uint8), blur)
        if start <= BAD < start + SPAN:
            data.logits[BAD - start], data.cams[BAD - start], data.status[BAD - start] = 0, 0, UNREADABLE
            data.blur[BAD - start] = np.nan
        store.write_span(start, data)
    return store


def written(path: Path, network: PooledLinear, activation: Activation = "softmax") -> dict[str, list[Any]]:
    run = run_of(activation)
    store = store_of(path / "cams.zarr", run, network)
    write_table(path / "patches.parquet", run, plan_of(run), store, {BAD: CAUSE})
    return cast(dict[str, list[Any]], pq.read_table(path / "patches.parquet").to_pydict())


def test_columns_are_as_documented_in_order(tmp_path: Path, network: PooledLinear) -> None:
    assert list(written(tmp_path, network)) == [
        "y",
        "x",
        "tissue",
        "pen",
        "glass",
        "blur",
        "status",
        "cause",
        "logit_other",
        f"logit_{CLASSES[1]}",
        "probability_other",
        f"probability_{CLASSES[1]}",
        "cam_mean_other",
        f"cam_mean_{CLASSES[1]}",
        "cam_mean_predicted",
        "cam_max_other",
        f"cam_max_{CLASSES[1]}",
        "cam_max_predicted",
    ]


def test_rows_are_the_stores_patches(tmp_path: Path, network: PooledLinear) -> None:
    columns = written(tmp_path, network)
    store = PatchStore(tmp_path / "cams.zarr")
    assert columns["y"] == [i * 11 for i in range(COUNT)]
    assert columns["x"] == [90_000 - i for i in range(COUNT)]
    for name in ("tissue", "pen", "glass"):
        assert columns[name] == store.share(name).tolist()
    assert columns["pen"] != columns["tissue"] != columns["glass"]
    assert columns["blur"] == [None if i == BAD else i for i in range(COUNT)]
    for i, name in enumerate(CLASSES):
        logits = store.logits(0, COUNT)[:, i].tolist()
        assert columns[f"logit_{name}"] == [*logits[:BAD], None, *logits[BAD + 1 :]]


def test_a_patch_that_could_not_be_read_has_a_cause_and_no_numbers(tmp_path: Path, network: PooledLinear) -> None:
    columns = written(tmp_path, network)
    row = {name: values[BAD] for name, values in columns.items()}
    assert (row["y"], row["x"], row["status"], row["cause"]) == (BAD * 11, 90_000 - BAD, "unreadable", CAUSE)
    assert all(value is None for name, value in row.items() if name.startswith(("blur", "logit", "probability", "cam")))
    others = [values[:BAD] + values[BAD + 1 :] for name, values in columns.items() if name != "cause"]
    assert all(value is not None for values in others for value in values)
    assert {columns["status"][i] for i in range(COUNT) if i != BAD} == {"ok"}
    assert [i for i, cause in enumerate(columns["cause"]) if cause is not None] == [BAD]


def test_mean_of_the_cam_plus_bias_is_the_logit(tmp_path: Path, network: PooledLinear) -> None:
    columns = written(tmp_path, network)
    biases = network.fc.bias.tolist()
    for i in set(range(COUNT)) - {BAD}:
        logits = [columns[f"logit_{name}"][i] for name in CLASSES]
        for name, bias, logit in zip(CLASSES, biases, logits, strict=True):
            assert columns[f"cam_mean_{name}"][i] + bias == pytest.approx(logit, abs=1e-4)
        winner = int(np.argmax(logits))
        assert columns["cam_mean_predicted"][i] + biases[winner] == pytest.approx(max(logits), abs=1e-4)


def test_largest_value_of_the_cam_is_in_the_heatmaps_unit(tmp_path: Path, network: PooledLinear) -> None:
    columns = written(tmp_path, network)
    cams = PatchStore(tmp_path / "cams.zarr").cams(0, COUNT, 1)
    for i in set(range(COUNT)) - {BAD}:
        expected = max(value * cams[i].size for value in cams[i].ravel().tolist())
        assert columns[f"cam_max_{CLASSES[1]}"][i] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("softmax", lambda logit, logits: math.exp(logit) / sum(math.exp(v) for v in logits)),
        ("sigmoid", lambda logit, logits: 1 / (1 + math.exp(-logit))),
        ("none", lambda logit, logits: logit),
    ],
)
def test_probabilities_follow_the_models_activation(
    activation: Activation, formula: Any, tmp_path: Path, network: PooledLinear
) -> None:
    columns = written(tmp_path, network, activation)
    for i in set(range(COUNT)) - {BAD}:
        logits = [columns[f"logit_{name}"][i] for name in CLASSES]
        for name, logit in zip(CLASSES, logits, strict=True):
            assert columns[f"probability_{name}"][i] == pytest.approx(formula(logit, logits), abs=1e-6)


@pytest.mark.parametrize("rows", [1, SPAN, 7, 1000])
def test_how_it_is_streamed_does_not_matter(
    rows: int, tmp_path: Path, network: PooledLinear, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = written(tmp_path, network)
    monkeypatch.setattr(patch_store, "ROWS", rows)
    (tmp_path / "other").mkdir()
    assert written(tmp_path / "other", network) == expected
    groups = pq.ParquetFile(tmp_path / "other/patches.parquet").metadata.num_row_groups
    assert groups == (1 if rows > COUNT else 3)


def test_no_patches_give_a_table_without_rows(tmp_path: Path, network: PooledLinear) -> None:
    run = run_of()
    store = store_of(tmp_path / "cams.zarr", run, network, count=0)
    write_table(tmp_path / "patches.parquet", run, plan_of(run, 0), store, {})
    found = pq.read_table(tmp_path / "patches.parquet")
    assert (found.num_rows, found.num_columns) == (0, 18)


def test_the_file_says_what_it_belongs_to(tmp_path: Path, network: PooledLinear) -> None:
    written(tmp_path, network)
    about = json.loads(pq.read_schema(tmp_path / "patches.parquet").metadata[b"wsi_gradcam"])
    assert about["model"] == "d"
    assert set(about["units"].values()) == {"logit"}
    assert about["run"] == run_of().digest()


def test_the_file_places_its_patches(tmp_path: Path, network: PooledLinear) -> None:
    """Whoever has the table alone can draw the patches: size and stride, of the patch and on the slide."""
    run = run_of()
    slide = replace(plan_of(run), footprint=(64.0, 48.0), slide_mpp=(0.25, 1 / 3))
    store = store_of(tmp_path / "cams.zarr", run, network)
    write_table(tmp_path / "patches.parquet", run, slide, store, {}, "inner/ü\udcff.svs")
    about = json.loads(pq.read_schema(tmp_path / "patches.parquet").metadata[b"wsi_gradcam"])
    known = {key: about[key] for key in about if key.startswith(("patch", "slide"))}
    assert known == {
        "slide": "inner/ü\udcff.svs",
        "slide_digest": "s",
        "slide_px": [1000, 1000],
        "slide_mpp": [0.25, 1 / 3],
        "patch_px": [32, 32],
        "patch_mpp": 0.5,
        "patch_stride_px": [32, 32],
        "patch_level0_px": [64.0, 48.0],
        "patch_stride_level0_px": [64.0, 48.0],
    }


@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.ENOSPC, "full"), StoreError), (KeyboardInterrupt(), KeyboardInterrupt), (ValueError(), ValueError)],
    ids=["full disk", "interrupt", "other"],
)
def test_a_failure_keeps_the_old_table_and_leaves_nothing_else(
    error: BaseException,
    expected: type[BaseException],
    tmp_path: Path,
    network: PooledLinear,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written(tmp_path, network)
    before, run = (tmp_path / "patches.parquet").read_bytes(), run_of()

    def fail(*args: object) -> NoReturn:
        raise error

    monkeypatch.setattr(patch_store, "_rows", fail)
    with pytest.raises(expected):
        write_table(tmp_path / "patches.parquet", run, plan_of(run), PatchStore(tmp_path / "cams.zarr"), {})
    assert (tmp_path / "patches.parquet").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"patches.parquet", "cams.zarr"}
