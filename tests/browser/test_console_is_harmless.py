"""Workers do not notice what becomes of the console: it is killed, its disk is full, it is started again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rowmill import publish
from rowmill.state.codec import loads

from .bench import ADDRESS, PROGRAM, Bench

pytestmark = pytest.mark.timeout(240)

ROWS = 4_000
FULL = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, 16_384)); {PROGRAM}"
"""No file may grow beyond this: to whoever writes, the disk is full."""


@pytest.fixture
def bench(broker_url: str, name: str, tmp_path: Path) -> Iterator[Bench]:
    """Ends every process that a test started."""
    bench = Bench(broker_url, name, tmp_path)
    yield bench
    bench.close()


def get(url: str) -> dict[str, Any]:
    """An answer of the API."""
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - the URL is ours
        found: dict[str, Any] = loads(answer.read())
        return found


def done(bench: Bench, console: str) -> int:
    """How many rows the session has done, as the console tells it."""
    for session in get(f"{console}/api/v1/overview")["sessions"]:
        if session["pipeline"] == bench.name:
            return int(session["rows"])
    return 0


def check(bench: Bench, worker: subprocess.Popen[bytes]) -> None:
    """Every row has one result, and the worker complained of nothing."""
    bench.until(lambda: len(bench.results()) >= ROWS, 120)
    bench.stop(worker)
    assert worker.returncode == 0
    assert bench.results() == list(range(ROWS))
    assert not re.search(r"(WARNING|ERROR)\s+rowmill|Traceback", bench.log("worker.log")), bench.log("worker.log")


def test_a_console_that_is_killed(bench: Bench) -> None:
    """A console is killed three times while a worker works: the worker goes on, and so does the next console's past."""
    publish(bench.name, [{"n": n} for n in range(ROWS)], broker=bench.url)
    worker = bench.worker("steady")
    seen = 0
    for _ in range(3):
        console = bench.console()
        bench.until(lambda console=console, seen=seen: done(bench, console) > seen)  # type: ignore[misc]
        seen = done(bench, console)
        bench.processes[-1].kill()
        bench.processes[-1].wait(30)
        (bench.folder / "console.log").unlink()
    check(bench, worker)


def test_a_console_whose_disk_is_full(bench: Bench) -> None:
    """A console that can write to no file serves what it sees and says what it cannot do; the worker works on."""
    publish(bench.name, [{"n": n} for n in range(ROWS)], broker=bench.url)
    worker = bench.worker("steady")
    bench.until(bench.results)
    log = bench.folder / "full.log"
    with log.open("ab") as file:
        bench.processes.append(
            subprocess.Popen(
                [sys.executable, "-c", FULL, "console", "--broker", bench.url, "--port", "0"],
                cwd=bench.folder, stdout=file, stderr=file, env={**os.environ, "ROWMILL_CONSOLE_TOKEN": ""},
            )
        )  # fmt: skip
    bench.until(lambda: ADDRESS.search(bench.log("full.log")) or bench.processes[-1].poll() is not None)
    found = ADDRESS.search(bench.log("full.log"))
    assert found is not None, bench.log("full.log")
    bench.until(lambda: done(bench, found[1]) == ROWS, 120)
    assert "Traceback" not in bench.log("full.log")
    check(bench, worker)
