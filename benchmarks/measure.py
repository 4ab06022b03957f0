"""One run of one peer, in processes of its own, watched from outside.

Counted is from the first call of the handler, which the process tells, to the moment when the group has committed the
last row and the sink holds as many results: the same for everybody, and seen by the broker's own answers. Processor
time is the process's own clock over the same span, so that nobody's start counts. Whatever fails, or fails its check,
has no figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .checks import Expected, judge
from .child import BEGUN, Settings
from .cluster import ROOT, Cluster
from .peers.known import Peer
from .rows import Row, key_of, result_of, row_of

START_SECONDS = 60.0
STALL_SECONDS = 60.0
"""Without any new commit for so long, a run has failed."""
STOP_SECONDS = 30.0
_LOG_CHARACTERS = 1_500


@dataclass(frozen=True, slots=True)
class Measured:
    """One run's figures.

    Attributes:
        peer: whose.
        rows: how many.
        seconds: from the first row in the handler to the last result committed.
        cpu_seconds: the processes' own processor time in that span.
        broker_seconds: the broker's in that span; None: not ours, so unknown.
        peak_mib: most memory that one process ever had (VmHWM).
        load: the machine's load average at the end.
        repeated: results that came more than once.
        complaint: why these figures do not count; empty if they do.
        more: what only this work measures.
    """

    peer: str
    rows: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    broker_seconds: float | None = None
    peak_mib: float = 0.0
    load: float = 0.0
    repeated: int = 0
    complaint: str = ""
    more: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Job:
    """What everybody does in a work.

    Attributes:
        rows: how many.
        keys: how many different ones.
        kind: see ``Settings.job``.
        row_bytes: about the size of a row.
        concurrency: rows at once.
        server: for the job ``ask``.
        workers: processes.
        waits: whether rows are published only once all workers have their partitions.
    """

    rows: int
    keys: int = 10_000
    kind: str = "plain"
    row_bytes: int = 80
    concurrency: int = 100
    server: str = ""
    workers: int = 1
    waits: bool = False

    def row(self, number: int) -> Row:
        return row_of(number, self.row_bytes)

    def key(self, number: int) -> bytes:
        return key_of(number, self.keys)

    def result(self, number: int) -> Row:
        """Keys come again after as many rows as there are keys, so that counts follow from numbers."""
        if self.kind == "count":
            return {**self.row(number), "number": number // self.keys + 1}
        if self.kind == "ask":
            return {**self.row(number), "answer": 2 * number + 1}
        return result_of(self.row(number))


class FailedRunError(Exception):
    """A run that has no figures, and why."""


def cpu_clock(pid: int) -> float:
    """Processor seconds of another process, all its threads (Linux: the clock that clock_getcpuclockid(3) gives)."""
    return time.clock_gettime((~pid << 3) | 2)


def dying_with_us(command: Sequence[str]) -> list[str]:
    """The command, run so that the kernel ends it when the harness is killed."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.kafka_server import DIE_WITH_PARENT

    return [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]


class Process:
    """One measured process.

    Args:
        command: to start it.
        said: what it is told.
    """

    def __init__(self, command: Sequence[str], said: Settings) -> None:
        self.folder = Path(said.folder)
        self._log = self.folder / "log.txt"
        environment = {**os.environ, **said.to_environment(), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                dying_with_us(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> None:
        """Raises FailedRunError when it has ended."""
        if self._process.poll() is not None:
            raise FailedRunError(f"ended by itself with {self._process.returncode}: {self.tail()}")

    def begun(self) -> dict[str, float] | None:
        """When it saw its first row, and the processor time it had used by then."""
        with contextlib.suppress(FileNotFoundError):
            told: dict[str, float] = json.loads((self.folder / BEGUN).read_bytes())
            return told
        return None

    def cpu_seconds(self) -> float:
        """Processor time since it began with rows."""
        told = self.begun()
        return 0.0 if told is None else cpu_clock(self.pid) - told["cpu"]

    def peak_mib(self) -> float:
        """Most memory it has had so far."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
        return 0.0

    async def stop(self) -> None:
        """Ask it to end, and make it end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def tail(self) -> str:
        """The end of what it printed."""
        return self._log.read_text(errors="replace")[-_LOG_CHARACTERS:].strip()


@contextlib.asynccontextmanager
async def running(peer: Peer, said: Settings, count: int = 1) -> AsyncIterator[list[Process]]:
    """So many processes of a peer, each with a folder of its own, stopped and swept away at the end."""
    base = Path(tempfile.mkdtemp(prefix="rowmill-bench-"))
    processes: list[Process] = []
    try:
        for number in range(count):
            folder = base / str(number)
            folder.mkdir()
            own = replace(said, folder=str(folder))
            processes.append(Process(peer.command(own), own))
        yield processes
    finally:
        for process in processes:
            await process.stop()
        shutil.rmtree(base, ignore_errors=True)


async def stream(cluster: Cluster, peer: Peer, job: Job) -> Measured:
    """Let a peer work through a job's rows, and check what came out; a failure is told in the figures."""
    name = f"bench-{uuid.uuid4().hex[:10]}"
    try:
        source = await cluster.create(f"{name}.in") if job.waits else await cluster.filled(job)
        sink = await cluster.create(f"{name}.out")
        said = settings_for(cluster, peer, job, name, source, sink)
        async with running(peer, said, job.workers) as processes:
            if job.waits:
                await joined(cluster, peer.group(said), processes)
                await cluster.fill_with(source, job)
            measured = await finished(cluster, peer, said, processes, job.rows)
        expected = Expected(job.rows, job.result, job.key, peer.is_exact)
        verdict = await judge(expected, cluster.read(sink))
        return replace(measured, repeated=verdict.repeated, complaint=verdict.complaint)
    except FailedRunError as error:
        return Measured(peer.name, job.rows, complaint=str(error))
    finally:
        await cluster.delete(name)


def settings_for(cluster: Cluster, peer: Peer, job: Job, name: str, source: str, sink: str) -> Settings:
    """What a peer is told; its folder is filled in where it is started."""
    return Settings(
        bootstrap=cluster.bootstrap,
        source=source,
        sink=sink,
        name=name,
        folder="",
        exactly_once=peer.is_exact,
        job=job.kind,
        concurrency=job.concurrency,
        row_bytes=job.row_bytes,
        server=job.server,
    )


async def joined(cluster: Cluster, group: str, processes: Sequence[Process]) -> None:
    """Wait until every process has its partitions."""
    await _until(lambda: _has_members(cluster, group, len(processes)), processes, START_SECONDS, "joined its group")


async def _has_members(cluster: Cluster, group: str, count: int) -> bool:
    return await cluster.members(group) == count


async def _until(done: Callable[[], Any], processes: Sequence[Process], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not await done():
        for process in processes:
            process.check()
        if time.monotonic() > deadline:
            raise FailedRunError(f"has not {what} within {seconds:.0f} s: {processes[0].tail()}")
        await asyncio.sleep(0.05)


async def finished(
    cluster: Cluster,
    peer: Peer,
    said: Settings,
    processes: Sequence[Process],
    rows: int,
    results: int | None = None,
) -> Measured:
    """Watch until so many rows are committed and as many results are visible; gives the figures."""

    async def has_begun() -> bool:
        return any(process.begun() for process in processes)

    await _until(has_begun, processes, START_SECONDS, "seen a row")
    broker_before = cpu_clock(cluster.pid) if cluster.pid else 0.0
    began = min(told["at"] for told in (process.begun() for process in processes) if told)
    wanted = (rows, rows if results is None else results)
    ended = await _await_end(cluster, peer.group(said), said, processes, wanted, began)
    return Measured(
        peer=peer.name,
        rows=rows,
        seconds=ended - began,
        cpu_seconds=sum(process.cpu_seconds() for process in processes),
        broker_seconds=cpu_clock(cluster.pid) - broker_before if cluster.pid else None,
        peak_mib=max(process.peak_mib() for process in processes),
        load=os.getloadavg()[0],
    )


async def _await_end(
    cluster: Cluster, group: str, said: Settings, processes: Sequence[Process], wanted: tuple[int, int], began: float
) -> float:
    """The moment when the last result was seen committed.

    It looks seldom while much is left and often near the end: every look costs the broker, and us, something that
    the measured process cannot use.
    """
    rows, results = wanted
    seen, changed = -1, time.monotonic()
    while True:
        committed = await cluster.committed(group, said.source)
        now = time.monotonic()
        if committed >= rows and sum((await cluster.ends(said.sink)).values()) >= results:
            return time.monotonic()
        if committed != seen:
            seen, changed = committed, now
        for process in processes:
            process.check()
        if now - changed > STALL_SECONDS:
            raise FailedRunError(f"stands still at {seen:,} of {rows:,} rows: {processes[0].tail()}")
        left = (now - began) * (rows - seen) / seen if seen > 0 else 1.0
        await asyncio.sleep(min(0.2, max(0.01, left / 8)))


async def tell_json(command: Sequence[str], environment: Mapping[str, str], seconds: float = 900) -> dict[str, Any]:
    """Run a process to its end; the last line that it prints is its answer.

    Raises:
        FailedRunError: it failed.
    """
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": variables, "cwd": ROOT}
    run = partial(subprocess.run, dying_with_us(command), timeout=seconds, check=False, **options)
    done = await asyncio.to_thread(run)
    if done.returncode:
        raise FailedRunError(f"ended with {done.returncode}: {done.stderr[-_LOG_CHARACTERS:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
