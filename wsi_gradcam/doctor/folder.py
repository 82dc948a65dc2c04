"""Checks of the folder of the results: what a run does there is done once, and undone."""

from __future__ import annotations

import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wsi_gradcam.doctor.environment import FAIL, OK, WARN, Check
from wsi_gradcam.errors import StoreError, one_line
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.io.paths import StoragePath

GIB = 1 << 30
LITTLE_FREE = 10 * GIB
FEW_FILES = 100_000


@contextmanager
def probe_place(out: StoragePath) -> Iterator[StoragePath]:
    """A folder of our own in `out`; afterwards all is as it was.

    Raises:
        StoreError: it cannot be made.
    """
    if isinstance(out, LocalPath):
        with _probe_folder(out.path) as probe:
            yield LocalPath(probe)
        return
    place = out / f".doctor-{uuid.uuid4().hex}"
    try:
        yield place
    finally:
        with suppress(StoreError):
            place.remove_tree()


@contextmanager
def _probe_folder(out: Path) -> Iterator[Path]:
    from wsi_gradcam.io.local import wrap_write_errors

    probe = out.absolute() / f".doctor-{uuid.uuid4().hex}"
    missing = [folder for folder in (out.absolute(), *out.absolute().parents) if not folder.exists()]
    try:
        with wrap_write_errors(out):
            probe.mkdir(parents=True)
        yield probe
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def folder_of_results(out: StoragePath) -> Iterator[Check]:
    """Whether `out` takes what a run writes, and how."""
    try:
        with probe_place(out) as probe:
            yield _array(probe)
            if isinstance(probe, LocalPath):
                yield _rename(probe.path)
                yield _locks(probe.path)
                yield _space(probe.path)
            yield _claims(probe)
    except StoreError as error:
        yield Check("OUT", FAIL, one_line(error), "the same --out would stop a run")


def _array(folder: StoragePath) -> Check:
    """A patch store of one span is written and read back."""
    import numpy as np

    from wsi_gradcam.results.patch_store import PatchStore, SpanData
    from wsi_gradcam.tissue.grid import Patches

    values = np.linspace(-1, 1, 4 * 2 * 7 * 7, dtype=np.float32).reshape(4, 2, 7, 7)
    span = SpanData(values[:, :, 0, 0], values, np.ones(4, np.uint8), values[:, 0, 0, 0])
    whole = np.ones(4, np.float32)
    store = PatchStore.create(
        folder / "cams.zarr", Patches(np.zeros((4, 2), np.int64), whole, whole, whole), 4, 2, 2, (7, 7), {}
    )
    store.write_span(0, span)
    if PatchStore(folder / "cams.zarr").read_span(0, 4).digest() != span.digest():
        return Check("OUT: arrays", FAIL, "what was read is not what was written", "choose another --out")
    return Check("OUT: arrays", OK, "written and read back")


def _claims(folder: StoragePath) -> Check:
    """A file is made where there is none, and changed where nobody else has."""
    file = folder / "claim"
    seen = [file.create(b"one"), file.create(b"two")]
    _, version = file.read_versioned()
    seen += [file.replace(b"three", version), file.replace(b"four", version)]
    if (seen, file.read()) == ([True, False, True, False], b"three"):
        return Check("OUT: claims", OK, "a file is made once, and changed only by who knows it")
    mend = "choose another --out, for object stores one that knows If-None-Match and If-Match"
    return Check("OUT: claims", FAIL, "what another process has written would be written over", mend)


def _rename(folder: Path) -> Check:
    """A file is replaced while it is open: who opened it before reads the old one, who opens it now the new."""
    from wsi_gradcam.io.local import write_atomic

    path = folder / "renamed"
    write_atomic(path, b"old")
    with path.open("rb") as before:
        write_atomic(path, b"new")
        seen = before.read(), path.read_bytes()
    if seen == (b"old", b"new"):
        return Check("OUT: rename", OK, "a file was replaced by renaming while it was open")
    mend = "readers may meet half a file; choose a file system with POSIX renames"
    return Check("OUT: rename", WARN, f"after replacing an open file by renaming, readers see {seen}", mend)


def _locks(folder: Path) -> Check:
    """A file is locked (flock), and must not be locked a second time meanwhile."""
    mend = "never have two runs on this --out at a time: their rows of slides.csv could be lost"
    try:
        import fcntl

        with (folder / "lock").open("w") as first, (folder / "lock").open("w") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Check("OUT: locks", OK, "a file locked once is not locked twice (tested on this machine alone)")
        return Check("OUT: locks", WARN, "a file could be locked twice", mend)
    except (ImportError, OSError) as error:
        return Check("OUT: locks", WARN, f"no locks: {one_line(error)}", mend)


def _space(folder: Path) -> Check:
    """Bytes and files that are left; some file systems do not tell the latter."""
    free = shutil.disk_usage(folder).free
    found, few = f"{free / GIB:.1f} GiB free", False
    if sys.platform != "win32":
        told = os.statvfs(folder)
        found += f", {told.f_favail:,} more files" if told.f_files else ""
        few = bool(told.f_files) and told.f_favail < FEW_FILES
    if free < LITTLE_FREE or few:
        return Check("OUT: space", WARN, found, "'wsi-gradcam explain --dry-run' prints what a run will take")
    return Check("OUT: space", OK, found)
