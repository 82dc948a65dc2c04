"""A slide's bytes, wherever they are: `SlideFile`, and the one on a disk."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from wsi_gradcam.slides.base import content_digest

ByteRange = tuple[int, int]  # offset and count


class SlideFile(Protocol):
    """The bytes of one file. Reading is safe from several threads, streams are for one."""

    @property
    def name(self) -> str:
        """What messages call it: its path, or its URL without secrets."""
        ...

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    def read_many(self, ranges: Sequence[ByteRange]) -> Sequence[bytes | OSError]:
        """The bytes of each (offset, count), fewer where the file ends before, or what the disk says of them.

        Raises:
            SlideAccessError: a remote file cannot be reached.
        """
        ...

    def stream(self) -> BinaryIO:
        """The file from its beginning, for the many small reads of a parser."""
        ...

    def digest(self) -> str:
        """A short text that changes when the file does."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class LocalFile:
    """A `SlideFile` on a disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    @property
    def name(self) -> str:
        """Its path."""
        return str(self._path)

    @property
    def size(self) -> int:
        """In bytes."""
        return os.fstat(self._descriptor).st_size

    def read_many(self, ranges: Sequence[ByteRange]) -> Sequence[bytes | OSError]:
        """The bytes of each (offset, count), fewer where the file ends before, or what the disk says of them."""
        return [self._read(*place) for place in ranges]

    def stream(self) -> BinaryIO:
        """The file from its beginning, opened anew."""
        return self._path.open("rb")

    def digest(self) -> str:
        """See `content_digest`."""
        return content_digest(self._path)

    def close(self) -> None:
        """Release the file."""
        os.close(self._descriptor)

    def _read(self, offset: int, count: int) -> bytes | OSError:
        try:
            return os.pread(self._descriptor, count, offset)
        except OSError as error:  # one bad sector is not the whole slide
            return error
