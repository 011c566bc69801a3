"""MCP servers that are hostile: whatever they say is data, and bounded."""

from __future__ import annotations

import asyncio
from typing import Any

import mcp
import mcp.types
import pytest
from mcp_servers import ended, fake, listing, tool
from talking import error_of, text_of, until

from actbox import (
    CallLimits,
    CodeExecutor,
    mcp_stdio,
    mcp_tools,
    schemas,
)

pytestmark = pytest.mark.anyio


async def test_an_answer_that_is_too_long_fails_its_call_alone(
    executor: CodeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    await executor.mount_mcp("fake", fake("plain"), timeout=1)
    await executor.execute("from mcptools import fake; pid = fake.pid()")
    for name in ("huge", "huge_last"):
        told = await error_of(executor, f"fake.{name}()")
        assert told.startswith("ToolError: its message has 62")
        assert told.endswith(" bytes, more than the 4194304 that are read")
    assert (await error_of(executor, "fake.huge_lost()")).startswith("TimeoutError: ")
    executor.functions(limits=CallLimits(bytes=8 << 20))
    assert await text_of(executor, "print(len(fake.huge()), fake.pid() == pid)") == f"{6 << 20} True"
    monkeypatch.setattr(mcp_stdio, "_MAX_SKIPPED", 40 << 20)
    server = int(await text_of(executor, "print(pid)") or "")
    assert await error_of(executor, "fake.endless()") == "ConnectionError: the MCP server fake has ended"
    await until(lambda: ended(server))


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_lines_are_kept_up_to_their_bound(step: int) -> None:
    long = b'{"jsonrpc":"2.0","id":12,"result":"' + b"x" * 5000 + b'"}'
    other = b'{"result":"' + b"x" * 5000 + b'", "jsonrpc": "2.0", "id": 13 }'
    data = b"first\n" + b"y" * 4096 + b"\n\n" + long + b"\n" + other + b"\n" + b"z" * 5000 + b"\nlast\nrest"
    lines = mcp_stdio.Lines(lambda: 4096)
    made = [line for start in range(0, len(data), step) for line in lines.feed(data[start : start + step])]
    assert len(lines._held) == lines.size == 4
    shown = [(line.size, line.answered) if isinstance(line, mcp_stdio.TooLong) else line for line in made]
    assert shown == [b"first", b"y" * 4096, b"", (len(long), 12), (len(other), 13), (5000, None), b"last"]


async def test_a_server_that_prints_and_asks_without_end_is_used_all_the_same(executor: CodeExecutor) -> None:
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, len(asyncio.all_tasks()))
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    try:
        await executor.mount_mcp("rude", fake("rude"))
        assert int((await text_of(executor, "import mcptools.rude; print(mcptools.rude.pid())")) or "") > 0
    finally:
        watching.cancel()
    assert most < 300


async def test_a_servers_own_schema_of_its_answers_holds_nobody_up(executor: CodeExecutor) -> None:
    output: dict[str, Any] = {
        "type": "object",
        "properties": {"text": {"type": "string", "pattern": "^(a+)+$"}, "number": {"type": "integer"}},
    }
    content: list[mcp.types.ContentBlock] = [mcp.types.TextContent(text="x")]
    evil = mcp.types.CallToolResult(content=content, structured_content={"text": "a" * 60 + "b"})
    await executor.mount_mcp("evil", listing(tool("f", output_schema=output), answer=evil))
    assert await text_of(executor, "import mcptools.evil; print(len(mcptools.evil.f()['text']))") == "61"
    wrong = mcp.types.CallToolResult(content=content, structured_content={"number": "7"})
    await executor.mount_mcp("wrong", listing(tool("f", output_schema=output), answer=wrong))
    told = await error_of(executor, "import mcptools.wrong; mcptools.wrong.f()")
    assert told.startswith(
        "ToolError: what the server has sent does not fit its own schema: number: '7' is not of type"
    )


async def test_schemas_that_take_long_to_read_cost_no_more_than_their_time(
    executor: CodeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcp_tools, "_MAX_SECONDS", 0.05)
    dear: dict[str, Any] = {"allOf": [{} for _ in range(1000)]}
    mount = await executor.mount_mcp("dear", listing(*(tool(f"t{number}", dear) for number in range(100))))
    assert 0 < len(mount.tools) < 100
    assert set(mount.left_out.values()) == {"those before took too long to read"}


CODE = "'''\"\"\"\n__import__('os').system('touch owned')\n{0.__class__}\x1b[2J\r\u202e"


async def test_names_become_identifiers_and_texts_stay_texts(executor: CodeExecutor) -> None:
    names = [
        "__import__",
        "import",
        "a b",
        "a_b",
        "a-b",
        "__class__",
        "1st",
        "",
        "ﬁne",
        "os.system('x')",
        "ToolError",
        "é",
    ]
    properties = {name: {"type": "string", "description": CODE, "default": CODE} for name in names}
    tools = [tool(name, {"properties": properties}, description=CODE, title=CODE) for name in names]
    mount = await executor.mount_mcp("hostile", listing(*tools, tool("a b", description="again")))
    assert sorted(mount.tools.values()) == sorted(names)
    assert mount.left_out == {"a b": "another tool has the same name"}
    assert all(name.isidentifier() and not name.startswith("_") for name in mount.tools)
    assert {"a_b", "class", "n1st", "ToolError", "é"} <= {name.rstrip("_") for name in mount.tools}
    for inside, name in mount.tools.items():
        code = f"from mcptools import hostile as h; f = h.{inside}; import inspect\n"
        code += "print(f(**{name: 'v' for name in inspect.signature(f).parameters}))"
        assert await text_of(executor, code) == f"{name!r} {dict.fromkeys(names, 'v')!r}"
    shown = await text_of(executor, "help(h)")
    assert shown is not None
    assert "\x1b" not in shown
    assert "__import__('os').system" in shown
    assert await text_of(executor, "import os; print(os.path.exists('owned'), h.__name__)") == "False mcptools.hostile"


async def test_schemas_beyond_the_bounds_are_left_out(executor: CodeExecutor) -> None:
    endless = {"properties": {"x": {"$ref": "#/properties/x"}}}
    doubling = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
    mount = await executor.mount_mcp(
        "hostile",
        listing(
            tool("huge", {"description": "x" * schemas.MAX_SCHEMA}),
            tool("many", {"properties": {f"p{n}": {} for n in range(schemas.MAX_PARAMETERS + 1)}}),
            tool("none", {"properties": {"x": {"type": "nonsense"}}}),
            tool("n" * 1000),
            tool("dialect", {"properties": {"x": {"$schema": "http://json-schema.org/draft-07/schema#"}}}),
            tool("endless", endless),
            tool("doubling", {"properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": {**doubling, "a40": {}}}),
            tool("slow", {"properties": {"x": {"pattern": "^(a+)+$"}}}),
            tool("nowhere", {"properties": {"x": {"$ref": "http://127.0.0.1:1/schema"}}}),
            tool("long", description="d" * 100_000),
            *(tool(f"t{n}") for n in range(300)),
        ),
    )
    assert {"endless", "doubling", "slow", "nowhere", "long"} <= mount.tools.keys()
    assert len(mount.tools) + 4 <= 256
    assert {"huge", "many", "none", "dialect"} <= mount.left_out.keys()
    await executor.execute("import mcptools.hostile as h")
    for name in ("endless", "doubling", "nowhere"):
        assert "cannot be applied" in await error_of(executor, f"h.{name}(x=1)")
    assert await text_of(executor, "print(h.slow(x='a' * 40 + 'b') is not None, len(h.long.__doc__))") == "True 8192"
