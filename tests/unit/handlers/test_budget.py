"""Budget, prices, the ledger's fold, and the account: reserve, settle, lease, give back, wait, tell."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import pytest
from rowmill.handlers.budget import (
    Account,
    Budget,
    Entry,
    LedgerState,
    MemoryLedger,
    Standing,
    checked_price,
    price_of,
)
from rowmill.handlers.errors import LedgerError, PriceTooHighError, UnknownPriceError
from rowmill.state.codec import dumps
from rowmill.state.errors import ConfigError
from support.fake_clock import FakeClock

pytestmark = pytest.mark.timeout(20)

NEVER = float("inf")
ONE = Decimal(1)


# --- the user's side -------------------------------------------------------------------------------------------


def test_budget() -> None:
    """Everything is Decimal; fractions given as floats mean what they look like, sorted and once each."""
    budget = Budget("12.50", warn=[0.9, 0.1, Decimal("0.9"), 1])
    assert budget.limit == Decimal("12.50")
    assert budget.warn == (Decimal("0.1"), Decimal("0.9"), Decimal(1))
    assert Budget(3).warn == (Decimal("0.75"), Decimal("0.9"))
    assert Budget(3, warn=()).warn == ()
    with pytest.raises(AttributeError):
        budget.limit = ONE  # type: ignore[misc]


@pytest.mark.parametrize(
    ("limit", "warn", "setting"),
    [
        (0.5, (), "limit"),
        (0, (), "limit"),
        (-1, (), "limit"),
        ("much", (), "limit"),
        ("Infinity", (), "limit"),
        (None, (), "limit"),
        (True, (), "limit"),
        (1, (0,), "warn"),
        (1, (1.1,), "warn"),
        (1, (float("nan"),), "warn"),
        (1, ("half",), "warn"),
        (1, (True,), "warn"),
        (1, "0.5", "warn"),
        (1, 0.5, "warn"),
    ],
)
def test_bad_budgets(limit: Any, warn: Any, setting: str) -> None:
    """What is no amount or no fraction is refused by name."""
    with pytest.raises(ConfigError, match=f"Budget\\({setting}="):
        Budget(limit, warn=warn)


def raising(row: dict[str, Any]) -> Decimal:
    """A price that is a mistake."""
    raise KeyError("tokens")


async def later(row: dict[str, Any]) -> Decimal:
    """A price that would have to be awaited."""
    return ONE


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        ("0.02", Decimal("0.02")),
        (2, Decimal(2)),
        (Decimal("0.5"), Decimal("0.5")),
        (0, Decimal(0)),
        (lambda row: Decimal(row["n"]) / 4, Decimal("1.75")),
        (lambda row: str(row["n"]), Decimal(7)),
    ],
)
def test_prices(price: Any, expected: Decimal) -> None:
    """A price is an amount, or a function of the row that gives one."""
    assert price_of(checked_price(price), {"n": 7}) == expected


@pytest.mark.parametrize(
    "price", [raising, later, *(lambda _, amount=amount: amount for amount in (None, 0.5, -1, "x", True)), 0.5]
)
def test_unknown_prices(price: Any) -> None:
    """A price that cannot be told is an error, never zero."""
    with pytest.raises(UnknownPriceError, match="unknown"):
        price_of(price, {"n": 7})


@pytest.mark.parametrize("price", [0.5, -1, None, "x", True])
def test_bad_price_options(price: Any) -> None:
    """A price that can never be one is refused when the stage is made."""
    with pytest.raises(ConfigError, match="price="):
        checked_price(price)


# --- the fold --------------------------------------------------------------------------------------------------


def fold(*entries: Entry) -> LedgerState:
    """A ledger of these entries."""
    state = LedgerState()
    for entry in entries:
        state.apply(entry)
    return state


def entry(worker: str, sequence: int, limit: Any = 10, **amounts: Any) -> Entry:
    """An entry from plain numbers."""
    closes = amounts.pop("closes", False)
    money = {name: Decimal(str(amount)) for name, amount in amounts.items()}
    return Entry(worker, sequence, Decimal(limit), closes=closes, **money)


@pytest.mark.parametrize(
    ("last", "granted", "used"),
    [
        (entry("b", 1, take=4), 4, 10),  # all that is left
        (entry("b", 1, take=5), 4, 10),  # cut to what is left
        (entry("b", 1, take=5, least=4), 4, 10),
        (entry("b", 1, take=6, least=5), 0, 6),  # refused rather than cut below what helps
        (entry("b", 1, limit=6, take=1), 0, 6),  # by the limit it knows nothing is left
        (entry("b", 1, limit=5, take=1), 0, 6),  # nor by one that is exceeded already
        (entry("b", 1, limit=20, take=9), 9, 15),  # another knows a higher limit
        (entry("a", 2, give=2, take=6), 6, 10),  # what is given back counts before what is taken
        (entry("a", 2, give=9), 0, 0),  # nobody gives back more than they hold
        (entry("b", 1, give=1), 0, 6),
        (entry("a", 1, take=4), 6, 6),  # seen already
        (entry("b", 1, charge=7), 0, 13),  # what was spent was spent
        (entry("b", 1, charge=3, take=3, least=1), 1, 10),
    ],
)
def test_decisions(last: Entry, granted: int, used: int) -> None:
    """With 6 of 10 leased to a: what the next entry gets."""
    state = fold(entry("a", 1, take=6), last)
    assert state.workers[last.worker].granted == granted
    assert state.used == used == sum(holder.leased for holder in state.workers.values())


def test_who_holds_what() -> None:
    """A standing tells one worker's share, what others hold, and how many there are."""
    state = fold(
        entry("a", 1, take=3),
        entry("b", 1, take=2),
        entry("b", 2, spent=1.5),
        entry("c", 1, take=1),
        entry("c", 2, spent=0.5, give=0.5, closes=True),
    )
    assert state.standing("a") == Standing(
        version=5, used=Decimal("5.5"), own=Decimal(3), others_open=Decimal("0.5"), workers=2, granted=Decimal(3),
        told=Decimal(0), others_wait=Decimal(0),
    )  # fmt: skip
    assert state.standing("new").own == 0


def test_first_to_tell() -> None:
    """Of those who see a fraction passed, the log's first is told that nobody told it; another limit starts anew."""
    state = fold(entry("a", 1, tell=0.5), entry("b", 1, tell=0.5), entry("c", 1, limit=20, tell=0.5))
    assert [state.workers[name].told for name in "abc"] == [0, Decimal("0.5"), 0]


def test_the_fold_stays_small() -> None:
    """Workers that ended are forgotten first, then the oldest; what they held stays counted."""
    state = LedgerState()
    state.apply(entry("old", 1, limit=1000, take=1))
    state.apply(entry("ended", 1, limit=1000, take=1, closes=True))
    for number in range(400):
        state.apply(entry(f"w{number}", 1, limit=1000 + number, take=1, tell=0.5))
    assert len(state.workers) == 256
    assert len(state.told) == 8
    assert {"old", "ended", "w0"}.isdisjoint(state.workers)
    assert state.used == 402
    state.apply(entry("old", 2, limit=1000, give=1))
    assert state.used == 402


# --- the account -----------------------------------------------------------------------------------------------


class FlakyLedger(MemoryLedger):
    """Does not answer where a test says so; ``took_effect`` whether an unanswered post was taken in."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.took_effect = False
        self.posts: list[Entry] = []
        self.looks = 0

    async def post(self, entry: Entry) -> Standing:
        self.posts.append(entry)
        self._fail(entry)
        return await super().post(entry)

    async def look(self, worker: str) -> Standing:
        self.looks += 1
        self._fail(None)
        return await super().look(worker)

    def _fail(self, entry: Entry | None) -> None:
        if self.failures:
            self.failures -= 1
            if self.took_effect and entry is not None:
                self.state.apply(entry)
            raise LedgerError("no answer")


class Bench:
    """Accounts on one ledger, and the events that they told."""

    def __init__(self) -> None:
        self.ledger = FlakyLedger()
        self.clock = FakeClock()
        self.events: list[tuple[str, dict[str, Any]]] = []

    @asynccontextmanager
    async def account(self, limit: Any = 10, *, warn: Any = (), idle: float = NEVER) -> AsyncIterator[Account]:
        """A started account, which dies at the end of the block unless it was closed."""
        account = Account(
            Budget(limit, warn=warn),
            self.ledger,
            clock=self.clock,
            on_event=lambda kind, detail: self.events.append((kind, detail)),
            idle=idle,
        )
        await account.start()
        try:
            yield account
        finally:
            await kill(account)

    @property
    def kinds(self) -> list[str]:
        """The events' kinds."""
        return [kind for kind, _ in self.events]


async def kill(account: Account) -> None:
    """What a crash leaves of an account: nothing more is said."""
    tasks = [task for task in (account._task, account._watch, account._idle_timer) if task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def calm() -> None:
    """Let everything that can go on go on."""
    for _ in range(60):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what the account does in the background."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def test_reserve_and_settle() -> None:
    """A call's price is set aside, and replaced by what it cost; what it did not cost can be used again."""
    bench = Bench()
    async with bench.account() as account:
        assert account.try_reserve(Decimal(4)) is None  # nothing is leased yet
        first = await account.reserve(Decimal(4))
        second = await account.reserve(Decimal(6))
        assert (account.reserved, account.spent) == (Decimal(10), Decimal(0))
        account.settle(first, Decimal("1.5"))
        assert (account.reserved, account.own_spent) == (Decimal(6), Decimal("1.5"))
        third = account.try_reserve(Decimal("2.5"))
        assert third is not None
        account.release(second)
        account.release(third)
        account.release(third)
        assert (account.reserved, account.available) == (Decimal(0), Decimal("8.5"))
        with pytest.raises(ConfigError, match="once"):
            account.settle(first, ONE)
        await account.close()
    assert bench.ledger.state.used == Decimal("1.5")
    assert bench.kinds == []


async def test_never_more_than_the_limit() -> None:
    """With 200 calls that want to start at once, exactly those start that the limit pays for."""
    bench = Bench()
    started = 0

    async def call(account: Account) -> None:
        nonlocal started
        reservation = await account.reserve(Decimal("0.1"))
        started += 1
        await asyncio.sleep(0)
        account.settle(reservation, Decimal("0.1"))

    async with bench.account("7.0") as account:
        calls = [asyncio.create_task(call(account)) for _ in range(200)]
        await until(lambda: account.is_exhausted)
        await calm()
        assert started == 70
        assert account.spent == 7
        for waiting in calls:
            waiting.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert bench.kinds == ["budget_exhausted"]
    assert len(bench.ledger.posts) < 15


async def test_free_calls_always_start() -> None:
    """A price of zero needs no lease, not even from an account that never began."""
    account = Account(Budget(1), MemoryLedger(), clock=FakeClock())
    reservation = account.try_reserve(Decimal(0))
    assert reservation is not None
    account.settle(reservation, Decimal(0))
    await account.close()


async def test_a_price_above_the_limit() -> None:
    """A call that the whole budget could not pay is refused, for it would wait for ever."""
    bench = Bench()
    async with bench.account(5) as account:
        with pytest.raises(PriceTooHighError, match=r"5\.1.*budget of 5"):
            account.try_reserve(Decimal("5.1"))
        assert account.try_reserve(Decimal(5)) is None


async def test_a_call_dearer_than_its_price() -> None:
    """What was spent beyond the price counts fully, beyond the limit too, and nothing more starts."""
    bench = Bench()
    async with bench.account() as account:
        reservation = await account.reserve(Decimal(8))
        account.settle(reservation, Decimal(13))
        await until(lambda: bench.ledger.state.charged)
        assert (account.spent, bench.ledger.state.used, account.available) == (Decimal(13), Decimal(13), Decimal(0))
        assert account.try_reserve(ONE) is None
        await until(lambda: account.is_exhausted)


async def test_leases_shrink_towards_the_limit() -> None:
    """Far from the limit a lease is for many calls, close to it for one: few entries, and nothing lies idle."""
    bench = Bench()
    async with bench.account(10_000) as account:
        for _ in range(10_000):
            reservation = account.try_reserve(ONE) or await account.reserve(ONE)
            account.settle(reservation, ONE)
        takes = [each.take for each in bench.ledger.posts if each.take]
        assert takes[0] == 200
        assert takes[-1] == 1
        assert takes == sorted(takes, reverse=True)
        assert len(takes) < 70
        assert account.spent == 10_000


async def test_exhausted_and_resumed() -> None:
    """At the limit calls wait, told once; when another worker gives back they go on, told once as well."""
    bench = Bench()
    async with bench.account() as account, bench.account() as other:
        theirs = await other.reserve(Decimal(4))
        ours = await account.reserve(Decimal(6))
        account.settle(ours, Decimal(6))
        waiting = asyncio.create_task(account.reserve(Decimal(3)))
        await until(lambda: account.is_exhausted)
        await calm()
        posts, looks = len(bench.ledger.posts), bench.ledger.looks
        await calm()
        assert bench.kinds == ["budget_exhausted"]
        assert bench.events[0][1] == {"limit": "10", "spent": "10", "reserved": "0", "others_open": "4"}
        assert (len(bench.ledger.posts), bench.ledger.looks) == (posts, looks), "waiting writes and asks nothing"
        other.settle(theirs, ONE)
        await other.close()
        assert (await waiting).amount == 3
        assert not account.is_exhausted
        assert bench.kinds == ["budget_exhausted", "budget_resumed"]
        assert account.to_dict()["reserved"] == "3"


async def test_not_exhausted_while_a_call_runs() -> None:
    """A call under way may cost less than its price: that is no exhaustion, and what it saves is used."""
    bench = Bench()
    async with bench.account() as account:
        running = await account.reserve(Decimal(10))
        waiting = asyncio.create_task(account.reserve(Decimal(2)))
        await calm()
        assert not account.is_exhausted
        account.settle(running, Decimal(7))
        assert (await waiting).amount == 2
        assert bench.kinds == []


async def test_what_is_too_little_goes_back() -> None:
    """Two workers hold what only one of them could use: both give back, and one gets it all."""
    bench = Bench()
    async with bench.account() as one, bench.account() as two:
        calls = [await one.reserve(Decimal(3)), await two.reserve(Decimal(7))]
        waiting = {asyncio.create_task(account.reserve(Decimal(10))) for account in (one, two)}
        one.release(calls[0])
        two.release(calls[1])
        done, left = await asyncio.wait(waiting, timeout=5, return_when=asyncio.FIRST_COMPLETED)
        assert len(done) == 1
        assert done.pop().result().amount == 10
        for task in left:
            task.cancel()


async def test_idle_leases_go_back_where_money_is_short() -> None:
    """A lease that nobody uses goes back when little is left, so that another worker need not wait for ever."""
    bench = Bench()
    async with bench.account(idle=5.0) as idle, bench.account() as busy:
        idle.release(await idle.reserve(Decimal(8)))
        assert (await busy.reserve(Decimal(9))).amount == 9
        assert bench.clock.slept[0] == 5.0
        assert idle.available == 0
        slept = len(bench.clock.slept)
        await calm()
        assert len(bench.clock.slept) == slept, "an account with nothing times nothing"


async def test_idle_leases_stay_where_there_is_plenty() -> None:
    """Far from the limit an idle lease takes nothing from anybody: it stays, and no entry is written."""
    bench = Bench()
    async with bench.account(1000, idle=5.0) as account:
        account.release(await account.reserve(ONE))
        await calm()
        assert account.available > 0
        assert len(bench.ledger.posts) == 1
        async with bench.account(1000) as other:
            assert (await other.reserve(Decimal(950))).amount == 950
            await until(lambda: account.available == 0)


async def test_a_crash_frees_no_money() -> None:
    """The lease of a worker that died stays counted as spent; its successor has the rest."""
    bench = Bench()
    async with bench.account() as account:
        account.settle(await account.reserve(Decimal(4)), ONE)
    async with bench.account() as account:
        assert account.try_reserve(Decimal(7)) is None
        await until(lambda: account.is_exhausted)
        assert account.spent == 4
        assert (await account.reserve(Decimal(6))).amount == 6


async def test_a_raised_limit() -> None:
    """A session that was out of money goes on when it is started with a higher limit."""
    bench = Bench()
    async with bench.account(10) as account:
        account.settle(await account.reserve(Decimal(10)), Decimal(10))
        await account.close()
    async with bench.account(12) as account:
        assert (await account.reserve(Decimal(2))).amount == 2
    async with bench.account(11) as account:
        assert account.try_reserve(ONE) is None
        await until(lambda: account.is_exhausted)


async def test_warnings() -> None:
    """Each fraction is told once in a session's life, over its workers and restarts, when it is really spent."""
    bench = Bench()
    async with bench.account(warn=(0.5, 0.75, 0.9)) as account:
        running = await account.reserve(Decimal(6))
        await calm()
        assert bench.kinds == []
        account.settle(running, Decimal(5))
        await until(lambda: bench.events)
        assert bench.events == [
            ("budget_warning", {"limit": "10", "spent": "5", "reserved": "0", "others_open": "0", "fraction": "0.5"})
        ]
        async with bench.account(warn=(0.5,)) as other:
            other.settle(await other.reserve(ONE), ONE)
            await calm()
            assert len(bench.events) == 1
            await other.close()
        account.settle(await account.reserve(Decimal("3.5")), Decimal("3.5"))
        await until(lambda: len(bench.events) == 3)
        assert [detail["fraction"] for _, detail in bench.events] == ["0.5", "0.75", "0.9"]
        await account.close()
    async with bench.account(warn=(0.5, 0.75, 0.9)):
        await calm()
        assert len(bench.events) == 3


async def test_events_are_json() -> None:
    """What observers get can be written as JSON at once."""
    bench = Bench()
    async with bench.account(warn=(0.1,)) as account:
        account.settle(await account.reserve(Decimal(10)), Decimal(10))
        account.try_reserve(ONE)
        await until(lambda: len(bench.events) == 2)
        assert dumps([*bench.events, account.to_dict()])


@pytest.mark.parametrize("took_effect", [False, True])
async def test_a_ledger_that_does_not_answer(took_effect: bool, caplog: pytest.LogCaptureFixture) -> None:
    """No answer is no lease now: asked again after growing pauses with the same entry, told once, good once."""
    bench = Bench()
    bench.ledger.took_effect = took_effect
    with caplog.at_level(logging.WARNING):
        async with bench.account() as account:
            await calm()
            bench.ledger.failures = 4
            reservation = await account.reserve(Decimal(2))
            account.settle(reservation, ONE)
            await calm()
            assert bench.kinds == ["budget_unreachable", "budget_reachable"]
            assert "no answer" in bench.events[0][1]["error"]
            assert [each.sequence for each in bench.ledger.posts[:5]] == [1] * 5
            assert bench.clock.slept[:4] == pytest.approx([0.075, 0.15, 0.3, 0.6])
            await account.close()
    assert bench.ledger.state.used == 1
    assert len(caplog.records) == 1


async def test_closing_without_a_ledger(caplog: pytest.LogCaptureFixture) -> None:
    """Closing does not wait for a ledger that is gone: the lease stays counted as spent, which is said."""
    bench = Bench()
    async with bench.account() as account:
        account.release(await account.reserve(ONE))
        bench.ledger.failures = 1_000_000
        async with asyncio.timeout(2):
            await account.close()
    assert bench.ledger.state.used > 0
    assert "stays counted as spent" in caplog.text


async def test_closing_while_the_ledger_hangs() -> None:
    """Closing ends within its time when the ledger neither answers nor fails."""
    bench = Bench()
    async with bench.account() as account:
        account.release(await account.reserve(ONE))
        bench.ledger.post = hang  # type: ignore[method-assign]
        async with asyncio.timeout(2):
            await account.close(seconds=0.01)


async def hang(entry: Entry) -> Standing:
    """Never answers."""
    await asyncio.Event().wait()
    raise AssertionError


async def test_an_observer_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """What an observer raises is logged once and holds nothing up."""
    ledger, clock = MemoryLedger(), FakeClock()

    def fail(kind: str, detail: dict[str, Any]) -> None:
        raise RuntimeError("observer")

    account = Account(Budget(4, warn=(0.25, 0.5)), ledger, clock=clock, on_event=fail, idle=NEVER)
    await account.start()
    for _ in range(4):
        account.settle(await account.reserve(ONE), ONE)
    await account.close()
    assert ledger.state.used == 4
    assert caplog.text.count("RuntimeError: observer") == 1


async def test_a_cancelled_wait_takes_nothing() -> None:
    """A row that stops waiting leaves no trace: the money is there for the next."""
    bench = Bench()
    async with bench.account() as account:
        running = await account.reserve(Decimal(10))
        waiting = asyncio.create_task(account.reserve(Decimal(2)))
        await calm()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        account.release(running)
        assert (await account.reserve(Decimal(10))).amount == 10
