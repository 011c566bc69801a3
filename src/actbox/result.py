"""A result is a fold of an execution's events, bounded whatever the guest prints.

Text is kept up to `Limits.output` bytes, its head and its tail; everything else up to `Limits.media`. What was left
out is counted and said.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actbox.blocks import make_blocks
from actbox.events import (
    ClearOutput,
    DisplayData,
    Error,
    Event,
    ExecuteResult,
    KernelRestarted,
    MimeData,
    Stream,
    UpdateDisplayData,
)
from actbox.outputs import Image, Output, image_types, plain_text, strip_ansi

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from actbox.blocks import Block, OutputPolicy

__all__ = [
    "ExecutionResult",
    "Fold",
    "Image",
    "Output",
    "bundle_size",
    "image_types",
    "join_text",
    "plain_text",
    "strip_ansi",
]

_MAX_OUTPUTS = 10_000
# More displays of one name than anybody shows; an update is a short frame, and may not cost the host long.
_MAX_UPDATED = 100
# What one output costs beside its text, so that a million empty ones are not free.
_OVERHEAD = 64
_MERGE_BELOW = 4096


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """The result of a cell that ran to its end, or what had come of one that did not.

    Attributes:
        text: everything printed, and the plain text of what was displayed, in order; None if there is none.
        images: every PNG, JPEG, GIF, WebP and SVG image displayed, in order.
        outputs: everything, every MIME type kept, as in a notebook.
        omitted_bytes: text left out between head and tail; 0 if `text` is whole.
        omitted_media: displays whose rich formats were left out for size.
        restarted: the kernel before this cell had died, so the cell began without the session's earlier state.
        execution_count: the cell's number, as in `In [n]`.
        duration: seconds from the cell's start to its end, seen from the host.
        ending: the message of the exception that the cell ended with; None if it ran to its end, or still runs.
        rolled_back_to: the kernel had died since the cell before, and the session was as it had been after the cell of
            this number when this one began (`recover=True`); None if nothing like that has happened.
    """

    text: str | None
    images: list[Image]
    outputs: list[Output] = field(default_factory=list[Output])
    omitted_bytes: int = 0
    omitted_media: int = 0
    restarted: bool = False
    execution_count: int = 0
    duration: float = 0.0
    ending: str | None = None
    rolled_back_to: int | None = None
    # Keeps a text where the session can read it, and says where that is, inside; None if it cannot be kept.
    _keep_text: Callable[[str], str | None] | None = field(default=None, repr=False, compare=False)

    def for_model(self, policy: OutputPolicy | None = None) -> list[Block]:
        """The result as text and images that fit a model's context; nothing is taken from the result itself.

        The blocks are plain dictionaries, those of the Model Context Protocol's content:
        `{"type": "text", "text": str}` and `{"type": "image", "data": base64 as str, "mimeType": str}`. There is at
        least one, and what is left out is named in its place. See `OutputPolicy` for the bounds, `to_anthropic` and
        `to_openai` for two APIs.

        When text is left out, all of it is written to a file that the session can read, and the text says where. That
        blocks on the disk for a moment: call this in a worker thread where it matters. Never raises for what the guest
        sent, or for a disk that is full.
        """
        return make_blocks(
            self.outputs,
            policy,
            restarted=self.restarted,
            rolled_back_to=self.rolled_back_to,
            ending=self.ending,
            omitted_media=self.omitted_media,
            keep_text=self._keep_text,
        )

    @property
    def truncated(self) -> bool:
        """Whether anything that the cell put out is missing here."""
        return self.omitted_bytes > 0 or self.omitted_media > 0


class Fold:
    """Collects events into a result.

    State: `_head` and `_tail`, the outputs kept (the tail begins once the head is full), with their sizes; what was
    left out; `_clear_next`, set by `clear_output(wait=True)`.
    """

    def __init__(self, output_limit: int, media_limit: int) -> None:
        self._half = output_limit // 2
        self._media_limit = media_limit
        self.restarted = False
        self.rolled_back_to: int | None = None
        self.used = False
        self.error: Error | None = None
        self._reset()

    def _reset(self) -> None:
        self._head: list[Output] = []
        self._head_size = 0
        self._tail: deque[Output] = deque()
        self._tail_size = 0
        self._overflowed = False
        self._omitted_bytes = 0
        self._omitted_media = 0
        self._media_size = 0
        self._clear_next = False

    def add(self, event: Event) -> None:
        """Take in the next event."""
        if isinstance(event, KernelRestarted):
            self.restarted = event.rolled_back_to is None
            self.rolled_back_to = event.rolled_back_to
            return
        self.used = True
        if isinstance(event, ClearOutput):
            self._clear_next = event.wait
            if not event.wait:
                self._reset()
            return
        if isinstance(event, UpdateDisplayData):
            self._update(event)
            return
        if self._clear_next:
            self._reset()
        match event:
            case Error(name, value, trace):
                self.error = event
                output = Output("error", name=name, text=value, trace=trace)
            case Stream(name, text):
                output = Output("stream", name=name, text=text)
            case DisplayData() | ExecuteResult():
                output = self._display(event)
        self._append(output)

    def _append(self, output: Output) -> None:
        if not self._overflowed:
            room = self._half - self._head_size
            if _size(output) <= room and len(self._head) < _MAX_OUTPUTS:
                _push(self._head, output, _MERGE_BELOW)
                self._head_size += _size(output)
                return
            self._overflowed = True
            if output.kind == "stream" and room > 0:
                begin, output = _split(output, room)
                self._head.append(begin)
                self._head_size = self._half
        _push(self._tail, output, _MERGE_BELOW)
        self._tail_size += _size(output)
        self._trim_tail()

    def _trim_tail(self) -> None:
        while self._tail_size > self._half or len(self._tail) > _MAX_OUTPUTS:
            self._drop_first()

    def _drop_first(self) -> None:
        first = self._tail.popleft()
        excess = self._tail_size - self._half
        self._tail_size -= _size(first)
        if first.kind == "stream" and _size(first) > excess > 0 and len(self._tail) < _MAX_OUTPUTS:
            lost, kept = _split(first, excess, up=True)
            self._omitted_bytes += _text_size(lost.text)
            self._tail.appendleft(kept)
            self._tail_size += _size(kept)
            return
        self._omitted_bytes += _text_size(_plain(first))
        self._omitted_media += any(mime != "text/plain" for mime in first.data)

    def _display(self, event: DisplayData | ExecuteResult | UpdateDisplayData) -> Output:
        """A display as an output, with what the media budget still has room for; plain text counts as text."""
        data, metadata = event.data, event.metadata
        cost = _media_cost(data, metadata)
        fits = self._media_size + cost <= self._media_limit
        self._omitted_media += event.left_out > 0 or not fits
        if not fits:
            text = plain_text(data)
            data, metadata = ({"text/plain": text} if text else dict[str, Any]()), dict[str, Any]()
            cost = _media_cost(data, metadata)
        self._media_size += cost
        if isinstance(event, ExecuteResult):
            return Output("execute_result", data=data, metadata=metadata, execution_count=event.execution_count)
        return Output("display_data", data=data, metadata=metadata, display_id=event.display_id)

    def _update(self, event: UpdateDisplayData) -> None:
        if event.display_id is None:
            return
        for outputs in (self._head, self._tail):
            found = [index for index, output in enumerate(outputs) if output.display_id == event.display_id]
            for index in found[-_MAX_UPDATED:]:
                self._media_size -= _media_cost(outputs[index].data, outputs[index].metadata)
                self._replace(outputs, index, self._display(event))
        self._trim_tail()

    def _replace(self, outputs: list[Output] | deque[Output], index: int, new: Output) -> None:
        """Put an updated display in its place, without more text than its half of the budget has room for."""
        old, in_head = outputs[index], outputs is self._head
        room = self._half - (self._head_size if in_head else 0) + _size(old)
        if _size(new) > room:
            self._omitted_bytes += _text_size(_plain(new))
            data = {mime: value for mime, value in new.data.items() if mime != "text/plain"}
            new = Output(new.kind, data=data, metadata=new.metadata, display_id=new.display_id)
        outputs[index] = new
        if in_head:
            self._head_size += _size(new) - _size(old)
        else:
            self._tail_size += _size(new) - _size(old)

    def outputs(self) -> list[Output]:
        """What is kept, with a line in the place of what is not."""
        note = [Output("stream", name="stderr", text=self._note())] if self._omitted_bytes else []
        joined: list[Output] = []
        for output in (*self._head, *note, *self._tail):
            _push(joined, output)
        return joined

    def _note(self) -> str:
        return f"\n... [{self._omitted_bytes} bytes of output left out] ...\n"

    def text(self) -> str | None:
        """All text in order, without blank lines at its ends; None if nothing is left."""
        return join_text(self.outputs()) or None

    def result(
        self,
        *,
        images: list[Image],
        execution_count: int,
        duration: float,
        ending: str | None = None,
        keep_text: Callable[[str], str | None] | None = None,
    ) -> ExecutionResult:
        """The result so far."""
        return ExecutionResult(
            text=self.text(),
            images=images,
            outputs=self.outputs(),
            omitted_bytes=self._omitted_bytes,
            omitted_media=self._omitted_media,
            restarted=self.restarted,
            execution_count=execution_count,
            duration=duration,
            ending=ending,
            rolled_back_to=self.rolled_back_to,
            _keep_text=keep_text,
        )


def join_text(outputs: list[Output]) -> str:
    """The text of outputs as one string: displays stand on lines of their own, errors are left to the exception."""
    pieces: list[str] = []
    for output in outputs:
        if output.kind == "error":
            continue
        text = _plain(output)
        if output.kind != "stream":
            if pieces and not pieces[-1].endswith("\n"):
                pieces.append("\n")
            text += "\n" * bool(text)
        if text:
            pieces.append(text)
    # Leading blanks belong to the first line: tables are aligned by them.
    return "".join(pieces).rstrip().lstrip("\n")


def _push(outputs: list[Output] | deque[Output], output: Output, below: int | None = None) -> None:
    """Append; text joins that of the same stream before it, if that is shorter than `below`.

    The bound keeps the cost of a frame small however many small ones there are.
    """
    last = outputs[-1] if outputs else None
    if (
        last is not None
        and output.kind == last.kind == "stream"
        and output.name == last.name
        and (below is None or len(last.text) < below)
    ):
        outputs[-1] = Output("stream", name=output.name, text=last.text + output.text)
    else:
        outputs.append(output)


def _split(output: Output, size: int, *, up: bool = False) -> tuple[Output, Output]:
    """A stream's text cut after `size` bytes; inside a character the cut goes before it, or with `up` behind it."""
    data = output.text.encode()
    while 0 < size < len(data) and data[size] & 0xC0 == 0x80:  # noqa: PLR2004 - UTF-8's continuation bytes
        size += 1 if up else -1
    return (
        Output("stream", name=output.name, text=data[:size].decode()),
        Output("stream", name=output.name, text=data[size:].decode()),
    )


def _plain(output: Output) -> str:
    if output.kind in ("stream", "error"):
        return output.text
    return plain_text(output.data)


def _media_cost(data: MimeData, metadata: Mapping[str, Any]) -> int:
    """What a display takes of the media budget: all but its plain text, which is counted as text."""
    return bundle_size(data, metadata) - _text_size(plain_text(data))


def _size(output: Output) -> int:
    if output.kind == "stream":
        return _text_size(output.text)
    error = _text_size(output.trace) + _text_size(output.name or "") if output.trace is not None else 0
    return _text_size(_plain(output)) + error + _OVERHEAD


def _text_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def bundle_size(data: MimeData, metadata: Mapping[str, Any]) -> int:
    """The bytes or so of a display: contents, names and metadata."""
    contents = sum(len(mime) + _content_size(value) for mime, value in data.items())
    return contents + (_content_size(metadata) if metadata else 0)


def _content_size(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, bytes):
        return len(value)
    if isinstance(value, str):
        return _text_size(value)
    # Of an empty list the two letters are the least.
    text = repr(value)
    return len(text) + _OVERHEAD * sum(map(text.count, ",[{"))


def event_size(event: Event) -> int:
    """What an event counts where it waits for a reader, in bytes or so."""
    match event:
        case Stream(_, text):
            return len(text)
        case DisplayData() | ExecuteResult() | UpdateDisplayData():
            return 1024 + bundle_size(event.data, event.metadata)
        case Error(_, value, trace):
            return len(value) + len(trace)
        case _:
            return 64
