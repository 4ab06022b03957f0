"""Components made on demand: factories by type, and a bounded pool of what they made.

A component does one thing to a row. It is a handler, or an object with a method ``run(row)`` or ``process(row)``
(looked for in this order, before the object's own ``__call__``), sync or async, with ``ctx`` as second argument where
it asks for one.

Pools belong to a worker's :class:`~rowmill.handlers.runtime.Runtime`: what a component holds (connections, sessions)
is bound to that worker's event loop. A component that somebody is using is never closed under their hands: evicted,
it is closed by the last one who leaves it.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, overload
from weakref import WeakKeyDictionary

from ..state.errors import ConfigError
from ..state.model import Row
from .context import RowContext
from .errors import HandlerTimeoutError, MisfitError
from .executors import BlockingPool
from .options import check_count, check_name, check_seconds
from .runtime import Runtime
from .stage import Handler, is_async, takes_context

log = logging.getLogger(__name__)

Factory: TypeAlias = Callable[[dict[str, Any]], Any]
"""Makes a component from its config; sync or async."""

F = TypeVar("F", bound=Factory)

METHODS = ("run", "process")
"""The methods that make an object a component, in the order they are looked for."""

_CLOSE_SECONDS = 10.0


class Registry:
    """Factories by type, and the components they made.

    Args:
        size: components kept per worker; beyond it the one not used for longest is closed.
        create_timeout: seconds that a factory may take.

    Raises:
        ConfigError: an option is wrong.
    """

    def __init__(self, *, size: int = 64, create_timeout: float = 300.0) -> None:
        check_count("Registry(size=)", size)
        check_seconds("Registry(create_timeout=)", create_timeout)
        self._size = size
        self._create_timeout = float(create_timeout)
        self._factories: dict[str, tuple[Factory, int]] = {}
        self._pools: WeakKeyDictionary[object, _Pool] = WeakKeyDictionary()
        self.created = 0
        """Components made so far."""
        self.failed = 0
        """Factories' calls that failed."""
        self.evicted = 0
        """Components that had to make room for others."""

    # --- factories -------------------------------------------------------------------------------------------

    @overload
    def register(self, component_type: str, factory: F, *, threads: int = 1) -> F: ...
    @overload
    def register(self, component_type: str, factory: None = None, *, threads: int = 1) -> Callable[[F], F]: ...
    def register(self, component_type: str, factory: Any = None, *, threads: int = 1) -> Any:
        """Say how components of a type are made; without ``factory`` it is a decorator.

        Args:
            component_type: 1 to 80 letters, digits, ``_`` and ``-``: it names the component's stage.
            factory: ``config -> component``, sync or async; a blocking one runs on a thread.
            threads: rows that one component with a blocking method takes at once. 1 is safe for components that
                were not made for threads. Async components are bounded by their stage's ``concurrency``.

        Raises:
            ConfigError: the type has a factory already, or an option is wrong.
        """
        check_name("register(component_type)", component_type)
        check_count("register(threads=)", threads)
        if factory is None:
            return partial(self.register, component_type, threads=threads)
        if not callable(factory):
            raise ConfigError("register(factory)", factory, "give a function that takes a config and gives a component")
        if component_type in self._factories:
            raise ConfigError("register(component_type)", component_type, "it has a factory already; use another name")
        self._factories[component_type] = (factory, threads)
        return factory

    @property
    def types(self) -> tuple[str, ...]:
        """The known types, in order."""
        return tuple(sorted(self._factories))

    def check(self, component_type: str) -> None:
        """Refuse a type that has no factory.

        Raises:
            ConfigError: also a ValueError; it names the known types.
        """
        if component_type not in self._factories:
            known = ", ".join(self.types) or "none yet"
            raise ConfigError("component type", component_type, f"unknown; register a factory for it; known: {known}")

    # --- components ------------------------------------------------------------------------------------------

    def create(self, component_type: str, config: Mapping[str, Any] | None = None) -> Any:
        """A new component that belongs to the caller: neither pooled nor closed by the registry.

        Raises:
            ConfigError: the type is unknown, the config is no mapping, or the factory is async (await
                :meth:`component` instead).
            Exception: whatever the factory raises.
        """
        self.check(component_type)
        factory, _ = self._factories[component_type]
        remedy = "its factory is async: use `await registry.component(...)`"
        if inspect.iscoroutinefunction(factory):
            raise ConfigError("create(component_type)", component_type, remedy)
        component = factory(_config(config))
        if inspect.iscoroutine(component):
            component.close()
            raise ConfigError("create(component_type)", component_type, remedy)
        return component

    async def component(
        self, component_type: str, config: Mapping[str, Any] | None = None, runtime: Runtime | None = None
    ) -> Any:
        """The pooled component of a type and config, made when first asked for; equal configs share one.

        Asked for by many at once, it is still made once. A factory's error goes to all who waited for it and is
        forgotten: the next one to ask tries again. It may be closed once others have pushed it out of the pool:
        whoever works with it for long uses :meth:`handler`, which holds on to it.

        Args:
            component_type: one that is registered.
            config: passed to the factory; JSON, or values that can be dict keys.
            runtime: the worker whose pool it is, such as ``ctx.runtime``; a blocking factory then runs on its
                threads. Default: a pool of the running event loop.

        Raises:
            ConfigError: the type is unknown, or the config cannot be compared.
            HandlerTimeoutError: the factory took longer than ``create_timeout``.
            Exception: whatever the factory raises.
        """
        async with self._pool(runtime).borrow(*self._order(component_type, config, runtime)) as loan:
            return loan.component

    def handler(
        self, component_type: str, config: Mapping[str, Any] | None = None, *, timeout: float | None = None
    ) -> Handler:
        """A handler that puts each row through the pooled component: for ``pipeline.add`` and for routes.

        Args:
            component_type: one that is registered when the first row comes.
            config: passed to the factory.
            timeout: that of the handler's stage, so that blocking methods which overran it are counted.

        Raises:
            ConfigError: the config cannot be compared.
        """
        return _Pooled(self, component_type, _config(config), timeout)

    def _order(
        self, component_type: str, config: Mapping[str, Any] | None, runtime: Runtime | None, key: Any = None
    ) -> _Order:
        self.check(component_type)
        config = _config(config)
        factory, threads = self._factories[component_type]
        make = partial(self._make, component_type, factory, config, runtime.pool if runtime else None)
        return key or key_of(component_type, config), make, threads

    async def _make(
        self, component_type: str, factory: Factory, config: dict[str, Any], threads: BlockingPool | None
    ) -> Any:
        try:
            component = await self._call(component_type, factory, config, threads)
        except BaseException:
            self.failed += 1
            raise
        self.created += 1
        return component

    async def _call(
        self, component_type: str, factory: Factory, config: dict[str, Any], threads: BlockingPool | None
    ) -> Any:
        limit = asyncio.timeout(self._create_timeout)
        try:
            async with limit:
                if threads is None or inspect.iscoroutinefunction(factory):
                    component = factory(config)
                else:
                    component = await threads.run(factory, config, timeout=self._create_timeout)
                if inspect.isawaitable(component):
                    component = await component
        except TimeoutError:
            if limit.expired():
                raise HandlerTimeoutError(
                    f"the factory of {component_type!r} gave nothing within {self._create_timeout:g} s"
                ) from None
            raise
        if component is None:
            raise MisfitError(f"the factory of {component_type!r} returned None; return a component")
        return component

    # --- pools -----------------------------------------------------------------------------------------------

    def _pool(self, runtime: Runtime | None) -> _Pool:
        owner = runtime if runtime is not None else asyncio.get_running_loop()
        pool = self._pools.get(owner)
        if pool is None:
            pool = self._pools[owner] = _Pool(self._size, runtime.pool if runtime else None, self._count_eviction)
            if runtime is not None:
                runtime.at_close(pool.aclose)
        return pool

    def _count_eviction(self) -> None:
        self.evicted += 1

    async def aclose(self, runtime: Runtime | None = None) -> None:
        """Close the components of a worker's pool, or those of the running event loop's own. Safe to call twice.

        Called with ``aclose()`` or ``close()``, on the worker's threads where these block. An error of theirs is
        logged. Components that are still used are closed when the last user leaves them.
        """
        pool = self._pools.pop(runtime if runtime is not None else asyncio.get_running_loop(), None)
        if pool is not None:
            await pool.aclose()

    def to_dict(self) -> dict[str, Any]:
        """Figures for status pages: the types, and how many components were made, failed, evicted and are kept."""
        kept = sum(len(pool) for pool in self._pools.values())
        return {
            "types": list(self.types),
            "created": self.created,
            "failed": self.failed,
            "evicted": self.evicted,
            "kept": kept,
        }

    # --- the names of other orchestrators ----------------------------------------------------------------------

    def register_component_factory(self, component_type: str, factory_func: Factory) -> None:
        """The same as :meth:`register`."""
        self.register(component_type, factory_func)

    def create_component_on_demand(self, component_type: str, config: Mapping[str, Any] | None = None) -> Any:
        """The same as :meth:`create`."""
        return self.create(component_type, config)


def handler_of(component: Any, name: str = "component") -> Handler:
    """What is called with a row: the component's ``run``, else its ``process``, else the component itself.

    Raises:
        ConfigError: it has none of them, or is a class.
    """
    if not inspect.isclass(component):
        for method in (*(getattr(component, name, None) for name in METHODS), component):
            if callable(method):
                return method  # type: ignore[no-any-return]  # getattr: anything callable is a Handler
    remedy = "a factory returns a handler, or an object (no class) with run(row) or process(row)"
    raise ConfigError(f"component {name!r}", component, remedy)


def frozen(value: Any) -> Any:
    """A config in a form that is equal for equal configs and can be a dict's key. 1, 1.0 and True are three things.

    Raises:
        ConfigError: a value in it is neither JSON nor hashable.
    """
    if isinstance(value, Mapping):
        return ("{}", frozenset((key, frozen(inner)) for key, inner in value.items()))
    if isinstance(value, (list, tuple)):
        return ("[]", tuple(frozen(inner) for inner in value))
    if isinstance(value, float):
        return ("float", repr(value))  # NaN differs from itself
    try:
        hash(value)
    except TypeError:
        raise ConfigError("config", value, "give JSON values, or ones that can be a dict's keys") from None
    return (type(value), value)


def key_of(component_type: str, config: Mapping[str, Any]) -> tuple[str, Any]:
    """What a component is pooled by.

    Raises:
        ConfigError: the config cannot be compared.
    """
    return component_type, frozen(config)


def _config(config: Mapping[str, Any] | None) -> dict[str, Any]:
    if config is not None and not isinstance(config, Mapping):
        raise ConfigError("config", config, "give a mapping, or leave it out")
    return dict(config or {})


# --- the handler of a pooled component -------------------------------------------------------------------------


class _Pooled:
    """Puts rows through the pooled component of a type and config."""

    def __init__(
        self, registry: Registry, component_type: str, config: dict[str, Any], timeout: float | None = None
    ) -> None:
        self.__name__ = component_type  # a stage made of it is named like the type
        self._registry = registry
        self._config = config
        self._key = key_of(component_type, config)  # once, not for each row
        self._timeout = timeout

    async def __call__(self, row: Row, ctx: RowContext) -> Any:
        """The component's answer for this row."""
        return await run_component(self._registry, self.__name__, self._config, row, ctx, self._timeout, self._key)


async def run_component(
    registry: Registry,
    component_type: str,
    config: Mapping[str, Any] | None,
    row: Row,
    ctx: RowContext,
    timeout: float | None = None,
    key: Any = None,
) -> Any:
    """One row through the pooled component.

    A blocking call that is not waited for any more goes on in its thread. The component must not get another row
    meanwhile, so it leaves the pool, and whoever queued for it gets a new one.

    Args:
        registry: where it comes from.
        component_type: its type.
        config: its config.
        row: the row.
        ctx: the row's context.
        timeout: seconds that a blocking method may take.
        key: that of type and config, for callers who know it already.

    Raises:
        ConfigError: the type is unknown, or its factory made no component.
        Exception: whatever the factory or the component raises.
    """
    runtime = ctx.runtime
    while True:
        async with registry._pool(runtime).borrow(*registry._order(component_type, config, runtime, key)) as loan:  # noqa: SLF001 - one module
            call = loan.call(component_type)
            arguments = (row, ctx) if call.takes_context else (row,)
            if call.is_async:
                return await call.handler(*arguments)
            async with loan.turns:
                if loan.deserted:
                    continue
                try:
                    result = await runtime.pool.run(call.handler, *arguments, timeout=timeout)
                except (asyncio.CancelledError, HandlerTimeoutError):
                    loan.desert()
                    raise
            return await result if inspect.isawaitable(result) else result


# --- the pool of one worker --------------------------------------------------------------------------------------


class _Loan:
    """A component of a pool, and who uses it."""

    __slots__ = ("_call", "closed", "component", "desert", "deserted", "evicted", "making", "turns", "users")

    def __init__(self, making: asyncio.Task[Any], threads: int) -> None:
        self.making: asyncio.Task[Any] | None = making
        self.component: Any = None
        self.users = 0
        self.turns = asyncio.Semaphore(threads)
        """Rows that a blocking component takes at once."""
        self.evicted = False
        self.closed = False
        self.deserted = False
        """Whether a thread may still be inside although nobody waits for it: then it is never closed."""
        self.desert: Callable[[], None] = lambda: None
        self._call: _Call | None = None

    async def wait(self) -> None:
        """Until the component is there; raises what its factory raised."""
        if self.making is not None:
            await asyncio.shield(self.making)  # whoever waits may be cancelled; the others go on

    def call(self, name: str) -> _Call:
        """How the component is called."""
        if self._call is None:
            handler = handler_of(self.component, name)
            self._call = _Call(handler, is_async(handler), takes_context(handler, name))
        return self._call


class _Call(NamedTuple):
    handler: Handler
    is_async: bool
    takes_context: bool


_Order: TypeAlias = "tuple[tuple[str, Any], Callable[[], Any], int]"
"""What a pool is asked for: key, how to make it, and threads per component."""


class _Pool:
    """Components by key, the least recently used first. On one event loop; nothing here needs a lock."""

    def __init__(self, size: int, threads: BlockingPool | None, on_eviction: Callable[[], None]) -> None:
        self._size = size
        self._threads = threads
        self._on_eviction = on_eviction
        self._loans: OrderedDict[Any, _Loan] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._loans)

    @asynccontextmanager
    async def borrow(self, key: Any, make: Callable[[], Any], threads: int) -> AsyncIterator[_Loan]:
        """The component of ``key``, which is not closed meanwhile."""
        loan = self._find(key, make, threads)
        loan.users += 1  # before the first await: it must not be closed between being made and being used
        try:
            await loan.wait()
            yield loan
        finally:
            loan.users -= 1
            self._settle(loan)

    def _find(self, key: Any, make: Callable[[], Any], threads: int) -> _Loan:
        loan = self._loans.get(key)
        if loan is not None:
            self._loans.move_to_end(key)
            return loan
        making = asyncio.create_task(make())
        loan = self._loans[key] = _Loan(making, threads)
        loan.desert = partial(self._desert, key, loan)
        making.add_done_callback(partial(self._made, key, loan))
        if len(self._loans) > self._size:
            self._on_eviction()
            self._evict(next(iter(self._loans)))
        return loan

    def _desert(self, key: Any, loan: _Loan) -> None:
        loan.deserted = True
        if self._loans.get(key) is loan:
            self._evict(key)

    def _made(self, key: Any, loan: _Loan, making: asyncio.Task[Any]) -> None:
        if making.cancelled() or making.exception() is not None:  # looked at, so that asyncio does not complain
            if self._loans.get(key) is loan:
                del self._loans[key]
            return
        loan.component, loan.making = making.result(), None
        self._settle(loan)

    def _evict(self, key: Any) -> None:
        loan = self._loans.pop(key)
        loan.evicted = True
        self._settle(loan)

    def _settle(self, loan: _Loan) -> None:
        """Close a component that was evicted and is not used."""
        if not loan.evicted or loan.users or loan.making is not None or loan.deserted or loan.closed:
            return
        loan.closed = True
        task = asyncio.get_running_loop().create_task(self._close(loan.component))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, component: Any) -> None:
        close = getattr(component, "aclose", None) or getattr(component, "close", None)
        if not callable(close):
            return
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                if self._threads is None or inspect.iscoroutinefunction(close):
                    result = close()
                else:
                    result = await self._threads.run(close, timeout=_CLOSE_SECONDS)
                if inspect.isawaitable(result):
                    await result
        except Exception as error:
            log.warning("closing the component %s failed", type(component).__qualname__, exc_info=error)

    async def aclose(self) -> None:
        """Close what is there and wait for it; what is used is closed by its last user."""
        for key in list(self._loans):
            self._evict(key)
        while self._closing:
            await asyncio.wait(set(self._closing))
