"""``rowmill dlq`` as processes, on both brokers: a bug's dead letters sent again, kills midway, and what is shown."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from rowmill import Pipeline, publish, read
from rowmill.handlers.chain import Failure
from rowmill.state.clock import SystemClock
from rowmill.state.codec import dumps
from rowmill.state.model import Outgoing, StoredRecord, TopicPartition
from rowmill.streams.brokers.base import Broker, TopicSpec
from rowmill.streams.brokers.open import open_broker
from rowmill.streams.dead_letters import dead_letter
from rowmill.streams.dlq import dead_letters, purge_dead_letters, retry_dead_letters
from rowmill.streams.dlq_letters import marks_topic

T = TypeVar("T")

ROWMILL = str(Path(sys.executable).with_name("rowmill"))
DEADLINE = 60

# Two dead letters in a transaction instead of 500, so that kills fall between and into many of them.
IN_SMALL_STEPS = """
import sys
from rowmill.streams.dlq import DeadLetters
DeadLetters.__init__.__kwdefaults__["batch_rows"] = 2
from rowmill.streams.cli.main import main
sys.exit(main())
"""

PIPELINE = """
from rowmill import Pipeline

p = Pipeline("NAME", source="NAME.in", sink="NAME.out")

@p.stage
def work(row):
    if row["n"] % 3 == 0 and not FIXED:
        raise ValueError("no \\x1b[31mthrees\\n" + "please " * 30)
    return {"n": row["n"], "square": row["n"] ** 2}
"""


def environment() -> dict[str, str]:
    """Ours without what would change the command's choices."""
    return {key: value for key, value in os.environ.items() if key not in {"ROWMILL_BROKER", "COLUMNS"}}


def run(folder: Path, url: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A command to its end, which is as expected."""
    done = subprocess.run(
        [ROWMILL, *words, "--broker", url], cwd=folder, env=environment(), capture_output=True, text=True,
        timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


def rows_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """JSON lines on standard output."""
    return [json.loads(line) for line in done.stdout.splitlines()]


def work_until(folder: Path, url: str, topic: str, count: int) -> None:
    """A worker of ``job.py``, until a topic has so many records."""
    words = [ROWMILL, "worker", "job.py", "--broker", url]
    with subprocess.Popen(words, cwd=folder, env=environment(), stderr=subprocess.DEVNULL) as worker:
        try:
            give_up = time.monotonic() + DEADLINE
            while on(url, lambda broker: count_records(broker, topic)) < count:
                assert time.monotonic() < give_up, f"{topic} has no {count} records"
                time.sleep(0.2)
            worker.send_signal(signal.SIGTERM)
            worker.wait(DEADLINE)
        finally:
            worker.kill()


def on(url: str, work: Callable[[Broker], Awaitable[T]]) -> T:
    """Do something with the broker from here."""

    async def act() -> T:
        broker = open_broker(url)
        await broker.start()
        try:
            return await work(broker)
        finally:
            await broker.close()

    return asyncio.run(act())


async def count_records(broker: Broker, topic: str) -> int:
    """Committed ones, counted one by one (offsets have gaps)."""
    from rowmill.streams.client import consume

    if topic not in await broker.topics():
        return 0
    return sum([len(lot) async for lot in consume(broker, topic)])


def squares(url: str, name: str) -> list[int]:
    """The rows that have a result, with repeats."""
    return sorted(message.row["n"] for message in read(f"{name}.out", broker=url))


def write_job(folder: Path, name: str, *, fixed: bool) -> None:
    """``job.py``, which fails on every third row until it is fixed."""
    (folder / "job.py").write_text(PIPELINE.replace("NAME", name).replace("FIXED", str(fixed)))


@pytest.mark.timeout(240)
def test_retry_after_a_fixed_bug(tmp_path: Path, broker_url: str, name: str) -> None:
    """Rows that failed by a bug are listed, shown, exported and, once it is fixed, sent again: none is left."""
    publish(f"{name}.in", [{"n": n, "k": f"k{n % 5}"} for n in range(30)], broker=broker_url, key="k")
    write_job(tmp_path, name, fixed=False)
    work_until(tmp_path, broker_url, f"{name}.dlq", 10)

    listed = rows_of(run(tmp_path, broker_url, "dlq", "list", name, "--json"))
    assert len(listed) == 10
    assert {(each["stage"], each["type"], each["attempts"]) for each in listed} == {("work", "ValueError", 1)}
    text = run(tmp_path, broker_url, "dlq", "list", f"{name}.dlq").stdout
    assert all(line.isprintable() and len(line) <= 80 for line in text.splitlines())
    shown = run(tmp_path, broker_url, "dlq", "show", name, listed[0]["id"]).stdout
    assert "no \\u001b[31mthrees" in shown
    assert '"n": ' in shown
    run(tmp_path, broker_url, "dlq", "export", name, "-o", "failed.csv", "--stage", "work")
    with (tmp_path / "failed.csv").open(newline="") as file:
        exported = list(csv.DictReader(file))
    assert sorted(int(each["n"]) for each in exported) == [*range(0, 30, 3)]
    assert {each["error.type"] for each in exported} == {"ValueError"}

    write_job(tmp_path, name, fixed=True)
    plan = run(tmp_path, broker_url, "dlq", "retry", "job.py")
    assert "10 rows would be sent (10 to " in plan.stderr
    assert len(rows_of(run(tmp_path, broker_url, "dlq", "list", name, "--json"))) == 10
    done = rows_of(run(tmp_path, broker_url, "dlq", "retry", "job.py", "--execute", "--json"))[0]
    assert (done["count"], done["targets"]) == (10, {f"{name}.in": 10})
    work_until(tmp_path, broker_url, f"{name}.out", 30)
    assert squares(broker_url, name) == [*range(30)]
    assert rows_of(run(tmp_path, broker_url, "dlq", "list", name, "--json")) == []
    states = rows_of(run(tmp_path, broker_url, "dlq", "list", name, "--all", "--json"))
    assert [each["state"] for each in states] == ["retried"] * 10
    again = rows_of(run(tmp_path, broker_url, "dlq", "retry", "job.py", "--execute", "--json"))[0]
    assert (again["count"], again["marked_before"]) == (0, 10)


@pytest.mark.timeout(240)
def test_a_row_that_fails_again(tmp_path: Path, broker_url: str, name: str) -> None:
    """It is a new dead letter, the old one stays marked; a purge puts it aside."""
    publish(f"{name}.in", [{"n": 3}], broker=broker_url)
    write_job(tmp_path, name, fixed=False)
    work_until(tmp_path, broker_url, f"{name}.dlq", 1)
    run(tmp_path, broker_url, "dlq", "retry", name, "--source", f"{name}.in", "--execute")
    work_until(tmp_path, broker_url, f"{name}.dlq", 2)
    (letter,) = dead_letters(name, broker=broker_url)
    assert letter.source_offset != 0
    assert len(list(dead_letters(name, broker=broker_url, marked=True))) == 2
    assert "1 dead letter would be purged" in run(tmp_path, broker_url, "dlq", "purge", name).stderr
    run(tmp_path, broker_url, "dlq", "purge", name, letter.id, "--execute")
    assert "no dead letters" in run(tmp_path, broker_url, "dlq", "list", name).stderr


def test_a_bounded_runs_dead_letters(tmp_path: Path, broker_url: str, name: str) -> None:
    """Its rows were its own: a retry says what to do, which works; or sends them where it is told."""
    write_job(tmp_path, name, fixed=False)
    (tmp_path / "in.csv").write_text("n\n" + "".join(f"{n}\n" for n in range(6)))
    run(tmp_path, broker_url, "run", "job.py", "--input", "in.csv", "--session", "s1")
    refused = run(tmp_path, broker_url, "dlq", "retry", "job.py", "--session", "s1", code=2).stderr
    assert "run them as another session" in refused
    run(tmp_path, broker_url, "dlq", "export", name, "--session", "s1", "--rows-only", "-o", "rows.jsonl")
    write_job(tmp_path, name, fixed=True)
    run(tmp_path, broker_url, "run", "job.py", "--input", "rows.jsonl", "--session", "s2", "--output", "o.jsonl")
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["n"] for line in lines) == [0, 3]
    on(broker_url, lambda broker: broker.create_topics([TopicSpec(f"{name}.in", 2)]))
    outcome = retry_dead_letters(Pipeline(name), session="s1", to=f"{name}.in", broker=broker_url)
    assert outcome.count == 2
    assert sorted(message.row["n"] for message in read(f"{name}.in", broker=broker_url)) == [0, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "NAME"], "no dead-letter topic 'NAME.dlq'"),
        (["list", "a b"], "use 1 to 80 letters"),
        (["list", "NAME", "--since", "tomorrow"], "--since: got 'tomorrow'"),
        (["list", "NAME.dlq", "--session", "s"], "is a topic"),
        (["list", "rowmill.NAME.dlq.marks"], "rowmill's own"),
        (["show", "NAME", "17"], "ID: got '17'"),
        (["show", "NAME"], "name one"),
        (["retry", "NAME", "--execute"], "give the pipeline's file"),
        (["retry", "nofile.py"], "there is no such file"),
        (["export", "NAME", "-o", "x.xyz"], "x.xyz"),
        (["nonsense", "NAME"], "invalid choice"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], message: str) -> None:
    """Each mistake is a line that says what to do, never a traceback."""
    done = subprocess.run(
        [ROWMILL, "dlq", *[word.replace("NAME", "p") for word in words]], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert done.returncode in {1, 2}
    assert message.replace("NAME", "p") in done.stderr
    assert "Traceback" not in done.stderr


# --- exactly once ----------------------------------------------------------------------------------------------

PARTITIONS = 3
LETTERS = 1_200
KILLING_ROUNDS = 5
"""Both processes are killed midway, one after the other; in the last of these rounds only one is."""


async def fill(broker: Broker, name: str) -> None:
    """A source without rows, and dead letters as if there had been."""
    await broker.create_topics([TopicSpec(f"{name}.in", PARTITIONS), TopicSpec(f"{name}.dlq", PARTITIONS)])
    now = SystemClock().now_ms()
    letters: dict[int, list[Outgoing]] = {partition: [] for partition in range(PARTITIONS)}
    for n in range(LETTERS):
        partition = n % PARTITIONS
        key = b"k%d" % (n % 7) if n % 2 else None
        row = StoredRecord(f"{name}.in", partition, n, now, key, dumps({"n": n}))
        letters[partition].append(dead_letter(row.tp, row, Failure("work", "ValueError", "no", 1, ""), "live", 100_000))
    producer = broker.producer()
    await producer.start()
    for partition, records in letters.items():
        await (await producer.send(TopicPartition(f"{name}.dlq", partition), records))
    await producer.close()


@pytest.mark.timeout(400)
def test_kills_and_two_at_once(tmp_path: Path, broker_url: str, name: str) -> None:
    """Two at a time, killed while they send, again and again until nothing is left: each row is sent exactly once."""
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    on(broker_url, lambda broker: fill(broker, name))
    write_job(tmp_path, name, fixed=True)
    words = [sys.executable, "-c", IN_SMALL_STEPS, "-q", "dlq", "retry", "job.py", "--execute", "--broker", broker_url]
    kills = fenced = rounds = 0
    give_up = time.monotonic() + 300
    while left := len(list(dead_letters(name, broker=broker_url))):
        assert time.monotonic() < give_up, f"seed {seed}: {left} are left"
        pair = [
            subprocess.Popen(words, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        try:
            rounds += 1
            if rounds <= KILLING_ROUNDS:
                wait_for_marks(broker_url, name, pair)
                for process in pair if rounds < KILLING_ROUNDS else pair[:1]:
                    time.sleep(chance.random() * 0.03)
                    kills += process.poll() is None
                    process.kill()
            for process in pair:
                _, errors = process.communicate(timeout=DEADLINE)
                assert process.returncode in {0, 1, -signal.SIGKILL}, errors
                assert "Traceback" not in errors
                fenced += "somebody else" in errors
        finally:
            for process in pair:
                process.kill()
                process.wait()
    sent = Counter(message.row["n"] for message in read(f"{name}.in", broker=broker_url))
    print(f"seed {seed}: {rounds} rounds, {kills} kills, {fenced} fenced")
    assert sent == Counter(range(LETTERS)), f"seed {seed}"
    assert kills, "nothing was killed midway"
    assert {each.mark.state for each in dead_letters(name, broker=broker_url, marked=True) if each.mark} == {"retried"}


@pytest.mark.timeout(120)
def test_two_at_once(tmp_path: Path, broker_url: str, name: str) -> None:
    """Three operators who say the same at the same time, and nobody is killed: each row is sent exactly once."""
    on(broker_url, lambda broker: fill(broker, name))
    write_job(tmp_path, name, fixed=True)
    words = [
        sys.executable,
        "-c",
        IN_SMALL_STEPS,
        "dlq",
        "retry",
        "job.py",
        "--execute",
        "--json",
        "--broker",
        broker_url,
    ]
    three = [
        subprocess.Popen(
            words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    told = []
    for process in three:
        out, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == bool(json.loads(out)["taken_over"]), errors
        told.append(json.loads(out)["count"])
    assert Counter(message.row["n"] for message in read(f"{name}.in", broker=broker_url)) == Counter(range(LETTERS))
    assert sum(told) == LETTERS, told
    assert list(dead_letters(name, broker=broker_url)) == []


def wait_for_marks(url: str, name: str, pair: list[subprocess.Popen[str]]) -> None:
    """Until something more is marked, or both are done."""

    async def wait(broker: Broker) -> None:
        async def written() -> int:
            topic = marks_topic(f"{name}.dlq")
            if topic not in await broker.topics():
                return 0
            places = [TopicPartition(topic, partition) for partition in range(PARTITIONS)]
            return sum((await broker.offsets(places, "high_watermark")).values())

        before = await written()
        async with asyncio.timeout(DEADLINE):
            while any(process.poll() is None for process in pair) and await written() <= before:
                await asyncio.sleep(0.01)

    on(url, wait)


def test_from_python(broker_url: str, name: str) -> None:
    """The same from Python: listed, sent by id, purged."""
    on(broker_url, lambda broker: fill(broker, name))
    pipeline = Pipeline(name, source=f"{name}.in")
    assert len(list(dead_letters(pipeline, broker=broker_url))) == LETTERS
    assert next(dead_letters(pipeline, broker=broker_url, type="ValueError")).stage == "work"
    outcome = retry_dead_letters(pipeline, ["0/0", f"{name}.dlq/1/0", "1/9999"], broker=broker_url, by="me")
    assert (outcome.count, outcome.missing) == (2, ["1/9999"])
    assert purge_dead_letters(pipeline, broker=broker_url).count == LETTERS - 2
    assert list(dead_letters(pipeline, broker=broker_url)) == []
