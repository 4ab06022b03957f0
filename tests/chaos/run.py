"""One scenario's run: topics, workers, rows, faults, the end, and the verdicts."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from rowmill import Session
from rowmill.state.clock import SystemClock
from rowmill.state.errors import RowmillError
from rowmill.state.model import TopicPartition
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.brokers.kafka import KafkaBroker
from support.kafka_server import KafkaServer, kafka_tool

from .cluster import ProxyProcess
from .feeder import Feeder
from .fleet import Fleet, Settings
from .verdicts import Evidence, Fault, Verdict, judge, recoveries, row_counts
from .watch import Place, Watch, changelog

PARTITIONS = 6
STUCK_SECONDS = 75.0
"""A run is given up when no row was completed for so long after the last fault."""
SETTLE_SECONDS = 10.0


Inject: TypeAlias = "Callable[[Run], Awaitable[None]]"
"""Injects a fault as often as asked, and returns when it is over."""


@dataclass(frozen=True)
class Scenario:
    """One fault type, injected repeatedly during one run.

    Attributes:
        name: how it is asked for.
        fault: what it is, in the words of the table.
        inject: injects, and returns when it is done; the workers run and rows flow meanwhile.
        times: how often.
        seconds: how long that takes, about: the rows are spread over it.
        workers: how many run.
        session: the group's session timeout.
        share: of the rows asked for.
        failpoints: with which workers are armed in turn.
        passages: at which passage they strike, at most; it is drawn.
        proxied: whether workers reach Kafka through the proxy.
        owns_kafka: whether it needs a Kafka that it may kill.
        small_disk: megabytes of a disk of its own for the tables, which root alone can make; None for none.
        may_give_up: whether workers may end with an error.
        deadly: rows that kill whoever runs them.
    """

    name: str
    fault: str
    inject: Inject
    times: int
    seconds: float
    workers: int = 2
    session: float = 6.0
    share: float = 1.0
    failpoints: tuple[str, ...] = ()
    passages: int = 40
    proxied: bool = False
    owns_kafka: bool = False
    small_disk: int | None = None
    may_give_up: bool = False
    deadly: int = 0


@dataclass
class Environment:
    """Where scenarios run."""

    bootstrap: str
    server: KafkaServer | None = None
    proxy: ProxyProcess | None = None
    package: str | None = None
    keep: Path | None = None
    """A folder for the workers' logs; by default they go with the run, unless a verdict is bad."""


@dataclass
class Outcome:
    """What a run showed."""

    scenario: Scenario
    seed: int
    injected: int
    kills: int
    rows: int
    seconds: float
    verdicts: dict[str, Verdict]
    recoveries: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folder: Path | None = None

    @property
    def holds(self) -> bool:
        """Whether every invariant that could be judged held."""
        return all(verdict.holds is not False for verdict in self.verdicts.values())


class Run:
    """A scenario at work; what faults act upon."""

    def __init__(self, scenario: Scenario, environment: Environment, rows: int, seed: int) -> None:
        self.scenario = scenario
        self.environment = environment
        self.chance = random.Random(f"{scenario.name}/{seed}")
        self.seed = seed
        self.rows = max(1, int(rows * scenario.share))
        self.name = f"chaos{self.chance.randrange(1 << 40):010x}"
        self.times = scenario.times
        self.faults: list[Fault] = []
        self.injected = 0
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.removed: set[Place] = set()
        if environment.keep is not None:
            environment.keep.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f"rowmill-chaos-{scenario.name}-", dir=environment.keep))
        group = Session(self.name).group
        self.outputs = [f"{self.name}.out", f"{self.name}.dlq", f"{self.name}.side", changelog(group, self.name)]
        self.watch = Watch(environment.bootstrap, group, self.name, self.outputs, PARTITIONS)
        seconds = scenario.seconds * min(1.0, rows / 20_000)
        self.feeder = Feeder(environment.bootstrap, self.name, PARTITIONS, self.rows, seconds, seed, scenario.deadly)
        self.fleet = Fleet(self._settings())

    def _settings(self) -> Settings:
        environment = self.environment
        proxied = self.scenario.proxied and environment.proxy is not None
        bootstrap = environment.proxy.bootstrap if proxied and environment.proxy else environment.bootstrap
        # Our own kills hit some rows more often than a row that kills would: none is to be condemned for them.
        deaths = 3 if self.scenario.deadly else 1_000
        return Settings(
            self.name, bootstrap, self.folder, self.scenario.session, 32, max_deaths=deaths, package=environment.package
        )

    # --- for faults --------------------------------------------------------------------------------------------

    @property
    def server(self) -> KafkaServer:
        """The Kafka that may be killed."""
        assert self.environment.server is not None
        return self.environment.server

    def fault(self, began: float, healed: float | None = None) -> None:
        """Note an injection."""
        self.injected += 1
        self.faults.append(Fault(began, began if healed is None else healed))

    async def until_all_progress(self, since: float, patience: float = 60) -> bool:
        """Wait until every partition with rows left got on after ``since``."""
        give_up = time.monotonic() + patience
        while time.monotonic() < give_up:
            totals = row_counts(self.watch)
            got = recoveries([Fault(since, since)], self.watch.progress, totals)
            if got and got[0] < patience:
                return True
            await asyncio.sleep(0.2)
        return False

    async def pause(self, least: float, most: float) -> None:
        """A random while."""
        await asyncio.sleep(self.chance.uniform(least, most))

    # --- the run -----------------------------------------------------------------------------------------------

    async def run(self) -> Outcome:
        """All of it."""
        began = time.monotonic()
        disk = self.scenario.small_disk
        with mounted(self.fleet.settings.state_dir, disk) if disk else contextlib.nullcontext():
            outcome = await self._run(began)
        if outcome.folder is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        return outcome

    async def _run(self, began: float) -> Outcome:
        feeding: asyncio.Task[None] | None = None
        try:
            await self._make_topics()
            self._arm()
            self.fleet.start(self.scenario.workers)
            await self._until_outputs_exist()
            await self.watch.start()
            feeding = asyncio.create_task(self.feeder.run())
            await self.scenario.inject(self)
            self.fleet.arm = str
            self.feeder.enough.set()
            await feeding
            finished = await self._until_complete()
            await self.fleet.stop()
            evidence = await self._evidence(finished)
            return self._outcome(evidence, time.monotonic() - began)
        finally:
            if feeding is not None:
                feeding.cancel()
            self.fleet.close()
            await self.watch.close()

    async def _make_topics(self) -> None:
        broker = KafkaBroker(self.environment.bootstrap, clock=SystemClock())
        await broker.start()
        try:
            await broker.create_topics([TopicSpec(self.name, PARTITIONS), TopicSpec(f"{self.name}.side", PARTITIONS)])
        finally:
            await broker.close()

    def _arm(self) -> None:
        self.fleet.on_strike = lambda at: self.fault(at) if at else None
        points, passages = itertools.cycle(self.scenario.failpoints), self.scenario.passages
        if self.scenario.failpoints:
            self.fleet.arm = lambda: f"{next(points)}/{self.chance.randint(1, passages)}/kill"

    async def _until_outputs_exist(self) -> None:
        await self.watch.broker.start()
        async with asyncio.timeout(60):
            while not set(self.outputs) <= set(await self.watch.broker.topics()):
                await asyncio.sleep(0.1)

    async def _until_complete(self) -> bool:
        """Wait until everything is committed; False when nothing moves any more."""
        ends = await self._ends()
        moved, before = time.monotonic(), -1
        while time.monotonic() < moved + STUCK_SECONDS:
            committed = self.watch.committed
            if all(ends[tp] == 0 or ((c := committed.get(tp)) and c.offset >= ends[tp]) for tp in ends):
                return True
            if sum(self.watch.progress[-1].complete) != before:
                moved, before = time.monotonic(), sum(self.watch.progress[-1].complete)
            await asyncio.sleep(0.1)
        return False

    async def _ends(self) -> dict[TopicPartition, int]:
        """Where the source ends; asked again while the broker comes back."""
        while True:
            try:
                return await self.watch.broker.offsets(self.watch.tps, "high_watermark")
            except RowmillError:
                await asyncio.sleep(0.5)

    async def _evidence(self, finished: bool) -> Evidence:
        unstable = await self._unstable()
        await self.watch.look()
        await self.watch.sample()
        sources = await self._ends()
        async with asyncio.timeout(60):
            while not self.watch.reads_up_to(self.watch.samples[-1].stable | sources):
                await asyncio.sleep(0.1)
        open_ = await asyncio.to_thread(open_transactions, self.environment.bootstrap, self.watch.group)
        return Evidence(
            self.watch, self.fleet.processes, self.faults, finished, open_, unstable, self.problems, self.removed,
            self.scenario.may_give_up,
        )  # fmt: skip

    async def _unstable(self) -> list[str]:
        """Output partitions whose last stable offset is not the high watermark soon after the workers stopped."""
        outputs = await self.watch.output_partitions()
        give_up = time.monotonic() + SETTLE_SECONDS
        while True:
            stable = await self.watch.broker.offsets(outputs, "end")
            written = await self.watch.broker.offsets(outputs, "high_watermark")
            behind = [f"{tp}: stable {stable[tp]} of {written[tp]}" for tp in outputs if stable[tp] < written[tp]]
            if not behind or time.monotonic() > give_up:
                return behind
            await asyncio.sleep(0.2)

    def _outcome(self, evidence: Evidence, seconds: float) -> Outcome:
        verdicts = judge(evidence)
        times = recoveries(self.faults, self.watch.progress, row_counts(self.watch))
        kills = sum(p.popen.returncode == -9 for p in self.fleet.processes)
        outcome = Outcome(
            self.scenario, self.seed, self.injected, kills, len(self.watch.rows), seconds, verdicts, times, self.notes
        )
        if not outcome.holds or self.environment.keep is not None:
            outcome.folder = self.folder
        return outcome


@contextlib.contextmanager
def mounted(folder: Path, megabytes: int) -> Iterator[None]:
    """A folder that is a small disk of its own; for root on Linux."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "chaos", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount() -> bool:
    """Whether :func:`mounted` works here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with mounted(Path(folder) / "disk", 1):
                return True
        except (subprocess.CalledProcessError, OSError):
            return False


def open_transactions(bootstrap: str, group: str) -> list[str]:
    """The group's transactions that are neither complete nor empty, as Kafka's own tool tells them."""
    listed = kafka_tool("transactions", "--bootstrap-server", bootstrap, "list")
    mine = [line.split() for line in listed.splitlines() if line.startswith(f"{group}/")]
    return [" ".join(words) for words in mine if words[-1] in {"Ongoing", "PrepareCommit", "PrepareAbort"}]


async def forget(environment: Environment, name: str) -> None:
    """Remove a run's topics and group, as far as that works."""
    broker = KafkaBroker(environment.bootstrap, clock=SystemClock())
    with contextlib.suppress(RowmillError):
        await broker.start()
        mine = [topic for topic in await broker.topics() if topic == name or name in topic]
        await broker.delete_topics(mine)
        await broker.delete_groups([Session(name).group])
    await broker.close()
