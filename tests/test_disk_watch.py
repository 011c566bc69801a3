"""How the host counts what a session's folder holds: with a clock and a disk of our own, and on real folders."""

from __future__ import annotations

import contextlib
import os
import resource
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from actbox import Limits, usage
from actbox.events import Overrun

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.anyio

MIB = 1 << 20


class Machine:
    """What `DiskWatch` asks of the system: the time, and what is free on the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.bytes, self.files, self.counts_files = 1 << 40, 1 << 30, True
        self.walks = 0
        self.walk_seconds = 0.0
        walk = usage.DiskWatch._walk

        def counting(watch: usage.DiskWatch, folder: int) -> tuple[int, int]:
            self.walks += 1
            held = walk(watch, folder)
            self.now += self.walk_seconds
            watch._walked, watch._walk_seconds = self.now, self.walk_seconds
            return held

        monkeypatch.setattr(usage.DiskWatch, "_walk", counting)
        monkeypatch.setattr(usage.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(usage.os, "statvfs", self._statvfs)

    def _statvfs(self, _folder: int) -> SimpleNamespace:
        return SimpleNamespace(
            f_bavail=self.bytes // 4096,
            f_frsize=4096,
            f_favail=self.files if self.counts_files else 0,
            f_files=1 << 31 if self.counts_files else 0,
        )

    async def look(self, watch: usage.DiskWatch) -> Overrun | None:
        """A look, and the pause after it."""
        found = await watch.look()
        self.now += watch.pause
        return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "key"
    made.mkdir()
    return made


def watch_of(folder: Path, **limits: int) -> usage.DiskWatch:
    return usage.DiskWatch(folder.parent, folder.name, Limits(**limits))


def write(path: Path, size: int) -> None:
    path.write_bytes(b"x" * size)


async def test_a_disk_that_does_not_change_is_walked_once_and_asked_ever_more_seldom(
    machine: Machine, folder: Path
) -> None:
    watch = watch_of(folder)
    pauses: list[float] = []
    for _ in range(9):
        await machine.look(watch)
        pauses.append(watch.pause)
    assert pauses == [0.5, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert machine.walks == 1
    machine.bytes -= 4096
    await machine.look(watch)
    assert (watch.pause, machine.walks) == (0.5, 2)
    machine.bytes -= 4096
    await machine.look(watch)
    assert (watch.pause, machine.walks) == (0.5, 2)  # so little is worth a walk from time to time


async def test_what_others_write_to_the_disk_is_not_held_against_a_session(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=MIB, files=10)
    for _ in range(20):
        machine.bytes -= 10 * MIB
        machine.files -= 20
        assert await machine.look(watch) is None
    assert machine.walks == 20


async def test_what_others_free_does_not_hide_what_a_session_takes(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=64 * MIB)
    await machine.look(watch)
    write(folder / "x", 65 * MIB)
    began = machine.now
    machine.bytes += 4096
    while (found := await machine.look(watch)) is None:
        assert machine.now < began + 10
    assert found.limit == "disk"


async def test_a_walk_takes_its_share_of_the_time_and_no_more(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=1000 * MIB)
    machine.walk_seconds = 2.0
    began = machine.now
    while machine.now < began + 200:
        # Worth a walk at every look, and never as much as there was left.
        machine.bytes = watch._free_at_walk[0] - 64 * MIB if machine.walks else machine.bytes
        await machine.look(watch)
    assert machine.walks == 5  # each 2 s, and 40 s after the one before


async def test_a_likely_overrun_is_looked_into_soon_however_long_it_takes(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=64 * MIB)
    await machine.look(watch)
    machine.walk_seconds = 2.0
    machine.bytes -= 8 * MIB
    assert await machine.look(watch) is None
    began = machine.now
    write(folder / "x", 65 * MIB)
    machine.bytes -= 100 * MIB
    while (found := await machine.look(watch)) is None:
        assert machine.now < began + 10
    assert (found.limit, found.bound) == ("disk", 64 * MIB)
    assert 65 * MIB <= found.use < 66 * MIB


async def test_where_files_are_not_counted_every_change_may_be_a_flood(machine: Machine, folder: Path) -> None:
    machine.counts_files = False
    watch = watch_of(folder, files=10)
    await machine.look(watch)
    for number in range(30):
        write(folder / str(number), 0)
    assert await machine.look(watch) is None
    machine.bytes -= 4096
    assert await machine.look(watch) == Overrun("files", 10, 20)  # no further than to be certain


async def test_what_is_shut_to_us_is_laid_to_whom_it_belongs(
    machine: Machine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "shut").mkdir()
    open_ = os.open

    def refusing(path: str, flags: int, *args: Any, **more: Any) -> int:
        if path == "shut":
            raise PermissionError(13, "Permission denied")
        return open_(path, flags, *args, **more)

    monkeypatch.setattr(usage.os, "open", refusing)
    watch = watch_of(folder, disk=64 * MIB)
    await machine.look(watch)
    machine.bytes -= 30 * MIB
    assert await machine.look(watch) is None
    machine.bytes -= 40 * MIB
    found = await machine.look(watch)
    assert found is not None
    assert found.limit == "disk"
    assert 70 * MIB <= found.use < 71 * MIB


async def test_after_an_excuse_only_what_is_added_counts(machine: Machine, folder: Path) -> None:
    watch = watch_of(folder, disk=MIB)
    await machine.look(watch)
    write(folder / "x", 2 * MIB)
    machine.bytes -= 2 * MIB
    watch.excuse()
    for _ in range(5):
        assert await machine.look(watch) is None
    write(folder / "y", 2 * MIB)
    machine.bytes -= 2 * MIB
    found = await machine.look(watch)
    assert found is not None
    assert 4 * MIB <= found.use < 5 * MIB


async def test_a_folder_that_is_gone_or_a_link_holds_nothing(machine: Machine, folder: Path, tmp_path: Path) -> None:
    watch = watch_of(folder)
    os.rmdir(folder)  # noqa: PTH106 - at once
    assert await watch.look() is None
    os.symlink(tmp_path, folder)  # noqa: PTH211
    assert await watch.look() is None
    assert machine.walks == 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are wanted


def walk_of(watch: usage.DiskWatch, folder: Path) -> tuple[int, int]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        return watch._walk(fd)
    finally:
        os.close(fd)


def nest(folder: Path, depth: int, *, comb: bool = False) -> None:
    """Folders in each other, deeper than a path can name; with `comb` another one beside each."""
    here = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        if comb:
            os.mkdir("a", dir_fd=here)
            os.mkdir("z", dir_fd=here)
        above, here = here, os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(above)
    os.close(os.open("last", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def unnest(folder: Path) -> None:
    """Take it away again; what pytest itself clears away may not be as deep."""
    depth = 0
    above = [os.open(folder, os.O_RDONLY)]
    with contextlib.suppress(FileNotFoundError):
        while True:
            above.append(os.open("d", os.O_RDONLY, dir_fd=above[-1]))
            depth += 1
    for fd in reversed(above):
        for name in os.listdir(fd):  # noqa: PTH208 - there is no path
            if name == "last":
                os.remove(name, dir_fd=fd)
            else:
                os.rmdir(name, dir_fd=fd)
        os.close(fd)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Leave to open as many descriptors as `unnest` needs."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, before[1]), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("comb", [False, True])
def test_a_deep_tree_is_counted_whole_and_in_time(folder: Path, many_files: None, *, comb: bool) -> None:
    nest(folder, 1000, comb=comb)
    try:
        watch = watch_of(folder)
        before, began = descriptors(), time.monotonic()
        assert walk_of(watch, folder)[1] == (3001 if comb else 1001)
        assert time.monotonic() - began < 3
        assert descriptors() == before
    finally:
        unnest(folder)


def test_what_lies_deeper_than_any_path_can_name_counts_as_too_much(folder: Path, many_files: None) -> None:
    """A24."""
    nest(folder, 2100)
    try:
        assert walk_of(watch_of(folder, files=50_000), folder)[1] == 100_001
    finally:
        unnest(folder)


def test_a_wide_and_deep_tree_holds_few_descriptors_and_opens_few_folders_twice(
    folder: Path, many_files: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A24."""
    nest(folder, 400, comb=True)
    opened, most = 0, 0
    open_ = os.open

    def counting(*args: Any, **more: Any) -> int:
        nonlocal opened, most
        opened += 1
        most = max(most, descriptors())
        return open_(*args, **more)

    try:
        before = descriptors()
        monkeypatch.setattr(usage.os, "open", counting)
        walk_of(watch_of(folder), folder)
        monkeypatch.undo()
        # 1200 folders, and a way of up to 400 back to each of 400 that were closed, which serves as many as are kept.
        assert 1200 < opened < 1200 + 400 * 400 / 32
        assert most - before < 40
    finally:
        monkeypatch.undo()
        unnest(folder)


def test_a_hundred_thousand_files_are_counted_in_time() -> None:
    # In memory, where they are made in a second.
    """A24."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        for name in range(10):
            (Path(place) / str(name)).mkdir()
            fd = os.open(f"{place}/{name}", os.O_RDONLY)
            for number in range(10_000):
                os.mknod(str(number), dir_fd=fd)
            os.close(fd)
        watch = watch_of(Path(place))
        began = time.monotonic()
        assert walk_of(watch, Path(place))[1] == 100_010
        assert time.monotonic() - began < 5
        # One that need not know so exactly does not look at all of them.
        began = time.monotonic()
        assert walk_of(watch_of(Path(place), files=100), Path(place))[1] < 500
        assert time.monotonic() - began < 0.5


def test_links_and_odd_things_are_neither_followed_nor_opened(folder: Path) -> None:
    """A14, A18."""
    outside = folder.parent / "outside"
    outside.mkdir()
    write(outside / "large", MIB)
    for name, target in (("up", ".."), ("loop", "loop"), ("self", "."), ("root", "/"), ("out", str(outside))):
        (folder / name).symlink_to(target)
    (folder / "sub").mkdir()
    (folder / "sub" / "back").symlink_to("../sub")
    os.mkfifo(folder / "pipe")  # opening it would wait for ever
    held, count = walk_of(watch_of(folder), folder)
    assert count == 8
    assert held < MIB


def test_a_folder_that_changes_while_it_is_walked_does_no_harm(folder: Path) -> None:
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            for number in range(20):
                place = folder / f"d{number}"
                with contextlib.suppress(OSError):
                    place.mkdir()
                    (place / "x").mkdir()
                    place.rename(folder / f"e{number}")
                    (folder / f"e{number}" / "x").rmdir()
                    (folder / f"e{number}").rmdir()
                    place.symlink_to("/")
                    place.unlink()

    churning = threading.Thread(target=churn)
    churning.start()
    before = descriptors()
    try:
        for _ in range(200):
            assert walk_of(watch_of(folder), folder)[1] <= 60
    finally:
        ended.set()
        churning.join()
    assert descriptors() == before
