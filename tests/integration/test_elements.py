"""What stages may be made of, at work on real brokers: graphs, routers, events, processes, schemas, artifacts, logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rowmill import Events, Graph, Message, Pipeline, Retry, Router, open_artifacts, publish, read
from rowmill.handlers.capture import install, uninstall

from .test_worker import ROWMILL, running, until

log = logging.getLogger("test.elements")


async def through(url: str, pipeline: Pipeline, rows: list[dict[str, Any]]) -> list[Message]:
    """Rows through a worker; what is on the sink then."""
    source = pipeline.sources[0]
    await asyncio.to_thread(publish, source, rows, broker=url)
    async with running(url, pipeline) as worker:
        await until(lambda: worker.stats.rows >= len(rows))
    return await messages(url, pipeline.sink)


async def messages(url: str, topic: str) -> list[Message]:
    """Everything on a topic."""
    return await asyncio.to_thread(lambda: list(read(topic, broker=url)))


def error_of(letter: Message) -> dict[str, str]:
    """A dead letter's error headers by their short names."""
    prefix = "rowmill.error."
    return {name[len(prefix) :]: (value or b"").decode() for name, value in letter.headers if name.startswith(prefix)}


async def test_a_graph_a_router_and_events_in_one_pipeline(broker_url: str, name: str) -> None:
    """Elements are stages like others: every row is accounted for, and dead letters name the stage inside."""
    graph = Graph("enrich", outputs=("words", "length"))

    @graph.node
    def words(text: str) -> int:
        return len(text.split())

    @graph.node(retry=Retry(3, first=0.01))
    async def length(text: str) -> int:
        if text.startswith("bad"):
            raise ValueError("bad text")
        return len(text)

    def short(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "path": "short"}

    def long(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "path": "long"}

    router = Router(default="short")
    router.path("short", short).path("long", long)
    router.rule(lambda row: row["length"] > 8, "long", name="long text")
    router.to_topic("none", f"{name}.none").rule({"length": 0}, "none", name="empty")
    events = Events(field="kind", unhandled="drop")

    @events.on("a")
    def mark(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "marked": True}

    pipeline = Pipeline(name, source=name, sink=f"{name}.out").add(graph).add(router, name="route")
    pipeline.add(events, name="events")
    texts = ["bad one", "short", "a long text here", ""]
    rows = [{"n": n, "text": texts[n % 4], "kind": "ab"[n % 2 ^ n // 4 % 2]} for n in range(80)]
    out = [message.row for message in await through(broker_url, pipeline, rows)]
    assert Counter((row["path"], row.get("marked")) for row in out) == {("short", True): 10, ("long", True): 10}
    assert len(await messages(broker_url, f"{name}.none")) == 20
    letters = [error_of(letter) for letter in await messages(broker_url, f"{name}.dlq")]
    assert len(letters) == 20
    assert {letter["stage"] for letter in letters} == {"enrich"}
    assert all("bad text" in letter["message"] for letter in letters)


PROCESSES = """
import os
from rowmill import Pipeline

p = Pipeline({name!r}, source={name!r}, sink={name!r} + ".out")

@p.stage(executor="process", timeout=5)
def square(row):
    if row["n"] == 13:
        os._exit(3)
    if row["n"] == 14:
        while True:
            pass
    return {{**row, "square": row["n"] ** 2, "pid": os.getpid()}}
"""


@pytest.mark.slow
def test_a_pipeline_file_with_processes(tmp_path: Path, name: str) -> None:
    """rowmill run: rows are worked on in other processes; one that dies or hangs costs its own row."""
    file = tmp_path / "squares.py"
    file.write_text(PROCESSES.format(name=name))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"n": {n}}}\n' for n in range(40)))
    out = tmp_path / "out.jsonl"
    done = subprocess.run(
        [ROWMILL, "run", str(file), "--input", str(rows), "--output", str(out), "--broker", f"local://{tmp_path}/b"],
        capture_output=True, text=True, timeout=90, check=False, env={**os.environ, "ROWMILL_TEST_MARK": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode in {0, 1}, done.stderr
    import json

    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["n"] for row in found] == [n for n in range(40) if n not in {13, 14}]
    assert all(row["square"] == row["n"] ** 2 for row in found)
    assert "ProcessDiedError" in done.stderr
    assert "HandlerTimeoutError" in done.stderr
    assert not processes_with(f"ROWMILL_TEST_MARK={tmp_path}"), "its processes outlived it"


def processes_with(variable: str) -> list[int]:
    """Processes that inherited this environment variable."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is somebody else's
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@dataclass
class Order:
    """What the pipeline takes."""

    id: str
    amount: float


@dataclass
class Priced:
    """What it gives."""

    id: str
    total: float


async def test_schemas_of_a_pipeline(broker_url: str, name: str) -> None:
    """A misfit of a row or of a result is a dead letter that names the field; its bytes are kept."""
    pipeline = Pipeline(name, source=name, sink=f"{name}.out", input=Order, output=Priced)
    pipeline.add(
        lambda row: {"id": row["id"], "total": row["amount"] * 2 if row["amount"] >= 0 else "negative"}, name="total"
    )
    rows: list[dict[str, Any]] = [
        {"id": "a", "amount": 1},
        {"id": 5, "amount": 1},
        {"id": "c"},
        {"id": "d", "amount": -1},
    ]
    out = await through(broker_url, pipeline, rows)
    assert [message.row for message in out] == [{"id": "a", "total": 2}]
    letters = {letter.row.get("id"): error_of(letter) for letter in await messages(broker_url, f"{name}.dlq")}
    assert {letter["type"] for letter in letters.values()} == {"schema"}
    assert [(letters[key]["stage"]) for key in (5, "c", "d")] == ["input", "input", "output"]
    assert "'id'" in letters[5]["message"]
    assert "'amount'" in letters["c"]["message"]
    assert "'total'" in letters["d"]["message"]


async def test_artifacts(broker_url: str, name: str, tmp_path: Path) -> None:
    """What is too large for a message lies in the folder, and the row carries the reference, also in a side output."""
    folder = tmp_path / "artifacts"
    pipeline = Pipeline(name, source=name, sink=f"{name}.out", artifacts=str(folder), artifact_limit=1_000)

    @pipeline.stage
    async def render(row: dict[str, Any], ctx: Any) -> dict[str, Any]:
        image = await ctx.artifact_async(bytes([row["n"]]) * 50, name="page.png", type="image/png")
        ctx.emit(f"{name}.side", {"n": row["n"], "text": "y" * 2_000})
        return {**row, "image": image, "text": "x" * (2_000_000 if row["n"] == 3 else 10)}

    out = [message.row for message in await through(broker_url, pipeline, [{"n": n} for n in range(5)])]
    store = open_artifacts(str(folder))
    assert {row["n"]: store.get(row["image"]) for row in out} == {n: bytes([n]) * 50 for n in range(5)}
    texts = {row["n"]: row["text"] for row in out}
    assert store.get(texts.pop(3)) == b"x" * 2_000_000
    assert set(texts.values()) == {"x" * 10}
    side = [message.row for message in await messages(broker_url, f"{name}.side")]
    assert all(store.get(row["text"]) == b"y" * 2_000 for row in side)


async def test_an_artifact_that_cannot_be_written(broker_url: str, name: str, tmp_path: Path) -> None:
    """The row fails with the reason; it is not committed without its artifact."""
    place = tmp_path / "file"
    place.write_text("no folder")
    pipeline = Pipeline(name, source=name, sink=f"{name}.out", artifacts=str(place / "below"), artifact_limit=10)
    pipeline.add(lambda row: {**row, "text": "x" * 100 if row["n"] else ""}, name="grow")
    out = await through(broker_url, pipeline, [{"n": 0}, {"n": 1}])
    assert [message.row["n"] for message in out] == [0]
    (letter,) = await messages(broker_url, f"{name}.dlq")
    assert error_of(letter)["type"] == "artifact"


async def test_logs_carry_their_rows(broker_url: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Log records of handlers tell session, row and stage; a dead letter shows what was logged about its row."""
    install()
    try:
        pipeline = Pipeline(name, source=name, sink=f"{name}.out", capture_logs=True, dead_letter_headers="connect")

        @pipeline.stage
        async def ask(row: dict[str, Any]) -> dict[str, Any]:
            log.warning("asking for %d", row["n"])
            await asyncio.sleep(0.01)
            if row["n"] == 7:
                raise ValueError("seven")
            return row

        with caplog.at_level(logging.WARNING, "test.elements"):
            await through(broker_url, pipeline, [{"n": n} for n in range(20)])
        records = [record for record in caplog.records if record.name == "test.elements"]
        assert len({record.rowmill_row for record in records}) == 20  # type: ignore[attr-defined]
        assert {(record.rowmill_session, record.rowmill_stage) for record in records} == {("live", "ask")}  # type: ignore[attr-defined]
        (letter,) = await messages(broker_url, f"{name}.dlq")
        assert "asking for 7" in error_of(letter)["log"]
        assert ("__connect.errors.exception.class.name", b"ValueError") in letter.headers
    finally:
        uninstall()
