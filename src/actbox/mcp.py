"""Tools of MCP servers, as functions of the host that a session finds in a module of their own.

The server runs here, or elsewhere by HTTP (`mcp_server`); the session never speaks to it. A call is one of a host's
function, with the same approval and budgets; its arguments are checked against the tool's schema before the server sees
them (`mcp_tools`). What a server says of itself is data too: see `schemas`.
"""

from __future__ import annotations

import asyncio
import keyword
import logging
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actbox.callee import check_approve
from actbox.calls import Registry
from actbox.errors import InvalidArgument, McpServerError
from actbox.execution import check_timeout
from actbox.functions import HostFunctions
from actbox.mcp_server import McpServer
from actbox.mcp_tools import MAX_NAME, Listing, make_tools
from actbox.shielded import finish, in_thread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actbox.callee import Approve

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class McpMount:
    """A mounted server.

    `tools` are the names of its tools by their names inside, and `left_out` says of the others why they are not there:
    as it was when it was mounted.
    """

    name: str
    tools: Mapping[str, str]
    left_out: Mapping[str, str]


class McpServers(HostFunctions):
    """The methods of `ExecutionClient` that mount MCP servers."""

    @abstractmethod
    def check_connected(self) -> None:
        """Raises `StateError` unless the client is connected."""

    async def mount_mcp(
        self, name: str, server: object, *, approve: Approve | None = None, timeout: float = 60
    ) -> McpMount:
        """Let the session's code call the tools of an MCP server: functions of the module `mcptools.NAME`.

        They are there from the next cell on and in whatever kernel runs it, until the client is disconnected, which
        ends the server. When the server says that it has other tools now, the next cell has these. A server of the same
        name is replaced once the new one has answered, and is ended then.

        Args:
            name: of the module inside, an identifier.
            server: what `mcp.Client` takes: the URL of a server (streamable HTTP), `mcp.StdioServerParameters` (a
                command, which is started with a few variables of this environment, and of whose errors no more is kept
                than a `McpServerError` tells), a transport of the SDK's, or a server object of this process.
            approve: decides each call, see `functions`; `FunctionCall.arguments` are by the server's own names.
            timeout: seconds that the start may take, and afterwards each call.

        Raises:
            InvalidArgument: the name or `approve` cannot be used, `server` is nothing that the SDK takes, or the SDK is
                missing.
            McpServerError: the server cannot be started or reached, ended at once, or has no tool that can be used.
            McpServerTimeout: it did not answer in time.
            StateError: not connected.
        """
        if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or len(name) > MAX_NAME // 2:
            raise InvalidArgument("name", name, f"pass an identifier of at most {MAX_NAME // 2} ASCII characters")
        if keyword.iskeyword(name) or name.startswith("_") or name == "ToolError":
            raise InvalidArgument("name", name, "pass a name that a module can have")
        check_approve(approve)
        check_timeout(timeout)
        self.check_connected()
        registry = self._registry = self._registry or Registry()
        made = McpServer(name, server, timeout, lambda: registry.max_message)
        listing = await made.start()
        try:
            tools, left_out = await in_thread(make_tools, made, listing, approve)
            # Whoever has disconnected meanwhile has not ended this one.
            self.check_connected()
            if not tools:
                why = "; ".join(f"{tool}: {reason}" for tool, reason in list(left_out.items())[:3])
                raise McpServerError(name, f"it has no tool that can be used. {why}".strip())
        except BaseException:
            await finish(made.close())
            raise
        _tell(name, left_out)
        before = registry.servers.get(name)
        registry.servers[name] = made
        registry.replace(name, tools)

        async def take(listing: Listing) -> None:
            tools, left_out = await in_thread(make_tools, made, listing, approve)
            if registry.servers.get(name) is made:
                _tell(name, left_out)
                registry.replace(name, tools)

        made.follow(take)
        if before is not None:
            await finish(before.close())
        return McpMount(name, {tool.told["as"]: tool.title for tool in tools}, left_out)

    async def unmount_mcp(self, name: str) -> None:
        """End a server; its module is gone from the next cell on.

        Raises:
            InvalidArgument: none of this name is mounted.
        """
        server = self._registry.servers.pop(name, None) if self._registry is not None else None
        if self._registry is None or server is None:
            raise InvalidArgument("name", name, "pass the name of a server that is mounted")
        self._registry.replace(name, ())
        await finish(server.close())

    async def close_servers(self) -> None:
        """End all of them, at once."""
        if self._registry is None:
            return
        servers = list(self._registry.servers.values())
        for server in servers:
            self._registry.replace(server.name, ())
        self._registry.servers.clear()
        await asyncio.gather(*(server.close() for server in servers))


def _tell(name: str, left_out: Mapping[str, str]) -> None:
    for tool, reason in left_out.items():
        logger.warning("the tool %s of the MCP server %s is left out: %s", ascii(tool), name, reason)
