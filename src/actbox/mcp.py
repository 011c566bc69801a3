"""Tools of MCP servers, as functions of the host that a session finds in a module of their own.

The server runs here, or elsewhere by HTTP; the session never speaks to it. A call is one of a host's function, with the
same approval and budgets; its arguments are checked against the tool's schema before the server sees them. What a
server says of itself is data too: see `schemas`.

The official SDK speaks the protocol. Here alone it is imported, and only when a server is mounted.
"""

from __future__ import annotations

import asyncio
import base64
import builtins
import contextlib
import importlib
import json
import keyword
import logging
import os
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from actbox import schemas
from actbox.errors import InvalidArgument, McpServerError, McpServerTimeout
from actbox.execution import check_timeout
from actbox.callee import Approve, ToolError, has_bytes, not_returned
from actbox.calls import Registry
from actbox.functions import HostFunctions
from actbox.guest import values as guest_values
from actbox.schemas import Unusable
from actbox.shielded import finish, in_thread
from actbox.values import Unsupported

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

logger = logging.getLogger(__name__)

_MAX_TOOLS = 256
_MAX_PAGES = 100
# Characters: of one description, of a server's own words, and of all that one server may say of its tools.
_MAX_DOC = 8 << 10
_MAX_TOLD = 1 << 20
# Of a tool's name: the name of a call has a bound of its own.
_MAX_NAME = 128
# The SDK lets a server that does not end by itself have about six seconds.
_CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class McpMount:
    """A mounted server.

    `tools` are the names of its tools by their names inside, and `left_out` says of the others why they are not there.
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
        ends the server. A server of the same name is replaced once the new one has answered, and is ended then.

        Args:
            name: of the module inside, an identifier.
            server: what `mcp.Client` takes: the URL of a server (streamable HTTP), `mcp.StdioServerParameters` (a
                command, which is started with a few variables of this environment, and whose errors are not shown), a
                transport of the SDK's, or a server object of this process.
            approve: decides each call, see `functions`; `FunctionCall.arguments` are by the server's own names.
            timeout: seconds that the start may take, and afterwards each call.

        Raises:
            InvalidArgument: the name cannot be used, `server` is nothing that the SDK takes, or the SDK is missing.
            McpServerError: the server cannot be started or reached, ended at once, or has no tool that can be used.
            McpServerTimeout: it did not answer in time.
            StateError: not connected.
        """
        if not isinstance(name, str) or not name.isidentifier() or not name.isascii() or len(name) > _MAX_NAME // 2:
            raise InvalidArgument("name", name, f"pass an identifier of at most {_MAX_NAME // 2} ASCII characters")
        if keyword.iskeyword(name) or name.startswith("_") or name == "ToolError":
            raise InvalidArgument("name", name, "pass a name that a module can have")
        check_timeout(timeout)
        self.check_connected()
        registry = self._registry = self._registry or Registry()
        made = _Server(name, server, timeout)
        listing = await made.start()
        try:
            self.check_connected()
            tools, left_out = await in_thread(_make_tools, made, listing, approve)
            if not tools:
                why = "; ".join(f"{tool}: {reason}" for tool, reason in list(left_out.items())[:3])
                raise McpServerError(name, f"it has no tool that can be used. {why}".strip())
        except BaseException:
            await finish(made.close())
            raise
        for tool, reason in left_out.items():
            logger.warning("the tool %s of the MCP server %s is left out: %s", ascii(tool), name, reason)
        before = registry.servers.get(name)
        registry.servers[name] = made
        registry.replace(name, tools)
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


# -- a server --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Listing:
    """What a server says of itself."""

    instructions: str
    tools: list[Any]


class _Server:
    """A connection to one server.

    State: `_task`, which opens and closes the connection, as the SDK wants both in one task; `_client`, the SDK's,
    while calls can be made; `_closing`.
    """

    def __init__(self, name: str, server: object, timeout: float) -> None:
        self.name = name
        self._server = server
        self._timeout = timeout
        self._client: Any = None
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> _Listing:
        """Connect, and ask for the tools. Raises as `mount_mcp`; then nothing is left of it."""
        try:
            sdk: Any = importlib.import_module("mcp")
        except ImportError as exc:
            raise InvalidArgument("server", self._server, "install the SDK: pip install 'actbox[mcp]'") from exc
        started: asyncio.Future[_Listing] = asyncio.get_running_loop().create_future()
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

    async def _run(self, sdk: Any, started: asyncio.Future[_Listing]) -> None:
        try:
            async with _connected(sdk, self._server) as client:
                listing = await _list(client)
                self._client = client
                if not started.done():
                    started.set_result(listing)
                await self._closing.wait()
        except Exception as exc:  # a transport may raise anything
            logger.debug("the MCP server %s has failed", self.name, exc_info=exc)
            if not started.done():
                started.set_exception(_as_ours(self.name, self._server, exc))
        finally:
            self._client = None
            started.cancel()

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
            if getattr(exc, "code", None) == importlib.import_module("mcp.types").CONNECTION_CLOSED:
                raise builtins.ConnectionError(f"the MCP server {self.name} has ended") from exc
            raise ToolError(str(exc)) from exc

    async def close(self) -> None:
        """Disconnect, and end what was started; may be called again."""
        task = self._task
        self._closing.set()
        if task is None or task.done():
            return
        if self._client is None:
            task.cancel()
        _, late = await asyncio.wait([task], timeout=_CLOSE_SECONDS)
        if late:
            task.cancel()
            await asyncio.wait([task], timeout=_CLOSE_SECONDS)


@contextlib.asynccontextmanager
async def _connected(sdk: Any, server: Any) -> AsyncGenerator[Any]:
    """The SDK's client. What a command writes of its errors is for nobody."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:  # noqa: ASYNC230 - no disk is waited for
        if isinstance(server, sdk.StdioServerParameters):
            server = sdk.stdio_client(server, errlog=nowhere)
        async with sdk.Client(server, cache=None) as client:
            yield client


async def _list(client: Any) -> _Listing:
    tools: list[Any] = []
    cursor: str | None = None
    for _ in range(_MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if not cursor:
            break
        if len(tools) > _MAX_TOOLS:
            break
    return _Listing(client.instructions or "", tools)


def _as_ours(name: str, server: object, exc: BaseException) -> Exception:
    """What went wrong at the start, of a group the first that says something."""
    while isinstance(exc, BaseExceptionGroup):
        exc = cast("BaseExceptionGroup[BaseException]", exc).exceptions[0]
    if isinstance(exc, TypeError | AttributeError) and not isinstance(server, str):
        kind = type(server).__name__
        return InvalidArgument("server", kind, "pass a URL, mcp.StdioServerParameters, or what else mcp.Client takes")
    return McpServerError(name, f"{type(exc).__name__}: {exc}"[:1000])


# -- its tools -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Arguments:
    """A tool's arguments, by the server's names."""

    arguments: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.arguments,)

    @property
    def kwargs(self) -> dict[str, Any]:
        return {}


class _Tool:
    """One tool, as a function that a session may call. `title` is what the server calls it, `size` what it has said."""

    def __init__(self, server: _Server, tool: Any, name: str, doc: str, approve: Approve | None) -> None:
        self.name = f"mcptools.{server.name}.{name}"
        self.title: str = tool.name
        self.module: tuple[str, str] | None = (server.name, doc)
        self.approve = approve
        self._server = server
        self._checker = schemas.Checker(tool.input_schema)
        self._read = schemas.read(tool.input_schema)
        self.size = self._checker.size
        self._wrapped = _is_wrapped(tool.output_schema)
        self.told: dict[str, Any] = {
            "name": self.name,
            "as": name,
            "module": f"mcptools.{server.name}",
            "doc": _doc(tool, name, self._read),
            "parameters": self._read.told,
            "returns": _returns(tool.output_schema, wrapped=self._wrapped),
        }
        self.size += len(json.dumps(self.told))

    def bind(self, args: list[Any], kwargs: dict[str, Any]) -> _Arguments:
        """See `Callee`."""
        bound = self._read.signature.bind(*args, **kwargs)
        arguments: dict[str, Any] = {}
        for parameter, value in bound.arguments.items():
            if self._read.signature.parameters[parameter].kind is bound.signature.parameters[parameter].VAR_KEYWORD:
                arguments = {**value, **arguments}
            else:
                arguments[self._read.names[parameter]] = value
        return self.rebind(arguments)

    def rebind(self, arguments: Mapping[str, Any]) -> _Arguments:
        """See `Callee`. An optional argument that is None is left out, unless the schema has a place for it."""
        given = dict(arguments)
        if has_bytes(given):
            raise TypeError("a server takes JSON, which has no bytes; encode them, by base64 for example")
        if None in given.values():
            for name in self._checker.refused_nulls(given) - self._read.required:
                del given[name]
        self._checker.check(given)
        return _Arguments(given)

    async def call(self, arguments: dict[str, Any]) -> Any:
        """Have the server do it. Raises what the session is told."""
        result = await self._server.call(self.title, arguments)
        contents = [_content(block) for block in result.content]
        if result.is_error:
            texts = [content for content in contents if type(content) is str]
            raise ToolError("\n".join(texts) or "the tool failed and does not say why")
        if result.structured_content is not None:
            data: Any = result.structured_content
            match data:
                case {"result": inner, **more} if self._wrapped and not more:
                    data = inner
                case _:
                    pass
            others = [content for content in contents if type(content) is not str]
            return {"structured": data, "content": others} if others else data
        return contents[0] if len(contents) == 1 else contents or None

    def pack(self, result: Any) -> bytes:
        """See `Callee`."""
        try:
            encoded = guest_values.to_json(result)
            return guest_values.prefix(encoded.header) + encoded.data
        except (Unsupported, ValueError, RecursionError) as exc:
            raise not_returned(self.name, str(exc)) from None


def _make_tools(server: _Server, listing: _Listing, approve: Approve | None) -> tuple[list[_Tool], dict[str, str]]:
    """The tools that can be used, and why others cannot."""
    by_name: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for tool in listing.tools:
        shown = schemas.legible(tool.name)[:_MAX_NAME]
        if len(tool.name) > _MAX_NAME:
            left_out[shown] = f"its name has more than {_MAX_NAME} characters"
        elif tool.name in by_name:
            left_out[shown] = "another tool has the same name"
        elif len(by_name) >= _MAX_TOOLS:
            left_out[f"all after {shown}"] = f"there are more than {_MAX_TOOLS}"
            break
        else:
            by_name[tool.name] = tool
    doc = schemas.legible(listing.instructions)[:_MAX_DOC] or f"Tools of the MCP server {server.name}."
    made: list[_Tool] = []
    told = 0
    for name, inside in schemas.identifiers(by_name).items():
        try:
            tool = _Tool(server, by_name[name], inside, doc, approve)
            told += tool.size
            if told > _MAX_TOLD:
                raise Unusable("the server has said too much already")
            made.append(tool)
        except Unusable as exc:
            left_out[schemas.legible(name)] = schemas.legible(str(exc))
    return made, left_out


def _doc(tool: Any, name: str, read: schemas.Read) -> str:
    parts = [schemas.legible(tool.description or tool.title or "").strip()[:_MAX_DOC]]
    if tool.name != name:
        parts.append(f"The server calls it {tool.name!a}.")
    if read.notes:
        notes = (f"    {parameter}: {' '.join(note.split())}" for parameter, note in read.notes)
        parts.append("\n".join(("Args:", *notes))[:_MAX_DOC])
    return "\n\n".join(part for part in parts if part)


def _is_wrapped(schema: Any) -> bool:
    """Whether results are objects because they have to be: SDKs make `{"result": ...}` of what is none."""
    match schema:
        case {"properties": {"result": _, **others}, "required": ["result"]} if not others:
            return True
        case _:
            return False


def _returns(schema: Any, *, wrapped: bool) -> str | None:
    if type(schema) is not dict:
        return None
    root = cast("dict[str, Any]", schema)
    return schemas.annotation(root["properties"]["result"] if wrapped else root, root)


def _content(block: Any) -> Any:
    """A part of a result: text as text, what is binary as bytes beside its type."""
    match block.type:
        case "text":
            return block.text
        case "image" | "audio":
            return {"type": block.type, "mime_type": block.mime_type, "data": _decoded(block.data)}
        case "resource":
            resource = block.resource
            told = {"type": "resource", "uri": str(resource.uri), "mime_type": resource.mime_type}
            blob = getattr(resource, "blob", None)
            return {**told, "text": resource.text} if blob is None else {**told, "data": _decoded(blob)}
        case "resource_link":
            return {"type": "resource_link", "uri": str(block.uri), "name": block.name, "mime_type": block.mime_type}
        case _:
            raise ToolError("the server has sent content of an unknown type")


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ToolError("the server has sent data that is no base64") from None
