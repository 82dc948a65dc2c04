"""The heatmap is OME-Zarr that validators accept, and its blocks are files that no two tasks share."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import yaozarrs
import zarr
from ome_zarr_models import v05

from wsi_gradcam.errors import StoreError
from wsi_gradcam.geometry import Region
from wsi_gradcam.results import heatmap
from wsi_gradcam.results.heatmap import EXPLAINED, SHARD, TISSUE, UNREADABLE, Channel, HeatmapStore

SHAPE = (150, 331)
SCALE = (8.0, 4.004)
CHANNELS = (
    Channel("gradcam: in situ", -3.0, 9.0, 0.0, 5.0),
    Channel("probability: in situ", active=False),
)
SMALL = 32  # px a shard's side, where a test needs many


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "SHARD", SMALL)
    monkeypatch.setattr(heatmap, "CHUNK", SMALL // 2)


def create(path: Path, shape: tuple[int, int] = SHAPE, channels: Sequence[Channel] = CHANNELS) -> HeatmapStore:
    return HeatmapStore.create(path, "slide 1", shape, SCALE, channels, {"model": "m"})


def metadata(path: Path) -> dict[str, Any]:
    """`ome` of an image or label, read by zarr alone."""
    ome: Any = zarr.open_group(path, mode="r").attrs["ome"]
    assert isinstance(ome, dict)
    return ome


def files(path: Path) -> set[str]:
    """Files with values, not metadata."""
    return {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and f.name != "zarr.json"}


def test_validators_accept_image_and_label(tmp_path: Path) -> None:
    create(tmp_path / "h.ome.zarr")
    yaozarrs.validate_zarr_store(str(tmp_path / "h.ome.zarr"))
    v05.Image.from_zarr(zarr.open_group(tmp_path / "h.ome.zarr", mode="r"))
    v05.Labels.from_zarr(zarr.open_group(tmp_path / "h.ome.zarr/labels", mode="r"))
    v05.ImageLabel.from_zarr(zarr.open_group(tmp_path / "h.ome.zarr/labels/coverage", mode="r"))


def test_validators_refuse_a_heatmap_that_is_not_right(tmp_path: Path) -> None:
    create(tmp_path / "h.ome.zarr")
    group = zarr.open_group(tmp_path / "h.ome.zarr", mode="r+")
    ome = metadata(tmp_path / "h.ome.zarr")
    ome["multiscales"][0]["axes"].reverse()
    group.attrs["ome"] = ome
    with pytest.raises(Exception, match="axes"):
        yaozarrs.validate_zarr_store(str(tmp_path / "h.ome.zarr"))


@pytest.mark.parametrize("shape", [(1, 1), (63, 900), (64, 64), (127, 128), (1000, 517)])
def test_each_level_is_half_the_one_before_at_twice_its_scale(shape: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "h.ome.zarr"
    store = create(path, shape)
    assert store.shapes[0] == shape
    for finer, coarser in pairwise(store.shapes):
        assert coarser == tuple((n + 1) // 2 for n in finer)
        assert min(coarser) >= 64
    assert (min(store.shapes[-1]) + 1) // 2 < 64
    for folder, leading, axes in ((path, [1.0], "cyx"), (path / "labels/coverage", [], "yx")):
        (image,) = metadata(folder)["multiscales"]
        assert "".join(axis["name"] for axis in image["axes"]) == axes
        assert [d["path"] for d in image["datasets"]] == [str(i) for i in range(len(store.shapes))]
        for level, dataset in enumerate(image["datasets"]):
            (transform,) = dataset["coordinateTransformations"]  # a scale alone: the image begins at (0, 0)
            assert transform == {"type": "scale", "scale": [*leading, SCALE[0] * 2**level, SCALE[1] * 2**level]}
            array = zarr.open_array(folder / dataset["path"], mode="r")
            assert array.shape[-2:] == store.shapes[level]
            assert array.metadata.dimension_names == tuple(axes)  # type: ignore[union-attr]


def test_space_is_in_micrometres_and_channels_are_channels(tmp_path: Path) -> None:
    create(tmp_path / "h.ome.zarr")
    (image,) = metadata(tmp_path / "h.ome.zarr")["multiscales"]
    assert image["axes"] == [
        {"name": "c", "type": "channel"},
        {"name": "y", "type": "space", "unit": "micrometer"},
        {"name": "x", "type": "space", "unit": "micrometer"},
    ]


def test_viewers_are_told_how_to_show_each_channel(tmp_path: Path) -> None:
    create(tmp_path / "h.ome.zarr", channels=[*CHANNELS, *[Channel(str(i)) for i in range(8)]])
    shown = metadata(tmp_path / "h.ome.zarr")["omero"]["channels"]
    assert all(re.fullmatch("[0-9A-F]{6}", channel["color"]) for channel in shown)
    assert len({channel["color"] for channel in shown}) == 7
    assert [channel["active"] for channel in shown[:2]] == [True, False]
    assert shown[0]["label"] == "gradcam: in situ"
    assert shown[0]["window"] == {"min": -3.0, "max": 9.0, "start": 0.0, "end": 5.0}


def test_every_value_a_label_can_have_is_explained(tmp_path: Path) -> None:
    create(tmp_path / "h.ome.zarr")
    label = metadata(tmp_path / "h.ome.zarr/labels/coverage")["image-label"]
    every = set(range(1, 1 + (TISSUE | EXPLAINED | UNREADABLE)))
    for key in ("colors", "properties"):
        assert {entry["label-value"] for entry in label[key]} == every
    assert all(len(color["rgba"]) == 4 for color in label["colors"])
    assert (tmp_path / "h.ome.zarr/labels/coverage" / label["source"]["image"]).resolve() == tmp_path / "h.ome.zarr"


def test_types_and_attributes(tmp_path: Path) -> None:
    store = create(tmp_path / "h.ome.zarr")
    assert zarr.open_array(tmp_path / "h.ome.zarr/0", mode="r").dtype == np.float32
    assert zarr.open_array(tmp_path / "h.ome.zarr/labels/coverage/0", mode="r").dtype == np.uint8
    assert store.attributes["wsi_gradcam"] == {"model": "m"}


@pytest.mark.parametrize("shape", [(SHARD, SHARD), (SHARD + 1, 2 * SHARD + 70)])
def test_blocks_are_whole_shards(shape: tuple[int, int], tmp_path: Path) -> None:
    store = create(tmp_path / "h.ome.zarr", shape)
    for level, (height, width) in enumerate(store.shapes):
        for folder in ("h.ome.zarr", "h.ome.zarr/labels/coverage"):
            array = zarr.open_array(tmp_path / folder / str(level), mode="r")
            assert array.shards is not None
            side_y, side_x = array.shards[-2:]
            assert array.shards[:-2] == (1,) * (array.ndim - 2)  # a channel is written at a time
            assert [(b.y % side_y, b.x % side_x) for b in store.blocks(level)] == [(0, 0)] * len(store.blocks(level))
            assert all(b.height == min(side_y, height - b.y) for b in store.blocks(level))
            assert all(b.width == min(side_x, width - b.x) for b in store.blocks(level))
        assert sum(b.height * b.width for b in store.blocks(level)) == height * width


@pytest.mark.usefixtures("small_shards")
def test_a_block_owns_its_files(tmp_path: Path) -> None:
    path = tmp_path / "h.ome.zarr"
    store = create(path)
    seen: set[str] = set()
    for channel, block in [(c, b) for c in (0, 1) for b in store.blocks(0)]:
        before = {name: (path / name).read_bytes() for name in seen}
        store.write(0, channel, block, np.ones((block.height, block.width), np.float32))
        assert all((path / name).read_bytes() == content for name, content in before.items())
        new = files(path) - seen
        assert len(new) == 1
        seen |= new


@pytest.mark.usefixtures("small_shards")
def test_what_is_written_in_any_order_is_read(tmp_path: Path) -> None:
    store = create(tmp_path / "h.ome.zarr")
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    flags = rng.integers(0, 8, SHAPE, np.uint8)
    work = [(channel, block) for channel in (0, 1, None) for block in store.blocks(0)]
    for i in rng.permutation(len(work)):
        channel, block = work[i]
        if channel is None:
            store.write_flags(0, block, flags[block.slices])
        else:
            store.write(0, channel, block, image[channel][block.slices])
    again = HeatmapStore(tmp_path / "h.ome.zarr")
    whole, part = Region(0, 0, *SHAPE), Region(17, 90, 60, 41)
    for channel in (0, 1):
        assert again.read(0, channel, whole).tobytes() == image[channel].tobytes()
        assert np.array_equal(again.read(0, channel, part), image[channel][part.slices])
    assert np.array_equal(again.read_flags(0, whole), flags)
    assert np.array_equal(again.read_flags(0, part), flags[part.slices])


@pytest.mark.usefixtures("small_shards")
def test_levels_do_not_mix(tmp_path: Path) -> None:
    store = create(tmp_path / "h.ome.zarr")
    for level in range(len(store.shapes)):
        for block in store.blocks(level):
            store.write(level, 0, block, np.full((block.height, block.width), level + 1, np.float32))
            store.write_flags(level, block, np.full((block.height, block.width), level + 1, np.uint8))
    for level, (height, width) in enumerate(store.shapes):
        assert np.all(store.read(level, 0, Region(0, 0, height, width)) == level + 1)
        assert np.all(store.read_flags(level, Region(0, 0, height, width)) == level + 1)
        assert not store.read(level, 1, Region(0, 0, height, width)).any()


def test_zeros_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "h.ome.zarr"
    store = create(path)
    (block,) = store.blocks(0)
    store.write(0, 0, block, np.zeros(SHAPE, np.float32))
    store.write_flags(0, block, np.zeros(SHAPE, np.uint8))
    assert files(path) == set()
    assert not store.read(0, 0, block).any()
    store.write(0, 0, block, np.eye(*SHAPE, dtype=np.float32))
    assert len(files(path)) == 1
    store.write(0, 0, block, np.zeros(SHAPE, np.float32))  # another attempt's values do not stay
    assert not store.read(0, 0, block).any()


def test_how_channels_are_shown_changes_and_values_do_not(tmp_path: Path) -> None:
    path = tmp_path / "h.ome.zarr"
    store = create(path)
    (block,) = store.blocks(0)
    store.write(0, 1, block, np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    content = {name: (path / name).read_bytes() for name in files(path)}
    before = metadata(path)
    store.set_channels([Channel("gradcam: in situ", -1, 2, 0, 1.5), Channel("probability: in situ")])
    assert {name: (path / name).read_bytes() for name in files(path)} == content
    after = metadata(path)
    assert after["omero"]["channels"][0]["window"] == {"min": -1, "max": 2, "start": 0, "end": 1.5}
    assert after["multiscales"] == before["multiscales"]
    assert HeatmapStore(path).attributes["wsi_gradcam"] == {"model": "m"}
    yaozarrs.validate_zarr_store(str(path))


def test_creating_anew_forgets_everything(tmp_path: Path) -> None:
    path = tmp_path / "h.ome.zarr"
    store = create(path)
    store.write(0, 0, store.blocks(0)[0], np.ones(SHAPE, np.float32))
    again = create(path, (70, 80))
    assert again.shapes == [(70, 80)]
    assert files(path) == set()
    assert not (path / "1").exists()


@pytest.mark.parametrize(
    "call",
    [
        lambda path: HeatmapStore(path).write(0, 0, Region(0, 0, *SHAPE), np.ones(SHAPE, np.float32)),
        lambda path: HeatmapStore(path).write_flags(0, Region(0, 0, *SHAPE), np.ones(SHAPE, np.uint8)),
        lambda path: HeatmapStore(path).set_channels(CHANNELS),
        create,
    ],
    ids=["write", "write_flags", "set_channels", "create"],
)
def test_a_full_disk_is_a_store_error_with_the_mend(
    call: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(tmp_path / "h.ome.zarr")

    def full(*args: object, **kwargs: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zarr.storage._local._put", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match=r"h\.ome\.zarr\S*: cannot write: the disk is full"):
        call(tmp_path / "h.ome.zarr")


def test_a_name_with_awkward_characters(tmp_path: Path) -> None:
    path = tmp_path / "Fälle #1 50%/a b.svs"
    store = create(path / "h.ome.zarr")
    store.write(0, 0, store.blocks(0)[0], np.ones(SHAPE, np.float32))
    assert np.all(HeatmapStore(path / "h.ome.zarr").read(0, 0, Region(0, 0, *SHAPE)) == 1)
