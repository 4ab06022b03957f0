"""The faults: each acts on a run until it was injected as often as asked."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete
from aiokafka.structs import TopicPartition as KafkaTopicPartition
from rowmill.state.model import Committed
from support.kafka_server import kafka_tool

from .fleet import Process
from .run import Inject, Run


async def strikes(run: Run) -> None:
    """Workers are armed with a failpoint and kill themselves; replacements are armed again."""
    give_up = time.monotonic() + 20 * run.times
    while run.injected < run.times and time.monotonic() < give_up:
        await asyncio.sleep(0.05)


async def deadly_rows(run: Run) -> None:
    """Some rows kill whoever runs them, until they are dead letters; the others must not suffer for it."""
    letters = f"{run.name}.dlq"
    give_up = time.monotonic() + 60 * run.scenario.deadly
    while time.monotonic() < give_up:
        buried = sum(
            b'"deadly"' in (record.value or b"")
            for tp, records in run.watch.records.items()
            if tp.topic == letters
            for record in records
        )
        if buried >= run.scenario.deadly:
            return
        await asyncio.sleep(0.3)
    run.problems.append("deadly rows are still at large")


async def random_kills(run: Run) -> None:
    """SIGKILL to one, two or all workers at random times; their replacements start at once."""
    await run.until_all_progress(time.monotonic())
    while run.injected < run.times:
        await run.pause(0.5, 4.5)
        alive = run.fleet.alive
        for process in run.chance.sample(alive, run.chance.randint(1, len(alive))):
            run.fault(run.fleet.kill(process))


async def zombies(run: Run) -> None:
    """SIGSTOP until others took over, then SIGCONT; every second one stops itself in the middle of a transaction."""
    await run.until_all_progress(time.monotonic())
    for turn in range(run.times):
        await run.pause(0.5, 1.5)
        zombie = await (_is_stopped(run) if turn % 2 else _stops_itself(run))
        began = time.monotonic()
        if not await run.until_all_progress(began + run.scenario.session - 1):
            run.problems.append(f"nobody took over from worker {zombie.number}")
        run.notes.append(f"worker {zombie.number} stood still for {time.monotonic() - began:.1f} s")
        run.fault(began, run.fleet.resume(zombie))
        await run.until_all_progress(run.faults[-1].healed)
        if len(run.fleet.alive) > run.scenario.workers:
            run.fleet.ask_to_stop(run.chance.choice(run.fleet.alive))


async def _is_stopped(run: Run) -> Process:
    process = run.chance.choice(run.fleet.alive)
    run.fleet.suspend(process)
    return process


async def _stops_itself(run: Run) -> Process:
    point = run.chance.choice(("after-sends", "after-offsets", "before-end", "after-end"))
    process = run.fleet.spawn(f"{point}/{run.chance.randint(1, 30)}/stop")
    give_up = time.monotonic() + 20
    while not process.stands_still and time.monotonic() < give_up:
        await asyncio.sleep(0.01)
    if not process.stands_still:
        run.fleet.suspend(process)
    return process


async def comings_and_goings(run: Run) -> None:
    """Every few seconds a worker is added, killed, or asked to stop: one to four of them."""
    await run.until_all_progress(time.monotonic())
    while run.injected < run.times:
        await run.pause(2, 4)
        alive = run.fleet.alive
        now = time.monotonic()
        if len(alive) < 4 and (len(alive) < 2 or run.chance.random() < 0.5):
            run.fleet.wanted = len(alive) + 1
            run.fleet.spawn()
        else:
            run.fleet.wanted = len(alive) - 1
            victim = run.chance.choice(alive)
            if run.chance.random() < 0.5:
                run.fleet.kill(victim)
            else:
                run.fleet.ask_to_stop(victim)
        run.fault(now)


async def broker_kills(run: Run) -> None:
    """The broker is killed and started again."""
    await _bounces(run, crash=True)


async def broker_stops(run: Run) -> None:
    """The broker is stopped in order and started again."""
    await _bounces(run, crash=False)


async def _bounces(run: Run, *, crash: bool) -> None:
    await run.until_all_progress(time.monotonic())
    for _ in range(run.times):
        await run.pause(1, 3)
        began = time.monotonic()
        await asyncio.to_thread(run.server.restart, crash=crash)
        run.fault(began, time.monotonic())
        await run.until_all_progress(time.monotonic())


def broker_freezes(seconds: float) -> Inject:
    """A fault: the broker stands still for so long."""

    async def inject(run: Run) -> None:
        await run.until_all_progress(time.monotonic())
        for _ in range(run.times):
            await run.pause(1, 3)
            began = time.monotonic()
            run.server.suspend()
            await asyncio.sleep(seconds)
            run.server.resume()
            run.fault(began, time.monotonic())
            await run.until_all_progress(time.monotonic())

    return inject


def swallowed_replies(api: str, then: str) -> Inject:
    """A fault: the next one to three replies to a request never arrive; their connections are closed, or go silent."""

    async def inject(run: Run) -> None:
        proxy = run.environment.proxy
        assert proxy is not None
        await run.until_all_progress(time.monotonic())
        while run.injected < run.times:
            await run.pause(0.5, 2)
            if api == "OffsetFetch":  # asked only by who opens a partition
                run.fleet.ask_to_stop(run.chance.choice(run.fleet.alive))
            began = time.monotonic()
            count = await proxy.swallow(api, run.chance.randint(1, 3) if then == "close" else 1, then)
            if not count:
                run.problems.append(f"no reply to {api} came by")
                return
            run.fault(began, time.monotonic())
            run.injected += count - 1
            await run.until_all_progress(time.monotonic())

    return inject


async def sink_refuses(run: Run) -> None:
    """The sink takes no batch of more than 300 bytes for a while: workers must give up, and not commit past it."""
    await run.until_all_progress(time.monotonic())
    for _ in range(run.times):
        await run.pause(1, 2)
        began = time.monotonic()
        run.fleet.wanted = 0  # what starts now would take the small limit for the topic's own
        await asyncio.to_thread(_limit_sink, run, 300)
        while run.fleet.alive and time.monotonic() < began + 30:
            await asyncio.sleep(0.1)
        if run.fleet.alive:
            run.problems.append(f"{len(run.fleet.alive)} workers went on though the sink refused their records")
        await asyncio.to_thread(_limit_sink, run, 1_048_588)
        run.fleet.wanted = run.scenario.workers
        run.fault(began, time.monotonic())
        await run.until_all_progress(time.monotonic())


def _limit_sink(run: Run, size: int) -> None:
    arguments = ["--bootstrap-server", run.environment.bootstrap, "--alter", "--topic", f"{run.name}.out"]
    kafka_tool("configs", *arguments, "--add-config", f"max.message.bytes={size}")


async def retention(run: Run) -> None:
    """With the workers stopped, the log of two partitions loses rows that were not processed yet.

    The workers must then end with an error that names the place. The operator resets those two partitions to the
    earliest row, and all goes on.
    """
    await run.until_all_progress(time.monotonic())
    for _ in range(run.times):
        await run.pause(1, 2)
        await _stop_all(run)
        await asyncio.sleep(3)  # rows pile up
        cut = await _cut(run)
        began = time.monotonic()
        ends = await _ends_by_itself(run)
        run.notes.append(f"after {ends[0]:.1f} s: {ends[1]}")
        parts = ",".join(map(str, sorted(cut)))
        arguments = ["--bootstrap-server", run.environment.bootstrap, "--group", run.watch.group]
        arguments += ["--reset-offsets", "--to-earliest", "--topic", f"{run.name}:{parts}", "--execute"]
        await asyncio.to_thread(kafka_tool, "consumer-groups", *arguments)
        run.fleet.start(run.scenario.workers)
        run.fault(began, time.monotonic())
        await run.until_all_progress(time.monotonic())


async def _stop_all(run: Run) -> None:
    await run.fleet.stop()


async def _cut(run: Run) -> set[int]:
    """Delete 50 rows behind the commits of two partitions, which only then can be seen as removed."""
    committed = await run.watch.look()
    admin = AIOKafkaAdminClient(bootstrap_servers=run.environment.bootstrap)
    await admin.start()
    cut: dict[int, int] = {}
    for tp in run.chance.sample(run.watch.tps, 2):
        checkpoint = committed[tp] or Committed(0)
        assert not checkpoint.metadata, "an orderly stop leaves no row behind"
        cut[tp.partition] = checkpoint.offset + 50
        while (tp.partition, cut[tp.partition]) not in run.watch.rows:  # first read, then removed
            await asyncio.sleep(0.1)
        run.removed |= {(tp.partition, offset) for offset in range(checkpoint.offset, cut[tp.partition])}
    before = {KafkaTopicPartition(run.name, p): RecordsToDelete(before_offset=offset) for p, offset in cut.items()}
    await admin.delete_records(before)
    await admin.close()
    return set(cut)


async def _ends_by_itself(run: Run) -> tuple[float, str]:
    """Start one worker; how long it took to give up, and what it said."""
    began = time.monotonic()
    process = run.fleet.spawn("")
    while process.popen.poll() is None and time.monotonic() < began + 30:
        await asyncio.sleep(0.05)
    process.ended = time.monotonic()
    words = process.last_words()
    told = "OffsetOutOfRangeError" in words and process.popen.returncode == 1
    if not told:
        run.problems.append(f"exit code {process.popen.returncode} and {words!r} instead of OffsetOutOfRangeError")
    return process.ended - began, words[:200]


async def damaged_stores(run: Run) -> None:
    """All workers end, in order or not; some files of their tables are cut, flipped or gone; they start again."""
    await run.until_all_progress(time.monotonic())
    for turn in range(run.times):
        await run.pause(1, 3)
        began = time.monotonic()
        if turn % 2:
            await run.fleet.stop()
        else:
            run.fleet.wanted = 0
            for process in run.fleet.alive:
                run.fleet.kill(process)
            await run.fleet.stop()
        run.notes.append(", ".join(_damage(run, path) for path in _victims(run)))
        run.fleet.start(run.scenario.workers)
        run.fault(began, time.monotonic())
        await run.until_all_progress(time.monotonic())
    run.notes.append(f"{_told_of_damage(run)} damaged stores told by the workers")


def _victims(run: Run) -> list[Path]:
    """One file each of half of the stores: of the kinds that hold data, where there are such."""
    stores = sorted(mark.parent for mark in run.fleet.settings.state_dir.rglob("ROWMILL"))
    chosen = run.chance.sample(stores, len(stores) // 2)
    found = []
    for store in chosen:
        files = sorted(file for file in store.iterdir() if file.is_file() and file.stat().st_size > 64)
        data = [file for file in files if file.suffix in {".sst", ".log"} or file.name.startswith("MANIFEST")]
        if data:
            found.append(run.chance.choice(data))
    return found


def _damage(run: Run, file: Path) -> str:
    """Cut a file's end off, flip some of its bytes, or remove it; says what."""
    raw = bytearray(file.read_bytes())
    how = run.chance.choice(("cut", "flipped", "flipped", "removed"))
    if how == "removed":
        file.unlink()
    elif how == "cut":
        file.write_bytes(raw[: run.chance.randrange(len(raw))])
    else:
        for _ in range(3):
            raw[run.chance.randrange(len(raw))] ^= 0xFF
        file.write_bytes(raw)
    return f"{file.suffix or file.name.split('-')[0]} {how}"


def _told_of_damage(run: Run) -> int:
    return sum(process.errors.read_text().count("tables are damaged") for process in run.fleet.processes)


async def full_disk(run: Run) -> None:
    """A file fills the disk that the tables are on, for some seconds."""
    await run.until_all_progress(time.monotonic())
    filler = run.fleet.settings.state_dir / "filler"
    for _ in range(run.times):
        await run.pause(1, 3)
        began = time.monotonic()
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"x" * 4_096):
                pass
        await asyncio.sleep(8)
        filler.unlink()
        run.fault(began, time.monotonic())
        await run.until_all_progress(time.monotonic())
    told = sum("No space left" in process.errors.read_text() for process in run.fleet.processes)
    run.notes.append(f"{told} of {len(run.fleet.processes)} workers told of it")
    if not told:
        run.problems.append("the disk was never full")
