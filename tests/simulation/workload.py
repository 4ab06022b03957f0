"""What a run works on: rows, stages and what must come of them, all by the seed.

The oracle runs the same pure functions as the handlers do, stage by stage and without any engine. What a stage does
to a row depends on the row's number and the seed alone, never on when or how often it is called.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

from rowmill import Pipeline, Retry
from rowmill.state.model import TopicPartition

SOURCE, SINK, SIDE, NAME = "in", "out", "side", "p"
DEAD, GROUP = f"{NAME}.dlq", f"rowmill.{NAME}"
CHANGELOG, TABLE = f"{GROUP}.{SOURCE}.changelog", "counts"

Kind: TypeAlias = Literal["plain", "blocking", "async", "batch", "async_batch"]
Ordering: TypeAlias = Literal["key", "partition", "none"]

_TIMEOUT, _OVERRUN = 30.0, 45.0


class Boom(Exception):  # noqa: N818 - a handler's own error
    """What handlers fail rows with."""


class Flaky(Exception):  # noqa: N818
    """What handlers raise that succeed when they are called again."""


def mix(*numbers: int) -> int:
    """A number below 2**32 that looks like chance and depends on these alone."""
    state = 0x9E3779B9
    for number in numbers:
        state = ((state ^ number) * 0x85EBCA6B) & 0xFFFFFFFF
        state = ((state ^ (state >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        state ^= state >> 16
    return state


@dataclass
class RowSpec:
    """One source record: when it is written, and what it is."""

    n: int
    partition: int
    key: bytes | None
    value: bytes | None
    at: float
    gap: int
    bad: tuple[str, str] | None = None
    offset: int = -1


@dataclass(frozen=True)
class StageSpec:
    """One stage: how it is called, and what it does, in per cent of the rows."""

    index: int
    kind: Kind
    concurrency: int
    batch: int
    context: bool
    timed: bool
    stubborn: bool
    pace: float
    drops: int
    splits: int
    fails: int
    emits: int
    overruns: int
    adds: bool
    """Whether it counts in a table."""
    rewrites: bool
    """Whether it reads the entry of the row's key, and writes it back changed."""
    flaky: int
    """In per cent of the rows the first calls fail; they are made again."""
    passes: int
    """So many per cent of the rows it is not for."""
    ends: Literal["dead_letter", "skip", "default"]
    """What becomes of rows that it fails."""

    @property
    def name(self) -> str:
        return f"s{self.index}"


class Expected(NamedTuple):
    """What one row must leave behind."""

    results: list[dict[str, Any]]
    emitted: list[dict[str, Any]]
    dead: tuple[str, str] | None
    """Stage and type of its dead letter."""
    forwarded: bool = False
    skipped: bool = False
    defaulted: bool = False


@dataclass
class Oracle:
    """What must come of all rows."""

    rows: dict[int, Expected]
    tables: dict[int, dict[str, int]]
    """The table's entries by partition."""


@dataclass
class Hooks:
    """How handlers tell of themselves."""

    started: Callable[[StageSpec, dict[str, Any]], None]
    busy: Callable[[float], None]
    die: Callable[[], None]


@dataclass
class Workload:
    """Rows and a pipeline.

    Attributes:
        seed: of everything that handlers do.
    """

    seed: int
    partitions: int
    ordering: Ordering
    tombstones: Literal["dead_letter", "forward"]
    rows: list[RowSpec]
    stages: list[StageSpec]
    deadly: int | None = None
    """The number of a row that kills its process."""
    _calls: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def make(cls, seed: int, *, seconds: float, may_time_out: bool, deadly: bool, exactly_once: bool) -> Workload:
        """A workload whose rows arrive within so many seconds.

        Args:
            may_time_out: whether stages have time limits; a process that stands still would overrun them by itself.
            deadly: whether one of the rows kills its process.
            exactly_once: whether rows may tell what they saw in a table; otherwise it may be counted twice.
        """
        chance = random.Random(f"workload {seed}")
        partitions = chance.randint(1, 4)
        kinds = chance.choice([("plain",), ("plain", "async"), ("async",), tuple(Kind.__args__)])  # type: ignore[attr-defined]
        stages = [_stage(chance, index, kinds, may_time_out) for index in range(chance.randint(1, 3))]
        rows = list(_rows(chance, partitions, seconds))
        able = [row.n for row in rows if row.bad is None]
        ordering: Ordering = chance.choice(["key", "key", "partition", "none"])
        return cls(
            seed=seed,
            partitions=partitions,
            ordering=ordering,
            tombstones=chance.choice(["dead_letter", "forward"]),
            rows=rows,
            deadly=chance.choice(able) if deadly else None,
            stages=_with_tables(chance, ordering, stages, exactly_once) if chance.random() < 0.6 else stages,
        )

    def describe(self) -> str:
        """For reports."""
        stages = "; ".join(
            f"{s.name} {s.kind} x{s.concurrency}"
            f"{f' batch {s.batch}' if 'batch' in s.kind else ''}{' timed' if s.timed else ''}"
            f"{' stubborn' if s.stubborn else ''} {s.pace:g} s"
            for s in self.stages
        )
        return f"{len(self.rows)} rows, {self.partitions} partitions, ordering {self.ordering}: {stages}"

    @property
    def has_tables(self) -> bool:
        """Whether any stage uses the table."""
        return any(s.adds or s.rewrites for s in self.stages)

    @property
    def keeps_partition_order(self) -> bool:
        """Whether all rows of a partition keep their order."""
        if self.ordering == "partition":
            return True
        return not self.has_tables and all(s.kind in {"plain", "batch"} for s in self.stages)

    @property
    def longest(self) -> float:
        """Seconds that all of it takes at most, one call after the other."""
        calls = sum(self._duration(s, row.n, 0) * (4 if s.flaky else 1) for s in self.stages for row in self.rows)
        # A split row may wait for each of its parts.
        pauses = sum(4 * 1.4 * len(self.rows) * s.flaky / 100 for s in self.stages)
        return (
            calls * 3
            + pauses
            + 5 * sum(_OVERRUN for s in self.stages if s.timed for r in self.rows if self._overruns(s, r.n))
        )

    # --- the pipeline ------------------------------------------------------------------------------------------

    def pipeline(self, hooks: Hooks) -> Pipeline:
        """The stages as handlers."""
        pipeline = Pipeline(NAME, source=SOURCE, sink=SINK, ordering=self.ordering, tombstones=self.tombstones)
        if self.has_tables:
            pipeline.table(TABLE)
        for spec in self.stages:
            options: dict[str, Any] = {}
            if spec.kind in {"batch", "async_batch"}:
                options["batch"] = spec.batch
            if spec.kind in {"blocking", "async", "async_batch"}:
                options["concurrency"] = spec.concurrency
            if spec.timed:
                options["timeout"] = _TIMEOUT
            if spec.flaky:
                options["retry"] = Retry(attempts=4, first=0.2, on=Flaky)
            if spec.passes:
                options["when"] = partial(self.is_for, spec)
            if spec.ends == "skip":
                options["on_error"] = "skip"
            elif spec.ends == "default":
                options["fallback"] = {spec.name: "default"}
            pipeline.add(self._handler(spec, hooks), name=spec.name, **options)
        return pipeline

    def is_for(self, spec: StageSpec, row: dict[str, Any]) -> bool:
        """Whether a row does not go past a stage; the one that kills its process meets the first."""
        return row["n"] == self.deadly or mix(self.seed, 10, row["n"], spec.index, row["part"]) % 100 >= spec.passes

    def _handler(self, spec: StageSpec, hooks: Hooks) -> Callable[..., Any]:
        """A function of the signature that the stage's kind wants."""
        handler = _Handler(self, spec, hooks)
        if spec.kind in {"plain", "blocking"}:
            return handler.one if spec.context else lambda row, /: handler.one(row)
        if spec.kind == "batch":
            return handler.many if spec.context else lambda rows, /: handler.many(rows)
        function = handler.one_async if spec.kind == "async" else handler.many_async
        return function if spec.context else _without_context(function)

    def next_duration(self, spec: StageSpec, n: int) -> float:
        """How long the next call for a row takes."""
        call = self._calls[n, spec.index] = self._calls.get((n, spec.index), 0) + 1
        return self._duration(spec, n, call)

    async def sleep(self, spec: StageSpec, seconds: float) -> None:
        """Take that long, unless cancelled."""
        if not seconds:
            return
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            if not spec.stubborn:
                raise
            await asyncio.sleep(min(seconds, 3.0))  # and the result comes all the same, to nobody

    # --- what it does ------------------------------------------------------------------------------------------

    def oracle(self) -> Oracle:
        """What must come of all rows, taken in the order in which they are written."""
        tables: dict[int, dict[str, int]] = {partition: {} for partition in range(self.partitions)}
        rows: dict[int, Expected] = {}
        for row in self.in_order():
            table = dict(tables[row.partition])
            rows[row.n] = self._expected(row, table)
            if rows[row.n].dead is None and not rows[row.n].skipped:
                tables[row.partition] = table
        return Oracle(rows, tables)

    def in_order(self) -> list[RowSpec]:
        """The rows as they are written."""
        return sorted(self.rows, key=lambda row: (row.at, row.n))

    def _expected(self, row: RowSpec, table: dict[str, int]) -> Expected:
        """What must come of one row; the table is changed."""
        if row.value is None and self.tombstones == "forward" and row.bad == ("input", "null_value"):
            return Expected([], [], None, forwarded=True)
        if row.bad is not None:
            return Expected([], [], row.bad)
        if row.n == self.deadly:
            return Expected([], [], ("process", "process_died"))
        parts: list[dict[str, Any]] = [json.loads(row.value or b"")]
        emitted: list[dict[str, Any]] = []
        defaulted = False
        for spec in self.stages:
            through: list[dict[str, Any]] = []
            for part in parts:
                if not self.is_for(spec, part):
                    through.append(part)
                    continue
                failed = self._fails(spec, part)
                if failed is None:
                    emitted += self.emits(spec, part) if spec.context else []
                    through += self.outcome(spec, part, self._touch(spec, part, row.key, table))
                elif spec.ends == "default":
                    through.append({**part, spec.name: "default"})
                    defaulted = True
                else:
                    skipped = spec.ends == "skip"
                    return Expected([], [], None if skipped else (spec.name, failed), skipped=skipped)
            parts = through
        return Expected(parts, emitted, None, defaulted=defaulted and bool(parts))

    def _fails(self, spec: StageSpec, part: dict[str, Any]) -> str | None:
        """The error with which a stage fails a row for good, if it does."""
        if spec.timed and self._overruns(spec, part["n"]):
            return "HandlerTimeoutError"
        return "Boom" if mix(self.seed, 1, part["n"], spec.index) % 100 < spec.fails else None

    def _touch(self, spec: StageSpec, part: dict[str, Any], key: bytes | None, table: dict[str, int]) -> int | None:
        """What a stage does to the table; what it sees there."""
        if spec.adds:
            entry, amount = self.count(spec, part)
            table[entry] = table.get(entry, 0) + amount
        if not spec.rewrites or key is None:
            return None
        entry = f"key/{key.decode()}"
        seen = table.get(entry, 0)
        rewritten = self.rewritten(part["n"], seen)
        if rewritten is None:
            table.pop(entry, None)
        else:
            table[entry] = rewritten
        return seen

    def count(self, spec: StageSpec, row: dict[str, Any]) -> tuple[str, int]:
        """The entry that a stage counts a row in, and how much."""
        lot = mix(self.seed, 7, row["n"], spec.index, row["part"])
        return f"sum/{lot % 4}", 1 + lot // 4 % 3

    def rewritten(self, n: int, seen: int) -> int | None:
        """What a stage makes of the entry of a row's key; None deletes it."""
        return None if mix(self.seed, 8, n) % 10 == 0 else (seen * 31 + n + 1) % 1_000_003

    def outcome(self, spec: StageSpec, row: dict[str, Any], seen: int | None) -> list[dict[str, Any]]:
        """What a stage makes of a row, and of what it saw in the table."""
        n, part = row["n"], row["part"]
        if mix(self.seed, 1, n, spec.index) % 100 < spec.fails:
            raise Boom(f"{spec.name} does not like {n}")
        lot = mix(self.seed, 2, n, spec.index, part) % 100
        if lot < spec.drops:
            return []
        changed = {**row, spec.name: mix(self.seed, 3, n, spec.index, part) % 1000}
        if seen is not None:
            changed["seen"] = seen
        if lot < spec.drops + spec.splits:
            return [{**changed, "part": part * 2 + 1}, {**changed, "part": part * 2 + 2}]
        return [changed]

    def cost(self, n: int) -> tuple[Decimal, int]:
        """Money and tokens that the first stage spends on a row."""
        lot = mix(self.seed, 9, n)
        return Decimal(lot % 50) / 100, lot // 64 % 7

    def emits(self, spec: StageSpec, row: dict[str, Any]) -> list[dict[str, Any]]:
        """What a stage sends to the side topic."""
        if mix(self.seed, 4, row["n"], spec.index, row["part"]) % 100 < spec.emits:
            return [{"n": row["n"], "p": row["p"], "by": spec.name, "part": row["part"]}]
        return []

    def _overruns(self, spec: StageSpec, n: int) -> bool:
        return mix(self.seed, 5, n, spec.index) % 100 < spec.overruns

    def _duration(self, spec: StageSpec, n: int, call: int) -> float:
        if spec.timed and self._overruns(spec, n):
            return _OVERRUN
        lot = mix(self.seed, 6, n, spec.index, call)
        share = (lot >> 8) / 2**24
        if lot % 100 < 25:
            return 0.0
        return spec.pace * share * (20 if lot % 100 >= 96 and spec.kind in {"async", "async_batch"} else 2)


class _Handler:
    """What a stage's function does, for each way of calling it."""

    def __init__(self, workload: Workload, spec: StageSpec, hooks: Hooks) -> None:
        self._workload = workload
        self._spec = spec
        self._hooks = hooks
        self._flakes: dict[tuple[int, int], int] = {}

    def one(self, row: dict[str, Any], ctx: Any = None) -> Any:
        self._hooks.busy(self._begin(row))
        return self._act(row, ctx, self._look(ctx))

    async def one_async(self, row: dict[str, Any], ctx: Any = None) -> Any:
        seconds, seen = self._begin(row), self._look(ctx)
        await self._workload.sleep(self._spec, seconds)
        return self._act(row, ctx, seen)

    def many(self, rows: list[dict[str, Any]], ctx: Any = None) -> Any:
        self._hooks.busy(max(self._begin(row) for row in rows))
        return [self._act(row, one, self._look(one)) for row, one in zip(rows, ctx or [None] * len(rows), strict=True)]

    async def many_async(self, rows: list[dict[str, Any]], ctx: Any = None) -> Any:
        contexts = ctx or [None] * len(rows)
        seconds, seen = max(self._begin(row) for row in rows), [self._look(one) for one in contexts]
        await self._workload.sleep(self._spec, seconds)
        return [self._act(*parts) for parts in zip(rows, contexts, seen, strict=True)]

    def _begin(self, row: dict[str, Any]) -> float:
        """Note the call; how long it takes."""
        self._hooks.started(self._spec, row)
        if row["n"] == self._workload.deadly:
            self._hooks.die()
            return 1e6
        return self._workload.next_duration(self._spec, row["n"])

    def _look(self, ctx: Any) -> int | None:
        if not self._spec.rewrites or ctx is None or ctx.key is None:
            return None
        return int(ctx.table(TABLE).get(f"key/{ctx.key}", 0))

    def _act(self, row: dict[str, Any], ctx: Any, seen: int | None) -> Any:
        """Everything besides the time it takes."""
        spec, workload = self._spec, self._workload
        if spec.flaky:
            self._flake(row, ctx)
        if spec.index == 0 and ctx is not None:
            ctx.add_cost(*workload.cost(row["n"]))
        for emitted in workload.emits(spec, row) if ctx is not None else ():
            ctx.emit(SIDE, emitted, key=ctx.key)
        if spec.adds and ctx is not None:
            ctx.table(TABLE).add(*workload.count(spec, row))
        if seen is not None:
            rewritten = workload.rewritten(row["n"], seen)
            if rewritten is None:
                ctx.table(TABLE).delete(f"key/{ctx.key}")
            else:
                ctx.table(TABLE).put(f"key/{ctx.key}", rewritten)
        parts = workload.outcome(spec, row, seen)
        return parts[0] if len(parts) == 1 else parts or None

    def _flake(self, row: dict[str, Any], ctx: Any) -> None:
        """Fail as often as the row's lot says, and leave something behind that must not be seen."""
        place, lot = (row["n"], row["part"]), mix(self._workload.seed, 11, row["n"], self._spec.index, row["part"])
        failed = self._flakes.get(place, 0)
        if lot % 100 < self._spec.flaky and failed < 1 + lot % 3:
            self._flakes[place] = failed + 1
            if ctx is not None:
                ctx.emit(SIDE, {"never": "seen"}, key=ctx.key)
                ctx.key = "never"
                if self._spec.adds:
                    ctx.table(TABLE).add("never", 1)
            raise Flaky(f"try {row['n']} again")
        self._flakes.pop(place, None)


def _without_context(function: Callable[..., Any]) -> Callable[..., Any]:
    async def handler(row: Any) -> Any:
        return await function(row)

    return handler


def _stage(chance: random.Random, index: int, kinds: tuple[Kind, ...], may_time_out: bool) -> StageSpec:
    kind = chance.choice(kinds)
    batched = kind in {"batch", "async_batch"}
    stubborn = kind == "async" and chance.random() < 0.2
    timed = may_time_out and kind in {"blocking", "async"} and chance.random() < 0.4
    return StageSpec(
        index=index,
        kind=kind,
        concurrency=chance.choice([2, 5, 20] if kind == "blocking" else [1, 2, 5, 20]),
        batch=chance.choice([2, 5, 10]),
        context=chance.random() < 0.6,
        timed=timed,
        stubborn=stubborn and not timed,
        pace=chance.choice([0.0, 0.005, 0.05, 0.5]) if kind not in {"plain", "batch"} else chance.choice([0.0, 0.005]),
        drops=chance.choice([0, 10]),
        splits=chance.choice([0, 20]),
        fails=0 if batched else chance.choice([0, 0, 10]),
        emits=chance.choice([0, 30]),
        overruns=3 if timed else 0,
        adds=False,
        rewrites=False,
        flaky=chance.choice([0, 0, 10, 50]) if kind in {"blocking", "async"} and not timed and not stubborn else 0,
        passes=chance.choice([0, 0, 0, 30]),
        ends=chance.choice(["dead_letter", "dead_letter", "skip", "default"]),
    )


def _with_tables(
    chance: random.Random, ordering: Ordering, stages: list[StageSpec], exactly_once: bool
) -> list[StageSpec]:
    """The stages with a table.

    Only the first one rewrites entries, since it sees a row once, and only where rows of one key follow each other.
    """
    serial = exactly_once and (
        ordering == "key" or (ordering == "partition" and not any("batch" in s.kind for s in stages))
    )
    # A row of such a chain looks unknown topics up from its thread and waits for it: the inline pool has none.
    silent = all(s.kind == "plain" for s in stages)
    return [
        replace(
            s,
            context=s.context or s.index == 0,
            adds=(s.context or s.index == 0) and chance.random() < 0.7,
            rewrites=serial and s.index == 0 and chance.random() < 0.7,
            emits=0 if silent else s.emits,
        )
        for s in stages
    ]


def _rows(chance: random.Random, partitions: int, seconds: float) -> Iterator[RowSpec]:
    count, keys = chance.randint(20, 200), chance.choice([0, 1, 3, 30])
    bad, gaps, early = chance.choice([0, 0, 5]), chance.choice([0, 10]), chance.random()
    for n in range(count):
        at = 0.0 if chance.random() < early else chance.uniform(0, seconds)
        partition = chance.randrange(partitions)
        key = b"k%d" % chance.randrange(keys) if keys and chance.random() < 0.9 else None
        row = RowSpec(n, partition, key, json.dumps({"n": n, "p": partition, "part": 0}).encode(), at, 0)
        if chance.random() * 100 < gaps:
            row.gap = chance.randint(1, 3)
        if chance.random() * 100 < bad:
            row.value, row.bad = chance.choice(
                [
                    (b"{oops", ("input", "not_json")),
                    (b"[1, 2]", ("input", "not_an_object")),
                    (None, ("input", "null_value")),
                ]
            )
        yield row


def source(partition: int) -> TopicPartition:
    """A partition that rows come from."""
    return TopicPartition(SOURCE, partition)
