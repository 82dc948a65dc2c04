"""Hosts and buckets that slides may be asked from, and cells of CSV that spreadsheets would run."""

from __future__ import annotations

import csv
import io
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_gradcam.cli.main import main
from wsi_gradcam.errors import SlideAccessError
from wsi_gradcam.inputs.find import find_slides
from wsi_gradcam.io.documents import plain_cell, safe_cell
from wsi_gradcam.io.urls import ALLOW_HOSTS, allowing, refusal
from wsi_gradcam.results.slide_tables import COLUMNS, encode_rows, parse_rows, row_problems
from wsi_gradcam.slides import open_slide

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
    with pytest.raises(SlideAccessError, match=r"is for a cloud machine itself; --allow-hosts .* allows it") as caught:
        open_slide(url, 0.5, reader)
    assert "secret" not in str(caught.value)


def test_a_name_that_leads_there_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in ("8.8.8.8", "169.254.169.254")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(SlideAccessError, match=r"the address 169.254.169.254 is for a cloud machine itself"):
        open_slide("https://slides.example/a.tif", 0.5)


def test_patterns_are_all_that_is_asked() -> None:
    with allowing(["*.example.org", "my-bucket"]):
        assert not refusal("https://a.example.org/x.svs")
        assert not refusal("s3://my-bucket/x.svs")
        assert refusal("https://example.net/x.svs").startswith("example.net is none of the hosts and buckets that are")
        assert refusal("s3://other/x.svs")
        with pytest.raises(SlideAccessError, match="other is none of the hosts and buckets"):
            open_slide("s3://other/x.tif", 0.5)
    assert not refusal("s3://other/x.svs")
    assert ALLOW_HOSTS not in os.environ
    with allowing(["169.254.169.254"]):
        assert not refusal(CLOUD[0])


def test_the_flag_holds_for_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "http://127.0.0.1:1/a.tif", "--allow-hosts", "*.example.org"]) == 2
    assert "127.0.0.1 is none of the hosts and buckets that are asked (*.example.org)" in capsys.readouterr().err


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
