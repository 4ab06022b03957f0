"""Bounded runs: what goes in comes out, once, in order, through kills; on both brokers."""

from __future__ import annotations

import asyncio
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rowmill import (
    ConfigError,
    Pipeline,
    Session,
    SessionError,
    StreamingResult,
    WorkerOptions,
    open_broker,
    publish,
    read,
)
from rowmill.state.model import TopicPartition
from rowmill.streams.runs import BoundedRun
from support.pipelines import mixed_oracle

HERE = Path(__file__).parents[1]
ROOT = HERE.parent
PIPELINES = HERE / "support" / "pipelines.py"
ROWMILL = str(Path(sys.executable).with_name("rowmill"))
REVIEWS = ROOT / "examples" / "data" / "reviews.csv"


def simple(name: str) -> Pipeline:
    """Doubles a number."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out")
    return pipeline.add(lambda row: {**row, "twice": row["n"] * 2}, name="double")


# --- results -----------------------------------------------------------------------------------------------------


def test_results_come_in_input_order_with_the_inputs_index(broker_url: str, name: str) -> None:
    """Whatever partitions rows pass through, a frame's results keep its order and labels."""
    frame = pd.DataFrame({"n": range(5_000)}, index=[f"row-{i}" for i in range(5_000)])
    result = simple(name).run(frame, broker=broker_url)
    assert list(result.data.index) == list(frame.index)
    assert (result.data["twice"] == frame["n"] * 2).all()
    assert result.is_complete
    assert result.metrics.total_rows == result.metrics.processed_rows == 5_000


def test_counts_are_exact_for_dropped_failed_and_several(broker_url: str, name: str) -> None:
    """Rows that drop, fail or multiply are each counted once, and failed ones are named with their labels."""
    pipeline = Pipeline(name)

    @pipeline.stage
    def sort_out(row: dict[str, Any]) -> Any:
        n = row["n"]
        if n % 10 == 0:
            return None
        if n % 7 == 0:
            raise ValueError(f"seven divides {n}")
        return [row, {**row, "again": True}] if n % 5 == 0 else row

    numbers = range(1_000)
    frame = pd.DataFrame({"n": numbers}, index=[n * 3 for n in numbers])
    results, failed, dropped = mixed_oracle(numbers)
    result = pipeline.run(frame, broker=broker_url)
    assert list(result.data["n"]) == results
    assert list(result.data.index) == [n * 3 for n in results]
    assert (result.metrics.failed_rows, result.metrics.dropped_rows) == (len(failed), dropped)
    assert result.metrics.results == len(results)
    assert result.lost_rows == [n * 3 for n in failed]
    assert {e.error_type for e in result.errors} == {"ValueError"}
    assert json.loads(result.errors[0].value or b"") == {"n": 7}
    assert result.error_rate == len(failed) / 1_000


def test_reviews_equal_direct_scoring(broker_url: str) -> None:
    """The example's results are, row by row, those of calling the scorer without rowmill; correlation 0.59."""
    example = runpy.run_path(str(ROOT / "examples" / "reviews.py"))
    reviews, analyzer = example["reviews"], example["analyzer"]
    frame = pd.read_csv(REVIEWS)
    result = reviews.run(frame, broker=broker_url)
    assert list(result.data["id"]) == list(frame["id"])
    direct = [analyzer().polarity_scores(" ".join(text.split()))["compound"] for text in frame["text"]]
    assert list(result.data["score"]) == direct
    assert round(result.data["score"].corr(result.data["human_rating"]), 2) == 0.59


def test_topics_of_a_run_without_a_name_are_removed(broker_url: str, name: str) -> None:
    """A run that nobody named leaves nothing behind on the broker."""
    result = simple(name).run([{"n": 1}], broker=broker_url)
    assert len(result.data) == 1
    left = subprocess.run(
        [ROWMILL, "topics", "--json", "--broker", broker_url],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert name not in left.stdout


def test_run_async_inside_a_running_loop(broker_url: str, name: str) -> None:
    """Both forms work from asyncio code: run() as in a notebook, run_async() on the caller's own loop."""

    async def main() -> tuple[int, int]:
        pipeline = simple(name)
        one = await pipeline.run_async([{"n": 1}, {"n": 2}], broker=broker_url)
        two = pipeline.run([{"n": 3}], broker=broker_url)
        return len(one.data), len(two.data)

    assert asyncio.run(main()) == (2, 1)


def test_no_rows_at_all(broker_url: str, name: str) -> None:
    """An empty input gives an empty result, not an error and not a hang."""
    result = simple(name).run(pd.DataFrame({"n": []}), broker=broker_url)
    assert len(result.data) == 0
    assert result.metrics.total_rows == 0
    assert result.error_rate == 0.0


# --- sessions ----------------------------------------------------------------------------------------------------


def test_same_session_twice_does_nothing_twice(broker_url: str, name: str) -> None:
    """Run again with the same name, a finished session gives the same results without calling a handler."""
    calls: list[int] = []
    pipeline = Pipeline(name)

    @pipeline.stage
    def note(row: dict[str, Any]) -> dict[str, Any]:
        calls.append(row["n"])
        return row

    rows = [{"n": n} for n in range(500)]
    first = pipeline.run(rows, broker=broker_url, session="once")
    second = pipeline.run(rows, broker=broker_url, session="once")
    assert sorted(calls) == list(range(500))
    pd.testing.assert_frame_equal(first.data, second.data)
    assert second.metrics.total_rows == 500


def test_another_input_for_a_session_is_refused(broker_url: str, name: str) -> None:
    """A session's name with other rows is an error that says so, before anything is published."""
    simple(name).run([{"n": 1}], broker=broker_url, session="mine")
    with pytest.raises(SessionError, match="started with another input"):
        simple(name).run([{"n": 1}, {"n": 2}], broker=broker_url, session="mine")


def test_the_live_session_is_not_for_rows_of_ones_own(tmp_path: Path, name: str) -> None:
    """The live session's topics are everybody's: rows that are given run under another name, from Python too."""
    url = f"local://{tmp_path}"
    publish(name, [{"n": 7}], broker=url)
    with pytest.raises(ConfigError, match="the session that reads the source topic; choose another name"):
        simple(name).run([{"n": 1}], broker=url, session="live")
    assert [message.row for message in read(name, broker=url)] == [{"n": 7}]


@pytest.mark.parametrize("limit", [-1, 1.5, True, "2"])
def test_limits_of_reading(tmp_path: Path, limit: Any) -> None:
    """What is no number of records is refused, instead of leaving some out; 0 and None are numbers."""
    url = f"local://{tmp_path}"
    publish("rows", [{"n": n} for n in range(5)], broker=url)
    with pytest.raises(ConfigError, match="give a whole number from 0"):
        list(read("rows", broker=url, limit=limit))
    assert [len(list(read("rows", broker=url, limit=most))) for most in (0, 3, None)] == [0, 3, 5]


def test_unknown_key_column_is_refused(broker_url: str, name: str) -> None:
    """A key that is no column names the columns there are."""
    with pytest.raises(ConfigError, match="no such column; it has n"):
        simple(name).run(pd.DataFrame({"n": [1]}), broker=broker_url, key="m")


def test_keys_partition_as_kafka_does(kafka: str, name: str) -> None:
    """Rows with a key land where Kafka's own partitioner puts them."""
    from aiokafka.partitioner import murmur2

    rows = [{"n": n, "user": f"user-{n % 50}"} for n in range(500)]
    url = f"kafka://{kafka}"
    simple(name).run(rows, broker=url, session="keyed", key="user")
    for message in read(f"{name}.keyed", broker=url):
        assert message.key is not None
        assert message.partition == (murmur2(message.key) & 0x7FFFFFFF) % 6


# --- kills -------------------------------------------------------------------------------------------------------


def run_command(broker_url: str, pipeline: str, source: Path, output: Path, session: str) -> list[str]:
    """The command line of a bounded run whose deaths come from outside."""
    return [
        ROWMILL, "run", f"{PIPELINES}:{pipeline}", "--input", str(source), "--output", str(output),
        "--max-deaths", "0", "--session", session, "--broker", broker_url,
    ]  # fmt: skip


@contextmanager
def rows_published(broker_url: str, pipeline: str) -> Iterator[Callable[[str], int]]:
    """A function that tells how many rows a session's publisher has committed so far."""
    with asyncio.Runner() as runner:
        broker = open_broker(broker_url, environment={})
        runner.run(broker.start())

        def published(session_id: str) -> int:
            session = Session(pipeline, session_id, owns_source=True)
            mark = TopicPartition(session.source(pipeline), 0)
            found = runner.run(broker.committed(session.publisher_id, [mark]))[mark]
            return found.offset if found else 0

        try:
            yield published
        finally:
            runner.run(broker.close())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigkill_at_ten_random_moments(broker_url: str, name: str, tmp_path: Path) -> None:
    """Killed ten times while publishing and processing, the session's output is exact, and little ran twice.

    A process needs seconds until it works, above all on Kafka: so the moments are counted from the first sign of work.
    """
    seed = int(os.environ.get("ROWMILL_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"ROWMILL_TEST_SEED={seed}")
    chance = random.Random(seed)
    numbers = range(20_000)
    source, output, calls = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "calls"
    source.write_text("".join(f'{{"n":{n}}}\n' for n in numbers))
    calls.touch()
    environment = {**os.environ, "ROWMILL_TEST_NAME": name, "ROWMILL_TEST_CALLS": str(calls)}
    session, kills = "killed", list[tuple[int, int]]()
    with rows_published(broker_url, f"{name}-mixed") as published:
        while len(kills) < 10:
            before = calls.stat().st_size, published(session)
            command = run_command(broker_url, "mixed", source, output, session)
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            # The first few are to hit the publisher, which is soon done, the others the worker.
            early = len(kills) < 4
            while process.poll() is None and (
                calls.stat().st_size == before[0] and not (early and published(session) > before[1])
            ):
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.03 if early else 0.6))
            process.kill()
            _, errors = process.communicate(timeout=20)
            assert process.returncode in {0, -signal.SIGKILL}, errors
            if process.returncode:
                kills.append((published(session), calls.stat().st_size - before[0]))
            else:
                # It finished before the kill: begin again under another name, so that ten kills hit work.
                check_mixed(output, broker_url, name, session, numbers)
                output.unlink()
                session = f"killed-{len(kills)}"
    print("rows published, and bytes that handlers wrote meanwhile, at each kill:", *kills)
    assert any(0 < rows < len(numbers) for rows, _ in kills), "no kill hit the publisher"
    assert sum(written > 0 for _, written in kills) >= 5, "hardly a kill hit a worker at work"
    finished = subprocess.run(
        run_command(broker_url, "mixed", source, output, session),
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    check_mixed(output, broker_url, name, session, numbers)
    if session == "killed":
        times = Counter(map(int, calls.read_text().split()))
        assert times.keys() == set(numbers)
        again = times.total() - len(numbers)
        print(f"{again:,} calls were made again after 10 kills")
        assert again < len(numbers)


def check_mixed(output: Path, broker_url: str, name: str, session: str, numbers: range) -> None:
    """The file, the sink, the side topic and the dead letters hold exactly what the oracle says."""
    results, failed, _ = mixed_oracle(numbers)
    assert [json.loads(line)["n"] for line in output.read_text().splitlines()] == results
    sink = [m.row["n"] for m in read(f"{name}-mixed.out.{session}", broker=broker_url)]
    assert sorted(sink) == results
    side = [m.row["n"] for m in read(f"{name}-mixed.side.{session}", broker=broker_url)]
    assert sorted(side) == results
    dead = [m.row["n"] for m in read(f"{name}-mixed.dlq.{session}", broker=broker_url)]
    assert sorted(dead) == failed


def test_two_runs_of_one_session_at_once(broker_url: str, name: str, tmp_path: Path) -> None:
    """Started twice at the same time, a session still gives every result once, whoever of the two survives."""
    numbers = range(2_000)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"n":{n}}}\n' for n in numbers))
    environment = {**os.environ, "ROWMILL_TEST_NAME": name}
    processes = [
        subprocess.Popen(
            run_command(broker_url, "doubled", source, tmp_path / f"out-{i}.jsonl", "both"),
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert not any("Traceback" in error for error in errors), errors
    again = subprocess.run(
        run_command(broker_url, "doubled", source, tmp_path / "last.jsonl", "both"),
        env=environment, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert [json.loads(line)["n"] for line in (tmp_path / "last.jsonl").read_text().splitlines()] == list(numbers)


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_files_in_and_out(broker_url: str, name: str, tmp_path: Path, kind: str) -> None:
    """A file of each kind goes in and comes out with its rows in order."""
    frame = pd.DataFrame({"n": range(300), "text": [f'say "{i}", é\nline' for i in range(300)]})
    source, output = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        "csv": pd.read_csv,
        "jsonl": lambda path: pd.read_json(path, lines=True),
        "parquet": pd.read_parquet,
    }
    if kind == "csv":
        frame.to_csv(source, index=False)
    elif kind == "jsonl":
        frame.to_json(source, orient="records", lines=True)
    else:
        frame.to_parquet(source)
    process = subprocess.run(
        run_command(broker_url, "doubled", source, output, "files"),
        env={**os.environ, "ROWMILL_TEST_NAME": name}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    pd.testing.assert_frame_equal(
        readers[kind](output)[["n", "text", "twice"]], frame.assign(twice=frame["n"] * 2), check_dtype=False
    )


def test_a_broken_csv_line_is_a_dead_letter(broker_url: str, name: str, tmp_path: Path) -> None:
    """A line with too many fields is dead-lettered with its own bytes and line number; the others go on."""
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("n,text\n1,one\n2,two,too,many\n3,three\n")
    process = subprocess.run(
        run_command(broker_url, "doubled", source, output, "broken"),
        env={**os.environ, "ROWMILL_TEST_NAME": name}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert list(pd.read_csv(output)["n"]) == [1, 3]
    [dead] = read(f"{name}.dlq.broken", broker=broker_url)
    headers = dict(dead.headers)
    assert dead.value == b"2,two,too,many"
    assert headers["rowmill.error.type"] == b"broken_input"
    assert b"line 3: 4 fields where the header has 2" in (headers["rowmill.error.message"] or b"")


# --- streams -----------------------------------------------------------------------------------------------------


def test_stream_yields_early_and_in_order(broker_url: str, name: str) -> None:
    """The first chunk arrives while most of the input has not even been read; chunks are whole and in order."""
    taken = 0

    def source() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for n in range(20_000):
            taken = n + 1
            yield {"n": n}

    chunks = simple(name).stream(source(), chunk_size=500, broker=broker_url)
    first = next(chunks)
    assert list(first["n"]) == list(range(500))
    assert taken < 10_000
    rest = [n for chunk in chunks for n in chunk["n"]]
    assert rest == list(range(500, 20_000))
    assert chunks.finalize().metrics.total_rows == 20_000


def test_stream_can_be_left(broker_url: str, name: str) -> None:
    """Leaving an endless stream stops its threads and removes its topics."""

    def endless() -> Iterator[dict[str, Any]]:
        n = 0
        while True:
            yield {"n": n}
            n += 1

    with simple(name).stream(endless(), chunk_size=100, broker=broker_url) as chunks:
        assert list(next(chunks)["n"]) == list(range(100))
    with pytest.raises(StopIteration):
        next(chunks)


def test_stream_keeps_the_frames_index_and_names_failures(broker_url: str, name: str) -> None:
    """A streamed frame keeps its labels; failed rows are missing from the chunks and counted."""
    pipeline = Pipeline(name)

    @pipeline.stage
    def no_sevens(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] % 7 == 0:
            raise ValueError("seven")
        return row

    frame = pd.DataFrame({"n": range(100)}, index=[f"r{n}" for n in range(100)])
    chunks = pipeline.stream(frame, chunk_size=30, broker=broker_url, keep=True)
    labels = [label for chunk in chunks for label in chunk.index]
    result = chunks.finalize()
    assert labels == [f"r{n}" for n in range(100) if n % 7]
    assert (result.metrics.failed_rows, len(result.errors)) == (15, 15)
    assert list(result.data.index) == labels


def test_streaming_result_adds_up() -> None:
    """Chunks and costs given by hand add up to an ExecutionResult."""
    from decimal import Decimal

    total = StreamingResult(keep=True)
    for n in range(3):
        total.add_chunk(pd.DataFrame({"n": [n]}), Decimal("0.10"))
    result = total.finalize()
    assert list(result.data["n"]) == [0, 1, 2]
    assert result.costs.total_cost == Decimal("0.30")


# --- stopping and memory -----------------------------------------------------------------------------------------


def test_ctrl_c_ends_in_order(broker_url: str, name: str, tmp_path: Path) -> None:
    """Interrupted, a run commits what it did and says how to go on; going on completes it exactly."""
    numbers = range(6_000)
    source, output, calls = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "calls"
    source.write_text("".join(f'{{"n":{n}}}\n' for n in numbers))
    environment = {**os.environ, "ROWMILL_TEST_NAME": name, "ROWMILL_TEST_CALLS": str(calls)}
    command = run_command(broker_url, "doubled", source, output, "stopped")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not (calls.exists() and calls.stat().st_size > 1_000):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 130, errors
    assert "--session stopped" in errors
    assert "Traceback" not in errors
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 0, again.stderr
    assert [json.loads(line)["n"] for line in output.read_text().splitlines()] == list(numbers)
    # In order, so that nothing that was committed before the stop ran again.
    assert sorted(map(int, calls.read_text().split())) == list(numbers)


MEMORY = """
import resource, sys
from rowmill import Pipeline
pipeline = Pipeline("memory").add(lambda row: {**row, "twice": row["n"] * 2}, name="double")
from rowmill.state.model import TopicPartition
from rowmill.streams.runs import BoundedRun
from rowmill.streams.inputs import make_input
from rowmill.streams.session import Session
from rowmill import open_broker
import asyncio
rows = ({"n": n, "text": "x" * 40} for n in range(int(sys.argv[1])))
run = BoundedRun(pipeline, open_broker(sys.argv[2]), Session("memory", "m", owns_source=True), make_input(rows, None))
outcome = asyncio.run(run.execute())
assert outcome.results == int(sys.argv[1]), outcome.results
assert sum(1 for _ in outcome.values()) == outcome.results
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak(script: str, rows: int, folder: Path) -> int:
    """The most memory, in KiB, of a script that is given so many rows and an embedded broker of its own."""
    words = [sys.executable, "-c", script, str(rows), f"local://{folder / str(rows)}"]
    return int(subprocess.run(words, capture_output=True, text=True, timeout=200, check=True).stdout)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Five times the rows through an embedded worker peak within 1.15 times the memory."""
    few, many = (_peak(MEMORY, rows, tmp_path) for rows in (100_000, 500_000))
    print(f"peak RSS: {few:,} KiB for 100,000 rows, {many:,} KiB for 500,000: {many / few:.3f}x")
    assert many <= 1.15 * few


STREAM_MEMORY = """
import resource, sys
from rowmill import Pipeline
pipeline = Pipeline("memory").add(lambda row: {**row, "twice": row["n"] * 2}, name="double")
rows = ({"n": n, "text": "x" * 40} for n in range(int(sys.argv[1])))
with pipeline.stream(rows, chunk_size=1000, broker=sys.argv[2]) as chunks:
    assert sum(len(chunk) for chunk in chunks) == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_streams_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Five times the rows through a stream, whose chunks are let go, peak within 1.15 times the memory."""
    few, many = (_peak(STREAM_MEMORY, rows, tmp_path) for rows in (20_000, 100_000))
    print(f"peak RSS: {few:,} KiB for 20,000 rows, {many:,} KiB for 100,000: {many / few:.3f}x")
    assert many <= 1.15 * few


def test_options_reach_the_worker(broker_url: str, name: str) -> None:
    """The number of partitions asked for is the one the run's topics get."""
    simple(name).run([{"n": 1}], broker=broker_url, session="wide", options=WorkerOptions(partitions=3))
    listed = subprocess.run(
        [ROWMILL, "topics", "--json", "--broker", broker_url],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert f'"{name}.wide"' in listed.stdout


# --- inputs that are not as they should be -----------------------------------------------------------------------


def test_a_row_too_large_for_any_topic(broker_url: str, name: str) -> None:
    """A row of two megabytes is a dead letter, cut to what fits and marked; the others go on, also when resumed."""
    rows: list[dict[str, Any]] = [{"n": 0}, {"n": 1, "text": "x" * 2_000_000}, {"n": 2}]
    for _ in range(2):
        result = simple(name).run(rows, broker=broker_url, session="large")
        assert list(result.data["n"]) == [0, 2]
        [error] = result.errors
        assert (error.row_index, error.error_type) == (1, "broken_input")
        assert "2,000,017 bytes" in error.error_message


def test_other_content_under_the_same_session(broker_url: str, name: str) -> None:
    """The same number of rows with another content is another input, for frames, lists and generators."""
    pipeline = simple(name)
    inputs: dict[str, Callable[[list[int]], Any]] = {
        "frame": lambda numbers: pd.DataFrame({"n": numbers}),
        "list": lambda numbers: [{"n": n} for n in numbers],
        "generator": lambda numbers: ({"n": n} for n in numbers),
    }
    for kind, make in inputs.items():
        pipeline.run(make([1, 2, 3]), broker=broker_url, session=kind)
        assert list(pipeline.run(make([1, 2, 3]), broker=broker_url, session=kind).data["n"]) == [1, 2, 3]
        for other in ([1, 2, 4], [1, 2], [1, 2, 3, 4]):
            with pytest.raises(SessionError, match="another input"):
                pipeline.run(make(other), broker=broker_url, session=kind)


def test_an_iterator_that_fails(broker_url: str, name: str) -> None:
    """An error in the user's iterator reaches the user; a stream gives the whole chunks before it first."""

    def breaks(after: int) -> Iterator[dict[str, Any]]:
        for n in range(after):
            yield {"n": n}
        raise LookupError("the source broke")

    with pytest.raises(LookupError, match="the source broke"):
        simple(name).run(breaks(50), broker=broker_url)
    chunks = simple(name).stream(breaks(350), chunk_size=100, broker=broker_url)
    assert [int(next(chunks)["n"].iloc[0]) for _ in range(3)] == [0, 100, 200]
    with pytest.raises(LookupError, match="the source broke"):
        next(chunks)


def test_results_of_two_sources_are_counted_apart(broker_url: str, name: str) -> None:
    """Rows at the same place of two sources are two rows."""
    pipeline = Pipeline(name, source=[f"{name}.a", f"{name}.b"], sink=f"{name}.out").add(lambda row: row, name="same")
    for which in "ab":
        publish(f"{name}.{which}", [{"n": n} for n in range(100)], broker=broker_url)
    broker = open_broker(broker_url, environment={})
    outcome = asyncio.run(BoundedRun(pipeline, broker, Session(name), None).execute())
    assert (outcome.rows, outcome.processed, outcome.dropped, outcome.results) == (200, 200, 0, 200)


@pytest.mark.parametrize("leaving", ["break", "held", "read"])
def test_what_is_left_open_does_not_keep_the_program_alive(tmp_path: Path, leaving: str) -> None:
    """A stream or read() that is left in the middle lets the interpreter end, and a stream takes its topics along."""
    program = f"""
from rowmill import Pipeline, open_broker, publish, read
import asyncio
url = "local://{tmp_path}"
pipeline = Pipeline("left").add(lambda row: row, name="same")
if "{leaving}" == "read":
    publish("rows", [{{"n": n}} for n in range(5_000)], broker=url)
    messages = read("rows", broker=url)
    next(messages)
else:
    stream = pipeline.stream(({{"n": n}} for n in range(5_000)), chunk_size=10, broker=url)
    if "{leaving}" == "break":
        for chunk in stream:
            break
    else:
        next(stream)
print("reached the end")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "reached the end\n"), done.stderr
    listed = subprocess.run(
        [ROWMILL, "topics", "--json", "--broker", f"local://{tmp_path}"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "left" not in listed.stdout
