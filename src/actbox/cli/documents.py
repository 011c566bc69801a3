"""JSON documents, for programs: what `--json` prints, in pure ASCII and whatever a guest has sent."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from actbox import ActboxError, ExecutionError, Output
from actbox.cli.exits import ExitCode, code_for, code_of
from actbox.events import Died, Exceeded, Failed, Finished, Interrupted, Lost, TimedOut

if TYPE_CHECKING:
    from actbox import Execution

__all__ = ["as_json", "document_of", "nothing_ran"]

_OUTCOMES = {
    ExitCode.FINISHED: "finished",
    ExitCode.ERROR: "error",
    ExitCode.INTERRUPTED: "interrupted",
    ExitCode.TIMED_OUT: "timed_out",
    ExitCode.DIED: "died",
    ExitCode.LOST: "lost",
    ExitCode.VIOLATION: "protocol_violation",
    ExitCode.UNAVAILABLE: "unavailable",
    ExitCode.HOST: "host_error",
    ExitCode.LIMIT: "limit_exceeded",
}
# Every document has every field. `outputs` are those of a notebook: bytes are base64, and `base64` names their types.
_EMPTY: dict[str, Any] = {
    "outcome": None,
    "message": None,  # one line that says what went wrong
    "text": None,
    "images": [],
    "outputs": [],
    "error": None,  # {"name", "value", "trace"}
    "state_kept": None,
    "signal": None,
    "exit_code": None,
    "memory_limit": None,
    "limit": None,  # {"name", "bound", "use"}
    "execution_count": None,
    "duration": None,
    "restarted": False,
    "truncated": False,
}


async def document_of(execution: Execution, timeout: float) -> dict[str, Any]:
    """The document of a cell, at its end, for which this waits."""
    document = dict(_EMPTY)
    try:
        await execution.result(timeout)
    except ActboxError as exc:
        document["message"] = str(exc)
        if isinstance(exc, ExecutionError) and exc.name is not None:
            document["error"] = {"name": exc.name, "value": exc.value, "trace": exc.trace}
    result = execution.so_far()
    document |= {
        "outcome": _OUTCOMES[code_for(execution.outcome)],
        "text": result.text,
        "images": [
            {"path": str(image.path) if image.path else None, "mime_type": image.mime_type, "size": len(image.data)}
            for image in result.images
        ],
        "outputs": [_output(output) for output in result.outputs],
        "duration": round(result.duration, 6),
        "restarted": result.restarted,
        "truncated": result.truncated,
    }
    match execution.outcome:
        case Finished(count) | Failed(_, count):
            document |= {"execution_count": count, "state_kept": True}
        case Interrupted(state_kept) | TimedOut(_, state_kept):
            document["state_kept"] = state_kept
        case Exceeded(overrun, state_kept):
            limit = {"name": overrun.limit, "bound": overrun.bound, "use": overrun.use}
            document |= {"limit": limit, "state_kept": state_kept}
        case Died(number, exit_code, _, memory_limit):
            document |= {"signal": number, "exit_code": exit_code, "memory_limit": memory_limit, "state_kept": False}
        case Lost() | None:
            document["state_kept"] = False
    return document


def nothing_ran(error: Exception) -> dict[str, Any]:
    """The document where something went wrong before the cell began."""
    return {**_EMPTY, "outcome": _OUTCOMES[code_of(error)], "message": str(error)}


def _output(output: Output) -> dict[str, Any]:
    binary = sorted(mime for mime, value in output.data.items() if isinstance(value, bytes))
    return {
        "kind": output.kind,
        "name": output.name,
        "text": output.text,
        "data": {mime: _content(value) for mime, value in output.data.items()},
        "base64": binary,
        "metadata": _content(output.metadata),
        "display_id": output.display_id,
        "execution_count": output.execution_count,
        "trace": output.trace,
    }


def _content(value: Any) -> Any:
    """A value of the guest's as JSON can hold it: its own may be deeper than can be written, or hold infinities."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    try:
        # Nested as deep as it will stand in the document.
        text = json.dumps([[[[[[[[value]]]]]]]])
    except RecursionError:
        return None
    return json.loads(text, parse_constant=str)[0][0][0][0][0][0][0][0]


def as_json(document: dict[str, Any]) -> str:
    """A document in a line."""
    # ASCII without controls, whatever is in it; json escapes all others.
    return json.dumps(document, ensure_ascii=True, allow_nan=False).replace("\x7f", "\\u007f") + "\n"
