"""The head of a SKILL.md: the part of YAML that skills are written in, read strictly and by hand. No I/O.

The Agent Skills specification wants YAML between two lines of `---`: strings, one map of strings, one list of strings.
That much is read here: plain and quoted scalars, block scalars (`|`, `>`), one level of maps and lists, flow lists and
maps of scalars. All values are text, as written: `1.0` stays "1.0". What else YAML has (anchors, tags, references,
documents, deeper nesting) is refused: whoever writes a skill may be hostile, and a YAML parser is more than the host
needs. Time and memory are linear in the text, which has a bound.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["MAX_LENGTH", "Malformed", "Value", "parse", "split"]

Value = str | list[str] | dict[str, str]

# Characters of a head; the fields that the specification has fit into a tenth of it.
MAX_LENGTH = 16 << 10
_KEY = re.compile(r"([A-Za-z0-9_][\w./-]*|'[^'\n]*'|\"[^\"\\\n]*\")[ \t]*:(?:[ \t]+|$)")
_BLOCK = re.compile(r"([|>])([+-]?)(?:[ \t]+#.*)?")
_COMMENT = re.compile(r"(?:^|[ \t])#")
_ESCAPE = re.compile(r'\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(["\\/0abtnvfre_ NLP]))')
_ESCAPED = dict(zip('"\\/0abtnvfre_ NLP', '"\\/\0\a\b\t\n\v\f\r\x1b\xa0 \x85\u2028\u2029', strict=True))
# What begins a value that this file does not read.
_FOREIGN = tuple("&*!%@`|>{}[],?")


class Malformed(ValueError):
    """A head that is not such YAML: `line`, from 1 at the first `---`, and why; `fields`, those that end before it."""

    fields: dict[str, Value]

    def __init__(self, line: int, why: str) -> None:
        self.line = line
        self.fields = {}
        super().__init__(f"line {line}: {why}")


def split(text: str) -> tuple[str | None, str]:
    """A SKILL.md as (head, body); the head is None if it has none, or one that does not end."""
    if not re.match(r"---[ \t]*\n", text):
        return None, text
    begin = text.index("\n") + 1
    end = re.compile(r"^---[ \t]*$", re.MULTILINE).search(text, begin)
    return (None, text) if end is None else (text[begin : end.start()], text[end.end() :].lstrip("\n"))


def parse(head: str) -> dict[str, Value]:
    """The fields of a head.

    Raises:
        Malformed: it is too long, not the YAML that is read here, or has a field twice.
    """
    if len(head) > MAX_LENGTH:
        raise Malformed(1, f"the head has more than {MAX_LENGTH} characters")
    return _Reader(head).fields()


class _Reader:
    """Lines, read forward. State: `_at`, the next line."""

    def __init__(self, head: str) -> None:
        self._lines = [line.rstrip() for line in head.split("\n")]
        self._at = 0

    def fields(self) -> dict[str, Value]:
        found: dict[str, Value] = {}
        try:
            while self._skip_blank():
                if self._indent():
                    raise self._wrong("a field begins at the start of its line")
                name, rest = self._key(self._lines[self._at])
                if name in found:
                    raise self._wrong(f"the field {name!r} is there twice")
                found[name] = self._value(rest)
        except Malformed as exc:
            exc.fields = found
            raise
        return found

    def _skip_blank(self) -> bool:
        """Go to the next line that says something; whether there is one."""
        while self._at < len(self._lines):
            line = self._lines[self._at].lstrip(" ")
            if line.startswith("\t"):
                raise self._wrong("lines are indented by blanks, not by tabs")
            if line and not line.startswith("#"):
                return True
            self._at += 1
        return False

    def _indent(self) -> int:
        line = self._lines[self._at]
        return len(line) - len(line.lstrip(" "))

    def _wrong(self, why: str) -> Malformed:
        return Malformed(self._at + 2, why)

    def _key(self, text: str) -> tuple[str, str]:
        key = _KEY.match(text)
        if key is None:
            raise self._wrong("here should be a field: a name, a colon, a blank, a value")
        name = key[1][1:-1] if key[1][0] in "'\"" else key[1]
        return name, text[key.end() :]

    def _value(self, rest: str) -> Value:
        """What follows a field's colon, to the line behind it."""
        if block := _BLOCK.fullmatch(rest):
            self._at += 1
            return self._block(folded=block[1] == ">", chomping=block[2])
        if rest and not rest.startswith("#"):
            return self._flow(rest) if rest[0] in "[{" else self._scalar(rest, 0)
        self._at += 1
        if not self._skip_blank():
            return ""
        line, indent = self._lines[self._at].lstrip(" "), self._indent()
        if line == "-" or line.startswith("- "):
            return self._items(indent)
        if not indent:
            return ""
        return self._map(indent) if _KEY.match(line) else self._scalar(line, 0)

    def _items(self, indent: int) -> list[str]:
        found: list[str] = []
        while self._skip_blank() and self._indent() == indent:
            line = self._lines[self._at].lstrip(" ")
            if not (line == "-" or line.startswith("- ")):
                break
            found.append(self._scalar(line[1:].lstrip(" "), indent))
        if self._at < len(self._lines) and self._indent() > indent:
            raise self._wrong("an item of a list is one scalar")
        return found

    def _map(self, indent: int) -> dict[str, str]:
        found: dict[str, str] = {}
        while self._skip_blank() and self._indent() == indent:
            name, rest = self._key(self._lines[self._at].lstrip(" "))
            if name in found:
                raise self._wrong(f"the entry {name!r} is there twice")
            if block := _BLOCK.fullmatch(rest):
                self._at += 1
                found[name] = self._block(folded=block[1] == ">", chomping=block[2], above=indent)
            else:
                found[name] = self._scalar(rest, indent)
        if self._at < len(self._lines) and self._indent():
            raise self._wrong("a map holds scalars, all indented alike")
        return found

    # -- scalars -------------------------------------------------------------------------------------------------------

    def _block(self, *, folded: bool, chomping: str, above: int = 0) -> str:
        """A block scalar: the lines that are indented more than what it belongs to."""
        lines: list[str] = []
        indent = 0
        while self._at < len(self._lines):
            line = self._lines[self._at]
            found = len(line) - len(line.lstrip(" "))
            if line and found <= above:
                break
            indent = indent or found
            if line and found < indent:
                raise self._wrong("the lines of a block are indented alike")
            lines.append(line[indent:])
            self._at += 1
        text = "\n".join(_folded(lines)) if folded else "\n".join(lines)
        return text.rstrip("\n") + "\n" * (chomping != "-" and bool(text.strip()))

    def _scalar(self, text: str, indent: int) -> str:
        """A scalar that begins here, plain or quoted, with the lines that go on with it."""
        if text[:1] in ("'", '"'):
            return self._quoted(text)
        pieces = [self._plain(text)]
        self._at += 1
        while self._at < len(self._lines):
            line = self._lines[self._at]
            if not line or self._indent() <= indent:
                break
            pieces.append(self._plain(line.lstrip(" ")))
            self._at += 1
        return " ".join(filter(None, pieces))

    def _plain(self, text: str) -> str:
        comment = _COMMENT.search(text)
        text = (text if comment is None else text[: comment.start()]).rstrip()
        if text.startswith((*_FOREIGN, "- ")) or text == "-":
            raise self._wrong(f"a value that begins with {text[0]!r} is put in quotes")
        if re.search(r":(?:[ \t]|$)", text):
            raise self._wrong("a value with a colon and a blank is put in quotes")
        return text

    def _quoted(self, text: str) -> str:
        quote, pieces, first = text[0], [text[1:]], self._at
        end = _closing(text[1:], quote)
        while end < 0:
            self._at += 1
            if self._at == len(self._lines) or (self._lines[self._at] and not self._indent()):
                self._at = first
                raise self._wrong("a quoted value does not end")
            line = self._lines[self._at].strip(" ")
            end = _closing(line, quote)
            pieces.append(line)
        rest = pieces[-1][end + 1 :].strip()
        pieces[-1] = pieces[-1][:end]
        if rest and not rest.startswith("#"):
            raise self._wrong("something stands behind a quoted value")
        value = self._unquoted(quote, "\n".join(_folded(pieces)))
        self._at += 1
        return value

    def _unquoted(self, quote: str, text: str) -> str:
        if quote == "'":
            return text.replace("''", "'")
        if "\\" in _ESCAPE.sub("", text):
            raise self._wrong("a backslash in double quotes stands before what it does not escape")
        return _ESCAPE.sub(_unescaped, text)

    # -- flow ----------------------------------------------------------------------------------------------------------

    def _flow(self, text: str) -> Value:
        """`[a, "b"]` or `{a: b}`, on one line."""
        opened, inner, found = text[0], text[1:], list[str]()
        for piece, last in self._pieces(inner, "]" if opened == "[" else "}"):
            if piece or not last:
                found.append(piece)
        self._at += 1
        if opened == "[":
            return [self._inline(piece) for piece in found]
        pairs = [self._key(piece) for piece in found]
        return {name: self._inline(rest) for name, rest in pairs}

    def _pieces(self, text: str, closing: str) -> Iterator[tuple[str, bool]]:
        """What stands between the commas, each with whether it is the last."""
        begin = at = 0
        while at < len(text):
            char = text[at]
            if char in "'\"" and not text[begin:at].strip(" ").rpartition(":")[2].strip(" "):
                end = _closing(text[at + 1 :], char)
                at += len(text) if end < 0 else end + 1
            elif char in (",", closing):
                yield text[begin:at].strip(), char == closing
                begin = at + 1
                if char == closing:
                    if (rest := text[begin:].strip()) and not rest.startswith("#"):
                        raise self._wrong("something stands behind a list or a map")
                    return
            elif char in "[]{}":
                raise self._wrong("a list or a map in one line holds scalars")
            at += 1
        raise self._wrong("a list or a map does not end on its line")

    def _inline(self, text: str) -> str:
        if text[:1] in ("'", '"'):
            if _closing(text[1:], text[0]) != len(text) - 2:
                raise self._wrong("something stands behind a quoted value")
            return self._unquoted(text[0], text[1:-1])
        return self._plain(text)


def _closing(text: str, quote: str) -> int:
    """Where the quote that ends a scalar is; -1 if it is not in this text."""
    at = 0
    while (at := text.find(quote, at)) >= 0:
        if quote == "'" and text[at + 1 : at + 2] == "'":
            at += 2
        elif quote == '"' and (at - len(text[:at].rstrip("\\"))) % 2:
            at += 1
        else:
            return at
    return -1


def _folded(lines: list[str]) -> list[str]:
    """Lines that follow each other as one; an empty line between them stays as a line's end."""
    found: list[str] = []
    fresh = True
    for line in lines:
        if not line:
            found.append("")
            fresh = True
        elif fresh or line.startswith(" "):
            if found and found[-1] == "":
                found[-1] = line
            else:
                found.append(line)
            fresh = False
        else:
            found[-1] += f" {line}"
    return found


def _unescaped(found: re.Match[str]) -> str:
    digits = found[1] or found[2] or found[3]
    if digits is None:
        return _ESCAPED[found[4]]
    number = int(digits, 16)
    return chr(number) if number < 0x110000 and not 0xD800 <= number < 0xE000 else "\ufffd"  # noqa: PLR2004 - Unicode's
