"""One MCP server: the connection to it, what it says of itself, and calls of its tools.

The official SDK speaks the protocol. It is imported here, in `mcp_stdio` and in `mcp_http` alone, when a server is
mounted.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import importlib
import logging
from typing import TYPE_CHECKING, Any, cast

from actbox.callee import ToolError
from actbox.errors import InvalidArgument, McpServerError, McpServerTimeout
from actbox.mcp_tools import MAX_TOOLS, Listing
from actbox.shielded import finish

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

logger = logging.getLogger(__name__)

_MAX_PAGES = 100
_MAX_REASON = 1000
# A server that does not end by itself has about six seconds until it is killed, and its children two more.
_CLOSE_SECONDS = 10.0
_CHANGED = "notifications/tools/list_changed"
# How often a stream of changes that has broken is asked for again.
_LISTEN_SECONDS = 5.0
# After its tools were read anew a server has to wait so many times as long as that took.
_REST = 4
# The SDK's words for a connection that is no more, or has brought no answer. The code alone servers use for their own.
_ENDED = ("Connection closed", "SSE stream ended")


class McpServer:
    """A connection to one server.

    State: `_task`, which opens and closes the connection, as the SDK wants both in one task; `_client`, the SDK's,
    while calls can be made; `_transport`, the command's, if it is one; `_closing`; `_changed`, set when the server has
    other tools than were read, and `_settled`, when it has not; `_follower`, the task that reads them anew.

    Args:
        server: what `mount_mcp` was given.
        timeout: seconds for the start, and for each call.
        bound: bytes that a message of the server's may have now.
    """

    def __init__(self, name: str, server: object, timeout: float, bound: Callable[[], int]) -> None:
        self.name = name
        self._server = server
        self._timeout = timeout
        self._bound = bound
        self._client: Any = None
        self._transport: Any = None
        self._closing = asyncio.Event()
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._task: asyncio.Task[None] | None = None
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> Listing:
        """Connect, and ask for the tools. Raises as `mount_mcp`; then nothing is left of it."""
        try:
            sdk: Any = importlib.import_module("mcp")
        except ImportError as exc:
            raise InvalidArgument("server", self._server, "install the SDK: pip install 'actbox[mcp]'") from exc
        started: asyncio.Future[Listing] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(sdk, started))
        try:
            async with asyncio.timeout(self._timeout):
                return await started
        except TimeoutError:
            await finish(self.close())
            raise McpServerTimeout(self.name, self._timeout) from None
        except BaseException:
            await finish(self.close())
            raise

    async def _run(self, sdk: Any, started: asyncio.Future[Listing]) -> None:
        try:
            async with self._connected(sdk) as client:
                listing = await _list(client)
                self._client = client
                if not started.done():
                    started.set_result(listing)
                await self._closing.wait()
        except Exception as exc:  # a transport may raise anything
            logger.debug("the MCP server %s has failed", self.name, exc_info=exc)
            if not started.done():
                started.set_exception(self._as_ours(exc))
        finally:
            self._client = None
            started.cancel()

    @contextlib.asynccontextmanager
    async def _connected(self, sdk: Any) -> AsyncGenerator[Any]:
        """The SDK's client."""
        server: Any = self._server
        if isinstance(server, sdk.StdioServerParameters):
            stdio: Any = importlib.import_module("actbox.mcp_stdio")
            server = self._transport = stdio.StdioServer(server, self._bound)
        elif isinstance(server, str):
            http: Any = importlib.import_module("actbox.mcp_http")
            server = http.connected(server, self._bound)
        async with sdk.Client(server, cache=None, message_handler=self._note) as client:
            # It would apply the server's own schemas in this event loop; `Tool` does, elsewhere and within a bound.
            client.session.validate_tool_result = _leave_unchecked
            yield client

    def _as_ours(self, exc: BaseException) -> Exception:
        """What went wrong at the start, of a group the first that says something."""
        while isinstance(exc, BaseExceptionGroup):
            exc = cast("BaseExceptionGroup[BaseException]", exc).exceptions[0]
        if (
            self._transport is None
            and isinstance(exc, TypeError | AttributeError)
            and not isinstance(self._server, str)
        ):
            kind = type(self._server).__name__
            remedy = "pass a URL, mcp.StdioServerParameters, or what else mcp.Client takes"
            return InvalidArgument("server", kind, remedy)
        reason = f"{type(exc).__name__}: {exc}"
        if self._transport is not None and self._transport.words:
            reason = f"{reason[: _MAX_REASON // 2]}. It has said: {self._transport.words[-_MAX_REASON // 2 :]}"
        return McpServerError(self.name, reason[:_MAX_REASON])

    async def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """The SDK's result of a call. Raises what the session is told."""
        if self._client is None:
            raise builtins.ConnectionError(f"the MCP server {self.name} has ended")
        try:
            async with asyncio.timeout(self._timeout):
                return await self._client.call_tool(tool, arguments)
        except TimeoutError:
            raise TimeoutError(f"the MCP server {self.name} did not answer within {self._timeout:g} s") from None
        except Exception as exc:
            closed = importlib.import_module("mcp.types").CONNECTION_CLOSED
            if getattr(exc, "code", None) == closed and str(exc).startswith(_ENDED):
                raise builtins.ConnectionError(f"the MCP server {self.name} has ended") from exc
            raise ToolError(str(exc)) from exc

    async def close(self) -> None:
        """Disconnect, and end what was started; may be called again."""
        self._closing.set()
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait([self._follower])
        task = self._task
        if task is None or task.done():
            return
        if self._client is None:
            task.cancel()
        _, late = await asyncio.wait([task], timeout=_CLOSE_SECONDS)
        if late:
            task.cancel()
            await asyncio.wait([task], timeout=_CLOSE_SECONDS)

    # -- tools that change ---------------------------------------------------------------------------------------

    def follow(self, take: Callable[[Listing], Awaitable[None]]) -> None:
        """From now on read the tools anew when the server says that they have changed, and hand them over."""
        self._follower = asyncio.create_task(self._follow(take))

    async def settle(self) -> None:
        """Wait until the tools are those that the server has last spoken of; without a bound."""
        await self._settled.wait()

    async def _note(self, message: Any) -> None:
        if getattr(message, "method", None) == _CHANGED:
            self._note_change()

    def _note_change(self) -> None:
        if not self._closing.is_set():
            self._changed.set()
            self._settled.clear()

    async def _follow(self, take: Callable[[Listing], Awaitable[None]]) -> None:
        loop = asyncio.get_running_loop()
        listener = asyncio.create_task(self._listen())
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                began = loop.time()
                try:
                    async with asyncio.timeout(self._timeout):
                        listing = await _list(self._client)
                    await take(listing)
                except Exception as exc:  # noqa: BLE001 - the SDK's, of any kind
                    logger.warning("the tools of the MCP server %s could not be read anew: %r", self.name, exc)
                if not self._changed.is_set():
                    self._settled.set()
                await asyncio.sleep(_REST * (loop.time() - began))
        finally:
            self._settled.set()
            listener.cancel()
            await asyncio.wait([listener])

    async def _listen(self) -> None:
        """Hear of changes from servers that tell them on request alone, as those of the protocol of 2026 do."""
        client = self._client
        capabilities = getattr(client, "server_capabilities", None)
        if capabilities is None or capabilities.tools is None or not capabilities.tools.list_changed:
            return
        lost: Any = importlib.import_module("mcp.client.subscriptions").SubscriptionLost
        while not self._closing.is_set():
            try:
                async with client.listen(tools_list_changed=True) as changes:
                    async for _ in changes:
                        self._note_change()
            except lost:
                pass
            except Exception as exc:  # noqa: BLE001 - it cannot be listened to, or is gone
                logger.debug("changes of the MCP server %s cannot be heard of: %r", self.name, exc)
                return
            await asyncio.sleep(_LISTEN_SECONDS)
            self._note_change()


async def _leave_unchecked(_name: str, _result: Any) -> None:
    pass


async def _list(client: Any) -> Listing:
    if client is None:
        raise builtins.ConnectionError("it has ended")
    tools: list[Any] = []
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if not cursor:
            break
        if len(tools) > MAX_TOOLS:
            break
    return Listing(client.instructions or "", tools)
