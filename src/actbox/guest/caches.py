"""Caches that libraries keep in files, made once for an environment and shown where each session may write."""

from __future__ import annotations

import contextlib
import os


def plant(seeds: list[list[str]]) -> None:
    """Make folders, each `[from, to]`, whose files are links to those of another, unless they are there already.

    Links, as a copy would cost each session memory and time; who writes such a file anew replaces the link, or is told
    that it is read-only and does without.
    """
    for source, target in seeds:
        # A library whose cache is missing makes it anew: slower, no error.
        with contextlib.suppress(OSError):
            names = os.listdir(source)
            os.mkdir(target, 0o700)
            for name in names:
                os.symlink(f"{source}/{name}", f"{target}/{name}")
