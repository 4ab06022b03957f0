"""Budgets under any interleaving of calls, crashes, restarts and lost answers: never above the limit, and all of it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rowmill.handlers.budget import (
    Account,
    Budget,
    Entry,
    LedgerState,
    MemoryLedger,
    Reservation,
    Standing,
)
from rowmill.handlers.errors import LedgerError
from support.fake_clock import FakeClock

pytestmark = pytest.mark.timeout(120)

amounts = st.decimals(min_value=0, max_value=12, places=2)


class LosingLedger(MemoryLedger):
    """Loses every answer that its plan says, and takes the entry in or not."""

    def __init__(self, plan: list[str]) -> None:
        super().__init__()
        self.plan = plan

    async def post(self, entry: Entry) -> Standing:
        fate = self.plan.pop() if self.plan else "answered"
        if fate == "lost":
            raise LedgerError("lost")
        standing = await super().post(entry)
        if fate == "taken in":
            raise LedgerError("the answer was lost")
        if fate == "later":
            await asyncio.sleep(0)
        return standing


@dataclass
class Worker:
    """An account, and the calls that it let start."""

    account: Account
    running: list[Reservation] = field(default_factory=list)


async def die(account: Account) -> None:
    """The process is gone."""
    tasks = [task for task in (account._task, account._watch, account._idle_timer) if task is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


steps = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "reserve", "settle", "settle", "release", "crash", "close", "wait"]),
        st.integers(0, 2),
        amounts,
        st.integers(0, 100),
    ),
    max_size=60,
)


@given(
    steps=steps,
    limits=st.lists(st.sampled_from(["10", "11.5", "9"]), min_size=3, max_size=3),
    plan=st.lists(st.sampled_from(["answered", "later", "lost", "taken in"]), max_size=20),
    idle=st.sampled_from([5.0, float("inf")]),
)
@settings(max_examples=150)
def test_never_above_the_limit(
    steps: list[tuple[str, int, Decimal, int]], limits: list[str], plan: list[str], idle: float
) -> None:
    """Whatever calls were let start, over all workers, crashes and lost answers, may cost the limit at most."""

    async def run() -> None:
        ledger, clock = LosingLedger(plan), FakeClock()
        highest = max(map(Decimal, limits))
        lost = Decimal(0)  # spent, or perhaps spent: calls that ended, and those that a crash cut off

        async def start(place: int) -> Worker:
            account = Account(Budget(limits[place]), ledger, clock=clock, idle=idle)
            await account.start()
            return Worker(account)

        workers = [await start(place) for place in range(3)]
        for step, place, amount, percent in steps:
            worker = workers[place]
            if step == "reserve" and amount <= worker.account.limit:
                reservation = worker.account.try_reserve(amount)
                worker.running += [reservation] if reservation is not None else []
            elif step in {"settle", "release"} and worker.running:
                reservation = worker.running.pop(percent % len(worker.running))
                if step == "settle":
                    actual = reservation.amount * percent / 100
                    lost += actual
                    worker.account.settle(reservation, actual)
                else:
                    worker.account.release(reservation)
            elif step in {"crash", "close"}:
                if step == "close":
                    await worker.account.close()
                await die(worker.account)
                lost += sum(each.amount for each in worker.running)
                workers[place] = await start(place)
            elif step == "wait":
                for _ in range(percent % 30):
                    await asyncio.sleep(0)
            under_way = sum(each.amount for worker in workers for each in worker.running)
            assert lost + under_way <= highest
            assert lost + under_way <= ledger.state.used <= highest
            assert ledger.state.used == sum(holder.leased for holder in ledger.state.workers.values())
        for worker in workers:
            await worker.account.close()
            await die(worker.account)
            lost += sum(each.amount for each in worker.running)
        assert lost <= ledger.state.used <= highest

    asyncio.run(run())


class Crowd:
    """Workers on one ledger whose callers make calls as long as there is money.

    Args:
        limit: of the budget.
        price: of each call.
        workers: how many accounts.
        callers: of each account.
        cheaper: whether half of the calls cost half of their price.
        seed: of how long calls take and what they cost.
    """

    def __init__(self, limit: Decimal, price: Decimal, workers: int, callers: int, cheaper: bool, seed: int) -> None:
        self.chance = random.Random(seed)
        self.price = price
        self.cheaper = cheaper
        self.ledger = MemoryLedger()
        self.started = 0
        self.spent = Decimal(0)
        clock = FakeClock()
        self.accounts = [Account(Budget(limit), self.ledger, clock=clock) for _ in range(workers)]
        self.callers = [[asyncio.create_task(self._call(account)) for _ in range(callers)] for account in self.accounts]

    async def _call(self, account: Account) -> None:
        while True:
            reservation = await account.reserve(self.price)
            self.started += 1
            await self.wait(self.chance.randrange(4))
            half = self.cheaper and self.chance.random() < 0.5
            actual = self.price / 2 if half else self.price
            self.spent += actual
            account.settle(reservation, actual)

    async def wait(self, turns: int) -> None:
        """Let others go on."""
        for _ in range(turns):
            await asyncio.sleep(0)

    async def one_leaves(self) -> Decimal:
        """One worker ends in order, its calls cut off; what these may have cost."""
        account, callers = self.accounts.pop(), self.callers.pop()
        for task in callers:
            task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        cut_off = account.reserved
        await account.close()
        return cut_off

    async def until_spent(self) -> None:
        """Until every account waits in vain."""
        for _ in range(20_000):
            if all(account.is_exhausted for account in self.accounts):
                room = self.accounts[0].limit - self.ledger.state.used
                if room < self.price:
                    return
            await asyncio.sleep(0)
        raise AssertionError(f"stuck: {[account.to_dict() for account in self.accounts]}")


@given(
    workers=st.integers(1, 4),
    calls=st.integers(1, 150),
    price=st.decimals(min_value=Decimal("0.01"), max_value=3, places=2),
    in_flight=st.sampled_from([1, 7, 200]),
    seed=st.integers(0, 1_000_000),
    cheaper=st.booleans(),
    leaves=st.booleans(),
)
@settings(max_examples=150)
def test_the_whole_limit_is_spent(
    workers: int, calls: int, price: Decimal, in_flight: int, seed: int, cheaper: bool, leaves: bool
) -> None:
    """Where the price divides the limit, exactly so many calls get through, whoever makes them; nobody starves."""
    limit = price * calls

    async def run() -> None:
        crowd = Crowd(limit, price, workers, max(1, in_flight // workers), cheaper, seed)
        for account in crowd.accounts:
            await account.start()
        cut_off = Decimal(0)
        if leaves and workers > 1:
            await crowd.wait(crowd.chance.randrange(40))
            cut_off = await crowd.one_leaves()
        await crowd.until_spent()
        spent = crowd.spent + cut_off
        if cheaper:
            assert limit - price < spent <= limit
        else:
            assert spent == limit
            assert crowd.started == calls
        while crowd.accounts:
            await crowd.one_leaves()
        assert crowd.ledger.state.used == spent

    asyncio.run(run())


entries = st.lists(
    st.builds(
        Entry,
        worker=st.sampled_from("abc"),
        sequence=st.integers(1, 6),
        limit=st.sampled_from([Decimal(10), Decimal(20)]),
        take=amounts,
        least=amounts,
        give=amounts,
        charge=st.sampled_from([Decimal(0), Decimal(1)]),
        spent=amounts,
        tell=st.sampled_from([Decimal(0), Decimal("0.5")]),
        closes=st.booleans(),
    ),
    max_size=30,
)


@given(entries)
def test_the_fold_adds_up(entries: list[Entry]) -> None:
    """After any entries, the parts make the whole; no lease passes its limit; repeats change nothing."""
    state = LedgerState()
    for entry in entries:
        before = state.used
        state.apply(entry)
        assert state.used == sum(holder.leased for holder in state.workers.values())
        if state.used > before:
            assert state.used <= max(entry.limit, before + entry.charge)
        assert all(holder.leased >= 0 for holder in state.workers.values())
        version, used = state.entries, state.used
        state.apply(entry)
        assert (state.entries, state.used) == (version, used)
