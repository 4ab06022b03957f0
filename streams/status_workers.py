"""The live workers of a session: the group's members, put together with what workers say of themselves on the events
topic.

The broker knows who is in the group, the workers know what they do, and neither knows the other's names: they are
matched by the partitions that both tell, and on the embedded broker by the process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from ..state.model import TopicPartition
from .brokers.base import MemberInfo
from .event_records import PROGRESS, EventRecord
from .status_state import Phase

_FRESH_SECONDS = 4.0
"""A worker tells its progress every second: one that was silent for so long stands still, or is cut off."""
_LEAST_SPAN_SECONDS = 0.5
"""Two words closer together than this tell no rate."""


@dataclass(frozen=True, slots=True)
class WorkerWord:
    """What one worker said of itself lately.

    Attributes:
        newest: its newest progress.
        told: all of them in the time looked at.
        rate: rows per second between its first progress in the time looked at and the newest; None for a single one.
    """

    newest: EventRecord
    rate: float | None
    told: Sequence[EventRecord] = ()

    def latency(self) -> dict[str, list[Mapping[str, Any]]]:
        """How long calls took, by stage: sketches to be added up."""
        found: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for event in self.told:
            stages = event.data.get("latency")
            for stage, sketch in stages.items() if isinstance(stages, dict) else ():
                if isinstance(sketch, dict):
                    found[str(stage)].append(sketch)
        return found

    @property
    def partitions(self) -> frozenset[TopicPartition]:
        """Those that it owns, it says."""
        return frozenset(self.said())

    def said(self) -> dict[TopicPartition, Mapping[str, Any]]:
        """What it says of each partition."""
        entries = self.newest.data.get("partitions")
        found = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
        return {
            TopicPartition(each["topic"], each["partition"]): _sound(each)
            for each in found
            if isinstance(each.get("topic"), str) and isinstance(each.get("partition"), int)
        }

    def age_seconds(self, now_ms: int) -> float:
        """How old it is, by the broker's date: no worker's clock is compared with ours."""
        return max(0.0, (now_ms - (self.newest.written_ms or self.newest.at_ms)) / 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One live worker.

    Attributes:
        name: its own name; the broker's for it where it does not say any.
        member: the broker's name for it; "" before it has joined the group.
        host: the machine, or the address that it connects from.
        pid: its process there; 0 where it does not say.
        phase: what it does.
        is_silent: whether it should have said something within the last seconds, and has not.
        seen_seconds: how old its newest word is; None where it has not said anything in the time looked at.
        partitions: those it owns.
        rate: rows per second lately.
        started_ms: when it started, in milliseconds since the epoch; None where it does not say.
        in_flight: rows in work.
        rows: what it committed since it started.
        commit_seconds: how long its last commit took.
        breakers: states by resource.
        stages: counts by stage.
        latency: how long calls took lately, by stage: sketches to be added up.
        said: what it says of its partitions.
    """

    name: str
    member: str = ""
    host: str = ""
    pid: int = 0
    phase: Phase = "running"
    is_silent: bool = False
    seen_seconds: float | None = None
    partitions: tuple[TopicPartition, ...] = ()
    rate: float | None = None
    started_ms: int | None = None
    in_flight: int = 0
    rows: int = 0
    commit_seconds: float | None = None
    breakers: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    latency: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    said: Mapping[TopicPartition, Mapping[str, Any]] = field(default_factory=dict)

    def said_of(self, tp: TopicPartition) -> Mapping[str, Any]:
        """What it says of one partition, its oldest row aged since; {} if nothing."""
        said = self.said.get(tp, {})
        oldest = said.get("oldest_seconds")
        if isinstance(oldest, (int, float)):
            return {**said, "oldest_seconds": oldest + (self.seen_seconds or 0.0)}
        return said

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        started = None
        if self.started_ms:
            started = datetime.fromtimestamp(self.started_ms // 1000, UTC).isoformat().replace("+00:00", "Z")
        return {
            "worker": self.name,
            "member": self.member or None,
            "host": self.host or None,
            "pid": self.pid or None,
            "state": self.phase,
            "silent": self.is_silent,
            "seen_seconds": None if self.seen_seconds is None else round(self.seen_seconds, 3),
            "partitions": [str(tp) for tp in self.partitions],
            "rows_per_second": None if self.rate is None else round(self.rate, 3),
            "started_at": started,
            "in_flight": self.in_flight,
            "rows": self.rows,
            "commit_seconds": self.commit_seconds,
        }


def words_of(events: Iterable[EventRecord]) -> dict[str, list[WorkerWord]]:
    """The words of the workers that have not said goodbye, by group."""
    progress: dict[tuple[str, str], list[EventRecord]] = defaultdict(list)
    gone = set()
    for event in events:
        if event.has_stopped:
            gone.add((event.group, event.worker))
        elif event.kind == PROGRESS:
            progress[event.group, event.worker].append(event)
    words: dict[str, list[WorkerWord]] = defaultdict(list)
    for (group, worker), told in progress.items():
        if (group, worker) not in gone and told[-1].data.get("state") != "stopped":
            words[group].append(WorkerWord(told[-1], _rate(told), told))
    return words


def _rate(told: Sequence[EventRecord]) -> float | None:
    seconds = (told[-1].at_ms - told[0].at_ms) / 1000
    if seconds < _LEAST_SPAN_SECONDS:
        return None
    return max(0.0, (_total(told[-1], "rows") - _total(told[0], "rows")) / seconds)


def _total(event: EventRecord, name: str) -> int:
    totals = event.data.get("totals")
    number = totals.get(name) if isinstance(totals, dict) else None
    return number if isinstance(number, int) else 0


def workers_of(
    members: Sequence[MemberInfo], words: Sequence[WorkerWord], now_ms: int, *, should_speak: bool = False
) -> tuple[WorkerStatus, ...]:
    """The live workers, by name.

    The group's members count: a worker that was killed still has words that are seconds old. One that is about to join
    is live as well.

    Args:
        members: of the group.
        words: of its workers, as :func:`words_of` gives them.
        now_ms: the present time.
        should_speak: whether a member with partitions and without a word is one that stands still, and not one of an
            older rowmill.
    """
    matched = _matched(members, words, now_ms)
    workers = [_worker(member, matched.get(member.id), now_ms, should_speak=should_speak) for member in members]
    taken = {word.newest.worker for word in matched.values()}
    workers += [
        _worker(None, word, now_ms, should_speak=should_speak)
        for word in words
        if word.newest.worker not in taken
        and word.newest.data.get("state") == "starting"
        and word.age_seconds(now_ms) < _FRESH_SECONDS
    ]
    return tuple(sorted(workers, key=lambda worker: worker.name))


def _matched(members: Sequence[MemberInfo], words: Sequence[WorkerWord], now_ms: int) -> dict[str, WorkerWord]:
    """Which word is whose, by the members' ids: fresh words first, best matches first."""
    matched: dict[str, WorkerWord] = {}
    for fresh in (True, False):
        left = [word for word in words if (word.age_seconds(now_ms) < _FRESH_SECONDS) is fresh]
        pairs = [
            (score, member.id, i)
            for member in members
            for i, word in enumerate(left)
            if (score := _likeness(member, word)) > 0
        ]
        taken: set[int] = set()
        for _, member_id, i in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
            if member_id not in matched and i not in taken:
                matched[member_id] = left[i]
                taken.add(i)
    return matched


def _likeness(member: MemberInfo, word: WorkerWord) -> float:
    """How sure it is that they are the same: 0 for surely not. One of them may not have heard of a rebalance yet."""
    if member.id == str(word.newest.pid) and member.host == word.newest.host:
        return 1_000_000.0
    common = len(member.partitions & word.partitions)
    if common:
        return float(common)
    return 0.5 if not member.partitions or not word.partitions else 0.0


def _worker(member: MemberInfo | None, word: WorkerWord | None, now_ms: int, *, should_speak: bool) -> WorkerStatus:
    owned: Collection[TopicPartition] = member.partitions if member is not None else ()
    if word is None:
        assert member is not None  # noqa: S101 - one of the two is there
        return WorkerStatus(
            name=member.id,
            member=member.id,
            host=member.host,
            phase="running" if owned else "starting",
            is_silent=should_speak and bool(owned),
            partitions=tuple(sorted(owned)),
        )
    data, age = word.newest.data, word.age_seconds(now_ms)
    is_silent = age >= _FRESH_SECONDS
    return WorkerStatus(
        name=word.newest.worker,
        member=member.id if member is not None else "",
        host=word.newest.host or (member.host if member is not None else ""),
        pid=word.newest.pid,
        phase=_phase(word),
        is_silent=is_silent,
        seen_seconds=age,
        partitions=tuple(sorted(owned)),
        rate=None if is_silent else word.rate,
        started_ms=_number(data, "started_ms"),
        in_flight=_number(data, "in_flight") or 0,
        rows=_total(word.newest, "rows"),
        commit_seconds=data.get("commit_seconds") if isinstance(data.get("commit_seconds"), (int, float)) else None,
        breakers=_texts(data.get("breakers")),
        stages=_figures(data.get("stages")),
        latency=word.latency(),
        said=word.said(),
    )


def _phase(word: WorkerWord) -> Phase:
    """A worker that runs and has opened none of its partitions is starting still."""
    state = word.newest.data.get("state")
    states = [str(said.get("state")) for said in word.said().values()]
    if state == "running":
        return "starting" if states and set(states) == {"opening"} else "running"
    if state in ("starting", "pausing", "paused", "stopping"):
        return state  # type: ignore[no-any-return]
    return "running"


_NUMBERS = ("committed", "position", "buffered", "in_flight", "oldest_offset", "oldest_seconds")


def _sound(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker says of a partition, without numbers that are none: anybody may write to the topic."""
    return {name: value for name, value in said.items() if name not in _NUMBERS or _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**53


def _number(data: Mapping[str, Any], name: str) -> int | None:
    value = data.get(name)
    return value if type(value) is int and 0 <= value < 253_402_300_800_000 else None


def _texts(value: Any) -> dict[str, str]:
    return {str(name): str(text) for name, text in value.items()} if isinstance(value, dict) else {}


def _figures(value: Any) -> dict[str, dict[str, float]]:
    """Counts by stage; what is no number is left out."""
    if not isinstance(value, dict):
        return {}
    return {
        str(stage): {str(name): number for name, number in counts.items() if _is_number(number)}
        for stage, counts in value.items()
        if isinstance(counts, dict)
    }
