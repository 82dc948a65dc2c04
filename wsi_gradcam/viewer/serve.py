"""`wsi-gradcam view`: starts the server and says where the page is.

uvicorn's HTTP protocol with bounds: on connections, and on how long one may keep us waiting.

uvicorn alone waits for ever for a request that never ends, and for a client that never reads; its limit of
concurrency counts such connections, so a thousand of them would shut everyone else out.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.viewer.app import make_app
from wsi_gradcam.viewer.archive import Archive
from wsi_gradcam.viewer.security import Access, is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.applications import Starlette


MOST_CONNECTIONS = 512
WAIT_S = 15.0  # for a whole request, from the connection or the last answer on
STUCK_S = 30.0  # without a byte read by a client that is sent something
SWEEP_S = 1.0


class BoundedProtocol(H11Protocol):
    """A connection that is ended when it has kept us waiting too long, or when there are too many."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._waiting_since = self._moved_at = time.monotonic()
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; of too many, the one that has waited longest goes."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)
        if len(self.connections) > MOST_CONNECTIONS:
            others = [other for other in self.connections if isinstance(other, BoundedProtocol) and other.is_idle]
            longest = min(others, key=lambda other: other._waiting_since)
            self.connections.discard(longest)  # now: many more may be taken before it is told that it is lost
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for the next request from now on."""
        self._waiting_since = time.monotonic()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Whether no request of it is being worked on."""
        return self.cycle is None or self.cycle.response_complete

    def _sweep(self) -> None:
        now, unsent = time.monotonic(), self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent:
            self._moved_at = now
        self._unsent = unsent
        if (self.is_idle and now - self._waiting_since > WAIT_S and not unsent) or now - self._moved_at > STUCK_S:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(SWEEP_S, self._sweep)


BACKLOG = 256
KEEP_ALIVE_S = 30


def view(
    out: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    slides: Path | None = None,
    token: bool = False,
    allow_host: Sequence[str] = (),
    browse: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Show the results in `out` until interrupted; port 0 takes any that is free.

    Args:
        host: address to listen on; on others than this machine's own a token is asked for.
        slides: a folder to take slides from, by their ids, where they have moved.
        token: ask for a token on 127.0.0.1 too, on a machine with several users.
        allow_host: names by which a proxy calls the server.
        browse: open the page in a browser.
        say: is told where the page is.

    Raises:
        ResultError: there are no results.
        ConfigError: the port is taken, or the page is not installed.
    """
    if slides is not None and not slides.is_dir():
        raise ConfigError(f"--slides {slides}: expected a folder; check the path")
    secret = secrets.token_urlsafe(24) if token or not is_loopback(host) else ""
    app = make_app(Archive(out, slides), Access.for_host(host, secret, allow_host))
    with listening(host, port) as bound:
        place = f"http://{_shown(host)}:{bound.getsockname()[1]}/" + (f"?token={secret}" if secret else "")
        say(f"{place}  (end with Ctrl-C)")
        if browse:
            webbrowser.open(place)
        server_of(app).run(sockets=[bound])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"--host {host} --port {port}: {error}; check them") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # who is told the address may connect at once
    except OSError as error:
        bound.close()
        raise ConfigError(f"port {port} on {host}: {error.strerror}; choose another --port, or 0 for any") from error
    return bound


def server_of(app: Starlette) -> uvicorn.Server:
    """A server with our bounds, to be run with a bound socket."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
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
    )


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
