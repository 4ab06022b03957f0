"""What the console does to sessions: exactly what the command line does, by the same functions."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Collection, Mapping
from typing import Any

from ...state.clock import Clock
from ...state.errors import ConfigError
from ...state.execution import Wanted
from ..brokers.base import Broker
from ..deadlines import deadline
from ..dlq import DeadLetters, targets_of
from ..dlq_letters import Selection, parse_id
from ..dlq_retry import Begun, Outcome, Stamp, Targets
from ..operating import ask
from ..session_records import SessionRecord
from .answers import not_found
from .contents import shown_text
from .guard import is_loopback
from .letter_reads import LetterReads
from .letter_reads import Wanted as WantedLetters
from .operations import Operations, Progress
from .watch import Watch

STEER_SECONDS = 30.0
DRY_RUN_SECONDS = 60.0
_MOST_REASONS = 50


class Actions:
    """Steers sessions and looks after their dead letters. Replay has a class of its own (``replays.py``).

    Args:
        broker: a started one.
        watch: which sessions there are; it looks again at once after each action.
        letters: reads dead letters.
        operations: runs what takes a while.
        clock: time.
    """

    def __init__(
        self, broker: Broker, watch: Watch, letters: LetterReads, operations: Operations, *, clock: Clock
    ) -> None:
        self._broker = broker
        self._watch = watch
        self._letters = letters
        self._operations = operations
        self._clock = clock

    async def steer(self, group: str, wanted: Wanted, *, reason: str, by: str) -> dict[str, Any]:
        """Ask that a session be paused, resumed or cancelled; returns when that is recorded.

        Raises:
            IllegalTransitionError: that cannot be asked of it now.
            BrokerError: the broker does not answer.
        """
        record_of(self._watch, group)
        async with deadline(STEER_SECONDS, f"{group}: ask its workers"):
            answer = await ask(self._broker, group, wanted, by=by, reason=reason)
        self._watch.hurry(group)
        record = answer.record
        return {
            "session": answer.session,
            "group": record.group,
            "wanted": record.wanted.value,
            "by": shown_text(record.changed_by),
            "at_ms": record.changed_ms,
            "reason": shown_text(record.reason),
        }

    async def retry(self, group: str, asked: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        """Send the rows of dead letters to their sources once more, exactly once; or tell what would be sent.

        Args:
            group: the session.
            asked: a checked body: ``ids``, ``filter``, ``dry_run``, ``to``, ``timestamp``.
            by: who does it, for the marks.

        Raises:
            ConfigError: nobody said where to send the rows, or what was asked for makes no sense.
            RefusedRequestError: another operation of this session is under way.
            BrokerError: the broker fails again and again.
        """
        record, letters = record_of(self._watch, group), self._letters.letters_of(group)
        to: str | None = asked.get("to")
        targets = targets_of(letters.topic, record.pipeline, to, () if to else record.sources)
        stamp: Stamp = "original" if asked.get("timestamp") == "original" else "now"
        selection = await self._selection(group, letters, asked)
        if asked["dry_run"] or selection is None:
            return await _dry_run(letters, selection, targets)

        progress = Progress()

        async def work() -> dict[str, Any]:
            outcome = await letters.retry(selection, targets, by=by, timestamp=stamp, begun=_teller(progress))
            self._watch.hurry(group)
            return outcome_of(outcome, is_dry=False)

        return await self._operations.run("retry", group, by, work, progress)

    async def purge(self, group: str, asked: Mapping[str, Any], *, by: str) -> dict[str, Any]:
        """Mark dead letters as done with, or tell which would be. Arguments and errors are those of :meth:`retry`."""
        record_of(self._watch, group)
        letters = self._letters.letters_of(group)
        selection = await self._selection(group, letters, asked)
        if asked["dry_run"] or selection is None:
            return await _dry_run(letters, selection, None)

        progress = Progress()

        async def work() -> dict[str, Any]:
            outcome = await letters.purge(selection, by=by, begun=_teller(progress))
            self._watch.hurry(group)
            return outcome_of(outcome, is_dry=False)

        return await self._operations.run("purge", group, by, work, progress)

    async def _selection(self, group: str, letters: DeadLetters, asked: Mapping[str, Any]) -> Selection | None:
        """Which dead letters; None: none. A selection without places would mean all of them."""
        given: Collection[str] | None = asked.get("ids")
        if given is not None and not given:
            raise ConfigError("ids", [], "name one at least; leave ids out to mean all that the filter admits")
        ids = None if given is None else {each.replace("-", "/") for each in given}
        wanted = WantedLetters.of({**asked.get("filter", {}), "status": "waiting"})
        if wanted.text:
            fitting = set(await self._letters.ids(group, wanted))
            ids = fitting if ids is None else ids & fitting
        if ids is not None and not ids:
            return None
        found = wanted.selection()
        places = frozenset(parse_id(each, letters.topic) for each in ids or ())
        return Selection(places, found.stages, found.types, found.since, found.until)


def _teller(progress: Progress) -> Begun:
    """What notes how far a retry or purge is."""

    def begun(outcome: Outcome, total: int) -> None:
        progress.done, progress.total = (lambda: outcome.count), total

    return begun


async def _dry_run(letters: DeadLetters, selection: Selection | None, targets: Targets | None) -> dict[str, Any]:
    if selection is None:
        return outcome_of(Outcome(), is_dry=True)
    async with deadline(DRY_RUN_SECONDS, f"go through {letters.topic}"):
        return outcome_of(await letters.plan(selection, targets), is_dry=True)


def record_of(watch: Watch, group: str) -> SessionRecord:
    """A session's record, as it was looked up last.

    Raises:
        RefusedRequestError: there is no such session.
    """
    status = watch.status(group)
    if status is None:
        raise not_found("session", group, "there is none of that name here; GET /api/v1/overview lists them")
    return status.record


def outcome_of(outcome: Outcome, *, is_dry: bool) -> dict[str, Any]:
    """What was done, or would be, as JSON."""
    reasons = list(outcome.refused.items())[:_MOST_REASONS]
    return {
        "running": False,
        "dry_run": is_dry,
        "matched": outcome.count + outcome.refusals,
        "count": outcome.count,
        "done": 0 if is_dry else outcome.count,
        "by_type": [
            {"stage": shown_text(stage), "type": shown_text(kind), "count": count}
            for (stage, kind), count in outcome.done.most_common(200)
        ],
        "targets": dict(sorted(outcome.targets.items())),
        "refusals": outcome.refusals,
        "refused": [{"reason": shown_text(why), "count": outcome.reasons[why], "ids": ids} for why, ids in reasons],
        "marked_before": outcome.marked,
        "missing": outcome.missing[:200],
        "taken_over": outcome.fenced,
    }


def console_user(remote: str | None) -> str:
    """Who asks, for records and marks: ``console user@host``, and from where, unless it is this machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name, in a container
        user = "somebody"
    name = f"console {user}@{socket.gethostname()}"
    return name if not remote or is_loopback(remote) else f"{name} for {remote[:64]}"
