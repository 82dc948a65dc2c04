"""Slides through Dask: a window of orders in flight, the oldest slides first."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Any

from distributed import Client, Future
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker

from wsi_gradcam.errors import WorkerError
from wsi_gradcam.executors.dask.failures import explained, failed, lost
from wsi_gradcam.executors.dask.mail import Mail
from wsi_gradcam.executors.dask.plugin import Answer, Order, stop_here
from wsi_gradcam.executors.dask.rates import LEAST_S, ORDER_S, Rates
from wsi_gradcam.executors.dask.running import MODEL, Running, Sent, kind_of
from wsi_gradcam.executors.dask.workers import Patience, Workers
from wsi_gradcam.executors.retries import PAUSES_S, say_again
from wsi_gradcam.inputs import SlideEntry
from wsi_gradcam.stages import RUN_MODEL, Performed, Task
from wsi_gradcam.stopping import GRACE_S, LOOK_S, STOP
from wsi_gradcam.workflow import FatalError, Job, Observer, SlideRecord

# Orders in flight for each that can run at once. Dask's adaptive clusters grow to (seconds of work that the scheduler
# knows) / 5 s: 4 orders of 3 s ask for more than twice the workers there are, until there are enough; and 12 s of work
# are left to each while a slide is planned.
ORDERS_PER_SLOT = 4
LOOK_AT_WORKERS_S = 2.0
# A task that was begun alone in its process so often, and each time the process died, has killed it.
DEATHS_ALONE = 2
MOST_TRIALS = 4  # of a task whose workers always die before it begins


class Flow:
    """Keeps a window of orders in flight, the oldest slides first.

    Slides are planned ahead only as far as the window is not full: none is begun that could not be worked on, so that
    slides finish in the order in which they began, and an archive of any size takes the same memory here.

    Dask blames all tasks of a worker that dies. One so blamed too often is run again while nothing else of the run
    is at work in its process: if that kills workers too, it is the culprit, and its slide has failed. Few run so at
    once, and meanwhile the other workers go on.
    """

    def __init__(
        self, client: Client, name: str, job: Job, observe: Observer, workers: Callable[[], Workers],
        patience: Patience,
    ) -> None:  # fmt: skip
        self._client, self._name = client, name
        self._job, self._observe = job, observe
        self._ask_workers, self._patience = workers, patience
        self._workers, self._looked = workers(), time.monotonic()
        self._mail = Mail(client)
        self._rates = Rates()
        self._active: list[Running] = []
        self._later: list[tuple[float, Sent]] = []
        self._suspects: deque[Sent] = deque()
        self._begun: Counter[str] = Counter()
        client.subscribe_topic(name, self._note)
        self._sent: dict[Future[Any], Sent] = {}
        self._out: Counter[str] = Counter()
        self._finished: deque[SlideRecord] = deque()
        self._more = True

    def run(self, slides: Iterable[SlideEntry]) -> Iterator[SlideRecord]:
        """Records as slides finish.

        Raises:
            FatalError: the run cannot go on.
        """
        left = enumerate(slides)
        try:
            while self._active or self._more:
                if STOP.asked():
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
        while self._suspects and self._out["alone"] < max(1, len(self._workers.addresses) // 4):
            self._send(self._suspects.popleft())
        room = {model: ORDERS_PER_SLOT * max(1, slots) for model, slots in self._workers.slots.items()}
        budgets_s = self._budgets_s()
        waiting = 0
        for running in list(self._active):
            while (stage := running.waits_for) and self._out[kind_of(stage)] < room[stage in RUN_MODEL]:
                self._send(running.take(self._rates, budgets_s[stage in RUN_MODEL]))
            waiting += running.spans
        begun = self._out["plan"]
        while (
            self._out["plan"] < max(1, self._workers.slots[False]) and self._out[MODEL] + waiting + begun < room[True]
        ):
            if not self._begin(left):
                break
            begun += 1

    def _budgets_s(self) -> dict[bool, float]:
        """Seconds of work in an order, of the model and else: at the end half of a worker's share of what is left."""
        if self._more:
            return {True: ORDER_S, False: ORDER_S}
        left_s = {True: 0.0, False: 0.0}
        for running in self._active:
            for phase in running.phases:
                stage = phase[0][1].stage
                left_s[stage in RUN_MODEL] += len(phase) * self._rates.seconds(stage)
        for sent in self._sent.values():
            left_s[sent.model] += sum(self._rates.seconds(task.stage) for task in sent.tasks)
        slots = self._workers.slots
        return {model: min(ORDER_S, max(LEAST_S, s / max(1, slots[model]) / 2)) for model, s in left_s.items()}

    def _begin(self, left: Iterator[tuple[int, SlideEntry]]) -> bool:
        """Begin the next slide, if there is one."""
        entry = next(left, None)
        if entry is None:
            self._more = False
            return False
        number, slide = entry
        running = Running(self._job(slide), number)
        self._active.append(running)
        running.begin()
        self._send(running.take(self._rates, ORDER_S))
        return True

    def _send(self, sent: Sent) -> None:
        running, stage = sent.running, sent.tasks[0].stage
        if running.error is not None:  # it has failed meanwhile
            self._leave(running, len(sent.tasks))
            return
        # What is planned is ready when it is wanted; a slide that began first is finished first.
        future = self._client.submit(
            *self._mail.letter(Order(self._name, sent.tasks, sent.alone)),
            key=self._key(sent), pure=False,
            priority=1 if stage == "plan" else -running.number, resources=self._workers.needs[sent.model],
            **self._elsewhere(sent),
        )  # fmt: skip
        self._sent[future] = sent
        self._out[sent.kind] += 1
        self._mail.expect(future)

    def _elsewhere(self, sent: Sent) -> dict[str, Any]:
        """Where to, rather than to the worker that could not do it; only where every worker could be taken."""
        addresses, able = self._workers.addresses, self._workers.able[sent.model]
        others = [address for address in addresses if address != sent.avoid]
        if not sent.avoid or not others or len(able) < len(addresses):
            return {}
        return {"workers": others, "allow_other_workers": True}

    def _collect(self) -> None:
        """Wait for a moment, take what has come, and see to it that there are workers for the rest."""
        for future, answer in self._mail.receive(LOOK_S):
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
        if isinstance(answer, KilledWorker) and not self._convicted(sent):
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
            if not STOP.asked():
                raise lost("workers were told to drop the run, as after a lost connection;")
        elif answer.may_pass and sent.attempt < len(PAUSES_S):
            say_again(sent.tasks[done], answer.error, sent.attempt)
            self._observe(sent.tasks[done], failed(answer.error, answer.worker, again=True))
            running.out -= done
            attempt = 0 if done else sent.attempt
            again = sent.rest(done, attempt=attempt + 1, avoid=answer.worker)
            self._later.append((time.monotonic() + PAUSES_S[attempt], again))
        else:
            running.out -= done
            self._failed(sent.rest(done), answer.error)

    def _convicted(self, sent: Sent) -> bool:
        """Whether tasks that workers died of are the cause; else they have another trial."""
        begun = sent.begun + self._begun.pop(self._key(sent), 0)
        if sent.alone and (begun >= DEATHS_ALONE or sent.trials >= MOST_TRIALS):
            return True
        suspects = [sent.rest(0)] if sent.alone else sent.singly()
        self._suspects += [replace(suspect, trials=sent.trials + 1, begun=begun) for suspect in suspects]
        return False

    def _note(self, event: tuple[float, Any]) -> None:
        """A worker has begun what is alone."""
        self._begun[event[1]["alone"]] += 1

    def _key(self, sent: Sent) -> str:
        return f"wsi-{sent.tasks[0].stage}-{self._name}-{sent.running.number}-{sent.order}"

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
