"""What people call a session: its pipeline's name, ``PIPELINE.NAME``, the whole group, or just NAME."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from ..state.errors import ConfigError
from .deadlines import deadline
from .session import CONSOLE, LIVE, Session
from .session_records import SessionRecord

if TYPE_CHECKING:
    from .control_topic import ControlTopic

_GROUP = re.compile(r"rowmill\.([a-zA-Z0-9_-]{1,80})(?:\.([a-zA-Z0-9_-]{1,80}))?")
_PREFIX = "rowmill."
_SHOWN = 8


class SessionRef(NamedTuple):
    """A session that is known.

    Attributes:
        group: its consumer group.
        record: its record; None for one that is known as a group only.
    """

    group: str
    record: SessionRecord | None

    @property
    def name(self) -> str:
        """What people call it."""
        return short_name(self.group)


def short_name(group: str) -> str:
    """``reviews`` for the group ``rowmill.reviews``, ``reviews.NAME`` for ``rowmill.reviews.NAME``."""
    return group.removeprefix(_PREFIX)


def session_of(group: str) -> Session | None:
    """The session whose group that is; None for groups of something else, such as the web console's."""
    found = _GROUP.fullmatch(group)
    if found is None or found[2] == LIVE or found[1] == CONSOLE:
        return None
    return Session(found[1], found[2] or LIVE)


def record_of(group: str) -> SessionRecord:
    """The record of a session of which only the group's name is known: workers of an older rowmill made none.

    Raises:
        ConfigError: it is no session's group.
    """
    session = session_of(group)
    if session is None:
        raise ConfigError("group", group, "a session's group is rowmill.PIPELINE or rowmill.PIPELINE.NAME")
    return SessionRecord(group=group, pipeline=session.pipeline, session=session.id)


def resolve(word: str, groups: Collection[str], where: str = "") -> str:
    """The group that a word means.

    Args:
        word: a pipeline's name (its live session), ``PIPELINE.NAME``, the whole group, or a session's NAME that only
            one pipeline has.
        groups: the groups of all sessions that are known.
        where: the broker, for messages.

    Raises:
        ConfigError: it means none of them, or several; the message names them.
    """
    sessions = {group: session for group in sorted(groups) if (session := session_of(group)) is not None}
    plain = word.removesuffix(f".{LIVE}")
    for group in (plain, _PREFIX + plain):
        if group in sessions:
            return group
    same_id = [group for group, session in sessions.items() if session.id == word != LIVE]
    if len(same_id) == 1:
        return same_id[0]
    if same_id:
        raise ConfigError("SESSION", word, f"there are several of that name: {_listed(same_id)}; name one of these")
    raise ConfigError("SESSION", word, _remedy(word, list(sessions), where))


def _remedy(word: str, groups: list[str], where: str) -> str:
    place = f" on {where}" if where else ""
    if not groups:
        return f"there are no sessions{place}; a session is known from the first start of a worker, or run, on"
    own = [group for group in groups if group.startswith(f"{_PREFIX}{word.removesuffix('.py')}.")]
    if own:
        return f"there is no such session{place}, but there {'is' if len(own) == 1 else 'are'} {_listed(own)}"
    if word.endswith(".py") or ":" in word:
        return f"give the session's name, not the pipeline's file; there {_are(groups)}{place}"
    names = {short_name(group): group for group in groups}
    names |= {session.id: group for group in groups if (session := session_of(group)) and not session.is_live}
    close = difflib.get_close_matches(word.removeprefix(_PREFIX), list(names), n=1, cutoff=0.6)
    if close:
        return f"there is no such session{place}; did you mean {short_name(names[close[0]])!r}?"
    return f"there is no such session{place}; there {_are(groups)}"


def _are(groups: list[str]) -> str:
    return f"{'is' if len(groups) == 1 else 'are'} {_listed(groups)}"


def _listed(groups: list[str]) -> str:
    more = f" and {len(groups) - _SHOWN:,} more" if len(groups) > _SHOWN else ""
    return ", ".join(short_name(group) for group in groups[:_SHOWN]) + more


async def known_sessions(control: ControlTopic) -> dict[str, SessionRecord | None]:
    """All sessions of this broker by group: those with a record, and those that are consumer groups only.

    Raises:
        BrokerError: the broker does not answer.
    """
    records = await control.sessions()
    async with deadline(control.timeout, "list groups"):
        groups = [group for group in await control.broker.groups() if session_of(group) is not None]
    return {**dict.fromkeys(groups), **records}


async def find_session(control: ControlTopic, word: str) -> SessionRef:
    """The session that a word means; see :func:`resolve`.

    Raises:
        ConfigError: there is none, or several; the message names them.
        BrokerError: the broker does not answer.
    """
    known = await known_sessions(control)
    group = resolve(word, known.keys(), control.broker.url)
    return SessionRef(group, known[group])
