"""The list of cases, the tests that are about them, and the page that says what came of them, agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from case_table import read, table
from cases import CASES, GROUPS, WITHOUT_TEST, Carrier, carriers

PAGE = Path(__file__).parents[1] / "docs" / "cases.md"


def by_case() -> dict[str, set[Carrier]]:
    found: dict[str, set[Carrier]] = {}
    for carrier, own in carriers().items():
        for number in own:
            found.setdefault(number, set()).add(carrier)
    return found


def test_every_case_has_a_test_or_the_reason_why_it_has_none() -> None:
    assert CASES.keys() - by_case().keys() == WITHOUT_TEST.keys()


def test_no_test_is_about_a_case_that_there_is_not() -> None:
    assert by_case().keys() - CASES.keys() == set()


def test_the_numbers_of_a_group_have_no_gap() -> None:
    for letter in GROUPS:
        own = [int(case[1:]) for case in CASES if case[0] == letter]
        assert own == [*range(1, len(own) + 1)]


def test_a_docstring_that_begins_with_a_number_is_read() -> None:
    """What is misspelled would be about nothing, and nobody would know."""
    known = {(carrier.file, carrier.name) for carrier in carriers()}
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                begins = re.match(r"[A-Z]\d", ast.get_docstring(node) or "")
                read = (path.stem.removeprefix("test_"), node.name.removeprefix("test_")) in known
                assert bool(begins) == read, f"{path.name}: {node.name}"


def test_the_page_lists_the_cases_and_tests_that_there_are() -> None:
    """Whatever it says came of them: it is what would be written now, had they ended so."""
    page = PAGE.read_text(encoding="utf-8")
    machine = re.findall(r"^Last run .*$", page, re.MULTILINE)
    assert page == table(read(page), *machine), "it is old: make cases"


def test_no_case_of_the_page_failed() -> None:
    assert [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.endswith("| failed |")] == []
