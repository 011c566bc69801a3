"""Exceptions as a gateway tells them to a client, and read back, strictly: of each what it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actbox import errors
from actbox.errors import (
    CheckpointMissing,
    ConnectionError,
    DriveRefused,
    ExecutionTimeout,
    ExecutionUnknown,
    ForkRefused,
    InvalidArgument,
    LimitExceeded,
    ProtocolError,
    SandboxUnavailable,
    SessionBroken,
    SessionGone,
    StateError,
    TransferRefused,
)
from actbox.protocol.frames import Frame
from actbox.protocol.messages import legible

if TYPE_CHECKING:
    from actbox.errors import ActboxError

_MAX_REASON = 2000


def refusal_frame(exc: ActboxError) -> Frame:
    """An exception as a frame."""
    header: dict[str, Any] = {"type": "refused", "kind": type(exc).__name__, "reason": str(exc)[:_MAX_REASON]}
    match exc:
        case SessionGone() | CheckpointMissing():
            header |= {"subject": exc.name, "reason": exc.reason[:_MAX_REASON]}
        case ExecutionUnknown():
            header |= {"subject": exc.id, "reason": exc.reason[:_MAX_REASON]}
        case TransferRefused():
            header |= {"subject": exc.path, "reason": exc.reason[:_MAX_REASON]}
        case InvalidArgument():
            header |= {"subject": exc.name, "value": errors.shown(exc.value), "reason": exc.remedy[:_MAX_REASON]}
        case SandboxUnavailable():
            header |= {"subject": exc.layer, "value": exc.detail[:_MAX_REASON], "reason": exc.remedy}
        case ForkRefused():
            header |= {"reason": exc.reason[:_MAX_REASON]}
        case SessionBroken():
            header |= {"reason": exc.reason[:_MAX_REASON], "back": exc.rolled_back_to}
        case LimitExceeded():
            header |= {"subject": exc.limit, "bound": exc.bound, "use": exc.use, "kept": exc.state_kept}
            header |= {"value": (exc.value or "")[:_MAX_REASON], "reason": exc.name or "", "back": exc.rolled_back_to}
        case ExecutionTimeout():
            header |= {"timeout": exc.timeout, "kept": exc.state_kept, "started": exc.started, "subject": exc.what}
            header |= {"back": exc.rolled_back_to}
        case _:
            pass
    return Frame(header, b"")


def read_refusal(header: dict[str, Any]) -> ActboxError:
    """The exception that a frame tells of; where the gateway's words are none of these, a `ConnectionError`."""
    match header:
        case {"kind": "SessionGone", "subject": str(subject), "reason": str(reason)}:
            return SessionGone(subject, _plain(reason))
        case {"kind": "CheckpointMissing", "subject": str(subject), "reason": str(reason)}:
            return CheckpointMissing(subject, _plain(reason))
        case {"kind": "ExecutionUnknown", "subject": str(subject), "reason": str(reason)}:
            return ExecutionUnknown(subject, _plain(reason))
        case {"kind": "TransferRefused", "subject": str(subject), "reason": str(reason)}:
            return TransferRefused(subject, _plain(reason))
        case {"kind": "InvalidArgument" | "InvalidKey", "subject": str(subject), "value": value, "reason": str(reason)}:
            return InvalidArgument(subject, value, _plain(reason))
        case {"kind": "SandboxUnavailable", "subject": str(layer), "value": str(detail), "reason": str(reason)}:
            return SandboxUnavailable(_plain(layer), _plain(detail), _plain(reason))
        case {"kind": "LimitExceeded" | "ExecutionTimeout"}:
            return _read_bound(header)
        case {"kind": "SessionBroken", "reason": str(reason), "back": int() | None as back}:
            return SessionBroken(_plain(reason), rolled_back_to=back)
        case {"kind": "ForkRefused", "reason": str(reason)}:
            return ForkRefused(_plain(reason))
        case {"kind": "DriveRefused", "reason": str(reason)}:
            return DriveRefused(_plain(reason))
        case {"kind": "StateError", "reason": str(reason)}:
            return StateError(_plain(reason))
        case {"kind": "ProtocolError", "reason": str(reason)}:
            return ProtocolError(_plain(reason))
        case _:
            return ConnectionError(f"the gateway refused: {errors.shown(header.get('reason'), 300)}")


def _read_bound(header: dict[str, Any]) -> ActboxError:
    """Of something that went over a bound."""
    match header:
        case {
            "kind": "LimitExceeded",
            "subject": str(limit),
            "bound": int() | float() as bound,
            "use": int() | float() as use,
            "kept": bool(kept),
            "value": str(value),
            "reason": str(name),
            "back": int() | None as back,
        }:
            names = (_plain(name) or None, _plain(value) or None)
            return LimitExceeded(
                _plain(limit), bound, use, state_kept=kept, name=names[0], value=names[1], rolled_back_to=back
            )
        case {
            "kind": "ExecutionTimeout",
            "timeout": int() | float() as timeout,
            "kept": bool(kept),
            "started": bool(started),
            "subject": str(what),
            "back": int() | None as back,
        }:
            return ExecutionTimeout(timeout, state_kept=kept, started=started, what=_plain(what), rolled_back_to=back)
        case _:
            return ConnectionError("the gateway refused, and does not say why")


def _plain(text: str) -> str:
    """A gateway's words, made harmless for a terminal."""
    return legible(text[:_MAX_REASON].encode("utf-8", "backslashreplace").decode())
