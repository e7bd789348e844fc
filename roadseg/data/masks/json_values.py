"""Reading masks that are written as JSON: parsing under limits, and checks of single values."""

from __future__ import annotations

import json
from typing import Any

from roadseg.errors import ImageError
from roadseg.images.decode import MAX_SIDE_PX, Limits


def parse_json(data: bytes, expected: str) -> Any:
    """The value. Raises ImageError for what is no JSON, is nested too deep, or says NaN or Infinity."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" or data[:3] == b"\xff\xd8\xff":
        raise ImageError("the content is a picture", expected=expected, todo="set `masks` in data.labels to ids")
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise ImageError("the JSON is nested too deep", expected=expected) from None
    except ValueError as e:  # among them bytes that are no UTF-8
        said = f"{e.msg}, line {e.lineno}" if isinstance(e, json.JSONDecodeError) else str(e)[:80]
        raise ImageError(f"is no JSON ({said})", expected=expected, todo="fetch or export it again") from None


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def canvas_size(width: Any, height: Any, limits: Limits) -> tuple[int, int]:
    """(width, height) in pixels of the mask that a JSON describes. Raises ImageError, before any is made."""
    if (
        type(width) is not int
        or type(height) is not int
        or not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX)
    ):
        said = f"{kind_of(width)} x {kind_of(height)}"
        raise ImageError(f"the size is {said}", expected=f"whole numbers of pixels, 1 to {MAX_SIDE_PX:,}")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the JSON says {width} x {height} = {width * height:,} pixels", expected=f"at most {limits.max_pixels:,}"
        )
    return width, height


def kind_of(value: Any) -> str:
    """A value for an error's text: a number as it is, if short, of others the kind."""
    if type(value) in (int, float) and abs(value) < 1e15:
        return str(value)
    kinds = {type(None): "nothing", str: "a text", list: "a list", dict: "a mapping", bool: "true or false"}
    return kinds.get(type(value), "a huge number")


def shown(text: str) -> str:
    """A name out of a JSON as a message may hold it: of at most 60 characters, each of which can be printed."""
    return (text if text.isprintable() else ascii(text)[1:-1])[:60]  # false for lone surrogates too


def is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_SIDE_PX <= value <= MAX_SIDE_PX  # false for NaN too
