"""Checks of a Dask cluster: its workers, and whether they have the versions, files and models of this process."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from wsi_gradcam.doctor.environment import (
    FAIL,
    OK,
    OPTIONAL,
    WARN,
    Check,
    Status,
    WorkerFacts,
    differences,
    facts,
    inspect_worker,
)
from wsi_gradcam.doctor.local import probe_place
from wsi_gradcam.errors import StoreError, WorkerError, one_line
from wsi_gradcam.io.paths import StoragePath

if TYPE_CHECKING:
    from wsi_gradcam.models.spec import ModelSpec

Workers = dict[str, WorkerFacts]
GIB = 1 << 30
MIN_MEMORY = 2 * GIB
MAX_LISTED = 5  # workers with the same problem
SAME = "install the same versions everywhere: pip install -c constraints.txt, or one image for all"


def check_workers(scheduler: str, out: StoragePath | None, spec: ModelSpec | None) -> Iterator[Check]:
    """Check the workers of a scheduler, also with the folder of the results and a model."""
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
    """Write a file with `token` in `out`; None where `out` cannot be written, which its own checks report."""
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
        mend = "start workers with --nthreads 2: one thread has patches read while the model works for the other"
        yield Check("workers", WARN, "some have one thread only", mend)
    small = {address: f"{limit / GIB:.1f} GiB" for address, limit in limits.items() if limit < MIN_MEMORY}
    if small:
        mend = "a worker that Dask pauses for memory may wait for ever: give it more, or --memory-limit 0"
        yield _problem("workers' memory", WARN, small, mend)


def _versions(workers: Workers) -> Check:
    here = facts()
    other = {address: found for address, worker in workers.items() if (found := differences(here, worker))}
    if not other:
        return Check("workers' versions", OK, f"equal to this program's on all {len(workers)}")
    serious = any(name not in OPTIONAL for found in other.values() for name in found)
    texts = {
        address: ", ".join(f"{name} {there} (here {ours})" for name, (ours, there) in found.items())
        for address, found in other.items()
    }
    return _problem("workers' versions", FAIL if serious else WARN, texts, SAME)


def _gpus(info: dict[str, Any], workers: Workers) -> Check:
    bare = {
        address: "has resource GPU, and torch finds none"
        for address, worker in workers.items()
        if info[address]["resources"].get("GPU") and not worker["devices"]
    }
    if bare:
        return _problem("workers' GPUs", WARN, bare, "see that jobs ask for a GPU, and that torch there knows CUDA")
    devices = sorted({device for worker in workers.values() for device in worker["devices"]})
    return Check("workers' GPUs", OK, ", ".join(devices) or "none; the model runs on CPUs")


def _model(workers: Workers, name: str) -> Check:
    lost = {address: worker["model"] for address, worker in workers.items() if worker["model"]}
    if lost:
        return _problem("workers' model", FAIL, lost, "its files must be at the same path on every worker")
    return Check("workers' model", OK, f"{name} loads on all {len(workers)}")


def _shared(out: StoragePath, workers: Workers, written: int) -> Check:
    """Check that each worker has read what this process wrote in `out`, and this process sees what each wrote."""
    mend = f"{out.absolute()} must be a shared folder, at the same path on every worker, or a bucket, for all to write"
    blind = {address: worker["out"] for address, worker in workers.items() if worker["out"]}
    if blind:
        return _problem("workers' OUT", FAIL, blind, mend)
    processes = len({(worker["host"], worker["pid"]) for worker in workers.values()})
    if written < processes:
        return Check("workers' OUT", FAIL, f"files of {processes - written} workers are not seen here", mend)
    return Check("workers' OUT", OK, f"read and written by all {len(workers)}")


def _problem(name: str, status: Status, by_worker: dict[str, str], mend: str) -> Check:
    """Return a check that some workers do not pass."""
    shown = [f"{address}: {problem}" for address, problem in list(by_worker.items())[:MAX_LISTED]]
    more = [f"and {len(by_worker) - MAX_LISTED} more"] if len(by_worker) > MAX_LISTED else []
    return Check(name, status, "; ".join(shown + more), mend)
