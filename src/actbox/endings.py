"""How an execution has ended, decided from why it was being ended, the kernel's reply, or the kernel's end. No I/O."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from actbox.calls import is_budget
from actbox.events import Died, Error, Exceeded, Failed, Finished, Interrupted, Lost, Outcome, Overrun, TimedOut

if TYPE_CHECKING:
    import asyncio

    from actbox.execution import Execution
    from actbox.sessions import Exit

Why = Literal["interrupt", "timeout", "limit"]


@dataclass(slots=True)
class Stop:
    """Why a running cell is being ended, the timer that will kill its kernel, and whether it has."""

    why: Why
    timeout: float
    overrun: Overrun | None = None
    killed: bool = False
    timer: asyncio.TimerHandle | None = None


def not_started(stop: Stop) -> Outcome:
    """It was ended while it waited."""
    if stop.why == "timeout":
        return TimedOut(stop.timeout, state_kept=True, started=False)
    return Interrupted(state_kept=True, started=False)


def replied(execution: Execution, stop: Stop | None, status: str, count: int, refused: Overrun | None) -> Outcome:
    """The kernel has replied; `refused` is the limit that it says stopped the code."""
    error = execution.fold.error if execution.fold is not None else None
    if stop is not None and stop.why == "timeout":
        return TimedOut(stop.timeout, state_kept=True)
    if stop is not None and stop.overrun is not None:
        return Exceeded(stop.overrun, state_kept=True)
    if stop is not None and status == "interrupted":
        return Interrupted(state_kept=True, error=error)
    if status == "ok":
        return Finished(count)
    if error is not None and execution.calls_over is not None and is_budget(error.name):
        return Exceeded(execution.calls_over, state_kept=True, error=error)
    if refused is not None and error is not None:
        return Exceeded(refused, state_kept=True, error=error)
    return Failed(error or Error("KeyboardInterrupt" if status == "interrupted" else "Error", "", ""), count)


def ended(execution: Execution, stop: Stop | None, cell: int, exit_: Exit | None, *, lived_on: bool) -> Outcome | None:
    """The kernel's stream has ended without a reply; None if the cell had not begun.

    Args:
        execution: which the kernel had been sent.
        stop: why it was being ended, if it was.
        cell: its number.
        exit_: how the kernel ended; None if that is not known.
        lived_on: the kernel had closed its stream, and was killed for that.
    """
    if exit_ is not None and exit_.violation is not None:
        return violation(exit_.violation)
    if exit_ is not None and exit_.gone:
        return Lost("the container is gone")
    if exit_ is not None and exit_.overrun is not None:
        return Exceeded(exit_.overrun, state_kept=False)
    if stop is not None:
        if stop.overrun is not None:
            return Exceeded(stop.overrun, state_kept=False)
        if stop.why == "timeout":
            return TimedOut(stop.timeout, state_kept=False)
        return Interrupted(state_kept=False)
    if exit_ is not None and exit_.killed and not lived_on:
        return Lost("the session was closed")
    if exit_ is not None and exit_.begun is not None and exit_.begun < cell and not execution.has_output:
        return None
    return Died(reason="it closed its stream and was killed") if lived_on else _death(exit_)


def violation(what: str) -> Lost:
    """What came was not what a kernel may send."""
    return Lost(f"the session was ended, its guest broke the rules of the wire: {what}", violation=True)


def _death(exit_: Exit | None) -> Died:
    if exit_ is None or exit_.status is None:
        return Died(reason="nothing is known of its end")
    if os.WIFSIGNALED(exit_.status):
        return Died(signal=os.WTERMSIG(exit_.status), memory_limit=exit_.memory_limit)
    return Died(exit_code=os.waitstatus_to_exitcode(exit_.status))
