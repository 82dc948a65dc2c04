"""Who may ask the server: a check of each request before anything else sees it, and headers on each answer.

The server shows patients' slides. A web page of someone else, open in the same browser, must not reach it: by its
address (refused by origin and fetch metadata, and nothing is shared across origins), nor by a name that it lets point
to 127.0.0.1 (refused by the Host header). From other machines a token is needed.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
COOKIE = "wsi-gradcam"
# The hash is of the one style sheet that OpenSeadragon 6.1.1 adds to a page.
POLICY = (
    "default-src 'none'; script-src 'self'; "
    "style-src 'self' 'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
LONGEST_TARGET = 4096


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: names and addresses by which the server may be called, without ports.
        any_address: whether it may also be called by any IP address: it listens on all of them.
        token: what a client must know; "" for nothing.
    """

    hosts: frozenset[str]
    any_address: bool = False
    token: str = ""

    @classmethod
    def for_host(cls, host: str, token: str, more: Iterable[str] = ()) -> Access:
        """Of a server that listens on `host`; `more` are names by which a proxy calls it."""
        names = frozenset(name.lower() for name in more)
        if is_loopback(host):
            return cls(LOOPBACK | names | {host.lower()}, False, token)
        own = {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        return cls(LOOPBACK | names | own, host in ("0.0.0.0", "::", ""), token)

    def knows_host(self, header: str) -> bool:
        """Whether a Host header names this server."""
        name = host_of(header)
        return name in self.hosts or (self.any_address and _is_address(name))

    def allows(self, given: str) -> bool:
        """Whether a token is the right one."""
        return hmac.compare_digest(given.encode(), self.token.encode())


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches a server on `host`."""
    if host.lower() == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def host_of(header: str) -> str:
    """The host of a Host header, without its port.

    >>> host_of("127.0.0.1:8000"), host_of("[::1]:80"), host_of("Slides.example")
    ('127.0.0.1', '::1', 'slides.example')
    """
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()


class Guard:
    """ASGI middleware that lets through what `Access` allows."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refusal, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(scope)
        await (refusal or self._app)(scope, receive, with_headers)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if not self._access.knows_host(headers.get("host", "")):
            return _refused(421, "this server is not called by that name; start it with --allow-host NAME")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > LONGEST_TARGET:
            return _refused(414, "the address is too long")
        if scope["method"] not in ("GET", "HEAD"):
            return Response("only GET and HEAD are answered\n", 405, {"Allow": "GET, HEAD"}, "text/plain")
        if _is_foreign(headers, scope["path"]):
            return _refused(403, "asked for by the page of another site")
        return self._without_token(scope, headers) if self._access.token else None

    def _without_token(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        """Refuse who has no token; who brings it in the address is given a cookie and sent on without it."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(query).get("token")
        if given is not None and self._access.allows(given):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            answer = RedirectResponse("/" + (f"?{rest}" if rest else ""), 303, {"Cache-Control": "no-store"})
            answer.set_cookie(COOKIE, self._access.token, httponly=True, samesite="strict")
            return answer
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        known = _cookie(headers.get("cookie", ""))
        if self._access.allows(known) or (kind.lower() == "bearer" and self._access.allows(bearer.strip())):
            return None
        return _refused(401, "open the address with ?token=... that the command printed")


def _is_foreign(headers: Mapping[str, str], path: str) -> bool:
    """Whether a page of another site asks: for anything but the page itself, which a link may lead to."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        return True
    site = headers.get("sec-fetch-site", "none")
    to_the_page = path == "/" and headers.get("sec-fetch-mode") == "navigate"
    return site not in ("same-origin", "none") and not to_the_page


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel else ""


def _refused(status: int, why: str) -> Response:
    return PlainTextResponse(f"{why}\n", status, {"Cache-Control": "no-store"})


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
