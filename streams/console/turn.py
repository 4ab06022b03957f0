"""One console per broker: which one it is, when several start one after the other or at the same moment.

On the embedded broker a lock decides, which is held from the start to the end.

On Kafka whoever is in the console's group has the turn, and others wait for a while whether it leaves: one that was
killed is in the group for some seconds. Between this look and the joining others may look as well, and a transactional
id decides between them. Each takes it, which shuts out those who took it before; then looks, joins the group, and
confirms as a member with an empty transaction, which fails where the id was taken meanwhile. So no two get through:
had one confirmed before the other took the id, the other would have seen it in the group. And one does: nobody shuts
out who took it last. A console that starts its Faust app again takes the id again, and so keeps the turn although it
was out of the group for a moment.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from ...state.clock import Clock
from ...state.errors import ConfigError
from ...state.model import Committed, TopicPartition
from ..brokers.base import Broker, MemberInfo, TransactionalProducer
from ..brokers.local_group import GroupLock, owner_of
from ..brokers.open import shown_url
from ..errors import FencedError, GroupBusyError

GROUP = "rowmill.console"
TRANSACTIONAL_ID = f"{GROUP}.start"

_LOCK = f"{GROUP}.turn"
_TRANSACTION_SECONDS = 10.0


def another_console(url: str, members: Sequence[MemberInfo] = ()) -> ConfigError:
    """What is said to one console too many.

    Args:
        url: the broker's.
        members: of the console's group, as far as they are known.
    """
    who = f" ({', '.join(map(_shown, members))})" if members else ""
    return ConfigError(
        "--broker",
        shown_url(url),
        f"another console runs on it{who}, and one is enough: open that one's page, or stop it first",
    )


def client_id(clock: Clock) -> str:
    """A name for a console's Faust app that tells others where it runs."""
    return f"{GROUP}/{platform.node() or 'localhost'}/{os.getpid()}/{clock.token()}"


def _shown(member: MemberInfo) -> str:
    name, _, place = member.client.partition("/")
    if name == GROUP and place.count("/") == 2:
        host, process, _ = place.split("/")
        return f"process {process} on {host}"
    return f"process {member.id} on {member.host}" if member.id.isdigit() else f"{member.client} on {member.host}"


class LocalTurn:
    """The turn on an embedded broker, for as long as a console runs."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._lock = GroupLock(folder, _LOCK)
        self._url = url
        self._is_held = False

    def take(self) -> None:
        """Have it from now on, unless it is had already.

        Raises:
            ConfigError: another console has it.
        """
        if self._is_held:
            return
        try:
            self._lock.acquire()
        except GroupBusyError:
            owner = owner_of(self._folder, _LOCK)
            who = [] if owner is None else [MemberInfo(str(owner.pid), "rowmill", platform.node(), frozenset())]
            raise another_console(self._url, who) from None
        self._is_held = True

    def release(self) -> None:
        """Give it up."""
        self._is_held = False
        self._lock.release()


class Turn:
    """The turn for one life of a console's Faust app: ``take``, ``start``, and ``confirm`` as a member.

    Args:
        broker: started.
        clock: time.
        url: the broker's, to tell.
        client: the name with which the app will be in the group.
    """

    def __init__(self, broker: Broker, clock: Clock, url: str, client: str) -> None:
        self._broker = broker
        self._clock = clock
        self._url = url
        self._client = client
        self._producer: TransactionalProducer | None = None

    async def take(self, patience: float, stopped_within: Callable[[float], Awaitable[bool]]) -> None:
        """Shut out who came before, and see that nobody is in the group.

        Args:
            patience: seconds for which members may go on to be there; on an embedded broker they may not at all.
            stopped_within: waits so many seconds, and tells whether to stop: then this ends.

        Raises:
            ConfigError: another console runs.
        """
        producer = self._broker.transactional_producer(TRANSACTIONAL_ID, timeout=_TRANSACTION_SECONDS)
        self._producer = producer
        await producer.start()
        until = self._clock.monotonic() + patience
        while members := await self._broker.members(GROUP):
            if self._broker.folder is not None or self._clock.monotonic() >= until:
                raise another_console(self._url, members)
            if await stopped_within(1.0):
                return

    async def start(self, offsets: Mapping[TopicPartition, Committed]) -> None:
        """Commit where to begin.

        Raises:
            ConfigError: another console has started since.
        """
        await self._settle(offsets)

    async def confirm(self) -> bool:
        """Once the app is in the group, make sure that nobody else took the turn; False while it is not.

        Raises:
            ConfigError: another console has started since.
        """
        if self._producer is None or self._broker.folder is not None:
            return True
        members = await self._broker.members(GROUP)
        if all(member.client != self._client for member in members):
            return False
        await self._settle({}, [member for member in members if member.client != self._client])
        await self.close()
        return True

    async def close(self) -> None:
        """Let go of the connection; the turn stays whose it is."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await producer.close()

    async def _settle(self, offsets: Mapping[TopicPartition, Committed], others: Sequence[MemberInfo] = ()) -> None:
        producer = self._producer
        if producer is None:
            return
        try:
            if offsets:
                await producer.begin()
                await producer.commit_offsets(GROUP, offsets)
                await producer.end()
            else:
                await producer.settle([], GROUP, {}, commit=True)
        except FencedError:
            raise another_console(self._url, others) from None
