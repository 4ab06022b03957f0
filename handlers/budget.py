"""A session's budget: what may be spent, what a call may cost, and who may spend how much of it right now.

Money takes this way. The session's :class:`Ledger` knows how much of the limit is given out. The :class:`Account` of
each worker takes *leases* from it, blocks of money for many calls, so that the price of one row never waits for a
broker. A call reserves its price from the lease before it starts and settles what it really cost afterwards. All
that was leased and not given back counts as spent: a worker that dies takes its lease with it, and no crash, lost
answer or second worker can make the session spend more than its limit.
"""

from __future__ import annotations

import asyncio
import decimal
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol, TypeAlias

from ..state.clock import Clock
from ..state.context import checked_cost, sum_costs
from ..state.errors import ConfigError
from ..state.model import Row
from .errors import LedgerError, PriceTooHighError, UnknownPriceError

log = logging.getLogger(__name__)

Price: TypeAlias = "Decimal | int | str | Callable[[Row], Decimal | int | str | None]"
"""The most that one call may cost: an amount, or a function that tells it from the row."""

OnEvent: TypeAlias = Callable[[str, dict[str, Any]], object]
"""Takes an event's kind and its details, which are ready for JSON (money as text)."""

IDLE_SECONDS = 5.0
"""How long a lease may lie unused before it goes back, where money is short."""

_ZERO = Decimal(0)
_BLOCKS = 50  # a lease is at most this part of the limit, unless as much is waited for
_SCARCE = 10  # below this part of the limit, idle leases go back
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_EVENT_DETAILS = frozenset({"limit", "spent", "reserved", "others_open"})
_REMEMBERED_WORKERS = 256
_REMEMBERED_LIMITS = 8
_WIDE = decimal.Context(prec=400)  # products and whole quotients of any amounts that checked_cost lets in are exact


# --- what the user says ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, init=False)
class Budget:
    """What one session of a pipeline may spend, over all its workers and restarts.

    Args:
        limit: money, in whatever unit the stages' prices are; above 0, and no float.
        warn: fractions of the limit, above 0 up to 1; an event tells once when each is spent.

    Raises:
        ConfigError: the limit is a float or no positive number, or a fraction is none.
    """

    limit: Decimal
    warn: tuple[Decimal, ...]

    def __init__(self, limit: Decimal | int | str, *, warn: Sequence[float | Decimal] = (0.75, 0.9)) -> None:
        amount = checked_cost(limit, "Budget(limit=)")
        if not amount:
            raise ConfigError("Budget(limit=)", limit, "give an amount above 0; without a budget nothing is limited")
        given: Any = warn
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise ConfigError("Budget(warn=)", warn, "give a list of fractions such as (0.75, 0.9), or () for none")
        object.__setattr__(self, "limit", amount)
        object.__setattr__(self, "warn", tuple(sorted({_fraction(each) for each in given})))


def _fraction(value: Any) -> Decimal:
    fraction = _ZERO
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        fraction = Decimal(str(value))  # 0.1 is meant as it is written, not as the nearest binary number
    if not fraction.is_finite() or not 0 < fraction <= 1:
        raise ConfigError("Budget(warn=)", value, "give fractions above 0, at most 1")
    return fraction


def checked_price(price: Any, setting: str = "stage(price=)") -> Price:
    """A price as it stands in a stage's options: a function as it is, an amount as a Decimal.

    Raises:
        ConfigError: it is neither a function nor an amount of at least 0; a float is none.
    """
    if callable(price):
        return price  # type: ignore[no-any-return]
    return checked_cost(price, setting)


def price_of(price: Price, row: Row) -> Decimal:
    """The most that a call with this row may cost.

    Raises:
        UnknownPriceError: the function raised, or gave None, a float or no amount of at least 0.
    """
    if callable(price):
        try:
            amount: Any = price(row)
        except Exception as error:
            raise UnknownPriceError(
                f"the price of this call is unknown: price(row) raised {type(error).__name__}: {error}"
            ) from error
    else:
        amount = price
    if amount is None:
        raise UnknownPriceError("the price of this call is unknown: price(row) gave None; give 0 if it is free")
    if inspect.iscoroutine(amount):
        amount.close()
        raise UnknownPriceError("the price of this call is unknown: price(row) is async; give a plain function")
    try:
        return checked_cost(amount, "price(row)")
    except ConfigError as error:
        raise UnknownPriceError(f"the price of this call is unknown: {error}") from error


# --- the ledger ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """What a worker tells the ledger. Applied in this order: charge, give, take.

    Attributes:
        worker: who; a name that no other worker and no later start of this one has.
        sequence: 1, 2, 3, … per worker. One that was seen already changes nothing, so an entry whose fate is unknown
            is simply written again.
        limit: the budget's limit as this worker knows it; it decides about this entry's lease and no other.
        take: the lease asked for, at most.
        least: less than this is of no use: it is refused rather than cut further.
        give: returned from earlier leases.
        charge: spent beyond the leases, because calls cost more than their price. Counts without being asked.
        spent: all that this worker has spent so far; for people to see.
        tell: the highest warning fraction that the worker saw passed; 0 for none.
        closes: the worker ends, and will spend nothing more.
    """

    worker: str
    sequence: int
    limit: Decimal
    take: Decimal = _ZERO
    least: Decimal = _ZERO
    give: Decimal = _ZERO
    charge: Decimal = _ZERO
    spent: Decimal = _ZERO
    tell: Decimal = _ZERO
    closes: bool = False


@dataclass(slots=True)
class Holder:
    """A worker in the ledger.

    Attributes:
        sequence: of its newest entry.
        leased: granted and charged, less returned: what it has spent or still may.
        spent: of that, what it said it had spent.
        granted: the answer to its newest entry.
        told: the highest fraction that had been told before its newest entry.
        waits: the least that it last asked for in vain; 0 once it got something.
        closed: whether it ended in order.
    """

    sequence: int = 0
    leased: Decimal = _ZERO
    spent: Decimal = _ZERO
    granted: Decimal = _ZERO
    told: Decimal = _ZERO
    waits: Decimal = _ZERO
    closed: bool = False

    @property
    def open(self) -> Decimal:
        """What it holds and has not said to have spent. Of a worker that died it stays so: it counts as spent."""
        return max(_ZERO, _minus(self.leased, self.spent))


@dataclass(frozen=True, slots=True)
class Standing:
    """How the ledger stands, as one worker needs to know it.

    Attributes:
        version: entries applied so far.
        used: leased over all workers: spent, or about to be.
        own: the part of ``used`` that the worker itself holds or spent.
        others_open: what other workers hold and may still give back.
        others_wait: the most that another worker asked for in vain. One that lives takes it as soon as it is there,
            so whoever waits for less than there is has died or changed its mind.
        workers: how many have not ended, the asking one included.
        granted: the answer to the worker's newest entry.
        told: the highest fraction that had been told before that entry.
    """

    version: int
    used: Decimal
    own: Decimal
    others_open: Decimal
    others_wait: Decimal
    workers: int
    granted: Decimal
    told: Decimal


@dataclass(slots=True)
class LedgerState:
    """All entries of a ledger, folded. Who folds the same entries in the same order comes to the same decisions.

    It stays small: of workers, the 256 that wrote last are remembered (what an older one held stays counted), of
    limits, the 8 newest.
    """

    entries: int = 0
    granted: Decimal = _ZERO
    returned: Decimal = _ZERO
    charged: Decimal = _ZERO
    limit: Decimal = _ZERO
    """Of the newest entry."""
    told: dict[Decimal, Decimal] = field(default_factory=dict)
    """By limit: the highest fraction that was told."""
    workers: dict[str, Holder] = field(default_factory=dict)
    """The one that wrote last comes last."""

    @property
    def used(self) -> Decimal:
        """What is spent, or leased to somebody who may spend it."""
        return sum_costs(self.granted, self.charged, self.returned.copy_negate())

    def apply(self, entry: Entry) -> None:
        """Take an entry in. One of a sequence number that was there already changes nothing."""
        holder = self.workers.get(entry.worker) or Holder()
        if entry.sequence <= holder.sequence:
            return
        self.workers.pop(entry.worker, None)
        self.workers[entry.worker] = holder
        self.entries += 1
        self.limit = entry.limit
        holder.sequence, holder.spent, holder.closed = entry.sequence, entry.spent, entry.closes
        self._account(holder, entry)
        self._tell(holder, entry)
        self._forget()

    def has(self, entry: Entry) -> bool:
        """Whether the newest entry of this one's worker is this one."""
        holder = self.workers.get(entry.worker)
        return holder is not None and holder.sequence == entry.sequence

    def standing(self, worker: str) -> Standing:
        """How things stand for one worker."""
        holder = self.workers.get(worker) or Holder()
        others = [other for name, other in self.workers.items() if name != worker and not other.closed]
        return Standing(
            version=self.entries,
            used=self.used,
            own=holder.leased,
            others_open=sum_costs(*(other.open for other in others)),
            others_wait=max((other.waits for other in others), default=_ZERO),
            workers=1 + len(others),
            granted=holder.granted,
            told=holder.told,
        )

    def _account(self, holder: Holder, entry: Entry) -> None:
        self.charged = sum_costs(self.charged, entry.charge)
        leased = sum_costs(holder.leased, entry.charge)
        given = min(entry.give, leased)  # nobody gives back what is not theirs: their lease was forgotten
        self.returned = sum_costs(self.returned, given)
        room = _minus(entry.limit, self.used)
        holder.granted = min(entry.take, room) if entry.take and entry.least <= room and room > 0 else _ZERO
        if entry.take:
            holder.waits = _ZERO if holder.granted else entry.least
        self.granted = sum_costs(self.granted, holder.granted)
        holder.leased = sum_costs(leased, holder.granted, given.copy_negate())

    def _tell(self, holder: Holder, entry: Entry) -> None:
        holder.told = self.told.get(entry.limit, _ZERO)
        if entry.tell > holder.told:
            self.told.pop(entry.limit, None)
            self.told[entry.limit] = entry.tell

    def _forget(self) -> None:
        while len(self.told) > _REMEMBERED_LIMITS:
            del self.told[next(iter(self.told))]
        if len(self.workers) > _REMEMBERED_WORKERS:
            oldest = next((name for name, holder in self.workers.items() if holder.closed), next(iter(self.workers)))
            del self.workers[oldest]


class Ledger(Protocol):
    """Keeps a session's entries in one order that all workers agree on.

    Each method raises LedgerError when it cannot answer; whether a posted entry was taken in is unknown then, and
    posting the same one again is right. An account has at most one ``post`` and one ``news`` under way; both may be
    cancelled.
    """

    async def post(self, entry: Entry) -> Standing:
        """Write an entry; how things stand once it, and all before it, are taken in, with its answer."""
        ...

    async def look(self, worker: str) -> Standing:
        """How things stand for a worker, everything included that was written before this call."""
        ...

    async def news(self, worker: str, version: int) -> Standing:
        """Wait until the ledger's version is another than this one. May take for ever."""
        ...


class MemoryLedger:
    """The ledger of workers that share one event loop: tests, notebooks, a run whose money no restart should know."""

    def __init__(self) -> None:
        self.state = LedgerState()
        self._waiting: list[asyncio.Future[None]] = []

    async def post(self, entry: Entry) -> Standing:
        """Take it in."""
        self.state.apply(entry)
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
        return self.state.standing(entry.worker)

    async def look(self, worker: str) -> Standing:
        """How things stand."""
        return self.state.standing(worker)

    async def news(self, worker: str, version: int) -> Standing:
        """Wait for the next entry."""
        while self.state.entries == version:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        return self.state.standing(worker)


# --- a worker's account ----------------------------------------------------------------------------------------


class Reservation:
    """Money set aside for one call. Settle or release it, whatever becomes of the call."""

    __slots__ = ("amount", "is_settled")

    def __init__(self, amount: Decimal) -> None:
        self.amount = amount
        self.is_settled = False


class Account:
    """One worker's access to its session's budget. Belongs to one event loop.

    A caller tries, and waits where there is nothing::

        while (reservation := account.try_reserve(price)) is None:
            await account.changed()
        try:
            ...                                     # the call
        finally:
            account.settle(reservation, what_it_cost)

    Size of a lease: as many times the smallest price waited for as fit in a fiftieth of the limit (or in all that is
    waited for, if that is more), and in the share ``what is left / (2 * workers)``; at least one. Leases shrink as the
    limit comes near, so no worker sits on much that others wait for. At the limit a worker keeps nothing that is no
    use to it: what is less than the price waited for goes back when its own calls are done, and a lease that nobody
    used for ``idle`` seconds goes back where another worker waits for it or less than a tenth of the limit is left.

    Args:
        budget: the session's.
        ledger: the session's.
        clock: for pauses.
        on_event: told ``budget_warning``, ``budget_exhausted``, ``budget_resumed``, ``budget_unreachable`` and
            ``budget_reachable``. What it raises is logged and changes nothing.
        worker: a name nobody else has had; default: 16 hexadecimal digits by chance.
        idle: seconds; infinity for never.
    """

    def __init__(
        self,
        budget: Budget,
        ledger: Ledger,
        *,
        clock: Clock,
        on_event: OnEvent | None = None,
        worker: str | None = None,
        idle: float = IDLE_SECONDS,
    ) -> None:
        self.worker = worker or clock.token() + clock.token()
        self._budget = budget
        self._ledger = ledger
        self._clock = clock
        self._on_event = on_event
        self._idle_seconds = idle
        # Money. What this worker holds is available + reserved + spent; available is negative when calls cost more
        # than their price and the lease does not cover it.
        self._available = _ZERO
        self._reserved = _ZERO
        self._spent = _ZERO
        # What is waited for since the last change.
        self._least: Decimal | None = None
        self._wanted = _ZERO
        self._change: asyncio.Future[None] | None = None
        self._is_refused = False
        self._marked = _ZERO  # the most that the ledger knows to be waited for here
        # The conversation with the ledger, one entry at a time.
        self._task: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._standing: Standing | None = None
        self._pending: Entry | None = None
        self._sequence = 0
        self._watch: asyncio.Task[Standing] | None = None
        self._pause = _FIRST_PAUSE
        self._is_closing = False
        # Idleness.
        self._uses = 0
        self._idle_timer: asyncio.Task[None] | None = None
        self._idle_uses = -1
        # What was told.
        self._told = _ZERO
        self._warn_at: Decimal | None = None
        self._told_exhausted = False
        self._told_unreachable = False
        self._told_observer = False

    # -- for each call ---------------------------------------------------------------------------------

    def try_reserve(self, amount: Decimal) -> Reservation | None:
        """Set money aside for a call, or None when this worker has not as much now: wait for :meth:`changed`.

        Never waits itself. A price of 0 is always granted.

        Raises:
            PriceTooHighError: ``amount`` is more than the whole limit.
        """
        if amount > self._available and amount:
            if amount > self._budget.limit:
                raise PriceTooHighError(
                    f"this call may cost {amount}, more than the whole budget of {self._budget.limit}; "
                    "raise the limit, or lower what the call may cost"
                )
            self._want(amount)
            return None
        self._available = _minus(self._available, amount)
        self._reserved = sum_costs(self._reserved, amount)
        self._uses += 1
        return Reservation(amount)

    async def reserve(self, amount: Decimal) -> Reservation:
        """Set money aside for a call, waiting as long as it takes: for ever, when the budget is spent.

        Raises:
            PriceTooHighError: ``amount`` is more than the whole limit.
        """
        while (reservation := self.try_reserve(amount)) is None:
            await self.changed()
        return reservation

    def settle(self, reservation: Reservation, actual: Decimal) -> None:
        """Replace what was set aside by what the call cost, which may be less or more. More counts fully.

        A call whose cost is unknown (it timed out, the connection broke) may have been paid: settle its whole amount.

        Raises:
            ConfigError: ``actual`` is a float or negative, or the reservation was settled before.
        """
        actual = checked_cost(actual, "settle(actual=)")
        if reservation.is_settled:
            raise ConfigError("settle(reservation=)", reservation.amount, "each reservation is settled once")
        reservation.is_settled = True
        self._reserved = _minus(self._reserved, reservation.amount)
        self._spent = sum_costs(self._spent, actual)
        self._available = sum_costs(self._available, reservation.amount, actual.copy_negate())
        self._settled()

    def release(self, reservation: Reservation) -> None:
        """Put back what was set aside for a call that never started. After ``settle`` it does nothing."""
        if not reservation.is_settled:
            self.settle(reservation, _ZERO)

    def changed(self) -> Awaitable[None]:
        """Ends when trying again may succeed. Ask for it at once after a try that failed, before any other await."""
        if self._change is None:
            self._change = asyncio.get_running_loop().create_future()
        return asyncio.shield(self._change)

    # -- state -----------------------------------------------------------------------------------------

    @property
    def limit(self) -> Decimal:
        """What the session may spend."""
        return self._budget.limit

    @property
    def spent(self) -> Decimal:
        """What the session has spent, as far as known here: exact for this worker; of others, all that they hold."""
        return sum_costs(self._others, self._spent)

    @property
    def own_spent(self) -> Decimal:
        """What this worker has spent."""
        return self._spent

    @property
    def reserved(self) -> Decimal:
        """Set aside for this worker's calls that are under way."""
        return self._reserved

    @property
    def available(self) -> Decimal:
        """Leased by this worker, and neither reserved nor spent."""
        return self._available

    @property
    def is_exhausted(self) -> bool:
        """Whether calls wait that cannot be paid: nothing here could free money any more, and the ledger has none.

        Not final while other workers hold leases (``others_open`` in ``to_dict``), or when the limit is raised.
        """
        return self._is_refused and not self._reserved and self._available <= 0 and self._pending is None

    def to_dict(self) -> dict[str, Any]:
        """The account as JSON, for status."""
        return {
            "limit": str(self.limit),
            "spent": str(self.spent),
            "own_spent": str(self._spent),
            "reserved": str(self._reserved),
            "available": str(self._available),
            "others_open": str(self._standing.others_open if self._standing else _ZERO),
            "is_exhausted": self.is_exhausted,
            "is_reachable": not self._told_unreachable,
        }

    # -- life ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin the conversation with the ledger, in the background. Without it nothing is ever leased."""
        if self._task is None:
            self._task = asyncio.create_task(self._converse(), name="rowmill-budget")

    async def close(self, seconds: float = 5.0) -> None:
        """Give back what is left, and end. What is still reserved counts as spent. Calls that wait go on waiting.

        Args:
            seconds: after these the lease stays behind, counted as spent.
        """
        task = self._task
        self._is_closing = True
        self._woken.set()
        try:
            if task is not None:
                async with asyncio.timeout(seconds):
                    await task
        except TimeoutError:
            self._tell_left_behind()
        finally:
            others = [each for each in (task, self._watch, self._idle_timer) if each is not None]
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    # -- inside: for each call -------------------------------------------------------------------------

    @property
    def _others(self) -> Decimal:
        return _minus(self._standing.used, self._standing.own) if self._standing is not None else _ZERO

    def _want(self, amount: Decimal) -> None:
        self._wanted = sum_costs(self._wanted, amount)
        if self._least is None or amount < self._least:
            self._least = amount
            self._woken.set()

    def _settled(self) -> None:
        if self._least is not None and self._available >= self._least:
            self._let_try_again()
        if (
            self._available < 0  # to be charged
            or (self._least is not None and not self._reserved)  # perhaps exhausted now
            or (self._available > 0 and self._idle_timer is None)  # there is something that may idle
            or (self._warn_at is not None and self._spent >= self._warn_at)
        ):
            self._woken.set()

    def _let_try_again(self) -> None:
        self._least, self._wanted, self._is_refused = None, _ZERO, False
        self._review()
        change, self._change = self._change, None
        if change is not None:
            change.set_result(None)

    # -- inside: the conversation ----------------------------------------------------------------------

    async def _converse(self) -> None:
        """Say what is to be said, entry by entry; rest until there is more."""
        while True:
            self._woken.clear()
            try:
                has_more = await self._step()
            except Exception as error:  # noqa: BLE001 - whatever it is, there is no lease now
                self._tell_unreachable(error)
                if self._is_closing:
                    self._tell_left_behind()
                    return
                await self._wait_a_little()
                continue
            self._tell_reachable()
            if has_more:
                continue
            self._review()
            if self._is_closing:
                return
            await self._woken.wait()

    async def _step(self) -> bool:
        """One exchange with the ledger, if one is due. Whether there may be more to say."""
        if self._standing is None:
            self._know(await self._ledger.look(self.worker))
        self._take_news()
        if self._is_idle() and self._watch is None:
            self._know(await self._ledger.look(self.worker))
        entry = self._pending or self._next_entry()
        if entry is None and self._is_short():
            entry = await self._refused()
        if entry is not None:
            await self._post(entry)
            return not entry.closes
        if self._is_idle():
            self._watch_ledger()  # idle money is nobody's loss until it gets scarce
        self._time_idleness()
        return False

    def _take_news(self) -> None:
        if self._watch is not None and self._watch.done():
            watch, self._watch = self._watch, None
            standing = watch.result()
            if self._standing is None or standing.version >= self._standing.version:  # else a post was quicker
                self._know(standing)

    def _watch_ledger(self) -> None:
        if self._watch is None and self._standing is not None and not self._is_closing:
            self._watch = asyncio.create_task(self._ledger.news(self.worker, self._standing.version))
            self._watch.add_done_callback(self._wake)

    def _know(self, standing: Standing) -> None:
        self._standing = standing
        self._told = max(self._told, standing.told)
        untold = [fraction for fraction in self._budget.warn if fraction > self._told]
        self._warn_at = _minus(self._share(untold[0]), self._others) if untold else None

    def _share(self, fraction: Decimal) -> Decimal:
        return _WIDE.multiply(self._budget.limit, fraction)

    def _next_entry(self) -> Entry | None:
        """What is to be said now, already booked here: money on its way back can be reserved by nobody."""
        charge = max(_ZERO, self._available.copy_negate())
        give = self._available if self._available > 0 and self._may_give() else _ZERO
        take, least = (_ZERO, _ZERO) if self._is_closing else self._wish(charge, give)
        tell = self._fraction_to_tell()
        closes = self._is_closing and self._sequence > 0
        if not (charge or give or take or tell or closes):
            return None
        self._available = sum_costs(self._available, charge, give.copy_negate())
        self._sequence += 1
        self._pending = Entry(
            worker=self.worker,
            sequence=self._sequence,
            limit=self._budget.limit,
            take=take,
            least=least,
            give=give,
            charge=charge,
            spent=self._spent,
            tell=tell,
            closes=closes,
        )
        return self._pending

    def _may_give(self) -> bool:
        if self._is_closing or (self._is_refused and not self._reserved):
            return True
        if self._standing is None or not self._is_idle():
            return False
        return self._room() < max(self._budget.limit / _SCARCE, self._standing.others_wait)

    def _room(self) -> Decimal:
        return _minus(self._budget.limit, self._standing.used) if self._standing is not None else _ZERO

    def _is_short(self) -> bool:
        """Whether something is waited for that there is, as far as known, no money for."""
        return self._least is not None and self._available < self._least and not self._is_closing

    def _wish(self, charge: Decimal, give: Decimal) -> tuple[Decimal, Decimal]:
        """The lease to ask for, at most and at least; two zeros when none is needed.

        What is not to be had is asked for once, so that others see it.
        """
        if self._least is None or self._available >= self._least:
            return _ZERO, _ZERO
        held = _minus(max(_ZERO, self._available), give)
        room = _minus(sum_costs(self._room(), held, give), charge)
        if self._standing is None:
            return _ZERO, _ZERO
        if room < self._least:
            if not self._is_refused or self._least <= self._marked:
                return _ZERO, _ZERO
            self._marked = self._least
            return self._least, self._least
        many = max(_times(self._budget.limit, self._least) // _BLOCKS, _times(self._wanted, self._least))
        fair = _times(room, self._least) // (2 * self._standing.workers)
        block = _WIDE.multiply(self._least, Decimal(max(1, min(many, fair))))
        return _minus(block, held), _minus(self._least, held)

    async def _refused(self) -> Entry | None:
        """There seems to be no money: look closely, then watch. Nothing is written meanwhile: waiting is free."""
        if self._watch is None:
            self._know(await self._ledger.look(self.worker))
            if (entry := self._next_entry()) is not None or not self._is_short():
                return entry
            self._watch_ledger()
        self._is_refused = True
        return self._next_entry()  # to let others know, and to give back what is too little for anybody here

    def _wake(self, _: object = None) -> None:
        self._woken.set()

    async def _post(self, entry: Entry) -> None:
        standing = await self._ledger.post(entry)
        self._pending = None
        self._available = sum_costs(self._available, standing.granted)
        self._know(standing)
        if entry.tell:
            self._tell_fractions(standing.told, entry.tell)
        if standing.granted and entry.take:
            self._marked = _ZERO
            self._uses += 1  # a new lease is not idle yet
            self._let_try_again()

    async def _wait_a_little(self) -> None:
        """Pause after the ledger failed, each time longer; closing cuts it short."""
        pause = asyncio.create_task(self._clock.sleep(self._pause * (0.5 + self._clock.random() / 2)))
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)
        pause.add_done_callback(self._wake)
        try:
            while not pause.done() and not self._is_closing:
                self._woken.clear()
                await self._woken.wait()
        finally:
            pause.cancel()

    # -- inside: idleness ------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        """Whether there is money here that nobody has used for a while."""
        return self._idle_uses == self._uses and self._available > 0

    def _time_idleness(self) -> None:
        has_some = self._available > 0 and not self._is_idle() and not self._is_closing
        if has_some and self._idle_timer is None and self._idle_seconds < float("inf"):
            self._idle_timer = asyncio.create_task(self._time_out(self._uses))
            self._idle_timer.add_done_callback(self._wake)

    async def _time_out(self, uses: int) -> None:
        await self._clock.sleep(self._idle_seconds)
        self._idle_timer = None
        if uses == self._uses:
            self._idle_uses = uses

    # -- inside: telling -------------------------------------------------------------------------------

    def _fraction_to_tell(self) -> Decimal:
        if self._warn_at is None or self._spent < self._warn_at:
            return _ZERO
        spent = self.spent
        return max((f for f in self._budget.warn if f > self._told and self._share(f) <= spent), default=_ZERO)

    def _tell_fractions(self, before: Decimal, upto: Decimal) -> None:
        """The ledger says who was the first to see a fraction passed: that one tells it."""
        for fraction in self._budget.warn:
            if before < fraction <= upto:
                log.warning("%s of the budget is spent: %s of %s", f"{fraction:.0%}", self.spent, self.limit)
                self._event("budget_warning", fraction=str(fraction))
        self._told = max(self._told, upto)
        if self._standing is not None:
            self._know(self._standing)

    def _review(self) -> None:
        """Tell when the money is out, and when there is some again."""
        if self.is_exhausted == self._told_exhausted:
            return
        self._told_exhausted = self.is_exhausted
        if self._told_exhausted:
            log.warning("the budget is spent: %s of %s; calls wait", self.spent, self.limit)
        else:
            log.info("the budget has room again; calls go on")
        self._event("budget_exhausted" if self._told_exhausted else "budget_resumed")

    def _tell_unreachable(self, error: Exception) -> None:
        if not self._told_unreachable:
            self._told_unreachable = True
            bug = None if isinstance(error, LedgerError) else error
            log.warning(
                "the budget's ledger does not answer, no money is leased until it does: %s", error, exc_info=bug
            )
            self._event("budget_unreachable", error=f"{type(error).__name__}: {error}")

    def _tell_left_behind(self) -> None:
        if self._available > 0 or self._pending is not None:
            log.warning("the budget's ledger does not answer: what this worker holds stays counted as spent")

    def _tell_reachable(self) -> None:
        self._pause = _FIRST_PAUSE
        if self._told_unreachable:
            self._told_unreachable = False
            log.info("the budget's ledger answers again")
            self._event("budget_reachable")

    def _event(self, kind: str, **more: str) -> None:
        if self._on_event is None:
            return
        detail = {name: value for name, value in self.to_dict().items() if name in _EVENT_DETAILS} | more
        try:
            self._on_event(kind, detail)
        except Exception:
            if not self._told_observer:
                self._told_observer = True
                log.exception("who listens to the budget's events failed; further failures are not logged")


def _minus(amount: Decimal, less: Decimal) -> Decimal:
    return sum_costs(amount, less.copy_negate())


def _times(amount: Decimal, unit: Decimal) -> int:
    """How often ``unit``, which is above 0, fits in ``amount``."""
    return int(_WIDE.divide_int(amount, unit)) if amount > 0 else 0
