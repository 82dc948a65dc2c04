"""Files and folders of OUT in an object store, s3://BUCKET/KEY. A folder is what keys before a slash have in common."""

from __future__ import annotations

import posixpath
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from wsi_gradcam.errors import ConfigError, StoreError
from wsi_gradcam.io import object_stores
from wsi_gradcam.io.base import StoragePath
from wsi_gradcam.io.object_stores import (
    S3,
    S3_FORM,
    Bucket,
    Trouble,
    bucket_and_key,
    error_of,
    patiently,
    pauses,
    trouble_of,
)
from wsi_gradcam.io.urls import shown_url

if TYPE_CHECKING:
    from wsi_gradcam.io.object_stores import ObjectStore
    from wsi_gradcam.io.zarr_remote import RemoteStore

T = TypeVar("T")

AT_ONCE = 16  # requests of one call
# What is streamed lies in memory up to this size, and in a temporary file beyond it.
STREAM_BYTES = 16 << 20
# An object says who wrote it: a request whose answer was lost can so be told from another's.
WRITER = "writer"
# What no key can hold: control characters, and bytes of file names that are not UTF-8.
_NOT_FOR_KEYS = re.compile("[\x00-\x1f\x7f\udc80-\udcff]")


@dataclass(frozen=True)
class S3Path(StoragePath):
    """An object, or the objects whose keys begin with `key` and a slash."""

    bucket: Bucket = field(repr=False)
    key: str

    @classmethod
    def from_url(cls, url: str) -> S3Path:
        """The place at an s3:// URL.

        Raises:
            ConfigError: it names no bucket, or leads upwards.
        """
        found = bucket_and_key(url)
        if found is None:
            raise ConfigError(f"{shown_url(url)}: {S3_FORM}")
        bucket, key = found
        if {".", ".."} & set(key.split("/")):
            raise ConfigError(f"{url}: has . or .. in it, which mean nothing to object stores; leave them out")
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

    def read(self) -> bytes:
        return self._asked(lambda store: bytes(store.get(self.key).bytes()))

    def read_range(self, start: int, count: int) -> bytes:
        def ranged(store: ObjectStore) -> bytes:
            if count <= 0:  # no range that servers know
                store.head(self.key)
                return b""
            try:
                return bytes(store.get(self.key, options={"range": (start, start + count)}).bytes())
            except Exception as error:
                if trouble_of(error) is not Trouble.BEYOND_END:
                    raise
                return b""

        return self._asked(ranged)

    def read_versioned(self) -> tuple[bytes, str]:
        def versioned(store: ObjectStore) -> tuple[bytes, str]:
            result = store.get(self.key)
            version = result.meta["e_tag"]
            if version is None:
                raise StoreError(f"{self}: the store tells no ETag, which runs need; choose another --out")
            return bytes(result.bytes()), version

        return self._asked(versioned)

    def size(self) -> int:
        return self._asked(lambda store: store.head(self.key)["size"])

    def exists(self) -> bool:
        try:
            self.size()
        except FileNotFoundError:
            return self._asked(lambda store: bool(next(iter(store.list(self._prefix, chunk_size=1)), [])))
        return True

    def file_names(self) -> list[str]:
        objects = self._asked(lambda store: store.list_with_delimiter(self._prefix)["objects"])
        return sorted(posixpath.basename(item["path"]) for item in objects)

    def folder_names(self) -> list[str]:
        prefixes = self._asked(lambda store: store.list_with_delimiter(self._prefix)["common_prefixes"])
        return sorted(posixpath.basename(prefix.rstrip("/")) for prefix in prefixes)

    def write(self, data: bytes) -> None:
        self._asked(lambda store: store.put(self.key, data, use_multipart=False), "written")

    def create(self, data: bytes) -> bool:
        return self._put_if("create", data)

    def replace(self, data: bytes, version: str) -> bool:
        return self._put_if({"e_tag": version}, data)

    @contextmanager
    def atomic_writer(self) -> Iterator[BinaryIO]:
        # Sent when it is whole: what was sent before could neither be sent again nor be taken back.
        with tempfile.SpooledTemporaryFile(STREAM_BYTES) as file:
            yield cast("BinaryIO", file)
            self._send(cast("BinaryIO", file))

    def _send(self, file: BinaryIO) -> None:
        def send(store: ObjectStore) -> None:
            file.seek(0)
            store.put(self.key, file)

        self._asked(send, "written")

    def remove(self) -> None:
        self._asked(lambda store: store.delete(self.key), "written")

    def keys(self) -> list[str]:
        """Keys of all objects below, sorted."""
        objects = self._asked(lambda store: store.list(self._prefix).collect())
        return sorted(item["path"] for item in objects)

    def remove_tree(self) -> None:
        def remove(store: ObjectStore) -> None:
            if paths := self.keys():
                store.delete(paths)

        self._asked(remove, "written")

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda name: (self / name).read(), names))

    def write_many(self, files: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda item: (self / item[0]).write(item[1]), files.items()))

    def remove_partial_files(self, recursive: bool = True) -> None:
        """Nothing half-written can be seen there."""

    def zarr_store(self, read_only: bool = False) -> RemoteStore:
        from wsi_gradcam.io.zarr_remote import RemoteStore

        return RemoteStore(self, self.bucket, self.key, read_only)

    def wrap_write_errors(self) -> AbstractContextManager[None]:
        return nullcontext()  # `RemoteStore` says it itself

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _asked(self, call: Callable[[ObjectStore], T], done: str = "read") -> T:
        """What the store answers, tried again while its trouble may pass."""
        try:
            return patiently(lambda: call(self.bucket.store), object_stores.OUT_PATIENCE_S)
        except StoreError:
            raise
        except Exception as error:  # obstore raises many kinds
            raise error_of(self, error, done) from None

    def _put_if(self, mode: Any, data: bytes) -> bool:
        """Put on a condition; whether it was met. Its own put that succeeded unheard is taken for what it is."""
        token = uuid.uuid4().hex
        waits = pauses(object_stores.OUT_PATIENCE_S)
        while True:
            try:
                self.bucket.store.put(self.key, data, mode=mode, attributes={WRITER: token})
            except Exception as error:
                trouble = trouble_of(error)
                if trouble not in (Trouble.EXISTS, Trouble.CHANGED, Trouble.MISSING, Trouble.UNREACHABLE):
                    raise error_of(self, error, "written") from None
                writer = self._writer()
                if writer == token:
                    return True
                # A store may also say that something exists where two have tried at once and none got it.
                settled = writer is not None or mode != "create"
                if settled and trouble is not Trouble.UNREACHABLE:
                    return False
                pause = next(waits, None)
                if pause is None:
                    raise error_of(self, error, "written") from None
                time.sleep(pause)
            else:
                return True

    def _writer(self) -> str | None:
        """Who wrote the object, "" if that is not known; None where there is none."""
        try:
            attributes = self._asked(lambda store: store.get(self.key, options={"head": True}).attributes)
        except FileNotFoundError:
            return None
        return attributes.get(WRITER, "")


def _key(path: str) -> str:
    """A key without empty parts, percent signs in place of characters that no key can have."""
    whole = "/".join(part for part in path.split("/") if part)
    return _NOT_FOR_KEYS.sub(lambda match: f"%{ord(match[0]) & 0xFF:02X}", whole)
