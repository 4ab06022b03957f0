"""``rowmill status``: how all sessions stand, or one of them in detail, once or again and again."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...state.errors import ConfigError
from .connect import CALL_SECONDS, broker_words, on_broker, shown_broker
from .output import cut, duration, plain, say, width
from .parser import Commands, add_broker, add_command, seconds

if TYPE_CHECKING:
    from ...state.clock import Clock
    from ..brokers.base import Broker
    from ..status import SessionStatus

_INTERVAL = 2.0
_SHOWN_SECONDS = 86_400
"""How long a session that has ended is listed."""
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _TO_LINE_END, _TO_SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"
_BEGIN_FRAME, _END_FRAME = "\x1b[?2026h", "\x1b[?2026l"
"""Terminals that know these show what is between them at once; the others pass over them."""


def add_parser(commands: Commands) -> None:
    """``status``'s options."""
    parser = add_command(
        commands,
        "status",
        main,
        words="[SESSION]",
        summary="how all sessions stand, or one in detail",
        about=(
            "Show every session of the broker: its state, workers, lag, speed, and what became of its rows. With "
            "SESSION, show that one in detail: partitions, workers, stages, cost and budget, breakers.\n\n"
            "All of it is read from the broker, so it works while no worker runs. Rows, cost and offsets are exact, as "
            "of the last commits; speed, rows in work and breakers are what live workers said within the last seconds. "
            "Lag is that of Kafka's consumer-groups tool: the log's end less the committed offset. On Kafka "
            "transactions' markers count.\n\n"
            "SESSION is a pipeline's name for its live session, PIPELINE.NAME for another, or just NAME where only one "
            "session is called so."
        ),
        example="rowmill status reviews --watch",
    )
    parser.add_argument("session", metavar="SESSION", nargs="?", help="one session in detail (default: all)")
    parser.add_argument(
        "--watch",
        metavar="S",
        nargs="?",
        const=str(_INTERVAL),
        help=f"show it again every S seconds, until Ctrl-C (default: {_INTERVAL:g} s); in a pipe, block after block",
    )
    parser.add_argument("--all", action="store_true", help="also sessions that ended more than a day ago")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object with all sessions and figures; with --watch one per line"
    )
    add_broker(parser)


def main(args: argparse.Namespace) -> int:
    """Show it once, or until Ctrl-C."""
    interval = _interval(args)
    if interval is None:
        return on_broker(args.broker, lambda broker: _once(args, broker))
    return on_broker(args.broker, lambda broker: _watch(args, broker, interval))


def _interval(args: argparse.Namespace) -> float | None:
    """Seconds between two looks. What follows --watch may as well be the session."""
    if args.watch is None:
        return None
    try:
        return seconds()(args.watch)
    except argparse.ArgumentTypeError as error:
        if args.session is None and not _is_number(args.watch):
            args.session = args.watch
            return _INTERVAL
        raise ConfigError("--watch", args.watch, "give seconds above 0, such as --watch 5") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


async def _once(args: argparse.Namespace, broker: Broker) -> int:
    from ...state.clock import SystemClock

    clock = SystemClock()
    group = await _group(args, broker, clock)
    print(_text(args, await _look(broker, clock, group), clock))
    return 0


async def _group(args: argparse.Namespace, broker: Broker, clock: Clock) -> str | None:
    """The group of the session that was named."""
    if args.session is None:
        return None
    from ..known_sessions import find_sessions
    from ..session_refs import resolve

    known = await find_sessions(broker, clock=clock, timeout=CALL_SECONDS)
    return resolve(args.session, known.keys(), shown_broker(args))


async def _look(broker: Broker, clock: Clock, group: str | None) -> list[SessionStatus]:
    from ..status import session_statuses

    return await session_statuses(broker, clock=clock, timeout=CALL_SECONDS, group=group)


def _text(
    args: argparse.Namespace, statuses: Sequence[SessionStatus], clock: Clock, *, columns: int | None = None
) -> str:
    from .status_view import Place, detail, overview

    if args.json:
        from ...state.codec import dumps

        return dumps(status_json(statuses, shown_broker(args), clock.now_ms())).decode()
    is_watched = args.watch is not None
    place = Place(shown_broker(args), broker_words(args), columns or width(), is_watched)
    if args.session is not None:
        if not statuses:
            return f"session {plain(args.session)} is gone from {place.broker}"
        return detail(statuses[0], place)
    shown, hidden = visible(statuses, everything=args.all)
    return overview(shown, hidden, place)


def status_json(statuses: Sequence[SessionStatus], broker: str, now_ms: int) -> dict[str, Any]:
    """What ``--json`` prints. Names and types are kept from release to release; fields may be added."""
    from ..status import iso_time

    return {"broker": broker, "at": iso_time(now_ms), "sessions": [status.to_dict() for status in statuses]}


class Visible(NamedTuple):
    """What the overview shows, and how many sessions it leaves out."""

    shown: list[SessionStatus]
    hidden: int


def visible(statuses: Sequence[SessionStatus], *, everything: bool) -> Visible:
    """Those that are worth a line, the most recently active ones first within each kind."""
    shown = [status for status in statuses if everything or not _is_old(status)]
    shown.sort(key=lambda status: (status.is_over, not status.workers, -(status.active_ms or 0), status.reference))
    return Visible(shown, len(statuses) - len(shown))


def _is_old(status: SessionStatus) -> bool:
    """Whether it has ended, and was silent for a day. The live session of a pipeline never ends."""
    is_ended = status.is_over and status.record.is_bounded and not status.workers
    return is_ended and status.at_ms - (status.active_ms or 0) > _SHOWN_SECONDS * 1000


# --- again and again -------------------------------------------------------------------------------------------


async def _watch(args: argparse.Namespace, broker: Broker, interval: float) -> int:
    import asyncio

    from ...state.clock import SystemClock
    from .signals import orderly_stop

    clock = SystemClock()
    group = await _group(args, broker, clock)
    watching = asyncio.create_task(_show_for_ever(args, broker, clock, group, interval))

    def stop() -> None:
        watching.cancel()

    with orderly_stop(stop) as caught:
        try:
            await watching
        except asyncio.CancelledError:
            if caught.signal is None:
                raise
    return 0  # that is how a watch ends


async def _show_for_ever(
    args: argparse.Namespace, broker: Broker, clock: Clock, group: str | None, interval: float
) -> None:
    from ..errors import BrokerError, TopicError

    # The first look may fail the command; later ones are tried again.
    statuses, looked = await _look(broker, clock, group), clock.monotonic()
    with Screen() if sys.stdout.isatty() and not args.json else Pipe() as out:
        trouble = ""
        while True:
            columns = out.columns()
            text = _text(args, statuses, clock, columns=columns)
            if not args.json:
                text = f"{_title(args, clock, interval)}\n\n{text}" + (
                    f"\n\n{cut(trouble, columns)}" if trouble else ""
                )
            out.show(text)
            await clock.sleep(interval)
            try:
                statuses, looked, trouble = await _look(broker, clock, group), clock.monotonic(), ""
            except (BrokerError, TopicError) as error:
                old = duration(clock.monotonic() - looked)
                trouble = f"this is {old} old, the broker is asked again and again: {plain(str(error))}"
                if not isinstance(out, Screen):
                    say(f"rowmill: {trouble}")


def _title(args: argparse.Namespace, clock: Clock, interval: float) -> str:
    from .status_view import local_time

    return f"{shown_broker(args)}, {local_time(clock.now_ms())}, every {interval:g} s"


class Pipe:
    """Standard output where nobody sits: one text after the other."""

    def __enter__(self) -> Pipe | Screen:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to put back."""

    def columns(self) -> int:
        """Room in a line."""
        return width()

    def show(self, text: str) -> None:
        """Print it, with an empty line behind texts of several lines."""
        print(text + ("\n" if "\n" in text else ""), flush=True)


class Screen(Pipe):
    """A terminal: one text in the place of the other, on the screen that editors use; the last one is left behind."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> Screen:
        _write(_ENTER)
        return self

    def __exit__(self, *_: object) -> None:
        _write(_LEAVE + self._last + "\n")

    def show(self, text: str) -> None:
        """Draw over what is there, without wiping it first: that would flicker."""
        self._last = text
        size = shutil.get_terminal_size((80, 24))
        lines = [cut(line, size.columns) for line in text.split("\n")]
        if len(lines) > size.lines:
            left = len(lines) - size.lines + 1
            lines = [*lines[: size.lines - 1], cut(f"… {left:,} more lines; make the window larger", size.columns)]
        _write(_BEGIN_FRAME + _HOME + f"{_TO_LINE_END}\r\n".join(lines) + _TO_LINE_END + _TO_SCREEN_END + _END_FRAME)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
