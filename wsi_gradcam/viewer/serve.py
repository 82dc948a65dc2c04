"""The viewer's server: limits on its connections, and a check of each request before a handler sees it.

The server shows patients' slides. A web page from another site, open in the same browser, must not reach it: neither
directly (refused by origin and fetch metadata, and nothing is shared across origins), nor by a name that resolves to
127.0.0.1 (refused by the Host header). From other machines a token is needed.

On its own, uvicorn waits forever for a request that never ends, and for a client that never reads; its concurrency
limit counts such connections, so a thousand of them would lock everyone else out.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import ipaddress
import re
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

import uvicorn
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from wsi_gradcam.errors import ConfigError, one_line

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

BACKLOG = 256
KEEP_ALIVE_S = 30
MAX_CONNECTIONS = 512
REQUEST_TIMEOUT_S = 15.0  # for a whole request, counted from the connection or the last response
STALL_TIMEOUT_S = 30.0  # for a client that does not read its response
CHECK_EVERY_S = 1.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
COOKIE = "wsi-gradcam"
# The hash is of the one style sheet that OpenSeadragon 6.1.1 adds to a page.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; "
    "style-src 'self' 'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# A report is a file that someone made: it may look as it likes, but it runs no scripts, connects to nothing, opens
# nothing and navigates nowhere on its own. It keeps its origin, without which browsers would not fetch its pictures.
REPORT_POLICY = (
    "sandbox allow-same-origin; "
    "default-src 'none'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; font-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": PAGE_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
# A name or an IPv4 address, or an IPv6 address in brackets, and a port. Browsers send nothing else as a Host header.
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9_.-]{1,253}))(?::[0-9]{1,5})?", re.ASCII)
MAX_TARGET_BYTES = 4096
WRITING = ("/api/marks", "/api/names")  # the only paths that accept data from a page


@dataclass(frozen=True)
class Access:
    """The clients that a server responds to.

    Attributes:
        hosts: names and addresses under which the server may be reached, without ports.
        any_address: whether it may also be reached under any IP address, since it listens on all of them.
        token: the token that clients must present; "" for none.
        codes: tokens that admit one browser each.
    """

    hosts: frozenset[str]
    any_address: bool = False
    token: str = field(default="", repr=False)
    codes: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def for_host(cls, host: str, token: str, more: Iterable[str] = ()) -> Access:
        """Return the access to a server that listens on `host`; `more` are names under which a proxy reaches it."""
        names = frozenset(name.lower() for name in more)
        if is_loopback(host):
            return cls(LOOPBACK | names | {host.lower()}, token=token)
        own = {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        return cls(LOOPBACK | names | own, host in ("0.0.0.0", "::", ""), token)

    def cookie(self, scheme: str = "http") -> str:
        """Return the name of the cookie, which differs from those of other servers.

        Over TLS, no page without encryption can set a cookie of that name. (`__Host-` would also exclude other hosts,
        but such a cookie has the path "/", and is therefore sent to all ports.)
        """
        name = f"{COOKIE}-{hashlib.sha256(self.token.encode()).hexdigest()[:16]}"
        return f"__Secure-{name}" if scheme == "https" else name

    @property
    def folder(self) -> str:
        """The path of the page if there is a token, "/.../"; no other server knows it.

        Browsers send the cookies of a host to all its ports, but only below their path: a server on another port that a
        link or a refresh leads to gets none.
        """
        return f"/{hashlib.sha256(b'folder' + self.token.encode()).hexdigest()[:32]}/" if self.token else "/"

    def knows_host(self, header: str) -> bool:
        """Return whether a Host header names this server."""
        name = host_of(header)
        return name in self.hosts or (self.any_address and _is_address(name))

    def allows(self, token: str) -> bool:
        """Return whether a token is the right one, in constant time."""
        return hmac.compare_digest(token.encode(), self.token.encode())

    def admits(self, token: str) -> bool:
        """Return whether a token in an address is the right one, or a code, which this uses up."""
        code = next((code for code in self.codes if hmac.compare_digest(token.encode(), code.encode())), None)
        self.codes.discard(code or "")
        return code is not None or self.allows(token)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server on `host`."""
    if host.lower() == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def host_of(header: str) -> str:
    """Return the host of a Host header, without its port; "" if it is invalid (RFC 9112, section 3.2).

    >>> host_of("127.0.0.1:8000"), host_of("[::1]:80"), host_of("Slides.example")
    ('127.0.0.1', '::1', 'slides.example')
    >>> host_of("[::1].evil"), host_of("me@localhost"), host_of("[::1")
    ('', '', '')
    """
    found = HOST.fullmatch(header)
    if found is None or (found[1] and not (":" in found[1] and _is_address(found[1]))):
        return ""
    return (found[1] or found[2]).lower()


class AccessMiddleware:
    """ASGI middleware that passes on requests allowed by `Access`, and adds headers to each response."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        below = self._below_folder(scope)
        refusal = self._refusal(below or scope, below is not None)
        await (refusal or self._app)(below or scope, receive, send_with_headers)

    def _below_folder(self, scope: Scope) -> Scope | None:
        """Return the request without the page's own folder at the start of its path; None if that is missing."""
        folder = self._access.folder
        if not hmac.compare_digest(scope["path"][: len(folder)].encode(), folder.encode()):
            return None
        raw = scope.get("raw_path") or b""
        return {**scope, "path": scope["path"][len(folder) - 1 :], "raw_path": raw[len(folder) - 1 :]}

    def _refusal(self, scope: Scope, in_folder: bool) -> Response | None:
        headers = Headers(scope=scope)
        if len(headers.getlist("host")) != 1 or not self._access.knows_host(headers["host"]):
            return _refuse(421, "this server is not called by that name; start it with --allow-host NAME")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_TARGET_BYTES:
            return _refuse(414, "the address is too long")
        if scope["method"] not in ("GET", "HEAD") and (refusal := _refuse_writing(scope, headers)):
            return refusal
        if _is_cross_site(headers, scope["path"]):
            return _refuse(403, "requested by a page of another site")
        return self._check_token(scope, headers, in_folder) if self._access.token else None

    def _check_token(self, scope: Scope, headers: Mapping[str, str], in_folder: bool) -> Response | None:
        """Refuse clients without the token; a token in the address is turned into a cookie, and leaves the address."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if given is not None and self._access.admits(given):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            folder = self._access.folder
            admitted = _admitted(folder + (f"?{rest}" if rest else ""), headers)
            kept: dict[str, Any] = {"path": folder, "httponly": True, "samesite": "strict"}
            name, secure = self._access.cookie(scope["scheme"]), scope["scheme"] == "https"
            admitted.set_cookie(name, self._access.token, secure=secure, **kept)
            return admitted
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        cookie = _cookie(headers.get("cookie", ""), self._access.cookie(scope["scheme"]))
        if (in_folder and self._access.allows(cookie)) or (
            scheme.lower() == "bearer" and self._access.allows(bearer.strip())
        ):
            return None
        return _refuse(401, "open the address with ?token=... that the command printed")


def _admitted(address: str, headers: Mapping[str, str]) -> Response:
    """Return the response that takes a browser to the page.

    A strict cookie is not sent with a request started by a page elsewhere, nor after its redirects: such a browser,
    like one that comes from the file of `--open`, gets a page of ours that starts a new request.
    """
    kept = {"Cache-Control": "no-store"}
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return RedirectResponse(address, 303, kept)
    return HTMLResponse(redirecting_page(address), headers=kept)


def redirecting_page(address: str) -> str:
    """Return a page that redirects to an address at once."""
    return f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(address)}">'


def _is_cross_site(headers: Mapping[str, str], path: str) -> bool:
    """Return whether the request comes from a page of another site; a link to our page itself is allowed."""
    origin = headers.get("origin")
    host = headers.get("host", "").lower()
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        return True
    site = headers.get("sec-fetch-site", "none")
    to_the_page = path == "/" and headers.get("sec-fetch-mode") == "navigate"
    return site not in ("same-origin", "none") and not to_the_page


def _refuse_writing(scope: Scope, headers: Mapping[str, str]) -> Response | None:
    """Refuse requests that would change anything, except those of our own page that store marks and names, as JSON.

    Browsers state for each POST which page it comes from; a page of another site can neither claim to be ours nor send
    JSON without asking first, which nothing here allows.
    """
    if scope["method"] != "POST" or scope["path"] not in WRITING:
        return Response("only GET and HEAD are answered\n", 405, {"Allow": "GET, HEAD"}, "text/plain")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return _refuse(415, "marks and names are sent as application/json")
    if "origin" not in headers:  # compared by another check
        return _refuse(403, "marks and names are kept for the viewer's own page, which sends its Origin")
    return None


def _cookie(header: str, name: str) -> str:
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _refuse(status: int, reason: str) -> Response:
    return PlainTextResponse(f"{reason}\n", status, {"Cache-Control": "no-store"})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


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
            self.connections.discard(longest)  # immediately: many more may be accepted before its loss is reported
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
    """Return a server with our limits, to be run with a bound socket; `tls` are files of a certificate and its key.

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
    except OSError as error:  # from ssl, too
        raise ConfigError(
            f"--tls {certificate} {key}: {one_line(error)}; expected certificate and key in PEM"
        ) from error
    return uvicorn.Server(config)


def url_host(host: str) -> str:
    """Return a host as written in addresses of pages: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host
