"""How large an image is, by its header, and how it is made smaller, by Pillow where that was asked for.

The header is read here, a few bytes of it; nothing is decoded unless `reduced` is called. A decoder is what attacks are
made for: whoever calls it has decided so, and it is given no more pixels than it can bear.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image as Pillow

__all__ = ["MAX_PIXELS", "NotReduced", "reduced", "size_of"]

# What a decoder may be asked for: four bytes each, 128 MiB of memory.
MAX_PIXELS = 32 << 20
_FORMATS = {"image/png": "PNG", "image/jpeg": "JPEG", "image/gif": "GIF", "image/webp": "WEBP"}
# Segments of a JPEG's header looked at; cameras write a few dozen.
_MAX_SEGMENTS = 1000
_QUALITIES = (85, 60, 30)


class NotReduced(Exception):
    """An image that stays as it is; the message says why, in words that fit behind "left out: "."""


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


def reduced(data: bytes, mime_type: str, side: int, limit: int) -> tuple[bytes, str]:
    """The image with its longer side at most `side` pixels, in at most `limit` bytes: as (bytes, MIME type).

    Of an animation it is the first picture. It is a PNG, or a JPEG if that is what it was or if a PNG is too large.

    Raises:
        NotReduced: Pillow is not installed, the image has too many pixels, or it cannot be decoded.
    """
    size = size_of(data, mime_type)
    if size is None or mime_type not in _FORMATS:
        raise NotReduced("its header tells no size")
    if size[0] * size[1] > MAX_PIXELS:
        raise NotReduced(f"more than {MAX_PIXELS:,} pixels are not decoded")
    try:
        from PIL import Image as Pillow  # noqa: PLC0415 - an extra, and slow to import
    except ImportError:
        raise NotReduced("to make it smaller takes Pillow; install actbox[images]") from None
    try:
        with Pillow.open(io.BytesIO(data), formats=[_FORMATS[mime_type]]) as image:
            # Nothing is decoded yet. Pillow would only warn of a size beyond its own bound, and to make that warning
            # an error would change the filters of every thread; what has the size of its header is within ours.
            if image.size != size:
                raise NotReduced("its header contradicts itself")
            image.draft(None, (side, side))
            picture = image.convert("RGBA" if _has_alpha(image) else "RGB")
            picture.thumbnail((side, side))
            return _encoded(picture, mime_type, limit)
    except NotReduced:
        raise
    except Exception as exc:  # decoders fail in every way
        raise NotReduced(f"it cannot be decoded ({type(exc).__name__})") from exc


def _has_alpha(image: Pillow.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _encoded(picture: Pillow.Image, mime_type: str, limit: int) -> tuple[bytes, str]:
    if mime_type != "image/jpeg":
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
    raise NotReduced("it is too large even when it is made smaller")
