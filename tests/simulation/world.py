"""One run: a seed's workload, workers, faults, and what must hold at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast
from unittest import mock

from rowmill import Worker
from rowmill.handlers.executors import BlockingPool
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.state.store import Change, StoreError
from rowmill.streams.errors import BrokerError, OffsetOutOfRangeError, StalledError
from rowmill.streams.options import WorkerOptions

from simulation.checker import Checker
from simulation.client import Connection
from simulation.cluster import Cluster
from simulation.loop import Process, SimLoop, StuckError
from simulation.machine import SimClock, SimPool, SimStores
from simulation.network import Mood, Network
from simulation.trace import Trace
from simulation.workload import GROUP, SIDE, SINK, SOURCE, Hooks, Workload, source

_EXPECTED_ENDS = (BrokerError, StalledError)
_HEAL_SECONDS = 60.0
_DEEDS = ("freeze", "kill", "hire", "dismiss", "stall", "restart", "evict", "cut", "load", "forget", "retain")


class SimulationError(AssertionError):
    """A run that failed, with all that is needed to understand and to repeat it."""

    def __init__(self, seed: int, cause: BaseException, world: World) -> None:
        super().__init__(
            f"\nseed {seed} (ROWMILL_SIM_SEED={seed}): {type(cause).__name__}: {cause}\n"
            f"workload: {world.workload.describe()}\nplan: {world.plan}\n"
            f"--- the last events ---\n{world.trace.tail()}"
        )
        self.seed = seed


Disk: TypeAlias = dict[tuple[str, TopicPartition], dict[bytes, bytes]]
"""What a machine keeps when its process dies."""


@dataclass
class Plan:
    """What a seed does to its workers besides the network's mood."""

    seconds: float
    deeds: dict[str, float]
    """Mean seconds between two of a kind."""
    mood: Mood
    session: float
    patience: float
    policy: Any
    transaction_timeout: float
    options: WorkerOptions
    pool_delay: float
    staff: int
    end: str
    tells_evicted: bool
    sink_partitions: int | None
    side_partitions: int | None
    disk_faults: float
    deadly: bool
    """Whether a row kills its process, and nothing else does."""

    @property
    def exactly_once(self) -> bool:
        """Which guarantee is asked for."""
        return self.options.guarantee == "exactly_once"

    @classmethod
    def make(cls, seed: int) -> Plan:
        """A plan. Each kind of fault is in about half of them, so that runs differ in kind and not only in detail."""
        chance = random.Random(f"plan {seed}")
        deeds = {
            name: chance.choice([3.0, 8.0, 25.0])
            for name in (
                "freeze",
                "kill",
                "hire",
                "dismiss",
                "stall",
                "restart",
                "evict",
                "cut",
                "load",
                "forget",
                "retain",
            )
            if chance.random() < 0.4
        }
        session = chance.choice([4.0, 6.0, 10.0])
        deadly = chance.random() < 0.08
        if deadly:
            deeds = {name: mean for name, mean in deeds.items() if name in {"hire", "dismiss"}}
        mood = _mood(chance)
        if deadly:
            mood.calm()
        return cls(
            seconds=chance.uniform(10, 60),
            deeds=deeds,
            mood=mood,
            session=session,
            patience=chance.choice([session, 20.0]),
            policy=chance.choice(["even", "sticky", "shuffle"]),
            transaction_timeout=chance.choice([5.0, 15.0, 60.0]),
            options=_options(chance, deadly=deadly),
            pool_delay=chance.choice([0.0, 0.001, 0.05]),
            staff=chance.randint(1, 3),
            end=chance.choice(["stop", "stay"] if deadly else ["kill", "stop", "stay"]),
            tells_evicted=chance.random() < 0.5,
            sink_partitions=chance.choice([None, None, 1, 3]),
            side_partitions=chance.choice([None, 1, 2]),
            disk_faults=0.0 if deadly else chance.choice([0.0, 0.0, 0.02]),
            deadly=deadly,
        )


def _mood(chance: random.Random) -> Mood:
    mood = Mood(
        latency=chance.choice([0.001, 0.005, 0.03]),
        marker=chance.choice([0.001, 0.05, 1.0]),
        late=chance.choice([5, 60]),
    )
    if chance.random() < 0.85:
        for name in ("lost_request", "lost_reply", "late_request", "repeated", "refused", "broken", "retriable"):
            if chance.random() < 0.5:
                setattr(mood, name, chance.choice([0.003, 0.01, 0.04]))
    return mood


def _options(chance: random.Random, *, deadly: bool) -> WorkerOptions:
    return WorkerOptions(
        commit_interval=chance.choice([0.0, 0.02, 0.1, 0.5]),
        commit_rows=chance.choice([3, 10_000]),
        fetch_rows=chance.choice([3, 10, 100]),
        buffer_rows=chance.choice([5, 50, 1000]),
        max_in_flight=chance.choice([2, 10, 100]),
        linger=chance.choice([0.0, 0.02]),
        drain_timeout=chance.choice([1.0, 5.0, 20.0]),
        broker_timeout=chance.choice([0.5, 2.0, 5.0]),
        stall_timeout=chance.choice([10.0, 60.0]),
        guarantee="at_least_once" if not deadly and chance.random() < 0.15 else "exactly_once",
        # A kill by us looks like one by the row in work, so the real limit is for runs in which only rows kill.
        max_deaths=3 if deadly else chance.choice([0, 1000]),
    )


@dataclass(eq=False)
class Staff:
    """A worker that was hired."""

    process: Process
    connection: Connection
    clock: SimClock
    pool: SimPool
    disk: Disk
    run: asyncio.Task[Any] = field(init=False)
    worker: Worker | None = None
    is_leaving: bool = False


class World:
    """Everything of one run.

    Args:
        seed: decides all of it.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.plan = Plan.make(seed)
        frozen = "freeze" in self.plan.deeds
        self.workload = Workload.make(
            seed,
            seconds=self.plan.seconds * 0.8,
            may_time_out=not frozen,
            deadly=self.plan.deadly,
            exactly_once=self.plan.exactly_once,
        )
        self.loop = SimLoop(max_seconds=20_000.0, max_steps=400_000)
        self.loop.set_exception_handler(self._complained)
        self.trace = Trace(self.loop.time)
        self.network = Network(self.loop, self.plan.mood, random.Random(f"network {seed}"), self.trace)
        self.checker = Checker(
            self.workload, self.loop.time, self.trace, self._halt, exactly_once=self.plan.exactly_once
        )
        self.counts: Counter[str] = Counter()
        self.staff: list[Staff] = []
        self._chance = random.Random(f"world {seed}")
        self._processes: dict[str, Staff] = {}
        self._hired = 0
        self._disks: list[Disk] = []
        self._disk_chance = random.Random(f"disk {seed}")
        self._healed = False
        self._is_over = False
        self._all_written = asyncio.Event()
        self.seconds = 0.0
        """Virtual ones that the run took."""
        self.digest = ""
        """Of all that happened."""

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Raises SimulationError."""
        handler = _LogHandler(self.trace)
        logger = logging.getLogger("rowmill")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        propagate, logger.propagate = logger.propagate, False
        asyncio.set_event_loop(self.loop)
        with deterministic():
            try:
                self.loop.run_until_complete(self._story())
            except Exception as error:
                raise SimulationError(self.seed, error, self) from error
            finally:
                self.digest, self.seconds = self.trace.digest, self.loop.time()
                self._dispose()
                logger.removeHandler(handler)
                logger.setLevel(level)
                logger.propagate = propagate
                asyncio.set_event_loop(None)

    def _dispose(self) -> None:
        self._is_over = True
        for staff in self._processes.values():
            staff.connection.link.is_cut = True
        with warnings.catch_warnings():  # coroutines that the dead never began
            warnings.simplefilter("ignore", RuntimeWarning)
            self.loop.dispose([staff.process for staff in self._processes.values()])

    async def _story(self) -> None:
        self._set_up()
        writing = asyncio.create_task(self._write_rows())
        for _ in range(self.plan.staff):
            self._hire()
        await self._faults()
        await self._heal()
        await writing
        await self._finish()
        # Whatever is still under way arrives, and what the dead left open times out.
        await asyncio.sleep(self.plan.mood.late + self.plan.transaction_timeout + 10)
        self.checker.at_end(self.cluster)
        for disk in self._disks:
            for (_, tp), content in disk.items():
                self.checker.check_store(self.cluster, tp, content)
        if self.loop.halted is not None:
            raise self.loop.halted

    def _set_up(self) -> None:
        plan = self.plan
        self.cluster = Cluster(
            self.loop,
            self.network,
            random.Random(f"cluster {self.seed}"),
            self.trace,
            on_decided=self.checker.decided,
            on_written=self.checker.appended,
            on_committed=self.checker.committed,
            session=plan.session,
            patience=plan.patience,
            policy=plan.policy,
            transaction_timeout=plan.transaction_timeout,
        )
        self.cluster.store.make(SOURCE, self.workload.partitions)
        for topic, partitions in ((SINK, plan.sink_partitions), (SIDE, plan.side_partitions)):
            if partitions is not None:
                self.cluster.store.make(topic, partitions)

    async def _write_rows(self) -> None:
        for row in self.workload.in_order():
            if not self._healed and row.at > self.loop.time():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(row.at):
                        await self._all_written.wait()
            tp = source(row.partition)
            if row.gap:
                self.cluster.store.skip_offsets(tp, row.gap)
            out = Outgoing(row.key, row.value, 1_700_000_000_000)
            (row.offset,) = self.cluster.store.log(tp).append(tp, [out])
            self.checker.written(row)
            self.cluster.wake()

    async def _faults(self) -> None:
        """Deeds at random times until the time is over."""
        due = {name: self._chance.expovariate(1 / mean) for name, mean in self.plan.deeds.items()}
        while due:
            name = min(due, key=lambda name: (due[name], name))
            if due[name] > self.plan.seconds:
                break
            await asyncio.sleep(max(0.0, due[name] - self.loop.time()))
            self.counts[name] += 1
            getattr(self, f"_do_{name}")()
            due[name] += self._chance.expovariate(1 / self.plan.deeds[name])
        await asyncio.sleep(max(0.0, self.plan.seconds - self.loop.time()))

    async def _heal(self) -> None:
        """No more faults. Those at work stay, stop or die."""
        self.trace.note(f"healed; those at work {self.plan.end}")
        self._healed = True
        self._all_written.set()
        self.plan.mood.calm()
        self.network.heal()
        for staff in self.staff:
            staff.connection.link.is_partitioned = False
            self.loop.thaw(staff.process)
        if self.plan.end == "kill":
            for staff in list(self.staff):
                self._kill(staff)
        elif self.plan.end == "stop":
            await self._stop_all()

    async def _finish(self) -> None:
        """I7: a fresh worker brings it to the end in time."""
        ends = {source(p): self.cluster.store.log(source(p)).high_watermark for p in range(self.workload.partitions)}
        self._last = self._hire(ends=ends)
        limit = _HEAL_SECONDS + self.workload.longest + (4 * (self.plan.session + 3) if self.plan.deadly else 0)
        give_up = self.loop.time() + limit
        while not self._last.run.done():
            if self.loop.time() > give_up:
                raise StuckError(f"I7: not finished {limit:,.0f} s after the faults: {self._state()}")
            await asyncio.wait({self._last.run}, timeout=1.0)
        if self._last.run.exception() is not None:
            raise StuckError(f"I7: the last worker ended with {self._last.run.exception()!r}")
        await self._stop_all()

    async def _stop_all(self) -> None:
        for staff in list(self.staff):
            self._stop(staff)
        options = self.plan.options
        limit = options.drain_timeout + 3 * options.broker_timeout + 15
        give_up = self.loop.time() + limit
        while self.staff:  # a row may kill one that is on its way out
            if self.loop.time() > give_up:
                raise StuckError(f"I7: {len(self.staff)} workers did not stop within {limit:g} s")
            await asyncio.wait({staff.run for staff in self.staff}, timeout=1.0)

    def _state(self) -> str:
        known = self.cluster.store.group_offsets.get(GROUP, {})
        return ", ".join(f"{tp} at {done.offset}" for tp, done in sorted(known.items()))

    # --- workers -----------------------------------------------------------------------------------------------

    def _hire(self, ends: dict[TopicPartition, int] | None = None) -> Staff:
        self._hired += 1
        name = f"w{self._hired}"
        process = Process(name)
        chance = random.Random(f"{name} {self.seed}")
        connection = Connection(
            name,
            self.cluster,
            self.network,
            heartbeat=self.plan.session / 3,
            on_bug=self._halt,
            on_start=self.checker.producer_started,
            on_anew=self.checker.assigned_anew,
            tells_evicted=self.plan.tells_evicted,
        )
        clock = SimClock(self.loop, chance, chance.randint(-5_000, 5_000))
        staff = Staff(process, connection, clock, SimPool(self.loop, chance, self.plan.pool_delay), self._disk())
        self._processes[name] = staff
        self.staff.append(staff)
        self.trace.note(f"{name} is hired")
        staff.run = self.loop.spawn(process, self._work(staff, ends))
        staff.run.add_done_callback(lambda run: self._ended(staff, run))
        return staff

    async def _work(self, staff: Staff, ends: dict[TopicPartition, int] | None) -> Any:
        hooks = Hooks(self.checker.started, staff.pool.busy, lambda: self._die(staff, ends))
        worker = staff.worker = Worker(
            self.workload.pipeline(hooks),
            staff.connection,
            options=self.plan.options,
            clock=staff.clock,
            stores=SimStores(staff.disk, self._writing),
            pool=cast(BlockingPool, staff.pool),
            steered=False,
        )
        if staff.is_leaving:
            worker.stop()
        if ends is not None:
            worker.finish_at(ends)
        return await worker.run()

    def _writing(self, tp: TopicPartition, changes: Sequence[Change]) -> None:
        """Something goes to a disk, unless that is broken."""
        if self.plan.disk_faults and not self._healed and self._disk_chance.random() < self.plan.disk_faults:
            damaged = self._disk_chance.random() < 0.3
            self.counts["disk faults"] += 1
            self.trace.note(f"the store of {tp} fails{' for good' if damaged else ''}")
            raise StoreError(f"the disk of {tp} fails", damaged=damaged)
        self.checker.stored(tp, changes)

    def _disk(self) -> Disk:
        """One that nobody uses: of a machine that was left, or a new one."""
        used = [id(staff.disk) for staff in self.staff]
        free = [disk for disk in self._disks if id(disk) not in used]
        if free and self._chance.random() < 0.7:
            return self._chance.choice(free)
        self._disks.append({})
        return self._disks[-1]

    def _ended(self, staff: Staff, run: asyncio.Task[Any]) -> None:
        if staff in self.staff:
            self.staff.remove(staff)
        error = None if run.cancelled() else run.exception()
        self.trace.note(f"{staff.process.name} ended: {error!r}")
        if error is None:
            return
        self.counts[f"ended by {type(error).__name__}"] += 1
        out_of_range = isinstance(error, OffsetOutOfRangeError) and "retain" in self.plan.deeds
        if not isinstance(error, _EXPECTED_ENDS) and not out_of_range and isinstance(error, Exception):
            self._halt(error)
        elif not self._healed:
            self.loop.call_later(self._chance.uniform(0, 3), self._replace)

    def _replace(self) -> None:
        if not self._healed and len(self.staff) < 4:
            self._hire()

    def _kill(self, staff: Staff) -> None:
        self.trace.note(f"{staff.process.name} is killed")
        self.counts["killed"] += 1
        staff.process.kill()
        self.staff.remove(staff)

    def _die(self, staff: Staff, ends: dict[TopicPartition, int] | None) -> None:
        """A row kills the process it is in."""
        if staff.process.is_dead:
            return
        self._kill(staff)
        if ends is None:
            self.loop.outside(1.0, self._replace)
        else:
            self.loop.outside(1.0, self._hire_last, ends)

    def _hire_last(self, ends: dict[TopicPartition, int]) -> None:
        self._last = self._hire(ends)

    def _stop(self, staff: Staff) -> None:
        self.trace.note(f"{staff.process.name} is told to stop")
        staff.is_leaving = True
        if staff.worker is not None:
            staff.worker.stop()

    # --- deeds -------------------------------------------------------------------------------------------------

    def _anybody(self) -> Staff | None:
        able = [staff for staff in self.staff if not staff.process.is_frozen and not staff.is_leaving]
        return self._chance.choice(able) if able else None

    def _do_freeze(self) -> None:
        staff = self._anybody()
        if staff is not None:
            seconds = self._chance.choice([0.3, 1.0, 2.5]) * self.plan.session * self._chance.uniform(0.5, 1.5)
            self.trace.note(f"{staff.process.name} stands still for {seconds:.2f} s")
            staff.process.freeze()
            self.loop.call_later(seconds, self.loop.thaw, staff.process)

    def _do_kill(self) -> None:
        staff = self._anybody()
        if staff is not None:
            self._kill(staff)
            self.loop.call_later(self._chance.uniform(0, 5), self._replace)

    def _do_hire(self) -> None:
        self._replace()

    def _do_dismiss(self) -> None:
        staff = self._anybody()
        if staff is not None:
            self._stop(staff)
            self.loop.call_later(self._chance.uniform(0, 5), self._replace)

    def _do_stall(self) -> None:
        seconds = self._chance.choice([0.5, 3.0, 12.0]) * self._chance.random()
        self.trace.note(f"brokers stand still for {seconds:.2f} s")
        self.network.stall(seconds)

    def _do_restart(self) -> None:
        down, loading = self._chance.uniform(0.1, 8), self._chance.choice([0.0, 0.0, 3.0])
        self.trace.note(f"brokers restart: down for {down:.2f} s, loading for {loading:g} s")
        self.network.restart(down, loading)
        if self._chance.random() < 0.3:
            self._do_forget()

    def _do_evict(self) -> None:
        group = self.cluster.groups.get(GROUP)
        if group is not None and group.members:
            name = self._chance.choice(group.members)
            self.trace.note(f"{name} is put out of the group")
            group.leave(name)

    def _do_cut(self) -> None:
        staff = self._anybody()
        if staff is not None:
            seconds = self._chance.uniform(0.5, 2 * self.plan.session)
            self.trace.note(f"{staff.process.name} is cut off for {seconds:.2f} s")
            staff.connection.link.is_partitioned = True
            self.loop.call_later(seconds, setattr, staff.connection.link, "is_partitioned", False)

    def _do_load(self) -> None:
        self.network.loading_until = self.loop.time() + self._chance.uniform(0.2, 4)

    def _do_forget(self) -> None:
        for group in self.cluster.groups.values():
            self.trace.note("every session of the group is lost")
            group.forget_all()

    def _do_retain(self) -> None:
        """Retention takes what the group has committed."""
        for tp, committed in self.cluster.store.group_offsets.get(GROUP, {}).items():
            log = self.cluster.store.log(tp)
            before = min(committed.offset, log.high_watermark)
            if before > log.start:
                self.cluster.store.truncate(tp, before)

    # --- troubles ----------------------------------------------------------------------------------------------

    def _halt(self, error: BaseException) -> None:
        if self.loop.halted is None and not self._is_over:
            self.loop.halted = error if isinstance(error, Exception) else RuntimeError(repr(error))

    def _complained(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception in a callback is a bug of somebody's; one that nobody retrieved is no news."""
        if "handle" in context and isinstance(context.get("exception"), Exception):
            self._halt(context["exception"])


class _LogHandler(logging.Handler):
    """The engine's own words, in the trace."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def emit(self, record: logging.LogRecord) -> None:
        self._trace.note(f"{record.levelname.lower()}: {record.getMessage()}")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Hash partitions in the same way in every process; the hash of text differs."""
    salts: dict[str, int] = {}

    def number(tp: TopicPartition) -> int:
        topic = tp[0]
        salt = salts.get(topic)
        if salt is None:
            salt = salts[topic] = zlib.crc32(topic.encode())
        return salt + tp[1]

    with mock.patch.object(TopicPartition, "__hash__", number):
        yield
