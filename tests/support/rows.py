"""Records for tests, with defaults for what a test does not care about."""

from __future__ import annotations

from typing import Any

from rowmill.state.codec import dumps
from rowmill.state.model import Headers, StoredRecord


def record(
    value: Any = b"{}",
    *,
    offset: int = 0,
    key: bytes | None = None,
    headers: Headers = (),
    topic: str = "in",
    partition: int = 0,
    timestamp: int = 1_000,
) -> StoredRecord:
    """A record as a broker gives it; a value that is no bytes becomes JSON."""
    value = value if value is None or isinstance(value, bytes) else dumps(value)
    return StoredRecord(topic, partition, offset, timestamp, key, value, headers)


def header_of(headers: Headers, name: str) -> bytes | None:
    """The only header of a name; None when absent."""
    found = [value for key, value in headers if key == name]
    assert len(found) <= 1, f"{name} stands {len(found)} times in {headers}"
    return found[0] if found else None
