"""The TCP port: clients of other processes, strangers, and kernels that would speak for the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from connections import BY_THE_PORT, Raw

from actbox import (
    CodeExecutionContainer,
    CodeExecutor,
    ConnectionError,
    ExecutionClient,
    ExecutionError,
    ExecutionLost,
    ExecutionTimeout,
    KernelDied,
    ProtocolError,
    gateway,
)
from actbox.protocol import frames

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Generator
    from pathlib import Path

pytestmark = pytest.mark.anyio

SECONDS = 10.0
GRACE = 1.0
SLEEP = "import time; print('asleep', flush=True); time.sleep(60)"
FLOOD = "while True: print('x' * 1000)"

OTHER_PROCESS = """
import asyncio, json, sys
from actbox import CodeExecutor, ExecutionClient, Workspace

async def main(port, token, key, workspace, cells):
    made = ExecutionClient(port, token=token, interrupt_grace=1) if key is None else (
        CodeExecutor(key, Workspace(workspace), port, token=token, interrupt_grace=1))
    async with made as client:
        for code, timeout in cells:
            execution = await client.submit(code)
            answer = {"stream": ""}
            try:
                async for chunk in execution.stream(timeout):
                    answer["stream"] += chunk
                result = await execution.result(timeout)
                answer |= {"text": result.text, "restarted": result.restarted, "images": len(result.images)}
            except Exception as exc:
                answer |= {"error": type(exc).__name__, "facts": {
                    name: value for name, value in vars(exc).items() if isinstance(value, (int, float, str, bool))}}
            print(json.dumps(answer), flush=True)

asyncio.run(main(**json.load(sys.stdin)))
"""


@pytest.fixture
async def remote(container: CodeExecutionContainer, key: str) -> AsyncIterator[CodeExecutor]:
    """An executor that comes in by the port."""
    async with CodeExecutor(
        key, container.workspace, container.port, BY_THE_PORT, token=container.token, interrupt_grace=GRACE
    ) as made:
        yield made


@pytest.fixture
def small(workspace_path: Path, engine: str) -> CodeExecutionContainer:
    """A container of the test's own that starts quickly; not started."""
    return CodeExecutionContainer(workspace_path=workspace_path, engine=engine, preload=())


@contextlib.contextmanager
def within(seconds: float) -> Generator[None]:
    """What is inside takes no longer than this."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def entries(folder: str | Path) -> list[str]:
    return os.listdir(folder)  # noqa: PTH208 - names are wanted


def resident() -> int:
    """The memory of this process, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - a file of the kernel's
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def text_of(client: ExecutionClient, code: str) -> str | None:
    return (await client.execute(code, timeout=SECONDS)).text


async def until_no_session_is_left(container: CodeExecutionContainer) -> None:
    async with asyncio.timeout(SECONDS):
        while "0 sessions" not in repr(container):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


async def in_another_process(container: CodeExecutionContainer, **arguments: Any) -> list[dict[str, Any]]:
    """What a client in another process has to say of each cell."""
    arguments = {
        "port": container.port,
        "token": container.token,
        "key": None,
        "workspace": str(container.workspace.path),
        **arguments,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        OTHER_PROCESS,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(18):
            out, complaint = await process.communicate(json.dumps(arguments).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, complaint.decode()
    return [json.loads(line) for line in out.splitlines()]


# -- a client of another process -------------------------------------------------------------------------------------


async def test_a_client_in_another_process_executes_streams_and_hears_of_every_end(
    container: CodeExecutionContainer,
) -> None:
    answers = await in_another_process(
        container,
        cells=[
            ("x = 1\nprint('é😀')\nx + 1", SECONDS),
            ("for n in range(50_000): print(n)", SECONDS),
            ("1 / 0", SECONDS),
            ("import time; time.sleep(60)", 0.3),
            ("x", SECONDS),
            ("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)", 0.3),
            ("'x' in globals()", SECONDS),
            ("import os, time; print('last'); time.sleep(0.05); os.kill(os.getpid(), 9)", SECONDS),
            ("import os; os._exit(7)", SECONDS),
            ("3", SECONDS),
        ],
    )
    assert answers[0] == {"stream": "é😀\n2\n", "text": "é😀\n2", "restarted": False, "images": 0}
    assert answers[1]["stream"] == "".join(f"{n}\n" for n in range(50_000))
    assert (answers[2]["error"], answers[2]["facts"]["name"]) == ("ExecutionError", "ZeroDivisionError")
    assert (answers[3]["error"], answers[3]["facts"]["state_kept"]) == ("ExecutionTimeout", True)
    assert (answers[4]["text"], answers[4]["restarted"]) == ("1", False)
    assert (answers[5]["error"], answers[5]["facts"]["state_kept"]) == ("ExecutionTimeout", False)
    assert (answers[6]["text"], answers[6]["restarted"]) == ("False", True)
    assert (answers[7]["error"], answers[7]["facts"]["signal"]) == ("KernelDied", 9)
    assert answers[7]["stream"] == "last\n"
    assert (answers[8]["error"], answers[8]["facts"]["exit_code"]) == ("KernelDied", 7)
    assert (answers[9]["text"], answers[9]["restarted"]) == ("3", True)


async def test_an_executor_in_another_process_has_its_key_and_its_images(
    container: CodeExecutionContainer, key: str
) -> None:
    png = b"\x89PNG\r\n\x1a\n"
    cells = [
        (f"import os\nopen('f', 'w').write('x')\nfrom IPython.display import Image\nImage(data={png!r})", SECONDS),
        ("os.getcwd()", SECONDS),
    ]
    answers = await in_another_process(container, key=key, cells=cells)
    assert answers[0]["images"] == 1
    assert answers[1]["text"] == f"'/app/skills/private/{key}'"
    working_dir, images_dir = container.workspace.prepare_key(key)
    assert entries(working_dir) == ["f"]
    assert len(entries(images_dir)) == 1


async def test_the_client_of_a_process_that_is_killed_leaves_no_kernel(small: CodeExecutionContainer) -> None:
    async with small:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OTHER_PROCESS, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdin is not None
        assert process.stdout is not None
        cells = [("1", SECONDS), (SLEEP, 60)]
        arguments = {"port": small.port, "token": small.token, "key": None, "workspace": "/", "cells": cells}
        process.stdin.write(json.dumps(arguments).encode())
        process.stdin.write_eof()
        async with asyncio.timeout(SECONDS):
            await process.stdout.readline()
        assert "1 sessions" in repr(small)
        process.kill()
        await process.wait()
        await until_no_session_is_left(small)


# -- a client by the port in this process ----------------------------------------------------------------------------


async def test_by_the_port_everything_is_as_without_it(remote: CodeExecutor) -> None:
    assert await text_of(remote, "x = 5\nprint('a'); x") == "a\n5"
    with pytest.raises(ExecutionError) as caught:
        await text_of(remote, "1 / 0")
    assert caught.value.name == "ZeroDivisionError"
    result = await remote.execute("display({'a': 1}, metadata={'m': 1})\nprint('x' * 3_000_000)", timeout=SECONDS)
    assert result.outputs[0].data == {"text/plain": "{'a': 1}"}
    assert result.truncated
    assert await text_of(remote, f"y = '''{'y' * 5_000_000}'''\nlen(y)") == "5000000"


async def test_by_the_port_interrupts_and_cancellation_keep_the_state(remote: CodeExecutor) -> None:
    await remote.execute("x = 5", timeout=SECONDS)
    execution = await remote.submit(SLEEP)
    await anext(execution.stream(SECONDS))
    with within(2):
        await execution.interrupt()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await remote.execute(SLEEP)
    with within(2):
        assert await text_of(remote, "x") == "5"
    with pytest.raises(ExecutionTimeout) as caught:
        await remote.execute(FLOOD, timeout=0.3)
    assert caught.value.state_kept
    assert await text_of(remote, "x") == "5"


@pytest.mark.parametrize(
    ("code", "signal", "exit_code"),
    [
        ("os.kill(os.getpid(), 9)", 9, None),
        ("os.kill(os.getpid(), 15)", 15, None),
        ("os.abort()", 6, None),
        ("os._exit(0)", None, 0),
        ("os._exit(42)", None, 42),
    ],
)
async def test_by_the_port_the_death_of_a_kernel_is_told_as_it_was(
    remote: CodeExecutor, code: str, signal: int | None, exit_code: int | None
) -> None:
    with within(3), pytest.raises(KernelDied) as caught:
        await remote.execute(f"import os\n{code}", timeout=SECONDS)
    assert (caught.value.signal, caught.value.exit_code) == (signal, exit_code)
    result = await remote.execute("1", timeout=SECONDS)
    assert (result.text, result.restarted) == ("1", True)


async def test_by_the_port_a_kernel_that_dies_between_two_cells_is_replaced(remote: CodeExecutor) -> None:
    await remote.execute("import os, threading\nthreading.Timer(0.02, os._exit, (1,)).start()", timeout=SECONDS)
    session = remote._session
    assert session is not None
    async with asyncio.timeout(SECONDS):
        while not session.ended:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)
    result = await remote.execute("1", timeout=SECONDS)
    assert (result.text, result.restarted) == ("1", True)


async def test_when_the_container_goes_a_cell_by_the_port_is_lost(small: CodeExecutionContainer, key: str) -> None:
    await small.run()
    client = CodeExecutor(key, small.workspace, small.port, BY_THE_PORT, token=small.token)
    await client.connect()
    try:
        execution = await client.submit(SLEEP)
        await anext(execution.stream(SECONDS))
        with within(SECONDS):
            await small.kill()
            with pytest.raises(ExecutionLost):
                await execution.result(SECONDS)
            with pytest.raises(ConnectionError):
                await client.execute("1", timeout=SECONDS)
    finally:
        await client.disconnect()
        await small.kill()


# -- the heartbeat -----------------------------------------------------------------------------------------------------


async def test_an_idle_client_keeps_its_session(container: CodeExecutionContainer, executor: CodeExecutor) -> None:
    async with ExecutionClient(container.port, BY_THE_PORT, 0.05, token=container.token) as client:
        await client.execute("x = 1", timeout=SECONDS)
        # Twenty heartbeats pass, and nobody asks anything of the idle client.
        await executor.execute("import time; time.sleep(1)", timeout=SECONDS)
        result = await client.execute("x", timeout=SECONDS)
        assert (result.text, result.restarted) == ("1", False)


async def test_a_cell_that_is_silent_for_long_keeps_its_session(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port, BY_THE_PORT, 0.05, token=container.token) as client:
        assert await text_of(client, "import time; time.sleep(0.5); 1") == "1"


async def test_a_caller_that_blocks_its_loop_keeps_its_session(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port, BY_THE_PORT, 0.05, token=container.token) as client:
        await client.execute("x = 1", timeout=SECONDS)
        for _ in range(3):
            time.sleep(0.3)  # noqa: ASYNC251 - the mistake under test: six heartbeats, and the loop does nothing
            await asyncio.sleep(0)
        result = await client.execute("x", timeout=SECONDS)
        assert (result.text, result.restarted) == ("1", False)


async def test_a_stalled_reader_is_not_taken_for_a_dead_link(container: CodeExecutionContainer) -> None:
    async with ExecutionClient(container.port, BY_THE_PORT, 0.05, token=container.token) as client:
        execution = await client.submit("for n in range(20_000): print('x' * 999)")
        size = 0
        stalls = 0
        async for chunk in execution.stream(SECONDS):
            size += len(chunk)
            if stalls < 5 and size > stalls * 2_000_000:
                stalls += 1
                await asyncio.sleep(0.2)
        assert size == 20_000_000


@contextlib.asynccontextmanager
async def no_container(said: bytes, *, stays: bool = False) -> AsyncGenerator[int]:
    """The port of a server that says this to everybody, and then leaves or falls silent."""
    writers: list[asyncio.StreamWriter] = []

    async def say(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(said)
        if not stays:
            writer.close()

    async with await asyncio.start_server(say, "127.0.0.1", 0) as server:
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            for writer in writers:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


async def test_a_gateway_that_falls_silent_is_given_up_after_a_few_heartbeats() -> None:
    async with no_container(frames.encode({"type": "welcome", "limits": {}}), stays=True) as port:
        client = ExecutionClient(port, heartbeat_interval=0.05, token="t", interrupt_grace=GRACE)
        await client.connect()
        with within(5), pytest.raises(ExecutionLost):
            await client.execute("1", timeout=SECONDS)
        await client.disconnect()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        bytes(1000),
        frames.encode({"type": "welcome", "limits": {"memory": "much"}}),
        frames.encode({"type": "welcome", "limits": {"unknown": 1}}),
        frames.encode({"type": "welcome", "limits": [1]}),
        frames.encode({"type": "refused", "reason": ["\x1b[2J", "\ud800"]}),
        frames.encode({"type": "ready", "python": "3", "ipython": "9"}),
        frames.encode({}),
    ],
    ids=["nothing", "http", "ssh", "zeros", "limit", "unknown limit", "limits", "refused", "ready", "empty"],
)
async def test_what_is_no_gateway_is_an_error_of_the_connection(answer: bytes) -> None:
    async with no_container(answer) as port:
        with within(5), pytest.raises((ConnectionError, ProtocolError)) as caught:
            await ExecutionClient(port, token="t").connect()
        assert str(caught.value).isascii()
        assert "\x1b" not in str(caught.value)


# -- strangers -------------------------------------------------------------------------------------------------------


async def test_the_port_is_there_for_this_machine_alone(container: CodeExecutionContainer) -> None:
    """G17."""
    made = container._gateway
    assert made is not None
    assert made._listener.getsockname()[0] == "127.0.0.1"


async def test_tokens_are_long_differ_and_are_told_nowhere(container: CodeExecutionContainer, engine: str) -> None:
    """B8, G17."""
    other = CodeExecutionContainer(workspace_path=container.workspace.path, engine=engine)
    assert other.token != container.token
    assert len(container.token) >= 32
    assert container.token not in repr(container)
    client = ExecutionClient(container.port, BY_THE_PORT, token=other.token)
    assert other.token not in repr(client)
    with pytest.raises(ConnectionError) as caught:
        await client.connect()
    assert other.token not in str(caught.value)
    assert "token" in str(caught.value)


async def test_a_client_of_another_process_needs_the_token(container: CodeExecutionContainer) -> None:
    """G17."""
    with within(2), pytest.raises(ConnectionError, match="token"):
        await ExecutionClient(container.port, BY_THE_PORT).connect()
    for wrong in ("", "x", container.token[:-1], f"{container.token}x", container.token.swapcase(), "é", "x" * 100_000):
        with within(2), pytest.raises(ConnectionError, match="refused"):
            await ExecutionClient(container.port, BY_THE_PORT, token=wrong).connect()


@pytest.mark.parametrize(
    "hello",
    [
        {"type": "hello"},
        {"type": "hello", "token": None},
        {"type": "hello", "token": True},
        {"type": "hello", "token": ["TOKEN"]},
        {"type": "hello", "token": "\ud800"},
        {"type": "hello", "token": "TOKEN\0"},
        {"type": "hello", "token": "TOKEN "},
        {"type": "execute", "token": "TOKEN", "id": 1},
        {"type": "ping"},
        {"token": "TOKEN"},
        {},
    ],
    ids=str,
)
async def test_a_greeting_without_the_token_is_refused(
    container: CodeExecutionContainer, executor: CodeExecutor, hello: dict[str, Any]
) -> None:
    """G17."""
    if isinstance(hello.get("token"), str):
        hello = {**hello, "token": hello["token"].replace("TOKEN", container.token)}
    elif hello.get("token") == ["TOKEN"]:
        hello = {**hello, "token": [container.token]}
    before = len(container._sessions)
    async with Raw(container.port) as raw:
        raw.send(hello)
        answer = await raw.receive()
        assert answer is not None
        assert answer["type"] == "refused"
        assert container.token not in json.dumps(answer)
        assert await raw.receive() is None
    assert len(container._sessions) == before
    assert await text_of(executor, "1") == "1"


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".", 5, ["a"], {}, True, "x" * 65, "\ud800", "CON"])
async def test_a_key_that_names_no_folder_is_refused(container: CodeExecutionContainer, key: Any) -> None:
    """A9."""
    before = len(container._sessions)
    async with Raw(container.port) as raw:
        raw.send({"type": "hello", "token": container.token, "key": key})
        answer = await raw.receive()
        assert answer is not None
        assert answer["type"] == "refused"
        assert "key" in answer["reason"]
    assert len(container._sessions) == before


@pytest.mark.parametrize(
    "said",
    [
        b"garbage, and more of it" * 100,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /api/kernels HTTP/1.1\r\nContent-Length: 100\r\n\r\n" + b"{}" * 50,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        bytes(1 << 20),
        b"\xff" * 8,
        frames.PREFIX.pack(2, 0) + b"[]",
        frames.PREFIX.pack(200_000, 0) + b"[" * 200_000,
        frames.PREFIX.pack(frames.MAX_HEADER + 1, 0),
        # A greeting is small: nobody may make the gateway wait for, or hold, more.
        frames.PREFIX.pack(2, frames.MAX_PAYLOAD),
        frames.PREFIX.pack(2, 1 << 20),
    ],
    ids=["garbage", "get", "post", "tls", "zeros", "ff", "list", "deep", "header", "payload", "large"],
)
async def test_who_speaks_no_frames_is_shut_out_at_once(
    container: CodeExecutionContainer, executor: CodeExecutor, said: bytes
) -> None:
    """G3, G17."""
    async with Raw(container.port) as raw:
        raw.writer.write(said)
        assert await raw.is_closed_within(2)
    assert await text_of(executor, "1") == "1"


async def test_who_says_nothing_is_shut_out_after_a_while(
    small: CodeExecutionContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G2, G17."""
    monkeypatch.setattr(gateway, "_HELLO_SECONDS", 0.2)
    async with small, Raw(small.port) as silent, Raw(small.port) as slow:
        slow.writer.write(frames.PREFIX.pack(100, 0) + b"{")
        assert await silent.is_closed_within(2)
        assert await slow.is_closed_within(2)


async def test_silent_strangers_are_bounded_and_keep_nobody_out_once_they_are_gone(
    small: CodeExecutionContainer,
) -> None:
    """G17."""
    async with small, contextlib.AsyncExitStack() as stack:
        for _ in range(gateway._MAX_STRANGERS):
            await stack.enter_async_context(Raw(small.port))
        made = small._gateway
        assert made is not None
        async with asyncio.timeout(SECONDS):
            while made._strangers < gateway._MAX_STRANGERS:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
        for _ in range(20):
            async with Raw(small.port) as one_more:
                assert await one_more.is_closed_within(2)
        # Who comes in by the door is not concerned.
        async with ExecutionClient(small.port) as client:
            assert await text_of(client, "1") == "1"
        await stack.aclose()
        async with asyncio.timeout(SECONDS):
            while made._strangers:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
        async with ExecutionClient(small.port, BY_THE_PORT, token=small.token) as client:
            assert await text_of(client, "2") == "2"


async def test_a_thousand_strangers_who_come_and_go_leave_nothing_behind(small: CodeExecutionContainer) -> None:
    """G17."""
    async with small:
        before = len(entries("/proc/self/fd"))
        for number in range(1000):
            with socket.create_connection(("127.0.0.1", small.port)) as stranger:
                stranger.send(b"x" * (number % 20))
            if number % 20 == 0:
                await asyncio.sleep(0)
        made = small._gateway
        assert made is not None
        async with asyncio.timeout(SECONDS):
            # Those that still wait to be accepted are looked at first.
            while made._guests or len(entries("/proc/self/fd")) > before:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
        assert made._strangers == 0
        async with ExecutionClient(small.port, BY_THE_PORT, token=small.token) as client:
            assert await text_of(client, "1") == "1"


# -- clients that have the token ---------------------------------------------------------------------------------------


async def admitted(raw: Raw, container: CodeExecutionContainer) -> None:
    raw.send({"type": "hello", "token": container.token, "key": None})
    answer = await raw.receive()
    assert answer is not None
    assert answer["type"] == "welcome"


@pytest.mark.parametrize("code", ["1", SLEEP, FLOOD], ids=["idle", "silent", "flooding"])
async def test_the_kernel_of_a_client_that_leaves_is_gone(
    small: CodeExecutionContainer, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    async with small:
        for _ in range(3):
            async with Raw(small.port) as raw:
                await admitted(raw, small)
                assert "1 sessions" in repr(small)
                raw.send({"type": "execute", "id": 1}, f"import os\nopen('/tmp/x', 'w')\n{code}".encode())
                await raw.receive()
            await until_no_session_is_left(small)
        async with ExecutionClient(small.port) as client:
            assert await text_of(client, "import os\nos.path.exists('/tmp/x')") == "False"
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_client_that_does_not_read_makes_its_kernel_wait(
    container: CodeExecutionContainer, executor: CodeExecutor
) -> None:
    """G7, G8."""
    async with Raw(container.port) as raw:
        await admitted(raw, container)
        before = resident()
        raw.send({"type": "execute", "id": 1}, FLOOD.encode())
        for n in range(20):
            assert await text_of(executor, f"import time; time.sleep(0.02); {n}") == str(n)
        assert resident() - before < 64 << 20


@pytest.mark.parametrize(
    "order",
    [
        {"type": "interrupt", "cell": 2**63},
        {"type": "interrupt", "cell": -(2**63) - 1},
        {"type": "interrupt", "cell": 10**19},
        {"type": "interrupt", "cell": True},
        {"type": "interrupt", "cell": "1"},
        {"type": "interrupt"},
        {"type": "execute", "id": "x"},
        {"type": "execute", "id": 2**63},
        {"type": "execute", "id": -(2**63) - 1},
        {"type": "execute", "id": None},
        {"type": "execute"},
        {"type": "hello", "token": "again"},
        {"type": "exited", "status": 0},
        {"type": "session", "session": 1},
        {"type": "kill"},
        {"type": "kill", "session": 1},
        {"type": []},
        {},
    ],
    ids=str,
)
async def test_an_order_of_no_sense_harms_its_own_session_at_most(
    small: CodeExecutionContainer, order: dict[str, Any]
) -> None:
    """G5."""
    async with small, ExecutionClient(small.port) as other:
        await other.execute("x = 1", timeout=SECONDS)
        async with Raw(small.port) as raw:
            await admitted(raw, small)
            raw.send(order)
            raw.send({"type": "ping"})
            while (answer := await raw.receive()) is not None and answer["type"] != "pong":
                pass
        assert await text_of(other, "x") == "1"
        async with ExecutionClient(small.port, BY_THE_PORT, token=small.token) as client:
            assert await text_of(client, "2") == "2"


# -- a kernel that would speak for the gateway -------------------------------------------------------------------------

FIND_STREAM = """
import json, os, socket, stat, struct, time
def is_stream(fd):
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode): return False
    except OSError: return False
    with socket.socket(fileno=os.dup(fd)) as copy: return copy.type == socket.SOCK_STREAM
[fd] = [fd for fd in range(3, 256) if is_stream(fd)]
stream = socket.socket(fileno=os.dup(fd))
def frame(header, payload=b""):
    head = json.dumps(header).encode()
    stream.sendall(struct.pack("!II", len(head), len(payload)) + head + payload)
"""


@pytest.mark.parametrize(
    "forged",
    [
        {"type": "exited", "status": 42 << 8},
        {"type": "exited", "status": None, "gone": True},
        {"type": "welcome", "limits": {"output": 1 << 40}},
        {"type": "refused", "reason": "no"},
        {"type": "pong"},
    ],
    ids=lambda forged: forged["type"],
)
async def test_a_kernel_cannot_speak_for_the_gateway(
    remote: CodeExecutor, executor: CodeExecutor, forged: dict[str, Any]
) -> None:
    """G5, G16."""
    await executor.execute("x = 1", timeout=SECONDS)
    forged = dict(forged)
    with within(5), pytest.raises(ProtocolError):
        await remote.execute(
            f"{FIND_STREAM}\nframe(json.loads('{json.dumps(forged)}'))\ntime.sleep(60)", timeout=SECONDS
        )
    assert await text_of(executor, "x") == "1"
    result = await remote.execute("2", timeout=SECONDS)
    assert (result.text, result.restarted) == ("2", True)


async def test_a_kernel_that_breaks_the_rules_behind_the_gateway_loses_its_own_session_alone(
    remote: CodeExecutor, executor: CodeExecutor
) -> None:
    """G3, G5."""
    await executor.execute("x = 1", timeout=SECONDS)
    for lie in ("stream.sendall(b'garbage' * 1000)", "frame({'type': 'stream', 'name': 'stdin'})", "frame([])"):
        with within(5), pytest.raises(ProtocolError):
            await remote.execute(f"{FIND_STREAM}\n{lie}\ntime.sleep(60)", timeout=SECONDS)
        assert await text_of(executor, "x") == "1"
        assert await text_of(remote, "2") == "2"


# -- forks -----------------------------------------------------------------------------------------------------------


async def test_by_the_port_a_kernel_that_takes_no_upload_is_killed_in_time(
    remote: CodeExecutor, tmp_path: Path
) -> None:
    """An order to the gateway does not wait behind pieces that the kernel does not read."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(64 << 20)
    await remote.execute(
        "import signal, time\nfrom actbox_guest.guest import transfer\n"
        "def deaf(self, request):\n    signal.signal(signal.SIGINT, signal.SIG_IGN)\n    time.sleep(999)\n"
        "transfer.Transfers.serve = deaf",
        SECONDS,
    )
    async with asyncio.timeout(SECONDS):
        with pytest.raises(ExecutionTimeout) as caught:
            await remote.upload_file("/tmp/large", tmp_path / "large", timeout=0.5)
    assert not caught.value.state_kept
    assert (await remote.execute("print(1)", SECONDS)).text == "1"


async def test_a_client_that_does_not_wait_for_its_pieces_to_be_taken_is_shut_out(
    container: CodeExecutionContainer,
) -> None:
    async with Raw(container.port) as raw:
        await admitted(raw, container)
        raw.send({"type": "execute", "id": 1}, SLEEP.encode())
        for _ in range(1000):
            raw.send({"type": "archive", "id": 2}, bytes(1 << 14))
        while (answer := await raw.receive()) is not None:
            assert answer["type"] in ("stream", "taken")


async def test_a_ticket_is_for_one_fork_and_no_other_is_one(small: CodeExecutionContainer, key: str) -> None:
    async with small, CodeExecutor(key, small.workspace, small.port, BY_THE_PORT, token=small.token) as client:
        session = client._session
        assert session is not None
        branch = await session.branch()
        gateway = small._gateway
        assert gateway is not None
        assert gateway._tickets == {}
        for ticket in ("no such ticket", "", 3, None, ["x"]):
            reader, writer = await asyncio.open_connection(BY_THE_PORT, small.port)
            writer.write(frames.encode({"type": "hello", "token": small.token, "key": "../x", "ticket": ticket}))
            async with asyncio.timeout(SECONDS):
                assert b"refused" in await reader.read()
            writer.close()
        await branch.close()
        assert await text_of(client, "1") == "1"


async def test_a_fork_that_nobody_fetches_is_closed(
    small: CodeExecutionContainer, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actbox.gateway._TICKET_SECONDS", 0.05)
    async with small, CodeExecutor(key, small.workspace, small.port, BY_THE_PORT, token=small.token) as client:
        session: Any = client._session
        await session._link.send({"type": "branch"})
        frame = await session.receive()
        assert frame.header["type"] == "branch"
        async with asyncio.timeout(SECONDS):
            while "1 sessions" not in repr(small):  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.005)
        assert await text_of(client, "1") == "1"


async def test_a_kernel_cannot_hand_out_tickets(remote: CodeExecutor) -> None:
    with pytest.raises(ProtocolError):
        await remote.execute(f"{FIND_STREAM}\nframe({{'type': 'branch', 'ticket': 'x', 'slot': 1}})", timeout=SECONDS)


async def test_the_gateway_speaks_at_once_and_does_not_wait_to_fill_a_packet(
    container: CodeExecutionContainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted: list[socket.socket] = []
    over = gateway.Link.over

    async def noting(sock: socket.socket, *bound: int) -> gateway.Link:
        if sock.family == socket.AF_INET:
            accepted.append(sock)
        return await over(sock, *bound)

    monkeypatch.setattr(gateway.Link, "over", noting)
    async with ExecutionClient(container.port, BY_THE_PORT, token=container.token) as client:
        assert await text_of(client, "print(1)") == "1"
        assert [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in accepted] == [1]
