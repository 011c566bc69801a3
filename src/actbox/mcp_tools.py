"""Tools of an MCP server as functions that a session may call: made of their schemas, checked, answered as data.

What a server says of its tools is data: names become identifiers, types words that are shown (see `schemas`). What it
answers is data too, and checked here, within a bound: the SDK's own check would hold up this process.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from actbox import schemas
from actbox.callee import ToolError, has_bytes, not_returned
from actbox.guest import values as guest_values
from actbox.schemas import Unusable
from actbox.shielded import in_thread
from actbox.values import Unsupported

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actbox.callee import Approve

logger = logging.getLogger(__name__)

MAX_TOOLS = 256
# Characters: of a tool's name (the name of a call has a bound of its own), of one description or of a server's own
# words, and of all that one server may say of its tools.
MAX_NAME = 128
_MAX_DOC = 8 << 10
_MAX_TOLD = 1 << 20
# Of a thread's own time, to read what a server says of its tools; schemas can be small and dear.
_MAX_SECONDS = 10.0


class Server(Protocol):
    """Where a tool's calls go."""

    name: str

    async def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """The SDK's result of a call. Raises what the session is told."""
        ...


@dataclass(frozen=True, slots=True)
class Listing:
    """What a server says of itself: `tools` as the SDK has read them."""

    instructions: str
    tools: list[Any]


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


class Tool:
    """One tool, as a function that a session may call. `title` is what the server calls it, `size` what it has said."""

    def __init__(self, server: Server, tool: Any, name: str, doc: str, approve: Approve | None) -> None:
        self.name = f"mcptools.{server.name}.{name}"
        self.title: str = tool.name
        self.module: tuple[str, str] | None = (server.name, doc)
        self.approve = approve
        self._server = server
        self._checker = schemas.Checker(tool.input_schema)
        self._read = schemas.read(tool.input_schema)
        self._answers = _answers(tool)
        self.size = self._checker.size + (self._answers.size if self._answers is not None else 0)
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
            if self._answers is not None:
                try:
                    await in_thread(self._answers.check, data)
                except TypeError as exc:
                    raise ToolError(f"what the server has sent does not fit its own schema: {exc}") from None
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


def make_tools(server: Server, listing: Listing, approve: Approve | None) -> tuple[list[Tool], dict[str, str]]:
    """The tools that can be used, and why others cannot."""
    by_name: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for tool in listing.tools:
        shown = schemas.legible(tool.name)[:MAX_NAME]
        if len(tool.name) > MAX_NAME:
            left_out[shown] = f"its name has more than {MAX_NAME} characters"
        elif tool.name in by_name:
            left_out[shown] = "another tool has the same name"
        elif len(by_name) >= MAX_TOOLS:
            left_out[f"all after {shown}"] = f"there are more than {MAX_TOOLS}"
            break
        else:
            by_name[tool.name] = tool
    doc = schemas.legible(listing.instructions)[:_MAX_DOC] or f"Tools of the MCP server {server.name}."
    made: list[Tool] = []
    told = 0
    until = time.thread_time() + _MAX_SECONDS
    for name, inside in schemas.identifiers(by_name).items():
        try:
            if told > _MAX_TOLD:
                raise Unusable("the server has said too much already")
            if time.thread_time() > until:
                raise Unusable("those before took too long to read")
            tool = Tool(server, by_name[name], inside, doc, approve)
            told += tool.size
            if told > _MAX_TOLD:
                raise Unusable("the server has said too much")
            made.append(tool)
        except Unusable as exc:
            left_out[schemas.legible(name)] = schemas.legible(str(exc))
    return made, left_out


def _answers(tool: Any) -> schemas.Checker | None:
    """What the tool says of its results; None if that is nothing, or cannot be applied, which costs nobody the tool."""
    if tool.output_schema is None:
        return None
    try:
        return schemas.Checker(tool.output_schema)
    except Unusable as exc:
        logger.debug("the results of the tool %s are not checked: %s", ascii(tool.name), exc)
        return None


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
