"""Closing what must be closed, however often the task that closes it is cancelled."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def finish(closing: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end; a cancellation that comes meanwhile is raised after it."""
    task = asyncio.ensure_future(closing)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as exc:
            if task.cancelled():
                raise
            cancelled = exc
    if cancelled is not None:
        task.result()
        raise cancelled
