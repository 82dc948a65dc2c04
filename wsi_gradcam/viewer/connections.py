"""uvicorn's HTTP protocol with bounds: on connections, and on how long one may keep us waiting.

uvicorn alone waits for ever for a request that never ends, and for a client that never reads; its limit of
concurrency counts such connections, so a thousand of them would shut everyone else out.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 512
WAIT_S = 15.0  # for a whole request, from the connection or the last answer on
STUCK_S = 30.0  # without a byte read by a client that is sent something
SWEEP_S = 1.0


class BoundedProtocol(H11Protocol):
    """A connection that is ended when it has kept us waiting too long, or when there are too many."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._waiting_since = self._moved_at = time.monotonic()
        self._unsent = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; of too many, the one that has waited longest goes."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)
        if len(self.connections) > MOST_CONNECTIONS:
            others = [other for other in self.connections if isinstance(other, BoundedProtocol) and other.is_idle]
            longest = min(others, key=lambda other: other._waiting_since)
            self.connections.discard(longest)  # now: many more may be taken before it is told that it is lost
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Wait for the next request from now on."""
        self._waiting_since = time.monotonic()
        super().on_response_complete()

    @property
    def is_idle(self) -> bool:
        """Whether no request of it is being worked on."""
        return self.cycle is None or self.cycle.response_complete

    def _sweep(self) -> None:
        now, unsent = time.monotonic(), self.transport.get_write_buffer_size()
        if unsent == 0 or unsent < self._unsent:
            self._moved_at = now
        self._unsent = unsent
        if (self.is_idle and now - self._waiting_since > WAIT_S and not unsent) or now - self._moved_at > STUCK_S:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(SWEEP_S, self._sweep)
