"""What the stages of a worker share, and what of it needs the broker or the disk: answers, artifacts, processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..handlers.budget import Account
from ..handlers.chain import Chain, with_inner
from ..handlers.executors import BlockingPool
from ..handlers.processes import ProcessHandler
from ..handlers.runtime import Event, Runtime
from ..state.answers import AnswerStores
from ..state.clock import Clock
from ..state.model import TopicPartition
from .brokers.base import Broker
from .catalog import Catalog
from .ledger import TopicLedger
from .options import WorkerOptions, state_folder
from .pipeline import Pipeline
from .session import Session
from .shared_answers import SharedAnswers, topic_config

_FLUSH_SECONDS = 5.0


class Facilities:
    """One worker's; nothing is made for stages that need none of it.

    Args:
        pipeline: what to run.
        chain: its compiled stages.
        session: which execution.
        broker: where.
        options: folders and sizes.
        pool: threads.
        clock: time and chance.

    Raises:
        ConfigError: some stage needs processes, and this is such a process itself.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        chain: Chain,
        session: Session,
        broker: Broker,
        options: WorkerOptions,
        pool: BlockingPool,
        clock: Clock,
    ) -> None:
        self._session = session
        self._broker = broker
        self._options = options
        self._clock = clock
        self._sources = [session.source(topic) for topic in pipeline.sources]
        self._stages = with_inner(chain.stages)
        self._caches = {stage.name: stage.cache for stage in self._stages if stage.cache is not None}
        self._answers = self._open_answers()
        self._shared: SharedAnswers | None = None
        self._budget = pipeline.budget
        self._ledger: TopicLedger | None = None
        self._last_words: dict[str, Any] | None = None  # of the account
        self.runtime = Runtime(
            pool,
            clock,
            answers=self._answers,
            artifacts=pipeline.artifact_store(session.group),
            processes=options.processes,
        )
        for stage in self._stages:  # whoever watches sees them from the beginning, in the chain's order
            self.runtime.counts(stage)
        self._remote = [stage.handler for stage in self._stages if isinstance(stage.handler, ProcessHandler)]
        if self._remote:
            _ = self.runtime.processes  # refuses to be made in a process of its own kind

    def _open_answers(self) -> AnswerStores | None:
        if not self._caches:
            return None
        from ..state.rocksdb import RocksAnswerStores

        return RocksAnswerStores(state_folder(self._options, self._broker))

    async def prepare(self, catalog: Catalog, partitions: Mapping[str, int]) -> None:
        """Make what is missing before the first row: the topics of shared answers, caches, and processes.

        Args:
            catalog: makes topics.
            partitions: of each source.

        Raises:
            ConfigError: a handler cannot be imported by a process.
            TopicError: a topic is missing and may not be made.
        """
        for stage in self._stages:
            self.runtime.cache(stage)  # a handler's code is looked at once, and now
        await self._share(catalog, partitions)
        await self._open_account()
        for handler in self._remote:
            await self.runtime.processes.prepare(handler.reference)

    async def _share(self, catalog: Catalog, partitions: Mapping[str, int]) -> None:
        shared = {name: cache for name, cache in self._caches.items() if cache.shared}
        if not shared:
            return
        topics = {source: self._session.answers(source) for source in self._sources}
        wanted = {topics[source]: count for source, count in partitions.items()}
        await catalog.require_own(wanted, topic_config(shared.values()), may_grow=True)
        if self._shared is None:
            stores = {name: self.runtime.answers.open(name, cache.max_bytes) for name, cache in shared.items()}
            timeout = self._options.broker_timeout
            self._shared = SharedAnswers(self._broker, topics, stores, self._clock, timeout=timeout)
            self.runtime.share = self._shared.publish

    async def _open_account(self) -> None:
        if self._budget is None:
            return
        runtime, options = self.runtime, self._options
        self._ledger = TopicLedger(
            self._broker,
            self._session.budget,
            clock=self._clock,
            timeout=options.broker_timeout,
            create=options.create_topics,
        )
        runtime.account = Account(
            self._budget,
            self._ledger,
            clock=self._clock,
            on_event=lambda kind, detail: runtime.tell(Event(kind, "budget", detail)),
        )
        await runtime.account.start()

    async def take_over(self, tp: TopicPartition) -> None:
        """A partition comes: look for answers that its former owner, here or elsewhere, has left."""
        if self._answers is not None:
            self._answers.refresh()
        if self._shared is not None:
            await self._shared.load(tp)

    @property
    def budget(self) -> dict[str, Any] | None:
        """What the account says, or said last; None without a budget."""
        account = self.runtime.account
        return self._last_words if account is None else account.to_dict()

    async def close(self) -> None:
        """Let go of everything; answers that are on their way to others get some seconds."""
        self._last_words = self.budget
        if self._shared is not None:
            await self._shared.flush(_FLUSH_SECONDS)
            await self._shared.close()
        account, self.runtime.account = self.runtime.account, None
        if account is not None:
            await account.close()
        if self._ledger is not None:
            await self._ledger.close()
        await self.runtime.close()
        if self._answers is not None:
            self._answers.close()
