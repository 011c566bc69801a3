"""MCP servers: their tools are functions of a module inside, for as long as they are mounted."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import mcp
import mcp.types
import pytest
import uvicorn
from mcp.server import MCPServer, Server
from mcp.server.mcpserver import Context  # noqa: TC002 - read by the SDK at run time
from mcp_servers import ended, fake, listing, make_shop, pids_in, stdio, tool
from talking import SECONDS, error_of, text_of, until

from actbox import (
    Allow,
    CallLimits,
    CodeExecutionContainer,
    CodeExecutor,
    Deny,
    ExecutionError,
    FunctionCall,
    InvalidArgument,
    LimitExceeded,
    McpServerError,
    McpServerTimeout,
    StateError,
    StateRefused,
    calls,
    mcp_stdio,
    mcp_tools,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path


pytestmark = pytest.mark.anyio


@pytest.fixture
def short_graces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seconds for a server that does not end by itself, made short."""
    for name in ("_END_SECONDS", "_TERMINATE_SECONDS"):
        monkeypatch.setattr(mcp_stdio, name, 0.1)


# -- using tools -----------------------------------------------------------------------------------------------------


async def test_tools_are_functions_of_a_module_with_signatures_and_texts(executor: CodeExecutor) -> None:
    mount = await executor.mount_mcp("shop", make_shop())
    assert mount.tools == {name: name for name in ("price", "place", "picture", "much", "words")}
    assert mount.left_out == {}
    shown = await text_of(executor, "import mcptools.shop; help(mcptools.shop)")
    assert shown is not None
    assert "mcptools.shop - A shop of fruit." in shown
    assert "price(article: str, *, currency: str = 'CHF') -> float" in shown
    assert "The price of an article." in shown
    assert "words(*, count: int = 1)" in shown
    code = "from mcptools.shop import price\nprint(price('pear'), price(article='pear', currency='EUR'))"
    assert await text_of(executor, code) == "0.5 0.6"
    assert await text_of(executor, "print(await price.aio('pear'), price.__module__)") == "0.5 mcptools.shop"
    assert [variable.name for variable in await executor.variables()] == ["mcptools", "price"]


async def test_results_come_as_data_text_and_bytes(executor: CodeExecutor) -> None:
    await executor.mount_mcp("shop", make_shop())
    code = "from mcptools.shop import *\nprint(place('Rigi'), picture(), words(), words(count=2), words(count=0))"
    image = {"type": "image", "mime_type": "image/png", "data": b"\x89PNG\0"}
    assert await text_of(executor, code) == f"{{'name': 'Rigi', 'height': 1.5}} {image} one ['one', 'two'] None"
    content: list[mcp.types.ContentBlock] = [
        mcp.types.TextContent(text="seen"),
        mcp.types.AudioContent(data="AAE=", mime_type="audio/wav"),
        mcp.types.EmbeddedResource(
            resource=mcp.types.BlobResourceContents(uri="file:///b", blob="AAE=", mime_type="x/y")
        ),
        mcp.types.EmbeddedResource(resource=mcp.types.TextResourceContents(uri="file:///t", text="T")),
        mcp.types.ResourceLink(uri="file:///l", name="l"),
    ]
    answer = mcp.types.CallToolResult(content=content, structured_content={"a": [1]})
    await executor.mount_mcp("kinds", listing(tool("get"), answer=answer))
    await executor.execute("import mcptools.kinds; got = mcptools.kinds.get()")
    assert await executor.get("got") == {
        "structured": {"a": [1]},
        "content": [
            {"type": "audio", "mime_type": "audio/wav", "data": b"\0\1"},
            {"type": "resource", "uri": "file:///b", "mime_type": "x/y", "data": b"\0\1"},
            {"type": "resource", "uri": "file:///t", "mime_type": None, "text": "T"},
            {"type": "resource_link", "uri": "file:///l", "name": "l", "mime_type": None},
        ],
    }


async def test_arguments_are_checked_here_before_the_server_sees_them(executor: CodeExecutor) -> None:
    schema = {
        "properties": {
            "count": {"$ref": "#/$defs/count"},
            "mode": {"enum": ["a", "b"]},
            "note": {"type": "string"},
            "day": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["count"],
        "additionalProperties": False,
        "$defs": {"count": {"type": "integer", "minimum": 1}},
    }
    await executor.mount_mcp("strict", listing(tool("f", schema), tool("free", {"additionalProperties": True})))
    await executor.execute("from mcptools.strict import f, free")
    assert await text_of(executor, "print(f(1, note=None, day=None))") == "'f' {'count': 1, 'day': None}"
    assert await text_of(executor, "print(free(a=[1], b={'c': None}))") == "'free' {'a': [1], 'b': {'c': None}}"
    for wrong, why in {
        "f('1')": "count: '1' is not of type 'integer'",
        "f(0)": "count: 0 is less than the minimum of 1",
        "f(1, mode='c')": "mode: 'c' is not one of ['a', 'b']",
        "f(1, note=b'x')": "a server takes JSON, which has no bytes",
    }.items():
        assert (await error_of(executor, wrong)).startswith(f"TypeError: mcptools.strict.f(): {why}")
    for wrong in ("f()", "f(1, 'a')", "f(1, other=2)"):
        assert (await error_of(executor, wrong)).startswith("TypeError: ")
    assert (
        await error_of(executor, "f(object())")
        == "TypeError: mcptools.strict.f() takes JSON values and bytes, not object"
    )


async def test_a_tools_failure_is_an_exception_to_be_caught(executor: CodeExecutor) -> None:
    await executor.mount_mcp("shop", make_shop())
    code = (
        "import mcptools.shop, pickle\ntry: mcptools.shop.price('plum')\nexcept mcptools.ToolError as error:\n"
        "    print(isinstance(error, RuntimeError), 'no plums' in str(error), type(pickle.loads(pickle.dumps(error))))"
    )
    assert await text_of(executor, code) == "True True <class 'mcptools.ToolError'>"


async def test_calls_are_approved_counted_and_bounded_like_functions(executor: CodeExecutor) -> None:
    asked: list[FunctionCall] = []

    def ask(call: FunctionCall) -> bool | Allow | Deny:
        asked.append(call)
        match call.arguments["article"]:
            case "fig":
                return Deny("no figs")
            case "kiwi":
                return Allow({"article": "kiwi", "currency": 7})
            case _:
                return Allow({**call.arguments, "currency": "EUR"})

    executor.functions(limits=CallLimits(per_cell=3))
    await executor.mount_mcp("shop", make_shop(), approve=ask)
    execution = await executor.submit("from mcptools.shop import price; print(price('pear'))")
    assert (await execution.result(SECONDS)).text == "0.6"
    assert [(call.name, call.verdict) for call in execution.calls] == [("mcptools.shop.price", "returned")]
    assert asked == [FunctionCall("mcptools.shop.price", {"article": "pear"})]
    assert await error_of(executor, "price('fig')") == "CallRefused: mcptools.shop.price() was denied: no figs"
    assert "currency: 7 is not of type 'string'" in await error_of(executor, "price('kiwi')")
    with pytest.raises(LimitExceeded) as caught:
        await executor.execute("for _ in range(9): price('pear')", SECONDS)
    assert caught.value.limit == "calls_per_cell"


async def test_modules_are_there_in_a_fresh_kernel_and_follow_what_is_mounted(executor: CodeExecutor) -> None:
    await executor.mount_mcp("shop", make_shop())
    code = "import mcptools.shop as s; print(s.price('pear'))"
    assert await text_of(executor, code) == "0.5"
    with pytest.raises(ExecutionError):
        await executor.execute("import os; os.kill(os.getpid(), 9)", SECONDS)
    assert await text_of(executor, code) == "0.5"
    await executor.mount_mcp("shop", listing(tool("other")))
    assert await text_of(executor, "print(s.other(), hasattr(s, 'price'), s.__all__)") == "'other' {} False ['other']"
    await executor.unmount_mcp("shop")
    assert "ModuleNotFoundError" in await error_of(executor, "import mcptools.shop")
    with pytest.raises(InvalidArgument, match="that is mounted"):
        await executor.unmount_mcp("shop")


async def test_copies_of_a_session_call_the_same_server(executor: CodeExecutor) -> None:
    await executor.mount_mcp("fake", fake("plain"))
    await executor.execute("from mcptools.fake import pid")
    pid = await text_of(executor, "print(pid())")
    async with await executor.fork() as copy:
        assert await text_of(copy, "import mcptools.fake; print(pid(), mcptools.fake.pid())") == f"{pid} {pid}"
        await copy.mount_mcp("more", make_shop())
        assert await text_of(copy, "import mcptools.more; print(mcptools.more.price('pear'))") == "0.5"
    # The copy's end is not that of the server, and what it has mounted was its own.
    assert await text_of(executor, "print(pid())") == pid
    assert "ModuleNotFoundError" in await error_of(executor, "import mcptools.more")
    async with await executor.fork() as copy:
        await executor.unmount_mcp("fake")
        assert await error_of(copy, "pid()") == "ConnectionError: the MCP server fake has ended"


async def test_a_saved_session_finds_its_tools_where_they_are_mounted(
    executor: CodeExecutor,
    make_executor: Callable[[], contextlib.AbstractAsyncContextManager[CodeExecutor]],
    tmp_path: Path,
) -> None:
    await executor.mount_mcp("shop", make_shop())
    await executor.execute("from mcptools import shop\nfrom mcptools.shop import price\nkept = [price]")
    assert [variable.type for variable in await executor.variables()] == ["module", "function", "list"]
    assert (await executor.save(tmp_path / "state")).left_out == {}
    async with make_executor() as other:
        with pytest.raises(StateRefused, match="mcptools"):
            await other.restore(tmp_path / "state")
        await other.mount_mcp("shop", make_shop())
        await other.execute("1")
        await other.restore(tmp_path / "state")
        assert await text_of(other, "print(shop.price('pear'), kept[0]('pear'))") == "0.5 0.5"


# -- servers as people have them -------------------------------------------------------------------------------------


async def test_a_server_of_its_own_process_tells_the_time(executor: CodeExecutor) -> None:
    await executor.mount_mcp("clock", stdio("mcp-server-time", "--local-timezone", "UTC"))
    await executor.execute("from mcptools.clock import convert_time, get_current_time")
    code = "convert_time('Asia/Tokyo', '12:00', 'Asia/Kolkata')['target']['datetime'][11:16]"
    assert await text_of(executor, f"print({code})") == "08:30"
    assert "Invalid timezone" in await error_of(executor, "get_current_time('Nowhere/AtAll')")


async def test_a_server_reads_a_repository_that_the_session_cannot_see(executor: CodeExecutor, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in ("init -q -b trunk", "commit -q --allow-empty -m first"):
        await asyncio.to_thread(subprocess.run, [*git, *words.split()], check=True)
    await executor.mount_mcp("git", stdio("mcp-server-git", "--repository", str(tmp_path)))
    code = f"import os, mcptools.git as g\nprint(os.path.exists({str(tmp_path)!r}), g.git_log({str(tmp_path)!r}))"
    shown = await text_of(executor, code)
    assert shown is not None
    assert shown.startswith("False ")
    assert "first" in shown


@contextlib.asynccontextmanager
async def serving(server: MCPServer, **options: Any) -> AsyncGenerator[tuple[str, uvicorn.Server]]:
    """The server by HTTP: its URL."""
    config = uvicorn.Config(
        server.streamable_http_app(**options), port=0, log_level="critical", ws="none", timeout_graceful_shutdown=1
    )
    web = uvicorn.Server(config)
    task = asyncio.create_task(web.serve())
    try:
        await until(lambda: web.started)
        port = web.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/mcp", web
    finally:
        web.should_exit = True
        await task


async def test_a_server_by_http_may_not_say_too_much(executor: CodeExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_LEAST_MESSAGE", 1 << 16)
    executor.functions(limits=CallLimits(bytes=1 << 14))
    for plain in (True, False):  # a JSON document for an answer, and a stream of events
        async with serving(make_shop(), json_response=plain) as (url, _):
            await executor.mount_mcp("shop", url, timeout=SECONDS / 2)
            await executor.execute("from mcptools.shop import much, price")
            assert (await error_of(executor, "much(1 << 20)")).startswith("ToolError: ")
            assert "the result is more than 16384 bytes" in await error_of(executor, "much(20_000)")
            assert await text_of(executor, "print(price('pear'))") == "0.5"


async def test_a_server_by_http_and_its_end(executor: CodeExecutor) -> None:
    async with serving(make_shop()) as (url, _):
        await executor.mount_mcp("shop", url, timeout=SECONDS / 2)
        assert await text_of(executor, "from mcptools.shop import price; print(price('pear'))") == "0.5"
    code = "x = 1\ntry: price('pear')\nexcept (ConnectionError, RuntimeError) as e: print(type(e).__name__)"
    assert await text_of(executor, code) == "ConnectionError"
    assert await text_of(executor, "print(x)") == "1"


# -- servers whose tools change --------------------------------------------------------------------------------------


async def test_the_next_cell_has_the_tools_that_a_server_has_got_meanwhile(executor: CodeExecutor) -> None:
    await executor.mount_mcp("fake", fake("plain"))
    await executor.execute("from mcptools import fake; fake.grow(); fake.grow()")
    code = "print([name for name in fake.__all__ if name.startswith('grown')], fake.grown_10() == fake.pid())"
    assert await text_of(executor, code) == "['grown_10', 'grown_11'] True"


async def test_a_server_of_the_protocol_of_2026_tells_of_its_changes_too(executor: CodeExecutor) -> None:
    server = MCPServer("shop")

    @server.tool()
    async def change(context: Context[Any]) -> None:  # pyright: ignore[reportUnusedFunction]
        server.remove_tool("change")
        server.add_tool(lambda: 7, name="seven")
        await context.notify_tools_changed()

    def ask(call: FunctionCall) -> bool:
        return call.name.endswith("change")

    await executor.mount_mcp("shop", server, approve=ask)
    assert await text_of(executor, "import mcptools.shop as s; s.change()") is None
    assert await text_of(executor, "print(s.__all__)") == "['seven']"
    assert "was denied" in await error_of(executor, "s.seven()")
    execution = await executor.submit("s.change()")
    with pytest.raises(ExecutionError):
        await execution.result(SECONDS)
    await executor.unmount_mcp("shop")
    assert not [task for task in asyncio.all_tasks() if "McpServer" in repr(task)]


async def test_a_server_that_does_not_say_what_it_has_now_keeps_nobody_waiting(
    executor: CodeExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_SETTLE_SECONDS", 0.1)
    never = asyncio.Event()
    first = True

    async def listed(*_args: Any) -> mcp.types.ListToolsResult:
        nonlocal first
        if not first:
            await never.wait()
        first = False
        return mcp.types.ListToolsResult(tools=[tool("f")])

    mount = await executor.mount_mcp("slow", Server("slow", on_list_tools=listed))
    assert set(mount.tools) == {"f"}
    assert executor._registry is not None
    executor._registry.servers["slow"]._note_change()
    for _ in range(2):
        assert await text_of(executor, "import mcptools.slow; print(mcptools.slow.__all__)") == "['f']"


# -- servers that fail -----------------------------------------------------------------------------------------------


async def test_what_cannot_be_mounted_says_why(executor: CodeExecutor) -> None:
    for server in (stdio("no-such-program"), fake("gone"), "http://127.0.0.1:1/mcp", listing()):
        with pytest.raises(McpServerError) as caught:
            await executor.mount_mcp("bad", server, timeout=SECONDS)
        assert (caught.value.name, bool(caught.value.reason)) == ("bad", True)
    with pytest.raises(McpServerTimeout) as late:
        await executor.mount_mcp("bad", fake("silent"), timeout=0.5)
    assert isinstance(late.value, TimeoutError)
    for name in ("a b", "class", "_x", "", "é", "x" * 65, 7):
        with pytest.raises(InvalidArgument, match="name"):
            await executor.mount_mcp(name, make_shop())  # pyright: ignore[reportArgumentType]
    for server in (7, None, ["mcp-server-time"]):
        with pytest.raises(InvalidArgument, match="server"):
            await executor.mount_mcp("bad", server)
    with pytest.raises(InvalidArgument, match="approve"):
        await executor.mount_mcp("bad", make_shop(), approve=True)  # pyright: ignore[reportArgumentType]
    with pytest.raises(McpServerError, match="Request URL"):
        await executor.mount_mcp("bad", "localhost:1/mcp")
    with pytest.raises(McpServerError, match=r"It has said: no \\x1b\[31mkey\\x1b\[0m was given"):
        await executor.mount_mcp("bad", fake("silly"))
    assert "ModuleNotFoundError" in await error_of(executor, "import mcptools")


async def test_a_server_that_dies_or_hangs_fails_the_call_and_not_the_session(executor: CodeExecutor) -> None:
    await executor.mount_mcp("fake", fake("plain"), timeout=1)
    await executor.execute("from mcptools import fake; x = 1")
    assert await error_of(executor, "fake.hang()") == "TimeoutError: the MCP server fake did not answer within 1 s"
    assert "no base64" in await error_of(executor, "fake.garbage()")
    # A code that the SDK has another use for.
    assert await error_of(executor, "fake.failed()") == "ToolError: not today"
    for _ in range(2):
        assert await error_of(executor, "fake.die()") == "ConnectionError: the MCP server fake has ended"
    await executor.mount_mcp("fake", fake("plain"))
    assert await text_of(executor, "print(x, int(fake.pid()) > 0)") == "1 True"


@pytest.mark.usefixtures("short_graces")
async def test_nothing_is_left_of_a_server_when_the_client_is_closed(
    container: CodeExecutionContainer, key: str, tmp_path: Path
) -> None:
    async with CodeExecutor(key, container.workspace, container.port) as executor:
        await executor.mount_mcp("deaf", fake("deaf", str(tmp_path / "pids")))
        await executor.mount_mcp("plain", fake("plain"))
        plain = int((await text_of(executor, "import mcptools.plain; print(mcptools.plain.pid())")) or "")
        pids = [plain, *pids_in(tmp_path)]
        assert [ended(pid) for pid in pids] == [False] * 3
    assert [ended(pid) for pid in pids] == [True] * 3
    with pytest.raises(StateError):
        await executor.mount_mcp("plain", fake("plain"))


@pytest.mark.usefixtures("short_graces")
@pytest.mark.parametrize("end", ["dies", "is unmounted"])
async def test_the_children_of_a_server_end_with_it(executor: CodeExecutor, tmp_path: Path, end: str) -> None:
    await executor.mount_mcp("parent", fake("parent", str(tmp_path / "pids")))
    server, child = pids_in(tmp_path)
    assert [ended(server), ended(child)] == [False, False]
    if end == "dies":
        assert "has ended" in await error_of(executor, "import mcptools.parent; mcptools.parent.die()")
        await until(lambda: ended(server) and ended(child))
    else:
        await executor.unmount_mcp("parent")
        assert [ended(server), ended(child)] == [True, True]


@pytest.mark.usefixtures("short_graces")
async def test_a_client_that_is_closed_while_it_mounts_leaves_nothing(
    container: CodeExecutionContainer, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reads, go_on, make = asyncio.Event(), threading.Event(), mcp_tools.make_tools
    loop = asyncio.get_running_loop()

    def slow(*args: Any) -> Any:
        loop.call_soon_threadsafe(reads.set)
        assert go_on.wait(SECONDS)
        return make(*args)

    monkeypatch.setattr("actbox.mcp.make_tools", slow)
    async with CodeExecutor(key, container.workspace, container.port) as executor:
        mounting = asyncio.create_task(executor.mount_mcp("parent", fake("parent", str(tmp_path / "pids"))))
        await asyncio.wait_for(reads.wait(), SECONDS)
    go_on.set()
    with pytest.raises(StateError):
        await mounting
    assert all(map(ended, pids_in(tmp_path)))


@pytest.mark.usefixtures("short_graces")
async def test_a_mount_that_is_cancelled_leaves_nothing(executor: CodeExecutor, tmp_path: Path) -> None:
    task = asyncio.create_task(executor.mount_mcp("deaf", fake("deaf", str(tmp_path / "pids"))))
    await until(lambda: len(pids_in(tmp_path)) == 2)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() or task.exception() is None
    if not task.cancelled():
        await executor.unmount_mcp("deaf")
    assert all(map(ended, pids_in(tmp_path)))
