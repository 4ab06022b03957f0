"""Steering sessions from the command line, with workers in processes of their own, on real brokers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rowmill import publish, read
from rowmill.state.codec import loads

ROWMILL = str(Path(sys.executable).with_name("rowmill"))
PIPELINES = Path(__file__).parents[1] / "support" / "pipelines.py"


class Bench:
    """Processes of one test: workers and commands about one pipeline."""

    def __init__(self, url: str, name: str, folder: Path) -> None:
        self.url = url
        self.name = name
        self._folder = folder
        self.calls_file = folder / "calls"
        self._env = os.environ | {
            "ROWMILL_TEST_NAME": name, "ROWMILL_TEST_CALLS": str(self.calls_file), "ROWMILL_BROKER": url
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []

    def worker(self, pipeline: str) -> subprocess.Popen[bytes]:
        """Start a worker."""
        place = f"{PIPELINES}:{pipeline}"
        with (self._folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [ROWMILL, "worker", place, "-v"], env=self._env, cwd=self._folder, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def workers(self, pipeline: str) -> list[subprocess.Popen[bytes]]:
        """As many as the broker has use for: the embedded one takes one of a group."""
        return [self.worker(pipeline) for _ in range(2 if self.url.startswith("kafka") else 1)]

    def command(self, *words: str, code: int = 0) -> str:
        """Run a command; what it wrote to standard output."""
        done = subprocess.run(
            [ROWMILL, *words], env=self._env, cwd=self._folder, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.log}"
        return done.stdout

    @property
    def log(self) -> str:
        return (self._folder / "worker.log").read_text(errors="replace") if self.processes else ""

    def status(self) -> dict[str, Any]:
        """The session, as ``rowmill status --json`` tells it."""
        found = loads(self.command("status", self.name, "--json").encode())
        (session,) = found["sessions"]
        return dict(session)

    def results(self) -> list[int]:
        return sorted(message.row["n"] for message in read(f"{self.name}.out", broker=self.url))

    def calls(self) -> list[int]:
        return [int(line) for line in self.calls_file.read_text().split()] if self.calls_file.exists() else []

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        """Wait for what the processes do."""
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, self.log
            time.sleep(0.1)

    def kill(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait(30)


@pytest.fixture
def bench(broker_url: str, name: str, tmp_path: Path) -> Iterator[Bench]:
    """Ends every process that a test started."""
    bench = Bench(broker_url, name, tmp_path)
    yield bench
    for process in bench.processes:
        if process.poll() is None:
            process.kill()
            process.wait(30)


@pytest.mark.timeout(240)
def test_paused_through_a_change_of_workers(bench: Bench) -> None:
    """Paused, all workers killed, others started: still paused. Then resumed: each row has its result exactly once, and
    no row that was done before the pause is called again."""
    publish(bench.name, [{"n": n} for n in range(60_000)], broker=bench.url)
    first = bench.workers("doubled")
    bench.until(lambda: len(bench.calls()) > 500)
    said = bench.command("pause", bench.name, "--wait", "30", "--json")
    assert loads(said.encode())["wanted"] == "pause"
    calls = bench.calls()
    done = set(calls)  # on Kafka some twice: those in work when the second worker came and took their partition
    assert 0 < len(done) < 60_000
    bench.until(lambda: bench.results() == sorted(done))  # what began was finished; it may show a little later
    assert bench.status()["state"] == "paused"
    bench.kill(first)
    second = bench.workers("doubled")
    bench.until(lambda: any(worker["state"] == "paused" for worker in bench.status()["workers"]))
    time.sleep(1)
    assert bench.calls() == calls
    assert bench.status()["state"] == "paused"
    bench.command("resume", bench.name)
    bench.until(lambda: len(set(bench.calls())) == 60_000)
    for worker in second:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) in {0, 143}, bench.log
    assert bench.results() == list(range(60_000))
    assert done.isdisjoint(bench.calls()[len(calls) :])


@pytest.mark.alone
@pytest.mark.timeout(180)
def test_cancel_amid_slow_rows(bench: Bench) -> None:
    """Cancelled during handlers that take a minute, the worker is gone within two seconds; the next start goes on."""
    publish(bench.name, [{"n": n} for n in range(40)], broker=bench.url)
    worker = bench.worker("minute")
    bench.until(lambda: len(bench.calls()) == 40)
    time.sleep(1)  # the quick ones are committed meanwhile
    bench.command("cancel", bench.name, "--reason", "too slow")
    began = time.monotonic()
    assert worker.wait(20) == 0, bench.log
    assert time.monotonic() - began < 4, "two seconds, and as much again for a machine that is busy"
    assert bench.results() == list(range(20))
    assert bench.status()["state"] == "cancelled"
    again = bench.worker("quick")
    bench.until(lambda: len(bench.calls()) == 60)
    bench.until(lambda: len(bench.results()) == 40)
    assert bench.results() == list(range(40))
    assert bench.status()["state"] == "executing"
    assert sorted(bench.calls())[-20:] == [n for n in range(30, 40) for _ in range(2)]
    again.send_signal(signal.SIGTERM)
    again.wait(60)


def test_illegal_requests(bench: Bench) -> None:
    """What cannot be asked of a session is refused by name, and an unknown session is told as such."""
    publish(bench.name, [{"n": 1}], broker=bench.url)
    worker = bench.worker("doubled")
    bench.until(bench.calls)
    bench.command("resume", bench.name, code=1)
    bench.command("pause", bench.name)
    bench.command("pause", bench.name, code=1)
    bench.command("cancel", bench.name)
    bench.command("pause", bench.name, code=1)
    bench.command("pause", "nobody-knows-this-one", code=2)
    assert worker.wait(30) == 0


@pytest.mark.timeout(120)
def test_a_run_is_cancelled(bench: Bench) -> None:
    """A bounded run that somebody cancels ends with exit code 1 and says how to go on; that finishes it exactly."""
    rows = bench.calls_file.with_name("rows.jsonl")
    rows.write_text("".join(f'{{"n":{n}}}\n' for n in range(30_000)))
    words = ["run", f"{PIPELINES}:doubled", "--input", str(rows), "--session", "once", "--output", "out.jsonl"]
    run = subprocess.Popen(
        [ROWMILL, *words], env=bench._env, cwd=bench._folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    bench.processes.append(run)
    bench.until(lambda: len(bench.calls()) > 1_000)
    bench.command("cancel", f"{bench.name}.once")
    _, said = run.communicate(timeout=30)
    assert run.returncode == 1, said
    assert b"--session once" in said
    bench.command(*words)
    out = (bench._folder / "out.jsonl").read_bytes().splitlines()
    assert [loads(line)["n"] for line in out] == list(range(30_000))


async def test_a_paused_run_waits(bench: Bench) -> None:
    """A bounded run that somebody pauses waits, and ends once it is resumed."""
    rows = bench.calls_file.with_name("rows.jsonl")
    rows.write_text("".join(f'{{"n":{n}}}\n' for n in range(30_000)))
    run = subprocess.Popen(
        [ROWMILL, "run", f"{PIPELINES}:doubled", "--input", str(rows), "--session", "once", "-q"],
        env=bench._env, cwd=bench._folder,
    )  # fmt: skip
    bench.processes.append(run)
    await asyncio.to_thread(bench.until, lambda: len(bench.calls()) > 500)
    bench.command("pause", f"{bench.name}.once", "--wait", "30")
    calls = len(bench.calls())
    await asyncio.sleep(1)
    assert (len(bench.calls()), run.poll()) == (calls, None)
    bench.command("resume", f"{bench.name}.once")
    assert await asyncio.to_thread(run.wait, 60) == 0
    assert sorted(bench.calls()) == list(range(30_000))
