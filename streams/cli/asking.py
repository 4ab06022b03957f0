"""What ``pause``, ``resume`` and ``cancel`` share: ask, say what happens next, and wait for it where that is wanted."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...state.execution import Wanted
from .connect import broker_words, on_broker
from .output import command, duration, plain, plural, say
from .parser import Commands, add_broker, add_command, seconds

if TYPE_CHECKING:
    from ..brokers.base import Broker
    from ..control_wait import Standing
    from ..operating import Answer

FAILED = 1


@dataclass(frozen=True, slots=True)
class Request:
    """One of the three, in words.

    Attributes:
        name: the command.
        wanted: what it asks for.
        summary: a line for ``rowmill --help``.
        about: what it does.
        next: what happens once it is recorded.
        done: what the workers are then.
        alone: what to do where no worker runs.
        back: the command that takes it back; "" if none does.
    """

    name: str
    wanted: Wanted
    summary: str
    about: str
    next: str
    done: str
    alone: str
    back: str = ""


def add_request(commands: Commands, request: Request) -> None:
    """The command's parser."""
    parser = add_command(
        commands,
        request.name,
        lambda args: _main(args, request),
        words="SESSION",
        summary=request.summary,
        about=f"{request.about}\n\nSESSION is a pipeline's name (its live session), PIPELINE.NAME, or a NAME that only "
        "one pipeline has.",
        example=f"rowmill {request.name} reviews --wait 30",
    )
    parser.add_argument("session", metavar="SESSION", help="which session")
    parser.add_argument("--reason", metavar="TEXT", default="", help="why, for those who see it (default: none)")
    parser.add_argument(
        "--wait",
        metavar="S",
        type=seconds(),
        help="wait until all workers have done it, at most so many seconds; exit code 1 if some have not (default: "
        "return when the request is recorded)",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object on standard output instead of text")
    add_broker(parser)


def _main(args: argparse.Namespace, request: Request) -> int:
    answer = on_broker(args.broker, lambda broker: _ask(args, broker, request))
    if args.json:
        from ...state.codec import dumps

        print(dumps(_fields(answer, request)).decode())
    else:
        _tell(args, request, answer)
    return 0 if answer.standing is None or answer.standing.is_carried_out else FAILED


async def _ask(args: argparse.Namespace, broker: Broker, request: Request) -> Answer:
    from ..operating import ask

    def recorded(name: str) -> None:
        say(f"{name}: {request.name} is recorded; waiting for its workers", quiet=args.quiet)

    return await ask(
        broker, args.session, request.wanted, by=who(), reason=args.reason, wait=args.wait, on_wait=recorded
    )


def who() -> str:
    """Who runs this process, as ``user@host``."""
    import getpass
    import socket

    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError, ImportError):  # a user id without a name, in a container
        return socket.gethostname()


# --- what is said ----------------------------------------------------------------------------------------------


def _tell(args: argparse.Namespace, request: Request, answer: Answer) -> None:
    standing = answer.standing
    if standing is None:
        say(f"{answer.session}: {request.name} is recorded. {request.next}", quiet=args.quiet)
    elif not standing.is_carried_out:
        say(f"rowmill: {answer.session}: not all workers have done it within {args.wait:g} s: {_waited_for(standing)}")
        say("it is recorded all the same: they do it as soon as they can, and so does a worker that starts")
    elif standing.done:
        workers = plural(standing.done, "worker")
        verb = "is" if standing.done == 1 else "are"
        say(f"{answer.session}: {workers} {verb} {request.done}, after {duration(answer.seconds)}", quiet=args.quiet)
    else:
        say(f"{answer.session}: no worker is running; {request.alone}", quiet=args.quiet)
    if request.back:
        back = command("rowmill", request.back, answer.session, *broker_words(args))
        say(f"to go on: {back}", quiet=args.quiet)


def _waited_for(standing: Standing) -> str:
    parts = [
        f"{plain(worker)} is {plain(state) or 'in no known state'}" for worker, state in standing.waited_for.items()
    ]
    if standing.unheard:
        parts.append(f"{plural(standing.unheard, 'worker')} cannot be heard")
    return ", ".join(parts)


def _fields(answer: Answer, request: Request) -> dict[str, Any]:
    record, standing = answer.record, answer.standing
    return {
        "session": answer.session,
        "group": record.group,
        "request": request.name,
        "wanted": record.wanted.value,
        "by": record.changed_by,
        "at_ms": record.changed_ms,
        "reason": record.reason,
        "carried_out": None if standing is None else standing.is_carried_out,
        "workers_done": None if standing is None else standing.done,
        "workers_waited_for": None if standing is None else dict(standing.waited_for),
        "workers_unheard": None if standing is None else standing.unheard,
    }
