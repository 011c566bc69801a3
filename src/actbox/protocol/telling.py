"""Events and outcomes as a gateway tells them to an attached client, and read back, strictly.

An event travels in the form in which kernels send it, so that what checks a kernel's word checks a gateway's: much of
it is the guest's own.
"""

from __future__ import annotations

import json
from typing import Any, cast

from actbox.errors import ProtocolError
from actbox.events import (
    ClearOutput,
    Died,
    DisplayData,
    Error,
    Event,
    Exceeded,
    ExecuteResult,
    Failed,
    Finished,
    Interrupted,
    KernelRestarted,
    Lost,
    MimeData,
    Outcome,
    Overrun,
    Stream,
    TimedOut,
    UpdateDisplayData,
)
from actbox.protocol import messages
from actbox.protocol.frames import Frame

_MAX_TEXT = 4000


def event_frame(event: Event) -> Frame:
    """An event as a frame."""
    match event:
        case Stream(name, text):
            return Frame({"type": "stream", "name": name}, text.encode())
        case DisplayData(data, metadata, display_id, left_out):
            return _bundle("display_data", data, {"metadata": metadata, "display_id": display_id, "left_out": left_out})
        case UpdateDisplayData(data, metadata, display_id, left_out):
            header = {"metadata": metadata, "display_id": display_id, "left_out": left_out}
            return _bundle("update_display_data", data, header)
        case ExecuteResult(data, metadata, count, left_out):
            header = {"metadata": metadata, "execution_count": count, "left_out": left_out}
            return _bundle("execute_result", data, header)
        case ClearOutput(wait):
            return Frame({"type": "clear_output", "wait": wait}, b"")
        case Error(name, value, traceback):
            return Frame({"type": "error", "ename": name, "evalue": value}, traceback.encode())
        case KernelRestarted(back):
            return Frame({"type": "restarted", "back": back}, b"")


def _bundle(kind: str, data: MimeData, header: dict[str, Any]) -> Frame:
    parts: list[list[Any]] = []
    blocks: list[bytes] = []
    for mime, value in data.items():
        if isinstance(value, bytes):
            form, block = "binary", value
        elif isinstance(value, str):
            form, block = "text", value.encode()
        else:
            form, block = "json", json.dumps(value).encode()
        parts.append([mime, form, len(block)])
        blocks.append(block)
    return Frame({"type": kind, "parts": parts, **header}, b"".join(blocks))


def read_event(header: object, payload: bytes) -> Event:
    """The event in a frame.

    Raises:
        ProtocolError: there is none.
    """
    if not isinstance(header, dict):
        raise ProtocolError("an event without a header")
    frame = Frame(cast("dict[str, Any]", header), payload)
    match frame.header:
        case {"type": "restarted", "back": int() | None as back}:
            return KernelRestarted(back)
        case _:
            pass
    message = messages.decode(frame)
    if isinstance(message, messages.Ready | messages.SetupFailed | messages.Reply | messages.Archive | messages.Call):
        raise ProtocolError("an event was expected")
    return message


def outcome_fields(outcome: Outcome) -> dict[str, Any]:
    """An outcome without its error, which is told apart: it may be long."""
    match outcome:
        case Finished(count):
            fields: dict[str, Any] = {"count": count}
        case Failed(_, count):
            fields = {"count": count}
        case Interrupted(kept, _, started, back):
            fields = {"kept": kept, "started": started, "back": back}
        case TimedOut(timeout, kept, started, back):
            fields = {"timeout": timeout, "kept": kept, "started": started, "back": back}
        case Exceeded(overrun, kept, _, back):
            passed = [overrun.limit, float(overrun.bound), float(overrun.use)]
            fields = {"overrun": passed, "kept": kept, "back": back}
        case Died(signal, exit_code, reason, memory, back):
            fields = {"signal": signal, "exit_code": exit_code, "reason": reason, "memory": memory, "back": back}
        case Lost(reason, violation):
            fields = {"reason": reason[:_MAX_TEXT], "violation": violation}
    return {"kind": type(outcome).__name__, **fields}


def outcome_error(outcome: Outcome) -> Error | None:
    """The exception that an outcome tells of."""
    return outcome.error if isinstance(outcome, Failed | Interrupted | Exceeded) else None


def read_outcome(fields: object, error: Error | None) -> Outcome:
    """The outcome that was told.

    Raises:
        ProtocolError: it is none.
    """
    match fields:
        case {"kind": "Finished", "count": int(count)}:
            return Finished(count)
        case {"kind": "Failed", "count": int(count)} if error is not None:
            return Failed(error, count)
        case {"kind": "Interrupted", "kept": bool(kept), "started": bool(started), "back": int() | None as back}:
            return Interrupted(kept, error, started, back)
        case {
            "kind": "TimedOut",
            "timeout": int() | float() as timeout,
            "kept": bool(kept),
            "started": bool(started),
            "back": int() | None as back,
        }:
            return TimedOut(timeout, kept, started, back)
        case {
            "kind": "Exceeded",
            "overrun": [str(limit), int() | float() as bound, int() | float() as use],
            "kept": bool(kept),
            "back": int() | None as back,
        }:
            return Exceeded(Overrun(limit, bound, use), kept, error, back)
        case {
            "kind": "Died",
            "signal": int() | None as signal,
            "exit_code": int() | None as exit_code,
            "reason": str() | None as reason,
            "memory": int() | None as memory,
            "back": int() | None as back,
        }:
            return Died(signal, exit_code, reason, memory, back)
        case {"kind": "Lost", "reason": str(reason), "violation": bool(violation)}:
            return Lost(reason, violation)
        case _:
            raise ProtocolError("an outcome was expected")
