"""Zarr's view of a folder in an object store: each chunk is one request, and errors say what to do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

from wsi_gradcam.io import object_stores
from wsi_gradcam.io.object_stores import Trouble, error_of, pauses, trouble_of

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from wsi_gradcam.io.base import StoragePath
    from wsi_gradcam.io.object_stores import Bucket, ObjectStore

T = TypeVar("T")


class RemoteStore(Store):
    """The objects below a place. It can be pickled, and shares the place's client."""

    supports_writes = True
    supports_deletes = True
    supports_listing = True

    def __init__(self, place: StoragePath, bucket: Bucket, key: str, read_only: bool = False) -> None:
        super().__init__(read_only=read_only)
        self.place = place
        self.bucket = bucket
        self.key = key

    def with_read_only(self, read_only: bool = False) -> RemoteStore:
        return RemoteStore(self.place, self.bucket, self.key, read_only)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteStore) and (self.place, self.read_only) == (other.place, other.read_only)

    def __str__(self) -> str:
        return str(self.place)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        options: Any = None if byte_range is None else {"range": _range(byte_range)}

        async def fetch(store: ObjectStore) -> Any:
            return await (await store.get_async(self._path(key), options=options)).bytes_async()

        try:
            data = await self._asked(key, fetch, "read")
        except FileNotFoundError:
            return None
        return prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        try:
            await self.getsize(key)
        except FileNotFoundError:
            return False
        return True

    async def getsize(self, key: str) -> int:
        return (await self._asked(key, lambda store: store.head_async(self._path(key)), "read"))["size"]

    async def set(self, key: str, value: Buffer) -> None:
        self._check_writable()
        data = value.as_buffer_like()
        # In one piece, however large: it is in memory already, and pieces of a killed process would stay, unseen.
        await self._asked(key, lambda store: store.put_async(self._path(key), data, use_multipart=False), "written")

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        self._check_writable()
        await asyncio.to_thread((self.place / key).create, value.to_bytes())

    async def delete(self, key: str) -> None:
        self._check_writable()
        await asyncio.to_thread((self.place / key).remove)

    async def delete_dir(self, prefix: str) -> None:
        self._check_writable()
        await asyncio.to_thread((self.place / prefix).remove_tree)

    async def list(self) -> AsyncIterator[str]:
        async for key in self.list_prefix(""):
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        start = len(self._path(""))

        async def paths(store: ObjectStore) -> list[str]:
            return [item["path"] for item in await store.list(self._path(prefix)).collect_async()]

        for path in await self._asked(prefix, paths, "read"):
            yield path[start:]

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        folder = self.place / prefix
        for name in (*await asyncio.to_thread(folder.file_names), *await asyncio.to_thread(folder.folder_names)):
            yield name

    def _path(self, key: str) -> str:
        return f"{self.key}/{key}" if self.key else key

    async def _asked(self, key: str, call: Callable[[ObjectStore], Awaitable[T]], done: str) -> T:
        """What the store answers, tried again while its trouble may pass."""
        waits = pauses(object_stores.OUT_PATIENCE_S)
        while True:
            try:
                return await call(self.bucket.store)
            except Exception as error:  # obstore raises many kinds
                pause = next(waits, None) if trouble_of(error) is Trouble.UNREACHABLE else None
                if pause is None:
                    raise error_of(self.place / key, error, done) from None
            await asyncio.sleep(pause)


def _range(part: ByteRequest) -> Any:
    if isinstance(part, RangeByteRequest):
        return part.start, part.end
    if isinstance(part, OffsetByteRequest):
        return {"offset": part.offset}
    assert isinstance(part, SuffixByteRequest)
    return {"suffix": part.suffix}
