"""What the layers of the guest cost: actbox against the same actbox whose guest code builds none of them.

The layers are switched off in a copy of the guest code, by a `return` at the beginning of what builds each. The outer
boundary, bubblewrap's, stands in both.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from actbox.engines import bubblewrap

if TYPE_CHECKING:
    from collections.abc import Generator

# Where each layer is built, and what stands for it: namespaces and root, limits, capabilities and the inner filter,
# the outer filter, Landlock, the watchdog's looks.
_OFF = (
    ("isolation.py", r"def enter_namespaces\([^)]*\)[^:]*:\n", "    return\n"),
    ("isolation.py", r"def build_root\([^)]*\)[^\n]*:\n", "    return\n"),
    ("isolation.py", r"def raise_loopback\([^)]*\)[^:]*:\n", "    return\n"),
    ("isolation.py", r"def set_limits\([^)]*\)[^\n]*:\n", "    return\n"),
    ("isolation.py", r"def give_up_rights\([^)]*\)[^:]*:\n", "    return\n"),
    ("isolation.py", r"def make_domain\([^)]*\)[^\n]*:\n", "    return landlock.Domain(0, -1)\n"),
    ("seccomp.py", r"def install\([^)]*\)[^:]*:\n", "    return\n"),
    ("usage.py", r"    def look\([^)]*\)[^:]*:\n", "        return None\n"),
)


@contextlib.contextmanager
def switched_off(folder: Path) -> Generator[None]:
    """Containers that start in this context have no layer inside the outer boundary; the copy is made in `folder`.

    Raises:
        RuntimeError: a function is not where it was: this file must follow.
    """
    real = Path(bubblewrap.__file__).resolve().parent.parent
    package = folder / "package"
    for part in ("guest", "protocol"):
        shutil.copytree(real / part, package / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file, pattern, stub in _OFF:
        place = package / "guest" / file
        text, changes = re.subn(pattern, lambda found, stub=stub: found[0] + stub, place.read_text(encoding="utf-8"))
        if changes != 1:
            raise RuntimeError(f"{file} has changed: adapt {pattern!r}")
        place.write_text(text, encoding="utf-8")
    with mock.patch.object(bubblewrap, "_PACKAGE", package):
        yield
