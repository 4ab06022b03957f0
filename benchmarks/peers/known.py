"""Who is compared: how each is started, and what it promises."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..child import Settings
from ..environments import FASTSTREAM, FAUST, QUIX, Environment

_HERE = Path(__file__).parent
_PIPELINES = {"plain": "plain", "burn": "burned", "count": "counted", "give way": "gave_way", "ask": "asked"}
"""rowmill's pipelines by job."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to do the work.

    Attributes:
        name: in tables and on the command line.
        command: from the settings, how to start it.
        group: from the settings, the consumer group whose offsets tell how far it is.
        is_exact: whether it promises each result once; others may repeat some.
        environment: where it is installed; None: rowmill's own, with the same client and JSON library.
    """

    name: str
    command: Callable[[Settings], Sequence[str]]
    group: Callable[[Settings], str]
    is_exact: bool
    environment: Environment | None = None


def rowmill_command(said: Settings) -> list[str]:
    """``rowmill worker`` as a user starts it, with its health endpoint and metrics."""
    guarantee = "exactly-once" if said.exactly_once else "at-least-once"
    command = [
        str(Path(sys.executable).with_name("rowmill")),
        "worker",
        f"{_HERE / 'pipelines.py'}:{_PIPELINES[said.job]}",
    ]
    command += ["--broker", f"kafka://{said.bootstrap}", "--http", "0", "--state-dir", said.folder]
    command += ["--commit-interval", str(said.commit_interval), "--commit-rows", str(said.commit_rows)]
    return [*command, "--guarantee", guarantee]


def _module(name: str, environment: Environment | None) -> Callable[[Settings], list[str]]:
    def command(_: Settings) -> list[str]:
        python = sys.executable if environment is None else str(environment.python())
        return [python, "-m", f"benchmarks.peers.{name}"]

    return command


def _rowmill_group(said: Settings) -> str:
    return f"rowmill.{said.name}"


def own_group(said: Settings) -> str:
    """The group of those who take the name they are given."""
    return said.name


ROWMILL = Peer("rowmill", rowmill_command, _rowmill_group, is_exact=True)
ROWMILL_ONCE_OR_MORE = Peer("rowmill (at least once)", rowmill_command, _rowmill_group, is_exact=False)
FLOOR = Peer("floor", _module("floor", None), own_group, is_exact=True)
LOOP = Peer("send loop", _module("loop", None), own_group, is_exact=False)
QUIX_EXACT = Peer("quixstreams", _module("with_quix", QUIX), own_group, is_exact=True, environment=QUIX)
QUIX_ONCE_OR_MORE = Peer(
    "quixstreams (at least once)", _module("with_quix", QUIX), own_group, is_exact=False, environment=QUIX
)
FAUST_AGENT = Peer("faust", _module("with_faust", FAUST), own_group, is_exact=False, environment=FAUST)
FASTSTREAM_BATCH = Peer(
    "faststream", _module("with_faststream", FASTSTREAM), own_group, is_exact=False, environment=FASTSTREAM
)

ALL = (ROWMILL, FLOOR, LOOP, QUIX_EXACT, QUIX_ONCE_OR_MORE, FAUST_AGENT, FASTSTREAM_BATCH)
