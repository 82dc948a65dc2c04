"""Slides through Dask: a window of orders in flight, the oldest slides first."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from typing import Any

from distributed import Client, Future
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from wsi_gradcam.errors import WorkerError
from wsi_gradcam.executors.dask.batching import Backlogs, Outlook
from wsi_gradcam.executors.dask.failures import explained, failed, lost
from wsi_gradcam.executors.dask.orders import Mail
from wsi_gradcam.executors.dask.plugin import Answer, Order, stop_here
from wsi_gradcam.executors.dask.rates import Rates
from wsi_gradcam.executors.dask.running import MODEL, Running, Sent, kind_of
from wsi_gradcam.executors.dask.suspects import Suspects
from wsi_gradcam.executors.dask.workers import Patience, Workers
from wsi_gradcam.inputs.find import SlideEntry
from wsi_gradcam.run.failures import PAUSES_S, log_retry
from wsi_gradcam.run.types import FatalError, Observer, Performed, SlideRecord, Task, Workload
from wsi_gradcam.run.workload import PLAN
from wsi_gradcam.system.stopping import GRACE_S, POLL_S, STOP

LOOK_AT_WORKERS_S = 2.0


class Flow:
    """Keeps a window of orders in flight, the oldest slides first.

    Slides are planned ahead only as far as the window is not full: none is begun that could not be worked on, so that
    slides finish in the order in which they began, and an archive of any size takes the same memory here.

    Where the model wants a resource, each order of it asks for the worker that will be free first, if `hints` are
    understood (by the run's `Caretaker`). Other orders Dask keeps until a worker is free.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        workload: Workload,
        observe: Observer,
        workers: Callable[[], Workers],
        patience: Patience,
        hints: bool = True,
    ) -> None:
        self._client, self._name = client, name
        self._workload, self._observe = workload, observe
        self._ask_workers, self._patience, self._hints = workers, patience, hints
        self._workers, self._looked = workers(), time.monotonic()
        self._mail = Mail(client)
        self._rates = Rates()
        self._active: list[Running] = []
        self._later: list[tuple[float, Sent]] = []
        self._suspects, self._backlogs = Suspects(), Backlogs()
        client.subscribe_topic(name, self._suspects.note)
        self._sent: dict[Future[Any], Sent] = {}
        self._out: Counter[str] = Counter()
        self._finished: deque[SlideRecord] = deque()
        self._more = True
        self._outlook = Outlook(self._rates, ())

    def run(self, slides: Iterable[SlideEntry]) -> Iterator[SlideRecord]:
        """Records as slides finish.

        Raises:
            FatalError: the run cannot go on.
        """
        left, self._outlook = enumerate(slides), Outlook(self._rates, slides)
        try:
            while self._active or self._more:
                if STOP.requested():
                    yield from self._stop()
                self._fill(left)
                self._collect()
                yield from self._drain()
        except (CancelledError, CommClosedError, ClosedClientError) as error:
            raise lost("the connection to the Dask scheduler is lost; start it anew") from error
        finally:
            if self._client.status == "running":
                self._client.cancel(list(self._sent))
                self._client.unsubscribe_topic(self._name)

    def _fill(self, left: Iterator[tuple[int, SlideEntry]]) -> None:
        """Send what may be sent, in the order of slides, and begin slides as long as the window is not full."""
        now = time.monotonic()
        due, self._later = [s for at, s in self._later if at <= now], [(at, s) for at, s in self._later if at > now]
        for again in due:
            self._send(again)
        while self._suspects.waiting and self._out["alone"] < max(1, len(self._workers.addresses) // 4):
            self._send(self._suspects.waiting.popleft())
        window = self._outlook.window(self._active, self._workers.slots)
        waiting = 0
        for running in list(self._active):
            while (stage := running.waits_for) and self._out[kind_of(stage)] < window.orders[stage.needs_model]:
                self._send(running.take(self._rates, window.seconds[stage.needs_model]))
            waiting += running.spans
        most, begun = max(1, self._workers.slots[False]), self._out["plan"]
        while self._out["plan"] < most and self._out[MODEL] + waiting + begun < window.ahead:
            if not self._begin(left):
                break
            begun += 1

    def _begin(self, left: Iterator[tuple[int, SlideEntry]]) -> bool:
        """Begin the next slide, if there is one."""
        entry = next(left, None)
        if entry is None:
            self._more = False
            self._outlook.over()
            return False
        self._outlook.begun()
        number, slide = entry
        running = Running(self._workload.job(slide), number)
        self._active.append(running)
        running.begin()
        self._send(running.take(self._rates, 0.0))
        return True

    def _send(self, sent: Sent) -> None:
        running, stage = sent.running, sent.tasks[0].stage
        if running.error is not None:  # it has failed meanwhile
            self._leave(running, len(sent.tasks))
            return
        # What is planned is ready when it is wanted; a slide that began first is finished first.
        future = self._client.submit(
            *self._mail.letter(Order(self._name, sent.tasks, sent.alone)),
            key=self._key(sent),
            pure=False,
            priority=1 if stage == PLAN else -running.number,
            resources=self._workers.needs[sent.model],
            workers=self._hint(sent),
        )
        self._sent[future] = sent
        self._out[sent.kind] += 1
        self._outlook.sent(sent.tasks)
        self._mail.expect(future)

    def _hint(self, sent: Sent) -> list[str] | None:
        """The worker that an order asks for, if one is better than the others; it may still go elsewhere."""
        able = self._workers.able[sent.model]
        others = {address: slots for address, slots in able.items() if address != sent.avoid}
        dealt = sent.model and bool(self._workers.needs[True])
        if not self._hints or not others or not (dealt or sent.avoid):
            return None
        worker = self._backlogs.soonest(others)
        self._backlogs.add(self._key(sent), worker, self._rates.of(sent.tasks))
        return [worker]

    def _collect(self) -> None:
        """Wait for a moment, take what has come, and see to it that there are workers for the rest."""
        for future, answer in self._mail.receive(POLL_S):
            if isinstance(answer, CancelledError) and future in self._sent:
                raise answer
            if (sent := self._forget(future)) is not None:
                self._take(sent, answer)
        if time.monotonic() - self._looked < LOOK_AT_WORKERS_S:
            return
        if self._client.status != "running":
            raise lost("the connection to the Dask scheduler is lost; start it anew")
        before, self._workers, self._looked = self._workers, self._ask_workers(), time.monotonic()
        if before.needs[False] and not self._workers.needs[False]:
            self._send_anew()
        try:
            self._patience.look(self._workers.lacking)
        except WorkerError as error:
            raise FatalError(error) from error

    def _forget(self, future: Future[Any]) -> Sent | None:
        """What a future was for; None where that was sent anew."""
        sent = self._sent.pop(future, None)
        if sent is not None:
            self._out[sent.kind] -= 1
            self._backlogs.remove(self._key(sent))
            self._outlook.back(sent.tasks)
        return sent

    def _send_anew(self) -> None:
        """Orders for workers that declare CPU, of which none is left: the others shall do them."""
        futures = [future for future, sent in self._sent.items() if not sent.model]
        anew = [sent for future in futures if (sent := self._forget(future)) is not None]
        self._client.cancel(futures)
        for sent in anew:
            self._send(sent.rest(0))

    def _take(self, sent: Sent, answer: Answer | BaseException) -> None:
        """Make use of what came back."""
        if isinstance(answer, KilledWorker) and not self._suspects.convicted(sent, self._key(sent)):
            self._observe(sent.tasks[0], failed(answer, again=True))
            return
        if not isinstance(answer, Answer):
            self._failed(sent, answer)
            return
        running, done = sent.running, len(answer.results)
        for position, task, performed in zip(sent.positions, sent.tasks, answer.results, strict=False):
            self._done(running, position, task, performed)
        if done == len(sent.tasks):
            self._leave(running, done)
        elif answer.error is None:  # the worker begins nothing more
            if not STOP.requested():
                raise lost("workers were told to drop the run, as after a lost connection;")
        elif answer.may_pass and sent.attempt < len(PAUSES_S):
            log_retry(sent.tasks[done], answer.error, sent.attempt)
            self._observe(sent.tasks[done], failed(answer.error, answer.worker, again=True))
            running.out -= done
            attempt = 0 if done else sent.attempt
            again = sent.rest(done, attempt=attempt + 1, avoid=answer.worker)
            self._later.append((time.monotonic() + PAUSES_S[attempt], again))
        else:
            running.out -= done
            self._failed(sent.rest(done), answer.error)

    def _key(self, sent: Sent) -> str:
        return f"wsi-{sent.tasks[0].stage.name}-{self._name}-{sent.running.number}-{sent.order}"

    def _done(self, running: Running, position: int, task: Task, performed: Performed) -> None:
        running.results[position] = performed.result
        self._rates.learn(task.stage, performed.seconds)
        self._observe(task, performed)

    def _failed(self, sent: Sent, error: BaseException) -> None:
        self._observe(sent.tasks[0], failed(error))
        sent.running.fail(explained(error, sent.tasks[0]))
        self._leave(sent.running, len(sent.tasks))

    def _leave(self, running: Running, count: int) -> None:
        """Tasks are no longer on their way; the job goes on when that were the last."""
        running.came_back(count)
        while running.ended:
            record = running.advance()
            if record is not None:
                self._active.remove(running)
                self._finished.append(record)
                return
            if not running.planned:
                running.planned = True
                self._outlook.planned(running)

    def _stop(self) -> Iterator[SlideRecord]:
        """Let workers finish what they have begun, within a bound, and end the run."""
        self._client.run(stop_here, self._name, wait=False, on_error="ignore")
        until = time.monotonic() + GRACE_S
        while self._sent and time.monotonic() < until:
            self._collect()
            yield from self._drain()
        raise FatalError(STOP.error())

    def _drain(self) -> Iterator[SlideRecord]:
        while self._finished:
            yield self._finished.popleft()
