"""The session's way to the proxy on the host: a port on the session's own loopback, and one socket to ask for more.

A convenience, and no boundary: it is what the usual proxy variables point at. For each connection to the port it asks
the host, which hands it a fresh stream to the session's proxy; what may pass is decided there. There is no other way
out, so whoever ends this process ends the network of the session.

State: the pairs of sockets between which bytes are carried; the connections for which a stream was asked.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections import deque
from typing import NoReturn

_CHUNK = 64 << 10
_BACKLOG = 64


def listen() -> socket.socket:
    """A listening socket on a free port of the loopback."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(_BACKLOG)
    return listener


def variables(port: int) -> dict[str, str]:
    """What tells programs of the proxy: pip, requests, httpx, urllib and curl heed them."""
    proxy = f"http://127.0.0.1:{port}"
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    values = {spelt: proxy for name in names for spelt in (name, name.lower())}
    return values | dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1,::1")


class _End:
    """One of two sockets that are connected here.

    State: its other end; what waits to be written to it; whether it has no more to say, was told that the other has
    not, and takes nothing any more.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.other: _End
        self.waiting = bytearray()
        self.read_all = False
        self.told_end = False
        self.deaf = False

    @property
    def served(self) -> bool:
        """Whether nothing will be written to it any more."""
        return self.deaf or (self.other.read_all and not self.waiting)


class Forwarder:
    """See the module's text."""

    def __init__(self, listener: socket.socket, asking: socket.socket) -> None:
        self._listener = listener
        self._asking = asking
        listener.setblocking(False)
        asking.setblocking(False)
        self._asked: deque[socket.socket] = deque()
        self._ends: dict[int, _End] = {}

    def run(self) -> None:
        """Carry until the host's end of the asking socket is closed."""
        while True:
            poller = select.poll()
            poller.register(self._asking, select.POLLIN)
            if len(self._asked) < _BACKLOG:
                poller.register(self._listener, select.POLLIN)
            for fd, end in self._ends.items():
                wanted = 0 if end.read_all or len(end.other.waiting) >= _CHUNK else select.POLLIN
                wanted |= select.POLLOUT if end.waiting else 0
                if wanted:
                    poller.register(fd, wanted)
            for fd, event in poller.poll():
                if fd == self._asking.fileno():
                    if not self._take():
                        return
                elif fd == self._listener.fileno():
                    self._ask()
                elif fd in self._ends:
                    self._serve(self._ends[fd], event)

    def _ask(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            self._asked.append(connection)
            self._asking.send(b"c")

    def _take(self) -> bool:
        """A stream from the host, for the connection that has waited longest."""
        try:
            data, fds, _, _ = socket.recv_fds(self._asking, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data:
            return False
        if not fds:
            # The host has none to give.
            if self._asked:
                self._asked.popleft().close()
            return True
        stream = socket.socket(fileno=fds[0])
        if not self._asked:
            stream.close()
            return True
        one, other = _End(self._asked.popleft()), _End(stream)
        one.other, other.other = other, one
        for end in (one, other):
            self._ends[end.sock.fileno()] = end
        return True

    def _serve(self, end: _End, event: int) -> None:
        if event & select.POLLOUT:
            self._write(end)
        if event & (select.POLLIN | select.POLLHUP | select.POLLERR) and not end.read_all:
            self._read(end)
        if end.served and end.other.served:
            self._close(end)

    def _read(self, end: _End) -> None:
        try:
            data = end.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            # Gone in both directions; what it has said before still goes on.
            data = b""
            end.deaf = True
        if not data:
            end.read_all = True
        elif not end.other.deaf:
            end.other.waiting += data
        self._write(end.other)

    def _write(self, end: _End) -> None:
        if end.deaf:
            return
        try:
            while end.waiting:
                sent = end.sock.send(end.waiting)
                del end.waiting[:sent]
            if end.other.read_all and not end.told_end:
                end.told_end = True
                end.sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:
            # It takes no more, which does not mean that it has said all that it has to say.
            end.deaf = True
            end.waiting.clear()

    def _close(self, end: _End) -> None:
        for each in (end, end.other):
            self._ends.pop(each.sock.fileno(), None)
            each.sock.close()


def run_forwarder(listener: socket.socket, asking: socket.socket) -> NoReturn:
    """The whole life of the process; never returns."""
    try:
        Forwarder(listener, asking).run()
    finally:
        os._exit(0)
