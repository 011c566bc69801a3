"""What a session has run, for notebooks: the newest cells with all that they put out, within a bound."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from actbox.events import Died, Exceeded, Failed, Finished, Interrupted, Lost, Outcome, TimedOut
from actbox.result import bundle_size

if TYPE_CHECKING:
    from datetime import datetime

    from actbox.execution import Execution
    from actbox.outputs import Output
    from actbox.result import ExecutionResult

__all__ = ["MAX_CELLS", "Cell", "History", "Marker", "outcome_name", "state_kept"]

MAX_CELLS = 1000
# What a cell costs beside its code and its outputs.
_OVERHEAD = 1024


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell that was submitted, and what is known of it.

    `outcome` is None while it runs or waits; `started` is None if it never began; `error` names the exception that it
    ended with. `forgotten` bytes of outputs, more than a record holds, are not in `result`.
    """

    code: str
    result: ExecutionResult
    outcome: Outcome | None
    started: datetime | None
    error: str | None = None
    forgotten: int = 0


@dataclass(frozen=True, slots=True)
class Marker:
    """What happened between two cells, in a sentence of ours."""

    text: str


class History:
    """A record of the cells that were submitted, in their order: the newest `MAX_CELLS`, of at most `limit` bytes.

    A cell that is larger by itself is kept without its outputs. With a limit of 0 nothing is kept.

    State: `_ended`, the cells that have ended, with their sizes, of `_size` bytes together; `_open`, the executions
    behind them; `forgotten`, how many cells are no longer here.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ended: deque[tuple[Cell | Marker, int]] = deque()
        self._size = 0
        self._open: deque[Execution | Marker] = deque()
        self.forgotten = 0

    def add(self, execution: Execution) -> None:
        """A cell that was just submitted."""
        if self._limit:
            self._settle()
            self._open.append(execution)

    def mark(self, text: str) -> None:
        """Something happened just now: before the cells that wait."""
        if self._limit:
            self._settle()
            ran = sum(1 for item in self._open if isinstance(item, Marker) or item.outcome or item.started)
            self._open.insert(ran, Marker(text))

    def branch(self) -> History:
        """A record that begins with what this one holds, and goes on by itself."""
        made = History(self._limit)
        self._settle()
        made._ended.extend(self._ended)
        made._size, made.forgotten = self._size, self.forgotten
        return made

    def cells(self) -> list[Cell]:
        """The cells, the oldest first; those that still run or wait among them."""
        return [entry for entry in self.entries() if isinstance(entry, Cell)]

    def entries(self) -> list[Cell | Marker]:
        """The cells, and what happened between them."""
        self._settle()
        still = (item if isinstance(item, Marker) else _cell(item) for item in self._open)
        return [*(cell for cell, _ in self._ended), *still]

    def _settle(self) -> None:
        while self._open:
            first = self._open[0]
            if isinstance(first, Marker):
                self._open.popleft()
                self._ended.append((first, _OVERHEAD))
                self._size += _OVERHEAD
                continue
            if first.outcome is None:
                break
            self._open.popleft()
            cell = _cell(first)
            size = _OVERHEAD + len(cell.code) + sum(map(_size, cell.result.outputs))
            if size > self._limit:
                cell, size = _without_outputs(cell, size), _OVERHEAD + len(cell.code)
            self._ended.append((cell, size))
            self._size += size
        while self._size > self._limit or len(self._ended) > MAX_CELLS:
            item, size = self._ended.popleft()
            self._size -= size
            self.forgotten += isinstance(item, Cell)


def _cell(execution: Execution) -> Cell:
    error = execution.error
    return Cell(
        execution.code,
        execution.so_far(),
        execution.outcome,
        execution.started,
        None if error is None else type(error).__name__,
    )


def _without_outputs(cell: Cell, size: int) -> Cell:
    result = replace(cell.result, text=None, images=[], outputs=[])
    return replace(cell, result=result, forgotten=size - _OVERHEAD - len(cell.code))


def _size(output: Output) -> int:
    return len(output.text) + len(output.trace or "") + bundle_size(output.data, output.metadata)


def outcome_name(outcome: Outcome | None) -> str:
    """An outcome in a word, for programs."""
    match outcome:
        case Finished():
            return "finished"
        case Failed():
            return "error"
        case Interrupted():
            return "interrupted"
        case TimedOut():
            return "timed_out"
        case Exceeded():
            return "limit_exceeded"
        case Died():
            return "died"
        case Lost(violation=True):
            return "protocol_violation"
        case Lost():
            return "lost"
        case None:
            return "running"


def state_kept(outcome: Outcome | None) -> bool | None:
    """Whether the session's variables survived the cell; None if that is not known yet."""
    match outcome:
        case None:
            return None
        case Finished() | Failed():
            return True
        case Interrupted(kept) | TimedOut(_, kept) | Exceeded(_, kept):
            return kept
        case _:
            return False
