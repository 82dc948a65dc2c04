"""Writing files so that a killed process leaves either the old or the new one, and disk errors say what to do."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsi_gradcam.errors import StoreError, WsiGradcamError

TRIES = 3
PARTIAL = ".partial"  # also the ending of zarr's own unfinished files

_MENDS = {
    errno.ENOSPC: "the disk is full; free space and run the same command again, nothing finished is lost",
    errno.EDQUOT: "the disk quota is used up; free space and run the same command again, nothing finished is lost",
    errno.EROFS: "the file system is read-only; choose another --out",
    errno.EACCES: "no permission to write there; choose another --out or change the permissions",
    errno.EPERM: "no permission to write there; choose another --out or change the permissions",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another --out",
    errno.EEXIST: "a file stands where a folder is needed; choose another --out",
}


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns an operating system's error while writing below `path` into a `StoreError` that says the mend."""
    try:
        yield
    except WsiGradcamError:
        raise
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, f"{error.strerror or error}; check the storage and run again")
        raise StoreError(f"{path}: cannot write: {mend}") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: readers see all of it or the file as it was.

    Raises:
        StoreError: the file system refuses.
    """
    with storing(path):
        for left in reversed(range(TRIES)):
            partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial.write_bytes(data)
                os.replace(partial, path)  # noqa: PTH105 - the atomic one on every platform
            except FileNotFoundError:  # a run that began just now took it for what a killed process has left
                if not left:
                    raise
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            else:
                return


def remove_partials(folder: Path, below: bool = True) -> None:
    """Delete what killed processes left half-written in `folder`, and below: files that end as ours and zarr's do."""
    pattern = f"*.{'[0-9a-f]' * 32}{PARTIAL}"
    for path in folder.rglob(pattern) if below else folder.glob(pattern):
        path.unlink(missing_ok=True)
