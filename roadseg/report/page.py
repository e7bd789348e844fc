"""Shared by all reports: templates, number formatting and embedded pictures.

A page is self-contained, runs no script and blocks all loading by its content security policy (base.html). All
text is escaped. The same input gives the same bytes: no time, host name or random id goes into a page.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from roadseg.errors import UsageError
from roadseg.images.decode import encode_jpeg


def fill(template: Path, **values: Any) -> str:
    """Render a template that extends base.html; the text can be encoded as UTF-8."""
    text = _environment(template.parent).get_template(template.name).render(**values)
    # A file name may hold undecodable bytes (lone surrogates), which UTF-8 can't encode.
    return text.encode("utf-8", "replace").decode()


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "points": points, "data_uri": data_uri, "soft": soft}
    return environment


def picture(image: np.ndarray, max_width: int = 640, quality: int = 85) -> bytes:
    """uint8 [H, W, 3] RGB as JPEG, shrunk to `max_width` pixels if wider; the same bytes for the same image."""
    height, width = image.shape[:2]
    if width > max_width:
        size = (max_width, max(1, round(height * max_width / width)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return encode_jpeg(image, quality)


def stripes(height: int, width: int, dark: int = 14, light: int = 74) -> np.ndarray:
    """uint8 [H, W, 1]: diagonal stripes that mark void, wide enough to stay visible when a large image is shrunk."""
    rows, columns = np.ogrid[:height, :width]
    period = max(6, width // 48)
    return np.where((rows + columns) % period < period // 3, light, dark).astype(np.uint8)[..., None]


def percent(value: object, digits: int = 1) -> str:
    """0..1 as a percentage, or a dash for None and non-finite values."""
    number = finite(value)
    return "–" if number is None else f"{100 * number:.{digits}f}%"


def points(value: object) -> str:
    """A difference of scores in 0..1 with its sign, in percentage points."""
    number = finite(value)
    return "–" if number is None else f"{100 * number:+.2f}".replace("-", "−")


def soft(text: str) -> Markup:
    """Allow line breaks in a path or setting after /, _, = and a dot between words."""
    return Markup("<wbr>").join(re.split(r"(?<=[/_=])(?=.)|(?<=[a-z]\.)(?=[a-z])", text))


def data_uri(picture: bytes) -> Markup:
    """Raises UsageError for anything but JPEG and PNG."""
    kind = "jpeg" if picture[:3] == b"\xff\xd8\xff" else "png" if picture[:8] == b"\x89PNG\r\n\x1a\n" else None
    if kind is None:
        raise UsageError(f"a picture for the report that begins with {picture[:8]!r}", expected="JPEG or PNG bytes")
    return Markup(f"data:image/{kind};base64,{base64.b64encode(picture).decode()}")


def finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def count(value: object) -> str:
    """1234 as 1,234; a million and more with three digits and M or G."""
    number = finite(value)
    if number is None:
        return "–"
    for limit, unit in ((1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:,.0f}"


def css_color(rgb: Sequence[int] | None) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(min(255, max(0, int(v))) for v in rgb)) if rgb else "#8a8f98"
