"""Log capture: whose log lines they are, however many handlers run at once."""

from __future__ import annotations

import asyncio
import contextvars
import io
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
from rowmill.handlers import capture
from rowmill.handlers.capture import CurrentRow, LogLines, captured, current_row, install, lines_of, uninstall
from rowmill.handlers.chain import bare_attempt
from rowmill.handlers.context import RowContext
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import make_stage
from rowmill.state.errors import ConfigError

library = logging.getLogger("some.library")
Fields = tuple[str, str, str, str]


class Context(RowContext):
    """A row's context with room for its log."""

    lines: LogLines


def context(offset: int = 0, limit: int = 4096) -> Context:
    """The context of a row of topic t."""
    made = Context("t", 0, offset, 0, None, (), "live")
    made.lines = LogLines(limit)
    return made


class Collected(logging.Handler):
    """Notes the message and the three fields of every record, as a formatter would see them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Fields] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = cast("Any", record)
        self.seen.append(
            (record.getMessage(), fields.rowmill_session, fields.rowmill_row, fields.rowmill_stage),
        )


@pytest.fixture
def collected() -> Iterator[Collected]:
    """Capture is installed, and the library's logger collected."""
    handler = Collected()
    library.addHandler(handler)
    library.setLevel(logging.INFO)
    library.propagate = False
    install()
    yield handler
    uninstall()
    library.removeHandler(handler)
    library.propagate = True


def talks(row: dict[str, Any]) -> dict[str, Any]:
    """Logs through a library."""
    library.info("sees %s", row["n"])
    return row


async def test_async_handlers_at_once(collected: Collected) -> None:
    """Handlers that run at the same time do not see each other's rows, before and after they waited."""
    gate = asyncio.Event()

    async def waits(row: dict[str, Any]) -> dict[str, Any]:
        library.info("before %s", row["n"])
        await gate.wait()
        return talks(row)

    stage = captured(make_stage(waits))
    tasks = [asyncio.create_task(stage.call({"n": n}, context(n))) for n in range(3)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    assert current_row() is None
    expected = {(f"{word} {n}", "live", f"t/0/{n}", "waits") for word in ("before", "sees") for n in range(3)}
    assert set(collected.seen) == expected
    assert len(collected.seen) == 6


@pytest.mark.parametrize("takes_context", [False, True])
async def test_rows_of_a_lane(collected: Collected, takes_context: bool) -> None:
    """Where a task runs row after row, each is named while its handler runs, also if it fails, and none in between."""
    seen: list[CurrentRow | None] = []

    async def waits(row: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0)
        return talks(row)

    async def waits_with_context(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        assert ctx.offset == row.get("n", 1)
        return await waits(row)

    stage = captured(make_stage(waits_with_context if takes_context else waits, name="waits", concurrency=1))
    pool = BlockingPool(1)
    try:
        runtime = Runtime(pool)
        for number, row in enumerate(({"n": 0}, {}, {"n": 2})):
            outcome = await bare_attempt(stage, row, context(number), runtime)
            assert (outcome == row) is ("n" in row)
            seen.append(current_row())
    finally:
        pool.close()
    assert seen == [None] * 3
    assert collected.seen == [(f"sees {n}", "live", f"t/0/{n}", "waits") for n in (0, 2)]


async def test_threads_of_the_pool(collected: Collected) -> None:
    """A blocking handler's records carry its row from the pool's threads, all at once."""
    barrier = threading.Barrier(3, timeout=10)

    def blocks(row: dict[str, Any]) -> dict[str, Any]:
        barrier.wait()
        return talks(row)

    stage = captured(make_stage(blocks, concurrency=3))
    pool = BlockingPool(3)
    try:
        await asyncio.gather(*(pool.run(stage.call, {"n": n}, context(n)) for n in range(3)))
    finally:
        pool.close()
    assert set(collected.seen) == {(f"sees {n}", "live", f"t/0/{n}", "blocks") for n in range(3)}


async def test_threads_and_tasks_of_a_handler(collected: Collected) -> None:
    """What an async handler starts by asyncio.to_thread or as a task is about its row as well."""

    async def starts(row: dict[str, Any]) -> dict[str, Any]:
        await asyncio.to_thread(talks, row)
        await asyncio.create_task(asyncio.to_thread(talks, row))
        return row

    await captured(make_stage(starts)).call({"n": 1}, context(7))
    assert collected.seen == [("sees 1", "live", "t/0/7", "starts")] * 2


def test_rows_one_after_the_other(collected: Collected) -> None:
    """Plain handlers say their row, and nothing is left over between rows, also when one raised."""
    stage = captured(make_stage(talks))
    assert stage.takes_context
    stage.call({"n": 1}, context(1))
    with pytest.raises(KeyError):
        stage.call({}, context(2))
    library.info("outside")
    assert collected.seen == [("sees 1", "live", "t/0/1", "talks"), ("outside", "", "", "")]


def test_stages_inside_of_stages(collected: Collected) -> None:
    """The innermost stage is named, and after it the outer one again."""
    inner = captured(make_stage(talks, name="inner"))

    def outer(row: dict[str, Any], ctx: Any) -> Any:
        inner.call(row, ctx)
        return talks(row)

    captured(make_stage(outer)).call({"n": 1}, context())
    assert [seen[3] for seen in collected.seen] == ["inner", "outer"]


def test_batches(collected: Collected) -> None:
    """A batch names its first row and how many more there are; its lines belong to each of its rows."""

    def many(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        library.info("a batch")
        return rows

    contexts = [context(n) for n in (5, 6, 7)]
    captured(make_stage(many, batch=10)).call([{}, {}, {}], contexts)
    assert collected.seen == [("a batch", "live", "t/0/5 and 2 more", "many")]
    assert all("INFO some.library: a batch" in lines_of(one) for one in contexts)


def test_current_row(collected: Collected) -> None:
    """Handlers and what they call may ask which row they are working on."""
    seen: list[CurrentRow | None] = []

    def asks(row: dict[str, Any]) -> dict[str, Any]:
        seen.append(current_row())
        return row

    captured(make_stage(asks)).call({}, context(3))
    make_stage(asks).call({})
    captured(make_stage(asks)).call({}, None)
    assert seen == [CurrentRow("live", "t", 0, 3, "asks"), None, None]


def test_a_call_that_somebody_else_closes() -> None:
    """A coroutine that is thrown away by code with another context leaves no error and no trace."""

    async def waits(row: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0)
        return row

    call = captured(make_stage(waits)).call({}, context())
    contextvars.copy_context().run(call.send, None)
    call.close()
    assert current_row() is None


# --- lines -----------------------------------------------------------------------------------------------------


def test_the_lines_of_a_row(collected: Collected) -> None:
    """A row's lines say when, how bad, who and what, with the error's name, and no other row's lines."""

    def fails(row: dict[str, Any]) -> dict[str, Any]:
        try:
            int("boom")
        except ValueError:
            library.exception("no\nluck with %s", row["n"])
        return row

    first, second = context(1), context(2)
    captured(make_stage(fails)).call({"n": 1}, first)
    captured(make_stage(talks)).call({"n": 1}, first)
    captured(make_stage(talks)).call({"n": 2}, second)
    error, luck, sees = lines_of(first).split("\n")
    assert error.endswith(" ERROR some.library: no")
    assert luck == "  luck with 1 (ValueError: invalid literal for int() with base 10: 'boom')"
    assert sees.endswith(" INFO some.library: sees 1")
    assert lines_of(second).count("\n") == 0


def test_what_is_not_logged_is_not_kept(collected: Collected) -> None:
    """Levels hold: what a logger does not let through is in no row's lines."""

    def quiet(row: dict[str, Any]) -> dict[str, Any]:
        library.debug("too quiet")
        return row

    row = context()
    captured(make_stage(quiet)).call({}, row)
    assert lines_of(row) == ""


def test_arguments_that_do_not_fit(collected: Collected) -> None:
    """A log call with a mistake in it is kept as it was written: to complain of it is the business of logging."""

    def sloppy(row: dict[str, Any]) -> dict[str, Any]:
        library.makeRecord(library.name, logging.INFO, "file.py", 1, "%d", ("text",), None)
        return row

    row = context()
    assert captured(make_stage(sloppy)).call({}, row) == {}
    assert lines_of(row).endswith("INFO some.library: %d")


@pytest.mark.parametrize(
    ("limit", "lines", "text"),
    [
        (100, ["a", "b"], "a\nb"),
        (3, ["a", "b"], "a\nb"),
        (3, ["a", "b", "c"], "… 1 earlier lines\nb\nc"),
        (5, ["x" * 9], "xxxx…"),
        (2000, ["x" * 900], "x" * 499 + "…"),
        (4, [], ""),
    ],
)
def test_lines_are_bounded(limit: int, lines: list[str], text: str) -> None:
    """The last lines stay, whole, within the limit; what had to go is counted."""
    kept = LogLines(limit)
    for line in lines:
        kept.add(line)
    assert kept.text() == text


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "4096"])
def test_limits_of_lines(limit: Any) -> None:
    """A limit is a number of characters."""
    with pytest.raises(ConfigError, match="capture_logs"):
        LogLines(limit)


def test_contexts_without_lines() -> None:
    """Where nothing is kept, a row's log is empty."""
    assert lines_of(None) == ""
    assert lines_of(RowContext("t", 0, 0, 0, None, (), "live")) == ""


def test_many_threads_on_one_row() -> None:
    """Lines of one row from several threads are all counted."""
    kept = LogLines(1000)

    def fill() -> None:
        for _ in range(500):
            kept.add("x" * 9)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert kept.left_out == 1900
    assert kept.text().count("x" * 9) == 100


# --- the process -----------------------------------------------------------------------------------------------


def test_installing_twice(collected: Collected) -> None:
    """A second installation changes nothing: no line is there twice."""
    factory = logging.getLogRecordFactory()
    install()
    assert logging.getLogRecordFactory() is factory


def test_installing_on_top_of_others(collected: Collected) -> None:
    """A factory that somebody puts on top is left alone; one that forgets ours is given ours again."""
    ours = logging.getLogRecordFactory()

    def on_top(*given: Any, **named: Any) -> logging.LogRecord:
        return ours(*given, **named)

    try:
        logging.setLogRecordFactory(on_top)
        install()
        assert logging.getLogRecordFactory() is on_top
        logging.setLogRecordFactory(logging.LogRecord)
        install()
        captured(make_stage(talks)).call({"n": 1}, context(4))
        assert collected.seen == [("sees 1", "live", "t/0/4", "talks")]
    finally:
        logging.setLogRecordFactory(ours)


def test_uninstalling() -> None:
    """Afterwards everything is as it was."""
    before, stdout = logging.getLogRecordFactory(), sys.stdout
    install(prints=True)
    uninstall()
    uninstall()
    assert logging.getLogRecordFactory() is before
    assert sys.stdout is stdout


async def test_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """What handlers print reaches standard output and the log of the right row, with several at once."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    gate = asyncio.Event()

    async def prints(row: dict[str, Any]) -> dict[str, Any]:
        print("row", row["n"], end=" ")
        await gate.wait()
        print("is done\nand", end="")
        sys.stdout.writelines([" out", "\n", "rest"])
        return row

    install(prints=True)
    install(prints=True)
    try:
        rows = [context(n) for n in range(2)]
        stage = captured(make_stage(prints))
        tasks = [asyncio.create_task(stage.call({"n": n}, row)) for n, row in enumerate(rows)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*tasks)
        print("outside")
        assert not sys.stdout.isatty()
    finally:
        uninstall()
    assert sys.stdout is out
    assert out.getvalue().startswith("row 0 row 1 is done\n")
    assert [lines_of(row) for row in rows] == [f"print: row {n} is done\nprint: and out\nprint: rest" for n in range(2)]


def test_stages_that_are_not_captured_are_left_alone() -> None:
    """Making a captured stage changes nothing of the one it was made of."""
    stage = make_stage(talks)
    assert stage.call is talks
    assert not stage.takes_context
    assert captured(stage).call is not talks
    assert capture.LOG_CHARACTERS == 4096
