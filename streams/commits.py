"""What has completed in a partition, on its way into commits.

*Exactly once*: all that completed since the last commit goes into one transaction every ``commit_interval``, or
sooner when there is much of it. *At least once*: results are sent as rows complete; every ``commit_interval`` the
changelog and then the offsets of what was sent follow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from ..handlers.flow import Flight
from ..state.clock import Clock
from ..state.model import Outgoing, Record, TopicPartition
from .delivery import Forwarder
from .offsets import OffsetTracker
from .options import WorkerOptions
from .partition_state import PartitionState
from .processing import Batch, Effects, Processor
from .transaction import Transactor

_POLL_SECONDS = 0.005


class _Pending:
    """What has completed since the last commit, or, at least once, the last send."""

    __slots__ = ("bytes", "effects", "flights", "rows", "since")

    def __init__(self) -> None:
        self.effects = Effects()
        self.flights: list[Flight] = []
        self.rows = 0
        self.bytes = 0
        self.since: float | None = None


class _Sent:
    """What was sent, at least once, and neither the changelog nor the group knows of.

    Args:
        since: when the first of it completed.
    """

    __slots__ = ("effects", "rows", "since")

    def __init__(self, since: float) -> None:
        self.effects = Effects()  # their counts: the records are out
        self.rows = 0
        self.since = since


class Commits:
    """A partition task's completed rows and their commits.

    Args:
        delivery: how they are committed.
        tracker: the offsets.
        state: tables and context.
        processor: encodes rows of flows.
        options: sizes and times.
        clock: time.
        on_commit: told of the rows and bytes that are through, of their effects, and of the seconds it took.
        on_change: called whenever the worker may have something to do.
    """

    def __init__(
        self,
        *,
        delivery: Transactor | Forwarder,
        tracker: OffsetTracker,
        state: PartitionState,
        processor: Processor,
        options: WorkerOptions,
        clock: Clock,
        on_commit: Callable[[int, int, Effects, float], None],
        on_change: Callable[[], None],
    ) -> None:
        self._tracker = tracker
        self._delivery = delivery
        self._state = state
        self._processor = processor
        self._options = options
        self._clock = clock
        self._on_commit = on_commit
        self._on_change = on_change
        self._pending = _Pending()
        self._sent: _Sent | None = None
        self._busy = False
        self._held = False
        self._ended = False  # nothing more will complete
        self._saying_stopped = False
        self._begun = self._done = 0  # commits
        self._committed = asyncio.Event()
        self._changed = asyncio.Event()
        self._due = asyncio.Event()  # it cannot wait for commit_interval
        self._released = asyncio.Event()
        self._released.set()

    # --- what completes ----------------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether everything that completed is committed."""
        return self._pending.since is None and not self._busy and self._sent is None

    def add_lot(self, effects: Effects, rows: int, size: int) -> None:
        """A lot is done; its effects are worked out already."""
        self._pending.effects.merge(effects)
        self._pending.rows += rows
        self._pending.bytes += size
        self.schedule()

    def add_flights(self, flights: Sequence[Flight], size: int) -> None:
        """Rows are done; their effects are worked out with the commit, on a thread."""
        pending = self._pending
        pending.flights += flights
        pending.rows += len(flights)
        pending.bytes += size
        if pending.since is None or pending.rows >= self._options.commit_rows:
            self.schedule()

    def schedule(self) -> None:
        """There is something to commit, if only an offset."""
        pending = self._pending
        if pending.since is None:
            pending.since = self._clock.monotonic()
            self._changed.set()
            self._on_change()
        if pending.rows >= self._options.commit_rows:
            self._due.set()

    def end(self) -> None:
        """Nothing more will complete: commit what there is, and say that the task stopped in order."""
        self._ended = True
        self._changed.set()
        self._due.set()

    async def note_starts(self, records: Sequence[Record]) -> None:
        """Write down that these rows begin, and return when that is committed."""
        self._state.note_starts(records)
        await self.say_running()

    async def say_running(self) -> None:
        """Make a commit, if only to note that the task runs: a death from now on is one that can be seen."""
        wanted = self._begun + 1
        self.schedule()
        while self._done < wanted:
            self._due.set()
            self._committed.clear()
            await self._committed.wait()

    # --- while the group rebalances ----------------------------------------------------------------------------

    async def flush(self, *, goodbye: bool) -> None:
        """Commit what has completed as soon as possible, and return when it is committed.

        With ``goodbye`` the changelog also learns that nobody died if this was the last commit of the task.
        """
        if goodbye and not self._state.says_stopped:
            self._saying_stopped = True
            self.schedule()
        while not self.is_settled and not self._held:
            self._due.set()
            self._changed.set()
            await self._clock.sleep(_POLL_SECONDS)

    def hold(self) -> None:
        """Begin no commit: the partition may be somebody else's by now, and would answer by fencing."""
        self._held = True
        self._released.clear()

    def release(self) -> None:
        """Go on committing."""
        self._held = self._saying_stopped = False
        self._released.set()
        self._changed.set()
        if self._state.says_stopped and not self._ended:
            self.schedule()  # rows may be in work, and the changelog must know

    # --- the loop ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit until :meth:`end`. Raises the first error."""
        while True:
            await self._wait_for_change()
            if self._pending.since is not None or self._sent is not None:
                await self._go_on()
            elif not self._ended:
                self._changed.clear()
            elif self._state.says_stopped or self._held:
                return
            else:
                self._saying_stopped = True
                self.schedule()

    async def _wait_for_change(self) -> None:
        """Until something is pending, or what was sent is due to be committed."""
        if self._sent is None:
            await self._changed.wait()
        elif self._pending.since is None and not self._ended and not self._due.is_set():
            self._changed.clear()
            await _within(self._sent.since + self._options.commit_interval - self._clock.monotonic(), self._changed)

    async def _go_on(self) -> None:
        """Commit when that is due; at least once, send until then."""
        since = self._sent.since if self._sent is not None else self._pending.since
        assert since is not None  # noqa: S101 - the caller's loop has seen to that
        if isinstance(self._delivery, Transactor):
            await self._until_due(since)
        await self._released.wait()
        if isinstance(self._delivery, Forwarder) and not self._is_due(since):
            await self._send(self._delivery, since)
        else:
            await self._deliver()

    async def _until_due(self, since: float) -> None:
        """Wait until the oldest of it is ``commit_interval`` old, or somebody cannot wait so long."""
        await _within(since + self._options.commit_interval - self._clock.monotonic(), self._due)

    def _is_due(self, since: float) -> bool:
        """Whether a commit must be made now: the oldest is ``commit_interval`` old, or somebody cannot wait so long."""
        rows = self._pending.rows + (self._sent.rows if self._sent is not None else 0)
        is_overdue = self._clock.monotonic() - since >= self._options.commit_interval
        return is_overdue or self._due.is_set() or rows >= self._options.commit_rows

    async def _send(self, delivery: Forwarder, since: float) -> None:
        """At least once, results need not wait for their commit.

        The changelog may: a record of it with each send would double the requests' work, here and at the broker.
        """
        pending, self._pending = self._pending, _Pending()
        self._busy = True
        began = self._clock.monotonic()
        effects = await self._effects_of(pending)
        self._state.check()
        if effects.outputs:
            await delivery.send(effects.outputs)
            effects.outputs = {}
        sent = self._sent = self._sent or _Sent(since)
        sent.effects.merge(effects)
        sent.rows += pending.rows
        self._busy = False
        if pending.rows:
            self._on_commit(pending.rows, pending.bytes, effects, self._clock.monotonic() - began)
            self._on_change()

    async def _deliver(self) -> None:
        """Commit all that has completed. Nothing is awaited between taking it and its checkpoint."""
        self._begun += 1
        number = self._begun
        pending, self._pending = self._pending, _Pending()
        checkpoint = self._tracker.snapshot()
        taken = self._state.take()
        self._busy = True
        if not self._ended:
            self._due.clear()  # what cannot wait from here on asks for the next one
        began = self._clock.monotonic()
        effects = everything = await self._effects_of(pending)
        if self._sent is not None:
            everything = self._sent.effects
            everything.merge(effects)
        stopped = self._saying_stopped or self._ended
        outputs: dict[TopicPartition, Sequence[Outgoing]] = {**effects.outputs}
        outputs[self._state.changelog] = self._state.records(taken, everything, checkpoint, stopped=stopped)
        if isinstance(self._delivery, Transactor):
            ends = await self._delivery.commit(outputs, checkpoint, self._state.last_was_ours)
            await self._state.written(ends.get(self._state.changelog))
        else:
            await self._delivery.send(outputs)
            await self._state.written(None)
            await self._delivery.commit(checkpoint, self._released)
        self._sent = None
        self._busy = False
        self._done = number
        self._committed.set()
        self._on_commit(pending.rows, pending.bytes, effects, self._clock.monotonic() - began)
        self._on_change()

    async def _effects_of(self, pending: _Pending) -> Effects:
        """With those of rows that completed one by one."""
        if pending.flights:
            pending.effects.merge(await self._processor.encode(_batch_of(pending.flights)))
        return pending.effects


async def _within(seconds: float, event: asyncio.Event) -> None:
    """Wait for an event, but not longer than this."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()


def _batch_of(flights: Sequence[Flight]) -> Batch:
    batch = Batch([flight.sender for flight in flights])
    batch.rows = [flight.value for flight in flights]
    contexts = [flight.context for flight in flights if flight.context is not None]
    batch.contexts = contexts if len(contexts) == len(flights) else None
    return batch
