"""The ledger on a topic: one order for all readers, lost answers, snapshots, records nobody understands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
from rowmill.handlers.budget import Account, Budget, Entry, LedgerState
from rowmill.handlers.errors import LedgerError
from rowmill.state.codec import dumps, loads
from rowmill.state.model import TopicPartition
from rowmill.streams import ledger as module
from rowmill.streams.brokers.base import TopicSpec
from rowmill.streams.ledger import LEDGER_CONFIG, TopicLedger, encode_entry, encode_snapshot, read_ledger
from support.fake_broker import FakeBroker, Step, lost
from support.fake_clock import FakeClock

TOPIC = "rowmill.p.budget"
TP = TopicPartition(TOPIC, 0)
ONE = Decimal(1)

pytestmark = pytest.mark.timeout(30)


def entry(worker: str, sequence: int, limit: Any = 10, **amounts: Any) -> Entry:
    """An entry from plain numbers."""
    closes = amounts.pop("closes", False)
    money = {name: Decimal(str(amount)) for name, amount in amounts.items()}
    return Entry(worker, sequence, Decimal(limit), closes=closes, **money)


@pytest.fixture
def broker() -> FakeBroker:
    """A broker with an empty ledger."""
    broker = FakeBroker()
    broker.make(TOPIC)
    return broker


@asynccontextmanager
async def opened(broker: FakeBroker, **options: Any) -> AsyncIterator[TopicLedger]:
    """A ledger on the topic."""
    ledger = TopicLedger(broker, TOPIC, clock=FakeClock(), **options)
    try:
        yield ledger
    finally:
        await ledger.close()


async def test_the_log_decides(broker: FakeBroker) -> None:
    """Two that ask for the same money at once get it in the log's order, and both readers agree."""
    async with opened(broker) as one, opened(broker) as two:
        first, second = await asyncio.gather(
            one.post(entry("a", 1, take=7, least=7)), two.post(entry("b", 1, take=7, least=7))
        )
        assert sorted([first.granted, second.granted]) == [0, 7]
        assert (await one.look("a")).used == (await two.look("b")).used == 7
        await two.post(entry("b", 2, give=7))
        await one.post(entry("a", 2, give=7))
        assert (await two.look("b")).used == 0


async def test_news(broker: FakeBroker) -> None:
    """Who waits for news gets it when another worker writes."""
    async with opened(broker) as one, opened(broker) as two:
        await one.post(entry("a", 1, take=10))
        news = asyncio.create_task(two.news("b", (await two.look("b")).version))
        await asyncio.sleep(0.01)
        assert not news.done()
        await one.post(entry("a", 2, give=4))
        assert (await news).used == 6


async def test_a_session_goes_on(broker: FakeBroker) -> None:
    """A later start finds what was spent, and what a worker that died held."""
    async with opened(broker) as ledger:
        await ledger.post(entry("a", 1, take=4))
        await ledger.post(entry("b", 1, take=3))
        await ledger.post(entry("b", 2, give=2, spent=1, closes=True))
    async with opened(broker) as ledger:
        assert (await ledger.look("c")).used == 5
    report = await read_ledger(broker, TOPIC, clock=FakeClock())
    assert [report.limit, report.granted, report.returned, report.used] == [Decimal(n) for n in (10, 7, 2, 5)]
    assert [(each.worker, each.leased, each.spent, each.open, each.is_closed) for each in report.workers] == [
        ("a", Decimal(4), Decimal(0), Decimal(4), False),
        ("b", ONE, ONE, Decimal(0), True),
    ]


async def test_nothing_there() -> None:
    """Reading for status makes no topic: without one, nothing is spent."""
    broker = FakeBroker()
    report = await read_ledger(broker, TOPIC, clock=FakeClock())
    assert (report.used, report.workers) == (Decimal(0), ())
    assert "create" not in broker.calls
    async with opened(broker, create=False) as ledger:
        with pytest.raises(LedgerError, match="creation is off"):
            await ledger.look("a")


async def test_the_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The topic is made with one partition, and nothing in it ever expires or is compacted."""
    broker = FakeBroker()
    made: list[TopicSpec] = []

    async def create(specs: list[TopicSpec]) -> None:
        made.extend(specs)
        broker.make(TOPIC)

    monkeypatch.setattr(broker, "create_topics", create)
    async with opened(broker) as ledger:
        await ledger.look("a")
    assert made == [TopicSpec(TOPIC, 1, LEDGER_CONFIG)]
    assert LEDGER_CONFIG == {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}


@pytest.mark.parametrize("took_effect", [False, True])
@pytest.mark.parametrize("step", ["send", "ack", "fetch", "look_up", "position"])
async def test_lost_answers(broker: FakeBroker, step: Step, took_effect: bool) -> None:
    """A call that fails is a LedgerError; the same entry again counts once, whatever became of the first."""
    async with opened(broker) as ledger:
        await ledger.post(entry("a", 1, take=2))
        broker.inject(step, lost(), took_effect=took_effect)
        asked = entry("a", 2, take=3)
        with pytest.raises(LedgerError, match="connection lost"):
            await ledger.post(asked)
        standing = await ledger.post(asked)
        assert (standing.granted, standing.used) == (Decimal(3), Decimal(5))
    async with opened(broker) as ledger:
        assert (await ledger.look("b")).used == 5


@pytest.mark.parametrize("step", ["ack", "fetch", "look_up", "topics"])
async def test_no_answer_at_all(broker: FakeBroker, step: Step) -> None:
    """A broker that never answers costs the deadline and no more."""
    broker.inject(step)
    async with opened(broker, timeout=0.05) as ledger:
        with pytest.raises(LedgerError, match=r"within 0\.05 s"):
            await ledger.post(entry("a", 1, take=2))
        assert (await ledger.post(entry("a", 1, take=2))).granted == 2


async def test_snapshots(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many entries a snapshot is written; who begins there comes to the same state, and reads little."""
    monkeypatch.setattr(module, "SNAPSHOT_EVERY", 10)
    async with opened(broker) as ledger:
        for number in range(1, 96):
            await ledger.post(entry(f"w{number % 7}", number, limit=1000, take=number, give=1, spent=1, tell=0.5))
        expected = ledger._state
    snapshots = [record for record in broker.records(TOPIC) if b'"snapshot"' in (record.value or b"")]
    assert len(snapshots) == 9
    broker.truncate(TP, snapshots[-2].offset)
    async with opened(broker) as ledger:
        await ledger.look("new")
        assert ledger._state == expected


async def test_a_snapshot_far_back(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest snapshot is found however far back it lies, and what came between it and its record is not lost."""
    monkeypatch.setattr(module, "SNAPSHOT_EVERY", 2)
    state = LedgerState()
    values = []
    for number in range(1, 200):
        each = entry("a", number, limit=1000, take=1)
        values.append(encode_entry(each))
        if number <= 3:
            state.apply(each)
    values.insert(5, encode_snapshot(state, 3))  # two entries of others came before it
    broker.write(TP, *values)
    broker.truncate(TP, 3)
    async with opened(broker) as ledger:
        assert (await ledger.look("a")).used == 199


async def test_a_ledger_that_lost_its_beginning(broker: FakeBroker) -> None:
    """Where retention removed entries, nobody knows what was spent: an error that says what to do."""
    broker.write(TP, *(encode_entry(entry("a", number, take=1)) for number in range(1, 5)))
    broker.truncate(TP, 2)
    async with opened(broker) as ledger:
        with pytest.raises(LedgerError, match="unlimited retention"):
            await ledger.look("a")


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"v":"1"}',
        b'{"v":1}',
        b'{"v":1,"type":"other"}',
        b'{"v":1,"type":"entry"}',
        b'{"v":1,"type":"entry","worker":"a","sequence":1,"limit":10}',
        b'{"v":1,"type":"entry","worker":"a","sequence":true,"limit":"10"}',
        b'{"v":1,"type":"entry","worker":"a","sequence":9,"limit":"10","take":"-1"}',
        b'{"v":1,"type":"entry","worker":"a","sequence":9,"limit":"10","take":"NaN"}',
        b'{"v":1,"type":"snapshot","position":0,"workers":[[]]}',
        b'{"v":1,"type":"snapshot","position":0,"entries":0,"granted":"0","returned":"0","charged":"0","limit":"0"}',
    ],
)
async def test_strange_records(broker: FakeBroker, value: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    """What no ledger wrote is left out by every reader, with a line in the log."""
    broker.write(TP, encode_entry(entry("a", 1, take=2)), value, encode_entry(entry("a", 2, take=3)))
    async with opened(broker) as ledger:
        assert (await ledger.look("a")).used == 5
    assert "offset 1 is no record" in caplog.text


@pytest.mark.parametrize("kind", ["entry", "snapshot"])
async def test_a_newer_rowmill(broker: FakeBroker, kind: str) -> None:
    """A record of a newer version stops this one, for it might count wrongly; the message says what to do."""
    broker.write(TP, dumps({"v": 2, "type": kind}))
    async with opened(broker) as ledger:
        for _ in range(2):
            with pytest.raises(LedgerError, match="update this worker"):
                await ledger.look("a")


def test_what_an_entry_looks_like() -> None:
    """The stored form is fixed: ledgers outlive versions."""
    written = encode_entry(entry("a", 3, limit="12.50", take=2, least="0.5", tell=0.75, closes=True))
    assert loads(written) == {
        "v": 1, "type": "entry", "worker": "a", "sequence": 3, "limit": "12.50", "take": "2", "least": "0.5",
        "tell": "0.75", "closes": True,
    }  # fmt: skip
    assert len(encode_entry(entry("0123456789abcdef", 1, take=2, least=1))) < 150


async def test_accounts_on_a_failing_broker(broker: FakeBroker) -> None:
    """Three workers with 200 calls in flight, over a broker that fails now and then, spend the limit and no more."""
    steps: tuple[Step, ...] = ("send", "ack", "fetch", "look_up")
    for step in steps:
        for skip in (3, 9, 15):
            broker.inject(step, lost(), took_effect=skip == 9, skip=skip)
    clock, started = FakeClock(), 0

    async def call(account: Account) -> None:
        nonlocal started
        while True:
            reservation = await account.reserve(ONE)
            started += 1
            await asyncio.sleep(0)
            account.settle(reservation, ONE)

    ledgers = [TopicLedger(broker, TOPIC, clock=clock) for _ in range(3)]
    accounts = [Account(Budget(300), ledger, clock=clock) for ledger in ledgers]
    for account in accounts:
        await account.start()
    calls = [asyncio.create_task(call(accounts[number % 3])) for number in range(200)]
    async with asyncio.timeout(20):
        while not all(account.is_exhausted for account in accounts) or started < 300:
            await asyncio.sleep(0.001)
    assert started == 300
    for task in calls:
        task.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    for account, ledger in zip(accounts, ledgers, strict=True):
        await account.close()
        await ledger.close()
    report = await read_ledger(broker, TOPIC, clock=clock)
    assert (report.used, len(report.workers)) == (Decimal(300), 3)
    assert all(each.is_closed and not each.open for each in report.workers)
