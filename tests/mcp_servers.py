"""MCP servers to be mounted by tests, and what is left of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mcp
import mcp.types
from mcp.server import MCPServer, Server
from mcp.server.mcpserver import Image
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel

PROGRAMS = Path(sys.executable).parent
FAKE = Path(__file__).with_name("mcp_fake.py")


class Place(BaseModel):
    name: str
    height: float | None = None


def make_shop() -> MCPServer:
    """A server of this process."""
    server = MCPServer("shop", instructions="A shop of fruit.")

    @server.tool()
    def price(article: str, currency: str = "CHF") -> float:  # pyright: ignore[reportUnusedFunction]
        """The price of an article."""
        if article == "plum":
            raise ToolError("no plums today")
        return {"CHF": 0.5, "EUR": 0.6}[currency]

    @server.tool()
    def place(name: str) -> Place:  # pyright: ignore[reportUnusedFunction]
        return Place(name=name, height=1.5)

    @server.tool()
    def picture() -> Image:  # pyright: ignore[reportUnusedFunction]
        return Image(data=b"\x89PNG\0", format="png")

    @server.tool(structured_output=False)
    def much(size: int) -> str:  # pyright: ignore[reportUnusedFunction]
        return "x" * size

    @server.tool(structured_output=False)
    def words(count: int = 1) -> list[str]:  # pyright: ignore[reportUnusedFunction]
        return ["one", "two", "three"][:count]

    return server


def stdio(program: str, *args: str, **more: Any) -> mcp.StdioServerParameters:
    return mcp.StdioServerParameters(command=str(PROGRAMS / program), args=list(args), **more)


def fake(*args: str) -> mcp.StdioServerParameters:
    return stdio("python", "-I", "-S", str(FAKE), *args)


def listing(*tools: mcp.types.Tool, answer: Any = None) -> Server[Any]:
    """A server that lists these tools, and answers any call with the arguments that it got, as text."""

    async def listed(*_args: Any) -> mcp.types.ListToolsResult:
        return mcp.types.ListToolsResult(tools=list(tools))

    async def called(_context: Any, params: mcp.types.CallToolRequestParams) -> mcp.types.CallToolResult:
        if answer is not None:
            return answer
        text = f"{params.name!r} {params.arguments!r}"
        return mcp.types.CallToolResult(content=[mcp.types.TextContent(text=text)])

    return Server("listing", on_list_tools=listed, on_call_tool=called)


def tool(name: str, schema: dict[str, Any] | None = None, **more: Any) -> mcp.types.Tool:
    return mcp.types.Tool(name=name, input_schema={"type": "object", **(schema or {})}, **more)


def ended(pid: int) -> bool:
    """Whether there is no such process, or nothing left of it but its number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def pids_in(folder: Path) -> list[int]:
    """The processes of a server that is "deaf", once it has told them."""
    place = folder / "pids"
    return [int(pid) for pid in place.read_text(encoding="utf-8").split()] if place.exists() else []
