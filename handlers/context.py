"""What a handler may ask about its row, and what it may do besides returning one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..state.artifacts import ArtifactStore, load_artifact, put_artifact
from ..state.context import checked_cost, sum_costs
from ..state.errors import ConfigError
from ..state.model import RESERVED_PREFIX, Headers, Row
from ..state.table import Operation, RowTables, Table

if TYPE_CHECKING:
    from .capture import LogLines
    from .runtime import Runtime

_LOG = logging.getLogger("rowmill.handler")

NO_COST = Decimal(0)
_MOST_TOKENS = 10**12  # a row's; sums of many still fit in the 64 bits that JSON is written with


class Emit(NamedTuple):
    """A side output: a row for another topic, which appears together with the row's results."""

    topic: str
    row: Row
    key: bytes | None
    headers: Headers


TablesOpener: TypeAlias = "Callable[[RowContext], RowTables]"
"""Gives a row its view of the tables, when it first asks for one."""


class RowContext:
    """The second argument of a handler that asks for one (``def score(row, ctx)``).

    ``topic``, ``partition``, ``offset`` say where the row came from; ``session`` which execution this is.
    ``key`` (str, or bytes with ``keys="bytes"``, or None), ``timestamp`` (ms) and ``headers`` are the row's own
    and may be assigned: results carry what stands there when the row completes. One context serves a row through
    all stages. It must not be used after the row completed.
    """

    __slots__ = (
        "_charged", "_emitted", "_first_key", "_headers", "_key", "_open_tables", "_root", "_runtime", "_tables",
        "cost", "has_reported", "is_defaulted", "lines", "offset", "partition", "placed", "session", "timestamp",
        "tokens", "topic", "trace",
    )  # fmt: skip

    def __init__(
        self,
        topic: str,
        partition: int,
        offset: int,
        timestamp: int,
        key: str | bytes | None,
        headers: Headers,
        session: str,
        open_tables: TablesOpener | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self.topic = topic
        self.partition = partition
        self.offset = offset
        self.timestamp = timestamp
        self.session = session
        self._key = self._first_key = key
        self._headers = headers
        self._open_tables = open_tables
        self._tables: RowTables | None = None
        self._runtime = runtime
        self._root: RowContext | None = None
        self._charged: set[bytes] | None = None
        self._emitted: list[Emit] | None = None  # made for the first one: most rows emit nothing
        self.cost = NO_COST
        self.tokens = 0
        self.has_reported = False
        """Whether a handler said what it spent, be it nothing."""
        self.lines: LogLines | None = None
        """What was logged about the row, where that is kept."""
        self.is_defaulted = False
        """Whether some stage failed and the row went on with its fallback."""
        self.placed: Any = None
        """The engine's own: what the row's results became, where that had to be settled before the commit."""
        self.trace: Any = None
        """The engine's own: the row's span, where rows are traced."""

    def fork(self) -> RowContext:
        """A context for one attempt of a stage: it begins as this one is, and what it collects is its own.

        So the effects of an attempt that fails are gone, and those that a handler causes when nobody waits for it any
        more (a thread beyond its time-out) reach nothing.
        """
        attempt = RowContext(
            self.topic, self.partition, self.offset, self.timestamp, self._key, self._headers, self.session,
            self._open_tables, self._runtime,
        )  # fmt: skip
        attempt._root = self._root or self
        attempt.lines = self.lines
        attempt.trace = self.trace
        if self._tables is not None:
            attempt._tables = self._tables.fork()
        return attempt

    def charge_once(self, key: bytes) -> bool:
        """Whether what is known by this key has not been charged to the row yet; from now on it has."""
        if self._root is not None:
            return self._root.charge_once(key)
        if self._charged is None:
            self._charged = set()
        is_new = key not in self._charged
        self._charged.add(key)
        return is_new

    def adopt(self, attempt: RowContext) -> None:
        """Take over the effects of an attempt that succeeded; what it cost comes by :meth:`pay`."""
        self._key, self._headers, self.timestamp = attempt._key, attempt._headers, attempt.timestamp
        self._tables = attempt._tables
        if attempt._emitted:
            self.emitted += attempt._emitted
        self.is_defaulted |= attempt.is_defaulted

    def pay(self, attempt: RowContext) -> None:
        """Count what an attempt cost, whatever became of it."""
        self.has_reported |= attempt.has_reported
        if attempt.cost or attempt.tokens:
            self.cost, self.tokens = sum_costs(self.cost, attempt.cost), self.tokens + attempt.tokens

    @property
    def key(self) -> str | bytes | None:
        """The row's key; assign str, bytes or None to give the results another one."""
        return self._key

    @key.setter
    def key(self, value: str | bytes | None) -> None:
        key_bytes(value)
        self._key = value

    @property
    def headers(self) -> Headers:
        """The row's headers in order, as (name, bytes) pairs; assign pairs or a mapping to change the results'."""
        return self._headers

    @headers.setter
    def headers(self, value: Mapping[str, str | bytes | None] | Headers) -> None:
        self._headers = header_pairs(value)

    def is_bare(self, timestamp: int) -> bool:
        """Whether the row's results need nothing from here: key and timestamp are as they came, and there is no more.

        Most rows have a context only so that their log lines can be told apart, or to ask for the row's offset.
        """
        return (
            self.placed is None
            and self._key is self._first_key
            and not self._headers
            and not self._emitted
            and self.timestamp == timestamp
            and not self.cost
            and not self.tokens
            and not self.is_defaulted
        )

    @property
    def emitted(self) -> list[Emit]:
        """Side outputs so far."""
        if self._emitted is None:
            self._emitted = []
        return self._emitted

    @emitted.setter
    def emitted(self, value: list[Emit]) -> None:
        self._emitted = value

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose lines name session and row."""
        return _RowLog(_LOG, {"session": self.session, "row": f"{self.topic}/{self.partition}/{self.offset}"})

    @property
    def runtime(self) -> Runtime:
        """What the stages of this worker share; for handlers that run stages of their own.

        Raises:
            ConfigError: the context was made by hand, without one.
        """
        if self._runtime is None:
            raise ConfigError("ctx.runtime", None, "make the context with RowContext(..., runtime=Runtime(pool))")
        return self._runtime

    def table(self, name: str) -> Table:
        """A table that the pipeline declared with :meth:`~rowmill.Pipeline.table`.

        Raises:
            ConfigError: it did not.
        """
        if self._tables is None:
            if self._open_tables is None:
                raise ConfigError("ctx.table(name)", name, f"declare it at the pipeline: pipeline.table({name!r})")
            self._tables = self._open_tables(self)
        return self._tables.table(name)

    @property
    def operations(self) -> Sequence[Operation]:
        """What the row does to tables when it completes."""
        return self._tables.operations if self._tables is not None else ()

    def add_cost(self, amount: Decimal | int, tokens: int = 0) -> None:
        """Count money spent on this row, and tokens: they join the session's context when the row completes.

        Args:
            amount: Decimal or int from 0; no float, whose sums are not exact.
            tokens: from 0.

        Raises:
            ConfigError: anything else.
        """
        self.cost, self.tokens = sum_costs(self.cost, checked_cost(amount)), self.tokens + _tokens(tokens)
        self.has_reported = True

    def artifact(self, data: bytes | str | Any, *, name: str = "", type: str | None = None) -> Row:  # noqa: A002
        """Put something large where artifacts are kept; the reference to it that the row carries instead.

        It is safe there before the row is committed. Blocks while it is written: async handlers use
        :meth:`artifact_async`.

        Args:
            data: bytes, text, or a JSON value.
            name: what people may call it, such as ``page.png``.
            type: its media type; default: by its kind.

        Raises:
            ConfigError: the pipeline has no ``artifacts=``, or the name is no name.
            ArtifactError: it cannot be written; the row fails.
        """
        return put_artifact(self._artifacts(), data, name=name, content_type=type)

    def load_artifact(self, reference: Row) -> bytes:
        """What a reference leads to, its size and digest checked.

        Raises:
            ArtifactError: it is not there, or damaged.
        """
        return load_artifact(self._artifacts(), reference)

    async def artifact_async(self, data: bytes | str | Any, *, name: str = "", type: str | None = None) -> Row:  # noqa: A002
        """As :meth:`artifact`, on a thread."""
        put = partial(put_artifact, self._artifacts(), data, name=name, content_type=type)
        return await self.runtime.pool.run(put)

    async def load_artifact_async(self, reference: Row) -> bytes:
        """As :meth:`load_artifact`, on a thread."""
        return await self.runtime.pool.run(load_artifact, self._artifacts(), reference)

    def _artifacts(self) -> ArtifactStore:
        store = self._runtime.artifacts if self._runtime is not None else None
        if store is None:
            raise ConfigError("ctx.artifact", None, "give the pipeline artifacts='FOLDER'")
        return store

    def emit(
        self,
        topic: str,
        row: Row,
        *,
        key: str | bytes | None = None,
        headers: Mapping[str, str | bytes | None] | Headers = (),
    ) -> None:
        """Send ``row`` to ``topic`` as well, together with this row's results or not at all.

        Args:
            topic: its name; created when absent, where creation is allowed.
            row: a JSON object.
            key: str, bytes or None; None sends it without a key.
            headers: pairs or a mapping.

        Raises:
            ConfigError: the topic is no text, the row is no dict, or a key or header is no text or bytes.
        """
        if not isinstance(topic, str):
            raise ConfigError("emit(topic=)", topic, "a topic's name is str")
        if not isinstance(row, dict):
            raise ConfigError("emit(row=)", row, "a row is a dict")
        self.emitted.append(Emit(topic, row, key_bytes(key), header_pairs(headers)))


class _RowLog(logging.LoggerAdapter[logging.Logger]):
    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        extra = self.extra or {}
        kwargs["extra"] = {**extra, **(kwargs.get("extra") or {})}
        return f"[{extra['session']} {extra['row']}] {msg}", kwargs


def _tokens(tokens: int) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens <= _MOST_TOKENS:
        raise ConfigError("add_cost(tokens=)", tokens, f"give a whole number from 0 to {_MOST_TOKENS:,}")
    return tokens


def key_bytes(key: str | bytes | None) -> bytes | None:
    """A key as it goes on the wire.

    Raises:
        ConfigError: neither text, bytes nor None, or text with lone surrogates.
    """
    if key is None or isinstance(key, bytes):
        return key
    if not isinstance(key, str):
        raise ConfigError("key", key, "a key is str, bytes or None")
    return _utf8("key", key)


def header_pairs(headers: Mapping[str, str | bytes | None] | Headers) -> Headers:
    """Headers as they go on the wire: (name, bytes or None) in order.

    Raises:
        ConfigError: a name or value of another type, or a name that rowmill keeps for itself.
    """
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    checked: list[tuple[str, bytes | None]] = []
    for name, value in pairs:
        if not isinstance(name, str):
            raise ConfigError("headers", name, "a header's name is str")
        _utf8("header name", name)
        if name.startswith(RESERVED_PREFIX):
            raise ConfigError("headers", name, f"names that begin with {RESERVED_PREFIX!r} are rowmill's own")
        if isinstance(value, str):
            value = _utf8(f"header {name}", value)
        elif value is not None and not isinstance(value, bytes):
            raise ConfigError(f"header {name}", value, "a header's value is str, bytes or None")
        checked.append((name, value))
    return tuple(checked)


def _utf8(what: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(what, text, "text must be valid Unicode (no lone surrogates)") from None
