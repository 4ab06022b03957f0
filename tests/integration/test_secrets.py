"""A secret goes in by every door there is, and comes out by none: not in errors, logs, or bug reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.kafka_server import free_port

pytestmark = pytest.mark.timeout(300)

CANARY = "c4nary-s3cret"
MAIN = "import sys\nfrom rowmill.streams.cli.main import main\nsys.exit(main())"
PIPELINE = 'from rowmill import Pipeline\np = Pipeline("p", sink="p.out")\n@p.stage\ndef same(row):\n    return row\n'

COMMANDS = {
    "run": ["run", "p.py"],
    "worker": ["worker", "p.py"],
    "status": ["status"],
    "pause": ["pause", "p"],
    "resume": ["resume", "p"],
    "cancel": ["cancel", "p", "--yes"],
    "replay": ["replay", "p.py", "--to-earliest"],
    "side": ["replay", "p.py", "--side"],
    "diff": ["diff", "p.py", "a", "b"],
    "dlq": ["dlq", "list", "p"],
    "checkpoints": ["checkpoints"],
    "publish": ["publish", "p", "rows.jsonl"],
    "consume": ["consume", "p"],
    "topics": ["topics"],
    "doctor": ["doctor"],
}

WRONG_URLS = [
    f"kafka://alice:{CANARY}@127.0.0.1:1",
    f"kafkas://alice:{CANARY}@127.0.0.1:1",
    f"kafka:/alice:{CANARY}@127.0.0.1:1",
    f"alice:{CANARY}@127.0.0.1:1",
    f"kafka://alice:{CANARY}/x@127.0.0.1:1",
    f"kafka://alice:{CANARY}#x@127.0.0.1:1",
    f"kafka://alice:?{CANARY}@127.0.0.1:1",
    f"kafka://{CANARY}@127.0.0.1:1",
    f"kafka://127.0.0.1:1?password={CANARY}",
    f"kafka://127.0.0.1?password={CANARY}",
    f"http://127.0.0.1?token={CANARY}",
]


def said(words: list[str], folder: Path, seconds: float = 60, **environment: str) -> tuple[int, str]:
    """The exit code, and everything that a command writes."""
    (folder / "p.py").write_text(PIPELINE)
    (folder / "rows.jsonl").write_text('{"n": 1}\n')
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *words],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=seconds, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def check(code: int, text: str) -> None:
    """It failed, it said so in a line of ours, and without the secret."""
    assert CANARY not in text
    assert "Traceback" not in text
    assert code in {1, 2}, text
    assert "rowmill: error: " in text or "✗" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_urls(command: str, tmp_path: Path) -> None:
    """A password in a broker's URL, in the option or the environment, however mangled the URL is."""
    for number, url in enumerate(WRONG_URLS if command == "topics" else WRONG_URLS[number_of(command) :: 5]):
        check(*said([*COMMANDS[command], "-vv", "--broker", url], tmp_path))
        if not number:
            check(*said([*COMMANDS[command], "--log-format", "json"], tmp_path, ROWMILL_BROKER=url))


def number_of(command: str) -> int:
    """Spreads the URLs over the commands."""
    return list(COMMANDS).index(command) % 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_broker_that_is_not_there(command: str, tmp_path: Path) -> None:
    """A password that is where it belongs, all details logged, and nobody who answers."""
    url = f"kafka://127.0.0.1:{free_port()}?sasl=PLAIN&user=alice"
    check(*said([*COMMANDS[command], "-vv", "--broker", url], tmp_path, ROWMILL_KAFKA_PASSWORD=CANARY))


@pytest.mark.parametrize(
    "words",
    [
        ["topics", f"--brokr=kafka://alice:{CANARY}@h:1"],
        ["topics", f"kafka://alice:{CANARY}@h:1"],
        ["topics", "--partitions", f"kafka://alice:{CANARY}@h:1"],
        [f"kafka://alice:{CANARY}@h:1"],
        ["worker", f"https://alice:{CANARY}@h/p.py"],
    ],
)
def test_urls_in_wrong_places(words: list[str], tmp_path: Path) -> None:
    """A URL where none belongs is repeated without its credentials."""
    check(*said(words, tmp_path))


def test_password_files(tmp_path: Path) -> None:
    """One that is no text, is a folder, or cannot be read is named, not shown."""
    broken = tmp_path / "broken"
    broken.write_bytes(CANARY.encode() + b"\xff")
    for path in (broken, tmp_path, tmp_path / "absent"):
        url = f"kafka://127.0.0.1:1?sasl=PLAIN&user=alice&password_file={path}"
        check(*said(["topics", "-vv", "--broker", url], tmp_path))


def test_a_pipeline_that_turns_everything_on(tmp_path: Path) -> None:
    """A pipeline's file that logs everything at DEBUG does not make the Kafka client log the password."""
    (tmp_path / "loud.py").write_text("import logging\nlogging.basicConfig(level=0)\n" + PIPELINE)
    url = f"kafka://127.0.0.1:{free_port()}?sasl=PLAIN&user=alice"
    check(*said(["run", "loud.py", "-vv", "--broker", url], tmp_path, ROWMILL_KAFKA_PASSWORD=CANARY))


def test_json_all_the_way(tmp_path: Path) -> None:
    """With --log-format json every line on standard error is an object: logs, notes and errors."""
    for words in (
        ["--log-format", "json", "-v", "publish", "p", "rows.jsonl"],
        ["run", "p.py", "-vv", "--log-format=json"],
        ["topics", "--log-format", "json", "--broker", "nonsense"],
        ["run", "absent.py", "--log-format", "json"],
    ):
        (tmp_path / "p.py").write_text(PIPELINE)
        (tmp_path / "rows.jsonl").write_text('{"n": 1}\n')
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *words],
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert lines
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
        if done.returncode:
            assert lines[-1]["level"] == "error"
            assert lines[-1]["message"].startswith("rowmill: error: ")


def test_the_client_stays_quiet() -> None:
    """At DEBUG the Kafka client logs requests, with the password: it stays above, whoever turns logging up later."""
    program = (
        "import logging\nfrom rowmill import open_broker\nopen_broker('kafka://h:1')\n"
        "logging.getLogger().setLevel(logging.DEBUG)\n"
        "print(logging.getLogger('aiokafka.conn').isEnabledFor(logging.DEBUG))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "False", done.stderr
