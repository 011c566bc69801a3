"""Measures actbox against jupyter_client and ipykernel in one run, and prints a table of ratios.

`make bench`, or `python benchmarks/bench.py [--quick] [--write]`; takes two minutes, `--quick` a quarter of one.
Kernels and containers are ended on every way out, Ctrl-C and SIGTERM included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import functools
import os
import platform
import re
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import layers
import memory
import report
from contenders import Actbox, Container, Contender, Jupyter, Session
from report import Row

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from report import Pair

IMPORTS = "import numpy, pandas, matplotlib.pyplot"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
_PACKAGES = ("actbox", "ipython", "ipykernel", "jupyter-client", "pyzmq", "numpy", "pandas", "matplotlib")
_MILLI = 1e3
_MIB = 1 << 20
_SETTLE_SECONDS = 0.2
# The kernel's word for the mode of filtering system calls.
_IS_FILTERED = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('Seccomp:')][0])"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Counts:
    """How often each is measured, in each of the two; `warm_up` rounds more are run first and not counted."""

    warm_up: int = 1

    starts: int = 5
    sessions: int = 10
    bursts: int = 3
    burst: int = 4
    blocks: int = 10
    block: int = 50
    streams: int = 5
    megabytes: int = 100
    loops: int = 5
    prints: int = 200_000
    interrupts: int = 10


FULL = Counts()
QUICK = Counts(
    starts=1,
    sessions=1,
    bursts=1,
    burst=2,
    blocks=1,
    block=20,
    streams=1,
    megabytes=10,
    loops=1,
    prints=10_000,
    interrupts=1,
)


@dataclass(frozen=True, slots=True)
class _Further:
    """One further session: seconds until it takes cells, until it is ready, to close it; bytes that it held.

    `unread` is how many of its processes this user may not look into: what they held is missing.
    """

    takes_cells: float
    ready: float
    close: float
    held: int
    unread: int


async def measure(counts: Counts, ours: Contender, theirs: Contender, tell: Callable[[str], None]) -> list[Row]:
    """All rows, in the table's order."""
    in_turn = functools.partial(_in_turn, counts.warm_up)
    tell("starts")
    starts = await in_turn(counts.starts, lambda: _start(ours), lambda: _start(theirs))
    rows = [Row("start to the first result", "ms", _in(_MILLI, starts, _itself), aim=1)]
    async with (
        ours.container() as our_container,
        theirs.container() as their_container,
        our_container.session() as a,
        their_container.session() as b,
    ):
        for container, session in ((our_container, a), (their_container, b)):
            await container.warmed()
            await session.run(IMPORTS)
        tell("further sessions")
        further = await in_turn(counts.sessions, lambda: _further(our_container), lambda: _further(their_container))
        tell("bursts")
        bursts = await in_turn(
            counts.bursts, lambda: _burst(our_container, counts.burst), lambda: _burst(their_container, counts.burst)
        )
        tell("round trips")
        trips = await in_turn(counts.blocks, lambda: _trips(a, counts.block), lambda: _trips(b, counts.block))
        tell("streaming")
        streams = await in_turn(
            counts.streams, lambda: _stream(a, counts.megabytes), lambda: _stream(b, counts.megabytes)
        )
        tell("print loops")
        loops = await in_turn(counts.loops, lambda: _loop(a, counts.prints), lambda: _loop(b, counts.prints))
        tell("interrupts")
        interrupts = await in_turn(counts.interrupts, a.interrupt, b.interrupt)
    our_trips, their_trips = ([seconds for block in side for seconds in block] for side in trips)
    return [
        *rows,
        *_further_rows(further),
        Row(f"{counts.burst} further sessions at once, all ready", "ms", _in(_MILLI, bursts, _itself)),
        Row("round trip of `1+1`", "ms", _in(_MILLI, (our_trips, their_trips), _itself), aim=8),
        Row(f"streaming {counts.megabytes} MB of stdout", "MB/s", _in(1, streams, _itself), more_is_better=True),
        Row("print loop", "prints/ms", _in(1, loops, _itself), more_is_better=True),
        Row("interrupt of an endless loop", "ms", _in(_MILLI, interrupts, _itself)),
    ]


async def measure_layers(counts: Counts, whole: Actbox, bare: Actbox, folder: Path) -> list[Row]:
    """The cost of the layers inside: `bare` has its containers started without them."""
    in_turn = functools.partial(_in_turn, counts.warm_up)
    async with contextlib.AsyncExitStack() as opened:
        with layers.switched_off(folder):
            without = await opened.enter_async_context(bare.container())
        within = await opened.enter_async_context(whole.container())
        a, b = [await opened.enter_async_context(one.session()) for one in (within, without)]
        for container, session in ((within, a), (without, b)):
            await container.warmed()
            await session.run(IMPORTS)
        # They are other sandboxes indeed, or nothing is compared.
        _expect([(await one.run(_IS_FILTERED)).strip() for one in (a, b)], ["2", "0"])
        starts = await in_turn(counts.sessions, lambda: _opened(within), lambda: _opened(without))
        trips = await in_turn(counts.blocks, lambda: _trips(a, counts.block), lambda: _trips(b, counts.block))
    flat = tuple([seconds for block in side for seconds in block] for side in trips)
    return [
        Row("session start, until `1+1` has its result", "ms", _in(_MILLI, starts, _itself)),
        Row("round trip of `1+1`", "ms", _in(_MILLI, (flat[0], flat[1]), _itself)),
    ]


async def _opened(container: Container) -> float:
    # What is made ahead for it is there by then.
    await asyncio.sleep(_SETTLE_SECONDS)
    began = time.perf_counter()
    async with container.session() as session:
        _expect((await session.run("1+1")).strip(), "2")
        return time.perf_counter() - began


async def _in_turn(
    warm_up: int, rounds: int, first: Callable[[], Awaitable[T]], second: Callable[[], Awaitable[T]]
) -> tuple[list[T], list[T]]:
    """A B A B ...: what drifts on the machine meets both."""
    results: tuple[list[T], list[T]] = ([], [])
    for number in range(warm_up + rounds):
        for measured, kept in zip((first, second), results, strict=True):
            result = await measured()
            if number >= warm_up:
                kept.append(result)
    return results


def _in(scale: float, sides: tuple[list[T], list[T]], get: Callable[[T], float]) -> Pair:
    """A number of each result of both, in the row's unit."""
    ours, theirs = ([scale * get(result) for result in side] for side in sides)
    return ours, theirs


def _itself(value: float) -> float:
    return value


# -- what is measured ------------------------------------------------------------------------------------------------


async def _start(contender: Contender) -> float:
    began = time.perf_counter()
    async with contender.container() as container, container.session() as session:
        await session.run(IMPORTS)
        _expect((await session.run("1+1")).strip(), "2")
        return time.perf_counter() - began


async def _further(container: Container) -> _Further:
    began = time.perf_counter()
    async with container.session() as session:
        takes_cells = time.perf_counter() - began
        await session.run(IMPORTS)
        ready = time.perf_counter() - began
        # What was started only to make it has ended by then, and what is made ahead for the next one is there.
        await asyncio.sleep(_SETTLE_SECONDS)
        held = memory.unique(memory.descendants(os.getpid()))
        began = time.perf_counter()
        await session.close()
        close = time.perf_counter() - began
    # Its processes are those that its end has ended; the last of them may need a moment more than `close`.
    await asyncio.sleep(_SETTLE_SECONDS)
    left = memory.descendants(os.getpid())
    its = [size for pid, size in held.items() if pid not in left]
    return _Further(takes_cells, ready, close, sum(size or 0 for size in its), its.count(None))


async def _burst(container: Container, count: int) -> float:
    async with contextlib.AsyncExitStack() as opened:

        async def open_one() -> None:
            session = await opened.enter_async_context(container.session())
            await session.run(IMPORTS)

        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(open_one())
        return time.perf_counter() - began


async def _trips(session: Session, count: int) -> list[float]:
    seconds: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        text = await session.run("1+1")
        seconds.append(time.perf_counter() - began)
        _expect(text.strip(), "2")
    return seconds


async def _stream(session: Session, megabytes: int) -> float:
    writes, size = megabytes * 10, 100_000
    code = f"import sys\nblock = 'x' * {size - 1} + '\\n'\nfor _ in range({writes}): _ = sys.stdout.write(block)"
    began = time.perf_counter()
    _expect(await session.count(code), writes * size)
    return megabytes / (time.perf_counter() - began)


async def _loop(session: Session, count: int) -> float:
    began = time.perf_counter()
    printed = await session.count(f"for i in range({count}): print(i)")
    seconds = time.perf_counter() - began
    _expect(printed, sum(len(f"{i}\n") for i in range(count)))
    return count / seconds / _MILLI


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise RuntimeError(f"measured something else: {found!r} instead of {wanted!r}")


def _further_rows(further: tuple[list[_Further], list[_Further]]) -> list[Row]:
    unread = sum(one.unread for side in further for one in side)
    memory_note = "without processes that this user may not look into; root may" if unread else ""
    held = _in(1 / _MIB, further, lambda one: one.held)
    return [
        Row("a further session, ready with the imports", "ms", _in(_MILLI, further, lambda one: one.ready), aim=25),
        Row("a further session, takes cells", "ms", _in(_MILLI, further, lambda one: one.takes_cells)),
        Row("unique memory of a further session", "MiB", held, aim=15, complete=not unread, note=memory_note),
        Row("close of a session", "ms", _in(_MILLI, further, lambda one: one.close)),
    ]


# -- the command -----------------------------------------------------------------------------------------------------


def facts(isolation: str) -> dict[str, str]:
    """What the numbers depend on, as far as it says nothing about whose machine it is."""
    kernel = re.match(r"[\d.]*\d", platform.release())
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return {
        "CPUs": f"{len(os.sched_getaffinity(0))} ({platform.machine()})",
        "Load before": f"{os.getloadavg()[0]:.1f}",
        "Kernel": f"Linux {kernel[0] if kernel else '?'}",
        "Python": platform.python_version(),
        "Packages": packages,
        "Sessions of actbox": isolation,
    }


async def run(counts: Counts, tell: Callable[[str], None]) -> tuple[list[Row], list[Row], Jupyter, dict[str, str]]:
    """Measure, with all folders in a temporary one."""
    load = facts("")["Load before"]
    with tempfile.TemporaryDirectory(prefix="actbox-bench-") as name:
        ours, theirs = Actbox(Path(name)), Jupyter(Path(name))
        rows = await measure(counts, ours, theirs, tell)
        tell("layers")
        costs = await measure_layers(counts, ours, Actbox(Path(name, "bare")), Path(name))
    return rows, costs, theirs, facts(ours.isolation) | {"Load before": load}


async def _until_told(counts: Counts) -> tuple[list[Row], list[Row], Jupyter, dict[str, str]]:
    """`run`, ended in order by SIGTERM as by SIGINT."""
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(NotImplementedError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await run(counts, lambda what: print(f"bench: {what}", file=sys.stderr, flush=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few runs of each: shows that it works, measures little")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md too")
    arguments = parser.parse_args()
    try:
        rows, costs, peer, where = asyncio.run(_until_told(QUICK if arguments.quick else FULL))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("bench: interrupted", file=sys.stderr)
        return 130
    print(report.table(rows, peer.name), end="\n\n")
    print(report.costs(costs), end="\n\n")
    for name, value in where.items():
        print(f"{name}: {value}")
    if arguments.write:
        command = f"python benchmarks/{Path(__file__).name} --write{' --quick' if arguments.quick else ''}"
        today = dt.datetime.now(tz=dt.UTC).date()
        PAGE.write_text(report.page(rows, costs, peer.name, where, today, command), encoding="utf-8")
        print(f"written: {PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
