"""The viewer on runs that are not finished, damaged, or too busy; and how the command starts it."""

from __future__ import annotations

import html
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest

from tests.viewer_runs import BROKEN, client, facts_of, make_run, tiles_of
from wsi_gradcam.viewer import app, responses
from wsi_gradcam.viewer.app import BoundedThreads
from wsi_gradcam.viewer.archive import Archive, valid_text
from wsi_gradcam.viewer.responses import BusyError, DisconnectedError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("states"))


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def test_what_may_change_is_not_kept(out: Path) -> None:
    (out / "a.tif" / "manifest" / "done.json").unlink()
    with client(out) as server:
        facts = facts_of(server, "a.tif")
        assert facts["table"] is False
        answer = server.get(f"{tiles_of(facts)}/heat/1/3/0_0.png")
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        assert server.get(f"/api/slides/{facts['key']}/values?y=808&x=1200").json()["explained"] is True
        assert server.get(f"/api/slides/{facts['key']}/patches/at?y=808&x=1200").status_code == 404
        assert "immutable" in server.get(f"{tiles_of(facts)}/slide/0/0_0.jpg").headers["cache-control"]


def test_a_run_without_a_list_of_slides_shows_those_that_were_begun(out: Path) -> None:
    (out / "slides.csv").unlink()
    with client(out) as server:
        found = server.get("/api/slides", params={"sort": "status"}).json()
        assert [(slide["id"], slide["status"]) for slide in found["slides"]] == [
            ("a.tif", "unfinished"),
            ("inner/b.tif", "unfinished"),
        ]
        facts = facts_of(server, "a.tif")
        assert facts["heat"] is not None
        assert facts["slide"]["problem"]


def test_a_table_that_is_gone_leaves_a_slide_without_scores(out: Path) -> None:
    (out / "a.tif" / "patches.parquet").unlink()
    with client(out) as server:
        end = time.monotonic() + 30
        while (found := server.get("/api/slides").json())["scored"] < 2:
            assert time.monotonic() < end
            time.sleep(0.05)
        scores = {slide["id"]: slide["scores"] for slide in found["slides"]}
        assert scores["a.tif"] == {}
        assert scores["inner/b.tif"]


def test_slides_by_status_and_slides_that_are_not_there(out: Path) -> None:
    with client(out) as server:
        found = server.get("/api/slides", params={"sort": "status"}).json()
        assert [slide["id"] for slide in found["slides"]] == [BROKEN, "a.tif", "inner/b.tif"]
        assert server.get("/api/slide", params={"id": "nothing"}).status_code == 404
        assert server.get("/favicon.ico").headers["content-type"] == "image/svg+xml"


def test_names_that_are_no_text_can_be_shown_and_found(out: Path) -> None:
    name = "a\udcff.tif"
    text = (out / "slides.csv").read_text(encoding="utf-8")
    (out / "slides.csv").write_bytes(text.replace("inner/b.tif", name).encode("utf-8", "surrogateescape"))
    archive = Archive(out)
    assert archive.find_by_id(valid_text(name)).result.id == name
    (out / "inner" / "b.tif").rename(out / name)
    with client(out) as server:
        assert "a?.tif" in [slide["id"] for slide in server.get("/api/slides").json()["slides"]]
        assert server.get("/files/a%FF.tif/overview.png").status_code == 200
        (out / "audit" / name).mkdir(parents=True)
        (out / "audit" / name / "report.html").write_text("audited", encoding="utf-8")
        assert server.get(facts_of(server, "a?.tif")["audit"]).text == "audited"


@pytest.mark.parametrize(("error", "status"), [(BusyError(), 503), (DisconnectedError(), 499), (OSError("disk"), 500)])
def test_trouble_is_a_status(out: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int) -> None:
    with client(out) as server:

        async def run(self: BoundedThreads, gone: Any, function: Any) -> None:
            raise error

        monkeypatch.setattr(BoundedThreads, "run", run)
        answer = server.get("/api/run")
        assert answer.status_code == status
        assert (answer.headers.get("retry-after") == "1") == (status == 503)


def test_what_is_too_large_is_sent_in_pieces_alone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_BYTES", 100)
    address = "/zarr/a.tif/heatmap.ome.zarr/zarr.json"
    with client(out) as server:
        assert server.get(address).status_code == 416
        part = server.get(address, headers={"Range": "bytes=10-5000"})
        assert (part.status_code, len(part.content)) == (206, 100)
        assert part.headers["content-range"].startswith("bytes 10-109/")


@pytest.mark.parametrize(
    ("host", "token", "begins"), [("127.0.0.1", False, "http://127.0.0.1:"), ("localhost", True, "http://localhost:")]
)
def test_the_command_opens_a_browser(
    out: Path, monkeypatch: pytest.MonkeyPatch, host: str, token: bool, begins: str
) -> None:
    """All users of the machine see its command line, which has no token."""
    opened: list[str] = []
    said: list[str] = []
    files: list[Path] = []

    class Server:
        def run(self, sockets: list[Any]) -> None:
            self.address = sockets[0].getsockname()

    def open_it(address: str) -> None:
        if address.startswith("file://"):
            files.append(Path(urlsplit(address).path))
            address = html.unescape(files[0].read_text(encoding="utf-8").partition("url=")[2].partition('"')[0])
            assert (files[0].stat().st_mode & 0o777, files[0].parent.stat().st_mode & 0o777) == (0o600, 0o700)
        opened.append(address)

    server = Server()
    monkeypatch.setattr(app, "make_server", lambda app, tls: server)
    monkeypatch.setattr("webbrowser.open", open_it)
    app.view(str(out), host=host, port=0, token=token, browse=True, announce=said.append)
    assert opened[0].startswith(f"{begins}{server.address[1]}/")
    assert ("?token=" in opened[0]) == token == bool(files)
    assert said[0].startswith(opened[0].partition("?")[0])
    assert opened[0].partition("?token=")[2] not in said[0].split()[0] or not token  # a code, not the token itself
    assert not any(file.parent.exists() for file in files)


async def _never() -> bool:
    return False


async def _always() -> bool:
    return True


def test_too_much_work_is_refused_and_unwanted_work_not_done() -> None:
    done: list[str] = []

    def take(name: str) -> str:
        time.sleep(0.02)
        done.append(name)
        return name

    async def all_of_it() -> list[str]:
        work, found = BoundedThreads(1, max_waiting=3), []

        async def one(number: int) -> None:
            try:
                found.append(await work.run(_always if number == 1 else _never, lambda: take(str(number))))
            except (BusyError, DisconnectedError) as error:
                found.append(type(error).__name__)

        async with anyio.create_task_group() as group:
            for number in range(5):
                group.start_soon(one, number)
        return [*found, await work.run(_never, lambda: "free again")]

    found = anyio.run(all_of_it)
    assert found[-1] == "free again"
    assert found.count("BusyError") == 2
    assert found.count("DisconnectedError") == 1
    assert sorted(done) == sorted(set(done))
    assert len(done) == 2


def _at(*keys: str | int) -> Callable[[Any, Any], None]:
    """A function that sets the value at a place in metadata."""

    def put(metadata: Any, value: Any) -> None:
        for key in keys[:-1]:
            metadata = metadata[key]
        metadata[keys[-1]] = value

    return put


WINDOW = ("attributes", "ome", "omero", "channels", 0, "window")
PLACES = [
    *(_at(*WINDOW, key) for key in ("min", "max", "start", "end")),
    *(_at(*WINDOW[: 5 - cut]) for cut in range(3)),
    _at(*WINDOW),
    _at(*WINDOW[:5], "label"),
    _at("attributes", "ome", "multiscales"),
    _at("attributes", "ome"),
    _at("attributes", "wsi_gradcam"),
]
VALUES: list[Any] = [float("nan"), float("inf"), -float("inf"), 10**400, None, "x" * 10_000, [], {}, True]


def test_senseless_metadata_are_told_and_break_nothing(out: Path, tmp_path: Path) -> None:
    """Never a 500, on no route."""
    shutil.copytree(out, tmp_path / "copy")
    file = tmp_path / "copy" / "a.tif" / "heatmap.ome.zarr" / "zarr.json"
    good = file.read_text(encoding="utf-8")
    with client(out) as server:
        facts = facts_of(server, "a.tif")
    routes = ["/api/run", "/api/slides", "/api/slide?id=a.tif"]
    routes += [
        f"/api/slides/{facts['key']}/{rest}" for rest in ("values?y=1&x=1", "patches/0", "patches/top?channel=0")
    ]
    routes += [f"{tiles_of(facts)}/{rest}" for rest in ("heat/0/0/0_0.png", "cells/0/0/0_0.png", "patch/0.jpg")]
    found = set()
    for place in PLACES:
        for value in VALUES:
            metadata = json.loads(good)
            place(metadata, value)
            file.write_text(json.dumps(metadata), encoding="utf-8")
            with client(tmp_path / "copy") as server:
                for route in routes:
                    answer = server.get(route)
                    assert answer.status_code < 500, f"{route}: {answer.text}"
                    found.add(answer.status_code)
    assert 422 in found or 404 in found
