"""Steering and watching sessions from Python, as the command line does: pause, resume, cancel, and how they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..state.clock import SystemClock
from ..state.execution import Wanted
from .brokers.base import Broker
from .brokers.open import open_broker
from .control import request
from .control_topic import ControlTopic
from .control_wait import Follower, Standing
from .loops import run_blocking
from .session_records import SessionRecord, here
from .session_refs import find_session
from .status import SessionStatus, session_statuses

_CALL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request.

    Attributes:
        session: the session's short name.
        record: its record, as it is now.
        standing: how far the workers are; None where nobody waited for them.
        seconds: how long the wait took.
    """

    session: str
    record: SessionRecord
    standing: Standing | None
    seconds: float = 0.0

    @property
    def is_carried_out(self) -> bool:
        """Whether all workers had done it when the wait was over. False where nobody waited."""
        return self.standing is not None and self.standing.is_carried_out


def pause_session(
    session: str, *, broker: str | None = None, reason: str = "", by: str = "", wait: float | None = None
) -> Answer:
    """Have all workers of a session finish the rows in work, and wait; so does a worker that starts later.

    Args:
        session: a pipeline's name (its live session), ``PIPELINE.NAME``, the whole group, or a unique name.
        broker: its URL. Default: ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
        reason: why, for those who see it.
        by: who asks; default: this host and process.
        wait: seconds to wait for the workers; None: return when it is recorded.

    Raises:
        IllegalTransitionError: that cannot be asked of it now; the message says why.
        ConfigError: there is no such session.
        BrokerError: the broker does not answer.
    """
    return _ask(session, Wanted.PAUSE, broker, reason, by, wait)


def resume_session(
    session: str, *, broker: str | None = None, reason: str = "", by: str = "", wait: float | None = None
) -> Answer:
    """Have a paused session's workers go on; see :func:`pause_session` for arguments and errors."""
    return _ask(session, Wanted.RUN, broker, reason, by, wait)


def cancel_session(
    session: str, *, broker: str | None = None, reason: str = "", by: str = "", wait: float | None = None
) -> Answer:
    """Have a session's workers stop at once: what is done is committed, the next start goes on.

    See :func:`pause_session` for arguments and errors.
    """
    return _ask(session, Wanted.CANCEL, broker, reason, by, wait)


def sessions(*, broker: str | None = None, session: str | None = None) -> list[SessionStatus]:
    """How sessions stand, by broker data alone, so that it works while no worker runs.

    Args:
        broker: its URL. Default: ``ROWMILL_BROKER``, else the embedded one in ``.rowmill``.
        session: one of them, named as for :func:`pause_session`; default: all.

    Raises:
        ConfigError: there is no such session.
        BrokerError: the broker does not answer.
    """

    async def look() -> list[SessionStatus]:
        clock = SystemClock()
        place = open_broker(broker, clock=clock)
        await place.start()
        try:
            group = None
            if session is not None:
                control = ControlTopic(place, clock=clock, timeout=_CALL_SECONDS, create=False)
                group = (await find_session(control, session)).group
            return await session_statuses(place, clock=clock, timeout=_CALL_SECONDS, group=group)
        finally:
            await place.close()

    return run_blocking(look)


def _ask(session: str, wanted: Wanted, url: str | None, reason: str, by: str, wait: float | None) -> Answer:
    async def work() -> Answer:
        broker = open_broker(url)
        await broker.start()
        try:
            return await ask(broker, session, wanted, reason=reason, by=by or here(), wait=wait)
        finally:
            await broker.close()

    return run_blocking(work)


async def ask(
    broker: Broker,
    session: str,
    wanted: Wanted,
    *,
    by: str,
    reason: str = "",
    wait: float | None = None,
    on_wait: Callable[[str], object] = lambda _: None,
) -> Answer:
    """Ask something of a session, on a started broker; see :func:`pause_session`.

    ``on_wait`` is called with the session's short name when the request is recorded and its workers are waited for.
    """
    clock = SystemClock()
    control = ControlTopic(broker, clock=clock, timeout=_CALL_SECONDS)
    found = await find_session(control, session)
    follower = Follower(control, found.group) if wait is not None else None
    if follower is not None:
        await follower.begin()
    record = await request(control, found.group, wanted, by=by, reason=reason)
    began, standing = clock.monotonic(), None
    if follower is not None and wait is not None:
        on_wait(found.name)
        standing = await follower.wait(wanted, wait)
    return Answer(found.name, record, standing, clock.monotonic() - began)
