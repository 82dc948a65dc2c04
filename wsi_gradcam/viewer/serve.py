"""`wsi-gradcam view`: starts the server and says where the page is."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from wsi_gradcam.errors import ConfigError
from wsi_gradcam.viewer.app import make_app
from wsi_gradcam.viewer.archive import Archive
from wsi_gradcam.viewer.connections import BoundedProtocol
from wsi_gradcam.viewer.security import Access, is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.applications import Starlette

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
