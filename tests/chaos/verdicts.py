"""The verdicts I1 to I8 on a finished run, each from what the brokers and the workers' own logs show."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from rowmill.state.checkpoint import CHECKPOINT_KEY
from rowmill.state.errors import BadRowError
from rowmill.state.model import Committed, Record, TopicPartition

from .calls import Line, read_log
from .fate import NO_KEY, TABLE, complaint, fate, results, side
from .fleet import STOP_SECONDS, Process
from .watch import Place, Progress, Watch, changelog, source_of

RECOVERY_SECONDS = 30.0
KNOWS_SECONDS = 2.0
"""How long a former owner may go on calling handlers after it could know that it is one."""


class Verdict(NamedTuple):
    """Whether an invariant held (None: nothing to judge), and the figures behind it."""

    holds: bool | None
    figures: str


class Fault(NamedTuple):
    """One injection: when it began, and when it was over."""

    began: float
    healed: float


@dataclass
class Evidence:
    """All that a run left behind."""

    watch: Watch
    processes: Sequence[Process]
    faults: Sequence[Fault]
    finished: bool
    open_transactions: Sequence[str]
    unstable: Sequence[str]
    problems: Sequence[str] = ()
    """What the fault itself expected and did not find."""
    removed: set[Place] = field(default_factory=set)
    """Rows that retention took before they ran."""
    may_give_up: bool = False

    def rows(self) -> Iterator[tuple[Place, Record, dict[str, Any]]]:
        """The source's rows that had to be processed."""
        for place, record in self.watch.rows.items():
            if place not in self.removed:
                yield place, record, orjson.loads(record.value or b"{}")


def judge(evidence: Evidence) -> dict[str, Verdict]:
    """All verdicts by name."""
    logs = {process.number: list(read_log(process.calls)) for process in evidence.processes}
    for lines in logs.values():
        for line in lines:
            if line.kind == "C":
                evidence.watch.note_earlier(line.partition, Committed(line.offset, line.rest), line.at)
    return {
        "I1": outputs_are_exact(evidence),
        "I2": keys_keep_their_order(evidence),
        "I3": tables_are_exact(evidence),
        "I4": commits_are_exact(evidence, logs),
        "I5": whole_transactions(evidence),
        "I6": nothing_hangs(evidence),
        "I7": it_recovers(evidence),
        "I8": dead_letters_are_exact(evidence),
    }


# --- I1, I8: the oracle ----------------------------------------------------------------------------------------


def expected_outputs(name: str, place: Place, record: Record, row: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """What a row must give: topic, source header, key, content."""
    if _dies(row):
        return
    outputs = [(f"{name}.out", content) for content in results(row)]
    if fate(row).emits:
        outputs.append((f"{name}.side", side(row)))
    for ordinal, (topic, content) in enumerate(outputs):
        header = f"{name}/{place[0]}/{place[1]}/{ordinal}".encode()
        yield topic, header, record.key, _canonical(content)


def outputs_are_exact(evidence: Evidence) -> Verdict:
    """I1: the read-committed output is what the rows must give, nothing lost, nothing twice."""
    watch = evidence.watch
    name = watch.tps[0].topic
    expected = Counter(
        out for place, record, row in evidence.rows() for out in expected_outputs(name, place, record, row)
    )
    found = Counter(
        (tp.topic, dict(record.headers).get("rowmill.source"), record.key, _parsed(record.value))
        for tp, record in _outputs(watch, f"{name}.out", f"{name}.side")
    )
    return _compared(expected, found, "results")


def dead_letters_are_exact(evidence: Evidence) -> Verdict:
    """I8: one dead letter for each row that failed, with its key, value and reason, and no other."""
    watch = evidence.watch
    name = watch.tps[0].topic
    expected = Counter(
        (*(str(part).encode() for part in place), *_reason(row), record.key, record.value)
        for place, record, row in evidence.rows()
        if _dies(row)
    )
    found: Counter[tuple[Any, ...]] = Counter()
    for _, record in _outputs(watch, f"{name}.dlq"):
        headers = dict(record.headers)
        told = [headers.get(f"rowmill.error.{what}") for what in ("partition", "offset", "stage", "type", "message")]
        told = [b"-" if b"died" in (text or b"") else text for text in told]
        found[(*told, record.key, record.value)] += 1
    return _compared(expected, found, "dead letters")


def _dies(row: dict[str, Any]) -> bool:
    """Whether a row ends as a dead letter."""
    return fate(row).fails or fate(row).deadly


def _reason(row: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    """Stage, type and message of a row's dead letter; how often a deadly row killed is in its message: left out."""
    if fate(row).deadly:
        return b"process", b"-", b"-"
    return b"work", b"ValueError", complaint(row).encode()


def _compared(expected: Counter[tuple[Any, ...]], found: Counter[tuple[Any, ...]], what: str) -> Verdict:
    missing, extra = expected - found, found - expected
    repeated = sum(count for item, count in extra.items() if item in expected)
    figures = f"{found.total():,} {what} of {expected.total():,}: {missing.total()} lost, {repeated} twice"
    foreign = extra.total() - repeated
    figures += f", {foreign} wrong" if foreign else ""
    examples = [str(item) for item in (*list(missing)[:2], *list(extra)[:2])]
    return Verdict(not missing and not extra, "; ".join([figures, *examples]))


def _outputs(watch: Watch, *topics: str) -> Iterator[tuple[TopicPartition, Record]]:
    for tp, records in watch.records.items():
        if tp.topic in topics:
            yield from ((tp, record) for record in records)


def _canonical(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SORT_KEYS)


def _parsed(value: bytes | None) -> bytes | None:
    with contextlib.suppress(BadRowError, orjson.JSONDecodeError):
        return _canonical(orjson.loads(value or b""))
    return value


# --- I2 --------------------------------------------------------------------------------------------------------


def keys_keep_their_order(evidence: Evidence) -> Verdict:
    """I2: in every output partition, the records of one key stand in the order of their rows."""
    wrong, seen = [], 0
    for tp, records in evidence.watch.records.items():
        last: dict[tuple[bytes, int], tuple[int, int]] = {}
        for record in records:
            header = dict(record.headers).get("rowmill.source")
            if record.key is None or not header:
                continue
            _, partition, offset, ordinal = header.decode().rsplit("/", 3)
            key, here = (record.key, int(partition)), (int(offset), int(ordinal))
            seen += 1
            if last.get(key, (-1, -1)) >= here:
                wrong.append(f"{tp} at {record.offset}: {record.key!r} {last[key]} before {here}")
            last[key] = max(here, last.get(key, here))
    return Verdict(not wrong, "; ".join([f"{seen:,} keyed records, {len(wrong)} out of order", *wrong[:2]]))


# --- I3 --------------------------------------------------------------------------------------------------------


def tables_are_exact(evidence: Evidence) -> Verdict:
    """I3: the fold of the changelog is what the rows must count, and so are the context's sums."""
    watch = evidence.watch
    expected: Counter[tuple[int, str]] = Counter()
    for (partition, _), record, row in evidence.rows():
        if not _dies(row):
            expected[partition, (record.key or NO_KEY.encode()).decode()] += 1
    folded: dict[tuple[int, str], int] = {}
    sums: dict[int, dict[str, int]] = {}
    prefix, changes = f"{TABLE}/".encode(), 0
    for tp, record in _outputs(watch, changelog(watch.group, watch.tps[0].topic)):
        key, value = record.key or b"", orjson.loads(record.value or b"0")
        if key.startswith(prefix):
            changes += 1
            folded[tp.partition, key[len(prefix) :].decode()] = value
        elif key == CHECKPOINT_KEY:
            sums[tp.partition] = value["counts"]
    wrong = [entry for entry in expected | Counter(folded) if expected.get(entry, 0) != folded.get(entry, 0)]
    problems = [f"{entry}: {folded.get(entry)} instead of {expected.get(entry)}" for entry in wrong[:3]]
    problems += _wrong_sums(evidence, sums)[:2]
    figures = f"{len(expected):,} entries from {changes:,} changes, {len(wrong)} wrong"
    return Verdict(not problems, "; ".join([figures, *problems]))


def _wrong_sums(evidence: Evidence, sums: Mapping[int, Mapping[str, int]]) -> list[str]:
    """Partitions whose context does not count what happened."""
    expected: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for (partition, _), _record, row in evidence.rows():
        meant, counts = fate(row), expected[partition]
        counts["rows"] += 1
        counts["dead_letters"] += _dies(row)
        if not _dies(row):
            counts["results"] += meant.parts
            counts["dropped"] += not meant.parts
            counts["emitted"] += meant.emits
    return [
        f"context of partition {partition}: {dict(sums.get(partition, {}))} instead of {dict(counts)}"
        for partition, counts in expected.items()
        if sums.get(partition) != {name: counts[name] for name in _SUMS}
    ]


_SUMS = ("rows", "results", "dropped", "skipped", "defaulted", "dead_letters", "emitted")


# --- I4 --------------------------------------------------------------------------------------------------------


class Openings:
    """Which process opened each partition when: the last one owns it, earlier ones are fenced."""

    def __init__(self, logs: dict[int, list[Line]]) -> None:
        self._by_partition: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
        for number, lines in logs.items():
            for line in lines:
                if line.kind == "O":
                    self._by_partition[line.partition].append((line.at, number))
        for openings in self._by_partition.values():
            openings.sort()

    def lost_at(self, partition: int, process: int, at: float) -> float | None:
        """When this process had lost the partition to another one, if it had by that time."""
        lost = None
        for opened, owner in self._by_partition[partition]:
            if opened > at:
                break
            if owner == process:
                lost = None
            elif lost is None:
                lost = opened
        return lost


class Repeats(NamedTuple):
    """Calls for rows whose completion was committed: by the owner, and by owners that had been fenced."""

    by_owner: list[str]
    fenced: int
    longest: float


def commits_are_exact(evidence: Evidence, logs: dict[int, list[Line]]) -> Verdict:
    """I4: the commits cover exactly the rows that ran, and nothing committed is run again."""
    watch = evidence.watch
    unfinished = _not_at_the_end(evidence)
    repeats = _repeats(evidence, logs)
    calls = [line for lines in logs.values() for line in lines if line.kind == "S"]
    ended = {(line.partition, line.offset) for lines in logs.values() for line in lines if line.kind == "E"}
    ran = ended | evidence.removed | {place for place, _, row in evidence.rows() if fate(row).deadly}
    unrun = watch.complete_at.keys() - ran
    unknown = _visible_and_unknown(watch)
    again = len(calls) - len({(line.partition, line.offset) for line in calls})
    figures = f"{len(calls):,} calls for {len(watch.rows):,} rows: {again} repeated, {len(repeats.by_owner)} of them "
    figures += "after the commit"
    if repeats.fenced:
        figures += f", {repeats.fenced} by fenced owners within {repeats.longest:.2f} s"
    problems = [*watch.backwards[:2], *unfinished[:3], *repeats.by_owner[:3]]
    if unknown:
        problems.append(f"{len(unknown)} rows had visible results and were not in the commit, first {min(unknown)}")
    if unrun:
        problems.append(f"{len(unrun)} rows committed that never ran, first {min(unrun)}")
    holds = not problems and repeats.longest <= KNOWS_SECONDS
    return Verdict(holds, "; ".join([figures, *problems]))


def _not_at_the_end(evidence: Evidence) -> list[str]:
    """Partitions whose last commit is not the end of the source with an empty map."""
    ends = Counter(partition for partition, _ in evidence.watch.rows)
    wrong = []
    for tp, committed in evidence.watch.committed.items():
        if ends[tp.partition] and committed != Committed(ends[tp.partition], ""):
            wrong.append(f"{tp} ended at {ends[tp.partition]}, committed is {committed}"[:200])
    return wrong


def _visible_and_unknown(watch: Watch) -> set[Place]:
    """Rows whose results were visible, and which two looks later still were not in offset or map."""
    unknown: set[Place] = set()
    seen = dict.fromkeys(watch.records, 0)
    for sample, later in zip(watch.samples, watch.samples[2:], strict=False):
        gaps = {partition: set(known.incomplete) for partition, known in later.complete.items()}
        for tp, records in watch.records.items():
            while seen[tp] < len(records) and records[seen[tp]].offset < sample.stable[tp]:
                place = source_of(records[seen[tp]])
                if place is not None and (place[1] >= later.complete[place[0]].end or place[1] in gaps[place[0]]):
                    unknown.add(place)
                seen[tp] += 1
    return unknown


def _repeats(evidence: Evidence, logs: dict[int, list[Line]]) -> Repeats:
    openings, complete_at = Openings(logs), dict(evidence.watch.complete_at)
    for place, at in evidence.watch.visible_at.items():
        complete_at[place] = min(at, complete_at.get(place, at))
    resumed = {process.number: process.resumed for process in evidence.processes}
    by_owner, fenced, longest = [], 0, 0.0
    for number, lines in logs.items():
        for line in lines:
            if line.kind != "S" or complete_at.get((line.partition, line.offset), line.at) >= line.at:
                continue
            lost = openings.lost_at(line.partition, number, line.at)
            if lost is None:
                known = complete_at[line.partition, line.offset]
                by_owner.append(
                    f"worker {number} ran {line.partition}/{line.offset} {line.at - known:.3f} s after its commit"
                )
                continue
            fenced += 1
            could_know = max([lost, *(at for at in resumed[number] if at <= line.at)])
            longest = max(longest, line.at - could_know)
    return Repeats(by_owner, fenced, longest)


# --- I5, I6 ----------------------------------------------------------------------------------------------------


def whole_transactions(evidence: Evidence) -> Verdict:
    """I5: whenever looked at, a committed row had all its outputs, and a row with one visible output had all."""
    watch = evidence.watch
    name = watch.tps[0].topic
    needed = {place: _outputs_of(name, place, record, row) for place, record, row in evidence.rows()}
    wrong: list[str] = []
    checked: set[Place] = set()
    lows = [0] * len(watch.tps)
    seen = dict.fromkeys(watch.records, 0)
    for sample in watch.samples:

        def torn(place: Place, written: Mapping[TopicPartition, int] = sample.written) -> str:
            there = sum(1 for tp, offset in watch.by_row.get(place, ()) if offset < written[tp])
            return f"{there} of {needed[place]} outputs" if there < needed.get(place, 0) else ""

        for partition, known in sample.complete.items():
            gaps = set(known.incomplete)
            fresh = ((partition, o) for o in range(lows[partition], known.end) if o not in gaps)
            for place in fresh:
                if place not in checked and (lack := torn(place)):
                    wrong.append(f"{place} committed with {lack}")
                checked.add(place)
            lows[partition] = known.low
        for tp, records in watch.records.items():
            while seen[tp] < len(records) and records[seen[tp]].offset < sample.stable[tp]:
                visible = source_of(records[seen[tp]])
                if visible is not None and (lack := torn(visible)):
                    wrong.append(f"{visible} visible with {lack}")
                seen[tp] += 1
    figures = f"{len(watch.samples)} looks at {len(checked):,} committed rows, {len(wrong)} torn"
    return Verdict(not wrong, "; ".join([figures, *wrong[:3]]))


def _outputs_of(name: str, place: Place, record: Record, row: dict[str, Any]) -> int:
    return sum(1 for _ in expected_outputs(name, place, record, row))


def nothing_hangs(evidence: Evidence) -> Verdict:
    """I6: after the run no transaction is open, and the last stable offset is the high watermark everywhere."""
    problems = [*evidence.unstable[:3], *evidence.open_transactions[:3]]
    figures = f"{len(evidence.open_transactions)} open, {len(evidence.unstable)} partitions held back"
    return Verdict(not problems, "; ".join([figures, *problems]))


# --- I7 --------------------------------------------------------------------------------------------------------


def recoveries(faults: Sequence[Fault], progress: Sequence[Progress], totals: Sequence[int]) -> list[float]:
    """Seconds from each heal until every partition that had rows left got on; faults that another one overtook
    within half a minute give no figure.

    The base is what was complete half a second after the heal: a commit under way at that time proves nothing.
    """
    found = []
    heals = sorted(fault.healed for fault in faults)
    begins = sorted(fault.began for fault in faults)
    for heal in heals:
        base = next((look for look in progress if look.at >= heal + 0.5), None)
        if base is None:
            continue
        waiting = [p for p, total in enumerate(totals) if base.complete[p] < total]
        back = next(
            (
                look.at - heal
                for look in progress
                if look.at > base.at and all(look.complete[p] > base.complete[p] for p in waiting)
            ),
            float("inf"),
        )
        overtaken = next((begin - heal for begin in begins if begin > heal), float("inf"))
        if back <= overtaken or overtaken > RECOVERY_SECONDS:
            found.append(back)
    return found


def standstill(faults: Sequence[Fault], progress: Sequence[Progress], totals: Sequence[int]) -> float:
    """The longest time without any commit while rows were left, not counting the faults' own duration."""
    longest, last = 0.0, progress[0] if progress else None
    for look in progress:
        assert last is not None
        if look.complete != last.complete or sum(look.complete) >= sum(totals):
            last = look
            continue
        within = sum(max(0.0, min(look.at, fault.healed) - max(last.at, fault.began)) for fault in faults)
        longest = max(longest, look.at - last.at - within)
    return longest


def it_recovers(evidence: Evidence) -> Verdict:
    """I7: progress within half a minute of every heal, an orderly stop in time, and no worker that gave up."""
    totals = row_counts(evidence.watch)
    times = recoveries(evidence.faults, evidence.watch.progress, totals)
    longest = standstill(evidence.faults, evidence.watch.progress, totals)
    stops = [p.ended - p.told_to_stop for p in evidence.processes if p.told_to_stop and p.ended and not p.killed_by_us]
    forced = overdue(evidence.processes)
    bad = [p for p in evidence.processes if p.told_to_stop and not p.ended_well]
    gave_up = [process for process in evidence.processes if process.gave_up]
    figures = f"recovery at most {max(times, default=0):.1f} s, stop at most {max(stops, default=0):.1f} s, longest "
    figures += f"standstill {longest:.1f} s, {len(gave_up)} workers gave up"
    problems = [*evidence.problems] if evidence.finished else [*evidence.problems, "not all rows were completed"]
    problems += [f"worker {p.number} did not stop within {STOP_SECONDS:g} s" for p in forced]
    problems += [f"worker {p.number} stopped with code {p.popen.returncode}: {p.last_words()[:200]}" for p in bad]
    if not evidence.may_give_up:
        problems += [f"worker {p.number}: {p.last_words()[:200]}" for p in gave_up[:2]]
    slow = max([longest, *times], default=0.0) > RECOVERY_SECONDS
    return Verdict(not problems and not slow, "; ".join([figures, *problems]))


def overdue(processes: Sequence[Process]) -> list[Process]:
    """Those that had to be killed because they did not stop in time; the storm also kills some on their way out."""
    now = time.monotonic()
    killed = [(p, p.told_to_stop) for p in processes if p.killed_by_us]
    return [p for p, told in killed if told is not None and (p.ended or now) - told >= STOP_SECONDS]


def row_counts(watch: Watch) -> list[int]:
    """Rows per source partition."""
    counts = Counter(partition for partition, _ in watch.rows)
    return [counts[tp.partition] for tp in watch.tps]
