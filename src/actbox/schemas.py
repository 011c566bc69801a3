"""JSON Schemas of others: read as signatures, and applied to arguments. Pure, and bounded whatever they say.

A schema comes from a server that nobody vouches for. Names become identifiers here, types become words that are shown
and never evaluated, and a check takes a bounded time.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import keyword
import threading
import time
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

# Bytes of JSON, characters, or numbers of things.
MAX_SCHEMA = 64 << 10
MAX_PARAMETERS = 100
_MAX_NAME = 100
_MAX_WORDS = 300
_MAX_TOLD = 500
_MAX_UNION = 8
_MAX_LITERALS = 12
# How many parts of a schema one annotation may be made of; `$ref` lets a small schema have very many.
_MAX_PARTS = 100
# Of a thread's own time, for one check.
_MAX_SECONDS = 2.0
_PLAIN = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
# What can take any time at all: regular expressions of the server's, and comparing each item with each. The server
# checks these itself.
_LEFT_TO_THE_SERVER = ("pattern", "patternProperties", "uniqueItems", "unevaluatedItems", "unevaluatedProperties")


class Unusable(ValueError):
    """A schema that is none, or is beyond a bound."""


# -- names -----------------------------------------------------------------------------------------------------------


def identifiers(names: Collection[str]) -> dict[str, str]:
    """An identifier for each of these different names, by name: the same whatever their order, and no two the same.

    A name that is a fitting identifier stays what it is; what others would share gets a part of the name's hash.
    """
    plain = {name: _identifier(name) for name in names}
    shared = {made for made in plain.values() if sum(made == other for other in plain.values()) > 1}
    made = {name: name for name in names if plain[name] == name}
    for name in sorted(plain.keys() - made.keys()):
        wanted, digest = plain[name], hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        if wanted in shared:
            wanted = f"{wanted}_{digest[:8]}"
        while wanted in made.values():
            wanted = f"{wanted}_{digest[:8]}"
        made[name] = wanted
    return made


def _identifier(name: str) -> str:
    """An identifier without leading underscores, which Python has other uses for."""
    # As Python's own reader of source has it: other spellings of a name would be beyond reach.
    text = unicodedata.normalize("NFKC", name)[:_MAX_NAME]
    text = "".join(char if f"_{char}".isidentifier() else "_" for char in text).strip("_")
    if not text:
        return "unnamed"
    if not text.isidentifier():
        text = f"n{text}"
    if keyword.iskeyword(text):
        text = f"{text}_"
    return text if text.isidentifier() and unicodedata.normalize("NFKC", text) == text else "unnamed"


# -- signatures ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """What a schema of an object says of a function's parameters.

    `names` are the schema's names by parameter, `required` those that must be there, `told` what the session is told
    of each parameter: name, kind, annotation, default.
    """

    signature: inspect.Signature
    names: Mapping[str, str]
    required: frozenset[str]
    told: list[list[Any]]
    notes: list[tuple[str, str]]


def read(schema: dict[str, Any]) -> Read:
    """Parameters of a schema: required ones first, which may be positional, then the others, by name alone.

    Raises:
        Unusable: it has too many, or no form of an object's schema.
    """
    properties: Any = schema.get("properties", {})
    if type(properties) is not dict:
        raise Unusable("its properties are no object")
    properties = cast("dict[str, Any]", properties)
    if len(properties) > MAX_PARAMETERS:
        raise Unusable(f"it has more than {MAX_PARAMETERS} parameters")
    listed: Any = schema.get("required", [])
    required = [name for name in cast("list[Any]", listed) if name in properties] if type(listed) is list else []
    made = identifiers(properties)
    parameters: list[inspect.Parameter] = []
    told: list[list[Any]] = []
    notes: list[tuple[str, str]] = []
    for name in [*(name for name in properties if name in required), *(n for n in properties if n not in required)]:
        inner = _object(properties[name])
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if name in required else inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if name in required else None
        parameters.append(inspect.Parameter(made[name], kind, default=default))
        shown = None if name in required else _default(inner)
        told.append([made[name], int(kind), annotation(properties[name], schema), shown])
        note: Any = inner.get("description")
        if made[name] != name or type(note) is str:
            spelled = "" if made[name] == name else f"({ascii(name)[:_MAX_NAME]}) "
            notes.append((made[name], spelled + (legible(note)[:_MAX_TOLD] if type(note) is str else "")))
    if schema.get("additionalProperties") or any(word in schema for word in ("$ref", "allOf", "anyOf", "oneOf")):
        more = identifiers([*made.values(), "more "])["more "]
        parameters.append(inspect.Parameter(more, inspect.Parameter.VAR_KEYWORD))
        told.append([more, int(inspect.Parameter.VAR_KEYWORD), None, None])
    names = {parameter: name for name, parameter in made.items()}
    return Read(inspect.Signature(parameters), names, frozenset(required), told, notes)


def _object(schema: Any) -> dict[str, Any]:
    """A schema as an object; True and False, and what is none, say nothing."""
    return cast("dict[str, Any]", schema) if type(schema) is dict else {}


def _default(schema: dict[str, Any]) -> str:
    try:
        text = ascii(schema.get("default"))
    except RecursionError:
        return "..."
    return text if len(text) <= _MAX_WORDS else "..."


def annotation(schema: Any, root: dict[str, Any]) -> str:
    """A schema in the words of an annotation; what cannot be said plainly is `Any`."""
    try:
        words = _Words(root).of(schema)
    except RecursionError:
        return "Any"
    return words if len(words) <= _MAX_WORDS else "Any"


class _Words:
    """Makes words of a schema, of a bounded number of its parts."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._left = _MAX_PARTS

    def of(self, given: Any) -> str:
        self._left -= 1
        if self._left < 0:
            return "Any"
        schema = _object(given)
        match schema:
            case {"$ref": str(ref)}:
                return self.of(self._follow(ref))
            case {"const": value}:
                return _literal([value])
            case {"enum": [*values]}:
                return _literal(values)
            case {"anyOf": [*options]} | {"oneOf": [*options]}:
                return self._union(self.of(option) for option in options[: _MAX_UNION + 1])
            case {"allOf": [option]}:
                return self.of(option)
            case {"type": [*kinds]}:
                return self._union(self.of({**schema, "type": kind}) for kind in kinds[: _MAX_UNION + 1])
            case {"type": "array"}:
                return f"list[{self.of(schema.get('items'))}]" if "items" in schema else "list[Any]"
            case {"type": "object"}:
                return f"dict[str, {self.of(schema.get('additionalProperties'))}]"
            case {"type": str(kind)}:
                return _PLAIN.get(kind, "Any")
            case _:
                return "Any"

    def _union(self, options: Iterable[str]) -> str:
        words = list(dict.fromkeys(options))
        return "Any" if not words or "Any" in words or len(words) > _MAX_UNION else " | ".join(words)

    def _follow(self, ref: str) -> Any:
        place: Any = self._root
        head, *steps = ref.split("/")
        if head != "#":
            return None
        for step in steps:
            place = cast("Any", place).get(step) if type(place) is dict else None
        return place


def _literal(values: list[Any]) -> str:
    plain = all(value is None or type(value) in (bool, int, str) for value in values)
    if not plain or not 0 < len(values) <= _MAX_LITERALS:
        return "Any"
    return f"Literal[{', '.join(map(ascii, values))}]"


def legible(text: str) -> str:
    """Text with nothing in it but what can be shown, and the ends of lines."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


# -- checking --------------------------------------------------------------------------------------------------------


class Checker:
    """Applies a schema to values, in a bounded time. `size` is that of the schema, in bytes of JSON.

    State: `_until`, when the check at hand is given up, in the thread's own time; threads have to wait for one another
    (`_lock`).

    Raises:
        Unusable: it is no schema, or too large.
    """

    def __init__(self, schema: dict[str, Any]) -> None:
        validators: Any = importlib.import_module("jsonschema.validators")
        registry: Any = importlib.import_module("referencing").Registry
        self._until = 0.0
        self._lock = threading.Lock()
        self.size = 0
        try:
            self.size = len(json.dumps(schema))
            if self.size > MAX_SCHEMA:
                raise Unusable(f"its schema is more than {MAX_SCHEMA} bytes")
            kind = validators.validator_for(schema)
            kind.check_schema(schema)
            schema = {name: value for name, value in schema.items() if name != "$schema"}
            if _names_a_dialect(schema):
                # It would choose other keywords than those that are counted.
                raise Unusable("its schema changes the dialect inside")
            counted = {word: self._counted(check) for word, check in kind.VALIDATORS.items()}
            counted.update(dict.fromkeys(_LEFT_TO_THE_SERVER, _nothing))
            if "patternProperties" in json.dumps(schema):
                counted["additionalProperties"] = _nothing
            # An empty registry: `$ref` leads to places within the schema alone.
            self._validator: Any = validators.extend(kind, counted)(schema, registry=registry())
        except Unusable:
            raise
        except Exception as exc:
            raise Unusable(f"its schema is none: {exc}"[:_MAX_TOLD]) from exc

    def check(self, value: Any) -> None:
        """Raise TypeError if the schema does not allow the value."""
        try:
            with self._lock:
                self._until = time.thread_time() + _MAX_SECONDS
                error: Any = next(self._validator.iter_errors(value), None)
        except Exception as exc:  # a `$ref` to nowhere, or without end
            raise TypeError(f"the tool's schema cannot be applied: {exc}"[:_MAX_TOLD]) from exc
        if error is not None:
            place = ".".join(map(str, error.absolute_path))
            raise TypeError(f"{place}: {error.message}"[:_MAX_TOLD] if place else str(error.message)[:_MAX_TOLD])

    def refused_nulls(self, value: dict[str, Any]) -> set[str]:
        """The names whose value is None where the schema has no place for that. Raises TypeError as `check`."""
        try:
            with self._lock:
                self._until = time.thread_time() + _MAX_SECONDS
                paths = [list(error.absolute_path) for error in self._validator.iter_errors(value)]
        except Exception as exc:
            raise TypeError(f"the tool's schema cannot be applied: {exc}"[:_MAX_TOLD]) from exc
        return {path[0] for path in paths if len(path) == 1 and value.get(path[0], 0) is None}

    def _counted(self, check: Any) -> Any:
        def counting(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
            # Before each keyword: what one can do is bounded by the sizes of schema and value.
            if time.thread_time() > self._until:
                raise Unusable("it takes too long")
            for error in check(validator, value, instance, schema) or ():
                # It quotes the value, which may be large; and errors may be very many.
                error.message = str(error.message)[:_MAX_TOLD]
                error.args = ()
                yield error

        return counting


def _nothing(*_args: Any) -> Iterator[Any]:
    return iter(())


def _names_a_dialect(schema: Any) -> bool:
    if type(schema) is dict:
        inner = cast("dict[str, Any]", schema)
        return type(inner.get("$schema")) is str or any(map(_names_a_dialect, inner.values()))
    return type(schema) is list and any(map(_names_a_dialect, cast("list[Any]", schema)))
