"""URLs of slides: their parts, the names they give to slides, and how they are shown without secrets."""

from __future__ import annotations

import re
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
