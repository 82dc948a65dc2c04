"""Checks of this process (packages, devices, codecs), of the folder for the results, and of a Dask cluster's workers.

Workers should have the same versions, files and models as this process.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsi_gradcam.doctor import (
    FAIL,
    OK,
    OPTIONAL,
    PACKAGES,
    PROGRAM,
    WARN,
    Check,
    Status,
    WorkerFacts,
    differences,
    facts,
    gpus,
    inspect_worker,
    loading_problem,
    low_precision,
    required_of,
    run_check,
    version_of,
)
from wsi_gradcam.errors import StoreError, WorkerError, from_extra, one_line
from wsi_gradcam.io.local import LocalPath
from wsi_gradcam.io.paths import StoragePath, storage_path
from wsi_gradcam.system.processes import cores

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from wsi_gradcam.doctor import AnySpec

GIB = 1 << 30
MIN_FREE = 10 * GIB
MIN_FILES = 100_000
# The codecs of tiles in TIFF slides, and the largest error of a decoded value.
CODECS = {"jpeg": 12, "jpeg2000": 12, "lzw": 0, "adobe_deflate": 0, "zstd": 0}
NVIDIA = Path("/proc/driver/nvidia/version")
Workers = dict[str, WorkerFacts]
MIN_MEMORY = 2 * GIB
MAX_LISTED = 5  # workers with the same problem
SAME = "install the same versions everywhere: pip install -c constraints.txt, or one image for all"


def examine(
    out: str | None = None, scheduler: str | None = None, model: str | None = None, *, trust_code: bool = False
) -> Iterator[Check]:
    """Return an iterator over the checks, each made when it is reached; an exception is a check that failed.

    Args:
        out: folder for the results, also tried from the workers; it need not exist, and is left as it was.
        scheduler: address of a Dask scheduler, whose workers are checked.
        model: a model as for `explain`, which is loaded here, and on each worker.
        trust_code: allow the code in the model to run.

    Raises:
        ConfigError: `out` is neither a folder nor s3://BUCKET/KEY.
        ModelError: no such model, or one whose loading runs code that is not allowed.
    """
    folder = None if out is None else storage_path(out)
    spec = None if model is None else _spec(model, trust_code)
    return _examine(folder, scheduler, spec)


def _examine(out: StoragePath | None, scheduler: str | None, spec: AnySpec | None) -> Iterator[Check]:
    yield from check_machine()
    if spec is not None:
        problem = loading_problem(spec)
        page = "docs/slide_level.md" if hasattr(spec, "aggregator") else "docs/models.md"
        good, bad = Check("model", OK, f"{spec.name} loads"), Check("model", FAIL, problem, f"see {page}")
        yield bad if problem else good
    if out is not None:
        yield from run_check("OUT", check_folder, out)
    if scheduler is not None:
        yield from run_check("scheduler", check_workers, scheduler, out, spec)


def _spec(model: str, trust_code: bool) -> AnySpec:
    from wsi_gradcam.mil.spec import is_slide_model, read_slide_model
    from wsi_gradcam.models.spec import read_spec

    if is_slide_model(model):
        of_slides = read_slide_model(model).trusting(trust_code)
        of_slides.check_trusted()
        if of_slides.encoder is not None:
            of_slides.encoder.check_trusted()
        return of_slides.resolved()
    spec = read_spec(model).trusting(trust_code)
    spec.check_trusted()
    return spec.model_copy(update={"folder": spec.folder.absolute()})  # workers may run in another folder


def check_machine() -> Iterator[Check]:
    """Check the installation and the devices of this process."""
    yield from run_check("Python", _python)
    for name in (*PACKAGES, *OPTIONAL):
        yield from run_check(name, _package, name)
    yield from run_check("CPU", _cpu)
    yield from run_check("GPU", _gpu)
    for codec in CODECS:
        yield from run_check(f"codec {codec}", _codec, codec)
    yield from run_check("OpenSlide", _openslide)
    yield from run_check("engine choices", _choices)


def _python() -> Iterator[Check]:
    required = required_of("python")
    fits = platform.python_version() in required
    mend = "" if fits else f"create an environment with Python {required}"
    yield Check(
        "Python",
        OK if fits else FAIL,
        f"{platform.python_version()}, {PROGRAM} {version_of(PROGRAM)}, {platform.platform()}",
        mend,
    )


def _package(name: str) -> Iterator[Check]:
    found, required = version_of(name), required_of(name)
    wanted = f"pip install '{name}{required}'"
    if found is None and name in OPTIONAL:
        extra, needed_for = OPTIONAL[name]
        yield Check(name, OK, f"not installed; {needed_for}", f"pip install '{PROGRAM}[{extra}]', if you want it")
    elif found is None:
        yield Check(name, FAIL, "not installed", wanted)
    elif found not in required:
        yield Check(name, FAIL, f"{found}, expected {required}", wanted)
    else:
        yield Check(name, OK, found)


def _cpu() -> Iterator[Check]:
    import torch

    able = ", ".join(low_precision()) or "no bfloat16 or AMX: --precision bfloat16 is no faster"
    found = f"{cores()} cores, torch uses {torch.get_num_threads()} threads, {able}"
    if torch.get_num_threads() > cores():
        yield Check("CPU", WARN, found, f"more threads than cores are slow: --torch-threads {cores()}")
    else:
        yield Check("CPU", OK, found)


def _gpu() -> Iterator[Check]:
    import torch

    found, remarks = gpus()
    for name, size, bfloat16 in found:
        memory = f", {size / GIB:.1f} GiB" if size else ""
        yield Check("GPU", OK, f"{name}{memory}, bfloat16: {'yes' if bfloat16 else 'no'}")
    if not found and NVIDIA.exists():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        mend = "install a torch that matches the driver, or make sure that the job has a GPU (CUDA_VISIBLE_DEVICES)"
        yield Check(
            "GPU", WARN, f"there is an NVIDIA driver, but torch finds no GPU; {built}. {remarks}".rstrip(". "), mend
        )
    elif not found:
        yield Check("GPU", OK, "none; the model runs on the CPU")


def _codec(codec: str) -> Iterator[Check]:
    import numpy as np
    import tifffile

    tile = _smooth_tile()
    decoded = tifffile.imread(BytesIO(_tiff(tile, codec)))
    error = int(np.abs(decoded.astype(int) - tile).max())
    if error > CODECS[codec]:
        mend = "pip install --force-reinstall imagecodecs"
        yield Check(f"codec {codec}", FAIL, f"decoded values are off by up to {error} from the true values", mend)
    else:
        yield Check(f"codec {codec}", OK, "a tile was decoded")


def _smooth_tile() -> NDArray[np.uint8]:
    """Return an RGB image, uint8 [64, 64, 3], that every codec can encode well."""
    import numpy as np

    y, x = np.mgrid[:64, :64].astype(np.uint8) * np.uint8(3)
    return np.stack([y, x, y // 2 + x // 2], axis=2)


def _tiff(tile: NDArray[np.uint8], codec: str) -> bytes:
    import tifffile

    file = BytesIO()
    level = {"jpeg": 95}.get(codec)
    with tifffile.TiffWriter(file) as writer:
        writer.write(
            tile,
            tile=tile.shape[:2],
            photometric="rgb",
            compression=codec,
            metadata=None,
            compressionargs=None if level is None else {"level": level},
        )
    return file.getvalue()


def _openslide() -> Iterator[Check]:
    """Check that OpenSlide opens and decodes a slide."""
    import numpy as np

    from wsi_gradcam.geometry import Region
    from wsi_gradcam.slides import open_slide
    from wsi_gradcam.slides.openslide_reader import library_version

    tile = _smooth_tile()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tile.tif")
        path.write_bytes(_tiff(tile, "jpeg"))
        slide = open_slide(path, mpp=0.5, reader="openslide")
        try:
            error = int(np.abs(slide.read_level(0, Region(0, 0, *tile.shape[:2])).astype(int) - tile).max())
        finally:
            slide.close()
    mend = "pip install --force-reinstall openslide-bin"
    found = f"library {library_version()}, a slide was read"
    yield Check("OpenSlide", OK, found) if error <= CODECS["jpeg"] else Check("OpenSlide", FAIL, f"{found} wrong", mend)


def _choices() -> Iterator[Check]:
    """Check the folder that stores the choices of --engine auto."""
    from wsi_gradcam.cam.auto import cache_file
    from wsi_gradcam.io.local import write_atomic

    folder = cache_file().parent
    probe = folder / f"doctor-{uuid.uuid4().hex}"
    try:
        write_atomic(probe, b"")
        probe.unlink()
    except OSError as error:
        mend = "set XDG_CACHE_HOME to a writable folder; otherwise --engine auto may choose differently in each run"
        yield Check("engine choices", WARN, one_line(error), mend)
    else:
        yield Check("engine choices", OK, str(folder))


@contextmanager
def probe_place(out: StoragePath) -> Iterator[StoragePath]:
    """Make a temporary folder in `out`; afterwards `out` is as it was before.

    Raises:
        StoreError: the folder cannot be made.
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


def check_folder(out: StoragePath) -> Iterator[Check]:
    """Check that everything a run does in `out` works there; all of it is undone."""
    try:
        with probe_place(out) as probe:
            yield _array(probe)
            if isinstance(probe, LocalPath):
                yield _rename(probe.path)
                yield _locks(probe.path)
                yield _space(probe.path)
            yield _claims(probe)
    except StoreError as error:
        yield Check("OUT", FAIL, one_line(error), "a run with this --out would stop")


def _array(folder: StoragePath) -> Check:
    """Check that a patch store is read back as it was written."""
    import numpy as np

    from wsi_gradcam.results.patch_store import PatchStore, SpanData
    from wsi_gradcam.tissue import Patches

    values = np.linspace(-1, 1, 4 * 2 * 7 * 7, dtype=np.float32).reshape(4, 2, 7, 7)
    span = SpanData(values[:, :, 0, 0], values, np.ones(4, np.uint8), values[:, 0, 0, 0])
    whole = np.ones(4, np.float32)
    store = PatchStore.create(
        folder / "cams.zarr", Patches(np.zeros((4, 2), np.int64), whole, whole, whole), 4, 2, 2, (7, 7), {}
    )
    store.write_span(0, span)
    if PatchStore(folder / "cams.zarr").read_span(0, 4).digest() != span.digest():
        return Check("OUT: arrays", FAIL, "the data read differ from the data written", "choose another --out")
    return Check("OUT: arrays", OK, "written and read back")


def _claims(folder: StoragePath) -> Check:
    """Check that a file is created once, and replaced only if nobody else has replaced it."""
    file = folder / "claim"
    seen = [file.create(b"one"), file.create(b"two")]
    _, version = file.read_versioned()
    seen += [file.replace(b"three", version), file.replace(b"four", version)]
    if (seen, file.read()) == ([True, False, True, False], b"three"):
        return Check("OUT: claims", OK, "a file is created only once, and changed only with its current version")
    mend = "choose another --out; an object store must support If-None-Match and If-Match"
    return Check("OUT: claims", FAIL, "the output of another process would be overwritten", mend)


def _rename(folder: Path) -> Check:
    """Check that a file can be replaced while it is open: readers see the old or the new contents."""
    from wsi_gradcam.io.local import write_atomic

    path = folder / "renamed"
    write_atomic(path, b"old")
    with path.open("rb") as before:
        write_atomic(path, b"new")
        seen = before.read(), path.read_bytes()
    if seen == (b"old", b"new"):
        return Check("OUT: rename", OK, "a file was replaced by renaming while it was open")
    mend = "readers may see half-written files; choose a file system with POSIX renames"
    return Check("OUT: rename", WARN, f"after replacing an open file by renaming, readers see {seen}", mend)


def _locks(folder: Path) -> Check:
    """Check that a locked file (flock) cannot be locked a second time."""
    mend = "never start two runs on this --out at once: rows of slides.csv could be lost"
    try:
        import fcntl

        with (folder / "lock").open("w") as first, (folder / "lock").open("w") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Check("OUT: locks", OK, "a locked file cannot be locked again (tested on this machine only)")
        return Check("OUT: locks", WARN, "a file could be locked twice", mend)
    except (ImportError, OSError) as error:
        return Check("OUT: locks", WARN, f"no locks: {one_line(error)}", mend)


def _space(folder: Path) -> Check:
    """Check the free bytes and files; some file systems do not count the latter."""
    free = shutil.disk_usage(folder).free
    found, few = f"{free / GIB:.1f} GiB free", False
    if sys.platform != "win32":
        stats = os.statvfs(folder)
        found += f", room for {stats.f_favail:,} more files" if stats.f_files else ""
        few = bool(stats.f_files) and stats.f_favail < MIN_FILES
    if free < MIN_FREE or few:
        return Check("OUT: space", WARN, found, "'wsi-gradcam explain --dry-run' prints what a run will need")
    return Check("OUT: space", OK, found)


def check_workers(scheduler: str, out: StoragePath | None, spec: AnySpec | None) -> Iterator[Check]:
    """Check the workers of a scheduler, also with the folder for the results and a model."""
    with from_extra("cluster", "--scheduler"):
        from wsi_gradcam.executors.dask import ask_workers

    token = uuid.uuid4().hex
    with _probe(out, token) as probe:
        try:
            info, answers = ask_workers(scheduler, inspect_worker, probe, token, spec)
        except WorkerError as error:
            yield Check("scheduler", FAIL, one_line(error), "docs/clusters.md says how to start one")
            return
        written = len(probe.parent.file_names()) - 1 if probe else 0
    yield Check("scheduler", OK, "answers")
    if not info:
        yield Check("workers", FAIL, "none", "start some, such as 'dask worker ADDRESS --nthreads 2 --memory-limit 0'")
        return
    yield from _resources(info)
    silent = {address: one_line(answer) for address, answer in answers.items() if isinstance(answer, BaseException)}
    if silent:
        yield _problem("workers' answers", FAIL, silent, SAME)
    facts_by_worker: Workers = {address: answer for address, answer in answers.items() if address not in silent}
    if facts_by_worker:
        yield _versions(facts_by_worker)
        yield _gpus(info, facts_by_worker)
        if spec is not None:
            yield _model(facts_by_worker, spec.name)
        if out is not None and probe is not None:
            yield _shared(out, facts_by_worker, written)


@contextmanager
def _probe(out: StoragePath | None, token: str) -> Iterator[StoragePath | None]:
    """Write a file with `token` in `out`; None if `out` cannot be written, which its own checks report."""
    with ExitStack() as opened:
        probe = None
        if out is not None:
            with suppress(StoreError):
                probe = opened.enter_context(probe_place(out)) / "probe"
                probe.write(token.encode())
        yield probe


def _resources(info: dict[str, Any]) -> Iterator[Check]:
    """Check threads, memory and resources of the workers, as the scheduler knows them."""
    threads = [worker["nthreads"] for worker in info.values()]
    limits = {address: worker["memory_limit"] for address, worker in info.items() if worker["memory_limit"]}
    gpus = [worker["resources"].get("GPU", 0) for worker in info.values()]
    memory = f"{min(limits.values()) / GIB:.1f} GiB or more each" if limits else "no memory limits"
    found = f"{len(info)} workers, {sum(threads)} threads, {memory}, resource GPU on {sum(map(bool, gpus))}"
    yield Check("workers", OK, found)
    if min(threads) < 2:
        mend = "start workers with --nthreads 2, so that one thread reads patches while the model works for the other"
        yield Check("workers", WARN, "some have only one thread", mend)
    small = {address: f"{limit / GIB:.1f} GiB" for address, limit in limits.items() if limit < MIN_MEMORY}
    if small:
        mend = "a worker that Dask pauses for memory may wait for ever; give it more memory, or use --memory-limit 0"
        yield _problem("workers' memory", WARN, small, mend)


def _versions(workers: Workers) -> Check:
    here = facts()
    other = {address: found for address, worker in workers.items() if (found := differences(here, worker))}
    if not other:
        return Check("workers' versions", OK, f"the same as here on all {len(workers)}")
    serious = any(name not in OPTIONAL for found in other.values() for name in found)
    texts = {
        address: ", ".join(f"{name} {there} (here {ours})" for name, (ours, there) in found.items())
        for address, found in other.items()
    }
    return _problem("workers' versions", FAIL if serious else WARN, texts, SAME)


def _gpus(info: dict[str, Any], workers: Workers) -> Check:
    bare = {
        address: "has resource GPU, but torch finds no GPU"
        for address, worker in workers.items()
        if info[address]["resources"].get("GPU") and not worker["devices"]
    }
    if bare:
        return _problem(
            "workers' GPUs", WARN, bare, "make sure that jobs request a GPU, and that its torch supports CUDA"
        )
    devices = sorted({device for worker in workers.values() for device in worker["devices"]})
    return Check("workers' GPUs", OK, ", ".join(devices) or "none; the model runs on CPUs")


def _model(workers: Workers, name: str) -> Check:
    lost = {address: worker["model"] for address, worker in workers.items() if worker["model"]}
    if lost:
        return _problem("workers' model", FAIL, lost, "put its files at the same path on every worker")
    return Check("workers' model", OK, f"{name} loads on all {len(workers)}")


def _shared(out: StoragePath, workers: Workers, written: int) -> Check:
    """Check that each worker has read what this process wrote in `out`, and this process sees what each wrote."""
    mend = (
        f"{out.absolute()} must be a shared folder at the same path on every worker, or a bucket; all must write to it"
    )
    blind = {address: worker["out"] for address, worker in workers.items() if worker["out"]}
    if blind:
        return _problem("workers' OUT", FAIL, blind, mend)
    processes = len({(worker["host"], worker["pid"]) for worker in workers.values()})
    if written < processes:
        return Check("workers' OUT", FAIL, f"files of {processes - written} workers cannot be seen here", mend)
    return Check("workers' OUT", OK, f"read and written by all {len(workers)}")


def _problem(name: str, status: Status, by_worker: dict[str, str], mend: str) -> Check:
    """Return a check that some workers did not pass."""
    shown = [f"{address}: {problem}" for address, problem in list(by_worker.items())[:MAX_LISTED]]
    more = [f"and {len(by_worker) - MAX_LISTED} more"] if len(by_worker) > MAX_LISTED else []
    return Check(name, status, "; ".join(shown + more), mend)
