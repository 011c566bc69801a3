"""System call numbers of the names that the seccomp policy speaks of, per machine.

Sources: `arch/x86/entry/syscalls/syscall_64.tbl` and `scripts/syscall.tbl` (the generic table, which arm64 uses) of the
Linux kernel, read up to Linux 7.0. Numbers from 424 on are the same on every machine.

Everything about numbers lives here; what is allowed is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MACHINES", "NAMES", "NEWEST_REVIEWED", "Machine"]

NEWEST_REVIEWED = 471
"""`rseq_slice_yield`, Linux 7.0: the last call that was looked at when the policy was written.

To raise it, read what the kernel added since, put the names that the policy must mention into the table below, and
extend the expectations of the tests.
"""


@dataclass(frozen=True)
class Machine:
    """One instruction set as seccomp sees it.

    `audit_arch` is the AUDIT_ARCH_* constant of `linux/audit.h`; `numbers` holds only calls that exist there;
    `unassigned` are the holes below `NEWEST_REVIEWED` that no call had when the table was read.
    """

    audit_arch: int
    numbers: Mapping[str, int]
    unassigned: tuple[range, ...]


# name: (x86_64, aarch64); None where the call does not exist. The generic table dropped what an `*at` call or a newer
# one replaces (open, chmod, mkdir, mknod, ustat ...) and never had what is of x86 alone (iopl, modify_ldt ...).
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "_sysctl": (156, None),
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "chmod": (90, None),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "creat": (85, None),
    "create_module": (174, None),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "fcntl": (72, 25),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "get_kernel_syms": (177, None),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "listmount": (458, 458),
    "listns": (470, 470),
    "lookup_dcookie": (212, 18),
    "lsm_get_self_attr": (459, 459),
    "lsm_list_modules": (461, 461),
    "lsm_set_self_attr": (460, 460),
    "mbind": (237, 235),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "migrate_pages": (256, 238),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "msgctl": (71, 187),
    "msgget": (68, 186),
    "msgrcv": (70, 188),
    "msgsnd": (69, 189),
    "name_to_handle_at": (303, 264),
    "nfsservctl": (180, 42),
    "open": (2, None),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "openat": (257, 56),
    "openat2": (437, 437),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "query_module": (178, None),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "seccomp": (317, 277),
    "semctl": (66, 191),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "shmget": (29, 194),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "statmount": (457, 457),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "sysfs": (139, None),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "uselib": (134, None),
    "userfaultfd": (323, 282),
    "ustat": (136, None),
    "vhangup": (153, 58),
    "vmsplice": (278, 75),
}

NAMES = frozenset(_NUMBERS)
"""Every name that some machine has: a name outside is a misspelling, not an absence."""

MACHINES: Mapping[str, Machine] = {
    "x86_64": Machine(
        audit_arch=0xC000_003E,
        numbers={name: number for name, (number, _) in _NUMBERS.items() if number is not None},
        # 335 and 336 are uretprobe and uprobe, which the kernel itself plants into a probed process.
        unassigned=(range(337, 424),),
    ),
    "aarch64": Machine(
        audit_arch=0xC000_00B7,
        numbers={name: number for name, (_, number) in _NUMBERS.items() if number is not None},
        # 244-259 are kept for calls of one machine alone, of which arm64 has none; 403-423 are for 32-bit machines.
        unassigned=(range(244, 260), range(295, 424)),
    ),
}
"""By `os.uname().machine`. Both are little-endian and 64-bit, which the assembler counts on."""
