"""How a connection ends, in closed sets of words, and the record of it. No I/O."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

_LONGEST = 120


class Verdict(StrEnum):
    """What became of a connection."""

    ALLOWED = "allowed"
    """It was relayed until one of the two sides ended it."""
    REFUSED = "refused"
    """The rules forbid it, or the guest did not keep to the protocol. Nothing went out."""
    FAILED = "failed"
    """It was allowed, but the host could not be reached, or did not answer in HTTP."""
    CUT = "cut"
    """It was relayed until a bound was reached, or the proxy was closed."""


class Reason(StrEnum):
    """Why a connection ended."""

    ENDED = "ended by one of the two sides"
    # refused
    MALFORMED = "the request is malformed"
    NOT_A_NAME = "the host is not a domain name"
    NOT_LISTED = "the host is not on the allow-list"
    PORT = "the port is not on the allow-list"
    NOT_PUBLIC = "the host has no public address"
    NOT_TLS = "what was sent is not TLS"
    NO_SERVER_NAME = "the ClientHello names no server"
    OTHER_SERVER_NAME = "the ClientHello names another server"
    HIDDEN_SERVER_NAME = "the ClientHello hides the server's name"
    TOO_LARGE = "the head is too large"
    TOO_SLOW = "the head did not come in time"
    LEFT = "the guest left before its request was whole"
    CONNECTIONS = "too many connections at one time"
    # failed
    NOT_RESOLVED = "the name does not resolve"
    RESOLVING_TOO_SLOW = "the name was not resolved in time"
    UNREACHABLE = "the host cannot be reached"
    CONNECTING_TOO_SLOW = "the host did not accept the connection in time"
    BAD_ANSWER = "the host did not answer in HTTP"
    # cut, and before anything was relayed refused
    BYTES_UP = "the session may not send more"
    BYTES_DOWN = "the session may not receive more"
    IDLE = "nothing moved for too long"
    CLOSED = "the session was closed"


FAILURES = frozenset(
    {
        Reason.NOT_RESOLVED,
        Reason.RESOLVING_TOO_SLOW,
        Reason.UNREACHABLE,
        Reason.CONNECTING_TOO_SLOW,
        Reason.BAD_ANSWER,
    }
)


@dataclass(frozen=True, slots=True)
class Refusal:
    """That a connection goes no further: the HTTP status and the one line that the guest is told, and why."""

    status: int
    reason: Reason
    message: str


@dataclass(frozen=True, slots=True)
class Record:
    """One connection, as it is logged when it is over. All texts are printable ASCII, whatever the guest sent.

    Attributes:
        time: seconds since 1970 (UTC) at which it began.
        host: the name asked for, at most 120 characters; "" if the request never became readable.
        port: the port asked for; 0 if there was none.
        address: the address connected to; "" if none was.
        verdict: what became of it.
        reason: why it ended.
        bytes_up: bytes sent to the host, TLS and rewritten heads included.
        bytes_down: bytes received from the host.
        seconds: how long it took.
        suppressed: how many refused and failed connections before this one were left out of the log because there
            were too many of them.
    """

    time: float
    host: str
    port: int
    address: str
    verdict: Verdict
    reason: Reason
    bytes_up: int
    bytes_down: int
    seconds: float
    suppressed: int = 0

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds")
        target = f"{self.host or '-'}:{self.port or '-'}{f' ({self.address})' if self.address else ''}"
        size = f"{self.bytes_up} bytes up, {self.bytes_down} down, {self.seconds:.3f} s"
        left_out = f"; {self.suppressed} more before it" if self.suppressed else ""
        return f"{when} {self.verdict} {target}: {self.reason}; {size}{left_out}"


class Allowance:
    """How many refusals may be logged: a guest that asks without end must not fill the host's disk.

    A burst of `burst`, refilled at `burst` a minute. What was relayed or cut is always logged: it cost a connection.

    State: `_left`, refusals that may still be logged, as of `_since`; `_suppressed`, those left out since the last one
    that was logged.
    """

    def __init__(self, burst: int = 300) -> None:
        self._burst = burst
        self._left = float(burst)
        self._since = time.monotonic()
        self._suppressed = 0

    def take(self, verdict: Verdict) -> int | None:
        """How many were left out before this one, which may be logged; None if this one is to be left out too."""
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._since) * self._burst / 60)
        self._since = now
        if verdict in (Verdict.REFUSED, Verdict.FAILED):
            if self._left < 1:
                self._suppressed += 1
                return None
            self._left -= 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed


def escaped(text: str) -> str:
    """A text of the guest's as printable ASCII of at most 120 characters."""
    safe = ascii(text)[1:-1]
    return safe if len(safe) <= _LONGEST else f"{safe[: _LONGEST - 3]}..."
