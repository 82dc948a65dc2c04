"""The manifest tells what is done, also when a process was killed at any moment or a file is damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wsi_gradcam.errors import StoreError
from wsi_gradcam.results.manifest import (
    DONE,
    PLAN,
    Manifest,
    SlideDone,
    SlideOutcome,
    SlidePlan,
    SlideStatus,
    digest_of,
)
from wsi_gradcam.results.seals import sealed_json

PLANNED = SlidePlan("s", "r", (64, 48), (0.5, 0.25), (32.0, 32.0), (0.0, 0.0, 32.0, 32.0), 3, 2, 16)
FINISHED = SlideDone(
    SlideOutcome(SlideStatus.OK, 3, 1, "torn"),
    {"000000": "a"},
    {"0-000000": ["c", "d"]},
    {"patches.parquet": "e"},
    {"pen": "f"},
    "a.svs",
    "m",
)
SINCE = {"arrays", "slide", "made_with"}  # older versions did not write them
Array = npt.NDArray[np.generic]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it and nothing after it runs."""


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest(tmp_path / "manifest")


def fill(manifest: Manifest) -> None:
    manifest.write_plan(PLANNED)
    manifest.complete("spans", "000001", {"digest": "b"})
    manifest.complete("spans", "000000", {"digest": "a"})
    manifest.complete("blocks", "0-000000", {"digests": ["c"]})


def killed(*args: object, **kwargs: object) -> NoReturn:
    raise Killed


def test_an_empty_manifest_knows_nothing(manifest: Manifest) -> None:
    assert manifest.plan() is None
    assert manifest.done() is None
    assert manifest.completed("spans") == set()
    assert manifest.records("blocks") == {}
    manifest.clear()


def test_what_is_recorded_is_known_to_others(manifest: Manifest, tmp_path: Path) -> None:
    fill(manifest)
    other = Manifest(tmp_path / "manifest")
    assert other.plan() == PLANNED
    assert other.completed("spans") == {"000000", "000001"}
    assert list(other.records("spans").items()) == [("000000", {"digest": "a"}), ("000001", {"digest": "b"})]
    assert other.records("blocks") == {"0-000000": {"digests": ["c"]}}
    assert other.done() is None


def test_a_finished_slide_keeps_two_files(manifest: Manifest, tmp_path: Path) -> None:
    fill(manifest)
    manifest.write_done(FINISHED)
    assert manifest.done() == FINISHED
    assert manifest.plan() == PLANNED
    assert {f.name for f in (tmp_path / "manifest").rglob("*")} == {PLAN, DONE}


def test_a_kill_between_done_and_fold_loses_nothing(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(manifest)
    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", killed)
        with pytest.raises(Killed):
            manifest.write_done(FINISHED)
    again = Manifest(tmp_path / "manifest")
    assert again.done() == FINISHED
    again.fold()
    again.fold()
    assert again.done() == FINISHED
    assert {f.name for f in (tmp_path / "manifest").rglob("*")} == {PLAN, DONE}


def test_a_kill_while_clearing_leaves_no_manifest_that_looks_valid(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(manifest)
    manifest.write_done(FINISHED)
    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", killed)
        with pytest.raises(Killed):
            manifest.clear()
    assert Manifest(tmp_path / "manifest").plan() is None
    manifest.clear()
    assert not (tmp_path / "manifest").exists()


def test_a_kill_while_writing_leaves_the_file_as_it_was(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(manifest)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(Killed):
            manifest.write_plan(replace(PLANNED, patches=4))
        with pytest.raises(Killed):
            manifest.complete("spans", "000002", {})
    assert manifest.plan() == PLANNED
    assert manifest.completed("spans") == {"000000", "000001"}
    assert any("000002" in f.name for f in (tmp_path / "manifest").rglob("*"))  # the unfinished one does not count


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b'{"a": 1} x'])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        (PLAN, Manifest.plan),
        (DONE, Manifest.done),
        ("spans/000000.json", lambda manifest: manifest.records("spans")),
    ],
    ids=["plan", "done", "span"],
)
def test_a_damaged_file_is_named(
    name: str, read: Callable[[Manifest], object], content: bytes, manifest: Manifest, tmp_path: Path
) -> None:
    fill(manifest)
    path = tmp_path / "manifest" / name
    path.write_bytes(content)
    with pytest.raises(StoreError) as caught:
        read(manifest)
    assert str(caught.value) == f"{path}: damaged; delete the slide's folder and run again, or use --overwrite"


@pytest.mark.parametrize("call", ["pathlib.Path.unlink", "os.walk"])
def test_what_cannot_be_cleared_is_a_store_error(
    call: str, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(manifest)

    def forbidden(*args: object, **kwargs: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(call, forbidden)
    with pytest.raises(StoreError, match="permission to write there is denied"):
        manifest.clear()


def test_records_are_plain_json(manifest: Manifest, tmp_path: Path) -> None:
    manifest.write_plan(PLANNED)
    plan = json.loads((tmp_path / "manifest" / PLAN).read_text())
    assert list(plan) == sorted(plan)
    assert (plan["slide_px"], plan["stain"], plan["patches"]) == ([64, 48], None, 3)
    manifest.write_done(FINISHED)
    expected = {
        "status": "ok",
        "patches": 3,
        "unreadable": 1,
        "cause": "torn",
        "spans": {"000000": "a"},
        "blocks": {"0-000000": ["c", "d"]},
        "files": {"patches.parquet": "e"},
        "arrays": {"pen": "f"},
        "slide": "a.svs",
        "made_with": "m",
    }
    assert (tmp_path / "manifest" / DONE).read_bytes() == sealed_json(expected, indent=1, sort_keys=True)


def test_a_final_record_of_an_older_version_is_read() -> None:
    values = {key: value for key, value in FINISHED.to_json().items() if key not in SINCE}
    found = SlideDone.from_json(values)
    assert (found.outcome, found.files, found.is_covered) == (FINISHED.outcome, FINISHED.files, False)


@pytest.mark.parametrize("key", sorted(FINISHED.to_json().keys() - SINCE))
def test_a_final_record_without_a_key_is_refused(key: str) -> None:
    values = FINISHED.to_json()
    assert SlideDone.from_json(values) == FINISHED
    del values[key]
    with pytest.raises(StoreError, match=f"done.json has no {key}"):
        SlideDone.from_json(values)


ARRAYS = hnp.arrays(
    st.sampled_from([np.float32, np.uint8, np.int64]), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
)


@given(st.lists(ARRAYS, max_size=3), st.lists(ARRAYS, max_size=3))
def test_digests_are_equal_for_equal_arrays_alone(a: list[Array], b: list[Array]) -> None:
    same = len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=False)
    )
    assert (digest_of(a) == digest_of(b)) == same


@given(ARRAYS.filter(lambda array: array.ndim > 0))
def test_a_digest_does_not_depend_on_the_memory_layout(array: Array) -> None:
    assert digest_of([np.asfortranarray(array)]) == digest_of([array])
    assert digest_of([np.repeat(array, 2, axis=0)[::2]]) == digest_of([array])


def test_digests_tell_order_type_shape_and_cut() -> None:
    a, b = np.arange(4, dtype=np.int32), np.arange(4, 8, dtype=np.int32)
    variants = [
        (a, b),
        (b, a),
        (a,),
        (np.concatenate([a, b]),),
        (a.reshape(2, 2), b),
        (a.view(np.float32), b),
        (a.view(np.uint32), b),
        (a, b, a[:0]),
    ]
    assert len({digest_of(variant) for variant in variants}) == len(variants)
