"""Where CPU-bound handlers run: a bounded pool of Python processes, one call at a time in each.

Python's multiprocessing and ProcessPoolExecutor were rejected: they pickle functions, rows and results (law 10), one
process that dies breaks the whole pool, and a call that overruns cannot be stopped. Here a handler is named by module
and qualified name and imported by the process itself; rows and results are JSON on a socket; a call that overruns is
ended together with its process, and the next call gets a new one. See :mod:`.process_child` for the other side.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..state.codec import encode, loads
from ..state.errors import ConfigError, RowmillError
from .context import RowContext
from .errors import HandlerTimeoutError, MisfitError, ProcessDiedError
from .process_child import LENGTH, MOST_BYTES, RESULT, apply_effects, is_child, pack_context

_BOOT = (
    "import sys; number, parent, entries = map(int, sys.argv[1:4]); sys.path[:] = sys.argv[4:4 + entries]; "
    "sys.argv[:] = sys.argv[4 + entries:]; "
    f"from {__package__}.process_child import serve; serve(number, parent)"
)
_LET_GO_SECONDS = 1.0
_POLL_SECONDS = 0.01
_KILL_SECONDS = 5.0
_REMEDY = "write a plain function (def) at the top level of a .py file, and give its name"


# --- naming handlers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class HandlerReference:
    """A handler by name, so that another process can import it. Made by :func:`name_handler`.

    Attributes:
        module: its module.
        name: its qualified name there.
        file: the module's file, for modules that were loaded by path; None for built-in ones.
        path: where Python looked for modules when the stage was made.
        frame: whether the handler takes and gives DataFrames; the process makes them of rows.
        handler: the handler itself.
    """

    module: str
    name: str
    file: str | None
    path: tuple[str, ...]
    frame: bool
    handler: Callable[..., Any] = field(repr=False)

    def check(self) -> None:
        """See that the name leads to this very handler, now that its module is complete.

        Raises:
            ConfigError: it leads elsewhere: the handler was renamed, replaced or wrapped after it became a stage.
        """
        found: Any = sys.modules.get(self.module)
        if found is None:
            return  # loaded by runpy and the like, and forgotten; the process will find out
        for part in self.name.split("."):
            found = getattr(found, part, None)
        if found is not self.handler and found != self.handler:
            shown = f"{self.module}.{self.name}"
            raise ConfigError(
                "stage(executor=)", "process", f"{shown} is not the stage's handler there, but {found!r}; {_REMEDY}"
            )


def name_handler(handler: Callable[..., Any], *, frame: bool = False) -> HandlerReference:
    """The name under which a process can import a handler.

    Args:
        handler: a function at the top level of a module or of a class in it, a class or a built-in.
        frame: whether it takes and gives DataFrames.

    Raises:
        ConfigError: it has no such name (a lambda, a function inside a function, an object, a notebook's function), or
            it is async.
    """
    if inspect.iscoroutinefunction(inspect.unwrap(handler)):
        raise _refused(handler, "an async handler waits and needs no process; leave executor= out")
    module, name = getattr(handler, "__module__", None), getattr(handler, "__qualname__", None)
    owner = getattr(handler, "__self__", None)
    if not isinstance(name, str) or not isinstance(module, str):
        raise _refused(handler, f"an object has no name by which a process could import it; {_REMEDY}")
    if "<lambda>" in name:
        raise _refused(handler, f"a lambda has no name by which a process could import it; {_REMEDY}")
    if "<locals>" in name:
        raise _refused(handler, f"a function inside a function cannot be imported; {_REMEDY}")
    if owner is not None and not inspect.ismodule(owner) and not inspect.isclass(owner):
        raise _refused(handler, f"a method of an object cannot be imported; {_REMEDY}")
    module, file = _home(handler, module)
    return HandlerReference(module, name, file, _search_path(), frame, handler)


def _refused(handler: Any, remedy: str) -> ConfigError:
    shown = getattr(handler, "__qualname__", None) or repr(handler)
    return ConfigError("stage(executor=)", "process", f"{shown}: {remedy}")


def _home(handler: Any, module: str) -> tuple[str, str | None]:
    """The module's name for the process, and its file."""
    code = getattr(inspect.unwrap(handler), "__code__", None)
    written = os.path.realpath(code.co_filename) if code is not None else None
    present = sys.modules.get(module)
    file = getattr(present, "__file__", None) or (written if written and os.path.isfile(written) else None)  # noqa: PTH113
    if module != "__main__":
        return module, os.path.realpath(file) if file else None
    if file is None or not os.path.isfile(file) or written != os.path.realpath(file):  # noqa: PTH113
        raise _refused(handler, f"it was typed into a notebook or a prompt, where no process finds it; {_REMEDY}")
    spec = getattr(present, "__spec__", None)
    return spec.name if spec is not None else module, os.path.realpath(file)


def _search_path() -> tuple[str, ...]:
    return tuple(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100 - "" means the folder we are in


# --- the pool --------------------------------------------------------------------------------------------------


def default_processes() -> int:
    """How many processes a pool has unless told otherwise: one per core that this process may use."""
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


class ProcessPool:
    """Runs calls of importable handlers in processes, started when needed and kept. Belongs to one event loop.

    Nothing outlives it: :meth:`close` ends the processes, and they end with this process however it ends.

    Args:
        processes: calls that run at once; default: one per core.
        start_timeout: seconds that a new process may take to start and import a handler (60).
        cancel_grace: seconds for which a call goes on that nobody waits for any more; then its process is replaced,
            which takes about as long (1).
        close_timeout: seconds that processes get to end in order (5).

    Raises:
        ConfigError: an option is wrong, or a handler's process is about to run a pipeline of its own.
    """

    def __init__(
        self,
        processes: int | None = None,
        *,
        start_timeout: float = 60.0,
        cancel_grace: float = 1.0,
        close_timeout: float = 5.0,
    ) -> None:
        if processes is not None and (isinstance(processes, bool) or not isinstance(processes, int) or processes < 1):
            raise ConfigError("processes", processes, "give a number from 1, or leave it out for one per core")
        if is_child():
            raise ConfigError(
                "stage(executor=)",
                "process",
                "a process that imports this file for its handlers would run the pipeline again; put what runs it "
                'under if __name__ == "__main__":',
            )
        self.processes = processes or default_processes()
        self._start_timeout = start_timeout
        self._cancel_grace = cancel_grace
        self._close_timeout = close_timeout
        self._slots = asyncio.Semaphore(self.processes)
        self._idle: list[_Process] = []
        self._alive: set[_Process] = set()
        self._numbers: dict[HandlerReference, int] = {}
        self._closed = False
        self.started = 0
        """Processes started so far."""
        self.overrun = 0
        """Calls that outlived their timeout, and whose process was ended."""
        self.died = 0
        """Calls whose process ended by itself."""
        self.given_up = 0
        """Calls that were cancelled, did not end within ``cancel_grace``, and whose process was ended."""

    async def run(self, reference: HandlerReference, *arguments: Any, timeout: float | None = None) -> Any:
        """A handler's result, from a process.

        Args:
            reference: the handler.
            arguments: the row (for batches and frames a list of rows), and the RowContext (a list of them) if the
                handler wants one. It gets a likeness of it; key, headers, timestamp, cost and what it emits come back.
            timeout: seconds from the moment a process begins with the call; waiting for a process and importing the
                handler do not count. After it the process is ended, and the call with it.

        Returns:
            The result as JSON gives it: dicts, lists and None. For frames a list with one entry per row: a row, a list
            of rows, or None.

        Raises:
            HandlerTimeoutError: it took longer.
            ProcessDiedError: the process ended by itself.
            BadRowError: the rows or the result cannot be written as JSON.
            MisfitError: the result is none, or too large.
            ConfigError: the handler cannot be imported by a process.
            Exception: what the handler raised, as an instance of the same class where this process has it.
        """
        contexts = arguments[1] if len(arguments) > 1 else None
        call = _frame(["call", self._number(reference), arguments[0], _packed(contexts)])
        answer = await self._with_process(reference, call, timeout)
        value, effects = loads(answer[1:])
        _apply_all(contexts, effects)
        if answer[:1] == RESULT:
            return value
        raise _rebuilt(value)

    async def prepare(self, reference: HandlerReference) -> None:
        """Start a process and import a handler in it, so that a mistake shows before the first row.

        Raises:
            ConfigError: the handler cannot be imported by a process.
            ProcessDiedError: the process ended while it tried.
        """
        self._number(reference)
        await self._with_process(reference, None, None)

    async def close(self) -> None:
        """End every process: those at rest at once, those in a call within ``close_timeout``; then they are killed."""
        self._closed = True
        ends = [process.ended for process in self._alive]
        for process in list(self._alive):
            process.end()
        try:
            if ends:
                await asyncio.wait(ends, timeout=self._close_timeout)
        finally:
            for process in list(self._alive):
                process.kill()
        if ends:
            await asyncio.wait(ends, timeout=_KILL_SECONDS)

    def _number(self, reference: HandlerReference) -> int:
        number = self._numbers.get(reference)
        if number is None:
            reference.check()
            number = self._numbers[reference] = len(self._numbers)
        return number

    async def _with_process(self, reference: HandlerReference, call: bytes | None, timeout: float | None) -> bytes:
        await self._slots.acquire()
        process: _Process | None = None
        try:
            process = self._take()
            await self._load(process, reference)
            return await process.ask(call, timeout) if call is not None else b""
        except HandlerTimeoutError:
            self.overrun += 1
            raise
        except ProcessDiedError:
            self.died += 1
            raise
        finally:
            self._give_back(process)

    def _take(self) -> _Process:
        """A process at rest, the one used last; a new one if there is none."""
        if self._closed:
            raise RowmillError("the pool of processes is closed")
        while self._idle:
            process = self._idle.pop()
            if process.is_idle:
                return process
        process = _Process()
        self._alive.add(process)
        self.started += 1
        process.ended.add_done_callback(lambda _: self._alive.discard(process))
        return process

    async def _load(self, process: _Process, reference: HandlerReference) -> None:
        number = self._numbers[reference]
        if number in process.handlers:
            return
        named = [reference.module, reference.name, reference.file, reference.path, reference.frame]
        try:
            await process.connect()
            answer = await process.ask(_frame(["load", number, *named]), self._start_timeout)
        except HandlerTimeoutError:
            raise _not_loaded(reference, f"took longer than {self._start_timeout:g} s") from None
        if answer[:1] != RESULT:
            error = _rebuilt(loads(answer[1:])[0])
            place = getattr(error, "raised_at", "")
            raise _not_loaded(
                reference, f"raised {type(error).__name__}: {error}{f' ({place})' if place else ''}"
            ) from error
        process.handlers.add(number)

    def _give_back(self, process: _Process | None) -> None:
        """The process rests, or is done for; if it still works on a call that nobody waits for, decide later."""
        if process is not None and process.is_working and not self._closed:
            process.abandon(self._cancel_grace, lambda: self._settled(process))
            return
        if process is not None and process.is_idle:
            self._idle.append(process)
        elif process is not None:
            process.kill()
        self._slots.release()

    def _settled(self, process: _Process) -> None:
        self.given_up += not process.is_idle
        self._give_back(process)


def _packed(contexts: Any) -> Any:
    if isinstance(contexts, RowContext):
        return pack_context(contexts)
    return None if contexts is None else [pack_context(context) for context in contexts]


def _apply_all(contexts: Any, effects: Any) -> None:
    if effects is None:
        return
    if isinstance(contexts, RowContext):
        apply_effects(contexts, effects)
        return
    for context, effect in zip(contexts, effects, strict=True):
        apply_effects(context, effect)


def _frame(message: list[Any]) -> bytes:
    text = encode(message)
    if len(text) > MOST_BYTES:
        raise MisfitError(f"the rows of one call have {len(text):,} bytes of JSON; at most {MOST_BYTES:,} are taken")
    return LENGTH.pack(len(text)) + text


def _not_loaded(reference: HandlerReference, what: str) -> ConfigError:
    return ConfigError(
        "stage(executor=)", "process", f"importing {reference.module}.{reference.name} in a process {what}"
    )


class ProcessHandler:
    """A handler for the engine, async and of (row, ctx), that has another one called in a process.

    So a stage with ``executor="process"`` is a stage like others: conditions, schemas, retries, caches and the rest
    look at it from outside, here, and only the bare call is elsewhere.

    Args:
        handler: the one to call.
        takes_context: whether it wants a context (a list of them for batches and frames) besides its rows.
        frame: whether it takes and gives DataFrames. The engine gives and gets lists of rows all the same.
        timeout: seconds that one call may take, or None. It is the pool's to keep: it ends the process.

    Raises:
        ConfigError: the handler cannot be named; see :func:`name_handler`.
    """

    def __init__(
        self, handler: Callable[..., Any], *, takes_context: bool, frame: bool = False, timeout: float | None = None
    ) -> None:
        self.reference = name_handler(handler, frame=frame)
        self.timeout = timeout
        self._takes_context = takes_context

    async def __call__(self, rows: Any, ctx: Any) -> Any:
        """Call it in a process of the worker's pool."""
        pool: ProcessPool = (ctx[0] if isinstance(ctx, list) else ctx).runtime.processes
        arguments = (rows, ctx) if self._takes_context else (rows,)
        return await pool.run(self.reference, *arguments, timeout=self.timeout)


# --- one process -----------------------------------------------------------------------------------------------


class _Process(asyncio.Protocol):
    """The parent's end of one process. Calls of the event loop only; starting takes some milliseconds of it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._connecting = False  # from then on the transport closes the socket
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._popen = _start(theirs.fileno(), self._socket)
        self._pidfd = _pidfd(self._popen.pid)
        if self._pidfd is not None:
            self._loop.add_reader(self._pidfd, self._pid_ended)
        self._received = bytearray()
        self._answer: asyncio.Future[bytes] | None = None
        self._abandoned: tuple[Callable[[], None], asyncio.TimerHandle] | None = None
        self._killed = False
        self._ending = False
        self.handlers: set[int] = set()
        """Numbers of the handlers that it has imported."""
        self.ended: asyncio.Future[None] = self._loop.create_future()

    @property
    def is_idle(self) -> bool:
        """Whether it could take a call now."""
        line = self._transport
        return line is not None and not line.is_closing() and self._answer is None and self._is_wanted

    @property
    def is_working(self) -> bool:
        """Whether an answer is still to come."""
        return self._answer is not None and self._is_wanted

    @property
    def _is_wanted(self) -> bool:
        return not self._killed and not self.ended.done()

    async def connect(self) -> None:
        """Take up the line; nothing if it is up."""
        if not self._connecting:
            self._connecting = True
            await self._loop.create_unix_connection(lambda: self, sock=self._socket)

    async def ask(self, call: bytes, timeout: float | None) -> bytes:
        """Send a call and wait for its answer; a cancelled one leaves the process at work.

        Raises:
            HandlerTimeoutError: no answer in time; the process was killed.
            ProcessDiedError: it ended by itself.
        """
        if self._transport is None or not self._is_wanted:
            raise self._death()
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._answer = answer
        timer = None if timeout is None else self._loop.call_later(timeout, self._overrun, answer, timeout)
        self._transport.write(call)
        try:
            return await answer
        finally:
            if timer is not None:
                timer.cancel()

    def abandon(self, grace: float, then: Callable[[], None]) -> None:
        """Nobody waits for the answer any more: call ``then`` when it has come, at the latest after ``grace``."""
        self._abandoned = then, self._loop.call_later(grace, self.kill)

    def end(self) -> None:
        """Ask it to end: it does when it has finished its call."""
        self._ending = True
        if self._transport is not None:
            self._transport.close()
        else:
            self.kill()

    def kill(self) -> None:
        """End it now, and what it started."""
        if self._is_wanted:
            self._killed = True
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            if not self._connecting:
                self._socket.close()
            if self._pidfd is None:
                self._poll()
        self._settle()

    def _overrun(self, answer: asyncio.Future[bytes], timeout: float) -> None:
        if not answer.done():
            self.kill()
            answer.set_exception(HandlerTimeoutError(f"no result within {timeout:g} s; its process was ended"))

    def _settle(self) -> None:
        if self._abandoned is not None:
            (then, timer), self._abandoned = self._abandoned, None
            timer.cancel()
            then()

    # --- the line, as asyncio tells of it ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - a stream socket has no other
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if len(received) < LENGTH.size or len(received) < LENGTH.size + LENGTH.unpack_from(received)[0]:
            return
        text = bytes(memoryview(received)[LENGTH.size :])
        received.clear()
        answer, self._answer = self._answer, None
        if answer is not None and not answer.done():
            answer.set_result(text)
        self._settle()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        if self.ended.done():
            return
        if not self._ending:  # it let go of the line: it ends, or is of no use any more
            self._loop.call_later(_LET_GO_SECONDS, self.kill)
        if self._pidfd is None:
            self._poll()

    # --- its end ---

    def _pid_ended(self) -> None:
        assert self._pidfd is not None  # noqa: S101 - it is what called us
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._loop.call_soon(self._ended)  # what it sent last is read first

    def _poll(self) -> None:
        if self._popen.poll() is None:
            self._loop.call_later(_POLL_SECONDS, self._poll)
        else:
            self._ended()

    def _ended(self) -> None:
        if self.ended.done():
            return
        self._popen.wait()  # it is over: this only collects the exit code
        if self._transport is not None:
            self._transport.abort()
        elif not self._connecting:
            self._socket.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(self._death())
        self.ended.set_result(None)
        self._settle()

    def _death(self) -> ProcessDiedError:
        if self._ending or self._killed:
            return ProcessDiedError("the handler's process was ended in the middle of a call")
        code = self._popen.returncode
        when = "in the middle of a call" if self.handlers else "while it started; what it wrote stands on stderr"
        return ProcessDiedError(f"the handler's process ended {when}: {_cause(code)}")


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return "its line broke" if code is None else f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _start(number: int, ours: socket.socket) -> subprocess.Popen[bytes]:
    """A new Python with our search path and arguments. Its output goes to our standard error."""
    path = _search_path()
    facts = [str(number), str(os.getpid()), str(len(path))]
    try:
        return subprocess.Popen(  # noqa: S603 - our own program and nothing else
            [sys.executable, "-P", "-u", "-c", _BOOT, *facts, *path, *sys.argv],
            stdin=subprocess.DEVNULL,
            stdout=_standard_error(),
            pass_fds=(number,),
            start_new_session=True,  # Ctrl-C is for us: rows in work finish
        )
    except OSError as error:
        ours.close()
        raise ProcessDiedError(f"no process could be started for handlers: {error}") from error


def _standard_error() -> int:
    try:
        os.fstat(2)
    except OSError:  # a service without one
        return subprocess.DEVNULL
    return 2


def _pidfd(pid: int) -> int | None:
    """A descriptor that tells of a process's end; None where there is no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, or an old kernel
        return None


# --- exceptions ------------------------------------------------------------------------------------------------


def _rebuilt(described: dict[str, Any]) -> BaseException:
    """An exception like the one that the process described: same class, name, text and plain attributes.

    ``raised_at`` is the handler's line, such as ``reviews.py:17``; a note holds the traceback there. The class is the
    nearest of its ancestors that this process has, so that policies which ask for classes see what they expect.
    """
    for module, name in [*described["kinds"], ["builtins", "Exception"]]:
        kind = _kind(module, name)
        if kind is None:
            continue
        try:
            likeness: Any = _likeness
            error: type[BaseException] = likeness(kind, described["name"])  # mypy takes no exception for hashable
            made = error.__new__(error, described["message"])
        except Exception:  # noqa: BLE001, S112 - a class that cannot be made without its own arguments
            continue
        vars(made).update(described["attributes"])
        vars(made).update(_text=described["message"], raised_at=described["where"])
        made.add_note(f"In the handler's process:\n{described['traceback']}")
        return made
    raise AssertionError("Exception can always be made")


def _kind(module: str, name: str) -> type[BaseException] | None:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    # Others mean something else in a coroutine: StopIteration, a cancellation, Ctrl-C.
    fits = isinstance(found, type) and issubclass(found, (Exception, SystemExit))
    return found if fits and not issubclass(found, (StopIteration, StopAsyncIteration)) else None


@functools.lru_cache(maxsize=256)
def _likeness(kind: type[BaseException], name: str) -> type[BaseException]:
    return type(name, (kind,), {"__str__": lambda self: self._text, "__module__": kind.__module__})
