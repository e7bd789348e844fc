"""Open WebP, BMP, TIFF and unusual PNG and JPEG files with Pillow; ImageError is the only error."""

from __future__ import annotations

import io
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from roadseg.errors import ImageError

# Plugins are called directly: Image.open would guess the format and warn about large images that the limits allow.
_PLUGINS: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "png": PngImagePlugin.PngImageFile,
    "jpeg": JpegImagePlugin.JpegImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
}
_SAFE_REASON = re.compile(r"[\w ,.:;()/+-]{1,100}")
_warnings_lock = threading.Lock()
_pillow_log = logging.getLogger("PIL.TiffImagePlugin")  # logs errors besides raising them


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's warnings and log lines, under a lock because warnings.catch_warnings is not thread-safe."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _pillow_log.disabled = True
        try:
            yield
        finally:
            _pillow_log.disabled = False


@contextmanager
def pillow_errors(format_: str) -> Iterator[None]:
    """Turn Pillow's errors into ImageError; its parsers raise nearly anything on malformed bytes."""
    try:
        yield
    except ImageError:
        raise
    except Exception as e:
        raise undecodable(format_, str(e)) from None


def undecodable(format_: str, reason: str) -> ImageError:
    """reason: the decoder's message, kept if it is short and plain text without the address of an object."""
    safe = _SAFE_REASON.fullmatch(reason) and " at 0x" not in reason
    detail = f" ({reason.replace('0x', '')})" if safe else ""
    return ImageError(f"the {format_} can't be decoded{detail}", todo="open it in a viewer; save it again")


def open_with_pillow(data: bytes, format_: str) -> Image.Image:
    """The image with its header read and no pixel decoded. Raises ImageError."""
    with pillow_errors(format_), quiet_pillow():
        return _PLUGINS[format_](io.BytesIO(data))
