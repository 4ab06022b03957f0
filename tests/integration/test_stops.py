"""What a review found in bounded runs and streams: ends that never come, counts that do not add up, rows paid twice."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from rowmill import Budget, Pipeline, StopExecution
from rowmill.streams.options import WorkerOptions

pytestmark = pytest.mark.timeout(60)


def in_time(work: Any, seconds: float) -> None:
    """Run it on a thread: a hang is a failure, not a test that never ends."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"no end after {seconds} s"


def test_a_stream_ends_when_a_handler_stops_the_session(tmp_path: Path) -> None:
    """The chunks before the row come; then the iteration ends."""
    pipeline = Pipeline("p", source="a", sink="b")

    @pipeline.stage
    def handler(row: dict[str, Any]) -> Any:
        if row["n"] == 150:
            raise StopExecution("enough")
        return row

    stream = pipeline.stream([{"n": n} for n in range(1_000)], chunk_size=100, broker=f"local://{tmp_path}")
    in_time(lambda: list(stream), 15)


def test_a_stream_ends_when_its_budget_is_spent(tmp_path: Path) -> None:
    """As a run does."""
    pipeline = Pipeline("p", source="a", sink="b", budget=Budget("3"))

    @pipeline.stage(price="1")
    async def handler(row: dict[str, Any]) -> Any:
        return row

    stream = pipeline.stream([{"n": n} for n in range(20)], chunk_size=2, broker=f"local://{tmp_path}")
    in_time(lambda: list(stream), 15)


def test_a_streams_counts_add_up_at_every_chunk(tmp_path: Path) -> None:
    """Rows that run ahead of the chunk are not counted with it: nothing is dropped fewer than no times."""
    import time

    pipeline = Pipeline("p", source="a", sink="b")

    @pipeline.stage(on_error="skip")
    def handler(row: dict[str, Any]) -> Any:
        if row["n"] >= 100:
            raise ValueError("skip")
        return row

    dropped = []
    with pipeline.stream([{"n": n} for n in range(800)], chunk_size=100, broker=f"local://{tmp_path}") as stream:
        for _ in stream:
            dropped.append(stream.finalize().metrics.dropped_rows)
            time.sleep(0.3)  # the worker runs ahead
    assert dropped == [0] * len(dropped)


@pytest.mark.parametrize("shape", ["partition", "batch"])
def test_a_session_without_money_ends_at_once(tmp_path: Path, shape: str) -> None:
    """Rows that wait for money inside a lot or a batch are given up as those of a flow are."""
    import time

    pipeline = Pipeline(
        "p", source="a", sink="b", budget=Budget("3"), ordering="partition" if shape == "partition" else "key"
    )

    async def handler(row: Any) -> Any:
        return row

    pipeline.add(handler, name="s", price="1", batch=2 if shape == "batch" else None)
    began = time.monotonic()
    pipeline.run([{"n": n} for n in range(20)], broker=f"local://{tmp_path}", session="s")
    assert time.monotonic() - began < 15


def test_what_was_paid_before_the_budget_ended_is_committed(tmp_path: Path) -> None:
    """Lot by lot: the rows of a lot that are through do not run, and are not paid, a second time."""
    calls: list[int] = []

    def pipeline(budget: str) -> Pipeline:
        one = Pipeline("p", source="a", sink="b", ordering="partition", budget=Budget(budget))

        @one.stage(price="1", name="s")
        async def handler(row: dict[str, Any]) -> Any:
            calls.append(row["n"])
            return row

        return one

    rows, options = [{"n": n} for n in range(3_000)], WorkerOptions(drain_timeout=1)
    for budget in ("1000", "9000"):
        pipeline(budget).run(rows, broker=f"local://{tmp_path}", session="s", options=options)
    assert len(calls) == 3_000


def test_a_generator_that_was_not_read_to_its_end_leaves_counts_that_add_up(tmp_path: Path) -> None:
    """A session that ends before its input is published counts what ran, and nothing below 0."""
    import time
    from collections.abc import Iterator

    pipeline = Pipeline("p", source="a", sink="b")

    @pipeline.stage
    def handler(row: dict[str, Any]) -> Any:
        if row["n"] == 5:
            raise StopExecution("enough")
        return row

    def rows() -> Iterator[dict[str, Any]]:
        for n in range(30_000):
            if n == 25_000:
                time.sleep(2)
            yield {"n": n}

    metrics = pipeline.run(rows(), broker=f"local://{tmp_path}").metrics
    assert metrics.total_rows >= metrics.processed_rows > 0
    assert metrics.dropped_rows == 0


def test_a_second_run_over_a_topic_counts_its_own_rows_only(tmp_path: Path, capsys: Any) -> None:
    """`rowmill run` without --input: rows that an earlier run skipped are none of this one's."""
    from rowmill.streams.cli.main import main

    script, rows, broker = tmp_path / "pipe.py", tmp_path / "rows.jsonl", f"local://{tmp_path / 'broker'}"
    script.write_text(
        "from rowmill import Pipeline\n"
        "p = Pipeline('p', source='a', sink='b')\n"
        "@p.stage(on_error='skip')\n"
        "def h(row):\n"
        "    if row['n'] % 2: raise ValueError('odd')\n"
        "    return row\n"
    )
    rows.write_text("\n".join(f'{{"n":{n}}}' for n in range(10)))
    for _ in range(2):
        assert main(["publish", "a", str(rows), "--broker", broker]) == 0
        capsys.readouterr()
        assert main(["run", str(script), "--broker", broker]) == 0
        shown = capsys.readouterr()
        counts = {
            line.rsplit(maxsplit=1)[0].strip(): line.split()[-1]
            for line in (shown.out + shown.err).splitlines()
            if line.startswith("  ") and len(line.split()) > 1
        }
        assert (counts["rows in"], counts["dropped"], counts["skipped"]) == ("10", "0", "5")
