"""What can be asked of the console, as plain JSON values: the API and the pages ask here, and get the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ...state.clock import Clock
from ...state.errors import ConfigError
from .answers import not_found
from .letter_reads import LetterReads
from .replays import Replays
from .routes import LETTER_ID, ROUTES
from .series import Window
from .topic_reads import TopicReads
from .watch import Watch

Query = Mapping[str, str]

_QUERIES = {route.name: route.query for route in ROUTES}
_SPANS_MS: Mapping[str, int] = {"10s": 900_000, "1m": 6 * 3_600_000, "1h": 7 * 86_400_000}
_EVENTS_SHOWN = 100


class Data:
    """Answers. Those from memory come at once; the others ask the broker, within limits of time and size.

    Args:
        watch: what is in memory.
        letters: dead letters.
        topics: topics and their records.
        replays: where sessions can be moved to.
        clock: time.
    """

    def __init__(
        self, watch: Watch, letters: LetterReads, topics: TopicReads, replays: Replays, *, clock: Clock
    ) -> None:
        self._watch = watch
        self._letters = letters
        self._topics = topics
        self._replays = replays
        self._clock = clock

    # --- from memory -------------------------------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """Whether the console does its work: it can look sessions up. What it cannot do beside that is told."""
        return self._watch.health()

    def overview(self) -> dict[str, Any]:
        """All sessions."""
        return self._watch.overview().to_dict()

    def session(self, group: str) -> dict[str, Any] | None:
        """One of them; None: there is none of that name."""
        view = self._watch.session(group)
        return None if view is None else view.to_dict()

    def series(self, group: str, query: Query) -> dict[str, Any]:
        """A session's figures over time; by default all that is kept in windows of ten seconds."""
        self._require(group)
        asked = read_query("series", query)
        window = cast(Window, asked.get("window", "10s"))
        until_ms = asked.get("until_ms", self._clock.now_ms())
        since_ms = asked.get("since_ms", until_ms - _SPANS_MS[window])
        if since_ms > until_ms:
            raise ConfigError("since_ms", since_ms, f"give a time before until_ms, which is {until_ms}")
        return self._watch.series(group, window, since_ms, until_ms).to_dict()

    def events(self, group: str, kinds: frozenset[str] | None, limit: int = _EVENTS_SHOWN) -> dict[str, Any]:
        """What a session's workers told, the newest first."""
        return {"events": [event.to_dict() for event in self._watch.events(group, kinds, limit)]}

    def events_of(self, group: str, query: Query) -> dict[str, Any]:
        """The same by a query: ``kind`` is one or several, with commas between them."""
        self._require(group)
        asked = read_query("events", query)
        kinds = frozenset(word for word in asked.get("kind", "").split(",") if word)
        return self.events(group, kinds or None, asked.get("limit", _EVENTS_SHOWN))

    def alerts(self) -> dict[str, Any]:
        """Open ones, and those that were closed lately."""
        return {"alerts": [alert.to_dict() for alert in self._watch.alerts()]}

    # --- from the broker ---------------------------------------------------------------------------------------

    async def dead_letters(self, group: str, query: Query) -> dict[str, Any]:
        """A session's dead letters, filtered."""
        self._require(group)
        return await self._letters.briefs(group, read_query("dead_letters", query))

    async def dead_letter(self, group: str, place: str) -> dict[str, Any]:
        """One of them, whole."""
        self._require(group)
        return await self._letters.whole(group, LETTER_ID.read("id", place).replace("-", "/"))

    async def topics(self) -> dict[str, Any]:
        """The broker's topics."""
        return await self._topics.topics()

    async def records(self, topic: str, query: Query) -> dict[str, Any]:
        """Some records of a topic."""
        return await self._topics.records(topic, read_query("records", query))

    async def replay_range(self, group: str) -> dict[str, Any]:
        """Between which moments and offsets a session can be moved."""
        self._require(group)
        return await self._replays.range(group)

    def _require(self, group: str) -> None:
        if self._watch.status(group) is None:
            raise not_found("session", group, "there is none of that name here; GET /api/v1/overview lists them")


def read_query(name: str, query: Query) -> dict[str, Any]:
    """The words of a query, checked against the route of that name. Empty ones count as absent.

    Raises:
        ConfigError: one is not known, or wrong.
    """
    fields = _QUERIES[name]
    for given in query:
        if given not in fields:
            raise ConfigError(given[:200], query[given][:200], f"known are {', '.join(fields) or 'none'}")
    return {given: fields[given].read(given, text) for given, text in query.items() if text}
