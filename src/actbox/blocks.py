"""Outputs as a model should get them: text within a budget, cut in the middle, and images within bounds.

All text of the outputs, freed of what only a terminal or a browser understands, is one document (`_Document`). Each
output keeps the head and the tail of its part, and all of them together keep the head and the tail of what is left. A
line stands where something is missing. It says from which character to which; if the document could be put where the
session can read it, it says where.
"""

from __future__ import annotations

import base64
import logging
import re
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from actbox.errors import InvalidArgument
from actbox.files import looks_like
from actbox.outputs import Output, image_types
from actbox.pictures import SMALLER, NotReduced, reduced, size_of
from actbox.readable import is_placeholder, plain, text_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["Block", "ImageBlock", "OutputPolicy", "TextBlock", "make_blocks", "to_anthropic", "to_openai"]

logger = logging.getLogger(__name__)

# What models take.
_IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
# What a browser runs, and may show nothing: plotly sends its library like this.
_SILENT = {"text/html", "application/javascript"}
# Of more than this in one output nobody reads the rest, and more than that in all is not kept in a file.
_MAX_TEXT = 2 << 20
_MAX_DOCUMENT = 8 << 20
_SMALLEST = 100
_WHOLE = 2000
# What a line in the place of something counts, or so.
_NOTE = 160
# Characters by which a cut may move to fall between two lines.
_TO_LINE_END = 200
_MAX_NAMES = 500


class TextBlock(TypedDict):
    """Text."""

    type: Literal["text"]
    text: str


class ImageBlock(TypedDict):
    """An image: PNG, JPEG, GIF or WebP, as base64."""

    type: Literal["image"]
    data: str
    mimeType: str


Block = TextBlock | ImageBlock
"""One part of a message, in the shape of the Model Context Protocol's content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPolicy:
    """How much of a result a model gets. Text is counted in characters; four of English are a token or so.

    Attributes:
        total: characters of all text together, up to a few lines that say what is missing. Default 24 000.
        stream: of what was printed between two displays. Default 12 000.
        error: of a traceback. Default 8000.
        display: of any one display or result. Default 6000.
        formats: the same for displays that are shown by a certain MIME type, such as "text/markdown".
        images: how many images; later ones are named. Default 4.
        image_bytes: of one image, before it is base64. Default 1 MiB.
        image_side: pixels of an image's longer side. Default 1568: larger ones providers make smaller
            themselves. Of an image that is larger than these two by default the session itself makes a smaller copy, if
            it has Pillow (matplotlib brings it), and the model gets that.
        downscale: whether Pillow (`actbox[images]`) may decode an image on the host to make it smaller, where there is
            no copy that is small enough. Off, it is left out, and a line says so. Image decoders are attacked with
            images; this one would run in the host's process.
        spill: whether text that is left out is kept in a file that the session can read. Default True.

    Budgets are 0, for nothing but a line that names the output, or at least 100.

    Raises:
        InvalidArgument: a number is negative or no whole number, or a budget too small.
    """

    total: int = 24_000
    stream: int = 12_000
    error: int = 8_000
    display: int = 6_000
    formats: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    images: int = 4
    image_bytes: int = 1 << 20
    image_side: int = 1568
    downscale: bool = False
    spill: bool = True

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "formats":
                for mime, budget in self.formats.items():
                    _check(f"formats[{mime!r}]", budget, _SMALLEST)
            elif entry.name not in ("downscale", "spill"):
                _check(entry.name, value, 1 if entry.name.startswith("image") else _SMALLEST)


def _check(name: str, value: object, least: int) -> None:
    if type(value) is not int or not (value == 0 or least <= value):
        raise InvalidArgument(f"policy.{name}", value, f"pass 0, or a whole number of at least {least}")


_DEFAULT = OutputPolicy()


def to_anthropic(blocks: Iterable[Block]) -> list[dict[str, Any]]:
    """Blocks as the `content` of a message or a `tool_result` of Anthropic's Messages API."""
    return [
        dict(block)
        if block["type"] == "text"
        else {
            "type": "image",
            "source": {"type": "base64", "media_type": block["mimeType"], "data": block["data"]},
        }
        for block in blocks
    ]


def to_openai(blocks: Iterable[Block], *, responses: bool = False) -> list[dict[str, Any]]:
    """Blocks as the `content` of a user's message of OpenAI's Chat Completions API; with `responses` of Responses.

    In Chat Completions a tool's message holds text alone: put images into a user's message behind it.
    """
    made: list[dict[str, Any]] = []
    for block in blocks:
        if block["type"] == "text":
            made.append({"type": "input_text" if responses else "text", "text": block["text"]})
            continue
        url = f"data:{block['mimeType']};base64,{block['data']}"
        made.append(
            {"type": "input_image", "image_url": url} if responses else {"type": "image_url", "image_url": {"url": url}}
        )
    return made


def make_blocks(
    outputs: Sequence[Output],
    policy: OutputPolicy | None = None,
    *,
    restarted: bool = False,
    rolled_back_to: int | None = None,
    ending: str | None = None,
    omitted_media: int = 0,
    keep_text: Callable[[str], str | None] | None = None,
) -> list[Block]:
    """See `ExecutionResult.for_model`. `keep_text` puts a text where the session can read it, and says where."""
    policy = policy or _DEFAULT
    document = _Document(policy)
    if restarted:
        document.say("the kernel before this cell had died: it began without earlier variables")
    if rolled_back_to is not None:
        document.say(
            f"the kernel before this cell had died: it began with the variables as after cell {rolled_back_to}"
        )
    told: set[str] = set()
    for printed, run in groupby(outputs, lambda output: output.kind == "stream"):
        if printed:
            document.show(plain("".join(output.text for output in run)), policy.stream)
            continue
        for output in run:
            if output.kind == "error":
                told.add(f"{output.name}: {output.text}")
                document.show(plain(output.trace or f"{output.name}: {output.text}"), policy.error)
            else:
                document.display(output.data)
    if omitted_media:
        document.say(f"richer formats of {omitted_media} displays were left out for their size")
    if ending is not None and ending not in told:
        document.say(plain(ending))
    return document.blocks(keep_text if policy.spill else None)


# -- the document ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Kept:
    """Characters of the document that are kept, from `begin` to before `end`."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class _Picture:
    """An image that stands before the character `at` of the document."""

    at: int
    block: ImageBlock


class _Document:
    """The outputs so far.

    State: `_parts`, all text, of `_length` characters; `_items`, what of it is kept, and the images, in order;
    `_images`, how many.
    """

    def __init__(self, policy: OutputPolicy) -> None:
        self._policy = policy
        self._parts: list[str] = []
        self._length = 0
        self._items: list[_Kept | _Picture] = []
        self._images = 0

    def show(self, text: str, budget: int) -> None:
        """Append a text, which begins a line of its own, and keep so much of it."""
        text = _shortened(text)
        if not text.strip():
            return
        text = text if text.endswith("\n") else f"{text}\n"
        begin, length = self._length, len(text)
        self._parts.append(text)
        self._length += length
        if length <= budget + 1:  # with the line end that may be ours
            self._items.append(_Kept(begin, self._length))
        elif budget:
            head = _line_end(text, 0, budget // 2)
            tail = _line_start(text, length - budget + budget // 2, length)
            self._items += [_Kept(begin, begin + head), _Kept(begin + tail, self._length)]

    def say(self, line: str) -> None:
        """Append a line of our own, kept whole."""
        self.show(f"[{line}]", _WHOLE)

    def display(self, data: Mapping[str, Any]) -> None:
        """Append a display: its image, if it has one, and the text that tells most."""
        image = next(iter(image_types(data)), None)
        shown = image is not None and self._picture(*image, data.get(SMALLER))
        found = text_of(data)
        if found is not None:
            mime, text = found
            if not (shown and is_placeholder(text)):
                self.show(text, self._policy.formats.get(mime, self._policy.display))
        elif image is None and not data.keys() <= _SILENT:
            self.say(f"{', '.join(sorted(map(plain, data)))[:_MAX_NAMES]}: left out, there is no text in it")

    def _picture(self, mime: str, data: bytes, smaller: object) -> bool:
        """Take in an image, or the session's smaller copy of it, or say why not; returns whether it was."""
        what = f"{mime}, {len(data):,} bytes"
        try:
            if mime not in _IMAGES:
                raise NotReduced("models take no such images; display a PNG")
            if not looks_like(data, mime) or (size := size_of(data, mime)) is None:
                raise NotReduced("it is not what it claims to be")
            what = f"{mime}, {size[0]}x{size[1]} pixels, {len(data):,} bytes"
            if self._images >= self._policy.images:
                raise NotReduced(f"no more than {self._policy.images} are shown")
            if not self._fits(size, data):
                data, mime = self._small_enough(data, mime, smaller)
        except NotReduced as exc:
            self.say(f"{what}: left out, {exc}")
            return False
        self._images += 1
        block = ImageBlock(type="image", data=base64.b64encode(data).decode("ascii"), mimeType=mime)
        self._items.append(_Picture(self._length, block))
        return True

    def _fits(self, size: tuple[int, int], data: bytes) -> bool:
        return max(size) <= self._policy.image_side and len(data) <= self._policy.image_bytes

    def _small_enough(self, data: bytes, mime: str, smaller: object) -> tuple[bytes, str]:
        """A large image within the bounds, as (bytes, MIME type). Of the copy, too, no more than the header is read."""
        if isinstance(smaller, bytes):
            for kind in ("image/png", "image/jpeg"):
                size = size_of(smaller, kind) if looks_like(smaller, kind) else None
                if size is not None and self._fits(size, smaller):
                    return smaller, kind
        if self._policy.downscale:
            return reduced(data, mime, self._policy.image_side, self._policy.image_bytes)
        side, most = self._policy.image_side, self._policy.image_bytes
        raise NotReduced(f"it is more than {side} pixels a side or {most:,} bytes; display it smaller")

    def blocks(self, keep_text: Callable[[str], str | None] | None) -> list[Block]:
        """What the model gets."""
        text = "".join(self._parts)
        items = self._within_total(text)
        kept = sum(item.end - item.begin for item in items if isinstance(item, _Kept))
        place = _put(text, keep_text) if kept < len(text) and keep_text is not None else None
        made: list[Block] = []
        pieces: list[str] = []
        at = 0
        for item in (*items, _Kept(len(text), len(text))):
            begin = item.begin if isinstance(item, _Kept) else item.at
            if begin > at:
                pieces.append(_note(at, begin, len(text), place))
                at = begin
            if isinstance(item, _Kept):
                pieces.append(text[item.begin : item.end])
                at = item.end
            else:
                _add_text(made, pieces)
                made.append(item.block)
        _add_text(made, pieces)
        return made or [TextBlock(type="text", text="[no output]")]

    def _within_total(self, text: str) -> list[_Kept | _Picture]:
        """The items, without the middle of the kept text if that, with the notes between, is more than the total."""
        costs: list[int] = []
        at = 0
        for item in self._items:
            gap = isinstance(item, _Kept) and item.begin > at
            costs.append(item.end - item.begin + _NOTE * gap if isinstance(item, _Kept) else 0)
            at = item.end if isinstance(item, _Kept) else at
        total = sum(costs)
        if total <= self._policy.total:
            return self._items
        head = self._policy.total // 2
        tail = total - (self._policy.total - head)
        items: list[_Kept | _Picture] = []
        behind = 0
        for item, cost in zip(self._items, costs, strict=True):
            behind += cost
            if isinstance(item, _Picture) or behind <= head or behind - cost >= tail:
                items.append(item)
                continue
            length = item.end - item.begin
            until = head - (behind - length)
            since = behind - tail
            if until > 0:
                items.append(_Kept(item.begin, _line_end(text, item.begin, item.begin + until)))
            if since > 0:
                items.append(_Kept(_line_start(text, item.end - min(since, length), item.end), item.end))
        return items


def _shortened(text: str) -> str:
    """A text of which nobody reads all, without its middle."""
    if len(text) <= _MAX_TEXT:
        return text
    half = _MAX_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


def _line_end(text: str, begin: int, end: int) -> int:
    """`end`, or where the last line before it ends, if that is near."""
    found = text.rfind("\n", max(begin, end - _TO_LINE_END), end)
    return end if found < 0 else found + 1


def _line_start(text: str, begin: int, end: int) -> int:
    """`begin`, or where the next line begins, if that is near."""
    found = text.find("\n", begin, min(end - 1, begin + _TO_LINE_END))
    return begin if found < 0 else found + 1


def _put(text: str, keep_text: Callable[[str], str | None]) -> str | None:
    if len(text) > _MAX_DOCUMENT:
        return None
    try:
        return keep_text(text)
    except OSError as exc:
        # The caller's disk: what fits the budget is there all the same.
        logger.warning("text that a model does not get was not kept: %s", exc)
        return None


def _note(begin: int, end: int, length: int, place: str | None) -> str:
    where = f": [{begin}:{end}] of the {length:,} in {place}" if place else ""
    return f"\n[... {end - begin:,} characters left out{where} ...]\n"


def _add_text(made: list[Block], pieces: list[str]) -> None:
    """Make one block of the pieces, if there is anything in them."""
    text = re.sub(r"\n\n(\[\.\.\. )", r"\n\1", "".join(pieces)).strip("\n").rstrip()
    pieces.clear()
    if text:
        made.append(TextBlock(type="text", text=text))
