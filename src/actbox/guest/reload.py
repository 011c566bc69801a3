# IPython's own types are partly unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Edited skills take effect at the next cell.

IPython's autoreload, asked about the modules below the skill folders alone: to look at every module that pandas and
matplotlib load would cost each cell more than the rest of its round trip.
"""

from __future__ import annotations

import sys
import traceback
from importlib.machinery import FileFinder
from typing import TYPE_CHECKING

from IPython.extensions.autoreload import ModuleReloader

if TYPE_CHECKING:
    from types import ModuleType

    from IPython.core.interactiveshell import InteractiveShell

    from .interrupts import Interrupts


class SkillReloader:
    """Reloads changed modules below the watched folders before a cell, and lets new files there be found.

    State: `_reloader`, IPython's record of files and their times; `_folders`, what is watched; `_last`, the
    module loaded last when the skills were last looked for. Made before the fork, as IPython first looks at every
    loaded module once.
    """

    def __init__(self, shell: InteractiveShell) -> None:
        self._reloader = ModuleReloader(shell=shell)
        self._reloader.enabled = True
        self._reloader.check_all = False
        if hasattr(self._reloader, "deduper_reloader"):
            # It reads the source of every loaded module after each check, and knows no bound.
            self._reloader.deduper_reloader.enabled = False
        self._folders: tuple[str, ...] = ()
        self._interrupts: Interrupts | None = None
        self._last = ""

    def watch(self, folders: list[str], interrupts: Interrupts) -> None:
        """Watch the modules below these folders from now on; `interrupts` tells the host's from the skill's own."""
        self._interrupts = interrupts
        self._folders = tuple(f"{folder.rstrip('/')}/" for folder in folders)
        # What the supervisor has imported is no skill: it never imports from a folder that a guest may write.
        self._last = next(reversed(sys.modules))

    def move(self, old: str, new: str) -> None:
        """A watched folder has been copied, and the copy is what is watched from now on."""
        self._folders = tuple(f"{new}/" if folder == f"{old}/" else folder for folder in self._folders)

    def before_cell(self) -> None:
        """Make imports of this cell see the folders as they are now."""
        for folder in self._folders:
            finder = sys.path_importer_cache.get(folder.rstrip("/"))
            if isinstance(finder, FileFinder):
                finder.invalidate_caches()
        self._remember()
        changed = [module for module in self._watched() if self._is_newer(module)]
        if not changed:
            return
        before = [(module, dict(module.__dict__)) for module in changed]
        try:
            self._reloader.check()
        except BaseException as exc:
            # IPython lets pass what is no Exception, and leaves the module empty. A skill that leaves at its top
            # level is a broken skill, not the kernel's end.
            for module, content in before:
                module.__dict__.update({**content, **module.__dict__})
            if isinstance(exc, KeyboardInterrupt) and self._interrupts is not None and self._interrupts.delivered:
                raise
            traceback.print_exc()

    def _watched(self) -> list[ModuleType]:
        return [sys.modules[name] for name in self._reloader.modules if name in sys.modules]

    def _is_newer(self, module: ModuleType) -> bool:
        _, modified = self._reloader.filename_and_mtime(module)
        return modified is not None and modified > self._reloader.modules_mtimes.get(module.__name__, 0)

    def after_cell(self) -> None:
        """Note the state of modules that this cell imported."""
        self._remember()

    def _remember(self) -> None:
        for name in self._new_modules():
            module = sys.modules.get(name)
            if module is not None and name not in self._reloader.modules and self._is_skill(module):
                self._reloader.modules[name] = True
                self._note_time(module)

    def _new_modules(self) -> list[str]:
        """Modules loaded since the last look: they are at the end, as a dict keeps its order.

        To walk over all of them would touch each one's reference count, and so copy pages of memory that sessions
        share.
        """
        new: list[str] = []
        try:
            for name in reversed(sys.modules):
                if name == self._last:
                    break
                new.append(name)
        except RuntimeError:
            # A thread imports meanwhile: at the next cell it is seen.
            return []
        if new:
            self._last = new[0]
        return new

    def _note_time(self, module: ModuleType) -> None:
        path, modified = self._reloader.filename_and_mtime(module)
        if path is not None and modified is not None:
            self._reloader.modules_mtimes[module.__name__] = modified

    def _is_skill(self, module: ModuleType) -> bool:
        path = getattr(module, "__file__", None)
        return isinstance(path, str) and path.startswith(self._folders)
