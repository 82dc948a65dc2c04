"""What a run needs of where its results lie: files and folders of OUT, on a disk or in an object store."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, BinaryIO

from wsi_gradcam.errors import StoreError
from wsi_gradcam.io.object_stores import pauses

if TYPE_CHECKING:
    from typing import Self

    from zarr.abc.store import Store

CHANGING_S = 120.0


class Place(ABC):
    """A file or folder. Folders need not be made, and one without files is as good as none.

    Whatever writes raises a `StoreError` that names the place and the mend; so does what reads, unless it says
    `FileNotFoundError`. Places can be pickled, compared and used as keys.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The last part."""

    @property
    @abstractmethod
    def parent(self) -> Self:
        """The folder that it lies in."""

    @abstractmethod
    def __str__(self) -> str:
        """As shown to users, without secrets."""

    @abstractmethod
    def __truediv__(self, name: str) -> Self:
        """A place below; `name` may have several parts."""

    @abstractmethod
    def absolute(self) -> Self:
        """The same place for a process that works in another folder."""

    @abstractmethod
    def read(self) -> bytes:
        """The file.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def read_range(self, start: int, count: int) -> bytes:
        """Some bytes of the file, fewer where it ends before.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def read_versioned(self) -> tuple[bytes, str]:
        """The file, and what tells its content from what was or will be there.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def size(self) -> int:
        """Bytes of the file.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def exists(self) -> bool:
        """Whether it is a file, or a folder with a file somewhere in it."""

    def is_file(self) -> bool:
        """Whether it is a file."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the files right below, sorted."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders right below that have files somewhere in them, sorted."""

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Make this the file: readers see all of it or what was there before."""

    @abstractmethod
    def create(self, data: bytes) -> bool:
        """Make this the file unless there is one; of all who try, one alone is told True."""

    @abstractmethod
    def replace(self, data: bytes, known: str) -> bool:
        """Make this the file if there is still the version that `read_versioned` told; whether it was so."""

    @abstractmethod
    def writing(self) -> AbstractContextManager[BinaryIO]:
        """A stream whose bytes are the file when the context ends well; else all stays as it was."""

    @abstractmethod
    def remove(self) -> None:
        """Delete the file, if there is one."""

    @abstractmethod
    def remove_all(self) -> None:
        """Delete the folder with everything below, if there is one."""

    @abstractmethod
    def remove_partials(self, below: bool = True) -> None:
        """Delete what killed processes left half-written in the folder, and in the folders below."""

    @abstractmethod
    def zarr(self, read_only: bool = False) -> Store:
        """The folder for `zarr.open_group(store=...)`. Each chunk is written whole or not at all."""

    def read_each(self, names: Sequence[str]) -> list[bytes]:
        """The files of these names right below, in this order.

        Raises:
            FileNotFoundError: one is not there.
        """
        return [(self / name).read() for name in names]

    def write_each(self, files: Mapping[str, bytes]) -> None:
        """Write files by name, which may have several parts; each is whole or not there."""
        for name, data in files.items():
            (self / name).write(data)

    @abstractmethod
    def storing(self) -> AbstractContextManager[None]:
        """Turns what zarr raises when it cannot write below this place into a `StoreError`."""

    def update(self, change: Callable[[bytes | None], bytes | None]) -> None:
        """Make the file what `change` makes of it (None where there is none); nobody else's update is lost.

        Where `change` gives None, all stays as it is. It is called again with what another process has written
        meanwhile.

        Raises:
            StoreError: it cannot be written, or others have always been faster.
        """
        for pause in pauses(CHANGING_S):
            if self._changed(change):
                return
            time.sleep(pause)
        raise StoreError(
            f"{self}: other processes write to it all the time; let fewer runs share an --out, and run the same "
            "command again, nothing finished is lost"
        )

    def _changed(self, change: Callable[[bytes | None], bytes | None]) -> bool:
        try:
            old, version = self.read_versioned()
        except FileNotFoundError:
            new = change(None)
            return new is None or self.create(new)
        new = change(old)
        return new is None or self.replace(new, version)
