"""The invariants I1 to I6 and I8, looked at with every transaction, every handler's call, and at the end.

What the brokers decided is compared with the oracle one transaction at a time, so a violation is found when it
happens and not when the output is counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal

from rowmill.state.model import Committed, StoredRecord, TopicPartition
from rowmill.streams.offsets import decode_map

from simulation.client import OPENED
from simulation.cluster import Cluster, Decided
from simulation.loop import PROCESS
from simulation.trace import Trace
from simulation.workload import (
    CHANGELOG,
    DEAD,
    GROUP,
    SIDE,
    SINK,
    TABLE,
    Expected,
    RowSpec,
    StageSpec,
    Workload,
    source,
)

_TOLD_SECONDS = 0.005
"""How long a process may take to stop what it has in work, after it was told that others may have owned it."""


class InvariantError(AssertionError):
    """The engine broke a promise."""


class Checker:
    """Follows one run.

    Args:
        workload: rows and oracle.
        now: virtual time.
        trace: told of handlers' calls.
        fail: called with the first violation.
        exactly_once: which guarantee to hold it to; otherwise, at least once.
    """

    def __init__(
        self,
        workload: Workload,
        now: Callable[[], float],
        trace: Trace,
        fail: Callable[[Exception], None],
        *,
        exactly_once: bool,
    ) -> None:
        self._exactly_once = exactly_once
        self._present: dict[tuple[int, int], Counter[str]] = {}
        self._workload = workload
        self._now = now
        self._trace = trace
        self._fail = fail
        self._rows: dict[tuple[int, int], RowSpec] = {}
        self._done: dict[int, tuple[int, set[int]]] = {}
        self._committed_at: dict[int, float] = {}
        self._oracle = workload.oracle()
        self._expected: dict[int, Expected] = self._oracle.rows
        self._anew: dict[tuple[str, int], float] = {}
        self._changes: set[tuple[int, bytes, bytes | None]] = set()
        self.calls = 0
        self.strays = 0
        """Producers started between two assignments: allowed, but they may fence the next owner."""

    def written(self, row: RowSpec) -> None:
        """A row stands in its partition."""
        self._rows[row.partition, row.offset] = row

    def fail(self, text: str) -> None:
        """A violation."""
        self._trace.note(f"VIOLATION {text}")
        self._fail(InvariantError(text))

    # --- as it happens -----------------------------------------------------------------------------------------

    def started(self, spec: StageSpec, row: dict[str, int]) -> None:
        """I4: a handler is called; not for a row whose completion was committed before its task opened."""
        self.calls += 1
        committed, opened = self._committed_at.get(row["n"]), OPENED.get()
        process = PROCESS.get()
        if spec.kind in {"async", "async_batch"} and process is not None:  # a thread cannot be stopped
            anew = self._anew.get((process.name, row["p"]), -1.0)
            if anew + _TOLD_SECONDS < self._now():
                opened = max(opened, anew)
        if committed is not None and committed < opened:
            self.fail(
                f"I4: {spec.name} is called for row {row['n']} of partition {row['p']}, which was committed at "
                f"{committed:.4f}; its task opened, or was assigned anew, at {opened:.4f}"
            )

    def assigned_anew(self, process: str, partitions: frozenset[TopicPartition]) -> None:
        """Others may have owned these before: whatever the process had in work of them is void from now on."""
        for tp in partitions:
            self._anew[process, tp.partition] = self._now()

    def producer_started(self, transactional_id: str, owned: frozenset[TopicPartition] | None) -> None:
        """Nobody fences another worker over a partition that it was told it does not own (DESIGN, step 6)."""
        if owned is None:
            self.strays += 1
        elif source(int(transactional_id.rpartition("/")[2])) not in owned:
            self.fail(f"{transactional_id} is started by a process that owns {sorted(owned)}")

    def decided(self, transaction: Decided) -> None:
        """I1, I4, I5, I8: what a transaction completes is what it carries, and was not complete before."""
        partition = int(transaction.transactional_id.rpartition("/")[2])
        moved = [done for group, offsets in transaction.offsets.items() for done in offsets.items()]
        if not moved:
            if transaction.records:
                self.fail(f"I5: {transaction.transactional_id} commits records without offsets")
            return
        if len(moved) > 1 or moved[0][0] != source(partition) or GROUP not in transaction.offsets:
            self.fail(f"I5: {transaction.transactional_id} commits {moved}")
            return
        fresh = self._advance(partition, moved[0][1])
        outputs: dict[int, list[StoredRecord]] = {}
        for record in transaction.records:
            if record.topic == CHANGELOG:
                self._changes.add((record.partition, record.key or b"", record.value))
                continue
            outputs.setdefault(self._origin(record), []).append(record)
        for offset in outputs.keys() - fresh.keys():
            row = self._rows.get((partition, offset))
            self.fail(
                f"I1/I5: offset {offset} of partition {partition} ({row}) is in another row's transaction, or again"
            )
        for offset, row in fresh.items():
            self._committed_at[row.n] = self._now()
            self._compare(row, outputs.get(offset, []))

    def appended(self, record: StoredRecord) -> None:
        """A record outside of transactions: it may come again, but it must be one that its row gives."""
        if record.topic == CHANGELOG:
            self._changes.add((record.partition, record.key or b"", record.value))
            return
        headers = dict(record.headers)
        if record.topic == DEAD:
            partition = int(headers["rowmill.error.partition"] or b"")
        else:
            partition = int((headers["rowmill.source"] or b"").split(b"/")[1])
        row = self._rows[partition, self._origin(record)]
        shown = _shown(record)
        if shown not in self._wanted(row):
            self.fail(f"I1: row {row} gave {shown}, not one of {self._wanted(row)}")
        self._present.setdefault((partition, row.offset), Counter())[shown] += 1

    def committed(self, tp: TopicPartition, committed: Committed) -> None:
        """At least once: what a commit calls complete has been written."""
        for offset, row in self._advance(tp.partition, committed).items():
            self._committed_at[row.n] = self._now()
            missing = self._wanted(row) - self._present.get((tp.partition, offset), Counter())
            if missing:
                self.fail(f"I1: row {row} is committed, and {missing} are not written")

    def _wanted(self, row: RowSpec) -> Counter[str]:
        expected = self._expected[row.n]
        wanted = Counter(f"{SINK} {value}" for value in ([None] if expected.forwarded else expected.results))
        wanted.update(f"{SIDE} {value}" for value in expected.emitted)
        wanted.update([f"{DEAD} {expected.dead}"] if expected.dead else [])
        return wanted

    def stored(self, tp: TopicPartition, changes: Sequence[tuple[bytes, bytes | None]]) -> None:
        """I3, law 5: what a local store is given was committed before."""
        for key, value in changes:
            if key[:1] != b"\0" and (tp.partition, key, value and value[8:]) not in self._changes:
                self.fail(f"I3: the store of {tp} is given {key!r}={value!r}, which no transaction has committed")

    def _advance(self, partition: int, committed: Committed) -> dict[int, RowSpec]:
        """The rows that a commit completes."""
        offsets = decode_map(committed)
        low, above = self._done.get(partition, (0, set()))
        now_above = set(range(offsets.low, offsets.end)) - set(offsets.incomplete)
        lost = {n for n in (*range(offsets.low, low), *above) if n >= offsets.low and n not in now_above}
        if self._exactly_once and any((partition, offset) in self._rows for offset in lost):
            self.fail(f"I4: the checkpoint of partition {partition} goes back: {sorted(lost)[:20]} at {committed}")
        self._done[partition] = (offsets.low, now_above)
        candidates = (*range(low, offsets.low), *now_above)
        return {
            offset: self._rows[partition, offset]
            for offset in sorted(set(candidates) - above)
            if offset >= low and (partition, offset) in self._rows
        }

    def _origin(self, record: StoredRecord) -> int:
        headers = dict(record.headers)
        if record.topic == DEAD:
            return int(headers["rowmill.error.offset"] or b"")
        return int((headers["rowmill.source"] or b"").split(b"/")[2])

    def _compare(self, row: RowSpec, records: list[StoredRecord]) -> None:
        expected = self._expected[row.n]
        by_topic: dict[str, list[StoredRecord]] = {}
        for record in records:
            by_topic.setdefault(record.topic, []).append(record)
        results = [_value(record) for record in sorted(by_topic.get(SINK, []), key=_ordinal)]
        emitted = sorted((_value(record) for record in by_topic.get(SIDE, [])), key=str)
        dead = [_reason(record) for record in by_topic.get(DEAD, [])]
        wanted = [None] if expected.forwarded else expected.results
        if results != wanted:
            self.fail(f"I1: row {row} gave {results}, not {wanted}")
        if emitted != sorted(expected.emitted, key=str):
            self.fail(f"I1: row {row} emitted {emitted}, not {expected.emitted}")
        if dead != [expected.dead] * (expected.dead is not None):
            self.fail(f"I8: row {row} has dead letters {dead}, not {expected.dead}")
        if any(record.key != row.key for record in records):
            self.fail(f"I1: row {row} has results of other keys: {records}")

    # --- at the end --------------------------------------------------------------------------------------------

    def at_end(self, cluster: Cluster) -> None:
        """Everything once more, from what a reader sees."""
        self._check_checkpoints(cluster)
        if self._exactly_once:
            self._check_outputs(cluster)
            self._check_order(cluster)
            self._check_tables(cluster)
        if cluster.open_transactions:
            self.fail(f"I6: {cluster.open_transactions} are left open")
        for topic in (SINK, SIDE, DEAD, CHANGELOG):
            for tp in cluster.store.partitions(topic) if topic in cluster.store._topics else ():
                log = cluster.store.log(tp)
                if log.end != log.high_watermark:
                    self.fail(f"I6: {tp} is readable to {log.end} of {log.high_watermark}")

    def _check_checkpoints(self, cluster: Cluster) -> None:
        known = cluster.store.group_offsets.get(GROUP, {})
        for partition in range(self._workload.partitions):
            mine = [row.offset for row in self._workload.rows if row.partition == partition]
            offset = known.get(source(partition), Committed(0)).offset
            if mine and offset <= max(mine):
                self.fail(f"I4: partition {partition} is committed up to {offset}, its last row is {max(mine)}")

    def _check_outputs(self, cluster: Cluster) -> None:
        wanted: Counter[str] = Counter()
        for row in self._workload.rows:
            expected = self._expected[row.n]
            wanted.update(f"{SINK} {value}" for value in ([None] if expected.forwarded else expected.results))
            wanted.update(f"{SIDE} {value}" for value in expected.emitted)
            wanted.update([f"{DEAD} {row.n} {expected.dead}"] if expected.dead else [])
        found = Counter(f"{r.topic} {_value(r)}" for topic in (SINK, SIDE) for r in _records(cluster, topic))
        for r in _records(cluster, DEAD):
            headers = dict(r.headers)
            place = (int(headers["rowmill.error.partition"] or b""), self._origin(r))
            found[f"{DEAD} {self._rows[place].n} {_reason(r)}"] += 1
        if found != wanted:
            self.fail(f"I1/I8: too few: {dict(wanted - found)}; too many: {dict(found - wanted)}")

    def _check_tables(self, cluster: Cluster) -> None:
        """I3: the changelog folds to what the oracle has, and its context counts what was done."""
        folds: dict[int, dict[bytes, bytes]] = {partition: {} for partition in range(self._workload.partitions)}
        for record in _records(cluster, CHANGELOG):
            fold = folds[record.partition]
            if record.value is None:
                fold.pop(record.key or b"", None)
            else:
                fold[record.key or b""] = record.value
        for partition, fold in folds.items():
            entries = {
                key.decode().partition("/")[2]: json.loads(value)
                for key, value in fold.items()
                if key.startswith(TABLE.encode() + b"/")
            }
            if entries != self._oracle.tables[partition]:
                self.fail(
                    f"I3: the tables of partition {partition} are {entries}, not {self._oracle.tables[partition]}"
                )
            self._check_context(partition, fold.get(b".checkpoint"))

    def _check_context(self, partition: int, raw: bytes | None) -> None:
        mine = [self._expected[row.n] for row in self._workload.rows if row.partition == partition]
        wanted = {
            "rows": len(mine),
            "results": sum(len(e.results) + e.forwarded for e in mine),
            "dropped": sum(not (e.dead or e.results or e.forwarded or e.skipped) for e in mine),
            "skipped": sum(e.skipped for e in mine),
            "defaulted": sum(e.defaulted for e in mine),
            "dead_letters": sum(e.dead is not None for e in mine),
            "emitted": sum(len(e.emitted) for e in mine),
        }
        self._check_cost(partition, raw)
        found = json.loads(raw)["counts"] if raw is not None else dict.fromkeys(wanted, 0)
        if found != wanted:
            self.fail(f"I3: the context of partition {partition} counts {found}, not {wanted}")

    def _check_cost(self, partition: int, raw: bytes | None) -> None:
        """The context's cost is exact: what its first stage spent on each row, whatever became of the row."""
        first = self._workload.stages[0]
        if not first.context or first.timed or raw is None:
            return
        ran = [row.n for row in self._workload.rows if row.partition == partition and row.bad is None]
        reached = [n for n in ran if n != self._workload.deadly and self._workload.is_for(first, {"n": n, "part": 0})]
        costs = [self._workload.cost(n) for n in reached]
        wanted = (sum((money for money, _ in costs), Decimal(0)), sum(tokens for _, tokens in costs))
        context = json.loads(raw)["context"]
        found = (Decimal(context["accumulated_cost"]), context["accumulated_tokens"])
        if found != wanted:
            self.fail(f"I3: the context of partition {partition} has cost {found}, not {wanted}")

    def check_store(self, cluster: Cluster, tp: TopicPartition, content: Mapping[bytes, bytes]) -> None:
        """I3: a store holds what the changelog held at some moment, at its position or later."""
        if not self._exactly_once:
            return
        position = int.from_bytes(content.get(b"\0position", b""), "big")
        entries = {key: value[8:] for key, value in content.items() if key[:1] != b"\0"}
        fold: dict[bytes, bytes] = {}
        for record in _records(cluster, CHANGELOG):
            if record.partition != tp.partition:
                continue
            if record.offset >= position and fold == entries:
                return
            if record.value is None:
                fold.pop(record.key or b"", None)
            else:
                fold[record.key or b""] = record.value
        if fold != entries:
            self.fail(f"I3: the store of {tp} at {position} holds what the changelog never did: {entries}")

    def _check_order(self, cluster: Cluster) -> None:
        """I2, in every partition of sink and side topic."""
        if self._workload.ordering == "none" and not self._workload.keeps_partition_order:
            return
        last: dict[tuple[TopicPartition, bytes, object], tuple[int, int]] = {}
        for record in (*_records(cluster, SINK), *_records(cluster, SIDE)):
            if not self._workload.keeps_partition_order and record.key is None:
                continue
            key = None if self._workload.keeps_partition_order else record.key
            origin = (dict(record.headers)["rowmill.source"] or b"").split(b"/")[1]
            group = (TopicPartition(record.topic, record.partition), origin, key)
            place = (self._origin(record), _ordinal(record))
            if place <= last.get(group, (-1, -1)):
                self.fail(f"I2: {place} comes after {last[group]} in {group}")
            last[group] = place


def _records(cluster: Cluster, topic: str) -> Iterable[StoredRecord]:
    return cluster.store.records(topic) if topic in cluster.store._topics else ()


def _value(record: StoredRecord) -> dict[str, object] | None:
    return None if record.value is None else json.loads(record.value)


def _shown(record: StoredRecord) -> str:
    return f"{DEAD} {_reason(record)}" if record.topic == DEAD else f"{record.topic} {_value(record)}"


def _ordinal(record: StoredRecord) -> int:
    return int((dict(record.headers)["rowmill.source"] or b"").split(b"/")[3])


def _reason(record: StoredRecord) -> tuple[str, str]:
    headers = dict(record.headers)
    return (headers["rowmill.error.stage"] or b"").decode(), (headers["rowmill.error.type"] or b"").decode()
