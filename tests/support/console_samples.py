"""Figures for the console's pages as a busy broker has them, in the forms of its JSON API. All of it is made up."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

NOW_MS = 1_795_312_800_000
"""2026-11-22 02:00:00 UTC."""
EVIL = '<script>window.evil=1</script><img src=x onerror="window.evil=2">\'"&'


def bytes_of(value: bytes | None, text: bool = True, json: str | None = None, cut: int = 0) -> dict[str, Any] | None:
    """Bytes as the API shows them."""
    if value is None:
        return None
    lines = []
    for at in range(0, len(value), 16):
        part = value[at : at + 16]
        shown = "".join(chr(b) if 32 <= b < 127 else "." for b in part)
        lines.append(f"{at:08x}  {part.hex(' '):<47}  {shown}")
    return {
        "size": len(value) + cut,
        "text": value.decode() if text else None,
        "json": json,
        "hex": "\n".join(lines),
        "base64": base64.b64encode(value).decode(),
        "cut": cut,
    }


def summary(name: str, state: str, **more: Any) -> dict[str, Any]:
    """A session on the overview."""
    pipeline, _, session = name.partition(".")
    return {
        "group": f"rowmill.{name}", "name": name, "pipeline": pipeline, "session": session or "live", "state": state,
        "wanted": "run", "workers": 0, "partitions": 6, "lag": 0, "rate": None, "rows": 0, "results": 0,
        "dead_letters": 0, "dead_letters_per_minute": 0, "cost": "0", "budget": None, "spark": [None] * 60,
        "alerts": 0, "updated_ms": NOW_MS - 1200, **more,
    }  # fmt: skip


def wave(base: float, swing: float, count: int = 60, phase: float = 0.0) -> list[float]:
    """A line that goes up and down."""
    return [
        round(max(0.0, base + swing * math.sin(n / 7 + phase) + swing / 3 * math.sin(n * 1.7 + phase)), 1)
        for n in range(count)
    ]


SUMMARIES: list[dict[str, Any]] = [
    summary(
        "enrich", "executing", workers=3, partitions=12, lag=48_211, rate=1_284.0, rows=8_412_090, results=8_390_771,
        dead_letters=412, dead_letters_per_minute=6.5, cost="812.4410", spark=wave(1200, 220),
        budget={"limit": "1000.00", "spent": "815.02", "fraction": 0.81502}, alerts=2,
    ),
    summary(
        "reviews", "executing", workers=1, lag=12, rate=84.2, rows=371_202, results=370_998, dead_letters=3,
        cost="0", spark=[None] * 8 + wave(80, 30, 52, 2.0),
    ),
    summary(
        "fraud-scoring", "paused", wanted="pause", workers=2, partitions=24, lag=2_410_332, rate=0.0, rows=77_120_443,
        results=77_119_020, dead_letters=88, cost="14.2", spark=[*wave(5200, 800, 40), *[0.0] * 20],
    ),
    summary(
        "translate", "failed", lag=9_921, rows=120_443, results=119_802, dead_letters=641, cost="96.118204",
        budget={"limit": "100.00", "spent": "100.00", "fraction": 1.0}, spark=[*wave(40, 9, 30, 1), *[None] * 30],
        alerts=1,
    ),
    summary("reviews.nightly-2026-11-21", "completed", rows=3_708, results=3_579, dead_letters=17),
    summary("geo", "idle", rows=12, results=12, partitions=1),
    summary("embed.backfill", "cancelled", partitions=6, lag=190_022, rows=412_003, results=412_003, cost="41.20"),
]  # fmt: skip


def overview() -> dict[str, Any]:
    """``GET /api/v1/overview``."""
    return {
        "broker": "kafka://kafka-1:9092", "kind": "kafka", "version": "0.1.0", "now_ms": NOW_MS, "read_only": False,
        "history": {"state": "live", "behind_seconds": 0.4, "message": ""}, "refreshed_ms": NOW_MS - 900,
        "refresh_error": "", "sessions": SUMMARIES, "sessions_left_out": 0,
    }  # fmt: skip


COUNTS = {
    "rows": 701_007, "ok": 699_120, "dropped": 1_760, "skipped": 0, "dead_letters": 34, "defaulted": 93,
    "results": 699_120, "emitted": 0,
}  # fmt: skip


def partition(number: int) -> dict[str, Any]:
    """A partition's status."""
    lag = [120, 41_023, 4_002, 0, 220, 801, 92, 40, 1_411, 420, 82, 0][number]
    end = 702_000 + 137 * number
    return {
        "topic": "orders", "partition": number, "committed": end - lag, "end": end, "lag": lag, "waiting": lag,
        "until": None, "worker": ["5ecf9a04", "1c298a6e", "533f814f"][number % 3], "state": "running",
        "in_flight": 12 + number, "oldest_offset": end - lag, "oldest_seconds": [0.2, 48.1, 1.2][min(number, 2)],
        "rows": COUNTS, "committed_at": "2026-11-22T01:59:59.102Z",
    }  # fmt: skip


def worker(name: str, host: str, **more: Any) -> dict[str, Any]:
    """A worker's status."""
    return {
        "worker": name, "member": f"aiokafka-{name}", "host": host, "pid": 4711, "state": "running", "silent": False,
        "seen_seconds": 0.4, "partitions": ["orders/0", "orders/3", "orders/6", "orders/9"], "rows_per_second": 428.1,
        "started_at": "2026-11-21T19:12:40Z", "in_flight": 96, "rows": 2_804_030, "commit_seconds": 0.0312, **more,
    }  # fmt: skip


STAGES: list[dict[str, Any]] = [
    {"name": "clean", "rows_in": 77_040, "rows_out": 76_880, "failed": 0, "per_second": 1284.0,
     "p50": 0.00002, "p95": 0.00005, "p99": 0.00011},
    {"name": "lookup", "rows_in": 76_880, "rows_out": 76_880, "failed": 2, "per_second": 1281.3,
     "p50": 0.0021, "p95": 0.0094, "p99": 0.041},
    {"name": "score-with-model", "rows_in": 76_878, "rows_out": 76_488, "failed": 390, "per_second": 1279.9,
     "p50": 0.182, "p95": 0.944, "p99": 2.31},
    {"name": "route", "rows_in": 76_488, "rows_out": 76_488, "failed": 0, "per_second": None,
     "p50": None, "p95": None, "p99": None},
]  # fmt: skip


def event(kind: str, ago: float, subject: str = "", **data: Any) -> dict[str, Any]:
    """An event of the log."""
    return {
        "at_ms": NOW_MS - round(ago * 1000), "kind": kind, "worker": "5ecf9a04", "host": "node-7", "subject": subject,
        "data": data,
    }  # fmt: skip


EVENTS: list[dict[str, Any]] = [
    event("row_failed", 1.2, "score-with-model", topic="orders", partition=1, offset=661_103, type="HTTPError",
          message="503 Service Unavailable: the model is overloaded", attempts=4, then="dead_letter"),
    event("breaker_half_open", 12, "model-api"),
    event("breaker_open", 42, "model-api", failures=5, open_for=30.0),
    event("budget_warning", 340, "budget", limit="1000.00", spent="800.11", reserved="1.20", fraction="0.8"),
    event("resumed", 3_700),
    event("paused", 3_760),
    event("partitions_assigned", 24_440, partitions=[f"orders/{n}" for n in range(12)]),
    event("worker_started", 24_442, version="0.1.0", stages=["clean", "lookup", "score-with-model", "route"],
          sources=["orders"], sink="orders.enriched", dead_letters="enrich.dlq", guarantee="exactly_once"),
]  # fmt: skip

ALERTS: list[dict[str, Any]] = [
    {"rule": "breaker open", "group": "rowmill.enrich", "subject": "model-api", "since_ms": NOW_MS - 42_000,
     "until_ms": None, "text": "the breaker of model-api has been open for 42 s"},
    {"rule": "budget", "group": "rowmill.enrich", "subject": "80 %", "since_ms": NOW_MS - 340_000, "until_ms": None,
     "text": "815.02 of 1,000.00 are spent"},
    {"rule": "lag", "group": "rowmill.enrich", "subject": "orders/1", "since_ms": NOW_MS - 7_000_000,
     "until_ms": NOW_MS - 6_400_000, "text": "lag was over 100,000"},
]  # fmt: skip


def session(group: str = "rowmill.enrich") -> dict[str, Any] | None:
    """``GET /api/v1/sessions/{group}``."""
    found = next((each for each in SUMMARIES if each["group"] == group), None)
    if found is None:
        return None
    busy = found["name"] == "enrich"
    workers = [worker("5ecf9a04", "node-7"), worker("1c298a6e", "node-8", in_flight=102, rows_per_second=431.0),
               worker("533f814f", "node-9", silent=True, seen_seconds=7.2, rows_per_second=None)]  # fmt: skip
    partitions = [partition(n) for n in range(12)] if busy else []
    breakers: list[dict[str, Any]] = [{"name": "model-api", "state": "half_open", "since_ms": NOW_MS - 12_000},
                {"name": "lookup", "state": "closed", "since_ms": None}]  # fmt: skip
    status = {
        "session": found["name"], "group": group, "pipeline": found["pipeline"], "id": found["session"],
        "state": found["state"], "activity": found["state"], "wanted": found["wanted"], "wanted_by": "ann@node-7",
        "wanted_at": "2026-11-22T00:58:00Z", "reason": "new model" if found["wanted"] == "pause" else None,
        "failure": "stage 'translate': the budget is used up" if found["state"] == "failed" else None,
        "failed_at": None, "registered": True, "bounded": found["session"] != "live", "sources": ["orders"],
        "sink": "orders.enriched", "dead_letters_topic": f"{found['name']}.dlq", "tables": ["customers"],
        "stage_names": [each["name"] for each in STAGES], "at": "2026-11-22T01:59:59Z",
        "started_at": "2026-11-02T08:00:00Z", "active_at": "2026-11-22T01:59:59Z",
        "rows": {**COUNTS, "rows": found["rows"], "results": found["results"], "dead_letters": found["dead_letters"]},
        "rows_per_second": found["rate"], "lag": found["lag"], "percent": None, "total_rows": None,
        "seconds_left": 37.5 if busy else None, "cost": found["cost"], "tokens": 18_204_412 if busy else 0,
        "budget": {"limit": "1000.00", "spent": "815.02", "held": "2.50"} if busy else None,
        "breakers": {each["name"]: each["state"] for each in breakers} if busy else {},
        "stages": {"score-with-model": {"calls": 8_500_120, "retries": 88_030, "timeouts": 41, "failures": 390,
                                        "defaulted": 93, "refused": 12, "passed_by": 0, "hits": 120_442,
                                        "seconds": 1_900_211.5}} if busy else {},
        "oldest_row": {"topic": "orders", "partition": 1, "offset": 661_114, "seconds": 48.1} if busy else None,
        "workers": workers if busy else [], "partitions": partitions, "problem": None,
    }  # fmt: skip
    return {
        "summary": found, "status": status, "partitions": partitions, "stages": STAGES if busy else [],
        "breakers": breakers if busy else [], "workers": workers if busy else [],
        "failures": [
            {"stage": "score-with-model", "type": "HTTPError", "count": 301, "last_ms": NOW_MS - 1200},
            {"stage": "score-with-model", "type": "TimeoutError", "count": 89, "last_ms": NOW_MS - 80_000},
            {"stage": "lookup", "type": "KeyError", "count": 2, "last_ms": NOW_MS - 5_000_000},
        ] if busy else [],
        "alerts": ALERTS if busy else [],
        "topics": {"sources": ["orders"], "sink": "orders.enriched", "dead_letters": f"{found['name']}.dlq"},
    }  # fmt: skip


def series(count: int = 90) -> dict[str, Any]:
    """``GET …/series``."""
    rows = [10 * y for y in wave(1200, 220, count)]
    return {
        "window_seconds": 10, "at_ms": [NOW_MS - (count - n) * 10_000 for n in range(count)], "rows": rows,
        "results": [y * 0.99 for y in rows], "failures": [max(0, round(6 * math.sin(n / 9))) for n in range(count)],
        "lag": [48_000 + round(9_000 * math.sin(n / 14)) for n in range(count)],
        "cost": [f"{y / 9000:.4f}" for y in rows], "tokens": [y * 20 for y in rows],
        "stages": {
            stage["name"]: {
                "rows": rows,
                "p50": [(stage["p50"] or 0) * (1 + math.sin(n / 8) / 5) for n in range(count)],
                "p95": [(stage["p95"] or 0) * (1 + math.sin(n / 5) / 4) for n in range(count)],
                "p99": [(stage["p99"] or 0) * (1 + math.sin(n / 3) / 3) for n in range(count)],
            }
            for stage in STAGES
        },
    }  # fmt: skip


def letter(number: int, **more: Any) -> dict[str, Any]:
    """A dead letter in a list."""
    kinds = [("score-with-model", "HTTPError", "503 Service Unavailable: the model is overloaded"),
             ("score-with-model", "TimeoutError", "no answer within 10 s"),
             ("lookup", "KeyError", "'customer_id'"),
             ("", "not_json", "unexpected character: line 1 column 1 (char 0)")]  # fmt: skip
    stage, kind, message = kinds[number % 7 % 4]
    return {
        "id": f"{number % 6}/{1200 - number}", "partition": number % 6, "offset": 1200 - number,
        "timestamp_ms": NOW_MS - 61_000 * (number + 1), "status": "waiting", "stage": stage, "type": kind,
        "message": message, "attempts": 4 if "score" in stage else 1, "key": f"customer-{9000 + number}",
        "session": "live", "came_from": f"orders/{number % 12}/{661_000 + number}", **more,
    }  # fmt: skip


def letters(count: int = 24) -> dict[str, Any]:
    """``GET …/dead-letters``."""
    return {
        "topic": "enrich.dlq",
        "letters": [letter(0, message=f"a message with markup in it: {EVIL}"), *map(letter, range(1, count))],
        "next": "24", "total": 412, "waiting": 392,
        "counts": [{"stage": "score-with-model", "type": "HTTPError", "count": 301},
                   {"stage": "score-with-model", "type": "TimeoutError", "count": 89},
                   {"stage": "lookup", "type": "KeyError", "count": 2}],
    }  # fmt: skip


ROW = b'{"order":661103,"customer":{"id":9001,"country":"PT"},"text":"late again","total":"18.20"}'
PRETTY = """{
  "order": 661103,
  "customer": {
    "id": 9001,
    "country": "PT"
  },
  "text": "late again",
  "total": "18.20"
}"""
TRACE = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
STACK = """Traceback (most recent call last):
  File "/srv/enrich/enrich.py", line 88, in score
    answer.raise_for_status()
  File "/srv/enrich/.venv/lib/python3.11/site-packages/aiohttp/client_reqrep.py", line 1161
HTTPError: 503 Service Unavailable: the model is overloaded"""


def whole_letter(number: int = 0) -> dict[str, Any]:
    """``GET …/dead-letters/{id}``."""
    return letter(number) | {
        "key": bytes_of(b"customer-9001"), "value": bytes_of(ROW, json=PRETTY),
        "headers": [{"name": "traceparent", "value": bytes_of(TRACE)},
                    {"name": "raw", "value": bytes_of(b"\xff\x00\x01", text=False)},
                    {"name": EVIL, "value": bytes_of(EVIL.encode())}],
        "where": STACK, "log": "", "truncated": None, "mark": None,
    }  # fmt: skip


def topics() -> dict[str, Any]:
    """``GET /api/v1/topics``."""

    def topic(name: str, partitions: int, records: int | None, kind: str, *sessions: str) -> dict[str, Any]:
        return {"name": name, "partitions": partitions, "records": records, "kind": kind, "sessions": list(sessions)}

    return {"topics": [
        topic("enrich.dlq", 12, 412, "dead letters", "rowmill.enrich"),
        topic("orders", 12, 8_460_301, "source", "rowmill.enrich"),
        topic("orders.enriched", 12, 8_390_771, "sink", "rowmill.enrich"),
        topic("payments", 24, 79_530_775, "source", "rowmill.fraud-scoring"),
        topic("reviews", 6, 371_214, "source", "rowmill.reviews"),
        topic("rowmill.control", 1, 41, "internal"),
        topic("rowmill.enrich.orders.changelog", 12, 1_204_220, "changelog", "rowmill.enrich"),
        topic("rowmill.events", 6, 99_120, "internal"),
        topic("someone-elses", 3, None, "other"),
    ]}  # fmt: skip


def records(topic: str = "orders") -> dict[str, Any]:
    """``GET /api/v1/topics/{topic}/records``."""
    values = [bytes_of(ROW, json=PRETTY), bytes_of(EVIL.encode()), bytes_of(b"\x00\xfe\xff binary", text=False), None,
              bytes_of(b"x" * 4096, cut=120_000)]  # fmt: skip
    return {
        "topic": topic,
        "partitions": [{"partition": n, "first": 0, "end": 702_000 + n} for n in range(12)],
        "records": [
            {"partition": n % 3, "offset": 661_100 + n, "timestamp_ms": NOW_MS - 1_000 * (12 - n),
             "key": bytes_of(f"customer-{9000 + n}".encode()), "value": values[n % len(values)],
             "headers": [{"name": "traceparent", "value": bytes_of(b"00-4bf92f-01")}] if n % 2 else []}
            for n in range(12)
        ],
        "next": {"partition": 0, "from": "661112"},
    }  # fmt: skip


def replay_range() -> dict[str, Any]:
    """``GET …/replay/range``."""
    return {
        "first_ms": NOW_MS - 7 * 86_400_000, "last_ms": NOW_MS - 2_000,
        "partitions": [{"topic": "orders", "partition": n, "first": 0, "end": 702_000 + 137 * n,
                        "committed": 701_000 + 137 * n} for n in range(12)],
    }  # fmt: skip


def plan() -> dict[str, Any]:
    """``POST …/replay/plan``."""
    moves = [{"topic": "orders", "partition": n, "from": 701_000 + 137 * n, "to": 690_000 + 91 * n,
              "run_again": 11_000 + 46 * n, "skipped": 0, "rebuilt": 0, "discarded": 0, "entries": None, "note": ""}
             for n in range(12)]  # fmt: skip
    return {
        "plan_id": "p1", "expires_ms": NOW_MS + 600_000, "state": "keep", "can_execute": False,
        "why_not": "3 workers run: pause the session first", "workers": 3, "paused": False, "moves": moves,
        "run_again": sum(move["run_again"] for move in moves), "skipped": 0, "rebuilt": 0, "warnings": [],
    }  # fmt: skip


def moved(value: Any, by_ms: int) -> Any:
    """The same figures at another time: all that is named ``…_ms`` is moved."""
    if isinstance(value, dict):
        return {name: _moved_field(name, each, by_ms) for name, each in value.items()}
    return [moved(each, by_ms) for each in value] if isinstance(value, list) else value


def _moved_field(name: str, value: Any, by_ms: int) -> Any:
    if not name.endswith("_ms"):
        return moved(value, by_ms)
    if isinstance(value, list):
        return [each + by_ms for each in value]
    return value + by_ms if isinstance(value, int) else value


class SampleData:
    """What pages ask of the console, answered from the samples. Attributes may be replaced.

    Args:
        by_ms: how much later than ``NOW_MS`` it is.
    """

    def __init__(self, by_ms: int = 0) -> None:
        self.by_ms = by_ms
        self.the_overview: Mapping[str, Any] = moved(overview(), by_ms)
        self.asked: list[tuple[str, Any]] = []

    def overview(self) -> Mapping[str, Any]:
        return self.the_overview

    def session(self, group: str) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = moved(session(group), self.by_ms)
        return found

    def events(self, group: str, kinds: frozenset[str] | None, limit: int) -> Mapping[str, Any]:
        self.asked.append(("events", (group, kinds, limit)))
        found = [each for each in EVENTS if kinds is None or each["kind"] in kinds][:limit]
        return {"events": moved(found, self.by_ms)}

    async def dead_letters(self, group: str, query: Mapping[str, str]) -> Mapping[str, Any]:
        self.asked.append(("dead_letters", (group, dict(query))))
        return dict(moved(letters(), self.by_ms))

    async def dead_letter(self, group: str, place: str) -> Mapping[str, Any]:
        self.asked.append(("dead_letter", (group, place)))
        return dict(moved(whole_letter(), self.by_ms))

    async def topics(self) -> Mapping[str, Any]:
        return topics()

    async def records(self, topic: str, query: Mapping[str, str]) -> Mapping[str, Any]:
        self.asked.append(("records", (topic, dict(query))))
        return dict(moved(records(topic), self.by_ms))

    async def replay_range(self, group: str) -> Mapping[str, Any]:
        return dict(moved(replay_range(), self.by_ms))
