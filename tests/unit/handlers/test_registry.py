"""The registry: components by type, pooled, never made twice and never closed under somebody's hands."""

# Handlers and factories here are made for their signatures, not for what they do with their arguments.
# ruff: noqa: ARG005
from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from rowmill.handlers.context import RowContext
from rowmill.handlers.errors import HandlerTimeoutError, MisfitError
from rowmill.handlers.executors import BlockingPool
from rowmill.handlers.registry import Registry, frozen, handler_of
from rowmill.handlers.runtime import Runtime
from rowmill.state.errors import ConfigError
from support.fake_clock import FakeClock


@pytest.fixture
async def runtime() -> AsyncIterator[Runtime]:
    """What a worker shares."""
    pool = BlockingPool(4)
    yield Runtime(pool, FakeClock())
    pool.close()


@pytest.fixture
def ctx(runtime: Runtime) -> RowContext:
    """A row's context."""
    return RowContext("t", 0, 1, 0, "k", (), "live", runtime=runtime)


class Scorer:
    """A component with everything that can be watched."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config or {}
        self.closed = 0

    def run(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "score": self.config.get("score", 0)}

    def close(self) -> None:
        self.closed += 1


class Listening(Scorer):
    """Its calls wait for a signal, on the event loop."""

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.go_on = asyncio.Event()
        self.entered = asyncio.Event()

    async def run(self, row: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        self.entered.set()
        await self.go_on.wait()
        return {**row, "closed": self.closed}


async def settled() -> None:
    """Let whatever closes components do so."""
    for _ in range(20):
        await asyncio.sleep(0)


# --- making ------------------------------------------------------------------------------------------------------


def test_a_component_is_made_by_its_factory() -> None:
    """A type's factory gets the config; each call makes a new component."""
    registry = Registry()
    registry.register("scorer", Scorer)
    first, second = registry.create("scorer", {"score": 7}), registry.create("scorer")
    assert (first.config, second.config) == ({"score": 7}, {})
    assert first is not second


def test_as_decorator_and_by_the_expected_names() -> None:
    """Factories can be decorated, and the names of the orchestration course do the same."""
    registry = Registry()

    @registry.register("one")
    def make_one(config: dict[str, Any]) -> Scorer:
        return Scorer(config)

    registry.register_component_factory("two", make_one)
    assert registry.types == ("one", "two")
    assert make_one({}).config == {}
    assert registry.create_component_on_demand("two", {"max_tokens": 150}).config == {"max_tokens": 150}


def test_an_unknown_type_is_a_value_error_that_names_the_known_ones() -> None:
    """Whoever mistypes a type is told which there are."""
    registry = Registry()
    registry.register("json_processor", Scorer)
    registry.register("data_validator", Scorer)
    with pytest.raises(ValueError, match=r"'xml'; unknown; .*known: data_validator, json_processor"):
        registry.create("xml")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda r: r.register("a b", Scorer), "component_type"),
        (lambda r: r.register("", Scorer), "component_type"),
        (lambda r: r.register("x", 5), "factory"),
        (lambda r: r.register("scorer", Scorer), "already"),
        (lambda r: r.register("x", Scorer, threads=0), "threads"),
        (lambda r: r.create("scorer", ["no", "mapping"]), "config"),
        (lambda r: r.create("async"), "await registry.component"),
        (lambda r: r.create("async_lambda"), "await registry.component"),
        (lambda r: Registry(size=0), "size"),
        (lambda r: Registry(create_timeout=0), "create_timeout"),
    ],
)
def test_wrong_use_is_refused(wrong: Any, named: str) -> None:
    """Each mistake is a ConfigError that names the setting or the remedy."""
    registry = Registry()
    registry.register("scorer", Scorer)

    @registry.register("async")
    async def make(config: dict[str, Any]) -> Scorer:
        return Scorer(config)

    registry.register("async_lambda", lambda config: make(config))  # noqa: PLW0108 - plain, though its answer is awaited
    with pytest.raises(ConfigError, match=named):
        wrong(registry)


@pytest.mark.parametrize(
    ("component", "answer"),
    [
        (Scorer(), {"score": 0}),
        (lambda row: {"by": "call"}, {"by": "call"}),
        (type("P", (), {"process": lambda self, row: {"by": "process"}})(), {"by": "process"}),
        (
            type("B", (), {"process": lambda self, row: {"by": "process"}, "run": lambda self, row: {"by": "run"}})(),
            {"by": "run"},
        ),
        (
            type("C", (), {"__call__": lambda self, row: {"by": "call"}, "process": lambda self, row: {"by": "p"}})(),
            {"by": "p"},
        ),
    ],
)
def test_what_of_a_component_is_called(component: Any, answer: dict[str, Any]) -> None:
    """``run`` goes before ``process``, and both before the object's own call."""
    assert handler_of(component)({}) == answer


@pytest.mark.parametrize("component", [5, object(), Scorer, type("N", (), {"run": 5})()])
def test_what_is_no_component(component: Any) -> None:
    """An object without such a method, or a class, is refused."""
    with pytest.raises(ConfigError, match="component"):
        handler_of(component)


# --- configs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}, True),
        ({"a": {"x": None}}, {"a": {"x": None}}, True),
        ({"a": float("nan")}, {"a": float("nan")}, True),
        ({"a": 1}, {"a": 1.0}, False),
        ({"a": 1}, {"a": True}, False),
        ({"a": [1, 2]}, {"a": [2, 1]}, False),
        ({"a": {}}, {"a": []}, False),
        ({}, {"a": None}, False),
    ],
)
def test_which_configs_are_the_same(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    """The order of keys says nothing; types and the order of lists do."""
    assert (frozen(one) == frozen(other)) is same
    assert not same or hash(frozen(one)) == hash(frozen(other))


def test_a_config_that_cannot_be_compared() -> None:
    """A set in a config is refused instead of never being found again."""
    with pytest.raises(ConfigError, match="config"):
        frozen({"a": {1, 2}})


# --- pooling -----------------------------------------------------------------------------------------------------


async def test_equal_configs_share_a_component(runtime: Runtime) -> None:
    """One component per type and config, whoever asks; another worker has its own."""
    registry = Registry()
    registry.register("scorer", Scorer)
    one = await registry.component("scorer", {"a": 1, "b": 2}, runtime)
    assert await registry.component("scorer", {"b": 2, "a": 1}, runtime) is one
    assert await registry.component("scorer", {}, runtime) is not one
    assert await registry.component("scorer", {"a": 1, "b": 2}, Runtime(runtime.pool)) is not one
    assert await registry.component("scorer", {"a": 1, "b": 2}) is not one
    assert registry.created == 4


@pytest.mark.parametrize("kind", ["async", "blocking", "returns a coroutine"])
async def test_made_once_under_concurrency(kind: str, runtime: Runtime) -> None:
    """Many who ask at once wait for one factory's call, whatever kind it is."""
    made: list[Scorer] = []
    go_on = threading.Event()

    def blocking(config: dict[str, Any]) -> Scorer:
        assert go_on.wait(10)
        made.append(Scorer(config))
        return made[-1]

    async def awaited(config: dict[str, Any]) -> Scorer:
        for _ in range(5):
            await asyncio.sleep(0)
        made.append(Scorer(config))
        return made[-1]

    def plain(config: dict[str, Any]) -> Any:
        return awaited(config)

    factories: dict[str, Any] = {"async": awaited, "blocking": blocking, "returns a coroutine": plain}
    registry = Registry()
    registry.register("scorer", factories[kind])
    async with asyncio.timeout(10):
        asked = [asyncio.create_task(registry.component("scorer", {"n": 1}, runtime)) for _ in range(20)]
        await asyncio.sleep(0)
        go_on.set()
        components = await asyncio.gather(*asked)
    assert len(made) == 1
    assert all(component is made[0] for component in components)


async def test_a_factorys_error_is_not_kept(runtime: Runtime) -> None:
    """All who waited get the error; the next one to ask gets a component."""
    registry = Registry()
    attempts = 0

    @registry.register("scorer")
    async def make(config: dict[str, Any]) -> Scorer:
        nonlocal attempts
        attempts += 1
        await asyncio.sleep(0)
        if attempts == 1:
            raise OSError("no model")
        return Scorer(config)

    asked = [registry.component("scorer", runtime=runtime) for _ in range(3)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [OSError] * 3
    assert isinstance(await registry.component("scorer", runtime=runtime), Scorer)
    assert (attempts, registry.failed, registry.created) == (2, 1, 1)


async def test_one_who_gives_up_does_not_take_it_from_the_others(runtime: Runtime) -> None:
    """The first to ask is cancelled; the factory goes on for those who still wait."""
    registry = Registry()
    go_on = asyncio.Event()

    @registry.register("scorer")
    async def make(config: dict[str, Any]) -> Scorer:
        await go_on.wait()
        return Scorer(config)

    first = asyncio.create_task(registry.component("scorer", runtime=runtime))
    await asyncio.sleep(0)
    second = asyncio.create_task(registry.component("scorer", runtime=runtime))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first}, timeout=10)
    go_on.set()
    async with asyncio.timeout(10):
        assert isinstance(await second, Scorer)
    assert first.cancelled()
    assert registry.created == 1


async def test_a_factory_that_gives_nothing(runtime: Runtime) -> None:
    """None is no component; the error names the type."""
    registry = Registry()
    registry.register("scorer", lambda config: None)
    with pytest.raises(MisfitError, match="scorer"):
        await registry.component("scorer", runtime=runtime)


async def test_a_factory_that_never_ends(runtime: Runtime) -> None:
    """A factory has a deadline of its own."""
    registry = Registry(create_timeout=0.01)

    @registry.register("scorer")
    async def make(config: dict[str, Any]) -> None:
        await asyncio.Event().wait()

    with pytest.raises(HandlerTimeoutError, match="scorer"):
        await registry.component("scorer", runtime=runtime)


async def test_the_least_recently_used_one_goes(runtime: Runtime) -> None:
    """Beyond its size the pool closes the component that was not used for longest."""
    registry = Registry(size=2)
    registry.register("scorer", Scorer)
    one = await registry.component("scorer", {"n": 1}, runtime)
    two = await registry.component("scorer", {"n": 2}, runtime)
    assert await registry.component("scorer", {"n": 1}, runtime) is one
    await registry.component("scorer", {"n": 3}, runtime)
    async with asyncio.timeout(10):
        while not two.closed:
            await asyncio.sleep(0)
    assert (one.closed, two.closed) == (0, 1)
    assert await registry.component("scorer", {"n": 1}, runtime) is one
    assert registry.to_dict() == {"types": ["scorer"], "created": 3, "failed": 0, "evicted": 1, "kept": 2}


async def test_a_component_in_use_is_closed_by_its_last_user(ctx: RowContext, runtime: Runtime) -> None:
    """An evicted component serves the row that is in it to the end, and is closed then."""
    registry = Registry(size=1)
    made: list[Listening] = []

    @registry.register("slow")
    async def make(config: dict[str, Any]) -> Listening:
        made.append(Listening(config))
        return made[-1]

    row = asyncio.create_task(registry.handler("slow", {"n": 1})({"a": 1}, ctx))
    async with asyncio.timeout(10):
        while not made:
            await asyncio.sleep(0)
        await made[0].entered.wait()
        await registry.component("slow", {"n": 2}, runtime)
        await settled()
        assert made[0].closed == 0
        made[0].go_on.set()
        assert await row == {"a": 1, "closed": 0}
        while not made[0].closed:
            await asyncio.sleep(0)
    assert [one.closed for one in made] == [1, 0]


async def test_closing_the_pool_of_a_worker(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    """``aclose`` closes everything, async or not; what raises is logged; without a close nothing happens."""
    closed: list[str] = []

    class Async(Scorer):
        async def aclose(self) -> None:
            closed.append("aclose")

        def close(self) -> None:
            closed.append("never")

    class Failing(Scorer):
        def close(self) -> None:
            raise OSError("still busy")

    registry = Registry()
    for name, factory in {"sync": Scorer, "async": Async, "failing": Failing}.items():
        registry.register(name, factory)
    registry.register("plain", lambda config: lambda row: row)
    sync = await registry.component("sync", runtime=runtime)
    for name in ("async", "failing", "plain"):
        await registry.component(name, runtime=runtime)
    other = await registry.component("sync")
    async with asyncio.timeout(10):
        await registry.aclose(runtime)
        await registry.aclose(runtime)
    assert (sync.closed, closed, other.closed) == (1, ["aclose"], 0)
    assert "Failing failed" in caplog.text
    assert await registry.component("sync", runtime=runtime) is not sync
    await registry.aclose()
    assert other.closed == 1


async def test_a_worker_that_is_gone_takes_its_pool_with_it(runtime: Runtime) -> None:
    """The registry keeps no worker's components beyond the worker."""
    registry = Registry()
    registry.register("scorer", Scorer)
    own = Runtime(runtime.pool)
    await registry.component("scorer", runtime=own)
    assert registry.to_dict()["kept"] == 1
    del own
    await settled()
    gc.collect()
    assert registry.to_dict()["kept"] == 0


# --- rows through components --------------------------------------------------------------------------------------


async def test_rows_through_a_pooled_component(ctx: RowContext) -> None:
    """The handler of a type calls the component, with the context where it asks for one."""
    registry = Registry()
    registry.register("scorer", Scorer)
    registry.register("keyed", lambda config: lambda row, ctx: {**row, "key": ctx.key})
    assert await registry.handler("scorer", {"score": 3})({"a": 1}, ctx) == {"a": 1, "score": 3}
    assert await registry.handler("scorer", {"score": 3})({"a": 2}, ctx) == {"a": 2, "score": 3}
    assert await registry.handler("keyed")({}, ctx) == {"key": "k"}
    assert registry.created == 2


@pytest.mark.parametrize(("threads", "most"), [(1, 1), (3, 3)])
async def test_threads_in_a_blocking_component(threads: int, most: int, ctx: RowContext) -> None:
    """A blocking component gets one row at a time, unless its factory says that it stands more."""
    lock, inside, peak = threading.Lock(), 0, 0
    gate = threading.Barrier(most)

    def run(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal inside, peak
        with lock:
            inside += 1
            peak = max(peak, inside)
        gate.wait(10)
        with lock:
            inside -= 1
        return row

    registry = Registry()
    registry.register("blocking", lambda config: run, threads=threads)
    handler = registry.handler("blocking")
    async with asyncio.timeout(10):
        await asyncio.gather(*(handler({"n": n}, ctx) for n in range(6)))
    assert peak == most


async def test_a_component_with_a_lost_thread_gets_no_further_row(ctx: RowContext) -> None:
    """A blocking call that overran keeps its component; the next row, also a queued one, gets another."""
    registry = Registry()
    hangs, entered = threading.Event(), threading.Event()
    made: list[Scorer] = []

    class Blocking(Scorer):
        def run(self, row: dict[str, Any]) -> dict[str, Any]:
            if self is made[0]:
                entered.set()
                assert hangs.wait(10)
            return {"by": made.index(self)}

    @registry.register("blocking")
    def make(config: dict[str, Any]) -> Scorer:
        made.append(Blocking(config))
        return made[-1]

    handler = registry.handler("blocking")
    async with asyncio.timeout(10):
        lost = asyncio.create_task(handler({}, ctx))
        while not entered.is_set():
            await asyncio.sleep(0)
        queued = asyncio.create_task(handler({}, ctx))
        await settled()
        lost.cancel()
        assert await queued == {"by": 1}
        assert await handler({}, ctx) == {"by": 1}
        hangs.set()
        await registry.aclose(ctx.runtime)
    assert [one.closed for one in made] == [0, 1]


async def test_the_time_limit_of_a_blocking_component(ctx: RowContext) -> None:
    """A time limit that is handed in reaches the thread, where overruns are counted."""
    registry = Registry()
    hangs = threading.Event()
    registry.register("blocking", lambda config: lambda row: hangs.wait(10) and row)
    with pytest.raises(HandlerTimeoutError):
        await registry.handler("blocking", timeout=0.01)({}, ctx)
    assert ctx.runtime.pool.abandoned == 1
    hangs.set()
