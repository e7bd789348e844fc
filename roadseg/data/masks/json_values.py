"""Parse JSON mask files under limits, and check single values in them."""

from __future__ import annotations

import json
from typing import Any

from roadseg.errors import ImageError
from roadseg.images.decode import MAX_SIDE_PX, Limits


def parse_json(data: bytes, expected: str) -> Any:
    """Raises ImageError for invalid JSON, for too deep nesting, and for NaN and Infinity."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" or data[:3] == b"\xff\xd8\xff":
        raise ImageError("the content is an image", expected=expected, todo="set `masks` in data.labels to ids")
    try:
        return json.loads(data, parse_constant=refuse_constant)
    except RecursionError:
        raise ImageError("the JSON is nested too deep", expected=expected) from None
    except ValueError as e:  # also for bytes that are not UTF-8
        reason = f"{e.msg}, line {e.lineno}" if isinstance(e, json.JSONDecodeError) else str(e)[:80]
        raise ImageError(f"not valid JSON ({reason})", expected=expected, todo="fetch or export it again") from None


def refuse_constant(text: str) -> float:
    """For json's parse_constant: refuses NaN and Infinity."""
    raise ValueError(f"{text} is not a number")


def canvas_size(width: Any, height: Any, limits: Limits) -> tuple[int, int]:
    """Check the size in pixels of the mask that a JSON describes. Raises ImageError before an array is allocated."""
    if (
        type(width) is not int
        or type(height) is not int
        or not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX)
    ):
        size = f"{describe_value(width)} x {describe_value(height)}"
        raise ImageError(f"the size is {size}", expected=f"whole numbers of pixels, 1 to {MAX_SIDE_PX:,}")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"the JSON says {width} x {height} = {width * height:,} pixels", expected=f"at most {limits.max_pixels:,}"
        )
    return width, height


def describe_value(value: Any) -> str:
    """For error messages: a short number itself, the kind of any other value."""
    if type(value) in (int, float) and abs(value) < 1e15:
        return str(value)
    kinds = {type(None): "null", str: "a string", list: "a list", dict: "a mapping", bool: "true or false"}
    return kinds.get(type(value), "a huge number")


def printable(text: str) -> str:
    """A string from a JSON file for error messages: at most 60 characters, escaped if not printable."""
    return (text if text.isprintable() else ascii(text)[1:-1])[:60]  # false for lone surrogates too


def is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and -MAX_SIDE_PX <= value <= MAX_SIDE_PX  # false for NaN too
