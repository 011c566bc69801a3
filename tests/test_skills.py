"""Skills are found and told, whatever a session has put in their place."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from actbox import CodeExecutionContainer, CodeExecutor, InvalidArgument, InvalidKey, Skill, Workspace, WorkspaceError
from actbox import skills as room
from actbox.frontmatter import Malformed, Value, parse, split

if TYPE_CHECKING:
    from pathlib import Path

# Seconds; much is to be looked at in these, and little time to be spent.
SOON = 5
HEAD = "---\nname: {name}\ndescription: {description}\n{more}---\nThe body.\n"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "ws")
    made.prepare_key("key")
    made.prepare()
    return made


@pytest.fixture
def private(workspace: Workspace) -> Path:
    return workspace.private_skills_path / "key"


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def agent(folder: Path, name: str | None = None, description: str = "What it does.", more: str = "") -> None:
    write(folder / "SKILL.md", HEAD.format(name=name or folder.name, description=description, more=more))


def only(workspace: Workspace) -> Skill:
    (skill,) = workspace.skills("key")
    return skill


def kinds(workspace: Workspace) -> list[str]:
    return [problem.kind for problem in only(workspace).problems]


# -- what is a skill ---------------------------------------------------------------------------------------------------


def test_shared_and_private_skills_of_every_kind_are_found(workspace: Workspace, private: Path) -> None:
    write(workspace.shared_skills_path / "tools.py", '#!/bin/python\n\n"""Tools.\n\nMore."""\n')
    write(private / "pack" / "__init__.py", "r'''A package\nof parts.'''")
    write(private / "pack" / "inner" / "deep.py")
    write(private / "plain" / "module.py")
    agent(private / "pdf-work", more="license: MIT\nmetadata:\n  author: me\nallowed-tools: Bash(git:*) Read\n")
    agent(private / "both", more="compatibility: Python 3\nallowed-tools: [A, B]\n")
    write(private / "both" / "__init__.py")
    found = workspace.skills("key")
    assert [(skill.name, skill.kind, skill.scope, skill.module) for skill in found] == [
        ("tools", "module", "shared", "tools"),
        ("both", "agent", "private", "both"),
        ("pack", "package", "private", "pack"),
        ("pdf-work", "agent", "private", None),
        ("plain", "package", "private", "plain"),
    ]
    tools, both, pack, pdf, _ = found
    assert [skill.problems for skill in found] == [()] * 5
    assert (tools.description, tools.inside) == ("Tools.", "/app/skills/shared/tools.py")
    assert tools.path == workspace.shared_skills_path / "tools.py"
    assert pack.description == "A package of parts."
    assert pack.files == ("__init__.py", "inner/deep.py")
    assert (both.compatibility, both.allowed_tools) == ("Python 3", ("A", "B"))
    assert (pdf.description, pdf.license, pdf.metadata) == ("What it does.", "MIT", {"author": "me"})
    assert pdf.allowed_tools == ("Bash(git:*)", "Read")
    assert pdf.inside == "/app/skills/private/key/pdf-work"
    assert workspace.skills() == [tools]


def test_what_cannot_be_told_or_imported_is_no_skill(workspace: Workspace, private: Path) -> None:
    for name in (".hidden.py", "_private.py", "__init__.py", "with-hyphen.py", "text.txt", "1.py", "line\nbreak.py"):
        write(private / name)
    for name in ("__pycache__/x.py", ".git/x.py", "_x/x.py", "empty/readme.txt", "a-b/x.py"):
        write(private / name)
    (private / os.fsdecode(b"\xff.py")).write_text("")
    assert workspace.skills("key") == []


def test_a_workspace_that_is_not_there_has_no_skills(tmp_path: Path) -> None:
    assert Workspace(tmp_path / "none").skills("key") == []
    with pytest.raises(InvalidKey):
        Workspace(tmp_path).skills("../key")
    with pytest.raises(InvalidArgument, match="no such skill"):
        Workspace(tmp_path / "none").skill_sources(["x"], "key")


@pytest.mark.parametrize(
    ("source", "summary"),
    [
        ('"""One.\n\nTwo."""', "One."),
        ("'One line.'", "One line."),
        ("# comment\n\nu'''  One\n  goes on.'''", "One goes on."),
        ('"""does not end', "does not end"),
        ("import os\n'''no docstring'''", ""),
        ("", ""),
        ('f"""no"""', ""),
        ("\ufeff'''With a mark.'''", "With a mark."),
        ("'''nul \0 and \x1b[2J escape'''", "nul and [2J escape"),
    ],
)
def test_a_docstring_is_looked_for_and_not_parsed(
    workspace: Workspace, private: Path, source: str, summary: str
) -> None:
    write(private / "module.py", source)
    assert only(workspace).description == summary


# -- the rules of the specification ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "a1", "1a", "pdf-processing", "x" * 64])
def test_a_name_that_keeps_the_rules_has_no_problem(workspace: Workspace, private: Path, name: str) -> None:
    agent(private / name)
    assert only(workspace).problems == ()


@pytest.mark.parametrize("name", ["PDF", "a--b", "-a", "a-", "a_b", "é", "x" * 65, "a b"])
def test_a_name_that_breaks_the_rules_is_a_problem(workspace: Workspace, private: Path, name: str) -> None:
    agent(private / name)
    assert kinds(workspace) == ["name"]


@pytest.mark.parametrize(
    ("more", "problems"),
    [
        ({"name": "other"}, ["name"]),
        ({"name": "''"}, ["name"]),
        ({"description": "''"}, ["description"]),
        ({"description": "x" * 1025}, ["description"]),
        ({"description": "[a]"}, ["description"]),
        ({"more": "compatibility: " + "x" * 501 + "\n"}, ["compatibility"]),
        ({"more": "license:\n  a: b\n"}, ["license"]),
        ({"more": "metadata: text\n"}, ["metadata"]),
        ({"more": "allowed-tools: {a: b}\n"}, ["allowed-tools"]),
        ({"more": "version: 1\nauthor: me\n"}, ["field", "field"]),
        ({"more": "broken\n"}, ["frontmatter"]),
        ({"more": "x: !!python/object/apply:os.system [id]\n"}, ["frontmatter"]),
        ({"more": "x: " + "y" * (16 << 10) + "\n"}, ["frontmatter"]),
    ],
)
def test_violations_are_told_on_the_skill(
    workspace: Workspace, private: Path, more: dict[str, str], problems: list[str]
) -> None:
    agent(private / "skill", **more)
    assert kinds(workspace) == problems
    assert only(workspace).name == "skill"


@pytest.mark.parametrize("text", ["", "# no head", "---\nname: skill\n", " ---\nname: skill\n---\n", "--- x\n---\n"])
def test_a_skill_without_a_head_is_one_with_a_problem(workspace: Workspace, private: Path, text: str) -> None:
    write(private / "skill" / "SKILL.md", text)
    assert kinds(workspace) == ["frontmatter"]


# -- YAML --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ("a: b", {"a": "b"}),
        ("a: b # comment\n# more\n\nc: d#e", {"a": "b", "c": "d#e"}),
        ("a: 1.0\nb: true\nc: null", {"a": "1.0", "b": "true", "c": "null"}),
        ("a:\nb: x", {"a": "", "b": "x"}),
        ("a: one\n  two\n   three", {"a": "one two three"}),
        ("a:\n  one\n  two", {"a": "one two"}),
        ("a: 'it''s: #1'", {"a": "it's: #1"}),
        (r'a: "tab\t \"q\" \u00e9 \x41 \U0001F600"', {"a": 'tab\t "q" é A 😀'}),
        (r'a: "\ud800"', {"a": "\ufffd"}),
        ('a: "one\n  two"  # c', {"a": "one two"}),
        ("a: |\n  one\n   two\n\nb: c", {"a": "one\n two\n", "b": "c"}),
        ("a: >-\n  one\n  two\n\n  three\nb: c", {"a": "one two\nthree", "b": "c"}),
        ("a: [x, 'y, z', \"w\"]\nb: []", {"a": ["x", "y, z", "w"], "b": []}),
        ("a: {x: y, z: 'v, w'}", {"a": {"x": "y", "z": "v, w"}}),
        ("a:\n  - Bash(git:*)\n  - b  # c\nd: e", {"a": ["Bash(git:*)", "b"], "d": "e"}),
        ("a:\n- x\n- y\nb: c", {"a": ["x", "y"], "b": "c"}),
        ("a:\n  x: y\n  'z': \"1.0\"\nb: c", {"a": {"x": "y", "z": "1.0"}, "b": "c"}),
        ("a: http://x.y/z", {"a": "http://x.y/z"}),
        ("", {}),
    ],
)
def test_the_yaml_that_skills_are_written_in_is_read(head: str, fields: dict[str, Value]) -> None:
    assert parse(head) == fields


@pytest.mark.parametrize(
    ("head", "line"),
    [
        ("a: &x b", 2),
        ("a: *x", 2),
        ("a: !tag b", 2),
        ("a: b\na: c", 3),
        ("a: b: c", 2),
        ("a: [b", 2),
        ("a: [[b]]", 2),
        ("a: {b: {c: d}}", 2),
        ('a: "b', 2),
        ('a: "\\q"', 2),
        ("a: 'b' c", 2),
        ("a:\n  b:\n    c: d", 4),
        ("a:\n  - b\n    - c: d", 4),
        ("  a: b", 2),
        ("\ta: b", 2),
        ("just text", 2),
        ("a: b\n--- x", 3),
        ("? a", 2),
        ("a: - b", 2),
        ("a: |\n    b\n  c", 4),
    ],
)
def test_other_yaml_is_refused_with_its_line(head: str, line: int) -> None:
    with pytest.raises(Malformed) as refused:
        parse(head)
    assert refused.value.line == line


@given(st.text("ab:-#'\"\\|>[]{},&*! \n\t", max_size=200) | st.text())
@example("a: |")
@example("a: [")
@example("a:\n-")
@example("a: '")
@example("- a")
def test_any_text_is_read_or_refused(text: str) -> None:
    head, _ = split(f"---\n{text}\n---\n")
    if head is not None:
        with contextlib.suppress(Malformed):
            assert all(isinstance(name, str) for name in parse(head))


@pytest.mark.timeout(SOON)
@pytest.mark.parametrize(
    "piece",
    ["'", '"', '\\"', "[", "a: b\n", "- ", "a: [", "''", "\n", " ", "  x\n", "#", "a,", "\\", '""'],
)
@pytest.mark.parametrize("begin", ["", "a: ", "a: '", 'a: "', "a: [", "a: |\n", "a: >\n", "a:\n", "a: {"])
def test_hostile_heads_take_little_time(begin: str, piece: str) -> None:
    with contextlib.suppress(Malformed):
        parse((begin + piece * (16 << 10))[: 16 << 10])


# -- what a session may put there --------------------------------------------------------------------------------------


def test_no_link_is_followed(workspace: Workspace, private: Path, tmp_path: Path) -> None:
    write(tmp_path / "secret.py", '"""secret"""')
    agent(tmp_path / "outside", description="secret")
    (private / "module.py").symlink_to(tmp_path / "secret.py")
    (private / "outside").symlink_to(tmp_path / "outside")
    (private / "skill").mkdir()
    (private / "skill" / "SKILL.md").symlink_to(tmp_path / "outside" / "SKILL.md")
    write(private / "skill" / "own.py")
    (private / "skill" / "inner").symlink_to(tmp_path)
    (private / "skill" / "other.py").symlink_to(tmp_path / "secret.py")
    skill = only(workspace)
    assert (skill.name, skill.description, skill.files) == ("skill", "", ("own.py",))
    assert [problem.kind for problem in skill.problems] == ["file"]
    assert "symbolic link" in skill.problems[0].message
    for name in ("module", "outside", "skill.other", "skill.inner.secret"):
        with pytest.raises(InvalidArgument, match="no such skill"):
            workspace.skill_sources([name], "key")
    assert "secret" not in workspace.skill_sources(["skill"], "key")


def test_a_folder_of_skills_that_is_a_link_is_refused(workspace: Workspace, private: Path, tmp_path: Path) -> None:
    private.rmdir()
    private.symlink_to(tmp_path)
    with pytest.raises(WorkspaceError, match="symbolic link"):
        workspace.skills("key")


def test_pipes_sockets_and_folders_in_the_place_of_files_are_passed_by(workspace: Workspace, private: Path) -> None:
    os.mkfifo(private / "pipe.py")
    (private / "folder.py").mkdir()
    (private / "skill").mkdir()
    os.mkfifo(private / "skill" / "SKILL.md")
    (private / "other" / "SKILL.md").mkdir(parents=True)
    here = os.open(private, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/socket.py")
    os.close(here)
    found = workspace.skills("key")
    assert [(skill.name, [problem.kind for problem in skill.problems]) for skill in found] == [
        ("other", ["file"]),
        ("skill", ["file"]),
    ]


def test_long_files_are_cut_and_it_is_told(workspace: Workspace, private: Path) -> None:
    write(private / "module.py", '"""Doc."""\n' + "x = 1\n" * (1 << 16))
    agent(private / "skill")
    with (private / "skill" / "SKILL.md").open("a", encoding="utf-8") as file:
        file.write("é" * (1 << 18))
    assert [[problem.kind for problem in skill.problems] for skill in workspace.skills("key")] == [["size"], ["size"]]
    text = workspace.skill_sources(["module", "skill"], "key")
    assert text.count("[cut here]") == 2
    assert len(text) < 3 * room.MAX_FILE


def test_sources_have_a_bound_in_all(workspace: Workspace, private: Path) -> None:
    for number in range(8):
        write(private / f"module{number}.py", "x = 1\n" * 20_000)
    text = workspace.skill_sources([f"module{number}" for number in range(8)], "key")
    assert len(text) < room.MAX_SOURCES + 1000
    assert text.endswith("the rest is left out]")


@pytest.mark.timeout(SOON)
def test_a_forest_of_folders_is_not_walked(
    workspace: Workspace, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_ENTRIES", 500)
    monkeypatch.setattr(room, "MAX_SKILLS", 3)
    deep = private / "deep"
    for _ in range(50):
        deep /= "deep"
    deep.mkdir(parents=True)
    for first in range(30):
        for second in range(30):
            (private / f"a{first}" / f"b{second}").mkdir(parents=True)
    assert workspace.skills("key") == []
    for number in range(10):
        write(private / f"m{number}.py")
    assert [skill.name for skill in workspace.skills("key")] == ["m0", "m1", "m2"]


def test_a_skill_of_many_files_names_the_first(workspace: Workspace, private: Path) -> None:
    agent(private / "skill")
    for number in range(2 * room.MAX_FILES):
        write(private / "skill" / "data" / f"{number:04}.txt")
    assert len(only(workspace).files) == room.MAX_FILES


@given(st.binary(max_size=300))
def test_any_bytes_make_valid_text(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    workspace = Workspace(tmp_path_factory.mktemp("ws"))
    workspace.prepare()
    (workspace.shared_skills_path / "skill").mkdir()
    (workspace.shared_skills_path / "skill" / "SKILL.md").write_bytes(b"---\n" + data + b"\n---\n" + data)
    (workspace.shared_skills_path / "skill" / "module.py").write_bytes(b'"""' + data)
    (found,) = workspace.skills()
    texts = [found.description, *(problem.message for problem in found.problems), workspace.skill_sources(["skill"])]
    for text in texts:
        text.encode()
        assert not set(text) & {"\0", "\x1b", "\r", "\x9b"}


# -- for a prompt ------------------------------------------------------------------------------------------------------


def test_sources_are_markdown_that_nothing_in_them_can_leave(workspace: Workspace, private: Path) -> None:
    write(private / "pack" / "__init__.py", '"""```` fences"""\n')
    write(private / "pack" / "part.py", "x = 1\n")
    write(private / "pack" / "inner" / "deep.py", "y = 2\n")
    agent(private / "skill")
    write(private / "skill" / "scripts" / "run.py", "z = 3\n")
    assert workspace.skill_sources(["pack", "skill", "pack.inner.deep"], "key") == (
        "## Module `pack`, in /app/skills/private/key/pack/__init__.py\n\n"
        '`````python\n"""```` fences"""\n`````\n\n'
        "## Module `pack.part`, in /app/skills/private/key/pack/part.py\n\n```python\nx = 1\n```\n\n"
        "Other files in /app/skills/private/key/pack:\n- inner/deep.py\n\n"
        "## Skill `skill`, in /app/skills/private/key/skill\n\nThe body.\n\n"
        "Other files in /app/skills/private/key/skill:\n- scripts/run.py\n\n"
        "## Module `pack.inner.deep`, in /app/skills/private/key/pack/inner/deep.py\n\n```python\ny = 2\n```"
    )


def test_a_shared_skill_comes_before_a_private_one_as_it_is_imported(workspace: Workspace, private: Path) -> None:
    write(workspace.shared_skills_path / "both.py", "shared = 1")
    write(private / "both.py", "private = 1")
    assert "shared = 1" in workspace.skill_sources(["both"], "key")
    assert [skill.scope for skill in workspace.skills("key")] == ["shared", "private"]


def test_files_at_the_top_of_a_skill_that_cannot_be_imported_are_named(workspace: Workspace, private: Path) -> None:
    agent(private / "pdf-work")
    write(private / "pdf-work" / "fill.py", "z = 3\n")
    assert workspace.skill_sources(["pdf-work"], "key").endswith(
        "Other files in /app/skills/private/key/pdf-work:\n- fill.py"
    )


@pytest.mark.parametrize("name", ["My Skill", "a--b", "with.dots", "v1.2", "é-x", "UP-er", "-", "`"])
def test_whatever_is_listed_has_sources(workspace: Workspace, private: Path, name: str) -> None:
    agent(private / name)
    assert workspace.skill_sources([skill.name for skill in workspace.skills("key")], "key") == (
        f"## Skill `{name}`, in /app/skills/private/key/{name}\n\nThe body."
    )


def test_a_skill_that_cannot_be_read_keeps_no_other_from_the_prompt(workspace: Workspace, private: Path) -> None:
    agent(private / "good")
    (private / "bad" / "SKILL.md").mkdir(parents=True)
    text = workspace.skill_sources([skill.name for skill in workspace.skills("key")], "key")
    assert "Its SKILL.md cannot be read." in text
    assert text.endswith("The body.")


def test_a_skill_is_found_behind_more_files_than_are_named(workspace: Workspace, private: Path) -> None:
    agent(private / "skill")
    for number in range(room.MAX_FILES + 1):
        write(private / "skill" / f"0{number:04}.txt")
    text = workspace.skill_sources(["skill"], "key")
    assert "The body." in text
    assert text.endswith(f"[no more than {room.MAX_FILES} files are named]")


def test_what_stands_before_yaml_that_is_not_read_is_kept(workspace: Workspace, private: Path) -> None:
    agent(private / "skill", more='license: MIT\nmetadata:\n  vendor:\n    emoji: "x"\n')
    skill = only(workspace)
    assert (skill.description, skill.license, skill.metadata) == ("What it does.", "MIT", {})
    assert kinds(workspace) == ["frontmatter"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a..b", ".hidden", "a.", "/etc/passwd", "x\0", "none", 1]
)
def test_a_name_of_no_skill_is_refused(workspace: Workspace, private: Path, name: Any) -> None:
    write(private / "a" / "b.py")
    with pytest.raises(InvalidArgument):
        workspace.skill_sources([name], "key")


# -- on every engine ---------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_skill_written_inside_serves_the_next_cell_and_the_next_session(
    container: CodeExecutionContainer, key: str
) -> None:
    async with CodeExecutor(key, container.workspace, container.port) as executor:
        await executor.execute(
            "from pathlib import Path\n"
            'Path(\'areas.py\').write_text(\'"""Areas."""\\ndef square(x): return x * x\\n\')\n'
            "Path('pack').mkdir(); Path('pack/__init__.py').write_text('side = 3')\n"
            "Path('how-to').mkdir()\n"
            "Path('how-to/SKILL.md').write_text('---\\nname: how-to\\ndescription: Says how.\\n---\\nThus.')"
        )
        assert (await executor.execute("import areas, pack; areas.square(pack.side)")).text == "9"
        await executor.execute("Path('areas.py').write_text('def square(x): return x ** 2 + 1000\\n')")
        assert (await executor.execute("areas.square(pack.side)")).text == "1009"
        found = await executor.skills()
        mine = [(skill.name, skill.kind, skill.problems) for skill in found if skill.scope == "private"]
        assert mine == [("areas", "module", ()), ("how-to", "agent", ()), ("pack", "package", ())]
        assert "return x ** 2 + 1000" in await executor.skill_sources(["areas"])
        described = next(skill for skill in found if skill.name == "how-to")
        assert (await executor.execute(f"print(Path({described.inside!r}, 'SKILL.md').exists())")).text == "True"
    async with CodeExecutor(key, container.workspace, container.port) as executor:
        assert (await executor.execute("from areas import square; import pack; square(pack.side)")).text == "1009"
        assert "Thus." in await executor.skill_sources(["how-to"])


@pytest.mark.anyio
async def test_a_session_cannot_show_the_hosts_files_as_skills(executor: CodeExecutor, tmp_path: Path) -> None:
    write(tmp_path / "secret.py", '"""secret"""')
    await executor.execute(
        "import os\n"
        f"os.symlink({str(tmp_path / 'secret.py')!r}, 'stolen.py'); os.symlink({str(tmp_path)!r}, 'folder')\n"
        f"os.mkdir('skill'); os.symlink({str(tmp_path / 'secret.py')!r}, 'skill/SKILL.md')"
    )
    mine = [skill for skill in await executor.skills() if skill.scope == "private"]
    assert [(skill.name, skill.description, skill.problems[0].kind) for skill in mine] == [("skill", "", "file")]
    for name in ("stolen", "folder.secret"):
        with pytest.raises(InvalidArgument):
            await executor.skill_sources([name])
    assert (await executor.skill_sources(["skill"])).endswith("Its SKILL.md cannot be read.")


@pytest.mark.anyio
async def test_the_skills_of_a_branch_are_those_that_it_imports(executor: CodeExecutor, key: str) -> None:
    await executor.execute("open('mine.py', 'w').write('x = 1')")
    for files, inside in (("shared", f"/app/skills/private/{key}/mine.py"), ("copy", "/.branches/")):
        async with await executor.fork(f"{key}-{files}", files=files) as branch:  # pyright: ignore[reportArgumentType]
            await branch.execute(f"open('mine.py', 'w').write(\"x = {files!r}\")\nimport mine")
            assert (await branch.execute("mine.__file__")).text == repr((await branch.skills())[-1].inside)
            (skill,) = (skill for skill in await branch.skills() if skill.scope == "private")
            assert inside in skill.inside
            assert f"x = {files!r}" in await branch.skill_sources(["mine"])
    assert "x = 'shared'" in await executor.skill_sources(["mine"])
