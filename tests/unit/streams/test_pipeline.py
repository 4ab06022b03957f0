"""Building pipelines and trying them on single rows."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from rowmill import Pipeline, RowContext, RowmillError
from rowmill.handlers.stage import make_stage
from rowmill.state.errors import ConfigError


def same(row: dict[str, Any]) -> dict[str, Any]:
    """Passes rows on."""
    return row


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"name": "a.b"}, "Pipeline(name)"),
        ({"name": ""}, "Pipeline(name)"),
        ({"name": None}, "Pipeline(name)"),
        ({"name": "rowmill", "source": "in", "sink": "out"}, "Pipeline(name)"),
        ({"source": ""}, "Pipeline(source=)"),
        ({"source": []}, "Pipeline(source=)"),
        ({"source": ["a", "a"]}, "Pipeline(source=)"),
        ({"source": ["a", "b c"]}, "Pipeline(source=)"),
        ({"source": "rowmill.events"}, "Pipeline(source=)"),
        ({"source": [None]}, "Pipeline(source=)"),
        ({"sink": ""}, "Pipeline(sink=)"),
        ({"sink": ".."}, "Pipeline(sink=)"),
        ({"sink": "rowmill.control"}, "Pipeline(sink=)"),
        ({"sink": "p"}, "Pipeline(sink=)"),
        ({"source": ["a", "b"], "sink": "b"}, "Pipeline(sink=)"),
        ({"source": "p.dlq"}, "Pipeline(source=)"),
        ({"source": ["a", "p.dlq"]}, "Pipeline(source=)"),
        ({"sink": "p.dlq"}, "Pipeline(sink=)"),
        ({"start": "beginning"}, "Pipeline(start=)"),
        ({"start": None}, "Pipeline(start=)"),
        ({"start": 5}, "Pipeline(start=)"),
        ({"start": datetime(2024, 1, 1)}, "Pipeline(start=)"),  # noqa: DTZ001
        ({"tombstones": "drop"}, "Pipeline(tombstones=)"),
        ({"tombstones": None}, "Pipeline(tombstones=)"),
        ({"keys": "json"}, "Pipeline(keys=)"),
        ({"max_row_bytes": 0}, "Pipeline(max_row_bytes=)"),
        ({"max_row_bytes": 2**30 + 1}, "Pipeline(max_row_bytes=)"),
        ({"max_row_bytes": 1e6}, "Pipeline(max_row_bytes=)"),
        ({"max_row_bytes": True}, "Pipeline(max_row_bytes=)"),
        ({"max_depth": 0}, "Pipeline(max_depth=)"),
        ({"max_depth": 201}, "Pipeline(max_depth=)"),
        ({"max_depth": "5"}, "Pipeline(max_depth=)"),
    ],
)
def test_wrong_options(options: dict[str, Any], setting: str) -> None:
    """A mistake is refused when the pipeline is built, by option, value and remedy."""
    with pytest.raises(ConfigError) as caught:
        Pipeline(**{"name": "p", **options})
    assert caught.value.setting == setting
    assert caught.value.remedy


def test_our_own_name_is_taken() -> None:
    """A pipeline's topics never begin as rowmill's own do; the message says so, and names like it are allowed."""
    with pytest.raises(ConfigError, match=r"its topics would begin with 'rowmill\.', which are rowmill's own"):
        Pipeline("rowmill")
    assert [Pipeline(name).name for name in ("Rowmill", "rowmill2", "rowmill-a")] == [
        "Rowmill",
        "rowmill2",
        "rowmill-a",
    ]


def test_defaults() -> None:
    """Source and sink are named after the pipeline; the rest is what DESIGN says."""
    pipeline = Pipeline("p")
    assert (pipeline.sources, pipeline.sink, pipeline.start) == (("p",), "p.results", "earliest")
    assert (pipeline.tombstones, pipeline.keys) == ("dead_letter", "text")
    assert (pipeline.max_row_bytes, pipeline.max_depth) == (1_000_000, 128)


@pytest.mark.parametrize("start", ["earliest", "latest", datetime(2024, 1, 1, tzinfo=UTC)])
def test_what_is_accepted(start: Any) -> None:
    """Several sources and every form of start are kept as they were given."""
    pipeline = Pipeline("p", source=["a", "b.c"], sink="d", start=start)
    assert (pipeline.sources, pipeline.sink, pipeline.start) == (("a", "b.c"), "d", start)


def test_stages_in_order() -> None:
    """The decorator with and without options, add() and finished stages append in order; functions stay functions."""
    pipeline = Pipeline("p")

    @pipeline.stage
    def first(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "first": True}

    @pipeline.stage(name="renamed", batch=2)
    def second(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return rows

    assert pipeline.add(same, name="third").add(make_stage(same, name="fourth", timeout=1)) is pipeline
    assert [stage.name for stage in pipeline.stages] == ["first", "renamed", "third", "fourth"]
    assert [stage.batch for stage in pipeline.stages] == [None, 2, None, None]
    assert first({"a": 1}) == {"a": 1, "first": True}
    assert second([]) == []


@pytest.mark.parametrize(
    ("handler", "options", "setting"),
    [
        (same, {"name": "taken"}, "stage(name=)"),
        (same, {"batch": 0}, "stage(batch=)"),
        (make_stage(same, name="done"), {"name": "other"}, "add(name=)"),
        (make_stage(same, name="done"), {"frame": True}, "add(frame=)"),
        (make_stage(same, name="done"), {"timeout": 5}, "add(timeout=)"),
        (make_stage(same, name="taken"), {}, "stage(name=)"),
    ],
)
def test_wrong_stages(handler: Any, options: dict[str, Any], setting: str) -> None:
    """A stage that is refused leaves the pipeline as it was."""
    pipeline = Pipeline("p").add(same, name="taken")
    with pytest.raises(ConfigError) as caught:
        pipeline.add(handler, **options)
    assert caught.value.setting == setting
    assert len(pipeline.stages) == 1


def test_wrong_decorators() -> None:
    """An unknown option of the decorator is told as what it is."""
    with pytest.raises(ConfigError, match="attempts"):
        Pipeline("p").stage(attempts=5)(same)  # type: ignore[call-overload]


def test_no_stage() -> None:
    """A pipeline without stages cannot run."""
    with pytest.raises(ConfigError, match="at least one stage"):
        Pipeline("p").process({})


def test_process() -> None:
    """One row goes through every kind of stage without a broker; the caller's row stays as it is."""
    pipeline = Pipeline("p")

    @pipeline.stage
    def split(row: dict[str, Any], ctx: RowContext) -> Any:
        row["touched"] = True
        assert (ctx.session, ctx.topic, ctx.key) == ("process", "p", "k")
        ctx.emit("elsewhere", {})
        return [row, {**row, "n": 2}] if row["n"] == 1 else None

    @pipeline.stage(timeout=5)
    async def later(row: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        return row

    @pipeline.stage(frame=True)
    def frames(frame: Any) -> Any:
        return frame.assign(m=frame["n"] * 10)

    row = {"n": 1}
    assert pipeline.process(row, key="k") == [{"n": 1, "touched": True, "m": 10}, {"n": 2, "touched": True, "m": 20}]
    assert row == {"n": 1}
    assert pipeline.process({"n": 5}, key="k") == []


def test_process_tells_why_a_row_failed() -> None:
    """A row that fails raises with its stage and the reason."""
    pipeline = Pipeline("p").add(lambda row: row["missing"], name="look")
    with pytest.raises(RowmillError, match="stage 'look': KeyError: 'missing'"):
        pipeline.process({})


@pytest.mark.parametrize("key", [7, "\ud800"])
def test_process_checks_the_key(key: Any) -> None:
    """A key that could not be on the wire is refused here, too."""
    with pytest.raises(ConfigError, match="key"):
        Pipeline("p").add(same).process({}, key=key)


async def test_process_in_a_running_loop() -> None:
    """It may be called where an event loop runs already, as in a notebook."""
    assert Pipeline("p").add(same).process({"a": 1}) == [{"a": 1}]
