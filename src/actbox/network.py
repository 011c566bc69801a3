"""Which hosts a session may reach: a frozen, validated value, and the grammar of names that it is written in.

This module does no I/O. What happens to a connection is decided in `egress`, by this value alone.
"""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING

from actbox.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["PLAIN_PORT", "Network", "Rule", "canonical_host", "canonical_port"]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# RFC 1035 section 2.3.4 counts 255 octets on the wire, which leaves 253 characters as text.
_LONGEST_NAME = 253
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})+", re.ASCII)
# A last label like these makes resolvers read the whole as an IPv4 address: 127.1, 0x7f.1, 0177.0.0.0x1.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_PORT = re.compile(r"[1-9][0-9]{0,4}", re.ASCII)
_LAST_PORT = 65535
_ENTRY = re.compile(r"(?P<plain>http://)?(?P<wild>\*\.)?(?P<name>[^:/*@]+)(?::(?P<port>[0-9]+))?", re.ASCII)
_EVERYTHING = re.compile(r"(?P<plain>http://)?\*(?::(?P<port>[0-9]+))?", re.ASCII)

# The port on which nothing but plain http is spoken.
PLAIN_PORT = 80
# Below a country's two letters these are registries, not registrants: co.uk, com.au, or.jp, gov.br.
_REGISTRIES = frozenset({"ac", "co", "com", "edu", "gob", "gov", "gouv", "govt", "mil", "ne", "net", "or", "org"})
_COUNTRY_LETTERS = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that is allowed: `name` on `port`.

    With `wild` it means every name below `name`, but not `name` itself; an empty `name` is then every name there is.
    With `plain` the port speaks http, else TLS.
    """

    name: str
    port: int
    wild: bool = False
    plain: bool = False

    def covers(self, host: str) -> bool:
        """Whether a canonical name falls under this rule, whatever the port. Only whole labels count."""
        if not self.wild:
            return host == self.name
        return not self.name or host.endswith(f".{self.name}")


@dataclass(frozen=True, slots=True)
class Network:
    """What one session may reach. By default, and with an empty list, nothing.

    Attributes:
        allow: names, each a domain name (`pypi.org`) or `*.` and a domain name, which means its sub-domains but not
            itself (`*.pythonhosted.org`). A port may follow (`example.org:8443`); without one the `ports` hold. What is
            spoken there is TLS, except on port 80 and where an entry begins with `http://`: there it is plain http.
            International names are spelled `xn--...`. Addresses cannot be listed.
        ports: the ports of entries without one. Default 443 alone; with 80 among them also plain http.
        private: domain names out of `allow` that may resolve to addresses that are not public: hosts of an intranet, or
            of a test, this machine included. Addresses of metadata services, link-local and multicast ones are refused
            even then.
        connections: connections at one time. Default 64.
        bytes_up: bytes that the session may send out, all connections together. Default 1 GiB.
        bytes_down: bytes that it may take in, all connections together. Default 16 GiB.
        idle_seconds: seconds without a byte in either direction after which a connection is closed. Default 300, for
            servers that think before they answer.
        header_bytes: bytes of a request's head. Default 16 KiB.
        header_seconds: seconds in which a request's head must have come. Default 10.
        dangerously_allow_all: take entries that let data out to anybody: `*`, and `*.` with a public suffix, such as
            `*.com` and `*.co.uk`. It allows nothing by itself. The registries' list of suffixes is longer than what is
            known here, and anybody can have a name below `github.io`: such an entry is the caller's to judge.

    Raises:
        InvalidArgument: an entry, a port or a bound that cannot be used.
    """

    allow: Collection[str] = ()
    _: KW_ONLY
    ports: Collection[int] = (443,)
    private: Collection[str] = ()
    connections: int = 64
    bytes_up: int = GIB
    bytes_down: int = 16 * GIB
    idle_seconds: float = 300.0
    header_bytes: int = 16 * KIB
    header_seconds: float = 10.0
    dangerously_allow_all: bool = False
    rules: frozenset[Rule] = field(init=False, repr=False, compare=False, default=frozenset())

    def __post_init__(self) -> None:
        if type(self.dangerously_allow_all) is not bool:
            raise InvalidArgument("network.dangerously_allow_all", self.dangerously_allow_all, "pass True or False")
        ports = tuple(_checked_port("ports", port) for port in _entries("ports", self.ports))
        if not ports:
            raise InvalidArgument("network.ports", (), "name at least one port, such as 443")
        allow = tuple(_checked_text("allow", entry) for entry in _entries("allow", self.allow))
        rules = frozenset(rule for entry in allow for rule in _rules(entry, ports, all_=self.dangerously_allow_all))
        private = tuple(_private(entry, rules) for entry in _entries("private", self.private))
        for name, least, most in _BOUNDS:
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise InvalidArgument(f"network.{name}", value, f"pass a whole number from {least} to {most}")
        for name in ("idle_seconds", "header_seconds"):
            value = getattr(self, name)
            # Also false of what is not a number at all.
            if type(value) not in (int, float) or not 0 < value <= _LONGEST_SECONDS:
                raise InvalidArgument(f"network.{name}", value, f"pass seconds above 0, up to {_LONGEST_SECONDS}")
        for name, value in {"allow": allow, "ports": ports, "private": private, "rules": rules}.items():
            object.__setattr__(self, name, value)


# The head must hold at least a name; more of it than a MiB is an attack. Each connection costs descriptors and memory.
_BOUNDS = (
    ("connections", 1, 4096),
    ("bytes_up", 1, (1 << 62) - 1),
    ("bytes_down", 1, (1 << 62) - 1),
    ("header_bytes", 1024, MIB),
)
_LONGEST_SECONDS = 86400


def canonical_host(text: str) -> str | None:
    """The one spelling of a domain name: lower case, no dot at the end; None for anything else.

    At least two labels of letters, digits and inner hyphens, 63 characters a label, 253 in all; the last label is no
    number. So no spelling of an address passes, nothing that holds NUL, `%`, blanks or non-ASCII characters (whose
    lower case may be ASCII), and nothing that a resolver could read in another way than this.
    """
    if not text.isascii():
        return None
    name = text.lower().removesuffix(".")
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name) or _NUMBER.fullmatch(name.rpartition(".")[2]):
        return None
    return name


def canonical_port(text: str) -> int | None:
    """A port from 1 to 65535, written as plain decimal digits without leading zeros; else None."""
    if not _PORT.fullmatch(text) or int(text) > _LAST_PORT:
        return None
    return int(text)


def _entries(name: str, values: object) -> tuple[object, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, (tuple, list, set, frozenset)):
        raise InvalidArgument(f"network.{name}", values, "pass a list; an empty one stands for nothing")
    return tuple(values)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType] - objects, so far


def _checked_port(name: str, value: object) -> int:
    if type(value) is not int or not 0 < value <= _LAST_PORT:
        raise InvalidArgument(f"network.{name}", value, "a port is a whole number from 1 to 65535")
    return value


def _checked_text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidArgument(f"network.{name}", value, "each entry is a text, such as 'pypi.org'")
    return value


def _rules(entry: str, ports: tuple[int, ...], *, all_: bool) -> list[Rule]:
    """What an entry of the list stands for."""
    name, wild, open_to_all = "", True, True
    found = _EVERYTHING.fullmatch(entry)
    if found is None:
        found = _ENTRY.fullmatch(entry)
        # Of a suffix even the top level may be meant; the grammar of names wants a label in front of it.
        wild = found is not None and found["wild"] is not None
        full = canonical_host(f"{'x.' if wild else ''}{found['name']}") if found else None
        if found is None or full is None:
            raise InvalidArgument(
                "network.allow",
                entry,
                "an entry is a domain name of at least two parts or '*.' and one, with ':port' behind it if need be; "
                "no address, no path, no scheme but http://, and international names as xn--",
            )
        name = full.removeprefix("x.") if wild else full
        open_to_all = wild and _is_public_suffix(name)
    if open_to_all and not all_:
        raise InvalidArgument(
            "network.allow", entry, "anybody can have a name there; list the names, or pass dangerously_allow_all=True"
        )
    return [Rule(name, port, wild, plain) for port, plain in _spoken(entry, found, ports)]


def _spoken(entry: str, found: re.Match[str], ports: tuple[int, ...]) -> list[tuple[int, bool]]:
    """The ports of an entry, each with whether plain http is spoken there."""
    plain = found["plain"] is not None
    if found["port"] is None:
        return [(PLAIN_PORT, True)] if plain else [(port, port == PLAIN_PORT) for port in ports]
    port = canonical_port(found["port"])
    if port is None:
        raise InvalidArgument("network.allow", entry, "a port is a whole number from 1 to 65535")
    return [(port, plain or port == PLAIN_PORT)]


def _is_public_suffix(name: str) -> bool:
    labels = name.split(".")
    return len(labels) == 1 or (
        len(labels) == 2 and len(labels[1]) == _COUNTRY_LETTERS and labels[0] in _REGISTRIES  # noqa: PLR2004 - a pair
    )


def _private(entry: object, rules: frozenset[Rule]) -> str:
    name = canonical_host(_checked_text("private", entry))
    if name is None:
        raise InvalidArgument("network.private", entry, "each entry is one domain name, without '*' and port")
    if not any(rule.covers(name) for rule in rules):
        raise InvalidArgument("network.private", entry, "it is not allowed at all; add it to 'allow' as well")
    return name
