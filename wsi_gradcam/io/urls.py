"""URLs of slides: what is one, what its slide is called, and how it is shown without secrets."""

from __future__ import annotations

import re
from urllib.parse import unquote

# Two letters at least: C:\ is a disk.
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
WEB = ("http", "https")


def is_url(text: str) -> bool:
    """Whether a text names something by URL, of any scheme, rather than by path.

    >>> is_url("s3://bucket/a.svs"), is_url("//server/a.svs"), is_url("C:/a.svs")
    (True, False, False)
    """
    return SCHEME.match(text) is not None


def split_url(url: str) -> tuple[str, str, str]:
    """Scheme in small letters, host or bucket with what stands before it, and path without the first slash.

    The path of a web address is without its query and fragment; a key in a bucket is taken as it is.

    >>> split_url("HTTPS://me:secret@host/a/b%20c.svs?sign=1")
    ('https', 'me:secret@host', 'a/b%20c.svs')
    >>> split_url("s3://bucket/what?.svs")
    ('s3', 'bucket', 'what?.svs')
    """
    scheme, _, rest = url.partition("://")
    if scheme.lower() in WEB:
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, _, path = rest.partition("/")
    return scheme.lower(), host, path


def shown_url(url: str) -> str:
    """The URL without user, password, query and fragment, which may be secrets.

    >>> shown_url("https://me:secret@host/a.svs?signature=1")
    'https://host/a.svs'
    """
    scheme, host, path = split_url(url)
    return f"{scheme}://{host.rpartition('@')[2]}/{path}"


def parts_of(url: str) -> tuple[str, ...]:
    """Host and parts of the path, as they can name folders.

    >>> parts_of("https://me@host:8000/x/b%20c.svs?sign=1")
    ('host:8000', 'x', 'b c.svs')
    >>> parts_of("https://host/..%2Fa.svs")
    ('host', '..%2Fa.svs')
    """
    scheme, host, path = split_url(url)
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return (host.rpartition("@")[2], *(_plain(part) if scheme in WEB else part for part in parts))


def name_of(url: str) -> str:
    """What a slide is called: the last part of the URL's path."""
    return parts_of(url)[-1]


def _plain(part: str) -> str:
    """Percent signs undone, unless that would lead to another folder."""
    text = unquote(part)
    return part if "/" in text or "\0" in text or text in ("", ".", "..") else text
