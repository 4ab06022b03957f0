"""Which topics exist and how many partitions they have, as far as a worker needs to know."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from ..state.errors import ConfigError
from .brokers.base import Broker, TopicSpec
from .deadlines import deadline
from .errors import TopicError
from .session import check_topic

log = logging.getLogger(__name__)


class UnknownTopicsError(Exception):
    """Rows go to topics the catalog has not looked up yet: call ``ensure`` with ``names``, then try again."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(", ".join(sorted(names)))
        self.names = names


class Catalog:
    """Looks topics up once, makes the missing ones where that is allowed, and remembers refusals.

    Args:
        broker: where the topics are.
        create: whether missing topics may be made.
        partitions: partitions of those that are made; None for the broker's default.
        timeout: seconds a look-up may take.
    """

    def __init__(self, broker: Broker, *, create: bool, partitions: int | None, timeout: float) -> None:
        self._broker = broker
        self._create = create
        self._partitions = partitions
        self._timeout = timeout
        self._counts: dict[str, int] = {}
        self._limits: dict[str, int] = {}
        self._refused: dict[str, str] = {}

    def partitions(self, topic: str) -> int:
        """The number of partitions of a topic that was looked up.

        Raises:
            UnknownTopicsError: nobody looked it up yet.
            TopicError: it was refused, with the reason.
        """
        count = self._counts.get(topic)
        if count is not None:
            return count
        if topic in self._refused:
            raise TopicError(self._refused[topic])
        raise UnknownTopicsError(frozenset((topic,)))

    def limit(self, topic: str) -> int:
        """The largest record, in bytes, that a topic which was looked up takes."""
        return self._limits[topic]

    async def ensure(
        self, names: Collection[str], config: Mapping[str, str] | None = None, partitions: int | None = None
    ) -> None:
        """Look topics up, make those that are missing, and remember what came of it.

        Never raises for a single topic: ``partitions`` does, where the row is that wanted it.

        Raises:
            BrokerError: the broker does not answer.
        """
        async with deadline(self._timeout, "look topics up"):
            present = await self._broker.topics()
            for name in names:
                if name not in present:
                    await self._make(name, config or {}, partitions or self._partitions)
            if any(name not in present for name in names):
                present = await self._broker.topics()
            self._limits |= await self._broker.record_limits([name for name in names if name in present])
        for name in names:
            if name in present:
                self._counts[name] = present[name].partitions
            else:  # made, and yet not listed: a name of the broker's own
                self._refused.setdefault(name, f"topic {name!r} is not for rows: {self._broker.url} does not list it")

    async def require(
        self, names: Collection[str], config: Mapping[str, str] | None = None, partitions: int | None = None
    ) -> None:
        """As :meth:`ensure`, for topics without which nothing can run.

        Raises:
            TopicError: one is missing and may not or cannot be made.
        """
        await self.ensure(names, config, partitions)
        for name in names:
            self.partitions(name)

    async def require_own(self, partitions: Mapping[str, int], config: Mapping[str, str], *, may_grow: bool) -> None:
        """See that topics of rowmill's own exist, with at least these numbers of partitions.

        Args:
            partitions: how many each must have.
            config: what missing ones are made with.
            may_grow: whether one with fewer partitions gets more; otherwise that is an error.

        Raises:
            TopicError: one is missing and may not be made, or is too small.
        """
        async with deadline(self._timeout, "look topics up"):
            present = await self._broker.topics()
            missing = [TopicSpec(name, count, config) for name, count in partitions.items() if name not in present]
            if missing and not self._create:
                raise TopicError(_may_not_make(missing[0].name, self._broker.url))
            await self._broker.create_topics(missing)
            for name, count in partitions.items():
                if name in present and present[name].partitions < count:
                    await self._grow(name, present[name].partitions, count, may_grow=may_grow)

    async def _grow(self, name: str, present: int, wanted: int, *, may_grow: bool) -> None:
        if not may_grow:
            raise TopicError(
                f"{name!r} has {present} partitions and its source {wanted}: the source has grown, keys have moved to "
                "other partitions, and tables stay with the old ones. Run the rows as another session, or, to begin "
                "with empty tables, stop the workers and delete this topic and the group"
            )
        log.info("%s gets %d partitions, as many as its source has now", name, wanted)
        await self._broker.grow_topic(name, wanted)

    async def _make(self, name: str, config: Mapping[str, str], partitions: int | None) -> None:
        try:
            check_topic("topic", name)
            if not self._create:
                self._refused[name] = _may_not_make(name, self._broker.url)
                return
            await self._broker.create_topics([TopicSpec(name, partitions, config)])
        except (TopicError, ConfigError) as error:
            self._refused[name] = str(error)


def _may_not_make(name: str, url: str) -> str:
    return (
        f"topic {name!r} does not exist on {url} and creation is off; make it, or allow rowmill to "
        "(drop --no-create-topics)"
    )
