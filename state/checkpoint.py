"""What every commit notes in the changelog besides the tables' writes: where it stood, and the context.

The group's committed offset stays the one that counts. This record is its witness: it tells a changelog that knows a
checkpoint from a group that forgot it (offsets expire), a store that ran ahead of the broker, a topic that was made
anew, and a task that died without saying goodbye.

Format, version 1: a JSON object under the key ``.checkpoint``. Version 2 has ``rebuild`` besides, and is written only
while tables are made again: an older rowmill, which would give those rows' results once more, refuses it by its
version; before and after, it reads what a newer one wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from zlib import crc32

from .codec import dumps, loads
from .errors import CheckpointError
from .model import Committed

CHECKPOINT_KEY = b".checkpoint"
"""The record's key in store and changelog; no table's name begins with a dot."""

_VERSION = 1
_REBUILDING = 2


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """The last commit of a partition, as its changelog knows it.

    Attributes:
        offset: the low watermark that was committed with it.
        map_crc: CRC-32 of the offset map's text.
        stopped: whether the task ended in order with this commit.
        witness: offset and timestamp of the highest row that was taken, None before the first one.
        counts: rows, results, dropped, skipped, defaulted, dead_letters, emitted: sums since the session's beginning.
        context: the ExecutionContext's checkpoint.
        owner: the process that made the commit.
        generation: a name for this life of the changelog; one that was deleted and made anew has another.
        starts: how often rows that may have killed their process were begun since, by offset.
        rebuild_until: rows below this offset run only for what they write to tables, which are made again; None: they
            are not.
        rebuild_map: an offset map's text: which rows from there on have had their results as well.
    """

    offset: int
    map_crc: int
    stopped: bool
    witness: tuple[int, int] | None
    counts: dict[str, int]
    context: dict[str, Any]
    starts: dict[int, int]
    owner: str
    generation: str
    rebuild_until: int | None = None
    rebuild_map: str = ""

    def agrees_with(self, committed: Committed) -> bool:
        """Whether the group's commit is the one this record was written with."""
        return committed.offset == self.offset and crc_of(committed) == self.map_crc

    def encode(self) -> bytes:
        """The record's value."""
        rebuild = {} if self.rebuild_until is None else {"rebuild": [self.rebuild_until, self.rebuild_map]}
        return dumps(
            {
                "version": _REBUILDING if rebuild else _VERSION,
                "offset": self.offset,
                "map_crc": self.map_crc,
                "stopped": self.stopped,
                "witness": self.witness,
                "counts": self.counts,
                "context": self.context,
                "starts": {str(offset): count for offset, count in self.starts.items()},
                "owner": self.owner,
                "generation": self.generation,
                **rebuild,
            }
        )

    @classmethod
    def decode(cls, value: bytes) -> CheckpointRecord:
        """The counterpart of :meth:`encode`.

        Raises:
            CheckpointError: it cannot be read, or a newer rowmill wrote it.
        """
        try:
            fields = loads(value)
            version = fields.pop("version")
            if version not in {_VERSION, _REBUILDING}:
                raise CheckpointError(
                    f"the changelog's checkpoint is of version {version}; this rowmill reads {_VERSION} and "
                    f"{_REBUILDING}: run a newer"
                )
            until, offset_map = fields.pop("rebuild") if version == _REBUILDING else (None, "")
            witness = fields.pop("witness")
            starts = {int(offset): int(count) for offset, count in fields.pop("starts").items()}
            place = None if witness is None else (int(witness[0]), int(witness[1]))
            return cls(**fields, witness=place, starts=starts, rebuild_until=until, rebuild_map=offset_map)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise CheckpointError(f"the changelog's checkpoint cannot be read ({error}): {value[:80]!r}…") from error


def crc_of(committed: Committed) -> int:
    """CRC-32 of a commit's map."""
    return crc32(committed.metadata.encode())
