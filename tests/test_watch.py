"""The watcher of a session, on its own: what it does with events that came together."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, cast

from actbox.guest import interrupts
from actbox.guest.watch import Watcher

if TYPE_CHECKING:
    import pytest


def test_a_kernel_that_was_heard_of_by_another_order_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One look at the sockets finds the new kernel's word and an order; the order has its word read first."""
    memory = interrupts.make_slots()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    host, watch = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    handover, _supervisor = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    children, _end = os.pipe()
    with host, theirs, handover, _supervisor:
        watcher = Watcher(memory, handover, children, cast("Any", None))
        watcher.add(1, watch, ours)
        # A watcher is older than its kernels, and has a lower number; here numbers may have begun anew.
        monkeypatch.setattr(os, "getpid", lambda: 1)
        kernel = os.fork()
        if not kernel:
            theirs.send(b"here")
            os._exit(0)
        os.waitpid(kernel, 0)
        seen_together = ours.fileno()
        host.send(b'{"op": "interrupt", "cell": 1}')
        watcher._serve(watch.fileno())
        assert watcher._pids() == [kernel]
        watcher._serve(seen_together)
        assert watcher._pids() == [kernel]
        watch.close()
        ours.close()
    os.close(children)
    os.close(_end)
