"""What happens during an execution: a closed set of small frozen values, read by `match`.

Field names follow the Jupyter messaging specification, so that a Jupyter gateway is a mapping and nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MimeData = Mapping[str, Any]
"""MIME type to content: `str` for text, `bytes` for images and other binary formats, plain JSON values for JSON."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Text printed to standard output or standard error, by Python, a subprocess or C code."""

    name: Literal["stdout", "stderr"]
    text: str


@dataclass(frozen=True, slots=True)
class DisplayData:
    """The result of `display(...)`; `display_id` if it may be updated later, `left_out` formats were too large."""

    data: MimeData
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    display_id: str | None = None
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class UpdateDisplayData:
    """New content for every display of this `display_id`."""

    data: MimeData
    metadata: Mapping[str, Any]
    display_id: str | None
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class ExecuteResult:
    """The value of a cell's last expression."""

    data: MimeData
    metadata: Mapping[str, Any]
    execution_count: int
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class ClearOutput:
    """`clear_output()`; with `wait` the outputs go when the next one comes."""

    wait: bool


@dataclass(frozen=True, slots=True)
class Error:
    """An exception of the user's code; `traceback` has ANSI colours."""

    name: str
    value: str
    traceback: str


@dataclass(frozen=True, slots=True)
class KernelRestarted:
    """The kernel before this cell had died: the cell runs in a fresh one, without the session's state.

    With `rolled_back_to` it runs in a copy that was kept after the cell of that number (`recover=True`).
    """

    rolled_back_to: int | None = None


Event = Stream | DisplayData | UpdateDisplayData | ExecuteResult | ClearOutput | Error | KernelRestarted


@dataclass(frozen=True, slots=True)
class CallRecord:
    """A call of a cell, and what became of it; `seconds` with the time it waited for approval.

    "returned" and "raised" say that the function was called; "denied" that it was not approved; "refused" that it could
    not be called as asked; "abandoned" that the cell ended before it.
    """

    name: str
    verdict: Literal["returned", "raised", "denied", "refused", "abandoned"]
    seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The cell ran to its end."""

    execution_count: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The cell's own exception ended it; the state is kept."""

    error: Error
    execution_count: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """`interrupt()` or a cancelled task ended it; `started` is False if it never ran."""

    state_kept: bool
    error: Error | None = None
    started: bool = True
    rolled_back_to: int | None = None


@dataclass(frozen=True, slots=True)
class TimedOut:
    """It outlived its `timeout` (seconds); `started` is False if it waited behind other cells all that time."""

    timeout: float
    state_kept: bool
    started: bool = True
    rolled_back_to: int | None = None


@dataclass(frozen=True, slots=True)
class Died:
    """The kernel's process ended: by `signal`, or with `exit_code`; the state is lost."""

    signal: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    memory_limit: int | None = None
    rolled_back_to: int | None = None


@dataclass(frozen=True, slots=True)
class Overrun:
    """A limit that was passed: its name as in `Limits`, its bound, and what was in use, both in the limit's unit."""

    limit: str
    bound: float
    use: float


@dataclass(frozen=True, slots=True)
class Exceeded:
    """It went over one of the session's limits.

    `error` is the exception that the cell got, if the system refused it more (`MemoryError` and the like); otherwise it
    was interrupted, and its kernel was killed if `state_kept` is False.
    """

    overrun: Overrun
    state_kept: bool
    error: Error | None = None
    rolled_back_to: int | None = None


@dataclass(frozen=True, slots=True)
class Lost:
    """The container is gone, or broke the rules of the wire: whether the cell had its effects is unknown."""

    reason: str
    violation: bool = False


Ended = Interrupted | TimedOut | Died | Exceeded
"""How a cell ends that may cost the state; `rolled_back_to` is the cell whose state is back then, if it did."""

Outcome = Finished | Failed | Interrupted | TimedOut | Exceeded | Died | Lost
