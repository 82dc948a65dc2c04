"""Slides behind URLs, read by ranges: s3://, https:// and http://."""

from __future__ import annotations

import hashlib
import io
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO, cast

from wsi_gradcam.errors import SlideAccessError, SlideError, SlideFormatError, SlideNotFoundError
from wsi_gradcam.geometry import ceil_div
from wsi_gradcam.io.cache import Cache
from wsi_gradcam.io.object_stores import (
    CREDENTIALS_HINT,
    EXPECTED_S3_URL,
    S3,
    Failure,
    bucket_and_key,
    classify,
    s3_store,
    short_message,
    web_store,
)
from wsi_gradcam.io.urls import WEB_SCHEMES, redact_url, split_url
from wsi_gradcam.slides.base import ZARR_FILES

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from wsi_gradcam.io.object_stores import HTTPStore, ObjectStore
    from wsi_gradcam.slides.base import ByteRange

SCHEMES = (S3, *WEB_SCHEMES)
# Tiles that touch are one request; writers of cloud-optimised TIFF leave 8 bytes between them, others pad by one.
GAP_BYTES = 8
# Headers are small and scattered: larger blocks would cost more bytes than they save requests.
BLOCK_BYTES = 1 << 11
MOST_BLOCKS = 1 << 14
# Compressed tiles, which are a tenth of what the cache of pixels holds: what it drops need not be fetched again.
KEPT_BYTES = 64 << 20


class RemoteFile:
    """A `SlideFile` behind a URL. Of its tiles, no byte is fetched twice as long as it is kept."""

    def __init__(self, url: str) -> None:
        self.name = redact_url(url)
        self._store, self._path = store_of(url)
        self._ranges: Cache[ByteRange, bytes] = Cache(KEPT_BYTES, len)
        self._trouble: SlideError | None = None
        try:
            self.size, self._identity, self._head = look(self._store, self._path, BLOCK_BYTES)
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        self._blocks = self._first_block()

    def read_many(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each (offset, count); fewer where the file ends before.

        Raises:
            SlideAccessError: it cannot be reached any more, or has changed.
        """
        return self._ranges.get_many(ranges, self._fetched)

    def stream(self) -> BinaryIO:
        """The file from its beginning; blocks that were read are shared by all streams until `end_of_headers`."""
        return cast("BinaryIO", _Stream(self))

    def digest(self) -> str:
        """Of the size, what the server says of the version, and the beginning; no byte is fetched for it."""
        digest = hashlib.sha256(f"{self.size} {self._identity}".encode())
        digest.update(self._head)
        return digest.hexdigest()[:32]

    def end_of_headers(self) -> None:
        """Forget what was read for parsing.

        Raises:
            SlideAccessError: some of it could not be read, whatever the parser made of that.
        """
        self._blocks = self._first_block()
        if self._trouble is not None:
            raise self._trouble

    def close(self) -> None:
        """Nothing is held open."""

    def peek(self, start: int, count: int) -> bytes:
        """Some bytes by way of blocks, fewer where the file ends before."""
        stop = min(start + count, self.size)
        if start >= stop:
            return b""
        first, last = start // BLOCK_BYTES, ceil_div(stop, BLOCK_BYTES)
        data = b"".join(self._blocks.get_many(range(first, last), self._peeked))
        return data[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def _first_block(self) -> Cache[int, bytes]:
        blocks: Cache[int, bytes] = Cache(MOST_BLOCKS)
        blocks.put(0, self._head)
        return blocks

    def _peeked(self, numbers: list[int]) -> list[bytes]:
        try:
            return self._fetched([(number * BLOCK_BYTES, BLOCK_BYTES) for number in numbers])
        except SlideError as error:  # parsers may swallow it
            self._trouble = error
            raise

    def _fetched(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        spans = [(min(offset, self.size), min(offset + count, self.size)) for offset, count in ranges]
        runs = joined(spans)
        starts, ends = [start for start, _ in runs], [stop for _, stop in runs]
        try:
            found = self._store.get_ranges(self._path, starts=starts, ends=ends, coalesce=0) if runs else []
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        if [len(data) for data in found] != [stop - start for start, stop in runs]:
            raise SlideAccessError(f"{self.name}: shorter than {self.size:,} bytes now; let it not change in a run")
        views = [memoryview(data) for data in found]
        parts = []
        for start, stop in spans:
            run = max(0, bisect_right(starts, start) - 1)
            parts.append(bytes(views[run][start - starts[run] : stop - starts[run]]) if start < stop else b"")
        return parts


def joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Half-open spans joined where they touch or nearly do, sorted; empty ones are left out.

    Obstore would join them too, but panics where a server then sends less than was asked for.

    >>> joined([(30, 40), (0, 10), (18, 20), (50, 50)])
    [(0, 20), (30, 40)]
    """
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if runs and start - runs[-1][1] <= GAP_BYTES:
            runs[-1] = runs[-1][0], max(runs[-1][1], stop)
        else:
            runs.append((start, stop))
    return runs


class _Stream(io.RawIOBase):
    """What a parser reads of a remote file."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._place = 0
        self.name = file.name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence])
        return self._place

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._file.peek(self._place, len(view))
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


def look(store: ObjectStore, path: str, count: int = 1) -> tuple[int, str, bytes]:
    """Size of an object, what tells its version from others, and its first bytes.

    By a ranged GET: addresses that are signed for GET refuse HEAD.
    """
    result = store.get(path, options={"range": (0, count)})
    meta = result.meta
    identity = meta["e_tag"] or f"{meta['last_modified'].isoformat()} {meta['version']}"
    return meta["size"], identity, bytes(result.bytes())


def is_zarr_at(url: str) -> bool:
    """Whether one of the files that make a folder a Zarr group lies below a URL.

    Raises:
        SlideAccessError: that cannot be found out.
    """
    store = folder_of(url)
    for name in ZARR_FILES:
        try:
            look(store, name)
        except FileNotFoundError:
            continue
        except Exception as error:
            raise access_error(redact_url(url), error) from None
        return True
    return False


def listed(url: str) -> tuple[list[str], list[str]]:
    """URLs of the folders, with a slash at their end, and of the files right below `url`, an s3:// folder.

    Raises:
        SlideAccessError: it cannot be listed.
    """
    if split_url(url)[0] != S3:
        raise SlideAccessError(
            f"{redact_url(url)}: web servers cannot be asked what lies below; name the slides one by one, or in a list "
            "(.csv)"
        )
    bucket, _ = _bucket_and_key(url)
    try:
        found = folder_of(url).list_with_delimiter()
    except Exception as error:
        raise access_error(redact_url(url), error) from None
    base = url.rstrip("/") if split_url(url)[2] else f"{S3}://{bucket}"
    folders = [f"{base}/{name.rstrip('/')}/" for name in found["common_prefixes"]]
    return folders, [f"{base}/{item['path']}" for item in found["objects"]]


def folder_of(url: str) -> ObjectStore:
    """The store whose paths start at `url`."""
    if split_url(url)[0] != S3:
        scheme, _, rest = url.partition("://")
        place, mark, query = rest.partition("?")
        return _web_store(f"{scheme}://{place.rstrip('/')}{mark}{query}")
    bucket, key = _bucket_and_key(url)
    return s3_store(bucket, key.rstrip("/") or None)


def store_of(url: str) -> tuple[ObjectStore, str]:
    """The store of a file, and its path there.

    Raises:
        SlideAccessError: a URL that cannot be read, with the reason.
    """
    if split_url(url)[0] != S3:
        return _web_store(url), ""  # all in the address, so that a query stays in its place
    bucket, key = _bucket_and_key(url)
    return s3_store(bucket), key


def _bucket_and_key(url: str) -> tuple[str, str]:
    found = bucket_and_key(url)
    if found is None:
        raise SlideAccessError(f"{redact_url(url)}: {EXPECTED_S3_URL}")
    return found


def _web_store(url: str) -> HTTPStore:
    scheme, host, _ = split_url(url)
    if scheme not in SCHEMES or not host.rpartition("@")[2]:
        raise SlideAccessError(f"{redact_url(url)}: expected a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
    try:
        return web_store(url)
    except ValueError as error:
        raise access_error(redact_url(url), error) from None


def access_error(name: str, error: Exception) -> SlideError:
    """What an error of obstore means for the slide, without the secrets that a URL or a request may hold."""
    if isinstance(error, SlideError):
        return error
    failure = classify(error)
    if failure is Failure.NO_BUCKET:
        return SlideNotFoundError(f"{name}: no such bucket; check the URL and the endpoint in AWS_ENDPOINT_URL")
    if failure is Failure.MISSING:
        return SlideNotFoundError(f"{name}: does not exist, expected a slide; check the URL, and end a folder's by /")
    if failure is Failure.IGNORES_RANGE:
        return SlideAccessError(
            f"{name}: the server ignores Range, so that the whole file would be sent for each tile; copy it to a disk"
        )
    if failure in (Failure.ACCESS_DENIED, Failure.NO_CREDENTIALS):
        web = "check user and password in the URL, or make a new signed one"
        what = "access was refused" if failure is Failure.ACCESS_DENIED else "there are no credentials"
        return SlideAccessError(f"{name}: {what}; {CREDENTIALS_HINT if split_url(name)[0] == S3 else web}")
    if failure is Failure.BEYOND_END:
        return SlideFormatError(f"{name}: empty, expected a slide; copy it again from its source")
    if failure is Failure.REDIRECTED:
        return SlideAccessError(
            f"{name}: it lies elsewhere ({short_message(error)}); set AWS_REGION, or give the final URL"
        )
    return SlideAccessError(
        f"{name}: cannot be read from its server ({short_message(error)}); check both and the network, and run the "
        "same command again: what is done is kept"
    )
