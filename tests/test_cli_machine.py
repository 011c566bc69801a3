"""`actbox build` and `doctor`: what they ask for, and what they tell of a machine."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import NEITHER, SAID

import actbox.cli.machine
from actbox import EnvironmentBuildError, Layer, __version__
from actbox.cli import ExitCode, main

if TYPE_CHECKING:
    from collections.abc import Callable

    from commands import Cli


def test_build_passes_on_what_is_asked_for_and_shows_its_progress(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def build(tag: str, packages: list[str], requirements: Path, python: str, progress: Callable[[str], None]) -> None:
        asked.extend((tag, packages, requirements, python))
        progress("Resolved \x1b[2Jall")

    monkeypatch.setattr(actbox.cli.machine, "build_environment", build)
    assert main(["build", "-t", "mine", "-r", "needs.txt", "--python", "3.12", "numpy>=2", "rich"]) == 0
    assert asked == ["mine", ["numpy>=2", "rich"], Path("needs.txt"), "3.12"]
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("Resolved all\nactbox: the environment mine is ready")


def test_a_build_that_fails_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def build(tag: str, *_: object) -> None:
        raise EnvironmentBuildError(tag, "no such package\nbecause \x1b[2Jreasons")

    monkeypatch.setattr(actbox.cli.machine, "build_environment", build)
    assert main(["build", "-t", "mine", "nonesuch"]) == ExitCode.UNAVAILABLE
    assert capfd.readouterr().err == "actbox: the environment 'mine' was not built: no such package because reasons\n"


def test_a_build_of_the_default_environment_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "-t", "default"]) == ExitCode.USAGE
    assert "choose another tag" in capfd.readouterr().err


def test_a_build_that_is_terminated_cleans_up_after_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[bool] = []

    def build(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal did nothing")
        finally:
            cleaned.append(True)

    monkeypatch.setattr(actbox.cli.machine, "build_environment", build)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["build", "-t", "mine"]) == 143
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == before


def test_doctor_finds_that_sandboxes_can_be_built(cli: Cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(f"actbox {__version__}  python {sys.version.split()[0]}  kernel Linux ")
    assert re.search(r"^ok +system call filter ", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1].startswith("Sandboxes can be built on this machine")


REMEDIES = {"bubblewrap": "Install the system's package", "docker": "Start the Docker engine"}


def test_doctor_says_what_is_missing_and_how_to_mend_it(cli: Cli, engine: str) -> None:
    done = cli("doctor", **NEITHER)
    assert done.returncode == ExitCode.UNAVAILABLE
    line = rf"^MISSING  {engine} +{SAID[engine]}.*\n {{11}}-> {REMEDIES[engine]}"
    assert re.search(line, done.stdout, re.MULTILINE), done.stdout
    assert done.stdout.splitlines()[-1] == f"Sandboxes cannot be built on this machine: {engine}."


def test_doctor_as_json(cli: Cli) -> None:
    found = json.loads(cli("doctor", "--json").stdout)
    assert found["actbox"] == __version__
    assert found["can_build"] is True
    assert {"name", "state", "detail", "remedy"} == found["layers"][0].keys()
    assert {layer["state"] for layer in found["layers"]} <= {"on", "weaker"}


def test_doctor_shows_weaker_layers_and_hostile_details_harmlessly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """F6."""

    async def examine(*_: object, **__: object) -> list[Layer]:
        return [Layer("fine", "on", "is\x1b[2J on"), Layer("sessions apart", "weaker", "one\neach", "Do\nthis.")]

    monkeypatch.setattr(actbox.cli.machine, "examine", examine)
    assert main(["doctor"]) == 0
    assert capfd.readouterr().out.splitlines()[2:] == [
        "ok       fine            is on",
        "weaker   sessions apart  one each",
        "           -> Do this.",
        "",
        "Sandboxes can be built on this machine; weaker than it could be: sessions apart.",
    ]
