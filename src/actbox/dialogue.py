"""What is said between a line over TCP and the desk at its other end: requests, and the frames that answer them.

Pure, and read strictly on both sides. A request carries a number `n`; its answer is any number of frames with this
number as `re`, and a last one of `LAST`. Requests of one connection are answered in any order.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from actbox.checkpoint import Checkpoint
from actbox.errors import ProtocolError
from actbox.events import DisplayData, Error, ExecuteResult, Stream
from actbox.journal import Dropped
from actbox.lines import Change, Ending, Page, Standing, Wish
from actbox.protocol import frames
from actbox.protocol.frames import Frame
from actbox.protocol.messages import legible
from actbox.protocol.telling import (
    event_frame,
    outcome_error,
    outcome_fields,
    read_event,
    read_outcome,
)
from actbox.result import ExecutionResult, Image, Output, join_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from actbox.events import Event
    from actbox.journal import Numbered

LAST = frozenset({"done", "page", "ending", "standings", "checkpoints", "refused"})
_MOST = 1 << 53
_MAX_PATH = 4096
# Text of one frame; a result's may be longer than a frame.
_PIECE = 1 << 20
# Of an error too long to be told.
_SHORT = 1000


class Request(NamedTuple):
    """What is asked; `execution` is an id, `after` the number of an event, `timeout` in seconds."""

    number: int
    kind: str
    execution: str = ""
    after: int = 0
    timeout: float = 0.0
    code: str = ""
    change: Change | None = None


# -- the greeting ----------------------------------------------------------------------------------------------------


def wish_fields(wish: Wish) -> dict[str, Any]:
    """A wish for a greeting."""
    return {
        "attach": wish.name,
        "client": wish.client,
        "key": wish.key,
        "ttl": wish.ttl,
        "drive": wish.drive,
        "take_over": wish.take_over,
        "incarnation": wish.incarnation,
        "recover": wish.recover,
    }


def read_wish(header: dict[str, Any]) -> Wish:
    """The wish in a greeting. Raises `ProtocolError`."""
    match header:
        case {
            "attach": str(name),
            "client": str(client),
            "key": str() | None as key,
            "ttl": int() | float() as ttl,
            "drive": bool(drive),
            "take_over": bool(take_over),
            "incarnation": str() | None as incarnation,
            "recover": bool(recover),
        } if len(client) <= _SHORT:
            return Wish(name, client, key, ttl, drive, take_over, incarnation, recover)
        case _:
            raise ProtocolError("a greeting that asks for a session, but does not say for which")


# -- requests --------------------------------------------------------------------------------------------------------


def request_frame(request: Request) -> Frame:
    """A request as a frame."""
    header: dict[str, Any] = {"type": request.kind, "n": request.number}
    if request.kind in ("submit", "read", "result", "interrupt"):
        header["execution"] = request.execution
    if request.kind == "read":
        header["after"] = request.after
    if request.kind == "submit":
        header["timeout"] = request.timeout
    if request.change is not None:
        header["change"] = asdict(request.change)
    return Frame(header, request.code.encode("utf-8", "surrogatepass"))


def read_request(frame: Frame) -> Request:
    """The request in a frame. Raises `ProtocolError`."""
    match frame.header:
        case {"type": "submit", "n": int(number), "execution": str(id_), "timeout": int() | float() as timeout}:
            try:
                code = frame.payload.decode("utf-8", "surrogatepass")
            except UnicodeDecodeError as exc:
                raise ProtocolError("a cell that is no text") from exc
            request = Request(number, "submit", id_, timeout=timeout, code=code)
        case {"type": "read", "n": int(number), "execution": str(id_), "after": int(after)} if 0 <= after < _MOST:
            request = Request(number, "read", id_, after)
        case {"type": "result" | "interrupt" as kind, "n": int(number), "execution": str(id_)}:
            request = Request(number, kind, id_)
        case {"type": "change", "n": int(number), "change": fields}:
            request = Request(number, "change", change=_read_change(fields))
        case {"type": "executions" | "checkpoints" | "end" | "forget" as kind, "n": int(number)}:
            request = Request(number, kind)
        case _:
            raise ProtocolError("what is asked is nothing that a client may ask")
    if not 0 < request.number < _MOST:
        raise ProtocolError("a request whose number is none")
    return request


def _read_change(fields: Any) -> Change:
    match fields:
        case {
            "kind": "checkpoint" | "rollback" | "discard" | "fork" as kind,
            "name": str(name),
            "mark": str(mark),
            "timeout": int() | float() as timeout,
            "force": bool(force),
            "files": bool(files),
            "key": str() | None as key,
        } if len(mark) <= _SHORT:
            return Change(kind, name, mark, timeout, force, files, key)
        case _:
            raise ProtocolError("what is to be changed is nothing that a client may change")


# -- answers: pages --------------------------------------------------------------------------------------------------


def page_frames(page: Page) -> Iterator[Frame]:
    """A page as frames; an event that no frame can hold is told as one that was dropped."""
    for number, event in page.events:
        if isinstance(event, Dropped):
            yield Frame({"type": "dropped", "first": event.first, "last": event.last}, b"")
        else:
            made = _frame_of("event", event, {"number": number})
            yield made or Frame({"type": "dropped", "first": number, "last": number}, b"")
    yield Frame({"type": "page", "ended": page.ended}, b"")


def read_page(after: int, answer: list[Frame]) -> Page:
    """The page in an answer, or as much of it as has come. Raises `ProtocolError` unless it follows without a gap."""
    events: list[Numbered] = []
    for frame in answer:
        match frame.header:
            case {"type": "event", "number": int(number), "event": header} if number == after + 1:
                events.append((number, read_event(header, frame.payload)))
            case {"type": "dropped", "first": int(first), "last": int(number)} if first == after + 1 <= number < _MOST:
                events.append((number, Dropped(first, number)))
            case {"type": "page", "ended": bool(ended)}:
                return Page(tuple(events), ended)
            case _:
                raise ProtocolError("what was answered is no page of events")
        after = number
    return Page(tuple(events), ended=False)


# -- answers: endings ------------------------------------------------------------------------------------------------


def ending_frames(ending: Ending) -> Iterator[Frame]:
    """How an execution ended, and its result, as frames."""
    result = ending.result
    left_out = 0
    for event in _events_of(result.outputs):
        made = _frame_of("output", event, {})
        left_out += made is None
        if made is not None:
            yield made
    for image in result.images:
        path = str(image.path) if image.path is not None else None
        yield Frame({"type": "image", "mime": image.mime_type, "path": path}, image.data)
    error = outcome_error(ending.outcome)
    if error is not None:
        short = Error(error.name[:_SHORT], error.value[:_SHORT], error.traceback[-_PIECE:])
        made = _frame_of("error", error, {}) or _frame_of("error", short, {})
        if made is not None:
            yield made
    yield Frame(
        {
            "type": "ending",
            "outcome": outcome_fields(ending.outcome),
            "omitted_bytes": result.omitted_bytes,
            "omitted_media": result.omitted_media + left_out,
            "restarted": result.restarted,
            "rolled_back_to": result.rolled_back_to,
            "execution_count": result.execution_count,
            "duration": result.duration,
        },
        b"",
    )


def read_ending(answer: list[Frame]) -> Ending:
    """The ending in an answer. Raises `ProtocolError`."""
    outputs: list[Output] = []
    images: list[Image] = []
    error: Error | None = None
    for frame in answer:
        match frame.header:
            case {"type": "output", "event": header}:
                _push(outputs, _output_of(read_event(header, frame.payload)))
            case {"type": "image", "mime": str(mime), "path": str() | None as path} if len(path or "") <= _MAX_PATH:
                images.append(Image(frame.payload, mime, Path(path) if path is not None else None))
            case {"type": "error", "event": header}:
                told = read_event(header, frame.payload)
                error = told if isinstance(told, Error) else None
            case {"type": "ending", "outcome": fields, "rolled_back_to": int() | None as back} as header:
                result = ExecutionResult(
                    join_text(outputs) or None,
                    images,
                    outputs,
                    _count(header, "omitted_bytes"),
                    _count(header, "omitted_media"),
                    header.get("restarted") is True,
                    _count(header, "execution_count"),
                    _seconds(header, "duration"),
                    rolled_back_to=back,
                )
                return Ending(read_outcome(fields, error), result)
            case _:
                break
    raise ProtocolError("what was answered is no ending of an execution")


def _events_of(outputs: Iterable[Output]) -> Iterator[Event]:
    for output in outputs:
        match output.kind:
            case "stream":
                name = "stderr" if output.name == "stderr" else "stdout"
                for start in range(0, len(output.text), _PIECE):
                    yield Stream(name, output.text[start : start + _PIECE])
            case "error":
                yield Error(output.name or "", output.text, output.trace or "")
            case "execute_result":
                yield ExecuteResult(output.data, output.metadata, output.execution_count or 0)
            case "display_data":
                yield DisplayData(output.data, output.metadata, output.display_id)


def _output_of(event: Event) -> Output:
    match event:
        case Stream(name, text):
            return Output("stream", name=name, text=text)
        case Error(name, value, trace):
            return Output("error", name=name, text=value, trace=trace)
        case ExecuteResult(data, metadata, count):
            return Output("execute_result", data=data, metadata=metadata, execution_count=count)
        case DisplayData(data, metadata, display_id):
            return Output("display_data", data=data, metadata=metadata, display_id=display_id)
        case _:
            raise ProtocolError("an output that is none")


def _push(outputs: list[Output], output: Output) -> None:
    """Append; pieces of one text are one output again."""
    last = outputs[-1] if outputs else None
    if last is not None and last.kind == output.kind == "stream" and last.name == output.name:
        outputs[-1] = replace(last, text=last.text + output.text)
    else:
        outputs.append(output)


# -- answers: the others ---------------------------------------------------------------------------------------------


def standings_frame(standings: list[Standing]) -> Frame:
    """Where executions stand, as a frame."""
    rows = [[each.id, each.state, each.first, each.last, each.outcome] for each in standings]
    return Frame({"type": "standings", "rows": rows}, b"")


def read_standings(answer: list[Frame]) -> list[Standing]:
    """What a frame says of where executions stand. Raises `ProtocolError`."""
    found: list[Standing] = []
    rows: Any = answer[-1].header.get("rows") if answer else None
    for row in cast("list[Any]", rows) if isinstance(rows, list) else [None]:
        match row:
            case [str(id_), "waiting" | "running" | "ended" as state, int(first), int(last), str() | None as outcome]:
                found.append(Standing(id_, state, first, last, outcome))
            case _:
                raise ProtocolError("what was answered is no list of executions")
    return found


def _frame_of(kind: str, event: Event, more: dict[str, Any]) -> Frame | None:
    """A frame around an event's; None if it is too large, or too deep, for one."""
    try:
        inner = event_frame(event)
        frame = Frame({"type": kind, "event": inner.header, **more}, inner.payload)
        # Room for the number of the request, which comes later.
        frames.encode({**frame.header, "re": _MOST})
    except (frames.FrameError, ValueError, RecursionError):
        return None
    return frame if len(frame.payload) <= frames.MAX_PAYLOAD else None


def checkpoints_frame(found: list[Checkpoint]) -> Frame:
    """Checkpoints, as a frame."""
    rows = [[each.name, each.cell, each.created, each.files, list(each.left_out)] for each in found]
    return Frame({"type": "checkpoints", "rows": rows}, b"")


def read_checkpoints(answer: list[Frame]) -> list[Checkpoint]:
    """What a frame says of checkpoints. Raises `ProtocolError`."""
    found: list[Checkpoint] = []
    rows: Any = answer[-1].header.get("rows") if answer else None
    for row in cast("list[Any]", rows) if isinstance(rows, list) else [None]:
        match row:
            case [str(name), int(cell), int() | float() as created, bool(files), [*left_out]]:
                paths = tuple(legible(path) for path in left_out if isinstance(path, str))
                found.append(Checkpoint(name, cell, created, files, paths))
            case _:
                raise ProtocolError("what was answered is no list of checkpoints")
    return found


def _count(header: dict[str, Any], field: str) -> int:
    value = header.get(field)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ProtocolError(f"the field {field} is no whole number")
    return value


def _seconds(header: dict[str, Any], field: str) -> float:
    value = header.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ProtocolError(f"the field {field} is no number")
    return float(value)
