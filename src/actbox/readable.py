"""Formats that a browser shows, as text that a model reads: tables, plotly figures, HTML, JSON, terminal output.

What comes here is a guest's word and may be anything. Each function takes time linear in what it is given, never
raises, and returns None if it cannot make a text of it.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from actbox.outputs import plain_text, strip_ansi

__all__ = ["PLOTLY", "TABLE", "is_placeholder", "plain", "text_of"]

TABLE = "application/vnd.actbox.table+json"
PLOTLY = "application/vnd.plotly.v1+json"
_JSON = re.compile(r"application/(?:[\w.-]+\+)?json", re.ASCII)
_MAX_HTML = 8 << 20
_MAX_LABEL = 100
_MAX_TRACES = 20
_MAX_ROWS = 100
_MAX_COLUMNS = 100
# A picture's number of points is told by these, the first that is there.
_POINTS = ("x", "y", "z", "values", "labels", "lat", "r", "ids")
_ITEM_SIZES = {"1": 1, "2": 2, "4": 4, "8": 8}
# `<Figure size 640x480 with 1 Axes>`, `<IPython.core.display.HTML object>`: a name in the place of a text.
_PLACEHOLDER = re.compile(r"<[^<>\n]{1,200}>")
_CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(13, 32), 127])
_BREAKS = {
    "br",
    "p",
    "div",
    "tr",
    "li",
    "ul",
    "ol",
    "table",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "pre",
    "hr",
    "section",
}
_CELLS = {"td", "th"}
_NAME = re.compile(r"/?([A-Za-z][A-Za-z0-9]*)")


def plain(text: str) -> str:
    """Text as it stands on a terminal in the end: no colours, no controls; of what was overwritten, the last."""
    text = strip_ansi(text)
    if "\r" in text:
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return text.translate(_CONTROLS)


def is_placeholder(text: str) -> bool:
    """Whether a plain text only names the object that it stands for."""
    return _PLACEHOLDER.fullmatch(text.strip()) is not None


def text_of(data: Mapping[str, Any]) -> tuple[str, str] | None:
    """The text of a display that tells a reader most, as (MIME type, text); None if there is none in it."""
    for mime, make in ((TABLE, _table), (PLOTLY, _plotly)):
        text = make(data[mime]) if mime in data else None
        if text:
            return mime, text
    name = plain_text(data)
    if name and not is_placeholder(name):
        return "text/plain", plain(name)
    for mime in ("text/markdown", "text/latex"):
        text = data.get(mime)
        if isinstance(text, str) and text.strip():
            return mime, plain(text)
    text = _html(data["text/html"]) if "text/html" in data else None
    if text:
        return "text/html", text
    for mime, value in data.items():
        text = _json(value) if _JSON.fullmatch(mime) and mime not in (TABLE, PLOTLY) else None
        if text:
            return mime, text
    return ("text/plain", plain(name)) if name else None


# -- tables ----------------------------------------------------------------------------------------------------------


def _table(value: object) -> str | None:
    """A data frame as `guest/tables.py` describes it: its shape, then rows of cells between bars."""
    found = _mapping(value)
    rows, columns = found.get("rows"), found.get("columns")
    head, tail, header = _grid(found.get("head")), _grid(found.get("tail")), _cells(found.get("header"))
    if type(rows) is not int or type(columns) is not int or not header:
        return None
    lines = [f"[table of {rows:,} rows x {columns:,} columns]", " | ".join(header), *map(" | ".join, head)]
    if found.get("left_out_rows"):
        lines.append("...")
    lines += map(" | ".join, tail)
    left_out = found.get("left_out_columns")
    if type(left_out) is int and left_out > 0:
        lines.append(f"[the last {left_out:,} columns are not shown]")
    return plain("\n".join(lines))


def _grid(value: object) -> list[list[str]]:
    return [_cells(row) for row in _sequence(value)[:_MAX_ROWS]]


def _cells(value: object) -> list[str]:
    return [_label(cell) for cell in _sequence(value)[: _MAX_COLUMNS + 1]]


# -- plotly ----------------------------------------------------------------------------------------------------------


def _plotly(value: object) -> str | None:
    """A figure in a line, and a line for each of its traces. The data are in the session's variables."""
    figure = _mapping(value)
    layout, traces = _mapping(figure.get("layout")), _sequence(figure.get("data"))
    title = _title(layout)
    lines = [f"[plotly figure{f' {title!r}' if title else ''}, {len(traces):,} traces]"]
    axes = [
        f"{name[0]}: {axis}"
        for name in ("xaxis", "yaxis", "zaxis")
        if (axis := _title(_mapping(layout.get(name)) or _mapping(_mapping(layout.get("scene")).get(name))))
    ]
    lines += [", ".join(axes)] * bool(axes)
    for trace in map(_mapping, traces[:_MAX_TRACES]):
        name = _label(trace.get("name", ""))
        points = next((count for part in _POINTS if (count := _count(trace.get(part)))), None)
        line = f"- {_label(trace.get('type') or 'scatter')}"
        lines.append(line + f" {name!r}" * bool(name) + (f", {points:,} points" if points else ""))
    if len(traces) > _MAX_TRACES:
        lines.append(f"- {len(traces) - _MAX_TRACES:,} more")
    return plain("\n".join(lines))


def _title(part: Mapping[str, Any]) -> str:
    title = part.get("title")
    return _label(_mapping(title).get("text") or title)


def _count(values: object) -> int:
    """How many values a list has, or an array that plotly has packed into base64."""
    packed = _mapping(values)
    if packed:
        data, kind = packed.get("bdata"), packed.get("dtype")
        size = _ITEM_SIZES.get(kind[-1:]) if isinstance(kind, str) else None
        return len(data) * 3 // 4 // size if isinstance(data, str) and size else 0
    return len(_sequence(values))


# -- HTML and JSON -----------------------------------------------------------------------------------------------------


def _html(value: object) -> str | None:
    """The text of HTML, without scripts and styles: blocks on lines of their own, a bar between the cells of a table.

    Every step goes forward, so a hostile text takes no longer than another.
    """
    if not isinstance(value, str):
        return None
    source = value[:_MAX_HTML]
    lower = source.lower() if source.isascii() else "".join(c.lower() if c < "\x80" else c for c in source)
    pieces: list[str] = []
    at = 0
    kept = False
    while (begin := source.find("<", at)) >= 0:
        # A line's end in the source is a blank to the reader, but for what is set as it stands.
        pieces.append(source[at:begin] if kept else source[at:begin].replace("\n", " "))
        name = _NAME.match(lower, begin + 1)
        tag = name[1] if name else ""
        ends = lower.startswith("/", begin + 1)
        if not tag and not lower.startswith(("/", "!", "?"), begin + 1):
            pieces.append("<")
            at = begin + 1
            continue
        closing = {"script": "</script", "style": "</style"}.get(tag) if not ends else None
        if closing:
            begin = lower.find(closing, begin)
        elif lower.startswith("<!--", begin):
            begin = lower.find("--", begin + 4)
        end = source.find(">", begin) if begin >= 0 else -1
        if end < 0:
            at = len(source)
            break
        if tag == "pre":
            kept = not ends
        pieces.append("\n" if tag in _BREAKS else " | " if tag in _CELLS and ends else "")
        at = end + 1
    pieces.append(source[at:] if kept else source[at:].replace("\n", " "))
    lines = (" ".join(line.split()).strip(" |") for line in html.unescape("".join(pieces)).split("\n"))
    return plain("\n".join(line for line in lines if line)) or None


def _json(value: object) -> str | None:
    try:
        return plain(json.dumps(value, ensure_ascii=False, default=repr))
    except (TypeError, ValueError, RecursionError):
        return None


# -- whatever a guest sent, as what it should be -----------------------------------------------------------------------


def _mapping(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _sequence(value: object) -> Sequence[Any]:
    return cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()


def _label(value: object) -> str:
    """A short text on one line."""
    return " ".join(value[: _MAX_LABEL + 1].split())[:_MAX_LABEL] if isinstance(value, str) else ""
