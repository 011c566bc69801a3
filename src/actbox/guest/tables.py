"""Data frames for readers who pay by the character: their shape and a few rows, as a format of its own beside HTML.

The host shows it to models (`readable.py`). It is computed here, where the frame is, and bounded in rows, columns and
characters, so that it costs a display little.
"""

# What is displayed may be of any type.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.formatters import DisplayFormatter

MIME = "application/vnd.actbox.table+json"
_HEAD, _TAIL = 10, 5
_COLUMNS = 20
_CELL = 60
# Where the libraries say that their class is: pandas from version 3 on, pandas before it, polars.
_MODULES = ("pandas", "pandas.core.frame", "polars.dataframe.frame")


def register(formatter: DisplayFormatter) -> None:
    """Have every data frame that is displayed described too. Imports neither pandas nor polars."""
    for module in _MODULES:
        formatter.mimebundle_formatter.for_type_by_name(module, "DataFrame", _bundle)


def _bundle(frame: Any) -> dict[str, Any]:
    try:
        return {MIME: describe(frame)}
    except Exception:  # noqa: BLE001 - a subclass may do anything; the frame's other formats are there
        return {}


def describe(frame: Any) -> dict[str, Any]:
    """A frame of pandas or polars: its shape, names and types of its columns, and rows from its head and its tail."""
    rows, columns = map(int, frame.shape)
    indexed = hasattr(frame, "iloc")
    shown = frame.iloc[:, :_COLUMNS] if indexed else frame[:, :_COLUMNS]
    header = [f"{_cell(name)} ({_cell(kind)})" for name, kind in zip(shown.columns, shown.dtypes, strict=False)]
    short = rows <= _HEAD + _TAIL

    def part(begin: int, end: int) -> list[list[str]]:
        found = shown.iloc[begin:end].itertuples(name=None) if indexed else shown[begin:end].rows()
        return [[_cell(value) for value in row] for row in found]

    return {
        "rows": rows,
        "columns": columns,
        "header": ["", *header] if indexed else header,
        "head": part(0, rows if short else _HEAD),
        "tail": [] if short else part(rows - _TAIL, rows),
        "left_out_rows": 0 if short else rows - _HEAD - _TAIL,
        "left_out_columns": max(0, columns - _COLUMNS),
    }


def _cell(value: Any) -> str:
    """A value in at most `_CELL` characters on one line."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple, dict, set, frozenset)) and len(value) > _CELL:
        return f"<{type(value).__name__} of {len(value)}>"
    text = " ".join((value if isinstance(value, str) else str(value))[: 4 * _CELL].split())
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."
