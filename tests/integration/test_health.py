"""The health endpoint of a real worker, in a process of its own where signals and exit codes matter."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rowmill import Pipeline, Worker, open_broker, publish
from rowmill.state.clock import SystemClock
from rowmill.streams.health import HealthServer

from .test_worker import running, until

pytestmark = pytest.mark.timeout(120)

MAIN = "import sys\nfrom rowmill.streams.cli.main import main\nsys.exit(main())"
SLOW = """
import asyncio, os
from rowmill import Pipeline
p = Pipeline(os.environ["ROWMILL_TEST_NAME"], sink=os.environ["ROWMILL_TEST_NAME"] + ".out")
@p.stage(concurrency=10)
async def wait(row):
    await asyncio.sleep(row["seconds"])
    return row
"""


def get(url: str, path: str) -> tuple[int, bytes]:
    """Status and body."""
    try:
        with urllib.request.urlopen(url + path, timeout=20) as answer:  # noqa: S310 - the URL is ours
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


async def ask(url: str, path: str) -> tuple[int, Any]:
    """Status and JSON."""
    status, body = await asyncio.to_thread(get, url, path)
    return status, json.loads(body)


async def figures(url: str) -> dict[str, float]:
    """The page of metrics: values by name, summed over labels."""
    status, body = await asyncio.to_thread(get, url, "/metrics")
    assert status == 200
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def pipeline_of(name: str) -> Pipeline:
    """An awaited stage with a policy; row 7 fails."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out")

    @pipeline.stage(concurrency=4, timeout=10)
    async def score(row: dict[str, Any]) -> dict[str, Any]:
        if row["n"] == 7:
            raise ValueError("seven")
        return row

    return pipeline


async def test_a_worker_from_start_to_stop(broker_url: str, name: str) -> None:
    """Not ready before it works, ready while it does or is paused, live until it has ended; figures are exact."""
    await asyncio.to_thread(publish, name, [{"n": n} for n in range(20)], broker=broker_url)
    broker = open_broker(broker_url, environment={})
    await broker.start()
    worker = Worker(pipeline_of(name), broker)
    server = HealthServer(worker, "0", clock=SystemClock())
    url = await server.start()
    try:
        assert (await ask(url, "/live"))[0] == 200
        status, answer = await ask(url, "/ready")
        assert (status, answer["reasons"]) == (503, ["it has not joined its group yet"])
        work = asyncio.create_task(worker.run())
        await until(lambda: worker.stats.rows >= 20)
        assert (await ask(url, "/ready"))[0] == 200
        found = await figures(url)
        assert found["rowmill_rows_total"] == found["rowmill_partition_committed_offset"] == 20
        assert (found["rowmill_results_total"], found["rowmill_dead_letters_total"]) == (19, 1)
        assert found["rowmill_in_flight_rows"] == 0
        assert found["rowmill_partitions"] == found["rowmill_partition_state"] > 1
        worker.pause()
        await until(lambda: worker.state == "paused")
        assert (await ask(url, "/ready"))[0] == (await ask(url, "/live"))[0] == 200
        worker.unpause()
        worker.stop()
        await work
        assert (await ask(url, "/ready"))[0] == (await ask(url, "/live"))[0] == 503
    finally:
        await server.close()
        await broker.close()


async def test_two_workers_in_one_process(tmp_path: Path, name: str) -> None:
    """Each has a page of its own."""
    first, second = f"{name}-a", f"{name}-b"
    for number, topic in enumerate((first, second), 1):
        url = f"local://{tmp_path / topic}"
        await asyncio.to_thread(publish, topic, [{"n": n} for n in range(number * 5)], broker=url)
    async with (
        running(f"local://{tmp_path / first}", pipeline_of(first)) as one,
        running(f"local://{tmp_path / second}", pipeline_of(second)) as two,
    ):
        servers = [HealthServer(worker, "0", clock=SystemClock()) for worker in (one, two)]
        urls = [await server.start() for server in servers]
        await until(lambda: one.stats.rows == 5 and two.stats.rows == 10)
        assert [(await figures(url))["rowmill_rows_total"] for url in urls] == [5, 10]
        for server in servers:
            await server.close()


async def test_scrapes_under_load(tmp_path: Path, name: str) -> None:
    """A thousand scrapes while rows flow: all are answered, and every row is there."""
    url = f"local://{tmp_path / 'broker'}"
    await asyncio.to_thread(publish, name, [{"n": n + 10} for n in range(3_000)], broker=url)
    async with running(url, pipeline_of(name)) as worker:
        server = HealthServer(worker, "0", clock=SystemClock())
        where = await server.start()
        for _ in range(100):
            answers = await asyncio.gather(*(asyncio.to_thread(get, where, "/metrics") for _ in range(10)))
            assert {status for status, _ in answers} == {200}
        await until(lambda: worker.stats.rows >= 3_000)
        assert worker.stats.results == 3_000
        await server.close()


# --- processes --------------------------------------------------------------------------------------------------


class Process:
    """``rowmill worker`` with what it said."""

    def __init__(self, folder: Path, name: str, *options: str) -> None:
        (folder / "p.py").write_text(SLOW)
        self.said = ""
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "worker", "p.py", "--http", "0", *options],
            cwd=folder,
            env={**os.environ, "ROWMILL_TEST_NAME": name},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.said += line
                self._changed.notify_all()

    def until(self, pattern: str) -> re.Match[str]:
        """Wait for something to be said."""
        with self._changed:
            assert self._changed.wait_for(lambda: re.search(pattern, self.said), 30), self.said
            found = re.search(pattern, self.said)
        assert found is not None
        return found

    def end(self) -> int:
        """The exit code."""
        code = self.process.wait(40)
        self._reading.join(10)
        return code


@contextmanager
def worker_process(folder: Path, name: str, *options: str) -> Iterator[Process]:
    """A worker that is gone afterwards, whatever happens."""
    worker = Process(folder, name, *options)
    try:
        yield worker
    finally:
        if worker.process.poll() is None:
            worker.process.kill()
        worker.end()
        if worker.process.stderr is not None:
            worker.process.stderr.close()


async def in_work(url: str) -> None:
    """Until a row is in work."""
    async with asyncio.timeout(30):
        while not (await figures(url))["rowmill_in_flight_rows"]:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("signals", "code"),
    [([signal.SIGTERM], 0), ([signal.SIGINT], 0), ([signal.SIGTERM] * 2, 143), ([signal.SIGINT] * 2, 130)],
)
async def test_signals(tmp_path: Path, name: str, signals: list[signal.Signals], code: int) -> None:
    """One signal drains: not ready, live, rows in work finish, exit code 0. The second one ends it at once."""
    url = f"local://{tmp_path / '.rowmill'}"
    await asyncio.to_thread(publish, name, [{"seconds": 3}], broker=url)
    with worker_process(tmp_path, name) as worker:
        where = (await asyncio.to_thread(worker.until, r"http://\S+"))[0]
        await in_work(where)
        worker.process.send_signal(signals[0])
        await asyncio.to_thread(worker.until, "stopping")
        async with asyncio.timeout(10):
            while (await ask(where, "/ready"))[0] != 503:
                await asyncio.sleep(0.02)
        assert (await ask(where, "/live"))[0] == 200
        for number in signals[1:]:
            worker.process.send_signal(number)
        assert await asyncio.to_thread(worker.end) == code
        assert ("stopped: 1 row in" in worker.said) == (code == 0)


async def test_a_port_that_is_taken(tmp_path: Path, name: str) -> None:
    """The second worker says so, and exits with 2 before it does any work."""
    with worker_process(tmp_path, name) as first:
        port = (await asyncio.to_thread(first.until, r"http://127\.0\.0\.1:(\d+)"))[1]
        (tmp_path / "other").mkdir()
        with worker_process(tmp_path / "other", f"{name}-2", "--http", port) as second:
            assert await asyncio.to_thread(second.end) == 2
            assert "another process listens there" in second.said
