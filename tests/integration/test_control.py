"""Steering sessions on both brokers: operators at once, kills, restarts of the broker, and a watch through it all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rowmill import open_broker
from rowmill.state.clock import SystemClock
from rowmill.state.execution import REQUESTS, Wanted
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams import control_watch
from rowmill.streams.brokers.base import Broker, TopicSpec
from rowmill.streams.collect import read_topic
from rowmill.streams.control import ControlTopic, ControlWatch, note_failure, register, request
from rowmill.streams.errors import BrokerError, IllegalTransitionError
from rowmill.streams.event_records import EVENTS_TOPIC, EventRecord
from rowmill.streams.session_records import CONTROL_TOPIC, SessionRecord
from support.kafka_server import KafkaServer

pytestmark = pytest.mark.timeout(240)

TP = TopicPartition(CONTROL_TOPIC, 0)
ROWMILL = [sys.executable, "-c", "import sys; from rowmill.streams.cli.main import main; sys.exit(main())"]
DEADLINE = 60


@asynccontextmanager
async def opened(url: str, count: int = 1) -> AsyncIterator[list[ControlTopic]]:
    """As many operators, each with a connection of its own."""
    brokers = [open_broker(url, environment={}) for _ in range(count)]
    async with contextlib.AsyncExitStack() as stack:
        for broker in brokers:
            await broker.start()
            stack.push_async_callback(broker.close)
        yield [ControlTopic(broker, clock=SystemClock()) for broker in brokers]


def session(name: str, **fields: Any) -> SessionRecord:
    """A session's record, as a worker writes it."""
    return SessionRecord(group=f"rowmill.{name}", pipeline=name, session="live", changed_by="worker", **fields)


async def log_of(broker: Broker, group: str) -> list[SessionRecord | None]:
    """Every record of a session, in order."""
    found = [each async for lot in read_topic(broker, CONTROL_TOPIC) for each in lot if each.key == group.encode()]
    return [None if record.value is None else SessionRecord.decode(record.value) for record in found]


def check_legal(log: Sequence[SessionRecord | None]) -> None:
    """Each record follows the one before it by the table, or by a worker's start, and none came from a stale one."""
    for before, after in pairwise(log):
        assert before is not None
        assert after is not None
        assert after.sequence == before.sequence + 1
        is_restart = (before.wanted, after.wanted, after.changed_by) == (Wanted.CANCEL, Wanted.RUN, "worker")
        is_description = (before.wanted, before.changed_ms) == (after.wanted, after.changed_ms)
        assert is_restart or is_description or not REQUESTS[before.wanted][after.wanted], (before, after)


# --- operators -------------------------------------------------------------------------------------------------


async def test_two_operators_at_once(broker_url: str, name: str) -> None:
    """One pauses, one cancels, at the same moment, again and again: the log is legal, and the loser hears by name."""
    group, both, refused, rounds = f"rowmill.{name}", 0, 0, 0
    async with opened(broker_url, 3) as (ann, bob, worker):
        while rounds < 10 or not (both and refused):  # both orders are there, after some rounds
            rounds += 1
            assert rounds < 200
            assert (await register(worker, session(name))).wanted is Wanted.RUN
            paused, cancelled = await asyncio.gather(
                request(ann, group, Wanted.PAUSE, by="ann"),
                request(bob, group, Wanted.CANCEL, by="bob"),
                return_exceptions=True,
            )
            assert isinstance(cancelled, SessionRecord), "to cancel is legal before and after a pause"
            if isinstance(paused, SessionRecord):
                both += 1
                continue
            refused += 1
            assert isinstance(paused, IllegalTransitionError)
            assert str(paused).startswith(f"{name} cannot be paused: it is cancelled; ")
            assert "(bob asked for that at " in str(paused)
        log = await log_of(worker.broker, group)
    check_legal(log)
    assert [record.changed_by for record in log if record].count("ann") == both
    print(f"{both} times both, {refused} times refused")


async def test_many_operators_of_many_sessions(broker_url: str, name: str) -> None:
    """Sessions do not disturb each other: every request of each is recorded or refused, and each log is legal."""
    chance = random.Random(7)
    groups = [f"rowmill.{name}-{n}" for n in range(3)]

    async def operate(control: ControlTopic, by: str) -> int:
        recorded = 0
        for _ in range(6):
            with contextlib.suppress(IllegalTransitionError):
                wanted = chance.choice([Wanted.PAUSE, Wanted.RUN])
                await request(control, chance.choice(groups), wanted, by=by)
                recorded += 1
        return recorded

    async with opened(broker_url, 4) as controls:
        for n in range(3):
            await register(controls[0], session(f"{name}-{n}"))
        recorded = await asyncio.gather(*(operate(each, f"operator-{n}") for n, each in enumerate(controls)))
        logs = [await log_of(controls[0].broker, group) for group in groups]
    for log in logs:
        check_legal(log)
    assert sum(len(log) - 1 for log in logs) == sum(recorded)


KILLED = """
import asyncio, os, signal, sys
from dataclasses import replace
from rowmill import open_broker
from rowmill.state.execution import Wanted
from rowmill.state.model import Outgoing, TopicPartition
from rowmill.streams.session_records import CONTROL_TOPIC, SessionRecord

async def main(url, group, how):
    broker = open_broker(url, environment={})
    await broker.start()
    producer = broker.transactional_producer(f"{group}.control")
    await producer.start()
    await producer.begin()
    record = SessionRecord(group=group, pipeline="x", session="live", wanted=Wanted.CANCEL, changed_by="killed")
    await (await producer.send(TopicPartition(CONTROL_TOPIC, 0), [Outgoing(group.encode(), record.encode(), 0)]))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(*sys.argv[1:], ""))
"""


def kill_between_begin_and_end(url: str, group: str) -> None:
    """An operator's process dies with its transaction open."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, url, group], capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.alone
async def test_an_operator_killed_between_begin_and_end(broker_url: str, name: str) -> None:
    """What it wrote is never seen: the next operator of the session ends it at once, and watchers hear only of theirs.

    On Kafka, operators of *other* sessions wait meanwhile, and are told why.
    """
    group = f"rowmill.{name}"
    async with opened(broker_url, 2) as (ann, worker):
        await register(worker, session(name))
        await register(worker, session(f"{name}-other"))
        async with watching(worker.broker, group) as told:
            await asyncio.to_thread(kill_between_begin_and_end, broker_url, group)
            other = ControlTopic(ann.broker, clock=SystemClock(), timeout=0.3)
            if broker_url.startswith("kafka"):
                with pytest.raises(BrokerError, match=r"was not recorded: .*killed while steering another session"):
                    await request(other, f"{group}-other", Wanted.PAUSE, by="bob")
            began = time.monotonic()
            found = await request(ann, group, Wanted.PAUSE, by="ann")
            assert time.monotonic() - began < 10
            assert (found.sequence, found.wanted) == (2, Wanted.PAUSE)
            await request(ann, f"{group}-other", Wanted.PAUSE, by="bob")
            await until(lambda: told)
        assert [record.changed_by for record in told if record] == ["ann"]
        log = await log_of(worker.broker, group)
    check_legal(log)
    assert "killed" not in {record.changed_by for record in log if record}


@pytest.mark.slow
async def test_operators_killed_at_any_moment(broker_url: str, name: str, tmp_path: Path) -> None:
    """Commands die while they work, two at a time: whatever became of them, the log is legal and the next one works."""
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    group, kills = f"rowmill.{name}", 0
    async with opened(broker_url) as (worker,):
        for _ in range(6):
            await register(worker, session(name))
            pair = [spawn(tmp_path, broker_url, word, name) for word in ("pause", "cancel")]
            before = await written(worker.broker)
            async with asyncio.timeout(DEADLINE):  # until one of them is at it, or both are done
                while all(each.poll() is None for each in pair) and await written(worker.broker) == before:
                    await asyncio.sleep(0.005)
            for process in pair:
                await asyncio.sleep(chance.random() * 0.05)
                kills += process.poll() is None
                process.kill()
            for process in pair:
                _, errors = await asyncio.to_thread(process.communicate, timeout=DEADLINE)
                assert process.returncode in {0, 1, -signal.SIGKILL}, errors
                assert "Traceback" not in errors
        last = await register(worker, session(name, sink="last"))  # writes, and so ends what a kill left open
        log = await log_of(worker.broker, group)
    print(f"seed {seed}: {kills} kills, {len(log)} records")
    check_legal(log)
    assert log[-1] == last


async def written(broker: Broker) -> int:
    """The end of the control topic."""
    return (await broker.offsets([TP], "high_watermark"))[TP]


def spawn(folder: Path, url: str, *words: str) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in {"ROWMILL_BROKER", "COLUMNS"}}
    return subprocess.Popen(
        [*ROWMILL, *words, "--broker", url], cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder: Path, url: str, *words: str, code: int = 0) -> tuple[str, str]:
    """A command to its end; standard output and standard error."""
    process = spawn(folder, url, *words)
    out, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    return out, errors


def test_the_commands(broker_url: str, name: str, tmp_path: Path) -> None:
    """What they say, what they refuse and with which exit code, on a session whose workers are not there."""

    async def enter() -> None:
        async with opened(broker_url) as (worker,):
            await register(worker, session(name))

    asyncio.run(enter())
    _, said = run(tmp_path, broker_url, "pause", name, "--reason", "deploying")
    assert f"{name}: pause is recorded. Its workers finish and commit the rows in work" in said
    assert f"to go on: rowmill resume {name} --broker {broker_url}" in said
    _, said = run(tmp_path, broker_url, "pause", f"rowmill.{name}", code=1)
    assert f"rowmill: error: {name} cannot be paused: it is paused already (" in said
    assert said.rstrip().endswith(": deploying)")
    out, said = run(tmp_path, broker_url, "resume", f"{name}.live", "--json")
    fields = json.loads(out)
    assert (fields["session"], fields["wanted"], fields["carried_out"], said) == (name, "run", None, "")
    out, said = run(tmp_path, broker_url, "cancel", name, "--wait", "20")
    assert f"{name}: no worker is running; to go on with it, start one" in said
    _, said = run(tmp_path, broker_url, "resume", name, code=1)
    assert "is cancelled; to go on with it, start it again" in said
    _, said = run(tmp_path, broker_url, "pause", name[:-1], code=2)
    assert f"SESSION: got '{name[:-1]}'; there is no such session" in said
    assert f"did you mean '{name}'?" in said


def test_a_worker_that_has_not_done_it_in_time(broker_url: str, name: str, tmp_path: Path) -> None:
    """It is named with what it does, the exit code is 1, and the request stands."""
    group = f"rowmill.{name}"

    async def enter() -> None:
        async with opened(broker_url) as (worker,):
            await register(worker, session(name))
            await worker.broker.create_topics([TopicSpec(EVENTS_TOPIC, 1)])
            now = worker.clock.now_ms()
            event = EventRecord(
                kind="progress", at_ms=now, pipeline=name, session="live", group=group, worker="f00d",
                data={"state": "pausing"},
            )  # fmt: skip
            producer = worker.broker.producer()
            await producer.start()
            await (
                await producer.send(TopicPartition(EVENTS_TOPIC, 0), [Outgoing(group.encode(), event.encode(), now)])
            )
            await producer.close()

    asyncio.run(enter())
    out, said = run(tmp_path, broker_url, "pause", name, "--wait", "0.5", "--json", code=1)
    assert json.loads(out)["workers_waited_for"] == {"f00d": "pausing"}
    assert json.loads(out)["carried_out"] is False
    assert f"{name}: pause is recorded; waiting for its workers" in said
    _, said = run(tmp_path, broker_url, "cancel", name, "--wait", "0.2", code=1)
    assert f"{name}: not all workers have done it within 0.2 s: f00d is pausing" in said
    assert "it is recorded all the same" in said


# --- workers ---------------------------------------------------------------------------------------------------


async def test_ten_workers_register_at_once(broker_url: str, name: str) -> None:
    """One record is written; so it is when a session that was cancelled, and failed, is started again."""
    group = f"rowmill.{name}"
    async with opened(broker_url, 10) as workers:
        began = time.monotonic()
        found = await asyncio.gather(
            *(register(each, session(name, started_ms=n)) for n, each in enumerate(workers, 1))
        )
        print(f"{time.monotonic() - began:.2f} s")
        assert len({each.encode() for each in found}) == 1
        assert len(await log_of(workers[0].broker, group)) == 1
        await note_failure(workers[0], group, "no such host")
        await request(workers[0], group, Wanted.CANCEL, by="ann")
        found = await asyncio.gather(*(register(each, session(name, sink="new")) for each in workers))
        assert {(each.sequence, each.wanted, each.failure, each.sink) for each in found} == {(4, Wanted.RUN, "", "new")}
        assert len(await log_of(workers[0].broker, group)) == 4


async def test_fields_of_a_newer_rowmill_are_kept(broker_url: str, name: str) -> None:
    """Through a start and a request of this one."""
    group = f"rowmill.{name}"
    async with opened(broker_url) as (control,):
        await register(control, session(name, unknown={"color": "red", "deep": {"a": [1]}}))
        await register(control, session(name, sink="new"))
        await request(control, group, Wanted.PAUSE, by="ann")
        found = await control.session(group)
        assert found is not None
        assert (found.unknown, found.sink) == ({"color": "red", "deep": {"a": [1]}}, "new")


async def test_a_removed_session(broker_url: str, name: str) -> None:
    """A deletion in the log: watchers are told, lists are without it, and a start begins anew."""
    group = f"rowmill.{name}"
    async with opened(broker_url) as (control,):
        await register(control, session(name))
        async with watching(control.broker, group) as told:
            assert await control.update(group, lambda _: None) is None
            await until(lambda: told)
            assert told == [None]
            assert group not in await control.sessions()
            again = await register(control, session(name))
            await until(lambda: len(told) == 2)
        assert again.sequence == 1
        assert told == [None, again]


# --- the watch -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def watching(broker: Broker, group: str) -> AsyncIterator[list[SessionRecord | None]]:
    """A watch that runs; what it has told."""
    told: list[SessionRecord | None] = []
    watch = ControlWatch(broker, group, told.append, clock=SystemClock(), timeout=5)
    await watch.start()
    running = asyncio.create_task(watch.run())
    try:
        yield told
        assert not running.done()
    finally:
        await watch.close()
        async with asyncio.timeout(10):
            await running


async def until(condition: Callable[[], Any], seconds: float = 30) -> None:
    """Wait for it."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.alone
async def test_every_watcher_hears_everything_within_two_seconds(broker_url: str, name: str) -> None:
    """Three workers on connections of their own, and an operator on another: the same records in the same order."""
    group = f"rowmill.{name}"
    async with opened(broker_url, 4) as (operator, *workers):
        await register(workers[0], session(name))
        async with contextlib.AsyncExitStack() as stack:
            heard = [await stack.enter_async_context(watching(each.broker, group)) for each in workers]
            asked = []
            slowest = 0.0
            for _ in range(4):
                for wanted in (Wanted.PAUSE, Wanted.RUN):
                    asked.append(await request(operator, group, wanted, by="ann"))
                    began = time.monotonic()
                    await until(lambda: all(len(told) == len(asked) for told in heard))
                    slowest = max(slowest, time.monotonic() - began)
            assert all(told == asked for told in heard)
    print(f"slowest {slowest:.2f} s")
    assert slowest < 2


async def test_an_embedded_topic_that_is_compacted_deleted_and_made_anew(tmp_path: Path, name: str) -> None:
    """The watch goes on through all of it, on a topic that another process handles."""
    group, url = f"rowmill.{name}", f"local://{tmp_path / 'broker'}"
    async with opened(url, 2) as (operator, worker):
        async with watching(worker.broker, group) as told:
            await asyncio.sleep(0.5)
            first = await register(operator, session(name))  # there was no topic before
            await until(lambda: told == [first])
            filler = operator.broker.producer()
            await filler.start()
            for n in range(20):
                await (await filler.send(TP, [Outgoing(b"k%d" % (n % 3), b"x" * 1000, 0)] * 100))
            await filler.close()
            paused = await request(operator, group, Wanted.PAUSE, by="ann")
            await until(lambda: told[-1] == paused)
            await operator.broker.compact()  # type: ignore[attr-defined]
            kept = [each async for lot in read_topic(operator.broker, CONTROL_TOPIC) for each in lot]
            assert len(kept) < 500, "nothing was compacted"
            resumed = await request(operator, group, Wanted.RUN, by="ann")
            await until(lambda: told[-1] == resumed)
            async with watching(worker.broker, group) as late:  # begins in the compacted log
                await operator.broker.delete_topics([CONTROL_TOPIC])
                await until(lambda: told[-1] is None and late == [None])
                anew = await register(operator, session(name))
                await until(lambda: told[-1] == late[-1] == anew)
        assert told == [first, paused, resumed, None, anew]


@pytest.mark.slow
async def test_a_kafka_that_restarts_compacts_and_loses_the_topic(
    kafka_server: Callable[..., KafkaServer], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The topic comes after the watch; the broker is killed under it, compacts; the topic is deleted and made anew."""
    monkeypatch.setattr(control_watch, "_CHECK_SECONDS", 5.0)  # instead of thirty, in which nothing else happens
    server = kafka_server(properties={"log.cleaner.backoff.ms": "200", "log.initial.task.delay.ms": "1000"})
    group, url = f"rowmill.{name}", f"kafka://{server.bootstrap}"
    async with opened(url, 2) as (operator, worker), watching(worker.broker, group) as told:
        await asyncio.sleep(2)
        quickly = {"cleanup.policy": "compact", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.01"}
        await operator.broker.create_topics([TopicSpec(CONTROL_TOPIC, 1, quickly)])
        first = await register(operator, session(name))
        await until(lambda: told == [first])

        await asyncio.to_thread(server.kill)
        await asyncio.sleep(1)
        await asyncio.to_thread(server.start)
        paused = await patiently(lambda: request(operator, group, Wanted.PAUSE, by="ann"))
        await until(lambda: told[-1] == paused)

        # Others' records, until the cleaner has been over all but the newest segment.
        async with asyncio.timeout(60):
            while len(await log_of(operator.broker, group)) > 1:
                await patiently(lambda: operator.update(f"{group}.filler", touched))
                await asyncio.sleep(0.3)
        async with watching(worker.broker, group) as late:
            resumed = await request(operator, group, Wanted.RUN, by="ann")
            await until(lambda: told[-1] == resumed and late == [resumed])

        await operator.broker.delete_topics([CONTROL_TOPIC])
        await until(lambda: told[-1] is None, 60)
        anew = await register(operator, session(name))
        await until(lambda: told[-1] == anew)
    assert told == [first, paused, resumed, None, anew]


def touched(present: SessionRecord | None) -> SessionRecord:
    """The same record, with another text in it."""
    present = present or session("filler")
    return replace(present, reason=str(present.sequence))


async def patiently(act: Callable[[], Any]) -> Any:
    """Again while the broker comes up."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await act()
            except BrokerError:
                await asyncio.sleep(0.2)
