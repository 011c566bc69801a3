"""An MCP server that is reached by HTTP: the SDK's transport, with a bound on what it reads."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import httpx2
from mcp.client.streamable_http import streamable_http_client

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

# Seconds, as the SDK's own: a server may be silent for long while it holds an answer open.
_TIMEOUT = httpx2.Timeout(30, read=300)
_EVENTS = "text/event-stream"


@contextlib.asynccontextmanager
async def connected(url: str, bound: Callable[[], int]) -> AsyncGenerator[tuple[Any, Any]]:
    """Streams of messages that come and go. `bound` is asked for each answer; for events, which are streamed, once."""

    async def limit(response: httpx2.Response) -> None:
        if not response.headers.get("content-type", "").lower().startswith(_EVENTS):
            _limit(response, bound())

    async with (
        httpx2.AsyncClient(timeout=_TIMEOUT, event_hooks={"response": [limit]}) as client,
        streamable_http_client(url, http_client=client, max_sse_event_size=bound()) as streams,
    ):
        yield streams


def _limit(response: httpx2.Response, bound: int) -> None:
    """Let no more than this be read of a response, as it is when it is decompressed."""
    whole = response.aiter_bytes

    async def bounded(chunk_size: int | None = None) -> AsyncGenerator[bytes]:
        size = 0
        async with contextlib.aclosing(whole(chunk_size)) as parts:
            async for part in parts:
                size += len(part)
                if size > bound:
                    # What the SDK takes for an answer that cannot be read.
                    raise httpx2.StreamError(f"its message has more than the {bound} bytes that are read")
                yield part

    response.aiter_bytes = bounded
