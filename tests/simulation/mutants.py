"""Bugs put in on purpose, to show that the simulation bites.

A mutant changes the text of one function of the real code. When the text is not there any more, the mutant says so
instead of passing for caught.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from rowmill.streams.commits import Commits
from rowmill.streams.offsets import OffsetTracker
from rowmill.streams.transaction import Transactor
from rowmill.streams.worker import Worker

from simulation.world import SimulationError, World


@dataclass(frozen=True)
class Change:
    """One replacement in the text of a method."""

    owner: type
    method: str
    old: str
    new: str

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block the class has the changed method."""
        text = textwrap.dedent(inspect.getsource(getattr(self.owner, self.method)))
        assert text.count(self.old) == 1, (
            f"{self.owner.__name__}.{self.method} has no {self.old!r} any more: mend the mutant"
        )
        space: dict[str, Any] = {}
        names = vars(sys.modules[self.owner.__module__])
        exec(f"from __future__ import annotations\n{text.replace(self.old, self.new)}", dict(names), space)  # noqa: S102
        with mock.patch.object(self.owner, self.method, space[self.method]):
            yield


@dataclass(frozen=True)
class Mutant:
    """A bug."""

    name: str
    what: str
    changes: tuple[Change, ...]

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block the code has the bug."""
        with contextlib.ExitStack() as stack:
            for change in self.changes:
                stack.enter_context(change.applied())
            yield


_READ = "found = await self._read()"

MUTANTS = (
    Mutant(
        "hasty-commit",
        "the transaction is committed before its sends have finished",
        (Change(Transactor, "_attempt", "await gather_all(written)", "pass"),),
    ),
    Mutant(
        "eager-store",
        "the local store is written before the transaction is committed",
        (
            Change(
                Commits,
                "_deliver",
                "ends = await self._delivery.commit(",
                "await self._state.written(None)\n        ends = await self._delivery.commit(",
            ),
        ),
    ),
    Mutant(
        "no-map",
        "the offset map is dropped from the commit",
        (Change(OffsetTracker, "snapshot", "encode_map(OffsetMap(low, self._taken, tuple(self._incomplete)))", '""'),),
    ),
    Mutant(
        "read-then-fence",
        "the producer is started after the offsets are read",
        (
            Change(
                Transactor,
                "open",
                f"await self._new_producer()\n        {_READ}",
                f"{_READ}\n        await self._new_producer()",
            ),
        ),
    ),
    Mutant(
        "stale-rows",
        "rows of an older epoch go on when the partition comes back after others had it",
        # Four guards stand in a row: the epoch, the fence, the checkpoint that is not as it was left, the changelog.
        (
            Change(Worker, "assigned", " if consecutive else frozenset()", ""),
            Change(Transactor, "commit", "except BrokerError as error", "except (BrokerError, FencedError) as error"),
            Change(
                Transactor,
                "_took_effect",
                "if found not in expected and not pending:",
                "if False:",
            ),
            Change(Transactor, "_was_committed", "if ours is None and self._changelog not in void:", "if False:"),
        ),
    ),
    Mutant(
        "stale-owner",
        "who was opening a partition in an older epoch goes on with it",
        (
            Change(Worker, "_run_task", "self._epochs.get(tp) != epoch or ", ""),
            Change(Worker, "_work_on", " or self._epochs.get(tp) != epoch", ""),
            Change(Worker, "_part", "owner.cancel()", "pass"),
        ),
    ),
)


def first_caught(mutant: Mutant, seeds: range) -> SimulationError | None:
    """The failure of the first of these seeds that fails with the bug and passes without it."""
    for seed in seeds:
        with mutant.applied():
            caught = _failure(seed)
        if caught is not None and _failure(seed) is None:
            return caught
    return None


def _failure(seed: int) -> SimulationError | None:
    try:
        World(seed).run()
    except SimulationError as error:
        return error
    return None
