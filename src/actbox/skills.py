"""Skills in the folders of a workspace: Python modules and packages, and Agent Skills (folders with a SKILL.md).

Sessions write these folders, so all that is here is a guest's word: walked by descriptors (`guest/places.py`), never
through a link, bounded in count, depth and size, and neither imported nor parsed as Python. What is wrong with a skill
is told on the skill, as `SkillProblem`s.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from actbox import frontmatter
from actbox.errors import InvalidArgument
from actbox.files import open_folder
from actbox.guest import places
from actbox.spec import APP

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from pathlib import Path

__all__ = ["Skill", "SkillFolder", "SkillProblem", "find_skills", "skill_sources"]

Scope = Literal["shared", "private"]
# What is wrong: a field whose rule is broken, or the head, a field that does not exist, a file, its size.
Field = Literal["name", "description", "license", "compatibility", "metadata", "allowed-tools"]
Kind = Field | Literal["frontmatter", "field", "file", "size"]

# Of one folder of skills; what lies beyond is not looked at.
MAX_SKILLS = 1000
# Entries of folders looked at in one search, whatever they are and however they nest.
MAX_ENTRIES = 50_000
# Of the files within one skill that are listed.
MAX_FILES = 200
_MAX_DEPTH = 5
# Bytes of one file that are read, and characters of all that `skill_sources` returns.
MAX_FILE = 128 << 10
MAX_SOURCES = 512 << 10
# Bytes of a file that are read for what it says of itself.
_MAX_HEAD = 32 << 10
_MAX_SUMMARY = 500

_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*", re.ASCII)
_MAX_NAME, _MAX_DESCRIPTION, _MAX_COMPATIBILITY = 64, 1024, 500
# Field, longest, and whether it must be there.
_STRINGS: tuple[tuple[Field, int | None, bool], ...] = (
    ("description", _MAX_DESCRIPTION, True),
    ("compatibility", _MAX_COMPATIBILITY, False),
    ("license", None, False),
)
_FIELDS = {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])
_DOCSTRING = re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)*[rRuU]?(\"\"\"|'''|\"|')")


@dataclass(frozen=True, slots=True)
class SkillProblem:
    """What is wrong with a skill.

    `kind` is the field of the Agent Skills specification whose rule is broken; "frontmatter" if the head is missing or
    is not YAML that is read here (what stands before that line is read all the same); "field" for a field that the
    specification does not have; "file" if a file cannot be read; "size" if it is longer than what is read of it.
    """

    kind: Kind
    message: str


@dataclass(frozen=True, slots=True)
class Skill:
    """A skill as it was found. All texts are the author's, who may be a session.

    Attributes:
        name: the module's or the folder's name.
        kind: "agent" for a folder with a SKILL.md, else "package" or "module".
        scope: whether all sessions have it, or those of one key.
        description: of an Agent Skill its `description`; of others the first paragraph of their docstring; may be "".
        path: on the host. A session may put something else there at any time: open nothing there through a link.
        inside: the path that sessions see.
        module: the name to import, None if it cannot be imported.
        files: the files within it, the first `MAX_FILES`, by paths below its folder; () for a module.
        license, compatibility, metadata, allowed_tools: those of a SKILL.md.
        problems: what is wrong with it; () if nothing is.
    """

    name: str
    kind: Literal["agent", "package", "module"]
    scope: Scope
    description: str
    path: Path
    inside: str
    module: str | None
    files: tuple[str, ...] = ()
    license: str | None = None
    compatibility: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    allowed_tools: tuple[str, ...] = ()
    problems: tuple[SkillProblem, ...] = ()


@dataclass(frozen=True, slots=True)
class SkillFolder:
    """A folder of skills: `below` the workspace's `root`, and what it is called `inside`."""

    root: Path
    below: tuple[str, ...]
    scope: Scope

    @property
    def inside(self) -> str:
        """Where sessions see it."""
        return str(APP.joinpath(*self.below))

    @contextlib.contextmanager
    def open(self) -> Generator[int]:
        """A descriptor of it, to be read. Raises `WorkspaceError` if it cannot be opened."""
        with open_folder(self.root, *self.below) as folder, _entered(folder, ".") as opened:
            yield opened


# -- finding -----------------------------------------------------------------------------------------------------------


def find_skills(where: SkillFolder) -> list[Skill]:
    """The skills in a folder, by name. What is hidden, or begins with an underscore, is none.

    Raises:
        WorkspaceError: the folder is missing, a link, or out of reach.
    """
    found: list[Skill] = []
    look = _Look()
    with where.open() as folder:
        files, folders = look.into(folder)
        for name in (name for name in files if name.endswith(".py") and not name.startswith("_")):
            if len(found) < MAX_SKILLS and (module := _module(where, folder, name)) is not None:
                found.append(module)
        for name in (name for name in folders if not name.startswith("_")):
            with contextlib.suppress(OSError, places.Refused):
                if len(found) < MAX_SKILLS and (skill := _folder(where, folder, name, look)) is not None:
                    found.append(skill)
    return sorted(found, key=lambda skill: skill.name)


def _module(where: SkillFolder, folder: int, name: str) -> Skill | None:
    stem = name.removesuffix(".py")
    if not stem.isidentifier():
        return None
    text, problems = _read(folder, name, _MAX_HEAD)
    if text is None:
        return None  # it is no longer there, or no longer a file
    return Skill(
        name=stem,
        kind="module",
        scope=where.scope,
        description=_summary(text),
        path=where.root.joinpath(*where.below, name),
        inside=f"{where.inside}/{name}",
        module=stem,
        problems=tuple(problems),
    )


def _folder(where: SkillFolder, above: int, name: str, look: _Look) -> Skill | None:
    with _entered(above, name) as folder:
        files = tuple(look.below(folder))
        agent = "SKILL.md" in files or _is_there(folder, "SKILL.md")
        package = name.isidentifier() and any(file.endswith(".py") and "/" not in file for file in files)
        if not agent and not package:
            return None
        found = Skill(
            name=name,
            kind="agent" if agent else "package",
            scope=where.scope,
            description="" if agent else _summary(_read(folder, "__init__.py", _MAX_HEAD)[0] or ""),
            path=where.root.joinpath(*where.below, name),
            inside=f"{where.inside}/{name}",
            module=name if package else None,
            files=files,
        )
        return _with_head(found, folder) if agent else found


def _with_head(skill: Skill, folder: int) -> Skill:
    """An Agent Skill with what its SKILL.md says, as far as it can be read."""
    text, problems = _read(folder, "SKILL.md", _MAX_HEAD)
    fields: dict[str, frontmatter.Value] = {}
    if text is not None:
        head, _ = frontmatter.split(text)
        if head is None:
            problems.append(SkillProblem("frontmatter", "SKILL.md begins with `---`, a head, and `---` again"))
        else:
            try:
                fields = frontmatter.parse(head)
            except frontmatter.Malformed as exc:
                problems.append(SkillProblem("frontmatter", _clean(str(exc))))
                fields = exc.fields
            else:
                problems += _violations(fields, skill.name)
    described = fields.get("description")
    metadata, tools = fields.get("metadata"), fields.get("allowed-tools")
    return replace(
        skill,
        description=described.strip()[:_MAX_DESCRIPTION] if isinstance(described, str) else "",
        license=_string(fields.get("license")),
        compatibility=_string(fields.get("compatibility")),
        metadata=metadata if isinstance(metadata, dict) else {},
        allowed_tools=tuple(tools.split() if isinstance(tools, str) else tools if isinstance(tools, list) else ()),
        problems=tuple(problems),
    )


def _string(value: frontmatter.Value | None) -> str | None:
    return value.strip() if isinstance(value, str) else None


def _violations(fields: Mapping[str, frontmatter.Value], folder: str) -> Iterator[SkillProblem]:
    """The rules of the specification that a head breaks."""
    name = fields.get("name")
    if not isinstance(name, str) or not name.strip():
        yield SkillProblem("name", "a skill has a name, which is a string")
    else:
        if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
            rule = f"a name is 1 to {_MAX_NAME} of a-z, 0-9 and '-', which stands between others and never twice"
            yield SkillProblem("name", f"{name[:100]!a}: {rule}")
        if name != folder:
            yield SkillProblem("name", f"{name[:100]!a} is not the name of its folder, {folder!a}")
    for entry, longest, needed in _STRINGS:
        value = fields.get(entry)
        if value is None and not needed:
            continue
        if not isinstance(value, str) or not value.strip():
            yield SkillProblem(entry, f"the {entry} is a string that is not empty")
        elif longest is not None and len(value.strip()) > longest:
            yield SkillProblem(entry, f"the {entry} has {len(value.strip())} characters, more than {longest}")
    if not isinstance(fields.get("metadata", {}), dict):
        yield SkillProblem("metadata", "the metadata are a map of strings to strings")
    if isinstance(fields.get("allowed-tools"), dict):
        yield SkillProblem("allowed-tools", "the allowed tools are a string, or a list of strings")
    for entry in sorted(fields.keys() - _FIELDS):
        yield SkillProblem("field", f"{entry[:100]!a} is no field of the specification")


# -- sources -----------------------------------------------------------------------------------------------------------


def skill_sources(folders: list[SkillFolder], names: list[str]) -> str:
    """What a model has to know of skills to use them, as Markdown; see `Workspace.skill_sources`."""
    parts: list[str] = []
    room = MAX_SOURCES
    for name in names:
        for text in _sources(folders, name):
            if len(text) > room:
                parts.append(f"[{name}: more than {MAX_SOURCES} characters in all; the rest is left out]")
                return "\n\n".join(parts)
            room -= len(text)
            parts.append(text)
    return "\n\n".join(parts)


def _sources(folders: list[SkillFolder], name: str) -> list[str]:
    """The texts of one skill: of the first folder that has it, as an import would find it."""
    parts = _parts(name)
    if parts:
        for where in folders:
            with where.open() as folder, contextlib.suppress(OSError, places.Refused):
                # A folder may have dots in its name, too.
                found = _of_folder(where, folder, [name]) if len(parts) > 1 else None
                found = found or _of_folder(where, folder, parts) or _of_module(where, folder, parts)
                if found:
                    return found
    raise InvalidArgument("names", name, "there is no such skill, or it cannot be read; see Workspace.skills")


def _parts(name: object) -> list[str]:
    """A name as the components of a path: a module's are divided by dots, any other is a folder's."""
    if not isinstance(name, str):
        return []
    parts = name.split(".")
    if all(part.isidentifier() for part in parts):
        return parts
    return [name] if name.isprintable() and "/" not in name and not name.startswith(".") and name else []


def _of_folder(where: SkillFolder, top: int, parts: list[str]) -> list[str] | None:
    with contextlib.ExitStack() as stack:
        folder = top
        try:
            for part in parts:
                folder = stack.enter_context(_entered(folder, part))
        except (OSError, places.Refused):
            return None
        files = _Look().below(folder)
        inside = "/".join([where.inside, *parts])
        found: list[str] = []
        told: set[str] = set()
        if "SKILL.md" in files or _is_there(folder, "SKILL.md"):
            text = _whole(folder, "SKILL.md")
            told.add("SKILL.md")
            body = "Its SKILL.md cannot be read." if text is None else frontmatter.split(text)[1].strip()
            found.append(f"## Skill `{'.'.join(parts)}`, in {inside}\n\n{body}")
        importable = all(part.isidentifier() for part in parts)
        for file in [file for file in files if importable and file.endswith(".py") and "/" not in file]:
            module = ".".join(parts) + ("" if file == "__init__.py" else f".{file.removesuffix('.py')}")
            text = _whole(folder, file)
            told.add(file)
            if text:
                found.append(_listing(module, f"{inside}/{file}", text))
        others = [f"- {file}" for file in files if file not in told]
        if len(files) == MAX_FILES:
            others.append(f"[no more than {MAX_FILES} files are named]")
        if found and others:
            found.append("\n".join([f"Other files in {inside}:", *others]))
        if not found and any(file.endswith(".py") and "/" not in file for file in files):
            found.append(f"## Package `{'.'.join(parts)}`, in {inside}\n\nIts modules are empty.")
        return found or None


def _of_module(where: SkillFolder, top: int, parts: list[str]) -> list[str] | None:
    if not parts[-1].isidentifier():
        return None
    with contextlib.ExitStack() as stack:
        folder = top
        for part in parts[:-1]:
            folder = stack.enter_context(_entered(folder, part))
        text = _whole(folder, f"{parts[-1]}.py")
        return None if text is None else [_listing(".".join(parts), f"{'/'.join([where.inside, *parts])}.py", text)]


def _listing(module: str, inside: str, source: str) -> str:
    """Source between fences that nothing in it can close."""
    longest = max((len(run) for run in re.findall("`+", source)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"## Module `{module}`, in {inside}\n\n{fence}python\n{source.strip(chr(10))}\n{fence}"


# -- what a guest has written ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _entered(above: int, name: str) -> Generator[int]:
    folder = places.enter(above, os.fsencode(name), read=True)
    try:
        yield folder
    finally:
        os.close(folder)


class _Look:
    """One search. State: `_left`, how many entries it may still look at."""

    def __init__(self) -> None:
        self._left = MAX_ENTRIES

    def into(self, folder: int) -> tuple[list[str], list[str]]:
        """The names of the regular files and of the folders in a folder, but hidden ones and those that are no text."""
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if not self._left:
                    break
                self._left -= 1
                if not entry.name.isprintable() or entry.name.startswith(".") or entry.name == "__pycache__":
                    continue
                if entry.is_file(follow_symlinks=False):
                    files.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
        return sorted(files), sorted(folders)

    def below(self, folder: int, path: str = "", depth: int = 1) -> list[str]:
        """The regular files in a folder, then those in its folders; at most `MAX_FILES`."""
        files, folders = self.into(folder)
        found = [f"{path}{name}" for name in files[:MAX_FILES]]
        for name in folders if depth < _MAX_DEPTH else ():
            if len(found) >= MAX_FILES or not self._left:
                break
            with contextlib.suppress(OSError, places.Refused), _entered(folder, name) as inner:
                found += self.below(inner, f"{path}{name}/", depth + 1)
        return found[:MAX_FILES]


def _is_there(folder: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        os.lstat(name, dir_fd=folder)
        return True
    return False


def _whole(folder: int, name: str) -> str | None:
    """A file's text, or so much of it as is read; None if it cannot be read."""
    text, problems = _read(folder, name, MAX_FILE)
    return f"{text}\n[cut here]\n" if text is not None and problems else text


def _read(folder: int, name: str, limit: int) -> tuple[str | None, list[SkillProblem]]:
    """A regular file's text, of its first `limit` bytes, made valid; None if it cannot be read."""
    try:
        file, status = places.open_file(folder, os.fsencode(name))
        with os.fdopen(file, "rb") as opened:
            text = _clean(opened.read(limit).decode("utf-8-sig", "replace"))
    except places.Refused as exc:
        return None, [SkillProblem("file", exc.reason)]
    except OSError as exc:
        return None, [SkillProblem("file", f"{name}: it cannot be read ({exc.strerror})")]
    if status.st_size > MAX_FILE:
        return text, [SkillProblem("size", f"{name}: only its first {MAX_FILE} bytes are read")]
    return text, []


def _clean(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROLS)


def _summary(source: str) -> str:
    """The first paragraph of a module's docstring. It is looked for, not parsed: the source is a guest's."""
    begin = _DOCSTRING.match(source)
    if begin is None:
        return ""
    end = source.find(begin[1], begin.end())
    text = source[begin.end() : end if end >= 0 else len(source)].strip()
    return " ".join(re.split(r"\n[ \t]*\n", text, maxsplit=1)[0].split())[:_MAX_SUMMARY]
