"""Landlock: a second layer over the file system, in force where the first one, the mounts, had a hole.

The kernel and all that it starts may read and execute what is mounted, and write below the session's own writable
places alone; `/proc` is mounted writable, and is none of them. From ABI 6 on they may signal nobody but themselves, so
that the watcher is out of reach also where it has no pid namespace between it and them.

Best effort: what the system's ABI has is asked for, and what is in force is told. Below ABI 2 (Linux 5.19) that is
nothing, because there every `rename` from one folder to another would be refused. See landlock(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

# The same on every machine, as all numbers from 424 on.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_CHAR, _MAKE_DIR, _MAKE_REG, _MAKE_SOCK, _MAKE_FIFO, _MAKE_BLOCK, _MAKE_SYM = (1 << bit for bit in range(6, 13))
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15

_READ = _EXECUTE | _READ_FILE | _READ_DIR
_WRITE = (
    _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_SOCK | _MAKE_FIFO | _MAKE_SYM
    | _REFER | _TRUNCATE
)  # fmt: skip
# Nobody may make a device, wherever.
_EVERYTHING = _READ | _WRITE | _MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV

_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1, 2
# What a guest is refused is no news for the machine's audit log, which it could fill.
_LOG_SAME_EXEC_OFF, _LOG_SUBDOMAINS_OFF = 1, 4

# The first ABI that has each.
_ABI_REFER, _ABI_TRUNCATE, _ABI_IOCTL_DEV, _ABI_SCOPES, _ABI_LOG = 2, 3, 5, 6, 7

_DEVICES = "/dev"

_libc = ctypes.CDLL(None, use_errno=True)


class Domain:
    """What a process is about to enter; `abi` is the one in force then, 0 for none.

    State: the descriptor of the rules, until `enter`.
    """

    def __init__(self, abi: int, fd: int) -> None:
        self.abi = abi
        self._fd = fd

    def enter(self) -> None:
        """Put this process, and all that it will start, under the rules. It cannot be undone.

        The process has one thread, and no new privileges.

        Raises:
            OSError: the system refused.
        """
        if self.abi:
            flags = _LOG_SAME_EXEC_OFF | _LOG_SUBDOMAINS_OFF if self.abi >= _ABI_LOG else 0
            _call(_RESTRICT_SELF, ctypes.c_int(self._fd), ctypes.c_uint32(flags))
            self.close()

    def allow(self, place: str, rights: int) -> None:
        """Add a rule: these rights at the place and below. A place that is not there gets none: nobody can write it."""
        try:
            fd = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            # struct landlock_path_beneath_attr is packed.
            rule = struct.pack("=Qi", rights, fd)
            _call(_ADD_RULE, ctypes.c_int(self._fd), ctypes.c_int(_RULE_PATH_BENEATH), rule, ctypes.c_uint32(0))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of the rules; who has entered stays under them."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def offered() -> int:
    """The ABI of this system; 0 if it has none, or none that is switched on."""
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))
    except OSError as exc:
        if exc.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def make(writable: list[str]) -> Domain:
    """Rules by which what is mounted may be read, and the places and all below them be written.

    Devices may be used.

    Raises:
        OSError: the system refused what it said that it has.
    """
    abi = min(offered(), _ABI_LOG)
    if abi < _ABI_REFER:
        return Domain(0, -1)
    handled = _EVERYTHING
    if abi < _ABI_TRUNCATE:
        handled &= ~_TRUNCATE
    if abi < _ABI_IOCTL_DEV:
        handled &= ~_IOCTL_DEV
    # struct landlock_ruleset_attr: file system, network, scopes. The network is not ours to handle: there is none.
    attributes = struct.pack("=QQQ", handled, 0, _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL)
    if abi < _ABI_SCOPES:
        attributes = attributes[:8]
    domain = Domain(abi, _call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)))
    try:
        for place, rights in [
            ("/", _READ),
            (_DEVICES, _WRITE_FILE | _IOCTL_DEV),
            *((place, _WRITE) for place in writable),
        ]:
            domain.allow(place, rights & handled)
    except BaseException:
        domain.close()
        raise
    return domain


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        failed = ctypes.get_errno()
        raise OSError(failed, f"landlock: {os.strerror(failed)}")
    return result
