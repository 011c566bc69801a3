"""The heads of HTTP messages: bytes in, frozen requests or refusals out. No I/O; what is allowed is not known here.

Two readings of one head are how requests are smuggled, so only one is taken (RFC 9112, the strict side of every choice)
and what goes on is written anew: one Host, one Content-Length, never a Transfer-Encoding, `Connection: close`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actbox.egress.verdicts import Reason, Refusal
from actbox.network import PLAIN_PORT, canonical_port

if TYPE_CHECKING:
    from actbox.egress.policy import Target

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
# Apache's default (LimitRequestFields), and that of most servers behind.
_MOST_FIELDS = 100

# With line feeds alone the head would be over too; that it is malformed is then said at once.
_END = re.compile(rb"\r?\n\r?\n")
# Bytes above ASCII are taken in a target only so that it can be said what is wrong with the host.
_REQUEST = re.compile(rb"([A-Z][A-Z-]{0,31}) ([\x21-\x7e\x80-\xff]+) HTTP/1\.([01])")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*")
_ABSOLUTE = re.compile(r"(?i:http)://([^/?#]*)([!-~]*)")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n]*)?")
# Between two neighbours only (RFC 9110, section 7.6.1), or made anew.
_DROPPED = frozenset(
    {
        *(b"connection", b"content-length", b"host", b"http2-settings", b"keep-alive", b"proxy-authenticate"),
        *(b"proxy-authorization", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)
_WITHOUT_BODY = frozenset({204, 304})  # RFC 9112, section 6.3
_PHRASES = {
    400: "Bad Request",
    403: "Forbidden",
    408: "Request Timeout",
    411: "Length Required",
    431: "Request Header Fields Too Large",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


@dataclass(frozen=True, slots=True)
class Connect:
    """`CONNECT host:port`: a tunnel is asked for. The host is as the guest wrote it."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """`GET http://host:port/path`: one plain request is to be made. The host is as the guest wrote it.

    `path` is what the host is to be asked for, `fields` what may be passed on, `length` the bytes of the body, None if
    there is none.
    """

    host: str
    port: int
    method: bytes
    path: bytes
    fields: tuple[tuple[bytes, bytes], ...]
    length: int | None

    def head(self, target: Target) -> bytes:
        """The head that goes to the target, whatever the guest had called it."""
        lines = [self.method + b" " + self.path + b" HTTP/1.1", b"Host: " + target.authority.encode()]
        lines += [name + b": " + value for name, value in self.fields]
        if self.length is not None:
            lines.append(b"Content-Length: %d" % self.length)
        return b"\r\n".join([*lines, b"Connection: close", b"", b""])


def end_of_head(data: bytes | bytearray, seen: int = 0) -> int | None:
    """Where the head ends that `data` begins with, its empty line included; None if it has not come yet.

    `seen` bytes were looked at before and had no end.
    """
    found = _END.search(data, max(0, seen - 3))
    return found.end() if found else None


def looks_like_http(data: bytes | bytearray) -> bool:
    """Whether the first byte can be that of a method: of TLS and SOCKS it cannot, and no head would ever end."""
    return data[:1].isalpha() and data[:1].isupper()


def parse(head: bytes) -> Connect | Fetch | Refusal:
    """What a whole head, its empty line included, asks for."""
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    request = _REQUEST.fullmatch(first)
    if request is None:
        return _malformed("the request line is malformed")
    if len(lines) > _MOST_FIELDS:
        return Refusal(431, Reason.TOO_LARGE, f"the request has more than {_MOST_FIELDS} header fields")
    fields: list[tuple[bytes, bytes]] = []
    for line in lines:
        # Folded lines, bare line ends and blanks before the colon do not match either.
        field = _FIELD.fullmatch(line)
        if field is None:
            return _malformed("a header field is malformed")
        fields.append((field[1], field[2]))
    method, target = request[1], request[2].decode("utf-8", "backslashreplace")
    if _count(fields, b"host") > 1:
        return _malformed("there is more than one Host")
    framed = {name.lower() for name, _ in fields} & {b"content-length", b"transfer-encoding"}
    if method == b"CONNECT":
        return _malformed("CONNECT has no body") if framed else _connect(target)
    return _fetch(method, target, fields)


@dataclass(frozen=True, slots=True)
class Answer:
    """The head of an answer: its status, the head as it goes to the guest, and the bytes of the body behind it.

    `length` is None if the body lasts until the connection ends, or tells its end itself.
    """

    status: int
    head: bytes
    length: int | None

    @property
    def final(self) -> bool:
        """Whether it is the answer itself, and not news of one to come (100 to 199)."""
        return self.status >= 200  # noqa: PLR2004 - RFC 9110, section 15


def answer(head: bytes, method: bytes) -> Answer | None:
    """What a whole head of an answer to this method says; None if it is none.

    A final one tells the guest that the connection ends with it, whatever the host said: there is one request on each.
    """
    first, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    found = _STATUS.fullmatch(first)
    if found is None:
        return None
    status = int(found[1])
    if status < 200:  # noqa: PLR2004 - there is more to come
        return Answer(status, head, 0)
    named: dict[bytes, list[bytes]] = {}
    for line in lines:
        name, _, value = line.partition(b":")
        named.setdefault(name.strip().lower(), []).append(value.strip())
    dropped = (b"connection:", b"keep-alive:", b"proxy-connection:", b"upgrade:")
    kept = [line for line in lines if not line.lower().startswith(dropped)]
    lengths = named.get(b"content-length", [])
    length = None
    if method == b"HEAD" or status in _WITHOUT_BODY:
        length = 0
    elif b"transfer-encoding" not in named and len(lengths) == 1 and _LENGTH.fullmatch(lengths[0]):
        length = int(lengths[0])
    return Answer(status, b"\r\n".join([first, *kept, b"Connection: close", b"", b""]), length)


def refuse(refusal: Refusal) -> bytes:
    """A whole answer. Clients show the status line alone when a tunnel is refused, so all is said there already."""
    lines = (
        f"HTTP/1.1 {refusal.status} {_PHRASES[refusal.status]}: {refusal.message}",
        "Content-Type: text/plain; charset=us-ascii",
        f"Content-Length: {len(refusal.message) + 1}",
        "Connection: close",
        "",
        f"{refusal.message}\n",
    )
    return "\r\n".join(lines).encode("ascii")


def _connect(target: str) -> Connect | Refusal:
    host, colon, digits = target.rpartition(":")
    port = canonical_port(digits)
    if not colon or port is None:
        return _malformed("CONNECT takes host:port, with a port from 1 to 65535")
    return Connect(host, port)


def _fetch(method: bytes, target: str, fields: list[tuple[bytes, bytes]]) -> Fetch | Refusal:
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        return _malformed("this is a proxy: it takes CONNECT host:port, and http:// addresses in full")
    host, colon, digits = absolute[1].partition(":") if "]" not in absolute[1] else absolute[1].rpartition(":")
    port = canonical_port(digits) if colon else PLAIN_PORT
    path = absolute[2]
    if port is None or "#" in path:
        return _malformed("the address is malformed")
    length = _body(fields)
    if isinstance(length, Refusal):
        return length
    named = {
        token.strip().lower()
        for name, value in fields
        if name.lower() in {b"connection", b"proxy-connection"}
        for token in value.split(b",")
    }
    kept = tuple((name, value) for name, value in fields if name.lower() not in _DROPPED | named)
    return Fetch(host, port, method, (path if path.startswith("/") else f"/{path}").encode(), kept, length)


def _body(fields: list[tuple[bytes, bytes]]) -> int | Refusal | None:
    """The bytes of the body; None if there is none. Anything that could be read in two ways is refused."""
    lengths = [value for name, value in fields if name.lower() == b"content-length"]
    if _count(fields, b"transfer-encoding"):
        if lengths:
            return _malformed("both Content-Length and Transfer-Encoding are given")
        return Refusal(411, Reason.MALFORMED, "over plain http a body needs a Content-Length, and no Transfer-Encoding")
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(value) for value in lengths):
        return _malformed("the Content-Length is malformed")
    return int(lengths[0]) if lengths else None


def _count(fields: list[tuple[bytes, bytes]], wanted: bytes) -> int:
    return sum(name.lower() == wanted for name, _ in fields)


def _malformed(problem: str) -> Refusal:
    return Refusal(400, Reason.MALFORMED, problem)
