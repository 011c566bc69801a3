"""Measures copies of a session, and calls of the host, each against what people do without them.

`python benchmarks/bench_forks.py [--quick] [--write] [--engine NAME]`. Both ways run in turn in one process, on the
same container; the state is arrays of NumPy and a little of everything else.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import report
from bench import facts
from report import Row

from actbox import AttachedClient, CodeExecutionContainer, CodeExecutor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks-forks.md"
_MILLI = 1e3
# A state that took some work: arrays, and what has no array.
_STATE = """
import numpy as np
generator = np.random.default_rng(1)
arrays = [generator.normal(size=({mebibytes} << 20) // 8 // 4) for _ in range(4)]
index = {{f"key-{{number}}": number for number in range(100_000)}}
def total():
    return float(sum(array.sum() for array in arrays)) + len(index)
"""
_OWN = """
def own():
    kinds = ("Private_Clean:", "Private_Dirty:")
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(kinds)) / 1024
"""
_TEXT = """\
# Benchmarks: forks and calls

Written by `python benchmarks/bench_forks.py --write` on {day}.

{table}

A cell holds the median, and the smallest and largest value behind it; the ratio is that of the medians. The state is
{mebibytes} MiB of arrays and a dictionary of 100 000 entries, made by one cell.

- **A second session with the state**: `fork()`, against opening a session and running the cell again, and against
  `save` to a file and `restore` into a session that is opened for it (the pickle is made inside; file and session are
  on the same machine).
- **Undo a wrecked state**: `rollback()` to a checkpoint, against the same two.
- **Come back to a state**: a client attaches to a session that has outlived the one before, and runs a cell; against
  opening a session and running the cell that makes the state again.
- **A call of the host**: `f(1)` in a loop inside a cell, by `executor.functions(f)`; against ending the cell with what
  is wanted in a variable, getting that, and putting the answer in before the next cell, as is done without it.
- **New memory of a fork**: the private pages of the copy's process before it has written to any array: {own} MiB.

## Where

{machine}
"""


async def _timed(work: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    await work()
    return _MILLI * (time.perf_counter() - began)


def _double(number: int) -> int:
    return 2 * number


class Bench:
    """One container and one session with the state; every `..._ways` is measured in turn."""

    def __init__(self, container: CodeExecutionContainer, executor: CodeExecutor, folder: Path, mebibytes: int) -> None:
        self._container = container
        self._executor = executor
        self._file = folder / "state"
        self._state = _STATE.format(mebibytes=mebibytes)
        self._keys = iter(range(1_000_000))
        self.own: list[float] = []

    async def prepare(self) -> None:
        """Make the state, in this session and in a file."""
        await self._executor.execute(f"{self._state}\n{_OWN}", timeout=600)
        await self._executor.checkpoint("good")
        async with self._kept() as client:
            await (await client.submit(self._state, timeout=600)).result()

    def _kept(self) -> AttachedClient:
        return AttachedClient(self._container.port, "kept")

    async def attach(self) -> None:
        async with self._kept() as client:
            await (await client.submit("pass")).result()

    def _another(self) -> CodeExecutor:
        return CodeExecutor(f"bench-{next(self._keys)}", self._container.workspace, self._container.port)

    async def fork(self) -> None:
        async with await self._executor.fork() as branch:
            self.own.append(float((await branch.execute("print(own())")).text or "nan"))

    async def rerun(self) -> None:
        async with self._another() as other:
            await other.execute(self._state, timeout=600)

    async def pickle(self) -> None:
        await self._executor.save(self._file, timeout=600, max_bytes=4 << 30)
        async with self._another() as other:
            await other.restore(self._file, timeout=600)

    async def wreck(self) -> None:
        await self._executor.execute("arrays = index = None")

    async def rollback(self) -> None:
        await self._executor.rollback("good")

    async def unpickle(self) -> None:
        async with self._another() as other:
            await other.restore(self._file, timeout=600)

    async def calls(self, number: int) -> None:
        await self._executor.execute(f"for number in range({number}): answer = double(number)", timeout=600)

    async def turns(self, number: int) -> None:
        await self._executor.execute("number = 0")
        for _ in range(number):
            asked = await self._executor.get("number")
            await self._executor.set("answer", 2 * asked)
            await self._executor.execute("number += 1")


async def measure(engine: str, rounds: int, mebibytes: int, calls: int) -> tuple[list[Row], float]:
    """The rows, and the MiB that a fork takes before it writes."""
    found: dict[str, list[float]] = {name: [] for name in ("fork", "rerun", "pickle", "attach", "rollback", "unpickle")}
    called: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with (
            CodeExecutionContainer(workspace_path=folder / "workspace", engine=engine) as container,
            CodeExecutor("bench", container.workspace, container.port) as executor,
        ):
            await container.warmed()
            executor.functions(double=_double)
            bench = Bench(container, executor, folder, mebibytes)
            await bench.prepare()
            for number in range(1 + rounds):
                print(f"bench: round {number} of {rounds}", file=sys.stderr, flush=True)
                done = {name: await _timed(getattr(bench, name)) for name in ("fork", "rerun", "pickle", "attach")}
                await bench.wreck()
                done["rollback"] = await _timed(bench.rollback)
                done["unpickle"] = await _timed(bench.unpickle)
                ways = (bench.calls, bench.turns)
                trips = [await _timed(lambda way=way: way(calls)) / calls for way in ways]
                if number:
                    for way, milliseconds in done.items():
                        found[way].append(milliseconds)
                    for kept, milliseconds in zip(called, trips, strict=True):
                        kept.append(milliseconds)
            own = statistics.median(bench.own)
    rows = [
        Row("a second session with the state; else: the cells again", "ms", (found["fork"], found["rerun"])),
        Row("a second session with the state; else: saved and restored", "ms", (found["fork"], found["pickle"])),
        Row("undo a wrecked state; else: the cells again", "ms", (found["rollback"], found["rerun"])),
        Row("undo a wrecked state; else: restored from a file", "ms", (found["rollback"], found["unpickle"])),
        Row("come back to a state; else: the cells again", "ms", (found["attach"], found["rerun"])),
        Row("a call of the host; else: by the ends of cells", "ms", called),
    ]
    return rows, own


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a round of little: shows that it works")
    parser.add_argument("--engine", default="bubblewrap", help="actbox's engine")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks-forks.md too")
    arguments = parser.parse_args()
    rounds, mebibytes, calls = (1, 16, 20) if arguments.quick else (5, 1024, 200)
    rows, own = asyncio.run(measure(arguments.engine, rounds, mebibytes, calls))
    table = report.table(rows, "without")
    print(table)
    print(f"new memory of a fork: {own:.1f} MiB")
    if arguments.write:
        told = {name: value for name, value in facts("").items() if value}
        machine = "\n".join(f"- {name}: {value}" for name, value in told.items())
        today = dt.datetime.now(tz=dt.UTC).date().isoformat()
        text = _TEXT.format(table=table, machine=machine, day=today, own=f"{own:.1f}", mebibytes=mebibytes)
        PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
