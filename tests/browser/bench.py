"""Workers, commands and a console in processes of their own, for one pipeline on one broker."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rowmill import read
from rowmill.state.codec import loads
from rowmill.streams.errors import TopicError

PIPELINES = Path(__file__).with_name("console_pipelines.py")
PROGRAM = "import sys; sys.argv[0] = 'rowmill'; from rowmill.streams.cli.main import entry; sys.exit(entry())"
ADDRESS = re.compile(r"(http://\S+:\d+)/\n")
LOGIN = re.compile(r"log in\b.*(http://\S+)\n")


class Bench:
    """Processes of one test.

    Args:
        url: the broker's.
        name: the pipeline's.
        folder: where logs go and processes run.
    """

    def __init__(self, url: str, name: str, folder: Path) -> None:
        self.url = url
        self.name = name
        self.folder = folder
        self.fixed = folder / "fixed"
        self.processes: list[subprocess.Popen[bytes]] = []
        self._env = os.environ | {
            "ROWMILL_BROKER": url, "ROWMILL_TEST_NAME": name, "ROWMILL_TEST_FIXED": str(self.fixed)
        }  # fmt: skip
        self._env.pop("ROWMILL_CONSOLE_TOKEN", None)

    def start(self, log: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a command that goes on; what it says goes to a file."""
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *words], env=self._env, cwd=self.folder, stdout=file, stderr=file
            )
        self.processes.append(process)
        return process

    def worker(self, pipeline: str) -> subprocess.Popen[bytes]:
        """Start a worker of one of ``console_pipelines.py``."""
        return self.start("worker.log", "worker", f"{PIPELINES}:{pipeline}", "-v")

    def console(self, *words: str) -> str:
        """Start the console on a free port; its address, without the last slash."""
        process = self.start("console.log", "console", "--port", "0", *words)
        self.until(lambda: ADDRESS.search(self.log("console.log")) or process.poll() is not None)
        found = ADDRESS.search(self.log("console.log"))
        assert found is not None, self.log("console.log")
        return found[1]

    def login_link(self) -> str:
        """What the console of a token showed."""
        self.until(lambda: LOGIN.search(self.log("console.log")))
        found = LOGIN.search(self.log("console.log"))
        assert found is not None
        return found[1]

    def log(self, name: str) -> str:
        """What a process said until now."""
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    def command(self, *words: str, code: int = 0) -> str:
        """Run a command to its end; its standard output."""
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            env=self._env, cwd=self.folder, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def status(self, session: str = "") -> dict[str, Any]:
        """The session, as ``rowmill status --json`` tells it."""
        (found,) = loads(self.command("status", session or self.name, "--json").encode())["sessions"]
        return dict(found)

    def results(self) -> list[int]:
        """The numbers of the rows in the sink."""
        try:
            return sorted(message.row["n"] for message in read(f"{self.name}.out", broker=self.url))
        except TopicError:  # the worker has not made it yet
            return []

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        """Wait for what the processes do."""
        give_up = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < give_up, self.log("worker.log") + self.log("console.log")
            time.sleep(0.05)

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End one in order."""
        process.send_signal(signal.SIGTERM)
        process.wait(60)

    def close(self) -> None:
        """End all that is left."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(30)
