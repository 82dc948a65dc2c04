"""`claim.json`: the run or audit that works on OUT. Two at the same time would overwrite each other's files.

A run creates the file if there is none, renews it every few seconds, and removes it at the end. Another run's claim is
taken over if that run is gone: at once if its process can be looked up on this machine, else if it has not been renewed
for a while by this machine's clock. All changes are compare-and-swap, so that only one of several runs holds the claim,
and a run notices when it has lost it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self

from wsi_gradcam.errors import ResumeError, StoreError
from wsi_gradcam.io.base import SMALL_BYTES
from wsi_gradcam.io.documents import read_json
from wsi_gradcam.system.processes import PeriodicTimer, Process, this_process

if TYPE_CHECKING:
    from wsi_gradcam.io.paths import StoragePath

CLAIM = "claim.json"
EXPLAIN, AUDIT, EVIDENCE = "explain", "audit", "evidence"  # the kinds of work that hold claims
HEARTBEAT_S = 3.0
SILENT_S = (
    20.0  # without a heartbeat for this long, a run on another machine counts as gone: some heartbeats may be late
)
POLL_S = 0.5

# Runs of this process that are over, although their claims may remain because the store was unreachable.
_ENDED: set[str] = set()


@dataclass(frozen=True)
class Holder:
    """The holder of a claim: the run, its process, since when (UTC, by its own clock), and how often it was renewed.

    Attributes:
        work: explain, audit or evidence.
    """

    run_id: str
    process: Process
    since: str
    beat: int = 0
    work: str = EXPLAIN

    def __str__(self) -> str:
        kind = {AUDIT: "audit", EVIDENCE: "search for evidence"}.get(self.work, "run")
        return f"{kind} {self.run_id} on {self.process.host} (process {self.process.pid}), since {self.since}"

    def to_bytes(self) -> bytes:
        """Return the holder as bytes for the file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder | None:
        """Return the holder that `to_bytes` wrote; None for anything else."""
        try:
            values = read_json(data)
            return cls(**{**values, "process": Process(**values["process"])})
        except (ValueError, KeyError, TypeError):
            return None


def new_run_id() -> str:
    """Return a new name for a run; names sort by time."""
    now = datetime.now(UTC)
    return f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03d}Z-{uuid.uuid4().hex[:6]}"


def read_holder(out: StoragePath) -> Holder | None:
    """Return the holder of the claim on OUT; None if there is none."""
    try:
        return Holder.from_bytes((out / CLAIM).read(SMALL_BYTES))
    except FileNotFoundError:
        return None


class Claim:
    """The claim of a run on OUT, as a context: within it no other run works there, or `check` raises an error."""

    def __init__(self, out: StoragePath, run_id: str, report: Callable[[str], None], work: str = EXPLAIN) -> None:
        self._out, self._place, self._report = out, out / CLAIM, report
        self._mine = Holder(run_id, this_process(), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", work=work)
        self._version = ""
        self._taken_by: str | None = None
        self._gone = ""  # the version of a claim whose run is known to be gone
        self._ticker = PeriodicTimer(HEARTBEAT_S, self._beat, "claim")

    def __enter__(self) -> Self:
        """Take the claim.

        Raises:
            ResumeError: another run holds it.
            StoreError: OUT cannot be written.
        """
        while not self._taken():
            pass
        self._ticker.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticker.__exit__(kind, error, trace)
        try:
            if self._holds():
                self._place.remove()
        except StoreError as problem:
            _ENDED.add(self._mine.run_id)
            self._report(f"the claim on {self._out} could not be removed: {problem}")

    def look_first(self) -> None:
        """Check, without changing anything, whether another run is active; if not, the claim can then be taken at once.

        Raises:
            ResumeError: another run is active.
        """
        with suppress(FileNotFoundError):
            data, version = self._place.read_versioned()
            self._wait_until_gone(Holder.from_bytes(data), version)

    @property
    def lost(self) -> bool:
        """True once another run has taken the claim."""
        return self._taken_by is not None

    def check(self) -> None:
        """Raise ResumeError if another run has taken the claim: this one must stop."""
        if self._taken_by is not None:
            raise ResumeError(
                f"{self._out}: taken over by {self._taken_by}, because this run was silent for {SILENT_S:.0f} s; this "
                "run stops, and the other continues with what is finished"
            )

    def _taken(self) -> bool:
        """Try to take the claim; return whether it was taken."""
        self._taken_by = None
        if self._place.create(self._mine.to_bytes()):
            return self._holds()
        try:
            data, version = self._place.read_versioned()
        except FileNotFoundError:
            return False
        if version != self._gone and not self._wait_until_gone(Holder.from_bytes(data), version):
            return False
        return self._place.replace(self._mine.to_bytes(), version) and self._holds()

    def _wait_until_gone(self, holder: Holder | None, version: str) -> bool:
        """Wait until the run that wrote this version of the claim is known to be gone; False if another has written it.

        Raises:
            ResumeError: that run is active.
        """
        alive = None if holder is None else holder.process.alive()
        if holder is not None and holder.run_id in _ENDED:
            alive = False
        if holder is not None and alive:
            raise _refusal(self._out, holder)
        if holder is not None and alive is False:
            self._report(f"{holder} ended without finishing; continuing with what it finished")
            self._gone = version
            return True
        named = str(holder) if holder else "an unknown run"
        self._report(f"{self._out} is claimed by {named}; waiting up to {SILENT_S:.0f} s for a sign of life")
        until = time.monotonic() + SILENT_S
        while time.monotonic() < until:
            time.sleep(POLL_S)
            try:
                data, now = self._place.read_versioned()
            except FileNotFoundError:
                return False
            if now != version:
                if (other := Holder.from_bytes(data)) is not None:
                    raise _refusal(self._out, other)
                return False
        self._report(f"no sign of life from {named} for {SILENT_S:.0f} s; taking over")
        self._gone = version
        return True

    def _holds(self) -> bool:
        """Return whether the present claim is this run's, and remember its version."""
        try:
            data, version = self._place.read_versioned()
        except FileNotFoundError:
            return False
        holder = Holder.from_bytes(data)
        if holder is None or holder.run_id != self._mine.run_id:
            self._taken_by = str(holder) if holder else "another process"
            return False
        self._version = version
        return True

    def _beat(self) -> None:
        """Renew the claim, even if it has vanished; a store that fails now may work the next time."""
        with suppress(StoreError):
            self._mine = replace(self._mine, beat=self._mine.beat + 1)
            data = self._mine.to_bytes()
            if not (self._place.replace(data, self._version) or self._holds()):
                self._place.create(data)
            self._holds()


def _refusal(out: StoragePath, holder: Holder) -> ResumeError:
    return ResumeError(
        f"{out}: {holder} is at work there; wait until it is done (`wsi-gradcam status {out}` shows its progress), "
        "stop it, or choose another --out"
    )
