"""Attacks on the viewer: what leads out of OUT, what other sites' pages ask for, what wants to exhaust it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.viewer_runs import Served, client, facts_of, fetched, make_run, served
from wsi_gradcam.errors import NotShownError, OutsideError
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.viewer import serve as connections
from wsi_gradcam.viewer.archive import check_inside, check_tree, path_below
from wsi_gradcam.viewer.serve import COOKIE, Access, host_of, is_loopback

SECRET = "root:x:0:0"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = make_run(tmp_path_factory.mktemp("security"))
    (found.parent / "secret.json").write_text(SECRET, encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def server(out: Path) -> Iterator[Served]:
    with served(out) as found:
        yield found


def raw(server: Served, target: str, *headers: str, method: str = "GET") -> bytes:
    """The answer to a request whose target is sent as it stands."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Connection: close", *headers]
        client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        return b"".join(iter(lambda: client.recv(65536), b""))


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "root",
    ["/zarr/a.tif/heatmap.ome.zarr", "/files", "/files/audit", "/files/a.tif", "/files/audit/a.tif", "/page", ""],
)
@pytest.mark.parametrize(
    "path",
    [
        "../../secret.json",
        "../../../secret.json",
        "%2e%2e/%2e%2e/secret.json",
        "..%2f..%2fsecret.json",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "..%5c..%5csecret.json",
        "%252e%252e/%252e%252e/secret.json",
        "....//....//secret.json",
        "zarr.json/../../../secret.json",
        "zarr.json%00.json",
        ".%00./secret.json",
        "%c0%ae%c0%ae/secret.json",
        "\\..\\secret.json",
        "./../../secret.json",
        "audit/../../../secret.json",
        "a" * 300 + ".json",
    ],
)
def test_no_path_leads_out(server: Served, root: str, path: str) -> None:
    answer = raw(server, f"{root}/{path}")
    assert status(answer) in (400, 403, 404)
    assert SECRET.encode() not in answer


@pytest.mark.parametrize("path", ["run.yaml", "slides.csv", "a.tif/manifest/done.json", "a.tif/cams.zarr/zarr.json"])
def test_other_files_of_out_are_not_handed_out(server: Served, path: str) -> None:
    for root in (
        "/files/",
        "/files/audit/../",
        "/files/a.tif/../",
        "/zarr/",
        "/zarr/a.tif/heatmap.ome.zarr/../../",
        "/",
    ):
        assert status(raw(server, root + path)) in (400, 403, 404)


def test_links_out_of_out_are_refused(out: Path, tmp_path: Path) -> None:
    secret, folder = out.parent / "secret.json", out / "a.tif"
    links = [folder / "heatmap.ome.zarr" / "link.json", folder / "audit", folder / "cams.zarr" / "0"]
    (tmp_path / "report.html").write_text(SECRET, encoding="utf-8")
    for link, target in zip(links, (secret, tmp_path, tmp_path), strict=True):
        link.symlink_to(target)
        try:
            with client(out) as server:
                answer = server.get("/api/slide", params={"id": "a.tif"})
                assert answer.status_code == 403
                assert "leads out" in answer.json()["error"]
                for address in ("/zarr/a.tif/heatmap.ome.zarr/link.json", "/files/a.tif/overview.png"):
                    refused = server.get(address)
                    assert refused.status_code == 403
                    assert SECRET not in refused.text
                assert server.get("/api/slide", params={"id": "inner/b.tif"}).status_code == 200
        finally:
            link.unlink()


def test_links_that_are_made_later_are_refused_too(out: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tif").mkdir()
    for file in ("report.html", "metrics.json", "a.tif/report.html", "a.tif/spread.json"):
        (tmp_path / file).write_text(SECRET, encoding="utf-8")
    links = {
        out / "a.tif" / "heatmap.ome.zarr" / "link.json": ["/zarr/a.tif/heatmap.ome.zarr/link.json"],
        out / "audit": [f"/files/audit/{name}" for name in ("report.html", "metrics.json", "a.tif/report.html")],
    }
    with client(out) as server:
        assert "key" in facts_of(server, "a.tif")
        for link, addresses in links.items():
            link.symlink_to(tmp_path if link.name == "audit" else out.parent / "secret.json")
            try:
                for address in addresses:
                    answer = server.get(address)
                    assert answer.status_code == 403, address
                    assert SECRET not in answer.text
                assert SECRET not in server.get("/api/slide", params={"id": "a.tif"}).text
            finally:
                link.unlink()


def test_links_inside_out_are_followed(out: Path, tmp_path: Path) -> None:
    link = out / "a.tif" / "more"
    link.symlink_to(out / "inner")
    try:
        check_tree(LocalPath(out), LocalPath(out / "a.tif"))
        check_inside(LocalPath(out), LocalPath(link / "b.tif"))
    finally:
        link.unlink()
    check_tree(LocalPath(out), LocalPath(out / "nothing"))
    with pytest.raises(OutsideError):
        check_inside(LocalPath(out), LocalPath(out / ".." / "secret.json"))


@pytest.mark.parametrize(
    "path", ["", "..", "a/../b", ".zattrs", "a//b", "a b", "a\0", "x" * 201, "a/" * 12 + "a", "a\n"]
)
def test_odd_paths_are_refused(path: str) -> None:
    with pytest.raises(NotShownError):
        path_below(LocalPath(Path("/nowhere")), path)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "",
        "0.0.0.0",
        "127.0.0.1@evil.example",
        "[::2]",
        "[::1].evil",
        "[::1].evil:80",
        "[::1]evil:80",
        "[::1",
        "[::1]:80:80",
        "[::1]@evil",
        "[[::1]]",
        "[localhost]",
        "[127.0.0.1]",
        "[::1%25lo]",
        "::1",
        "127.0.0.1.evil",
        "127.0.0.1.",
        "localhost.",
        "localhost:80@evil",
        "localhost@evil:80",
        "me@localhost",
        "me:you@127.0.0.1:80",
        "localhost:",
        "localhost:80:80",
        "localhost:x",
        "localhost:800000",
        "localhost/evil",
        "localhost#evil",
        "localhost?evil",
        "localhost,evil",
        "localhost evil",
        "http://localhost",
        "2130706433",
        "0x7f000001",
        "127.1",
        "loc\xe0lhost",
        "localhost" + "x" * 300,
    ],
)
def test_other_names_for_this_machine_are_refused(server: Served, host: str) -> None:
    """A page of another site whose name points to 127.0.0.1 sends its own name."""
    assert fetched(f"{server.url}/api/run", Host=host)[0] == 421


def test_one_host_is_named(server: Served) -> None:
    """Servers and caches may each believe another one of two."""
    for one, other in (("127.0.0.1", "evil"), ("evil", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            request = f"GET /api/run HTTP/1.1\r\nHost: {one}\r\nhost: {other}\r\nConnection: close\r\n\r\n"
            client.sendall(request.encode())
            assert status(client.recv(100)) in (400, 421)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
        client.sendall(b"GET /api/run HTTP/1.0\r\n\r\n")
        assert status(client.recv(100)) in (400, 421)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "LOCALHOST", "[::1]:80", "[::1]"])
def test_own_names_are_known(server: Served, host: str) -> None:
    assert fetched(f"{server.url}/api/run", Host=host)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "file://127.0.0.1"},
        {"Origin": "http://me@127.0.0.1"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    ],
)
def test_pages_of_other_sites_are_refused(server: Served, headers: dict[str, str]) -> None:
    code, _, answer = fetched(f"{server.url}/api/run", **headers)
    assert code == 403
    assert not [name for name in answer if name.startswith("access-control")]


def test_a_link_to_the_page_may_stand_anywhere(server: Served) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert fetched(f"{server.url}/", **headers)[0] == 200
    own = {"Sec-Fetch-Site": "same-origin", "Origin": server.url}
    assert fetched(f"{server.url}/api/run", **own)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_nothing_can_be_changed(server: Served, method: str) -> None:
    answer = raw(server, "/api/run", method=method)
    assert status(answer) == 405
    assert b"access-control" not in answer.lower()


def test_each_answer_has_the_headers_that_browsers_need(server: Served) -> None:
    for path in ("/", "/api/run", "/nothing", "/page/main.js"):
        headers = fetched(server.url + path)[2]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers


def test_a_token_is_asked_for(out: Path) -> None:
    access = Access.for_host("0.0.0.0", "right")
    with client(out, access) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": f"{COOKIE}=wrong"}, {"Cookie": "\x01=;;="}):
            assert server.get("/api/run", headers=headers).status_code == 401
            assert server.get("/", headers=headers).status_code == 401
        assert server.get("/?token=wrong").status_code == 401
        assert server.get("/api/run", headers={"Authorization": "Bearer right"}).status_code == 200
        entered = server.get("/?token=right&x=1", follow_redirects=False)
        assert (entered.status_code, entered.headers["location"]) == (303, f"{access.folder}?x=1")
        cookie = entered.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert f"path={access.folder}" in cookie
        assert "secure" not in cookie.split("; ")
        assert server.get(f"{access.folder}api/run").status_code == 200  # by the cookie
        assert server.get("/api/run").status_code == 401  # where no browser sends it
        value = {"Cookie": f"{access.cookie()}=right"}
        assert server.get("/api/run", headers=value).status_code == 401
        assert server.get("/api/run", headers={"Authorization": "Bearer right"}).status_code == 200


def test_the_folder_of_a_page_tells_nothing_of_its_token(out: Path) -> None:
    access = Access.for_host("127.0.0.1", "right")
    assert "right" not in access.folder
    assert len(access.folder) == 34
    assert access.folder != Access.for_host("127.0.0.1", "other").folder
    assert Access.for_host("127.0.0.1", "").folder == "/"
    with client(out, access) as server:
        assert server.get(f"{access.folder}api/run").status_code == 401
        assert server.get(f"{access.folder}page/main.js").status_code == 401
        assert server.get(f"{access.folder}api/run", headers={"Authorization": "Bearer right"}).status_code == 200


def test_two_servers_of_a_machine_keep_their_browsers(out: Path) -> None:
    """Browsers send the cookies of a host to all its ports."""
    cookies: dict[str, str] = {}
    servers = {token: Access.for_host("127.0.0.1", token) for token in ("first", "second")}
    for token, access in servers.items():
        with client(out, access) as server:
            server.get(f"/?token={token}", follow_redirects=False)
            cookies |= dict(server.cookies)
    assert len(cookies) == 2
    both = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
    for access in servers.values():
        with client(out, access) as server:
            assert server.get(f"{access.folder}api/run", headers=both).status_code == 200


def test_a_code_admits_one_browser(out: Path) -> None:
    access = Access.for_host("127.0.0.1", "right")
    access.codes.add("once")
    for code, found in (("wrong", 401), ("once", 303), ("once", 401), ("", 401)):
        with client(out, access) as server:
            answer = server.get(f"/?token={code}", follow_redirects=False)
            assert answer.status_code == found
            assert server.get(f"{access.folder}api/run").status_code == (200 if found == 303 else 401)
            assert answer.headers.get("cache-control") == "no-store"


@pytest.mark.parametrize("years", [-30, 30])
def test_a_clock_that_is_set_locks_nobody_out_and_in(out: Path, monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    """Neither token nor cookie has an end by the clock, which is the browser's too here."""
    access = Access.for_host("127.0.0.1", "right")
    access.codes.update({"before", "after"})
    true, jumped = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: true() + jumped[0])
    with client(out, access) as early, client(out, access) as late, client(out, access) as stranger:
        entered = early.get("/?token=before", follow_redirects=False)
        assert not {"expires", "max-age"} & {part.partition("=")[0] for part in cookie_parts(entered)}
        jumped[0] = years * 365.25 * 86400
        assert early.get(f"{access.folder}api/run").status_code == 200
        assert early.get("/api/run", headers={"Authorization": "Bearer right"}).status_code == 200
        assert stranger.get("/?token=before", follow_redirects=False).status_code == 401  # used up, as ever
        assert late.get("/?token=after", follow_redirects=False).status_code == 303
        jumped[0] = 0.0
        assert [each.get(f"{access.folder}api/run").status_code for each in (early, late, stranger)] == [200, 200, 401]


def cookie_parts(answer: Any) -> list[str]:
    return [part.strip().lower() for part in answer.headers["set-cookie"].split(";")]


def test_a_clock_that_is_set_closes_no_connection_and_keeps_none(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How long a client has been silent is told by a clock that nobody sets."""
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT_S", 2.0)
    monkeypatch.setattr(connections, "CHECK_EVERY_S", 0.1)
    true, jumped = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: true() + jumped[0])
    with served(out) as server:
        for years in (30, -30):
            with socket.create_connection(("127.0.0.1", server.port), timeout=20) as silent:
                began, jumped[0] = time.monotonic(), years * 365.25 * 86400
                assert silent.recv(1) == b""
                assert 1.5 < time.monotonic() - began < 15
            assert fetched(f"{server.url}/api/run")[0] == 200


def test_a_browser_that_comes_from_a_file_begins_anew(out: Path) -> None:
    """A strict cookie is not sent along with what another page began, nor with where that is redirected to."""
    access = Access.for_host("127.0.0.1", "right")
    with client(out, access) as server:
        come = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        answer = server.get('/?token=right&slide="><script>', headers=come)
        assert answer.status_code == 200
        assert f'url={access.folder}?slide=%22%3E%3Cscript%3E"' in answer.text
        assert "right" not in answer.text
        assert "set-cookie" in answer.headers


def test_who_may_be_called_how() -> None:
    assert not Access.for_host("127.0.0.1", "").knows_host("192.168.1.4:80")
    everywhere = Access.for_host("0.0.0.0", "t")
    assert everywhere.knows_host("192.168.1.4:8765")
    assert everywhere.knows_host(socket.gethostname())
    assert not everywhere.knows_host("evil.example")
    assert Access.for_host("127.0.0.1", "", ["Proxy.example"]).knows_host("proxy.example:443")
    assert not Access.for_host("10.0.0.1", "t").knows_host("10.0.0.2")
    assert [is_loopback(h) for h in ("127.0.0.9", "::1", "localhost", "0.0.0.0", "host")] == [True] * 3 + [False] * 2
    assert host_of("[::1") == ""
    assert "secret" not in repr(Access.for_host("127.0.0.1", "secret"))


def test_long_addresses_and_many_ranges_are_refused(server: Served) -> None:
    assert status(raw(server, "/api/slides?search=" + "x" * 5000)) == 414
    ranges = "Range: bytes=" + ",".join(f"{i}-{i}" for i in range(8000))
    assert status(raw(server, "/zarr/a.tif/heatmap.ome.zarr/zarr.json", ranges)) == 416
    with suppress(ConnectionResetError):  # it does not read on
        assert status(raw(server, "/api/run", "X-Long: " + "x" * 1_000_000)) == 400
    assert fetched(f"{server.url}/api/run")[0] == 200


def test_a_thousand_slow_connections_shut_nobody_out(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 200)
    slow: list[socket.socket] = []
    try:
        for number in range(1000):
            one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            one.sendall(b"GET /api/run HTTP/1.1\r\nHost: 127" if number % 2 else b"")
            slow.append(one)
        started = time.monotonic()
        assert fetched(f"{server.url}/api/run")[0] == 200
        assert time.monotonic() - started < 5
        assert sum(map(open_still, slow)) <= 200
    finally:
        for one in slow:
            one.close()


def test_slow_requests_and_stuck_readers_are_ended(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("REQUEST_TIMEOUT_S", 0.5), ("STALL_TIMEOUT_S", 1.0), ("CHECK_EVERY_S", 0.1)):
        monkeypatch.setattr(connections, name, value)
    with served(out) as server:
        dripping = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        dripping.sendall(b"GET / HTTP/1.1\r\nHost: x")
        stop = threading.Event()
        drip = threading.Thread(target=_drip, args=(dripping, stop))
        drip.start()
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", server.port))
        request = f"GET /page/vendor/openseadragon.min.js HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
        reader.sendall(request * 40)  # 14 MB that nobody reads
        time.sleep(3)
        stop.set()
        drip.join()
        assert not open_still(dripping)
        assert not drained(reader)
        kept = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        kept.sendall(f"GET /api/run HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        assert kept.recv(100).startswith(b"HTTP/1.1 200")
        for one in (dripping, reader, kept):
            one.close()


def _drip(client: socket.socket, stop: threading.Event) -> None:
    while not stop.wait(0.1):
        try:
            client.sendall(b"x")
        except OSError:
            return


def open_still(client: socket.socket) -> bool:
    """Whether the other side has not ended a connection on which it has nothing to say."""
    client.settimeout(0.001)
    try:
        return client.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def drained(client: socket.socket) -> bool:
    """Whether all 40 answers come, once they are read."""
    client.settimeout(5)
    received = 0
    try:
        while data := client.recv(1 << 20):
            received += len(data)
            if received >= 40 * 350_000:
                return True
    except OSError:
        pass
    return False
