"""What docs/events.md and docs/events.schema.json promise of events, for tests that hold real ones against it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "events.md").read_text(encoding="utf-8")
SCHEMA: dict[str, Any] = json.loads((DOCS / "events.schema.json").read_text(encoding="utf-8"))

KINDS = frozenset(SCHEMA["$defs"]) - {"counts", "money", "partitions", "totals"}
"""The kinds that the schema describes: each has a definition of its name."""

_JSON = re.compile(r"^```json\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def examples() -> dict[str, dict[str, Any]]:
    """The page's examples by kind: whole events."""
    found = [json.loads(line) for block in _JSON.findall(PAGE) for line in block.splitlines() if '"type"' in line]
    by_kind = {event["type"]: event for event in found}
    assert len(by_kind) == len(found), "two examples of one kind"
    return by_kind


def check(event: dict[str, Any]) -> None:
    """Hold an event against the schema."""
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(event)]
    assert not errors, f"{event}: {errors}"


def shape(event: dict[str, Any]) -> set[str]:
    """The fields of an event's data, and of what lies in it under fixed names."""
    data = event["data"]
    fields = set(data)
    for name in ("totals", "budget"):
        fields |= {f"{name}.{field}" for field in data.get(name) or ()}
    for partition in data.get("partitions", ()):
        if isinstance(partition, dict):
            fields |= {f"partitions.{field}" for field in partition}
    for counts in data.get("stages", {}).values() if isinstance(data.get("stages"), dict) else ():
        fields |= {f"stages.{field}" for field in counts}
    return fields


def first_of_each(events: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The first event of each kind."""
    found: dict[str, dict[str, Any]] = {}
    for event in events:
        found.setdefault(event["type"], event)
    return found
