"""The patch store gives back what spans wrote, and spans share no file."""

from __future__ import annotations

import errno
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import xarray
import zarr

from wsi_gradcam.errors import StoreError
from wsi_gradcam.results.patch_store import OK, PENDING, SHARES, UNREADABLE, PatchStore, SpanData
from wsi_gradcam.tissue import Patches

SPAN, CLASSES, TARGETS, CAM = 4, 3, 2, (2, 5)


def patches(count: int) -> Patches:
    yx = np.stack([np.arange(count) * 7, 100_000 + np.arange(count) * 3], axis=1)
    share = np.linspace(0, 1, count, dtype=np.float32)
    return Patches(yx, share, share[::-1].copy(), 1 - share)


def create(path: Path, count: int) -> PatchStore:
    return PatchStore.create(path, patches(count), SPAN, CLASSES, TARGETS, CAM, {"targets": ["a", "b"]})


def data(start: int, count: int) -> SpanData:
    rng = np.random.default_rng(start)
    return SpanData(
        rng.normal(size=(count, CLASSES)).astype(np.float32),
        rng.normal(size=(count, TARGETS, *CAM)).astype(np.float32),
        np.where(rng.random(count) < 0.8, OK, UNREADABLE).astype(np.uint8),
        np.where(rng.random(count) < 0.8, rng.random(count), np.nan).astype(np.float32),
    )


def spans(count: int) -> list[tuple[int, int]]:
    return [(start, min(SPAN, count - start)) for start in range(0, count, SPAN)]


def files(path: Path) -> dict[str, bytes]:
    """Files with values by name."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file() and f.name != "zarr.json"}


def same(a: SpanData, b: SpanData) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("count", [0, 10])
def test_xarray_opens_it(count: int, tmp_path: Path) -> None:
    """Each array names its axes, those with one axis too."""
    store = create(tmp_path / "cams.zarr", count)
    for start, size in spans(count):
        store.write_span(start, data(start, size))
    found = xarray.open_zarr(tmp_path / "cams.zarr", consolidated=False)
    assert {name: found[name].dims[0] for name in found.variables} == dict.fromkeys(found.variables, "patch")
    assert {"status", "blur", "logits", "cam", "xy", *SHARES} == set(found.variables)
    np.testing.assert_array_equal(found["blur"], store.blur())


@pytest.mark.parametrize("count", [1, 4, 10])
def test_what_spans_wrote_in_any_order_is_read(count: int, tmp_path: Path) -> None:
    store = create(tmp_path / "cams.zarr", count)
    for start, size in reversed(spans(count)):
        store.write_span(start, data(start, size))
    again = PatchStore(tmp_path / "cams.zarr")
    for start, size in spans(count):
        expected, part = data(start, size), (start, start + size)
        assert same(again.read_span(*part), expected)
        assert again.read_span(*part).digest() == expected.digest()
        assert np.array_equal(again.logits(*part), expected.logits)
        assert np.array_equal(again.status(*part), expected.status)
        assert np.array_equal(again.blur(*part), expected.blur, equal_nan=True)
        for target in range(TARGETS):
            assert np.array_equal(again.cams(*part, target), expected.cams[:, target])


@pytest.mark.parametrize("count", [1, 10])
def test_positions_and_tissue_are_there_before_any_result(count: int, tmp_path: Path) -> None:
    store, given = create(tmp_path / "cams.zarr", count), patches(count)
    assert np.array_equal(store.yx(), given.yx)
    assert np.array_equal(store.yx(0, 1), given.yx[:1])
    for name in SHARES:
        assert np.array_equal(store.share(name), getattr(given, name))
    assert np.isnan(store.blur()).all()
    assert store.yx().dtype == np.int64
    assert np.all(store.status() == PENDING)


def test_on_disk_positions_are_x_before_y(tmp_path: Path) -> None:
    create(tmp_path / "cams.zarr", 3)
    xy = zarr.open_array(tmp_path / "cams.zarr/xy", mode="r")
    assert np.asarray(xy[:]).tolist() == [[100_000, 0], [100_003, 7], [100_006, 14]]


def test_no_patches_at_all(tmp_path: Path) -> None:
    store = create(tmp_path / "cams.zarr", 0)
    assert store.yx().shape == (0, 2)
    assert store.status().shape == store.share("tissue").shape == (0,)
    assert store.cams(0, 0, 1).shape == (0, *CAM)
    assert store.read_span(0, 0).digest() == store.read_span(0, 0).digest()


def test_a_span_owns_its_files(tmp_path: Path) -> None:
    path = tmp_path / "cams.zarr"
    store, before = create(path, 10), {}
    for start, size in ((4, 4), (8, 2), (0, 4)):
        before = files(path)
        store.write_span(start, data(start, size))
        after = files(path)
        assert {name: after[name] for name in before} == before
        assert len(after) == len(before) + 4  # logits, cam, status, blur


def write_every_other(path: Path, first: int, count: int) -> None:
    store = PatchStore(path)
    for start, size in spans(count)[first::2]:
        store.write_span(start, data(start, size))


def test_spans_written_by_two_processes_at_once_all_survive(tmp_path: Path) -> None:
    count = 20 * SPAN - 1
    store = create(tmp_path / "cams.zarr", count)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(write_every_other, tmp_path / "cams.zarr", first, count) for first in (0, 1)]:
            future.result(timeout=60)
    assert all(same(store.read_span(start, start + size), data(start, size)) for start, size in spans(count))


def test_writing_a_span_again_replaces_it(tmp_path: Path) -> None:
    store = create(tmp_path / "cams.zarr", 10)
    store.write_span(4, data(99, 4))
    zeros = SpanData(*(np.zeros_like(a) for a in vars(data(4, 4)).values()))
    store.write_span(4, zeros)
    assert same(store.read_span(4, 8), zeros)


def test_creating_anew_forgets_everything(tmp_path: Path) -> None:
    create(tmp_path / "cams.zarr", 10).write_span(0, data(0, 4))
    again = create(tmp_path / "cams.zarr", 6)
    assert np.all(again.status() == PENDING)
    assert len(again.yx()) == 6
    assert not again.read_span(0, 4).cams.any()


def test_a_targets_cams_are_read_without_the_others(tmp_path: Path) -> None:
    create(tmp_path / "cams.zarr", 10)
    cam = zarr.open_array(tmp_path / "cams.zarr/cam", mode="r")
    assert (cam.chunks, cam.shards) == ((SPAN, 1, *CAM), (SPAN, TARGETS, *CAM))


@pytest.mark.parametrize("field", ["logits", "cams", "status", "blur"])
def test_the_digest_tells_every_value(field: str) -> None:
    original = data(0, 4)
    changed = getattr(original, field).copy()
    changed.flat[-1] += 1
    assert replace(original, **{field: changed}).digest() != original.digest()
    assert data(0, 4).digest() == original.digest()


def test_a_full_disk_is_a_store_error_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create(tmp_path / "cams.zarr", 10)

    def full(*args: object, **kwargs: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zarr.storage._local._put", full)
    with pytest.raises(StoreError, match=r"cams\.zarr: cannot write: the disk is full"):
        store.write_span(0, data(0, 4))
