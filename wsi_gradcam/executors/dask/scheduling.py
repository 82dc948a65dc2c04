"""Scheduling slides on Dask: a bounded number of batches in flight, the oldest slides first."""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from functools import partial
from typing import Any

from distributed import Client, Future
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker, NoValidWorkerError

from wsi_gradcam.errors import AGAIN, SlideMemoryError, WorkerError, one_line
from wsi_gradcam.executors.dask.batching import (
    ALONE,
    BATCHES_PER_SLOT,
    MODEL,
    PLANNING,
    Backlogs,
    CrashTrials,
    Rates,
    RemainingWork,
    RunningSlide,
    SentBatch,
    kind_of,
)
from wsi_gradcam.executors.dask.plugins import BatchResult, TaskBatch, perform_batch, stop_here
from wsi_gradcam.executors.dask.workers import LOST, MissingWorkerTimer, Workers
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.run.failures import PAUSES_S, log_retry
from wsi_gradcam.run.types import FatalError, Observer, Performed, SlideRecord, Task, Workload
from wsi_gradcam.run.workload import PLAN
from wsi_gradcam.system.isolation import GRACE_S, POLL_S, STOP

WORKERS_POLLED_S = 2.0
FETCH_S = 10.0  # time to wait for results whose workers may be gone


class ResultCollector:
    """Waits for futures, and fetches the results of all finished ones in one request.

    A separate request for each costs 3 ms, which is too much for a GPU cluster.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._lost: list[Future[Any]] = []

    def watch(self, future: Future[Any]) -> None:
        """Collect the result of a future once it is done."""
        future.add_done_callback(self._done.put)

    def collect(self, wait_s: float) -> list[tuple[Future[Any], BatchResult | BaseException]]:
        """Return the futures that are done, with their result or Dask's error; waits a while for the first."""
        collected: list[tuple[Future[Any], BatchResult | BaseException]] = []
        finished = []
        arrived, self._lost = self._lost + self._arrived(wait_s), []
        for future in arrived:
            if future.status == "finished":
                finished.append(future)
            elif future.status == "error":
                collected.append((future, future.exception()))
            elif future.status == "pending":
                self.watch(future)
            elif future.status == "lost":  # with its worker; it is computed again, and Dask calls it done meanwhile
                self._lost.append(future)
            else:
                collected.append((future, CancelledError(future.key)))
        return collected + self._fetched(finished)

    def _arrived(self, wait_s: float) -> list[Future[Any]]:
        arrived: list[Future[Any]] = []
        with suppress(queue.Empty):
            arrived.append(self._done.get(timeout=wait_s))
            while True:
                arrived.append(self._done.get_nowait())
        return arrived

    def _fetched(self, futures: list[Future[Any]]) -> list[tuple[Future[Any], BatchResult | BaseException]]:
        """Return results; futures whose result is not available now are watched again."""
        gather = partial(self._client.gather, asynchronous=True)
        found: dict[int, BatchResult | None] = {}
        if futures:
            with suppress(TimeoutError):
                found = self._client.sync(gather, dict(enumerate(futures)), errors="skip", callback_timeout=FETCH_S)
        results: list[tuple[Future[Any], BatchResult | BaseException]] = []
        for number, future in enumerate(futures):
            result = found.get(number)
            if result is None:
                self.watch(future)
            else:
                results.append((future, result))
        return results


def _lost(reason: str) -> FatalError:
    """Return the error for a run that cannot continue, through no fault of its own."""
    return FatalError(WorkerError(f"{reason} and {AGAIN}"))


def _failed_attempt(error: BaseException, worker: str = "", again: bool = False) -> Performed:
    """Return an attempt that failed."""
    text = "the worker that was processing it died" if isinstance(error, KilledWorker) else one_line(error)
    return Performed(None, worker=worker, error=text, again=again)


def _helpful(error: BaseException, task: Task, lost: str = "") -> BaseException:
    """Return a task's error, or in place of Dask's error one that says how to fix it; `lost` is why a GPU failed."""
    if isinstance(error, KilledWorker) and lost:
        return WorkerError(
            f"{task.slide.path}: the GPU failed in one worker after another on '{task}' alone ({lost}); check the "
            f"system messages (nvidia-smi, dmesg), and {AGAIN}"
        )
    if isinstance(error, KilledWorker):
        return SlideMemoryError(
            f"{task.slide.path}: workers died repeatedly on '{task}' alone, usually for lack of memory; give workers "
            "more memory, or lower --batch-size"
        )
    if isinstance(error, NoValidWorkerError):
        return WorkerError(f"no worker can run the task: {error}")
    if isinstance(error, MemoryError):
        return SlideMemoryError(
            f"{task.slide.path}: not enough memory on a worker; give it more, or lower --batch-size"
        )
    return error


class SlideScheduler:
    """Keeps a bounded number of batches in flight, the oldest slides first.

    Slides are planned ahead only as long as the limits allow it: none is begun that could not be processed, so that
    slides finish in the order in which they began, and an archive of any size takes the same memory here.

    If the model needs a resource, each of its batches asks for the worker that will be free first, provided that
    `hints` are understood (by the run's `RunSchedulerPlugin`). Dask keeps other batches until a worker is free.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        workload: Workload,
        observe: Observer,
        workers: Callable[[], Workers],
        timer: MissingWorkerTimer,
        hints: bool = True,
    ) -> None:
        self._client, self._name = client, name
        self._workload, self._observe = workload, observe
        self._ask_workers, self._missing_timer, self._hints = workers, timer, hints
        self._workers, self._looked = workers(), time.monotonic()
        self._collector = ResultCollector(client)
        self._rates = Rates()
        self._active: list[RunningSlide] = []
        self._later: list[tuple[float, SentBatch]] = []
        self._crash_trials, self._backlogs = CrashTrials(), Backlogs()
        client.subscribe_topic(name, self._crash_trials.record)
        self._sent: dict[Future[Any], SentBatch] = {}
        self._out: Counter[str] = Counter()
        self._finished: deque[SlideRecord] = deque()
        self._more = True
        self._remaining = RemainingWork(self._rates, ())

    def run(self, slides: Iterable[SlideEntry]) -> Iterator[SlideRecord]:
        """Yield records as slides finish.

        Raises:
            FatalError: the run cannot go on.
        """
        left, self._remaining = enumerate(slides), RemainingWork(self._rates, slides)
        try:
            while self._active or self._more:
                if STOP.requested():
                    yield from self._stop()
                self._fill(left)
                self._collect()
                yield from self._drain()
        except (CancelledError, CommClosedError, ClosedClientError) as error:
            raise _lost(LOST) from error
        finally:
            if self._client.status == "running":
                self._client.cancel(list(self._sent))
                self._client.unsubscribe_topic(self._name)

    def _fill(self, left: Iterator[tuple[int, SlideEntry]]) -> None:
        """Send the tasks that may be sent, in the order of slides, and begin slides as long as the limits allow it."""
        now = time.monotonic()
        due, self._later = [s for at, s in self._later if at <= now], [(at, s) for at, s in self._later if at > now]
        for again in due:
            self._send(again)
        while self._crash_trials.waiting and self._out[ALONE] < max(1, len(self._workers.addresses) // 4):
            self._send(self._crash_trials.waiting.popleft())
        limits = self._remaining.limits(self._active, self._workers.slots)
        waiting = 0
        for running in list(self._active):
            while (stage := running.next_stage) and self._out[kind_of(stage)] < limits.batches.of(stage.needs_model):
                self._send(running.next_batch(self._rates, limits.seconds.of(stage.needs_model)))
            waiting += running.waiting_for_model
        # More than can be planned at once: waiting plans take precedence over finishing slides.
        most, begun = BATCHES_PER_SLOT * max(1, self._workers.slots.other), self._out[PLANNING]
        while self._out[PLANNING] < most and self._out[MODEL] + waiting + begun < limits.ahead:
            if not self._begin(left):
                break
            begun += 1

    def _begin(self, left: Iterator[tuple[int, SlideEntry]]) -> bool:
        """Begin the next slide; return whether there was one."""
        entry = next(left, None)
        if entry is None:
            self._more = False
            self._remaining.no_more_slides()
            return False
        self._remaining.slide_begun()
        number, slide = entry
        running = RunningSlide(self._workload.job(slide), number)
        self._active.append(running)
        running.begin()
        self._send(running.next_batch(self._rates, 0.0))
        return True

    def _send(self, sent: SentBatch) -> None:
        running, stage = sent.running, sent.tasks[0].stage
        if running.error is not None:  # it has failed in the meantime
            self._leave(running, len(sent.tasks))
            return
        # Plans are ready when they are needed; a slide that began first is finished first.
        future = self._client.submit(
            perform_batch,
            TaskBatch(self._name, sent.tasks, sent.alone),
            key=self._key(sent),
            pure=False,
            priority=1 if stage == PLAN else -running.number,
            resources=self._workers.needs.of(sent.needs_model),
            workers=self._hint(sent),
        )
        self._sent[future] = sent
        self._out[sent.kind] += 1
        self._remaining.sent(sent.tasks)
        self._collector.watch(future)

    def _hint(self, sent: SentBatch) -> list[str] | None:
        """Return the worker that a batch asks for, if one is better than the others; it may still go elsewhere."""
        able = self._workers.able.of(sent.needs_model)
        others = {address: slots for address, slots in able.items() if address != sent.avoid}
        is_dealt = sent.needs_model and bool(self._workers.needs.model)
        if not self._hints or not others or not (is_dealt or sent.avoid):
            return None
        worker = self._backlogs.soonest(others)
        self._backlogs.add(self._key(sent), worker, self._rates.of(sent.tasks))
        return [worker]

    def _collect(self) -> None:
        """Wait for a moment, take the results that have arrived, and check that there are workers for the rest."""
        for future, result in self._collector.collect(POLL_S):
            if isinstance(result, CancelledError) and future in self._sent:
                raise result
            if (sent := self._forget(future)) is not None:
                self._take(sent, result)
        if time.monotonic() - self._looked < WORKERS_POLLED_S:
            return
        if self._client.status != "running":
            raise _lost(LOST)
        try:
            before, self._workers, self._looked = self._workers, self._ask_workers(), time.monotonic()
            if before.needs.other and not self._workers.needs.other:
                self._send_anew()
            self._missing_timer.check(self._workers.missing)
        except WorkerError as error:
            raise FatalError(error) from error

    def _forget(self, future: Future[Any]) -> SentBatch | None:
        """Return the batch of a future, which is no longer in flight; None if it was sent again."""
        sent = self._sent.pop(future, None)
        if sent is not None:
            self._out[sent.kind] -= 1
            self._backlogs.remove(self._key(sent))
            self._remaining.returned(sent.tasks)
        return sent

    def _send_anew(self) -> None:
        """Send batches for workers that declare CPU, if none of these is left, to the others."""
        futures = [future for future, sent in self._sent.items() if not sent.needs_model]
        anew = [sent for future in futures if (sent := self._forget(future)) is not None]
        self._client.cancel(futures)
        for sent in anew:
            self._send(sent.rest(0))

    def _take(self, sent: SentBatch, result: BatchResult | BaseException) -> None:
        """Take the result of a batch, or Dask's error instead."""
        if isinstance(result, KilledWorker) and not self._crash_trials.is_culprit(sent, self._key(sent)):
            self._observe(sent.tasks[0], _failed_attempt(result, again=True))
            return
        if not isinstance(result, BatchResult):
            self._failed(sent, result)
            return
        running, done = sent.running, len(result.results)
        for position, task, performed in zip(sent.positions, sent.tasks, result.results, strict=False):
            self._done(running, position, task, performed)
        if done == len(sent.tasks):
            self._leave(running, done)
        elif result.error is None:  # the worker begins nothing more
            if not STOP.requested():
                raise _lost("workers have dropped the run, for example after a lost connection;")
        elif result.may_succeed and sent.attempt < len(PAUSES_S):
            log_retry(sent.tasks[done], result.error, sent.attempt)
            self._observe(sent.tasks[done], _failed_attempt(result.error, result.worker, again=True))
            running.out -= done
            attempt = 0 if done else sent.attempt
            again = sent.rest(done, attempt=attempt + 1, avoid=result.worker)
            self._later.append((time.monotonic() + PAUSES_S[attempt], again))
        else:
            running.out -= done
            self._failed(sent.rest(done), result.error)

    def _key(self, sent: SentBatch) -> str:
        return f"wsi-{sent.tasks[0].stage.name}-{self._name}-{sent.running.number}-{sent.number}"

    def _done(self, running: RunningSlide, position: int, task: Task, performed: Performed) -> None:
        running.results[position] = performed.result
        self._rates.learn(task.stage, performed.seconds)
        self._observe(task, performed)

    def _failed(self, sent: SentBatch, error: BaseException) -> None:
        self._observe(sent.tasks[0], _failed_attempt(error))
        sent.running.fail(_helpful(error, sent.tasks[0], self._crash_trials.lost.get(self._key(sent), "")))
        self._leave(sent.running, len(sent.tasks))

    def _leave(self, running: RunningSlide, count: int) -> None:
        """Count tasks as no longer in flight; the job continues if they were the last."""
        running.returned(count)
        while running.ended:
            record = running.advance()
            if record is not None:
                self._active.remove(running)
                self._finished.append(record)
                return
            if not running.planned:
                running.planned = True
                self._remaining.slide_planned(running)

    def _stop(self) -> Iterator[SlideRecord]:
        """Let workers finish what they have begun, within a time limit, and end the run."""
        self._client.run(stop_here, self._name, wait=False, on_error="ignore")
        until = time.monotonic() + GRACE_S
        while self._sent and time.monotonic() < until:
            self._collect()
            yield from self._drain()
        raise FatalError(STOP.error())

    def _drain(self) -> Iterator[SlideRecord]:
        while self._finished:
            yield self._finished.popleft()
