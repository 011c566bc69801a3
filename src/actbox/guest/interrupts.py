"""SIGINT reaches the cell it was meant for, and never tears a frame.

The watcher writes the number of the cell to be interrupted into memory that it shares with the kernel, then sends the
signal. A signal that arrives late finds another number and does nothing. The same memory tells the watcher, when the
kernel has died, which cell it had begun. Every kernel of a session has a slot of it.

A signal that arrives between the interpreter's last look and a system call that blocks is not seen until that call
returns, which may be never. So the kernel notes in its slot that it has seen one, and is reminded until it has.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import sys
import threading
from threading import get_ident
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

SLOTS = 512
_SLOT = 32
_NUMBER = struct.Struct("<q")
_TARGET = 0
_CURRENT = 8
_BEGUN = 16
_SEEN = 24
# Seconds after an interrupt. Few, for code with a handler of its own sees each of them.
REMINDERS = (0.1, 0.4, 1.0)


def make_slots() -> mmap.mmap:
    """Memory for `SLOTS` kernels, shared with whoever is forked."""
    return mmap.mmap(-1, SLOTS * _SLOT)


def slot(memory: mmap.mmap, number: int) -> memoryview:
    """One kernel's part of it."""
    return memoryview(memory)[number * _SLOT : (number + 1) * _SLOT]


def clear(slot: memoryview) -> None:
    """Make a slot a new kernel's."""
    slot[:] = bytes(_SLOT)


def set_target(slot: memoryview, cell: int) -> None:
    """Name the cell that the next SIGINT is for."""
    _NUMBER.pack_into(slot, _TARGET, cell)


def begun(slot: memoryview) -> int:
    """The last cell that the kernel began, by its own account; 0 for none."""
    return _NUMBER.unpack_from(slot, _BEGUN)[0]


def running(slot: memoryview) -> int:
    """The cell that runs, by the kernel's own account; 0 for none."""
    return _NUMBER.unpack_from(slot, _CURRENT)[0]


def wanted(slot: memoryview) -> bool:
    """Whether the running cell is the one to be interrupted."""
    current = running(slot)
    return current != 0 and current == _NUMBER.unpack_from(slot, _TARGET)[0]


def remind(slot: memoryview, kernel: int) -> None:
    """Signal the kernel once more if it has not seen the signal for the cell that it runs."""
    if wanted(slot) and _NUMBER.unpack_from(slot, _SEEN)[0] != running(slot):
        with contextlib.suppress(ProcessLookupError):
            os.kill(kernel, signal.SIGINT)


class Interrupts:
    """This kernel's side of it.

    State: the slot's current cell; `_depth`, how deep the main thread is in code that must not be torn; `_pending`,
    whether a signal came meanwhile; `delivered`, whether the running cell was interrupted.
    """

    def __init__(self, slot: memoryview) -> None:
        self._slot = slot
        self._depth = 0
        self._pending = False
        self._main = threading.main_thread().ident
        self.delivered = False
        self.held = _Held(self)

    def install(self) -> None:
        """Take over SIGINT; call it in the main thread."""
        signal.signal(signal.SIGINT, self._handle)

    def watch_losses(self) -> None:
        """Be reminded of an interrupt that Python drops: it came in a hook of a fork, or in a destructor."""
        others = sys.unraisablehook

        def note(lost: Any) -> None:
            if lost.exc_type is KeyboardInterrupt and self.delivered and wanted(self._slot):
                self.delivered = False
                _NUMBER.pack_into(self._slot, _SEEN, 0)
            else:
                others(lost)

        sys.unraisablehook = note

    def move(self, slot: memoryview) -> None:
        """This process has become another kernel, with a slot of its own and no cell under way."""
        self._slot = slot
        self._depth = 0
        self._pending = False

    def begin(self, cell: int) -> None:
        """A cell runs from now on. Raises KeyboardInterrupt if it was to be interrupted before it began."""
        self.delivered = False
        self._pending = False
        _NUMBER.pack_into(self._slot, _BEGUN, cell)
        _NUMBER.pack_into(self._slot, _CURRENT, cell)
        # The order may have overtaken the cell: then its signal found nothing to interrupt.
        if wanted(self._slot):
            _NUMBER.pack_into(self._slot, _SEEN, cell)
            self.delivered = True
            raise KeyboardInterrupt

    def was_delivered(self) -> bool:
        """Whether the running cell was interrupted."""
        return self.delivered

    def end(self) -> None:
        """No cell runs any more: a SIGINT does nothing."""
        _NUMBER.pack_into(self._slot, _CURRENT, 0)
        self._pending = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        # Tracebacks begin where the user's code was interrupted.
        __tracebackhide__ = True
        if not wanted(self._slot):
            return
        _NUMBER.pack_into(self._slot, _SEEN, running(self._slot))
        if self._depth:
            self._pending = True
            return
        self.delivered = True
        raise KeyboardInterrupt

    def enter(self) -> None:
        """`with interrupts.held` begins: every write of the guest's comes through here, so it is short."""
        if get_ident() == self._main:
            self._depth += 1

    def leave(self, *_exc: object) -> None:
        """`with interrupts.held` ends."""
        __tracebackhide__ = True
        if get_ident() != self._main:
            return
        self._depth -= 1
        if self._pending and not self._depth:
            self._pending = False
            if wanted(self._slot):
                self.delivered = True
                raise KeyboardInterrupt


class _Held:
    """`with interrupts.held:` delays a KeyboardInterrupt to the end of the block."""

    def __init__(self, owner: Interrupts) -> None:
        self._owner = owner

    def __enter__(self) -> None:
        self._owner.enter()

    def __exit__(self, *exc: object) -> None:
        self._owner.leave()


def forward(slot: memoryview, kernel: int) -> None:
    """Pass SIGINT on to the kernel and the programs it runs in the foreground, as a terminal would."""
    if not wanted(slot):
        return
    try:
        os.killpg(kernel, signal.SIGINT)
    except ProcessLookupError:
        return
