# jupyter_client's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""actbox and its peer behind one contract, so that a measurement is written once and cannot favour either."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from actbox import CodeExecutionContainer, CodeExecutor, ExecutionInterrupted
from actbox.events import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from jupyter_client.asynchronous.client import AsyncKernelClient

ENDLESS = "print('begun', flush=True)\nwhile True: pass"
_SECONDS = 120.0


class Session(Protocol):
    """One kernel that takes cells. Nothing of it waits longer than two minutes."""

    async def run(self, code: str) -> str:
        """Run a cell to its end; its text. Raises if the cell did."""
        ...

    async def count(self, code: str) -> int:
        """Run a cell to its end; how many characters it printed, counted as they arrive."""
        ...

    async def interrupt(self) -> float:
        """Run ENDLESS, and interrupt it once it has begun; seconds from then to its end."""
        ...

    async def close(self) -> None:
        """End the kernel; returns when its processes are gone. Leaving the session's context does it too."""
        ...


class Container(Protocol):
    """Where sessions are opened."""

    async def warmed(self) -> None:
        """Wait until what makes later sessions quick has been done."""
        ...

    def session(self) -> AbstractAsyncContextManager[Session]:
        """A session that takes cells; entering it waits for that."""
        ...


class Contender(Protocol):
    """What is measured."""

    name: str

    def container(self) -> AbstractAsyncContextManager[Container]:
        """What has to be running before a session can be opened, if anything."""
        ...


# -- actbox ----------------------------------------------------------------------------------------------------------


class Actbox:
    """Containers over workspaces below `folder`, each with all its defaults but the log.

    State: how many workspaces and sessions were made, to give each a new name.
    """

    name = "actbox"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._containers = 0
        self._sessions = 0
        self.isolation = ""

    @asynccontextmanager
    async def container(self) -> AsyncGenerator[Container]:
        """See `Contender`."""
        self._containers += 1
        workspace = self._folder / f"workspace-{self._containers}"
        async with CodeExecutionContainer(workspace_path=workspace, env={}) as container:
            self.isolation = container.isolation
            yield _ActboxContainer(self, container)

    def next_key(self) -> str:
        """A key that no session had."""
        self._sessions += 1
        return f"session-{self._sessions}"


class _ActboxContainer:
    def __init__(self, owner: Actbox, container: CodeExecutionContainer) -> None:
        self._owner = owner
        self._container = container

    async def warmed(self) -> None:
        await self._container.warmed()

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Session]:
        async with CodeExecutor(self._owner.next_key(), self._container.workspace, self._container.port) as executor:
            yield _ActboxSession(executor)


class _ActboxSession:
    def __init__(self, executor: CodeExecutor) -> None:
        self._executor = executor

    async def run(self, code: str) -> str:
        return (await self._executor.execute(code, _SECONDS)).text or ""

    async def count(self, code: str) -> int:
        execution = await self._executor.submit(code)
        return sum([len(chunk) async for chunk in execution.stream(_SECONDS)])

    async def interrupt(self) -> float:
        began = 0.0
        interrupting: asyncio.Task[None] | None = None
        execution = await self._executor.submit(ENDLESS)
        with contextlib.suppress(ExecutionInterrupted):
            async for event in execution.events(_SECONDS):
                if isinstance(event, Stream):
                    began = time.perf_counter()
                    interrupting = asyncio.ensure_future(execution.interrupt())
        ended = time.perf_counter()
        if interrupting is not None:
            await interrupting
        return ended - began

    async def close(self) -> None:
        await self._executor.disconnect()


# -- the peer --------------------------------------------------------------------------------------------------------


class Jupyter:
    """ipykernel driven by jupyter_client: both as they are installed, whatever the user's own settings are.

    State: how many kernels were started, to give each connection file a new name.
    """

    name = "jupyter_client + ipykernel"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kernels = 0

    @asynccontextmanager
    async def container(self) -> AsyncGenerator[Container]:
        """See `Contender`; a kernel needs nothing to be running."""
        yield self

    async def warmed(self) -> None:
        """See `Container`; every kernel imports for itself."""

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Session]:
        """See `Container`."""
        self._kernels += 1
        manager = AsyncKernelManager(
            # No folder is searched: what is left is the specification that ipykernel has for its own interpreter.
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=str(self._folder / f"kernel-{self._kernels}.json"),
        )
        session = _JupyterSession(manager)
        try:
            await session.start(self._environment())
            yield session
        finally:
            await session.close()

    def _environment(self) -> dict[str, str]:
        chosen = {name: str(self._folder) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
        return {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | chosen


class _JupyterSession:
    """State: the manager, and the client once there is one."""

    def __init__(self, manager: AsyncKernelManager) -> None:
        self._manager = manager
        self._client: AsyncKernelClient | None = None

    async def start(self, environment: dict[str, str]) -> None:
        async with asyncio.timeout(_SECONDS):
            # Its log would come between our lines.
            await self._manager.start_kernel(env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self._client = self._manager.client()
            self._client.start_channels()
            await self._client.wait_for_ready()

    async def run(self, code: str) -> str:
        texts: list[str] = []

        def keep(kind: str, content: dict[str, Any]) -> None:
            if kind == "stream":
                texts.append(content["text"])
            elif kind in ("execute_result", "display_data"):
                texts.append(content["data"].get("text/plain", ""))

        await self._execute(code, keep)
        return "".join(texts)

    async def count(self, code: str) -> int:
        total = 0

        def add(kind: str, content: dict[str, Any]) -> None:
            nonlocal total
            if kind == "stream":
                total += len(content["text"])

        await self._execute(code, add)
        return total

    async def interrupt(self) -> float:
        began = 0.0
        interrupting: asyncio.Task[None] | None = None

        def interrupt(kind: str, _content: dict[str, Any]) -> None:
            nonlocal began, interrupting
            if kind == "stream":
                began = time.perf_counter()
                interrupting = asyncio.ensure_future(self._manager.interrupt_kernel())

        with contextlib.suppress(_Raised):
            await self._execute(ENDLESS, interrupt)
        ended = time.perf_counter()
        if interrupting is not None:
            await interrupting
        return ended - began

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.stop_channels()
        if self._manager.has_kernel:
            closing = asyncio.ensure_future(self._manager.shutdown_kernel(now=True))
            try:
                await asyncio.shield(closing)
            except asyncio.CancelledError:
                await closing
                raise

    async def _execute(self, code: str, output: Callable[[str, dict[str, Any]], None]) -> None:
        """Run a cell: it has ended when its reply has come and the kernel has said that it is idle."""
        assert self._client is not None
        async with asyncio.timeout(_SECONDS):
            request = self._client.execute(code, allow_stdin=False)
            while True:
                message = await self._client.get_iopub_msg()
                if message["parent_header"].get("msg_id") != request:
                    continue
                kind, content = message["msg_type"], message["content"]
                if kind == "status" and content["execution_state"] == "idle":
                    break
                output(kind, content)
            while True:
                message = await self._client.get_shell_msg()
                if message["parent_header"].get("msg_id") == request:
                    break
        if message["content"]["status"] != "ok":
            raise _Raised(message["content"].get("ename"), message["content"].get("evalue"))


class _Raised(Exception):
    """The peer's cell raised: name and value."""
