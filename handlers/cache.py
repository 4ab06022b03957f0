"""Caches of stages: what was paid for once is not paid for again.

The parts, from the user's word to the engine's: :class:`Cache` says what is wanted; :func:`fingerprint` turns a
handler's code into text, so that a changed prompt or changed code misses; :class:`StageCache` makes keys of rows and
answers of bytes; :class:`Flights` lets rows with equal keys wait for the one that is being computed.
"""

from __future__ import annotations

import asyncio
import decimal
import enum
import functools
import json
import logging
import re
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from hashlib import blake2b
from pathlib import PurePath
from typing import Any, NamedTuple, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

from ..state import codec
from ..state.answers import Answers
from ..state.clock import Clock
from ..state.context import checked_cost
from ..state.errors import BadRowError, ConfigError
from ..state.model import Row
from .context import RowContext

log = logging.getLogger(__name__)

KEY_BYTES = 20
"""Length of a key: with 2^64 answers the odds that any two keys meet are still one in 2^33."""

FORMAT = 1
"""Version of a stored answer. Others are misses."""

LARGEST_ANSWER = 4 * 1024 * 1024
"""Bytes above which no answer is stored, whatever ``max_bytes`` says."""

_LEAST_BYTES = 1024 * 1024
_LONGEST_TTL = 100 * 365 * 86_400.0

Inputs: TypeAlias = "Sequence[str] | Callable[[Row], Any] | None"


# --- what is wanted --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Keep a stage's answers: ``pipeline.stage(cache=Cache(ttl=86_400))``.

    An answer is found again by what it depends on: the stage's name, its code, ``parameters``, and ``inputs`` of the
    row. Not by the pipeline or session: a replay, a side session, or another pipeline with the same stage asks the
    same question, and paying twice for it is what a cache is there to prevent. What the handler reads besides (tables,
    the row's key or headers, a file, a model behind an API) the cache does not see: put it in ``inputs`` or
    ``parameters``, or change ``version`` with it.

    Results that JSON does not give back as they were (dates, tuples, NaN) are not kept; nor are failures.

    Args:
        ttl: seconds for which an answer may be given again, above 0; None: for ever.
        inputs: names of the row's fields that the answer depends on, or a function from the row to anything JSON (a hit
            then sets and removes the fields that the handler did in the row that paid, and leaves the others alone);
            None: the whole row. A field that is absent and one that is null are different inputs, and so are 1, 1.0
            and true.
        parameters: anything else the answer depends on, as JSON: a prompt, a model's name.
        version: stands for the handler's code, which is not looked at then: change it when answers must not be
            given again. None: the code's own fingerprint, see :func:`fingerprint`.
        max_bytes: room on this machine's disk for each worker, from 1 MiB (256 MiB); the oldest answers go first. An
            answer above a sixteenth of it, or above 4 MiB, is not kept.
        shared: also write answers to a compacted topic, so that they follow their partition to any machine (False).

    Raises:
        ConfigError: an option is none of the above.
    """

    ttl: float | None = None
    inputs: Inputs = None
    parameters: Mapping[str, Any] | None = None
    version: str | None = None
    max_bytes: int = 256 * 1024 * 1024
    shared: bool = False

    def __post_init__(self) -> None:
        if self.ttl is not None and not _is_number(self.ttl, _LONGEST_TTL):
            raise ConfigError("Cache(ttl=)", self.ttl, "give seconds above 0, or leave it out to keep answers for ever")
        _check_inputs(self.inputs)
        _check_parameters(self.parameters)
        if self.version is not None and (not isinstance(self.version, str) or not self.version):
            raise ConfigError("Cache(version=)", self.version, "give text, such as '2', or leave it out")
        if isinstance(self.max_bytes, bool) or not isinstance(self.max_bytes, int) or self.max_bytes < _LEAST_BYTES:
            raise ConfigError("Cache(max_bytes=)", self.max_bytes, f"give at least {_LEAST_BYTES} (1 MiB)")
        if not isinstance(self.shared, bool):
            raise ConfigError("Cache(shared=)", self.shared, "give True or False")


def _is_number(value: Any, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= most


def _check_inputs(inputs: Any) -> None:
    if inputs is None or callable(inputs):
        return
    is_names = isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes))
    if not is_names or not inputs or not all(isinstance(name, str) for name in inputs):
        raise ConfigError(
            "Cache(inputs=)", inputs, "give a list of field names, or a function of the row; leave it out for all of it"
        )


def _check_parameters(parameters: Any) -> None:
    if parameters is None:
        return
    remedy = "give a dict with text as keys and JSON values, such as {'model': 'small', 'prompt': PROMPT}"
    if not isinstance(parameters, Mapping) or not all(isinstance(name, str) for name in parameters):
        raise ConfigError("Cache(parameters=)", parameters, remedy)
    try:
        _PLAIN.encode(dict(parameters))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError("Cache(parameters=)", parameters, f"{remedy} ({error})") from None


# --- keys ------------------------------------------------------------------------------------------------------

_PLAIN = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
"""One text per value. The standard library's, since it keeps NaN, null and integers of any size apart."""


def _tagged(value: Any) -> Any:
    """A form for what earlier stages may put in a row although JSON has none for it.

    Raises:
        TypeError: two different values of this type may look alike.
    """
    if isinstance(value, (Decimal, UUID, PurePath, Fraction)):
        return [type(value).__name__, str(value)]
    if isinstance(value, (date, time)):
        return [type(value).__name__, value.isoformat()]
    if isinstance(value, timedelta):
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return [type(value).__name__, str(value.dtype), value.tolist()]
    raise TypeError(f"a {type(value).__name__} has no JSON form")


_TAGGED = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=_tagged)


def _canonical(value: Any) -> bytes:
    """Equal values give equal bytes, different ones different bytes.

    Raises:
        TypeError, ValueError, RecursionError: the value has no such form.
    """
    try:
        return b"j" + _PLAIN.encode(value).encode()
    except TypeError:  # another first byte: a tagged value must not pass for a list that looks like it
        return b"t" + _TAGGED.encode(value).encode()


# --- answers ---------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """The row that paid for an answer: its session and where it stands in its topic."""

    session: str
    topic: str
    partition: int
    offset: int


class Answer(NamedTuple):
    """What a handler gave for a row, what it cost, and which row paid.

    ``outcome`` is a row, a list of rows, or None for a row that was dropped. ``made_ms`` is milliseconds since the
    epoch.
    """

    outcome: Row | list[Row] | None
    cost: Decimal
    tokens: int
    made_ms: int
    origin: Origin

    def paid_by(self, origin: Origin) -> bool:
        """Whether this row is the one that paid: run again after a kill, its cost belongs in the context."""
        return self.origin == origin

    def encode(self) -> bytes:
        """The answer as it is stored.

        Raises:
            BadRowError: JSON has no form for the outcome, or gives back another one.
        """
        encoded = codec.encode([self.outcome, str(self.cost), self.tokens, self.made_ms, *self.origin])
        try:
            faithful = bool(codec.loads(encoded)[0] == self.outcome)
        except (ValueError, TypeError):  # arrays do not say whether they are equal
            faithful = False
        if not faithful:
            raise BadRowError("unserialisable", "the result is not the same when it comes back from JSON")
        return bytes((FORMAT,)) + encoded

    @classmethod
    def decode(cls, value: bytes) -> Answer:
        """The counterpart of :meth:`encode`; each call makes a new outcome, which the caller may change.

        Raises:
            ValueError: it is no answer, or one of another format.
        """
        if value[:1] != bytes((FORMAT,)):
            raise ValueError(f"no answer of format {FORMAT}")
        parts = codec.loads(value[1:])
        if not isinstance(parts, list) or [type(part) for part in parts[1:]] != [str, int, int, str, str, int, int]:
            raise ValueError("no answer: the parts are others")
        outcome, cost, tokens, made_ms, *origin = parts
        several = outcome if isinstance(outcome, list) else () if outcome is None else (outcome,)
        if not all(isinstance(row, dict) for row in several):
            raise ValueError("no answer: the outcome is no row")
        return cls(outcome, checked_cost(cost), tokens, made_ms, Origin(*origin))


_EXACT = decimal.Context(prec=200)  # as sums of costs are: Decimal's everyday context rounds to 28 digits


class Before:
    """What a row's context was like before a call, to tell what the call itself cost and did.

    One call at a time may use a context meanwhile: give stages of a row that run side by side contexts of their own.

    Args:
        context: the row's, or None where a chain runs without contexts.
    """

    __slots__ = ("_context", "_cost", "_effects", "_tokens")

    def __init__(self, context: RowContext | None) -> None:
        self._context = context
        self._cost = context.cost if context is not None else Decimal(0)
        self._tokens = context.tokens if context is not None else 0
        self._effects = _effects(context)

    @property
    def cost(self) -> Decimal:
        """What was reported since, exactly."""
        return Decimal(0) if self._context is None else _EXACT.subtract(self._context.cost, self._cost)

    @property
    def tokens(self) -> int:
        """The same for tokens."""
        return 0 if self._context is None else self._context.tokens - self._tokens

    @property
    def has_effects(self) -> bool:
        """Whether the call did what a hit would leave out: emitted, wrote tables, changed key, headers or timestamp."""
        return _effects(self._context) != self._effects

    @property
    def origin(self) -> Origin:
        """The row."""
        context = self._context
        if context is None:
            return Origin("", "", -1, -1)
        return Origin(context.session, context.topic, context.partition, context.offset)


def _effects(context: RowContext | None) -> object:
    if context is None:
        return None
    return len(context.emitted), len(context.operations), context.key, context.headers, context.timestamp


Share: TypeAlias = "Callable[[str, Origin, bytes, bytes, int | None], None]"
"""Takes an answer for others: the stage, the row that paid, the key, the encoded answer, when it expires (ms)."""


def changes_of(row: Row, outcome: Any) -> Any:
    """A result as what it changed in its row: the fields it set, and those it took out; several results as several.

    A field that was set to the value it had already counts as unchanged.
    """
    if isinstance(outcome, list):
        return [changes_of(row, result) for result in outcome]
    if outcome is None:
        return None
    changed = {name: value for name, value in outcome.items() if name not in row or not _same(row[name], value)}
    return {"set": changed, "removed": [name for name in row if name not in outcome]}


def _same(before: Any, after: Any) -> bool:
    return type(before) is type(after) and bool(before == after)


def with_changes(row: Row, changes: Any) -> Any:
    """The counterpart of :func:`changes_of`, for a row with the same inputs."""
    if isinstance(changes, list):
        return [with_changes(row, one) for one in changes]
    if changes is None:
        return None
    removed = set(changes["removed"])
    return {**{name: value for name, value in row.items() if name not in removed}, **changes["set"]}


class StageCache:
    """The cache of one stage in one worker. Everything is quick and called on the event loop.

    Args:
        cache: what is wanted.
        stage: the stage's name.
        handler: the stage's handler, as the user gave it.
        answers: where answers are kept.
        clock: the time.
        share: takes answers for other workers; None: they are not shared.

    Attributes:
        flights: the keys that are being computed.
        hits: rows that found an answer.
        misses: rows that found none and led.
        stored: answers kept.
        refused: rows and answers that could not be cached: no JSON form, or too large.
        damaged: stored answers that could not be read, misses all of them.
    """

    def __init__(
        self, cache: Cache, stage: str, handler: Any, answers: Answers, clock: Clock, share: Share | None = None
    ) -> None:
        self.cache = cache
        self.answers = answers
        self.flights = Flights()
        self.hits = self.misses = self.stored = self.refused = self.damaged = 0
        self._stage = stage
        self._clock = clock
        self._share = share
        self._told = False
        self._largest = min(cache.max_bytes // 16, LARGEST_ANSWER)
        self._ttl_ms = None if cache.ttl is None else max(1, round(cache.ttl * 1000))
        self._fields = None if callable(cache.inputs) or cache.inputs is None else tuple(dict.fromkeys(cache.inputs))
        code = ["version", cache.version] if cache.version is not None else ["code", fingerprint(handler)]
        self.is_partial = cache.inputs is not None
        """Whether answers hold what the handler changed: other rows with the same inputs have other fields besides."""
        about = [FORMAT, stage, code, dict(cache.parameters or {}), "changes" if self.is_partial else "results"]
        self._beginning = blake2b(_canonical(about), digest_size=KEY_BYTES)

    def key(self, row: Row) -> bytes | None:
        """The key of a row's answer; None, counted as refused, when its inputs have no form that tells them apart.

        Raises:
            Exception: whatever the user's function of inputs raises; that row has failed.
        """
        inputs = self._inputs(row)
        try:
            canonical = _canonical(inputs)
        except (TypeError, ValueError, RecursionError) as error:
            self.refuse(error)
            return None
        digest = self._beginning.copy()
        digest.update(canonical)
        return digest.digest()

    def enter(self, key: bytes) -> Answer | asyncio.Future[bytes | None] | None:
        """Begin a row: its answer (a hit), a future to :meth:`wait` for, or None (a miss): call, then leave.

        Who got None must call :meth:`leave`, come what may, with what :meth:`keep` returned or, after a failure, None.
        """
        answer = self.find(key)
        if answer is not None:
            return answer
        waiting = self.flights.enter(key)
        if waiting is None:
            self.misses += 1
        return waiting

    async def wait(self, key: bytes, waiting: asyncio.Future[bytes | None]) -> Answer | None:
        """The answer of the row that leads (a hit), or None: it gave up, now this one leads, as after ``enter``."""
        return self.arrived(await self.flights.wait(key, waiting))

    def arrived(self, value: bytes | None) -> Answer | None:
        """What the future of :meth:`enter` gave, for callers with callbacks of their own."""
        if value is None:
            self.misses += 1
            return None
        self.hits += 1
        return Answer.decode(value)

    def leave(self, key: bytes, value: bytes | None) -> None:
        """The row that leads is done: its answer goes to those who wait; without one, the next of them leads."""
        self.flights.leave(key, value)

    def find(self, key: bytes) -> Answer | None:
        """The answer that is stored under a key and no older than ``ttl``; counts a hit."""
        now_ms = self._clock.now_ms()
        value = self.answers.get(key, now_ms)
        if value is None:
            return None
        try:
            answer = Answer.decode(value)
        except (ValueError, TypeError):  # ConfigError, of a cost that is none, is a ValueError
            self.damaged += 1
            return None
        # Also by the present ttl, which may be shorter than that of the worker that stored it.
        if self._ttl_ms is not None and answer.made_ms + self._ttl_ms <= now_ms:
            return None
        self.hits += 1
        return answer

    def keep(self, key: bytes, outcome: Any, cost: Decimal, tokens: int, origin: Origin) -> bytes | None:
        """Store what a call gave, at once; returns it encoded, for those who wait for it.

        None, counted as refused, when JSON has no faithful form for it. One that is too large to be stored is
        returned all the same.

        Args:
            key: of :meth:`key`.
            outcome: a row, a list of rows, or None.
            cost: what the call reported, not what the row had spent before.
            tokens: the same.
            origin: the row that paid.
        """
        now_ms = self._clock.now_ms()
        try:
            value = Answer(outcome, cost, tokens, now_ms, origin).encode()
        except BadRowError as error:
            self.refuse(error)
            return None
        if len(value) > self._largest:
            self.refuse(f"an answer has {len(value):,} bytes, and max_bytes allows {self._largest:,}")
            return value
        expires_ms = None if self._ttl_ms is None else now_ms + self._ttl_ms
        self.answers.put(key, value, expires_ms)
        self.stored += 1
        if self._share is not None:
            self._share(self._stage, origin, key, value, expires_ms)
        return value

    def refuse(self, reason: object) -> None:
        """Count something that is not cached; the first of a stage is logged with its reason."""
        self.refused += 1
        if not self._told:
            self._told = True
            log.warning(
                "stage %r: some rows are not cached: %s; the stage's further ones are only counted", self._stage, reason
            )

    def _inputs(self, row: Row) -> Any:
        if self._fields is not None:
            return {name: row[name] for name in self._fields if name in row}
        return self.cache.inputs(row) if callable(self.cache.inputs) else row


# --- flights ---------------------------------------------------------------------------------------------------


class Flights:
    """Keys whose answer is being computed: the first row computes, those that come meanwhile wait for it.

    Failures are not shared: when the first one fails, or is cancelled, the next one tries itself. Nothing here runs
    by itself: a waiting row is a future and needs neither a task nor a slot. What enters must leave, come what may::

        waiting = flights.enter(key)
        value = None if waiting is None else await flights.wait(key, waiting)
        if value is None:                      # we lead: at once, or because the row before us gave up
            try:
                value = ...                    # call, and encode what it gave
            finally:
                flights.leave(key, value)      # None after a failure
    """

    def __init__(self) -> None:
        self._waiting: dict[bytes, deque[asyncio.Future[bytes | None]] | None] = {}

    def __len__(self) -> int:
        """How many keys are in flight."""
        return len(self._waiting)

    def enter(self, key: bytes) -> asyncio.Future[bytes | None] | None:
        """None: you lead, so compute, and ``leave`` in the end. Otherwise a future to wait for.

        It gives the encoded answer, or None: then you lead. Cancel the future itself, or call :meth:`abandon`, when
        nobody is to wait for it any more.
        """
        if key not in self._waiting:
            self._waiting[key] = None
            return None
        queue = self._waiting[key]
        if queue is None:
            queue = self._waiting[key] = deque()
        waiting: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        queue.append(waiting)
        return waiting

    async def wait(self, key: bytes, waiting: asyncio.Future[bytes | None]) -> bytes | None:
        """Await the future of :meth:`enter`. Cancelled meanwhile, it hands the lead on if it had just come."""
        try:
            return await waiting
        except asyncio.CancelledError:
            self.abandon(key, waiting)
            raise

    def leave(self, key: bytes, answer: bytes | None = None) -> None:
        """You lead and are done: with an answer, for all who wait; without one, the next of them leads."""
        queue = self._waiting.pop(key, None)
        while queue:
            waiting = queue.popleft()
            if waiting.done():  # cancelled
                continue
            waiting.set_result(answer)
            if answer is None:
                self._waiting[key] = queue
                return

    def abandon(self, key: bytes, waiting: asyncio.Future[bytes | None]) -> None:
        """The row that waits is gone. If the lead had come to it already, the next one gets it. Call it once."""
        if not waiting.done():
            waiting.cancel()
        elif not waiting.cancelled() and waiting.result() is None:
            self.leave(key)


# --- fingerprints ----------------------------------------------------------------------------------------------

_MOST_DEPTH = 40
_MOST_NODES = 50_000

_LONGEST = 10_000
"""Items above which a container counts by its type and length: a word list must not use the whole budget up."""

_SIMPLE = {date, time, datetime, timedelta, timezone, ZoneInfo, Decimal, Fraction, UUID, range, complex}
"""Types whose ``repr`` is the whole value and the same in every process, besides JSON's. Exactly these: a subclass
may have a ``repr`` with an address in it."""

_CODE_PARTS = ("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags", "co_names", "co_freevars")
_UNSEEN_MEMBERS = {
    "__dict__", "__weakref__", "__module__", "__doc__", "__annotations__", "__firstlineno__", "__static_attributes__",
    "__qualname__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl",
    "__orig_bases__", "__parameters__",
}  # fmt: skip


def fingerprint(handler: Any) -> str:
    """A digest of everything in a handler's code that may change its answers, the same in every process.

    Seen are: bytecode and constants, its functions and lambdas inside, defaults, closures, ``functools.partial``
    arguments; of what it mentions from its module the simple values (a prompt in a constant), functions and classes,
    and objects of such classes with their simple attributes; simple values in modules of the user's that it mentions
    (``prompts.SCORE``); a callable object's class and simple attributes. Simple is what JSON has, and tuples, sets,
    dates, Decimals, enums, paths, patterns. Anything else counts by its type's name.

    Not seen are: imported libraries, functions imported from other modules, files, the environment, a model behind an
    API; containers of more than 10,000 items (but for their length), things past the first 50,000, and what is nested
    deeper than 40. Another minor version of Python has other bytecode,
    and so another fingerprint.

    Never raises.
    """
    seen = _Fingerprint()
    seen.root(handler)
    return seen.hexdigest()


class _Fingerprint:
    """Walks from a handler to what it refers to, and feeds a digest."""

    def __init__(self, nodes: int = 0) -> None:
        self._digest = blake2b(digest_size=16)
        self._places: dict[int, int] = {}
        self._alive: list[Any] = []  # an id means something only while its object is there
        self._nodes = nodes

    def hexdigest(self) -> str:
        """The digest of what was walked."""
        return self._digest.hexdigest()

    def root(self, handler: Any) -> None:
        """The handler itself: an object with ``__call__`` counts with its class, whoever wrote that."""
        try:
            home = _home(handler)
        except Exception:  # noqa: BLE001 - see below
            home = ""
        self._value(handler, home, 0)

    def _say(self, *words: object) -> None:
        for word in words:
            data = word if isinstance(word, bytes) else str(word).encode("utf-8", "surrogatepass")
            self._digest.update(len(data).to_bytes(8, "big"))
            self._digest.update(data)

    def _value(self, value: Any, home: str, depth: int) -> None:
        """Anything. ``home`` is the module whose own things are looked into."""
        self._nodes += 1
        try:
            if self._scalar(value):
                return
            if _is_long(value):
                self._say("long", len(value))
                self._by_type(value)
            elif depth > _MOST_DEPTH or self._nodes > _MOST_NODES:
                self._by_type(value)
            elif not self._known(value):
                self._compound(value, home, depth + 1)
        except Exception:  # noqa: BLE001 - objects may raise from anything; whatever they are must not stop a pipeline
            self._by_type(value)

    def _by_type(self, value: Any) -> None:
        kind = type(value)
        self._say("type", kind.__module__, kind.__qualname__)

    def _scalar(self, value: Any) -> bool:
        """Whether it is a single value that can be said whole; then it is."""
        kind = type(value)
        if value is None or value is Ellipsis or kind is bool or kind in _SIMPLE:
            self._say(kind.__name__, repr(value))
        elif isinstance(value, enum.Enum):
            self._say("enum", kind.__qualname__, value.name)
            self._scalar(value.value)
        elif isinstance(value, str):
            self._say("str", str.__str__(value))
        elif isinstance(value, int):
            self._say("int", int.__repr__(value))
        elif isinstance(value, float):
            self._say("float", float.__repr__(value))
        elif isinstance(value, (bytes, bytearray)):
            self._say("bytes", bytes(value))
        elif isinstance(value, PurePath):
            self._say("path", str(value))
        elif isinstance(value, re.Pattern):
            self._say("pattern", value.pattern, value.flags)
        else:
            return False
        return True

    def _known(self, value: Any) -> bool:
        """Whether it was met before: then its place in the order of meeting says enough, and cycles end.

        Constants of code are told each time: which of them are one object depends on how the code was loaded.
        """
        if isinstance(value, (tuple, frozenset, types.CodeType)):
            return False
        place = self._places.get(id(value))
        if place is None:
            self._places[id(value)] = len(self._places)
            self._alive.append(value)
            return False
        self._say("again", place)
        return True

    def _compound(self, value: Any, home: str, depth: int) -> None:
        if isinstance(value, types.CodeType):
            self._code(value, home, depth)
        elif isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, type):
            self._class(value, home, depth)
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._say(type(value).__name__, len(value))
            for name, item in value.items():  # in their order: it may be that of a prompt's parts
                self._value(name, home, depth)
                self._value(item, home, depth)
        elif isinstance(value, (set, frozenset)):
            self._set(value, home, depth)
        elif isinstance(value, (types.BuiltinFunctionType, types.MethodDescriptorType, types.ModuleType)):
            self._say("name", getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__))
        elif (parts := _parts(value)) is not None:
            self._say(type(value).__name__, len(parts))
            for part in parts:
                self._value(part, home, depth)
        elif type(value).__module__ == home:
            self._object(value, home, depth)
        else:
            self._by_type(value)

    def _code(self, code: types.CodeType, home: str, depth: int) -> None:
        self._say("code", code.co_code, getattr(code, "co_exceptiontable", b""))
        for part in _CODE_PARTS:
            self._say(part, getattr(code, part))
        for constant in code.co_consts:
            self._value(constant, home, depth)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        home = function.__globals__.get("__name__", function.__module__)
        self._say("function")
        self._code(function.__code__, home, depth)
        self._value(function.__defaults__, home, depth)
        self._value(function.__kwdefaults__, home, depth)
        for cell in function.__closure__ or ():
            try:
                content = cell.cell_contents
            except ValueError:  # not assigned yet
                self._say("empty")
            else:
                self._value(content, home, depth)
        names = _names(function.__code__)
        for name in names:
            if name in function.__globals__:
                self._say("global", name)
                self._global(function.__globals__[name], names, home, depth)

    def _global(self, value: Any, names: Sequence[str], home: str, depth: int) -> None:
        """Something that a function mentions: its module's own things are looked into, others count by name."""
        if isinstance(value, types.ModuleType):
            self._module(value, names, home, depth)
        elif (isinstance(value, (types.FunctionType, type)) or _wrapped(value)) and value.__module__ != home:
            self._say("name", value.__module__, value.__qualname__)
        else:
            self._value(value, home, depth)

    def _module(self, module: types.ModuleType, names: Sequence[str], home: str, depth: int) -> None:
        """A module by name, and, unless it is Python's own, those of its simple values that are mentioned."""
        self._say("module", module.__name__)
        if module.__name__.partition(".")[0] in sys.stdlib_module_names:
            return
        for name in names:
            value = vars(module).get(name)
            if value is None or isinstance(value, (bool, int, float, str, bytes, list, tuple, dict, set, frozenset)):
                self._say(name)
                self._value(value, home, depth)

    def _set(self, items: Iterable[Any], home: str, depth: int) -> None:
        """Sorted by the digests of its items: the order of a set differs between processes."""
        digests = []
        for item in items:
            part = _Fingerprint(self._nodes)
            part._value(item, home, depth)
            digests.append(part.hexdigest())
            self._nodes = part._nodes  # or else objects that are in sets of each other would never end
        self._say("set", *sorted(digests))

    def _class(self, kind: type, home: str, depth: int) -> None:
        if kind.__module__ != home:
            self._say("name", kind.__module__, kind.__qualname__)
            return
        self._say("class", len(kind.__bases__))
        for base in kind.__bases__:
            self._value(base, home, depth)
        for name, member in sorted(vars(kind).items()):
            # Slots have their content in the objects.
            if name not in _UNSEEN_MEMBERS and not isinstance(member, types.MemberDescriptorType):
                self._say(name)
                self._value(member, home, depth)

    def _object(self, value: Any, home: str, depth: int) -> None:
        self._say("object")
        self._value(type(value), home, depth)
        for name, content in sorted(_attributes(value).items()):
            self._say(name)
            self._value(content, home, depth)


def _home(handler: Any) -> str:
    """The module that a handler's code is from: of its class, if it is an object."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if isinstance(handler, types.MethodType):
        handler = handler.__self__
    if isinstance(handler, (types.FunctionType, type)):
        return str(handler.__module__)
    return str(type(handler).__module__)


def _is_long(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, set, frozenset, deque)) and len(value) > _LONGEST


def _wrapped(value: Any) -> Any:
    """The function inside of what ``functools.cache`` and the like have made of it, or None."""
    return None if isinstance(value, types.FunctionType) else getattr(value, "__dict__", {}).get("__wrapped__")


def _parts(value: Any) -> Sequence[Any] | None:
    """What a thing of a few known kinds is made of; None for other kinds."""
    if isinstance(value, (list, tuple, deque)):
        return value
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, (functools.partial, functools.partialmethod)):
        return (value.func, value.args, value.keywords)
    if isinstance(value, property):
        return (value.fget, value.fset, value.fdel)
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    inner = _wrapped(value)
    return None if inner is None else (inner,)


def _names(code: types.CodeType) -> list[str]:
    """The names that code and the code inside it mention, each once, in a settled order."""
    found = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found.update(dict.fromkeys(_names(constant)))
    return list(found)


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                found[name] = getattr(value, name)
    return found
