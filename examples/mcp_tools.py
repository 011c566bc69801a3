"""Tools of MCP servers, called by code in the sandbox as Python functions.

The servers run here, outside; the session has no network and sees none of this program's files. One is a command from
PyPI, the other an object of this program's. Run it with `.venv/bin/python examples/mcp_tools.py`; it keeps its
workspace in a temporary folder.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

from mcp import StdioServerParameters
from mcp.server import MCPServer

from actbox import Deny, FunctionCall, execution_environment

CLOCK = StdioServerParameters(command=sys.executable, args=["-m", "mcp_server_time", "--local-timezone", "UTC"])
OPEN = range(8, 18)
OFFICE = MCPServer("office", instructions="Meetings of the office.")


@OFFICE.tool()
def book(hour: int, room: str = "small") -> str:
    """Book a room for an hour of the day, 0 to 23."""
    return f"the {room} room is booked at {hour}:00"


def ask(call: FunctionCall) -> bool | Deny:
    """Decide a call, as a person would who is shown it."""
    return call.arguments["hour"] in OPEN or Deny("the office is closed then")


CELLS = {
    "what there is": """
        import inspect
        from mcptools import clock, office
        print(*clock.__all__, f"book{inspect.signature(office.book)}")
    """,
    "a loop of calls, and data to go on with": """
        answers = {zone: clock.convert_time("Europe/Zurich", "09:00", zone) for zone in ("Asia/Tokyo", "Asia/Kolkata")}
        print({zone: answer["target"]["datetime"][11:16] for zone, answer in answers.items()})
    """,
    "an error of the server's": """
        import mcptools
        try:
            clock.get_current_time("Nowhere")
        except mcptools.ToolError as error:
            print(error)
    """,
    "a wrong type never arrives": """
        try:
            office.book("nine")
        except TypeError as error:
            print(error)
    """,
    "approved": """
        print(office.book(9, room="large"))
    """,
    "denied": """
        try:
            office.book(22)
        except RuntimeError as error:
            print(error)
    """,
}


async def main() -> None:
    """Mount the servers and run the cells."""
    with tempfile.TemporaryDirectory() as folder:
        async with execution_environment(env_vars={}, workspace_path=folder, log_file=None) as environment:
            executor = environment.executor
            await executor.mount_mcp("clock", CLOCK)
            await executor.mount_mcp("office", OFFICE, approve=ask)
            for title, cell in CELLS.items():
                result = await executor.execute(cell)
                print(f"{title}: {result.text}")


if __name__ == "__main__":
    asyncio.run(main())
