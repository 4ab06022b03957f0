"""The end of a process that has threads left."""

from __future__ import annotations

import subprocess
import sys

ENDS = "\nleave_threads_behind(3)\nsys.exit(3)\n"


def test_atexit_runs_beside_an_idle_pool() -> None:
    """Idle threads that Python itself ends are no reason to end at once: what is registered with atexit runs."""
    begins = (
        "import atexit, sys\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from rowmill.streams.cli import signals\n"
        "from rowmill.streams.cli.signals import leave_threads_behind\n"
        "signals._THREAD_SECONDS = 15.0\n"  # the machine may stand still for longer than a second
        "pool = ThreadPoolExecutor(2)\n"
        "pool.submit(int).result()\n"
        "atexit.register(print, 'all is flushed')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", begins + ENDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "all is flushed\n", "")


def test_a_thread_that_hangs_is_left_behind() -> None:
    """A thread that does not end keeps the process for seconds only; what was printed is not lost."""
    begins = (
        "import sys, threading\n"
        "from rowmill.streams.cli.signals import leave_threads_behind\n"
        "threading.Thread(target=threading.Event().wait, args=(600,)).start()\n"
        "print('last words')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", begins + ENDS], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "last words\n", "")
