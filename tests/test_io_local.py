"""Files are old or new, never half; disk errors say what to do."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from wsi_gradcam.errors import MppError, StoreError
from wsi_gradcam.io.local import PARTIAL, remove_partial_files, wrap_write_errors, write_atomic


def test_writes_what_it_is_given_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two, longer")
    assert path.read_bytes() == b"two, longer"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path if failing == "write_bytes" else os, failing, full)
        with pytest.raises(
            StoreError, match=r"file\.json: cannot write: the disk is full; .*run the same command again"
        ):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_between_write_and_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    remove_partial_files(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("removals", [1, 9])
def test_a_file_that_is_swept_away_is_written_again(
    removals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, left = os.replace, removals

    def swept(source: Path, target: Path) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            remove_partial_files(tmp_path)
        replace(source, target)

    monkeypatch.setattr(os, "replace", swept)
    if removals == 1:
        write_atomic(tmp_path / "file", b"data")
        assert (tmp_path / "file").read_bytes() == b"data"
    else:
        with pytest.raises(StoreError, match="cannot write"):
            write_atomic(tmp_path / "file", b"data")


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([i]) * 300_000 for i in range(4)]
    write_atomic(path, contents[0])

    def write(content: bytes) -> None:
        for _ in range(15):
            write_atomic(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(path.read_bytes())
    assert seen <= set(contents)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for path in (tmp_path / "out" / "run.yaml", tmp_path / "out" / "deep" / "run.yaml"):
        with pytest.raises(StoreError, match=r"run\.yaml: cannot write: there is a file where a folder is needed"):
            write_atomic(path, b"")


def test_a_folder_where_a_file_is_needed(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").mkdir()
    with pytest.raises(StoreError, match=r"run\.yaml: cannot write: "):
        write_atomic(tmp_path / "run.yaml", b"")
    assert [p.name for p in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("number", "mend"),
    [
        (errno.ENOSPC, "free space and run the same command again"),
        (errno.EDQUOT, "free space and run the same command again"),
        (errno.EROFS, "choose another --out"),
        (errno.EACCES, "choose another --out or change the permissions"),
        (errno.EPERM, "choose another --out or change the permissions"),
        (errno.ENOTDIR, "choose another --out"),
        (errno.EIO, "check the storage and run again"),
    ],
)
def test_disk_errors_say_the_mend_and_keep_the_cause(number: int, mend: str) -> None:
    cause = OSError(number, os.strerror(number))
    with pytest.raises(StoreError) as caught, wrap_write_errors(Path("out/x")):
        raise cause
    assert str(caught.value).startswith("out/x: cannot write: ")
    assert mend in str(caught.value)
    assert caught.value.__cause__ is cause
    assert isinstance(caught.value, OSError)


def test_an_error_without_number_keeps_its_words() -> None:
    with pytest.raises(StoreError, match="lost the connection; check the storage"), wrap_write_errors(Path("x")):
        raise OSError("lost the connection")


@pytest.mark.parametrize("error", [MppError("a.svs: no mpp"), StoreError("y: full"), KeyError("k"), ValueError("v")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, wrap_write_errors(Path("x")):
        raise error
    assert caught.value is error


def test_partials_are_removed_at_any_depth_and_nothing_else(tmp_path: Path) -> None:
    kept = ["a.json", "x/c/0/0", "x/partial", "x/a.partial.json", "slide.svs.1a2b3c4d.partial"]
    ours = "0123456789abcdef" * 2
    for name in (*kept, f"a.json.{ours}{PARTIAL}", f"x/c/0/0.{ours}{PARTIAL}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    remove_partial_files(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)


def test_removing_partials_of_a_missing_folder_does_nothing(tmp_path: Path) -> None:
    remove_partial_files(tmp_path / "gone")
    assert list(tmp_path.iterdir()) == []
