"""What tests say to a session and wait for: shared words, no fixtures."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from actbox import ExecutionClient, ExecutionError

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from actbox import CodeExecutor

    MakeExecutor = Callable[[], contextlib.AbstractAsyncContextManager[CodeExecutor]]

SECONDS = 10.0


async def text_of(executor: ExecutionClient, code: str) -> str | None:
    return (await executor.execute(code, timeout=SECONDS)).text


async def error_of(executor: ExecutionClient, code: str) -> str:
    """What the code raises, of which nothing of the guest's own files is shown."""
    with pytest.raises(ExecutionError) as caught:
        await executor.execute(code, timeout=SECONDS)
    assert caught.value.state_kept
    assert "/actbox/src" not in str(caught.value.trace)
    return f"{caught.value.name}: {caught.value.value}"


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SECONDS):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


def indented(body: str) -> str:
    """The body of a function, for a template of a program."""
    return "\n".join(f"    {line}" for line in body.splitlines())
