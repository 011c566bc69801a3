"""Rows of measurements, and the table and page made of them. No I/O, no clock: the same rows give the same text."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import date

    Pair = tuple[Sequence[float], Sequence[float]]

COMMAND = "make bench"
# By so much of what it is without them may the layers make a thing slower, or the page says why.
MOST_GROWTH = 0.25


@dataclass(frozen=True, slots=True)
class Row:
    """One thing that was measured in both, in the same unit: `values` are ours and theirs.

    `aim` is the ratio that is wanted, None if none is; `complete` is False where a number lacks something, and then
    no aim counts as met; `note` says what.
    """

    what: str
    unit: str
    values: Pair
    aim: float | None = None
    more_is_better: bool = False
    complete: bool = True
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times better ours is, by the medians."""
        ours, theirs = map(statistics.median, self.values)
        return ours / theirs if self.more_is_better else theirs / ours

    @property
    def verdict(self) -> str:
        """Whether the aim was met, as the table says it."""
        if self.aim is None:
            return ""
        if not self.complete:
            return "not known"
        return "yes" if self.ratio >= self.aim else "no"


def table(rows: Sequence[Row], peer: str) -> str:
    """The rows as a Markdown table, aligned so that it can be read as it is."""
    lines: list[Sequence[str]] = [("", "actbox", peer, "ratio", "aim", "met")]
    for number, row in enumerate(rows):
        mark = f" [{_mark(rows, number)}]" if row.note else ""
        aim = "" if row.aim is None else f"{row.aim:g}"
        what = f"{row.what}, {row.unit}{mark}"
        lines.append((what, *map(_spread, row.values), f"{row.ratio:.1f}", aim, row.verdict))
    notes = [f"[{_mark(rows, number)}] {row.note}" for number, row in enumerate(rows) if row.note]
    return "\n".join(_aligned(lines) if not notes else [*_aligned(lines), "", *notes])


def costs(rows: Sequence[Row]) -> str:
    """What something costs, as a Markdown table: `values` are those with it and without it, less is better."""
    lines: list[Sequence[str]] = [("", "all layers", "without", "growth", f"at most {MOST_GROWTH:.0%}")]
    for row in rows:
        growth = 1 / row.ratio - 1
        met = "yes" if growth <= MOST_GROWTH else "no"
        lines.append((f"{row.what}, {row.unit}", *map(_spread, row.values), f"{growth:+.0%}", met))
    return "\n".join(_aligned(lines))


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rule = "|".join(
        "-" * (widths[0] + 2) if column == 0 else f"{'-' * (width + 1)}:" for column, width in enumerate(widths)
    )
    return [_line(lines[0], widths), f"|{rule}|", *(_line(line, widths) for line in lines[1:])]


def page(
    rows: Sequence[Row],
    cost: Sequence[Row],
    peer: str,
    facts: Mapping[str, str],
    day: date,
    command: str = COMMAND,
) -> str:
    """The page of the docs: what was measured, where, how, and what came out."""
    machine = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return _PAGE.format(
        table=table(rows, peer), costs=costs(cost), machine=machine, day=day.isoformat(), command=command
    )


def _mark(rows: Sequence[Row], number: int) -> int:
    return sum(1 for row in rows[: number + 1] if row.note)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if column == 0 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join((first, *others))} |"


def _spread(values: Sequence[float]) -> str:
    return f"{_short(statistics.median(values))} ({_short(min(values))}-{_short(max(values))})"


def _short(value: float) -> str:
    """Three digits that count, never in powers of ten."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


_PAGE = """\
# Benchmarks

Written by `{command}` on {day}; run it to have the table for your own machine.

{table}

A cell holds the median, and the smallest and largest value behind it. The ratio is that of the medians, how many times
better actbox is; below 1 the peer is better.

## What was compared

actbox with its whole boundary (bubblewrap, a sandbox of its own for each session, seccomp) against `jupyter_client`
and `ipykernel` as they come from PyPI, with no sandbox at all: the kindest peer there is, since whatever isolates it
only adds to its numbers. Both run the same interpreter and the same libraries from the same place, with bytecode.

- **Start to the first result**: until the cell `import numpy, pandas, matplotlib.pyplot` and then `1+1` have given
  their results. actbox: from entering `CodeExecutionContainer` and `CodeExecutor`; the peer: from `start_kernel()` and
  `wait_for_ready()`.
- **A further session**: the container runs and its libraries are loaded, the peer has one kernel running. *Takes cells*
  is when `connect()`, or `wait_for_ready()`, has returned; *ready* is when the cell with the imports has ended too. Of
  the peer's time 0.2 s is `wait_for_ready()` seeing that no more output comes.
  They are opened one after the other, so that actbox has had the time to prepare the next; sessions opened *at once*
  find one prepared and no more.
- **Round trip**: a cell, from the call to its result. The peer's has ended when both its reply and its `idle` have
  arrived, as the protocol demands; they are awaited without polling, by the asynchronous client.
- **Streaming**: 100 MB in 1000 writes to `sys.stdout`, read as they come, every character counted on arrival.
- **Print loop**: `for i in range(n): print(i)`, the same way.
- **Interrupt**: an endless loop, from asking for its interrupt to its end, with the state kept.
- **Unique memory**: the private pages (USS: `Private_*` of `/proc/PID/smaps_rollup`) of all processes of a further
  session, after the cell with the imports, while a first session stays open. Its processes are those that are gone once
  it is closed; one that actbox keeps in store for the next session is not among them. Pages that only a session's own
  processes share count for none of them: of actbox's two, about 1 MiB more.
- **Close**: from asking for it until the kernel is gone.

Runs alternate, one of actbox and one of the peer, so that what else the machine does meets both; the first run of each
is not counted.

## What the layers cost

{costs}

Both have the outer boundary, bubblewrap's. The layers are those that the guest code builds inside it: namespaces and a
root for each session, Landlock, both system call filters, limits, no capabilities, the watchdog's looks. In *without*
each is left out, in a copy of the guest code that only this measurement uses. Sessions are opened one after the other,
each when the one made ahead for it is there; runs alternate as above. Proxies for `network=` are off.
What is done ahead of need (the fork, the namespaces) is in neither number; what a start has more is its own root, built
mount by mount, and the filter.

## Where

{machine}
"""
