"""The pool of processes: results, contexts, exceptions, calls that overrun, crash or are cancelled, and the end."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rowmill.handlers.chain import Chain
from rowmill.handlers.context import RowContext
from rowmill.handlers.errors import HandlerTimeoutError, MisfitError, ProcessDiedError
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.process_child import MAIN_ALIAS
from rowmill.handlers.processes import HandlerReference, ProcessHandler, ProcessPool, name_handler
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import Stage, make_stage
from rowmill.state.errors import BadRowError, ConfigError

pytestmark = pytest.mark.timeout(60)

HANDLERS = """
import asyncio, os, signal, subprocess, sys, threading, time
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

import neighbour

MAIN_GUARD = __name__ == "__main__"


class Slow(TimeoutError):
    def __init__(self, what, retry_after):
        super().__init__(f"{what} is slow")
        self.retry_after = retry_after
        self.kind = "slow"
        self.response = object()


@dataclass
class Point:
    x: int = 1


class Kit:
    @staticmethod
    def double(row):
        return {"n": row["n"] * 2}

    @classmethod
    def named(cls, row):
        return {"kit": cls.__name__}

    def method(self, row):
        return row


def echo(row):
    return row


def pid(row):
    return {"pid": os.getpid(), "cwd": os.getcwd(), "argv": sys.argv, "path": sys.path, "module": __name__}


def result(row):
    return {"none": None, "many": [{"a": 1}, {"a": 2}], "tuple": ({"a": 1},), "date": {"at": datetime(2026, 1, 31)},
            "point": Point(), "text": "text", "points": [Point()], "set": {"s": {1}}, "number": 3}[row["give"]]


def fail(row):
    what = row["what"]
    if what == "slow":
        raise Slow("it", 2.5)
    if what == "local":
        class Own(KeyError):
            pass
        raise Own("mine")
    if what == "unicode":
        b"\\xff".decode("utf-8")
    if what == "group":
        raise ExceptionGroup("several", [ValueError("one")])
    if what == "silent":
        raise ValueError
    if what == "surrogate":
        raise ValueError("\\ud800")
    if what == "mute":
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("no")
        raise Mute
    raise {"exit": SystemExit(2), "stop": StopIteration("s"), "cancelled": asyncio.CancelledError("c"),
           "interrupt": KeyboardInterrupt("k"), "memory": MemoryError("m")}[what]  # THE LINE


def die(row):
    if "signal" in row:
        os.kill(os.getpid(), row["signal"])
    os._exit(row["code"])


def nap(row):
    time.sleep(row["seconds"])
    return {"pid": os.getpid()}


def noisy(row):
    print("on stdout")
    print("on stderr", file=sys.stderr)
    os.write(1, b"raw\\n")
    subprocess.run(["echo", "from a child"], check=True)
    return {"stdin": sys.stdin.read()}


def deaf(row):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return {"alive": True}


def batch(rows):
    return [{"n": row["n"] + 1} for row in rows]


def frame(frame):
    frame["twice"] = frame["n"] * 2
    return frame[frame["n"] != 1]


def lost_index(frame):
    return frame.reset_index(drop=True)


def told(row, ctx):
    return {"topic": ctx.topic, "partition": ctx.partition, "offset": ctx.offset, "timestamp": ctx.timestamp,
            "key": ctx.key if isinstance(ctx.key, str | None) else list(ctx.key), "session": ctx.session,
            "headers": [[name, None if value is None else list(value)] for name, value in ctx.headers]}


def acts(row, ctx):
    ctx.add_cost(Decimal("0.1000000000000000000000000000000000001"), 7)
    ctx.emit("side", {"n": 1}, key=b"\\xff", headers={"h": b"\\xfe"})
    ctx.key, ctx.timestamp, ctx.headers = "new", 99, {"a": "b"}
    if row.get("fail"):
        raise ValueError("after all")
    return row


def uses_table(row, ctx):
    return ctx.table("t").get("k")


def uses_runtime(row, ctx):
    return {"r": repr(ctx.runtime)}


def emits_nonsense(row, ctx):
    ctx.emit("side", {"n": object()})
    return row


def batch_acts(rows, contexts):
    for row, ctx in zip(rows, contexts):
        if row["n"]:
            ctx.key = f"k{row['n']}"
    return rows


def lets_go(row):
    os.closerange(3, 100)
    time.sleep(30)


def starts_another(row):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    open(row["file"], "w").write(str(child.pid))
    child.wait()


async def waits(row):
    return row


nameless = lambda row: row
kit = Kit()


def maker():
    def inner(row):
        return row
    return inner


made = maker()


def wrapped_twice(row):
    return row


raw = wrapped_twice
wrapped_twice = Kit.double
"""


def load(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module loaded by its path as the command line loads one: its folder is first on the path, then last."""
    file = folder / f"{name}.py"
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(folder))
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def handlers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A pipeline file's handlers, beside a neighbour that they import."""
    (tmp_path / "neighbour.py").write_text("WORD = 'here'\n", encoding="utf-8")
    yield load(tmp_path, "handlers_of_a_test", HANDLERS, monkeypatch)
    sys.modules.pop("neighbour", None)


@pytest.fixture
async def pool() -> AsyncIterator[ProcessPool]:
    """A pool of two."""
    pool = ProcessPool(2)
    yield pool
    await pool.close()


def context(**changes: Any) -> RowContext:
    """A row's context."""
    given: dict[str, Any] = {"key": "k", "headers": (("h", b"\xff"), ("n", None))}
    given |= changes
    return RowContext("t", 1, 2, 3, given["key"], given["headers"], "session")


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be collected does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    for _ in range(500):
        if not is_alive(pid):
            return True
        time.sleep(0.01)
    return False


# --- results -----------------------------------------------------------------------------------------------------


async def test_results_come_from_another_process(pool: ProcessPool, handlers: ModuleType, tmp_path: Path) -> None:
    """A call runs elsewhere, in a process that is kept, with our folder, arguments, path and module name."""
    reference = name_handler(handlers.pid)
    told = [await pool.run(reference, {}) for _ in range(3)]
    assert told[0] == told[1] == told[2]
    assert told[0]["pid"] != os.getpid()
    assert told[0]["cwd"] == str(Path.cwd())
    assert told[0]["argv"] == sys.argv
    assert told[0]["module"] == "handlers_of_a_test"
    assert [str(Path(entry).absolute()) for entry in sys.path] == told[0]["path"]
    assert pool.started == 1


@pytest.mark.parametrize(
    ("give", "expected"),
    [
        ("none", None),
        ("many", [{"a": 1}, {"a": 2}]),
        ("tuple", [{"a": 1}]),
        ("date", {"at": "2026-01-31T00:00:00"}),
        ("point", MisfitError),
        ("text", MisfitError),
        ("number", MisfitError),
        ("points", MisfitError),
        ("set", BadRowError),
    ],
)
async def test_what_a_handler_may_return(pool: ProcessPool, handlers: ModuleType, give: str, expected: Any) -> None:
    """Rows, lists of rows and None come back; what is no row on a thread is none here either."""
    call = pool.run(name_handler(handlers.result), {"give": give})
    if isinstance(expected, type):
        with pytest.raises(expected):
            await call
    else:
        assert await call == expected


@pytest.mark.parametrize("size", [0, 1, 65_000, 3_000_000])
async def test_rows_of_any_size(pool: ProcessPool, handlers: ModuleType, size: int) -> None:
    """A row that fits in no buffer goes there and back whole."""
    row = {"text": "ü" * size, "deep": [[[{"n": None}]]], "big": 2**63, "float": 0.1}
    assert await pool.run(name_handler(handlers.echo), row) == row


async def test_a_row_that_is_no_json(pool: ProcessPool, handlers: ModuleType) -> None:
    """It is refused before it takes a process."""
    with pytest.raises(BadRowError, match="JSON"):
        await pool.run(name_handler(handlers.echo), {"n": object()})
    assert pool.started == 0


async def test_batches_and_frames(pool: ProcessPool, handlers: ModuleType) -> None:
    """A batch is a list of rows; a frame is made in the process, and comes back as what became of each row."""
    rows = [{"n": n} for n in range(3)]
    assert await pool.run(name_handler(handlers.batch), rows) == [{"n": 1}, {"n": 2}, {"n": 3}]
    framed = await pool.run(name_handler(handlers.frame, frame=True), rows)
    assert framed == [{"n": 0, "twice": 0}, None, {"n": 2, "twice": 4}]
    with pytest.raises(MisfitError, match="index"):
        await pool.run(name_handler(handlers.lost_index, frame=True), rows)


async def test_as_many_calls_at_once_as_processes(handlers: ModuleType) -> None:
    """Two processes take two calls at once, the others wait, and each call has its own answer."""
    pool = ProcessPool(2)
    calls = [pool.run(name_handler(handlers.nap), {"seconds": 0.05}) for _ in range(6)]
    pids = [answer["pid"] for answer in await asyncio.gather(*calls)]
    assert (len(set(pids)), pool.started) == (2, 2)
    echo = name_handler(handlers.echo)
    assert await asyncio.gather(*(pool.run(echo, {"n": n}) for n in range(200))) == [{"n": n} for n in range(200)]
    await pool.close()


async def test_output_belongs_to_standard_error(
    pool: ProcessPool, handlers: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a handler prints goes to standard error and disturbs nothing; there is nothing to read from."""
    assert await pool.run(name_handler(handlers.noisy), {}) == {"stdin": ""}
    printed = capfd.readouterr()
    assert printed.out == ""
    assert sorted(printed.err.split("\n")) == ["", "from a child", "on stderr", "on stdout", "raw"]


async def test_signals_are_for_the_parent(pool: ProcessPool, handlers: ModuleType) -> None:
    """Ctrl-C and a polite request to end do nothing to a process: its parent lets rows finish first."""
    assert await pool.run(name_handler(handlers.deaf), {}) == {"alive": True}


# --- contexts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "k", "", "ü", b"\xff\x00", b""])
async def test_a_handler_knows_its_row(pool: ProcessPool, handlers: ModuleType, key: str | bytes | None) -> None:
    """The likeness of a context tells all that the row's own one tells."""
    told = await pool.run(name_handler(handlers.told), {}, context(key=key))
    expected = key if isinstance(key, str | None) else list(key)
    assert told == {
        "topic": "t", "partition": 1, "offset": 2, "timestamp": 3, "key": expected, "session": "session",
        "headers": [["h", [255]], ["n", None]],
    }  # fmt: skip


@pytest.mark.parametrize("fail", [False, True])
async def test_effects_come_back(pool: ProcessPool, handlers: ModuleType, fail: bool) -> None:
    """Cost, emitted rows and changes of key, timestamp and headers reach the row's own context, also from a failure."""
    ctx = context()
    if fail:
        with pytest.raises(ValueError, match="after all"):
            await pool.run(name_handler(handlers.acts), {"fail": True}, ctx)
    else:
        await pool.run(name_handler(handlers.acts), {}, ctx)
    assert (ctx.cost, ctx.tokens) == (Decimal("0.1000000000000000000000000000000000001"), 7)
    assert ctx.emitted == [("side", {"n": 1}, b"\xff", (("h", b"\xfe"),))]
    assert (ctx.key, ctx.timestamp, ctx.headers) == ("new", 99, (("a", b"b"),))


async def test_contexts_of_a_batch(pool: ProcessPool, handlers: ModuleType) -> None:
    """Each row of a batch has its own context, and its own effects."""
    contexts = [context() for _ in range(3)]
    await pool.run(name_handler(handlers.batch_acts), [{"n": n} for n in range(3)], contexts)
    assert [ctx.key for ctx in contexts] == ["k", "k1", "k2"]


@pytest.mark.parametrize("name", ["uses_table", "uses_runtime"])
async def test_what_stays_with_the_worker(pool: ProcessPool, handlers: ModuleType, name: str) -> None:
    """Tables and the runtime are out of reach, and the error says what to do."""
    with pytest.raises(ConfigError, match="without executor="):
        await pool.run(name_handler(getattr(handlers, name)), {}, context())


async def test_emitted_nonsense(pool: ProcessPool, handlers: ModuleType) -> None:
    """An emitted row that is no JSON fails the row, and not the process."""
    for _ in range(2):
        with pytest.raises(BadRowError):
            await pool.run(name_handler(handlers.emits_nonsense), {}, context())
    assert (pool.started, pool.died) == (1, 0)


# --- as a stage's handler ----------------------------------------------------------------------------------------


async def through(pool: ProcessPool, stage: Stage, rows: list[Any]) -> list[Any]:
    """What becomes of rows in a chain of one stage."""
    threads = BlockingPool(1)
    runtime = Runtime(threads)
    runtime._processes = pool
    contexts = [RowContext("t", 0, n, 0, None, (), "s", None, runtime) for n in range(len(rows))]
    outcomes: list[Any] = list(rows)
    await Chain([stage]).run(outcomes, contexts, runtime)
    threads.close()
    return outcomes


async def test_a_stage_whose_handler_is_elsewhere(pool: ProcessPool, handlers: ModuleType) -> None:
    """The engine takes it for an async handler: rows, batches and frames go there, and failures are the rows' own."""
    rows = [{"n": n} for n in range(3)]
    one = ProcessHandler(handlers.Kit.double, takes_context=False)
    assert await through(pool, make_stage(one, name="one"), rows) == [{"n": 0}, {"n": 2}, {"n": 4}]
    batch = ProcessHandler(handlers.batch, takes_context=False)
    assert await through(pool, make_stage(batch, name="batch", batch=2), rows) == [{"n": 1}, {"n": 2}, {"n": 3}]
    frame = ProcessHandler(handlers.frame, takes_context=False, frame=True)
    expected = [{"n": 0, "twice": 0}, None, {"n": 2, "twice": 4}]
    assert await through(pool, make_stage(frame, name="frame", batch=10), rows) == expected
    told = ProcessHandler(handlers.told, takes_context=True)
    assert (await through(pool, make_stage(told, name="told"), rows))[2]["offset"] == 2
    failures = await through(
        pool,
        make_stage(ProcessHandler(handlers.nap, takes_context=False, timeout=0.05), name="nap"),
        [{"seconds": 30}, {}, {"seconds": 0}],
    )
    assert [getattr(outcome, "kind", None) for outcome in failures] == ["HandlerTimeoutError", "KeyError", None]


# --- exceptions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "kind", "name", "text"),
    [
        ("local", KeyError, "Own", "'mine'"),
        ("unicode", UnicodeDecodeError, "UnicodeDecodeError", "'utf-8' codec can't decode byte 0xff"),
        ("group", Exception, "ExceptionGroup", "several (1 sub-exception)"),
        ("silent", ValueError, "ValueError", "ValueError()"),
        ("surrogate", ValueError, "ValueError", "?"),
        ("mute", Exception, "Mute", "Mute"),
        ("exit", SystemExit, "SystemExit", "2"),
        ("stop", Exception, "StopIteration", "s"),
        ("cancelled", Exception, "CancelledError", "c"),
        ("interrupt", Exception, "KeyboardInterrupt", "k"),
        ("memory", MemoryError, "MemoryError", "m"),
    ],
)
async def test_exceptions_are_the_callers(
    pool: ProcessPool, handlers: ModuleType, what: str, kind: type[BaseException], name: str, text: str
) -> None:
    """Whatever a handler raises comes with its class, name, text and line, and never ends the process or the loop."""
    with pytest.raises(kind) as caught:
        await pool.run(name_handler(handlers.fail), {"what": what})
    error = caught.value
    assert (type(error).__name__, str(error)[: len(text)]) == (name, text)
    assert error.raised_at.startswith("handlers_of_a_test.py:")  # type: ignore[attr-defined]
    assert "Traceback" in error.__notes__[0]
    assert isinstance(error, Exception | SystemExit)
    assert await pool.run(name_handler(handlers.echo), {"n": 1}) == {"n": 1}
    assert (pool.started, pool.died) == (1, 0)


async def test_the_line_that_raised(pool: ProcessPool, handlers: ModuleType) -> None:
    """``raised_at`` is the very line in the handler's file."""
    line = 1 + HANDLERS[: HANDLERS.index("# THE LINE")].count("\n")
    with pytest.raises(MemoryError) as caught:
        await pool.run(name_handler(handlers.fail), {"what": "memory"})
    assert caught.value.raised_at in {f"handlers_of_a_test.py:{line}", f"handlers_of_a_test.py:{line - 1}"}  # type: ignore[attr-defined]


async def test_policies_can_ask_the_exception(pool: ProcessPool, handlers: ModuleType) -> None:
    """It is an instance of the user's own class, with its plain attributes, though nobody called its constructor."""
    with pytest.raises(handlers.Slow) as caught:
        await pool.run(name_handler(handlers.fail), {"what": "slow"})
    assert (caught.value.retry_after, caught.value.kind) == (2.5, "slow")
    assert isinstance(caught.value, TimeoutError)
    assert not hasattr(caught.value, "response")


# --- calls that overrun, crash, or that nobody waits for ---------------------------------------------------------


async def test_a_call_that_overruns_is_ended(pool: ProcessPool, handlers: ModuleType) -> None:
    """Its process is gone at once, is counted, and the next call gets a new one."""
    first = (await pool.run(name_handler(handlers.pid), {}))["pid"]
    with pytest.raises(HandlerTimeoutError, match=r"no result within 0.1 s; its process was ended"):
        await pool.run(name_handler(handlers.nap), {"seconds": 60}, timeout=0.1)
    assert gone(first)
    assert (pool.overrun, pool.died) == (1, 0)
    assert (await pool.run(name_handler(handlers.pid), {}, timeout=5))["pid"] != first
    assert pool.started == 2


async def test_starting_and_waiting_do_not_count(
    handlers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timeout shorter than the import of a handler, or than the wait for a process, fails no row."""
    slow = load(tmp_path, "slow_to_import", "import time\ntime.sleep(0.8)\ndef echo(row): return row", monkeypatch)
    pool = ProcessPool(1)
    nap, echo = name_handler(handlers.nap), name_handler(slow.echo)
    calls = [pool.run(nap, {"seconds": 0.2}, timeout=0.7) for _ in range(4)]
    await asyncio.gather(*calls, pool.run(echo, {}, timeout=0.7))
    assert (pool.overrun, pool.started) == (0, 1)
    await pool.close()


async def test_what_it_started_ends_with_it(pool: ProcessPool, handlers: ModuleType, tmp_path: Path) -> None:
    """A program that an overrunning handler runs is ended as well."""
    file = tmp_path / "pid"
    with pytest.raises(HandlerTimeoutError):
        await pool.run(name_handler(handlers.starts_another), {"file": str(file)}, timeout=2.0)
    assert gone(int(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"code": 7}, "exit code 7"),
        ({"code": 0}, "exit code 0"),
        ({"signal": signal.SIGSEGV}, "killed by SIGSEGV"),
        ({"signal": signal.SIGKILL}, r"killed by SIGKILL \(out of memory\?\)"),
    ],
)
async def test_a_process_that_dies_fails_its_call_alone(handlers: ModuleType, row: Any, cause: str) -> None:
    """The error names how it ended, the other process's call goes on, and a new process takes its place."""
    pool = ProcessPool(2)
    other = asyncio.create_task(pool.run(name_handler(handlers.nap), {"seconds": 0.3}))
    await asyncio.sleep(0)
    with pytest.raises(ProcessDiedError, match=cause):
        await pool.run(name_handler(handlers.die), row)
    assert "pid" in await other
    assert await pool.run(name_handler(handlers.echo), {"n": 1}) == {"n": 1}
    assert pool.died == 1
    await pool.close()


async def test_a_process_that_dies_at_rest_costs_no_row(pool: ProcessPool, handlers: ModuleType) -> None:
    """The next call gets another one."""
    first = (await pool.run(name_handler(handlers.pid), {}))["pid"]
    os.kill(first, signal.SIGKILL)
    while pool._alive:
        await asyncio.sleep(0.001)
    assert (await pool.run(name_handler(handlers.pid), {}))["pid"] != first
    assert pool.died == 0


async def test_a_process_that_lets_go_of_its_line(pool: ProcessPool, handlers: ModuleType) -> None:
    """It can never answer, so it is ended and the call fails."""
    with pytest.raises(ProcessDiedError):
        await pool.run(name_handler(handlers.lets_go), {})


async def test_a_cancelled_call_that_ends_soon_keeps_its_process(handlers: ModuleType) -> None:
    """Its answer is thrown away, meanwhile its place is taken, and the next call has its own answer."""
    pool = ProcessPool(1)
    first = (await pool.run(name_handler(handlers.pid), {}))["pid"]
    task = asyncio.create_task(pool.run(name_handler(handlers.nap), {"seconds": 0.1}))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await pool.run(name_handler(handlers.pid), {}))["pid"] == first
    assert (pool.given_up, pool.started) == (0, 1)
    await pool.close()


async def test_a_cancelled_call_that_goes_on_is_ended(handlers: ModuleType) -> None:
    """After the grace its process is replaced."""
    pool = ProcessPool(1, cancel_grace=0.05)
    first = (await pool.run(name_handler(handlers.pid), {}))["pid"]
    task = asyncio.create_task(pool.run(name_handler(handlers.nap), {"seconds": 60}))
    await asyncio.sleep(0.02)
    task.cancel()
    assert (await pool.run(name_handler(handlers.pid), {}))["pid"] != first
    assert (pool.given_up, pool.overrun, pool.died) == (1, 0, 0)
    assert gone(first)
    with pytest.raises(asyncio.CancelledError):
        await task
    await pool.close()


@pytest.mark.parametrize("moment", [0.0, 0.001, 0.01, 0.05, 0.1, 0.2])
async def test_cancelled_at_any_moment(handlers: ModuleType, moment: float) -> None:
    """A call may be cancelled while its process starts or imports: no place is lost."""
    pool = ProcessPool(1)
    echo = name_handler(handlers.echo)
    task = asyncio.create_task(pool.run(echo, {}))
    await asyncio.sleep(moment)
    task.cancel()
    await asyncio.wait({task})
    async with asyncio.timeout(20):
        assert await pool.run(echo, {"n": 1}) == {"n": 1}
    await pool.close()
    assert not pool._alive


# --- the end -----------------------------------------------------------------------------------------------------


async def test_close_ends_all(handlers: ModuleType) -> None:
    """Processes at rest and in a call are gone when close returns; calls fail, and no more are taken."""
    pool = ProcessPool(2, close_timeout=0.2)
    first = (await pool.run(name_handler(handlers.pid), {}))["pid"]
    hanging = asyncio.create_task(pool.run(name_handler(handlers.nap), {"seconds": 60}))
    resting = asyncio.create_task(pool.run(name_handler(handlers.pid), {}))
    waiting = asyncio.create_task(pool.run(name_handler(handlers.nap), {"seconds": 60}))
    second = (await resting)["pid"]
    late = asyncio.create_task(pool.run(name_handler(handlers.echo), {}))
    await asyncio.sleep(0.05)
    await pool.close()
    assert not is_alive(first)
    assert not is_alive(second)
    for task in (hanging, waiting):
        with pytest.raises(ProcessDiedError, match="was ended"):
            await task
    with pytest.raises(Exception, match="closed"):
        await late
    await pool.close()


async def test_close_before_the_first_call() -> None:
    """Nothing was started, nothing is to be ended."""
    pool = ProcessPool()
    await pool.close()
    assert pool.started == 0
    assert pool.processes >= 1


PARENT = """
import asyncio, sys
sys.path.insert(0, {folder!r})
from {package}.handlers.processes import ProcessPool, name_handler
import handlers_of_a_test as handlers

async def main():
    pool = ProcessPool(2)
    print((await pool.run(name_handler(handlers.pid), {{}}))["pid"])
    busy = asyncio.create_task(pool.run(name_handler(handlers.nap), {{"seconds": 60}}))
    await asyncio.sleep(0)
    print((await pool.run(name_handler(handlers.pid), {{}}))["pid"], flush=True)
    await {then}

asyncio.run(main())
"""


@pytest.mark.parametrize("then", ["asyncio.sleep(60)", "asyncio.sleep(0)"])
def test_processes_end_with_their_parent(handlers: ModuleType, tmp_path: Path, then: str) -> None:
    """``kill -9`` of the parent, or its end without ``close()``, leaves nothing behind, idle or busy."""
    package = ProcessPool.__module__.partition(".")[0]
    text = PARENT.format(folder=str(tmp_path), package=package, then=then)
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        if "60" in then:
            parent.kill()
    assert len(set(pids)) == 2
    assert all(gone(pid) for pid in pids)


# --- naming handlers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pick", "remedy"),
    [
        (lambda m: m.nameless, "a lambda has no name"),
        (lambda m: m.made, "a function inside a function"),
        (lambda m: m.kit.method, "a method of an object"),
        (lambda m: functools.partial(m.echo), "an object has no name"),
        (lambda m: m.kit, "an object has no name"),
        (lambda m: m.waits, "leave executor= out"),
    ],
)
def test_what_cannot_be_named(handlers: ModuleType, pick: Callable[[ModuleType], Any], remedy: str) -> None:
    """It is refused when the stage is made, with what to do instead."""
    with pytest.raises(ConfigError, match=remedy):
        name_handler(pick(handlers))


def test_a_notebooks_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was typed in has no file that a process could import."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def typed(row): return row", "<ipython-input-1>", "exec"), namespace)  # noqa: S102 - as a notebook does
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    with pytest.raises(ConfigError, match="notebook"):
        name_handler(namespace["typed"])


@pytest.mark.parametrize("name", ["Kit.double", "Kit.named"])
async def test_functions_of_classes(pool: ProcessPool, handlers: ModuleType, name: str) -> None:
    """Static and class methods have names."""
    handler = getattr(handlers.Kit, name.partition(".")[2])
    assert await pool.run(name_handler(handler), {"n": 2}) in [{"n": 4}, {"kit": "Kit"}]


async def test_builtins(pool: ProcessPool) -> None:
    """A built-in has a name and no file."""
    reference = name_handler(dict)
    assert reference.file is None
    assert await pool.run(reference, {"n": 1}) == {"n": 1}


async def test_a_handler_that_is_another_one_by_name(pool: ProcessPool, handlers: ModuleType) -> None:
    """A name that leads to something else is refused before anything runs."""
    with pytest.raises(ConfigError, match="is not the stage's handler there"):
        await pool.run(name_handler(handlers.raw), {})
    assert pool.started == 0


async def test_a_file_whose_name_is_taken(
    pool: ProcessPool, handlers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline file loaded under another name, as the command line does for ``json.py``, is loaded by its path."""
    module = load(tmp_path, "rowmill_pipeline_json", "def own(row): return {'own': __name__}", monkeypatch)
    (tmp_path / "rowmill_pipeline_json.py").rename(tmp_path / "json-of-mine.py")
    module.__file__ = str(tmp_path / "json-of-mine.py")
    reference = name_handler(module.own)
    assert await pool.run(reference, {}) == {"own": "rowmill_pipeline_json"}


async def test_a_neighbour_comes_from_the_files_folder(
    pool: ProcessPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline file's neighbours win while it is imported, as when its stages were made."""
    for folder, word in (("a", "wrong"), ("b", "right")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "next_door.py").write_text(f"WORD = {word!r}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "a"))
    text = "import next_door\ndef word(row): return {'word': next_door.WORD}"
    module = load(tmp_path / "b", "pipeline_of_b", text, monkeypatch)
    reference = name_handler(module.word)
    sys.path.remove(str(tmp_path / "b"))
    sys.path.append(str(tmp_path / "b"))
    assert await pool.run(reference, {}) == {"word": "right"}
    sys.modules.pop("next_door")


SCRIPT = """
import asyncio, sys
from {package}.handlers.processes import ProcessPool, name_handler

class Mine(Exception):
    pass

def score(row):
    if row["n"] == 2:
        raise Mine("two")
    return {{"n": row["n"], "module": __name__}}

async def main():
    pool = ProcessPool(1)
    try:
        print(await pool.run(name_handler(score), {{"n": 1}}))
        try:
            await pool.run(name_handler(score), {{"n": 2}})
        except Mine as error:
            print("mine:", error, error.raised_at)
    finally:
        await pool.close()

{guard}asyncio.run(main())
"""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_script(tmp_path: Path, guarded: bool) -> None:
    """A script's own functions work; one that runs on import is told to guard that."""
    package = ProcessPool.__module__.partition(".")[0]
    guard = 'if __name__ == "__main__":\n    ' if guarded else ""
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(package=package, guard=guard), encoding="utf-8")
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=50, check=False)
    if guarded:
        assert done.stdout.split("\n")[0] == str({"n": 1, "module": MAIN_ALIAS})
        assert "mine: two script.py:10" in done.stdout
        assert (done.stderr, done.returncode) == ("", 0)
    else:
        assert 'put what runs it under if __name__ == "__main__":' in done.stderr.splitlines()[-1]
        assert done.returncode == 1


@pytest.mark.parametrize(
    ("text", "what", "seconds"),
    [
        ("raise RuntimeError('no database')", r"raised RuntimeError: no database \(broken.py:2\)", 30),
        ("import sys; sys.exit(3)", "raised SystemExit: 3", 30),
        ("handler = None", "is no function", 30),
        ("import time; time.sleep(60)", "took longer than 1 s", 1),
        ("import os; os._exit(4)", "while it started.*exit code 4", 30),
    ],
)
async def test_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, what: str, seconds: float
) -> None:
    """The error says what happened there; ``prepare`` shows it before the first row."""
    module = load(tmp_path, "broken", "def handler(row): return row\n", monkeypatch)
    reference = name_handler(module.handler)
    (tmp_path / "broken.py").write_text(f"def handler(row): return row\n{text}\n", encoding="utf-8")
    os.utime(tmp_path / "broken.py", (1, 1))  # so that no cached bytecode is taken for it
    pool = ProcessPool(1, start_timeout=seconds)
    for call in (lambda: pool.prepare(reference), lambda: pool.run(reference, {})):
        with pytest.raises((ConfigError, ProcessDiedError), match=what):
            await call()
    await pool.close()


@pytest.mark.parametrize("processes", [0, -1, 1.5, True, "2"])
def test_no_processes(processes: Any) -> None:
    """A pool without processes is a mistake."""
    with pytest.raises(ConfigError, match="processes"):
        ProcessPool(processes)


def test_references_are_told_apart(handlers: ModuleType) -> None:
    """Two stages of one handler are two references, so that one may take frames and the other rows."""
    one, other = name_handler(handlers.echo), name_handler(handlers.echo, frame=True)
    assert isinstance(one, HandlerReference)
    assert one != other
    assert one.frame is False
