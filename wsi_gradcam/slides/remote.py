"""Files and Zarr folders of slides at URLs (s3://, https://, http://), read by range requests."""

from __future__ import annotations

import asyncio
import hashlib
import io
import sys
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import ObjectStore as ZarrObjectStore

from wsi_gradcam.errors import SlideAccessError, SlideError, SlideFormatError, SlideNotFoundError, StoreError
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
from wsi_gradcam.io.urls import ANONYMOUS, WEB_SCHEMES, RouteError, redact_url, refusal, split_url
from wsi_gradcam.io.zarr_stores import SlideLimits, check_count
from wsi_gradcam.slides.base import ZARR_FILES

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from wsi_gradcam.io.object_stores import HTTPStore, ObjectStore
    from wsi_gradcam.slides.base import ByteRange

    Request = tuple[str, ByteRequest | None]

SCHEMES = (S3, *WEB_SCHEMES)
# Adjacent tiles are one request; writers of cloud-optimised TIFF leave 8 bytes between them, others pad by one.
GAP_BYTES = 8
# Headers are small and scattered: larger blocks would cost more bytes than they save requests.
BLOCK_BYTES = 1 << 11
MAX_BLOCKS = 1 << 14
# Compressed tiles, a tenth the size of their pixels: tiles dropped by the pixel cache need not be fetched again.
KEPT_BYTES = 64 << 20
LISTED_HINT = "--allow-hosts BUCKET permits using them for a bucket that is named only in a list or in results"
SMALL_BYTES = 4 << 20


class RemoteFile:
    """A `SlideFile` at a URL. No byte of its tiles is fetched again while it is cached."""

    def __init__(self, url: str) -> None:
        self.name = redact_url(url)
        self._store, self._path = file_store(url)
        self._ranges: Cache[ByteRange, bytes] = Cache(KEPT_BYTES, len)
        self._failed: SlideError | None = None
        try:
            self.size, self._identity, self._head = probe(self._store, self._path, BLOCK_BYTES)
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        self._blocks = self._first_block()

    def read_many(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """Return the bytes of each (offset, count), fewer where the file ends before.

        Raises:
            SlideAccessError: the file can no longer be reached, or has changed.
        """
        return self._ranges.get_many(ranges, self._fetched)

    def stream(self) -> BinaryIO:
        """Open the file from its beginning; all streams share the blocks they read until `forget_headers`."""
        return cast("BinaryIO", _Stream(self))

    def digest(self) -> str:
        """Return a digest of the file's size, version and beginning; no byte is fetched for it."""
        digest = hashlib.sha256(f"{self.size} {self._identity}".encode())
        digest.update(self._head)
        return digest.hexdigest()[:32]

    def forget_headers(self) -> None:
        """Drop the blocks that were read for parsing.

        Raises:
            SlideAccessError: one could not be read, even if the parser has swallowed that.
        """
        self._blocks = self._first_block()
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Do nothing: no connection is held open."""

    def peek(self, start: int, count: int) -> bytes:
        """Return `count` bytes from `start` on, through cached blocks; fewer if the file ends before."""
        stop = min(start + count, self.size)
        if start >= stop:
            return b""
        first, last = start // BLOCK_BYTES, ceil_div(stop, BLOCK_BYTES)
        data = b"".join(self._blocks.get_many(range(first, last), self._peeked))
        return data[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def _first_block(self) -> Cache[int, bytes]:
        blocks: Cache[int, bytes] = Cache(MAX_BLOCKS)
        blocks.put(0, self._head)
        return blocks

    def _peeked(self, numbers: list[int]) -> list[bytes]:
        try:
            return self._fetched([(number * BLOCK_BYTES, BLOCK_BYTES) for number in numbers])
        except SlideError as error:  # parsers may swallow it
            self._failed = error
            raise

    def _fetched(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        spans = [(min(offset, self.size), min(offset + count, self.size)) for offset, count in ranges]
        runs = merge_spans(spans)
        starts, ends = [start for start, _ in runs], [stop for _, stop in runs]
        try:
            found = self._store.get_ranges(self._path, starts=starts, ends=ends, coalesce=0) if runs else []
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        if [len(data) for data in found] != [stop - start for start, stop in runs]:
            raise SlideAccessError(
                f"{self.name}: now shorter than {self.size:,} bytes; do not change slides during a run"
            )
        views = [memoryview(data) for data in found]
        parts = []
        for start, stop in spans:
            run = max(0, bisect_right(starts, start) - 1)
            parts.append(bytes(views[run][start - starts[run] : stop - starts[run]]) if start < stop else b"")
        return parts


def merge_spans(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return half-open spans sorted, without empty ones, merged if they touch or nearly touch.

    Obstore would join them too, but panics if a server then sends less than was requested.

    >>> merge_spans([(30, 40), (0, 10), (18, 20), (50, 50)])
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
    """A stream of a remote file for a parser."""

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


class RemoteZarr(SlideLimits, ZarrObjectStore[Any]):
    """A Zarr store at a URL that caches its latest reads and distinguishes network errors from damage."""

    def __init__(self, url: str) -> None:
        super().__init__(folder_store(url), read_only=True)
        self.name = redact_url(url)
        self._url = url
        self._cache_of_reads: Cache[Request, bytes] = Cache(KEPT_BYTES, len)
        self._sizes: dict[str, int] = {}
        self._pending: dict[Request, asyncio.Task[bytes | None]] = {}

    def parent(self) -> RemoteZarr:
        """Return the folder that contains this one."""
        place, mark, query = self._url.partition("?")
        return RemoteZarr(place.rstrip("/").rpartition("/")[0] + mark + query)

    def small_file(self, name: str, most: int) -> bytes:
        """Return a file, or the first `most` bytes of a longer one; empty if there is none.

        Raises:
            SlideAccessError: the server does not answer.
        """
        try:
            return probe(self.store, name, most)[2]
        except FileNotFoundError:
            return b""
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None

    def identity(self, key: str) -> str:
        """Return the size and version of an object, or "missing".

        Raises:
            SlideAccessError: the server does not answer.
        """
        try:
            size, version, _ = probe(self.store, key)
        except FileNotFoundError:
            return "missing"
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        return f"{size} {version}"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object, or a range of it; None if it does not exist.

        All calls come from zarr's own thread, so nothing needs a lock.

        Raises:
            SlideAccessError: the server does not answer.
        """
        request = key, byte_range
        data = self._cache_of_reads.peek(request)
        if data is None:
            if request not in self._pending:
                task = self._pending[request] = asyncio.ensure_future(self._fetched(key, byte_range))
                task.add_done_callback(lambda _: self._pending.pop(request))
            data = await asyncio.shield(self._pending[request])
            if data is None:
                return None
            self._cache_of_reads.put(request, data)
        self.count(key, len(data))
        return prototype.buffer.from_bytes(data)

    async def _fetched(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        try:
            if isinstance(
                byte_range, SuffixByteRequest
            ):  # many web servers support only ranges from one byte to another
                if key not in self._sizes:
                    self._sizes[key], *_ = await asyncio.to_thread(probe, self.store, key)
                size = self._sizes[key]
                byte_range = RangeByteRequest(max(0, size - byte_range.suffix), size)
            if byte_range is None:
                result = await self.store.get_async(key)
                check_count(f"{self.name}/{key}", result.meta["size"], None, self.most(key), self.mend)
                return bytes(await result.bytes_async())
            check_count(f"{self.name}/{key}", sys.maxsize, byte_range, self.most(key), self.mend)
            found = await super().get(key, default_buffer_prototype(), byte_range)
        except FileNotFoundError:
            return None
        except StoreError:
            raise
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        return None if found is None else found.to_bytes()


def probe(store: ObjectStore, path: str, count: int = 1) -> tuple[int, str, bytes]:
    """Return the size of an object, a text that identifies its version, and its first bytes.

    This uses a GET with a range: URLs that are signed for GET refuse HEAD.
    """
    result = store.get(path, options={"range": (0, count)})
    meta = result.meta
    identity = meta["e_tag"] or f"{meta['last_modified'].isoformat()} {meta['version']}"
    return meta["size"], identity, bytes(result.bytes())


def is_remote_zarr(url: str) -> bool:
    """Return True for the URL of a Zarr group.

    Raises:
        SlideAccessError: the server does not answer.
    """
    store = folder_store(url)
    for name in ZARR_FILES:
        try:
            probe(store, name)
        except FileNotFoundError:
            continue
        except Exception as error:
            raise access_error(redact_url(url), error) from None
        return True
    return False


def read_in_folder(url: str, name: str) -> bytes | None:
    """Return a small file in a folder, or the first bytes of a larger one; None if there is no such file.

    Raises:
        SlideAccessError: the server does not answer.
    """
    try:
        return probe(folder_store(url), name, SMALL_BYTES)[2]
    except FileNotFoundError:
        return None
    except Exception as error:
        raise access_error(redact_url(url), error) from None


def remote_texts(url: str) -> dict[int, str]:
    """Return the `first_texts` of a TIFF at a URL; none if it cannot be read."""
    from wsi_gradcam.slides.tiff_metadata import first_texts  # not imported above: a reader of files

    try:
        file = RemoteFile(url)
        with file.stream() as stream:
            return first_texts(stream, file.size)
    except SlideError:  # it will fail later as a slide, with this cause
        return {}


def list_folder(url: str) -> tuple[list[str], list[str]]:
    """Return the URLs of the folders, ending in a slash, and of the files directly in `url`, an s3:// folder.

    Raises:
        SlideAccessError: it cannot be listed.
    """
    if split_url(url)[0] != S3:
        raise SlideAccessError(
            f"{redact_url(url)}: web servers cannot be searched; name the slides one by one, or in a list (.csv)"
        )
    try:
        found = folder_store(url).list_with_delimiter()
    except Exception as error:
        raise access_error(redact_url(url), error) from None
    base = url.rstrip("/")
    folders = [f"{base}/{name.rstrip('/')}/" for name in found["common_prefixes"]]
    return folders, [f"{base}/{item['path']}" for item in found["objects"]]


def folder_store(url: str) -> ObjectStore:
    """Return the store whose paths start at `url`."""
    if split_url(url)[0] != S3:
        scheme, _, rest = url.partition("://")
        place, mark, query = rest.partition("?")
        return _web_store(f"{scheme}://{place.rstrip('/')}{mark}{query}", ZARR_FILES)
    bucket, key, signed = _place_in_store(url)
    return s3_store(bucket, key.rstrip("/") or None, signed=signed)


def file_store(url: str) -> tuple[ObjectStore, str]:
    """Return the store of a file, and the file's path there.

    Raises:
        SlideAccessError: a URL that cannot be read, with the reason.
    """
    if split_url(url)[0] != S3:
        return _web_store(url), ""  # all of it in the address, so that a query stays in its place
    bucket, key, signed = _place_in_store(url)
    return s3_store(bucket, signed=signed), key


def _place_in_store(url: str) -> tuple[str, str, bool]:
    """Return the bucket and key of an s3:// URL, and whether requests are signed with the user's credentials."""
    found = bucket_and_key(url.replace(f"://{ANONYMOUS}", "://", 1))
    if found is None:
        raise SlideAccessError(f"{redact_url(url)}: {EXPECTED_S3_URL}")
    if why := refusal(url):
        raise SlideAccessError(f"{redact_url(url)}: {why}")
    return *found, f"://{ANONYMOUS}" not in url


def _web_store(url: str, names: Sequence[str] = ("",)) -> HTTPStore:
    scheme, host, _ = split_url(url)
    if scheme not in SCHEMES or not host.rpartition("@")[2]:
        raise SlideAccessError(f"{redact_url(url)}: expected a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
    try:
        return web_store(url, names)
    except RouteError as error:
        raise SlideAccessError(str(error)) from None
    except ValueError as error:
        raise access_error(redact_url(url), error) from None


def access_error(name: str, error: Exception) -> SlideError:
    """Return the slide's error for an obstore error, without the secrets that a URL or a request may contain."""
    if isinstance(error, SlideError):
        return error
    failure = classify(error)
    if failure is Failure.NO_BUCKET:
        return SlideNotFoundError(f"{name}: no such bucket; check the URL and the endpoint in AWS_ENDPOINT_URL")
    if failure is Failure.MISSING:
        return SlideNotFoundError(
            f"{name}: does not exist, expected a slide; check the URL, and end that of a folder with /"
        )
    if failure is Failure.IGNORES_RANGE:
        return SlideAccessError(
            f"{name}: the server ignores Range requests, so each tile would take the whole file; copy it to a local "
            "disk"
        )
    if failure in (Failure.ACCESS_DENIED, Failure.NO_CREDENTIALS):
        web = "check the user and password in the URL, or create a new signed URL"
        in_s3 = split_url(name)[0] == S3
        what = "access was refused" if failure is Failure.ACCESS_DENIED else "there are no credentials"
        return SlideAccessError(f"{name}: {what}; {f'{CREDENTIALS_HINT}; {LISTED_HINT}' if in_s3 else web}")
    if failure is Failure.BEYOND_END:
        return SlideFormatError(f"{name}: empty, expected a slide; copy it again from its source")
    if failure is Failure.REDIRECTED:
        return SlideAccessError(
            f"{name}: it is in another region or at another address ({short_message(error)}); set AWS_REGION, or give "
            "the final URL"
        )
    return SlideAccessError(
        f"{name}: cannot be read from its server ({short_message(error)}); check the server and the network, and run "
        "the same command again: nothing finished is lost"
    )
