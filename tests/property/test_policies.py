"""Any mix of policies and failures: each row ends in exactly one way, calls stay within what was promised."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill import CircuitBreaker, RateLimit, Retry, StopExecution
from rowmill.handlers.flow import Flow
from rowmill.handlers.outcomes import Failure
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import Stage, make_stage
from support.virtual import passage


class Trouble(Exception):  # noqa: N818 - a handler's own
    """What handlers raise."""


options = st.fixed_dictionaries(
    {},
    optional={
        "retry": st.builds(
            Retry,
            attempts=st.integers(1, 4),
            first=st.sampled_from([0.0, 0.1, 5.0]),
            deadline=st.sampled_from([None, 3.0]),
        ),
        "timeout": st.sampled_from([0.5, 5.0]),
        "breaker": st.builds(
            CircuitBreaker,
            failures=st.integers(1, 4),
            open_for=st.sampled_from([1.0, 20.0]),
            probes=st.integers(1, 2),
            when_open=st.sampled_from(["wait", "fail"]),
        ),
        "limit": st.builds(RateLimit, per_second=st.sampled_from([2.0, 50.0]), burst=st.sampled_from([1, 5])),
        "fallback": st.just({"fallback": True}),
        "on_error": st.sampled_from(["skip", "dead_letter"]),
        "concurrency": st.integers(1, 5),
        "batch": st.integers(1, 3),
    },
)
"""Options of one stage."""

acts = st.lists(st.sampled_from(["pass", "pass", "pass", "drop", "raise", "hang", "split"]), min_size=1, max_size=8)
"""What the calls of a handler do, one after the other, over and over."""


class Handler:
    """Does what its script says; counts calls by row, and how many run at once."""

    def __init__(self, script: list[str], number: int) -> None:
        self.script = script
        self.number = number
        self.calls: Counter[int] = Counter()
        self.turn = 0
        self.running = self.most = 0

    def stage(self, given: dict[str, Any]) -> Stage:
        """The stage with these options."""

        async def one(row: dict[str, Any]) -> Any:
            return await self.act([row], many=False)

        async def many(rows: list[dict[str, Any]]) -> Any:
            return await self.act(rows, many=True)

        return make_stage(many if "batch" in given else one, name=f"s{self.number}", **given)

    async def act(self, rows: list[dict[str, Any]], *, many: bool) -> Any:
        """The next step."""
        for row in rows:
            self.calls[row["n"]] += 1
        step = self.script[self.turn % len(self.script)]
        self.turn += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(60 if step == "hang" else 0.01)
            if step == "raise":
                raise Trouble(step)
            results = [{"pass": row, "hang": row, "drop": None, "split": [row, row]}[step] for row in rows]
            return results if many else results[0]
        finally:
            self.running -= 1


@settings(max_examples=250, deadline=None)
@given(
    stages=st.lists(st.tuples(options, acts), min_size=1, max_size=3),
    rows=st.integers(1, 25),
    keys=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 1_000),
)
def test_each_row_ends_in_one_way(
    stages: list[tuple[dict[str, Any], list[str]]], rows: int, keys: int | None, seed: int
) -> None:
    """Rows in = results + dropped + skipped + dead letters; nothing is done twice, attempts and slots are kept."""
    handlers = [Handler(script, number) for number, (_, script) in enumerate(stages)]
    made = [handler.stage(given) for handler, (given, _) in zip(handlers, stages, strict=True)]
    order = [n % keys for n in range(rows)] if keys else None
    seen = passage(made, [{"n": n} for n in range(rows)], keys=order, seed=seed)
    assert seen.given_up == []
    ends = Counter(_end(outcome) for outcome in seen.outcomes.values())
    assert sum(ends.values()) == rows
    assert set(ends) <= {"result", "dropped", "skip", "dead_letter"}
    for n, outcome in seen.outcomes.items():
        results = outcome if isinstance(outcome, list) else [outcome] if isinstance(outcome, dict) else []
        assert {row["n"] for row in results} <= {n}
    for handler, stage in zip(handlers, made, strict=True):
        assert handler.most <= stage.concurrency
        attempts = stage.retry.attempts if stage.retry else 1
        split = 2**handler.number
        assert all(count <= attempts * split for count in handler.calls.values())
    if keys:
        for key in range(keys):
            mine = [n for n in seen.order if n % keys == key]
            assert mine == sorted(mine)


@settings(max_examples=120, deadline=None)
@given(
    stages=st.lists(st.tuples(options, acts), min_size=1, max_size=2),
    rows=st.integers(1, 20),
    stopping=st.integers(0, 25),
    drained=st.sampled_from([None, 0.0, 0.5, 8.0]),
    seed=st.integers(0, 1_000),
)
def test_stopping_leaves_rows_undone_but_never_half_done(
    stages: list[tuple[dict[str, Any], list[str]]], rows: int, stopping: int, drained: float | None, seed: int
) -> None:
    """Whatever ends the session, each row is done in one way or given up, and of a key nothing after a row given up."""

    async def stop(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == stopping:
            raise StopExecution("enough")
        return row

    async def drain(flow: Flow, runtime: Runtime) -> None:
        if drained is not None:
            await runtime.clock.sleep(drained)
            flow.drain(2.0)

    made = [Handler(script, number).stage(given) for number, (given, script) in enumerate(stages)]
    made.insert(seed % (len(made) + 1), make_stage(stop))
    seen = passage(made, [{"n": n} for n in range(rows)], keys=[n % 3 for n in range(rows)], seed=seed, during=drain)
    assert set(seen.outcomes) | set(seen.given_up) == set(range(rows))
    assert not set(seen.outcomes) & set(seen.given_up)
    assert len(seen.given_up) == len(set(seen.given_up))
    for key in range(3):
        done = [n for n in sorted(seen.outcomes) if n % 3 == key]
        undone = [n for n in sorted(seen.given_up) if n % 3 == key]
        assert not done or not undone or max(done) < min(undone)


def _end(outcome: Any) -> str:
    if isinstance(outcome, Failure):
        return outcome.then
    return "result" if outcome else "dropped"
