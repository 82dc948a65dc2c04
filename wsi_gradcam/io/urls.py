"""URLs of slides: their parts, the names they give to slides, how they are shown without secrets, and which are asked.

Lists of slides come from anywhere. No server is asked that only machines in a cloud reach: there lie their secrets.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from urllib.parse import unquote

# Two letters at least: C:\ is a disk.
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
WEB_SCHEMES = ("http", "https")


def is_url(text: str) -> bool:
    """Return True for a URL of any scheme, False for a path.

    >>> is_url("s3://bucket/a.svs"), is_url("//server/a.svs"), is_url("C:/a.svs")
    (True, False, False)
    """
    return SCHEME.match(text) is not None


def split_url(url: str) -> tuple[str, str, str]:
    """Return the scheme in lower case, the host or bucket with any user in front, and the path without first slash.

    The path of a web address is without its query and fragment; a key in a bucket is taken as it is.

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
    """Return host and parts of the path, as they can name folders.

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


ALLOW_HOSTS = "WSI_GRADCAM_ALLOW_HOSTS"  # patterns of hosts and buckets, separated by commas; all others are not asked
# What clouds answer with the secrets of the machine that asks, besides the link-local addresses.
METADATA_ADDRESSES = frozenset(
    map(ipaddress.ip_address, ("100.100.100.200", "168.63.129.16", "192.0.0.192", "fd00:ec2::254"))
)
MAPPED = ipaddress.ip_network("64:ff9b::/96")


@contextmanager
def allowing(patterns: Sequence[str] | None) -> Iterator[None]:
    """Ask only hosts and buckets that match one of these patterns within, also in processes that are started there."""
    before = os.environ.get(ALLOW_HOSTS)
    if patterns:
        os.environ[ALLOW_HOSTS] = ",".join(patterns)
    try:
        yield
    finally:
        if patterns:
            os.environ.pop(ALLOW_HOSTS)
            os.environ.update({} if before is None else {ALLOW_HOSTS: before})


def refusal(url: str) -> str:
    """Return why the server of a URL is not asked, with the mend; "" where it is.

    >>> refusal("http://169.254.169.254/latest"), refusal("https://8.8.8.8/a.svs")
    ('the address 169.254.169.254 is for a cloud machine itself; --allow-hosts 169.254.169.254 allows it', '')
    """
    scheme, place, _ = split_url(url)
    host = _host(place) if scheme in WEB_SCHEMES else place
    patterns = [pattern.strip() for pattern in os.environ.get(ALLOW_HOSTS, "").split(",") if pattern.strip()]
    if any(fnmatchcase(host.lower(), pattern.lower()) for pattern in patterns):
        return ""
    if patterns:
        return (
            f"{host} is none of the hosts and buckets that are asked ({', '.join(patterns)}); --allow-hosts adds others"
        )
    if scheme in WEB_SCHEMES and (found := next(filter(is_private_to_cloud, _addresses(host)), None)):
        return f"the address {found} is for a cloud machine itself; --allow-hosts {host} allows it"
    return ""


def is_private_to_cloud(address: str) -> bool:
    """Return True for a link-local address or one of a cloud's metadata, also as IPv6 writes those of IPv4.

    >>> is_private_to_cloud("169.254.169.254"), is_private_to_cloud("::ffff:169.254.0.1")
    (True, True)
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        mapped = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in MAPPED else found.ipv4_mapped
        found = mapped or found
    return found.is_link_local or found in METADATA_ADDRESSES


def _host(place: str) -> str:
    """Return the host of user, host and port."""
    host = place.rpartition("@")[2]
    return host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]


def _addresses(host: str) -> list[str]:
    """Return all addresses of a host; none where it has none, which whoever asks it will say."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(unquote(host), None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []
