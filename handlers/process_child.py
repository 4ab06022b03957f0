"""What runs in a process for CPU-bound handlers: calls come in over a socket as JSON, answers go out the same way.

The counterpart of :mod:`.processes`, which starts it. A frame is four bytes of length and a JSON text; an answer's
text has one letter before it. One call at a time, on the main thread. Standard output and error belong to the handler.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from ..state.codec import encode, loads
from ..state.errors import BadRowError, ConfigError
from ..state.table import Table
from .context import NO_COST, RowContext
from .errors import MisfitError
from .frames import is_frame, rows_to_frame, split_result

if TYPE_CHECKING:
    from ..state.artifacts import ArtifactStore
    from .runtime import Runtime

MOST_BYTES = 256 * 1024 * 1024
"""Longest call or answer: a batch of rows, not a data set."""

RESULT, ERROR = b"R", b"E"
LENGTH = struct.Struct("!I")

MAIN_ALIAS = "rowmill_main"
"""The parent's ``__main__`` file is loaded under this name, so that its ``if __name__ == "__main__":`` is false."""

_WATCH_SECONDS = 1.0
_TEXT_MOST = 10_000
_FRAMES_SHOWN = 12
_NOT_THEIRS = (str(Path(__file__).parent), str(Path(importlib.__file__).parent), "<frozen importlib")
_RULE = "a handler returns a dict, a list of dicts, or None to drop the row"

_this = {"is_child": False}


def is_child() -> bool:
    """Whether this process is one that runs handlers for another."""
    return _this["is_child"]


# --- life and death --------------------------------------------------------------------------------------------


def serve(number: int, parent: int) -> None:
    """Answer calls until the parent closes its end.

    Args:
        number: the socket's file descriptor.
        parent: the parent's process id; when it is gone, this process ends, whatever it is doing.
    """
    _this["is_child"] = True
    _end_with(parent)
    for each in (signal.SIGINT, signal.SIGTERM):
        # The parent decides when we end. A function, not SIG_IGN: what a handler starts would inherit that.
        signal.signal(each, lambda *_: None)
    connection = socket.socket(fileno=number)
    connection.set_inheritable(False)
    with contextlib.suppress(ConnectionError), connection, connection.makefile("rb") as calls:
        handlers: dict[int, _Handler] = {}
        while (call := _read(calls)) is not None:
            tag, answer = _answer(handlers, call)
            connection.sendall(LENGTH.pack(len(answer) + 1) + tag + answer)


def _read(calls: IO[bytes]) -> bytes | None:
    head = calls.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return calls.read(LENGTH.unpack(head)[0])


def _end_with(parent: int) -> None:
    """Never outlive the parent: the kernel sees to it on Linux, even in the middle of C code; a thread elsewhere."""
    with contextlib.suppress(Exception):  # not Linux, or no ctypes
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), name="rowmill-parent", daemon=True).start()


def _watch(parent: int) -> None:
    never = threading.Event()
    while not never.wait(_WATCH_SECONDS):
        if os.getppid() != parent:
            os._exit(1)


# --- calls -----------------------------------------------------------------------------------------------------


class _Handler:
    """A handler as it was named by the parent, imported."""

    def __init__(self, module: str, name: str, file: str | None, path: list[str], frame: bool) -> None:
        self._call = _load(module, name, file, path)
        self._frame = frame

    def __call__(self, rows: Any, contexts: Any) -> Any:
        given = rows_to_frame(rows) if self._frame else rows
        result = self._call(given) if contexts is None else self._call(given, contexts)
        return split_result(result, len(rows)) if self._frame else _checked(result)


def _answer(handlers: dict[int, _Handler], call: bytes) -> tuple[bytes, bytes]:
    contexts: Any = None
    packed: Any = None
    try:
        kind, number, *rest = loads(call)
        if kind == "load":
            handlers[number] = _Handler(*rest)
            return RESULT, b"[null,null]"
        rows, packed = rest
        contexts = _contexts(packed)
        return RESULT, _limited(encode([handlers[number](rows, contexts), _all_effects(contexts, packed)]))
    except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the caller
        described = describe(error)
    try:
        return ERROR, _limited(encode([described, _all_effects(contexts, packed)]))
    except (BadRowError, MisfitError):  # what was emitted is the very thing that is no JSON
        return ERROR, encode([described, None])


def _limited(answer: bytes) -> bytes:
    if len(answer) > MOST_BYTES:
        raise MisfitError(f"the handler returned {len(answer):,} bytes of JSON; at most {MOST_BYTES:,} are taken")
    return answer


def _checked(result: Any) -> Any:
    """Refuse what JSON would quietly turn into a row, such as a dataclass: on a thread it would be no row either."""
    for one in result if isinstance(result, (list, tuple)) else (result,):
        for part in one if isinstance(one, (list, tuple)) else (one,):
            if part is not None and not isinstance(part, dict):
                shown = "DataFrame (set frame=True for frames)" if is_frame(part) else type(part).__name__
                raise MisfitError(f"the handler returned a {shown}; {_RULE}")
    return result


# --- contexts --------------------------------------------------------------------------------------------------


class _Context(RowContext):
    """A context away from its worker: what it collects goes back with the answer; tables stay where they are."""

    __slots__ = ()

    def table(self, name: str) -> Table:
        raise ConfigError(
            "ctx.table(name)",
            name,
            "tables stay with the worker: look up in a stage before this one, without executor=",
        )

    def _artifacts(self) -> ArtifactStore:
        raise ConfigError("ctx.artifact", None, "artifacts are put in stages without executor=")

    @property
    def runtime(self) -> Runtime:
        raise ConfigError("ctx.runtime", None, "it stays with the worker: use it in a stage without executor=")


def pack_bytes(value: bytes | None) -> str | None:
    """Bytes as text that JSON can carry."""
    return None if value is None else value.decode("latin-1")


def unpack_bytes(value: str | None) -> bytes | None:
    """The counterpart of :func:`pack_bytes`."""
    return None if value is None else value.encode("latin-1")


def pack_key(key: str | bytes | None) -> Any:
    """A key as JSON; bytes are a list of one text."""
    return [pack_bytes(key)] if isinstance(key, bytes) else key


def unpack_key(key: Any) -> str | bytes | None:
    """The counterpart of :func:`pack_key`."""
    return unpack_bytes(key[0]) if isinstance(key, list) else key


def pack_headers(headers: Any) -> list[list[str | None]]:
    """Headers as JSON."""
    return [[name, pack_bytes(value)] for name, value in headers]


def unpack_headers(headers: Any) -> tuple[tuple[str, bytes | None], ...]:
    """The counterpart of :func:`pack_headers`."""
    return tuple((name, unpack_bytes(value)) for name, value in headers)


def pack_context(context: RowContext) -> list[Any]:
    """What a handler may know of its row, as JSON."""
    return [
        context.topic,
        context.partition,
        context.offset,
        context.timestamp,
        pack_key(context.key),
        pack_headers(context.headers),
        context.session,
    ]


def _contexts(packed: Any) -> Any:
    """One context, a list of them for a batch, or None."""
    if not packed:
        return packed
    return [_context(each) for each in packed] if isinstance(packed[0], list) else _context(packed)


def _context(packed: list[Any]) -> _Context:
    topic, partition, offset, timestamp, key, headers, session = packed
    return _Context(topic, partition, offset, timestamp, unpack_key(key), unpack_headers(headers), session)


def _all_effects(contexts: Any, packed: Any) -> Any:
    if isinstance(contexts, list):
        return [_effects(context, before) for context, before in zip(contexts, packed, strict=True)]
    return None if contexts is None else _effects(contexts, packed)


def _effects(context: _Context, before: list[Any]) -> list[Any] | None:
    """What the handler did with the context: None for nothing."""
    after = pack_context(context)
    if after == before and not context.emitted and context.cost == NO_COST and not context.tokens:
        return None
    emitted = [[side.topic, side.row, pack_bytes(side.key), pack_headers(side.headers)] for side in context.emitted]
    return [str(context.cost), context.tokens, emitted, *after[3:6]]


def apply_effects(context: RowContext, effects: list[Any] | None) -> None:
    """In the parent: do to the row's own context what the handler did to its likeness."""
    if effects is None:
        return
    cost, tokens, emitted, timestamp, key, headers = effects
    context.add_cost(Decimal(cost), tokens)
    for topic, row, side_key, side_headers in emitted:
        context.emit(topic, row, key=unpack_bytes(side_key), headers=unpack_headers(side_headers))
    context.timestamp = timestamp
    if key != pack_key(context.key):
        context.key = unpack_key(key)
    if headers != pack_headers(context.headers):
        context.headers = unpack_headers(headers)


# --- finding the handler ---------------------------------------------------------------------------------------


def _load(module: str, name: str, file: str | None, path: list[str]) -> Callable[..., Any]:
    """The handler, imported with the path that the parent had when it imported it."""
    usual = list(sys.path)
    sys.path[:] = path
    try:
        found: Any = _module(MAIN_ALIAS if module == "__main__" else module, file)
    finally:
        sys.path[:] = usual + [entry for entry in sys.path if entry not in usual and entry not in path]
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError("stage(executor=)", "process", f"{module}.{name} is no function where it is imported anew")
    handler: Callable[..., Any] = found
    return handler


def _module(name: str, file: str | None) -> ModuleType:
    """By import where that leads to the same file; else from the file, as the command line loads pipelines."""
    present = sys.modules.get(name)
    if present is not None:
        if file is None or _same_file(getattr(present, "__file__", None), file):
            return present
        name = f"rowmill_file_{name}"  # somebody else's name here
    if file is None or _same_file(_origin(name), file):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _origin(name: str) -> str | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # no such package around it, or a name that is none
        return None
    return spec.origin if spec is not None else None


def _same_file(one: str | None, other: str) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(other)


# --- exceptions ------------------------------------------------------------------------------------------------


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as JSON: what the parent needs to raise its like."""
    kinds = [[_shown_module(kind.__module__), kind.__qualname__] for kind in type(error).__mro__[:-1]]
    return {
        "name": type(error).__name__,
        "kinds": kinds,
        "message": _clean(_text_of(error)),
        "where": _clean(_where(error)),
        "attributes": _attributes(error),
        "traceback": _clean("".join(traceback.format_exception(error, limit=-_FRAMES_SHOWN))),
    }


def _shown_module(module: str) -> str:
    return "__main__" if module == MAIN_ALIAS else module


def _text_of(error: BaseException) -> str:
    try:
        return str(error) or repr(error)
    except Exception:  # noqa: BLE001 - a class of the user's that cannot even say what it is
        return type(error).__name__


def _clean(text: str) -> str:
    return text[:_TEXT_MOST].encode("utf-8", "replace").decode("utf-8")


def _attributes(error: BaseException) -> dict[str, Any]:
    """Plain values on the exception, such as ``retry_after``, that policies may ask for."""
    kept: dict[str, Any] = {}
    for name, value in vars(error).items():
        if name.startswith("_"):
            continue
        if isinstance(value, str):
            kept[name] = _clean(value)
        elif value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63):
            kept[name] = value
    return kept


def _where(error: BaseException) -> str:
    """The last line of the handler's own file on the way to the error, as ``file.py:17``; "" if there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    theirs = [(name, line) for name, line in frames if not name.startswith(_NOT_THEIRS)]
    own = [line for name, line in theirs if name == theirs[0][0]]
    return f"{Path(theirs[0][0]).name}:{own[-1]}" if theirs else ""
