"""The ClientHello, the first thing that a TLS client says: which server it names. No I/O.

CONNECT names a host, but behind one address there are many, and the ClientHello says which is meant; unless the two are
one, the allow-list says nothing. OpenSSL reads it here, as a server would, and gives up once it has the name. A second,
shorter reading must agree to the byte, and finds what OpenSSL passes over: that the real name is hidden.
"""

from __future__ import annotations

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

    State: `_data`, all bytes so far; `_tls`, OpenSSL's reading of them through `_incoming`; `_names`, what it found:
    one entry once the hello is whole, None for no name.
    """

    def __init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.sni_callback = self._found
        self._names: list[str | None] = []
        self._data = bytearray()
        self._incoming = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, ssl.MemoryBIO(), server_side=True)

    def feed(self, data: bytes) -> Hello | None:
        """The ClientHello, once it is whole; None until then.

        Raises:
            NotTLS: these bytes, or as many as 16 KiB, are no ClientHello.
        """
        self._data += data
        self._incoming.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            if len(self._data) > MOST_BYTES:
                raise NotTLS("too long") from None
            return None
        except ssl.SSLError as exc:
            if not self._names:
                raise NotTLS("not a ClientHello") from exc
        if not self._names:
            raise NotTLS("not a ClientHello")
        name = self._names[0]
        try:
            extensions = _extensions(_client_hello(bytes(self._data)))
        except (IndexError, struct.error) as exc:
            raise NotTLS("not a ClientHello") from exc
        if extensions.get(_SERVER_NAME) != (None if name is None else _as_extension(name)):
            raise NotTLS("a ClientHello that can be read in two ways")
        return Hello(name, hides=not _HIDING.isdisjoint(extensions))

    def _found(self, _tls: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> int:
        self._names.append(name)
        return _UNRECOGNISED_NAME  # enough: the handshake ends here


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


# -- the second reading ---------------------------------------------------------------------------------------------


def _client_hello(data: bytes) -> bytes:
    """The body of the ClientHello, put together from the records that it came in.

    Raises:
        IndexError, struct.error, NotTLS: it is none, or not whole.
    """
    message = b""
    at = 0
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4]):  # noqa: PLR2004 - type and length
        kind, major, _, length = struct.unpack_from("!BBBH", data, at)
        if kind != _HANDSHAKE or major != 3 or not length or at + 5 + length > len(data):  # noqa: PLR2004 - SSL 3, TLS
            raise NotTLS("not a ClientHello")
        message += data[at + 5 : at + 5 + length]
        at += 5 + length
    if message[0] != _CLIENT_HELLO:
        raise NotTLS("not a ClientHello")
    return message[4 : 4 + int.from_bytes(message[1:4])]


def _extensions(hello: bytes) -> dict[int, bytes]:
    """The extensions, by their numbers. Raises like `_client_hello`."""
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


def _as_extension(name: str) -> bytes:
    """A server_name extension that holds this one name and nothing else."""
    raw = name.encode()
    return struct.pack("!HBH", len(raw) + 3, _HOST_NAME, len(raw)) + raw
