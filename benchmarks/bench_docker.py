"""Measures actbox in a container against ipybox, in turn, and prints a table of ratios.

`python benchmarks/bench_docker.py [--quick] [--write] [--engine NAME] [--tag TAG]`; needs what peer_ipybox.py needs,
and says so where it is missing. Both run on the same daemon, and each is driven by a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import peer_ipybox
import report
from bench import facts
from report import Row
from rounds import Driver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rounds import Round

_MILLI = 1e3
_FOLDER = Path(__file__).resolve().parent
PAGE = _FOLDER.parent / "docs" / "benchmarks-docker.md"
_TEXT = """\
# Benchmarks: Docker

Written by `python benchmarks/bench_docker.py --write` on {day}; it needs a Docker engine with a bridge network and the
base image of the tests (`BRIDGE=1 .ci/docker up`).

{table}

A cell holds the median, and the smallest and largest value behind it; the ratio is that of the medians.

actbox's engine "docker" against ipybox 0.3.2, the last of its line with containers, whose image has
jupyter-kernel-gateway 3.0.1 and ipykernel 6. Both images stand on the same base and hold numpy, pandas and matplotlib;
both run on the same daemon, in turn, each driven by a process of its own. A start is from entering the container's
context to the result of `print(1)`, or to that of importing the three libraries; a second session is opened beside the
first.

## Where

{machine}
"""


async def measure(ours: Driver, theirs: Driver, rounds: int, trips: int) -> tuple[list[Round], list[Round]]:
    """Rounds of both in turn, A B A B ...; the first of each is not counted."""
    results: tuple[list[Round], list[Round]] = ([], [])
    async with ours, theirs:
        for number in range(1 + rounds):
            print(f"bench: round {number} of {rounds}", file=sys.stderr, flush=True)
            for driver, kept in zip((ours, theirs), results, strict=True):
                done = await driver.round(trips)
                if number:
                    kept.append(done)
    return results


def rows(results: tuple[Sequence[Round], Sequence[Round]]) -> list[Row]:
    """What was measured, as the table shows it; further rows go here."""

    def seconds(get: Callable[[Round], float]) -> tuple[list[float], list[float]]:
        ours, theirs = ([_MILLI * get(done) for done in side] for side in results)
        return ours, theirs

    ours, theirs = ([_MILLI * trip for done in side for trip in done.trips] for side in results)
    lost = sum(done.lost for done in results[1])
    return [
        Row("container start to the first result", "ms", seconds(lambda done: done.start), aim=3),
        Row("container start, ready with the imports", "ms", seconds(lambda done: done.start_ready)),
        Row("a second session's first result", "ms", seconds(lambda done: done.further), aim=20),
        Row("a second session, ready with the imports", "ms", seconds(lambda done: done.further_ready)),
        Row(
            "round trip of `print(1)`",
            "ms",
            (ours, theirs),
            aim=30,
            note=f"the peer lost the text of {lost} of {len(theirs)} cells" if lost else "",
        ),
    ]


async def _until_told(engine: str, tag: str, rounds: int, trips: int) -> tuple[list[Round], list[Round]]:
    """`measure`, ended in order by SIGTERM as by SIGINT."""
    task = asyncio.current_task()
    assert task is not None
    with contextlib.suppress(NotImplementedError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    ours = Driver("actbox", [sys.executable, str(_FOLDER / "driven_actbox.py"), engine, tag])
    return await measure(ours, peer_ipybox.driver(), rounds, trips)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a round of each: shows that it works, measures little")
    parser.add_argument("--engine", default="docker", help="actbox's engine")
    parser.add_argument("--tag", default="default", help="actbox's environment")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks-docker.md too")
    arguments = parser.parse_args()
    rounds, trips = (1, 20) if arguments.quick else (5, 200)
    try:
        results = asyncio.run(_until_told(arguments.engine, arguments.tag, rounds, trips))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("bench: interrupted", file=sys.stderr)
        return 130
    table = report.table(rows(results), peer_ipybox.NAME)
    print(table)
    if arguments.write:
        told = {name: value for name, value in facts("").items() if value}
        machine = "\n".join(f"- {name}: {value}" for name, value in told.items())
        today = dt.datetime.now(tz=dt.UTC).date().isoformat()
        PAGE.write_text(_TEXT.format(table=table, machine=machine, day=today), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
