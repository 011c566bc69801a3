"""Thousands of sessions with faults injected at random: every cell must end once and truly, and nothing may be left.

`make soak SESSIONS=2000`, or `python benchmarks/soak.py [--sessions N] [--at-once N] [--docker N] [--seed N]`. It
prints a table of what was done and how it ended, and each violation; the exit code is 1 if there is any. The seed that
it prints makes the same choices again, though not at the same moments.

A cell writes its token to its output and to a file in its session's folder: an outcome that is lost, doubled, another's
or untrue, and a cell that ran twice, are seen by them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import memory

from actbox import ActboxError, CodeExecutionContainer, CodeExecutor, ExecutionResult, Limits
from actbox.events import Died, Exceeded, Failed, Finished, Interrupted, Lost, TimedOut

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from actbox import Execution
    from actbox.events import Outcome

MIB = 1 << 20
_SECONDS = 60.0
_GRACE = 2.0
_SHORT = 0.3
_LIMITS = Limits(memory=512 * MIB, tmp=16 * MIB)
_TOKEN = re.compile(r"T[0-9a-f]{16}")

# What every cell begins with: its token twice, where it can be counted, and how many cells this kernel has begun.
_BEGIN = """
with open("journal", "a") as _journal: _ = _journal.write("{token}\\n")
n = globals().get("n", 0) + 1
print("{token}", n, flush=True)
"""
# A name by which the kernel is found from outside.
_MARK = "import ctypes; _ = ctypes.CDLL(None).prctl(15, b'{mark}', 0, 0, 0)\n"
_SLEEP = "import time; time.sleep(99)"
# What a cell does, how often it is chosen, and whether it needs the host to see the kernel.
_KINDS: dict[str, tuple[str, float]] = {
    "plain": ("", 10),
    "raise": ("raise ValueError('{token}')", 2),
    "flood": ("for _ in range(50): print('x' * 99_999)\nprint('{token}')", 1),
    "timeout": (_SLEEP, 1),
    "deaf": ("import time\nwhile True:\n    try: time.sleep(99)\n    except BaseException: pass", 0.4),
    "interrupt": (_SLEEP, 2),
    "exit": ("import os; os._exit(7)", 1),
    "kill kernel": (_MARK + _SLEEP, 1),
    "kill watcher": (_MARK + _SLEEP, 0.5),
    "memory": ("_ = bytearray(1 << 30)", 0.6),
    "cancel": (_SLEEP, 1),
    "abandon": (_SLEEP, 0.7),
    "kill supervisor": (_MARK + _SLEEP, 0.12),
    "close container": (_SLEEP, 0.06),
}
_FROM_OUTSIDE = {"kill kernel", "kill watcher", "kill supervisor"}


@dataclass
class _Slot:
    """A running container; `doomed` once it is being ended, so that whatever runs there may be lost."""

    engine: str
    container: CodeExecutionContainer
    doomed: bool = False


@dataclass
class _Cell:
    """A submitted cell, what was awaited of it, and how it came out."""

    kind: str
    token: str
    execution: Execution
    result: ExecutionResult | ActboxError | None = None


class _Executor(CodeExecutor):
    """Counts the ends of each of its executions."""

    def count_ends(self, ends: Counter[int]) -> None:
        self._ends = ends

    async def note_end(self, execution: Execution) -> None:
        self._ends[id(execution)] += 1


@dataclass
class Soak:
    """The whole run.

    State: the slots, one for each container that should run; how many cells of each kind ended how; the violations.
    """

    folder: Path
    choose: random.Random
    slots: list[_Slot] = field(default_factory=list[_Slot])
    endings: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    violations: list[str] = field(default_factory=list[str])
    containers: int = 0
    _renewing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self, sessions: int, at_once: int, engines: list[str]) -> None:
        """Run all sessions, so many at one time, in a container for each of these engines."""
        waiting = iter(range(sessions))

        async def work() -> None:
            for number in waiting:
                await self._session(number)

        try:
            for engine in engines:
                self.slots.append(await self._start(engine))
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(work())
        finally:
            for slot in self.slots:
                slot.doomed = True
                await slot.container.kill()

    async def _start(self, engine: str) -> _Slot:
        self.containers += 1
        workspace = self.folder / f"workspace-{self.containers}"
        container = CodeExecutionContainer(
            workspace_path=workspace, engine=engine, env={}, limits=_LIMITS, preload=(), show_pull_progress=False
        )
        await container.run()
        await container.warmed()
        return _Slot(engine, container)

    async def _renew(self, old: _Slot) -> None:
        """Put a fresh container in the place of one that was ended."""
        async with self._renewing:
            await old.container.kill()
            if old in self.slots:
                self.slots[self.slots.index(old)] = await self._start(old.engine)

    async def _session(self, number: int) -> None:
        slot = await self._choose_slot()
        kinds = [kind for kind in _KINDS if slot.engine == "bubblewrap" or kind not in _FROM_OUTSIDE]
        weights = [_KINDS[kind][1] for kind in kinds]
        plan = self.choose.choices(kinds, weights, k=self.choose.randint(1, 4))
        ends: Counter[int] = Counter()
        cells: list[_Cell] = []
        container = slot.container
        try:
            executor = _Executor(f"s{number}", container.workspace, container.port, interrupt_grace=_GRACE)
        except ActboxError as exc:
            self._refused(slot, exc)
            return
        executor.count_ends(ends)
        try:
            async with executor:
                for kind in plan:
                    cells.append(await self._cell(slot, executor, kind))
                    if kind == "abandon":
                        break
        except ActboxError as exc:
            self._refused(slot, exc)
        for cell in cells:
            self._judge(slot, cell)
        self._judge_session(cells, ends, executor.working_dir / "journal")
        await asyncio.to_thread(shutil.rmtree, executor.working_dir, ignore_errors=True)

    async def _choose_slot(self) -> _Slot:
        """One whose container runs; where all are being ended, wait for the next."""
        while not (running := [slot for slot in self.slots if not slot.doomed]):  # noqa: ASYNC110 - a moment
            await asyncio.sleep(0.01)
        return self.choose.choice(running)

    def _refused(self, slot: _Slot, exc: ActboxError) -> None:
        if slot.doomed:
            self.endings["(session)", "refused: its container was ended"] += 1
        else:
            self.violations.append(f"a session was refused by a container that runs: {exc!r}")

    async def _cell(self, slot: _Slot, executor: CodeExecutor, kind: str) -> _Cell:
        token, mark = f"T{secrets.token_hex(8)}", f"k{secrets.token_hex(6)}"
        code = (_BEGIN + _KINDS[kind][0]).format(token=token, mark=mark)
        cell = _Cell(kind, token, await executor.submit(code))
        if kind == "abandon":
            await _until_begun(cell)
            return cell
        short = _SHORT if kind in ("timeout", "deaf") else _SECONDS
        waiting = asyncio.create_task(_outcome(cell.execution, short))
        try:
            if kind not in ("plain", "raise", "flood", "timeout", "deaf", "exit", "memory"):
                await _until_begun(cell)
                await self._disturb(slot, cell, waiting, mark)
            cell.result = await _outcome(cell.execution, _SECONDS) if kind == "cancel" else await waiting
        finally:
            waiting.cancel()
        return cell

    async def _disturb(self, slot: _Slot, cell: _Cell, waiting: asyncio.Task[object], mark: str) -> None:
        """Do to a cell that runs what its kind says."""
        match cell.kind:
            case "interrupt":
                await cell.execution.interrupt()
            case "cancel":
                waiting.cancel()
                await asyncio.wait([waiting])
            case "kill kernel" | "kill watcher" | "kill supervisor":
                lineage = await _lineage(mark, lambda: cell.execution.outcome is not None)
                if not lineage:
                    return
                if cell.kind == "kill supervisor":
                    slot.doomed = True
                place = {"kill kernel": 0, "kill watcher": 1, "kill supervisor": -2}[cell.kind]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(lineage[place], signal.SIGKILL)
                if cell.kind == "kill supervisor":
                    await self._renew(slot)
            case _:
                slot.doomed = True
                await self._renew(slot)

    # -- what is true ------------------------------------------------------------------------------------------------

    def _judge(self, slot: _Slot, cell: _Cell) -> None:
        outcome = cell.execution.outcome
        self.endings[cell.kind, _name(outcome)] += 1
        if not _is_true(cell, outcome) and not (slot.doomed and isinstance(outcome, Lost | Died)):
            self.violations.append(f"{cell.kind}: {outcome!r}, {cell.result!r}"[:1000])
        text = cell.execution.so_far().text or ""
        others = set(_TOKEN.findall(text)) - {cell.token}
        if others:
            self.violations.append(f"{cell.kind}: the output has another's token: {text[:300]!r}")
        if isinstance(outcome, Finished) and not isinstance(cell.result, ExecutionResult) and cell.kind != "abandon":
            self.violations.append(f"{cell.kind}: it finished, and its result was {cell.result!r}")

    def _judge_session(self, cells: list[_Cell], ends: Counter[int], journal: Path) -> None:
        begun = Counter(journal.read_text().split() if journal.exists() else [])
        strangers = set(begun) - {cell.token for cell in cells}
        if strangers:
            self.violations.append(f"the journal has tokens of nobody: {strangers}")
        for cell in cells:
            outcome = cell.execution.outcome
            if begun[cell.token] not in _times(outcome):
                self.violations.append(f"{cell.kind}: ran {begun[cell.token]} times: {outcome!r}")
            # One that was given up by leaving the session may have no end that is noted.
            ended = ends[id(cell.execution)]
            if ended > 1 or (ended == 0 and not isinstance(outcome, Lost)):
                self.violations.append(f"{cell.kind}: ended {ended} times: {outcome!r}")
        self._judge_state(cells, begun)

    def _judge_state(self, cells: list[_Cell], begun: Counter[str]) -> None:
        """A result tells how many cells its kernel had begun, and whether it was a fresh one."""
        state, unsure, fresh = 0, 0, False
        for cell in cells:
            outcome = cell.execution.outcome
            state += begun[cell.token]
            if isinstance(cell.result, ExecutionResult):
                found = re.search(f"{cell.token} (\\d+)", cell.result.text or "")
                told = int(found[1]) if found else 0
                if cell.result.restarted != fresh or not state - unsure <= told <= state:
                    self.violations.append(
                        f"{cell.kind}: state {told} instead of {state}, restarted: {cell.result.restarted}"
                    )
            if 0 not in _times(outcome) or len(_times(outcome)) > 1:
                fresh = False
            if _loses_state(outcome):
                state, unsure, fresh = 0, 0, True
            else:
                # It may have been interrupted between the one count and the other.
                unsure += isinstance(outcome, TimedOut)


def _is_true(cell: _Cell, outcome: Outcome | None) -> bool:
    text = cell.execution.so_far().text or ""
    match cell.kind, outcome:
        case "plain", Finished():
            return cell.token in text
        case "raise", Failed(error):
            return (error.name, error.value) == ("ValueError", cell.token)
        case "flood", Finished():
            whole = isinstance(cell.result, ExecutionResult) and cell.result.truncated
            return whole and text.startswith(cell.token) and text.endswith(cell.token)
        case (("timeout" | "deaf"), TimedOut(_, state_kept, started)):
            return not (cell.kind == "deaf" and state_kept and started and cell.token in text)
        case (("interrupt" | "cancel"), Interrupted()):
            # Whether the kernel has heeded it in time the table tells: on a busy machine it may not.
            return True
        case "exit", Died(_, code):
            return code == 7
        case "kill kernel", Died(number):
            return number == signal.SIGKILL
        case "kill watcher", Died(number, code):
            return code is None and number in (None, signal.SIGKILL)
        case "memory", Exceeded(overrun):
            return overrun.limit == "memory"
        case "abandon", Lost(_, violation):
            return not violation
        case _:
            return False


def _times(outcome: Outcome | None) -> tuple[int, ...]:
    """How often a cell that ended so may have run."""
    match outcome:
        case Finished() | Failed():
            return (1,)
        case Interrupted(_, _, False) | TimedOut(_, _, False):
            return (0,)
        case _:
            return (0, 1)


def _loses_state(outcome: Outcome | None) -> bool:
    match outcome:
        case Finished() | Failed():
            return False
        case Interrupted(state_kept) | Exceeded(_, state_kept) | TimedOut(_, state_kept):
            return not state_kept
        case _:
            return True


def _name(outcome: Outcome | None) -> str:
    match outcome:
        case Interrupted(state_kept) | Exceeded(_, state_kept) | TimedOut(_, state_kept):
            return f"{type(outcome).__name__}, state {'kept' if state_kept else 'lost'}"
        case Died(number, code):
            return f"Died, signal {number}" if number else f"Died, exit code {code}"
        case _:
            return type(outcome).__name__


async def _outcome(execution: Execution, timeout: float) -> ExecutionResult | ActboxError:
    try:
        return await execution.result(timeout)
    except ActboxError as exc:
        return exc


async def _until_begun(cell: _Cell) -> None:
    """Wait until the cell has put out its token, or has ended."""
    async with asyncio.timeout(_SECONDS):
        # There is no event for it.
        while cell.execution.outcome is None and cell.token not in (cell.execution.so_far().text or ""):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def _lineage(mark: str, ended: Callable[[], bool]) -> list[int]:
    """The kernel of this name, its parent, and so on up to our own child; empty if it ended meanwhile."""
    while not ended():
        found = _kernels_lineage(mark)
        if found:
            return found
        await asyncio.sleep(0.005)
    return []


def _kernels_lineage(mark: str) -> list[int]:
    for pid in memory.descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == mark:
                found = [pid]
                while (parent := _parent(found[-1])) != os.getpid():
                    found.append(parent)
                return found
    return []


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# -- what is left ----------------------------------------------------------------------------------------------------


def _traces(folder: Path) -> dict[str, object]:
    """What this process has that containers and sessions could leave behind."""
    gc.collect()
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    groups = (
        str(path)
        for top in ("", "memory", "pids")
        for path in Path("/sys/fs/cgroup", top).glob(f"actbox-{os.getpid()}-*")
    )
    places = ("/run", f"/run/user/{os.geteuid()}", "/tmp", "/dev/shm")
    named = (str(path) for place in places for path in Path(place).glob(f"actbox-*{os.getpid()}*"))
    return {
        "processes": sorted(memory.descendants(os.getpid())),
        "descriptors": _open_files(),
        "mounts": [line for line in mounts if str(folder) in line],
        "control groups": sorted(groups),
        "folders": sorted(named),
        "temporary files": sorted(path.name for path in (folder / "tmp").iterdir()),
        "tasks": sorted(task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()),
    }


def _open_files() -> list[str]:
    """What this process has open, by kind."""
    found: list[str] = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(fd.readlink()).split(":")[0])
    # The folder itself is open while it is read.
    return sorted(what for what in found if not what.endswith("/fd"))


async def _left(before: dict[str, object], folder: Path) -> dict[str, tuple[object, object]]:
    """What has not come back to what it was, within ten seconds."""
    deadline = time.monotonic() + 10
    while True:
        now = _traces(folder)
        changed = {name: (before[name], now[name]) for name in before if before[name] != now[name]}
        if not changed or time.monotonic() > deadline:
            return changed
        await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def _own_folder() -> AsyncGenerator[Path]:
    """A folder for the workspaces, and in it one for the temporary files of this process."""
    with tempfile.TemporaryDirectory(prefix="actbox-soak-") as name:
        folder = Path(name)
        (folder / "tmp").mkdir()
        tempfile.tempdir = str(folder / "tmp")
        try:
            yield folder
        finally:
            tempfile.tempdir = None


def _resident() -> float:
    """MiB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


async def soak(sessions: int, at_once: int, docker: int, seed: int) -> int:
    """Run it, print what came of it, and return how many violations there were."""
    print(f"soak: {sessions} sessions, {at_once} at one time, seed {seed}", flush=True)
    began = time.monotonic()
    async with _own_folder() as folder:
        # What is made once and kept is there before anything is counted.
        first = Soak(folder, random.Random(seed))
        await first.run(2 * at_once, at_once, ["bubblewrap"] + ["docker"] * (docker > 0))
        before, size = _traces(folder), _resident()
        run = Soak(folder, random.Random(seed), containers=first.containers)
        await run.run(sessions, at_once, ["bubblewrap"] * 2 + ["docker"] * docker)
        left = await _left(before, folder)
        grown = _resident() - size
    violations = first.violations + run.violations + [f"left behind: {name}: {what}" for name, what in left.items()]
    for kind in [*_KINDS, "(session)"]:
        for (one, ending), count in sorted(run.endings.items()):
            if one == kind:
                print(f"{kind:16} {ending:40} {count:6}")
    seconds = time.monotonic() - began
    print(
        f"{sum(run.endings.values())} cells in {sessions} sessions and {run.containers - first.containers} containers"
    )
    print(f"{seconds:.0f} s, load {os.getloadavg()[0]:.1f}; this process grew by {grown:.1f} MiB")
    for violation in violations:
        print(f"VIOLATION: {violation}")
    print(f"{len(violations)} violations")
    return len(violations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--docker", type=int, default=0, help="containers of Docker's, beside two of bubblewrap's")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32))
    arguments = parser.parse_args()
    violations = asyncio.run(soak(arguments.sessions, arguments.at_once, arguments.docker, arguments.seed))
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
