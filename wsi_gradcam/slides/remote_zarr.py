"""Zarr groups behind URLs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from zarr.abc.store import RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import ObjectStore

from wsi_gradcam.io.cache import Cache
from wsi_gradcam.io.urls import redact_url
from wsi_gradcam.slides.remote import KEPT_BYTES, access_error, folder_of, look

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    Request = tuple[str, ByteRequest | None]


class RemoteZarr(ObjectStore[Any]):
    """Zarr's store behind a URL, which keeps what it read last and tells trouble with the network from damage."""

    def __init__(self, url: str) -> None:
        super().__init__(folder_of(url), read_only=True)
        self.name = redact_url(url)
        self._kept: Cache[Request, bytes] = Cache(KEPT_BYTES, len)
        self._sizes: dict[str, int] = {}
        self._asked: dict[Request, asyncio.Task[bytes | None]] = {}

    def identity(self, key: str) -> str:
        """Size and version of an object, or that there is none.

        Raises:
            SlideAccessError: the server does not answer.
        """
        try:
            size, version, _ = look(self.store, key)
        except FileNotFoundError:
            return "missing"
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        return f"{size} {version}"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """As of zarr's stores; all calls come in zarr's own thread, so that nothing needs a lock.

        Raises:
            SlideAccessError: the server does not answer.
        """
        request = key, byte_range
        data = self._kept.peek(request)
        if data is None:
            if request not in self._asked:
                task = self._asked[request] = asyncio.ensure_future(self._fetched(key, byte_range))
                task.add_done_callback(lambda _: self._asked.pop(request))
            data = await asyncio.shield(self._asked[request])
            if data is None:
                return None
            self._kept.put(request, data)
        return prototype.buffer.from_bytes(data)

    async def _fetched(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        try:
            if isinstance(
                byte_range, SuffixByteRequest
            ):  # many a web server knows only ranges from one byte to another
                if key not in self._sizes:
                    self._sizes[key], *_ = await asyncio.to_thread(look, self.store, key)
                size = self._sizes[key]
                byte_range = RangeByteRequest(max(0, size - byte_range.suffix), size)
            found = await super().get(key, default_buffer_prototype(), byte_range)
        except FileNotFoundError:
            return None
        except Exception as error:  # obstore raises many kinds
            raise access_error(self.name, error) from None
        return None if found is None else found.to_bytes()
