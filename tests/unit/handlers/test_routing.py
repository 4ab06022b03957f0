"""The router: which path a row takes, what happens on the way, and how it learns from measurements."""

# Handlers here are made for their signatures, not for what they do with their arguments.
# ruff: noqa: ARG005
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from rowmill.handlers.chain import Chain
from rowmill.handlers.context import RowContext
from rowmill.handlers.errors import StageFailedError, StopExecution, UnroutedError
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.outcomes import Failure, Outcome
from rowmill.handlers.registry import Registry
from rowmill.handlers.retry import Retry
from rowmill.handlers.routing import Adaptive, Route, Router, StatisticsByName
from rowmill.handlers.runtime import Runtime
from rowmill.handlers.stage import make_stage
from rowmill.state.errors import ConfigError
from support.fake_clock import FakeClock


class Dice(FakeClock):
    """A clock whose chance is written down; even when that is used up."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0) if self.numbers else 0.5


@pytest.fixture
def clock() -> FakeClock:
    """The worker's clock."""
    return FakeClock()


@pytest.fixture
async def ctx(clock: FakeClock) -> AsyncIterator[RowContext]:
    """A row's context."""
    pool = BlockingPool(4)
    yield RowContext("t", 0, 1, 0, "k", (("h", b"1"),), "live", runtime=Runtime(pool, clock))
    pool.close()


def noting(name: str) -> Any:
    """A stage that notes in the row that it saw it."""

    async def note(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "seen": [*row.get("seen", []), name]}

    return make_stage(note, name=name)


def registry_of(*types: str) -> Registry:
    """A registry whose components note in the row that they saw it."""
    registry = Registry()
    for component_type in types:
        registry.register(component_type, lambda config, name=component_type: noting(name).handler)
    return registry


async def seen(router: Router, row: dict[str, Any], ctx: RowContext) -> Any:
    """The stages that a row met."""
    result = await router(row, ctx)
    assert isinstance(result, dict)
    return result.get("seen", [])


# --- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "path", "why"),
    [
        ({"kind": "a", "n": 9}, ("a1", "a2"), "rule \"kind='a'\""),
        ({"kind": "b", "n": 9}, ("b",), "rule 'large'"),
        ({"kind": "b", "n": 1}, ("rest",), "default"),
        ({"kind": "keyed", "n": 1}, ("k",), "rule 'by key'"),
        ({"n": 1}, ("rest",), "default"),
    ],
)
async def test_the_first_rule_that_holds_wins(
    row: dict[str, Any], path: tuple[str, ...], why: str, ctx: RowContext
) -> None:
    """Fields or functions, of the row or with its context; in the order they were added."""

    def large(row: dict[str, Any]) -> bool:
        return bool(row["n"] > 5)

    router = Router(default="otherwise").path("otherwise", noting("rest"))
    router.rule({"kind": "a"}, [noting("a1"), noting("a2")]).rule(large, noting("b"))
    router.rule(lambda row, ctx: row.get("kind") == "keyed" and ctx.key == "k", noting("k"), name="by key")
    route = router.choose(row, ctx)
    assert (route.path, route.why) == (path, why)
    assert await seen(router, row, ctx) == list(path)


def test_choosing_needs_no_worker() -> None:
    """``choose`` works by itself, runs nothing and counts nothing."""
    router = Router().path("fast", noting("a"), noting("b")).to_topic("away", "elsewhere")
    router.rule({"to": 1}, "fast").rule({"to": 2}, "away").rule({"to": 3}, [noting("c"), noting("d")])
    assert router.choose({"to": 1}) == Route("fast", ("a", "b"), "rule 'to=1'")
    assert router.choose({"to": 2}) == Route("away", ("topic:elsewhere",), "rule 'to=2'")
    assert router.choose({"to": 3}) == Route("c>d", ("c", "d"), "rule 'to=3'")
    assert router.determine_optimal_path({"to": 1}) == ["a", "b"]
    assert router.to_dict()["paths"] == {}


@pytest.mark.parametrize("fields", [{"a": 1}, {"a": 1, "b": None}])
@pytest.mark.parametrize("row", [{}, {"a": 2}, {"b": None}, {"a": 1}, {"a": 1, "b": None}])
def test_fields_must_be_there_and_equal(fields: dict[str, Any], row: dict[str, Any]) -> None:
    """A field that is absent equals nothing, not even None."""
    router = Router(default="no").path("no", noting("no")).rule(fields, noting("yes"))
    holds = all(name in row and row[name] == value for name, value in fields.items())
    assert router.choose(row).name == ("yes" if holds else "no")


async def test_no_route_is_a_failure(ctx: RowContext) -> None:
    """Without a rule that holds and without a default the row fails as ``no_route``, and is counted."""
    router = Router().rule({"a": 1}, noting("x"))
    with pytest.raises(UnroutedError, match="none of 1 rules") as caught:
        await router({"a": 2}, ctx)
    assert caught.value.kind == "no_route"
    assert router.to_dict()["unrouted"] == 1


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda r: r.rule(lambda row: row["n"] > 1, noting("x"), name="big"), "rule 'big' raised KeyError: 'n'"),
        (lambda r: r.rule(lambda row: row["n"] > 1, noting("x")), "rule '1' raised KeyError: 'n'"),
        (lambda r: r.analyse(lambda row: row["n"]), "analyser raised KeyError: 'n'"),
    ],
)
async def test_a_raising_rule_is_the_rows_failure(
    build: Callable[[Router], Router], named: str, ctx: RowContext
) -> None:
    """It names the rule or the analyser, and later rules are not asked."""
    router = build(Router(default="rest").path("rest", noting("rest")))
    with pytest.raises(StageFailedError, match=named) as caught:
        await router({}, ctx)
    assert caught.value.kind == "KeyError"
    assert isinstance(caught.value.failure.error, KeyError)
    assert router.unrouted == 1


# --- analysis ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "path"),
    [
        (["x", "y"], ("x", "y")),
        (("y", "x"), ("y", "x")),
        (["x", "x"], ("x",)),
        (["two", "x"], ("p", "q", "x")),
        ("named", ("n",)),
        ("x", ("x",)),
        ([], ("rest",)),
        (None, ("rest",)),
    ],
)
async def test_requirements_make_the_path(answer: Any, path: tuple[str, ...], ctx: RowContext) -> None:
    """Types of the registry or steps that meet a requirement; a path by name; or no answer."""
    router = Router(registry_of("x", "y"), default="rest").path("rest", noting("rest")).path("named", noting("n"))
    router.analyse(lambda row: answer, {"two": [noting("p"), noting("q")]})
    assert router.choose({}).path == path
    assert await seen(router, {}, ctx) == list(path)


@pytest.mark.parametrize("answer", [5, {"x": 1}, [1], ["x", None]])
async def test_an_analyser_that_gives_something_else(answer: Any, ctx: RowContext) -> None:
    """It is the row's failure."""
    with pytest.raises(ConfigError, match="analyser"):
        await Router(registry_of("x")).analyse(lambda row: answer)({}, ctx)


@pytest.mark.parametrize("registry", [None, registry_of("x")])
async def test_a_requirement_that_nothing_meets(registry: Registry | None, ctx: RowContext) -> None:
    """It is the row's failure, names what there is, and leaves nothing behind in memory."""
    router = Router(registry).analyse(lambda row: [row["need"]], {"z": noting("z")})
    before = router.stages
    for number in range(3):
        with pytest.raises(ConfigError, match=r"known: [xz]"):
            await router({"need": f"no-{number}"}, ctx)
    assert router.stages == before


async def test_analysed_paths_are_bounded(ctx: RowContext) -> None:
    """However many combinations an analyser comes up with, figures and paths stay bounded."""
    names = [f"t{number}" for number in range(9)]
    router = Router(registry_of(*names))
    router.analyse(lambda row: [name for bit, name in enumerate(names) if row["bits"] >> bit & 1])
    for bits in range(1, 400):
        await router({"bits": bits}, ctx)
    paths = router.to_dict()["paths"]
    assert len(paths) == 257
    assert sum(path["rows"] for path in paths.values()) == 399
    assert len(router._analysed_paths) <= 256


# --- mistakes when building --------------------------------------------------------------------------------------


async def _async_predicate(row: dict[str, Any]) -> bool:
    return True


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda: Router("registry"), "registry"),  # type: ignore[arg-type]
        (lambda: Router(report=5), "report"),  # type: ignore[arg-type]
        (lambda: Router(cache_size=0), "cache_size"),
        (lambda: Router(cache_key=5), "cache_key"),  # type: ignore[arg-type]
        (lambda: Router(config=5), "config"),  # type: ignore[arg-type]
        (lambda: Router(options={"x": {"retries": 3}}), "retries"),
        (lambda: Router(options={"x": {"batch": 3}}), "batch"),
        (lambda: Router(registry_of("x"), config=lambda row: {}, options={"x": {"cache": 1}}), "cache|use "),
        (lambda: Router().path("p"), "steps"),
        (lambda: Router().path("p p", noting("x")), "name"),
        (lambda: Router().path("p", noting("x")).path("p", noting("y")), "another path"),
        (lambda: Router().path("p", noting("x")).to_topic("p", "t"), "another path"),
        (lambda: Router().path("p", 5), "step"),  # type: ignore[arg-type]
        (lambda: Router().path("p", "type"), "registry"),
        (lambda: Router().path("p", lambda row: row, lambda row: {}), "another step has this name"),
        (lambda: Router().path("p", make_stage(lambda rows: rows, name="x", batch=2)), "batch"),
        (lambda: Router(options={"x": {"timeout": 1}}).path("p", noting("x")), "finished Stage"),
        (lambda: Router(options={"x": {"timeout": 1}}).path("p", noting("y")).stages, "no step has this name"),
        (lambda: Router(registry_of("x")).path("p", "nope").stages, "known: x"),
        (lambda: Router(default="nope").path("p", noting("x")).stages, "paths: p"),
        (lambda: Router().to_topic("p", ""), "topic"),
        (lambda: Router().to_topic("p", "a b"), "topic"),
        (lambda: Router().rule(5, noting("x")), "condition"),
        (lambda: Router().rule({}, noting("x")), "condition"),
        (lambda: Router().rule(_async_predicate, noting("x")), "condition"),
        (lambda: Router().rule(lambda a, b, c: True, noting("x")), "row"),
        (lambda: Router().rule(lambda row: True, []), "target"),
        (lambda: Router().rule(len, noting("x")).rule(len, noting("y")), "another rule"),
        (lambda: Router().analyse(5), "analyser"),  # type: ignore[arg-type]
        (lambda: Router().analyse(len).analyse(len), "already"),
        (lambda: Router().adaptive("a", ["p", "q"]), "define this path first"),
        (lambda: Router().path("p", noting("x")).adaptive("p", ["p", "q"]), "another path"),
        (lambda: Adaptive(["p"]), "candidates"),
        (lambda: Adaptive(["p", "p"]), "candidates"),
        (lambda: Adaptive("pq"), "candidates"),
        (lambda: Adaptive(["p", "q"], explore=1), "explore"),
        (lambda: Adaptive(["p", "q"], weight=2), "weight"),
        (lambda: Adaptive(["p", "q"], half_life=0), "half_life"),
        (lambda: Adaptive(["p", "q"], failure_seconds=-1), "failure_seconds"),
    ],
)
def test_mistakes_are_refused_when_built(wrong: Callable[[], Any], named: str) -> None:
    """Each is a ConfigError that names the setting or the remedy."""
    with pytest.raises(ConfigError, match=named):
        wrong()


# --- on the way --------------------------------------------------------------------------------------------------


async def test_a_path_mixes_what_there_is(ctx: RowContext) -> None:
    """Types, plain and async functions, with and without context, and Stages, in one path; all are its stages."""

    def plain(row: dict[str, Any], ctx: RowContext) -> dict[str, Any]:
        return {**row, "seen": [*row["seen"], f"plain {ctx.key!r}"]}

    router = Router(registry_of("type"), default="all").path("all", "type", plain, noting("stage"))
    assert await seen(router, {}, ctx) == ["type", "plain 'k'", "stage"]
    assert [stage.name for stage in router.stages] == ["type", "plain", "stage"]


async def test_steps_are_shared_between_paths() -> None:
    """The same handler in two paths is one stage: one set of slots, one breaker."""

    def shared(row: dict[str, Any]) -> dict[str, Any]:
        return row

    router = Router().path("p", shared, noting("x")).path("q", shared)
    assert [stage.name for stage in router.stages] == ["shared", "x"]


@pytest.mark.parametrize(
    ("returned", "results"),
    [
        (None, None),
        ([], None),
        ([{"n": 1}], [{"n": 1, "seen": ["after"]}]),
        ([{"n": 1}, {"n": 2}], [{"n": 1, "seen": ["after"]}, {"n": 2, "seen": ["after"]}]),
    ],
)
async def test_dropping_and_splitting(returned: Any, results: Any, ctx: RowContext) -> None:
    """A dropped row ends; each part of a split one goes on."""
    router = Router(default="p").path("p", make_stage(lambda row: returned, name="first"), noting("after"))
    assert await router({}, ctx) == results
    assert router.to_dict()["paths"]["p"]["dropped"] == (results is None)


async def test_parts_may_split_and_drop_again(ctx: RowContext) -> None:
    """Parts of parts stay in order; all dropped is dropped."""

    def halve(row: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"n": row["n"] + "a"}, {"n": row["n"] + "b"}]

    one, two = make_stage(halve, name="one"), make_stage(halve, name="two")
    keep = make_stage(lambda row: row if row["n"] not in {"ab", "ba"} else None, name="keep")
    router = Router(default="p").path("p", one, two, keep).path("none", one, make_stage(lambda row: None, name="no"))
    router.rule({"n": "x"}, "none")
    assert await router({"n": ""}, ctx) == [{"n": "aa"}, {"n": "bb"}]
    assert await router({"n": "x"}, ctx) is None


async def test_a_failure_keeps_its_stage(ctx: RowContext) -> None:
    """The error names path and stage, and carries the inner failure with kind, attempts and cause."""

    async def boom(row: dict[str, Any]) -> dict[str, Any]:
        raise OSError("down")

    router = Router(default="p", options={"boom": {"retry": Retry(attempts=3)}}).path("p", noting("x"), boom)
    with pytest.raises(StageFailedError, match="path 'p': stage 'boom': OSError: down") as caught:
        await router({}, ctx)
    failure = caught.value.failure
    assert (failure.stage, failure.kind, failure.message, failure.attempts) == ("boom", "OSError", "down", 3)
    assert caught.value.kind == "OSError"
    assert isinstance(caught.value.__cause__, OSError)
    assert router.to_dict()["paths"]["p"]["failed"] == 1


async def test_a_failing_part_fails_the_row(ctx: RowContext) -> None:
    """Nothing of a row appears if one of its parts failed."""
    split = make_stage(lambda row: [{"n": 1}, {"n": 0}], name="split")
    divide = make_stage(lambda row: {"n": 1 / row["n"]}, name="divide")
    with pytest.raises(StageFailedError, match="divide"):
        await Router(default="p").path("p", split, divide)({}, ctx)


async def test_stopping_passes_through(ctx: RowContext) -> None:
    """A handler inside a path can end the session as any other; that is no failure of the path."""

    async def stop(row: dict[str, Any]) -> dict[str, Any]:
        raise StopExecution("enough")

    router = Router().path("p", stop).path("q", noting("x")).adaptive("a", ["p", "q"])
    with pytest.raises(StopExecution):
        await router({}, ctx)
    assert router.to_dict()["paths"]["p"]["failed"] == 0


async def test_concurrency_of_inner_stages(ctx: RowContext) -> None:
    """A stage inside a path keeps to its ``concurrency``, with policies and without."""
    running = peak = 0

    async def count(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        for _ in range(3):
            await asyncio.sleep(0)
        running -= 1
        return row

    for options in ({"concurrency": 2}, {"concurrency": 2, "retry": Retry(attempts=2)}):
        name = f"count{len(options)}"
        router = Router(default="p").path("p", make_stage(count, name=name, **options))
        peak = 0
        async with asyncio.timeout(10):
            await asyncio.gather(*(router({"n": n}, ctx) for n in range(9)))
        assert peak == 2


async def test_as_a_stage_of_a_chain(ctx: RowContext) -> None:
    """Inside a chain its failures are rows' failures, with the inner kind, and other rows go on."""
    router = Router().rule({"ok": True}, noting("x")).rule({"ok": False}, make_stage(lambda row: 1 / 0, name="boom"))
    rows: list[Outcome] = [{"ok": True}, {"ok": False}, {"ok": None}]
    async with asyncio.timeout(10):
        await Chain([make_stage(router, name="route")]).run(rows, [ctx] * 3, ctx.runtime)
    assert rows[0] == {"ok": True, "seen": ["x"]}
    failures = [row for row in rows if isinstance(row, Failure)]
    assert [failure.kind for failure in failures] == ["ZeroDivisionError", "no_route"]
    assert "boom" in failures[0].stage + failures[0].message


# --- topics and reports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
async def test_routes_to_topics(keep: bool, ctx: RowContext) -> None:
    """The row goes to the topic with its key and headers, and ends here or goes on as well."""
    router = Router(default="t").to_topic("t", "elsewhere", keep=keep)
    assert await router({"a": 1}, ctx) == ({"a": 1} if keep else None)
    (emitted,) = ctx.emitted
    assert (emitted.topic, emitted.row, emitted.key, emitted.headers) == (
        "elsewhere",
        {"a": 1},
        b"k",
        (("h", b"1"),),
    )


async def test_results_carry_the_route(ctx: RowContext) -> None:
    """With ``report=`` each result says which route was taken; the row that came in stays as it was."""
    split = make_stage(lambda row: [{"n": 1}, {"n": 2}], name="split")
    router = Router(default="p", report="route").path("p", noting("x")).rule({"split": True}, [split])
    row = {"a": 1}
    told = {"route": "p", "path": ["x"], "why": "default"}
    assert await router(row, ctx) == {"a": 1, "seen": ["x"], "route": told}
    assert row == {"a": 1}
    told = {"route": "split", "path": ["split"], "why": "rule 'split=True'"}
    assert await router({"split": True}, ctx) == [{"n": 1, "route": told}, {"n": 2, "route": told}]


async def test_a_kept_row_is_not_changed_by_its_report(ctx: RowContext) -> None:
    """What goes to the topic is the row, without the report."""
    router = Router(default="t", report="route").to_topic("t", "elsewhere", keep=True)
    result = await router({"a": 1}, ctx)
    assert isinstance(result, dict)
    assert result["route"]["path"] == ["topic:elsewhere"]
    assert ctx.emitted[0].row == {"a": 1}


async def test_figures_by_path(clock: FakeClock, ctx: RowContext) -> None:
    """Rows, failures, drops and seconds of each path."""

    async def slow(row: dict[str, Any]) -> dict[str, Any] | None:
        await clock.sleep(row["s"])
        return None if row["s"] == 1 else {"x": 1 / row["n"]}

    router = Router(default="p").path("p", slow)
    await router({"s": 1, "n": 1}, ctx)
    await router({"s": 3, "n": 1}, ctx)
    with pytest.raises(StageFailedError):
        await router({"s": 2, "n": 0}, ctx)
    assert router.to_dict()["paths"]["p"] == {
        "rows": 3,
        "failed": 1,
        "dropped": 1,
        "seconds": 6.0,
        "slowest_seconds": 3.0,
        "mean_seconds": 2.0,
    }


def test_figures_are_bounded() -> None:
    """Names beyond the limit are counted together."""
    statistics = StatisticsByName(most=2)
    for name in ["a", "b", "c", "d", "a"]:
        statistics.of(name).count(1.0)
    assert {name: found["rows"] for name, found in statistics.to_dict().items()} == {"a": 2, "b": 1, "(others)": 2}


# --- remembered decisions ----------------------------------------------------------------------------------------


async def test_decisions_are_remembered_by_key(ctx: RowContext) -> None:
    """Equal keys are decided once; None is decided anew; rules that are added count at once."""
    asked: list[Any] = []

    def rule(row: dict[str, Any]) -> bool:
        asked.append(row["kind"])
        return bool(row["kind"] == "a")

    router = Router(cache_key=lambda row: row["kind"], default="rest").path("rest", noting("rest"))
    router.rule(rule, noting("a"))
    for kind in ["a", "b", "a", "b", None, None]:
        await router({"kind": kind}, ctx)
    assert asked == ["a", "b", None, None]
    assert router.cache_hits == 2
    router.rule({"kind": "b"}, noting("b"))
    assert router.choose({"kind": "b"}).path == ("b",)


async def test_remembered_decisions_are_bounded(ctx: RowContext) -> None:
    """The decision not used for longest is forgotten first."""
    asked: list[int] = []
    router = Router(cache_key=lambda row: row["n"], cache_size=2, default="p").path("p", noting("x"))
    router.rule(lambda row: asked.append(row["n"]), noting("never"))
    for n in [1, 2, 1, 3, 1, 2]:
        await router({"n": n}, ctx)
    assert asked == [1, 2, 3, 2]


@pytest.mark.parametrize("key", [lambda row: row["missing"], lambda row: [], lambda row, ctx: ctx.nothing])
async def test_a_key_that_is_none(key: Any, ctx: RowContext) -> None:
    """A key function that raises, or gives what has no hash, is the row's failure."""
    router = Router(cache_key=key, default="p").path("p", noting("x"))
    with pytest.raises(StageFailedError, match="cache_key raised"):
        await router({}, ctx)


# --- choice by measurement ---------------------------------------------------------------------------------------


class World:
    """Two paths whose latency and failures can be set, on one clock."""

    def __init__(self, clock: FakeClock, **options: Any) -> None:
        self.clock = clock
        self.seconds = {"small": 0.1, "large": 0.2}
        self.broken: set[str] = set()
        self.router = Router(clock=clock).path("small", self._stage("small")).path("large", self._stage("large"))
        self.router.adaptive("best", ["small", "large"], **options)

    def _stage(self, name: str) -> Any:
        async def handler(row: dict[str, Any]) -> dict[str, Any]:
            self.clock.advance(self.seconds[name])
            if name in self.broken:
                raise OSError("down")
            return {"by": name}

        return make_stage(handler, name=name)

    async def rows(self, number: int, ctx: RowContext) -> dict[str, int]:
        """How many of so many rows took which path."""
        taken = {"small": 0, "large": 0}
        for _ in range(number):
            before = {name: self.router.statistics.of(name).rows for name in taken}
            with suppress(StageFailedError):
                await self.router({}, ctx)
            for name in taken:
                taken[name] += self.router.statistics.of(name).rows - before[name]
        return taken


async def test_the_quicker_path_wins(clock: FakeClock, ctx: RowContext) -> None:
    """Each path is measured once; then the quicker one gets the rows, and the slower one a look from time to time."""
    world = World(clock, explore=0)
    assert await world.rows(2, ctx) == {"small": 1, "large": 1}
    assert (await world.rows(100, ctx))["small"] == 100
    world.seconds["small"] = 0.5
    taken = await world.rows(100, ctx)
    assert taken["large"] > 90
    assert world.router.choose({}).why == "measured: best of 2"


async def test_a_failing_path_is_left_and_found_again(clock: FakeClock, ctx: RowContext) -> None:
    """A path that fails gets single tries while it is down, and the rows again some time after it recovered."""
    world = World(clock, explore=0, half_life=5.0)
    await world.rows(50, ctx)
    world.broken = {"small"}
    taken = await world.rows(1000, ctx)
    assert 0 < taken["small"] < 20
    world.broken = set()
    await world.rows(400, ctx)  # 80 seconds
    assert (await world.rows(100, ctx))["small"] > 90


async def test_a_share_of_the_rows_explores(ctx: RowContext) -> None:
    """A lot below ``explore`` sends the row to a path drawn by a second lot."""
    clock = Dice()
    world = World(clock, explore=0.1)
    await world.rows(2, ctx)
    clock.numbers = [0.09, 0.6, 0.1]
    assert world.router.choose({}) == Route("large", ("large",), "measured: a try")
    assert world.router.choose({}) == Route("small", ("small",), "measured: best of 2")


def test_lots_at_their_edges() -> None:
    """The smallest and the largest lot draw the first and the last path."""
    choice = Adaptive(["p", "q", "r"], explore=0.5)
    assert choice.choose(Dice(0.0, 0.0))[0] == "p"
    assert choice.choose(Dice(0.0, 0.9999999999999999))[0] == "r"


def test_unknown_paths_get_one_row_each() -> None:
    """While the first row is on its way, others go to paths that are known, or are spread over the unknown ones."""
    choice, clock = Adaptive(["p", "q"], explore=0), FakeClock()
    taken = []
    for _ in range(4):
        name, _ = choice.choose(clock)
        taken.append(name)
        choice.begin(name, clock.monotonic())
    assert taken == ["p", "q", "p", "q"]
    choice.end("p", clock.monotonic(), 9.0, failed=True)
    assert choice.choose(clock)[0] == "p"
    choice.give_up("q")
    choice.give_up("q")
    assert choice.choose(clock)[0] == "q"


def test_a_hanging_path_gets_no_crowd() -> None:
    """Once what is held against a path has faded, one row tries it; until it is back the others stay away."""
    choice, clock = Adaptive(["p", "q"], explore=0, half_life=1.0), FakeClock()
    for name, failed in (("p", True), ("q", False)):
        choice.begin(name, clock.monotonic())
        choice.end(name, clock.monotonic(), 0.1, failed=failed)
    clock.advance(30)
    choice.begin("q", clock.monotonic())
    assert choice.choose(clock)[0] == "p"
    choice.begin("p", clock.monotonic())
    assert choice.choose(clock)[0] == "q"


async def test_a_cancelled_row_says_nothing_of_its_path(ctx: RowContext) -> None:
    """A row taken away by a rebalance is neither a success nor a failure."""
    entered = asyncio.Event()

    async def wait(row: dict[str, Any]) -> dict[str, Any]:
        entered.set()
        await asyncio.Event().wait()
        return row

    router = Router().path("p", wait).path("q", noting("x")).adaptive("a", ["p", "q"])
    row = asyncio.create_task(router({}, ctx))
    async with asyncio.timeout(10):
        await entered.wait()
        row.cancel()
        await asyncio.wait({row})
    assert router.to_dict()["measured"]["a"]["p"] == {
        "latency_seconds": 0.0,
        "failure_rate": 0.0,
        "rows": 0,
        "running": 0,
    }
    assert router.to_dict()["paths"]["p"]["rows"] == 0


async def test_rules_may_lead_to_a_choice(clock: FakeClock, ctx: RowContext) -> None:
    """A rule and an analysis may name it, and rows that nothing claims go there."""
    world = World(clock, explore=0)
    router = world.router.rule({"a": 1}, "best").analyse(lambda row: "best" if "b" in row else None)
    assert router.choose({"a": 1}).why == "rule 'a=1', measured: best of 2"
    assert router.choose({"b": 1}).why == "analysis, measured: best of 2"
    assert router.choose({}).why == "measured: best of 2"


async def test_what_is_remembered_is_the_choice(ctx: RowContext) -> None:
    """With ``cache_key`` a choice by measurement is still made for each row."""
    router = Router(cache_key=lambda row: "same").path("p", noting("p")).path("q", noting("q"))
    router.adaptive("best", ["p", "q"], explore=0)
    assert [await seen(router, {}, ctx) for _ in range(2)] == [["p"], ["q"]]
    assert router.cache_hits == 1
