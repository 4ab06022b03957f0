"""What the API serves: one table, from which requests are answered and the OpenAPI document is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from .schemas import MOMENT, Choice, Field, Flag, Listed, OneOf, Record, Text, Whole

PREFIX: Final = "/api/v1"

Method: TypeAlias = Literal["GET", "POST"]

GROUP: Final = Text(
    170, r"rowmill\.[a-zA-Z0-9_-]{1,80}(\.[a-zA-Z0-9_-]{1,80})?", "give a session's group, as rowmill.reviews"
)
TOPIC: Final = Text(249, r"[a-zA-Z0-9._-]+", "give a topic's name: letters, digits, '.', '_' and '-'")
LETTER_ID: Final = Text(30, r"[0-9]{1,9}[-/][0-9]{1,19}", "give PARTITION-OFFSET, such as 0-17")
PLACE: Final = Text(60, r"earliest|end|[0-9]{1,19}|time:[0-9]{1,15}", "give earliest, end, an offset, or time:MS")
CURSOR: Final = Text(80, r"-?[0-9]{1,19}\.[0-9]{1,10}\.[0-9]{1,19}", "give `next` of the page before")

MOST_LETTERS, MOST_RECORDS, MOST_EVENTS, MOST_IDS = 500, 100, 500, 10_000

_FILTER: Final[Mapping[str, Field]] = {
    "stage": Text(200),
    "type": Text(500),
    "text": Text(200),
    "since_ms": MOMENT,
    "until_ms": MOMENT,
}
_REASON: Final = Record({"reason": Text(1_000)})
_LETTERS: Final = Record(
    {
        "ids": Listed(Text(30, r"[0-9]{1,9}[-/][0-9]{1,19}", "give PARTITION/OFFSET, such as 0/17"), MOST_IDS),
        "filter": Record(_FILTER),
        "dry_run": Flag(),
    },
    frozenset({"dry_run"}),
)
_RETRY: Final = Record({**_LETTERS.fields, "to": TOPIC, "timestamp": Choice(("now", "original"))}, _LETTERS.needed)
_TARGET: Final = Record(
    {
        "how": Choice(("earliest", "latest", "current", "offset", "datetime", "duration", "shift")),
        "value": OneOf((Whole(-(2**63) + 1), Text(60))),
    },
    frozenset({"how"}),
)
_PLAN: Final = Record(
    {
        "to": _TARGET,
        "partitions": Listed(Text(300), 10_000),
        "state": Choice(("keep", "reset", "rebuild")),
    },
    frozenset({"to"}),
)


@dataclass(frozen=True, slots=True)
class Route:
    """One entry.

    Attributes:
        method, path: below ``/api/v1``; ``{name}`` stands for a part of the path.
        name: of what answers it: a method of ``Api``, and OpenAPI's operationId.
        summary: what it is for.
        path_fields, query: what may be given.
        needed: those of ``query`` that must be.
        body: of a POST.
        answer: which schema of ``openapi.py`` the answer has; "" for a stream of events.
        is_harmless: whether it changes nothing although it is POSTed to.
        is_open: whether it needs no token.
    """

    method: Method
    path: str
    name: str
    summary: str
    answer: str = ""
    path_fields: Mapping[str, Field] = field(default_factory=dict)
    query: Mapping[str, Field] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    body: Record | None = None
    is_harmless: bool = False
    prefix: str = PREFIX
    is_open: bool = False

    @property
    def is_stream(self) -> bool:
        """Whether it answers with server-sent events."""
        return not self.answer


_SESSION: Final[Mapping[str, Field]] = {"group": GROUP}
_ONE_TOPIC: Final[Mapping[str, Field]] = {"topic": TOPIC}
_STEER: Final = "the request is recorded; its workers follow within seconds"

ROUTES: Final[tuple[Route, ...]] = (
    Route("GET", "/health", "health", "whether the console itself is well", "Health", prefix="", is_open=True),
    Route("GET", "/openapi.json", "openapi", "this description", "Document"),
    Route("GET", "/csrf", "csrf", "the token that changes carry as X-Rowmill-CSRF, bound to the cookie", "Csrf"),
    Route("GET", "/overview", "overview", "all sessions in a line each, and how current that is", "Overview"),
    Route("GET", "/sessions/{group}", "session", "one session in detail", "Session", _SESSION),
    Route(
        "GET",
        "/sessions/{group}/series",
        "series",
        "a session's figures over time, in columns",
        "Series",
        _SESSION,
        {"window": Choice(("10s", "1m", "1h")), "since_ms": MOMENT, "until_ms": MOMENT},
    ),
    Route(
        "GET",
        "/sessions/{group}/events",
        "events",
        "what its workers told, the newest first",
        "Events",
        _SESSION,
        {"kind": Text(1_000), "limit": Whole(1, MOST_EVENTS)},
    ),
    Route("POST", "/sessions/{group}/pause", "pause", f"pause it: {_STEER}", "Answer", _SESSION, body=_REASON),
    Route("POST", "/sessions/{group}/resume", "resume", f"resume it: {_STEER}", "Answer", _SESSION, body=_REASON),
    Route("POST", "/sessions/{group}/cancel", "cancel", f"cancel it: {_STEER}", "Answer", _SESSION, body=_REASON),
    Route(
        "GET",
        "/sessions/{group}/dead-letters",
        "dead_letters",
        "its dead letters, the newest row first",
        "DeadLetters",
        _SESSION,
        {
            **_FILTER,
            "status": Choice(("waiting", "retried", "purged", "all")),
            "limit": Whole(1, MOST_LETTERS),
            "after": CURSOR,
        },
    ),
    Route(
        "GET",
        "/sessions/{group}/dead-letters/{id}",
        "dead_letter",
        "one dead letter, whole",
        "DeadLetter",
        {**_SESSION, "id": LETTER_ID},
    ),
    Route(
        "POST",
        "/sessions/{group}/dead-letters/retry",
        "retry",
        "send the rows of dead letters to their source once more, exactly once; or tell what would be sent",
        "Outcome",
        _SESSION,
        body=_RETRY,
    ),
    Route(
        "POST",
        "/sessions/{group}/dead-letters/purge",
        "purge",
        "mark dead letters as done with; or tell which would be",
        "Outcome",
        _SESSION,
        body=_LETTERS,
    ),
    Route(
        "GET",
        "/sessions/{group}/replay/range",
        "replay_range",
        "between which moments and offsets its position can be moved",
        "ReplayRange",
        _SESSION,
    ),
    Route(
        "POST",
        "/sessions/{group}/replay/plan",
        "replay_plan",
        "what moving its position would do; changes nothing",
        "Plan",
        _SESSION,
        body=_PLAN,
        is_harmless=True,
    ),
    Route(
        "POST",
        "/sessions/{group}/replay/execute",
        "replay_execute",
        "carry out a plan, if it still holds",
        "Execution",
        _SESSION,
        body=Record({"plan_id": Text(64)}, frozenset({"plan_id"})),
    ),
    Route(
        "GET",
        "/sessions/{group}/operation",
        "operation",
        "the last thing that was done to it from here, and how far that is",
        "Operation",
        _SESSION,
    ),
    Route("GET", "/topics", "topics", "the broker's topics", "Topics"),
    Route(
        "GET",
        "/topics/{topic}/records",
        "records",
        "some records of a topic",
        "Records",
        _ONE_TOPIC,
        {"partition": Whole(0, 2**31 - 1), "from": PLACE, "limit": Whole(1, MOST_RECORDS)},
    ),
    Route(
        "GET",
        "/topics/{topic}/tail",
        "tail",
        "records of a topic as they come: events `record`, `dropped` and `beat`",
        "",
        _ONE_TOPIC,
        {"partition": Whole(0, 2**31 - 1)},
    ),
    Route("GET", "/alerts", "alerts", "open alerts, and those that were closed lately", "Alerts"),
    Route(
        "GET",
        "/live",
        "live",
        "what changes, as it does: events `overview`, `session` and `beat`",
        "",
        query={"group": GROUP},
    ),
)
