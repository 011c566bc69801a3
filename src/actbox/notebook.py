"""A session's cells as a Jupyter notebook (nbformat 4.5), as plain JSON values. No I/O.

What ran is told as it was: a cell that timed out, was killed or lost ends with an error output that says so, and a
line stands where the kernel was a fresh one, or the session went back to a checkpoint. `metadata.actbox` of a cell has
the facts.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from actbox.events import Ended, Failed, Finished
from actbox.history import Marker, outcome_name, state_kept
from actbox.pictures import SMALLER
from actbox.readable import TABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from actbox.history import Cell
    from actbox.outputs import Output

__all__ = ["make_notebook", "notebook_bytes"]

# Those whose content is JSON as it stands; all others are text, or base64 of it.
_JSON = re.compile(r"application/(?:.*\+)?json")
_TEXT = ("text/", "image/svg+xml", "application/javascript", "application/xml")
# For models; no program that reads notebooks knows them.
_OURS = (TABLE, SMALLER)
# Levels of a guest's JSON; programs that read notebooks recurse.
_MAX_DEPTH = 100


def make_notebook(
    cells: Iterable[Cell | Marker], *, forgotten: int = 0, key: str | None = None, version: str
) -> dict[str, Any]:
    """The cells as a notebook; `forgotten` earlier ones are no longer known, and it says so."""
    made: list[dict[str, Any]] = []
    if forgotten:
        made.append(_line(f"*{forgotten} earlier cells are no longer in the record.*"))
    for cell in cells:
        if isinstance(cell, Marker):
            made.append(_line(f"**{cell.text}**"))
            continue
        if cell.result.restarted:
            made.append(_line("**A fresh kernel from here on:** the one before had died, and its variables with it."))
        if cell.result.rolled_back_to is not None:
            number = cell.result.rolled_back_to
            made.append(_line(f"**The kernel had died:** the session is as it was after cell {number} from here on."))
        made.append(_code(cell))
    for number, cell in enumerate(made, 1):
        cell["id"] = f"cell-{number}"
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
            "actbox": {"version": version, "key": key, "forgotten": forgotten},
        },
        "cells": made,
    }


def notebook_bytes(notebook: Mapping[str, Any]) -> bytes:
    """A notebook as its file holds it."""
    return (json.dumps(notebook, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()


def _line(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {"actbox": {"marker": True}}, "source": text}


def _code(cell: Cell) -> dict[str, Any]:
    result, outcome = cell.result, cell.outcome
    count = result.execution_count if isinstance(outcome, Finished | Failed) else None
    ran = cell.started is not None
    facts = {
        "outcome": outcome_name(outcome) if ran or outcome is not None else "waiting",
        "ran": ran,
        "state_kept": state_kept(outcome),
        "rolled_back_to": outcome.rolled_back_to if isinstance(outcome, Ended) else None,
        "duration": round(result.duration, 6) if ran else None,
        "restarted": result.restarted,
        "message": None if result.ending is None else _text(result.ending),
        "omitted_bytes": result.omitted_bytes + cell.forgotten,
        "omitted_media": result.omitted_media,
    }
    metadata: dict[str, Any] = {"actbox": facts}
    if cell.started is not None:
        metadata["execution"] = {"iopub.execute_input": _time(cell.started)}
        if outcome is not None:
            ended = cell.started + timedelta(seconds=result.duration)
            metadata["execution"]["shell.execute_reply"] = _time(ended)
    return {
        "cell_type": "code",
        "metadata": metadata,
        "source": _text(cell.code),
        "execution_count": count,
        "outputs": [*_outputs(cell)],
    }


def _outputs(cell: Cell) -> Iterator[dict[str, Any]]:
    for output in cell.result.outputs:
        yield _output(output)
    if cell.forgotten:
        text = f"[{cell.forgotten:,} bytes of output are not in the record]\n"
        yield {"output_type": "stream", "name": "stderr", "text": text}
    told = any(output.kind == "error" for output in cell.result.outputs)
    if cell.result.ending is not None and not (told and isinstance(cell.outcome, Failed)):
        # What was not the code's own exception, or is missing among the outputs.
        ending = _text(cell.result.ending)
        yield {"output_type": "error", "ename": cell.error or "Error", "evalue": ending, "traceback": [ending]}


def _output(output: Output) -> dict[str, Any]:
    match output.kind:
        case "stream":
            return {"output_type": "stream", "name": output.name or "stdout", "text": _text(output.text)}
        case "error":
            name, value = _text(output.name or "Error"), _text(output.text)
            trace = _text(output.trace or f"{name}: {value}").split("\n")
            return {"output_type": "error", "ename": name, "evalue": value, "traceback": trace}
        case kind:
            data = {_text(mime): _content(mime, value) for mime, value in output.data.items() if mime not in _OURS}
            made: dict[str, Any] = {"output_type": kind, "data": data, "metadata": _json(output.metadata)}
            if kind == "execute_result":
                made["execution_count"] = max(0, output.execution_count or 0)
            return made


def _content(mime: str, value: object) -> Any:
    if _JSON.fullmatch(mime):
        return _json(value)
    if isinstance(value, bytes):
        if mime.startswith(_TEXT):
            return value.decode("utf-8", "replace")
        return base64.b64encode(value).decode("ascii")
    return _text(value) if isinstance(value, str) else json.dumps(_json(value))


def _json(value: object, levels: int = _MAX_DEPTH) -> Any:
    """A value as JSON that everybody can read: no infinities, no lone surrogates, and not too deep."""
    if isinstance(value, str):
        return _text(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if not levels:
        return None
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {_text(str(name)): _json(item, levels - 1) for name, item in items}
    if isinstance(value, list | tuple):
        return [_json(item, levels - 1) for item in cast("list[object]", value)]
    return base64.b64encode(value).decode("ascii") if isinstance(value, bytes) else _text(repr(value))


def _text(text: str) -> str:
    """Text without lone surrogates, which no file can hold."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _time(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
