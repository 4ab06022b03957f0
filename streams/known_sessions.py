"""The sessions that a broker knows, and what can be found out of those that never registered.

A session of a present-day worker has its record on the control topic, which names everything. One of an older worker
left a group, the publisher's group beside it, and changelogs; whose these are tell the groups' offsets, and the context
in each changelog's last checkpoint, which has the session's id in it. Names alone do not: ``rowmill.p.a.b.changelog``
may be that of the live session's source ``a.b``, or that of session ``a``'s source ``b``.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..state.checkpoint import CHECKPOINT_KEY, CheckpointRecord
from ..state.clock import Clock
from ..state.codec import loads
from ..state.context import session_uuid
from ..state.errors import CheckpointError, ConfigError
from ..state.model import RESERVED_PREFIX, Committed, Record, TopicPartition
from .brokers.base import Broker, Reader, TopicInfo
from .control_topic import ControlTopic
from .deadlines import deadline
from .session import CONSOLE, LIVE, Session
from .session_records import SessionRecord
from .session_refs import session_of

log = logging.getLogger(__name__)

_CHANGELOG = re.compile(r"rowmill\.(?P<pipeline>[a-zA-Z0-9_-]{1,80})\.(?P<rest>.+)\.changelog")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,80}")
_PUBLISHER = "input"
"""What the publisher's group of a live session is called behind the group's name: as a session may be called, too."""

_TAIL = 100
_FETCH_ROWS = 5_000
_FETCH_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class KnownSession:
    """One session.

    Attributes:
        record: its record; of one that never registered, what could be found out: its sink is "" then.
        is_registered: whether the control topic has it.
    """

    record: SessionRecord
    is_registered: bool

    @property
    def session(self) -> Session:
        """The session itself."""
        return recorded_session(self.record)


def recorded_session(record: SessionRecord) -> Session:
    """The session that a record is of."""
    return Session(record.pipeline, record.session, owns_source=record.owns_source)


async def find_sessions(broker: Broker, *, clock: Clock, timeout: float = 30.0) -> dict[str, KnownSession]:
    """All sessions by their groups, sorted.

    Args:
        broker: a started one.
        clock: time.
        timeout: seconds that each call may take.

    Raises:
        BrokerError: the broker does not answer.
    """
    records = await ControlTopic(broker, clock=clock, timeout=timeout, create=False).sessions()
    known = {group: KnownSession(record, True) for group, record in records.items() if _is_sound(group, record)}
    known |= await _Unregistered(broker, timeout).find(known)
    return dict(sorted(known.items()))


def _is_sound(group: str, record: SessionRecord) -> bool:
    """Whether the record's names fit together: other things are found, and deleted, by them."""
    try:
        fits = record.group == group == recorded_session(record).group
    except ConfigError:
        fits = False
    if not fits:
        log.warning("the control topic's record of %r tells of another session; it is left out", group)
    return fits


# --- sessions without a record ---------------------------------------------------------------------------------


class _Unregistered:
    """Finds the sessions of which only groups and changelogs tell.

    Args:
        broker: a started one.
        timeout: seconds that each call may take.
    """

    def __init__(self, broker: Broker, timeout: float) -> None:
        self._broker = broker
        self._timeout = timeout
        self._topics: dict[str, TopicInfo] = {}
        self._groups: set[str] = set()

    async def find(self, registered: Mapping[str, KnownSession]) -> dict[str, KnownSession]:
        async with deadline(self._timeout, "look sessions up"):
            self._topics = await self._broker.topics()
            self._groups = set(await self._broker.groups())
        sources = await self._changelog_sources(registered)
        wanted = {group: session for group, session in self._sessions(sources) if group not in registered}
        return {g: KnownSession(await self._describe(s, sources.get(g, set())), False) for g, s in wanted.items()}

    async def _changelog_sources(self, registered: Mapping[str, KnownSession]) -> dict[str, set[str]]:
        """By group, the sources whose changelogs nobody on the control topic has."""
        claimed = {known.session.changelog(s) for known in registered.values() for s in known.record.sources}
        left = [name for name in self._topics if name not in claimed and _CHANGELOG.fullmatch(name)]
        partitions = [TopicPartition(name, p) for name in left for p in range(self._topics[name].partitions)]
        tails = await read_tails(self._broker, partitions, timeout=self._timeout)
        owners = {tp.topic: tail.session_id for tp, tail in tails.items() if tail.session_id}
        found: dict[str, set[str]] = defaultdict(set)
        for name in left:
            for session, source in _readings(name):
                if owners.get(name) == str(session_uuid(session.group)):
                    found[session.group].add(source)
        return found

    def _sessions(self, changelogs: Collection[str]) -> Iterator[tuple[str, Session]]:
        for group in sorted({*self._groups, *changelogs}):
            session = session_of(group) or session_of(group.removesuffix(f".{_PUBLISHER}"))
            if session is None:
                continue
            # rowmill.p.input is what a replay of the live session leaves, unless there is more of a session "input".
            if session.id != _PUBLISHER or session.group in changelogs or session.publisher_id in self._groups:
                yield session.group, session

    async def _describe(self, session: Session, sources: set[str]) -> SessionRecord:
        """Its record, as far as it can be found out."""
        everywhere = [
            TopicPartition(name, partition)
            for name, info in self._topics.items()
            if not name.startswith(RESERVED_PREFIX)
            for partition in range(info.partitions)
        ]
        async with deadline(self._timeout, f"look at group {session.group}"):
            committed = _only(await self._broker.committed(session.group, everywhere))
            marks = _only(await self._broker.committed(session.publisher_id, everywhere))
            high = await self._broker.offsets([tp for tp in everywhere if tp.topic in {m.topic for m in marks}], "end")
        notes = {} if session.is_live else {tp: _note(mark) for tp, mark in marks.items()}
        published = {tp.topic for tp, note in notes.items() if "input" in note and tp.topic.endswith(f".{session.id}")}
        ranges = {tp: marks[tp].offset for tp, note in notes.items() if "begin" in note}
        if published and all(notes[TopicPartition(topic, 0)].get("done") for topic in published):
            ranges |= {tp: end for tp, end in high.items() if tp.topic in published}
        return SessionRecord(
            group=session.group,
            pipeline=session.pipeline,
            session=session.id,
            owns_source=bool(published),
            sources=tuple(sorted({tp.topic for tp in committed} | published | {tp.topic for tp in ranges} | sources)),
            dead_letters=session.dead_letters,
            is_bounded=bool(published or ranges),
            ends=ranges or None,
        )


def _readings(changelog: str) -> Iterator[tuple[Session, str]]:
    """The sessions that a changelog may be of, each with the source."""
    found = _CHANGELOG.fullmatch(changelog)
    assert found is not None  # noqa: S101 - the caller looked
    if found["pipeline"] == CONSOLE:
        return
    yield Session(found["pipeline"]), found["rest"]
    name, _, source = found["rest"].partition(".")
    if source and name != LIVE and _NAME.fullmatch(name):
        yield Session(found["pipeline"], name), source


def _only(committed: Mapping[TopicPartition, Committed | None]) -> dict[TopicPartition, Committed]:
    return {tp: found for tp, found in committed.items() if found is not None}


def _note(mark: Committed) -> dict[str, object]:
    """What a publisher or a side replay wrote beside its offset."""
    try:
        note = loads(mark.metadata)
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


# --- changelogs' tails -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Tail:
    """The end of one partition's changelog.

    Attributes:
        value: the last checkpoint as it was written; None: there is none.
        at_ms: when the newest checkpoint was written, in milliseconds since the epoch.
    """

    value: bytes | None = None
    at_ms: int = 0

    @property
    def size(self) -> int:
        """Bytes of the last checkpoint."""
        return len(self.value or b"")

    @property
    def session_id(self) -> str:
        """The id of the session that wrote it; "" where that cannot be told."""
        try:
            return str(self.checkpoint().context.get("session_id", "")) if self.value else ""
        except CheckpointError:
            return ""

    def checkpoint(self) -> CheckpointRecord:
        """The last checkpoint.

        Raises:
            CheckpointError: it cannot be read.
        """
        return CheckpointRecord.decode(self.value or b"")


@dataclass(frozen=True, slots=True)
class KnownTail:
    """The end of a changelog as it was read once: up to which offset, and the last checkpoint."""

    first: int
    end: int
    tail: Tail


@dataclass(slots=True)
class _Search:
    """How far back one changelog is being looked at; ``before`` is what was found below ``first``."""

    first: int
    end: int
    step: int = _TAIL
    tail: Tail = field(default_factory=Tail)
    before: Tail | None = None

    @property
    def begin(self) -> int:
        return max(self.first, self.end - self.step)

    @property
    def found(self) -> Tail:
        """The newest checkpoint."""
        return self.before if self.tail.value is None and self.before is not None else self.tail


async def read_tails(
    broker: Broker,
    changelogs: Collection[TopicPartition],
    *,
    timeout: float,
    known: dict[TopicPartition, KnownTail] | None = None,
) -> dict[TopicPartition, Tail]:
    """The last checkpoints of these partitions, with one reader, from the ends backwards.

    Args:
        broker: a started one.
        changelogs: partitions that exist.
        timeout: seconds without progress after which the broker counts as gone.
        known: what this function found before, and is found now: of those that have not grown nothing is read.

    Raises:
        BrokerError: the broker does not answer.
    """
    async with deadline(timeout, "look up where the changelogs end"):
        first = await broker.offsets(changelogs, "earliest")
        ends = await broker.offsets(changelogs, "end")
    searches = {tp: _begin_search(first[tp], ends[tp], known.get(tp) if known else None) for tp in changelogs}
    left = {tp: search for tp, search in searches.items() if search.first < search.end}
    while left:
        reader = broker.reader()
        try:
            async with deadline(timeout, "start reading changelogs"):
                await reader.start({tp: search.begin for tp, search in left.items()})
            await _search(reader, left, timeout)
        finally:
            await reader.close()
        left = {tp: search for tp, search in left.items() if search.tail.value is None and search.begin > search.first}
        for search in left.values():
            search.step *= 20
    if known is not None:
        known.update({tp: KnownTail(first[tp], ends[tp], search.found) for tp, search in searches.items()})
    return {tp: search.found for tp, search in searches.items()}


def _begin_search(first: int, end: int, known: KnownTail | None) -> _Search:
    """Of a changelog that is known only what came since; one that has shrunk was made anew."""
    if known is None or known.end > end or known.first > first:
        return _Search(first, end)
    return _Search(max(first, known.end), end, before=known.tail)


async def _search(reader: Reader, searches: Mapping[TopicPartition, _Search], timeout: float) -> None:
    left = {tp: search.begin for tp, search in searches.items()}
    while left:
        async with deadline(timeout, "read changelogs"):
            found, position = await _advance(reader, left)
        for tp, records in found.items():
            tail = searches[tp].tail
            for record in records:
                if record.key == CHECKPOINT_KEY and record.value is not None:
                    tail.value, tail.at_ms = record.value, record.timestamp
        left = {tp: offset for tp, offset in position.items() if offset < searches[tp].end}


async def _advance(
    reader: Reader, before: Mapping[TopicPartition, int]
) -> tuple[Mapping[TopicPartition, Sequence[Record]], dict[TopicPartition, int]]:
    """The next records, and the positions behind them; gaps move positions only."""
    while True:
        found = await reader.fetch(before, _FETCH_ROWS, _FETCH_SECONDS)
        position = {tp: await reader.position(tp) for tp in before}
        if found or position != before:
            return found, position
