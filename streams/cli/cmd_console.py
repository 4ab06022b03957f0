"""``rowmill console``: watch and steer every session of a broker in the browser."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ...state.errors import ConfigError
from .output import say
from .parser import Commands, add_broker, add_command

if TYPE_CHECKING:
    from ..console.console import Console

TOKEN_VARIABLE = "ROWMILL_CONSOLE_TOKEN"  # noqa: S105 - the name of a variable
_HOST = "127.0.0.1"
_PORT = 8321


def add_parser(commands: Commands) -> None:
    """``console``'s options."""
    parser = add_command(
        commands,
        "console",
        main,
        summary="watch and steer every session in the browser",
        about=(
            "Serve a web page that shows what all sessions of a broker do, live, and lets its reader pause, resume and "
            "cancel them, look into dead letters and send them again, plan replays, and browse topics. It only reads "
            "topics: no worker needs it or notices it. One console per broker.\n\n"
            "It listens on this machine only. Another address needs a token (--token-file or ROWMILL_CONSOLE_TOKEN); "
            "put TLS in front of it there."
        ),
        example="rowmill console --broker kafka://localhost:9092 --open",
    )
    add_broker(parser)
    parser.add_argument("--host", metavar="HOST", default=_HOST, help="the address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", metavar="PORT", type=_port, default=_PORT, help="its port; 0: a free one (default: %(default)s)"
    )
    parser.add_argument("--read-only", action="store_true", help="show everything, change nothing")
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help=f"a file with the token that people log in with (default: ${TOKEN_VARIABLE}, else none)",
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="answer under this name, too, such as that of a proxy in front of it; may be repeated",
    )
    parser.add_argument("--alerts", metavar="FILE", type=Path, help="a file with rules and actions for alerts")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def main(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    import asyncio

    from ..console.console import Console

    console = Console(
        args.broker,
        args.host,
        args.port,
        token=_token(args.token_file),
        read_only=args.read_only,
        hosts=args.allow_host,
        alerts=args.alerts,
    )
    asyncio.run(_serve(args, console))
    return 0


async def _serve(args: argparse.Namespace, console: Console) -> None:
    import asyncio

    from .signals import orderly_stop

    stop = asyncio.Event()
    note = "" if args.quiet else "stopping (once more: stop at once)"
    with orderly_stop(stop.set, note):
        await console.run(stop, lambda ready: _tell(args, ready))
    say("stopped", quiet=args.quiet)


def _tell(args: argparse.Namespace, console: Console) -> None:
    """Say where it is. A login link is said although --quiet was asked for: it is what the command gives."""
    address = console.login_url()
    about = f"console of {console.shown_broker}{', read-only' if console.read_only else ''}"
    say(f"{about}: {console.url}", quiet=args.quiet)
    if address != console.url:
        say(f"log in, once and within ten minutes: {address}")
    if args.open:
        _open(address)


def _open(address: str) -> None:
    """Show the page. What the browser's start says belongs to nobody's output, so it is left to the library."""
    import threading
    import webbrowser

    # In a thread, because some browsers keep the caller waiting; a daemon, because none may keep us from ending.
    threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()


def _token(path: Path | None) -> str | None:
    """The token of the file, or of the environment.

    Raises:
        ConfigError: the file cannot be read, or has none.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError("--token-file", str(path), f"it cannot be read: {why}") from None
    if not token:
        raise ConfigError("--token-file", str(path), "the file is empty; write the token into it")
    return token


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"got {text!r}; give a number from 0 to 65535")
    return int(text)
