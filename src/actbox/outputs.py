"""What a cell put out, as values: one output, one image, and the text in them. No I/O, and nothing is decoded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actbox.events import MimeData

__all__ = ["Image", "Output", "image_types", "plain_text", "strip_ansi"]

# CSI, OSC and the other escape sequences of ECMA-48, and what is left of broken ones.
_ANSI = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?|\x1b[ -/]*[0-~]?|[\x80-\x9f]"
)


@dataclass(frozen=True, slots=True)
class Image:
    """An image that a cell displayed: its bytes as the guest sent them, never decoded, and where they were saved.

    `path` is None when the client has no image folder, or when the bytes are not what `mime_type` claims.
    """

    data: bytes
    mime_type: str
    path: Path | None = None

    def save(self, path: str | Path) -> None:
        """Write the bytes to a file of the caller's choice."""
        Path(path).write_bytes(self.data)


@dataclass(frozen=True, slots=True)
class Output:
    """One output, as in a notebook. `kind` is the nbformat output type.

    For a stream `name` and `text` are set; for a display or a result `data` and `metadata`; for an error `name`
    (exception), `text` (its message) and `trace`.
    """

    kind: Literal["stream", "display_data", "execute_result", "error"]
    name: str | None = None
    text: str = ""
    data: MimeData = field(default_factory=dict[str, Any])
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    display_id: str | None = None
    execution_count: int | None = None
    trace: str | None = None


def image_types(data: MimeData) -> list[tuple[str, bytes]]:
    """The images in a bundle, at most one: the first of PNG, JPEG, GIF, WebP, SVG."""
    for mime in ("image/png", "image/jpeg", "image/gif", "image/webp", "image/svg+xml"):
        value = data.get(mime)
        if isinstance(value, str):
            value = value.encode()
        if isinstance(value, bytes) and value:
            return [(mime, value)]
    return []


def strip_ansi(text: str) -> str:
    """Text without colours and other escape sequences."""
    return _ANSI.sub("", text)


def plain_text(data: MimeData) -> str:
    """A display's text for those who show nothing else; empty if it has none."""
    text = data.get("text/plain")
    return text if isinstance(text, str) else ""
