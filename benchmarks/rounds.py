"""Rounds of a measurement, with each contender in a process of its own, which may have an environment of its own.

A round starts a container, opens two sessions in it, runs cells, and ends both. The process that is measured keeps the
time, so that asking for a round costs none. Both ends of the pipe between the two processes are here: `serve` is what
the measured one runs, and `Driver` is what the other has. Standard library alone, as any environment has that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager

CELL = "print(1)"
IMPORTS = "import numpy, pandas, matplotlib.pyplot"
_END_SECONDS = 30.0


class Session(Protocol):
    """One kernel that takes cells."""

    async def run(self, code: str) -> str:
        """Run a cell to its end; its text. Raises if the cell did."""
        ...


class Container(Protocol):
    """Where sessions are opened."""

    async def warmed(self) -> None:
        """Wait until what makes later sessions quick has been done, if anything does."""
        ...

    def session(self) -> AbstractAsyncContextManager[Session]:
        """A session that takes cells; entering it waits for that."""
        ...


class Contender(Protocol):
    """What is measured."""

    def container(self) -> AbstractAsyncContextManager[Container]:
        """A container that was not there before."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds, all of them from asking for a container or session: until CELL gave its result, and then IMPORTS too.

    `start` is a container with its first session, `further` a second session in it, and `trips` are cells in the first
    session, one after the other. `lost` is how many cells gave a result without what they had printed: a contender for
    which a cell ends before its output has come.
    """

    start: float
    start_ready: float
    further: float
    further_ready: float
    trips: Sequence[float]
    lost: int


async def measure(contender: Contender, trips: int) -> Round:
    """One round."""
    lost = 0

    async def trip(session: Session) -> float:
        nonlocal lost
        began = time.perf_counter()
        text = await session.run(CELL)
        seconds = time.perf_counter() - began
        if text.strip() not in {"1", ""}:
            raise RuntimeError(f"measured something else: {text!r} instead of '1'")
        lost += not text
        return seconds

    async def until_ready(session: Session, began: float) -> tuple[float, float]:
        await trip(session)
        first = time.perf_counter() - began
        await session.run(IMPORTS)
        return first, time.perf_counter() - began

    began = time.perf_counter()
    async with contender.container() as container, container.session() as first:
        start, start_ready = await until_ready(first, began)
        await container.warmed()
        began = time.perf_counter()
        async with container.session() as second:
            further, further_ready = await until_ready(second, began)
        seconds = [await trip(first) for _ in range(trips)]
        return Round(start, start_ready, further, further_ready, seconds, lost)


def serve(contender: Contender) -> None:
    """Measure a round for each line of standard input, until it ends; the line is how many trips.

    SIGTERM ends a round in order, as SIGINT does.
    """

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGTERM, interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        for line in sys.stdin:
            print(json.dumps(asdict(asyncio.run(measure(contender, int(line))))), flush=True)


class Driver:
    """A process that serves rounds, started by `command`; leaving the context ends it, and the round that it runs."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = tuple(command)
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        # Of a session of its own, so that Ctrl-C reaches it once only, through us.
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(_END_SECONDS):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def round(self, trips: int) -> Round:
        """One round.

        Raises:
            RuntimeError: The process ended; what it said is on standard error.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{trips}\n".encode())
        line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {await process.wait()}")
        return Round(**json.loads(line))
