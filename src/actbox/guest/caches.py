"""Caches that libraries keep in files, made once for an environment and copied to where each session may write."""

from __future__ import annotations

import contextlib
import os
import shutil


def plant(seeds: list[list[str]]) -> None:
    """Copy folders, each `[from, to]`, that are there and not there yet."""
    for source, target in seeds:
        if os.path.isdir(source) and not os.path.exists(target):
            # A library whose cache is missing makes it anew: slower, no error.
            with contextlib.suppress(OSError):
                shutil.copytree(source, target, copy_function=shutil.copyfile)
