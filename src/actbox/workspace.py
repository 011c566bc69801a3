"""The workspace: a folder of the user's that containers share with the host, and its layout.

::

    path
    ├── skills
    │   ├── shared          skills of all executors; read-only inside, unless asked otherwise
    │   └── private
    │       └── {key}       skills of one executor, and its working directory
    └── images
        └── {key}           images that one executor produced

The path itself is the user's and may be reached through symbolic links. Below it, guests may have written: every folder
is opened without following links, by `files.open_folder`, and a key is checked before any path is made of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from actbox.errors import InvalidArgument, WorkspaceError
from actbox.files import open_folder
from actbox.skills import Skill, SkillFolder, find_skills, skill_sources
from actbox.spec import check_key

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Workspace"]


class Workspace:
    """The paths of a workspace. Constructing it makes nothing, `prepare` and `prepare_key` do.

    `path` is made absolute, and symbolic links in it are resolved, when the object is constructed.

    Raises:
        InvalidArgument: `path` is empty, no path, or cannot name a folder (it holds a NUL).
    """

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, (str, Path)):  # pyright: ignore[reportUnnecessaryIsInstance] - callers need not be typed
            raise InvalidArgument("path", path, "a workspace is named by a string or a Path")
        if not str(path) or "\0" in str(path):
            raise InvalidArgument("path", str(path), "pass the path of a folder: not empty, and without NUL")
        try:
            self._path = Path(os.path.realpath(path))
        except (ValueError, OSError) as exc:
            raise InvalidArgument("path", str(path), f"pass the path of a folder ({exc})") from exc

    @property
    def path(self) -> Path:
        """The workspace itself: absolute, without symbolic links."""
        return self._path

    @property
    def skills_path(self) -> Path:
        """All skills."""
        return self._path / "skills"

    @property
    def shared_skills_path(self) -> Path:
        """Skills that all executors see."""
        return self._path / "skills" / "shared"

    @property
    def private_skills_path(self) -> Path:
        """The folder of folders, one a key, of skills that one executor sees."""
        return self._path / "skills" / "private"

    @property
    def images_path(self) -> Path:
        """The folder of folders, one a key, of images that one executor produced."""
        return self._path / "images"

    def prepare(self) -> None:
        """Make the folders that are missing, the workspace itself among them. May be called at any time.

        Raises:
            WorkspaceError: one of them is a symbolic link, a file, or cannot be made.
        """
        self._make_root()
        self._make("skills", "shared")
        self._make("skills", "private")
        self._make("images")

    def prepare_key(self, key: str) -> tuple[Path, Path]:
        """Make the folders of one executor, and those above that are missing; return (working_dir, images_dir).

        Raises:
            InvalidKey: nothing was made, and no path of the key was looked at.
            WorkspaceError: a folder is a symbolic link, a file, cannot be made, or is not writable.
        """
        key = check_key(key)
        self._make_root()
        return self._make("skills", "private", key, writable=True), self._make("images", key, writable=True)

    def skills(self, key: str | None = None) -> list[Skill]:
        """The skills that sessions have: the shared ones, then those of one key; each by name.

        They are read anew at each call, from folders that sessions write: see `Skill` for what can be relied on. At
        most 1000 of either folder are found. Blocks on the disk.

        Raises:
            InvalidKey: the key cannot be used; nothing was looked at.
            WorkspaceError: a folder of skills is a symbolic link or out of reach. One that is missing has none.
        """
        return [skill for folder in self.skill_folders(key) for skill in find_skills(folder)]

    def skill_sources(self, names: Iterable[str], key: str | None = None) -> str:
        """Skills as Markdown for a prompt: the text of a SKILL.md, the source of modules and packages, in this order.

        A name is that of a skill, or of a module within one, with dots. Where both folders have it, it is the shared
        one, which an import finds, too. Texts are made valid and cut: 128 KiB of a file, 512 Ki characters in all. They
        are their author's, who may be a session: a prompt does well to say so. Blocks on the disk.

        Raises:
            InvalidArgument: there is no skill of a name.
            InvalidKey, WorkspaceError: as of `skills`.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        return skill_sources(self.skill_folders(key), wanted)

    def skill_folders(self, key: str | None, *below: str) -> list[SkillFolder]:
        """The folders of skills that are there, in the order of imports; `below` leads on from that of the key."""
        folders = [SkillFolder(self._path, ("skills", "shared"), "shared")]
        if key is not None:
            folders.append(SkillFolder(self._path, ("skills", "private", check_key(key), *below), "private"))
        return [folder for folder in folders if os.path.lexists(self._path.joinpath(*folder.below))]

    def __repr__(self) -> str:
        return f"Workspace({str(self._path)!r})"

    def _make_root(self) -> None:
        try:
            self._path.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            problem = f"the workspace cannot be made ({exc.strerror}); pass a path where this user may make folders"
            raise WorkspaceError(self._path, problem) from exc

    def _make(self, *below: str, writable: bool = False) -> Path:
        path = self._path.joinpath(*below)
        with open_folder(self._path, *below, make=True) as folder:
            if writable and not os.access(".", os.W_OK | os.X_OK, dir_fd=folder):
                raise WorkspaceError(path, "the folder is not writable; make it writable for this user")
        return path
