"""Caches of stages: what makes a key, what is kept, who waits for whom, and what a change of code changes."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import logging
import math
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rowmill.handlers.cache import Answer, Before, Cache, Flights, Origin, StageCache, fingerprint
from rowmill.handlers.context import RowContext
from rowmill.state.answers import MemoryAnswers
from rowmill.state.errors import BadRowError, ConfigError
from support.fake_clock import FakeClock

pytestmark = pytest.mark.timeout(30)

ORIGIN = Origin("live", "in", 3, 42)
OTHER = Origin("live", "in", 3, 43)
MIB = 1 << 20


def score(*args: Any, **options: Any) -> dict[str, Any]:
    """A handler."""
    return {**args[-1], **options, "score": 1}


def made(cache: Cache | None = None, **options: Any) -> StageCache:
    """The cache of a stage with nothing in it."""
    answers = options.pop("answers", None) or MemoryAnswers(16 * MIB)
    stage, handler = options.pop("stage", "score"), options.pop("handler", score)
    return StageCache(cache or Cache(), stage, handler, answers, options.pop("clock", None) or FakeClock(), **options)


class TestSpec:
    """What a user may write."""

    def test_everything_has_a_default(self) -> None:
        """For ever, the whole row, the code's fingerprint, 256 MiB, not shared."""
        assert Cache() == Cache(ttl=None, inputs=None, parameters=None, version=None, max_bytes=256 * MIB, shared=False)

    @pytest.mark.parametrize(
        "options",
        [
            {"ttl": 0.001, "inputs": ["text"], "parameters": {"model": "small", "n": [1, None]}, "version": "2"},
            {"ttl": 86_400, "inputs": ("a", "b"), "max_bytes": MIB, "shared": True},
            {"inputs": lambda row: row["text"].lower()},
        ],
    )
    def test_what_may_be_given(self, options: dict[str, Any]) -> None:
        """Each option in its usual forms."""
        Cache(**options)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("ttl", 0),
            ("ttl", -1),
            ("ttl", math.inf),
            ("ttl", math.nan),
            ("ttl", True),
            ("ttl", "1h"),
            ("inputs", "text"),
            ("inputs", b"text"),
            ("inputs", []),
            ("inputs", [1]),
            ("inputs", {"text"}),
            ("inputs", 5),
            ("parameters", ["a"]),
            ("parameters", {1: "a"}),
            ("parameters", {"a": object()}),
            ("parameters", {"a": {1, 2}}),
            ("version", ""),
            ("version", 2),
            ("max_bytes", MIB - 1),
            ("max_bytes", 1e9),
            ("max_bytes", True),
            ("shared", "yes"),
            ("shared", None),
        ],
    )
    def test_what_may_not(self, option: str, value: Any) -> None:
        """The error names the option."""
        with pytest.raises(ConfigError, match=rf"^Cache\({option}=\)"):
            Cache(**{option: value})

    def test_parameters_that_contain_themselves(self) -> None:
        """Refused like everything that is no JSON."""
        endless: dict[str, Any] = {}
        endless["self"] = endless
        with pytest.raises(ConfigError, match="parameters"):
            Cache(parameters=endless)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def typed(value: Any) -> Any:
    """A value in which 1, 1.0, True, 0.0, -0.0 and NaN are what they are."""
    if isinstance(value, dict):
        return {name: typed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return (type(value), repr(value))


class TestKeys:
    """What counts as the same question."""

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"a": 1}, {"a": 1.0}),
            ({"a": 1}, {"a": True}),
            ({"a": 1.0}, {"a": True}),
            ({"a": 0}, {"a": False}),
            ({"a": 0.0}, {"a": -0.0}),
            ({"a": "1"}, {"a": 1}),
            ({"a": None}, {}),
            ({"a": None}, {"a": "null"}),
            ({"a": None}, {"a": math.nan}),
            ({"a": []}, {"a": {}}),
            ({"a": "b,c"}, {"a": "b", "c": ""}),
            ({"a": [1, 2]}, {"a": [2, 1]}),
            ({"a": [[1], 2]}, {"a": [[1, 2]]}),
            ({"a": "é"}, {"a": "e\u0301"}),
            ({"a": 2**64}, {"a": float(2**64)}),
            ({"a": Decimal("1.0")}, {"a": Decimal("1.00")}),
            ({"a": Decimal("1.0")}, {"a": ["Decimal", "1.0"]}),
            ({"a": Decimal("1.0")}, {"a": "1.0"}),
            ({"a": b"a"}, {"a": "a"}),
            ({"a": date(2024, 1, 1)}, {"a": "2024-01-01"}),
            ({"a": date(2024, 1, 1)}, {"a": datetime(2024, 1, 1)}),  # noqa: DTZ001 - rows may have them
            ({"a": datetime(2024, 1, 1, tzinfo=UTC)}, {"a": datetime(2024, 1, 1)}),  # noqa: DTZ001
        ],
    )
    def test_what_differs(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        """Rows that a handler can tell apart have different keys."""
        cache = made()
        keys = {cache.key(one), cache.key(other)}
        assert len(keys) == 2
        assert None not in keys

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}),
            ({"a": math.nan}, {"a": float("nan")}),
            ({"a": (1, 2)}, {"a": [1, 2]}),
            ({"a": "\ud800"}, {"a": "\ud800"}),
            ({"a": Decimal("1.0"), "b": 1}, {"b": 1, "a": Decimal("1.0")}),
        ],
    )
    def test_what_is_the_same(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        """The order of fields does not matter."""
        cache = made()
        assert cache.key(one) == cache.key(other) is not None

    @given(
        st.dictionaries(st.text(max_size=3), JSON, max_size=3), st.dictionaries(st.text(max_size=3), JSON, max_size=3)
    )
    def test_keys_are_equal_where_rows_are(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        """For any two rows of JSON."""
        cache = made(Cache(version="1"))
        assert (cache.key(one) == cache.key(other)) == (typed(one) == typed(other))

    def test_only_the_chosen_fields_count(self) -> None:
        """Others may be what they like; their names are a set, and absent is not null."""
        cache, same = made(Cache(inputs=["a", "b"])), made(Cache(inputs=("b", "a", "b")))
        assert cache.key({"a": 1, "b": 2, "c": 3}) == cache.key({"b": 2, "a": 1}) == same.key({"a": 1, "b": 2})
        assert len({cache.key({"a": 1}), cache.key({"a": 1, "b": None}), cache.key({"b": 1}), cache.key({})}) == 4

    def test_a_function_of_the_row(self) -> None:
        """Its result is what counts; what it raises is the row's failure."""
        cache = made(Cache(inputs=lambda row: row["text"].strip().lower()))
        assert cache.key({"text": " A ", "n": 1}) == cache.key({"text": "a", "n": 2})
        with pytest.raises(KeyError):
            cache.key({})
        with pytest.raises(AttributeError):
            cache.key({"text": 1})
        assert cache.refused == 0

    @pytest.mark.parametrize("value", [object(), {1, 2}, {"a": 1, 2: 3}, 1j], ids=lambda value: type(value).__name__)
    def test_what_has_no_form_is_not_cached(self, value: Any, caplog: pytest.LogCaptureFixture) -> None:
        """Two values that look alike must not share an answer: the row runs, is counted, and one line says so."""
        cache = made()
        assert cache.key({"a": value}) is None
        assert cache.key({"a": value}) is None
        assert cache.refused == 2
        assert [record.levelno for record in caplog.records] == [logging.WARNING]

    def test_endless_rows_are_not_cached(self) -> None:
        """A row that contains itself, or is nested without end, is refused."""
        row: dict[str, Any] = {}
        row["self"] = row
        deep: Any = 0
        for _ in range(100_000):
            deep = [deep]
        cache = made()
        assert (cache.key(row), cache.key({"a": deep}), cache.refused) == (None, None, 2)

    @pytest.mark.parametrize(
        ("other", "stage", "handler"),
        [
            (Cache(parameters={"prompt": "b"}), "score", score),
            (Cache(parameters={"prompt": "a", "model": None}), "score", score),
            (Cache(), "score", score),
            (Cache(parameters={"prompt": "a"}), "score2", score),
            (Cache(parameters={"prompt": "a"}), "score", lambda row: row),
            (Cache(parameters={"prompt": "a"}, version="1"), "score", score),
        ],
    )
    def test_stage_code_and_parameters_count(self, other: Cache, stage: str, handler: Callable[..., Any]) -> None:
        """A change of any of them asks another question."""
        first = made(Cache(parameters={"prompt": "a"}))
        assert first.key({"a": 1}) == made(Cache(parameters={"prompt": "a"})).key({"a": 1})
        assert first.key({"a": 1}) != made(other, stage=stage, handler=handler).key({"a": 1})

    def test_a_version_stands_for_the_code(self) -> None:
        """With a version the code does not matter, and the version does."""
        one, two = made(Cache(version="1")), made(Cache(version="1"), handler=lambda row: row)
        assert one.key({}) == two.key({})
        assert one.key({}) != made(Cache(version="2")).key({})

    def test_time_and_room_do_not_count(self) -> None:
        """Another ttl, bound or sharing finds the answers that are there."""
        assert made(Cache()).key({}) == made(Cache(ttl=5, max_bytes=MIB, shared=True)).key({})


def keep(cache: StageCache, row: dict[str, Any], outcome: Any, cost: str = "0", tokens: int = 0) -> bytes | None:
    """Store an answer to a row."""
    key = cache.key(row)
    assert key is not None
    return cache.keep(key, outcome, Decimal(cost), tokens, ORIGIN)


def find(cache: StageCache, row: dict[str, Any]) -> Answer | None:
    """Look for the answer to a row."""
    key = cache.key(row)
    assert key is not None
    return cache.find(key)


class TestAnswers:
    """What is kept and found."""

    @pytest.mark.parametrize("outcome", [None, {}, [], {"a": None}, [{}], [{"a": 1}, {"b": [1.5, "é", True]}]])
    def test_every_outcome_is_kept(self, outcome: Any) -> None:
        """None and empty results are answers as well, and not the same as having none."""
        cache = made()
        assert find(cache, {"a": 1}) is None
        keep(cache, {"a": 1}, outcome)
        answer = find(cache, {"a": 1})
        assert answer is not None
        assert answer.outcome == outcome
        assert (cache.stored, cache.hits) == (1, 1)

    def test_each_hit_is_a_copy(self) -> None:
        """What later stages do to a row does not reach the next hit."""
        cache = made()
        outcome = {"list": [1]}
        keep(cache, {}, outcome)
        outcome["list"].append(2)
        for _ in range(2):
            answer = find(cache, {})
            assert answer is not None
            assert answer.outcome == {"list": [1]}
            assert isinstance(answer.outcome, dict)
            answer.outcome["list"].append(3)

    def test_who_paid_what(self) -> None:
        """Cost, tokens and the paying row come back exactly; another row, or another session, did not pay."""
        cache = made()
        keep(cache, {}, {"a": 1}, "0.1234567890123456789012345678901", 17)
        answer = find(cache, {})
        assert answer is not None
        assert (answer.cost, answer.tokens, answer.origin) == (Decimal("0.1234567890123456789012345678901"), 17, ORIGIN)
        assert answer.paid_by(ORIGIN)
        assert not answer.paid_by(OTHER)
        assert not answer.paid_by(ORIGIN._replace(session="replay"))

    def test_time_to_live(self) -> None:
        """An answer is found until its ttl is over, and not from then on."""
        clock = FakeClock()
        cache = made(Cache(ttl=10), clock=clock)
        keep(cache, {}, {"a": 1})
        clock.advance(9.999)
        assert find(cache, {}) is not None
        clock.advance(0.001)
        assert find(cache, {}) is None

    def test_a_shorter_ttl_counts_at_once(self) -> None:
        """An answer that was stored for a day, or for ever, is not given after the hour that is asked for now."""
        clock, answers = FakeClock(), MemoryAnswers(MIB)
        keep(made(clock=clock, answers=answers), {}, {"a": 1})
        clock.advance(3_600)
        assert find(made(Cache(ttl=3_600), clock=clock, answers=answers), {}) is None
        assert find(made(Cache(ttl=3_601), clock=clock, answers=answers), {}) is not None

    @pytest.mark.parametrize(
        "outcome",
        [
            pytest.param({"a": object()}, id="an object"),
            {"a": math.nan},
            {"a": (1, 2)},
            {"a": datetime(2024, 1, 1, tzinfo=UTC)},
            {"a": {1: 2}},
            {"a": 2**70},
            {"a": "\ud800"},
        ],
        ids=str,
    )
    def test_what_json_does_not_give_back_is_not_kept(self, outcome: Any, caplog: pytest.LogCaptureFixture) -> None:
        """A hit must not differ from a call: such answers are counted, and one line says so."""
        cache = made()
        assert keep(cache, {}, outcome) is None
        assert keep(cache, {}, outcome) is None
        assert find(cache, {}) is None
        assert (cache.stored, cache.refused) == (0, 2)
        assert len(caplog.records) == 1

    def test_arrays_are_not_kept(self) -> None:
        """Comparing them raises; it is no error here."""
        numpy = pytest.importorskip("numpy")
        cache = made()
        assert keep(cache, {}, {"a": numpy.array([1, 2])}) is None
        assert cache.refused == 1

    def test_a_large_answer_is_not_kept(self) -> None:
        """Above a sixteenth of the room it is handed to those who wait, and not stored."""
        cache = made(Cache(max_bytes=MIB))
        assert keep(cache, {}, {"a": "x" * (MIB // 16)}) is not None
        assert find(cache, {}) is None
        assert (cache.stored, cache.refused) == (0, 1)
        keep(cache, {}, {"a": "x" * (MIB // 16 - 200)})
        assert find(cache, {}) is not None

    @pytest.mark.parametrize(
        "value",
        [
            b"",
            b"\x01",
            b"\x02" + Answer({}, Decimal(0), 0, 0, ORIGIN).encode()[1:],
            b"garbage",
            b"\x01{}",
            b"\x01[]",
            b'\x01[{},"x",0,0,"live","in",0,0]',
            b'\x01[{},"-1",0,0,"live","in",0,0]',
            b'\x01[{},"NaN",0,0,"live","in",0,0]',
            b'\x01["text","0",0,0,"live","in",0,0]',
            b'\x01[[1],"0",0,0,"live","in",0,0]',
            b'\x01[{},"0","0",0,"live","in",0,0]',
            b'\x01[{},"0",0,0,"live","in",0,true]',
            b'\x01[{},"0",0,0,"live","in",0]',
        ],
    )
    def test_garbage_is_a_miss(self, value: bytes) -> None:
        """Whatever lies under a key, a newer format included, is counted and paid for again."""
        cache = made()
        key = cache.key({}) or b""
        cache.answers.put(key, value, None)
        assert cache.find(key) is None
        assert cache.damaged == 1
        cache.keep(key, {"a": 1}, Decimal(0), 0, ORIGIN)
        assert cache.find(key) is not None

    @given(st.binary(max_size=60))
    def test_no_bytes_are_an_error(self, value: bytes) -> None:
        """Decoding gives an answer or a ValueError, for any bytes."""
        for text in (value, b"\x01" + value):
            with contextlib.suppress(ValueError):
                Answer.decode(text)

    def test_answers_keep_their_form(self) -> None:
        """What this version writes, later ones have to read."""
        text = b'\x01[{"a":1},"0.25",7,1750000000000,"live","in",3,42]'
        answer = Answer({"a": 1}, Decimal("0.25"), 7, 1_750_000_000_000, ORIGIN)
        assert answer.encode() == text
        assert Answer.decode(text) == answer

    def test_encoding_says_what_is_wrong(self) -> None:
        """The reason is one for people."""
        with pytest.raises(BadRowError, match="JSON"):
            Answer({"a": math.nan}, Decimal(0), 0, 0, ORIGIN).encode()

    def test_sharing(self) -> None:
        """Every answer that is stored is handed over with its stage and expiry; those that are not are not."""
        shared: list[Any] = []
        clock = FakeClock()
        cache = made(Cache(ttl=1, max_bytes=MIB), clock=clock, share=lambda *told: shared.append(told))
        value = keep(cache, {}, {"a": 1})
        keep(cache, {"b": 1}, {"a": "x" * MIB})
        keep(cache, {"b": 2}, {"a": math.nan})
        assert shared == [("score", ORIGIN, cache.key({}), value, clock.now_ms() + 1_000)]


class TestBefore:
    """What a call itself did to its row's context."""

    @staticmethod
    def context() -> RowContext:
        """A row's."""
        return RowContext("in", 3, 42, 1_000, "k", (("h", b"1"),), "live")

    def test_what_a_call_cost(self) -> None:
        """The difference is exact, and what the row had spent before is not in it."""
        context = self.context()
        context.add_cost(Decimal(1000000000000000000000), 5)
        before = Before(context)
        context.add_cost(Decimal("0.0000000000000000001"), 7)
        assert (before.cost, before.tokens, before.has_effects) == (Decimal("0.0000000000000000001"), 7, False)
        assert before.origin == ORIGIN

    @pytest.mark.parametrize(
        "act",
        [
            lambda context: context.emit("elsewhere", {}),
            lambda context: setattr(context, "key", "other"),
            lambda context: setattr(context, "headers", {"h": "2"}),
            lambda context: setattr(context, "timestamp", 2),
        ],
        ids=["emit", "key", "headers", "timestamp"],
    )
    def test_what_a_hit_could_not_do(self, act: Callable[[RowContext], None]) -> None:
        """Effects besides result, cost and tokens are noticed: such an answer is not to be kept."""
        context = self.context()
        before = Before(context)
        assert not before.has_effects
        act(context)
        assert before.has_effects

    def test_writes_to_tables_are_effects(self) -> None:
        """A hit would leave them out."""
        context = self.context()
        before = Before(context)
        context._tables = types.SimpleNamespace(operations=[1])  # type: ignore[assignment]
        assert before.has_effects

    def test_without_a_context(self) -> None:
        """A chain that runs without contexts costs nothing, and nobody paid."""
        before = Before(None)
        assert (before.cost, before.tokens, before.has_effects) == (Decimal(0), 0, False)
        assert before.origin == Origin("", "", -1, -1)

    def test_refusing(self, caplog: pytest.LogCaptureFixture) -> None:
        """The engine counts what it does not want to keep, in one line."""
        cache = made()
        cache.refuse("the handler emits")
        cache.refuse("the handler emits")
        assert (cache.refused, len(caplog.records)) == (2, 1)


class TestFlights:
    """Equal keys in flight."""

    async def test_one_computes_the_others_wait(self) -> None:
        """The first leads; all others get its answer; then nothing is in flight."""
        flights = Flights()
        assert flights.enter(b"k") is None
        waiting = [flights.enter(b"k") for _ in range(3)]
        assert flights.enter(b"other") is None
        flights.leave(b"k", b"answer")
        assert [await one for one in waiting if one is not None] == [b"answer"] * 3
        assert len(flights) == 1
        flights.leave(b"other")
        assert len(flights) == 0
        assert flights.enter(b"k") is None

    async def test_a_failure_is_not_shared(self) -> None:
        """Each that fails hands the lead to the next one, in the order they came."""
        flights = Flights()
        flights.enter(b"k")
        first, second, third = (flights.enter(b"k") for _ in range(3))
        assert first is not None
        assert second is not None
        assert third is not None
        flights.leave(b"k")
        assert (first.done(), second.done(), third.done()) == (True, False, False)
        assert await first is None
        flights.leave(b"k")
        assert await second is None
        assert not third.done()
        flights.leave(b"k", b"answer")
        assert await third == b"answer"
        assert len(flights) == 0

    async def test_late_ones_wait_for_the_new_lead(self) -> None:
        """Who comes after a failure waits behind those who are there."""
        flights = Flights()
        flights.enter(b"k")
        first = flights.enter(b"k")
        flights.leave(b"k")
        late = flights.enter(b"k")
        assert late is not None
        assert first is not None
        assert await first is None
        flights.leave(b"k", b"answer")
        assert await late == b"answer"

    async def test_a_cancelled_waiter_harms_nobody(self) -> None:
        """It is passed over, whether its task or its future was cancelled."""
        flights = Flights()
        flights.enter(b"k")
        tasks = []
        for _ in range(4):
            waiting = flights.enter(b"k")
            assert waiting is not None
            tasks.append(asyncio.create_task(flights.wait(b"k", waiting)))
        abandoned = flights.enter(b"k")
        assert abandoned is not None
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        flights.abandon(b"k", abandoned)
        await asyncio.sleep(0)
        flights.leave(b"k")
        assert await tasks[1] is None
        flights.leave(b"k", b"answer")
        assert await tasks[3] == b"answer"
        assert len(flights) == 0

    async def test_a_lead_that_comes_too_late_goes_on(self) -> None:
        """Cancelled in the very moment in which the lead came to it, a waiter hands it on."""
        flights = Flights()
        flights.enter(b"k")
        tasks = []
        for _ in range(2):
            waiting = flights.enter(b"k")
            assert waiting is not None
            tasks.append(asyncio.create_task(flights.wait(b"k", waiting)))
        await asyncio.sleep(0)
        flights.leave(b"k")
        tasks[0].cancel()
        assert await tasks[1] is None
        assert tasks[0].cancelled()
        flights.leave(b"k", None)
        assert len(flights) == 0

    async def test_an_answer_that_comes_too_late_is_no_lead(self) -> None:
        """Cancelled in the moment in which the answer came, a waiter has nothing to hand on."""
        flights = Flights()
        flights.enter(b"k")
        waiting = flights.enter(b"k")
        assert waiting is not None
        task = asyncio.create_task(flights.wait(b"k", waiting))
        await asyncio.sleep(0)
        flights.leave(b"k", b"answer")
        task.cancel()
        await asyncio.wait({task})
        assert flights.enter(b"k") is None
        assert len(flights) == 1

    async def test_leaving_what_was_not_entered(self) -> None:
        """Nothing happens."""
        Flights().leave(b"k", b"answer")

    @given(st.lists(st.sampled_from(["enter", "fail", "answer", "cancel", "run"]), max_size=40))
    def test_nobody_waits_for_ever(self, steps: list[str]) -> None:
        """Whatever comes in whatever order: one leads at any time, and in the end all have an answer or gave up."""
        asyncio.run(self.play(steps))

    async def play(self, steps: list[str]) -> None:
        """Rows come, fail, answer and are cancelled."""
        flights, tasks, leads = Flights(), [], 0

        async def row() -> str:
            nonlocal leads
            waiting = flights.enter(b"k")
            value = None if waiting is None else await flights.wait(b"k", waiting)
            if value is not None:
                return "got"
            leads += 1
            assert leads == 1
            gave: bytes | None = None
            try:
                outcome = await turns.get()
                gave = b"answer" if outcome == "answer" else None
            finally:
                leads -= 1
                flights.leave(b"k", gave)
            return outcome

        turns: asyncio.Queue[str] = asyncio.Queue()
        for step in steps:
            if step == "enter":
                tasks.append(asyncio.create_task(row()))
            elif step == "cancel" and tasks:
                tasks[len(steps) % len(tasks)].cancel()
            elif step == "run":
                for _ in range(5):
                    await asyncio.sleep(0)
            else:
                turns.put_nowait(step)
        for _ in tasks:
            turns.put_nowait("answer")
        if tasks:
            done, pending = await asyncio.wait(tasks, timeout=5)
            assert not pending
            assert all(task.cancelled() or task.exception() is None for task in done)
        assert len(flights) == 0

    async def test_a_stage_counts_those_who_waited_as_hits(self) -> None:
        """One miss for the row that pays, a hit for each that gets its answer, copies all of them."""
        cache = made()
        key = cache.key({"a": 1}) or b""
        assert cache.enter(key) is None
        waiting = cache.enter(key)
        assert isinstance(waiting, asyncio.Future)
        cache.leave(key, cache.keep(key, {"b": 1}, Decimal(1), 5, ORIGIN))
        late = cache.enter(key)
        assert isinstance(late, Answer)
        got = await cache.wait(key, waiting)
        assert got == late
        assert got is not None
        assert got.outcome is not late.outcome
        assert (cache.misses, cache.hits, cache.stored) == (1, 2, 1)

    async def test_a_stage_counts_each_try_as_a_miss(self) -> None:
        """After a failure the next row pays itself."""
        cache = made()
        key = cache.key({"a": 1}) or b""
        assert cache.enter(key) is None
        waiting = cache.enter(key)
        assert isinstance(waiting, asyncio.Future)
        cache.leave(key, None)
        assert await cache.wait(key, waiting) is None
        cache.leave(key, None)
        assert (cache.misses, cache.hits) == (2, 0)

    async def test_an_answer_too_large_to_be_stored_goes_to_those_who_wait(self) -> None:
        """They need not pay for themselves."""
        cache = made(Cache(max_bytes=MIB))
        key = cache.key({"a": 1}) or b""
        cache.enter(key)
        waiting = cache.enter(key)
        assert isinstance(waiting, asyncio.Future)
        cache.leave(key, cache.keep(key, {"b": "x" * MIB}, Decimal(1), 5, ORIGIN))
        assert await cache.wait(key, waiting) is not None


# --- fingerprints ----------------------------------------------------------------------------------------------


def loaded(source: str, name: str = "user_code", **globals_: Any) -> Any:
    """The ``handler`` of a module with this source."""
    module = types.ModuleType(name)
    module.__dict__.update(globals_)
    exec(compile(textwrap.dedent(source), f"{name}.py", "exec"), module.__dict__)  # noqa: S102 - tests only
    return module.handler


BASE = """
import functools, re, enum, math
from decimal import Decimal

PROMPT = "score this"
UNUSED = 1
SETTINGS = {"model": "small", "stop": ["a", "b"]}
WORDS = {"good", "bad", "ugly"}
PATTERN = re.compile("a+")
CLIENT = object()

class Mode(enum.Enum):
    FAST = 1

def clean(text):
    return text.strip()

@functools.cache
def cached(text):
    return text + "cached"

class Scorer:
    weight = 2
    def __init__(self, model):
        self.model = model
        self.client = object()
    def score(self, text):
        return len(text) * self.weight
    def __call__(self, row):
        return {"score": self.score(row["text"])}

scorer = Scorer("small")

def outer(factor):
    def inner(row):
        return {"x": row["x"] * factor}
    return inner

def handler(row, ctx=None, *, limit=5):
    if row["kind"] in {"a", "b", "c"}:
        return None
    parts = [clean(part) for part in row["text"].split()]
    mode = Mode.FAST if PATTERN.match(row["text"]) else None
    return {"parts": parts, "prompt": PROMPT, "settings": SETTINGS, "mode": mode, "n": scorer.score("x"),
            "w": sorted(WORDS, key=lambda word: -len(word)), "cached": cached(row["text"]), "c": CLIENT, "pi": math.pi}
"""


class TestFingerprint:
    """What a change of code changes."""

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('"score this"', '"score that"'),
            ('"small", "stop"', '"large", "stop"'),
            ('["a", "b"]', '["b", "a"]'),
            ('{"good", "bad"', '{"good", "best"'),
            ('re.compile("a+")', 're.compile("a*")'),
            ('re.compile("a+")', 're.compile("a+", re.I)'),
            ("FAST = 1", "FAST = 2"),
            ("text.strip()", "text.rstrip()"),
            ('text + "cached"', 'text + "other"'),
            ("weight = 2", "weight = 3"),
            ("len(text) * self.weight", "len(text) + self.weight"),
            ('Scorer("small")', 'Scorer("large")'),
            ("limit=5", "limit=6"),
            ("ctx=None", "ctx=0"),
            ('{"a", "b", "c"}', '{"a", "b", "d"}'),
            ("-len(word)", "len(word)"),
            ('"n": scorer.score("x")', '"n": scorer.score("y")'),
            ("math.pi", "math.e"),
        ],
    )
    def test_what_is_seen(self, old: str, new: str) -> None:
        """A changed constant, default, helper, class, object or expression is another code."""
        assert old in BASE
        assert fingerprint(loaded(BASE)) != fingerprint(loaded(BASE.replace(old, new)))

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ("UNUSED = 1", "UNUSED = 2"),
            ("\ndef clean", "\n# a comment\n\n\ndef clean"),
            ('{"good", "bad", "ugly"}', '{"ugly", "good", "bad"}'),
            ("CLIENT = object()", "CLIENT = object(  )"),
        ],
    )
    def test_what_does_not_matter(self, old: str, new: str) -> None:
        """Comments, lines, what is not mentioned, and the order of a set."""
        assert old in BASE
        assert fingerprint(loaded(BASE)) == fingerprint(loaded(BASE.replace(old, new)))

    def test_a_module_may_go_by_another_name(self) -> None:
        """The command line and a script import one file under different names."""
        assert fingerprint(loaded(BASE, "reviews")) == fingerprint(loaded(BASE, "__main__"))

    def test_running_does_not_change_it(self) -> None:
        """Python rewrites bytecode while it runs; what counts is what it was made from."""
        source = (
            "def handler(row):\n    total = 0\n    for n in range(100):\n        total += n\n    return {'n': total}"
        )
        handler = loaded(source)
        before = fingerprint(handler)
        for _ in range(1_000):
            handler({})
        assert fingerprint(handler) == before == fingerprint(loaded(source))

    def test_closures(self) -> None:
        """What a function closes over is part of it."""
        one, same, other = (loaded(BASE + f"handler = outer({factor})") for factor in (2, 2, 3))
        assert fingerprint(one) == fingerprint(same) != fingerprint(other)

    def test_partials(self) -> None:
        """So are the arguments of a partial, positional or not."""
        made = [
            functools.partial(score),
            functools.partial(score, 1),
            functools.partial(score, 2),
            functools.partial(score, x=1),
            functools.partial(score, x=2),
            score,
        ]
        assert len({fingerprint(handler) for handler in made}) == len(made)
        assert fingerprint(functools.partial(score, x=1)) == fingerprint(functools.partial(score, x=1))

    def test_objects(self) -> None:
        """A callable object counts with its class's code and its simple attributes; others count by type."""
        same = [fingerprint(loaded(BASE + "handler = Scorer('small')")) for _ in range(2)]
        assert same[0] == same[1]
        assert same[0] != fingerprint(loaded(BASE + "handler = Scorer('large')"))
        assert same[0] != fingerprint(loaded(BASE.replace("weight = 2", "weight = 3") + "handler = Scorer('small')"))
        bound = fingerprint(loaded(BASE + "handler = Scorer('small').score"))
        assert bound == fingerprint(loaded(BASE + "handler = Scorer('small').score"))
        assert bound != fingerprint(loaded(BASE + "handler = Scorer('large').score"))

    def test_slots(self) -> None:
        """Attributes in slots are attributes."""
        source = """
        class Base:
            __slots__ = "a"
        class Handler(Base):
            __slots__ = ("b", "c")
            def __init__(self, a, b):
                self.a, self.b = a, b
            def __call__(self, row):
                return row
        handler = Handler({})
        """
        made = {fingerprint(loaded(source.replace("{}", text))) for text in ("1, 2", "2, 2", "1, 3")}
        assert len(made) == 3

    def test_decorated_functions(self) -> None:
        """A decorator hides neither the function inside nor itself."""
        source = """
        import functools
        def twice(inner):
            @functools.wraps(inner)
            def call(row):
                return inner(inner(row))
            return call
        @twice
        def handler(row):
            return {"a": 1}
        """
        changed = source.replace('{"a": 1}', '{"a": 2}'), source.replace("inner(inner(row))", "inner(row)")
        assert len({fingerprint(loaded(one)) for one in (source, *changed)}) == 3

    def test_modules_of_the_user(self) -> None:
        """A prompt in a module of its own is seen where it is mentioned as an attribute; Python's modules are not."""
        source = "def handler(row):\n    return {'p': prompts.SCORE}"
        modules = []
        for text in ("a", "a", "b"):
            prompts = types.ModuleType("prompts")
            prompts.SCORE, prompts.OTHER = text, object()  # type: ignore[attr-defined]
            modules.append(fingerprint(loaded(source, prompts=prompts)))
        assert modules[0] == modules[1] != modules[2]

    def test_cycles_end(self) -> None:
        """Functions that call each other, objects and containers that contain themselves."""
        source = """
        LOOP = []
        LOOP.append(LOOP)
        def odd(n): return n and even(n - 1)
        def even(n): return not n or odd(n - 1)
        class Node:
            def __init__(self): self.me = self; self.all = {self}; NODES.add(self)
        NODES = set()
        for _ in range(20): Node()
        def handler(row): return handler, odd, LOOP, NODES
        """
        assert fingerprint(loaded(source)) == fingerprint(loaded(source))

    def test_large_values_are_bounded(self) -> None:
        """A word list of a million counts by its length, and hides nothing that comes after it."""
        source = "TABLE = {}\nPROMPT = 'a'\ndef handler(row):\n    return TABLE, PROMPT"
        big = "dict.fromkeys(range(200_000))"
        one, same = loaded(source.replace("{}", big)), loaded(source.replace("{}", big))
        other = loaded(source.replace("{}", big).replace("'a'", "'b'"))
        longer = loaded(source.replace("{}", "dict.fromkeys(range(200_001))"))
        assert fingerprint(one) == fingerprint(same)
        assert len({fingerprint(one), fingerprint(other), fingerprint(longer)}) == 3

    def test_deep_values_are_bounded(self) -> None:
        """Nested without end, it ends."""
        source = "DEEP = 0\nfor _ in range(100_000): DEEP = [DEEP]\ndef handler(row): return DEEP"
        assert fingerprint(loaded(source)) == fingerprint(loaded(source))

    @pytest.mark.parametrize(
        "handler",
        [
            len,
            dict,
            str.upper,
            pytest.param("text".upper, id="a bound builtin"),
            print,
            pytest.param(re.compile("a").match, id="a pattern's method"),
            math.sqrt,
            5,
            None,
            pytest.param(object(), id="an object"),
            types,
            enum.Enum,
        ],
        ids=repr,
    )
    def test_anything_has_one(self, handler: Any) -> None:
        """Builtins, classes, and what is no handler at all."""
        assert re.fullmatch("[0-9a-f]{32}", fingerprint(handler))
        assert fingerprint(handler) == fingerprint(handler)

    def test_hostile_objects(self) -> None:
        """Objects that raise from everything count by their type."""

        class Hostile:
            def __getattribute__(self, name: str) -> Any:
                raise RuntimeError(name)

            def __repr__(self) -> str:
                raise RuntimeError

            def __hash__(self) -> int:
                raise RuntimeError

            def __eq__(self, other: object) -> bool:
                raise RuntimeError

            def __len__(self) -> int:
                raise RuntimeError

            def __call__(self, row: Any) -> Any:
                return row

        assert fingerprint(Hostile()) == fingerprint(Hostile())
        assert fingerprint(functools.partial(score, Hostile())) != fingerprint(functools.partial(score))

    def test_it_is_the_same_in_every_process(self, tmp_path: Path) -> None:
        """Seeds of hashes, addresses, and whether the code came from a compiled file or not make no difference."""
        (tmp_path / "reviews.py").write_text(BASE, encoding="utf-8")
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); import reviews\n"
            "from rowmill.handlers.cache import fingerprint\n"
            "print([fingerprint(one) for one in (reviews.handler, reviews.scorer, reviews.outer(3))])"
        )
        found = set()
        for seed in ("0", "1", "77"):
            environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))}
            found.add(
                subprocess.run(
                    [sys.executable, "-c", program, str(tmp_path)],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=25,
                ).stdout
            )
        assert (tmp_path / "__pycache__").exists()
        assert len(found) == 1
