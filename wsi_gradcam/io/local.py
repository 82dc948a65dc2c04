"""`LocalPath`: results in folders on a disk, written atomically."""

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
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

from wsi_gradcam.errors import StoreError, WsiGradcamError, canonical
from wsi_gradcam.io.base import MAX_READ_BYTES, StoragePath

if TYPE_CHECKING:
    from zarr.storage import LocalStore

LOCK = ".lock"
ATTEMPTS = 3
PARTIAL = ".partial"  # also the ending of zarr's own unfinished files

# Results may be untrusted: a link in place of the lock is not followed, and a pipe is not waited for.
LOCKING = os.O_RDWR | os.O_CREAT | sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW"))

_MENDS = {
    errno.ELOOP: "a symbolic link takes the place of a file of the results; delete it",
    errno.ENOSPC: "the disk is full; free space and run the same command again; nothing finished is lost",
    errno.EDQUOT: "the disk quota is used up; free space and run the same command again; nothing finished is lost",
    errno.EROFS: "the file system is read-only; choose another --out",
    errno.EACCES: "permission to write there is denied; choose another --out or change the permissions",
    errno.EPERM: "permission to write there is denied; choose another --out or change the permissions",
    errno.ENOTDIR: "there is a file where a folder is needed; choose another --out",
    errno.EEXIST: "there is a file where a folder is needed; choose another --out",
}
_PARTIAL_NAME = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(PARTIAL)}$")
# Errors from file systems without hard links: SMB, exFAT and some on top of object stores.
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}


@dataclass(frozen=True)
class LocalPath(StoragePath):
    """A file or folder on a disk, which `open` and `Path` accept as a path."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> LocalPath:
        return LocalPath(self.path.parent)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> LocalPath:
        return LocalPath(self.path / name)

    def absolute(self) -> LocalPath:
        return LocalPath(self.path.absolute())

    def read(self, most: int = MAX_READ_BYTES) -> bytes:
        with _wrap_read_errors(self.path):
            self.check_size(check_regular(self.path).st_size, most)
            return self.path.read_bytes()

    def read_range(self, start: int, count: int) -> bytes:
        with _wrap_read_errors(self.path):
            check_regular(self.path)
        with _wrap_read_errors(self.path), self.path.open("rb") as file:
            file.seek(start)
            return file.read(count)

    def read_versioned(self) -> tuple[bytes, str]:
        data = self.read()
        return data, _version(data)

    def size(self) -> int:
        with _wrap_read_errors(self.path):
            found = self.path.stat()
            if stat.S_ISDIR(found.st_mode):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
            return found.st_size

    def modified(self) -> float:
        with _wrap_read_errors(self.path):
            return self.path.stat().st_mtime

    def exists(self) -> bool:
        return self.is_file() or _holds_files(self.path)

    def file_names(self) -> list[str]:
        return sorted(entry.name for entry in self._entries() if entry.is_file() and not _is_internal(entry.name))

    def folder_names(self) -> list[str]:
        return sorted(entry.name for entry in self._entries() if entry.is_dir() and _holds_files(Path(entry.path)))

    def all_files(self) -> list[str]:
        found = (Path(folder, name) for folder, _, names in os.walk(self.path) for name in names)
        return sorted(path.relative_to(self.path).as_posix() for path in found if not _is_internal(path.name))

    def _entries(self) -> list[os.DirEntry[str]]:
        with _wrap_read_errors(self.path):
            try:
                return list(os.scandir(self.path))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def write(self, data: bytes) -> None:
        write_atomic(self.path, data)

    def create(self, data: bytes) -> bool:
        with self._temporary(data) as partial:
            try:
                os.link(partial, self.path)
            except FileExistsError:
                # a network file system may have lost the answer to a first request
                return partial.stat().st_nlink > 1 and partial.samefile(self.path)
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                return self._create_without_links(data)
            return True

    def _create_without_links(self, data: bytes) -> bool:
        try:
            with self.path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def replace(self, data: bytes, version: str) -> bool:
        with self._locked():
            try:
                if self.read_versioned()[1] != version:
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
    def atomic_writer(self) -> Iterator[BinaryIO]:
        partial = self._partial()
        with wrap_write_errors(self.path):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file:
                    yield file
                partial.replace(self.path)
            finally:
                partial.unlink(missing_ok=True)

    def remove(self) -> None:
        with wrap_write_errors(self.path), suppress(NotADirectoryError):
            self.path.unlink(missing_ok=True)

    def remove_tree(self) -> None:
        with wrap_write_errors(self.path), suppress(FileNotFoundError, NotADirectoryError):
            shutil.rmtree(self.path)

    def remove_files(self, made: re.Pattern[str]) -> None:
        def failed(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise error

        emptier = set[Path]()
        with wrap_write_errors(self.path):
            for folder, _, names in os.walk(self.path, topdown=False, onerror=failed):
                here = Path(folder)
                found = [n for n in names if made.fullmatch((here / n).relative_to(self.path).as_posix())]
                for name in found:
                    (here / name).unlink(missing_ok=True)
                if found or here in emptier:
                    with suppress(OSError):  # something else is in it
                        here.rmdir()
                        emptier.add(here.parent)

    def remove_partial_files(self, recursive: bool = True) -> None:
        remove_partial_files(self.path, recursive)

    def zarr_store(self, read_only: bool = False) -> LocalStore:
        from wsi_gradcam.io.zarr_stores import BoundedStore

        return BoundedStore(self.path, read_only=read_only)

    def wrap_write_errors(self) -> AbstractContextManager[None]:
        return wrap_write_errors(self.path)

    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}{PARTIAL}")

    @contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        """Provide a temporary file next to this one, containing `data`."""
        partial = self._partial()
        with wrap_write_errors(self.path):
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(data)
                yield partial
            finally:
                partial.unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold an exclusive lock on the folder, as far as the system and the file system support locks."""
        with wrap_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(self.path.parent / LOCK, LOCKING, 0o666), "wb")
        with file:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield


def append_line(path: Path, line: bytes) -> None:
    """Append a line that ends in a line break, completely or not at all, and return once it is on the disk.

    Raises:
        OSError: the file cannot be written.
    """
    is_new = not path.exists()
    file = os.open(path, LOCKING | os.O_APPEND, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line  # after a line that was cut short
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
    if is_new:
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Flush the name of a new file to the disk, as far as the system can."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_regular(path: Path) -> os.stat_result:
    """Return a file's status without opening it: opening a pipe means waiting for its writer, perhaps for ever.

    Raises:
        OSError: it does not exist, or is a folder, pipe, socket or device.
    """
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, not a regular file", str(path))
    return found


def read_file(path: Path, most: int | None = None) -> bytes:
    """Return the contents of a regular file, of at most `most` bytes; errors as for `check_regular`."""
    size = check_regular(path).st_size
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB", str(path))
    return path.read_bytes()


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error while writing below `path` into a `StoreError` that gives the remedy."""
    try:
        yield
    except WsiGradcamError:
        raise
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, f"{error.strerror or error}; check the storage and run again")
        raise StoreError(f"{path}: cannot write: {mend}") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically: readers see all of it or the file as it was before.

    Raises:
        StoreError: the file system refuses.
    """
    with wrap_write_errors(path):
        for left in reversed(range(ATTEMPTS)):
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(data)
                os.replace(partial, path)  # noqa: PTH105 - the atomic one on every platform
            except FileNotFoundError:  # a run that has just begun has removed it as that of a killed process
                if not left:
                    raise
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            else:
                return


def remove_partial_files(folder: Path, recursive: bool = True) -> None:
    """Delete half-written files of killed processes, ours and zarr's, in `folder`, and below if `recursive`."""
    pattern = f"*.{'[0-9a-f]' * 32}{PARTIAL}"
    for path in folder.rglob(pattern) if recursive else folder.glob(pattern):
        if not path.is_dir():  # a slide may be named so
            path.unlink(missing_ok=True)


@contextmanager
def _wrap_read_errors(path: Path) -> Iterator[None]:
    """Turn an operating system error while reading into a `StoreError`, unless the file does not exist."""
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
    return any(not all(map(_is_internal, files)) for _, _, files in os.walk(folder) if files)


def _is_internal(name: str) -> bool:
    """Return whether a name is that of a lock or of a half-written file."""
    return name == LOCK or _PARTIAL_NAME.search(name) is not None


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def alike(folder: Path, name: str) -> list[Path]:
    """Return the files or folders in `folder`, or below it, whose path is `name`.

    If there is none, return those whose path differs only in its Unicode normalisation form: macOS and archives change
    it.
    """
    if os.path.lexists(folder / name):
        return [folder / name]
    if name.isascii():
        return []
    places = [folder]
    for part in Path(name).parts:
        places = [inner for place in places for inner in _named(place, part)]
    return places


def _named(folder: Path, name: str) -> list[Path]:
    try:
        return [folder / each for each in _by_form(folder, folder.stat().st_mtime_ns).get(canonical(name), ())]
    except OSError:  # no folder, or one that cannot be read
        return []


@lru_cache(maxsize=64)
def _by_form(folder: Path, changed: int) -> dict[str, list[str]]:
    """Return the names in a folder, last changed at that time, by their normalised forms."""
    found: dict[str, list[str]] = {}
    for name in sorted(place.name for place in folder.iterdir()):
        found.setdefault(canonical(name), []).append(name)
    return found
