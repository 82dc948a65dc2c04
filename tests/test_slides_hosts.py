"""Hosts and buckets that slides may be asked from, and cells of CSV that spreadsheets would run."""

from __future__ import annotations

import csv
import io
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bombs_zarr import Image
from tests.servers import CREDENTIALS, serving
from tests.synthetic import write_marker_slide
from wsi_gradcam.api import explain
from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import ModelError, SlideAccessError
from wsi_gradcam.inputs.find import SlideEntry, find_slides, search_slides
from wsi_gradcam.io import object_stores
from wsi_gradcam.io.documents import plain_cell, safe_cell
from wsi_gradcam.io.object_stores import web_store
from wsi_gradcam.io.urls import ALLOW_HOSTS, Route, allowing, find_route, refusal
from wsi_gradcam.models.load import load_model
from wsi_gradcam.results.slide import slide_address
from wsi_gradcam.results.slide_tables import COLUMNS, encode_rows, parse_rows, row_problems
from wsi_gradcam.run.settings import make_settings, read_config
from wsi_gradcam.slides import open_slide, read_region
from wsi_gradcam.slides.patch_reader import open_entry

CLOUD = (
    "http://169.254.169.254/latest/meta-data/a.tif",
    "https://169.254.170.2/a.zarr",
    "http://me:secret@169.254.169.254:80/a.tif",
    "http://[fe80::1]/a.tif",
    "http://[fd00:ec2::254]/a.tif",
    "http://[::ffff:169.254.169.254]/a.tif",
    "http://[64:ff9b::a9fe:a9fe]/a.tif",
    "http://2852039166/a.tif",
    "http://0xa9fea9fe/a.tif",
    "http://100.100.100.200/a.tif",
)


@pytest.fixture(autouse=True)
def no_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOW_HOSTS, raising=False)


@pytest.mark.parametrize("url", CLOUD)
@pytest.mark.parametrize("reader", ["auto", "tiff", "ome-zarr"])
def test_what_clouds_tell_only_their_machines_is_not_asked(url: str, reader: str) -> None:
    with pytest.raises(
        SlideAccessError, match=r"belongs to a cloud machine's own metadata service; --allow-hosts .* allows it"
    ) as caught:
        open_slide(url, 0.5, reader)
    assert "secret" not in str(caught.value)


def test_a_name_that_leads_there_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in ("8.8.8.8", "169.254.169.254")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(
        SlideAccessError, match=r"the address 169.254.169.254 belongs to a cloud machine's own metadata service"
    ):
        open_slide("https://slides.example/a.tif", 0.5)


def test_patterns_are_all_that_is_asked() -> None:
    with allowing(["*.example.org", "my-bucket"]):
        assert not refusal("https://a.example.org/x.svs")
        assert not refusal("s3://my-bucket/x.svs")
        assert refusal("https://example.net/x.svs").startswith(
            "example.net is not one of the allowed hosts and buckets"
        )
        assert refusal("s3://other/x.svs")
        with pytest.raises(SlideAccessError, match="other is not one of the allowed hosts and buckets"):
            open_slide("s3://other/x.tif", 0.5)
    assert not refusal("s3://other/x.svs")
    assert ALLOW_HOSTS not in os.environ
    with allowing(["169.254.169.254"]):
        assert not refusal(CLOUD[0])


def test_the_flag_holds_for_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "http://127.0.0.1:1/a.tif", "--allow-hosts", "*.example.org"]) == 2
    assert "127.0.0.1 is not one of the allowed hosts and buckets (*.example.org)" in capsys.readouterr().err


@dataclass
class Asked:
    """A request that a server got."""

    host: str
    path: str
    authorization: str


@contextmanager
def recording(address: str, answer: Callable[[str, str], tuple[int, str, bytes]]) -> Iterator[tuple[str, list[Asked]]]:
    """Serve on an address of loopback; `answer` makes status, Location and body of method and path.

    Yields the URL, and what was asked.
    """
    asked: list[Asked] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(Asked(self.headers["Host"], self.path, self.headers.get("Authorization", "")))
            status, location, body = answer(self.command, self.path)
            span = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            self.send_response(206 if status == 200 and span else status)
            if location:
                self.send_header("Location", location)
            if span and status == 200:
                start, stop = int(span[1]), min(int(span[2]) + 1, len(body))
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(body)}")
                body = body[start:stop]
            self.send_header("ETag", '"a"')
            self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            """Be quiet."""

    with serving(ThreadingHTTPServer((address, 0), Handler)) as server:
        yield f"http://{address}:{server.server_address[1]}", asked


def leading_to(*places: str) -> Callable[[str, str], tuple[int, str, bytes]]:
    """Return an answer that redirects to the first place, later to the next."""
    left = list(places)
    return lambda method, path: (302, left.pop(0) if len(left) > 1 else left[0], b"")


@pytest.fixture(scope="module")
def slide_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("slide") / "a.tif"
    write_marker_slide(path, 100, 100, mpp=0.5, markers=[], marker_px=9, tile_px=64)
    return path.read_bytes()


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest/a.tif", "https://[fd00:ec2::254]/", "//169.254.0.9/a"]
)
@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_redirects_to_what_clouds_tell_only_their_machines_are_not_followed(target: str, name: str) -> None:
    said = r"redirects to http.*belongs to a cloud machine's own metadata service; --allow-hosts"
    with recording("127.0.0.1", leading_to(target)) as (url, _), pytest.raises(SlideAccessError, match=said):
        open_slide(f"{url}/{name}", 0.5)


@pytest.mark.parametrize("name", ["a.tif", "a.zarr"])
def test_redirects_to_hosts_that_no_pattern_names_are_not_followed(name: str) -> None:
    with (
        recording("127.0.0.2", lambda *_: (200, "", b"x" * 99)) as (other, seen),
        recording("127.0.0.1", leading_to(f"{other}/b.tif")) as (url, _),
        allowing(["127.0.0.1"]),
        pytest.raises(
            SlideAccessError, match=r"redirects to .*: 127\.0\.0\.2 is not one of the allowed hosts and buckets"
        ),
    ):
        open_slide(f"{url}/{name}", 0.5)
    assert seen == []


def test_redirects_that_are_allowed_are_followed_without_the_password(slide_bytes: bytes) -> None:
    with (
        recording("127.0.0.2", lambda *_: (200, "", slide_bytes)) as (other, seen),
        recording("127.0.0.1", leading_to(f"{other}/b.tif?sign=1")) as (url, first),
        allowing(["127.0.0.*"]),
        closing(open_slide(f"{url.replace('//', '//me:secret@')}/a.tif")) as slide,
    ):
        assert slide.info.height == 100
    assert {each.authorization for each in first} == {"Basic bWU6c2VjcmV0"}
    assert {each.authorization for each in seen} == {""}
    assert {each.path for each in seen} == {"/b.tif?sign=1"}


@pytest.mark.parametrize("method", ["GET", "later"])
def test_a_server_that_redirects_only_the_reader_leads_it_nowhere(
    method: str, slide_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check in front sees a slide; what reads it then is led elsewhere."""
    monkeypatch.setattr(object_stores, "PATIENCE_S", 1.0)
    with recording("127.0.0.2", lambda *_: (200, "", slide_bytes)) as (other, seen):
        first = iter([(200, "", slide_bytes)] * (2 if method == "later" else 1))
        answer = lambda *_: next(first, (302, f"{other}/b.tif", b""))  # noqa: E731
        with recording("127.0.0.1", answer) as (url, asked), pytest.raises(SlideAccessError, match="cannot be read"):
            _read_some(f"{url}/a.tif")
        assert len(asked) > 1
    assert seen == []


def _read_some(url: str) -> None:
    slide = open_slide(url)
    read_region(slide, 0, 0, 64, 64, 0.5)


def test_a_name_is_asked_at_the_address_that_was_looked_at(monkeypatch: pytest.MonkeyPatch, slide_bytes: bytes) -> None:
    """Else a name could lead elsewhere a moment later; over TLS the certificate shows that."""
    found: list[Any] = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.3", 0))]
    with recording("127.0.0.3", lambda *_: (200, "", slide_bytes)) as (url, asked):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        port = url.rpartition(":")[2]
        route = find_route(f"http://slides.example:{port}/a.tif")
        assert route == Route(f"{url}/a.tif", f"slides.example:{port}", ("127.0.0.3",))
        web_store(f"http://slides.example:{port}/a.tif").get("", options={"range": (0, 9)})
    assert {each.host for each in asked} == {f"slides.example:{port}"}


def test_redirects_end(slide_bytes: bytes) -> None:
    with (
        recording("127.0.0.1", lambda method, path: (302, f"{path}x", b"")) as (url, asked),
        pytest.raises(SlideAccessError, match="redirects too many times; give the final URL"),
    ):
        open_slide(f"{url}/a.tif")
    assert len(asked) <= 12


def test_a_folder_is_found_where_its_files_are_redirected_to(tmp_path: Path) -> None:
    folder = Image(2, fill=200).write(tmp_path / "a.zarr")

    def answer(method: str, path: str) -> tuple[int, str, bytes]:
        place = folder / path.removeprefix("/real/")
        return (200, "", place.read_bytes()) if place.is_file() else (404, "", b"")

    with recording("127.0.0.2", answer) as (other, _):
        moved = lambda method, path: (302, other + path.replace("/a.zarr/", "/real/"), b"")  # noqa: E731
        with recording("127.0.0.1", moved) as (url, _), closing(open_slide(f"{url}/a.zarr")) as slide:
            assert (slide.info.height, slide.info.width) == (1024, 1024)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch, slide_bytes: bytes) -> Iterator[list[Asked]]:
    """What an object store is asked in which each key is a slide."""
    with recording("127.0.0.1", lambda *_: (200, "", slide_bytes)) as (url, asked):
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        yield asked


def opened(entries: Sequence[SlideEntry], **settings: Any) -> None:
    for entry in entries:
        open_entry(entry, make_settings(**settings)).close()


def test_only_buckets_that_the_user_names_are_asked_with_credentials(stores: list[Asked], tmp_path: Path) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text("slide\ns3://mine/a.tif\ns3://other/b.tif\ns3://results/c.tif\n")
    entries = search_slides([listed, "s3://mine/d.tif"], "s3://results/out").entries
    assert [entry.path for entry in entries] == [
        "s3://mine/a.tif",
        "s3://other/b.tif",
        "s3://results/c.tif",
        "s3://mine/d.tif",
    ]
    opened(entries)
    signed = {each.path.split("/")[1]: bool(each.authorization) for each in stores}
    assert signed == {"mine": True, "other": False, "results": True}
    stores.clear()
    with allowing(["s3://other"]):
        (entry,) = find_slides([_list_of(tmp_path, "s3://other/b.tif")])
        opened([entry])
    assert all(each.authorization for each in stores)


def _list_of(folder: Path, *urls: str) -> Path:
    path = folder / "these.csv"
    path.write_text("\n".join(["slide", *urls]))
    return path


def test_a_bucket_that_refuses_says_how_it_is_asked_with_credentials(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with recording("127.0.0.1", lambda *_: (403, "", b"")) as (url, asked):
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": url}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            SlideAccessError, match="--allow-hosts BUCKET permits using them for a bucket that is named only in a list"
        ):
            opened(find_slides([_list_of(tmp_path, "s3://other/b.tif")]))
    assert not any(each.authorization for each in asked)


def test_results_are_no_reason_to_sign(stores: list[Asked]) -> None:
    assert slide_address("s3://other/a.tif", "/out") == "s3://anonymous@other/a.tif"
    assert slide_address("s3://mine/a.tif", "s3://mine/out") == "s3://mine/a.tif"
    assert slide_address("/a.tif", "/out") == "/a.tif"
    open_slide(slide_address("s3://other/a.tif", "/out")).close()
    assert not any(each.authorization for each in stores)


def test_patterns_hold_on_workers_which_have_them_from_the_settings(stores: list[Asked]) -> None:
    entry = SlideEntry("a.tif", "s3://other/a.tif")
    with pytest.raises(SlideAccessError, match="other is not one of the allowed hosts and buckets"):
        opened([entry], allow_hosts=("mine",))
    opened([entry], allow_hosts=("oth*",))
    opened([entry])


def test_patterns_are_a_key_of_the_config_that_no_result_holds(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("allow_hosts: mine\n")
    settings = make_settings(**read_config(tmp_path / "run.yaml"))
    assert settings.allow_hosts == ("mine",)
    assert "allow_hosts" not in settings.model_dump()
    with pytest.raises(SlideAccessError, match="other is not one of the allowed hosts and buckets"):
        explain("s3://other/", "tiny", tmp_path / "out", settings)


@pytest.mark.parametrize("model", ["timm:resnet10t", "torchvision:resnet18"])
def test_weights_are_not_fetched_from_hosts_that_no_pattern_names(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with (
        allowing(["*.example.org"]),
        pytest.raises(ModelError, match="is not one of the allowed hosts and buckets"),
    ):
        load_model(model)


FORMULAS = ("=1+1", "+1+1", "-2+3", "@SUM(1)", "\tx", "\r=1", "'=1", "''@x", "=cmd|' /C calc'!A0")


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_a_formula_and_all_are_read_back(text: str) -> None:
    row = dict.fromkeys(COLUMNS, "") | {"id": text, "path": f"/a/{text}", "status": "failed", "error": text}
    data = encode_rows({text: row})
    for cells in list(csv.reader(io.StringIO(data.decode(), newline="")))[1:]:
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    rows = parse_rows("slides.csv", data)
    assert rows[text] | {"row_digest": ""} == row
    assert list(row_problems(data, rows)) == []


@given(st.text(st.sampled_from("'=+-@\ta1."), max_size=6))
def test_cells_are_read_back(text: str) -> None:
    assert plain_cell(safe_cell(text)) == text


def test_a_list_may_have_such_cells(tmp_path: Path) -> None:
    (tmp_path / "=a.svs").write_bytes(b"")
    (tmp_path / "list.csv").write_text("slide\n'=a.svs\n")
    assert [entry.id for entry in find_slides([tmp_path / "list.csv"])] == ["=a.svs"]


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254\\@8.8.8.8/a.svs",
        "https://169.254.169.254\\@8.8.8.8/a.svs",
        "http://169.254\t.169.254/a.svs",
        "http://169.254.169.254\n/a.svs",
        "http://169.254.169.254 /a.svs",
        "http://8.8.8.8\0.169.254.169.254/a.svs",
    ],
)
def test_hosts_that_libraries_read_in_several_ways_are_not_asked(url: str) -> None:
    """Browsers' rules leave tabs out and end the host at a backslash; those of RFC 3986 do not."""
    assert "is not a host name; correct the URL" in refusal(url)
    with allowing(["8.8.8.8"]):
        assert "is not a host name; correct the URL" in refusal(url)
