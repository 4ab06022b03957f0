"""A real HTTP client before a service that misbehaves: what became of every row, and what the service saw."""

from __future__ import annotations

import asyncio
import runpy
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from itertools import accumulate, count, pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import pytest
from rowmill import CircuitBreaker, Pipeline, RateLimit, Retry, WorkerOptions, publish
from rowmill.handlers.breaker import Breaker
from rowmill.handlers.runtime import Event
from support.flaky_server import Call, FlakyServer, Plan, most_within
from support.paid_pipelines import ask, paid_pipeline

from .test_policies import context_of, rows_of
from .test_worker import running, until

pytestmark = pytest.mark.timeout(120)

EXAMPLES = Path(__file__).parents[2] / "examples"

ROWS = 5_000
RATE, BURST = 700, 20
ATTEMPTS = 10
TIMEOUT = 0.5
TIMERS = 0.05
"""By how many seconds a call may begin late without the next ones being put off."""
LAG = 0.1
"""Seconds that may pass on the way between the two, on a machine that does other things as well."""


# --- what the service does, and what must become of the rows ----------------------------------------------------


def fate(row: int) -> str:
    """What the pipeline must make of a row."""
    kind = row % 100
    if kind == 50:
        return "dropped"
    if kind == 51:
        return "skipped"
    if row % 200 == 7 or row % 1_000 == 8:
        return "dead"
    return "defaulted" if kind == 9 else "result"


class Moods:
    """A plan: bad rows are answered badly for ever, others now and then; three times everybody is told to slow down,
    and once the service is down for a while.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.down_at = float("inf")
        self.slow_downs = [1_000, 2_500, 4_000]

    def __call__(self, row: int, number: int) -> str:
        self.calls += 1
        if row % 200 == 7:
            return "400"  # never cured: one call
        if self.slow_downs and self.calls >= self.slow_downs[0]:  # that very call may be of a row never cured
            self.slow_downs.pop(0)
            return "429"
        if self.calls >= 3_000 and self.down_at == float("inf"):
            self.down_at = time.monotonic()
        if row % 1_000 == 8 or 0 <= time.monotonic() - self.down_at < 1.2:
            return "500"
        if number > 3:
            return "ok"
        answers = ["500", "hang", "reset", "garbage"] + ["ok"] * 36
        return Random(f"{row}/{number}").choice(answers)


def flaky_pipeline(name: str, url: str) -> Pipeline:
    """Every policy that a stage before such a service wants."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out")

    @pipeline.stage
    def choose(row: dict[str, Any]) -> dict[str, Any] | None:
        return None if fate(row["n"]) == "dropped" else row

    @pipeline.stage(
        concurrency=64,
        timeout=TIMEOUT,
        retry=Retry(ATTEMPTS, first=0.05, cap=0.2),
        breaker=CircuitBreaker(failures=12, open_for=0.5, probes=2),
        limit=RateLimit(per_second=RATE, burst=BURST),
    )
    async def enrich(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        return await ask(url, row, ctx)

    @pipeline.stage(on_error="skip")
    def check(row: dict[str, Any]) -> dict[str, Any]:
        if fate(row["n"]) == "skipped":
            raise ValueError("not wanted")
        return row

    @pipeline.stage(fallback={"answer": None})
    def refine(row: dict[str, Any]) -> dict[str, Any]:
        if fate(row["n"]) == "defaulted":
            raise ValueError("nothing to refine")
        return row

    return pipeline


class Change(NamedTuple):
    """A breaker's change of state."""

    at: float
    state: str
    since: float
    """For one that opened: when, by what it has left; the machine may have stood still before it was told."""


def listen(changes: list[Change], breakers: dict[str, Breaker], open_for: float) -> Callable[[Event], None]:
    """Note when the breaker changed, and to what."""

    def hear(event: Event) -> None:
        if event.kind.startswith("breaker_"):
            at = time.monotonic()
            since = at + breakers[event.subject].seconds_left - open_for
            changes.append(Change(at, event.kind.removeprefix("breaker_"), since))

    return hear


# --- what the service's log must show ---------------------------------------------------------------------------


def check_pace(calls: list[Call], rate: float, burst: float) -> None:
    """No second with more calls than the limit allows, but for timers that ring late; on their way to the service calls
    may come together by as much as the longest way took.
    """
    assert most_within(call.begun for call in calls) <= rate * (1 + TIMERS) + burst + 1
    way = max(call.came - call.begun for call in calls)
    assert most_within(call.came for call in calls) <= rate * (1 + TIMERS + way) + burst + 1


def check_retry_after(calls: list[Call], seconds: float) -> int:
    """Who is told to wait lets nothing begin for as long; returns how often that was."""
    told = [call for call in calls if call.answer == "429"]
    for slow_down in told:
        early = [c for c in calls if slow_down.answered + 4 * LAG < c.begun < slow_down.came + seconds]
        assert not early, f"{len(early)} calls began within {seconds} s of the request to wait"
    return len(told)


def check_breaker(calls: list[Call], changes: list[Change], open_for: float, probes: int) -> int:
    """An open breaker lets nothing begin, a half open one its probes; returns how often it opened."""
    for (at, state, since), (end, *_) in pairwise(changes):
        begun = sorted((c for c in calls if at < c.begun < end), key=lambda c: c.begun)
        if state == "open":
            assert not begun
            assert end - since >= open_for - 1e-6
        elif state == "half_open":
            # Beyond the first ones, each may begin only when one before it has ended, and not by a fault.
            ended = accumulate((call.answer in {"ok", "400", "429"} for call in begun), initial=0)
            assert all(before < good + probes for before, good in zip(range(len(begun)), ended, strict=False))
    return sum(change.state == "open" for change in changes)


def check_hangs(calls: list[Call], timeout: float) -> int:
    """Whoever gets no answer hangs up in time; returns how many did."""
    hung = [call for call in calls if call.answer == "hang"]
    lasted = [call.gone - call.begun for call in hung]
    assert min(lasted) >= timeout - LAG
    assert median(lasted) <= timeout + 5 * LAG
    assert max(lasted) <= timeout + 3  # on a machine that stands still for a while
    return len(hung)


# --- tests ------------------------------------------------------------------------------------------------------


@pytest.mark.alone
async def test_five_thousand_rows_through_a_flaky_service(broker_url: str, name: str) -> None:
    """Every row ends in the one right way; the service was called no faster, no oftener and no longer than allowed."""
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(ROWS)], broker=broker_url)
    changes: list[Change] = []
    with FlakyServer(Moods()) as server:
        options = {"max_in_flight": 500}
        async with running(broker_url, flaky_pipeline(name, server.url), **options) as worker:
            worker.runtime.listeners.append(listen(changes, worker.runtime.breakers, 0.5))
            await until(lambda: worker.stats.rows >= ROWS, 90)
            stats, counts = worker.stats, worker.runtime.stage_counts["enrich"]
    await check_rows(broker_url, name)
    fates = Counter(fate(n) for n in range(ROWS))
    assert stats.rows == ROWS == stats.results + stats.dropped + stats.skipped + stats.dead_letters
    assert (stats.dropped, stats.skipped, stats.dead_letters) == (fates["dropped"], fates["skipped"], fates["dead"])
    assert (stats.results, stats.defaulted) == (fates["result"] + fates["defaulted"], fates["defaulted"])
    calls, per_row = server.calls, server.per_row()
    check_pace(calls, RATE, BURST)
    assert check_retry_after(calls, 1.0) == 3
    assert check_breaker(calls, changes, 0.5, 2) >= 2
    assert check_hangs(calls, TIMEOUT) > 50
    assert counts.timeouts >= sum(call.answer == "hang" for call in calls)
    # A call that ends before it left (its time was up while it waited for a connection) is none to the service.
    assert 0 <= counts.calls - len(calls) <= 20
    assert set(per_row) == {n for n in range(ROWS) if fate(n) != "dropped"}
    assert max(per_row.values()) <= ATTEMPTS
    assert sum(per_row[n] - 1 for n in range(7, ROWS, 200)) <= 2  # but for a time-out on a busy machine
    assert all(per_row[n] == ATTEMPTS for n in range(8, ROWS, 1_000))


@pytest.mark.alone
async def test_a_limit_holds_when_slots_were_busy(tmp_path: Path, name: str) -> None:
    """Rows whose turn came while every slot was taken do not all begin together afterwards."""

    def plan(row: int, number: int) -> str:
        return "hang" if row < 10 and number == 1 else "ok"

    calls = await calls_of(name, tmp_path, plan, timeout=1.0, retry=Retry(2, first=0.05))
    assert len(calls) == 310
    check_pace(calls, 100, 1)
    check_hangs(calls, 1.0)


async def test_a_limit_holds_when_a_breaker_was_open(tmp_path: Path, name: str) -> None:
    """Nor those whose turn came while the breaker was open."""
    calls = await calls_of(
        name,
        tmp_path,
        lambda row, number: "500" if 20 <= row < 25 and number == 1 else "ok",
        retry=Retry(6, first=0.01),
        breaker=CircuitBreaker(failures=3, open_for=1.0),
    )
    check_pace(calls, 100, 1)


@pytest.mark.alone
async def test_retry_after_holds_for_rows_whose_turn_had_come(tmp_path: Path, name: str) -> None:
    """A request to wait is obeyed also by rows that might have begun before it, had a slot been free."""
    came = count(1)

    def plan(row: int, number: int) -> str:
        nth = next(came)
        return "hang" if nth <= 10 else "429" if nth == 11 else "ok"

    calls = await calls_of(name, tmp_path, plan, timeout=1.0, retry=Retry(4, first=0.01))
    assert check_retry_after(calls, 1.0) == 1
    check_pace(calls, 100, 1)


async def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/enrich_http.py: its figures are exact, and what it pays is what its service saw."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = runpy.run_path(str(EXAMPLES / "enrich_http.py"))
    async with asyncio.timeout(60):
        result, again, calls, server = await example["main"](600)
    metrics, stage = result.metrics, result.stages["classify"]
    assert (metrics.total_rows, metrics.results, metrics.failed_rows, metrics.defaulted_rows) == (600, 594, 6, 12)
    assert calls == stage["calls"] == 594 + stage["retries"]
    assert stage["retries"] == server.faults > 0
    assert result.costs.total_cost == calls * Decimal(example["PRICE"])
    assert list(result.data["id"]) == [n for n in range(600) if n % 100 != 99]
    assert again.data.equals(result.data)
    assert again.stages["classify"]["hits"] == 582
    assert server.calls - calls == again.stages["classify"]["calls"] == 12  # failures are not kept
    assert f"{calls:,}" in capsys.readouterr().out


async def calls_of(
    name: str, folder: Path, plan: Plan, *, rate: float = 100, rows: int = 300, **policies: Any
) -> list[Call]:
    """What the service sees of a bounded run with ten slots, in which every row must succeed in the end, or fail."""
    with FlakyServer(plan) as server:
        pipeline = paid_pipeline(name, server.url, concurrency=10, limit=RateLimit(per_second=rate), **policies)
        async with asyncio.timeout(60):
            result = await pipeline.run_async(
                [{"n": n} for n in range(rows)],
                broker=f"local://{folder / 'broker'}",
                options=WorkerOptions(partitions=1),
            )
    assert result.metrics.processed_rows + result.metrics.failed_rows == rows
    return server.calls


async def check_rows(url: str, name: str) -> None:
    """Results and dead letters hold the right rows, each once, and the context counts the same."""
    out = await rows_of(url, f"{name}.out")
    dead = await rows_of(url, f"{name}.dlq")
    assert sorted(row["n"] for row in out) == [n for n in range(ROWS) if fate(n) in {"result", "defaulted"}]
    assert sorted(row["n"] for row in dead) == [n for n in range(ROWS) if fate(n) == "dead"]
    assert all(row["answer"] == (row["n"] * 2 if fate(row["n"]) == "result" else None) for row in out)
    context = await context_of(url, name)
    fates = Counter(fate(n) for n in range(ROWS))
    assert (context.processed_rows, context.failed_rows) == (fates["result"] + fates["defaulted"], fates["dead"])
    assert (context.dropped_rows, context.skipped_rows) == (fates["dropped"], fates["skipped"])
    assert (context.completed_rows, context.defaulted_rows) == (ROWS, fates["defaulted"])
