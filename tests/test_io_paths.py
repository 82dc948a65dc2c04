"""Files and folders of OUT: a disk and an object store give the same answers to the same calls."""

from __future__ import annotations

import errno
import os
import pickle
import re
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.s3_proxy import Proxy, at_random
from wsi_gradcam.errors import ConfigError, StoreError
from wsi_gradcam.io import base, object_stores
from wsi_gradcam.io.local import LOCK, LocalPath
from wsi_gradcam.io.paths import S3Path, StoragePath, storage_path

NAMES = ["f", "g.json", "x/f", "x/y/f", "x/ü #%?+&=[1]", "x.zarr/c/0/0"]
FOLDERS = ["", "x", "x/y", "x.zarr", "gone"]


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> StoragePath:
    return storage_path(tmp_path / "out" if request.param == "local" else request.getfixturevalue("s3_out"))


def at(place: StoragePath, name: str) -> StoragePath:
    return place / name if name else place


def told(call: Callable[[], Any]) -> Any:
    """What a call gives, or the kind of what it raises."""
    try:
        return call()
    except OSError as error:
        return type(error)


def streamed(place: StoragePath, data: bytes, fails: bool) -> None:
    with place.atomic_writer() as file:
        file.write(data[:-3])
        if fails:
            raise StoreError("in the middle")
        file.write(data[-3:])


SOME = re.compile("([^/]+/)?f|c/.*")  # of the names below a folder


def appended(data: bytes | None) -> bytes:
    return (data or b"") + b"+"


def replaced(place: StoragePath, data: bytes, stale: bool) -> bool:
    _, version = place.read_versioned()
    if stale:
        place.write(b"in between")
    return place.replace(data, version)


ACTIONS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(NAMES), st.binary(max_size=9)),
    st.tuples(st.just("create"), st.sampled_from(NAMES), st.binary(max_size=9)),
    st.tuples(st.just("stream"), st.sampled_from(NAMES), st.binary(max_size=9), st.booleans()),
    st.tuples(st.just("replace"), st.sampled_from(NAMES), st.binary(max_size=9), st.booleans()),
    st.tuples(st.just("update"), st.sampled_from(NAMES)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("remove_tree"), st.sampled_from(FOLDERS)),
    st.tuples(st.just("remove_files"), st.sampled_from(FOLDERS)),
)


def act(out: StoragePath, action: tuple[Any, ...]) -> Any:
    kind, name, *values = action
    place = at(out, name)
    calls: dict[str, Callable[[], Any]] = {
        "write": lambda: place.write(*values),
        "create": lambda: place.create(*values),
        "stream": lambda: streamed(place, *values),
        "replace": lambda: replaced(place, *values),
        "update": lambda: place.update(appended),
        "remove": place.remove,
        "remove_tree": place.remove_tree,
        "remove_files": lambda: place.remove_files(SOME),
    }
    return told(calls[kind])


def seen(out: StoragePath) -> list[Any]:
    """Everything that can be asked."""
    found: list[Any] = []
    for name in NAMES:
        file = out / name
        found += [told(file.read), told(file.size), file.is_file(), file.exists(), file.name]
        found += [told(partial(file.read_range, *part)) for part in ((0, 2), (1, 99), (99, 3), (0, 0))]
    for name in FOLDERS:
        folder = at(out, name)
        found += [folder.file_names(), folder.folder_names(), folder.exists(), folder.is_file()]
    present = [name for name in NAMES if (out / name).is_file()]
    return [*found, out.read_many(present), told(lambda: out.read_many([*present, "gone"]))]


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(ACTIONS, max_size=10))
def test_disk_and_object_store_agree(actions: list[tuple[Any, ...]], s3_out: str, tmp_path: Path) -> None:
    new = uuid.uuid4().hex
    local, remote = storage_path(tmp_path / new), storage_path(s3_out) / new
    for action in actions:
        assert act(local, action) == act(remote, action), action
    assert seen(local) == seen(remote)


def test_all_of_an_archive_is_listed(s3_out: str, s3_proxy: Proxy) -> None:
    """Servers list a thousand at a time."""
    out = storage_path(s3_out)
    files = {f"{number:04d}": b"" for number in range(1005)}
    out.write_many({**files, "x/f": b"f"})
    assert out.file_names() == sorted(files)
    assert out.folder_names() == ["x"]
    s3_proxy.passed.requests.clear()
    out.remove_tree()
    assert len(s3_proxy.passed.requests) < 10
    assert not out.exists()


def together(count: int, call: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_updates_of_many_are_all_kept(out: StoragePath) -> None:
    def count(_: int) -> None:
        for _ in range(4):
            (out / "count").update(lambda data: str(int(data or b"0") + 1).encode())

    together(4, count)
    assert (out / "count").read() == b"16"


def test_of_all_who_create_one_wins(out: StoragePath) -> None:
    for turn in range(4):
        winners: list[int] = []
        claim = out / f"claims/{turn}"

        def try_it(number: int, claim: StoragePath = claim, winners: list[int] = winners) -> None:
            if claim.create(str(number).encode()):
                winners.append(number)

        together(6, try_it)
        assert len(winners) == 1
        assert claim.read() == str(winners[0]).encode()


def test_a_store_that_fails_often_loses_nothing(s3_out: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the answer to a request that was carried out is lost."""
    monkeypatch.setattr(object_stores, "FIRST_DELAY_S", 0.01)
    out = storage_path(s3_out)
    s3_proxy.passed.fails = at_random(0.3, 5)
    for number in range(25):
        file = out / f"f{number}"
        assert file.create(b"first")
        assert not file.create(b"second")
        data, version = file.read_versioned()
        assert data == b"first"
        assert file.replace(b"third", version)
        assert not file.replace(b"fourth", version)
        file.update(appended)
        with file.atomic_writer() as stream:
            stream.write(file.read() * 2)
        assert file.read_range(3, 5) == b"rd+th"
    group = zarr.create_group((out / "z").zarr_store())
    array = group.create_array("a", shape=(40, 40), chunks=(10, 10), dtype="int16", fill_value=0)
    array[:] = np.arange(1600).reshape(40, 40)
    np.testing.assert_array_equal(
        zarr.open_group((out / "z").zarr_store(), mode="r")["a"], np.arange(1600).reshape(40, 40)
    )
    assert sorted(out.file_names()) == sorted(f"f{number}" for number in range(25))
    out.remove_tree()
    assert not out.exists()
    assert s3_proxy.passed.failed > 100


def test_large_streams_are_sent_in_parts_and_come_whole(s3_out: str) -> None:
    data = os.urandom(1 << 20) * 21
    file = storage_path(s3_out) / "large"
    with file.atomic_writer() as stream:
        for start in range(0, len(data), 3_000_000):
            stream.write(data[start : start + 3_000_000])
    assert file.size() == len(data)
    assert abs(file.modified() - time.time()) < 60
    assert file.read() == data


def test_a_stream_that_breaks_leaves_the_old_file(out: StoragePath) -> None:
    file = out / "x/file"
    file.write(b"old")
    with pytest.raises(StoreError, match="in the middle"):
        streamed(file, bytes(20 << 20), fails=True)
    assert file.read() == b"old"
    assert (out / "x").file_names() == ["file"]


def test_zarr_reads_what_it_wrote(out: StoragePath) -> None:
    values = np.random.default_rng(0).normal(size=(70, 90)).astype(np.float32)
    group = zarr.create_group((out / "a.zarr").zarr_store(), attributes={"about": "ü"})
    inner = group.create_group("labels")
    array = inner.create_array("0", shape=values.shape, chunks=(16, 16), shards=(64, 64), dtype="float32")
    array[:] = values
    store = pickle.loads(pickle.dumps((out / "a.zarr").zarr_store(read_only=True)))
    again: Any = zarr.open_group(store, mode="r")
    assert again.attrs.asdict() == {"about": "ü"}
    assert [name for name, _ in again.members(max_depth=None)] == ["labels", "labels/0"]
    np.testing.assert_array_equal(again["labels/0"][3:40, 60:], values[3:40, 60:])
    np.testing.assert_array_equal(again["labels/0"][:, 5], values[:, 5])
    assert store == (out / "a.zarr").zarr_store(read_only=True)
    with pytest.raises(ValueError, match=r"read.only"):
        store.with_read_only(True)._check_writable()
    del group["labels"]
    assert (out / "a.zarr").folder_names() == []


def test_remote_zarr_is_a_store(s3_out: str) -> None:
    """The rest of what zarr may ask."""
    from zarr.abc.store import OffsetByteRequest
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    out = storage_path(s3_out)
    store: Any = (out / "z").zarr_store()
    buffer = default_buffer_prototype().buffer.from_bytes

    async def collected(keys: Any) -> list[str]:
        return sorted([key async for key in keys])

    sync(store.set_if_not_exists("a/b", buffer(b"one")))
    sync(store.set_if_not_exists("a/b", buffer(b"two")))
    sync(store.set("a/c", buffer(b"three")))
    assert (out / "z/a/b").read() == b"one"
    assert sync(collected(store.list())) == ["a/b", "a/c"]
    assert sync(collected(store.list_prefix("a"))) == ["a/b", "a/c"]
    assert sync(collected(store.list_dir(""))) == ["a"]
    assert sync(store.exists("a/c"))
    assert not sync(store.exists("a"))
    assert sync(store.getsize("a/c")) == 5
    sync(store.delete("a/c"))
    parts = sync(store.get_partial_values(default_buffer_prototype(), [("a/b", None), ("a/c", None)]))
    assert [part and part.to_bytes() for part in parts] == [b"one", None]
    offset = sync(store.get("a/b", default_buffer_prototype(), OffsetByteRequest(1)))
    assert offset.to_bytes() == b"ne"
    assert str(store) == str(out / "z")
    assert store != (out / "z").zarr_store(read_only=True)


def test_places_travel_without_their_connections(out: StoragePath) -> None:
    (out / "f").write(b"1")
    again = pickle.loads(pickle.dumps(out))
    assert again == out
    assert {again: 1}[out] == 1
    assert (again / "f").read() == b"1"
    assert (again / "f").parent == out
    assert len(pickle.dumps(out)) < 400
    assert again.absolute() == out


def test_what_no_key_can_hold_is_written_with_percent_signs(s3_out: str) -> None:
    name = os.fsdecode(b"slide \xe9\n.svs")
    file = storage_path(s3_out) / name / "f"
    file.write(b"1")
    assert storage_path(s3_out).folder_names() == ["slide %E9%0A.svs"]
    assert file.read() == b"1"


@pytest.mark.parametrize(
    ("given_out", "message"),
    [
        ("https://me:secret@host/out?sign=hidden", r"^https://host/out: expected a folder, or s3://BUCKET/KEY$"),
        ("gs://bucket/out", "expected a folder, or s3://BUCKET/KEY"),
        (Path("s3://bucket/out"), "give a URL as text, not as a path"),
        ("s3://", "expected s3://BUCKET/KEY"),
        ("s3://key:secret@bucket/out", r"^s3://bucket/out: expected s3://BUCKET/KEY; set credentials"),
        ("s3://bucket/a/../b", r"contains \. or \.\."),
    ],
)
def test_other_urls_are_refused(given_out: str | Path, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        storage_path(given_out)
    assert "secret" not in str(caught.value)


def test_how_places_are_named(tmp_path: Path) -> None:
    assert str(storage_path("s3://bucket//a/b/")) == "s3://bucket/a/b"
    assert (storage_path("s3://bucket/a") / "b/c").name == "c"
    assert str(storage_path("s3://bucket")) == "s3://bucket/"
    local = storage_path("x/out")
    assert isinstance(local, LocalPath)
    assert local.absolute().path == Path("x/out").absolute()
    assert Path(local / "f") == Path("x/out/f")
    assert storage_path(local) is local


WRITES: dict[str, Callable[[StoragePath], Any]] = {
    "write": lambda file: file.write(b"new"),
    "create": lambda file: (file.parent / "new").create(b"new"),
    "replace": lambda file: file.replace(b"new", file.read_versioned()[1]),
    "atomic_writer": lambda file: streamed(file, b"new data", fails=False),
    "zarr": lambda file: zarr.create_group((file.parent / "z").zarr_store()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize(
    ("failure", "message"), [("403", "access was refused"), ("503", "run the same command again"), ("400", "rejects")]
)
def test_errors_of_the_store_say_what_to_do(
    write: Callable[[StoragePath], Any],
    failure: str,
    message: str,
    s3_out: str,
    s3_proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_stores, "OUT_PATIENCE_S", 0.5)
    file = storage_path(s3_out) / "file"
    file.write(b"old")
    s3_proxy.passed.fails = lambda method, target: failure if method == "PUT" else ""
    with pytest.raises(StoreError, match=message) as caught:
        write(file)
    assert "\n" not in str(caught.value)
    assert s3_out in str(caught.value)
    s3_proxy.passed.fails = lambda method, target: ""
    assert file.read() == b"old"
    assert file.parent.file_names() == ["file"]


@pytest.mark.parametrize("ask", ["read", "file_names", "folder_names", "exists", "remove_tree"])
def test_what_cannot_be_read_is_no_empty_folder(ask: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_stores, "OUT_PATIENCE_S", 0.5)
    with pytest.raises(StoreError, match=r"no such bucket; create it|access was refused"):
        getattr(storage_path("s3://no-such-bucket/out"), ask)()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match="check the store and the network, and run the same command again"):
        getattr(storage_path("s3://slides/out"), ask)()


def test_an_update_among_too_many_gives_up(s3_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "UPDATE_PATIENCE_S", 0.3)
    monkeypatch.setattr(S3Path, "replace", lambda self, data, known: False)
    file = storage_path(s3_out) / "file"
    file.write(b"old")
    with pytest.raises(StoreError, match="other processes keep writing to it"):
        file.update(appended)


def test_a_disk_without_hard_links_can_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    file = storage_path(tmp_path / "x/claim")
    assert file.create(b"one")
    assert not file.create(b"two")
    assert file.read() == b"one"
    assert file.parent.file_names() == ["claim"]


def test_a_link_whose_answer_was_lost_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def sent_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", sent_twice)
    assert storage_path(tmp_path / "claim").create(b"one")


@pytest.mark.parametrize("write", ["write", "create", "atomic_writer"])
def test_a_full_disk_is_told(write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_bytes", "replace"):
        monkeypatch.setattr(Path, name, full)
    with pytest.raises(StoreError, match="the disk is full"):
        WRITES[write](storage_path(tmp_path / "file"))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_are_neither_listed_nor_kept(tmp_path: Path) -> None:
    out = storage_path(tmp_path)
    partial = f"f.{'0123456789abcdef' * 2}.partial"
    for path in (tmp_path / partial, tmp_path / "x" / partial, tmp_path / LOCK):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    assert (out.file_names(), out.folder_names(), out.exists()) == ([], [], False)
    out.remove_partial_files(recursive=False)
    assert [path.name for path in tmp_path.rglob("*.partial")] == [partial]
    out.remove_partial_files()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path: Path) -> None:
    out = storage_path(tmp_path)
    (out / "x/f").write(b"1")
    for missing in (out / "x", out / "x/f/g"):
        with pytest.raises(FileNotFoundError):
            missing.size()
    with pytest.raises(FileNotFoundError):
        (out / "x/none").modified()
    with pytest.raises(FileNotFoundError):
        (out / "x/f/g").read()
    with pytest.raises(StoreError, match="cannot be read: Is a directory"):
        (out / "x").read()
    assert (out / "x/f").file_names() == []
    (out / "x/f/g").remove()
    (out / "x/f").remove_tree()
    assert (out / "x/f").read() == b"1"


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    """Results may be a stranger's: what it leads to would be emptied."""
    (tmp_path / "mine").write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(StoreError, match="a symbolic link takes the place of a file of the results; delete it"):
        storage_path(out / "display.json").update(lambda _: b"{}")
    assert (tmp_path / "mine").read_text() == "precious"
    (out / ".lock").unlink()
    os.mkfifo(out / ".lock")  # which nobody reads
    storage_path(out / "display.json").update(lambda _: b"{}")
    assert (out / "display.json").read_bytes() == b"{}"
