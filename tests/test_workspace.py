"""The workspace's folders: what is made, and that nothing is made through a link or for a bad key."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actbox.errors import InvalidArgument, InvalidKey, WorkspaceError
from actbox.workspace import Workspace

FOLDERS = ["skills", "skills/shared", "skills/private", "images"]

BAD_KEYS: list[Any] = [
    "",
    ".",
    "..",
    "../x",
    "/etc",
    "a/b",
    "a\\b",
    "a\0b",
    "a\n",
    "\x1b[2J",
    "\u202egnp",
    "．．／x",
    unicodedata.normalize("NFC", "é"),
    unicodedata.normalize("NFD", "é"),
    "%2e%2e",
    "~",
    "-rf",
    "_a",
    "a" + " " * 200,
    "a " * 200,
    " ",
    "\udc80",
    "CON",
    "con",
    "Lpt1",
    "a.",
    "a" * 65,
    "x" * 200,
    None,
    0,
    1.5,
    b"key",
    ("a",),
    ["a"],
    Path("a"),
]

KEYS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True).filter(
    lambda key: key.upper() not in {"CON", "PRN", "AUX", "NUL"} and key[:3].upper() not in {"COM", "LPT"}
)


def tree(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def prepare_all(workspace: Workspace) -> None:
    workspace.prepare_key("key")
    workspace.prepare()


def test_constructing_makes_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    assert workspace.path == tmp_path / "ws"
    assert workspace.skills_path == tmp_path / "ws/skills"
    assert workspace.shared_skills_path == tmp_path / "ws/skills/shared"
    assert workspace.private_skills_path == tmp_path / "ws/skills/private"
    assert workspace.images_path == tmp_path / "ws/images"
    assert tree(tmp_path) == []
    assert repr(workspace) == f"Workspace({str(tmp_path / 'ws')!r})"


def test_preparing_makes_what_is_missing_and_keeps_what_is_there(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "deep" / "ws")
    workspace.prepare()
    assert tree(workspace.path) == sorted(FOLDERS)
    (workspace.shared_skills_path / "skill.py").write_text("x = 1")
    workspace.images_path.rmdir()
    workspace.prepare()
    assert tree(workspace.path) == sorted([*FOLDERS, "skills/shared/skill.py"])


def test_preparing_a_key_makes_its_folders_and_those_above(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    working_dir, images_dir = workspace.prepare_key("alice-1")
    assert working_dir == workspace.private_skills_path / "alice-1"
    assert images_dir == workspace.images_path / "alice-1"
    assert working_dir.is_dir()
    assert images_dir.is_dir()
    (working_dir / "kept.py").touch()
    assert workspace.prepare_key("alice-1") == (working_dir, images_dir)
    assert (working_dir / "kept.py").exists()


def test_the_path_is_absolute_and_may_be_a_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace("some/../ws")
    assert workspace.path == tmp_path / "ws"
    monkeypatch.chdir("/")
    workspace.prepare()
    assert (tmp_path / "ws" / "images").is_dir()


def test_the_users_own_links_above_the_workspace_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "ws").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    (tmp_path / "direct").symlink_to(tmp_path / "disk" / "ws")
    for path in (tmp_path / "home" / "ws", tmp_path / "direct"):
        workspace = Workspace(path)
        assert workspace.path == tmp_path / "disk" / "ws"
        workspace.prepare_key("k")
    assert (tmp_path / "disk/ws/images/k").is_dir()


@pytest.mark.parametrize("path", ["", "a\0b", Path("a\0b"), "\ud800", None, 3, b"ws"])
def test_what_names_no_folder_is_an_invalid_argument(path: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Workspace(path)
    assert caught.value.name == "path"
    assert str(caught.value).isascii()


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(WorkspaceError):
        Workspace(tmp_path / "a").prepare()


@pytest.mark.parametrize("planted", [*FOLDERS, "skills/private/key", "images/key"])
@pytest.mark.parametrize("target", ["folder", "nothing", "itself", "root"])
def test_a_planted_link_is_refused_and_nothing_is_made_through_it(tmp_path: Path, planted: str, target: str) -> None:
    """A12."""
    outside = tmp_path / "outside"
    outside.mkdir()
    workspace = Workspace(tmp_path / "ws")
    link = workspace.path / planted
    link.parent.mkdir(parents=True)
    link.symlink_to({"folder": outside, "nothing": outside / "new", "itself": link, "root": Path("/")}[target])
    with pytest.raises(WorkspaceError, match="symbolic link") as caught:
        prepare_all(workspace)
    assert caught.value.path == link
    assert "put a folder" in caught.value.problem
    assert tree(outside) == []
    assert not (Path("/") / "key").exists()
    assert not (Path("/") / "private").exists()


@pytest.mark.parametrize("planted", [*FOLDERS, "skills/private/key", "images/key"])
def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path, planted: str) -> None:
    workspace = Workspace(tmp_path / "ws")
    path = workspace.path / planted
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(WorkspaceError, match="not a folder") as caught:
        prepare_all(workspace)
    assert caught.value.path == path


def test_a_workspace_that_is_a_file_or_lies_below_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "ws"):
        with pytest.raises(WorkspaceError, match="cannot be made") as caught:
            Workspace(path).prepare()
        assert caught.value.path == path


def test_a_workspace_where_nobody_may_make_folders_is_refused_with_a_remedy() -> None:
    for prepare in (Workspace("/proc/actbox").prepare, lambda: Workspace("/proc/actbox").prepare_key("key")):
        with pytest.raises(WorkspaceError, match="pass a path"):
            prepare()


@pytest.mark.parametrize("locked", ["skills/private", "images"])
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused_with_a_remedy(tmp_path: Path, locked: str) -> None:
    workspace = Workspace(tmp_path)
    workspace.prepare()
    (tmp_path / locked).chmod(0o555)
    try:
        with pytest.raises(WorkspaceError, match="writable"):
            workspace.prepare_key("key")
        workspace.prepare()  # makes nothing there
    finally:
        (tmp_path / locked).chmod(0o755)


@pytest.mark.parametrize("locked", ["skills/private/key", "images/key"])
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_keys_folder_that_may_not_be_written_is_refused_with_a_remedy(tmp_path: Path, locked: str) -> None:
    workspace = Workspace(tmp_path)
    workspace.prepare_key("key")
    (tmp_path / locked).chmod(0o555)
    try:
        with pytest.raises(WorkspaceError, match="writable") as caught:
            workspace.prepare_key("key")
        assert caught.value.path == tmp_path / locked
    finally:
        (tmp_path / locked).chmod(0o755)


def test_a_folder_that_is_made_by_another_at_the_same_time_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_mkdir = os.mkdir

    def overtaken(path: str, *args: int, **kwargs: int | None) -> None:
        really_mkdir(path, *args, **kwargs)
        really_mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", overtaken)
    working_dir, images_dir = Workspace(tmp_path).prepare_key("key")
    assert working_dir.is_dir()
    assert images_dir.is_dir()


def test_a_link_that_is_planted_between_the_making_and_the_opening_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A12."""
    outside = tmp_path / "outside"
    outside.mkdir()
    really_mkdir = os.mkdir

    def swapped(path: str, *args: int, dir_fd: int | None = None) -> None:
        if path == "private":
            os.symlink(outside, path, dir_fd=dir_fd)
        else:
            really_mkdir(path, *args, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", swapped)
    with pytest.raises(WorkspaceError, match="symbolic link"):
        Workspace(tmp_path / "ws").prepare_key("key")
    assert tree(outside) == []


def refused_without_a_look(workspace: Workspace, key: Any) -> None:
    looks = [mock.patch.object(os, name) for name in ("open", "mkdir", "stat", "lstat", "access", "symlink", "listdir")]
    mocks = [look.start() for look in looks]
    try:
        with pytest.raises(InvalidKey) as caught:
            workspace.prepare_key(key)
        calls = [each.mock_calls for each in mocks]
    finally:
        for look in looks:
            look.stop()
    assert calls == [[]] * len(looks)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", BAD_KEYS, ids=ascii)
def test_a_key_outside_the_grammar_is_refused_before_the_file_system_is_touched(tmp_path: Path, key: Any) -> None:
    """A9."""
    workspace = Workspace(tmp_path / "ws")
    refused_without_a_look(workspace, key)
    assert tree(tmp_path) == []


@given(
    st.text().filter(lambda key: not key.isascii() or not key.replace("_", "a").replace("-", "a").isalnum())
    | st.builds("{}{}{}".format, KEYS, st.sampled_from("./\\\0\n %:~\x1b\u202e\uff0f\udc80"), KEYS)
    | st.text("ab-_", min_size=65)
    | KEYS.map(lambda key: f"-{key}")
)
def test_any_text_outside_the_grammar_is_refused(key: str) -> None:
    """A9."""
    refused_without_a_look(Workspace("/nonexistent"), key)


@settings(deadline=None)  # it makes folders, and machines differ
@given(key=KEYS)
def test_any_key_inside_the_grammar_is_accepted(tmp_path_factory: pytest.TempPathFactory, key: str) -> None:
    """A9."""
    workspace = Workspace(tmp_path_factory.getbasetemp() / "keys")
    working_dir, images_dir = workspace.prepare_key(key)
    assert [working_dir.parent, images_dir.parent] == [workspace.private_skills_path, workspace.images_path]
    assert working_dir.name == images_dir.name == key
    assert working_dir.is_dir()
    assert images_dir.is_dir()


def descriptors() -> list[str]:
    return sorted(found.name for found in Path("/proc/self/fd").iterdir())


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = descriptors()
    workspace = Workspace(tmp_path / "ws")
    workspace.prepare()
    workspace.prepare_key("key")
    (workspace.path / "images" / "link").symlink_to("/")
    with pytest.raises(WorkspaceError):
        workspace.prepare_key("link")
    assert descriptors() == before
