import cv2
import numpy as np
import pytest

from roadseg.errors import UsageError
from roadseg.report.page import count, css_color, data_uri, fill, percent, picture, points, soft, stripes
from tests.html_page import Page


def test_pictures_are_shrunk_and_the_same_each_time():
    image = np.random.default_rng(0).integers(0, 256, (60, 200, 3), dtype=np.uint8)
    small = picture(image, max_width=50)
    assert small == picture(image.copy(), max_width=50)
    assert cv2.imdecode(np.frombuffer(small, np.uint8), cv2.IMREAD_COLOR).shape == (15, 50, 3)
    red = cv2.imdecode(np.frombuffer(picture(np.full((8, 8, 3), (250, 0, 0), np.uint8)), np.uint8), cv2.IMREAD_COLOR)
    assert red[4, 4, 2] > 200 > 60 > red[4, 4, 0]  # BGR of OpenCV: red stayed red
    assert cv2.imdecode(np.frombuffer(picture(image), np.uint8), cv2.IMREAD_COLOR).shape == image.shape


def test_percent_and_points():
    assert (percent(0.71325), percent(None), percent(float("inf")), percent(True)) == ("71.3%", "–", "–", "–")
    assert (points(0.0031), points(-0.05), points(None)) == ("+0.31", "−5.00", "–")


def test_counts_colours_and_pictures_as_text():
    assert (count(1234), count(3_583_412), count(2.5e9), count(None)) == ("1,234", "3.58 M", "2.5 G", "–")
    assert (css_color((1, 300, -5)), css_color(None)) == ("#01ff00", "#8a8f98")
    with pytest.raises(UsageError, match="JPEG or PNG"):
        data_uri(b"GIF89a")


def test_soft_breaks_escape_what_they_part():
    assert soft("a/<b>_c/") == "a/<wbr>&lt;b&gt;_<wbr>c/"
    assert soft("training.learning_rate=0.002") == "training.<wbr>learning_<wbr>rate=<wbr>0.002"  # no number is broken
    assert soft("") == "" and Page(soft("train/<img src=x onerror=alert(1)>_1.png")).named("img") == []


def test_stripes_are_of_two_values_at_any_size():
    for size in ((8, 8), (300, 2048)):
        hatched = stripes(*size)
        assert hatched.shape == (*size, 1) and set(np.unique(hatched)) == {14, 74}
        assert 0.2 < (hatched == 74).mean() < 0.5


def test_a_page_escapes_and_carries_no_lone_surrogate(tmp_path):
    (tmp_path / "x.html").write_text(
        '{% extends "base.html" %}{% set kind = "data" %}{% block main %}{{ name }}{% endblock %}'
    )
    html = fill(tmp_path / "x.html", title="<b>", name=b"caf\xe9".decode("utf-8", "surrogateescape"))
    page = Page(html)
    assert (
        page.balanced and not page.named("b") and "caf?" in page.text and "Data report" in page.text and html.encode()
    )
