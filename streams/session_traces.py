"""Every trace of one session, and nothing else: what there is, what of it may go, and taking it away.

Names tell what may be a session's; what is another session's as well is left alone, whoever had it first. Two pipelines
with one sink may both have a session ``test``, and ``rowmill.p.a.b.changelog`` fits two sessions of ``p``. So all that
the other sessions' records name is subtracted, and topics that were emitted to are looked into.

The order of the removal is what makes a kill harmless. The group's offsets go first, which the broker refuses while a
worker is there; from then on the changelogs, which know a checkpoint that the group has not, keep every worker from
going on with what is left. They go last of all topics, behind the local tables. The session's record, which tells what
there was, goes last of all, so that the same call begins again where a kill ended it; a session that has no record is
given one first.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import shutil
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from ..state.artifact_stores import open_artifacts
from ..state.clock import Clock, SystemClock
from ..state.execution import Wanted
from ..state.model import RESERVED_PREFIX, Record
from ..state.store import StoreError
from .brokers.base import Broker
from .collect import header, input_row, partitions_of, read_topic
from .control import request
from .control_topic import ControlTopic
from .deadlines import deadline
from .dlq_letters import marks_topic
from .errors import BrokerError, GroupBusyError, IllegalTransitionError, SessionError
from .known_sessions import KnownSession, find_sessions, recorded_session
from .options import WorkerOptions, state_folder
from .session import SESSION_HEADER, SOURCE_HEADER, Session
from .session_records import CONTROL_TOPIC, SessionRecord
from .session_refs import short_name

log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["group", "topic", "tables", "folder", "artifacts", "record"]

APART = "no-cache"
"""The folder, in a state folder, of sessions that keep their answers to themselves: see side_replay.answers_apart."""

_FENCES_AT_ONCE = 8
_LOOK_SECONDS = 0.25
_REASON = "its traces are being removed"


@dataclass(frozen=True, slots=True)
class Trace:
    """One thing that a session left.

    Attributes:
        kind: a consumer ``group``, a ``topic``, ``tables`` of this machine, a ``folder`` of caches, ``artifacts``, or
            the control topic's ``record``.
        name: of the group or topic; else where it is.
        what: what it holds, in a word or two.
        is_last: whether it goes only when all that is not has gone.
    """

    kind: Kind
    name: str
    what: str
    is_last: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that belongs to the session in a way, and stays all the same."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Traces:
    """What one session left.

    Attributes:
        record: the session's record, or what could be found out of one that never registered.
        is_registered: whether the control topic has it.
        workers: the members of its group; None where the broker does not tell.
        found: what would be removed, in that order.
        kept: what would stay, and why.
    """

    record: SessionRecord
    is_registered: bool
    workers: int | None
    found: tuple[Trace, ...]
    kept: tuple[Kept, ...]

    @property
    def session(self) -> Session:
        """The session."""
        return recorded_session(self.record)


# --- names -----------------------------------------------------------------------------------------------------


def owned_topics(session: Session, sources: Iterable[str], sink: str = "") -> dict[str, str]:
    """The topics that a session has for itself by their names, and what each holds; side topics are not among them.

    Args:
        session: which.
        sources: the topics it reads, as they are named on the broker.
        sink: where its results go, as it is named there; "" where nobody knows.

    The live session's source, sink and dead letters are everybody's: they are not its own.
    """
    topics: dict[str, str] = {}
    sources = list(sources)
    if not session.is_live:
        # Their name is the session's, whatever its record says: anybody may write one.
        letters = session.dead_letters
        if session.owns_source:
            topics |= {name: "rows" for name in sources if name.endswith(f".{session.id}")}
        if sink.endswith(f".{session.id}"):
            topics[sink] = "results"
        topics |= {letters: "dead letters", marks_topic(letters): "dead letters' marks"}
    topics[session.budget] = "the budget's ledger"
    topics |= {session.answers(source): "shared answers" for source in sources}
    topics |= {session.changelog(source): "context and tables" for source in sources}
    return topics


def _mentioned(record: SessionRecord) -> set[str]:
    """Every topic that a session has to do with: nobody else's cleaning may touch it."""
    session = recorded_session(record)
    letters = record.dead_letters or session.dead_letters
    own = owned_topics(session, record.sources, record.sink)
    return {*own, *record.sources, letters, marks_topic(letters), *([record.sink] if record.sink else [])}


def _groups(session: Session) -> tuple[str, str]:
    return session.group, session.publisher_id


# --- what there is ---------------------------------------------------------------------------------------------


async def list_traces(
    broker: Broker,
    group: str,
    *,
    options: WorkerOptions | None = None,
    clock: Clock | None = None,
    known: Mapping[str, KnownSession] | None = None,
) -> Traces | None:
    """Everything that a session left. Changes nothing.

    Args:
        broker: a started one.
        group: the session's.
        options: its ``state_dir`` says where this machine's workers keep tables, besides where the record says so.
        clock: time.
        known: what ``find_sessions`` found a moment ago; default: it is asked.

    Returns:
        None where nobody knows the session.

    Raises:
        BrokerError: the broker does not answer.
    """
    options, clock = options or WorkerOptions(), clock or SystemClock()
    if known is None:
        known = await find_sessions(broker, clock=clock, timeout=options.broker_timeout)
    subject = known.get(group)
    if subject is None:
        return None
    return await _Look(broker, subject, known, options).look()


class _Look:
    """Finds one session's traces among everybody's."""

    def __init__(
        self, broker: Broker, subject: KnownSession, known: Mapping[str, KnownSession], options: WorkerOptions
    ) -> None:
        self._broker = broker
        self._record = subject.record
        self._session = subject.session
        self._is_registered = subject.is_registered
        self._others = [each for each in known.values() if each.record.group != subject.record.group]
        self._options = options
        self._kept: list[Kept] = []

    async def look(self) -> Traces:
        """Look everywhere."""
        async with deadline(self._options.broker_timeout, "look groups and topics up"):
            groups = set(await self._broker.groups())
            topics = await self._broker.topics()
        workers = await _workers(self._broker, self._session.group, self._options.broker_timeout)
        found = [
            *self._own_groups(groups),
            *await self._own_topics(topics),
            *await asyncio.to_thread(lambda: list(self._own_folders())),
        ]
        if self._is_registered:
            found.append(Trace("record", CONTROL_TOPIC, "its record", is_last=True))
        self._tell_what_stays(topics)
        return Traces(self._record, self._is_registered, workers, _in_order(found), tuple(self._kept))

    def _own_groups(self, present: Collection[str]) -> Iterator[Trace]:
        taken = {each.record.group for each in self._others}
        group, publisher = _groups(self._session)
        if group in present:
            yield Trace("group", group, "offsets")
        if publisher in present and publisher not in taken:  # rowmill.p.input may be session input's of pipeline p
            yield Trace("group", publisher, "a replay's mark" if self._session.is_live else "what it is to run")

    async def _own_topics(self, present: Collection[str]) -> list[Trace]:
        named = owned_topics(self._session, self._record.sources, self._record.sink)
        taken = self._taken()
        found = []
        for name in [name for name in named if name in present]:
            doubt = f"session {taken[name]} has it, too" if name in taken else await self._foreign_rows(name)
            if doubt:
                self._kept.append(Kept(name, doubt))
            else:
                found.append(Trace("topic", name, named[name], is_last=name.endswith(".changelog")))
        what = "emitted rows" if self._record.sink else "results, or emitted rows"
        unclaimed = [name for name in present if name not in named and name not in taken]
        return found + [Trace("topic", name, what) async for name in self._side_topics(unclaimed)]

    def _taken(self) -> dict[str, str]:
        """Topics of other sessions, with one that has each."""
        return {name: short_name(each.record.group) for each in self._others for name in _mentioned(each.record)}

    async def _side_topics(self, unclaimed: Collection[str]) -> AsyncIterator[str]:
        """Topics that rows were emitted to: they are named after the session, and their records tell its source."""
        if self._session.is_live:
            return
        for name in sorted(unclaimed):
            if not name.endswith(f".{self._session.id}") or name.startswith(RESERVED_PREFIX):
                continue
            doubt = await self._doubt(name, is_named=False)
            if doubt == "":
                yield name
            elif doubt is not None:
                self._kept.append(Kept(name, doubt))

    async def _foreign_rows(self, topic: str) -> str | None:
        """Why a topic that the session's record names is another's as well; "" or None: it is not."""
        if topic == self._record.sink:
            return await self._doubt(topic, is_named=True)
        if topic not in self._record.sources:
            return None
        async for records in read_topic(self._broker, topic, until="end"):
            if any(input_row(record) is None for record in records):
                return "others write to it as well"
        return None

    async def _doubt(self, topic: str, *, is_named: bool) -> str | None:
        """Why a topic with the session's name at its end may be another's; "": it is ours; None: it surely is not.

        Args:
            topic: which.
            is_named: whether the session's record names it.
        """
        count = ours = 0
        async for records in read_topic(self._broker, topic, until="end"):  # all of it: what goes is gone for good
            count += len(records)
            ours += sum(map(self._is_ours, records))
            if ours < count and (ours or is_named):
                break
        if not count:
            return "" if is_named else "it is empty, and nothing else tells whose it was"
        if not ours and not is_named:
            return None
        if ours < count:
            return "others write to it as well"
        twin = self._twin(is_named=is_named)
        return "" if twin is None else f"it may be session {twin}'s, which has the same name and source"

    def _is_ours(self, record: Record) -> bool:
        source = header(record, SOURCE_HEADER) or b""
        if header(record, SESSION_HEADER) != self._session.id.encode():
            return False
        return source.startswith(tuple(f"{name}/".encode() for name in self._record.sources))

    def _twin(self, *, is_named: bool) -> str | None:
        """Another pipeline's session of the same name that reads what this one reads: its rows look like ours.

        Where the topic is named, those that have a record are out of the question: they would name it, too.
        """
        for other in self._others:
            if other.record.session != self._session.id or (is_named and other.is_registered):
                continue
            if set(other.record.sources) & set(self._record.sources):
                return short_name(other.record.group)
        return None

    def _own_folders(self) -> Iterator[Trace]:
        """Tables and caches of this machine, and artifacts."""
        from ..state.rocksdb import group_folders

        group = self._session.group
        roots = [state_folder(self._options, self._broker).absolute(), *self._here("tables", self._record.state_dir)]
        for root in dict.fromkeys(roots):
            apart = root if root.parts[-2:] == (APART, group) else root / APART / group
            if group_folders(root, group) and apart != root:
                yield Trace("tables", str(root), "tables")
            for folder in (apart, _gone(apart)):
                if folder.is_dir():
                    yield Trace("folder", str(folder), "tables and answers")
        for root in self._here("artifacts", self._record.artifacts):
            if any(root.glob(group)) or any(root.glob(f"{group}%*")):
                if self._session.is_live:
                    self._kept.append(Kept(f"artifacts in {root}", "results refer to them"))
                else:
                    yield Trace("artifacts", str(root), "artifacts")

    def _here(self, what: str, place: str) -> list[Path]:
        """The folder of ``host:folder`` if the host is this one."""
        host, _, folder = place.partition(":")
        if not folder:
            return []
        if host == platform.node():
            return [Path(folder)]
        self._kept.append(Kept(f"{what} in {place}", "they are on another machine"))
        return []

    def _tell_what_stays(self, present: Collection[str]) -> None:
        session, record = self._session, self._record
        if session.is_live:
            letters = record.dead_letters or session.dead_letters
            shared = {
                **dict.fromkeys(record.sources, "rows are no session's own"),
                **({record.sink: "results are not removed with the live session"} if record.sink else {}),
                letters: "dead letters are not removed with the live session",
                marks_topic(letters): "it tells which dead letters were retried",
            }
        else:
            own = owned_topics(session, record.sources, record.sink)
            shared = {name: "others read it" for name in record.sources if name not in own}
        self._kept += [Kept(name, why) for name, why in shared.items() if name in present]


def is_being_removed(record: SessionRecord) -> bool:
    """Whether somebody began to remove the session, and nobody has started it since."""
    return record.wanted is Wanted.CANCEL and record.reason == _REASON


async def _workers(broker: Broker, group: str, timeout: float) -> int | None:
    """How many members a group has; None where the broker does not tell."""
    try:
        async with deadline(timeout, f"look who is in group {group}"):
            return len(await broker.members(group))
    except BrokerError as error:
        log.info("%s", error)
        return None


def _in_order(traces: Sequence[Trace]) -> tuple[Trace, ...]:
    """As they are removed."""
    order: dict[Kind, int] = {"group": 0, "topic": 1, "tables": 2, "folder": 3, "artifacts": 4, "record": 5}
    return tuple(sorted(traces, key=lambda trace: (trace.is_last, order[trace.kind])))


# --- taking it away --------------------------------------------------------------------------------------------


async def remove_traces(
    broker: Broker,
    traces: Traces,
    *,
    options: WorkerOptions | None = None,
    clock: Clock | None = None,
    stop_workers: float | None = None,
    by: str = "",
    told: Callable[[Trace], None] = lambda _: None,
) -> None:
    """Remove what :func:`list_traces` found. Killed at any moment, it can be done again and comes to its end.

    Args:
        broker: a started one.
        traces: what there is.
        options: time limits.
        clock: time.
        stop_workers: seconds to wait for the session's workers, which are asked to cancel; default: a session with
            workers is refused.
        by: who does it, for the workers' record.
        told: called with each trace that has gone.

    Raises:
        GroupBusyError: a worker serves the session; nothing was removed.
        SessionError: a worker was started meanwhile; do it again once it is stopped.
        BrokerError: the broker does not answer; do it again.
        StoreError, ArtifactStoreError: a folder cannot be deleted; mend that, and do it again.
    """
    options, clock = options or WorkerOptions(), clock or SystemClock()
    if stop_workers is not None and await _Removal(broker, traces, options, clock, by).stop_workers(stop_workers):
        # They may have made more since, until the last one left.
        traces = await list_traces(broker, traces.record.group, options=options, clock=clock) or traces
    await _Removal(broker, traces, options, clock, by).execute(told)


class _Removal:
    """One removal."""

    def __init__(self, broker: Broker, traces: Traces, options: WorkerOptions, clock: Clock, by: str) -> None:
        self._broker = broker
        self._traces = traces
        self._session = traces.session
        self._timeout = options.broker_timeout
        self._clock = clock
        self._by = by
        self._control = ControlTopic(broker, clock=clock, timeout=options.broker_timeout)

    async def stop_workers(self, seconds: float) -> bool:
        """Have them cancel, and wait until the last one has left. Tells whether there were any."""
        group = self._session.group
        if not await _workers(self._broker, group, self._timeout):
            return False
        with suppress(IllegalTransitionError):  # it is cancelled already, or completed: they are leaving
            await request(self._control, group, Wanted.CANCEL, by=self._by, reason=_REASON)
        until = self._clock.monotonic() + seconds
        while await _workers(self._broker, group, self._timeout) and self._clock.monotonic() < until:
            await self._clock.sleep(_LOOK_SECONDS)
        return True

    async def execute(self, told: Callable[[Trace], None]) -> None:
        await self._check_idle()
        if not self._traces.found:
            return
        if not self._traces.is_registered:  # whoever goes on with this is told so what there was
            await self._control.update(self._session.group, lambda present: present or self._traces.record)
        groups = [trace for trace in self._traces.found if trace.kind == "group"]
        await self._remove_groups([trace.name for trace in groups] or [self._session.group])
        await self._mark()
        for trace in groups:
            told(trace)
        for batch in self._steps():
            await self._remove(batch)
            for trace in batch:
                told(trace)
        if not self._traces.is_registered:
            await self._forget()

    def _steps(self) -> list[list[Trace]]:
        """What comes behind the groups: topics together, all else one by one."""
        steps: list[list[Trace]] = []
        for trace in self._traces.found:
            before = steps[-1][-1] if steps else None
            if (
                trace.kind == "topic"
                and before is not None
                and (before.kind, before.is_last) == ("topic", trace.is_last)
            ):
                steps[-1].append(trace)
            elif trace.kind != "group":
                steps.append([trace])
        return steps

    async def _remove(self, batch: list[Trace]) -> None:
        names, group = [trace.name for trace in batch], self._session.group
        match batch[0].kind:
            case "topic":
                async with deadline(self._timeout, f"delete {', '.join(names)}"):
                    await self._broker.delete_topics(names)
            case "tables":
                from ..state.rocksdb import forget_group

                await asyncio.to_thread(forget_group, Path(names[0]), group)
            case "folder":
                await asyncio.to_thread(_delete, Path(names[0]))
            case "artifacts":
                await asyncio.to_thread(open_artifacts(names[0], scope=group).clear)
            case "record":
                await self._forget()

    async def _remove_groups(self, names: list[str]) -> None:
        async with deadline(self._timeout, f"delete {', '.join(names)}"):
            await self._broker.delete_groups(names)
        if self._broker.session_timeout is None:
            return
        # A worker that stood still for so long that the group dropped it may still commit: its offsets would be back.
        await self._fence()
        async with deadline(self._timeout, f"delete {', '.join(names)}"):
            await self._broker.delete_groups(names)

    async def _fence(self) -> None:
        """Take every transactional id of the session's workers, so that none of them commits anything any more."""
        gate = asyncio.Semaphore(_FENCES_AT_ONCE)

        async def take(transactional_id: str) -> None:
            async with gate:
                producer = self._broker.transactional_producer(transactional_id)
                try:
                    async with deadline(self._timeout, f"fence {transactional_id}"):
                        await producer.start()
                finally:
                    await producer.close()

        partitions = await partitions_of(self._broker, self._traces.record.sources)
        ids = [self._session.transactional_id(tp) for tp in partitions]
        if not self._session.is_live:
            ids.append(self._session.publisher_id)
        async with asyncio.TaskGroup() as group:
            for each in ids:
                group.create_task(take(each))

    async def _check_idle(self) -> None:
        workers = await _workers(self._broker, self._session.group, self._timeout)
        if workers:
            raise GroupBusyError(
                f"group {self._session.group} has {workers} member{'s' if workers > 1 else ''}: stop the workers of "
                f"session {short_name(self._session.group)} first (rowmill cancel {short_name(self._session.group)})"
            )

    async def _mark(self) -> None:
        """Write on the control topic what is being done; a worker that starts from now on is noticed: it wants to run.

        Behind the groups and not before: a worker that nobody has seen yet is to be refused, not cancelled.
        """
        now = self._clock.now_ms()

        def change(present: SessionRecord | None) -> SessionRecord:
            record = present or self._traces.record
            if is_being_removed(record):
                return record
            return replace(record, wanted=Wanted.CANCEL, changed_ms=now, changed_by=self._by, reason=_REASON)

        await self._control.update(self._session.group, change)

    async def _forget(self) -> None:
        def change(present: SessionRecord | None) -> SessionRecord | None:
            return present if present is not None and present.wanted is not Wanted.CANCEL else None

        if await self._control.update(self._session.group, change) is not None:
            name = short_name(self._session.group)
            raise SessionError(
                f"session {name} was started again while it was being removed; stop its workers, and remove it again"
            )


async def remove_owned(
    broker: Broker,
    session: Session,
    sources: Iterable[str],
    sink: str,
    *,
    side_topics: Iterable[str] = (),
    tables: Path | None = None,
    record: ControlTopic | None = None,
) -> None:
    """Remove a session that nobody but its maker can have heard of: by its names alone, in two calls.

    For a temporary run, whose name is drawn by lot. Its artifacts stay: the results that the caller got refer to them.

    Args:
        broker: a started one.
        session: which.
        sources: the topics it reads, as they are named on the broker.
        sink: where its results went, as it is named there.
        side_topics: what rows were emitted to.
        tables: the folder of the tables; None where it has none.
        record: the control topic, if the session has a record on it; that takes a transaction of its own.

    Raises:
        GroupBusyError: a worker serves it.
        BrokerError: the broker does not answer.
        StoreError: the tables cannot be deleted.
    """
    await broker.delete_topics([*owned_topics(session, sources, sink), *side_topics])
    await broker.delete_groups(_groups(session))
    if tables is not None:
        from ..state.rocksdb import forget_group

        await asyncio.to_thread(forget_group, tables, session.group)
    if record is not None:
        await record.update(session.group, lambda _: None)


def _gone(folder: Path) -> Path:
    """Where a folder lies while it is being deleted: half a store must not be where a worker looks."""
    return folder.with_name(f"{folder.name}%gone")


def _delete(folder: Path) -> None:
    gone = folder if folder.name.endswith("%gone") else _gone(folder)
    try:
        if gone != folder:
            if gone.exists():
                shutil.rmtree(gone)
            folder.rename(gone)
        shutil.rmtree(gone)
    except FileNotFoundError:
        if folder.exists() or gone.exists():
            raise
    except OSError as error:
        raise StoreError(f"the folder {folder} cannot be deleted: {error.strerror or error}", damaged=False) from error
