"""`wsi-gradcam view`: starts the server, with bounds on its connections, and announces the page's address.

uvicorn alone waits without end for a request that never ends, and for a client that never reads; its limit of
concurrency counts such connections, so a thousand of them would lock everyone else out.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
import webbrowser
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from wsi_gradcam.errors import ConfigError, one_line
from wsi_gradcam.system.confinement import Limits, can_confine, isolating, limits_here
from wsi_gradcam.viewer.app import make_app
from wsi_gradcam.viewer.archive import Archive
from wsi_gradcam.viewer.security import Access, is_loopback, redirecting_page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from starlette.applications import Starlette

BACKLOG = 256
KEEP_ALIVE_S = 30
MAX_CONNECTIONS = 512
REQUEST_TIMEOUT_S = 15.0  # for a whole request, from the connection or the last response on
STALL_TIMEOUT_S = 30.0  # for a client that reads nothing of its response
CHECK_EVERY_S = 1.0
NOT_ENCRYPTED = (
    "warning: not encrypted: who can listen on this network can read slides, results and the token, and use it; "
    "--tls CERT KEY encrypts"
)
NOT_ISOLATED = "warning: slides are read by this process itself: only Linux has processes that can do little"


class BoundedProtocol(H11Protocol):
    """A connection that is closed when its client is too slow, or when there are too many connections."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._waiting_since = self._moved_at = time.monotonic()
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Accept a connection; if there are too many, close the one that has been idle longest."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(CHECK_EVERY_S, self._check)
        if len(self.connections) > MAX_CONNECTIONS:
            others = [other for other in self.connections if isinstance(other, BoundedProtocol) and other.is_idle]
            longest = min(others, key=lambda other: other._waiting_since)
            self.connections.discard(longest)  # at once: many more may be accepted before it is reported lost
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop checking the connection."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the timeout of the next request."""
        self._waiting_since = time.monotonic()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Return whether none of its requests is being handled."""
        return self.cycle is None or self.cycle.response_complete

    def _check(self) -> None:
        now, unsent = time.monotonic(), self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent:
            self._moved_at = now
        self._unsent = unsent
        is_late = self.is_idle and not unsent and now - self._waiting_since > REQUEST_TIMEOUT_S
        if is_late or now - self._moved_at > STALL_TIMEOUT_S:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(CHECK_EVERY_S, self._check)


def view(
    out: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    slides: Path | None = None,
    token: bool = False,
    allow_host: Sequence[str] = (),
    remote_slides: bool = False,
    isolate: bool | None = None,
    tls: tuple[str, str] | None = None,
    browse: bool = False,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve the results in `out` until interrupted; port 0 takes any that is free.

    Args:
        host: address to listen on; except on the loopback addresses, clients need a token.
        slides: a folder to take slides from, by their ids, where they have moved.
        token: require a token on 127.0.0.1 too, for machines with several users.
        allow_host: names by which proxies call the server.
        remote_slides: ask other machines for slides that the results name by URLs.
        isolate: read slides by processes of their own, which can do little; None: unless this system has none, which
            is announced, or slides are read so already.
        tls: files of a certificate and its key, in PEM: the page's address is then https://.
        browse: open the page in a browser; a token is not in its command line.
        announce: receives a line with the page's address.

    Raises:
        ResultError: there are no results.
        ConfigError: the port is in use, or the page is not installed.
    """
    if slides is not None and not slides.is_dir():
        raise ConfigError(f"--slides {slides}: expected a folder; check the path")
    secret = secrets.token_urlsafe(24) if token or not is_loopback(host) else ""
    access = Access.for_host(host, secret, allow_host)
    limits = Limits() if isolate or (isolate is None and can_confine() and limits_here() is None) else None
    with ExitStack() as opened:
        opened.enter_context(isolating(limits))
        app = make_app(Archive(out, slides, remote_slides), access)
        bound = opened.enter_context(listen(host, port))
        address = f"http{'s' if tls else ''}://{_url_host(host)}:{bound.getsockname()[1]}/"
        server = make_server(app, tls)
        announce(f"{address}{f'?token={secret}' if secret else ''}  (end with Ctrl-C)")
        if not tls and not is_loopback(host):
            announce(NOT_ENCRYPTED)
        if isolate is None and not can_confine():
            announce(NOT_ISOLATED)
        if browse:
            webbrowser.open(opened.enter_context(_private_address(address, access)) if secret else address)
        server.run(sockets=[bound])


@contextmanager
def _private_address(address: str, access: Access) -> Iterator[str]:
    """Return an address for a browser's command line, which all users of the machine can read, as a context.

    It is that of a file which nobody else can read. The file leads to the page with a code that admits one browser:
    the token itself gets into no history. (A code in the command line could be used by another user first.)
    """
    code = secrets.token_urlsafe(24)
    access.codes.add(code)
    with TemporaryDirectory(prefix="wsi-gradcam-") as folder:  # mode 0700
        file = Path(folder) / "open.html"
        file.touch(0o600)
        file.write_text(redirecting_page(f"{address}?token={code}"), encoding="utf-8")
        yield file.as_uri()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}; check them") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # so that clients may connect as soon as the address is announced
    except OSError as error:
        bound.close()
        raise ConfigError(f"port {port} on {host}: {error.strerror}; choose another --port, or 0 for any") from error
    return bound


def make_server(app: Starlette, tls: tuple[str, str] | None = None) -> uvicorn.Server:
    """Return a server with our bounds, to be run with a bound socket; `tls` are files of a certificate and its key.

    Raises:
        ConfigError: these cannot be used.
    """
    certificate, key = tls or (None, None)
    try:
        config = uvicorn.Config(
            app,
            ssl_certfile=certificate,
            ssl_keyfile=key,
            http=BoundedProtocol,
            ws="none",
            loop="asyncio",
            log_level="error",
            access_log=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=2,
            server_header=False,
            proxy_headers=False,
        )
        config.load()
    except OSError as error:  # of ssl, too
        raise ConfigError(
            f"--tls {certificate} {key}: {one_line(error)}; expected certificate and key in PEM"
        ) from error
    return uvicorn.Server(config)


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
