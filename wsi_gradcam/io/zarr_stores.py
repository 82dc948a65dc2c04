"""Zarr groups of results, created and opened with few requests: in an object store each takes tens of milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import zarr
from zarr.storage import LocalStore, MemoryStore, ObjectStore

from wsi_gradcam.io import object_stores
from wsi_gradcam.io.object_stores import Failure, classify, retry_delays, store_error

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from wsi_gradcam.io.base import StoragePath
    from wsi_gradcam.io.object_stores import Bucket

T = TypeVar("T")


def write_group(path: StoragePath, build: Callable[[Store], None]) -> None:
    """Replace everything at `path` by what `build` writes into an empty store.

    It is built in memory first: zarr itself would check for each array whether it exists.

    Raises:
        StoreError: the path cannot be written.
    """
    built: dict[str, Buffer] = {}
    build(MemoryStore(built))
    path.remove_tree()
    path.write_many({name: data.to_bytes() for name, data in built.items()})


class ZarrGroup:
    """A group of Zarr 3 whose arrays' metadata is read once.

    Raises:
        FileNotFoundError: there is no group.
    """

    def __init__(self, path: StoragePath, *, read_only: bool = False) -> None:
        store = path.zarr_store(read_only)
        if isinstance(store, LocalStore) and not store.root.is_dir():  # zarr would make the folder
            raise FileNotFoundError(f"{path}: does not exist")
        self.group = zarr.open_group(store, mode="r" if read_only else "r+", zarr_format=3)
        self._arrays: dict[str, zarr.Array[Any]] = {}

    def array(self, name: str) -> zarr.Array[Any]:
        """Return the array of this path in the group."""
        if name not in self._arrays:
            array = self.group[name]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array
        return self._arrays[name]


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
