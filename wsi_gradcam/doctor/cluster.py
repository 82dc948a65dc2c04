"""Checks of a Dask cluster: what its workers are, and whether they know what this process knows."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from wsi_gradcam.doctor.environment import FAIL, OK, OPTIONAL, WARN, Check, differences, facts, visit
from wsi_gradcam.doctor.folder import probe_place
from wsi_gradcam.errors import StoreError, WorkerError, one_line
from wsi_gradcam.io.paths import StoragePath

if TYPE_CHECKING:
    from wsi_gradcam.models.spec import ModelSpec

GIB = 1 << 30
LITTLE_MEMORY = 2 * GIB
SHOWN = 5  # of workers that have the same trouble
SAME = "install the same versions everywhere: pip install -c constraints.txt, or one image for all"


def workers(scheduler: str, out: StoragePath | None, spec: ModelSpec | None) -> Iterator[Check]:
    """What workers are, and whether they know what this process knows."""
    from wsi_gradcam.executors.dask import ask_workers

    token = uuid.uuid4().hex
    with _probe(out, token) as probe:
        try:
            told, answers = ask_workers(scheduler, visit, probe, token, spec)
        except WorkerError as error:
            yield Check("scheduler", FAIL, one_line(error), "docs/clusters.md says how to start one")
            return
        written = len(probe.parent.file_names()) - 1 if probe else 0
    yield Check("scheduler", OK, "answers")
    if not told:
        yield Check("workers", FAIL, "none", "start some, such as 'dask worker ADDRESS --nthreads 2 --memory-limit 0'")
        return
    yield from _resources(told)
    silent = {address: one_line(answer) for address, answer in answers.items() if isinstance(answer, BaseException)}
    if silent:
        yield _trouble("workers' answers", FAIL, silent, SAME)
    visits = {address: answer for address, answer in answers.items() if address not in silent}
    if visits:
        yield _versions(visits)
        yield _gpus(told, visits)
        if spec is not None:
            yield _model(visits, spec.name)
        if out is not None and probe is not None:
            yield _shared(out, visits, written)


@contextmanager
def _probe(out: StoragePath | None, token: str) -> Iterator[StoragePath | None]:
    """A file in `out` that holds `token`; None where `out` cannot be written, which its own checks tell."""
    with ExitStack() as opened:
        probe = None
        if out is not None:
            with suppress(StoreError):
                probe = opened.enter_context(probe_place(out)) / "probe"
                probe.write(token.encode())
        yield probe


def _resources(told: dict[str, Any]) -> Iterator[Check]:
    """Threads, memory and resources of workers, as the scheduler knows them."""
    threads = [worker["nthreads"] for worker in told.values()]
    limits = {address: worker["memory_limit"] for address, worker in told.items() if worker["memory_limit"]}
    gpus = [worker["resources"].get("GPU", 0) for worker in told.values()]
    memory = f"{min(limits.values()) / GIB:.1f} GiB or more each" if limits else "no memory limits"
    found = f"{len(told)} workers, {sum(threads)} threads, {memory}, resource GPU on {sum(map(bool, gpus))}"
    yield Check("workers", OK, found)
    if min(threads) < 2:
        mend = "start workers with --nthreads 2: one thread has patches read while the model works for the other"
        yield Check("workers", WARN, "some have one thread only", mend)
    small = {address: f"{limit / GIB:.1f} GiB" for address, limit in limits.items() if limit < LITTLE_MEMORY}
    if small:
        mend = "a worker that Dask pauses for memory may wait for ever: give it more, or --memory-limit 0"
        yield _trouble("workers' memory", WARN, small, mend)


def _versions(visits: dict[str, Any]) -> Check:
    here = facts()
    other = {address: found for address, visit in visits.items() if (found := differences(here, visit))}
    if not other:
        return Check("workers' versions", OK, f"equal to this program's on all {len(visits)}")
    serious = any(name not in OPTIONAL for found in other.values() for name in found)
    texts = {
        address: ", ".join(f"{name} {there} (here {ours})" for name, (ours, there) in found.items())
        for address, found in other.items()
    }
    return _trouble("workers' versions", FAIL if serious else WARN, texts, SAME)


def _gpus(told: dict[str, Any], visits: dict[str, Any]) -> Check:
    bare = {
        address: "has resource GPU, and torch finds none"
        for address, visit in visits.items()
        if told[address]["resources"].get("GPU") and not visit["devices"]
    }
    if bare:
        return _trouble("workers' GPUs", WARN, bare, "see that jobs ask for a GPU, and that torch there knows CUDA")
    devices = sorted({device for visit in visits.values() for device in visit["devices"]})
    return Check("workers' GPUs", OK, ", ".join(devices) or "none; the model runs on CPUs")


def _model(visits: dict[str, Any], name: str) -> Check:
    lost = {address: visit["model"] for address, visit in visits.items() if visit["model"]}
    if lost:
        return _trouble("workers' model", FAIL, lost, "its files must be at the same path on every worker")
    return Check("workers' model", OK, f"{name} loads on all {len(visits)}")


def _shared(out: StoragePath, visits: dict[str, Any], written: int) -> Check:
    """Whether each worker read what this process wrote in `out`, and this process sees what each wrote."""
    mend = f"{out.absolute()} must be a shared folder, at the same path on every worker, or a bucket, for all to write"
    blind = {address: visit["out"] for address, visit in visits.items() if visit["out"]}
    if blind:
        return _trouble("workers' OUT", FAIL, blind, mend)
    processes = len({(visit["host"], visit["pid"]) for visit in visits.values()})
    if written < processes:
        return Check("workers' OUT", FAIL, f"files of {processes - written} workers are not seen here", mend)
    return Check("workers' OUT", OK, f"read and written by all {len(visits)}")


def _trouble(name: str, status: str, by_worker: dict[str, str], mend: str) -> Check:
    """A check that some workers do not pass."""
    shown = [f"{address}: {problem}" for address, problem in list(by_worker.items())[:SHOWN]]
    more = [f"and {len(by_worker) - SHOWN} more"] if len(by_worker) > SHOWN else []
    return Check(name, status, "; ".join(shown + more), mend)
