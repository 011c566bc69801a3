"""What a log is told of an execution: a few words for people, and facts for programs. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actbox.events import Died, Ended, Exceeded, Failed, Finished, Interrupted, Lost, TimedOut
from actbox.outputs import strip_ansi

if TYPE_CHECKING:
    from actbox.events import Outcome
    from actbox.execution import Execution

_MAX_CHARACTERS = 10_000
_MAX_REASON = 300


def entry(execution: Execution, outcome: Outcome) -> tuple[str, dict[str, Any]]:
    """The message and the metadata of an execution that has ended.

    Of the metadata, "restarted" and "rolled_back_to" say what it began with: a fresh kernel, or the state after the
    cell of that number; "went_back_to" says whose state there is since it ended, where it cost the kernel.
    """
    result = execution.so_far()
    facts: dict[str, Any] = {
        **_subject(execution),
        "outcome": type(outcome).__name__,
        "seconds": round(result.duration, 4),
    }
    if isinstance(outcome, Failed):
        error = outcome.error
        facts["error"] = strip_ansi(error.traceback)[-_MAX_CHARACTERS:] or f"{error.name}: {error.value}"
    if result.text:
        facts["text"] = result.text[:_MAX_CHARACTERS]
    if result.images:
        facts["images"] = [str(image.path) for image in result.images]
    if result.restarted:
        facts["restarted"] = True
    if result.rolled_back_to is not None:
        facts["rolled_back_to"] = result.rolled_back_to
    if isinstance(outcome, Ended) and outcome.rolled_back_to is not None:
        facts["went_back_to"] = outcome.rolled_back_to
    return _words(outcome, "cell" if execution.transfer is None else "transfer"), facts


def _subject(execution: Execution) -> dict[str, Any]:
    if execution.transfer is None:
        return {"code": execution.code}
    return {name: value for name, value in execution.transfer.request.items() if name != "id"}


def _words(outcome: Outcome, what: str) -> str:
    match outcome:
        case Finished(count):
            return f"{what} {count} finished" if what == "cell" else f"{what} finished"
        case Failed(error, count):
            return f"{what} {count} failed: {error.name}" if what == "cell" else f"{what} failed"
        case Interrupted():
            return f"{what} interrupted, {_fate(outcome)}"
        case Exceeded(overrun):
            return f"{what} went over the limit {overrun.limit}, {_fate(outcome)}"
        case TimedOut(timeout):
            return f"{what} timed out after {timeout:g} s, {_fate(outcome)}"
        case Died():
            return f"kernel died, {_fate(outcome)}"
        case Lost(reason):
            return f"{what} lost: {reason[:_MAX_REASON]}"


def _fate(outcome: Ended) -> str:
    if not isinstance(outcome, Died) and outcome.state_kept:
        return "state kept"
    if outcome.rolled_back_to is not None:
        return f"back to the state after cell {outcome.rolled_back_to}"
    return "state lost"
