"""The group coordinator's side of Kafka's eager protocol: everybody gives up everything, then all is shared anew."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rowmill.state.model import TopicPartition

from simulation.loop import SimLoop
from simulation.trace import Trace

Policy: TypeAlias = Literal["even", "sticky", "shuffle"]


class UnknownMemberError(Exception):
    """The group does not know that member (any more)."""


@dataclass(eq=False)
class _Member:
    name: str
    heard: float
    joining: asyncio.Future[Share] | None = None


Share: TypeAlias = "tuple[int, frozenset[TopicPartition]]"
"""A generation, and what a member owns in it."""


class Group:
    """One consumer group.

    Args:
        partitions: what is shared out.
        session: seconds of silence after which a member is put out.
        patience: seconds that a rebalance waits for members who are known.
        policy: who gets what.
    """

    def __init__(
        self,
        loop: SimLoop,
        chance: random.Random,
        trace: Trace,
        partitions: Sequence[TopicPartition],
        *,
        session: float,
        patience: float,
        policy: Policy,
    ) -> None:
        self._loop = loop
        self._chance = chance
        self._trace = trace
        self._partitions = partitions
        self._session = session
        self._patience = patience
        self._policy = policy
        self._members: dict[str, _Member] = {}
        self._gone: set[str] = set()
        self._owners: dict[TopicPartition, str] = {}
        self._preparing = False
        self.generation = 0
        self.rebalances = 0

    @property
    def members(self) -> list[str]:
        """Who is in it."""
        return sorted(self._members)

    def join(self, name: str) -> asyncio.Future[Share] | None:
        """Enter, or take part in the rebalance under way; the answer comes when all have."""
        if name in self._gone:
            raise UnknownMemberError
        member = self._members.get(name)
        if member is None:
            member = self._members[name] = _Member(name, self._loop.time())
            self._watch(member)
        if member.joining is not None and not member.joining.done():
            member.joining.cancel()
        member.joining = self._loop.create_future()
        answer = member.joining
        self._prepare()
        self._complete_if_all()
        return answer

    def heartbeat(self, name: str, generation: int) -> bool:
        """Whether all is as it was; otherwise the member has to join again."""
        member = self._members.get(name)
        if member is None:
            raise UnknownMemberError
        member.heard = self._loop.time()
        return generation == self.generation and not self._preparing

    def is_current(self, name: str, generation: int) -> bool:
        """Whether a commit of that member counts."""
        return name in self._members and generation == self.generation

    def leave(self, name: str) -> None:
        """Go, or be put out; for good: who comes back has another name."""
        self._gone.add(name)
        member = self._members.pop(name, None)
        if member is None:
            return
        if member.joining is not None and not member.joining.done():
            member.joining.cancel()
        if not self._members:
            self.generation += 1
            self._preparing = False
        else:
            self._prepare()
            self._complete_if_all()

    def forget_all(self) -> None:
        """Lose every session, as a coordinator may that comes back."""
        for name in self.members:
            self.leave(name)

    def _watch(self, member: _Member) -> None:
        if self._members.get(member.name) is not member:
            return
        silent = self._loop.time() - member.heard
        if member.joining is not None and not member.joining.done():
            silent = 0.0  # it waits for us
        if silent >= self._session:
            self._trace.note(f"session of {member.name} is over")
            self.leave(member.name)
        else:
            self._loop.outside(self._session - silent + 0.001, self._watch, member)

    def _prepare(self) -> None:
        if not self._preparing:
            self._preparing = True
            self._loop.outside(self._patience, self._put_out_absent, self.generation)

    def _put_out_absent(self, generation: int) -> None:
        if self._preparing and generation == self.generation:
            for member in list(self._members.values()):
                if member.joining is None:
                    self._trace.note(f"{member.name} did not join in time")
                    self._gone.add(member.name)
                    del self._members[member.name]
            if not self._members:
                self.generation += 1
                self._preparing = False
            self._complete_if_all()

    def _complete_if_all(self) -> None:
        if not self._preparing or not self._members or any(m.joining is None for m in self._members.values()):
            return
        self._preparing = False
        self.generation += 1
        self.rebalances += 1
        shares = self._share_out(self.members)
        self._owners = {tp: name for name, mine in shares.items() for tp in mine}
        for name, mine in shares.items():
            member = self._members[name]
            answer, member.joining = member.joining, None
            member.heard = self._loop.time()
            if answer is not None and not answer.done():
                answer.set_result((self.generation, mine))
        self._trace.note(f"generation {self.generation}: {_shown(shares)}")

    def _share_out(self, names: Sequence[str]) -> Mapping[str, frozenset[TopicPartition]]:
        partitions = list(self._partitions)
        if self._policy == "shuffle":
            self._chance.shuffle(partitions)
        most = -(-len(partitions) // len(names))
        shares: dict[str, list[TopicPartition]] = {name: [] for name in names}
        left = []
        for tp in partitions:
            owner = self._owners.get(tp, "") if self._policy == "sticky" else ""
            if owner in shares and len(shares[owner]) < most:
                shares[owner].append(tp)
            else:
                left.append(tp)
        for tp in left:
            min(shares.values(), key=len).append(tp)
        return {name: frozenset(mine) for name, mine in shares.items()}


def _shown(shares: Mapping[str, Collection[TopicPartition]]) -> str:
    return "; ".join(f"{name}: {', '.join(map(str, sorted(mine))) or 'nothing'}" for name, mine in shares.items())
