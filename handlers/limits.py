"""Rate limits: how many calls, and how many units (tokens, bytes, records) of them, may begin in a time.

A token bucket kept as one moment (the generic cell rate algorithm of ITU-T I.371): what is taken now is paid off at
the rate, and whoever finds the bucket empty is told when to begin. The place is taken at that moment, so those who
wait go in the order in which they came, and nobody starves behind a large one.

aiolimiter was looked at (docs/decisions/0016): it waits inside, on the loop's clock, which a row that must hold no slot
meanwhile cannot use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..state.clock import Clock
from ..state.errors import ConfigError
from ..state.model import Row
from .options import check_name, check_rate

_HAIR = 1e-4  # timers may ring a little early


@dataclass(frozen=True, slots=True)
class RateLimit:
    """How fast calls of a stage may begin, in one worker. Retries count as calls.

    Attributes:
        per_second, per_minute: calls; give one of the two, or none.
        burst: calls that may begin at once after a pause (1): the bucket's size.
        units_per_second, units_per_minute: units, such as tokens; give one of the two, or none.
        unit_burst: units that may begin at once after a pause; default: what one second, or one minute, allows.
        units: how many units a row's call takes, as far as one knows before: a number, or a function of the row. What
            the handler then reports (``ctx.add_cost(tokens=)``) takes its place.
        name: stages whose limits have one name share them; default: the stage's own.

    Raises:
        ConfigError: an option is out of its range, or there is nothing to limit.
    """

    per_second: float | None = None
    per_minute: float | None = None
    burst: float = 1
    units_per_second: float | None = None
    units_per_minute: float | None = None
    unit_burst: float | None = None
    units: float | Callable[[Row], float] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        rates = ("per_second", "per_minute", "units_per_second", "units_per_minute")
        for option in (*rates, "unit_burst"):
            if getattr(self, option) is not None:
                check_rate(f"RateLimit({option}=)", getattr(self, option))
        check_rate("RateLimit(burst=)", self.burst)
        if all(getattr(self, option) is None for option in rates):
            raise ConfigError("RateLimit()", "nothing", f"give one of {', '.join(rates)}")
        for one, other in (rates[:2], rates[2:]):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ConfigError(f"RateLimit({other}=)", getattr(self, other), f"{one} is given as well; give one")
        if self.burst < 1:
            raise ConfigError("RateLimit(burst=)", self.burst, "give a number from 1: a call is never less than one")
        has_units = self.units_per_second is not None or self.units_per_minute is not None
        if has_units != (self.units is not None):
            raise ConfigError("RateLimit(units=)", self.units, "units and units_per_… belong together: give both")
        if self.units is not None and not callable(self.units):
            check_rate("RateLimit(units=)", self.units)
        if self.name is not None:
            check_name("RateLimit(name=)", self.name)


class Place(NamedTuple):
    """A call's place in the queue: when it may begin in each bucket, as of how far these had been moved then."""

    begins: tuple[float, ...]
    moved: tuple[float, ...]


class _Bucket:
    """A bucket of tokens, kept as the time at which it will be full again."""

    def __init__(self, rate: float, size: float, now: float) -> None:
        self._rate = rate
        self._slack = size / rate
        self._full_at = now
        self._held_until = now
        self.moved = 0.0
        """By how many seconds everybody in the queue was put off, in all."""

    def take(self, amount: float, now: float) -> float:
        """Take so many; the time from which they may be used."""
        taken = amount / self._rate
        self._full_at = max(self._full_at, now, self._held_until) + taken
        return max(now, self._held_until, self._full_at - max(self._slack, taken))

    def put_off(self, seconds: float) -> None:
        """Everybody in the queue begins so much later; earlier, if it is below 0."""
        self._full_at += seconds
        self.moved += seconds

    def settle(self, difference: float) -> None:
        """A call took so many more than it said."""
        self.put_off(difference / self._rate)

    def hold(self, until: float, now: float) -> None:
        """Nobody begins before."""
        if until > self._held_until:
            self.put_off(until - max(now, self._held_until))
            self._held_until = until


class Limiter:
    """One resource's limits in one worker.

    Args:
        spec: how fast.
        clock: time.
    """

    def __init__(self, spec: RateLimit, clock: Clock) -> None:
        self._spec = spec
        self._clock = clock
        now = clock.monotonic()
        rate = _rate(spec.per_second, spec.per_minute)
        self._calls = _Bucket(rate, spec.burst, now) if rate is not None else None
        unit_rate = _rate(spec.units_per_second, spec.units_per_minute)
        size = spec.unit_burst or spec.units_per_second or spec.units_per_minute or 1.0
        self._units = _Bucket(unit_rate, size, now) if unit_rate is not None else None
        self._buckets = [bucket for bucket in (self._calls, self._units) if bucket is not None]

    def units_of(self, row: Row) -> float:
        """What a call for this row takes, as far as one knows.

        Raises:
            Exception: whatever the user's function raises.
            ConfigError: it gave no number of at least 0.
        """
        units = self._spec.units
        if units is None:
            return 0.0
        amount = units(row) if callable(units) else units
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < float("inf"):
            raise ConfigError("RateLimit(units=)", amount, "the function must give a number of at least 0")
        return float(amount)

    def take(self, units: float) -> Place:
        """Take the place of one call."""
        now = self._clock.monotonic()
        amounts = [(self._calls, 1.0), (self._units, units)]
        begins = tuple(bucket.take(amount, now) for bucket, amount in amounts if bucket is not None)
        return Place(begins, tuple(bucket.moved for bucket in self._buckets))

    def wait(self, place: Place) -> float:
        """Seconds until the call of that place may begin; 0.0: now."""
        begin = max(
            begin + bucket.moved - moved
            for begin, moved, bucket in zip(place.begins, place.moved, self._buckets, strict=True)
        )
        wait = begin - self._clock.monotonic()
        return wait if wait > _HAIR else 0.0

    def settle(self, estimated: float, actual: float) -> None:
        """A call took other units than was thought: whoever is in the queue begins later, or earlier."""
        if self._units is not None:
            self._units.settle(actual - estimated)

    def hold(self, seconds: float) -> None:
        """Let nothing begin for so long: the resource asked for it (``Retry-After``)."""
        now = self._clock.monotonic()
        for bucket in self._buckets:
            bucket.hold(now + seconds, now)


def _rate(per_second: float | None, per_minute: float | None) -> float | None:
    """Per second."""
    if per_second is not None:
        return float(per_second)
    return None if per_minute is None else per_minute / 60
