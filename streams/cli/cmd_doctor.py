"""``rowmill doctor``: what works here, and what to do about what does not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ... import __version__
from ...state.errors import RowmillError
from .connect import CALL_SECONDS, shown_broker
from .output import duration, plain, plural, size
from .parser import Commands, add_broker, add_command, add_state_dir

if TYPE_CHECKING:
    from ..brokers.base import Broker

_LIBRARIES = ("aiokafka", "orjson", "pandas", "pyarrow", "rocksdict", "tqdm")
_LOOKED_UP = ("aiohttp", "ddsketch", "faust-streaming", "jinja2", "prometheus-client")
"""Only their versions: what imports them is the console or ``--http``, which many never start."""
_WIDTH = max(map(len, (*_LIBRARIES, *_LOOKED_UP)))
_LEAST_FREE = 1 << 30
_REINSTALL = "install again: pip install --force-reinstall rowmill"


@dataclass(frozen=True)
class Check:
    """One thing looked at."""

    name: str
    ok: bool
    found: str
    remedy: str | None = None


def add_parser(commands: Commands) -> None:
    """``doctor``'s options."""
    parser = add_command(
        commands,
        "doctor",
        main,
        summary="check what works here, and say what to do about the rest",
        about=(
            "Check Python, rowmill and its libraries, the broker, the disk of an embedded one, and the folder for "
            "tables. Nothing is changed, unless --write is given. Exit code 1 when a check fails."
        ),
        example="rowmill doctor --broker kafka://localhost:9092 --write",
    )
    add_broker(parser)
    add_state_dir(parser)
    parser.add_argument(
        "--write", action="store_true", help="also make a temporary topic, write to it, read it, and delete it"
    )
    parser.add_argument("--json", action="store_true", help="the checks as one JSON object")


def main(args: argparse.Namespace) -> int:
    """Check everything."""
    import asyncio

    checks = [_python(), Check("rowmill", True, __version__), *map(_library, _LIBRARIES), *map(_package, _LOOKED_UP)]
    checks += asyncio.run(_all_broker_checks(args))
    ok = all(check.ok for check in checks)
    if args.json:
        from ...state.codec import dumps

        print(dumps({"ok": ok, "checks": [asdict(check) for check in checks]}).decode())
    else:
        for check in checks:
            _show(check)
    return 0 if ok else 1


def _show(check: Check) -> None:
    wide = (getattr(sys.stdout, "encoding", None) or "ascii").lower().startswith("utf")
    mark = ("✓" if check.ok else "✗") if wide else ("ok" if check.ok else "NO")
    print(f"{mark} {check.name:<{_WIDTH}} {plain(check.found)}")
    if check.remedy is not None:
        print(f"{'':<{len(mark)}} {'':<{_WIDTH}} -> {check.remedy}")


def _python() -> Check:
    found = sys.version.split()[0]
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, found, None if ok else "rowmill needs Python 3.11 or newer")


def _library(name: str) -> Check:
    """Imports it: a library that is installed but broken is the case worth finding."""
    from importlib import import_module, metadata

    try:
        import_module(name)
        return Check(name, True, metadata.version(name))
    except Exception as error:  # noqa: BLE001 - a broken library raises anything when imported
        return Check(name, False, f"{type(error).__name__}: {error}", _REINSTALL)


def _package(name: str) -> Check:
    """Its version, without importing it."""
    from importlib import metadata

    try:
        return Check(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, False, "it is not installed", _REINSTALL)


async def _all_broker_checks(args: argparse.Namespace) -> list[Check]:
    return [check async for check in _broker_checks(args)]


async def _broker_checks(args: argparse.Namespace) -> AsyncIterator[Check]:
    from ..brokers.open import open_broker

    broker = open_broker(args.broker)
    url = shown_broker(args)
    yield _state(args, broker)
    if url.startswith("local://"):
        folder = _folder(url)
        yield _disk("disk", folder, "--broker local://DIR")
        if not folder.exists() and not args.write:
            yield Check("broker", True, f"{url} (not made yet: the first command that writes makes it)")
            return
    try:
        await broker.start()
    except RowmillError as error:
        yield Check("broker", False, str(error), _broker_remedy(args, url))
        return
    try:
        yield await _check(broker, "broker", _describe)
        yield await _check(broker, "topics", _topics)
        if args.write:
            yield await _check(broker, "write", _write)
    finally:
        await broker.close()


def _broker_remedy(args: argparse.Namespace, url: str) -> str:
    if url.startswith("local://"):
        return "choose a folder on a local disk that you may write to: --broker local://DIR"
    import os

    origin = "--broker" if args.broker else "ROWMILL_BROKER" if os.environ.get("ROWMILL_BROKER") else "--broker"
    return f"start Kafka there, or correct {origin}; without Kafka: --broker local://.rowmill"


async def _check(broker: Broker, name: str, look: Callable[[Broker], Awaitable[str]]) -> Check:
    from ..deadlines import deadline

    try:
        async with deadline(CALL_SECONDS, name):
            return Check(name, True, await look(broker))
    except RowmillError as error:
        return Check(name, False, str(error), _REMEDIES[name])


_REMEDIES = {
    "broker": "the address answers, but not as a broker should: is it Kafka 2.5 or newer?",
    "topics": "the user needs the ACL Describe on topics",
    "write": "the user needs the ACLs Create, Write, Read and Delete on topics; or the disk is full",
}


async def _describe(broker: Broker) -> str:
    info = await broker.info()
    nodes = f", {plural(info.nodes, 'node')}" if info.kind != "local" else ""
    return f"{info.url.partition('?')[0]}: {info.kind}, {info.version}{nodes}"


async def _topics(broker: Broker) -> str:
    return plural(len(await broker.topics()), "topic")


async def _write(broker: Broker) -> str:
    """A record there and back, through a topic that is deleted whatever happens."""
    from ...state.clock import SystemClock
    from ...state.model import Outgoing, TopicPartition
    from ..brokers.base import TopicSpec
    from ..collect import read_topic
    from ..errors import BrokerError

    clock = SystemClock()
    tp = TopicPartition(f"rowmill-doctor-{clock.token()}", 0)
    began = clock.monotonic()
    await broker.create_topics([TopicSpec(tp.topic, 1)])
    try:
        producer = broker.producer()
        try:
            await producer.start()
            await (await producer.send(tp, [Outgoing(b"key", b"{}", clock.now_ms())]))
        finally:
            await producer.close()
        read = [record.value async for records in read_topic(broker, tp.topic) for record in records]
        if read != [b"{}"]:
            raise BrokerError(f"wrote one record to {tp.topic} and read {len(read)}")
    finally:
        await broker.delete_topics([tp.topic])
    return f"made, wrote, read and deleted a topic in {duration(clock.monotonic() - began)}"


def _folder(url: str) -> Path:
    return Path(url.removeprefix("local://")).expanduser().absolute()


def _state(args: argparse.Namespace, broker: Broker) -> Check:
    """The folder that a worker here would keep its tables and cached answers in."""
    from ..options import WorkerOptions, state_folder

    folder = state_folder(WorkerOptions(state_dir=args.state_dir), broker).expanduser().absolute()
    return _disk("state", folder, "--state-dir DIR")


def _disk(name: str, folder: Path, option: str) -> Check:
    import os
    import shutil

    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}: {size(free)} free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Check(name, False, f"{there}: no folder that you may write to", f"choose another: {option}")
    if free < _LEAST_FREE:
        return Check(name, False, found, f"free {size(_LEAST_FREE)} or choose another disk: {option}")
    return Check(name, True, found)
