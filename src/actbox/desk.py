"""A gateway's side of a line over TCP: answers the requests of one attached client, each by itself, until it leaves."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from actbox import dialogue, refusals
from actbox.errors import ActboxError, ProtocolError
from actbox.protocol.frames import Frame

if TYPE_CHECKING:
    from collections.abc import Iterable

    from actbox.dialogue import Request
    from actbox.lines import Line
    from actbox.link import Link

logger = logging.getLogger(__name__)

# A client gives a sign of life every ten seconds or so; one that does not is gone, though its connection is not.
IDLE_SECONDS = 90.0
# Requests of one client that may wait for their answers.
_MOST = 256


async def serve(link: Link, line: Line) -> None:
    """Answer a client until it leaves, is cut off, or breaks the rules; then it is detached."""
    answering: dict[int, asyncio.Task[None]] = {}
    speaking = asyncio.Lock()
    try:
        await link.send({"type": "welcome", "incarnation": line.incarnation})
        while True:
            async with asyncio.timeout(IDLE_SECONDS):
                frame = await link.receive()
            match frame.header if frame is not None else None:
                case None | {"type": "leave"}:
                    return
                case {"type": "ping"}:
                    await link.send({"type": "pong"})
                case _:
                    assert frame is not None  # noqa: S101 - for the types
                    _begin(link, line, dialogue.read_request(frame), answering, speaking)
    finally:
        tasks = list(answering.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await line.leave()


def _begin(
    link: Link, line: Line, request: Request, answering: dict[int, asyncio.Task[None]], speaking: asyncio.Lock
) -> None:
    if request.kind == "forget":
        task = answering.get(request.number)
        if task is not None:
            task.cancel()
        return
    if request.number in answering or len(answering) >= _MOST:
        raise ProtocolError("a client that asks for too much at once")
    task = asyncio.create_task(_answer(link, line, request, speaking))
    answering[request.number] = task

    def note_end(task: asyncio.Task[None]) -> None:
        answering.pop(request.number, None)
        if not task.cancelled() and (exc := task.exception()) is not None:
            # An answer that will not come must keep nobody waiting: without its connection the client asks again.
            logger.error("a request of an attached client failed", exc_info=exc)
            link.close()

    task.add_done_callback(note_end)


async def _answer(link: Link, line: Line, request: Request, speaking: asyncio.Lock) -> None:
    # A client that is gone is noticed where it is read.
    with suppress(OSError):
        try:
            answer = await _ask(line, request)
        except ActboxError as exc:
            answer = [refusals.refusal_frame(exc)]
        frames = iter(answer)
        while True:
            # One frame at a time is made for a client, so that one who does not read costs no more than that.
            async with speaking:
                frame = next(frames, None)
                if frame is None:
                    return
                await link.send({**frame.header, "re": request.number}, frame.payload)


async def _ask(line: Line, request: Request) -> Iterable[Frame]:
    match request.kind:
        case "read":
            return dialogue.page_frames(await line.read(request.execution, request.after))
        case "result":
            return dialogue.ending_frames(await line.result(request.execution))
        case "executions":
            return [dialogue.standings_frame(await line.executions())]
        case "checkpoints":
            return [dialogue.checkpoints_frame(await line.checkpoints())]
        case "change":
            assert request.change is not None  # noqa: S101 - it was read so
            return [dialogue.checkpoints_frame(await line.change(request.change))]
        case "submit":
            await line.submit(request.execution, request.code, request.timeout)
        case "interrupt":
            await line.interrupt(request.execution)
        case _:
            await line.end()
    return [Frame({"type": "done"}, b"")]
