"""A broker for the length of one command. What connects is imported when a command runs, not for a help text."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from ..brokers.base import Broker

T = TypeVar("T")

_NEW_OBJECTS = 50_000

CALL_SECONDS = 30.0
"""How long a single request to the broker may take."""


def shown_broker(args: argparse.Namespace) -> str:
    """The broker's URL as it was given or fell back to, without settings (some of them name files of secrets)."""
    from ..brokers.open import broker_url, shown_url

    return shown_url(broker_url(args.broker).partition("?")[0])


def broker_words(args: argparse.Namespace) -> list[str]:
    """What a suggested command needs to reach the same broker."""
    return ["--broker", args.broker] if args.broker else []


def on_broker(url: str | None, work: Callable[[Broker], Awaitable[T]]) -> T:
    """Connect, work, disconnect, on an event loop of its own.

    Raises:
        ConfigError, BrokerUnreachableError: there is nothing to connect to.
    """
    import asyncio

    return asyncio.run(connected(url, work))


async def connected(url: str | None, work: Callable[[Broker], Awaitable[T]]) -> T:
    """The same on the running loop."""
    from ..brokers.open import open_broker

    broker = open_broker(url)
    await broker.start()
    if gc.get_threshold()[0] == _NEW_OBJECTS:
        gc.freeze()  # what was imported until now
    try:
        return await work(broker)
    finally:
        await broker.close()


def collect_seldom() -> None:
    """Look for cycles less often, and not in what was imported: right for a process of our own, not for a library.

    A row in work is half a dozen objects that wait for their commit and are part of no cycle. With Python's default,
    at every 700 new objects, the collector walked through them for 7.4 of the 29 µs of an async row and for 3 of the
    10 µs of a plain one; so it takes 0.8 and less. A pipeline's file that chooses a threshold has it.
    """
    gc.set_threshold(_NEW_OBJECTS, 10, 10)
