"""The ClientHello, the first thing that a TLS client says: which server it names. No I/O.

CONNECT names a host, but behind one address there are many, and the ClientHello says which is meant; unless the two are
one, the allow-list says nothing. It is read twice, and both readings must agree to the byte: strictly and briefly here,
which also finds a name that is hidden, and by OpenSSL, as a server would read it.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from actbox.egress.verdicts import Reason, Refusal

if TYPE_CHECKING:
    from actbox.egress.policy import Target

# A plain one takes 250 to 600 bytes, one with a post-quantum key share under 2,000; a record holds 16 KiB.
MOST_BYTES = 16 << 10
# Seconds. It is the client's first word, and waits for nobody.
MOST_SECONDS = 5.0

_SERVER_NAME = 0  # RFC 6066
_HIDING = frozenset({0xFE0D, 0xFFCE})  # RFC 9849: encrypted_client_hello; and its predecessor encrypted_server_name
_HANDSHAKE = 22  # RFC 8446, section 5.1
_CLIENT_HELLO = 1
_HOST_NAME = 0
_RECORD = struct.Struct("!BBBH")  # kind, version, length
_NAMED = struct.Struct("!HBH")  # length of the list, kind, length of the name
_VISIBLE = re.compile(rb"[!-~]{1,255}")
# Before these stand the version and the random bytes.
_FIXED = 2 + 32
_ACCESS_DENIED = 49
_UNRECOGNISED_NAME = 112
_INTERNAL_ERROR = 80


@dataclass(frozen=True, slots=True)
class Hello:
    """A whole ClientHello: the name in it, None for none, and whether it carries another that cannot be read."""

    name: str | None
    hides: bool


class NotTLS(ValueError):
    """What was sent is not the beginning of a TLS connection that could be read."""


class HelloReader:
    """Takes the bytes of a connection as they come, until the ClientHello is whole.

    State: `_data`, all bytes so far; `_next`, where in them the next record begins; `_message`, what the records before
    it held.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._next = 0
        self._message = bytearray()

    def feed(self, data: bytes) -> Hello | None:
        """The ClientHello, once it is whole; None until then.

        Raises:
            NotTLS: these bytes, or as many as 16 KiB, are no ClientHello.
        """
        self._data += data
        while (length := self._missing()) is None or length > 0:
            if not self._take_record():
                if len(self._data) > MOST_BYTES:
                    raise NotTLS("too long")
                return None
        try:
            extensions = _extensions(bytes(self._message[4 : len(self._message) + (length or 0)]))
        except (IndexError, struct.error) as exc:
            raise NotTLS("not a ClientHello") from exc
        name = _server_name(extensions)
        if _as_openssl_reads(bytes(self._data)) != [name]:
            raise NotTLS("a ClientHello that can be read in two ways")
        return Hello(name, hides=not _HIDING.isdisjoint(extensions))

    def _missing(self) -> int | None:
        """How many bytes of the message are still to come, less than 0 if there are more; None if it cannot be told."""
        if len(self._message) < 4:  # noqa: PLR2004 - its type and length
            return None
        if self._message[0] != _CLIENT_HELLO:
            raise NotTLS("not a ClientHello")
        return 4 + int.from_bytes(self._message[1:4]) - len(self._message)

    def _take_record(self) -> bool:
        """Move the next record into the message; False if it has not come yet."""
        head = self._data[self._next : self._next + _RECORD.size]
        if head and head[0] != _HANDSHAKE:
            raise NotTLS("not a ClientHello")
        if len(head) < _RECORD.size:
            return False
        _, major, _, length = _RECORD.unpack(head)
        if major != 3 or not 0 < length <= MOST_BYTES:  # noqa: PLR2004 - of SSL 3 and every TLS
            raise NotTLS("not a ClientHello")
        end = self._next + _RECORD.size + length
        if len(self._data) < end:
            return False
        self._message += self._data[self._next + _RECORD.size : end]
        self._next = end
        return True


def judge(hello: Hello, target: Target) -> Refusal | None:
    """Whether a ClientHello is for the host that CONNECT named; None if it is."""
    if hello.hides:
        return Refusal(403, Reason.HIDDEN_SERVER_NAME, "the ClientHello is encrypted (ECH)")
    if hello.name is None:
        return Refusal(403, Reason.NO_SERVER_NAME, "the ClientHello names no server (SNI)")
    # No dot at the end: RFC 6066, section 3.
    if hello.name.lower() != target.host:
        return Refusal(403, Reason.OTHER_SERVER_NAME, "the ClientHello names another server than CONNECT")
    return None


def alert(refusal: Refusal) -> bytes:
    """What a TLS client is told before its connection is closed, so that it does not report a broken network."""
    match refusal.reason:
        case Reason.OTHER_SERVER_NAME | Reason.NO_SERVER_NAME:
            code = _UNRECOGNISED_NAME
        case Reason.HIDDEN_SERVER_NAME:
            code = _ACCESS_DENIED
        case _:
            code = _INTERNAL_ERROR
    return bytes((21, 3, 3, 0, 2, 2, code))  # RFC 8446, section 6: an alert record, fatal


# -- the two readings -----------------------------------------------------------------------------------------------


def _extensions(hello: bytes) -> dict[int, bytes]:
    """The extensions of a ClientHello's body, by their numbers.

    Raises:
        IndexError, struct.error, NotTLS: it is none.
    """
    at = _FIXED
    at += 1 + hello[at]  # the session's number
    at += 2 + struct.unpack_from("!H", hello, at)[0]  # the ciphers
    at += 1 + hello[at]  # the compressions
    if at == len(hello):
        return {}
    if at + 2 + struct.unpack_from("!H", hello, at)[0] != len(hello):
        raise NotTLS("not a ClientHello")
    at += 2
    found: dict[int, bytes] = {}
    while at < len(hello):
        number, length = struct.unpack_from("!HH", hello, at)
        if number in found or at + 4 + length > len(hello):
            raise NotTLS("not a ClientHello")
        found[number] = hello[at + 4 : at + 4 + length]
        at += 4 + length
    return found


def _server_name(extensions: dict[int, bytes]) -> str | None:
    """The one name in the extension for it."""
    body = extensions.get(_SERVER_NAME)
    if body is None:
        return None
    name = body[_NAMED.size :]
    if body[: _NAMED.size] != _NAMED.pack(len(name) + 3, _HOST_NAME, len(name)) or not _VISIBLE.fullmatch(name):
        raise NotTLS("a server name that is none")
    return name.decode("ascii")


def _as_openssl_reads(data: bytes) -> list[str | None]:
    """The names that a server finds in a connection's first bytes: one, None for none; or no entry if it gives up."""
    names: list[str | None] = []

    def found(_tls: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int:
        names.append(name)
        return _UNRECOGNISED_NAME  # enough: the handshake ends here

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = found
    incoming = ssl.MemoryBIO()
    incoming.write(data)
    with contextlib.suppress(ssl.SSLError):
        context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True).do_handshake()
    return names
