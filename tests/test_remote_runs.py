"""Slides by URL on the command line and in lists: ids, folders, and the same results as from files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.runs import SMALL, command, flags, rows_of, stored, toy_file, toy_spec
from tests.servers import BUCKET, CREDENTIALS, put_folder, s3_server, web_server
from tests.synthetic import PINK, write_marker_slide
from tests.test_slides_ome_zarr_reader import write as write_zarr
from wsi_gradcam.api import explain, validate
from wsi_gradcam.errors import ConfigError, SlideAccessError
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.io.urls import ALLOW_HOSTS
from wsi_gradcam.results.validation import check
from wsi_gradcam.slides import open_slide


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": server}.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_marker_slide(tmp_path / "a.tif", 300, 400, mpp=0.25, markers=[(100, 200)], marker_px=16).path


def assert_same_values(out: Path, expected: Path) -> None:
    for name in ("xy", "logits", "cam"):
        np.testing.assert_array_equal(stored(out, name), stored(expected, name))


def test_urls_are_named_by_their_last_part() -> None:
    url = "https://me:secret@host/archive/case%201.svs?signature=hidden"
    (entry,) = find_slides([url])
    assert (entry.id, entry.path, entry.address) == ("case 1.svs", "https://host/archive/case%201.svs", url)
    assert "secret" not in repr(entry)
    assert "hidden" not in repr(entry)
    (plain,) = find_slides(["s3://bucket/x/a.svs"])
    assert (plain.id, plain.path, plain.url) == ("a.svs", "s3://bucket/x/a.svs", "")


def test_equal_names_are_told_apart_by_what_differs(slide: Path) -> None:
    urls = ["s3://bucket/x/1/a.svs", "s3://bucket/x/2/a.svs"]
    assert [entry.id for entry in find_slides(urls)] == ["1/a.svs", "2/a.svs"]
    assert [entry.id for entry in find_slides([*urls, "https://host/a.svs"])] == [
        "bucket/x/1/a.svs",
        "bucket/x/2/a.svs",
        "host/a.svs",
    ]
    assert [entry.id for entry in find_slides([slide, "s3://bucket/b.tif"])] == ["a.tif", "b.tif"]
    both = [entry.id for entry in find_slides([slide, "s3://bucket/a.tif"])]
    assert both == sorted(["bucket/a.tif", slide.as_posix().lstrip("/")])


def test_a_url_given_twice_is_one_slide() -> None:
    assert len(find_slides(["https://host/a.svs?sign=1", "https://host/a.svs?sign=2"])) == 1
    with pytest.raises(ConfigError, match="differ only in dots and slashes"):
        find_slides(["s3://bucket/x/a.svs", "s3://bucket/x//a.svs"])


def test_a_remote_folder_is_searched_through(s3: str, tmp_path: Path) -> None:
    for name in ("b.svs", "x/a.tiff", "x/y/c.NDPI", "notes.txt", "._b.svs", "old.zarr/0.svs", "x/old.svs/d.svs"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"content")
    data = np.full((3, 130, 130), 99, np.uint8)
    write_zarr(tmp_path / "in/x/e.ome.zarr", data)
    write_zarr(tmp_path / "in/x/heatmap.ome.zarr", data)
    (tmp_path / "in/f.ome.zarr").mkdir()
    (tmp_path / "in/f.ome.zarr/readme").write_bytes(b"no group")
    put_folder(s3, tmp_path / "in", "deep/in")
    expected = ["b.svs", "x/a.tiff", "x/e.ome.zarr", "x/old.svs/d.svs", "x/y/c.NDPI"]
    entries = find_slides([f"s3://{BUCKET}/deep/in/"])
    assert [entry.id for entry in entries] == expected
    assert [entry.id for entry in find_slides([tmp_path / "in"])] == expected
    assert entries[0].path == f"s3://{BUCKET}/deep/in/b.svs"
    for end in ("", "/"):
        (image,) = find_slides([f"s3://{BUCKET}/deep/in/x/e.ome.zarr{end}"])
        assert image.id == "e.ome.zarr"
        open_slide(image.address).close()
    with pytest.raises(ConfigError, match=r"empty/: no slides in this folder; expected names ending in .*\.svs"):
        find_slides([f"s3://{BUCKET}/empty/"])


def test_web_servers_are_not_asked_what_they_have(tmp_path: Path) -> None:
    write_zarr(tmp_path / "image", np.full((3, 130, 130), 99, np.uint8))
    with web_server(tmp_path) as web:
        assert [entry.id for entry in find_slides([f"{web.url}/image/"])] == ["image"]
        with pytest.raises(SlideAccessError, match=r"web servers cannot be searched; name the slides one by one"):
            find_slides([f"{web.url}/slides/"])


@pytest.mark.parametrize("workers", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_list_of_urls_gives_what_files_give(
    workers: int | None, s3: str, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_HOSTS, f"s3://{BUCKET},127.0.0.1")  # else a list's bucket is asked without credentials
    key, image = f"{tmp_path.name}/{slide.name}", tmp_path / "b.ome.zarr"
    pixels = np.array(PINK, np.uint8) - np.random.default_rng(3).integers(0, 16, (260, 390, 3), dtype=np.uint8)
    write_zarr(image, np.moveaxis(pixels, -1, 0), scale=0.25)
    put_folder(s3, slide, key)
    put_folder(s3, image, f"{tmp_path.name}/{image.name}")
    with web_server(tmp_path) as web:
        remote, local = tmp_path / "remote.csv", tmp_path / "local.csv"
        remote.write_text(f"slide,mpp\ns3://{BUCKET}/{key},0.5\n{web.url}/{image.name}?sign=secret,\n")
        local.write_text(f"slide,mpp\n{slide.name},0.5\n{image.name},\n")
        model = toy_spec("pooled_linear")
        explain(local, model, tmp_path / "local", **SMALL)
        explain(remote, model, tmp_path / "remote", workers=workers, **SMALL)
        rows = rows_of(tmp_path / "remote")
        assert {name: row["status"] for name, row in rows.items()} == {"a.tif": "ok", "b.ome.zarr": "ok"}
        assert rows["b.ome.zarr"]["path"] == f"{web.url}/{image.name}"
        for name in rows:
            assert_same_values(tmp_path / "remote" / name, tmp_path / "local" / name)
        assert not validate(tmp_path / "remote", remote_slides=True)
        unasked = check(tmp_path / "remote")
        assert not unasked.findings
        assert [note.partition(":")[0] for note in unasked.notes] == ["a.tif", "b.ome.zarr"]
        assert all("on another machine, which is contacted only with --remote-slides" in note for note in unasked.notes)
        put_folder(s3, image / "zarr.json", key)  # another object now
        assert [finding.slide for finding in validate(tmp_path / "remote", remote_slides=True)] == ["a.tif"]
    written = b"".join(path.read_bytes() for path in (tmp_path / "remote").rglob("*") if path.is_file())
    assert b"sign=secret" not in written


@pytest.mark.slow
def test_the_command_line_takes_urls(s3: str, slide: Path, tmp_path: Path) -> None:
    key = f"{tmp_path.name}/{slide.name}"
    put_folder(s3, slide, key)
    url, model, out = f"s3://{BUCKET}/{key}", toy_file(tmp_path, "pooled_linear"), tmp_path / "out"
    told = command("info", url)
    assert (told.returncode, told.stderr) == (0, "")
    assert "generic-tiff" in told.stdout
    dry = command("explain", url, "--model", model, "--out", out, "--dry-run", *flags(SMALL))
    assert dry.returncode == 0, dry.stderr
    assert not out.exists()
    done = command("explain", url, "--model", model, "--out", out, *flags(SMALL))
    assert done.returncode == 0, done.stderr
    assert command("explain", slide, "--model", model, "--out", tmp_path / "local", *flags(SMALL)).returncode == 0
    assert_same_values(out / "a.tif", tmp_path / "local" / "a.tif")
    told = command("validate", out)
    assert (told.returncode, "--remote-slides" in told.stdout) == (0, True)
    assert "--remote-slides" not in command("validate", out, "--remote-slides").stdout
    failed = command("explain", f"s3://{BUCKET}/gone.svs", url, "--model", model, "--out", out, *flags(SMALL))
    assert failed.returncode == 1
    assert "gone.svs: does not exist" in " ".join(failed.stderr.split())
