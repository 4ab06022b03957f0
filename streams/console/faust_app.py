"""The console's Faust app: reads what workers tell, keeps it in tables, and feeds the board.

It runs on an event loop in a thread of its own, so that catching up with a day of events, a broker that hangs or an
error inside Faust hold up neither the page nor what it steers; whatever is left of a dead app goes with its loop.

Agents take batches, the board counts, and every few seconds a checkpoint writes what has changed to the tables'
changelogs; only then are the records acknowledged. The tables, not the group's offsets, say what is counted
(``session_board.py``), so a record that is read twice is counted once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import faust
from faust.types.auth import SASLMechanism
from mode.supervisors import CrashingSupervisor
from mode.threads import WorkerThread
from yarl import URL

from ...state.clock import Clock
from ...state.errors import ConfigError, RowmillError
from ...state.model import Committed, TopicPartition
from ..brokers.base import Broker, MemberInfo, TopicSpec
from ..brokers.open import addresses_of, open_broker, security_of
from ..brokers.security import KafkaSecurity
from ..collect import read_topic
from ..control_topic import CONTROL_CONFIG
from ..dead_letters import ERROR_PREFIX
from ..deadlines import deadline
from ..errors import GroupBusyError
from ..event_records import EVENTS_TOPIC, EventRecord
from ..events import events_topic
from ..session import SESSION_HEADER
from ..session_records import CONTROL_TOPIC
from .board import MOST_LETTER_TOPICS, TABLES, Board, Change
from .own_thread import close_loop, in_thread
from .transport import Consumer as LocalConsumer
from .turn import GROUP, LocalTurn, Turn, another_console, client_id

TABLE_CONFIG = {"cleanup.policy": "compact", "segment.bytes": str(16 << 20), "segment.ms": "86400000"}
"""Kafka never compacts the newest segment: small ones keep a restart quick."""

_DAY_MS = 86_400_000
FIRST_MS = _DAY_MS
"""How far back a first start begins, or one after a long absence."""
MOST_LETTERS = 20_000
"""Dead letters of one partition that are read at a start: there may be millions, and this is no place to count them."""
CHECKPOINT_SECONDS = 5.0
BATCH = 2_000
STOP_SECONDS = 4.5
_LET_GO_SECONDS = 1.0
SESSION_SECONDS = 10.0

_CALL_SECONDS = 15.0
_LOOK_SECONDS = 1.0
_JOIN_LOOK_SECONDS = 0.2
_ENDS_SECONDS = 5.0
_STALL_SECONDS = 30.0
_LIVE_SECONDS = 5.0
_LETTER_TOPICS_SECONDS = 30.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_GOOD_SECONDS = 60.0

_log = logging.getLogger(__name__)


def table_topic(table: str) -> str:
    """The changelog topic of one of the console's tables."""
    return f"{GROUP}.{table}"


CONSOLE_TOPICS = tuple(table_topic(table) for table in TABLES)


class ConsoleApp:
    """Runs the Faust app as long as the console runs, and starts it again when it fails.

    Args:
        url: the broker's.
        board: what is fed. Its listeners are called on the event loop that ``run`` is called on.
        clock: time.
        state_dir: where Faust may keep files; a folder with mode 0700 is made in it.
        create_topics: whether the console's topics may be made.
        on_events: called on that loop with the events that were new, as they come; not with those of the past.
        environment: default: the process's.
        checkpoint_seconds: how often what has changed is written down; so much is read again after a kill.
    """

    def __init__(
        self,
        url: str,
        board: Board,
        clock: Clock,
        *,
        state_dir: Path,
        create_topics: bool = True,
        on_events: Callable[[Sequence[EventRecord]], None] | None = None,
        environment: Mapping[str, str] | None = None,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self.url = url
        self.board = board
        self.clock = clock
        self.create_topics = create_topics
        self.environment = environment
        self.checkpoint_seconds = checkpoint_seconds
        self.datadir = state_dir / "console"
        self.has_looked_back = False
        """Not whether the board knows sessions: the watch may have told it of some by then."""
        self.has_left_out = False
        """Whether it was said that not all dead-letter topics are read."""
        self._on_events = on_events
        self._loop: asyncio.AbstractEventLoop | None = None
        self._local_turn: LocalTurn | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``; then within five seconds.

        Raises:
            ConfigError: another console runs on this broker, a setting is wrong, or topics are missing and may not be
                made.
        """
        self._loop = asyncio.get_running_loop()
        self.datadir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            await self._live_again_and_again(stop)
        finally:
            if self._local_turn is not None:
                self._local_turn.release()
        self.board.stand("stopped", message="the console was stopped")

    async def _live_again_and_again(self, stop: asyncio.Event) -> None:
        pause, has_run = _FIRST_PAUSE, False
        while not stop.is_set():
            began = self.clock.monotonic()
            life = _Life(self)
            try:
                await in_thread(life, stop, STOP_SECONDS)
                has_run = True
                continue
            except ConfigError as error:
                if not has_run and not life.was_live:
                    raise
                message = str(error)
            except Exception as error:  # noqa: BLE001 - whatever it is, the console goes on without
                message = f"{type(error).__name__}: {error}"[:500]
                _log.warning("the console's history stands still: %s", message)
            has_run = has_run or life.was_live
            pause = _FIRST_PAUSE if self.clock.monotonic() - began > _GOOD_SECONDS else min(pause * 2, _LONGEST_PAUSE)
            self.board.stand("stopped", message=f"{message}; tried again in {pause:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)

    def take_local_turn(self, folder: Path) -> None:
        """Be the one console on this embedded broker until ``run`` ends.

        Raises:
            ConfigError: another one is.
        """
        self._local_turn = self._local_turn or LocalTurn(folder, self.url)
        self._local_turn.take()

    def tell(self, groups: Iterable[str], events: Sequence[EventRecord]) -> None:
        """From the Faust app's thread: something has changed."""
        loop, told = self._loop, tuple(groups)
        if loop is None or loop.is_closed():
            return
        with contextlib.suppress(RuntimeError):  # closed since
            loop.call_soon_threadsafe(self.board.notify, told)
            if events and self._on_events is not None:
                loop.call_soon_threadsafe(self._on_events, tuple(events))


class _Restart(Exception):  # noqa: N818 - no error
    """The app is to be made anew, for there are dead-letter topics that it does not read."""


class _Life:
    """One Faust app from its start to its end, on the loop of its thread."""

    def __init__(self, owner: ConsoleApp) -> None:
        self.was_live = False
        self._owner = owner
        self._board = owner.board
        self._clock = owner.clock
        self._stop = asyncio.Event()
        self._messages: list[Any] = []
        self._read: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._moved = self._clock.monotonic()
        self._newest_ms = 0
        self._writing = asyncio.Lock()
        self._letter_topics: tuple[str, ...] = ()
        self._tables: dict[str, Any] = {}
        self._is_loaded = False
        self._has_passed_over = False
        self._client = client_id(self._clock)
        self._shared_since: float | None = None

    def ask_to_stop(self) -> None:
        """On its loop."""
        self._stop.set()

    async def live(self) -> None:
        """Until asked to stop, or until something fails."""
        self._board.stand("starting")
        broker = open_broker(self._owner.url, clock=self._clock, environment=self._owner.environment)
        await broker.start()
        try:
            if broker.folder is not None:
                self._owner.take_local_turn(broker.folder)
            if not self._owner.has_looked_back:
                await self._look_back(broker)
                self._owner.has_looked_back = True
            turn = Turn(broker, self._clock, self._owner.url, self._client)
            try:
                await self._live_in_turn(broker, turn)
            finally:
                await turn.close()
        except _Restart:
            _log.info("reading dead letters of further topics")
        finally:
            await broker.close()

    async def _live_in_turn(self, broker: Broker, turn: Turn) -> None:
        self._board.stand("starting", message="waiting for the end of a console that ran before, if there is one")
        await turn.take(SESSION_SECONDS + 5, self._stopped_within)
        if self._stop.is_set():
            return
        self._board.stand("starting")
        await self._prepare(broker, turn)
        with _quiet_loggers():
            app = self._app(broker)
            try:
                await self._serve(app, broker, turn)
            finally:
                await self._end(app)

    # -- before the start --------------------------------------------------------------------------------------

    async def _look_back(self, broker: Broker) -> None:
        """Show the past at once, as the tables' topics have it: Faust may be seconds away, and a killed console's
        place in its group is free only when its time is over.
        """
        present = await broker.topics()
        tables: dict[str, dict[bytes, bytes]] = {}
        for table in TABLES:
            kept = tables.setdefault(table, {})
            if table_topic(table) in present:
                async for records in read_topic(broker, table_topic(table), until="end"):
                    kept.update((record.key or b"", record.value or b"") for record in records)
        self._fill(tables)

    def _fill(self, tables: Mapping[str, Mapping[bytes, bytes]]) -> None:
        self._board.load(lambda table: [(key.decode(), value) for key, value in tables[table].items() if value])
        self._owner.tell(self._board.groups(), ())

    async def _prepare(self, broker: Broker, turn: Turn) -> None:
        async with deadline(60, "prepare the console's topics"):
            present = await broker.topics()
            specs = [
                events_topic(broker),
                TopicSpec(CONTROL_TOPIC, 1, CONTROL_CONFIG),
                *(TopicSpec(topic, 1, TABLE_CONFIG) for topic in CONSOLE_TOPICS),
            ]
            absent = [spec.name for spec in specs if spec.name not in present]
            if absent and not self._owner.create_topics:
                raise ConfigError(
                    "topics", ", ".join(absent), "they are not there and may not be made: see docs/operations.md, ACLs"
                )
            await broker.create_topics(specs)
            self._letter_topics = await self._find_letter_topics(broker)
            present = await broker.topics()
            names = [EVENTS_TOPIC, CONTROL_TOPIC, *self._letter_topics]
            partitions = [TopicPartition(name, n) for name in names for n in range(present[name].partitions)]
            await turn.start(await self._starts(broker, partitions, is_new=bool(set(absent) & set(CONSOLE_TOPICS))))

    async def _find_letter_topics(self, broker: Broker) -> tuple[str, ...]:
        """Those that sessions named, and those that are named like one; where they are too many, those of sessions
        that were heard of last.

        To the day, and then by name: which ones are read must not change with every event.
        """
        named = self._board.letter_topics()
        found = [name for name in await broker.topics() if name in named or name.endswith(".dlq")]
        found.sort(key=lambda name: (-(named.get(name, 0) // _DAY_MS), name))
        if len(found) > MOST_LETTER_TOPICS and not self._owner.has_left_out:
            self._owner.has_left_out = True
            _log.warning(
                "there are %d dead-letter topics, and the console counts those of %d: %s and others are not counted "
                "by stage and error; delete those that nobody needs",
                len(found),
                MOST_LETTER_TOPICS,
                found[MOST_LETTER_TOPICS],
            )
        return tuple(found[:MOST_LETTER_TOPICS])

    async def _starts(
        self, broker: Broker, partitions: list[TopicPartition], *, is_new: bool
    ) -> dict[TopicPartition, Committed]:
        """Where to begin, for partitions whose committed place is missing, lost or too far back."""
        committed = await broker.committed(GROUP, partitions)
        earliest = await broker.offsets(partitions, "earliest")
        ends = await broker.offsets(partitions, "end")
        recent = await broker.offsets(partitions, self._clock.now_ms() - FIRST_MS)
        starts = {}
        for tp in partitions:
            least = max(earliest[tp], recent[tp] if tp.topic != CONTROL_TOPIC else 0)
            if tp.topic in self._letter_topics:
                least = max(least, ends[tp] - MOST_LETTERS)
            place = committed[tp]
            is_sound = place is not None and least <= place.offset <= ends[tp] and not is_new
            self._read[tp] = place.offset if is_sound and place is not None else least
            if not is_sound:
                starts[tp] = Committed(least)
        self._ends = dict(ends)
        return starts

    # -- the app -----------------------------------------------------------------------------------------------

    def _app(self, broker: Broker) -> faust.App:
        app = faust.App(
            GROUP,
            autodiscover=False,
            agent_supervisor=CrashingSupervisor,
            broker_client_id=self._client,
            broker_commit_interval=2.0,
            broker_heartbeat_interval=3.0,
            broker_request_timeout=_CALL_SECONDS,
            broker_session_timeout=SESSION_SECONDS,
            broker_rebalance_timeout=SESSION_SECONDS,
            consumer_auto_offset_reset="earliest",
            datadir=self._owner.datadir,
            producer_request_timeout=_CALL_SECONDS,
            store="memory://",
            stream_wait_empty=False,
            topic_allow_declare=False,
            topic_disable_leader=True,
            web_enabled=False,
            **_connection(self._owner.url, broker, self._owner.environment),
        )
        for table in TABLES:
            self._tables[table] = app.Table(
                table,
                partitions=1,
                key_type=bytes,
                value_type=bytes,
                changelog_topic=_topic(app, table_topic(table), acks=False, internal=True, maxsize=131_072),
                use_partitioner=True,
            )
        self._tables["sessions"].on_recover(self._load)
        self._add_agent(app, "events", [EVENTS_TOPIC], self._take_event)
        self._add_agent(app, "control", [CONTROL_TOPIC], self._take_control)
        if self._letter_topics:
            self._add_agent(app, "letters", list(self._letter_topics), self._take_letter)
        return app

    def _add_agent(self, app: faust.App, name: str, topics: list[str], take: Callable[[Any], Any]) -> None:
        """An agent that reads topics in batches; what it has read is acknowledged by a checkpoint."""

        async def read(stream: Any) -> None:
            async for events in stream.noack_take(BATCH, within=_LOOK_SECONDS):
                self._feed(events, take)
                while len(self._messages) > 10 * BATCH:  # the tables cannot be written: read no further
                    await self._checkpoint()

        app.agent(_topic(app, *topics), name=f"{GROUP}.{name}")(read)

    async def _load(self) -> None:
        """Once the tables are as they were, also after a rebalance: what was not written down is read again."""
        async with self._writing:
            self._messages.clear()
            self._fill({name: table.data for name, table in self._tables.items()})
            self._is_loaded = True

    async def _serve(self, app: faust.App, broker: Broker, turn: Turn) -> None:
        if (client := getattr(app.consumer, "_thread", None)) is not None:
            client.Worker = _ClientThread
            client.seek_to_committed = functools.partial(_seek_to_committed, client)
        await app.start()
        while not await turn.confirm():
            self._check_alive(app)
            if await self._stopped_within(_JOIN_LOOK_SECONDS):
                return
        written = ends_seen = topics_seen = self._clock.monotonic()
        while not await self._stopped_within(_LOOK_SECONDS):
            self._check_alive(app)
            if not self._is_loaded:
                continue
            self._stand()
            now = self._clock.monotonic()
            if now - written >= self._owner.checkpoint_seconds:
                await self._checkpoint()
                written = now
            if now - ends_seen >= _ENDS_SECONDS:
                await self._look_at_ends(broker)
                ends_seen = now
            if now - topics_seen >= _LETTER_TOPICS_SECONDS:
                await self._look_for_letter_topics(app, broker)
                topics_seen = now
        if self._is_loaded:
            await self._checkpoint()

    def _check_alive(self, app: faust.App) -> None:
        if not app.crashed:
            return
        reason = app.crash_reason
        if isinstance(reason, GroupBusyError):
            raise another_console(self._owner.url)
        raise RuntimeError(f"the Faust app failed: {reason or 'no reason'}")

    async def _end(self, app: faust.App) -> None:
        """Within the time there is; the rest is cut off with the loop."""
        stopping = asyncio.ensure_future(app.stop())
        await asyncio.wait((stopping,), timeout=STOP_SECONDS - 2.5)
        if not stopping.done():
            _log.warning("the console's Faust app did not stop in time: it is cut off")
            stopping.cancel()
            await _let_go(app)
        elif error := stopping.exception():
            _log.warning("the console's Faust app did not stop in order: %s: %s", type(error).__name__, error)
        await _cut_off(app)

    async def _stopped_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
        return self._stop.is_set()

    # -- reading -----------------------------------------------------------------------------------------------

    def _feed(self, batch: Sequence[Any], take: Callable[[Any], EventRecord | None]) -> None:
        groups: dict[str, None] = {}
        news: list[EventRecord] = []
        for event in batch:
            message = event.message
            known = self._taken(message, take)
            if known is not None:
                groups[known.group] = None
                if self._clock.now_ms() - known.written_ms < 60_000:
                    news.append(known)
            self._read[TopicPartition(message.topic, message.partition)] = message.offset + 1
            message.value = event.value = None  # only the acknowledgement is to come
            self._messages.append(event)
        self._moved = self._clock.monotonic()
        self._owner.tell(groups, news)

    def _taken(self, message: Any, take: Callable[[Any], EventRecord | None]) -> EventRecord | None:
        """What a record was. One that cannot be counted is passed over: it would else be read again for ever."""
        try:
            return take(message)
        except Exception:  # noqa: BLE001 - anybody may write to these topics
            if not self._has_passed_over:
                _log.exception("%s, offset %d, cannot be counted and is passed over", _tp(message), message.offset)
            self._has_passed_over = True
            return None

    def _take_event(self, message: Any) -> EventRecord | None:
        written_ms = round(message.timestamp * 1000)
        self._newest_ms = written_ms
        return self._board.take(_tp(message), message.offset, written_ms, message.value)

    def _take_control(self, message: Any) -> EventRecord | None:
        return self._board.take_control(_tp(message), message.offset, round(message.timestamp * 1000), message.value)

    def _take_letter(self, message: Any) -> None:
        headers = dict(message.headers.items() if isinstance(message.headers, Mapping) else message.headers or ())
        why = {name: _text(headers.get(ERROR_PREFIX + name)) for name in ("stage", "type", "session")}
        why["session"] = why["session"] or _text(headers.get(SESSION_HEADER))
        # A dead letter has its row's time, which says nothing of when it failed.
        at_ms = self._clock.now_ms() if self.was_live else round(message.timestamp * 1000)
        self._board.take_letter(_tp(message), message.offset, at_ms, why)

    def _stand(self) -> None:
        """Live: nothing is left to read, or what was read last is seconds old."""
        is_behind = any(self._read[tp] < end for tp, end in self._ends.items() if tp.topic == EVENTS_TOPIC)
        age = max(0, self._clock.now_ms() - self._newest_ms) / 1000 if self._newest_ms else 0.0
        if is_behind and (age >= _LIVE_SECONDS or not self._newest_ms):
            self._board.stand("catching up", age)
            return
        self.was_live = True
        self._board.stand("live", age if is_behind else 0.0)

    async def _look_at_ends(self, broker: Broker) -> None:
        """Where the topics end now. A consumer that has silently stopped (faust-streaming#175, #640) is caught here."""
        async with deadline(_CALL_SECONDS, "look at the ends of the console's topics"):
            self._ends = await broker.offsets(list(self._read), "end")
            members = await broker.members(GROUP)
        self._check_shared(members)
        is_behind = any(self._read[tp] < end for tp, end in self._ends.items() if tp.topic == EVENTS_TOPIC)
        if not is_behind:
            self._moved = self._clock.monotonic()
        elif self._clock.monotonic() - self._moved > _STALL_SECONDS:
            raise RuntimeError("there are events, and the Faust app reads none")

    def _check_shared(self, members: Sequence[MemberInfo]) -> None:
        """One that started at the same moment leaves the group soon; somebody who stays takes partitions from us."""
        if len(members) <= 1:
            self._shared_since = None
            return
        now = self._clock.monotonic()
        self._shared_since = now if self._shared_since is None else self._shared_since
        if now - self._shared_since > SESSION_SECONDS + 5:
            raise another_console(self._owner.url, [each for each in members if each.client != self._client])

    async def _look_for_letter_topics(self, app: faust.App, broker: Broker) -> None:
        """See that all are read: also that a topic which was just being made when the app started was given to it."""
        assigned = {tp.topic for tp in app.consumer.assignment()}
        if not assigned:  # amid a rebalance
            return
        async with deadline(_CALL_SECONDS, "look for dead-letter topics"):
            if set(await self._find_letter_topics(broker)) - (assigned & set(self._letter_topics)):
                await self._checkpoint()
                raise _Restart

    # -- writing -----------------------------------------------------------------------------------------------

    async def _checkpoint(self) -> None:
        """Write what has changed, sessions last, and acknowledge what that counts."""
        async with self._writing:
            messages, self._messages = self._messages, []
            changes = self._board.changes()
            async with deadline(_CALL_SECONDS, "write the console's tables"):
                await self._write([change for change in changes if change.table != "sessions"])
                await self._write([change for change in changes if change.table == "sessions"])
            for event in messages:
                event.ack()

    async def _write(self, changes: Sequence[Change]) -> None:
        """Each to its table and its changelog, and wait until they are written."""
        sent = []
        for table, key, value in (
            (self._tables[change.table], change.key.encode(), change.value) for change in changes
        ):
            if value is None:
                table.data.pop(key, None)
            else:
                table.data[key] = value
            sent.append(table.send_changelog(0, key, value, key_serializer="raw", value_serializer="raw"))
        for outcome in await asyncio.gather(*sent, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome


class _ClientThread(WorkerThread):
    """The thread that Faust's Kafka consumer has: it can be cut off, and keeps no program from ending.

    While the broker is away the client's own stop waits for it without end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.daemon = True

    def run(self) -> None:
        """As it is, without a word of how it ended, and with nothing left open."""
        self.service._close_thread_loop_on_stop = False  # noqa: SLF001 - there is no public name for it
        try:
            try:
                super().run()
            finally:
                close_loop(self.service.thread_loop)
        except BaseException as error:  # noqa: BLE001 - it was cut off, or the app has heard of it
            _log.debug("the Kafka consumer's thread has ended: %s: %s", type(error).__name__, error)


async def _seek_to_committed(client: Any) -> dict[Any, int | None]:
    """Go back to where each partition was committed, also at 0, which aiokafka 0.14's own method passes over.

    At the end of a recovery Faust may fetch records of partitions that it then neither delivers nor remembers, and
    relies on this to fetch them again: those of a new topic would never be read (ran).
    """
    consumer = client._ensure_consumer()  # noqa: SLF001 - Faust has no public name for the client

    async def seek() -> dict[Any, int | None]:
        assigned = list(consumer.assignment())
        committed = dict(zip(assigned, await asyncio.gather(*map(consumer.committed, assigned)), strict=True))
        for tp, offset in committed.items():
            if offset is not None and tp in consumer.assignment():
                consumer.seek(tp, offset)
        return committed

    found: dict[Any, int | None] = await client.call_thread(seek)
    return found


async def _let_go(app: faust.App) -> None:
    """Leave the group of an embedded broker, which has no session timeout that would do so later."""
    consumer = getattr(app, "_consumer", None)
    if isinstance(consumer, LocalConsumer):
        with contextlib.suppress(TimeoutError, RowmillError):
            async with asyncio.timeout(_LET_GO_SECONDS):
                await consumer.let_go()


async def _cut_off(app: faust.App) -> None:
    """End the Kafka consumer's thread, where it has not ended by itself."""
    client = getattr(app.consumer, "_thread", None)
    thread, loop = getattr(client, "_thread", None), getattr(client, "thread_loop", None)
    if loop is None:
        return
    if not isinstance(thread, threading.Thread):  # the app failed before it began
        loop.close()
        return

    def cancel() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    for end in (cancel, cancel, cancel, loop.stop):
        if not thread.is_alive():
            return
        with contextlib.suppress(RuntimeError):  # closed since
            loop.call_soon_threadsafe(end)
        await asyncio.to_thread(thread.join, 0.3)


def _is_no_cutting_off(record: logging.LogRecord) -> bool:
    """Whether it tells something else than that a task was cancelled."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    """Faust tells its life at INFO and warns of what we chose; only its errors are for our log, and of them not those
    that it makes of being cut off (which may come after this).
    """
    logging.getLogger("faust.agents.actor").addFilter(_is_no_cutting_off)
    loggers = [logging.getLogger(name) for name in ("faust", "mode")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _topic(app: faust.App, *names: str, **options: Any) -> Any:
    return app.topic(
        *names,
        key_type=bytes,
        value_type=bytes,
        key_serializer="raw",
        value_serializer="raw",
        allow_empty=True,
        **options,
    )


def _connection(url: str, broker: Broker, environment: Mapping[str, str] | None) -> dict[str, Any]:
    """The broker in Faust's words."""
    if broker.folder is not None:
        return {"broker": URL.build(scheme="local", path=str(broker.folder))}
    addresses = addresses_of(url)
    security = security_of(url, os.environ if environment is None else environment)
    found: dict[str, Any] = {"broker": [URL(f"kafka://{address}") for address in addresses.split(",")]}
    if security is not None:
        found["broker_credentials"] = _credentials(security)
    return found


def _credentials(security: KafkaSecurity) -> Any:
    context = security.client_options().get("ssl_context")
    if security.sasl:
        return faust.SASLCredentials(
            username=security.user,
            password=security.password,
            ssl_context=context,
            mechanism=SASLMechanism(security.sasl),
        )
    return faust.SSLCredentials(context) if context is not None else None


def _tp(message: Any) -> TopicPartition:
    return TopicPartition(message.topic, message.partition)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")
