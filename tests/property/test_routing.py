"""Whatever the stages of a path do, a row's outcome is that of plain function calls, and every row is counted once."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill.handlers.context import RowContext
from rowmill.handlers.dispatch import Events
from rowmill.handlers.errors import StageFailedError, UnroutedError
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.routing import Adaptive, Router
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import make_stage
from support.fake_clock import FakeClock

DOINGS = st.sampled_from(["keep", "drop", "split", "fail on odd", "drop odd"])
PATHS = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.lists(DOINGS, min_size=1, max_size=4), max_size=3)
ROWS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 9)), max_size=8)


def apply(doing: str, row: dict[str, Any]) -> Any:
    """What a stage does with a row."""
    if doing == "fail on odd" and row["n"] % 2:
        raise ValueError("odd")
    if doing == "drop" or (doing == "drop odd" and row["n"] % 2):
        return None
    return [{**row, "n": row["n"] + 1}, {**row, "n": row["n"] * 2}] if doing == "split" else row


def expected(doings: list[str], row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The results of a row by plain calls; None if it fails."""
    rows = [row]
    for doing in doings:
        try:
            answers = [apply(doing, one) for one in rows]
        except ValueError:
            return None
        rows = [
            one for answer in answers for one in (answer if isinstance(answer, list) else [answer] if answer else [])
        ]
    return rows


def stage_of(name: str, doing: str, *, is_async: bool) -> Any:
    """A stage that does so."""

    async def later(row: dict[str, Any]) -> Any:
        return apply(doing, row)

    return make_stage(later if is_async else lambda row: apply(doing, row), name=name)


async def outcomes(element: Any, rows: list[dict[str, Any]]) -> list[Any]:
    """What became of each row: its results, None for a failure, or the kind of what is not routed."""
    pool = BlockingPool(1)
    ctx = RowContext("t", 0, 1, 0, None, (), "live", runtime=Runtime(pool, FakeClock()))
    found: list[Any] = []
    try:
        async with asyncio.timeout(20):
            for row in rows:
                try:
                    result = await element(row, ctx)
                    found.append(result if isinstance(result, list) else [result] if result else [])
                except StageFailedError:
                    found.append(None)
                except UnroutedError as error:
                    found.append(error.kind)
    finally:
        pool.close()
    return found


@settings(deadline=None)
@given(PATHS, ROWS, st.booleans())
def test_router(paths: dict[str, list[str]], given_rows: list[tuple[Any, int]], is_async: bool) -> None:
    """Results, failures and unrouted rows are exactly those of plain calls; the figures sum up."""
    router = Router()
    for name, doings in paths.items():
        stages = [stage_of(f"{name}{place}", doing, is_async=is_async) for place, doing in enumerate(doings)]
        router.path(name, *stages).rule({"to": name}, name)
    rows = [{"to": to, "n": n} for to, n in given_rows]
    wanted = [expected(paths[row["to"]], row) if row["to"] in paths else "no_route" for row in rows]
    assert asyncio.run(outcomes(router, rows)) == wanted
    figures = router.to_dict()
    assert sum(path["rows"] for path in figures["paths"].values()) + figures["unrouted"] == len(rows)
    assert sum(path["failed"] for path in figures["paths"].values()) == wanted.count(None)
    assert sum(path["dropped"] for path in figures["paths"].values()) == wanted.count([])


@settings(deadline=None)
@given(PATHS, ROWS, st.booleans())
def test_events(paths: dict[str, list[str]], given_rows: list[tuple[Any, int]], is_async: bool) -> None:
    """Handlers in a chain give what plain calls give; each event is handled or unhandled."""
    events = Events(field="to", unhandled="fail")
    for name, doings in paths.items():
        for place, doing in enumerate(doings):
            events.on(name, stage_of(f"{name}{place}", doing, is_async=is_async))
    rows = [{"to": to, "n": n} for to, n in given_rows]
    wanted = [expected(paths[row["to"]], row) if row["to"] in paths else "no_handlers" for row in rows]
    assert asyncio.run(outcomes(events, rows)) == wanted
    assert events.counts == {
        "handled": len(rows) - wanted.count("no_handlers"),
        "unhandled": wanted.count("no_handlers"),
        "unknown": sum(row["to"] is None for row in rows),
    }


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 100), st.floats(0, 60)), max_size=60))
def test_averages_stay_in_bounds(rows: list[tuple[bool, float, float]]) -> None:
    """Whatever is measured, rates stay between 0 and 1, latencies within what was seen, and somebody is chosen."""
    choice, clock = Adaptive(["p", "q", "r"], explore=0), FakeClock()
    for failed, seconds, pause in rows:
        name, _ = choice.choose(clock)
        choice.begin(name, clock.monotonic())
        clock.advance(pause)
        choice.end(name, clock.monotonic(), seconds, failed=failed)
    for figures in choice.to_dict().values():
        assert 0 <= figures["failure_rate"] <= 1
        assert 0 <= figures["latency_seconds"] <= max([seconds for _, seconds, _ in rows], default=0) * (1 + 1e-9)
        assert figures["running"] == 0
