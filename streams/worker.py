"""The worker: joins a session's group, runs a partition task per assigned partition, and stops in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

from ..handlers.capture import install
from ..handlers.chain import Chain, with_inner
from ..handlers.context import NO_COST
from ..handlers.executors import BlockingPool
from ..handlers.flow import Flow, OnDone, OnGivenUp
from ..handlers.outcomes import Failure
from ..handlers.policed import GIVEN_UP
from ..handlers.runtime import Event, Runtime
from ..state.clock import Clock, SystemClock
from ..state.context import ExecutionContext, sum_costs
from ..state.execution import Wanted
from ..state.model import Record, TopicPartition
from ..state.sketch import Sketch
from ..state.store import StoreError, Stores
from .brokers.base import AssignmentListener, Broker, Member, Moment
from .catalog import Catalog
from .contexts import new_context
from .dead_letters import HEADROOM_BYTES
from .deadlines import FIRST_PAUSE, LONGEST_PAUSE, Patience, deadline, to_the_end
from .delivery import Forwarder
from .errors import BrokerError, FencedError, OffsetOutOfRangeError, RowFailedError, StalledError, TopicError
from .facilities import Facilities
from .in_flight import InFlight
from .options import WorkerOptions, state_folder
from .partition_state import CHANGELOG_CONFIG, PartitionState
from .partition_task import PartitionTask
from .pipeline import Pipeline
from .processing import Effects, Processor
from .session import Session
from .session_records import SessionRecord
from .snapshots import PartitionSnapshot, WorkerSnapshot, WorkerState
from .tracing import Tracing, find_tracing, system_of
from .transaction import CheckpointMovedError, Transactor

if TYPE_CHECKING:
    from ..handlers.observers import ExecutionObserver
    from .steering import Audience, Steering

log = logging.getLogger(__name__)

_PULSE_SECONDS = 0.25
_STORE_THREADS = 4
_FETCH_SECONDS = 0.1
_FETCH_PATIENCE_SECONDS = 1.0
_REVOKE_SECONDS = 0.5
_CANCEL_SECONDS = 1.0
_ELSEWHERE_SECONDS = 1.0
_PROBE_SECONDS = 10.0
_OTHERS_SECONDS = 10.0
_TOLD_CHARACTERS = 1_000
_TOTALS = (
    "rows", "rebuilt", "results", "dropped", "skipped", "defaulted", "dead_letters", "emitted", "transactions",
    "tokens",
)  # fmt: skip

BUDGET_STAGE = "budget"
"""Stands for the session's budget where that ended it."""


@dataclass(slots=True)
class WorkerStats:
    """What this process has committed since it started. Exact for it; not for the session's other workers."""

    rows: int = 0
    rebuilt: int = 0
    """Rows that ran only to make tables again; no other count but that of cost and tokens knows of them."""
    results: int = 0
    dropped: int = 0
    skipped: int = 0
    defaulted: int = 0
    dead_letters: int = 0
    emitted: int = 0
    transactions: int = 0
    cost: Decimal = NO_COST
    tokens: int = 0
    partitions: set[TopicPartition] = field(default_factory=set)
    started_ms: int = 0
    """When it started."""
    commit_seconds: float | None = None
    """How long the last commit took."""

    def add(self, tp: TopicPartition, effects: Effects) -> None:
        """Count one committed transaction."""
        self.rows += effects.rows - effects.rebuilt
        self.rebuilt += effects.rebuilt
        self.results += effects.results
        self.dropped += effects.dropped
        self.skipped += effects.skipped
        self.defaulted += effects.defaulted
        self.dead_letters += effects.dead_letters
        self.emitted += effects.emitted
        self.transactions += 1
        self.cost = sum_costs(self.cost, effects.cost)
        self.tokens += effects.tokens
        self.partitions.add(tp)


class Worker(AssignmentListener):
    """Runs a pipeline's session on this process's share of the partitions.

    Args:
        pipeline: what to run.
        broker: where; started by the caller, and closed by it.
        session: which execution; default: the live one.
        options: sizes and times.
        clock: time and chance.
        stores: where tables are kept; default: RocksDB in the options' ``state_dir``.
        pool: threads for blocking work; default: one of its own.
        observers: told of progress besides those of the pipeline.
        steered: whether it obeys ``rowmill pause``, ``resume`` and ``cancel``, and tells ``rowmill.events``.
        bounded: whether the session is over once this worker is: see :meth:`finish_at`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        broker: Broker,
        *,
        session: Session | None = None,
        options: WorkerOptions | None = None,
        clock: Clock | None = None,
        stores: Stores | None = None,
        pool: BlockingPool | None = None,
        observers: Sequence[ExecutionObserver] = (),
        steered: bool = True,
        bounded: bool = False,
    ) -> None:
        self.pipeline = pipeline
        self.session = session or Session(pipeline.name)
        self.options = options or WorkerOptions()
        self.stopped_by: Failure | None = None
        """The row's failure that ended the session, if one did: a StopExecution, or one whose stage says ``fail``."""
        self._broker = broker
        self._clock = clock or SystemClock()
        self.stats = WorkerStats(started_ms=self._clock.now_ms())
        self._chain = pipeline.chain()
        self._sources = [self.session.source(topic) for topic in pipeline.sources]
        self._catalog = Catalog(
            broker,
            create=self.options.create_topics,
            partitions=self.options.partitions,
            timeout=self.options.broker_timeout,
        )
        self._keeps_order = _keeps_order(pipeline, self._chain)
        self._pool = pool or BlockingPool(self.options.threads + _blocking_calls(pipeline))
        self._facilities = Facilities(
            pipeline, self._chain, self.session, broker, self.options, self._pool, self._clock
        )
        self._runtime = self._facilities.runtime
        self._runtime.listeners.append(self._heard_of)
        # Tables have threads of their own: handlers that hang must not keep a partition from being handed over.
        self._store_pool = pool or BlockingPool(_STORE_THREADS)
        self._stores = stores
        self.name = self._clock.token()
        """This worker's; every start has a new one."""
        self.is_bounded = bounded and not self.session.is_live
        """Whether the session is over once this worker is."""
        self._tracing = self._trace()
        self._steering = self._make_steering() if steered else None
        self._audience = self._make_audience([*pipeline.observers, *observers])
        self._alone = asyncio.Lock()
        self._changelogs: dict[str, int] = {}  # partitions of the changelog by source
        self._in_flight = InFlight(self.options.max_in_flight, self.options.max_in_flight_bytes)
        self._member: Member | None = None
        self._epoch = 0
        self._epochs: dict[TopicPartition, int] = {}
        """The assignment that each owned partition belongs to: work of an older one is dropped."""
        self._tasks: dict[TopicPartition, PartitionTask] = {}
        self._known: dict[TopicPartition, tuple[ExecutionContext, int]] = {}
        """Context and offset of partitions that nothing is open of: paused, or at the worker's end."""
        self._owners: dict[TopicPartition, asyncio.Task[None]] = {}
        self._parting: set[asyncio.Task[None]] = set()  # owners of partitions that are gone, on their way out
        self._changed = asyncio.Event()
        self._stable = _set_event()  # while the group does not rebalance
        self._may_work = _set_event()  # while the session is not paused
        self._resting: set[TopicPartition] = set()  # partitions that wait for it
        self._introduced = self._stopping = self._stopped = self._rejoin = False
        self._cancelling = asyncio.Event()
        self._penniless: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._ends: Mapping[TopicPartition, int] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._finished: set[TopicPartition] = set()
        self._asked_elsewhere = -_ELSEWHERE_SECONDS
        self._heard = self._probed = self._clock.monotonic()

    # --- for the caller ----------------------------------------------------------------------------------------

    async def run(self) -> WorkerStats:
        """Work until :meth:`stop`, until everything given to :meth:`finish_at` is committed, or an error.

        Raises:
            TopicError, GroupBusyError: it cannot start.
            OffsetOutOfRangeError, StalledError: it cannot go on.
        """
        try:
            await self._work()
        except Exception as error:
            self._failure = self._failure or error
            raise
        finally:
            await to_the_end(self._say_goodbye())
        if self._failure is not None:
            raise self._failure
        return self.stats

    async def _work(self) -> None:
        if self.pipeline.kept_log:
            install()
        try:
            await self._prepare_topics()
            await self._introduce()
            await self._join()
            pulse = asyncio.create_task(self._feel_pulse())
            try:
                await self._serve()
            finally:
                pulse.cancel()
            await self._drain()
        finally:  # cancelled, or a bug: what is in work is given up, and runs again elsewhere
            self._stopping = True
            await self._leave()
            if self._penniless is not None:
                self._penniless.cancel()
            await self._facilities.close()
            if self._stores is not None:
                self._stores.close()
            self._pool.close()
            self._store_pool.close()

    async def _introduce(self) -> None:
        """Take part in the session: find out what is wanted of it, and tell whoever watches."""
        if self._steering is not None:
            await self._steering.start()
            self._introduced = True
            if self._ends is not None and self.is_bounded:
                self._steering.ends_at(self._ends)
        if self._audience is not None:
            self._audience.start()

    async def _say_goodbye(self) -> None:
        """Tell whoever watches how it ended."""
        self._stopped = True
        why = {"reason": self._ended_by, "message": str(self._failure or "")}
        self._runtime.tell(Event("worker_stopped", "", {**why, "totals": self._totals()}))
        if self.is_bounded and self.is_complete and self._failure is None:
            self._runtime.tell(Event("session_completed", "", {"totals": self._totals()}))
        if self._failure is not None:
            self._runtime.tell(Event("session_failed", "", {"message": str(self._failure)}))
        if self._audience is not None:
            await self._audience.close(self.stats, self._failure)
        if self._steering is not None:
            await self._steering.close(str(self._failure or ""))

    @property
    def _ended_by(self) -> str:
        if self._failure is not None:
            return "failed"
        if self.was_cancelled:
            return "cancelled"
        if self.stopped_by is not None:
            return "row"
        return "finished" if self.is_complete else "stopped"

    def stop(self) -> None:
        """Ask for an orderly end: no more rows are begun, those in work finish, everything is committed."""
        self._stopping = True
        self._changed.set()

    def pause(self) -> None:
        """Begin no more rows, finish and commit those in work, and let go of producers and tables.

        The worker stays in the group and keeps its partitions: until :meth:`unpause`, or the end.
        """
        if not self._may_work.is_set() or self._stopping:
            return
        self._may_work.clear()
        log.info("pausing: rows in work are finished and committed")
        self._runtime.tell(Event("pausing", "", {"in_flight": self._in_flight.rows}))
        self._runtime.end(self.options.drain_timeout)
        for task in self._tasks.values():
            task.drain()
        self._changed.set()
        self._tell_if_paused()

    def unpause(self) -> None:
        """Open the partitions again, and go on where they stand then: a replay may have moved them meanwhile."""
        if self._may_work.is_set() or self._stopping:
            return
        log.info("resumed")
        self._runtime.go_on()
        self._finished.clear()  # a replay may have moved what was complete
        self._may_work.set()
        self._runtime.tell(Event("resumed", "", {}))

    def cancel(self) -> None:
        """Stop at once: what has completed is committed, rows in work are given up and run again at the next start.

        A blocking handler's thread goes on without anybody waiting for it.
        """
        if not self._cancelling.is_set():
            log.warning("cancelled: what has completed is committed, rows in work will run again")
            self._runtime.tell(Event("cancelled", "", {"in_flight": self._in_flight.rows}))
        self._cancelling.set()
        self.stop()

    @property
    def was_cancelled(self) -> bool:
        """Whether :meth:`cancel` was called, or somebody cancelled the session."""
        return self._cancelling.is_set()

    @property
    def state(self) -> WorkerState:
        """What it does now."""
        if self._stopped:
            return "stopped"
        if self._stopping:
            return "stopping"
        if not self._may_work.is_set():
            return "paused" if self._is_at_rest else "pausing"
        return "running" if self._epoch else "starting"

    @property
    def _is_at_rest(self) -> bool:
        return self._owners.keys() <= self._resting

    def _obey(self, record: SessionRecord) -> None:
        """What the session's operators want; heard whenever that changes."""
        if record.wanted is Wanted.CANCEL:
            self.cancel()
        elif record.wanted is Wanted.PAUSE:
            self.pause()
        else:
            self.unpause()

    def finish_at(self, ends: Mapping[TopicPartition, int]) -> None:
        """End by itself once the low watermark of each of these partitions has reached the offset given."""
        self._ends = dict(ends)
        if self._steering is not None and self._introduced and self.is_bounded:
            self._steering.ends_at(self._ends)
        self._changed.set()

    @property
    def is_complete(self) -> bool:
        """Whether everything given to :meth:`finish_at` is committed."""
        return self._ends is not None and self._ends.keys() <= self._finished

    @property
    def runtime(self) -> Runtime:
        """What the stages share: their counts, breakers and events."""
        return self._runtime

    def context(self) -> ExecutionContext:
        """The session's context as far as this worker's partitions go, as of their last commits."""
        known = self._known | {tp: (task.context, task.committed) for tp, task in self._tasks.items()}
        contexts = [context for context, _ in known.values()]
        context = ExecutionContext.merge(contexts) if contexts else new_context(self.session, self._clock)
        if self._ends is not None:
            behind = (end - known[tp][1] for tp, end in self._ends.items() if tp in known)
            context.total_rows = context.completed_rows + sum(max(0, rows) for rows in behind)
        context.pipeline_name, context.session_name = self.pipeline.name, self.session.id
        context.worker_name = self.name
        return context

    def progress(self) -> WorkerSnapshot:
        """As :meth:`snapshot`, with the times of calls since the last time that this was asked for."""
        return self.snapshot(self._runtime.new_latency())

    def snapshot(self, latency: Mapping[str, Sketch] | None = None) -> WorkerSnapshot:
        """How the worker and its partitions stand now, with the times of calls of the last half minute."""
        partitions = tuple(self._partition_snapshot(tp) for tp in sorted(self._owners))
        return WorkerSnapshot(
            worker=self.name,
            state=self.state,
            at_ms=self._clock.now_ms(),
            started_ms=self.stats.started_ms,
            totals=self._totals(),
            in_flight=sum(each.in_flight for each in partitions),
            in_flight_bytes=self._in_flight.bytes,
            commit_seconds=self.stats.commit_seconds,
            partitions=partitions,
            stages={name: counts.to_dict() for name, counts in self._runtime.stage_counts.items()},
            breakers={name: breaker.state for name, breaker in self._runtime.breakers.items()},
            budget=self._facilities.budget,
            latency=self._runtime.latency() if latency is None else latency,
            events_dropped=self._steering.events_dropped if self._steering is not None else 0,
            observer_errors=sum(self._audience.dispatcher.errors.values()) if self._audience is not None else 0,
        )

    def _partition_snapshot(self, tp: TopicPartition) -> PartitionSnapshot:
        task = self._tasks.get(tp)
        if task is not None:
            return task.snapshot()
        return PartitionSnapshot(tp=tp, state="paused" if tp in self._resting else "opening", counts={})

    def _totals(self) -> dict[str, int | str]:
        totals: dict[str, int | str] = {name: getattr(self.stats, name) for name in _TOTALS}
        return {**totals, "cost": str(self.stats.cost)}

    def _trace(self) -> Tracing | None:
        """Have rows traced, where the process has a provider of traces."""
        system = system_of(self._broker.url)
        tracing = find_tracing(system=system, group=self.session.group, worker=self.name)
        if tracing is not None:
            self._chain, self._runtime.traced = tracing.chain(self._chain), tracing.stage
        return tracing

    def _make_audience(self, observers: Sequence[ExecutionObserver]) -> Audience | None:
        if not observers:
            return None
        from .steering import Audience

        return Audience(self.pipeline, observers, self.context, self._runtime, self._clock, self.session.id, self.name)

    def _make_steering(self) -> Steering:
        from .steering import Steering, about, describe

        return Steering(
            self._broker,
            self.session,
            self.name,
            about=partial(about, self),
            describe=partial(describe, self, state_folder(self.options, self._broker)),
            obey=self._obey,
            snapshot=self.progress,
            runtime=self._runtime,
            clock=self._clock,
            timeout=self.options.broker_timeout,
            create=self.options.create_topics,
        )

    def has_committed(self, ends: Mapping[TopicPartition, int]) -> bool:
        """Whether everything before these offsets is committed, as far as this worker's partitions go."""
        return all(end == 0 or self._has_reached(tp, end) for tp, end in ends.items())

    def _has_reached(self, tp: TopicPartition, end: int) -> bool:
        task = self._tasks.get(tp)
        return task is not None and (task.committed >= end or (task.is_settled and task.low_watermark >= end))

    # --- AssignmentListener ------------------------------------------------------------------------------------

    def assigned(self, partitions: frozenset[TopicPartition], consecutive: bool) -> None:
        """Start a task per new partition, in a new epoch; see the port for what must not happen here.

        Partitions that came straight back go on where they were: nothing in flight is lost.
        """
        if self._member is None:
            return  # on its way out of the group
        self._stable.set()
        kept = partitions & self._owners.keys() if consecutive else frozenset()
        self._epoch += 1
        log.info("assigned %s (epoch %d; %d stayed)", _names(partitions), self._epoch, len(kept))
        self._runtime.tell(Event("partitions_assigned", "", _listed(partitions)))
        former = {tp: self._part(tp) for tp in list(self._owners) if tp not in kept}
        for tp in sorted(partitions - kept):
            self._epochs[tp] = self._epoch
            owner = self._own(tp, self._epoch, former.get(tp))
            self._owners[tp] = asyncio.create_task(owner, name=f"own {tp}")
        for tp in sorted(kept):
            task = self._tasks.get(tp)  # none while it opens: it begins the partition when it is ready
            if task is not None and self._member is not None:
                self._member.begin(tp, task.position)
                task.release()
        self._changed.set()

    async def revoked(self, partitions: frozenset[TopicPartition]) -> None:
        """Commit what has completed, for half a second at most, and commit no more until :meth:`assigned`.

        Rows in work go on: most partitions come straight back.
        """
        log.info("revoked %s", _names(partitions))
        self._runtime.tell(Event("partitions_revoked", "", _listed(partitions)))
        self._stable.clear()
        tasks = [self._tasks[tp] for tp in sorted(partitions) if tp in self._tasks]
        await _flush(tasks, goodbye=True)
        for task in tasks:
            task.hold()

    def _part(self, tp: TopicPartition) -> asyncio.Task[None]:
        """Give a partition up: its owner is cancelled, and lets go of producer and store on its way out."""
        self._epochs.pop(tp, None)
        self._resting.discard(tp)
        task = self._tasks.pop(tp, None)
        if self._member is not None:
            self._known.pop(tp, None)  # somebody else's now
        elif task is not None:
            self._known[tp] = (task.context, task.committed)
        owner = self._owners.pop(tp)
        owner.cancel()
        self._parting.add(owner)
        owner.add_done_callback(self._parting.discard)
        return owner

    # --- starting ----------------------------------------------------------------------------------------------

    async def _prepare_topics(self) -> None:
        await self._catalog.require(self._sources)
        counts = [self._catalog.partitions(topic) for topic in self._sources]
        await self._catalog.require([self.session.output(self.pipeline.sink)], partitions=max(counts))
        room = max(self.pipeline.max_row_bytes, self._broker.max_message_bytes) + 2 * HEADROOM_BYTES
        await self._catalog.require(
            [self.session.dead_letters], config={"max.message.bytes": str(room)}, partitions=max(counts)
        )
        partitions = {source: self._catalog.partitions(source) for source in self._sources}
        await self._prepare_changelogs(partitions)
        await self._facilities.prepare(self._catalog, partitions)

    async def _prepare_changelogs(self, partitions: Mapping[str, int]) -> None:
        """Changelogs have the partitions of their sources, also when those grow."""
        await self._catalog.require_own(
            {self.session.changelog(source): count for source, count in partitions.items()},
            CHANGELOG_CONFIG,
            may_grow=not self.pipeline.tables,
        )
        self._changelogs |= partitions

    def _open_stores(self) -> Stores | None:
        """Where tables are kept; nothing is made on disk for a pipeline without any."""
        if self.pipeline.tables and self._stores is None:
            from ..state.rocksdb import RocksStores

            self._stores = RocksStores(
                state_folder(self.options, self._broker), cache_bytes=self.options.table_cache_bytes
            )
        return self._stores

    async def _join(self) -> None:
        self._rejoin = False
        self._known.clear()
        self._stable.set()
        self._member = self._broker.member(self.session.group, self._sources)
        await self._member.join(self)

    # --- one partition -----------------------------------------------------------------------------------------

    async def _own(self, tp: TopicPartition, epoch: int, former: asyncio.Task[None] | None) -> None:
        """Own a partition; nothing that goes wrong with it goes unheard."""
        try:
            await self._work_on(tp, epoch, former)
        except asyncio.CancelledError:
            raise
        except StoreError as error:
            self._fail(StalledError(f"{tp}: {error}"))
        except BaseException as error:  # noqa: BLE001 - it must reach the caller of run()
            self._fail(error)

    async def _work_on(self, tp: TopicPartition, epoch: int, former: asyncio.Task[None] | None) -> None:
        """Run a partition's task, from step 2 again after an error that a fresh look can mend."""
        if former is not None:  # it holds the store
            await asyncio.wait({former}, timeout=self.options.broker_timeout)
        patience = Patience(self._clock, self.options.stall_timeout)
        while True:
            if await self._until_it_may_work(tp):
                patience = Patience(self._clock, self.options.stall_timeout)  # no time of a pause is trouble
            if self._stopping or self._epochs.get(tp) != epoch:
                return
            task = self._make_task(tp)
            patience.begin()
            try:
                trouble = await self._run_task(task, epoch)
            finally:
                if self._tasks.get(tp) is task:
                    del self._tasks[tp]
                    self._known[tp] = (task.context, task.committed)
                await to_the_end(task.close())
            if trouble is None:
                if self._member is None or self._stopping:
                    return
                continue  # paused, or resumed since
            if patience.is_over(worked=task.has_committed):
                self._fail(StalledError(f"{tp}: no progress for {self.options.stall_timeout:g} s: {trouble}"))
                return
            log.warning("%s: starting the partition again: %s", tp, trouble)
            if isinstance(trouble, StoreError) and trouble.damaged:
                await self._set_aside(tp)
            await patience.pause()

    async def _until_it_may_work(self, tp: TopicPartition) -> bool:
        """Wait while the group rebalances, or the session is paused; tells whether it was.

        Nothing of a paused partition is open: whoever wants may move it.
        """
        has_rested = False
        await self._stable.wait()
        while not self._may_work.is_set():
            has_rested = True
            self._resting.add(tp)
            self._tell_if_paused()
            try:
                await self._may_work.wait()
            finally:
                self._resting.discard(tp)
            await self._stable.wait()
        return has_rested

    def _tell_if_paused(self) -> None:
        if self._is_at_rest and not self._stopping:
            log.info("paused")
            self._runtime.tell(Event("paused", "", {}))

    async def _run_task(self, task: PartitionTask, epoch: int) -> BaseException | None:
        """Run a task to its end; gives the error that a fresh look can mend, None if nothing is left to do."""
        tp = task.tp
        began = self._clock.monotonic()
        try:
            if tp.partition >= self._changelogs[tp.topic]:
                await self._prepare_changelogs({tp.topic: tp.partition + 1})
            await self._facilities.take_over(tp)
            offset = await task.open(self._first_offset)
            await self._stable.wait()  # the next assignment tells whether it is still ours
            if self._epochs.get(tp) != epoch or self._member is None or not self._may_work.is_set():
                return None
            self._tasks[tp] = task
            self._member.begin(tp, offset)
            self._changed.set()
            opened = round(self._clock.monotonic() - began, 3)
            self._runtime.tell(Event("partition_opened", str(tp), {"offset": offset, "seconds": opened}))
            await task.run()
        except FencedError as error:
            if self.options.guarantee == "at_least_once":
                return error
            log.warning("%s; joining the group again", error)
            self._epochs.pop(tp, None)  # it is somebody else's: not to be opened here without a fresh assignment
            self._rejoin = True
            self._changed.set()
        except (BrokerError, CheckpointMovedError, StoreError) as error:
            return error
        except asyncio.CancelledError:
            raise
        except BaseException:
            if task.store_failure is None:
                raise
            return task.store_failure  # a task group in a handler wrapped it
        return None

    async def _set_aside(self, tp: TopicPartition) -> None:
        stores = self._stores
        if stores is not None:
            try:
                place = await self._store_pool.run(stores.set_aside, self.session.group, tp)
            except StoreError as error:  # opening it again will fail again, until stall_timeout
                log.warning("%s: %s", tp, error)
                return
            log.warning("%s: the local tables are damaged; they lie in %s now and are restored", tp, place)

    def _make_task(self, tp: TopicPartition) -> PartitionTask:
        state = PartitionState(
            self._broker,
            self.session,
            tp,
            self.pipeline.tables,
            self._open_stores(),
            self.options,
            self._store_pool,
            self._clock,
            self.name,
        )
        return PartitionTask(
            tp,
            delivery=self._make_delivery(tp),
            state=state,
            make_processor=lambda: Processor(
                self.pipeline,
                self._chain,
                self.session,
                tp,
                self._catalog,
                self._runtime,
                state.tables,
                lambda: state.rebuild,
                self._tracing,
            ),
            make_flow=None if self._keeps_order else self._make_flow,
            in_flight=self._in_flight,
            alone=self._alone,
            options=self.options,
            clock=self._clock,
            on_commit=self._on_commit,
            on_halt=self._halt,
            on_change=self._changed.set,
        )

    def _make_delivery(self, tp: TopicPartition) -> Transactor | Forwarder:
        if self.options.guarantee == "exactly_once":
            return Transactor(self._broker, self.session, tp, self.options, self._clock, self._stable)
        return Forwarder(self._broker, self.session, tp, self.options, self._clock, lambda: self._member)

    def _make_flow(self, on_done: OnDone, on_error: Callable[[], None], on_given_up: OnGivenUp) -> Flow:
        if self._tracing is not None:
            on_done, on_given_up = self._tracing.ending(on_done), self._tracing.giving_up(on_given_up)
        return Flow(
            self._chain,
            self._runtime,
            on_done,
            on_error,
            on_given_up,
            by_key=self.pipeline.ordering == "key",
            linger=self.options.linger,
        )

    async def _first_offset(self, tp: TopicPartition) -> int:
        """Where a group that never committed begins: at the pipeline's ``start``, or the first row of its own topic."""
        start = self.pipeline.start if self.session.is_live else "earliest"
        at: Moment = "earliest"
        if isinstance(start, datetime):
            at = int(start.timestamp() * 1000)
        elif start == "latest":
            at = "end"
        async with deadline(self.options.broker_timeout, f"{tp}: look up the first offset"):
            return (await self._broker.offsets([tp], at))[tp]

    def _on_commit(self, tp: TopicPartition, effects: Effects, seconds: float) -> None:
        self.stats.add(tp, effects)
        self.stats.commit_seconds = seconds
        for record, failure in effects.failures:
            self._runtime.tell(_row_failed(tp, record, failure))
        log.debug("%s: committed %d rows in %.3f s", tp, effects.rows, seconds)

    def _halt(self, tp: TopicPartition, failure: Failure) -> None:
        """A row ends the session: in order, or as failed."""
        if failure.kind == GIVEN_UP:  # it ends already, or pauses, and the row waits for something
            return
        if self.stopped_by is None:
            self.stopped_by = failure
            log.warning("%s: stage %r ends the session: %s", tp, failure.stage, failure.message)
        if failure.then == "fail":
            self._fail(
                RowFailedError(
                    f"{tp}: stage {failure.stage!r}: {failure.kind}: {failure.message}. Its on_error= is 'fail': the "
                    "row stays undone, and the session goes on with it once the cause is mended"
                )
            )
        else:
            self.stop()

    def _heard_of(self, event: Event) -> None:
        """Once the money is gone, a session that should end does; one that goes on for ever waits for more."""
        if event.kind == "budget_exhausted" and (self._ends is not None or self.session.owns_source):
            self._penniless = self._penniless or asyncio.create_task(self._end_without_money(event.detail))

    async def _end_without_money(self, detail: dict[str, Any]) -> None:
        """Unless other workers give some back within a while: what a dead one had leased never comes back."""
        account = self._runtime.account
        give_up = self._clock.monotonic() + (_OTHERS_SECONDS if detail.get("others_open") not in {None, "0"} else 0)
        while account is not None and account.is_exhausted and not self._stopping:
            if self._clock.monotonic() >= give_up:
                message = f"the budget of {detail['limit']} is used up (spent: {detail['spent']})"
                self.stopped_by = self.stopped_by or Failure(BUDGET_STAGE, "budget_exhausted", message, then="stop")
                log.warning("%s: the session ends; give it a higher budget to go on", message)
                self.stop()
                return
            await self._clock.sleep(_PULSE_SECONDS)
        self._penniless = None

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self.stop()

    # --- serving -----------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while not self._stopping and not await self._is_finished():
            if self._rejoin:
                await _flush(self._tasks.values(), goodbye=True)
                await self._leave()
                await self._join_again()
            await self._probe()
            self._changed.clear()
            wanted = [tp for tp, task in self._tasks.items() if task.wants_rows]
            if wanted:
                await self._fetch(wanted)
            else:
                await self._until_changed()

    async def _join_again(self) -> None:
        """Join after having been fenced, with the patience that any trouble with the broker gets."""
        give_up = self._clock.monotonic() + self.options.stall_timeout
        pause = FIRST_PAUSE
        while not self._stopping:
            try:
                await self._join()
            except BrokerError as error:
                if self._clock.monotonic() > give_up:
                    raise StalledError(f"cannot join group {self.session.group} again: {error}") from error
                log.warning("joining again: %s", error)
                await self._leave()
            else:
                return
            await self._clock.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _feel_pulse(self) -> None:
        """Notice when this process stood still for so long that its partitions are somebody else's by now.

        It would hear of that from the group, and from being fenced, but only later: until then its handlers would go
        on being called, and paid, for rows that others run as well.
        """
        longest = self._broker.session_timeout
        last = self._clock.monotonic()
        while longest is not None:
            await self._clock.sleep(_PULSE_SECONDS)
            now = self._clock.monotonic()
            if now - last > longest:
                log.warning("stood still for %.1f s, longer than the session timeout: joining again", now - last)
                for tp in list(self._owners):
                    self._part(tp)
                self._rejoin = True
                self._changed.set()
            last = now

    async def _probe(self) -> None:
        """Ask the broker for something now and then while no rows come: a fetch tells nothing of a dead broker."""
        now = self._clock.monotonic()
        if now - max(self._heard, self._probed) < _PROBE_SECONDS:
            return
        self._probed = now
        try:
            async with deadline(_PROBE_SECONDS, "ask the broker whether it is there"):
                await self._broker.offsets([TopicPartition(self._sources[0], 0)], "earliest")
            self._heard = self._clock.monotonic()
        except BrokerError as error:
            silent = self._clock.monotonic() - self._heard
            log.warning("no sign of the broker for %.0f s: %s", silent, error)
            if silent > self.options.stall_timeout:
                self._fail(StalledError(f"no sign of {self._broker.url} for {silent:.0f} s: {error}"))

    async def _fetch(self, wanted: list[TopicPartition]) -> None:
        member = self._member
        if member is None:
            return
        fetching = self._fetching or asyncio.create_task(self._fetch_and_offer(member, wanted))
        self._fetching = fetching
        # aiokafka waits in there for as long as a rebalance lasts: look now and then whether there is something else.
        await asyncio.wait({fetching}, timeout=_FETCH_PATIENCE_SECONDS)
        if fetching.done():
            self._fetching = None
            fetching.result()

    async def _fetch_and_offer(self, member: Member, wanted: list[TopicPartition]) -> None:
        try:
            got = await member.fetch(wanted, self.options.fetch_rows, _FETCH_SECONDS)
        except OffsetOutOfRangeError as error:
            way = self.session.way_to_move(error.tp, "--to-earliest")
            self._fail(OffsetOutOfRangeError(error.tp, error.offset, f"{error.remedy}: {way}"))
            return
        except BrokerError as error:
            log.warning("%s", error)
            await self._clock.sleep(_FETCH_SECONDS)
            return
        # By the port's contract these records lie where the partition was begun last, so they are for its present
        # task, also if that one was made while the fetch was waiting. Nothing may be awaited in between: a task that
        # is begun meanwhile would take records from further on for its first ones, and miss those before them.
        for tp, records in got.items():
            task = self._tasks.get(tp)
            if task is not None and task.running and records:
                task.offer(records)
        for tp in wanted:
            task = self._tasks.get(tp)
            if task is not None and task.running and not got.get(tp):
                await self._advance(member, task)
        if any(got.values()):
            self._heard = self._clock.monotonic()

    async def _advance(self, member: Member, task: PartitionTask) -> None:
        """Tell a task of a gap at the end of its log (transaction markers, records compacted away)."""
        with contextlib.suppress(BrokerError, TopicError, TimeoutError):  # it may be gone, or not be begun
            async with asyncio.timeout(_FETCH_SECONDS):
                position = await member.position(task.tp)
            if self._tasks.get(task.tp) is task:
                task.advance(position)

    async def _until_changed(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FETCH_SECONDS):
                await self._changed.wait()

    async def _is_finished(self) -> bool:
        if self._ends is None:
            return False
        self._finished |= {tp for tp, end in self._ends.items() if end == 0 or self._has_reached(tp, end)}
        missing = self._ends.keys() - self._finished
        elsewhere = missing - (self._owners.keys() - self._resting)
        if elsewhere and self._clock.monotonic() - self._asked_elsewhere > _ELSEWHERE_SECONDS:
            await self._ask_elsewhere(elsewhere)
        return not missing - self._finished

    async def _ask_elsewhere(self, partitions: set[TopicPartition]) -> None:
        """Partitions that other workers own, or that are paused: only the broker knows how far they are."""
        self._asked_elsewhere = self._clock.monotonic()
        with contextlib.suppress(BrokerError):
            async with deadline(self.options.broker_timeout, "read the group's offsets"):
                committed = await self._broker.committed(self.session.group, partitions)
            for tp, checkpoint in committed.items():
                if checkpoint is not None and self._ends is not None and checkpoint.offset >= self._ends[tp]:
                    self._finished.add(tp)

    # --- stopping ----------------------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Finish what is in work, and commit it."""
        self._stopping = True
        self._runtime.end(self.options.drain_timeout)
        for task in self._tasks.values():
            task.drain()
        owners = [owner for tp, owner in self._owners.items() if tp in self._tasks]
        if not owners:
            return
        cancelled = asyncio.ensure_future(self._cancelling.wait())
        ends: set[asyncio.Future[Any]] = {asyncio.gather(*owners, return_exceptions=True), cancelled}
        try:
            await asyncio.wait(ends, timeout=self.options.drain_timeout, return_when=FIRST_COMPLETED)
        finally:
            cancelled.cancel()
        late = [owner for owner in owners if not owner.done()]
        if late:
            if not self.was_cancelled:
                log.warning("%d partitions did not finish within %g s", len(late), self.options.drain_timeout)
            await _flush(self._tasks.values(), goodbye=True)  # nobody died: rows in work are not to blame
            for task in self._tasks.values():
                task.hold()  # a commit that begins now would be cut off, and its transaction left open

    async def _leave(self) -> None:
        self._epoch += 1
        member, self._member = self._member, None  # first: what it is still assigned is nobody's
        fetching, self._fetching = self._fetching, None
        if fetching is not None:
            fetching.cancel()
            await asyncio.wait({fetching})
        for tp in list(self._owners):
            self._part(tp)
        if self._parting:
            # A handler that swallows its cancellation is not waited for, once nobody wants what it does.
            patience = _CANCEL_SECONDS if self.was_cancelled else self.options.broker_timeout
            await asyncio.wait(self._parting, timeout=patience)
        if member is not None:
            await member.leave()


def _keeps_order(pipeline: Pipeline, chain: Chain) -> bool:
    """Whether rows run lot by lot, in order.

    Chains of plain functions keep it at no cost; with tables, though, a row must see what the rows before it wrote,
    so there only if each row runs through the whole chain before the next.
    """
    if pipeline.ordering == "partition" or not pipeline.tables:
        return pipeline.ordering == "partition" or chain.is_sync
    return chain.is_row_by_row


async def _flush(tasks: Iterable[PartitionTask], *, goodbye: bool) -> None:
    """Commit what has completed in these, for half a second at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REVOKE_SECONDS):
            await asyncio.gather(*(task.flush(goodbye=goodbye) for task in tasks))


def _blocking_calls(pipeline: Pipeline) -> int:
    """How many calls of blocking handlers may hold a thread at once."""
    return sum(s.concurrency for s in with_inner(pipeline.stages) if not s.is_async and not s.is_plain)


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


def _row_failed(tp: TopicPartition, record: Record, failure: Failure) -> Event:
    place = {"topic": tp.topic, "partition": tp.partition, "offset": record.offset}
    why = {"type": failure.kind, "message": failure.message[:_TOLD_CHARACTERS], "attempts": failure.attempts}
    return Event("row_failed", failure.stage, {**place, **why, "then": failure.then})


def _listed(partitions: frozenset[TopicPartition]) -> dict[str, Any]:
    return {"partitions": [str(tp) for tp in sorted(partitions)]}


def _names(partitions: frozenset[TopicPartition]) -> str:
    return ", ".join(str(tp) for tp in sorted(partitions)) or "nothing"
