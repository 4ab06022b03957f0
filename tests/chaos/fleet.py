"""The worker processes of a run: started, armed with failpoints, killed, stopped, and replaced when they die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import TESTS
from .calls import read_log

STOP_SECONDS = 20.0
"""How long an orderly stop is waited for: the worker's drain timeout and as much for goodbyes."""


STARTING_SECONDS = 3.0
"""Until when a worker may not have its signal handlers yet."""


@dataclass
class Settings:
    """What every worker of a run is told."""

    name: str
    bootstrap: str
    folder: Path
    session_timeout: float
    concurrency: int
    max_deaths: int
    package: str | None = None

    @property
    def state_dir(self) -> Path:
        """Where the workers keep their tables, each in a part of its own."""
        return self.folder / "state"


@dataclass
class Process:
    """One worker process, alive or dead."""

    number: int
    popen: subprocess.Popen[bytes]
    calls: Path
    errors: Path
    began: float = field(default_factory=time.monotonic)
    told_to_stop: float | None = None
    killed_by_us: bool = False
    ended: float | None = None
    resumed: list[float] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        """Whether it runs, or stands still."""
        return self.popen.returncode is None

    @property
    def stands_still(self) -> bool:
        """Whether it is stopped by SIGSTOP."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.popen.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        return False

    @property
    def struck(self) -> bool:
        """Whether its own failpoint killed it."""
        return self.popen.returncode == -signal.SIGKILL and not self.killed_by_us

    @property
    def gave_up(self) -> bool:
        """Whether it ended by itself, neither killed nor asked to."""
        return not self.alive and not self.struck and not self.killed_by_us and self.told_to_stop is None

    @property
    def ended_well(self) -> bool:
        """Whether its exit code is fit for an orderly stop; SIGTERM ends one that has hardly begun at once."""
        hardly_begun = self.told_to_stop is not None and self.told_to_stop - self.began < STARTING_SECONDS
        return self.popen.returncode in {0, -signal.SIGKILL} or (
            hardly_begun and self.popen.returncode == -signal.SIGTERM
        )

    def last_words(self) -> str:
        """The end of its log."""
        lines = self.errors.read_text(errors="replace").splitlines()
        return lines[-1] if lines else ""


class Fleet:
    """Keeps ``wanted`` workers alive, as a supervisor would; processes that stand still count as alive."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.wanted = 0
        self.processes: list[Process] = []
        self.arm: Callable[[], str] = str
        self.on_strike: Callable[[float], object] = float
        self._keeping: asyncio.Task[None] | None = None

    @property
    def alive(self) -> list[Process]:
        """Processes that are there, in the order of their start."""
        return [process for process in self.processes if process.alive]

    def start(self, count: int) -> None:
        """Start so many, and keep them."""
        self.wanted = count
        while len(self.alive) < count:
            self.spawn()
        self._keeping = asyncio.create_task(self._keep())

    def spawn(self, failpoint: str | None = None) -> Process:
        """One more process."""
        number = len(self.processes)
        calls, errors = (self.settings.folder / f"worker-{number:03}.{kind}" for kind in ("calls", "log"))
        options = {
            "--broker": self.settings.bootstrap,
            "--session-timeout": str(self.settings.session_timeout),
            "--state-dir": str(self.settings.state_dir),
            "--max-deaths": str(self.settings.max_deaths),
            "--failpoint": self.arm() if failpoint is None else failpoint,
            "--parent": str(os.getpid()),
        }
        command = [sys.executable, "-m", "chaos.worker", *(word for option in options.items() for word in option)]
        paths = [self.settings.package, str(TESTS), os.environ.get("PYTHONPATH")]
        environment = os.environ | {
            "PYTHONPATH": ":".join(path for path in paths if path),
            "CHAOS_NAME": self.settings.name,
            "CHAOS_CALLS": str(calls),
            "CHAOS_CONCURRENCY": str(self.settings.concurrency),
        }
        with errors.open("ab") as log:
            popen = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        process = Process(number, popen, calls, errors)
        self.processes.append(process)
        return process

    async def _keep(self) -> None:
        while True:
            self._reap()
            while len(self.alive) < self.wanted:
                self.spawn()
            await asyncio.sleep(0.03)

    def _reap(self) -> None:
        for process in self.processes:
            if process.ended is None and process.popen.poll() is not None:
                process.ended = time.monotonic()
                if process.struck:
                    self.on_strike(max((line.at for line in read_log(process.calls) if line.kind == "K"), default=0.0))

    def kill(self, process: Process) -> float:
        """SIGKILL; returns when."""
        process.killed_by_us = True
        process.popen.kill()
        at = time.monotonic()
        process.popen.wait(10)
        return at

    def suspend(self, process: Process) -> float:
        """SIGSTOP; returns when."""
        process.popen.send_signal(signal.SIGSTOP)
        return time.monotonic()

    def resume(self, process: Process) -> float:
        """SIGCONT; returns when."""
        process.resumed.append(time.monotonic())  # before: it may run before we do
        process.popen.send_signal(signal.SIGCONT)
        return process.resumed[-1]

    def ask_to_stop(self, process: Process) -> None:
        """SIGTERM."""
        process.told_to_stop = process.told_to_stop or time.monotonic()
        process.popen.send_signal(signal.SIGTERM)

    async def stop(self) -> None:
        """End all in an orderly way, and by force what does not end in time."""
        self.wanted = 0
        for process in self.alive:
            if process.told_to_stop is None:  # a second signal would end it at once
                self.ask_to_stop(process)
        give_up = time.monotonic() + STOP_SECONDS
        while self.alive and time.monotonic() < give_up:
            self._reap()
            await asyncio.sleep(0.03)
        self.close()

    def close(self) -> None:
        """No process of ours stays."""
        if self._keeping is not None:
            self._keeping.cancel()
        for process in self.alive:
            self.kill(process)
        self._reap()
