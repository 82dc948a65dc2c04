"""Files and folders on a disk that this machine has mounted."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from wsi_gradcam.errors import StoreError, WsiGradcamError
from wsi_gradcam.io.base import Place
from wsi_gradcam.io.files import PARTIAL, remove_partials, storing, write_atomic

if TYPE_CHECKING:
    from zarr.storage import LocalStore

LOCK = ".lock"
_PARTIAL_NAME = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(PARTIAL)}$")
# File systems without hard links: SMB, exFAT and some that are made of other stores.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


@dataclass(frozen=True)
class LocalPlace(Place):
    """A file or folder on a disk; `open` and `Path` take it as they take a path."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> LocalPlace:
        return LocalPlace(self.path.parent)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> LocalPlace:
        return LocalPlace(self.path / name)

    def absolute(self) -> LocalPlace:
        return LocalPlace(self.path.absolute())

    def read(self) -> bytes:
        with _reading(self.path):
            return self.path.read_bytes()

    def read_range(self, start: int, count: int) -> bytes:
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(start)
            return file.read(count)

    def read_versioned(self) -> tuple[bytes, str]:
        data = self.read()
        return data, _version(data)

    def size(self) -> int:
        with _reading(self.path):
            found = self.path.stat()
            if stat.S_ISDIR(found.st_mode):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
            return found.st_size

    def exists(self) -> bool:
        return self.is_file() or _holds_files(self.path)

    def names(self) -> list[str]:
        return sorted(entry.name for entry in self._entries() if entry.is_file() and not _is_ours(entry.name))

    def folders(self) -> list[str]:
        return sorted(entry.name for entry in self._entries() if entry.is_dir() and _holds_files(Path(entry.path)))

    def _entries(self) -> list[os.DirEntry[str]]:
        with _reading(self.path):
            try:
                return list(os.scandir(self.path))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def write(self, data: bytes) -> None:
        write_atomic(self.path, data)

    def create(self, data: bytes) -> bool:
        with self._written(data) as partial:
            try:
                os.link(partial, self.path)
            except FileExistsError:
                # a network file system may have lost the answer to a first request
                return partial.stat().st_nlink > 1 and partial.samefile(self.path)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._created_without_links(data)
            return True

    def _created_without_links(self, data: bytes) -> bool:
        try:
            with self.path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def replace(self, data: bytes, known: str) -> bool:
        with self._locked():
            try:
                if self.read_versioned()[1] != known:
                    return False
            except FileNotFoundError:
                return False
            self.write(data)
            return True

    def update(self, change: Callable[[bytes | None], bytes | None]) -> None:
        with self._locked():
            try:
                old = self.read()
            except FileNotFoundError:
                old = None
            if (new := change(old)) is not None:
                self.write(new)

    @contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        partial = self._partial()
        with storing(self.path):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file:
                    yield file
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)

    def remove(self) -> None:
        with storing(self.path), suppress(NotADirectoryError):
            self.path.unlink(missing_ok=True)

    def remove_all(self) -> None:
        with storing(self.path), suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(self.path)

    def remove_partials(self, below: bool = True) -> None:
        remove_partials(self.path, below)

    def zarr(self, read_only: bool = False) -> LocalStore:
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=read_only)

    def storing(self) -> AbstractContextManager[None]:
        return storing(self.path)

    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}{PARTIAL}")

    @contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A file beside this one that holds `data`, for a while."""
        partial = self._partial()
        with storing(self.path):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(data)
                yield partial
            finally:
                partial.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock file of the folder, as far as the system and the file system know locks."""
        with storing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = (self.path.parent / LOCK).open("w")
        with file:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what an operating system says while reading into a `StoreError`, unless nothing is there."""
    try:
        yield
    except (WsiGradcamError, FileNotFoundError):
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be read: {error.strerror or error}; choose another --out, or check the storage and its "
            "permissions"
        ) from error


def _holds_files(folder: Path) -> bool:
    return any(not all(map(_is_ours, files)) for _, _, files in os.walk(folder) if files)


def _is_ours(name: str) -> bool:
    """Whether a name is of what this module leaves beside files."""
    return name == LOCK or _PARTIAL_NAME.search(name) is not None


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
