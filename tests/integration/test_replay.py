"""Replay on real brokers: rows run again by the live session or on the side, results compared, and kills on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rowmill import Pipeline, Session, TopicError, Worker, WorkerOptions, open_broker, publish, read
from rowmill.state.model import Committed, TopicPartition
from rowmill.streams.brokers.base import Broker
from rowmill.streams.replay import Replay, Target

pytestmark = pytest.mark.timeout(180)

ROWMILL = "import sys; from rowmill.streams.cli.main import main; sys.exit(main())"
EXAMPLE = Path(__file__).parents[2] / "examples" / "reviews.py"
REVIEWS = EXAMPLE.parent / "data" / "reviews.csv"

JOB = """
import time
from pathlib import Path
from rowmill import Cache, Pipeline

p = Pipeline("NAME", source="NAME.in", sink="NAME.out")

@p.stage(cache=Cache(version="1"))
async def ask(row):
    with Path("asked.txt").open("a") as file:
        file.write(f"{row['n']}\\n")
    return {"n": row["n"]}

@p.stage
def work(row):
    time.sleep(PAUSE)
    return {**row, "version": VERSION}
"""


def write_job(folder: Path, name: str, version: int, pause: float = 0.0) -> None:
    """``job.py``; its cached stage notes each call in ``asked.txt``."""
    text = JOB.replace("NAME", name).replace("VERSION", str(version)).replace("PAUSE", str(pause))
    (folder / "job.py").write_text(text)


def start(folder: Path, url: str, *words: str) -> subprocess.Popen[str]:
    """A ``rowmill`` process."""
    environment = {name: value for name, value in os.environ.items() if name != "ROWMILL_BROKER"}
    environment["ROWMILL_BROKER"] = url
    return subprocess.Popen(
        [sys.executable, "-c", ROWMILL, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, url: str, *words: str, code: int = 0) -> tuple[str, str]:
    """A ``rowmill`` command to its end: standard output and error."""
    process = start(folder, url, *words)
    out, err = process.communicate(timeout=90)
    assert process.returncode == code, f"{words}: {process.returncode}\n{out}\n{err}"
    return out, err


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Broker]:
    """A started broker."""
    broker = open_broker(url, environment={})
    await broker.start()
    try:
        yield broker
    finally:
        await broker.close()


async def look(url: str, session: Session, topic: str) -> tuple[dict[TopicPartition, Committed | None], dict[Any, int]]:
    """What a replay could change: the group's offsets with their maps, and the end of the changelog."""
    async with opened(url) as broker:
        count = (await broker.topics())[topic].partitions
        tps = [TopicPartition(topic, number) for number in range(count)]
        changelog = [TopicPartition(session.changelog(topic), number) for number in range(count)]
        return await broker.committed(session.group, tps), await broker.offsets(changelog, "high_watermark")


def rows_of(url: str, topic: str) -> list[dict[str, Any]]:
    """The rows of a topic, as far as committed."""
    return [message.row for message in read(topic, broker=url)]


def feed(url: str, topic: str, numbers: Sequence[int]) -> None:
    """Publish rows under seven keys."""
    publish(topic, [{"n": n, "key": f"k{n % 7}"} for n in numbers], broker=url, key="key")


def feed_halves(url: str, topic: str) -> str:
    """Rows 0 to 199, and later 200 to 399; the moment in between."""
    feed(url, topic, range(200))
    time.sleep(0.05)
    moment = datetime.now(UTC).isoformat(timespec="milliseconds")
    time.sleep(0.05)
    feed(url, topic, range(200, 400))
    return moment


def versions(rows: Sequence[dict[str, Any]]) -> Counter[tuple[int, int]]:
    """How often there is which version's result of which row."""
    return Counter((row["n"], row["version"]) for row in rows)


def test_the_second_half_after_a_fix(broker_url: str, name: str, tmp_path: Path) -> None:
    """A dry run changes nothing; executed, exactly the rows behind the moment get the new stage's results besides."""
    moment = feed_halves(broker_url, f"{name}.in")
    write_job(tmp_path, name, 1)
    run(tmp_path, broker_url, "run", "job.py", "--json")
    before = asyncio.run(look(broker_url, Session(name), f"{name}.in"))
    write_job(tmp_path, name, 2)

    out, _ = run(tmp_path, broker_url, "replay", "job.py", "--to-datetime", moment, "--json")
    plan = json.loads(out)
    assert not plan["executed"]
    assert plan["skipped"] == 0
    assert 200 <= plan["run_again"] <= 230  # on Kafka markers count
    out, err = run(tmp_path, broker_url, "replay", "job.py", "--to-datetime", moment)
    assert "nothing was changed" in err
    assert f"{name}.out" in out
    assert asyncio.run(look(broker_url, Session(name), f"{name}.in")) == before

    out, _ = run(tmp_path, broker_url, "replay", "job.py", "--to-datetime", moment, "--execute", "--json")
    executed = json.loads(out)
    assert [(p["from"], p["to"]) for p in executed["partitions"]] == [(p["from"], p["to"]) for p in plan["partitions"]]
    summary = json.loads(run(tmp_path, broker_url, "run", "job.py", "--json")[0])
    assert summary["rows"] == 200
    expected = [(n, 1) for n in range(400)] + [(n, 2) for n in range(200, 400)]
    assert versions(rows_of(broker_url, f"{name}.out")) == Counter(expected)


def test_the_reviews_example(broker_url: str, name: str, tmp_path: Path) -> None:
    """The example's second half again with another scorer: new results for those rows, the old ones for the rest."""
    text = EXAMPLE.read_text(encoding="utf-8").replace('"reviews', f'"{name}')
    (tmp_path / "example.py").write_text(text, encoding="utf-8")
    lines = REVIEWS.read_text(encoding="utf-8").splitlines(keepends=True)
    half = len(lines) // 2
    for part, chosen in (("first", lines[1:half]), ("second", lines[half:])):
        (tmp_path / f"{part}.csv").write_text("".join([lines[0], *chosen]), encoding="utf-8")
    run(tmp_path, broker_url, "publish", name, "first.csv", "--key", "id")
    time.sleep(0.05)
    moment = datetime.now(UTC).isoformat(timespec="milliseconds")
    time.sleep(0.05)
    run(tmp_path, broker_url, "publish", name, "second.csv", "--key", "id")
    run(tmp_path, broker_url, "run", "example.py", "-q")
    old = {row["id"]: row for row in rows_of(broker_url, f"{name}.scored")}
    published = [row["id"] for row in rows_of(broker_url, name)]
    second = set(published) - {line.partition(",")[0] for line in lines[1:half]}

    (tmp_path / "example.py").write_text(text.replace('["compound"]', '["compound"] * 10'), encoding="utf-8")
    run(tmp_path, broker_url, "replay", "example.py", "--to-datetime", moment, "--execute")
    run(tmp_path, broker_url, "run", "example.py", "-q")
    found: dict[str, list[float]] = {}
    for row in rows_of(broker_url, f"{name}.scored"):
        found.setdefault(row["id"], []).append(row["score"])
    assert 1_500 < len(second) < 2_200
    assert found.keys() == old.keys()
    for key, scores in found.items():
        score = old[key]["score"]
        assert sorted(scores) == sorted([score, score * 10] if key in second else [score])


def test_by_name_and_from_a_file(broker_url: str, name: str, tmp_path: Path) -> None:
    """The pipeline's name and its source suffice; a file names offsets, which are clamped to the log."""
    feed(broker_url, f"{name}.in", range(50))
    write_job(tmp_path, name, 1)
    run(tmp_path, broker_url, "run", "job.py", "--json")
    (tmp_path / "to.csv").write_text(f"{name}.in,0,0\n{name}.in,1,99999\n")
    words = ["replay", name, "--source", f"{name}.in", "--from-file", "to.csv", "--execute", "--json"]
    plan = json.loads(run(tmp_path, broker_url, *words)[0])
    assert [(p["partition"], p["to"] == p["from"]) for p in plan["partitions"]] == [(0, False), (1, True)]
    assert plan["partitions"][0]["to"] == 0
    _, err = run(tmp_path, broker_url, "replay", name, "--source", f"{name}.no", "--to-earliest", code=1)
    assert "does not exist" in err


def test_a_running_worker_keeps_a_replay_out(broker_url: str, name: str, tmp_path: Path) -> None:
    """With a worker in the group nothing moves, the error names the remedy, and the worker works on."""
    feed(broker_url, f"{name}.in", range(50))
    write_job(tmp_path, name, 1)
    worker = start(tmp_path, broker_url, "worker", "job.py")
    try:
        await_rows(broker_url, f"{name}.out", 50)
        before, _ = asyncio.run(look(broker_url, Session(name), f"{name}.in"))
        _, err = run(tmp_path, broker_url, "replay", "job.py", "--to-earliest", "--execute", code=1)
        assert "stop" in err.lower()
        assert asyncio.run(look(broker_url, Session(name), f"{name}.in"))[0] == before
        feed(broker_url, f"{name}.in", range(50, 60))
        await_rows(broker_url, f"{name}.out", 60)
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=60)
    assert versions(rows_of(broker_url, f"{name}.out")) == Counter((n, 1) for n in range(60))


def test_after_a_killed_worker(broker_url: str, name: str, tmp_path: Path) -> None:
    """A worker that was killed keeps a replay waiting until its session times out, and no longer."""
    feed(broker_url, f"{name}.in", range(50))
    write_job(tmp_path, name, 1)
    worker = start(tmp_path, broker_url, "worker", "job.py")
    await_rows(broker_url, f"{name}.out", 50)
    worker.kill()
    worker.communicate(timeout=30)
    run(tmp_path, broker_url, "replay", "job.py", "--to-earliest", "--execute")
    run(tmp_path, broker_url, "run", "job.py", "--json")
    assert versions(rows_of(broker_url, f"{name}.out")) == Counter({(n, 1): 2 for n in range(50)})


def await_rows(url: str, topic: str, count: int) -> None:
    """Until there are so many."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        with suppress(TopicError):  # it is not there yet
            if len(rows_of(url, topic)) >= count:
                return
        time.sleep(0.2)
    pytest.fail(f"{topic} never had {count} rows")


# --- tables ----------------------------------------------------------------------------------------------------


def counting(name: str) -> Pipeline:
    """Numbers the rows of each key."""
    pipeline = Pipeline(name, source=f"{name}.in", sink=f"{name}.out").table("counts")

    @pipeline.stage
    def number(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        table = ctx.table("counts")
        table.put(ctx.key, table.get(ctx.key, 0) + 1)
        return {**row, "number": table.get(ctx.key)}

    return pipeline


async def work(url: str, pipeline: Pipeline, state: Path) -> Worker:
    """A live worker to the present end."""
    async with opened(url) as broker:
        count = (await broker.topics())[pipeline.sources[0]].partitions
        tps = [TopicPartition(pipeline.sources[0], partition) for partition in range(count)]
        worker = Worker(pipeline, broker, options=WorkerOptions(state_dir=str(state)))
        worker.finish_at(await broker.offsets(tps, "high_watermark"))
        async with asyncio.timeout(90):
            await worker.run()
        return worker


@pytest.mark.parametrize(("state", "first"), [("keep", 11), ("reset", 1)])
@pytest.mark.parametrize("disk", ["the same", "another"])
async def test_tables(broker_url: str, name: str, tmp_path: Path, state: Any, first: int, disk: str) -> None:
    """From the first row on again: numbers go on where tables were kept, and begin anew where they were reset."""
    pipeline = counting(name)
    await asyncio.to_thread(feed, broker_url, f"{name}.in", range(70))
    await work(broker_url, pipeline, tmp_path / "state")
    async with opened(broker_url) as broker:
        execution = await Replay(broker, Session(name), pipeline.sources, Target("earliest"), state=state).execute()
    assert not execution.failed
    if state == "reset":
        assert sum(move.entries or 0 for move in execution.moved) == 7
    worker = await work(broker_url, pipeline, tmp_path / ("state" if disk == "the same" else "other"))
    assert worker.stats.rows == 70
    rows = await asyncio.to_thread(rows_of, broker_url, f"{name}.out")
    for key in {row["key"] for row in rows}:
        found = sorted(row["number"] for row in rows if row["key"] == key)
        assert found == sorted([*range(1, 11), *range(first, first + 10)])


# --- kills -----------------------------------------------------------------------------------------------------

KILLED = """
import asyncio, os, signal, sys
from rowmill import Session, open_broker
from rowmill.streams import replay
from rowmill.streams.replay import Replay, Target

url, name, place, number = sys.argv[1:]
honest, count = replay.Transactor.commit, 0

async def commit(self, outputs, checkpoint, is_ours):
    global count
    count += 1
    mine = count
    if mine == int(number):
        if place == "inside":
            producer, ended = self._producer, self._producer.end
            async def end():
                os.kill(os.getpid(), signal.SIGKILL)
            producer.end = end
        elif place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
    done = await honest(self, outputs, checkpoint, is_ours)
    if mine == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return done

replay.Transactor.commit = commit
replay._AT_ONCE = 1

async def main():
    broker = open_broker(url, environment={})
    await broker.start()
    await Replay(broker, Session(name), [name + ".in"], Target("shift", -3), state="reset").execute()

asyncio.run(main())
"""


@pytest.mark.parametrize("place", ["before", "inside", "after"])
async def test_killed_and_again(broker_url: str, name: str, tmp_path: Path, place: str) -> None:
    """Killed at its second partition, a shift moves each partition once when it is run again, tables and all."""
    pipeline = counting(name)
    await asyncio.to_thread(feed, broker_url, f"{name}.in", range(140))
    await work(broker_url, pipeline, tmp_path / "state")
    before, _ = await look(broker_url, Session(name), f"{name}.in")
    killed = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", KILLED, broker_url, name, place, "2"], timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    async with opened(broker_url) as broker:
        replay = Replay(broker, Session(name), pipeline.sources, Target("shift", -3), state="reset")
        execution = await replay.execute()
    assert not execution.failed
    assert sum(move.done for move in execution.moved) == (2 if place == "after" else 1)
    expected = {tp: Committed(max(0, done.offset - 3)) for tp, done in before.items() if done is not None}
    after, _ = await look(broker_url, Session(name), f"{name}.in")
    assert after == expected
    await work(broker_url, pipeline, tmp_path / "state")
    rows = await asyncio.to_thread(rows_of, broker_url, f"{name}.out")
    again = [n for n, count in Counter(row["n"] for row in rows).items() if count == 2]
    assert len({row["n"] for row in rows}) == 140
    for key in {row["key"] for row in rows if row["n"] in again}:
        count = sum(row["n"] in again and row["key"] == key for row in rows) // 2
        found = sorted(row["number"] for row in rows if row["key"] == key)
        assert found == sorted([*range(1, 21), *range(1, count + 1)]), "tables began anew"


def test_a_side_session(broker_url: str, name: str, tmp_path: Path) -> None:
    """It runs its range once through a kill, in topics of its own; the live group stays where it is; diff tells."""
    moment = feed_halves(broker_url, f"{name}.in")
    write_job(tmp_path, name, 1)
    run(tmp_path, broker_url, "run", "job.py", "--json")
    asked = (tmp_path / "asked.txt").read_text().split()
    live = asyncio.run(look(broker_url, Session(name), f"{name}.in"))

    words = ["replay", "job.py", "--side", "--session", "fix", "--from", moment, "--commit-interval", "0.01", "--json"]
    write_job(tmp_path, name, 1, pause=0.02)
    process = start(tmp_path, broker_url, *words)
    await_rows(broker_url, f"{name}.out.fix", 20)
    process.kill()
    process.communicate(timeout=30)
    done = len(rows_of(broker_url, f"{name}.out.fix"))
    assert done < 200
    feed(broker_url, f"{name}.in", range(400, 420))  # behind the range's end
    write_job(tmp_path, name, 1)
    summary = json.loads(run(tmp_path, broker_url, *words)[0])
    assert summary["dead_letters"] == 0
    assert versions(rows_of(broker_url, f"{name}.out.fix")) == Counter((n, 1) for n in range(200, 400))
    assert asyncio.run(look(broker_url, Session(name), f"{name}.in")) == live
    assert (tmp_path / "asked.txt").read_text().split() == asked, "answers came from the cache"

    out, _ = run(tmp_path, broker_url, "diff", "job.py", "live", "fix", "--json")
    found = json.loads(out)
    assert (found["equal"], found["changed"], found["only_a"], found["only_b"]) == (200, 0, 0, 0)

    write_job(tmp_path, name, 2)
    run(tmp_path, broker_url, "replay", "job.py", "--side", "--session", "two", "--until", "5", "--no-cache", "--json")
    ran = rows_of(broker_url, f"{name}.out.two")
    again = (tmp_path / "asked.txt").read_text().split()
    assert sorted(map(int, again[len(asked) :])) == sorted(row["n"] for row in ran), "answers were refused"
    out, _ = run(tmp_path, broker_url, "diff", "job.py", "live", "two", "--limit", "2", code=1)
    assert "version: 1 -> 2" in out
    assert asyncio.run(look(broker_url, Session(name), f"{name}.in")) == live
    _, err = run(tmp_path, broker_url, "replay", "job.py", "--side", "--session", "two", "--until", "6", code=1)
    assert "another range" in err
