"""From a name to a connected socket: resolve once, then connect to the address itself, never to the name."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Protocol

from actbox.egress.policy import acceptable
from actbox.egress.verdicts import Reason, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable

    from actbox.egress.policy import Address, Target

# Seconds. Resolvers try a server for 5 s (resolv.conf(5)), then the next.
_RESOLVING = 12.0
# Seconds for each address: a lost SYN is sent again after 1 and 3 s.
_CONNECTING = 6.0
_THREADS = 4
# TEST-NET-1 (RFC 5737): nobody's, so nobody's socket can be bound to it.
_NOBODYS = {4: IPv4Address("192.0.2.1"), 6: IPv6Address("2001:db8::1")}


class Resolver(Protocol):
    """Finds the addresses of a name. It is asked once for each connection."""

    async def __call__(self, host: str, /) -> Iterable[Address]:
        """All addresses of `host`.

        Raises:
            OSError: there are none, or nobody can tell.
        """
        ...


class SystemResolver:
    """The machine's own resolver, in threads of its own: names that take long must not hold up others' work."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, "actbox-resolver")

    async def __call__(self, host: str, /) -> list[Address]:
        """See `Resolver`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, _look_up, host)

    def close(self) -> None:
        """Resolve no more. Does not wait for answers that are still out."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str) -> list[Address]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [ip_address(str(entry[4][0])) for entry in found]


async def resolve(resolver: Resolver, target: Target) -> tuple[Address, ...] | Refusal:
    """The addresses at which a target may be connected to, after one question to the resolver."""
    try:
        async with asyncio.timeout(_RESOLVING):
            addresses = await resolver(target.host)
    except TimeoutError:
        return Refusal(504, Reason.RESOLVING_TOO_SLOW, f"{target.host} was not resolved in time")
    except (OSError, UnicodeError, ValueError):
        return Refusal(502, Reason.NOT_RESOLVED, f"{target.host} does not resolve")
    kept = acceptable(target, addresses)
    if isinstance(kept, Refusal) or target.private:
        return kept
    return acceptable(target, [address for address in kept if not is_our_own(address)])


async def connect(target: Target, addresses: Iterable[Address]) -> tuple[socket.socket, Address] | Refusal:
    """A connected, non-blocking socket, and the address it is connected to: the first that accepts."""
    loop = asyncio.get_running_loop()
    late = False
    for address in addresses:
        sock = socket.socket(socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(_CONNECTING):
                await loop.sock_connect(sock, (str(address), target.port))
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except TimeoutError:
            # Also the system's own ETIMEDOUT.
            late = True
            sock.close()
        except OSError:
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock, address
    if late:
        return Refusal(504, Reason.CONNECTING_TOO_SLOW, f"{target.host} did not accept the connection in time")
    return Refusal(502, Reason.UNREACHABLE, f"{target.host} cannot be reached")


def is_our_own(address: Address) -> bool:
    """Whether an address is one of this machine's own.

    What listens at a machine's public address often trusts a firewall to keep strangers away, and connections of the
    machine with itself do not pass it.
    """
    # Where any address may be bound to (ip_nonlocal_bind), this cannot be told.
    return _can_bind(address) and not _can_bind(_NOBODYS[address.version])


def _can_bind(address: Address) -> bool:
    try:
        with socket.socket(
            socket.AF_INET if isinstance(address, IPv4Address) else socket.AF_INET6, socket.SOCK_DGRAM
        ) as sock:
            sock.bind((str(address), 0))
    except OSError:
        return False
    return True
