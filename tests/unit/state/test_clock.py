"""The machine's clock, and the one that tests turn by hand."""

from __future__ import annotations

import time

import pytest
from rowmill.state.clock import Clock, SystemClock
from support.fake_clock import FakeClock


@pytest.fixture(params=[SystemClock, FakeClock])
def clock(request: pytest.FixtureRequest) -> Clock:
    """One of each kind."""
    made: Clock = request.param()
    return made


async def test_time_goes_on(clock: Clock) -> None:
    """Sleeping lets at least so much time pass on the monotonic clock."""
    began = clock.monotonic()
    await clock.sleep(0.01)
    assert clock.monotonic() - began >= 0.009


def test_chance(clock: Clock) -> None:
    """Jitter is in [0, 1), and tokens are eight hexadecimal digits and differ."""
    assert all(0 <= clock.random() < 1 for _ in range(100))
    tokens = {clock.token() for _ in range(20)}
    assert len(tokens) == 20
    assert all(len(token) == 8 and int(token, 16) >= 0 for token in tokens)


def test_wall_clock_is_milliseconds() -> None:
    """The system clock tells the machine's time in whole milliseconds."""
    before = int(time.time() * 1000)
    assert before - 1 <= SystemClock().now_ms() <= before + 5_000
