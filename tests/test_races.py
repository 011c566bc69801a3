"""Races: what a session flips between itself and a link, while the host reads or writes there.

Two names are exchanged by one call of the system, again and again, so that there is always something under both, and
whoever looks twice may find two things. Behind the links lie a folder of the host's and one of the system's. Every
attempt of the host's ends with what is the session's own or is refused, and both must have happened.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from actbox import CodeExecutor, Limits, TransferRefused, Workspace, WorkspaceError, files
from actbox.files import ImageFolder
from actbox.usage import DiskWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    Turns = Callable[[], int]

ENOUGH = 500  # attempts of the host's
BOUND = 2000  # attempts after which both must have happened
FLIPS = 10_000

FLIPPER = """
import ctypes, mmap, os, struct, sys, threading

def flip(pairs, counter):
    libc = ctypes.CDLL(None, use_errno=True)
    with open(counter, "w+b") as file:
        file.write(bytes(8))
        file.flush()
        shown = mmap.mmap(file.fileno(), 8)
    turns = 0
    while True:
        for one, other in pairs:
            if libc.renameat2(-100, one.encode(), -100, other.encode(), 2):
                raise OSError(ctypes.get_errno(), "renameat2")
        turns += 1
        shown[:] = struct.pack("Q", turns)
"""
# A thread of the kernel's, and a process that holds no lock of its interpreter.
INSIDE = f"""{FLIPPER}
def begin(*pairs):
    if os.fork() == 0:
        flip(pairs, "process")
    threading.Thread(target=flip, args=(pairs, "thread"), daemon=True).start()
"""
SECRET = "of the host"


def counted(*counters: Path) -> int:
    """How often was flipped, so far."""
    found = [counter.read_bytes() if counter.exists() else b"" for counter in counters]
    return sum(struct.unpack("Q", data)[0] for data in found if len(data) == 8)


@contextlib.contextmanager
def flipping(folder: Path, one: Path, other: Path) -> Generator[Turns]:
    """Exchange two names from a process of its own, until the block ends; how often, so far."""
    counter = folder / "turns"
    command = [sys.executable, "-c", f"{FLIPPER}\nflip([sys.argv[1:3]], sys.argv[3])", one, other, counter]
    with subprocess.Popen(command) as process:
        try:
            yield lambda: counted(counter)
            assert process.poll() is None
        finally:
            process.kill()


def over(number: int, outcomes: set[str], turns: int) -> bool:
    """Whether the host has tried often enough, and the names were exchanged often enough meanwhile."""
    return number >= ENOUGH and len(outcomes) == 2 and turns >= FLIPS


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    """A folder of the host's that no session is shown."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    for name in ("plot.png", "passwd"):
        (folder / name).write_text(SECRET, encoding="ascii")
    return folder


@pytest.mark.anyio
async def test_a_file_that_is_exchanged_for_a_link_never_brings_what_is_the_hosts(
    executor: CodeExecutor, tmp_path: Path, hidden: Path
) -> None:
    """A16: by a thread and by a process of the session's, ten thousand times, while it is downloaded."""
    inside, local = f"/app/skills/private/{executor.key}", tmp_path / "out"
    await executor.execute(f"""{INSIDE}
for name, target in (("plot.png", "{hidden}/plot.png"), ("passwd", "/etc/passwd")):
    with open(name, "w") as file: file.write("ours")
    os.symlink(target, f"link to {{name}}")
begin(("plot.png", "link to plot.png"), ("passwd", "link to passwd"))
""")
    outcomes: set[str] = set()
    for number in range(BOUND):
        try:
            await executor.download_file(f"{inside}/{('plot.png', 'passwd')[number % 2]}", local)
            outcomes.add(local.read_text(encoding="ascii"))
        except TransferRefused:
            outcomes.add("refused")
        if over(number, outcomes, flips_of(executor)):
            break
    assert outcomes == {"ours", "refused"}
    assert flips_of(executor) >= FLIPS


@pytest.mark.anyio
async def test_a_folder_that_is_exchanged_for_a_link_never_brings_what_is_the_hosts(
    executor: CodeExecutor, tmp_path: Path, hidden: Path
) -> None:
    """A17: while what is below it is downloaded, and while the folder above it is."""
    inside = f"/app/skills/private/{executor.key}/tree"
    await executor.execute(f"""{INSIDE}
for name, target in (("plots", "{hidden}"), ("etc", "/etc")):
    os.makedirs(f"tree/{{name}}")
    for file in ("plot.png", "passwd"):
        with open(f"tree/{{name}}/{{file}}", "w") as opened: opened.write("ours")
    os.symlink(target, f"link to {{name}}")
begin(("tree/plots", "link to plots"), ("tree/etc", "link to etc"))
""")
    outcomes: set[str] = set()
    for number in range(BOUND):
        local = tmp_path / f"out-{number}"
        try:
            if number % 3:
                await executor.download_file(f"{inside}/{('plots/plot.png', 'etc/passwd')[number % 2]}", local)
                outcomes.add(local.read_text(encoding="ascii"))
            else:
                left_out = await executor.download_directory(inside, local)
                assert set(left_out) <= {"plots", "etc"}
                outcomes |= {path.read_text(encoding="ascii") for path in local.glob("*/*")}
        except TransferRefused:
            outcomes.add("refused")
        if over(number, outcomes, flips_of(executor)):
            break
    assert outcomes == {"ours", "refused"}
    assert flips_of(executor) >= FLIPS


def flips_of(executor: CodeExecutor) -> int:
    return counted(executor.working_dir / "thread", executor.working_dir / "process")


def try_often(attempt: Callable[[int], None], turns: Turns) -> None:
    """Until it succeeded and was refused, and often enough."""
    outcomes: set[str] = set()
    for number in itertools.count():
        try:
            attempt(number)
        except WorkspaceError:
            outcomes.add("refused")
        else:
            outcomes.add("done")
        if over(number, outcomes, turns()):
            return


def test_an_image_is_never_saved_through_a_link_that_is_exchanged_for_its_folder(tmp_path: Path) -> None:
    """A17, A33."""
    images, link, outside = (tmp_path / name for name in ("images", "link", "outside"))
    images.mkdir()
    outside.mkdir()
    link.symlink_to(outside)
    with flipping(tmp_path, images, link) as turns:
        try_often(lambda _: ImageFolder(images).save(b"\x89PNG\r\n\x1a\n", "image/png") and None, turns)
    assert list(outside.iterdir()) == []


def test_without_the_rule_a_link_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """H14: the case above would tell."""
    images, link, outside = (tmp_path / name for name in ("images", "link", "outside"))
    images.mkdir()
    outside.mkdir()
    link.symlink_to(outside)
    monkeypatch.setattr(files, "_FOLDER", files._FOLDER & ~os.O_NOFOLLOW)
    with flipping(tmp_path, images, link):
        while not list(outside.iterdir()):
            ImageFolder(images).save(b"\x89PNG\r\n\x1a\n", "image/png")


@pytest.mark.parametrize("exchanged", ["skills", "skills/private", "images"])
def test_a_keys_folders_are_never_made_through_a_link_that_is_exchanged_for_one_above(
    tmp_path: Path, exchanged: str
) -> None:
    """A12, A17."""
    workspace, link, outside = Workspace(tmp_path / "workspace"), tmp_path / "link", tmp_path / "outside"
    workspace.prepare()
    (outside / "private").mkdir(parents=True)
    link.symlink_to(outside)
    with flipping(tmp_path, workspace.path / exchanged, link) as turns:
        try_often(lambda number: workspace.prepare_key(f"key-{number}") and None, turns)
    assert [str(path.relative_to(outside)) for path in outside.rglob("*")] == ["private"]


def test_what_lies_behind_a_link_that_is_exchanged_for_a_folder_is_not_counted(tmp_path: Path) -> None:
    """A17: by the watch of the disk, which would lay it to the session."""
    private, link, outside = (tmp_path / name for name in ("private", "link", "outside"))
    (private / "key" / "below").mkdir(parents=True)
    outside.mkdir()
    for number in range(50):
        (outside / str(number)).touch()
    link.symlink_to(outside)
    with flipping(tmp_path, private / "key" / "below", link) as turns:
        while turns() < FLIPS:
            watch = DiskWatch(private, "key", Limits())
            assert watch._look() is None
            assert watch._held is not None
            assert watch._held[1] == 1
