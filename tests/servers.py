"""Servers on loopback for tests of remote slides, which count what they send: of files with Range, and S3."""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

Server = TypeVar("Server", bound=ThreadingHTTPServer)
BUCKET = "slides"
RANGE = re.compile(r"bytes=(\d+)-(\d+)$")
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


@dataclass(frozen=True)
class Sent:
    """One answer: what was asked for, the status, where its body begins in the file, and its length."""

    target: str
    status: int
    start: int
    count: int


@dataclass
class Traffic:
    """What a server has sent, and what it shall do wrong.

    Attributes:
        fails: of the number of a request, counted from 0, and its target, the status to answer with, or None. 0
            breaks the connection.
        user: what a client must say with basic authentication.
    """

    sent: list[Sent] = field(default_factory=list)
    fails: Callable[[int, str], int | None] = lambda number, target: None
    ignores_range: bool = False
    user: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def total(self) -> int:
        """Bytes of all bodies."""
        return sum(sent.count for sent in self.sent)

    def twice(self) -> int:
        """Bytes that were sent more than once."""
        seen: dict[str, set[int]] = {}
        for sent in self.sent:
            if sent.status < 400:
                path = urlsplit(sent.target).path
                seen.setdefault(path, set()).update(range(sent.start, sent.start + sent.count))
        return sum(s.count for s in self.sent if s.status < 400) - sum(map(len, seen.values()))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        traffic = self.server.traffic
        with traffic.lock:
            number = len(traffic.sent)
            status = traffic.fails(number, self.path)
            if status is None and traffic.user:
                token = base64.b64encode(traffic.user.encode()).decode()
                status = None if self.headers.get("Authorization") == f"Basic {token}" else 401
            traffic.sent.append(Sent(self.path, status or 0, 0, 0))
        if status == 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        start, body = 0, b""
        headers: dict[str, str] = {}
        if status is None:
            status, start, body, headers = self.server.answer(self)
        traffic.sent[number] = Sent(self.path, status, start, len(body))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        """Say that nothing lies elsewhere; it is not counted."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Callable[[_Handler], tuple[int, int, bytes, dict[str, str]]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.traffic = Traffic()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave."""


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Let a server answer in a thread, and end it."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def web_server(folder: Path) -> Iterator[_Server]:
    """A server of the files in a folder."""

    def answer(handler: _Handler) -> tuple[int, int, bytes, dict[str, str]]:
        path = folder / unquote(urlsplit(handler.path).path).lstrip("/")
        if not path.is_file():
            return 404, 0, b"nothing", {}
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        match = RANGE.match(handler.headers.get("Range") or "")
        if match is None or handler.server.traffic.ignores_range:
            return 200, 0, data, headers
        start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
        if start >= stop:
            return 416, 0, b"Range", {"Content-Range": f"bytes */{len(data)}"}
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return 206, start, data[start:stop], headers

    with serving(_Server(answer)) as server:
        yield server


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an S3 server in a process of its own, with one empty bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    try:
        _until_it_answers(url)
        put(f"{url}/{BUCKET}", b"")
        yield url
    finally:
        process.terminate()
        process.wait(20)


def _until_it_answers(url: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)


def put(url: str, body: bytes) -> None:
    """Send an object to an S3 server that checks no signatures."""
    signed = "AWS4-HMAC-SHA256 Credential=testing/20250101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    headers = {"Content-Type": "application/octet-stream", "Authorization": signed}  # a form would be parsed
    with urllib.request.urlopen(urllib.request.Request(url, body, headers, method="PUT"), timeout=20) as answer:
        assert answer.status == 200


def put_folder(url: str, folder: Path, key: str) -> None:
    """Send a file, or all files of a folder, below a key."""
    files = [folder] if folder.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        inner = "" if path == folder else f"/{path.relative_to(folder).as_posix()}"
        put(f"{url}/{BUCKET}/{quote(key + inner)}", path.read_bytes())


@contextmanager
def counting(upstream: str) -> Iterator[_Server]:
    """A server that passes all requests on to another, and counts."""
    place = urlsplit(upstream)

    def answer(handler: _Handler) -> tuple[int, int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=20)
        try:
            connection.request("GET", handler.path, headers=dict(handler.headers))
            got = connection.getresponse()
            body = got.read()
            headers = {k: v for k, v in got.headers.items() if k.lower() in ("etag", "content-range", "last-modified")}
        finally:
            connection.close()
        span = re.match(r"bytes (\d+)-", headers.get("content-range", headers.get("Content-Range", "")))
        return got.status, int(span[1]) if span else 0, body, headers

    with serving(_Server(answer)) as server:
        yield server
