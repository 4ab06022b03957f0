"""Server-sent events: what changes, to any browser that wants to hear of it, and the end of a topic as it grows.

A stream says *that* something changed rather than what it is now: whoever is slow misses nothing by hearing it once.
Streams are few, each is written to within a deadline or ended, and all of them end when the console does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from aiohttp import web

from ...state.clock import Clock
from ...state.codec import dumps
from ...state.errors import RowmillError
from ...state.model import StoredRecord
from ..brokers.base import Broker
from ..client import consume
from .answers import RefusedRequestError, described
from .topic_reads import TopicReads, record_of
from .watch import Watch

MOST_STREAMS = 64
MOST_TAILS = 8
BEAT_SECONDS = 15.0
"""How often something is sent where nothing happens, so that what lies between does not take it for dead."""
MOST_TAIL_SECONDS = 1_800.0
_LEAST_PAUSE = 0.5
_WRITE_SECONDS = 10.0
_TAIL_PER_SECOND = 50
_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"}
_RETRY_MS = 2_000


class Live:
    """Serves streams.

    Args:
        watch: tells what changes.
        broker: whose topics are followed.
        topics: which topics there are.
        clock: time.
    """

    def __init__(self, watch: Watch, broker: Broker, topics: TopicReads, *, clock: Clock) -> None:
        self._watch = watch
        self._broker = broker
        self._topics = topics
        self._clock = clock
        self._streams = 0
        self._tails = 0
        self._is_over = asyncio.Event()

    def close(self) -> None:
        """End all streams."""
        self._is_over.set()

    # --- what changes ------------------------------------------------------------------------------------------

    async def changes(self, request: web.Request, group: str | None) -> web.StreamResponse:
        """``overview`` when anything changes, ``session`` with each group that does (or only with this one)."""
        self._take_room(self._streams, MOST_STREAMS)
        self._streams += 1
        changed = _Changed(group)
        remove = self._watch.add_listener(changed.note)
        unfollow = self._watch.follow(group) if group is not None else lambda: None
        response = web.StreamResponse(headers=_HEADERS)
        try:
            await _begin(request, response)
            await _send(response, "overview", self._news())
            while not self._is_over.is_set():
                if not await self._either(changed.happened, BEAT_SECONDS):
                    await _send(response, "beat", {"now_ms": self._clock.now_ms()})
                    continue
                if self._is_over.is_set():
                    break
                self._watch.touch()
                groups = changed.take()
                await _send(response, "overview", self._news())
                for each in groups:
                    await _send(response, "session", self._session(each))
                await self._pause()
        except (ConnectionError, TimeoutError):
            pass  # nobody listens any more
        finally:
            remove()
            unfollow()
            self._streams -= 1
        return response

    def _news(self) -> dict[str, Any]:
        health = self._watch.health()
        return {"now_ms": self._clock.now_ms(), "refreshed_ms": health["refreshed_ms"], "history": health["history"]}

    def _session(self, group: str) -> dict[str, Any]:
        status = self._watch.status(group)
        if status is None:
            return {"group": group, "gone": True}
        return {"group": group, "state": status.state.value, "activity": status.activity, "lag": status.lag}

    def _take_room(self, present: int, most: int) -> None:
        if present >= most or self._is_over.is_set():
            raise RefusedRequestError(
                503, "stream", "one more", f"there are {present:,}: close a page or two", retry_after=10
            )

    async def _either(self, event: asyncio.Event, seconds: float) -> bool:
        """Whether it happened, or all is over, within so many seconds."""
        waits = [asyncio.ensure_future(event.wait()), asyncio.ensure_future(self._is_over.wait())]
        try:
            done, _ = await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            for each in waits:
                each.cancel()

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAST_PAUSE):
                await self._is_over.wait()

    # --- the end of a topic ------------------------------------------------------------------------------------

    async def tail(self, request: web.Request, topic: str, partition: int | None) -> web.StreamResponse:
        """Records as they come: ``record`` each; ``dropped`` tells how many were too many to show."""
        await self._topics.partitions(topic, partition)
        self._take_room(self._tails, MOST_TAILS)
        self._tails += 1
        response = web.StreamResponse(headers=_HEADERS)
        try:
            await _begin(request, response)
            try:
                async with asyncio.timeout(MOST_TAIL_SECONDS) as time_limit:
                    await self._follow(response, topic, partition)
            except TimeoutError:
                if not time_limit.expired():
                    raise  # whoever reads is too slow
            except RowmillError as error:
                await _send(response, "failed", described(error)[1])
            await _send(response, "end", {})
        except (ConnectionError, TimeoutError):
            pass
        finally:
            self._tails -= 1
        return response

    async def _follow(self, response: web.StreamResponse, topic: str, partition: int | None) -> None:
        await _send(response, "beat", {"now_ms": self._clock.now_ms()})
        shown, second, beat = 0, self._clock.monotonic(), self._clock.monotonic()
        async with aclosing(self._lots(topic, partition)) as lots:
            async for lot in lots:
                now = self._clock.monotonic()
                if now - second >= 1.0:
                    shown, second = 0, now
                fitting = lot[-max(0, _TAIL_PER_SECOND - shown) :] if shown < _TAIL_PER_SECOND else []
                for record in fitting:
                    await _send(response, "record", record_of(record))
                shown += len(fitting)
                if len(lot) > len(fitting):
                    await _send(response, "dropped", {"count": len(lot) - len(fitting)})
                if lot:
                    beat = now
                elif now - beat >= BEAT_SECONDS:
                    beat = now
                    await _send(response, "beat", {"now_ms": self._clock.now_ms()})

    async def _lots(self, topic: str, partition: int | None) -> AsyncGenerator[Sequence[StoredRecord]]:
        """What comes, and an empty list every second in which nothing does, until all is over."""
        lots = consume(self._broker, topic, start="end", follow=True, partition=partition)
        async with aclosing(lots):
            following = asyncio.ensure_future(anext(lots))
            try:
                while not self._is_over.is_set():
                    await asyncio.wait({following}, timeout=1.0)
                    if not following.done():
                        yield []
                        continue
                    yield following.result()
                    following = asyncio.ensure_future(anext(lots))
            finally:
                following.cancel()
                await asyncio.wait({following})


class _Changed:
    """What changed since somebody looked."""

    def __init__(self, only: str | None) -> None:
        self.happened = asyncio.Event()
        self._only = only
        self._groups: set[str] = set()

    def note(self, groups: frozenset[str]) -> None:
        """Something did; no groups: something of the console itself."""
        self._groups |= groups if self._only is None else groups & {self._only}
        if self._only is None or not groups or self._only in groups:
            self.happened.set()

    def take(self) -> list[str]:
        """The groups that did; from now on it begins anew."""
        groups, self._groups = sorted(self._groups), set()
        self.happened.clear()
        return groups


async def _begin(request: web.Request, response: web.StreamResponse) -> None:
    await response.prepare(request)
    await _write(response, b"retry: %d\n\n" % _RETRY_MS)


async def _send(response: web.StreamResponse, event: str, data: Any) -> None:
    """One event. JSON has no line breaks, so that nothing in it can be taken for a field of the stream."""
    await _write(response, b"event: %s\ndata: %s\n\n" % (event.encode(), dumps(data)))


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(_WRITE_SECONDS):
        await response.write(data)
