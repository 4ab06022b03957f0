"""The state manager: checkpoints of sessions by their ids, whatever keeps them. The names are ondine's."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from ..state.context import ExecutionContext
from ..state.errors import ConfigError
from .checkpoint_stores import CheckpointInfo, CheckpointStorage

CHECKPOINT_ROWS = 500
"""Rows between checkpoints, where nothing else is said."""


class StateManager:
    """Saves, loads, lists and removes the checkpoints of sessions.

    On a broker there is nothing to save: every transaction of a session commits its checkpoint, and this reads it. For
    sessions that are run through a ``PipelineExecutor`` the interval is how many rows a transaction has at most.

    A session is told by its UUID (``context.session_id``), the UUID's text, or by name: ``reviews`` is the live session
    of that pipeline, ``reviews.NAME`` another one.

    The methods may be called from ordinary code, and from inside of a running event loop, which they hold up; those
    that end in ``_async`` are for there. Belongs to one thread.

    Args:
        storage: where checkpoints are; default: the broker that ``ROWMILL_BROKER`` names, else the embedded one in
            ``.rowmill``.
        checkpoint_interval: rows between checkpoints.

    Raises:
        ConfigError: an argument is wrong.
    """

    def __init__(self, storage: CheckpointStorage | None = None, checkpoint_interval: int = CHECKPOINT_ROWS) -> None:
        if isinstance(checkpoint_interval, bool) or not isinstance(checkpoint_interval, int) or checkpoint_interval < 1:
            raise ConfigError("checkpoint_interval", checkpoint_interval, "give a whole number of rows from 1")
        if storage is None:
            from .broker_checkpoints import BrokerCheckpointStorage

            storage = BrokerCheckpointStorage()
        self.storage = _checked(storage)
        self.checkpoint_interval = checkpoint_interval
        self._last_row = 0

    def should_checkpoint(self, current_row: int) -> bool:
        """Whether a checkpoint is due: ``checkpoint_interval`` rows after the last one that was saved or loaded.

        Args:
            current_row: the position of the row done last, or the number of rows done. One that lies before the last
                checkpoint is another session's, which begins to count from 0.
        """
        if current_row < self._last_row:
            self._last_row = 0
        return current_row - self._last_row >= self.checkpoint_interval

    def save_checkpoint(self, context: ExecutionContext) -> bool:
        """Keep a context. Of a session that the broker runs there is nothing to keep: it is committed already.

        Returns:
            True.

        Raises:
            CheckpointError: it cannot be written.
            BrokerError: the broker does not answer.
        """
        saved = self.storage.save(context.session_id, context.to_checkpoint())
        self._last_row = context.last_processed_row
        return saved

    def load_checkpoint(self, session_id: UUID | str) -> ExecutionContext | None:
        """The context of a session, as of its last checkpoint; None where there is none.

        Raises:
            CheckpointError: there is one, and it cannot be read.
            ConfigError: the name is no session's.
            BrokerError: the broker does not answer.
        """
        return self._loaded(self.storage.load(self.storage.find(session_id)))

    def can_resume(self, session_id: UUID | str) -> bool:
        """Whether there is a checkpoint of the session. Errors are those of :meth:`load_checkpoint`."""
        return self.storage.exists(self.storage.find(session_id))

    def cleanup_checkpoints(self, session_id: UUID | str) -> bool:
        """Remove a session's checkpoints; on a broker, every trace of the session that is its own, without asking.

        ``rowmill checkpoints delete SESSION --dry-run`` shows what that is.

        Returns:
            Whether there was anything.

        Raises:
            GroupBusyError: workers serve the session; nothing was removed.
            BrokerError: the broker does not answer; what is left is removed by the next call.
        """
        return self.storage.delete(self.storage.find(session_id))

    def list_checkpoints(self) -> list[CheckpointInfo]:
        """All checkpoints, the newest first.

        Raises:
            BrokerError: the broker does not answer.
        """
        return self.storage.list_checkpoints()

    async def save_checkpoint_async(self, context: ExecutionContext) -> bool:
        """:meth:`save_checkpoint` on a running event loop."""
        saved = await self.storage.save_async(context.session_id, context.to_checkpoint())
        self._last_row = context.last_processed_row
        return saved

    async def load_checkpoint_async(self, session_id: UUID | str) -> ExecutionContext | None:
        """:meth:`load_checkpoint` on a running event loop."""
        return self._loaded(await self.storage.load_async(await self.storage.find_async(session_id)))

    async def can_resume_async(self, session_id: UUID | str) -> bool:
        """:meth:`can_resume` on a running event loop."""
        return await self.storage.exists_async(await self.storage.find_async(session_id))

    async def cleanup_checkpoints_async(self, session_id: UUID | str) -> bool:
        """:meth:`cleanup_checkpoints` on a running event loop."""
        return await self.storage.delete_async(await self.storage.find_async(session_id))

    async def list_checkpoints_async(self) -> list[CheckpointInfo]:
        """:meth:`list_checkpoints` on a running event loop."""
        return await self.storage.list_checkpoints_async()

    def _loaded(self, data: dict[str, Any] | None) -> ExecutionContext | None:
        if data is None:
            return None
        context = ExecutionContext.from_checkpoint(data)
        self._last_row = max(0, context.last_processed_row)
        return context


def _checked(storage: Any) -> CheckpointStorage:
    if not isinstance(storage, CheckpointStorage):
        remedy = "give a CheckpointStorage, such as FileCheckpointStorage('checkpoints')"
        raise ConfigError("storage", storage, remedy)
    return storage
