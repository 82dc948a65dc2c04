"""Access to the server: a check of each request before any handler sees it, security headers, and paths below OUT.

The server shows patients' slides. A web page of another site, open in the same browser, must not reach it: neither
directly (refused by origin and fetch metadata, and nothing is shared across origins), nor by a name that it lets point
to 127.0.0.1 (refused by the Host header). From other machines a token is needed. Files outside OUT are never served,
not even through links.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from wsi_gradcam.errors import NotShownError, OutsideError
from wsi_gradcam.io.local import LocalPath

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from wsi_gradcam.io.paths import StoragePath

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
COOKIE = "wsi-gradcam"
# The hash is of the one style sheet that OpenSeadragon 6.1.1 adds to a page.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; "
    "style-src 'self' 'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
# A report is a file that someone made: it may look as it likes, but runs no scripts, connects to nothing, opens nothing
# and leads nowhere by itself. It keeps its origin, without which browsers would not fetch its pictures.
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
# A name or an IPv4 address, or an IPv6 address in brackets; and a port. Nothing else is a Host header of a browser.
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9_.-]{1,253}))(?::[0-9]{1,5})?", re.ASCII)
MAX_TARGET_BYTES = 4096
# A part of a path below OUT that a request may name. Nothing that is hidden, relative or odd is ever served.
PATH_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", re.ASCII)
MAX_PATH_PARTS = 12


@dataclass(frozen=True)
class Access:
    """The clients that a server answers.

    Attributes:
        hosts: names and addresses by which the server may be called, without ports.
        any_address: whether it may also be called by any IP address, since it listens on all of them.
        token: the token that clients must present; "" for none.
        codes: tokens that admit one browser each.
    """

    hosts: frozenset[str]
    any_address: bool = False
    token: str = field(default="", repr=False)
    codes: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def for_host(cls, host: str, token: str, more: Iterable[str] = ()) -> Access:
        """Return the access to a server that listens on `host`; `more` are names by which a proxy calls it."""
        names = frozenset(name.lower() for name in more)
        if is_loopback(host):
            return cls(LOOPBACK | names | {host.lower()}, token=token)
        own = {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
        return cls(LOOPBACK | names | own, host in ("0.0.0.0", "::", ""), token)

    def cookie(self, scheme: str = "http") -> str:
        """Return the name of the cookie, other than those of other servers.

        Over TLS no page without encryption can set one of that name. (`__Host-` would say the same of other hosts, but
        such a cookie lies below "/", and so goes to all ports.)
        """
        name = f"{COOKIE}-{hashlib.sha256(self.token.encode()).hexdigest()[:16]}"
        return f"__Secure-{name}" if scheme == "https" else name

    @property
    def folder(self) -> str:
        """The path below which the page lies where there is a token, "/.../"; no other server knows it.

        Browsers send the cookies of a host to all its ports, but only below their path: a server on another port, to
        which a link or a refresh leads, gets none.
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
        """Return whether a token in an address is the right one, or a code, which is used up by that."""
        code = next((code for code in self.codes if hmac.compare_digest(token.encode(), code.encode())), None)
        self.codes.discard(code or "")
        return code is not None or self.allows(token)


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server on `host`."""
    if host.lower() == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def host_of(header: str) -> str:
    """Return the host of a Host header, without its port; "" for what is none (RFC 9112, section 3.2).

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
    """ASGI middleware that passes on the requests that `Access` allows, and adds headers to each response."""

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
        """Return the request as one without the page's own folder before its path; None where that is not there."""
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
        if scope["method"] not in ("GET", "HEAD"):
            return Response("only GET and HEAD are answered\n", 405, {"Allow": "GET, HEAD"}, "text/plain")
        if _is_cross_site(headers, scope["path"]):
            return _refuse(403, "requested by the page of another site")
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
    """Return the answer that leads a browser on to the page.

    A strict cookie is not sent with a request that a page elsewhere began, nor after its redirects: such a browser,
    as one that comes from the file of `--open`, gets a page of ours that begins a new request.
    """
    kept = {"Cache-Control": "no-store"}
    if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        return RedirectResponse(address, 303, kept)
    return HTMLResponse(redirecting_page(address), headers=kept)


def redirecting_page(address: str) -> str:
    """Return a page that leads to an address at once."""
    return f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(address)}">'


def _is_cross_site(headers: Mapping[str, str], path: str) -> bool:
    """Return whether a page of another site makes the request; a link to our page itself is allowed."""
    origin = headers.get("origin")
    host = headers.get("host", "").lower()
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        return True
    site = headers.get("sec-fetch-site", "none")
    to_the_page = path == "/" and headers.get("sec-fetch-mode") == "navigate"
    return site not in ("same-origin", "none") and not to_the_page


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


def path_below(folder: StoragePath, name: str) -> StoragePath:
    """Return the path below a folder that a request names.

    Raises:
        NotShownError: the path has parts that none of our files has.
    """
    parts = name.split("/")
    if len(parts) > MAX_PATH_PARTS or not all(PATH_PART.fullmatch(part) for part in parts):
        raise NotShownError("no such file")
    return folder / name


def check_inside(out: StoragePath, path: StoragePath) -> None:
    """Check that a file or folder is below OUT after all links are followed; object stores have no links.

    Raises:
        OutsideError: it is not below OUT.
    """
    if isinstance(out, LocalPath) and isinstance(path, LocalPath):
        _check_link(out.path.resolve(), path.path)


def check_tree(out: StoragePath, folder: StoragePath) -> None:
    """Check everything below a folder, for readers that open files in it by themselves.

    Raises:
        OutsideError: a link leads out of OUT.
    """
    if not (isinstance(out, LocalPath) and isinstance(folder, LocalPath)):
        return
    root = out.path.resolve()
    _check_link(root, folder.path)
    waiting = [folder.path]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            if entry.is_symlink():
                _check_link(root, Path(entry.path))
            elif entry.is_dir():
                waiting.append(Path(entry.path))


def _check_link(root: Path, path: Path) -> None:
    if not path.resolve().is_relative_to(root):
        raise OutsideError(f"{path.name}: a link that leads out of the results; copy the file there instead")
