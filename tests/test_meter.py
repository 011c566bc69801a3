"""What a session's watcher measures, with processes of our own, and once a real one."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from actbox.guest import usage as guest

if TYPE_CHECKING:
    from pathlib import Path

MIB = 1 << 20


@dataclass
class Process:
    """A process as the meter sees it; times in clock ticks."""

    own: int = 0
    children: int = 0
    resident: int = 0
    proportional: int = 0


class World:
    """All processes of a session."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: dict[int, Process] = {2: Process()}
        self.deleted = 0
        self.asked_for_shares = 0
        for name in ("_processes", "_ticks", "_resident", "_proportional", "_in_deleted_files"):
            monkeypatch.setattr(guest, name, getattr(self, name))
        monkeypatch.setattr(guest, "_TICKS", 100)
        self._used = SimpleNamespace(ru_utime=0.0, ru_stime=0.0)
        monkeypatch.setattr(guest.resource, "getrusage", self._reaped)

    def reap(self, seconds: float) -> None:
        """The watcher has waited for an orphan that used so much."""
        self._used.ru_utime += seconds

    def _reaped(self, _who: int) -> SimpleNamespace:
        return self._used

    def _processes(self, own: int) -> list[int]:
        return [pid for pid in self.all if pid > own]

    def _ticks(self, pid: int) -> tuple[int, int]:
        return self.all[pid].own, self.all[pid].children

    def _resident(self, pids: list[int]) -> int:
        return sum(self.all[pid].resident for pid in pids)

    def _proportional(self, pid: int) -> int:
        self.asked_for_shares += 1
        return self.all[pid].proportional

    def _in_deleted_files(self, _pids: list[int], _device: int) -> int:
        return self.deleted


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def meter_of(*, memory: int = 1000, cpu: float | None = None, disk: int = 1000) -> guest.Meter:
    return guest.Meter({"memory": memory, "cpu": cpu, "disk": disk}, 1, "/")


def test_a_session_that_sleeps_is_looked_at_ever_more_seldom(world: World) -> None:
    meter = meter_of()
    pauses: list[int] = []
    for _ in range(6):
        meter.look()
        pauses.append(meter.pause)
    assert pauses == [500, 1000, 2000, 2000, 2000, 2000]
    world.all[2].own += 1  # a tick is no sign of life
    meter.look()
    assert meter.pause == 2000
    world.all[2].own += 5
    meter.look()
    assert meter.pause == 250
    meter.look()
    meter.begin_cell()
    assert meter.pause == 250


def test_shares_of_memory_are_asked_for_only_when_it_may_be_too_much(world: World) -> None:
    world.all |= {3: Process(resident=600, proportional=300), 4: Process(resident=400, proportional=300)}
    meter = meter_of(memory=1000)
    assert meter.look() is None
    assert world.asked_for_shares == 0
    world.all[5] = Process(resident=600, proportional=300)
    assert meter.look() is None
    assert world.asked_for_shares == 4
    world.all[5].proportional = 500
    assert meter.look() == guest.Overrun("memory", 1100)


def test_what_is_slow_to_weigh_holds_up_neither_orders_nor_the_other_bounds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.all = {pid: Process(resident=600, proportional=300) for pid in range(2, 12)}
    clock = SimpleNamespace(now=0.0)
    weigh = world._proportional

    def slowly(pid: int) -> int:
        clock.now += 1.0
        return weigh(pid)

    monkeypatch.setattr(guest, "monotonic", lambda: clock.now)
    monkeypatch.setattr(guest, "_proportional", slowly)
    meter = meter_of(memory=2500, cpu=1.0)
    meter.begin_cell()
    for weighed in range(1, 10):
        assert meter.look() is None
        assert (world.asked_for_shares, meter.pause) == (weighed, 0)
    world.all[2].own += 150
    assert meter.look() == guest.Overrun("memory", 3000)
    assert meter.pause == 250
    assert meter.look() == guest.Overrun("cpu", 1.5)  # beside the next weighing
    assert meter.pause == 0


def test_processor_time_counts_from_the_cells_beginning_whoever_used_it(world: World) -> None:
    meter = meter_of(cpu=1.0)
    world.all[2].own = 500
    assert meter.look() is None  # before the first cell
    meter.begin_cell()
    world.all[2].own += 30
    assert meter.look() is None
    world.all[3] = Process(own=30)
    assert meter.look() is None
    del world.all[3]
    world.all[2].children += 30  # it was waited for
    assert meter.look() is None
    world.reap(0.5)
    assert meter.look() == guest.Overrun("cpu", 1.1)


def test_who_goes_on_after_an_overrun_is_told_of_again(world: World) -> None:
    meter = meter_of(cpu=1.0)
    meter.begin_cell()
    found: list[float] = []
    for _ in range(40):
        world.all[2].own += 10
        over = meter.look()
        if over is not None:
            found.append(over.use)
    assert found == [1.1, 1.1, 1.1]


def test_the_time_of_children_whom_nobody_waits_for_is_not_forgotten(world: World) -> None:
    meter = meter_of(cpu=1.0)
    meter.begin_cell()
    found = None
    for pid in range(10, 16):
        world.all[pid] = Process(own=10)
        found = found or meter.look()
        world.all[pid].own = 20
        found = found or meter.look()
        del world.all[pid]
    assert found == guest.Overrun("cpu", 1.1)


def test_the_number_of_a_process_that_has_gone_may_come_again(world: World) -> None:
    meter = meter_of(cpu=10.0)
    meter.begin_cell()
    world.all[3] = Process(own=600)
    meter.look()
    world.all[3] = Process(own=500)
    assert meter.look() == guest.Overrun("cpu", 11.0)


def test_deleted_files_are_told_of_when_there_are_more_of_them(world: World) -> None:
    meter = meter_of(disk=1000)
    world.deleted = 900
    assert meter.look() is None
    world.deleted = 1100
    assert meter.look() == guest.Overrun("disk", 1100)
    assert meter.look() is None
    world.deleted = 1200
    assert meter.look() == guest.Overrun("disk", 1200)


def test_deleted_files_are_found_in_the_processes_that_hold_them(tmp_path: Path) -> None:
    path = tmp_path / "x"
    device = tmp_path.stat().st_dev
    with path.open("wb") as one, path.open("rb"):
        one.write(bytes(MIB) + b"x" * MIB)
        one.flush()
        before = guest._in_deleted_files([os.getpid()], device)
        path.unlink()
        held = guest._in_deleted_files([os.getpid()], device)
        assert 2 * MIB <= held - before < 3 * MIB  # once, though it is open twice
        assert guest._in_deleted_files([os.getpid()], device + 1) < held
    assert guest._in_deleted_files([os.getpid(), 1 << 30], device) == before


def test_a_real_process_is_measured() -> None:
    resident, proportional = guest._resident([os.getpid()]), guest._proportional(os.getpid())
    assert MIB < proportional <= resident * 1.1
    own, _ = guest._ticks(os.getpid())
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    assert guest._ticks(os.getpid())[0] >= own + 5
    assert guest._ticks(1 << 30) == (0, 0)
    assert guest._proportional(1 << 30) == 0
    assert os.getpid() in guest._processes(1)
