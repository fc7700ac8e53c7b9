"""A circuit breaker: no requests to a server that fails, until one succeeds. And the state of a server behind it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field


class NoServer(Exception):
    """No server can take a request now: each is down, draining, tried already, or behind an open breaker."""


@dataclass
class CircuitBreaker:
    """Closed; open for a while after failures in a row; then half-open, one request at a time until one succeeds.

    Not safe from several threads: the balancer holds a lock.
    """

    failures: int = 3  # in a row, that open it
    cooldown_s: float = 1.0  # how long it stays open the first time; twice as long after each failed trial
    longest_s: float = 30.0  # bound of the cooldown
    clock: Callable[[], float] = time.monotonic
    _in_a_row: int = field(default=0, init=False)
    _opened: int = field(default=0, init=False)  # times since the last success
    _until: float = field(default=-math.inf, init=False)
    _trial: bool = field(default=False, init=False)  # half-open, and one request is on its way

    @property
    def state(self) -> str:
        """`closed`, `open` or `half-open`."""
        if not self._opened:
            return "closed"
        return "open" if self.clock() < self._until else "half-open"

    def allows(self) -> bool:
        """Whether a request may go to the server now."""
        return self.state == "closed" or (self.state == "half-open" and not self._trial)

    def began(self) -> bool:
        """A request goes to the server. Returns whether it is the trial: an argument of `ended`."""
        trial = self.state == "half-open" and not self._trial
        self._trial |= trial
        return trial

    def ended(self, ok: bool | None, trial: bool = False) -> None:
        """A request ended well or not; None says nothing about the server (the client left)."""
        if trial:
            self._trial = False
        if ok:
            self._in_a_row = self._opened = 0
        elif ok is not None:
            self._in_a_row += 1
            if trial or (self._opened == 0 and self._in_a_row >= self.failures):
                cooldown_s = min(self.longest_s, self.cooldown_s * 2.0 ** min(self._opened, 64))
                self._until = self.clock() + cooldown_s
                self._opened += 1

    def reset(self) -> None:
        """The server has come back, as an active check says: its past no longer counts."""
        self._in_a_row = self._opened = 0
        self._trial = False


@dataclass
class ServerState:
    """What a balancer knows of one server."""

    breaker: CircuitBreaker
    ready: bool = True
    in_flight: int = 0


@dataclass(frozen=True)
class Lease:
    """A request at a server. `trial`: it tests whether a server that failed works again."""

    server: str
    trial: bool
    state: ServerState = field(repr=False, compare=False)
