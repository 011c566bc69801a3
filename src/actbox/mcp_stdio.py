"""An MCP server that is a command: its pipes, which are bounded, and its processes, which end with it.

A server is trusted less than this process. The SDK's own transport keeps a message of any length, and any number of a
server's own requests; and what a server has started is left alone if the server ends first. Otherwise this one does as
that does. It knows no more of MCP than whose answer a message is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import anyio
from mcp import types
from mcp.client.stdio import StdioServerParameters, get_default_environment
from mcp.shared.message import SessionMessage

from actbox.schemas import legible
from actbox.shielded import finish

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

logger = logging.getLogger(__name__)

# Seconds: for a server that is told to end, by the end of its input and by SIGTERM; the specification asks for both.
_END_SECONDS = 2.0
_TERMINATE_SECONDS = 2.0
# For news of a process that was killed.
_KILL_SECONDS = 2.0
_POLL_SECONDS = 0.01
# Bytes: of what a server writes of its errors, and of a message that is too long, in which to look for its number.
_MAX_WORDS = 2000
_EDGE = 200
# A message of which so much was passed over has no end.
_MAX_SKIPPED = 1 << 30
# A server's own requests that wait for an answer. This client offers nothing but to be pinged.
_MAX_ASKED = 100

# Where the SDKs of Python and of TypeScript write the number of the request that they answer.
_FIRST_ID = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*(\d{1,15})\s*,')
_LAST_ID = re.compile(
    rb',\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?"id"\s*:\s*(\d{1,15})\s*(?:,\s*"jsonrpc"\s*:\s*"2\.0"\s*)?\}\s*$'
)


@dataclass(frozen=True, slots=True)
class TooLong:
    """A line that was passed over: how long it was, how long it may be, its beginning and its end."""

    size: int
    bound: int
    head: bytes
    tail: bytes

    @property
    def answered(self) -> int | None:
        """The number of the request that it answers; None if that cannot be seen."""
        found = _FIRST_ID.match(self.head) or _LAST_ID.search(self.tail)
        return None if found is None else int(found[1])


class Lines:
    """Cuts bytes into lines, of which it keeps no more than `bound()` bytes. Pure.

    State: `_held`, what is kept of the line at hand; `size`, its bytes so far; `_head`, its beginning if it is too
    long, and then `_held` is its end alone.
    """

    def __init__(self, bound: Callable[[], int]) -> None:
        self._bound = bound
        self._held = bytearray()
        self._head = b""
        self.size = 0

    def feed(self, data: bytes) -> list[bytes | TooLong]:
        """The lines that end in these bytes."""
        made: list[bytes | TooLong] = []
        *ended, rest = data.split(b"\n")
        for piece in ended:
            self._add(piece)
            kept = bytes(self._held)
            made.append(TooLong(self.size, self._bound(), self._head, kept) if self._head else kept)
            self._held.clear()
            self._head, self.size = b"", 0
        self._add(rest)
        return made

    def _add(self, piece: bytes) -> None:
        self._held += piece
        self.size += len(piece)
        if self._head or self.size > self._bound():
            self._head = self._head or bytes(self._held[:_EDGE])
            del self._held[:-_EDGE]


class _Process(asyncio.SubprocessProtocol):
    """A command that leads a process group of its own.

    State: `_came`, lines that nobody has taken, and while there are any nothing more is read (`_paused`); `silent`,
    whether no more will come; `_deaf`, whether it reads no more; `_leaving`, whether what comes is passed over;
    `words`, the end of what it has written of its errors; `exited`; `_sweep`, the task that ends the rest of the group
    then.
    """

    def __init__(self, bound: Callable[[], int]) -> None:
        self.exited = asyncio.Event()
        self.words = b""
        self.silent = False
        self._lines = Lines(bound)
        self._came: deque[bytes | TooLong] = deque()
        self._news = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._paused = False
        self._deaf = False
        self._leaving = False
        self._sweep: asyncio.Task[None] | None = None
        self._transport: asyncio.SubprocessTransport | None = None

    @property
    def transport(self) -> asyncio.SubprocessTransport:
        assert self._transport is not None  # noqa: S101 - subprocess_exec returns after connection_made
        return self._transport

    async def next_line(self) -> bytes | TooLong | None:
        """The next line; None when there will be none."""
        while not self._came:
            if self.silent:
                return None
            self._news.clear()
            self._read(on=True)
            await self._news.wait()
        return self._came.popleft()

    async def write(self, data: bytes) -> bool:
        """Write, once there is room; False if nobody reads any more."""
        await self._writable.wait()
        if self._deaf or self._leaving:
            return False
        cast("asyncio.WriteTransport", self.transport.get_pipe_transport(0)).write(data)
        return True

    def be_silent(self) -> None:
        """Nothing more will be heard of it."""
        self.silent = True
        self._news.set()

    async def end(self) -> None:
        """End it as the specification says, and then whatever is left of its group. Bounded in time."""
        self._leaving = True
        self._writable.set()
        self._came.clear()
        self._read(on=True)
        pipe = self.transport.get_pipe_transport(0)
        if pipe is not None:
            pipe.close()
        if not (
            await self._exits_within(_END_SECONDS)
            or await self._exits_within(_TERMINATE_SECONDS, signal.SIGTERM)
            or await self._exits_within(_KILL_SECONDS, signal.SIGKILL)
        ):
            logger.warning("the MCP server with process %d is alive after it was killed", self.transport.get_pid())
        if self._sweep is not None:
            await asyncio.wait([self._sweep])
        # What has left the group may still hold the pipes. A process of another user's cannot be killed by closing.
        with contextlib.suppress(PermissionError):
            self.transport.close()

    async def _exits_within(self, seconds: float, sent: int = 0) -> bool:
        if sent:
            self._signal(sent)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.exited.wait()
        return self.exited.is_set()

    def _signal(self, number: int) -> bool:
        """Whether there is anybody in the group to signal."""
        try:
            # Its leader's number, which no other process gets while any of the group is left.
            os.killpg(self.transport.get_pid(), number)
        except ProcessLookupError:
            return False
        except PermissionError:
            logger.debug("some of the group of an MCP server may not be signalled")
        return True

    async def _end_group(self) -> None:
        for sent, seconds in ((signal.SIGTERM, _TERMINATE_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
            self._signal(sent)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while self._signal(0):  # noqa: ASYNC110 - nobody tells of grandchildren
                        await asyncio.sleep(_POLL_SECONDS)
                    return

    def _read(self, *, on: bool) -> None:
        pipe = cast("asyncio.ReadTransport | None", self.transport.get_pipe_transport(1))
        if pipe is not None and self._paused is on:
            self._paused = not on
            if on:
                pipe.resume_reading()
            else:
                pipe.pause_reading()

    # -- called by the event loop --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd != 1:
            self.words = (self.words + data)[-_MAX_WORDS:]
        elif not self._leaving:
            self._came.extend(self._lines.feed(data))
            if self._came:
                self._read(on=False)
                self._news.set()
            elif self._lines.size > _MAX_SKIPPED:
                logger.warning("an MCP server has sent a message without an end, and was killed")
                self._leaving = True
                self.be_silent()
                self._signal(signal.SIGKILL)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002 - an end is an end
        if fd == 0:
            self._deaf = True
            self._writable.set()
        elif fd == 1:
            self.be_silent()

    def process_exited(self) -> None:
        # What it has written last is still to be read.
        self.exited.set()
        self._sweep = asyncio.get_running_loop().create_task(self._end_group())

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()


class StdioServer:
    """A transport of the SDK's for a command: a context of the streams of messages that come and go.

    State: the process; `_tasks`, which move messages between it and the streams; `_asked`, the numbers of the server's
    own requests that were not answered.

    Args:
        parameters: as `stdio_client` takes them; all of the variables of this environment that it passes on are passed.
        bound: bytes that a message may have now.
    """

    def __init__(self, parameters: StdioServerParameters, bound: Callable[[], int]) -> None:
        self._parameters = parameters
        self._bound = bound
        self._process = _Process(bound)
        self._tasks: list[asyncio.Task[None]] = []
        self._streams: tuple[Any, ...] = ()
        self._asked: set[Any] = set()

    @property
    def words(self) -> str:
        """The end of what the command has written of its errors, made fit to be shown."""
        return legible(self._process.words.decode("utf-8", "replace")).strip()

    async def __aenter__(self) -> tuple[Any, Any]:
        given = self._parameters
        await asyncio.get_running_loop().subprocess_exec(
            lambda: self._process,
            given.command,
            *given.args,
            env=get_default_environment() | (given.env or {}),
            cwd=given.cwd,
            start_new_session=True,
        )
        arrived, incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        outgoing, leaving = anyio.create_memory_object_stream[SessionMessage](0)
        self._streams = (arrived, incoming, outgoing, leaving)
        self._tasks = [asyncio.create_task(self._receive(arrived)), asyncio.create_task(self._send(leaving))]
        return incoming, outgoing

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await finish(self._close())

    async def _close(self) -> None:
        await self._process.end()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for stream in self._streams:
            stream.close()

    async def _receive(self, arrived: MemoryObjectSendStream[SessionMessage | Exception]) -> None:
        with contextlib.suppress(anyio.ClosedResourceError, anyio.BrokenResourceError):
            async with arrived:
                while (line := await self._process.next_line()) is not None:
                    message = self._refused(line) if isinstance(line, TooLong) else self._read(line)
                    if message is None:
                        # Lines that are at hand are taken without a pause: leave the loop to others too.
                        await asyncio.sleep(0)
                    else:
                        await arrived.send(SessionMessage(message))

    async def _send(self, leaving: MemoryObjectReceiveStream[SessionMessage]) -> None:
        with contextlib.suppress(anyio.ClosedResourceError):
            async for item in leaving:
                message = item.message
                if isinstance(message, types.JSONRPCResponse | types.JSONRPCError):
                    self._asked.discard(message.id)
                try:
                    text = message.model_dump_json(by_alias=True, exclude_unset=True)
                    data = text.encode(self._parameters.encoding, self._parameters.encoding_error_handler)
                except ValueError as exc:
                    logger.warning("a message to an MCP server cannot be written: %s", exc)
                    continue
                if not await self._process.write(data + b"\n"):
                    self._process.be_silent()
                    return

    def _read(self, line: bytes) -> Any:
        """The message in a line; None if there is none that is wanted."""
        try:
            text = line.decode(self._parameters.encoding, self._parameters.encoding_error_handler)
            message: Any = types.jsonrpc_message_adapter.validate_json(text, by_name=False)
        except ValueError:
            # Many servers print to where they should not.
            logger.debug("an MCP server has written what is no message: %a", line[:_EDGE])
            return None
        match message:
            case types.JSONRPCRequest(id=number):
                if len(self._asked) >= _MAX_ASKED:
                    logger.debug("an MCP server asks without end")
                    return None
                self._asked.add(number)
            case types.JSONRPCNotification(
                method="notifications/cancelled", params={"requestId": int() | str() as number}
            ):
                self._asked.discard(number)
            case _:
                pass
        return message

    def _refused(self, line: TooLong) -> Any:
        """An error in the place of an answer that is too long; None if it is not known whose it is."""
        number = line.answered
        told = f"its message has {line.size} bytes, more than the {line.bound} that are read"
        logger.warning("an MCP server was not understood: %s", told)
        if number is None:
            return None
        return types.JSONRPCError(
            jsonrpc="2.0", id=number, error=types.ErrorData(code=types.INTERNAL_ERROR, message=told)
        )
