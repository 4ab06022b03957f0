"""Circuit breakers: leave a resource alone that keeps failing, and try it again with care.

The pattern is Michael Nygard's ("Release It!", 2007). *Closed*: calls go through, failures are counted. *Open*: none
goes through for ``open_for`` seconds. *Half open*: a few probes go through; they decide.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ..state.clock import Clock
from ..state.errors import ConfigError
from .options import check_count, check_name, check_seconds
from .retry import Errors, check_errors, concerns, is_fault

State: TypeAlias = "Literal['closed', 'open', 'half_open']"
_MOST_OUTCOMES = 10_000


@dataclass(frozen=True, slots=True)
class CircuitBreaker:
    """When calls of a stage stop for a while because they keep failing.

    Attributes:
        failures: consecutive failures that open it (5); None: only ``rate`` does.
        rate: share of failed calls within ``window``, above 0 and up to 1, that opens it; None: only ``failures`` does.
        window: seconds that ``rate`` looks back (60.0).
        minimum: calls within the window from which on ``rate`` means something (20).
        open_for: seconds for which it stays open before probes (30.0).
        probes: calls that go through at once while it is half open; when as many have succeeded in a row it closes, one
            failure opens it again (1).
        when_open: what rows meet at an open breaker: ``wait`` (they wait, the buffers fill up, the partitions pause),
            ``fallback`` (the stage's ``fallback``, at once), or ``fail`` (the stage's ``on_error``, at once).
        on: which errors count: classes, or a function. Default: those that speak against the resource: not programming
            mistakes, not HTTP 4xx (a 429 asks to slow down; see RateLimit and Retry).
        name: stages whose breakers have one name share it; default: the stage's own.

    Raises:
        ConfigError: an option is out of its range.
    """

    failures: int | None = 5
    rate: float | None = None
    window: float = 60.0
    minimum: int = 20
    open_for: float = 30.0
    probes: int = 1
    when_open: Literal["wait", "fallback", "fail"] = "wait"
    on: Errors | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.failures is not None:
            check_count("CircuitBreaker(failures=)", self.failures)
        if self.rate is not None and (not isinstance(self.rate, (int, float)) or not 0 < self.rate <= 1):
            raise ConfigError("CircuitBreaker(rate=)", self.rate, "give a share above 0 and up to 1, such as 0.5")
        if self.failures is None and self.rate is None:
            raise ConfigError(
                "CircuitBreaker(failures=)", None, "give failures=, rate=, or both: something must open it"
            )
        check_seconds("CircuitBreaker(window=)", self.window)
        check_count("CircuitBreaker(minimum=)", self.minimum)
        check_seconds("CircuitBreaker(open_for=)", self.open_for)
        check_count("CircuitBreaker(probes=)", self.probes)
        if self.when_open not in {"wait", "fallback", "fail"}:
            raise ConfigError("CircuitBreaker(when_open=)", self.when_open, "use 'wait', 'fallback' or 'fail'")
        check_errors("CircuitBreaker(on=)", self.on)
        if self.name is not None:
            check_name("CircuitBreaker(name=)", self.name)


class Permit:
    """Leave for one call. What it reports counts only as long as the breaker is in the state that gave it."""

    __slots__ = ("is_probe", "turn")

    def __init__(self, turn: int, *, is_probe: bool) -> None:
        self.turn = turn
        self.is_probe = is_probe


class Breaker:
    """One resource's breaker in one worker. Not for several threads.

    Args:
        spec: when it opens.
        clock: time.
        on_change: told of every change: the old state and the new one, with what led to it.
    """

    def __init__(
        self, spec: CircuitBreaker, clock: Clock, on_change: Callable[[State, State, dict[str, Any]], None]
    ) -> None:
        self.spec = spec
        self.state: State = "closed"
        self._clock = clock
        self._on_change = on_change
        self._turn = 0  # counts changes of state
        self._in_a_row = 0
        self._outcomes: deque[tuple[float, bool]] = deque()  # (when, failed), within the window
        self._failed = 0  # of these
        self._opened = 0.0
        self._probing = 0
        self._good_probes = 0
        self._waiters: list[asyncio.Future[None]] = []

    def admit(self) -> Permit | None:
        """Leave for a call now; None: wait for :meth:`changed`, or :attr:`seconds_left`."""
        if self.state == "open" and self.seconds_left <= 0:
            self._become("half_open", {})
        if self.state == "closed":
            return Permit(self._turn, is_probe=False)
        if self.state == "half_open" and self._probing < self.spec.probes:
            self._probing += 1
            return Permit(self._turn, is_probe=True)
        return None

    def holds(self, permit: Permit) -> bool:
        """Whether a leave that was given is still good."""
        return permit.turn == self._turn

    @property
    def seconds_left(self) -> float:
        """How long it stays open; 0.0 in other states."""
        left = self._opened + self.spec.open_for - self._clock.monotonic()
        return max(0.0, left) if self.state == "open" else 0.0

    def changed(self) -> asyncio.Future[None]:
        """Ends when there may be leave again: at a change of state, or when a probe's place is free."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        return waiter

    def succeeded(self, permit: Permit) -> None:
        """The call went well."""
        if permit.turn != self._turn:
            return
        self._in_a_row = 0
        if self.state == "half_open":
            self._probed(permit)
        elif self.spec.rate is not None:
            self._note(failed=False)

    def failed(self, permit: Permit, error: BaseException) -> None:
        """The call raised; whether that counts depends on the error."""
        if permit.turn != self._turn:
            return
        if not concerns(self.spec.on, error, is_fault):
            self.given_back(permit)
            return
        self._in_a_row += 1
        if self.state == "half_open":
            self._open({"probe": "failed"})
            return
        if self.spec.rate is not None:
            self._note(failed=True)
        if self.spec.failures is not None and self._in_a_row >= self.spec.failures:
            self._open({"failures": self._in_a_row})
        elif self.spec.rate is not None and self._is_over_rate(self.spec.rate):
            self._open({"failed": self._failed, "calls": len(self._outcomes)})

    def given_back(self, permit: Permit) -> None:
        """The call told nothing: it was cancelled, or raised an error that does not count."""
        if permit.is_probe and permit.turn == self._turn:
            self._probing -= 1
            self._wake()

    def to_dict(self) -> dict[str, Any]:
        """State and figures, for status."""
        return {
            "state": self.state,
            "failures_in_a_row": self._in_a_row,
            "seconds_left": round(self.seconds_left, 3),
            "waiting": sum(not waiter.done() for waiter in self._waiters),
        }

    def _probed(self, permit: Permit) -> None:
        if permit.is_probe:
            self._probing -= 1
        self._good_probes += 1
        if self._good_probes >= self.spec.probes:
            self._become("closed", {})
        else:
            self._wake()

    def _open(self, why: dict[str, Any]) -> None:
        self._opened = self._clock.monotonic()
        self._become("open", {**why, "open_for": self.spec.open_for})

    def _become(self, state: State, why: dict[str, Any]) -> None:
        before, self.state = self.state, state
        self._turn += 1
        self._in_a_row = self._failed = self._probing = self._good_probes = 0
        self._outcomes.clear()
        self._wake()
        self._on_change(before, state, why)

    def _note(self, *, failed: bool) -> None:
        now = self._clock.monotonic()
        self._outcomes.append((now, failed))
        self._failed += failed
        while self._outcomes[0][0] <= now - self.spec.window or len(self._outcomes) > _MOST_OUTCOMES:
            self._failed -= self._outcomes.popleft()[1]

    def _is_over_rate(self, rate: float) -> bool:
        return len(self._outcomes) >= self.spec.minimum and self._failed / len(self._outcomes) >= rate

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
