"""URLs of slides: their parts, the slide names they give, how to show them without secrets, and which are allowed.

Lists of slides come from anywhere. Servers that only machines in a cloud can reach, where their secrets are kept, are
never contacted, not even by redirects; and buckets that the user has not named are accessed without the user's
credentials.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import shlex
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urljoin, urlsplit

if TYPE_CHECKING:
    from http.client import HTTPConnection

# At least two letters: C:\ is a disk.
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
WEB_SCHEMES = ("http", "https")


def is_url(text: str) -> bool:
    """Return True for a URL of any scheme, False for a path.

    >>> is_url("s3://bucket/a.svs"), is_url("//server/a.svs"), is_url("C:/a.svs")
    (True, False, False)
    """
    return SCHEME.match(text) is not None


def split_url(url: str) -> tuple[str, str, str]:
    """Return the scheme in lower case, the host or bucket with any user in front, and the path without a first slash.

    The path of a web address comes without its query and fragment; a key in a bucket is taken as it is.

    >>> split_url("HTTPS://me:secret@host/a/b%20c.svs?sign=1")
    ('https', 'me:secret@host', 'a/b%20c.svs')
    >>> split_url("s3://bucket/what?.svs")
    ('s3', 'bucket', 'what?.svs')
    """
    scheme, _, rest = url.partition("://")
    if scheme.lower() in WEB_SCHEMES:
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, _, path = rest.partition("/")
    return scheme.lower(), host, path


def redact_url(url: str) -> str:
    """Return the URL without user, password, query and fragment, which may be secrets.

    >>> redact_url("https://me:secret@host/a.svs?signature=1")
    'https://host/a.svs'
    """
    scheme, host, path = split_url(url)
    return f"{scheme}://{host.rpartition('@')[2]}/{path}"


def url_parts(url: str) -> tuple[str, ...]:
    """Return the host and the parts of the path in a form that can name folders.

    >>> url_parts("https://me@host:8000/x/b%20c.svs?sign=1")
    ('host:8000', 'x', 'b c.svs')
    >>> url_parts("https://host/..%2Fa.svs")
    ('host', '..%2Fa.svs')
    """
    scheme, host, path = split_url(url)
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return (host.rpartition("@")[2], *(_plain(part) if scheme in WEB_SCHEMES else part for part in parts))


def url_name(url: str) -> str:
    """Return the name of the slide: the last part of the URL's path."""
    return url_parts(url)[-1]


def _plain(part: str) -> str:
    """Undo percent-encoding, unless that would lead to another folder."""
    text = unquote(part)
    return part if "/" in text or "\0" in text or text in ("", ".", "..") else text


ALLOW_HOSTS = "WSI_GRADCAM_ALLOW_HOSTS"  # patterns of hosts and buckets, separated by commas; all others are refused
_OF_RUN: ContextVar[tuple[str, ...]] = ContextVar("patterns of a run, which a worker has from its settings", default=())
ANONYMOUS = "anonymous@"  # before a bucket: accessed without credentials
# Addresses, besides link-local ones, where clouds answer with the secrets of the requesting machine.
METADATA_ADDRESSES = frozenset(
    map(ipaddress.ip_address, ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254"))
)
MAPPED = ipaddress.ip_network("64:ff9b::/96")
NO_HOST = re.compile(r"[\x00-\x20\x7f\\]")  # some libraries drop these, or end the host there, and others do not


@contextmanager
def allowing(patterns: Sequence[str] | None) -> Iterator[None]:
    """Allow only hosts and buckets that match these patterns in this context, and in processes started in it."""
    before = os.environ.get(ALLOW_HOSTS)
    if patterns:
        os.environ[ALLOW_HOSTS] = ",".join(patterns)
    try:
        yield
    finally:
        if patterns:
            os.environ.pop(ALLOW_HOSTS)
            os.environ.update({} if before is None else {ALLOW_HOSTS: before})


@contextmanager
def allowing_for_run(patterns: tuple[str, ...]) -> Iterator[None]:
    """Do the same as `allowing` in this thread alone; workers elsewhere do not have the command's environment."""
    token = _OF_RUN.set(patterns)
    try:
        yield
    finally:
        _OF_RUN.reset(token)


def allowed_hosts() -> tuple[str, ...]:
    """Return the patterns that apply here; none if everything is allowed but the addresses private to clouds."""
    return _OF_RUN.get() or tuple(
        pattern.strip() for pattern in os.environ.get(ALLOW_HOSTS, "").split(",") if pattern.strip()
    )


def _matches(scheme: str, host: str) -> bool:
    """Return whether a pattern names the host or bucket, with or without its scheme."""
    names = (host.lower(), f"{scheme}://{host.lower()}")
    return any(fnmatchcase(name, pattern.lower().rstrip("/")) for pattern in allowed_hosts() for name in names)


def as_listed(url: str, named: Collection[str] = ()) -> str:
    """Return the URL of a slide that a list or a result names, without the use of the user's credentials.

    Credentials are used for buckets that the user has `named` and for those that `--allow-hosts` allows. Other URLs and
    paths are returned as they are.

    >>> as_listed("s3://bucket/a.svs"), as_listed("s3://bucket/a.svs", {"bucket"}), as_listed("https://host/a.svs")
    ('s3://anonymous@bucket/a.svs', 's3://bucket/a.svs', 'https://host/a.svs')
    """
    scheme, place, _ = split_url(url)
    if scheme != "s3" or "@" in place or place in named or _matches(scheme, place):
        return url
    return url.replace("://", f"://{ANONYMOUS}", 1)


def refusal(url: str) -> str:
    """Return why the server of a URL is not contacted, with the remedy; "" if it may be.

    >>> refusal("http://169.254.169.254/latest").split(";")[0], refusal("https://8.8.8.8/a.svs")
    ("the address 169.254.169.254 belongs to a cloud machine's own metadata service", '')
    """
    (scheme, place, _), host = split_url(url), host_of_url(url)
    if scheme in WEB_SCHEMES and NO_HOST.search(place):
        return f"{place.rpartition('@')[2][:100]!r} is not a host name; correct the URL"
    if _matches(scheme, host):
        return ""
    if patterns := allowed_hosts():
        return f"{host} is not one of the allowed hosts and buckets ({', '.join(patterns)}); add it to --allow-hosts"
    if scheme in WEB_SCHEMES and (found := next(filter(is_private_to_cloud, _addresses(host)), None)):
        return f"the address {found} belongs to a cloud machine's own metadata service; --allow-hosts {host} allows it"
    return ""


def is_private_to_cloud(address: str) -> bool:
    """Return whether an address is link-local or a cloud's metadata service, also in IPv6's form for IPv4.

    >>> is_private_to_cloud("169.254.169.254"), is_private_to_cloud("::ffff:169.254.0.1")
    (True, True)
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        mapped = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in MAPPED else found.ipv4_mapped
        found = mapped or found
    return found.is_link_local or found in METADATA_ADDRESSES


def host_of_url(url: str) -> str:
    """Return the host of a web address, without user, port and brackets, or the bucket.

    >>> host_of_url("https://me@[fe80::1]:80/a.svs"), host_of_url("s3://bucket/a.svs")
    ('fe80::1', 'bucket')
    """
    scheme, place, _ = split_url(url)
    host = place.rpartition("@")[2]
    if scheme not in WEB_SCHEMES:
        return host
    return host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]


def _addresses(host: str) -> list[str]:
    """Return all addresses of a host; none if it has none, which the code that contacts it will report."""
    try:
        found = socket.getaddrinfo(unquote(host), None, type=socket.SOCK_STREAM)
        return list(dict.fromkeys(str(each[4][0]) for each in found))
    except (OSError, UnicodeError):
        return []


# --- redirects -------------------------------------------------------------------------------------------------------

MAX_REDIRECTS = 10
REDIRECTS = (301, 302, 303, 307, 308)
FRESH_S = 60  # after this, a route is looked up again


class RouteError(ValueError):
    """A web address that is not contacted because of where it leads; the message says everything."""


@dataclass(frozen=True)
class Route:
    """The way to a web address, all of whose hosts may be contacted.

    Attributes:
        url: to request; without encryption, the host's name is replaced by its address, since names can lead elsewhere
            a moment later, and no certificate would show it.
        host: the Host header to send then; "" for the URL's own.
        hosts: the hosts to which redirects may lead from there; None if a proxy from the environment does the asking.
    """

    url: str
    host: str = ""
    hosts: tuple[str, ...] | None = None


def find_route(url: str, names: Sequence[str] = ("",), wait_s: float = 5.0) -> Route:
    """Return the route to a file at a web address, or to the files of a folder that has one of these `names`.

    A server that does not answer within `wait_s` counts as not redirecting.

    Raises:
        RouteError: its server, or one that it redirects to, must not be contacted.
    """
    return _found_route(url, tuple(names), wait_s, allowed_hosts(), int(time.monotonic() / FRESH_S))


@lru_cache(maxsize=256)
def _found_route(url: str, names: tuple[str, ...], wait_s: float, patterns: tuple[str, ...], now: int) -> Route:
    from urllib.request import getproxies, proxy_bypass  # takes time to import, like http.client and ssl

    if getproxies().get(split_url(url)[0]) and not proxy_bypass(host_of_url(url)):
        return Route(url)
    chain, name = [url], ""
    for name in names:
        chain, status = _follow(_joined(url, name), wait_s)
        if status is None or status < 400 or len(chain) > 1:
            break
    plain = [number for number, each in enumerate(chain) if split_url(each)[0] == "http"]
    start = min(plain[-1] + 1, len(chain) - 1) if plain else 0
    base = chain[start] if not name else _without(chain[start], name, url)
    if split_url(base)[0] != "http":
        return Route(base, hosts=tuple(dict.fromkeys(map(host_of_url, chain[start:]))))
    return _pinned(base, wait_s)


def _joined(url: str, name: str) -> str:
    place, mark, query = url.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{query}" if name else url


def _without(place: str, name: str, url: str) -> str:
    """Return the address of the folder that contains a file."""
    path, mark, query = place.partition("?")
    if not path.endswith(f"/{name}"):
        raise RouteError(f"{redact_url(url)}: redirects to {redact_url(place)}; give the final URL of the folder")
    return path.removesuffix(f"/{name}") + mark + query


def _pinned(url: str, wait_s: float) -> Route:
    """Return the route to the address that a host's name has now."""
    place = split_url(url)[1]
    user, at, named = place.rpartition("@")
    try:
        with closing(_connected(url, wait_s)) as connected:
            address = str(connected.getpeername()[0])
    except (OSError, ValueError):  # the reader will report it
        address = next(iter(_addresses(host_of_url(url))), "")
    if address in ("", host_of_url(url)):
        return Route(url, hosts=(host_of_url(url),))
    shown = f"[{address}]" if ":" in address else address
    port = re.search(r":\d+$", named)
    return Route(url.replace(place, f"{user}{at}{shown}{port[0] if port else ''}", 1), named, (address,))


def _follow(url: str, wait_s: float) -> tuple[list[str], int | None]:
    """Return an address and those that it redirects to, in order, and the last status; None if there is none.

    Raises:
        RouteError: one of them must not be contacted.
    """
    chain = [url]
    while True:
        if why := refusal(chain[-1]):
            raise RouteError(f"{redact_url(url)}: {_redirected(chain)}{why}")
        status, location = _asked(chain[-1], wait_s)
        if status not in REDIRECTS or not location:
            return chain, status
        following = urljoin(chain[-1], quote(location, safe="!#$%&'()*+,/:;=?@[]~"))
        user, at, place = split_url(chain[-1])[1].rpartition("@")
        if at and split_url(following)[1] == place:  # still there
            following = following.replace(place, f"{user}@{place}", 1)
        chain.append(following)
        if split_url(following)[0] not in WEB_SCHEMES or not host_of_url(following):
            raise RouteError(f"{redact_url(url)}: {_redirected(chain)}not a web address; give another URL")
        if (split_url(chain[-2])[0], split_url(following)[0]) == ("https", "http"):
            raise RouteError(
                f"{redact_url(url)}: {_redirected(chain)}not encrypted, unlike the URL that was given; "
                "give the final URL"
            )
        if len(chain) > MAX_REDIRECTS:
            raise RouteError(f"{redact_url(url)}: redirects too many times; give the final URL")


def _redirected(chain: Sequence[str]) -> str:
    return f"redirects to {redact_url(chain[-1])}: " if len(chain) > 1 else ""


def _asked(url: str, wait_s: float) -> tuple[int | None, str]:
    """Return the status of a web address and where it redirects to; (None, "") if it does not answer.

    Some servers do not answer HEAD, and URLs that are signed for GET refuse it.
    """
    from http.client import HTTPException

    parts = urlsplit(url)
    user, at, _ = parts.netloc.rpartition("@")
    headers = {"User-Agent": "wsi-gradcam", "Range": "bytes=0-0"}
    if at:
        headers["Authorization"] = f"Basic {base64.b64encode(unquote(user).encode()).decode()}"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    answer: tuple[int | None, str] = (None, "")
    for method in ("HEAD", "GET"):
        try:
            with closing(_connection(url, wait_s)) as connection:
                connection.request(method, target, headers=headers)
                found = connection.getresponse()
                answer = found.status, found.headers.get("Location", "")
        except (OSError, ValueError, HTTPException):  # the reader will report what is wrong
            return answer
        if found.status < 400 or found.status == 404:
            break
    return answer


def _connection(url: str, wait_s: float) -> HTTPConnection:
    """Return a connection to the host of a web address, at an IP address that may be contacted.

    Raises:
        OSError: there is none.
    """
    from http.client import HTTPConnection
    from ssl import create_default_context

    connected, connection = _connected(url, wait_s), HTTPConnection(urlsplit(url).netloc.rpartition("@")[2])
    if split_url(url)[0] == "https":
        with closing(connected) as plain:  # replaced by the encrypted one
            connected = create_default_context().wrap_socket(plain, server_hostname=host_of_url(url))
    connection.sock = connected
    return connection


def _connected(url: str, wait_s: float) -> socket.socket:
    """Return a socket connected to the first of a host's addresses that may be contacted and answers.

    Raises:
        OSError: there is none.
    """
    parts, host = urlsplit(url), host_of_url(url)
    failed = OSError(f"{host} has no address")
    for address in _addresses(host):
        if _matches(parts.scheme, host) or not is_private_to_cloud(address):
            try:
                return socket.create_connection(
                    (address, parts.port or (443 if parts.scheme == "https" else 80)), wait_s
                )
            except OSError as error:
                failed = error
    raise failed


@lru_cache(maxsize=1)
def closed_proxy() -> str:
    """Return the address of a proxy that refuses everything: a socket of this process that nobody can connect to."""
    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{door.getsockname()[1]}"
    door.detach()  # kept as long as the process lives, so that no other process takes the port
    return address


def command_line(argv: Sequence[str]) -> str:
    """Return the command as it was given, URLs without secrets; of programs other than ours the name alone.

    >>> command_line(["/usr/bin/wsi-gradcam", "explain", "https://me:pw@host/a b.svs?key=1", "--out=s3://x/y"])
    "wsi-gradcam explain 'https://host/a b.svs' --out=s3://x/y"
    >>> command_line(["study.py", "--token", "secret"])
    'python study.py'
    """
    program = Path(argv[0]) if argv and argv[0] else Path("-c")
    if program.stem != "wsi-gradcam" and program.parts[-2:] != ("cli", "main.py"):
        return f"python {program.name}"
    return shlex.join(["wsi-gradcam", *map(_without_secrets, argv[1:])])


def _without_secrets(argument: str) -> str:
    found = re.search(SCHEME, argument)
    return argument if found is None else argument[: found.start()] + redact_url(argument[found.start() :])
