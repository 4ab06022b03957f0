"""Moving a session's position from the console: plan, look at it, carry out that very plan or nothing.

A plan is kept for some minutes. What is carried out has its offsets, not the words that led to them, so that "twelve
hours ago" does not move on while somebody reads; and it is carried out only if planning once more comes to the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...state.clock import Clock
from ...state.errors import ConfigError
from ...state.model import TopicPartition
from ..brokers.base import Broker
from ..collect import partitions_of
from ..deadlines import deadline
from ..errors import GroupBusyError
from ..hold import Standstill
from ..known_sessions import recorded_session
from ..offset_times import parse_duration, parse_moment
from ..replay import Move, Replay, Tables, Target
from ..session_records import SessionRecord
from .actions import record_of
from .answers import RefusedRequestError
from .contents import shown_text
from .operations import Operations
from .schemas import MOMENT, Whole
from .topic_reads import records_between
from .watch import Watch

PLAN_SECONDS = 60.0
"""How long planning may take."""
KEPT_SECONDS = 600.0
"""How long a plan may be carried out."""
_MOST_PLANS = 100
_EDGE_SECONDS = 5.0
_EDGE_OFFSETS = 20
_MOST_PARTITIONS = 256
_OFFSET, _SHIFT = Whole(), Whole(-(2**63) + 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """What was planned: for whom, and the replay that does it."""

    group: str
    target: Target
    state: Tables
    only: Mapping[str, frozenset[int] | None] | None
    moves: Sequence[Move]
    until: float


class Replays:
    """Plans replays and carries them out.

    Args:
        broker: a started one.
        watch: which sessions there are.
        operations: runs what takes a while.
        clock: time.
    """

    def __init__(self, broker: Broker, watch: Watch, operations: Operations, *, clock: Clock) -> None:
        self._broker = broker
        self._watch = watch
        self._operations = operations
        self._clock = clock
        self._plans: OrderedDict[str, Plan] = OrderedDict()

    # --- where one can go --------------------------------------------------------------------------------------

    async def range(self, group: str) -> dict[str, Any]:
        """Between which moments and offsets a session's position can be moved."""
        record = record_of(self._watch, group)
        async with deadline(PLAN_SECONDS, f"look up where {', '.join(record.sources)} begin and end"):
            partitions = (await partitions_of(self._broker, record.sources))[:_MOST_PARTITIONS]
            first = await self._broker.offsets(partitions, "earliest")
            ends = await self._broker.offsets(partitions, "end")
            committed = await self._broker.committed(group, partitions) if partitions else {}
        earliest = await self._times({tp: first[tp] for tp in partitions}, ends, is_first=True)
        latest = await self._times({tp: max(first[tp], ends[tp] - _EDGE_OFFSETS) for tp in partitions}, ends)
        return {
            "first_ms": min(earliest, default=None),
            "last_ms": max(latest, default=None),
            "partitions": [
                {
                    "topic": tp.topic,
                    "partition": tp.partition,
                    "first": first[tp],
                    "end": ends[tp],
                    "committed": None if (done := committed[tp]) is None else done.offset,
                }
                for tp in partitions
            ],
        }

    async def _times(
        self, starts: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int], *, is_first: bool = False
    ) -> list[int]:
        """Times of records from there on: of the first one of each partition, or of all."""
        found: list[int] = []
        with contextlib.suppress(TimeoutError):  # then the slider is a little shorter
            async with asyncio.timeout(_EDGE_SECONDS):
                async for record in records_between(self._broker, starts, ends, only_first=is_first):
                    found.append(record.timestamp)  # noqa: PERF401 - what was found counts when time is up
        return [at_ms for at_ms in found if at_ms >= 0]

    # --- planning ----------------------------------------------------------------------------------------------

    async def plan(self, group: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What moving a session would do. Changes nothing.

        Args:
            group: the session.
            asked: a checked body: ``to``, ``partitions``, ``state``.

        Raises:
            ConfigError: what was asked for makes no sense.
            SessionError, TopicError, BrokerError: as :meth:`Replay.plan`.
        """
        record = record_of(self._watch, group)
        state: Tables = asked.get("state", "keep")
        if state == "rebuild" and self._has_tables(record) is False:
            raise ConfigError("state", state, "the session has no tables; choose keep")
        target = self._target(asked["to"])
        only = _only(asked.get("partitions"), record.sources)
        replay = self._replay(record, target, state, only)
        async with deadline(PLAN_SECONDS, f"{group}: plan"):
            moves, standstill = await replay.plan(), await replay.standstill()
        plan = Plan(group, _pinned(target, moves), state, only, moves, self._clock.monotonic() + KEPT_SECONDS)
        plan_id = secrets.token_urlsafe(16)
        self._plans[plan_id] = plan
        while len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return self._described(plan_id, plan, record, standstill)

    def _replay(
        self,
        record: SessionRecord,
        target: Target,
        state: Tables,
        only: Mapping[str, frozenset[int] | None] | None,
    ) -> Replay:
        if not record.sources:
            raise ConfigError("session", record.group, "nobody knows what it reads; use rowmill replay --source TOPIC")
        return Replay(
            self._broker,
            recorded_session(record),
            record.sources,
            target,
            state=state,
            only=only,
            has_tables=self._has_tables(record),
            clock=self._clock,
        )

    def _has_tables(self, record: SessionRecord) -> bool | None:
        """Whether the session has tables; None where nobody knows."""
        status = self._watch.status(record.group)
        return bool(record.tables) if status is not None and status.is_registered else None

    def _target(self, asked: Mapping[str, Any]) -> Target:
        how, value = asked["how"], asked.get("value")
        if how in {"earliest", "latest", "current"}:
            if value is not None:
                raise ConfigError("to.value", value, f"{how} takes none")
            return Target(how)
        if value is None:
            raise ConfigError("to.value", None, f"{how} needs one")
        if how == "offset":
            return Target("offset", _OFFSET.read("to.value", value))
        if how == "shift":
            return Target("shift", _SHIFT.read("to.value", value))
        if how == "datetime":
            is_text = isinstance(value, str)
            return Target("time", parse_moment("to.value", value) if is_text else MOMENT.read("to.value", value))
        ago = parse_duration("to.value", value) if isinstance(value, str) else MOMENT.read("to.value", value)
        # From now on this is a moment: the plan would else be another one in a second.
        return Target("time", max(0, self._clock.now_ms() - ago))

    def _described(self, plan_id: str, plan: Plan, record: SessionRecord, standstill: Standstill) -> dict[str, Any]:
        why_not = _why_not(record.group, standstill)
        moves = plan.moves
        return {
            "plan_id": plan_id,
            "expires_ms": self._clock.now_ms() + round(KEPT_SECONDS * 1000),
            "group": plan.group,
            "state": plan.state,
            "time_ms": plan.target.value if plan.target.how == "time" else None,
            "can_execute": not why_not,
            "why_not": why_not,
            "workers": standstill.members,
            "paused": standstill.is_paused,
            "moves": [move_of(move) for move in moves],
            "run_again": sum(move.run_again for move in moves),
            "skipped": sum(move.skipped for move in moves),
            "rebuilt": sum(move.rebuilt for move in moves),
            "discarded": sum(move.discarded for move in moves),
            "entries": sum(move.entries or 0 for move in moves) if plan.state != "keep" else None,
            "warnings": list(_warnings(plan, record)),
        }

    # --- carrying out ------------------------------------------------------------------------------------------

    async def execute(self, group: str, plan_id: str, *, by: str) -> dict[str, Any]:
        """Carry out a plan.

        Raises:
            RefusedRequestError: there is no such plan, or it is not what it was.
            GroupBusyError: workers run, and are not paused.
            SessionError, TopicError, BrokerError: as :meth:`Replay.execute`.
        """
        record, plan = record_of(self._watch, group), self._plans.get(plan_id)
        if plan is None or plan.group != group or self._clock.monotonic() > plan.until:
            raise RefusedRequestError(404, "plan_id", plan_id, "there is no such plan any more: plan it again")
        replay = self._replay(record, plan.target, plan.state, plan.only)

        async def work() -> dict[str, Any]:
            async with deadline(PLAN_SECONDS, f"{group}: plan once more"):
                if why_not := _why_not(group, await replay.standstill()):
                    raise GroupBusyError(why_not)
                present = await replay.plan()
            if _essence(present) != _essence(plan.moves):
                self._plans.pop(plan_id, None)
                raise RefusedRequestError(
                    409, "plan_id", plan_id, "the session has moved since, and this would do something else: plan anew"
                )
            self._plans.pop(plan_id, None)
            execution = await replay.execute()
            self._watch.hurry(group)
            return {
                "running": False,
                "moved": [move_of(move) for move in execution.moved],
                "failed": [
                    {"topic": tp.topic, "partition": tp.partition, "message": shown_text(str(error))}
                    for tp, error in sorted(execution.failed.items())
                ],
                "by": by,
            }

        return await self._operations.run("replay", group, by, work)


def _why_not(group: str, standstill: Standstill) -> str:
    """Why a session cannot be moved now; "" if it can."""
    if not standstill.members or standstill.is_paused:
        return ""
    many = standstill.members > 1
    workers = f"{standstill.members:,} workers run" if many else "a worker runs"
    return f"{group}: {workers}: pause the session, or stop {'them' if many else 'it'}, and plan again"


def _only(asked: Sequence[str] | None, sources: Sequence[str]) -> dict[str, frozenset[int] | None] | None:
    """The partitions that were asked for, as ``topic/partition``, or ``topic`` for all of one; None for all."""
    if not asked:
        return None
    chosen: dict[str, frozenset[int] | None] = {}
    for text in asked:
        topic, slash, number = (text, "", "") if text in sources else text.rpartition("/")
        if topic not in sources or (slash and not (number.isascii() and number.isdigit() and len(number) < 10)):
            raise ConfigError("partitions", text, f"give TOPIC or TOPIC/PARTITION; it reads {', '.join(sources)}")
        before = chosen.get(topic, frozenset())
        chosen[topic] = None if not slash or before is None else before | {int(number)}
    return chosen


def _pinned(target: Target, moves: Sequence[Move]) -> Target:
    """The same by offsets. Where it stays, that it does is what counts: rows done above the position are heeded."""
    if target.how == "current":
        return target
    return Target("file", target.value, {move.tp: move.to for move in moves if move.to is not None})


def _essence(moves: Sequence[Move]) -> list[tuple[object, ...]]:
    """What makes a plan this plan; partitions that stay as they are do not."""
    return [
        (m.tp, m.before, m.to, m.run_again, m.skipped, m.discarded, m.entries, m.rebuilds_from, m.rebuilt)
        for m in sorted(moves, key=lambda move: move.tp)
        if m.to is not None
    ]


def move_of(move: Move) -> dict[str, Any]:
    """One partition's way, as JSON."""
    return {
        "topic": move.tp.topic,
        "partition": move.tp.partition,
        "from": move.before,
        "to": move.to,
        "run_again": move.run_again,
        "skipped": move.skipped,
        "rebuilt": move.rebuilt,
        "rebuilds_from": move.rebuilds_from,
        "discarded": move.discarded,
        "entries": move.entries,
        "done": move.done,
        "note": shown_text(move.note),
    }


def _warnings(plan: Plan, record: SessionRecord) -> list[str]:
    """What somebody should know who is about to carry it out."""
    warnings = []
    if again := sum(move.run_again for move in plan.moves):
        warnings.append(
            f"results of {again:,} rows at most appear once more in {record.sink or 'the sink'}; rows, cost and tokens "
            "are sums: what runs again counts, and is paid, again but where a cache has the answer"
        )
    if skipped := sum(move.skipped for move in plan.moves):
        warnings.append(f"{skipped:,} rows at most are left out: they give no results")
    if plan.state == "keep" and record.tables and any(move.run_again for move in plan.moves):
        names = ", ".join(record.tables)
        warnings.append(f"tables stay as they are ({names}): rows that run again write to them again")
    if plan.state != "keep":
        warnings.append("tables of these partitions are emptied" + (", then made again" * (plan.state == "rebuild")))
    short = [move for move in plan.moves if move.lost and move.to is not None]
    if short:
        warnings.append(f"{short[0].tp} begins at {short[0].lost:,}: what older rows wrote to tables is lost")
    return [shown_text(each) for each in warnings]
