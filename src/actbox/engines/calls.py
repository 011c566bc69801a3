"""Names of the system calls that the seccomp policy says nothing of, per machine.

A Docker profile has to name what it allows; the policy of `guest/seccomp.py` names what it denies. With the names of
`guest/syscalls.py` these are all calls that the kernel's tables have up to `NEWEST_REVIEWED`, also those that no kernel
implements any more. Whoever raises that number adds the new names here or there.

The sources are the same as there; the names are those of the tables, which libseccomp uses too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["UNMENTIONED"]

_ANYWHERE = """
    accept accept4 bind brk cachestat capget capset chdir clock_getres clock_gettime clock_nanosleep close close_range
    connect copy_file_range dup dup3 epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 eventfd2 execve execveat exit
    exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchown fchownat fdatasync fgetxattr file_getattr
    file_setattr flistxattr flock fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait
    futex_waitv futex_wake get_mempolicy get_robust_list getcpu getcwd getdents64 getegid geteuid getgid getgroups
    getitimer getpeername getpgid getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid
    getsockname getsockopt gettid gettimeofday getuid getxattr getxattrat inotify_add_watch inotify_init1
    inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit ioprio_get ioprio_set kill
    landlock_add_rule landlock_create_ruleset landlock_restrict_self lgetxattr linkat listen listxattr listxattrat
    llistxattr lremovexattr lseek lsetxattr madvise map_shadow_stack membarrier mincore mlock mlock2 mlockall mmap
    mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap mseal msync munlock
    munlockall munmap nanosleep newfstatat pidfd_open pidfd_send_signal pipe2 pkey_alloc pkey_free pkey_mprotect ppoll
    prctl pread64 preadv preadv2 prlimit64 pselect6 pwrite64 pwritev pwritev2 read readahead readlinkat readv recvfrom
    recvmmsg recvmsg remap_file_pages removexattr removexattrat renameat renameat2 restart_syscall rseq rseq_slice_yield
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam sched_setscheduler
    sched_yield sendfile sendmmsg sendmsg sendto set_robust_list set_tid_address setfsgid setfsuid setgid setgroups
    setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid setxattr
    setxattrat shutdown sigaltstack signalfd4 splice statfs statx symlinkat sync sync_file_range syncfs sysinfo tee
    tgkill timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime
    timerfd_settime times tkill truncate umask uname unlinkat utimensat wait4 waitid write writev
"""

# What the generic table dropped or never had. The last two are planted by the kernel into a probed process.
_X86_64_ALONE = """
    access afs_syscall alarm arch_prctl chown dup2 epoll_create epoll_ctl_old epoll_wait epoll_wait_old eventfd fork
    futimesat get_thread_area getdents getpgrp getpmsg inotify_init lchown link lstat pause pipe poll putpmsg readlink
    rename rmdir security select set_thread_area signalfd stat symlink time tuxcall unlink utime utimes vfork vserver
    uprobe uretprobe
"""

UNMENTIONED: Mapping[str, frozenset[str]] = {
    "x86_64": frozenset(f"{_ANYWHERE} {_X86_64_ALONE}".split()),
    "aarch64": frozenset(_ANYWHERE.split()),
}
"""By `os.uname().machine`."""
