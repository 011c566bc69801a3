"""What a session may call, and how that is approved and bounded: the contract between calls and what is called.

How calls come and are answered is in `calls`; what is called is a function of the host (`functions`) or a tool of an
MCP server (`mcp_tools`). Nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from actbox.errors import InvalidArgument

_MAX_PAYLOAD = 32 << 20


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What a session may call.

    `per_cell` and `per_session` are numbers of calls, of whatever outcome; `in_flight` is how many may be at work at
    once (more wait inside); `bytes` is how large the arguments of a call, or its result, may be, at most 32 MiB.
    """

    per_cell: int = 1000
    per_session: int = 100_000
    in_flight: int = 16
    bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name, least in (("per_cell", 0), ("per_session", 0), ("in_flight", 1), ("bytes", 1024)):
            value = cast("object", getattr(self, name))
            if type(value) is not int or not least <= value < 1 << 53:
                raise InvalidArgument(name, value, f"pass a whole number from {least}")
        if self.bytes > _MAX_PAYLOAD:
            raise InvalidArgument("bytes", self.bytes, f"pass at most {_MAX_PAYLOAD}")


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call that waits for approval: the function's name, and its arguments by parameter, checked already.

    Those that the session has left out are there with their defaults, unless a server alone knows them.
    """

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Allow:
    """Approval of a call; with `arguments` these take the place of the session's, and are checked like them."""

    arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        given = cast("object", self.arguments)
        if given is not None and not isinstance(given, Mapping):
            raise InvalidArgument("arguments", given, "pass a dictionary: arguments by parameter")


@dataclass(frozen=True, slots=True)
class Deny:
    """Refusal of a call; the session's code sees the reason."""

    reason: str = "it was not approved"


Decision = bool | Allow | Deny
Approve = Callable[[FunctionCall], Decision | Awaitable[Decision]]


class Bound(Protocol):
    """Arguments that were checked: by parameter, for who approves, and as they are passed."""

    @property
    def arguments(self) -> Mapping[str, Any]: ...
    @property
    def args(self) -> tuple[Any, ...]: ...
    @property
    def kwargs(self) -> dict[str, Any]: ...


class Callee(Protocol):
    """What a session may call: `name` is what a call says, `told` what the session is told of it.

    One with a `module`, a name and a text, is in that module of `mcptools` inside, the others in the namespace.
    """

    @property
    def name(self) -> str: ...
    @property
    def approve(self) -> Approve | None: ...
    @property
    def told(self) -> dict[str, Any]: ...
    @property
    def call(self) -> Callable[..., Any]: ...
    @property
    def module(self) -> tuple[str, str] | None: ...

    def bind(self, args: list[Any], kwargs: dict[str, Any]) -> Bound:
        """The session's arguments, checked. Raises TypeError."""
        ...

    def rebind(self, arguments: Mapping[str, Any]) -> Bound:
        """The approver's arguments, checked. Raises TypeError."""
        ...

    def pack(self, result: Any) -> bytes:
        """The result as it travels."""
        ...


class NotCalled(Exception):
    """The function is not called; `status` is what the session is told, `verdict` what is recorded."""

    def __init__(self, status: str, message: str, verdict: Literal["denied", "refused"] = "refused") -> None:
        self.status = status
        self.verdict: Literal["denied", "refused"] = verdict
        super().__init__(message)


class ToolError(Exception):
    """A tool of a server failed, or its server did: `mcptools.ToolError` inside, with this message."""


class Raised(Exception):
    """The function was called, and raised this."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__()


def check_approve(approve: object) -> None:
    """Raises InvalidArgument unless calls can be approved by this."""
    if approve is not None and not callable(approve):
        raise InvalidArgument("approve", approve, "pass a function that takes a FunctionCall, or None")


def not_returned(name: str, why: str) -> Exception:
    """For `Callee.pack`: the function was called, and its result cannot travel."""
    return Raised(TypeError(f"the result of {name}() is not what can be returned: {why}"))


def has_bytes(value: Any) -> bool:
    """Whether there are bytes anywhere in a value as it came."""
    match value:
        case bytes():
            return True
        case list():
            return any(has_bytes(each) for each in cast("list[Any]", value))
        case dict():
            return any(has_bytes(each) for each in cast("dict[str, Any]", value).values())
        case _:
            return False
