"""Dead letters as they are listed: by pages, filtered, in bounded time, and none twice."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from rowmill.state.model import Headers, Outgoing, TopicPartition
from rowmill.streams.console import letter_reads
from rowmill.streams.console.actions import Actions
from rowmill.streams.console.answers import RefusedRequestError
from rowmill.streams.console.board import Board
from rowmill.streams.console.letter_reads import LetterReads, Wanted
from rowmill.streams.console.operations import Operations
from rowmill.streams.console.watch import Watch
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock
from support.statuses import a_status

GROUP = "rowmill.p"


def why(stage: str, kind: str, message: str) -> Headers:
    """The headers of a dead letter."""
    told = {"stage": stage, "type": kind, "message": message, "topic": "in", "partition": "0", "offset": "7"}
    return tuple((f"rowmill.error.{name}", text.encode()) for name, text in told.items())


class Desk:
    """Twelve dead letters in three partitions, and who reads them."""

    def __init__(self) -> None:
        self.broker, self.clock = FakeBroker(), FakeClock()
        self.broker.make("in", 3)
        self.rows: list[tuple[TopicPartition, Outgoing]] = []
        for n, tp in enumerate(self.broker.make("p.dlq", 3) * 4):
            kind = "TimeoutError" if n % 2 else "ValueError"
            headers = why("score" if n < 9 else "clean", kind, f"Trouble {n}")
            row = Outgoing(b"K%d" % n, b'{"n": %d}' % n, 1_000, headers)
            self.rows.append((tp, row))
        self.watch = Watch(self.broker, Board(self.clock), clock=self.clock)
        status = a_status("p")
        record = replace(status.record, sources=("in",), dead_letters="p.dlq")
        self.watch._statuses = {GROUP: replace(status, record=record)}
        self.reads = LetterReads(self.broker, self.watch, clock=self.clock)
        self.actions = Actions(self.broker, self.watch, self.reads, Operations(clock=self.clock), clock=self.clock)


@pytest.fixture
async def desk() -> Desk:
    """A fresh one."""
    desk = Desk()
    producer = desk.broker.producer()
    await producer.start()
    for tp, row in desk.rows:
        await (await producer.send(tp, [row]))
    await producer.close()
    return desk


async def test_pages(desk: Desk) -> None:
    """Each dead letter stands on one page, also where many have the same time."""
    seen: list[str] = []
    after: dict[str, Any] = {}
    for _ in range(3):
        found = await desk.reads.briefs(GROUP, {"limit": 5, **after})
        seen += [letter["id"] for letter in found["letters"]]
        after = {"after": found["next"]}
    assert (len(seen), len(set(seen)), found["next"]) == (12, 12, None)
    assert (found["total"], found["waiting"], found["scanned"], found["complete"]) == (12, 12, 12, True)


async def test_what_has_not_grown_is_not_read_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page asks whenever something changes in its session; another dead letter, or a mark, is seen at once."""
    scans = 0
    scan = desk.reads._scan

    async def counted(*args: Any) -> Any:
        nonlocal scans
        scans += 1
        return await scan(*args)

    monkeypatch.setattr(desk.reads, "_scan", counted)
    first = await desk.reads.briefs(GROUP, {"limit": 5})
    assert await desk.reads.briefs(GROUP, {"limit": 5}) == first
    assert scans == 1
    assert (await desk.reads.briefs(GROUP, {"limit": 5, "status": "all"}))["total"] == 12
    assert scans == 2
    producer = desk.broker.producer()
    await producer.start()
    await (await producer.send(*(desk.rows[0][0], [desk.rows[0][1]])))
    await producer.close()
    assert (await desk.reads.briefs(GROUP, {"limit": 5}))["total"] == 13
    await desk.actions.purge(GROUP, {"dry_run": False, "ids": ["0/0"]}, by="me")
    assert (await desk.reads.briefs(GROUP, {"limit": 5}))["total"] == 12
    for n in range(40):
        await desk.reads.briefs(GROUP, {"limit": 5, "text": f"{n}"})
    assert len(desk.reads._remembered) == letter_reads._MOST_REMEMBERED


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({}, 12),
        ({"stage": "clean"}, 3),
        ({"type": "ValueError"}, 6),
        ({"stage": "clean", "type": "ValueError"}, 1),
        ({"text": "trouble 11"}, 1),
        ({"text": '"N": 3'}, 1),
        ({"text": "k1"}, 3),
        ({"text": "in/0/7"}, 12),
        ({"text": "absent"}, 0),
        ({"status": "retried"}, 0),
        ({"status": "all"}, 12),
        ({"since_ms": 2**50}, 0),
        ({"until_ms": 0}, 0),
    ],
)
async def test_filters(desk: Desk, asked: dict[str, Any], count: int) -> None:
    """All that is given must hold; a text may stand in the key, the value, the message or the place."""
    assert (await desk.reads.briefs(GROUP, asked))["total"] == count


async def test_counts_are_of_all_kinds(desk: Desk) -> None:
    """Whatever stage and type are chosen, so that others can be."""
    found = await desk.reads.briefs(GROUP, {"stage": "clean", "type": "ValueError"})
    assert sum(each["count"] for each in found["counts"]) == 12
    assert {(each["stage"], each["type"]) for each in found["counts"]} == {
        ("score", "ValueError"), ("score", "TimeoutError"), ("clean", "ValueError"), ("clean", "TimeoutError"),
    }  # fmt: skip


async def test_a_topic_that_takes_too_long(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found by then is the answer, and says so; nothing is retried by half a look."""

    async def stuck(*_: Any) -> Any:
        await asyncio.Event().wait()
        yield

    monkeypatch.setattr(letter_reads, "_of_partition", stuck)
    monkeypatch.setattr(letter_reads, "SCAN_SECONDS", 0.05)
    found = await desk.reads.briefs(GROUP, {})
    assert (found["complete"], found["letters"]) == (False, [])
    with pytest.raises(RefusedRequestError, match="narrow it"):
        await desk.reads.ids(GROUP, Wanted(text="x"))


async def test_readers_wait_for_each_other(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time; who waits too long is told to come again."""
    monkeypatch.setattr(letter_reads, "_ROOM_SECONDS", 0.05)
    async with desk.reads._turn(), desk.reads._turn():
        with pytest.raises(RefusedRequestError) as caught:
            await desk.reads.briefs(GROUP, {})
        assert caught.value.status == 503
    assert (await desk.reads.briefs(GROUP, {}))["total"] == 12


async def test_what_is_not_there(desk: Desk) -> None:
    """No session, no dead letters yet, and too many for a filter by text."""
    with pytest.raises(RefusedRequestError):
        await desk.reads.briefs("rowmill.q", {})
    await desk.broker.delete_topics(["p.dlq"])
    assert (await desk.reads.briefs(GROUP, {}))["letters"] == []


async def test_too_many_for_a_text(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filter by text chooses all that fit, or nothing is done."""
    monkeypatch.setattr(letter_reads, "MOST_FOUND", 5)
    with pytest.raises(RefusedRequestError, match="more than 5"):
        await desk.actions.retry(GROUP, {"filter": {"text": "trouble"}, "dry_run": True}, by="me")


async def test_a_filter_that_fits_nothing_is_not_all(desk: Desk) -> None:
    """A text that stands nowhere, ids that the text leaves out, and no ids at all choose none."""
    for asked in ({"filter": {"text": "absent"}}, {"ids": ["0/0"], "filter": {"text": "trouble 11"}}):
        for action in (desk.actions.retry, desk.actions.purge):
            outcome = await action(GROUP, {**asked, "dry_run": False}, by="me")
            assert (outcome["matched"], outcome["done"]) == (0, 0)
    assert (await desk.reads.briefs(GROUP, {}))["waiting"] == 12
    assert desk.broker.values("in") == []


async def test_retry_and_purge(desk: Desk) -> None:
    """What was chosen, once, and marked with who did it."""
    dry = await desk.actions.retry(GROUP, {"filter": {"stage": "clean"}, "dry_run": True}, by="me")
    assert (dry["matched"], dry["done"], dry["targets"]) == (3, 0, {"in": 3})
    done = await desk.actions.retry(GROUP, {"filter": {"text": "trouble 1"}, "dry_run": False}, by="me")
    assert done["done"] == 3  # 1, 10, 11
    purged = await desk.actions.purge(GROUP, {"ids": ["0-0", "2/0"], "dry_run": False}, by="you")
    assert purged["done"] == 2
    found = await desk.reads.briefs(GROUP, {"status": "all"})
    assert sorted(letter["status"] for letter in found["letters"]) == ["purged"] * 2 + ["retried"] * 3 + ["waiting"] * 7
    mark = (await desk.reads.whole(GROUP, "0/0"))["mark"]
    assert (mark["state"], mark["by"]) == ("purged", "you")
    assert len(desk.broker.values("in")) == 3


async def test_what_is_refused_is_counted_by_reason(desk: Desk) -> None:
    """All of it, though only the first ids of each reason are named; and how many are done is told meanwhile."""
    source = desk.rows[0][0]
    named = "rowmill.error.topic"
    odd = (*(each for each in why("score", "ValueError", "odd") if each[0] != named), (named, b"elsewhere"))
    cut = (*why("score", "ValueError", "cut"), ("rowmill.error.truncated", b"999"))
    producer = desk.broker.producer()
    await producer.start()
    rows = [Outgoing(b"k", b"{}", 1_000, odd)] * 30 + [Outgoing(b"k", b"{}", 1_000, cut)] * 25
    await (await producer.send(source, rows))
    await producer.close()
    outcome = await desk.actions.retry(GROUP, {"dry_run": False}, by="me")
    assert (outcome["done"], outcome["refusals"]) == (12, 55)
    assert sorted(each["count"] for each in outcome["refused"]) == [25, 30]
    last = desk.actions._operations.last(GROUP)
    assert last is not None
    assert (last.to_dict()["done"], last.to_dict()["total"]) == (12, 12)
