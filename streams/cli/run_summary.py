"""What a bounded run did, for people and for programs."""

from __future__ import annotations

from typing import Any

from ..results import ErrorInfo
from ..runs import RunOutcome
from .output import command, cut, duration, plain, plural, table

SHOWN_ERRORS = 5
"""Errors shown to people; --json gives more."""
JSON_ERRORS = 100
_ROLES = {"source": "source topic", "sink": "sink topic", "dead_letters": "dead letters"}


def summary_text(outcome: RunOutcome, pipeline: str, output: str | None, broker_words: list[str]) -> str:
    """Counts, places, the first errors, and what to type next; fits 80 columns."""
    parts = [
        _headline(outcome, pipeline),
        table(_counts(outcome), right=[1], indent="  "),
        table(_places(outcome, output), indent="  "),
    ]
    if outcome.errors:
        parts.append(_errors(outcome))
    if outcome.rows and outcome.dropped == outcome.rows:
        parts.append("every row was dropped: does each handler return its row?")
    parts.append("next:\n" + "\n".join(f"  {line}" for line in _next_commands(outcome, output, broker_words)))
    return "\n\n".join(parts)


def _headline(outcome: RunOutcome, pipeline: str) -> str:
    text = f"{pipeline}: {plural(outcome.rows_here, 'row')} in {duration(outcome.seconds)}"
    if outcome.rows_here and outcome.seconds:
        text += f" ({outcome.rows_here / outcome.seconds:,.0f} rows/s)"
    earlier = outcome.done - outcome.rows_here
    if earlier > 0:
        text += f"; {earlier:,} had been done before"
    if outcome.stopped_by is not None:
        stage, why = outcome.stopped_by.stage, plain(outcome.stopped_by.message)
        text += f"\nstopped by stage {stage!r}: {why}; {outcome.rows - outcome.done:,} rows are left to do"
    return text


def _counts(outcome: RunOutcome) -> list[tuple[str, str]]:
    costs = outcome.costs
    spent = [("cost", f"{costs.total_cost:,f}")] if costs.total_cost else []
    spent += [("tokens", f"{costs.total_tokens:,}")] if costs.total_tokens else []
    return [
        ("rows in", f"{outcome.rows:,}"),
        ("results", f"{outcome.results:,}"),
        ("dropped", f"{outcome.dropped:,}"),
        *([("skipped", f"{outcome.skipped:,}")] if outcome.skipped else []),
        *([("with fallback", f"{outcome.defaulted:,}")] if outcome.defaulted else []),
        ("dead letters", f"{outcome.failed:,}"),
        *spent,
    ]


def _places(outcome: RunOutcome, output: str | None) -> list[tuple[str, str]]:
    places = [("output", "standard output" if output == "-" else output)] if output else []
    places += [("session", outcome.session.id)]
    places += [(_ROLES.get(role, role), topic) for role, topic in outcome.topics.items()]
    places += [("side topic", topic) for topic in sorted(outcome.side_topics)]
    return [(name, place) for name, place in places if place]


def _errors(outcome: RunOutcome) -> str:
    shown = outcome.errors[:SHOWN_ERRORS]
    title = f"{len(shown)} of {outcome.failed:,} errors" if outcome.failed > len(shown) else "errors"
    lines = [("row", "stage", "type", "message"), *(_error_line(error) for error in shown)]
    return f"{title} (row 0 is the first):\n" + table(lines, right=[0], indent="  ")


def _error_line(error: ErrorInfo) -> tuple[str, str, str, str]:
    row = "-" if error.row_index is None else f"{error.row_index:,}"
    message = f"{error.where}: {error.error_message}" if error.where else error.error_message
    return row, cut(plain(error.stage_name), 20) or "-", cut(plain(error.error_type), 24), plain(message)


def _next_commands(outcome: RunOutcome, output: str | None, broker_words: list[str]) -> list[str]:
    sink, dead_letters = outcome.topics["sink"], outcome.topics["dead_letters"]
    looks = [("consume", sink)] if outcome.results and output is None else []
    looks += [("dlq list", dead_letters)] if outcome.failed else []
    looks += [("consume", topic) for topic in sorted(outcome.side_topics)]
    return [
        command("rowmill", *verb.split(), topic, "--limit", "5", *broker_words)
        for verb, topic in looks or [("consume", sink)]
    ]


def summary_json(outcome: RunOutcome, pipeline: str, output: str | None, broker: str) -> dict[str, Any]:
    """The same as JSON values; names and types are kept from release to release."""
    return {
        "status": "stopped" if outcome.stopped_by else "done",
        "stopped": outcome.stopped_by.message if outcome.stopped_by else None,
        "pipeline": pipeline,
        "session": outcome.session.id,
        "broker": broker,
        "rows": outcome.rows,
        "processed": outcome.processed,
        "results": outcome.results,
        "dropped": outcome.dropped,
        "skipped": outcome.skipped,
        "defaulted": outcome.defaulted,
        "dead_letters": outcome.failed,
        "cost": str(outcome.costs.total_cost),
        "tokens": outcome.costs.total_tokens,
        "rows_here": outcome.rows_here,
        "seconds": round(outcome.seconds, 3),
        "rows_per_second": round(outcome.rows_here / outcome.seconds, 1) if outcome.seconds else None,
        "output": output,
        "topics": outcome.topics,
        "side_topics": sorted(outcome.side_topics),
        "errors": [_error_json(error) for error in outcome.errors[:JSON_ERRORS]],
    }


def _error_json(error: ErrorInfo) -> dict[str, Any]:
    return {
        "row": error.row_index,
        "stage": error.stage_name,
        "type": error.error_type,
        "message": error.error_message,
        "where": error.where,
        "attempts": error.attempts,
        "dead_letter": error.dead_letter,
    }
