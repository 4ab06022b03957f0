"""The way between workers and brokers: what it delays, loses, repeats and breaks, by a seed.

A request is carried out when it arrives, whatever has become of who sent it. So a request outlives its caller's
deadline, its cancellation and its process, as it does on a real network.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from rowmill.streams.errors import BrokerError

from simulation.loop import SimLoop
from simulation.trace import Trace

T = TypeVar("T")

_RETRY_SECONDS = 0.05


class RetriableError(Exception):
    """The client itself asks again: a coordinator that loads, or has the transaction's markers still to write."""


@dataclass
class Mood:
    """How bad things are. Chances are per call; seconds are the longest, or the mean of exponential ones.

    Attributes:
        latency: mean seconds that a request, or a reply, is under way.
        lost_request, lost_reply: it vanishes; the caller waits for ever.
        late_request: it arrives after ``late`` seconds at most; its reply goes to nobody.
        repeated: a copy arrives again, up to ``late`` seconds after.
        refused, broken: an error, before or after it took effect.
        retriable: the client has to ask again.
        marker: mean seconds from a transaction's decision to its markers.
    """

    latency: float = 0.002
    lost_request: float = 0.0
    lost_reply: float = 0.0
    late_request: float = 0.0
    late: float = 30.0
    repeated: float = 0.0
    refused: float = 0.0
    broken: float = 0.0
    retriable: float = 0.0
    marker: float = 0.005

    def calm(self) -> None:
        """No more faults; what is slow stays a little slow."""
        self.latency, self.marker = min(self.latency, 0.01), min(self.marker, 0.05)
        self.lost_request = self.lost_reply = self.late_request = self.repeated = 0.0
        self.refused = self.broken = self.retriable = 0.0


class Network:
    """Carries calls to the brokers, which are all away or all there.

    Args:
        loop: whose time.
        mood: how bad things are now.
        chance: the seed's.
        trace: told of what goes wrong.
    """

    def __init__(self, loop: SimLoop, mood: Mood, chance: random.Random, trace: Trace) -> None:
        self.loop = loop
        self.mood = mood
        self.chance = chance
        self.trace = trace
        self.faults: Counter[str] = Counter()
        self.loading_until = 0.0
        """Until when coordinators answer that they load."""
        self._stalled_until = 0.0
        self._down_until = 0.0
        self._life = 0

    def stall(self, seconds: float) -> None:
        """Brokers stand still; connections stay."""
        self._stalled_until = max(self._stalled_until, self.loop.time() + seconds)

    def restart(self, down: float, loading: float) -> None:
        """Brokers go away and come back; every request under way is lost, and its caller knows."""
        self._life += 1
        self._down_until = self.loop.time() + down
        self._stalled_until = 0.0
        self.loading_until = self._down_until + loading

    def heal(self) -> None:
        """Brokers are there and work."""
        self._down_until = self._stalled_until = self.loading_until = 0.0

    def delay(self) -> float:
        """How long something is under way."""
        return self.chance.expovariate(1 / self.mood.latency)

    async def call(self, link: Link, what: str, act: Callable[[bool], Any], *, coordinator: bool = False) -> Any:
        """One call of a client, asked again as long as the answer is that it has to be.

        Args:
            link: the caller's connection.
            what: its name, for faults and traces.
            act: carries it out; is told whether this is a copy of a request whose caller had its answer. May return
                a future.
            coordinator: whether a coordinator answers it, which may still load.
        """
        while True:
            try:
                return await self._once(link, what, act, coordinator=coordinator)
            except RetriableError:
                await asyncio.sleep(_RETRY_SECONDS * (0.5 + self.chance.random()))

    async def _once(self, link: Link, what: str, act: Callable[[bool], Any], *, coordinator: bool) -> Any:
        if link.is_cut:
            raise BrokerError(f"{what}: the connection is cut")
        answer: asyncio.Future[Any] = self.loop.create_future()
        mood, lot, when = self.mood, self.chance.random(), self.delay()
        fate = ""
        for name in ("lost_request", "lost_reply", "late_request", "repeated", "refused", "broken", "retriable"):
            lot -= getattr(mood, name)
            if lot < 0:
                fate = name
                self.faults[f"{name} {what}"] += 1
                self.trace.note(f"{name}: {what}")
                break
        if link.is_partitioned:
            fate = "lost_request"
        request = _Request(what, act, answer, fate, self._life, coordinator, link)
        if fate == "late_request":
            when = self.chance.uniform(0, mood.late)
        if fate == "repeated":
            copy = _Request(what, act, None, fate, self._life, coordinator, link)
            self.loop.outside(when + self.chance.uniform(0, mood.late) ** 2 / mood.late, self._arrive, copy)
        if fate != "lost_request":
            self.loop.outside(when, self._arrive, request)
        return await answer

    def _arrive(self, request: _Request) -> None:
        now = self.loop.time()
        if now < self._stalled_until:
            self.loop.outside(self._stalled_until - now, self._arrive, request)
            return
        result: Any = None
        error: Exception | None = None
        if now < self._down_until or request.life != self._life:
            error = BrokerError(f"{request.what}: connection lost")
        elif request.fate == "refused":
            error = BrokerError(f"{request.what}: refused")
        elif request.fate == "retriable" or (request.coordinator and now < self.loading_until):
            error = RetriableError("loading")
        else:
            try:
                result = request.act(request.answer is None)
            except Exception as raised:  # noqa: BLE001 - it is the caller's
                error = raised
        if isinstance(result, asyncio.Future):
            result.add_done_callback(lambda done: self._later(request, done), context=self.loop.nobody)
        else:
            self._reply(request, result, error)

    def _later(self, request: _Request, done: asyncio.Future[Any]) -> None:
        if not done.cancelled():
            self._reply(request, None if done.exception() else done.result(), done.exception())

    def _reply(self, request: _Request, result: Any, error: BaseException | None) -> None:
        if request.fate == "broken":
            error = error or BrokerError(f"{request.what}: connection lost after it")
        if request.answer is not None and request.fate not in {"lost_reply", "late_request"}:
            self.loop.outside(self.delay(), self._deliver, request, result, error)

    def _deliver(self, request: _Request, result: Any, error: BaseException | None) -> None:
        answer = request.answer
        if answer is None or answer.done() or request.link.is_partitioned:
            return
        if request.life != self._life:
            error = BrokerError(f"{request.what}: connection lost")
        if error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)


class Link:
    """One process's connection."""

    def __init__(self) -> None:
        self.is_cut = False
        """Everything fails at once: the run is over."""
        self.is_partitioned = False
        """Nothing gets through, either way."""


@dataclass(eq=False)
class _Request:
    what: str
    act: Callable[[bool], Any]
    answer: asyncio.Future[Any] | None
    fate: str
    life: int
    coordinator: bool
    link: Link
