"""What is decided about a connection: who may be asked for, and which addresses may be connected to. No I/O.

Every decision is made here, on one spelling of a name and from one frozen `Network`; what is not allowed is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import TYPE_CHECKING

from actbox.egress.verdicts import Reason, Refusal, escaped
from actbox.network import canonical_host

if TYPE_CHECKING:
    from collections.abc import Iterable

    from actbox.network import Network

Address = IPv4Address | IPv6Address

# Characters that cannot stand in a host at all; what is free of them is refused as a host, not as a request.
_NOT_IN_A_HOST = re.compile(r"[\x00-\x20\x7f%/?#@\\]")
# A name that resolves to more addresses is tried at the first few.
_MOST_ADDRESSES = 4


@dataclass(frozen=True, slots=True)
class Target:
    """A host and port that are allowed: `host` in its one spelling; `plain` for http, else TLS is spoken."""

    host: str
    port: int
    plain: bool
    private: bool

    @property
    def authority(self) -> str:
        """As it stands in a Host field, where http's own port is left out."""
        return self.host if self.port == 80 else f"{self.host}:{self.port}"  # noqa: PLR2004 - http's own port


def decide(network: Network, host: str, port: int, *, plain: bool) -> Target | Refusal:
    """Whether what the guest wrote as host and port may be reached, in plain http or in TLS."""
    name = canonical_host(host)
    if name is None:
        shown = escaped(host)
        if not host or _NOT_IN_A_HOST.search(host):
            return Refusal(400, Reason.MALFORMED, f"'{shown}' cannot be the name of a host")
        return Refusal(403, Reason.NOT_A_NAME, f"'{shown}' is not a domain name; addresses cannot be allowed")
    rules = [rule for rule in network.rules if rule.covers(name)]
    if not rules:
        return Refusal(403, Reason.NOT_LISTED, f"{name} is not on the allow-list of this session")
    rules = [rule for rule in rules if rule.port == port]
    if not rules:
        return Refusal(403, Reason.PORT, f"port {port} of {name} is not on the allow-list of this session")
    if not any(rule.plain == plain for rule in rules):
        spoken = "TLS" if plain else "plain http"
        return Refusal(403, Reason.PORT, f"port {port} of {name} is allowed for {spoken} alone")
    return Target(name, port, plain, private=name in network.private)


def acceptable(target: Target, addresses: Iterable[Address]) -> tuple[Address, ...] | Refusal:
    """The addresses, out of all that a name resolved to, that may be connected to: in their order, four at the most."""
    plain = [(isinstance(address, IPv6Address) and address.ipv4_mapped) or address for address in addresses]
    kept = [address for address in plain if is_public(address) or (target.private and is_connectable(address))]
    if not kept:
        return Refusal(403, Reason.NOT_PUBLIC, f"{target.host} is on the allow-list, but has no public address")
    return tuple(dict.fromkeys(kept))[:_MOST_ADDRESSES]


# -- addresses ------------------------------------------------------------------------------------------------------

_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052
_COMPATIBLE = IPv6Network("::/96")  # RFC 4291, section 2.5.5.1
_V4_NEVER_PUBLIC = (
    IPv4Network("192.0.0.0/24"),  # RFC 6890: protocol assignments; older Pythons call most of it global
    IPv4Network("192.88.99.0/24"),  # RFC 7526: relays of 6to4
)
_V6_NEVER_PUBLIC = (
    IPv6Network("2001::/23"),  # RFC 2928: protocol assignments, Teredo and its embedded addresses among them
    IPv6Network("2001:db8::/32"),  # RFC 3849: documentation
    IPv6Network("3fff::/20"),  # RFC 9637: documentation
)
# Services that tell a machine of a cloud its credentials or settings, wherever they do not lie in link-local addresses
# already: Azure's WireServer, which has a public address; Amazon's, Oracle's and Alibaba's.
_METADATA = frozenset(
    {
        IPv4Address("168.63.129.16"),
        IPv4Address("192.0.0.192"),
        IPv4Address("100.100.100.200"),
        IPv6Address("fd00:ec2::254"),
    }
)
# RFC 5214, section 6.1: the upper half of an interface identifier below which ISATAP keeps an IPv4 address.
_ISATAP = frozenset({0x00005EFE, 0x02005EFE})


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and so is every IPv4 address that it carries.

    `ipaddress` alone does not say it: which blocks are global differs between Python's versions, and addresses that
    carry another one, multicast and long deprecated blocks count as global.
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if not is_connectable(address) or not address.is_global:
        return False
    if isinstance(address, IPv4Address):
        return not any(address in block for block in _V4_NEVER_PUBLIC)
    carried = embedded(address)
    if carried is not None and not is_public(carried):
        return False
    if address in _NAT64:
        return True  # what a host without IPv4 gets for every host without IPv6 (RFC 6147)
    return address in _GLOBAL_UNICAST and not any(address in block for block in _V6_NEVER_PUBLIC)


def is_connectable(address: Address) -> bool:
    """Whether an address may be connected to where private ones are wanted.

    Not one that means no host, many hosts, an unknown neighbour, or a cloud's metadata.
    """
    if isinstance(address, IPv6Address):
        if address.scope_id is not None or address.is_site_local:
            return False
        carried = embedded(address)
        if carried is not None and not is_connectable(carried):
            return False
    elif address.packed[0] == 0:
        return False  # RFC 1122: "this network", which Linux takes for itself
    return not (
        address.is_unspecified
        or address.is_multicast
        or address.is_link_local
        or (address.is_reserved and address.version == 4)  # noqa: PLR2004 - 240.0.0.0/4 with the broadcast address
        or address in _METADATA
    )


def embedded(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address carries, and that a router or this machine may turn it into; else None."""
    value = int(address)
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    low = IPv4Address(value & 0xFFFFFFFF)
    if address in _NAT64 or (value >> 32) & 0xFFFFFFFF in _ISATAP:
        return low
    # ::0.0.0.1 is IPv6's own loopback address, and no IPv4 address.
    return low if address in _COMPATIBLE and value > 1 else None
