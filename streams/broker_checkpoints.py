"""The checkpoints that a broker has: those of its sessions, which their transactions commit, and some kept by hand.

A checkpoint of a session that the broker does not know, which somebody saves all the same, goes on the compacted topic
``rowmill.checkpoints``, one partition, under the session's id. Format, version 1: ``{"v": 1, "at": milliseconds,
"data": the checkpoint's twelve keys}``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID

from ..state.clock import Clock, SystemClock
from ..state.codec import loads
from ..state.context import session_uuid
from ..state.errors import ConfigError
from ..state.execution import ExecutionState
from ..state.model import RESERVED_PREFIX, Outgoing, TopicPartition
from .brokers.base import Broker
from .brokers.open import open_broker
from .catalog import Catalog
from .checkpoint_stores import CheckpointInfo, CheckpointStorage, info_of, named_id, newest_first, written
from .collect import read_topic
from .contexts import session_context
from .control_topic import ControlTopic
from .deadlines import deadline
from .errors import CheckpointError
from .known_sessions import KnownSession, find_sessions
from .loops import run_blocking
from .options import WorkerOptions
from .session_refs import known_sessions, resolve, session_of
from .session_traces import is_being_removed, list_traces, remove_traces
from .status import SessionStatus, session_statuses

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECKPOINTS_TOPIC = RESERVED_PREFIX + "checkpoints"

_PLACE = TopicPartition(CHECKPOINTS_TOPIC, 0)
_CONFIG = {"cleanup.policy": "compact"}
_VERSION = 1


class BrokerCheckpoints:
    """The checkpoints of one broker, for one event loop.

    Args:
        broker: a started one.
        clock: time.
        options: time limits, and where tables of this machine are.
    """

    def __init__(self, broker: Broker, *, clock: Clock, options: WorkerOptions | None = None) -> None:
        self.clock = clock
        self.options = options or WorkerOptions()
        self._broker = broker
        self._timeout = self.options.broker_timeout

    async def find(self, session: UUID | str) -> UUID:
        """The id of a session, by its id or its name, as ``rowmill status`` takes names.

        Raises:
            ConfigError: it is no name, or that of several sessions.
            BrokerError: the broker does not answer.
        """
        if isinstance(session, UUID):
            return session
        groups = await self._groups()
        try:
            return session_uuid(resolve(str(session), groups, self._broker.url))
        except ConfigError:
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                return UUID(session)
            if sum(each is not None and each.id == session for each in map(session_of, groups)) > 1:
                raise
        return named_id(session)

    async def infos(self) -> list[CheckpointInfo]:
        """All of them, the newest first.

        Raises:
            BrokerError: the broker does not answer.
        """
        statuses = await session_statuses(self._broker, clock=self.clock, timeout=self._timeout)
        found = [self._described(status) for status in statuses]
        by_hand = [self._kept(session_id, value) for session_id, value in (await self._by_hand()).items()]
        known = {info.session_id for info in found}
        return newest_first(found + [info for info in by_hand if info is not None and info.session_id not in known])

    async def load(self, session_id: UUID) -> dict[str, Any] | None:
        """A session's checkpoint.

        Raises:
            CheckpointError: it cannot be read.
            BrokerError: the broker does not answer.
        """
        known = await self._known(session_id)
        if known is not None:
            record = known.record
            context = await session_context(self._broker, known.session, record.sources, self._timeout, self.clock)
            if context is not None:
                statuses = await session_statuses(
                    self._broker, clock=self.clock, timeout=self._timeout, group=record.group
                )
                # Of a session with an end, rows behind it are not for it.
                totals = [status.total_rows for status in statuses if status.total_rows is not None]
                context.total_rows = max([context.completed_rows, *totals]) if totals else context.total_rows
                return context.to_checkpoint()
        value = (await self._by_hand()).get(session_id)
        return None if value is None else _data(session_id, value)

    async def exists(self, session_id: UUID) -> bool:
        """Whether there is one. Errors are those of :meth:`load`."""
        return await self.load(session_id) is not None

    async def save(self, session_id: UUID, data: dict[str, Any]) -> bool:
        """Keep a checkpoint, unless it is that of a session of this broker, whose transactions keep it.

        Raises:
            CheckpointError: it cannot be written as JSON, or is too large for a message.
            BrokerError: the broker does not answer.
        """
        if session_id in {session_uuid(group) for group in await self._groups()}:
            return True
        value = written({"v": _VERSION, "at": self.clock.now_ms(), "data": data})
        room = self._broker.max_message_bytes - 200
        if len(value) > room:
            raise CheckpointError(
                f"the checkpoint of session {session_id} has {len(value):,} bytes, and a message {room:,} at most: "
                "keep less in its intermediate_data, or use a FileCheckpointStorage"
            )
        catalog = Catalog(self._broker, create=True, partitions=None, timeout=self._timeout)
        await catalog.require_own({CHECKPOINTS_TOPIC: 1}, _CONFIG, may_grow=True)
        await self._write(session_id, value)
        return True

    async def delete(self, session_id: UUID) -> bool:
        """Remove every trace of a session that is its own, and what was kept by hand.

        Returns:
            Whether there was anything.

        Raises:
            GroupBusyError: workers serve the session; nothing was removed.
            BrokerError: the broker does not answer.
        """
        known = await find_sessions(self._broker, clock=self.clock, timeout=self._timeout)
        deleted = False
        for group, each in known.items():
            if session_uuid(group) == session_id:
                deleted |= await self._remove(group, {**known, group: each})
        return await self.forget(session_id) or deleted

    async def forget(self, session_id: UUID) -> bool:
        """Remove a checkpoint that was kept by hand; False where there is none."""
        if session_id not in await self._by_hand():
            return False
        await self._write(session_id, None)
        return True

    async def _remove(self, group: str, known: dict[str, KnownSession]) -> bool:
        traces = await list_traces(self._broker, group, options=self.options, clock=self.clock, known=known)
        if traces is None or not traces.found:
            return False
        await remove_traces(self._broker, traces, options=self.options, clock=self.clock, by="StateManager")
        return True

    async def _groups(self) -> list[str]:
        control = ControlTopic(self._broker, clock=self.clock, timeout=self._timeout, create=False)
        return list(await known_sessions(control))

    async def _known(self, session_id: UUID) -> KnownSession | None:
        known = await find_sessions(self._broker, clock=self.clock, timeout=self._timeout)
        return next((each for group, each in known.items() if session_uuid(group) == session_id), None)

    def _described(self, status: SessionStatus) -> CheckpointInfo:
        record, active = status.record, status.active_ms or 0
        done = status.rows.rows
        total = status.total_rows if status.total_rows is not None else done + status.lag
        progress = status.percent if status.percent is not None else 100 * done / total if total else 0.0
        sources = {partition.tp.topic for partition in status.partitions}
        begun = any(partition.committed is not None for partition in status.partitions)
        return CheckpointInfo(
            session_id=session_uuid(record.group),
            checkpoint_path=f"{self._broker.url} {record.group}",
            row_index=max((p.committed - 1 for p in status.partitions if p.committed), default=0),
            timestamp=datetime.fromtimestamp(active / 1000, UTC),
            session=status.reference,
            pipeline=record.pipeline,
            group=record.group,
            state=status.state,
            resumable=begun
            and status.lag > 0
            and status.state is not ExecutionState.COMPLETED
            and sources >= set(record.sources),
            progress=min(100.0, progress),
            rows=done,
            total_rows=total,
            failed_rows=status.rows.dead_letters,
            skipped_rows=status.rows.skipped,
            cost=status.cost,
            tokens=status.tokens,
            age=timedelta(milliseconds=max(0, status.at_ms - active)) if active else None,
            workers=len(status.workers),
            is_being_removed=is_being_removed(record),
            problem=status.problem,
        )

    # --- those kept by hand ----------------------------------------------------------------------------------------

    async def _by_hand(self) -> dict[UUID, bytes]:
        async with deadline(self._timeout, "look topics up"):
            if CHECKPOINTS_TOPIC not in await self._broker.topics():
                return {}
        kept: dict[UUID, bytes] = {}
        async for records in read_topic(self._broker, CHECKPOINTS_TOPIC):
            for record in records:
                try:
                    session_id = UUID((record.key or b"").decode())
                except ValueError:
                    log.warning("%s: offset %d is no checkpoint", CHECKPOINTS_TOPIC, record.offset)
                    continue
                kept.pop(session_id, None)
                if record.value is not None:
                    kept[session_id] = record.value
        return kept

    def _kept(self, session_id: UUID, value: bytes) -> CheckpointInfo | None:
        try:
            data, at = _data(session_id, value), int(loads(value)["at"])
            info = info_of(data, f"{self._broker.url} {CHECKPOINTS_TOPIC}", len(value), at, self.clock.now_ms())
            return replace(info, session_id=session_id)
        except (CheckpointError, KeyError, TypeError, ValueError, OverflowError) as error:
            log.warning("%s", error)
            return None

    async def _write(self, session_id: UUID, value: bytes | None) -> None:
        producer = self._broker.producer()
        try:
            async with deadline(self._timeout, f"write to {CHECKPOINTS_TOPIC}"):
                await producer.start()
                out = Outgoing(str(session_id).encode(), value, self.clock.now_ms())
                await (await producer.send(_PLACE, [out]))
        finally:
            await producer.close()


def _data(session_id: UUID, value: bytes) -> dict[str, Any]:
    try:
        outer = loads(value)
        if outer["v"] == _VERSION:
            return dict(outer["data"])
        reason = f"it has version {outer['v']}, and this rowmill reads {_VERSION}: run a newer"
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error)
    raise CheckpointError(f"the checkpoint of session {session_id} on {CHECKPOINTS_TOPIC} cannot be read: {reason}")


class BrokerCheckpointStorage(CheckpointStorage):
    """The checkpoints that a broker has of its sessions. Each call connects, and lets go again.

    Args:
        broker: its URL; default ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
        state_dir: where workers of this machine keep tables, if they were told; ``delete`` removes a session's.
        timeout: seconds that each call to the broker may take.
        clock: time.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(
        self,
        broker: str | None = None,
        *,
        state_dir: str | None = None,
        timeout: float = 30.0,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._options = WorkerOptions(state_dir=state_dir, broker_timeout=timeout)
        self._url = broker
        open_broker(broker, clock=self._clock)  # refuses what is no broker

    def save(self, session_id: UUID, data: dict[str, Any]) -> bool:
        """Keep a checkpoint of a session that the broker does not know; of another one it has it already."""
        return run_blocking(lambda: self.save_async(session_id, data))

    def load(self, session_id: UUID) -> dict[str, Any] | None:
        """The session's checkpoint, as of its last commit."""
        return run_blocking(lambda: self.load_async(session_id))

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """All sessions of the broker, those without a checkpoint among them, and what was kept by hand."""
        return run_blocking(self.list_checkpoints_async)

    def delete(self, session_id: UUID) -> bool:
        """Remove every trace of the session that is its own."""
        return run_blocking(lambda: self.delete_async(session_id))

    def exists(self, session_id: UUID) -> bool:
        """Whether something was committed, or kept."""
        return run_blocking(lambda: self.exists_async(session_id))

    def find(self, session: UUID | str) -> UUID:
        """The id of a session; a name that only one session has will do."""
        return session if isinstance(session, UUID) else run_blocking(lambda: self.find_async(session))

    async def save_async(self, session_id: UUID, data: dict[str, Any]) -> bool:
        """:meth:`save` on a running event loop."""
        return await self._on_broker(lambda checkpoints: checkpoints.save(session_id, data))

    async def load_async(self, session_id: UUID) -> dict[str, Any] | None:
        """:meth:`load` on a running event loop."""
        return await self._on_broker(lambda checkpoints: checkpoints.load(session_id))

    async def list_checkpoints_async(self) -> list[CheckpointInfo]:
        """:meth:`list_checkpoints` on a running event loop."""
        return await self._on_broker(lambda checkpoints: checkpoints.infos())

    async def delete_async(self, session_id: UUID) -> bool:
        """:meth:`delete` on a running event loop."""
        return await self._on_broker(lambda checkpoints: checkpoints.delete(session_id))

    async def exists_async(self, session_id: UUID) -> bool:
        """:meth:`exists` on a running event loop."""
        return await self._on_broker(lambda checkpoints: checkpoints.exists(session_id))

    async def find_async(self, session: UUID | str) -> UUID:
        """:meth:`find` on a running event loop."""
        if isinstance(session, UUID):
            return session
        return await self._on_broker(lambda checkpoints: checkpoints.find(session))

    async def _on_broker(self, work: Callable[[BrokerCheckpoints], Awaitable[T]]) -> T:
        async with _connected(self._url, self._clock) as broker:
            return await work(BrokerCheckpoints(broker, clock=self._clock, options=self._options))


@asynccontextmanager
async def _connected(url: str | None, clock: Clock) -> AsyncIterator[Broker]:
    broker = open_broker(url, clock=clock)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()
