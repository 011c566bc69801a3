"""JSON Schemas of others: read as signatures, and applied, within bounds whatever they say."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest

from actbox import (
    schemas,
)


def test_a_check_is_bounded_in_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "_MAX_SECONDS", 0.2)
    dear = schemas.Checker({"properties": {"x": {"items": {"enum": list(range(10_000))}}}})
    began = time.thread_time()
    with pytest.raises(TypeError, match="too long"):
        dear.check({"x": [9999] * 40_000})
    assert time.thread_time() - began < 2
    large = schemas.Checker({"properties": {"x": {"anyOf": [{"type": "integer"}] * 300}}})
    tracemalloc.start()
    try:
        with pytest.raises(TypeError) as caught:
            large.check({"x": "x" * (1 << 20)})
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000
    many = schemas.Checker({"properties": {"x": {"items": {"type": "integer"}}}})
    monkeypatch.setattr(schemas, "_MAX_SECONDS", 5)
    many.check({"x": [1] * 100_000})


def test_names_are_the_same_in_any_order() -> None:
    names = ["a b", "a-b", "a_b", "A B", "__a", "a", "ﬁ", "fi", "class", "class_", "\ud800", "١", "\u0301"]
    made = schemas.identifiers(names)
    assert len(set(made.values())) == len(names)
    assert schemas.identifiers(names[::-1]) == made
    assert made["a_b"] == "a_b"
    assert all(name.isidentifier() for name in made.values())


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string"}, "str"),
        ({"type": ["integer", "null"]}, "int | None"),
        ({"type": "array", "items": {"type": "number"}}, "list[float]"),
        ({"type": "array", "items": {}}, "list[Any]"),
        ({"type": "object", "additionalProperties": {"type": "boolean"}}, "dict[str, bool]"),
        ({"enum": ["a", 1, None]}, "Literal['a', 1, None]"),
        ({"const": "']; import os"}, 'Literal["\']; import os"]'),
        ({"oneOf": [{"type": "string"}, {"$ref": "#/$defs/n"}]}, "str | int"),
        ({"anyOf": [{"type": "string"}, {}]}, "Any"),
        ({"$ref": "#/$defs/loop"}, "Any"),
        ({"$ref": "#/$defs/n/none"}, "Any"),
        ({"enum": [[1]]}, "Any"),
        ({"enum": ["x" * 1000]}, "Any"),
        (True, "Any"),
        ("string", "Any"),
    ],
    ids=repr,
)
def test_a_schema_in_words(schema: Any, words: str) -> None:
    root = {"$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    assert schemas.annotation(schema, root) == words
