"""Sessions listed, loaded and removed, on both brokers: every trace of one goes, and not a byte of another's."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import platform
import pty
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import pytest
from rowmill import Pipeline, publish
from rowmill.handlers.context import RowContext
from rowmill.state.clock import SystemClock
from rowmill.state.context import ExecutionContext, session_uuid
from rowmill.state.model import TopicPartition
from rowmill.streams.broker_checkpoints import CHECKPOINTS_TOPIC, BrokerCheckpointStorage
from rowmill.streams.brokers.base import Broker, MemberInfo, TransactionalProducer
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.checkpoint_stores import FileCheckpointStorage
from rowmill.streams.collect import read_topic
from rowmill.streams.contexts import session_context
from rowmill.streams.control_topic import ControlTopic
from rowmill.streams.errors import CheckpointError, GroupBusyError
from rowmill.streams.inputs import make_input
from rowmill.streams.known_sessions import find_sessions
from rowmill.streams.options import WorkerOptions
from rowmill.streams.runs import BoundedRun
from rowmill.streams.session import Session
from rowmill.streams.session_records import SessionRecord
from rowmill.streams.session_traces import Trace, Traces, is_being_removed, list_traces, remove_traces
from rowmill.streams.side_replay import EarlyEnd
from rowmill.streams.state_manager import StateManager
from rowmill.streams.worker import Worker

T = TypeVar("T")

CLOCK = SystemClock()
ROWS = [{"n": n} for n in range(40)]
ROWMILL = """
import sys
from rowmill.streams.cli import cmd_checkpoints, main
if cmd_checkpoints not in main.COMMANDS:
    main.COMMANDS += (cmd_checkpoints,)
sys.exit(main.main())
"""

pytestmark = pytest.mark.timeout(240)


# --- sessions ----------------------------------------------------------------------------------------------------


def make_pipeline(name: str, artifacts: Path | None = None) -> Pipeline:
    """A pipeline that leaves something everywhere: results, emitted rows, dead letters, tables, costs, artifacts."""
    pipeline = Pipeline(
        name, source=f"{name}.in", sink=f"{name}.out", artifacts=None if artifacts is None else str(artifacts)
    )
    pipeline.table("seen")

    @pipeline.stage
    def work(row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
        if row["n"] % 20 == 7:
            raise ValueError("sevens")
        ctx.table("seen").put(str(row["n"] % 5), row["n"])
        ctx.emit(f"{name}.side", {"n": row["n"]})
        ctx.add_cost(Decimal("0.001"), tokens=2)
        return {**row, "long": "x" * 70_000} if artifacts and row["n"] == 3 else row

    return pipeline


def options_at(folder: Path) -> WorkerOptions:
    """Few partitions, and tables in the test's own folder on either broker."""
    return WorkerOptions(state_dir=str(folder / "state"), partitions=2, commit_interval=0.02)


async def run_session(url: str, pipeline: Pipeline, session: str, folder: Path, *, steered: bool = True) -> Session:
    """A bounded run of its own, to its end."""
    made = Session(pipeline.name, session, owns_source=True)
    broker = open_broker(url, environment={})
    attempt = BoundedRun(
        pipeline, broker, made, make_input(ROWS, None), options=options_at(folder), steered=steered, clock=CLOCK
    )
    (await attempt.execute()).sorter.close()
    return made


async def run_live(url: str, pipeline: Pipeline, folder: Path) -> Session:
    """The live session, up to the present end of its source."""
    attempt = BoundedRun(
        pipeline, open_broker(url, environment={}), Session(pipeline.name), None, options=options_at(folder)
    )
    (await attempt.execute()).sorter.close()
    return Session(pipeline.name)


async def tell_artifacts(url: str, session: Session, folder: Path) -> None:
    """Have the session's record say where its artifacts are, as a worker that registers does."""
    async with opened(url) as broker:

        def change(record: SessionRecord | None) -> SessionRecord:
            assert record is not None
            return replace(record, artifacts=f"{platform.node()}:{folder.resolve()}")

        await ControlTopic(broker, clock=CLOCK).update(session.group, change)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Broker]:
    """A started broker."""
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def working(url: str, pipeline: Pipeline, session: Session, folder: Path) -> AsyncIterator[Worker]:
    """A worker that has its partitions, while the block lasts."""
    broker = open_broker(url, environment={})
    await broker.start()
    worker = Worker(pipeline, broker, session=session, options=options_at(folder), clock=CLOCK)
    task = asyncio.create_task(worker.run())
    try:
        async with opened(url) as other:
            await until(lambda: has_partitions(other, session.group), task)
        yield worker
    finally:
        worker.stop()
        await asyncio.wait({task}, timeout=30)
        await broker.close()
    if not task.cancelled():
        task.result()


async def has_worked(worker: Worker) -> bool:
    """Whether it has committed all rows."""
    return worker.stats.rows == len(ROWS) and worker.snapshot().in_flight == 0


async def has_partitions(broker: Broker, group: str) -> bool:
    """Whether somebody serves the group."""
    return any(member.partitions for member in await broker.members(group))


async def until(check: Callable[[], Awaitable[bool]], task: asyncio.Task[Any] | None = None) -> None:
    """Wait for something, 30 seconds at most."""
    async with asyncio.timeout(30):
        while not await check():
            if task is not None and task.done():
                task.result()
            await asyncio.sleep(0.05)


# --- everything that there is ------------------------------------------------------------------------------------


async def everything(url: str, name: str, folder: Path) -> dict[str, Any]:
    """Every topic, record, offset, control record and file of a test's sessions, to be compared."""
    found: dict[str, Any] = {}
    async with opened(url) as broker:
        topics = {t: i.partitions for t, i in (await broker.topics()).items() if name in t}
        for topic, count in topics.items():
            records = [r async for batch in read_topic(broker, topic) for r in batch]
            content = sorted((r.partition, r.offset, r.timestamp, r.key, r.value, tuple(r.headers)) for r in records)
            found[f"topic {topic}"] = (count, hashlib.sha256(repr(content).encode()).hexdigest())
        tps = [TopicPartition(t, p) for t, count in topics.items() for p in range(count)]
        for group in [group for group in await broker.groups() if name in group]:
            committed = await broker.committed(group, tps)
            found[f"group {group}"] = {tp: mark for tp, mark in committed.items() if mark is not None}
        records_of = await ControlTopic(broker, clock=CLOCK).sessions()
        found |= {f"record {group}": record for group, record in records_of.items() if name in group}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "broker" not in path.relative_to(folder).parts:
            found[f"file {path.relative_to(folder)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def without(found: dict[str, Any], session: Session) -> dict[str, Any]:
    """All but what is one session's, by its suffix and its group, which are nobody else's in these tests."""
    own = (f".{session.id}", f".{session.id}.")
    return {
        thing: value
        for thing, value in found.items()
        if not (thing.endswith(own[0]) or own[1] in thing or f"{session.group}/" in thing)
    }


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is not as it was."""
    return {
        thing: (before.get(thing), after.get(thing))
        for thing in before.keys() | after.keys()
        if before.get(thing) != after.get(thing)
    }


async def traces_of(broker: Broker, session: Session, folder: Path) -> Traces:
    """What a session left, which is known."""
    traces = await list_traces(broker, session.group, options=options_at(folder), clock=CLOCK)
    assert traces is not None
    return traces


async def remove(broker: Broker, session: Session, folder: Path, **more: Any) -> None:
    """Look, and remove."""
    await remove_traces(broker, await traces_of(broker, session, folder), options=options_at(folder), **more)


# --- removing one of three -----------------------------------------------------------------------------------------


def test_one_session_goes_and_nothing_else_changes(broker_url: str, name: str, tmp_path: Path) -> None:
    """Of two sessions and a live one, one is removed: topics, offsets, records and files of the others stay as is."""

    async def check() -> None:
        pipeline = make_pipeline(name, tmp_path / "artifacts")
        publish_rows(broker_url, f"{name}.in", ROWS)
        await run_live(broker_url, pipeline, tmp_path)
        monday = await run_session(broker_url, pipeline, "monday", tmp_path)
        await run_session(broker_url, pipeline, "monday-2", tmp_path)
        await tell_artifacts(broker_url, monday, tmp_path / "artifacts")
        before = await everything(broker_url, name, tmp_path)
        async with opened(broker_url) as broker:
            listed = await traces_of(broker, monday, tmp_path)
            assert difference(before, await everything(broker_url, name, tmp_path)) == {}  # looking changes nothing
            gone: list[Trace] = []
            await remove_traces(broker, listed, options=options_at(tmp_path), told=gone.append)
            assert tuple(gone) == listed.found
            assert listed.found[-1].kind == "record"
            assert await list_traces(broker, monday.group, clock=CLOCK) is None
        after = await everything(broker_url, name, tmp_path)
        expected = without(before, monday)
        assert difference(expected, after) == {}
        lost = before.keys() - expected.keys()
        assert {f"topic {name}.{part}.monday" for part in ("in", "out", "side", "dlq")} <= lost
        assert {f"group {monday.group}", f"group {monday.group}.input", f"record {monday.group}"} <= lost
        assert f"topic {monday.group}.{name}.in.monday.changelog" in lost
        assert {thing.split("/")[0] for thing in lost if thing.startswith("file ")} == {"file state", "file artifacts"}

    asyncio.run(check())


def test_the_live_session_goes_without_what_is_shared(broker_url: str, name: str, tmp_path: Path) -> None:
    """Of the live session offsets, changelog and tables go; rows, results, emitted rows and dead letters stay."""

    async def check() -> None:
        pipeline = make_pipeline(name)
        publish_rows(broker_url, f"{name}.in", ROWS)
        live = await run_live(broker_url, pipeline, tmp_path)
        await run_session(broker_url, pipeline, "input", tmp_path)  # whose group is the live one's publisher group
        before = await everything(broker_url, name, tmp_path)
        async with opened(broker_url) as broker:
            listed = await traces_of(broker, live, tmp_path)
            await remove_traces(broker, listed, options=options_at(tmp_path))
        after = await everything(broker_url, name, tmp_path)
        lost = {thing for thing in difference(before, after) if not thing.startswith("file ")}
        assert lost == {
            f"group rowmill.{name}",
            f"topic rowmill.{name}.{name}.in.changelog",
            f"record rowmill.{name}",
        }
        assert not [thing for thing in after if f"rowmill.{name}/" in thing]
        assert {kept.name for kept in listed.kept} == {f"{name}.in", f"{name}.out", f"{name}.dlq"}
        await run_live(broker_url, pipeline, tmp_path)  # it begins anew, from the earliest row
        async with opened(broker_url) as broker:
            context = await session_context(broker, live, [f"{name}.in"], 30, CLOCK)
            assert context is not None
            assert context.completed_rows == len(ROWS)

    asyncio.run(check())


def test_a_live_worker_goes_on_beside_a_removal(broker_url: str, name: str, tmp_path: Path) -> None:
    """While a live worker runs, another session is removed: the worker does its rows, before and after, once each."""

    async def check() -> None:
        pipeline = make_pipeline(name)
        publish_rows(broker_url, f"{name}.in", ROWS[:20])
        monday = await run_session(broker_url, pipeline, "monday", tmp_path)
        live = Session(name)
        async with working(broker_url, pipeline, live, tmp_path), opened(broker_url) as broker:
            await remove(broker, monday, tmp_path)
            publish_rows(broker_url, f"{name}.in", ROWS[20:])

            async def is_done() -> bool:
                context = await session_context(broker, live, [f"{name}.in"], 30, CLOCK)
                return context is not None and context.completed_rows == len(ROWS)

            await until(is_done)
            results = [record async for batch in read_topic(broker, f"{name}.out") for record in batch]
            assert len(results) == len(ROWS) - 2
            assert await list_traces(broker, monday.group, clock=CLOCK) is None

    asyncio.run(check())


def test_a_session_with_workers_is_refused(broker_url: str, name: str, tmp_path: Path) -> None:
    """A session that a worker serves loses nothing, unless its workers are cancelled first."""

    async def check() -> None:
        pipeline = make_pipeline(name)
        publish_rows(broker_url, f"{name}.in", ROWS)
        busy = Session(name, "busy")
        async with working(broker_url, pipeline, busy, tmp_path) as worker, opened(broker_url) as broker:
            await until(lambda: has_worked(worker))  # what it makes is there
            listed = await traces_of(broker, busy, tmp_path)
            assert listed.workers == 1
            with pytest.raises(GroupBusyError, match=f"{name}.busy"):
                await remove_traces(broker, listed, options=options_at(tmp_path))
            assert (await traces_of(broker, busy, tmp_path)).found == listed.found
            # One that joined behind the look is met by the broker itself.
            with pytest.raises(GroupBusyError):
                await remove_traces(SilentBroker(broker), listed, options=options_at(tmp_path))
            assert f"{name}.out.busy" in await broker.topics()
            record = await ControlTopic(broker, clock=CLOCK).session(busy.group)
            assert record is not None
            assert record.wanted == "run"
            await remove_traces(broker, listed, options=options_at(tmp_path), stop_workers=30)
            assert worker.state in {"stopping", "stopped"}
            assert await list_traces(broker, busy.group, clock=CLOCK) is None
            assert not [topic for topic in await broker.topics() if topic.endswith(".busy") and name in topic]

    asyncio.run(check())


# --- killed midway -------------------------------------------------------------------------------------------------


class KilledError(Exception):
    """The process ends here."""


class DyingBroker(EarlyEnd):
    """A broker under a process that is killed in the middle of a step that changes something.

    Args:
        broker: a started one.
        at: which of these steps, from 0; None: at none.
        behind: a call, behind the first one of which it is killed.
    """

    def __init__(self, broker: Broker, at: int | None = None, behind: str = "") -> None:
        super().__init__(broker, {})
        self._at = at
        self._behind = behind
        self.steps = 0

    async def members(self, group: str) -> list[MemberInfo]:
        return await self._broker.members(group)

    async def delete_topics(self, names: Collection[str]) -> None:
        await self._step(self._broker.delete_topics, list(names))

    async def delete_groups(self, names: Collection[str]) -> None:
        await self._step(self._broker.delete_groups, list(names))

    def transactional_producer(self, transactional_id: str, *, timeout: float | None = None) -> TransactionalProducer:
        producer = self._broker.transactional_producer(transactional_id, timeout=timeout)
        if transactional_id.endswith(".control"):
            end = producer.end

            async def dying() -> dict[TopicPartition, int]:
                self._count()
                ended = await end()
                self._count()
                return ended

            producer.end = dying  # type: ignore[method-assign]
        return producer

    async def _step(self, act: Callable[[list[str]], Awaitable[None]], names: list[str]) -> None:
        """Before it, in its middle, behind it."""
        self._count()
        half = len(names) // 2
        await act(names[:half])
        self._count()
        await act(names[half:])
        self._count()
        if act.__name__ == self._behind:
            raise KilledError

    def _count(self) -> None:
        self.steps += 1
        if self._at is not None and self.steps > self._at:
            raise KilledError


class SilentBroker(DyingBroker):
    """A broker that tells of nobody in a group."""

    def __init__(self, broker: Broker) -> None:
        super().__init__(broker)

    async def members(self, group: str) -> list[MemberInfo]:
        return []


@pytest.mark.parametrize("steered", [True, False], ids=["registered", "never registered"])
def test_killed_midway_and_done_again(broker_url: str, name: str, tmp_path: Path, steered: bool) -> None:
    """Killed in the middle of any step, the removal is found unfinished and comes to its end; the rest stays."""

    async def check() -> None:
        pipeline = make_pipeline(name)
        await run_session(broker_url, pipeline, "bystander", tmp_path)
        rest = await everything(broker_url, name, tmp_path)
        at = 0
        while True:
            session = await run_session(broker_url, pipeline, f"victim{at}", tmp_path, steered=steered)
            async with opened(broker_url) as broker:
                dying = DyingBroker(broker, at)
                with suppress(KilledError):
                    await remove(dying, session, tmp_path)
                if dying.steps <= at:
                    break  # it came to its end before the kill
                known = (await find_sessions(broker, clock=CLOCK)).get(session.group)
                if known is not None:
                    await remove(broker, session, tmp_path)
                assert await list_traces(broker, session.group, clock=CLOCK) is None
            after = await everything(broker_url, name, tmp_path)
            assert difference(rest, after) == {}, f"killed at step {at}"
            at += 1
        assert at >= 10
        assert difference(rest, await everything(broker_url, name, tmp_path)) == {}

    asyncio.run(check())


@pytest.mark.parametrize("behind", ["delete_groups", "delete_topics"])
def test_a_half_removed_session_does_not_go_on(broker_url: str, name: str, tmp_path: Path, behind: str) -> None:
    """Between its offsets' end and its changelog's, a worker refuses to begin a session anew over what is left."""

    async def check() -> None:
        pipeline = make_pipeline(name)
        publish_rows(broker_url, f"{name}.in", ROWS)
        side = Session(name, "side")
        async with working(broker_url, pipeline, side, tmp_path), opened(broker_url) as broker:

            async def is_done() -> bool:
                context = await session_context(broker, side, [f"{name}.in"], 30, CLOCK)
                return context is not None and context.completed_rows == len(ROWS)

            await until(is_done)
        async with opened(broker_url) as broker:
            with pytest.raises(KilledError):
                await remove(DyingBroker(broker, behind=behind), side, tmp_path)
            assert side.group not in await broker.groups()
            known = (await find_sessions(broker, clock=CLOCK))[side.group]
            assert is_being_removed(known.record) == (behind == "delete_topics")
        async with opened(broker_url) as broker:
            worker = Worker(pipeline, broker, session=side, options=options_at(tmp_path), clock=CLOCK)
            with pytest.raises(CheckpointError, match="changelog"):
                await asyncio.wait_for(worker.run(), 60)
        async with opened(broker_url) as broker:
            await remove(broker, side, tmp_path)
            assert await list_traces(broker, side.group, clock=CLOCK) is None

    asyncio.run(check())


# --- the state manager ---------------------------------------------------------------------------------------------


def test_the_state_manager_reads_what_transactions_commit(broker_url: str, name: str, tmp_path: Path) -> None:
    """Contexts load by id and by name, exact; lists tell progress, cost and state; saving writes nothing."""
    pipeline = make_pipeline(name)
    publish_rows(broker_url, f"{name}.in", ROWS)
    live = asyncio.run(run_live(broker_url, pipeline, tmp_path))
    monday = asyncio.run(run_session(broker_url, pipeline, "monday", tmp_path))
    publish_rows(broker_url, f"{name}.in", ROWS[:10])
    manager = StateManager(BrokerCheckpointStorage(broker_url, state_dir=str(tmp_path / "state")))

    for session in (monday, live):
        context = manager.load_checkpoint(session_uuid(session.group))
        assert context is not None
        assert (context.completed_rows, context.failed_rows) == (40, 2)
        assert (context.accumulated_cost, context.accumulated_tokens) == (Decimal("0.038"), 76)
        assert manager.can_resume(session.group)
    done = manager.load_checkpoint(f"{name}.monday")
    assert done is not None
    assert (done.get_progress(), done.total_rows) == (100.0, 40)
    assert manager.load_checkpoint(f"{name}.tuesday") is None
    assert not manager.can_resume(f"{name}.tuesday")

    infos = {info.session: info for info in manager.list_checkpoints() if name in info.session}
    assert set(infos) == {name, f"{name}.monday"}
    over, waits = infos[f"{name}.monday"], infos[name]
    assert (over.state, over.resumable, over.progress, over.rows) == ("completed", False, 100.0, 40)
    assert (waits.state, waits.resumable, waits.rows, waits.cost) == ("idle", True, 40, Decimal("0.038"))
    assert waits.progress < 100
    assert waits.age is not None

    before = asyncio.run(everything(broker_url, name, tmp_path))
    assert manager.save_checkpoint(done)
    assert difference(before, asyncio.run(everything(broker_url, name, tmp_path))) == {}

    async def inside() -> None:
        assert manager.load_checkpoint(f"{name}.monday") == done  # an event loop runs, and is held up
        assert await manager.load_checkpoint_async(f"{name}.monday") == done
        assert await manager.can_resume_async(str(done.session_id))
        assert await manager.cleanup_checkpoints_async(f"{name}.monday") is True
        assert await manager.cleanup_checkpoints_async(f"{name}.monday") is False

    asyncio.run(inside())
    assert not manager.can_resume(done.session_id)
    assert manager.can_resume(name)


def test_checkpoints_kept_by_hand(broker_url: str, name: str, tmp_path: Path) -> None:
    """A checkpoint of ondine goes from its file to the broker and back into a file, the same at each place."""
    session_id = session_uuid(name)  # of nothing that the broker knows
    given = ExecutionContext(
        session_id=session_id,
        last_processed_row=41,
        total_rows=100,
        accumulated_cost=Decimal("1.0000000001"),
        intermediate_data={"name": name},
    )
    first, second = FileCheckpointStorage(tmp_path / "first"), FileCheckpointStorage(tmp_path / "second")
    first.save(session_id, given.to_checkpoint())
    broker = BrokerCheckpointStorage(broker_url)
    loaded = StateManager(first).load_checkpoint(session_id)
    assert loaded is not None
    assert StateManager(broker).save_checkpoint(loaded)
    loaded = StateManager(broker).load_checkpoint(str(session_id))
    assert loaded == given
    assert StateManager(second).save_checkpoint(loaded)
    paths = [tmp_path / folder / f"checkpoint_{session_id}.json" for folder in ("first", "second")]
    assert json.loads(paths[0].read_text())["data"] == json.loads(paths[1].read_text())["data"]

    (info,) = [info for info in broker.list_checkpoints() if info.session_id == session_id]
    assert (info.group, info.state, info.rows, info.progress) == ("", None, 42, 42.0)
    assert CHECKPOINTS_TOPIC in info.checkpoint_path
    given.update_row(99)
    StateManager(broker).save_checkpoint(given)
    assert StateManager(broker).load_checkpoint(session_id) == given
    assert broker.delete(session_id)
    assert not broker.delete(session_id)
    assert not broker.exists(session_id)
    assert session_id not in {info.session_id for info in broker.list_checkpoints()}


def test_a_checkpoint_too_large_for_a_message(broker_url: str, name: str) -> None:
    """It is refused with what to do instead."""
    context = ExecutionContext(session_id=session_uuid(name), intermediate_data={"much": "x" * 3_000_000})
    storage = BrokerCheckpointStorage(broker_url)
    with pytest.raises(CheckpointError, match="FileCheckpointStorage"):
        storage.save(context.session_id, context.to_checkpoint())


# --- the command ---------------------------------------------------------------------------------------------------


def environment(url: str) -> dict[str, str]:
    """A terminal's, at 80 columns."""
    return {**os.environ, "ROWMILL_BROKER": url, "COLUMNS": "80"}


def run(folder: Path, url: str, *words: str, code: int = 0) -> tuple[str, str]:
    """A ``rowmill checkpoints`` command to its end, in a pipe."""
    done = subprocess.run(
        [sys.executable, "-c", ROWMILL, "checkpoints", *words],
        cwd=folder,
        env=environment(url),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def answer(folder: Path, url: str, text: str, *words: str) -> tuple[int, str]:
    """The same on a terminal, where somebody answers."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ROWMILL, "checkpoints", *words],
        cwd=folder,
        env=environment(url),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown, give_up = b"", time.monotonic() + 60
    try:
        while b"[y/N]" not in shown and time.monotonic() < give_up and process.poll() is None:
            shown += os.read(ours, 4096)
        os.write(ours, text.encode() + b"\n")
        code = process.wait(timeout=60)
        with suppress(OSError):
            while part := os.read(ours, 4096):
                shown += part
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return code, shown.decode()


def test_the_command_lists_shows_and_deletes(broker_url: str, name: str, tmp_path: Path) -> None:
    """At 80 columns every line fits; a dry run changes nothing; in a pipe nothing goes without --yes."""
    pipeline = make_pipeline(name)
    publish_rows(broker_url, f"{name}.in", ROWS)
    asyncio.run(run_live(broker_url, pipeline, tmp_path))
    asyncio.run(run_session(broker_url, pipeline, "monday", tmp_path))
    asyncio.run(run_session(broker_url, pipeline, "a-name-that-is-longer-than-any-terminal-" + "x" * 40, tmp_path))
    state = ("--state-dir", "state")

    out, _ = run(tmp_path, broker_url)
    assert all(len(line) <= 80 for line in out.splitlines())
    assert out.splitlines()[0].split() == ["session", "state", "resume", "done", "rows", "cost", "age"]
    (line,) = [line.split() for line in out.splitlines() if line.startswith(f"{name}.monday")]
    assert line[1:7] == ["completed", "no", "100", "%", "40", "0.038"]
    lines = run(tmp_path, broker_url, "list", "--json")[0].splitlines()
    assert lines
    infos = {info["session"]: info for info in map(json.loads, lines)}
    assert infos[f"{name}.monday"]["cost"] == "0.038"
    assert infos[name]["resumable"] is False  # nothing is left to do

    out, _ = run(tmp_path, broker_url, "show", f"{name}.monday", *state)
    assert all(len(line) <= 80 for line in out.splitlines())
    assert str(session_uuid(f"rowmill.{name}.monday")) in out
    shown = json.loads(run(tmp_path, broker_url, "show", f"{name}.monday", "--json", *state)[0])
    assert ExecutionContext.from_checkpoint(shown["checkpoint"]).completed_rows == 40
    assert {"kind": "topic", "name": f"{name}.out.monday", "what": "results"} in shown["traces"]

    before = asyncio.run(everything(broker_url, name, tmp_path))
    out, err = run(tmp_path, broker_url, "delete", f"{name}.monday", "--dry-run", *state)
    assert f"{name}.out.monday" in out
    assert "nothing was removed" in err
    _, err = run(tmp_path, broker_url, "delete", f"{name}.monday", *state, code=2)
    assert "--yes" in err
    run(tmp_path, broker_url, "delete", code=2)
    run(tmp_path, broker_url, "delete", name, "--older-than", "7d", code=2)
    _, err = run(tmp_path, broker_url, "delete", f"{name}.mondai", "--yes", code=2)
    assert f"{name}.monday" in err
    assert difference(before, asyncio.run(everything(broker_url, name, tmp_path))) == {}

    _, err = run(tmp_path, broker_url, "delete", f"{name}.monday", "--yes", *state)
    assert f"removed {name}.monday" in err
    after = asyncio.run(everything(broker_url, name, tmp_path))
    assert difference(without(before, Session(name, "monday")), after) == {}


def test_the_command_asks_on_a_terminal(name: str, tmp_path: Path) -> None:
    """Somebody at a terminal is asked; without a yes nothing goes."""
    url = f"local://{tmp_path / 'broker'}"
    asyncio.run(run_session(url, make_pipeline(name), "monday", tmp_path))
    words = ("delete", "monday", "--state-dir", "state")
    for text in ("", "n", "Yes please"):
        code, shown = answer(tmp_path, url, text, *words)
        assert code == 1
        assert "nothing was removed" in shown
        assert f"{name}.out.monday" in shown
    code, shown = answer(tmp_path, url, "y", *words)
    assert code == 0
    assert f"removed {name}.monday" in shown
    assert run(tmp_path, url)[1] == f"no sessions on {url}\n"


def test_the_command_deletes_what_is_old(name: str, tmp_path: Path) -> None:
    """By age, only sessions go that are old enough, that nobody serves, and that are not live ones."""
    url = f"local://{tmp_path / 'broker'}"
    pipeline = make_pipeline(name)
    publish_rows(url, f"{name}.in", ROWS)

    async def prepare() -> None:
        await run_live(url, pipeline, tmp_path)
        for session in ("monday", "tuesday"):
            await run_session(url, pipeline, session, tmp_path)

    asyncio.run(prepare())
    state = ("--state-dir", "state")
    assert run(tmp_path, url, "delete", "--older-than", "1h", "--yes", *state)[1] == "nothing to remove\n"
    time.sleep(1.1)

    async def while_one_works() -> tuple[str, str]:
        async with working(url, pipeline, Session(name, "busy"), tmp_path):
            return await asyncio.to_thread(run, tmp_path, url, "delete", "--older-than", "1s", "--yes", *state)

    out, err = asyncio.run(while_one_works())
    assert f"removed {name}.monday" in err
    assert f"removed {name}.tuesday" in err
    assert f"{name} stays: it is a live session" in err
    assert f"session {name}:" not in out
    left = [json.loads(line)["session"] for line in run(tmp_path, url, "--json")[0].splitlines()]
    assert sorted(left) == [name, f"{name}.busy"]


def publish_rows(url: str, topic: str, rows: Sequence[dict[str, Any]]) -> None:
    """Rows under some keys."""
    publish(topic, [{**row, "key": f"k{row['n'] % 5}"} for row in rows], broker=url, key="key")
