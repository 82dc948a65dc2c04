"""A server between a client and an S3 server, which notes what passes, and lets some of it go wrong."""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.servers import serving

# Before the request is passed on: answer 500 or 503, or hang up. After: hang up, so that the answer is lost.
FAILURES = ("500", "503", "reset", "lost")
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}
BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>busy</Message></Error>'


@dataclass
class Passed:
    """What went through: (method, target) of each request, and how many of them failed.

    Attributes:
        fails: of a request's method and target, one of FAILURES or "".
    """

    requests: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0
    fails: Callable[[str, str], str] = lambda method, target: ""
    lock: threading.Lock = field(default_factory=threading.Lock)


def at_random(share: float, seed: int) -> Callable[[str, str], str]:
    """Fails that share of all requests, each time in another way."""
    chance = random.Random(seed)
    return lambda method, target: chance.choice(FAILURES) if chance.random() < share else ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        passed = self.server.passed
        with passed.lock:
            passed.requests.append((self.command, self.path))
            failure = passed.fails(self.command, self.path)
            passed.failed += bool(failure)
        if failure == "reset":
            self._hang_up()
        elif failure.isdigit():
            self._answer(int(failure), {"Content-Type": "application/xml"}, BUSY)
        else:
            got = self.server.ask(self.command, self.path, dict(self.headers), body)
            if failure:
                self._hang_up()
            else:
                self._answer(*got)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", headers.get("x-length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Be quiet."""


class Proxy(ThreadingHTTPServer):
    """Passes requests on; `passed` notes them."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.passed = Passed()
        self._upstream = urlsplit(upstream)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def ask(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        place = self._upstream
        connection = http.client.HTTPConnection(place.hostname or "", place.port or 80, timeout=60)
        try:
            connection.request(method, target, body=body, headers=headers)
            got = connection.getresponse()
            found = {name: value for name, value in got.headers.items() if name.lower() not in HOP_BY_HOP}
            if method == "HEAD":
                found["x-length"] = got.headers.get("Content-Length", "0")
            return got.status, found, got.read()
        finally:
            connection.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave."""


@contextmanager
def passing(upstream: str) -> Iterator[Proxy]:
    """A server on loopback that passes all requests on to `upstream`."""
    with serving(Proxy(upstream)) as server:
        yield server
