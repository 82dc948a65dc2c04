"""Zarr groups of results, created and opened with few requests: an object store takes tens of milliseconds for each.

Results and slides may be untrusted. So arrays are decoded only by listed codecs (for results, those that we write
with); each chunk is unpacked to no more than its shape needs, and neither a chunk nor a file may be larger than
`RESULTS` or `SLIDES` allow.
"""

from __future__ import annotations

import asyncio
import bz2
import lzma
import math
import os
import re
import stat
import struct
import sys
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import zarr
from imagecodecs import zstd_decode
from numcodecs.abc import Codec as OldCodec
from numcodecs.blosc import decompress as blosc_decode
from numcodecs.lz4 import decompress as lz4_decode
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec
from zarr.core.array import AsyncArray
from zarr.core.chunk_grids import RegularChunkGrid
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from wsi_gradcam.errors import MissingPartError, StoreError, WsiGradcamError, one_line
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
MAX_SLIDE_METADATA_BYTES = 8 << 20
LZMA_BYTES = 128 << 20  # its dictionary
MADE_BY_US = "expected results of wsi_gradcam; recompute with --overwrite"


@dataclass(frozen=True)
class Rules:
    """Limits on the arrays that are read.

    Attributes:
        of: what the arrays are of.
        packed: names of the codecs that may compress chunks.
        chunk_bytes: the most that a chunk unpacks to.
        chunks: the most chunks in a shard, each of which is examined.
        mend: what a user can do about any other array.
    """

    of: str
    packed: tuple[str, ...]
    chunk_bytes: int
    chunks: int
    mend: str


RESULTS = Rules("results", ("zstd",), 1 << 28, 1 << 14, MADE_BY_US)
SLIDES = Rules(
    "slides",
    ("zstd", "gzip", "blosc", "zlib", "lz4", "bz2", "lzma"),
    1 << 27,
    1 << 16,
    "convert the image again, with chunks of about 512 x 512 px compressed with Zstandard, Blosc or gzip",
)
# Files of a group of ours, by their paths below it; zarr's own half-written files have the same ending as ours.
ZARR_CONTENTS = re.compile(r"([^/]+/)*(zarr\.json|c(/[0-9]+)*|[^/]+\.[0-9a-f]{32}\.partial)")


def write_group(path: StoragePath, build: Callable[[Store], None], keep: bool = False) -> None:
    """Replace the group at `path` by what `build` writes into an empty store; files that belong to no group stay.

    With `keep`, other arrays, and chunks that are not written, stay too.

    It is built in memory first: zarr itself would check for each array whether it exists.

    Raises:
        StoreError: the path cannot be written.
    """
    built: dict[str, Buffer] = {}
    build(MemoryStore(built))
    if not keep:
        path.remove_files(ZARR_CONTENTS)
    path.write_many({name: data.to_bytes() for name, data in built.items()})


def write_labels_group(
    path: StoragePath, shapes: Iterable[tuple[int, int]], chunk: int, shard: int, attributes: dict[str, Any]
) -> None:
    """Replace the group at `path` by empty uint8 arrays "0", "1", ... of `shapes` [h, w]; as `write_group`."""
    layout: dict[str, Any] = {
        "chunks": (chunk,) * 2,
        "shards": (shard,) * 2,
        "dtype": "uint8",
        "dimension_names": ("y", "x"),
    }

    def build(store: Store) -> None:
        group = zarr.create_group(store, attributes=attributes)
        for level, shape in enumerate(shapes):
            group.create_array(str(level), shape=shape, fill_value=0, **layout)

    write_group(path, build)


@contextmanager
def telling_damage(path: object) -> Iterator[None]:
    """Turn the errors that metadata of unexpected types and values cause into a StoreError."""
    try:
        yield
    except WsiGradcamError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise StoreError(f"{path}: damaged metadata ({one_line(error)[:200]}); {MADE_BY_US}") from error


class ZarrGroup:
    """A Zarr 3 group whose arrays' metadata is read once, and whose memory is limited, see `bounded`.

    Raises:
        FileNotFoundError: there is no group.
    """

    def __init__(self, path: StoragePath, *, read_only: bool = False) -> None:
        store = path.zarr_store(read_only)
        if isinstance(store, LocalStore) and not store.root.is_dir():  # zarr would create the folder
            raise FileNotFoundError(f"{path}: does not exist")
        with telling_damage(path):
            self.group = zarr.open_group(store, mode="r" if read_only else "r+", zarr_format=3)
        self._path = path
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def array(self, name: str) -> zarr.Array[Any]:
        """Return the array of this path in the group.

        Raises:
            MissingPartError: there is no such array.
            StoreError: it is damaged.
        """
        if name not in self._arrays:
            with telling_damage(f"{self._path}/{name}"):
                try:
                    array = self.group[name]
                except KeyError as error:
                    raise MissingPartError(f"{self._path}: has no array {name}; {MADE_BY_US}") from error
            self._arrays[name] = bounded(array, f"{self._path}/{name}")
        return self._arrays[name]


def bounded(array: Any, name: str, rules: Rules = RESULTS) -> zarr.Array[Any]:
    """Return an array that unpacks no chunk to more than its shape needs; results are in Zarr 3.

    Raises:
        StoreError: it is not an array, or has codecs or chunk sizes that the rules do not allow.
    """
    about = array.metadata if isinstance(array, zarr.Array) else None
    changed: ArrayV2Metadata | ArrayV3Metadata
    if isinstance(about, ArrayV3Metadata) and isinstance(about.chunk_grid, RegularChunkGrid):
        changed = replace(
            about, codecs=tuple(_bounded_codec(codec, name, rules, is_outer=True) for codec in about.codecs)
        )
    elif isinstance(about, ArrayV2Metadata) and rules is not RESULTS:
        changed = _bounded_old(about, name, rules)
    else:
        raise StoreError(f"{name}: not a Zarr 3 array with regular chunks; {rules.mend}")
    itemsize = array.dtype.itemsize if array.dtype.kind in "biuf" else 0
    shard, chunk = array.shards or array.chunks, array.chunks
    inside = (
        math.prod(-(-whole // part) for whole, part in zip(shard, chunk, strict=True)) if all(chunk) else sys.maxsize
    )
    if not itemsize or math.prod(chunk) * itemsize > rules.chunk_bytes or inside > rules.chunks:
        raise StoreError(f"{name}: chunks of {chunk} {array.dtype} in files of {shard} are too large; {rules.mend}")
    inner = array.async_array
    return zarr.Array(AsyncArray(metadata=changed, store_path=inner.store_path, config=inner.config))


def most_in_file(array: zarr.Array[Any]) -> int:
    """Return the most bytes that a chunk's file, or a single read from a shard's file, may have.

    Compression never makes data much larger. A shard's index has 16 bytes per chunk.
    """
    chunk = math.prod(array.chunks) * array.dtype.itemsize
    index = 16 * math.prod(array.shards) // max(1, math.prod(array.chunks)) if array.shards else 0
    return chunk + chunk // 4 + index + (1 << 16)


def _bounded_codec(codec: Codec, name: str, rules: Rules, *, is_outer: bool = False) -> Codec:
    for made_of in (BoundedZstd, BoundedGzip, BoundedBlosc):
        if type(codec) is made_of.__base__ and made_of.packed in rules.packed:
            return made_of.from_dict(codec.to_dict())
    if isinstance(codec, BytesCodec | Crc32cCodec) or (isinstance(codec, TransposeCodec) and rules is not RESULTS):
        return codec
    if isinstance(codec, ShardingCodec) and is_outer:
        return ShardingCodec(
            chunk_shape=codec.chunk_shape,
            codecs=[_bounded_codec(inner, name, rules) for inner in codec.codecs],
            index_codecs=[_plain_codec(inner, name, rules) for inner in codec.index_codecs],
            index_location=codec.index_location,
        )
    raise StoreError(f"{name}: compressed with {type(codec).__name__}, unsupported in {rules.of}; {rules.mend}")


def _plain_codec(codec: Codec, name: str, rules: Rules) -> Codec:
    if not isinstance(codec, BytesCodec | Crc32cCodec):
        raise StoreError(f"{name}: the index of shards is compressed with {type(codec).__name__}; {rules.mend}")
    return codec


def _bounded_old(about: ArrayV2Metadata, name: str, rules: Rules) -> ArrayV2Metadata:
    if about.filters:
        raise StoreError(f"{name}: filtered with {about.filters[0].codec_id}, unsupported in {rules.of}; {rules.mend}")
    if about.compressor is None:
        return about
    packed = about.compressor.codec_id
    if packed not in rules.packed or packed not in UNPACK:
        raise StoreError(f"{name}: compressed with {packed}, unsupported in {rules.of}; {rules.mend}")
    return replace(
        about, compressor=BoundedCodec(packed, math.prod(about.chunks) * about.dtype.to_native_dtype().itemsize)
    )


def _inflated(data: bytes, size: int, wbits: int) -> bytes:
    """Return the content of a zlib or gzip stream, which is checked at its end."""
    unpacker = zlib.decompressobj(wbits)
    found = unpacker.decompress(data, size) if size else b""
    return _ended(found, unpacker, unpacker.decompress(unpacker.unconsumed_tail, 1))


def _unpacked(unpacker: Any, data: bytes, size: int) -> bytes:
    found: bytes = unpacker.decompress(data, size)
    return _ended(found, unpacker, b"" if unpacker.eof else unpacker.decompress(b"", 1))


def _ended(found: bytes, unpacker: Any, more: bytes) -> bytes:
    if more or not unpacker.eof:
        raise ValueError("larger than its chunk" if more else "cut short")
    return found


def _told(data: bytes, size: int, layout: str, place: int, unpack: Callable[[bytes], bytes]) -> bytes:
    """Return the unpacked content of data that states its size to the code that allocates memory for it."""
    (told,) = struct.unpack_from(layout, data, place)
    if not 0 <= told <= size:
        raise ValueError(f"{told:,} bytes, expected {size:,}")
    return unpack(data)


# By codec name: what `data` unpacks to, up to `size` bytes. More is a ValueError, or an error of the codec's own.
UNPACK: dict[str, Callable[[bytes, int], bytes]] = {
    "zstd": lambda data, size: bytes(zstd_decode(data, out=size)),
    "gzip": lambda data, size: _inflated(data, size, 31),
    "zlib": lambda data, size: _inflated(data, size, 15),
    "blosc": lambda data, size: _told(data, size, "<I", 4, blosc_decode),
    "lz4": lambda data, size: _told(data, size, "<i", 0, lz4_decode),
    "bz2": lambda data, size: _unpacked(bz2.BZ2Decompressor(), data, size),
    "lzma": lambda data, size: _unpacked(lzma.LZMADecompressor(memlimit=LZMA_BYTES), data, size),
}


class BoundedCodec(OldCodec):  # type: ignore[misc]
    """A Zarr 2 codec that unpacks to no more than a chunk's size, for reading only."""

    codec_id = "bounded"

    def __init__(self, packed: str, size: int) -> None:
        self.packed, self.size = packed, size

    def encode(self, buf: Any) -> Any:
        raise NotImplementedError

    def decode(self, buf: Any, out: Any = None) -> bytes:
        return UNPACK[self.packed](bytes(buf), self.size)


def _chunk_of(packed: str, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
    size = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
    return chunk_spec.prototype.buffer.from_bytes(UNPACK[packed](chunk_bytes.to_bytes(), size))


class BoundedZstd(ZstdCodec):
    """Zstandard, unpacked into no more bytes than a chunk has."""

    packed: ClassVar = "zstd"

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return _chunk_of(self.packed, chunk_bytes, chunk_spec)


class BoundedGzip(GzipCodec):
    """The codec gzip, unpacked into no more bytes than a chunk has."""

    packed: ClassVar = "gzip"

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return _chunk_of(self.packed, chunk_bytes, chunk_spec)


class BoundedBlosc(BloscCodec):
    """The codec Blosc, unpacked into no more bytes than a chunk has."""

    packed: ClassVar = "blosc"

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return _chunk_of(self.packed, chunk_bytes, chunk_spec)


class BoundedStore(LocalStore):
    """Zarr's store in a folder: only regular files, and never more at once than a shard of ours can have."""

    mend = MADE_BY_US

    def most(self, key: str) -> int:
        """Return how many bytes may be read from a file at once."""
        return MAX_METADATA_BYTES if key.rpartition("/")[2] == METADATA else MAX_FILE_BYTES

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return a file, or a part of it; None if there is none.

        Raises:
            StoreError: it is not a regular file, or too large.
        """
        try:
            found = os.stat(self.root / key)  # noqa: PTH116 - of each chunk
        except OSError:
            return await super().get(key, prototype, byte_range)
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise StoreError(f"{self.root / key}: a pipe, socket or device, not a file; {self.mend}")
        check_count(f"{self.root / key}", found.st_size, byte_range, self.most(key), self.mend)
        return await super().get(key, prototype, byte_range)


class SlideLimits:
    """Limits on reads from a slide's files: a few MiB of metadata in all, and for levels the size of their chunks.

    Untrusted metadata may name any path as a level, so only paths that were explicitly allowed count.
    """

    mend = SLIDES.mend

    def allow(self, array: zarr.Array[Any]) -> None:
        """Allow the chunks of a level to be read."""
        self._allowed[f"{array.path}/"] = most_in_file(array)

    def most(self, key: str) -> int:
        """Return how many bytes may be read from a file or object at once."""
        found = [most for path, most in self._allowed.items() if key.startswith(path)]
        return max(found, default=self._metadata_left)

    def count(self, key: str, found: int) -> None:
        """Count metadata that was read."""
        if not any(key.startswith(path) for path in self._allowed):
            self._metadata_left -= found

    @cached_property
    def _allowed(self) -> dict[str, int]:
        return {}

    @cached_property
    def _metadata_left(self) -> int:
        return MAX_SLIDE_METADATA_BYTES


class LocalSlideStore(SlideLimits, BoundedStore):
    """Zarr's store of a slide in a folder."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the same as `BoundedStore`."""
        found = await super().get(key, prototype, byte_range)
        self.count(key, 0 if found is None else len(found))
        return found


def check_count(
    name: str, size: int, part: ByteRequest | None, most: int = MAX_FILE_BYTES, mend: str = MADE_BY_US
) -> None:
    """Raise a StoreError if a file of `size` bytes, or a part of it, has more than `most`."""
    if isinstance(part, RangeByteRequest):
        size = min(size, part.end) - part.start
    elif isinstance(part, OffsetByteRequest):
        size -= part.offset
    elif isinstance(part, SuffixByteRequest):
        size = min(size, part.suffix)
    if size > most:
        raise StoreError(f"{name}: {size:,} bytes, expected at most {most:,}; {mend}")


class RemoteStore(ObjectStore[Any]):
    """Zarr's store for the objects below a results path: patient, with errors that say what to do.

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
        # In one piece, however large: it is in memory already, and the pieces of a killed upload would stay, unseen.
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
        await asyncio.to_thread((self.path / prefix).remove_tree)  # one request, not one per object

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
