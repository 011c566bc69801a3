"""Tries system calls past the C library and tells what came of each; standard library only, for any Python 3.10.

Run as a script inside a boundary: the argument is a JSON object of {label: [number, argument, ...]} in which an
argument is an integer or a path. Each call is made in a process of its own, which ends at once, so that nothing of what
it does lasts. Printed is a JSON object of {label: "ok", the name of an error, or the name of the signal that ended it}.

From outside, `command` is what to run there.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["command", "read"]


def command(calls: Mapping[str, Sequence[int | str]], python: str = "python3") -> list[str]:
    """The command line that tries the calls wherever it is run; `read` understands what it prints."""
    return [python, "-c", Path(__file__).read_text(encoding="utf-8"), json.dumps(calls)]


def read(printed: str | bytes) -> dict[str, str]:
    """What came of each call, by its label."""
    return json.loads(printed)


def attempt(number: int, arguments: Sequence[int | str]) -> str:
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        own = os.getpid()
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            values = [ctypes.c_ulong(a) if isinstance(a, int) else ctypes.c_char_p(a.encode()) for a in arguments]
            result = libc.syscall(ctypes.c_long(number), *values)
            if os.getpid() == own:  # the call itself may have made another process
                os.write(sending, b"ok" if result != -1 else errno.errorcode[ctypes.get_errno()].encode())
        finally:
            os._exit(0)
    os.close(sending)
    told = os.read(receiving, 100).decode()
    os.close(receiving)
    _, status = os.waitpid(child, 0)
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else told or "silent"


if __name__ == "__main__":
    print(json.dumps({label: attempt(call[0], call[1:]) for label, call in json.loads(sys.argv[1]).items()}))  # noqa: T201
