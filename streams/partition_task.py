"""The partition task: everything that one assigned partition owns, from its reader's position to its commits.

Two loops share it. *Processing* takes records from the inbox and runs them; *committing* turns what has completed
into a transaction every ``commit_interval``. Both stop at the first error, and whoever owns the task (the worker)
decides what follows.

There are two ways of processing. Chains that only keep order anyway (plain functions; ``ordering="partition"``) run
lot by lot, each lot completing as a whole. All others go through a :class:`~rowmill.handlers.flow.Flow`, where rows
complete one by one in any order; the offset map tells the next owner which.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from ..handlers.chain import Failure
from ..handlers.flow import Flight, Flow
from ..state.clock import Clock
from ..state.model import Committed, Record, TopicPartition
from .offsets import OffsetTracker, decode_map
from .options import WorkerOptions
from .processing import Batch, Effects, Processor
from .transaction import Transactor

log = logging.getLogger(__name__)

_FIRST_LOT = 64
_SHORTEST_LOT_SECONDS = 0.02
_FLOW_LOT = 200

FlowMaker = Callable[[Callable[[Flight], None]], Flow]
"""Makes a task's flow, given what is to be called with every row that is done."""


class InFlight:
    """How much is in work in the whole worker, against its caps on rows and bytes.

    A task with nothing in work may always begin one row: nobody starves because others are slow.
    """

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self.rows = 0
        self.bytes = 0
        self._waiting: list[asyncio.Event] = []

    def has_room(self) -> bool:
        """Whether another row may begin."""
        return self.rows < self._max_rows and self.bytes < self._max_bytes

    def begin(self, size: int) -> None:
        """A row begins."""
        self.rows += 1
        self.bytes += size

    def end(self, rows: int, size: int) -> None:
        """Rows are done, or given up."""
        self.rows -= rows
        self.bytes -= size
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for event in waiting:
                event.set()

    def tell(self, event: asyncio.Event) -> None:
        """Set this event at the next :meth:`end`."""
        self._waiting.append(event)


class _Pending:
    """What has completed since the last transaction."""

    __slots__ = ("bytes", "effects", "flights", "rows", "since")

    def __init__(self) -> None:
        self.effects = Effects()
        self.flights: list[Flight] = []
        self.rows = 0
        self.bytes = 0
        self.since: float | None = None


class PartitionTask:
    """One partition during one assignment.

    Args:
        tp: the partition.
        transactor: its transactions.
        processor: its rows.
        make_flow: for chains whose rows complete in any order; None for those that keep the partition's order.
        in_flight: the worker's caps.
        options: sizes and times.
        clock: time.
        on_commit: told of the effects of each committed transaction, and of the time it took in seconds.
        on_change: called whenever the worker may have something to do: room for rows, or progress.
    """

    def __init__(
        self,
        tp: TopicPartition,
        *,
        transactor: Transactor,
        processor: Processor,
        make_flow: FlowMaker | None,
        in_flight: InFlight,
        options: WorkerOptions,
        clock: Clock,
        on_commit: Callable[[TopicPartition, Effects, float], None],
        on_change: Callable[[], None],
    ) -> None:
        self.tp = tp
        self._transactor = transactor
        self._processor = processor
        self._flow = make_flow(self._finished) if make_flow is not None else None
        self._in_flight = in_flight
        self._options = options
        self._clock = clock
        self._on_commit = on_commit
        self._on_change = on_change

        self._tracker = OffsetTracker(decode_map(Committed(0)))
        self._inbox: deque[Sequence[Record]] = deque()
        self._arrived = asyncio.Event()
        self._position = 0  # where the reader stands: everything before it was offered, or is a gap
        self._lot = processor.least_rows if processor.awaits else max(_FIRST_LOT, processor.least_rows)
        self._lot_in_work = False
        self._buffered_rows = 0  # taken from the reader and not yet committed
        self._buffered_bytes = 0
        self._flying_rows = 0
        self._flying_bytes = 0
        self._room = asyncio.Event()

        self._pending = _Pending()
        self._committing = False
        self._changed = asyncio.Event()  # something is pending, or nothing more will be
        self._due = asyncio.Event()  # it cannot wait for commit_interval
        self._draining = False
        self._processed = False
        self.running = False
        self.has_committed = False
        """Whether this task, not a former one, has committed anything."""

    # --- what the worker asks and tells ------------------------------------------------------------------------

    @property
    def wants_rows(self) -> bool:
        """Whether the next fetch should ask for this partition."""
        return (
            self.running
            and not self._draining
            and self._buffered_rows < self._options.buffer_rows
            and self._buffered_bytes < self._options.buffer_bytes
        )

    @property
    def committed(self) -> int:
        """The low watermark that the group has committed; 0 before the first commit."""
        checkpoint = self._transactor.checkpoint
        return checkpoint.offset if checkpoint else 0

    @property
    def low_watermark(self) -> int:
        """The lowest offset not yet completed here."""
        return self._tracker.low_watermark

    @property
    def is_settled(self) -> bool:
        """Whether every row that was taken is committed."""
        return self.running and not self._buffered_rows and self._pending.since is None

    def offer(self, records: Sequence[Record]) -> None:
        """Take records that the reader gave, in order."""
        self._inbox.append(records)
        self._position = records[-1].offset + 1
        self._buffered_rows += len(records)
        self._buffered_bytes += _bytes(records)
        self._arrived.set()

    def advance(self, position: int) -> None:
        """The reader stands at ``position`` and everything before it was offered: what lies between is a gap."""
        self._position = max(self._position, position)
        if not self._inbox and not self._lot_in_work:
            before = self._tracker.low_watermark
            self._tracker.pass_over(self._position)
            if self._tracker.low_watermark > before:
                self._schedule()

    def drain(self) -> None:
        """Take no more rows; finish those in work, commit, and end. Rows not begun are left to the next run."""
        self._draining = True
        self._inbox.clear()
        self._arrived.set()
        self._room.set()

    # --- the life of the task ----------------------------------------------------------------------------------

    async def open(self, first_offset: Callable[[TopicPartition], Awaitable[int]]) -> int:
        """Fence the former owner, read the checkpoint, and tell the offset to begin at.

        Raises:
            CheckpointError: the committed offset map cannot be read.
        """
        checkpoint = await self._transactor.open()
        start = decode_map(checkpoint or Committed(await first_offset(self.tp)))
        self._tracker = OffsetTracker(start)
        self._position = start.low
        return start.low

    async def run(self) -> None:
        """Process and commit until drained. Raises the first error of either loop."""
        self.running = True
        work = self._process_flow() if self._flow is not None else self._process_lots()
        processing = asyncio.create_task(work, name=f"process {self.tp}")
        committing = asyncio.create_task(self._commit_loop(), name=f"commit {self.tp}")
        try:
            await _until_one_fails({processing, committing})
        finally:
            self.running = False
            self._draining = True  # also where a handler swallows the cancellation
            for loop in (processing, committing):
                loop.cancel()
            results = await asyncio.gather(processing, committing, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    async def close(self) -> None:
        """Let go of the producer and of rows in work. Nothing of this task reaches the broker afterwards."""
        if self._flow is not None:
            await self._flow.close()
        self._in_flight.end(self._flying_rows, self._flying_bytes)
        self._flying_rows = self._flying_bytes = 0
        await self._transactor.close()

    async def flush(self) -> None:
        """Commit what has completed as soon as possible, and return when it is committed."""
        while self.running and (self._pending.since is not None or self._committing):
            self._due.set()
            await self._clock.sleep(0.005)

    # --- processing lot by lot ---------------------------------------------------------------------------------

    async def _process_lots(self) -> None:
        while not self._draining:
            if not self._inbox:
                self._arrived.clear()
                await self._arrived.wait()
                continue
            taken = self._take(self._lot)
            self._lot_in_work = True
            records = self._tracker.still_to_run(taken)
            began = self._clock.monotonic()
            effects = await self._processor.process(records) if records else Effects()
            self._lot_in_work = False
            self._pending.effects.merge(effects)
            # With nothing further in the inbox, a gap that was told meanwhile lies behind these rows.
            drained = not self._inbox and not self._draining
            self._tracker.pass_over(self._position if drained else taken[-1].offset + 1)
            self._complete(len(taken), _bytes(taken))
            self._adapt(len(taken), self._clock.monotonic() - began)
        self._end_processing()

    def _take(self, most: int) -> Sequence[Record]:
        """The next records: as many as are there, up to ``most``."""
        taken = self._inbox.popleft()
        while self._inbox and len(taken) < most:
            taken = [*taken, *self._inbox.popleft()]
        if len(taken) > most:
            self._inbox.appendleft(taken[most:])
            taken = taken[:most]
        return taken

    def _adapt(self, rows: int, seconds: float) -> None:
        """Size lots so that one takes about ``commit_interval``.

        A lot completes as a whole: with slow handlers a large one would hold back results, and an orderly stop,
        for as long as all of its rows take. With quick ones a small one would cost more than its rows.
        """
        pace = rows / max(seconds, 1e-6)
        fitting = int(pace * max(self._options.commit_interval, _SHORTEST_LOT_SECONDS))
        least = self._processor.least_rows
        self._lot = max(least, min(fitting, self._lot * 4, self._options.fetch_rows))

    # --- processing row by row ---------------------------------------------------------------------------------

    async def _process_flow(self) -> None:
        while not self._draining:
            self._check_flow()
            if not self._inbox:
                self._arrived.clear()
                await self._arrived.wait()
            elif not self._may_begin(self._inbox[0][0]):
                self._room.clear()
                self._in_flight.tell(self._room)
                await self._room.wait()
            else:
                self._begin(self._take(self._share()))
        while self._flying_rows:
            self._check_flow()
            self._room.clear()
            await self._room.wait()
        self._end_processing()

    def _check_flow(self) -> None:
        if self._flow is not None:
            self._flow.check()

    def _may_begin(self, record: Record) -> bool:
        return self._tracker.has_room(record.offset) and (self._in_flight.has_room() or not self._flying_rows)

    def _share(self) -> int:
        """How many rows to begin in one go: few enough that no cap is passed by much."""
        free = self._options.max_in_flight - self._in_flight.rows
        return max(1, min(_FLOW_LOT, free))

    def _begin(self, taken: Sequence[Record]) -> None:
        """Send rows into the flow, but those that the last owner completed, and those that are none."""
        assert self._flow is not None  # noqa: S101 - the caller is the flow's loop
        places = self._tracker.take([record.offset for record in taken])
        if len(places) < len(taken):
            done = len(taken) - len(places)
            self._buffered_rows -= done
            running = [taken[place] for place in places]
            self._buffered_bytes -= _bytes(taken) - _bytes(running)
            taken = running
            self._schedule()
        batch = Batch(taken)
        self._processor.decode(batch)
        for i, record in enumerate(taken):
            size = len(record.value or b"")
            self._flying_rows += 1
            self._flying_bytes += size
            self._in_flight.begin(size)
            flight = Flight(batch.rows[i], batch.contexts[i] if batch.contexts else None, record.key, record)
            if flight.value.__class__ is Failure:
                self._finished(flight)
            else:
                self._flow.enter(flight)

    def _finished(self, flight: Flight) -> None:
        """A row is through the chain, in whatever way."""
        record: Record = flight.sender
        size = len(record.value or b"")
        self._flying_rows -= 1
        self._flying_bytes -= size
        self._in_flight.end(1, size)
        self._tracker.complete((record.offset,))
        self._pending.flights.append(flight)
        self._room.set()
        self._complete(1, size)

    # --- completing --------------------------------------------------------------------------------------------

    def _complete(self, rows: int, size: int) -> None:
        """Rows are done: their effects wait for the next transaction."""
        self._pending.rows += rows
        self._pending.bytes += size
        self._schedule()

    def _schedule(self) -> None:
        pending = self._pending
        if pending.since is None:
            pending.since = self._clock.monotonic()
            self._changed.set()
            self._on_change()
        if pending.rows >= self._options.commit_rows:
            self._due.set()

    def _end_processing(self) -> None:
        self._processed = True
        self._changed.set()
        self._due.set()

    # --- committing --------------------------------------------------------------------------------------------

    async def _commit_loop(self) -> None:
        while True:
            await self._changed.wait()
            if self._pending.since is not None:
                await self._until_due(self._pending.since)
                await self._commit()
            elif self._processed:
                return
            else:
                self._changed.clear()

    async def _until_due(self, since: float) -> None:
        """Wait until the oldest pending row is ``commit_interval`` old, or somebody cannot wait so long."""
        remaining = since + self._options.commit_interval - self._clock.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, remaining)):
                await self._due.wait()
        if not self._processed:
            self._due.clear()

    async def _commit(self) -> None:
        """One transaction of all that has completed. Nothing is awaited between taking it and its checkpoint."""
        pending, self._pending = self._pending, _Pending()
        checkpoint = self._tracker.snapshot()
        self._committing = True
        began = self._clock.monotonic()
        effects = pending.effects
        if pending.flights:
            effects.merge(await self._processor.encode(_batch_of(pending.flights)))
        await self._transactor.commit(effects.outputs, checkpoint)
        self._buffered_rows -= pending.rows
        self._buffered_bytes -= pending.bytes
        self._committing = False
        self.has_committed = True
        self._on_commit(self.tp, effects, self._clock.monotonic() - began)
        self._on_change()


async def _until_one_fails(tasks: set[asyncio.Task[None]]) -> None:
    """Wait for all, or for the first that ends badly; asyncio's FIRST_EXCEPTION overlooks one that was cancelled."""
    running = tasks
    while running:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        if any(task.cancelled() or task.exception() is not None for task in done):
            return


def _batch_of(flights: Sequence[Flight]) -> Batch:
    batch = Batch([flight.sender for flight in flights])
    batch.rows = [flight.value for flight in flights]
    contexts = [flight.context for flight in flights if flight.context is not None]
    batch.contexts = contexts if len(contexts) == len(flights) else None
    return batch


def _bytes(records: Sequence[Record]) -> int:
    return sum(len(record.value) for record in records if record.value is not None)
