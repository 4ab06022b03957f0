"""The command line as processes: signals, pipes, terminals, and Apache Kafka."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rowmill import publish

ROWMILL = str(Path(sys.executable).with_name("rowmill"))
DEADLINE = 60

PIPELINE = """
import time
from rowmill import Pipeline

p = Pipeline("NAME", source="NAME.in", sink="NAME.out")

@p.stage
def work(row):
    time.sleep(PAUSE)
    with open("ran.txt", "a") as file:
        file.write(f"{row['n']}\\n")
    return {"n": row["n"], "square": row["n"] ** 2}
"""


@pytest.fixture
def name() -> str:
    """A pipeline name that no other test uses, for the Kafka that the session shares."""
    return f"cli-{uuid.uuid4().hex[:8]}"


@pytest.fixture(params=["local", "kafka"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Both kinds of broker."""
    return f"kafka://{request.getfixturevalue('kafka')}" if request.param == "kafka" else f"local://{tmp_path}/broker"


def write_job(folder: Path, name: str, rows: int = 0, pause: float = 0.0) -> None:
    """``job.py`` with a pipeline whose handler leaves a line for each row it sees, and ``in.csv``."""
    (folder / "job.py").write_text(PIPELINE.replace("NAME", name).replace("PAUSE", str(pause)))
    (folder / "in.csv").write_text("n\n" + "".join(f"{n}\n" for n in range(rows)))


def environment() -> dict[str, str]:
    """Ours without what would change the command's choices."""
    return {key: value for key, value in os.environ.items() if key not in {"ROWMILL_BROKER", "COLUMNS"}}


def run(folder: Path, *words: str, timeout: float = DEADLINE) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    return subprocess.run(
        [ROWMILL, *words], cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


@contextmanager
def started(folder: Path, *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command that runs meanwhile, and surely no longer than the block."""
    pipes: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    } | options
    process = subprocess.Popen([ROWMILL, *words], cwd=folder, env=environment(), text=True, **pipes)
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()
    finally:
        process.wait(DEADLINE)


def until(true: Callable[[], bool], what: str) -> None:
    """Wait for something, with a deadline."""
    give_up = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < give_up, f"no {what} within {DEADLINE} s"
        time.sleep(0.02)


def ran(folder: Path) -> list[int]:
    """The rows the handler saw, in the order it saw them."""
    path = folder / "ran.txt"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def results(path: Path) -> list[dict[str, int]]:
    """A file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def squares(rows: int) -> list[dict[str, int]]:
    """What the pipeline makes of ``in.csv``."""
    return [{"n": n, "square": n * n} for n in range(rows)]


# --- run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, name: str, number: int, code: int) -> None:
    """A signal midway ends a run in order: the same session then does the rest, and no row runs twice."""
    rows = 20_000
    write_job(tmp_path, name, rows, pause=0.0002)
    words = ("run", "job.py", "--input", "in.csv", "--output", "out.jsonl", "--session", "s1")
    with started(tmp_path, *words, "--json") as process:
        until(lambda: len(ran(tmp_path)) > 100, "first rows")
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == code
    assert "stopping" in err
    assert "To go on:\n  rowmill run job.py --input in.csv --output out.jsonl --session s1 --json" in err
    stopped = json.loads(out)
    assert stopped["status"] == "interrupted"
    assert 100 < stopped["rows_here"] < rows
    assert not (tmp_path / "out.jsonl").exists()

    again = run(tmp_path, *words)
    assert (again.returncode, again.stdout) == (0, "")
    assert f"{stopped['rows_here']:,} had been done before" in again.stderr
    assert results(tmp_path / "out.jsonl") == squares(rows)
    assert sorted(ran(tmp_path)) == list(range(rows))


def test_a_second_signal_ends_at_once_even_when_a_handler_blocks(tmp_path: Path, name: str) -> None:
    """An async handler that blocks the event loop cannot hold up a second Ctrl-C."""
    write_job(tmp_path, name, 10, pause=50)
    text = (tmp_path / "job.py").read_text().replace("def work", "async def work")
    (tmp_path / "job.py").write_text(text.replace("time.sleep", "open('ran.txt', 'w').write('0\\n') and time.sleep"))
    with started(tmp_path, "run", "job.py", "--input", "in.csv") as process:
        until(lambda: bool(ran(tmp_path)), "first row")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)  # the handler blocks for much longer
    assert process.returncode == 130
    assert "stopping" in err
    assert "Traceback" not in err


def test_no_progress_bar_in_a_pipe(tmp_path: Path, name: str) -> None:
    """In a pipe there is neither a bar nor anything else that moves the cursor."""
    write_job(tmp_path, name, 500, pause=0.001)
    done = run(tmp_path, "run", "job.py", "--input", "in.csv", "--output", "-")
    assert done.returncode == 0
    assert "\r" not in done.stderr
    assert "%|" not in done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == squares(500)


@pytest.mark.parametrize("option", [None, "--no-progress", "--quiet"])
def test_a_progress_bar_on_a_terminal(tmp_path: Path, name: str, option: str | None) -> None:
    """On a terminal there is a bar, unless it is not wanted."""
    write_job(tmp_path, name, 500, pause=0.002)
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    try:
        with started(
            tmp_path, "run", "job.py", "--input", "in.csv", *([option] if option else []), stderr=theirs
        ) as process:
            os.close(theirs)
            shown = _read_terminal(ours)
            assert process.wait(DEADLINE) == 0
    finally:
        os.close(ours)
    assert ("%|" in shown) == (option is None)


def _read_terminal(descriptor: int) -> str:
    """All that is shown until the process closes its side."""
    shown = b""
    while select.select([descriptor], [], [], DEADLINE)[0]:
        try:
            shown += os.read(descriptor, 65_536)
        except OSError:  # Linux: EIO once nobody holds the other side
            return shown.decode()
    raise AssertionError(f"still running after {DEADLINE} s: {shown!r}")


def test_a_run_on_kafka(tmp_path: Path, name: str, kafka: str) -> None:
    """A file through Apache Kafka: results exact, topics named, and consume shows them."""
    write_job(tmp_path, name, 2_000)
    url = f"kafka://{kafka}"
    words = ("run", "job.py", "--input", "in.csv", "--output", "out.jsonl", "--session", "s1", "--broker", url)
    done = run(tmp_path, *words, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["results"], summary["dead_letters"]) == (2_000, 2_000, 0)
    assert results(tmp_path / "out.jsonl") == squares(2_000)
    seen = run(tmp_path, "consume", summary["topics"]["sink"], "--broker", url)
    assert sorted(json.loads(line)["n"] for line in seen.stdout.splitlines()) == list(range(2_000))
    listed = run(tmp_path, "topics", "--broker", url)
    assert summary["topics"]["sink"] in listed.stdout
    assert "records: at most" in listed.stderr
    checked = run(tmp_path, "doctor", "--write", "--broker", url)
    assert checked.returncode == 0, checked.stdout


# --- worker ----------------------------------------------------------------------------------------------------


def test_a_worker_serves_until_sigterm(tmp_path: Path, name: str, broker: str) -> None:
    """A worker takes plain rows as they come; SIGTERM lets it finish, commit and report, with exit code 0."""
    write_job(tmp_path, name)
    publish(f"{name}.in", ({"n": n} for n in range(100)), broker=broker, key="n")
    for topic in (f"{name}.out", f"{name}.dlq"):
        assert run(tmp_path, "topics", "--create", topic, "--broker", broker).returncode == 0
    with started(tmp_path, "worker", "job.py", "--broker", broker) as process:
        with started(tmp_path, "consume", f"{name}.out", "--follow", "--limit", "200", "--broker", broker) as reader:
            until(lambda: len(ran(tmp_path)) == 100, "rows from before the start")
            publish(f"{name}.in", ({"n": n} for n in range(100, 200)), broker=broker, key="n")
            out, _ = reader.communicate(timeout=DEADLINE)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert sorted((json.loads(line) for line in out.splitlines()), key=lambda row: row["n"]) == squares(200)
    assert f"worker of group rowmill.{name}: {name}.in -> {name}.out on {broker}\n" in err
    assert "stopped: 200 rows in, 200 results out, 0 dropped, 0 dead letters, in " in err
    assert len(err.splitlines()) == 4  # start, an empty line, stopping, stopped


def test_one_worker_at_a_time_on_the_embedded_broker(tmp_path: Path, name: str) -> None:
    """A second worker of a session is refused with the reason and exit code 1, and the first one goes on."""
    write_job(tmp_path, name)
    publish(f"{name}.in", [{"n": 1}], broker=f"local://{tmp_path}/.rowmill")
    with started(tmp_path, "worker", "job.py") as process:
        until(lambda: bool(ran(tmp_path)), "first row")
        second = run(tmp_path, "worker", "job.py")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
    assert second.returncode == 1
    assert "rowmill: error: " in second.stderr
    assert f"rowmill.{name}" in second.stderr


def test_an_unreachable_broker_is_said_within_ten_seconds(tmp_path: Path, name: str) -> None:
    """Nothing listens: every command that needs the broker says so, clearly and soon, with exit code 1."""
    write_job(tmp_path, name, 10)
    for words in (["worker", "job.py"], ["run", "job.py", "--input", "in.csv"], ["consume", "t"], ["topics"]):
        done = run(tmp_path, *words, "--broker", "kafka://127.0.0.1:1", timeout=10)
        assert done.returncode == 1
        assert "rowmill: error: kafka://127.0.0.1:1: no broker answers" in done.stderr
        assert "Traceback" not in done.stderr
        assert "aiokafka" not in done.stderr


# --- publish and consume ---------------------------------------------------------------------------------------


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    """``rowmill consume t | head -1`` ends quietly with exit code 0."""
    publish("t", ({"n": n, "text": "x" * 50} for n in range(20_000)), broker=f"local://{tmp_path}/.rowmill")
    with started(tmp_path, "consume", "t") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["text"]
        process.stdout.close()
        assert process.wait(DEADLINE) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_closed_standard_output_and_error(tmp_path: Path, name: str) -> None:
    """Where a daemon has closed both, commands do their work all the same: what they would say goes nowhere."""
    write_job(tmp_path, name, 3)
    closed = ["sh", "-c", '"$0" "$@" >&- 2>&-', ROWMILL]
    words = (["run", "job.py", "--input", "in.csv", "--output", "out.jsonl", "--session", "s"], ["topics"])
    for command in (*words, ["consume", f"{name}.out.s"]):
        done = subprocess.run([*closed, *command], cwd=tmp_path, env=environment(), timeout=DEADLINE, check=False)
        assert done.returncode == 0, command
    assert results(tmp_path / "out.jsonl") == squares(3)


def test_following_shows_rows_as_they_come_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    """--follow shows a new row at once, waits for more, and Ctrl-C ends it with 130 and without a traceback."""
    broker = f"local://{tmp_path}/.rowmill"
    publish("t", [{"n": 1}], broker=broker)
    with started(tmp_path, "consume", "t", "--follow") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == '{"n":1}\n'
        publish("t", [{"n": 2}], broker=broker)
        assert process.stdout.readline() == '{"n":2}\n'
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert err == "rowmill: interrupted\n"


def test_publishing_from_a_terminal_ends_on_ctrl_c(tmp_path: Path) -> None:
    """Ctrl-C ends a publish that waits for standard input, instead of waiting for its end."""
    with started(tmp_path, "publish", "t", "-", stdin=subprocess.PIPE) as process:
        until((tmp_path / ".rowmill").exists, "broker folder")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 130
        assert process.stderr is not None
        assert "interrupted" in process.stderr.read()


def test_start_up_time(tmp_path: Path) -> None:
    """``rowmill --help`` takes less than a quarter of a second of a processor's time (the best of five)."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(tmp_path, "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    print(f"{min(times):.3f} to {max(times):.3f} s")
    assert min(times) < 0.25
