"""How many dead letters a topic has had, by session, stage and type of error, in steps of five minutes for a day.

Everything of one topic is one value, so that the counts and the offsets up to which they count never part.
"""

from __future__ import annotations

from ...state.codec import loads
from .series import MOST_FAILURE_TYPES, OTHER, VERSION, packed

STEP_MS = 300_000
KEPT_MS = 86_400_000
_LONGEST = 100


class LetterBoard:
    """One dead-letter topic."""

    def __init__(self) -> None:
        self.is_changed = False
        self._positions: dict[str, int] = {}
        self._steps: dict[int, dict[tuple[str, str, str], list[int]]] = {}

    def take(self, partition: int, offset: int, at_ms: int, why: dict[str, str]) -> None:
        """Count a letter, unless it is counted already."""
        if offset < self._positions.get(str(partition), 0):
            return
        self._positions[str(partition)] = offset + 1
        session, stage, kind = (why.get(name, "")[:_LONGEST] for name in ("session", "stage", "type"))
        counts = self._steps.setdefault(at_ms - at_ms % STEP_MS, {})
        if (session, stage, kind) not in counts and len(counts) >= MOST_FAILURE_TYPES:
            stage, kind = "", OTHER
        entry = counts.setdefault((session, stage, kind), [0, 0])
        entry[0] += 1
        entry[1] = max(entry[1], at_ms)
        self.is_changed = True

    def counts(self, session: str, since_ms: int) -> dict[tuple[str, str], list[int]]:
        """By stage and type: how many since then, and when the last one came."""
        found: dict[tuple[str, str], list[int]] = {}
        for step_ms, counts in self._steps.items():
            if step_ms + STEP_MS <= since_ms:
                continue
            for (owner, stage, kind), (count, last_ms) in counts.items():
                if owner == session:
                    entry = found.setdefault((stage, kind), [0, 0])
                    entry[0] += count
                    entry[1] = max(entry[1], last_ms)
        return found

    def encode(self, now_ms: int) -> bytes:
        """As the table holds it; what is too old is dropped."""
        self._steps = {step: counts for step, counts in self._steps.items() if step + KEPT_MS > now_ms}
        self.is_changed = False
        steps = [[step, [[*key, *entry] for key, entry in counts.items()]] for step, counts in self._steps.items()]
        return packed([VERSION, self._positions, steps])

    @classmethod
    def decode(cls, value: bytes) -> LetterBoard:
        """The counterpart of :meth:`encode`.

        Raises:
            ValueError: another version wrote it.
        """
        version, positions, steps = loads(value)
        if version != VERSION:
            raise ValueError(f"version {version} of the console's tables, this one reads {VERSION}")
        board = cls()
        board._positions = positions
        board._steps = {
            step: {(s, stage, kind): [n, last] for s, stage, kind, n, last in counts} for step, counts in steps
        }
        return board
