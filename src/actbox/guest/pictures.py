"""Images made smaller, by Pillow: a copy of each that a cell displays and that is too large for models.

A decoder is what attacks are made for, so the host decodes nothing of a session's unless its caller has decided so.
Here a decoder can do no more than the cell itself. The copy goes beside the image, as a format of its own, and the host
gives it on as it came. Where the host was asked to decode, it is by the same functions (`actbox.pictures`).
"""

# Pillow is whatever is installed, and need not be.
from __future__ import annotations

import importlib
import io
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

MIME = "application/vnd.actbox.smaller-image"
# What `OutputPolicy` allows unless it is told otherwise.
SIDE = 1568
BYTES = 1 << 20
# What a decoder may be asked for: four bytes each, 128 MiB of memory.
MAX_PIXELS = 32 << 20
FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/gif": "GIF", "image/webp": "WEBP"}
# Segments of a JPEG's header looked at; cameras write a few dozen.
_MAX_SEGMENTS = 1000
_QUALITIES = (85, 60, 30)


class NotSmaller(Exception):
    """An image that stays as it is; the message says why."""


def copy_of(parts: Iterable[tuple[str, str, bytes]]) -> bytes | None:
    """A copy of a display's image that models take; None if it is small enough, or cannot be made smaller here.

    Args:
        parts: the display's formats: MIME type, kind, content.
    """
    found = {mime: data for mime, _, data in parts if mime in FORMATS}
    mime = next((mime for mime in FORMATS if mime in found), None)
    if mime is None or MIME in (name for name, _, _ in parts):
        return None
    data = found[mime]
    size = size_of(data, mime)
    if size is None or (max(size) <= SIDE and len(data) <= BYTES):
        return None
    try:
        return smaller(data, mime, SIDE, BYTES, size)[0]
    except Exception:  # noqa: BLE001 - no Pillow, or no image; the host says that it is left out
        return None


def size_of(data: bytes, mime_type: str) -> tuple[int, int] | None:
    """Width and height in pixels as the header of a PNG, JPEG, GIF or WebP has them; None if it has none."""
    try:
        match mime_type:
            case "image/png":
                size = struct.unpack_from(">II", data, 16) if data[12:16] == b"IHDR" else None
            case "image/gif":
                size = struct.unpack_from("<HH", data, 6)
            case "image/jpeg":
                size = _jpeg_size(data)
            case "image/webp":
                size = _webp_size(data)
            case _:
                size = None
    except (struct.error, IndexError):
        return None
    return None if size is None or 0 in size else (size[0], size[1])


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if data[at] != 0xFF:  # noqa: PLR2004 - what every marker begins with
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # noqa: PLR2004 - a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # noqa: PLR2004 - the frame headers
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _open(data: bytes, mime: str) -> Any:
    """An image of which the header alone has been read. Raises ImportError without Pillow."""
    return importlib.import_module("PIL.Image").open(io.BytesIO(data), formats=[FORMATS[mime]])


def smaller(data: bytes, mime: str, side: int, limit: int, size: tuple[int, int]) -> tuple[bytes, str]:
    """The image with its longer side at most `side` pixels, in at most `limit` bytes: as (bytes, MIME type).

    Of an animation it is the first picture. It is a PNG, or a JPEG if that is what it was or if a PNG is too large.

    Raises:
        NotSmaller: the image has too many pixels, not the `size` that its header tells, or cannot be made small enough.
        ImportError: Pillow is not installed.
        Exception: it cannot be decoded; decoders fail in every way.
    """
    if size[0] * size[1] > MAX_PIXELS:
        raise NotSmaller(f"more than {MAX_PIXELS:,} pixels are not decoded")
    with _open(data, mime) as image:
        # Nothing is decoded yet. Pillow would only warn of a size beyond its own bound, and to make that warning
        # an error would change the filters of every thread.
        if image.size != size:
            raise NotSmaller("its header contradicts itself")
        image.draft(None, (side, side))
        picture = _plain(image)
        picture.thumbnail((side, side))
        return _encoded(picture, mime, limit)


def _plain(image: Any) -> Any:
    """The picture in eight bits a channel."""
    if image.mode.startswith("I;16"):
        # Of sixteen bits Pillow's conversion would cut off the upper ones, and nearly all would be white.
        return image.convert("I").point(_upper).convert("L").convert("RGB")
    alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    return image.convert("RGBA" if alpha else "RGB")


def _upper(value: Any) -> Any:
    """The upper eight of sixteen bits, in the form in which Pillow takes such a function apart."""
    return value * (1 / 256)


def _encoded(picture: Any, mime: str, limit: int) -> tuple[bytes, str]:
    if mime != "image/jpeg":
        out = io.BytesIO()
        picture.save(out, "PNG")
        if out.tell() <= limit:
            return out.getvalue(), "image/png"
    flat = picture.convert("RGB")
    for quality in _QUALITIES:
        out = io.BytesIO()
        flat.save(out, "JPEG", quality=quality)
        if out.tell() <= limit:
            return out.getvalue(), "image/jpeg"
    raise NotSmaller("it is too large even when it is made smaller")
