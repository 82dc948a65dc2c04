"""`StoragePath`: files and folders on a disk or in an object store, read and written alike."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, BinaryIO

from wsi_gradcam.errors import StoreError
from wsi_gradcam.io.object_stores import retry_delays

if TYPE_CHECKING:
    import re
    from typing import Self

    from zarr.abc.store import Store

UPDATE_PATIENCE_S = 120.0
MAX_READ_BYTES = 1 << 29  # of a file that is read whole, if no tighter limit is known
SMALL_BYTES = 1 << 26  # of a JSON file, which takes twenty times its size in memory


class StoragePath(ABC):
    """A file or folder. Folders need not be created, and one without files counts as none.

    All methods that write raise a `StoreError` that names the path and the remedy; so do those that read, except where
    a `FileNotFoundError` is promised. Paths can be pickled, compared and used as keys.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part."""

    @property
    @abstractmethod
    def parent(self) -> Self:
        """The folder that contains it."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the path as shown to users, without secrets."""

    @abstractmethod
    def __truediv__(self, name: str) -> Self:
        """Return a path below; `name` may have several parts."""

    @abstractmethod
    def absolute(self) -> Self:
        """Return the same path for a process with a different working directory."""

    @abstractmethod
    def read(self, most: int = MAX_READ_BYTES) -> bytes:
        """Return the file's contents.

        Raises:
            FileNotFoundError: there is no such file.
            StoreError: it has more than `most` bytes: results may be untrusted.
        """

    def check_size(self, size: int, most: int) -> None:
        """Raise a StoreError if a file of `size` bytes is larger than any that we write there."""
        if size > most:
            raise StoreError(
                f"{self}: {size:,} bytes, expected at most {most:,}; it is damaged, or wsi_gradcam did not write it"
            )

    @abstractmethod
    def read_range(self, start: int, count: int) -> bytes:
        """Return `count` bytes of the file from `start` on, fewer if it ends before.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def read_versioned(self) -> tuple[bytes, str]:
        """Return the file's contents and a version that changes whenever they do.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def size(self) -> int:
        """Return the file's size in bytes.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def modified(self) -> float:
        """Return when the file was last written, in seconds since 1970.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def exists(self) -> bool:
        """Return True for a file, and for a folder with a file somewhere in it."""

    def is_file(self) -> bool:
        """Return True for a file."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def file_names(self) -> list[str]:
        """Return the names of the files directly in this folder, sorted."""

    @abstractmethod
    def folder_names(self) -> list[str]:
        """Return the names of the folders directly in this one that have files somewhere in them, sorted."""

    @abstractmethod
    def all_files(self) -> list[str]:
        """Return the names of all files in this folder and below it, relative to it and with /, sorted."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Replace the file atomically: readers see all of `data` or the previous content."""

    @abstractmethod
    def create(self, data: bytes) -> bool:
        """Write the file unless it exists; return True to the one writer that created it."""

    @abstractmethod
    def replace(self, data: bytes, version: str) -> bool:
        """Write the file if it still has the version that `read_versioned` returned; return True if it had."""

    @abstractmethod
    def atomic_writer(self) -> AbstractContextManager[BinaryIO]:
        """Open a stream whose bytes become the file if the context ends without an error; otherwise it stays as is."""

    @abstractmethod
    def remove(self) -> None:
        """Delete the file, if there is one."""

    @abstractmethod
    def remove_tree(self) -> None:
        """Delete the folder and everything in it, if there is one."""

    @abstractmethod
    def remove_files(self, made: re.Pattern[str]) -> None:
        """Delete the files below whose path from here, with slashes, matches, and folders then left empty."""

    @abstractmethod
    def remove_partial_files(self, recursive: bool = True) -> None:
        """Delete half-written files of killed processes in this folder, and in those below if `recursive`."""

    @abstractmethod
    def zarr_store(self, read_only: bool = False) -> Store:
        """Return the folder as a store for `zarr.open_group`. Each chunk is written whole or not at all."""

    def read_many(self, names: Sequence[str]) -> list[bytes]:
        """Return the contents of the named files in this folder, in this order.

        Raises:
            FileNotFoundError: one does not exist.
        """
        return [(self / name).read() for name in names]

    def write_many(self, files: Mapping[str, bytes]) -> None:
        """Write files by name, which may have several parts; each atomically."""
        for name, data in files.items():
            (self / name).write(data)

    @abstractmethod
    def wrap_write_errors(self) -> AbstractContextManager[None]:
        """Turn errors that zarr raises while it writes below this path into a `StoreError`."""

    def update(self, change: Callable[[bytes | None], bytes | None]) -> None:
        """Replace the file's contents by `change(contents)` in such a way that no concurrent update is lost.

        `change` is given None if there is no file, and returns None to leave the file as it is. It is called again with
        the new contents if another process has written in between.

        Raises:
            StoreError: the file cannot be written, or other processes were faster every time.
        """
        for delay in retry_delays(UPDATE_PATIENCE_S):
            if self._try_update(change):
                return
            time.sleep(delay)
        raise StoreError(
            f"{self}: other processes keep writing to it; let fewer runs share an --out, and run the same command "
            "again: nothing finished is lost"
        )

    def _try_update(self, change: Callable[[bytes | None], bytes | None]) -> bool:
        try:
            old, version = self.read_versioned()
        except FileNotFoundError:
            new = change(None)
            return new is None or self.create(new)
        new = change(old)
        return new is None or self.replace(new, version)
