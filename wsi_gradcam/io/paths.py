"""The paths of results that users name: folders on a disk, or in an object store.

`S3Path` is a path in an object store, s3://BUCKET/KEY. A folder is a common prefix of keys, up to a slash.
"""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from wsi_gradcam.errors import ConfigError, StoreError
from wsi_gradcam.io import object_stores
from wsi_gradcam.io.base import MAX_READ_BYTES, StoragePath
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.io.object_stores import (
    EXPECTED_S3_URL,
    S3,
    Bucket,
    Failure,
    bucket_and_key,
    classify,
    retry,
    retry_delays,
    store_error,
)
from wsi_gradcam.io.urls import is_url, redact_url, split_url

if TYPE_CHECKING:
    from wsi_gradcam.io.object_stores import ObjectStore
    from wsi_gradcam.io.zarr_stores import RemoteStore

__all__ = ["S3Path", "StoragePath", "StoragePathLike", "storage_path"]

StoragePathLike = str | os.PathLike[str] | StoragePath
T = TypeVar("T")

MAX_REQUESTS = 16  # of one call, at the same time
# Streamed data is held in memory up to this size, and in a temporary file beyond it.
STREAM_BYTES = 16 << 20
# An attribute that names the request that wrote an object, so that one whose answer was lost is recognised.
WRITER = "writer"
# Keys cannot contain control characters or bytes of file names that are not UTF-8.
_INVALID_IN_KEYS = re.compile("[\x00-\x1f\x7f\udc80-\udcff]")


def storage_path(out: StoragePathLike) -> StoragePath:
    """Return the path that a user names: a path on a disk, or s3://BUCKET/KEY.

    Raises:
        ConfigError: a URL of any other kind.

    >>> str(storage_path("s3://bucket/a/") / "run.yaml")
    's3://bucket/a/run.yaml'
    """
    if isinstance(out, StoragePath):
        return out
    text = os.fspath(out)
    if is_url(text) and split_url(text)[0] == S3:
        return S3Path.from_url(text)
    if is_url(text):
        raise ConfigError(f"{redact_url(text)}: expected a folder, or s3://BUCKET/KEY")
    if re.match(f"{S3}:/", text):  # what pathlib makes of s3://
        raise ConfigError(f"{text}: expected a folder, or s3://BUCKET/KEY; give a URL as text, not as a path")
    return LocalPath(Path(text))


@dataclass(frozen=True)
class S3Path(StoragePath):
    """An object, or the objects whose keys begin with `key` and a slash."""

    bucket: Bucket = field(repr=False)
    key: str

    @classmethod
    def from_url(cls, url: str) -> S3Path:
        """Return the path of an s3:// URL.

        Raises:
            ConfigError: it names no bucket, or has . or .. in it.
        """
        found = bucket_and_key(url)
        if found is None:
            raise ConfigError(f"{redact_url(url)}: {EXPECTED_S3_URL}")
        bucket, key = found
        if {".", ".."} & set(key.split("/")):
            raise ConfigError(f"{url}: contains . or .., which mean nothing to object stores; remove them")
        return cls(Bucket(bucket), _key(key))

    @property
    def name(self) -> str:
        return posixpath.basename(self.key)

    @property
    def parent(self) -> S3Path:
        return S3Path(self.bucket, posixpath.dirname(self.key))

    def __str__(self) -> str:
        return f"{S3}://{self.bucket.name}/{self.key}"

    def __truediv__(self, name: str) -> S3Path:
        return S3Path(self.bucket, _key(f"{self.key}/{name}"))

    def absolute(self) -> S3Path:
        return self

    def read(self, most: int = MAX_READ_BYTES) -> bytes:
        def read(store: ObjectStore) -> bytes:
            result = store.get(self.key)
            self.check_size(result.meta["size"], most)
            return bytes(result.bytes())

        return self._retry(read)

    def read_range(self, start: int, count: int) -> bytes:
        def read(store: ObjectStore) -> bytes:
            if count <= 0:  # servers do not support empty ranges
                store.head(self.key)
                return b""
            try:
                return bytes(store.get(self.key, options={"range": (start, start + count)}).bytes())
            except Exception as error:
                if classify(error) is not Failure.BEYOND_END:
                    raise
                return b""

        return self._retry(read)

    def read_versioned(self) -> tuple[bytes, str]:
        def read(store: ObjectStore) -> tuple[bytes, str]:
            result = store.get(self.key)
            version = result.meta["e_tag"]
            if version is None:
                raise StoreError(f"{self}: the store returns no ETags, which a run needs; choose another --out")
            return bytes(result.bytes()), version

        return self._retry(read)

    def size(self) -> int:
        return self._retry(lambda store: store.head(self.key)["size"])

    def modified(self) -> float:
        return self._retry(lambda store: store.head(self.key)["last_modified"]).timestamp()

    def exists(self) -> bool:
        try:
            self.size()
        except FileNotFoundError:
            return self._retry(lambda store: bool(next(iter(store.list(self._prefix, chunk_size=1)), [])))
        return True

    def file_names(self) -> list[str]:
        objects = self._retry(lambda store: store.list_with_delimiter(self._prefix)["objects"])
        return sorted(posixpath.basename(item["path"]) for item in objects)

    def folder_names(self) -> list[str]:
        prefixes = self._retry(lambda store: store.list_with_delimiter(self._prefix)["common_prefixes"])
        return sorted(posixpath.basename(prefix.rstrip("/")) for prefix in prefixes)

    def all_files(self) -> list[str]:
        return [key.removeprefix(self._prefix) for key in self.keys()]

    def write(self, data: bytes) -> None:
        self._retry(lambda store: store.put(self.key, data, use_multipart=False), "written")

    def create(self, data: bytes) -> bool:
        return self._put_if("create", data)

    def replace(self, data: bytes, version: str) -> bool:
        return self._put_if({"e_tag": version}, data)

    @contextmanager
    def atomic_writer(self) -> Iterator[BinaryIO]:
        # Sent when it is complete: anything sent earlier could neither be repeated nor undone.
        with tempfile.SpooledTemporaryFile(STREAM_BYTES) as file:
            yield cast("BinaryIO", file)
            self._send(cast("BinaryIO", file))

    def _send(self, file: BinaryIO) -> None:
        def send(store: ObjectStore) -> None:
            file.seek(0)
            store.put(self.key, file)

        self._retry(send, "written")

    def remove(self) -> None:
        self._retry(lambda store: store.delete(self.key), "written")

    def keys(self) -> list[str]:
        """Return the keys of all objects below, sorted."""
        objects = self._retry(lambda store: store.list(self._prefix).collect())
        return sorted(item["path"] for item in objects)

    def remove_tree(self) -> None:
        def remove(store: ObjectStore) -> None:
            if paths := self.keys():
                store.delete(paths)

        self._retry(remove, "written")

    def remove_files(self, made: re.Pattern[str]) -> None:
        def remove(store: ObjectStore) -> None:
            if paths := [key for key in self.keys() if made.fullmatch(key.removeprefix(self._prefix))]:
                store.delete(paths)

        self._retry(remove, "written")

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            return list(pool.map(lambda name: (self / name).read(), names))

    def write_many(self, files: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            list(pool.map(lambda item: (self / item[0]).write(item[1]), files.items()))

    def remove_partial_files(self, recursive: bool = True) -> None:
        """Do nothing: an object store shows no half-written objects."""

    def zarr_store(self, read_only: bool = False) -> RemoteStore:
        from wsi_gradcam.io.zarr_stores import RemoteStore

        return RemoteStore(self, self.bucket, self.key, read_only)

    def wrap_write_errors(self) -> AbstractContextManager[None]:
        return nullcontext()  # `RemoteStore` itself raises them

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _retry(self, call: Callable[[ObjectStore], T], action: str = "read") -> T:
        """Return the result of an idempotent call, repeated while its failures are transient."""
        try:
            return retry(lambda: call(self.bucket.store), object_stores.OUT_PATIENCE_S)
        except StoreError:
            raise
        except Exception as error:  # obstore raises many kinds
            raise store_error(self, error, action) from None

    def _put_if(self, mode: Any, data: bytes) -> bool:
        """Put on a condition; return True if it was met, even if the answer to the successful request was lost."""
        token = uuid.uuid4().hex
        delays = retry_delays(object_stores.OUT_PATIENCE_S)
        while True:
            try:
                self.bucket.store.put(self.key, data, mode=mode, attributes={WRITER: token})
            except Exception as error:
                failure = classify(error)
                if failure not in (Failure.EXISTS, Failure.CHANGED, Failure.MISSING, Failure.TRANSIENT):
                    raise store_error(self, error, "written") from None
                writer = self._writer()
                if writer == token:
                    return True
                # A store may also report that the object exists after two requests have raced and both have failed.
                settled = writer is not None or mode != "create"
                if settled and failure is not Failure.TRANSIENT:
                    return False
                delay = next(delays, None)
                if delay is None:
                    raise store_error(self, error, "written") from None
                time.sleep(delay)
            else:
                return True

    def _writer(self) -> str | None:
        """Return the token of the request that wrote the object, "" if it has none; None if there is no object."""
        try:
            attributes = self._retry(lambda store: store.get(self.key, options={"head": True}).attributes)
        except FileNotFoundError:
            return None
        return attributes.get(WRITER, "")


def _key(path: str) -> str:
    """Return a key without empty parts and with invalid characters percent-encoded."""
    joined = "/".join(part for part in path.split("/") if part)
    return _INVALID_IN_KEYS.sub(lambda match: f"%{ord(match[0]) & 0xFF:02X}", joined)
