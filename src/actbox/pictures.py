"""How large an image is, by its header, and how it is made smaller, by Pillow where that was asked for.

Of the header a few bytes are read; nothing is decoded unless `reduced` is called. A decoder is what attacks are made
for: whoever calls it has decided so, and it is given no more pixels than it can bear. Sessions do the same, by the same
functions, for all their large images (`guest/pictures.py`).
"""

from __future__ import annotations

from actbox.guest import pictures

__all__ = ["MAX_PIXELS", "SMALLER", "NotReduced", "reduced", "size_of"]

MAX_PIXELS = pictures.MAX_PIXELS
size_of = pictures.size_of
# The copy of a large image that a session has made: PNG or JPEG, and as little trusted as the image.
SMALLER = pictures.MIME


class NotReduced(Exception):
    """An image that stays as it is; the message says why, in words that fit behind "left out: "."""


def reduced(data: bytes, mime_type: str, side: int, limit: int) -> tuple[bytes, str]:
    """The image with its longer side at most `side` pixels, in at most `limit` bytes: as (bytes, MIME type).

    Of an animation it is the first picture. It is a PNG, or a JPEG if that is what it was or if a PNG is too large.

    Raises:
        NotReduced: Pillow is not installed, the image has too many pixels, or it cannot be decoded.
    """
    size = size_of(data, mime_type)
    if size is None:
        raise NotReduced("its header tells no size")
    try:
        return pictures.smaller(data, mime_type, side, limit, size)
    except ImportError:
        raise NotReduced("to make it smaller takes Pillow; install actbox[images]") from None
    except pictures.NotSmaller as exc:
        raise NotReduced(str(exc)) from exc
    except Exception as exc:  # decoders fail in every way
        raise NotReduced(f"it cannot be decoded ({type(exc).__name__})") from exc
