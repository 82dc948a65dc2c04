"""Searching folders: nothing is left out in silence, whatever stands in the way, and the order is always the same."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.runs import SMALL, rows_of, toy_spec
from tests.synthetic import write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.inputs.search import find_in_folder


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def names_in(folder: Path) -> list[str]:
    return [name for _, name in find_in_folder(folder)]


def refusing(monkeypatch: pytest.MonkeyPatch, place: Path, number: int) -> None:
    """`os.scandir` as it is where `place` may not be read; the tests may run as one who may read all."""
    scandir = os.scandir

    def refused(path: str) -> Any:
        if Path(path) == place:
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)


@pytest.mark.parametrize("number", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    touch(tmp_path, "a.svs", "x/y/b.svs", "z/c.svs")
    refusing(monkeypatch, tmp_path / "x" / "y", number)
    said = rf"/x/y: cannot be read: {os.strerror(number)}, so its slides would be missing; grant read permission, or"
    for given in (tmp_path, tmp_path / "**" / "*.svs"):
        with pytest.raises(ConfigError, match=said):
            find_slides([given])


def test_a_pattern_can_leave_out_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "case1/a.svs", "lost+found/b.svs")
    refusing(monkeypatch, tmp_path / "lost+found", errno.EACCES)
    assert [slide.id for slide in find_slides([tmp_path / "case*" / "*.svs"])] == ["case1/a.svs"]


def test_a_link_of_which_nobody_can_tell_where_it_leads_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def entries(path: str) -> Iterator[list[Hidden]]:
        yield [Hidden()]

    class Hidden:
        name, path = "case", str(tmp_path / "case")

        def is_dir(self) -> bool:
            raise PermissionError(errno.EACCES, "Permission denied", self.path)

    monkeypatch.setattr(os, "scandir", entries)
    with pytest.raises(ConfigError, match="/case: cannot be read: Permission denied"):
        names_in(tmp_path)


def test_a_path_that_may_not_be_looked_at_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(
        ConfigError, match=r"/a\.svs: cannot be read: Permission denied; grant read permission, or give other"
    ):
        find_slides([tmp_path / "a.svs"])


def test_a_link_to_itself_stops_nothing(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    assert names_in(tmp_path) == ["a.svs"]


def test_pipes_are_no_slides(tmp_path: Path) -> None:
    touch(tmp_path, "a.svs")
    os.mkfifo(tmp_path / "b.svs")
    assert names_in(tmp_path) == ["a.svs"]


def test_folders_come_before_links_to_them(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.svs", "z/real/b.svs", "z/real/a.svs")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "z" / "real")
    (tmp_path / "b").symlink_to(tmp_path / "z")
    assert names_in(tmp_path) == ["a/x.svs", "z/real/a.svs", "z/real/b.svs"]


def test_images_of_zarr_are_slides_and_other_zarr_is_not_searched(tmp_path: Path) -> None:
    touch(
        tmp_path, "a.ome.zarr/zarr.json", "a.ome.zarr/0/b.svs", "c.zarr/d.svs", "e/heatmap.ome.zarr/zarr.json", "f.svs"
    )
    touch(tmp_path, "._a.ome.zarr/zarr.json", "empty.ome.zarr/notes")
    assert names_in(tmp_path) == ["a.ome.zarr", "f.svs"]


def test_a_link_that_leads_nowhere_fails_as_a_slide(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_marker_slide(tmp_path / "in" / "a.tif", 128, 128, mpp=0.25, markers=[], marker_px=16)
    (tmp_path / "in" / "b.svs").symlink_to(tmp_path / "gone.svs")
    (failed,) = explain(tmp_path / "in", toy_spec("pooled_linear"), tmp_path / "out", **SMALL).failed
    assert (failed.slide.id, "b.svs: does not exist" in failed.error) == ("b.svs", True)
    assert rows_of(tmp_path / "out")["a.tif"]["status"] == "ok"
