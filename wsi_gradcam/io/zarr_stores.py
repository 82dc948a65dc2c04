"""Zarr groups of results, created and opened with few requests: in an object store each takes tens of milliseconds.

Results may be a stranger's. So arrays are read by the codecs that we write with and by no other, each chunk is unpacked
into no more than its shape holds, and neither a chunk nor a shard may be larger than any of ours.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import stat
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import zarr
from imagecodecs import zstd_decode
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.array import AsyncArray
from zarr.core.chunk_grids import RegularChunkGrid
from zarr.core.metadata import ArrayV3Metadata
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from wsi_gradcam.errors import StoreError
from wsi_gradcam.io import object_stores
from wsi_gradcam.io.object_stores import Failure, classify, retry_delays, store_error

if TYPE_CHECKING:
    from zarr.abc.codec import Codec
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, BufferPrototype

    from wsi_gradcam.io.base import StoragePath
    from wsi_gradcam.io.object_stores import Bucket

T = TypeVar("T")

METADATA = "zarr.json"
MAX_METADATA_BYTES = 16 << 20
MAX_FILE_BYTES = 1 << 30  # of a shard
MAX_CHUNK_BYTES = 1 << 28  # unpacked
MAX_CHUNKS = 1 << 14  # in a shard, each of which is looked at
# Of a group of ours, by paths below it; zarr's own half-written files end as ours do.
ZARR_CONTENTS = re.compile(r"([^/]+/)*(zarr\.json|c(/[0-9]+)*|[^/]+\.[0-9a-f]{32}\.partial)")


def write_group(path: StoragePath, build: Callable[[Store], None]) -> None:
    """Replace the group at `path` by what `build` writes into an empty store; files that are of no group stay.

    It is built in memory first: zarr itself would check for each array whether it exists.

    Raises:
        StoreError: the path cannot be written.
    """
    built: dict[str, Buffer] = {}
    build(MemoryStore(built))
    path.remove_files(ZARR_CONTENTS)
    path.write_many({name: data.to_bytes() for name, data in built.items()})


class ZarrGroup:
    """A group of Zarr 3 whose arrays' metadata is read once, and whose memory is bounded, see `bounded`.

    Raises:
        FileNotFoundError: there is no group.
    """

    def __init__(self, path: StoragePath, *, read_only: bool = False) -> None:
        store = path.zarr_store(read_only)
        if isinstance(store, LocalStore) and not store.root.is_dir():  # zarr would make the folder
            raise FileNotFoundError(f"{path}: does not exist")
        self.group = zarr.open_group(store, mode="r" if read_only else "r+", zarr_format=3)
        self._path = path
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def array(self, name: str) -> zarr.Array[Any]:
        """Return the array of this path in the group."""
        if name not in self._arrays:
            try:
                array = self.group[name]
            except KeyError as error:
                raise FileNotFoundError(f"{self._path}: has no array {name}") from error
            self._arrays[name] = bounded(array, f"{self._path}/{name}")
        return self._arrays[name]


def bounded(array: Any, name: str) -> zarr.Array[Any]:
    """Return an array of Zarr 3 that unpacks no chunk to more than its shape holds.

    Raises:
        StoreError: it is none, has other codecs than ours, or larger chunks than any of ours.
    """
    about = array.metadata if isinstance(array, zarr.Array) else None
    if not isinstance(about, ArrayV3Metadata) or not isinstance(about.chunk_grid, RegularChunkGrid):
        raise StoreError(f"{name}: not an array of Zarr 3 in regular chunks; {MADE_BY_US}")
    codecs = tuple(_bounded_codec(codec, name, is_outer=True) for codec in about.codecs)
    itemsize = array.dtype.itemsize if array.dtype.kind in "biuf" else 0
    shard, chunk = array.shards or array.chunks, array.chunks
    inside = math.prod(-(-whole // part) for whole, part in zip(shard, chunk, strict=True))
    if not itemsize or math.prod(chunk) * itemsize > MAX_CHUNK_BYTES or inside > MAX_CHUNKS:
        raise StoreError(f"{name}: chunks of {chunk} {array.dtype} in files of {shard}, larger than any; {MADE_BY_US}")
    inner = array.async_array
    return zarr.Array(
        AsyncArray(metadata=replace(about, codecs=codecs), store_path=inner.store_path, config=inner.config)
    )


MADE_BY_US = "expected results of wsi_gradcam; recompute with --overwrite"


def _bounded_codec(codec: Codec, name: str, *, is_outer: bool = False) -> Codec:
    if isinstance(codec, ZstdCodec):
        return BoundedZstd(level=codec.level, checksum=codec.checksum)
    if isinstance(codec, BytesCodec | Crc32cCodec):
        return codec
    if isinstance(codec, ShardingCodec) and is_outer:
        return ShardingCodec(
            chunk_shape=codec.chunk_shape,
            codecs=[_bounded_codec(inner, name) for inner in codec.codecs],
            index_codecs=[_plain_codec(inner, name) for inner in codec.index_codecs],
            index_location=codec.index_location,
        )
    raise StoreError(f"{name}: packed by {type(codec).__name__}, which no results are; {MADE_BY_US}")


def _plain_codec(codec: Codec, name: str) -> Codec:
    if not isinstance(codec, BytesCodec | Crc32cCodec):
        raise StoreError(f"{name}: an index packed by {type(codec).__name__}, which none is; {MADE_BY_US}")
    return codec


class BoundedZstd(ZstdCodec):
    """Zstandard, unpacked into no more bytes than a chunk has."""

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        size = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        found = zstd_decode(chunk_bytes.to_bytes(), out=size)
        return chunk_spec.prototype.buffer.from_bytes(bytes(found))


class BoundedStore(LocalStore):
    """Zarr's store in a folder: only of regular files, and never more at once than a shard of ours can have."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file, or a part of it; None where there is none.

        Raises:
            StoreError: it is no regular file, or too large.
        """
        most = MAX_METADATA_BYTES if key.rpartition("/")[2] == METADATA else MAX_FILE_BYTES
        try:
            found = os.stat(self.root / key)  # noqa: PTH116 - of each chunk
        except OSError:
            return await super().get(key, prototype, byte_range)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise StoreError(f"{self.root / key}: a pipe, socket or device, and no file; {MADE_BY_US}")
        check_count(f"{self.root / key}", found.st_size, byte_range, most)
        return await super().get(key, prototype, byte_range)


def check_count(name: str, size: int, part: ByteRequest | None, most: int = MAX_FILE_BYTES) -> None:
    """Raise a StoreError where a file of `size` bytes, or a part of it, is larger than any of ours."""
    if isinstance(part, RangeByteRequest):
        size = min(size, part.end) - part.start
    elif isinstance(part, OffsetByteRequest):
        size -= part.offset
    elif isinstance(part, SuffixByteRequest):
        size = min(size, part.suffix)
    if size > most:
        raise StoreError(f"{name}: {size:,} bytes, expected up to {most:,}; {MADE_BY_US}")


class RemoteStore(ObjectStore[Any]):
    """Zarr's store for the objects below a path of results: patient, with errors that say what to do.

    It shares the bucket's client, and can be pickled.
    """

    def __init__(self, path: StoragePath, bucket: Bucket, key: str, read_only: bool = False) -> None:
        super().__init__(bucket.store, read_only=read_only)
        self.path = path
        self._bucket = bucket
        self._prefix = f"{key}/" if key else ""
        self._arguments = path, bucket, key

    def __reduce__(self) -> tuple[type[RemoteStore], tuple[StoragePath, Bucket, str, bool]]:
        return RemoteStore, (*self._arguments, self.read_only)

    def with_read_only(self, read_only: bool = False) -> RemoteStore:
        return RemoteStore(*self._arguments, read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and (self.path, self.read_only) == (other.path, other.read_only)

    def __str__(self) -> str:
        return str(self.path)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        get = super().get
        if isinstance(byte_range, RangeByteRequest):
            check_count(f"{self.path / key}", sys.maxsize, byte_range)
        return await self._retry(key, lambda: get(self._prefix + key, prototype, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        exists = super().exists
        return await self._retry(key, lambda: exists(self._prefix + key))

    async def getsize(self, key: str) -> int:
        getsize = super().getsize
        return await self._retry(key, lambda: getsize(self._prefix + key))

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        data = value.as_buffer_like()
        # In one piece, however large: it is in memory already, and pieces of a killed process would stay, unseen.
        put = self.store.put_async
        await self._retry(key, lambda: put(self._prefix + key, data, use_multipart=False), "written")

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread((self.path / key).create, value.to_bytes())

    async def delete(self, key: str) -> None:
        delete = super().delete
        await self._retry(key, lambda: delete(self._prefix + key), "written")

    async def delete_dir(self, prefix: str) -> None:
        self._check_writable()
        await asyncio.to_thread((self.path / prefix).remove_tree)  # one request, where zarr's own makes one an object

    def list(self) -> AsyncGenerator[str, None]:
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        found = self.store.list
        objects = await self._retry(prefix, lambda: found(self._prefix + prefix).collect_async())
        for item in objects:
            yield item["path"][len(self._prefix) :]

    async def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        folder = self.path / prefix
        for name in (*await asyncio.to_thread(folder.file_names), *await asyncio.to_thread(folder.folder_names)):
            yield name

    async def _retry(self, key: str, call: Callable[[], Awaitable[T]], action: str = "read") -> T:
        """Return the result of an idempotent call, repeated while its failures are transient."""
        delays = retry_delays(object_stores.OUT_PATIENCE_S)
        while True:
            try:
                return await call()
            except Exception as error:  # obstore raises many kinds
                delay = next(delays, None) if classify(error) is Failure.TRANSIENT else None
                if delay is None:
                    raise store_error(self.path / key, error, action) from None
            await asyncio.sleep(delay)
