"""``rowmill status`` against real brokers, and against what Kafka's own tool says of the same groups."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rowmill import Pipeline, Session, Worker, WorkerOptions, open_broker, publish
from rowmill.state.clock import SystemClock
from rowmill.state.execution import ExecutionState, Wanted
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.brokers.base import Broker
from rowmill.streams.cli.cmd_status import status_json
from rowmill.streams.control import ControlTopic, request
from rowmill.streams.inputs import make_input
from rowmill.streams.runs import BoundedRun
from rowmill.streams.status import SessionStatus, session_statuses
from support.kafka_server import kafka_tool
from support.sessions import MadeSession

pytestmark = pytest.mark.timeout(120)

ROWMILL = str(Path(sys.executable).with_name("rowmill"))
_LOOKS = 20


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Broker]:
    """A connection for those who look."""
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def hired(url: str, pipeline: Pipeline, folder: Path, **options: Any) -> AsyncIterator[Worker]:
    """A worker with a connection of its own, at work for as long as the block lasts."""
    async with opened(url) as broker:
        worker = Worker(pipeline, broker, options=WorkerOptions(state_dir=str(folder), **options))
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            async with asyncio.timeout(60):
                await asyncio.wait({running})
            running.exception()


async def status_of(broker: Broker, group: str) -> SessionStatus | None:
    """How one session stands."""
    found = await session_statuses(broker, clock=SystemClock(), group=group)
    return found[0] if found else None


async def until(broker: Broker, group: str, condition: Callable[[SessionStatus], Any]) -> SessionStatus:
    """Look until the session is as it should be."""
    status = None
    try:
        async with asyncio.timeout(40):
            while (status := await status_of(broker, group)) is None or not condition(status):
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"it never came to that: {status and status.to_dict()}")
    return status


def gated(name: str) -> tuple[Pipeline, asyncio.Event]:
    """A pipeline whose rows from 300 on wait for the gate; row 7 fails, row 8 is dropped."""
    gate = asyncio.Event()
    pipeline = Pipeline(name, source=name, sink=f"{name}.out")

    @pipeline.stage(concurrency=1_000)
    async def wait(row: dict[str, Any], ctx: Any) -> dict[str, Any] | None:
        if row["n"] >= 300:
            await gate.wait()
        if row["n"] == 7:
            raise ValueError("seven")
        ctx.add_cost("0.25", tokens=2)
        return None if row["n"] == 8 else row

    return pipeline, gate


# --- the same figures as Kafka's tool --------------------------------------------------------------------------


class Told(NamedTuple):
    """What Kafka's tool says of a partition; None for its dash."""

    committed: int | None
    end: int
    lag: int | None
    member: str | None


async def told_by_kafka(bootstrap: str, group: str) -> dict[TopicPartition, Told]:
    """``kafka-consumer-groups --describe``."""
    words = ("--bootstrap-server", bootstrap, "--describe", "--group", group)
    text = await asyncio.to_thread(kafka_tool, "consumer-groups", *words)
    lines = [line.split() for line in text.splitlines() if line.startswith(group)]

    def number(word: str) -> int | None:
        return None if word == "-" else int(word)

    return {
        TopicPartition(topic, int(partition)): Told(
            number(committed), int(end), number(lag), None if member == "-" else member
        )
        for _, topic, partition, committed, end, lag, member, *_ in lines
    }


def told_by_us(status: SessionStatus) -> dict[TopicPartition, Told]:
    """The same from ``--json``."""
    session = json.loads(json.dumps(status_json([status], "", 1)))["sessions"][0]
    members = {worker["worker"]: worker["member"] for worker in session["workers"]}
    return {
        TopicPartition(each["topic"], each["partition"]): Told(
            each["committed"], each["end"], each["lag"], members.get(each["worker"])
        )
        for each in session["partitions"]
    }


async def test_agrees_with_kafkas_own_tool(kafka: str, name: str, tmp_path: Path) -> None:
    """Offsets, ends, lag and members are those of kafka-consumer-groups: with two workers midway, and when idle."""
    url, group = f"kafka://{kafka}", f"rowmill.{name}"
    pipeline, _ = gated(name)
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(600)], broker=url)
    async with opened(url) as broker:
        async with (
            hired(url, pipeline, tmp_path / "a", drain_timeout=0.5) as one,
            hired(url, pipeline, tmp_path / "b", drain_timeout=0.5) as two,
        ):
            # The second worker may be joining still: then offsets and members change between the two looks.
            for _ in range(_LOOKS):
                midway = await until(
                    broker, group, lambda s: s.rows.rows == 300 and len(s.workers) == 2 and s.oldest is not None
                )
                found = await told_by_kafka(kafka, group)
                if told_by_us(midway) == found:
                    break
            assert told_by_us(midway) == found
            assert midway.state is ExecutionState.EXECUTING
            assert {each.worker for each in midway.partitions} == {one.snapshot().worker, two.snapshot().worker}
            assert sum(each.lag or 0 for each in midway.partitions) >= 300
            assert (midway.rows.dead_letters, midway.rows.dropped, midway.rows.ok) == (1, 1, 298)
            assert midway.oldest is not None
            assert midway.oldest.in_flight > 0
            assert (str(midway.cost), midway.tokens) == ("74.75", 598)
        idle = await until(broker, group, lambda s: not s.workers)
        assert told_by_us(idle) == await told_by_kafka(kafka, group)
        assert {each.member for each in told_by_us(idle).values()} == {None}
        assert idle.state is ExecutionState.IDLE
        assert idle.rows == midway.rows
        assert idle.lag >= 300


async def test_agrees_where_offsets_are_odd(kafka: str, name: str) -> None:
    """A partition that was never committed (the tool shows a dash), markers, and a transaction that is open."""
    url, group = f"kafka://{kafka}", f"rowmill.{name}"
    async with opened(url) as broker:
        made = MadeSession(Session(name), ends=(5, 0, 7), committed=(3, None, None))
        await made.make(broker, SystemClock())
        producer = broker.transactional_producer(f"{name}-open")
        await producer.start()
        try:
            await producer.begin()
            await (await producer.send(made.tps[0], [Outgoing(None, b"{}", 1)] * 2))
            status = await status_of(broker, group)
            assert status is not None
            told, ours = await told_by_kafka(kafka, group), told_by_us(status)
        finally:
            await producer.close()
    assert made.tps[0] in told
    assert {tp: ours[tp] for tp in told} == told  # the tool may leave out what was never committed
    assert [each.lag for each in status.partitions] == [5, None, None]  # two rows, a marker, two rows on their way
    assert status.lag == 5 + 0 + 8


# --- on both brokers -------------------------------------------------------------------------------------------


async def test_a_life(broker_url: str, name: str, tmp_path: Path) -> None:
    """Unknown, executing, paused, executing again, idle: what status says follows what happens."""
    group = f"rowmill.{name}"
    pipeline, gate = gated(name)
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(600)], broker=broker_url)
    async with opened(broker_url) as broker:
        assert await status_of(broker, group) is None
        control = ControlTopic(broker, clock=SystemClock())
        async with hired(broker_url, pipeline, tmp_path):
            busy = await until(broker, group, lambda s: s.rows.rows == 300 and s.rate is not None)
            assert busy.activity == "executing"
            assert [worker.pid for worker in busy.workers] == [os.getpid()]
            assert all(each.worker and each.state == "running" for each in busy.partitions)
            oldest = await until(broker, group, lambda s: s.oldest is not None)
            assert oldest.oldest is not None
            assert oldest.oldest.oldest_offset is not None
            await request(control, group, Wanted.PAUSE, by="ann@desk", reason="lunch")
            await until(broker, group, lambda s: s.activity == "pausing")  # rows in work are not done
            gate.set()
            paused = await until(broker, group, lambda s: s.activity == "paused")
            assert paused.state is ExecutionState.PAUSED
            assert (paused.record.changed_by, paused.record.reason) == ("ann@desk", "lunch")
            await request(control, group, Wanted.RUN, by="ann@desk")
            await until(broker, group, lambda s: s.activity == "executing" and s.rows.rows == 600)
        idle = await until(broker, group, lambda s: not s.workers)
        assert idle.activity == "idle"
        assert idle.lag <= len(idle.partitions)  # a marker each, at most


async def test_a_bounded_session_is_complete_by_its_offsets(broker_url: str, name: str) -> None:
    """A run over rows of its own ends as completed, with all of its rows counted and nothing left."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out").add(lambda row: row, name="same")
    session = Session(name, "job", owns_source=True)
    broker = open_broker(broker_url, environment={})
    run = BoundedRun(pipeline, broker, session, make_input([{"n": n} for n in range(100)], key=None))
    assert (await run.execute()).processed == 100
    async with opened(broker_url) as broker:
        status = await status_of(broker, session.group)
        assert status is not None
        assert (status.state, status.percent, status.total_rows, status.lag) == (ExecutionState.COMPLETED, 100, 100, 0)
        assert status.reference == f"{name}.job"
        assert status.rows.ok == 100


async def test_the_last_failure_is_told(broker_url: str, name: str, tmp_path: Path) -> None:
    """A session whose worker failed is shown as failed, with the reason, for as long as nobody works on it."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out")

    @pipeline.stage(on_error="fail")
    def refuse(row: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("enough")

    await asyncio.to_thread(publish, name, [{"n": 1}], broker=broker_url)
    async with opened(broker_url) as broker, hired(broker_url, pipeline, tmp_path):
        status = await until(broker, f"rowmill.{name}", lambda s: s.state is ExecutionState.FAILED)
        assert "enough" in status.record.failure


# --- the command -----------------------------------------------------------------------------------------------


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command to its end."""
    environment = {key: value for key, value in os.environ.items() if key not in {"ROWMILL_BROKER", "COLUMNS"}}
    return subprocess.run(
        [ROWMILL, "status", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_the_command(broker_url: str, name: str, tmp_path: Path) -> None:
    """Overview, detail and JSON as a process; a name that is wrong is a usage error that names the right one."""
    async with opened(broker_url) as broker:
        await MadeSession(Session(name), ends=(5, 9), committed=(3, None)).make(broker, SystemClock())
    lines = (await asyncio.to_thread(command, tmp_path, "--broker", broker_url)).stdout.splitlines()
    assert lines[0].split()[:3] == ["session", "state", "workers"]
    assert any(line.split()[:2] == [name, "idle"] for line in lines)
    detail = await asyncio.to_thread(command, tmp_path, name, "--broker", broker_url)
    assert detail.stdout.startswith(f"{name}: idle\n")
    assert "no worker runs" in detail.stdout
    found = json.loads((await asyncio.to_thread(command, tmp_path, name, "--json", "--broker", broker_url)).stdout)
    assert [each["session"] for each in found["sessions"]] == [name]
    wrong = await asyncio.to_thread(command, tmp_path, f"{name}x", "--broker", broker_url)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert f"did you mean {name!r}" in wrong.stderr


async def test_watch_in_a_pipe(tmp_path: Path, name: str) -> None:
    """In a pipe a JSON object comes per interval; Ctrl-C ends it well."""
    url = f"local://{tmp_path}/broker"
    async with opened(url) as broker:
        await MadeSession(Session(name)).make(broker, SystemClock())
    words = [ROWMILL, "status", "--watch", "0.2", "--json", "--broker", url]
    process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        async with asyncio.timeout(40):
            assert process.stdout is not None
            for _ in range(2):
                line = await process.stdout.readline()
                assert json.loads(line)["sessions"][0]["pipeline"] == name
            process.send_signal(signal.SIGINT)
            _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, said) == (0, b"")
