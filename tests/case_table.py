"""The plugin behind `--cases=FILE`: runs the tests that are about cases, and writes what came of each case.

The table says what really ran: a test that never ran is "not run", and one that was skipped says why.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from cases import CASES, GROUPS, WITHOUT_TEST, Carrier, carriers, numbers

__all__ = ["read", "table"]

HEADING = """# The containment cases

Made by `make cases` from the runs of the tests that it names: do not edit. Each row is an attempt that must fail, or a
thing that must hold; `test_containment.py` and its neighbours make the attempts, `tests/cases.py` has the list. How
often a test ran, each time with other parameters, stands behind it, by engine; "host" is what is tried on the host's
side alone. A run of some of the tests renews what they tell, and leaves the rest.
"""
NOT_RUN = "not run"
WORDS = {"passed": "", "failed": " failed", "skipped": " skipped"}


class Outcomes:
    """What came of one test: how often it ended how, on which engine; and why it was skipped."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = defaultdict(int)
        self._reasons: set[str] = set()

    def add(self, where: str, outcome: str, reason: str = "") -> None:
        """Count one run."""
        self._counts[where, outcome] += 1
        if reason:
            self._reasons.add(" ".join(reason.replace("|", "/").split()))

    def __str__(self) -> str:
        told = [f"{where} {count}{WORDS[outcome]}" for (where, outcome), count in sorted(self._counts.items())]
        reasons = f" ({'; '.join(sorted(self._reasons))})" if self._reasons else ""
        return f"{', '.join(told) or NOT_RUN}{reasons}"


def place(item: pytest.Item) -> str:
    """The engine that a test runs on."""
    engine = (
        item.callspec.params.get("engine") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else 0
    )
    return str(engine) if engine else "docker" if "docker" in item.path.stem else "host"


def entry(carrier: Carrier) -> str:
    """How a test is named in the table."""
    return f"`{carrier.file}`: {carrier.name.replace('_', ' ')}"


def verdict(told: list[str]) -> str:
    """The result of a case, from what its tests tell."""
    if any(" failed" in one for one in told):
        return "failed"
    if any(one == NOT_RUN for one in told):
        return "not run" if all(one == NOT_RUN for one in told) else "passed, but for what was not run"
    return "passed, but for what was skipped" if any(" skipped" in one for one in told) else "passed"


def table(told: dict[str, str], where: str) -> str:
    """The page; `told` is what came of each test, by its entry."""
    by_case: dict[str, list[Carrier]] = defaultdict(list)
    for carrier, own in carriers().items():
        for number in own:
            by_case[number].append(carrier)
    lines = [HEADING, where, ""]
    for letter, title in GROUPS.items():
        lines += [f"## {letter}: {title}", "", "| case | what is tried | tests | result |", "|---|---|---|---|"]
        for case, sentence in CASES.items():
            if case[0] != letter:
                continue
            if case in WITHOUT_TEST:
                lines.append(f"| {case} | {sentence} | – | not tested: {WITHOUT_TEST[case]} |")
                continue
            found = {name: told.get(name, NOT_RUN) for name in map(entry, sorted(by_case[case]))}
            tests = "<br>".join(f"{name} – {outcomes}" for name, outcomes in found.items())
            lines.append(f"| {case} | {sentence} | {tests} | {verdict([*found.values()])} |")
        lines.append("")
    return "\n".join(lines)


def read(page: str) -> dict[str, str]:
    """What a page tells of each test, by its entry."""
    return {name: told for name, told in re.findall(r"(`\w+`: [\w ]+) – (.*?)(?:<br>| \|)", page) if told != NOT_RUN}


def machine() -> str:
    """What the run depended on."""
    told = [f"Last run on Linux {'.'.join(platform.release().split('.')[:2])}, {platform.machine()}"]
    told.append(f"with Python {platform.python_version()}")
    docker = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, encoding="utf-8", check=False
    ) if any(os.access(f"{folder}/docker", os.X_OK) for folder in os.get_exec_path()) else None  # fmt: skip
    if docker is not None and docker.returncode == 0:
        told.append(f"with Docker {docker.stdout.strip()}")
    return ", ".join([*told, f"as {'root' if os.geteuid() == 0 else 'an ordinary user'}."])


class Recorder:
    """Keeps what came of every test that is about a case."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._items: dict[str, tuple[str, str]] = {}
        self._outcomes: dict[str, Outcomes] = defaultdict(Outcomes)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what is about no case."""
        left_out: list[pytest.Item] = []
        for item in items:
            if numbers(getattr(getattr(item, "function", None), "__doc__", None)):
                name: str = getattr(item, "originalname", item.name)
                carrier = Carrier(item.path.stem.removeprefix("test_"), name.removeprefix("test_"))
                self._items[item.nodeid] = entry(carrier), place(item)
            else:
                left_out.append(item)
        items[:] = [item for item in items if item.nodeid in self._items]
        config.hook.pytest_deselected(items=left_out)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test's call, or whatever ended it before or after."""
        if report.nodeid not in self._items or (report.when != "call" and report.passed):
            return
        name, where = self._items[report.nodeid]
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        self._outcomes[name].add(where, report.outcome, reason)

    def pytest_sessionfinish(self) -> None:
        """Write the table: what ran now, and of what did not run now what the file tells."""
        before = read(self._file.read_text(encoding="utf-8")) if self._file.exists() else {}
        now = {name: str(outcomes) for name, outcomes in self._outcomes.items()}
        self._file.write_text(table({**before, **now}, machine()), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--cases", metavar="FILE", help="(with =) run what is about containment cases, and write their table"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Record, if that was asked for."""
    file: str | None = config.getoption("--cases")
    if file is not None and not config.getoption("collectonly"):
        config.pluginmanager.register(Recorder(Path(file)), "cases")
