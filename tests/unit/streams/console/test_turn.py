"""Which console has the turn, for every order in which two of them take their steps."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from rowmill.state.errors import ConfigError
from rowmill.state.model import Committed, TopicPartition
from rowmill.streams.brokers.base import MemberInfo
from rowmill.streams.console.turn import GROUP, LocalTurn, Turn, another_console, client_id
from support.fake_broker import FakeBroker
from support.fake_clock import FakeClock

URL = "kafka://127.0.0.1:9092?sasl=PLAIN&user=me"


class Group(FakeBroker):
    """A broker on which the console's group is a list of names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    async def members(self, group: str) -> list[MemberInfo]:
        """As the group's coordinator tells them."""
        assert group == GROUP
        return [MemberInfo(f"{name}-id", name, "10.0.0.1", frozenset()) for name in self.names]


class Racer:
    """One console on its way to the turn, a step at a time."""

    def __init__(self, broker: Group, clock: FakeClock, name: str) -> None:
        self.turn = Turn(broker, clock, URL, name)
        self.broker = broker
        self.clock = clock
        self.name = name
        self.rival: Racer | None = None
        self.has_it: bool | None = None
        self._steps = iter((self._take, self._join, self._confirm))

    async def step(self) -> bool:
        """The next one, unless refused before; False if there is none."""
        step = next(self._steps, None)
        if step is None or self.has_it is False:
            return False
        try:
            await step()
        except ConfigError:
            self.has_it = False
            if self.name in self.broker.names:
                self.broker.names.remove(self.name)
            await self.turn.close()
        return True

    async def _take(self) -> None:
        await self.turn.take(15.0, self._wait)

    async def _join(self) -> None:
        await self.turn.start({})
        self.broker.names.append(self.name)

    async def _confirm(self) -> None:
        self.has_it = await self.turn.confirm()

    async def _wait(self, seconds: float) -> bool:
        """Meanwhile the other one goes on."""
        if self.rival is None or not await self.rival.step():
            self.clock.advance(seconds)
        return False


async def _never(seconds: float) -> bool:
    return False


ORDERS = sorted(set(itertools.permutations("aaabbb")))
"""All ways to put the steps of two consoles into one order, by the consoles' names."""


@pytest.mark.parametrize("order", ORDERS, ids="".join)
async def test_exactly_one_gets_through(order: tuple[str, ...]) -> None:
    """Whoever does is alone in the group; who was through before the other one began is not disturbed."""
    broker, clock = Group(), FakeClock()
    racers = {name: Racer(broker, clock, name) for name in "ab"}
    racers["a"].rival, racers["b"].rival = racers["b"], racers["a"]
    for name in order:
        await racers[name].step()
    winners = [name for name, racer in racers.items() if racer.has_it]
    assert len(winners) == 1
    assert broker.names == winners
    if len(set(order[:3])) == 1:
        assert winners == [order[0]]


async def test_who_waits_gets_the_turn_of_one_that_leaves() -> None:
    """One that was shut out is in the group for a moment: it is waited for, and its name told if it stays."""
    broker, clock = Group(), FakeClock()
    broker.names = [f"{GROUP}/host-1/4711/abc"]
    turn = Turn(broker, clock, URL, "me")
    waited: list[float] = []

    async def leaves(seconds: float) -> bool:
        waited.append(seconds)
        if len(waited) == 3:
            broker.names.clear()
        return False

    await turn.take(15.0, leaves)
    assert len(waited) == 3
    await turn.start({TopicPartition("t", 0): Committed(5)})
    assert not await turn.confirm()
    broker.names = ["me"]
    assert await turn.confirm()
    assert await turn.confirm()
    assert broker.group_offsets[GROUP] == {TopicPartition("t", 0): Committed(5)}

    broker.names = [f"{GROUP}/host-1/4711/abc"]
    with pytest.raises(ConfigError, match=r"another console runs on it \(process 4711 on host-1\)"):
        await Turn(broker, clock, URL, "you").take(0.0, _never)


async def test_a_console_that_starts_its_app_again_keeps_the_turn() -> None:
    """Another one that looks at the moment when it is out of the group is shut out by its return."""
    broker, clock = Group(), FakeClock()
    intruder, again = Racer(broker, clock, "b"), Racer(broker, clock, "a")
    await intruder.step()
    await again.step()
    await intruder.step()
    assert intruder.has_it is False
    await again.step()
    await again.step()
    assert again.has_it


def test_the_lock_of_an_embedded_broker(tmp_path: Path) -> None:
    """One has it until it is released; the other one hears who has it."""
    first, second = LocalTurn(tmp_path, "local://b"), LocalTurn(tmp_path, "local://b")
    first.take()
    first.take()
    with pytest.raises(ConfigError, match=r"'local://b'; another console runs on it \(process \d+ on "):
        second.take()
    second.release()
    first.release()
    second.take()
    second.release()


def test_what_is_said() -> None:
    """Setting, value without what may be secret, and remedy."""
    assert str(another_console(URL)) == (
        "--broker: got 'kafka://127.0.0.1:9092?…'; another console runs on it, and one is enough: open that one's "
        "page, or stop it first"
    )
    strange = [MemberInfo("x-1", "kcat", "10.0.0.7", frozenset())]
    assert "(kcat on 10.0.0.7)" in str(another_console(URL, strange))
    assert client_id(FakeClock()).count("/") == 3
