"""Time limits of calls, one timer for many: what becomes of each call, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from rowmill.handlers.calls import TimeLimit, call_with_limit
from rowmill.handlers.errors import HandlerTimeoutError
from support.virtual import virtual


async def sleeps(seconds: float) -> float:
    """A handler that takes so long."""
    await asyncio.sleep(seconds)
    return seconds


async def cleans_up(seconds: float) -> float:
    """One that needs a second after it was cancelled."""
    try:
        return await sleeps(seconds)
    finally:
        await asyncio.sleep(1)


async def swallows(seconds: float) -> float:
    """One that takes no notice, and goes on for a second."""
    try:
        return await sleeps(seconds)
    except asyncio.CancelledError:
        await asyncio.sleep(1)
        return -1


async def turns_into(seconds: float, error: type[Exception]) -> float:
    """One that makes another error of its cancellation."""
    try:
        return await sleeps(seconds)
    except asyncio.CancelledError:
        raise error("mine") from None


async def raises(error: type[BaseException]) -> None:
    """One that fails at once."""
    raise error("mine")


def of_asyncio(call: Callable[..., Any], *arguments: Any) -> Coroutine[Any, Any, Any]:
    """With a limit of 5 s by asyncio.timeout."""
    return call_with_limit(call, arguments, 5.0)


def of_ours(call: Callable[..., Any], *arguments: Any) -> Coroutine[Any, Any, Any]:
    """With a limit of 5 s by a TimeLimit."""
    return TimeLimit(5.0).call(call, arguments)


@pytest.mark.parametrize("limited", [of_asyncio, of_ours])
@pytest.mark.parametrize(
    ("call", "arguments", "seen", "seconds"),
    [
        (sleeps, (0,), 0, 0),
        (sleeps, (4.9,), 4.9, 4.9),
        (sleeps, (100,), HandlerTimeoutError, 5),
        (cleans_up, (100,), HandlerTimeoutError, 6),
        (swallows, (100,), -1, 6),
        (turns_into, (100, TimeoutError), HandlerTimeoutError, 5),
        (turns_into, (100, KeyError), KeyError, 5),
        (raises, (TimeoutError,), TimeoutError, 0),
        (raises, (KeyError,), KeyError, 0),
        (raises, (asyncio.CancelledError,), asyncio.CancelledError, 0),
        (raises, (SystemExit,), SystemExit, 0),
    ],
)
def test_what_a_call_ends_with(limited: Any, call: Any, arguments: Any, seen: Any, seconds: float) -> None:
    """One timer for many calls and asyncio's own give the same, and leave no cancellation behind."""

    async def main() -> tuple[Any, float, int]:
        task = asyncio.current_task()
        assert task is not None
        try:
            found = await limited(call, *arguments)
        except BaseException as error:  # noqa: BLE001 - that is what is looked at
            found = type(error)
        return found, asyncio.get_running_loop().time(), task.cancelling()

    found, ended, cancelling = virtual(main)
    assert (found, cancelling) == (seen, 0)
    assert ended == pytest.approx(seconds, abs=0.001)


@pytest.mark.parametrize("limited", [of_asyncio, of_ours])
@pytest.mark.parametrize(("after", "call"), [(3, sleeps), (5, sleeps), (5.5, cleans_up), (5.5, swallows)])
def test_who_is_cancelled_from_outside_stays_so(limited: Any, after: float, call: Any) -> None:
    """Before the limit, in the same moment, or while the handler still ends: the task's cancellation is kept."""

    async def main() -> tuple[bool, int]:
        task = asyncio.create_task(limited(call, 100))
        asyncio.get_running_loop().call_later(after, task.cancel)
        await asyncio.wait([task])
        return task.cancelled() or call is swallows, task.cancelling()

    assert virtual(main) == (True, 1)


@pytest.mark.parametrize(("outer", "inner", "seen"), [(5, 9, "outer"), (9, 5, "inner"), (5, 5, "outer")])
def test_limits_within_limits(outer: float, inner: float, seen: str) -> None:
    """The one whose seconds are over says so, the outer one where both are; nothing stays cancelled."""
    limits = {"outer": TimeLimit(outer), "inner": TimeLimit(inner)}

    async def within() -> str:
        try:
            await limits["inner"].call(sleeps, (100,))
        except HandlerTimeoutError:
            return "inner"
        return "none"

    async def main() -> tuple[str, int]:
        task = asyncio.current_task()
        assert task is not None
        try:
            found = await limits["outer"].call(within, ())
        except HandlerTimeoutError:
            found = "outer"
        return found, task.cancelling()

    assert virtual(main) == (seen, 0)


def test_each_call_has_its_own_seconds() -> None:
    """Calls that begin one after the other, some of which end early, run out one after the other, on the second."""
    limit = TimeLimit(5.0)
    ends: dict[int, float] = {}

    async def one(number: int) -> None:
        await asyncio.sleep(number)
        try:
            await limit.call(sleeps, (100 if number % 3 else 1,))
        except HandlerTimeoutError:
            ends[number] = asyncio.get_running_loop().time()

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(20)))

    virtual(main)
    assert ends == {number: pytest.approx(number + 5, abs=0.001) for number in range(20) if number % 3}


def test_a_limit_after_a_long_rest() -> None:
    """Once its timer has rung with nothing to do, the next call is limited all the same, and there is one timer."""
    limit = TimeLimit(5.0)

    async def main() -> float:
        for _ in range(3):
            assert await limit.call(sleeps, (1,)) == 1
            await asyncio.sleep(60)
        with pytest.raises(HandlerTimeoutError, match="no result within 5 s"):
            await limit.call(sleeps, (100,))
        return asyncio.get_running_loop().time()

    assert virtual(main) == pytest.approx(3 * 61 + 5, abs=0.001)
