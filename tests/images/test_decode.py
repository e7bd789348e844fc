"""The decoder: a documented result for every unusual file, and nothing but ImageError for any bytes."""

import io
import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import kornia_rs.io
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from roadseg.errors import ImageError
from roadseg.images import formats as image_formats
from roadseg.images.decode import Limits, encode_jpeg, encode_label_png, probe, read_image, read_label, read_photograph
from roadseg.images.formats import mode
from roadseg.labels import CITYSCAPES

RNG = np.random.default_rng(0)
PHOTO = cv2.GaussianBlur(RNG.integers(0, 256, (41, 67, 3), dtype=np.uint8), (9, 9), 0)
IDS = RNG.integers(0, 34, (41, 67), dtype=np.uint8)


def saved(image: Image.Image, format_: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


def photo(format_: str, mode: str = "RGB", **options: object) -> bytes:
    return saved(Image.fromarray(PHOTO).convert(mode), format_, **options)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, color_type: int, raw: bytes, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = [png_chunk(b"IHDR", header), *extra, png_chunk(b"IDAT", zlib.compress(raw)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def on_main_thread(read: Callable[[bytes], np.ndarray], data: bytes) -> np.ndarray:
    return read(data)


def in_a_thread(read: Callable[[bytes], np.ndarray], data: bytes) -> np.ndarray:
    """Other threads decode plain PNGs with OpenCV."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(read, data).result()


def assert_same(pixels: np.ndarray, expected: np.ndarray) -> None:
    assert pixels.dtype == expected.dtype and pixels.flags.writeable and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


LOSSLESS = {
    "png": photo("PNG"),
    "bmp": photo("BMP"),
    "tiff": photo("TIFF"),
    "tiff-lzw": photo("TIFF", compression="tiff_lzw"),
    "tiff-deflate": photo("TIFF", compression="tiff_deflate"),
    "webp": photo("WEBP", lossless=True),
}
LOSSY = {
    "jpeg": photo("JPEG", quality=95),
    "jpeg-progressive": photo("JPEG", quality=95, progressive=True),
    "webp-lossy": photo("WEBP", quality=95),
    "cmyk": photo("JPEG", "CMYK", quality=95),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_give_the_exact_pixels_from_bytes_and_from_a_wrongly_named_file(kind, tmp_path):
    assert_same(read_image(LOSSLESS[kind]), PHOTO)
    (tmp_path / "picture.jpg").write_bytes(LOSSLESS[kind])
    assert_same(read_image(tmp_path / "picture.jpg"), PHOTO)
    assert probe(LOSSLESS[kind]) == (kind.partition("-")[0], 67, 41)


@pytest.mark.parametrize("kind", LOSSY)
def test_lossy_formats_stay_close(kind):
    pixels = read_image(LOSSY[kind])
    assert pixels.shape == PHOTO.shape
    assert np.abs(pixels.astype(int) - PHOTO).mean() < 4
    assert probe(LOSSY[kind])[1:] == (67, 41)


def test_modes_of_photographs():
    grey = np.array(Image.fromarray(PHOTO).convert("L"))
    grey3 = np.repeat(grey[..., None], 3, 2)
    assert_same(read_image(photo("PNG", "L")), grey3)
    assert_same(read_image(photo("TIFF", "L")), grey3)
    with_alpha = np.dstack([grey, IDS])
    assert_same(read_image(saved(Image.fromarray(with_alpha, "LA"), "PNG")), grey3)
    rgba = np.dstack([PHOTO, np.zeros_like(grey)])  # fully transparent, and still there
    for format_ in ("PNG", "TIFF"):
        assert_same(read_image(saved(Image.fromarray(rgba, "RGBA"), format_)), PHOTO)
    bits = Image.fromarray(PHOTO).convert("1")
    assert_same(read_image(saved(bits, "PNG")), np.repeat(np.array(bits)[..., None].astype(np.uint8) * 255, 3, 2))


def test_palette_with_transparency_gives_the_palettes_colors():
    image = Image.fromarray(IDS, "P")
    image.putpalette(CITYSCAPES.palette.tobytes())
    expected = CITYSCAPES.palette[IDS]
    assert_same(read_image(saved(image, "PNG", transparency=bytes(range(0, 255, 8)))), expected)
    assert_same(read_image(saved(image, "BMP")), expected)
    assert_same(read_image(saved(image, "TIFF")), expected)


@pytest.mark.parametrize("extension", [".png", ".tiff"])
def test_sixteen_bits_keep_the_high_byte(extension):
    deep = RNG.integers(0, 65536, (9, 11, 3), dtype=np.uint16)

    def encoded(array: np.ndarray) -> bytes:
        return cv2.imencode(extension, array)[1].tobytes()

    high = (deep >> 8).astype(np.uint8)
    assert_same(read_image(encoded(deep)), high[..., ::-1])
    assert_same(read_image(encoded(deep[..., 0])), np.repeat(high[..., :1], 3, 2))
    assert_same(read_image(encoded(np.dstack([deep, deep[..., :1]]))), high[..., ::-1])


def interlaced(image: np.ndarray) -> bytes:
    """Adam7, as the PNG standard, 8.2, orders it."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = (row for x, y, dx, dy in passes for row in image[y::dy, x::dx])
    color_type = 2 if image.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, color_type, 0, 0, 1)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("run", [on_main_thread, in_a_thread])
def test_plain_pngs_are_the_same_from_both_decoders(run):
    grey = np.array(Image.fromarray(PHOTO).convert("L"))
    for data in (LOSSLESS["png"], interlaced(PHOTO)):
        assert_same(run(read_image, data), PHOTO)
    for data in (saved(Image.fromarray(grey), "PNG"), interlaced(grey)):
        assert_same(run(read_image, data), np.repeat(grey[..., None], 3, 2))
        assert_same(run(read_label, data), grey)
    for data in (encode_label_png(IDS), encode_label_png(IDS, CITYSCAPES.palette), interlaced(IDS)):
        assert_same(run(read_label, data), IDS)
    deep = IDS.astype(np.uint16) * 1000
    assert_same(run(read_label, cv2.imencode(".png", deep)[1].tobytes()), deep)


def test_a_palette_that_is_too_short_for_a_label_does_not_matter():
    raw = b"".join(b"\0" + row.tobytes() for row in IDS)
    data = png(67, 41, 8, 3, raw, png_chunk(b"PLTE", bytes(range(6))))
    assert_same(read_label(data), IDS)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (photo("PNG"), "rgb"),
        (photo("PNG", "RGBA"), "rgba"),
        (photo("PNG", "LA"), "greya"),
        (photo("PNG", "1"), "grey"),
        (encode_label_png(IDS), "grey"),
        (encode_label_png(IDS, CITYSCAPES.palette), "palette"),
        (cv2.imencode(".png", IDS.astype(np.uint16))[1].tobytes(), "grey16"),
        (photo("JPEG"), "rgb"),
        (photo("JPEG", "L"), "grey"),
        (photo("JPEG", "CMYK"), "cmyk"),
        (photo("WEBP"), "rgb"),
        (saved(Image.fromarray(np.dstack([PHOTO, IDS]), "RGBA"), "WEBP", lossless=True), "rgba"),
        (photo("BMP"), "rgb"),
        (photo("BMP", "P"), "palette"),
        (photo("TIFF"), "rgb"),
        (photo("TIFF", "L"), "grey"),
        (photo("TIFF", "P"), "palette"),
        (cv2.imencode(".tiff", IDS.astype(np.uint16))[1].tobytes(), "grey16"),
        (b' {"objects": []}', "json"),
        (b"", ""),
        (b"hello", ""),
        (b"\x89PNG\r\n\x1a\n", ""),
        (b"\xff\xd8\xff", ""),
    ],
)
def test_how_values_are_stored(data, expected):
    assert mode(data) == expected


def test_a_photograph_has_its_format_and_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    found = read_photograph(photo("JPEG", exif=exif))
    assert (found.format, found.orientation, found.pixels.shape) == ("jpeg", 6, (67, 41, 3))
    found = read_photograph(LOSSLESS["webp"])
    assert (found.format, found.orientation) == ("webp", 1)


def test_cmyk_is_inverted_only_for_adobe():
    cyan = saved(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=100)
    assert np.abs(read_image(cyan).astype(int) - (0, 255, 255)).max() <= 2
    at = cyan.find(b"\xff\xee")
    plain = cyan[:at] + cyan[at + 2 + struct.unpack_from(">H", cyan, at + 2)[0] :]
    # The same samples without Adobe's marker mean their complement: full magenta, yellow and black.
    assert np.abs(read_image(plain).astype(int)).max() <= 2


def turned(orientation: int) -> np.ndarray:
    """What has to be stored so that a viewer, applying the tag, shows PHOTO; by the standard's table."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: np.rot90(a, 2),
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),  # shown after 90 degrees clockwise
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    return np.ascontiguousarray(undo[orientation](PHOTO))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_is_applied_to_photographs(format_, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format_ == "WEBP" else {"quality": 100} if format_ == "JPEG" else {}
    data = saved(Image.fromarray(turned(orientation)), format_, exif=exif, **options)
    pixels = read_image(data)
    assert pixels.shape == PHOTO.shape and pixels.flags.c_contiguous
    assert np.abs(pixels.astype(int) - PHOTO).mean() < (3 if format_ == "JPEG" else 1e-9)


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_exif_orientation_is_never_applied_to_labels(format_):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert_same(read_label(saved(Image.fromarray(IDS), format_, exif=exif)), IDS)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "TIFF"])
def test_animations_give_the_first_frame(format_):
    frames = [Image.fromarray(PHOTO), Image.fromarray(255 - PHOTO)]
    options = {"lossless": True} if format_ == "WEBP" else {}
    assert_same(read_image(saved(frames[0], format_, save_all=True, append_images=frames[1:], **options)), PHOTO)


def test_labels_are_ids_as_stored():
    assert_same(read_label(saved(Image.fromarray(IDS), "PNG")), IDS)
    for format_ in ("PNG", "BMP", "TIFF"):
        palette = Image.fromarray(IDS, "P")
        palette.putpalette(CITYSCAPES.palette.tobytes())
        assert_same(read_label(saved(palette, format_)), IDS)
    deep = IDS.astype(np.uint16) * 1000
    for extension in (".png", ".tiff"):
        assert_same(read_label(cv2.imencode(extension, deep)[1].tobytes()), deep)
    bits = Image.fromarray(IDS > 16)
    for format_ in ("PNG", "BMP", "TIFF"):
        assert_same(read_label(saved(bits, format_)), (IDS > 16).astype(np.uint8))


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("color_type", [0, 3])
def test_labels_of_few_bits_are_not_stretched(depth, color_type):
    ids = RNG.integers(0, 1 << depth, (5, 13), dtype=np.uint8)
    padded = np.pad(np.unpackbits(ids[..., None], axis=2)[:, :, -depth:].reshape(5, -1), ((0, 0), (0, -13 * depth % 8)))
    raw = b"".join(b"\0" + np.packbits(row).tobytes() for row in padded)
    palette = [png_chunk(b"PLTE", bytes(range(3 << depth)))] if color_type == 3 else []
    assert_same(read_label(png(13, 5, depth, color_type, raw, *palette)), ids)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (photo("PNG"), "RGB colors"),
        (photo("PNG", "RGBA"), "RGBA colors"),
        (photo("PNG", "LA"), "grey and alpha"),
        (photo("JPEG", "L"), "saved as jpeg"),
        (photo("WEBP", lossless=True), "RGB colors"),
        (photo("TIFF", "F"), "floating-point"),
        (photo("TIFF", "I"), "32-bit integers"),
        (photo("TIFF", "CMYK"), "CMYK"),
    ],
)
def test_masks_without_ids_are_refused(data, says):
    with pytest.raises(ImageError) as e:
        read_label(data)
    assert says in e.value.found


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"not a picture", "something else"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG"),
        (photo("GIF"), "GIF"),
        (photo("TIFF", "F"), "floating point"),
        (b"\x89PNG\r\n\x1a\n", "cut off"),
        (b"\xff\xd8\xff", "cut off"),
    ],
)
def test_other_content_is_refused(data, says, tmp_path):
    with pytest.raises(ImageError) as e:
        read_image(data)
    assert says in e.value.found and e.value.where == ""
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError) as e:
        read_image(tmp_path / "a.png")
    assert says in e.value.found and e.value.where == str(tmp_path / "a.png")


def test_folders_pipes_and_missing_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path, tmp_path / "pipe.png"):
        with pytest.raises(ImageError) as e:
            read_image(path)
        assert e.value.where == str(path)
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "absent.png")


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY])
def test_truncated_anywhere_is_an_error(kind):
    data = {**LOSSLESS, **LOSSY}[kind]
    padding = 3 if kind == "bmp" else 0  # ends the last row; without it all pixels are still there
    for length in {*range(0, len(data) - padding, max(1, len(data) // 150)), len(data) - padding - 1}:
        with pytest.raises(ImageError):
            read_image(data[:length])


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate", "packbits"])
def test_a_tiff_truncated_in_its_first_page_is_an_error(compression):
    """What is cut off behind the first page does not matter: it is not read."""
    one = photo("TIFF", compression=compression)
    two = saved(
        Image.fromarray(PHOTO), "TIFF", compression=compression, save_all=True, append_images=[Image.new("L", (9, 9))]
    )
    for length in range(0, len(one) - 4, 50):
        with pytest.raises(ImageError):
            read_image(two[:length])
    assert_same(read_image(two), PHOTO)


@pytest.mark.parametrize("length", range(0, 9000, 450))
def test_a_truncated_animation_is_an_error(length):
    data = saved(
        Image.fromarray(PHOTO), "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - PHOTO)]
    )
    with pytest.raises(ImageError):
        read_image(data[:length])


@pytest.mark.parametrize("compression", [1, 2])
def test_a_bmp_of_run_lengths_is_refused(compression):
    """Pillow decodes truncated ones without an error."""
    data = bytearray(photo("BMP", "P"))
    data[30:34] = struct.pack("<I", compression)
    with pytest.raises(ImageError):
        read_image(bytes(data))


@pytest.mark.parametrize("kind", ["png", "jpeg", "jpeg-progressive"])
def test_a_large_file_truncated_at_every_kilobyte_is_an_error(kind):
    big = Image.fromarray(cv2.GaussianBlur(RNG.integers(0, 256, (400, 640, 3), dtype=np.uint8), (5, 5), 0))
    options = {"progressive": kind.endswith("progressive")} if kind != "png" else {}
    data = saved(big, kind.partition("-")[0], **options)
    assert len(data) > 20_000
    for length in range(1024, len(data), 1024):
        with pytest.raises(ImageError):
            read_image(data[:length])


@pytest.mark.parametrize("data", [LOSSLESS["png"], photo("PNG", "LA")], ids=["plain", "by Pillow"])
@pytest.mark.parametrize("run", [on_main_thread, in_a_thread])
def test_every_changed_byte_of_a_png_is_detected(run, data):
    def read_changed(_: bytes) -> np.ndarray:
        for at in range(len(data)):
            changed = bytearray(data)
            changed[at] ^= 0x10
            with pytest.raises(ImageError):
                read_image(bytes(changed))
        return PHOTO

    run(read_changed, b"")


def test_a_changed_byte_in_unused_compressed_data_is_detected():
    """Compressed data may end before its chunks do; decoders could stop reading there."""
    raw = b"".join(b"\0" + row.tobytes() for row in PHOTO)
    spare = bytearray(png_chunk(b"IDAT", b"nothing"))
    spare[9] ^= 1
    whole = png(67, 41, 8, 2, raw)
    with pytest.raises(ImageError) as e:
        read_image(whole[:-12] + bytes(spare) + whole[-12:])
    assert "IDAT" in e.value.found


def cut(whole: bytes, lengths: list[int]) -> bytes:
    """A PNG of three chunks with its pixels in chunks of these bytes, and what is left in one more."""
    body, parts = whole[41:-16], list[bytes]()
    for length in lengths:
        parts.append(png_chunk(b"IDAT", body[:length]))
        body = body[length:]
    return whole[:33] + b"".join(parts) + png_chunk(b"IDAT", body) + whole[-12:]


@pytest.mark.parametrize("lengths", [[0, 0], [9] * 40, [9] * 40 + [5] * 8 + [9], [7, 9, 9, 9], [5, 0, 0, 5]])
def test_pixels_in_many_chunks(lengths):
    whole = png(67, 41, 8, 2, b"".join(b"\0" + row.tobytes() for row in PHOTO))
    many = cut(whole, lengths)
    assert_same(read_image(many), PHOTO)
    for end in range(33, len(many) - 1, 21):
        with pytest.raises(ImageError):
            read_image(many[:end])


def test_too_many_chunks_are_refused_also_when_equal(monkeypatch):
    monkeypatch.setattr(image_formats, "MAX_CHUNKS", 50)
    whole = png(67, 41, 8, 2, b"".join(b"\0" + row.tobytes() for row in PHOTO))
    assert_same(read_image(cut(whole, [0] * 47)), PHOTO)  # and a last one of pixels, IHDR, IEND
    for lengths in ([0] * 48, [0] * 9_000, [1, 2] * 25):
        with pytest.raises(ImageError) as e:
            read_image(cut(whole, lengths))
        assert "50" in e.value.found


def test_a_panic_of_the_decoder_is_an_image_error_and_an_interrupt_is_not(monkeypatch):
    class PanicException(BaseException):  # what pyo3 makes of a panic in Rust
        pass

    def raising(error: BaseException) -> Callable[..., np.ndarray]:
        def decode(*_: object) -> np.ndarray:
            raise error

        return decode

    monkeypatch.setattr(kornia_rs.io, "decode_image_png_u8", raising(PanicException("index out of bounds")))
    with pytest.raises(ImageError):
        read_image(LOSSLESS["png"])
    monkeypatch.setattr(kornia_rs.io, "decode_image_png_u8", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        read_image(LOSSLESS["png"])


@pytest.mark.parametrize("kind", ["jpeg", "jpeg-progressive"])
def test_a_truncated_jpeg_with_a_new_end_marker_is_an_error(kind):
    data = photo("JPEG", quality=95, progressive=kind.endswith("progressive"))
    with pytest.raises(ImageError):
        read_image(data[: data.rfind(b"\xff\xda") + 60] + b"\xff\xd9")


def test_a_jpeg_cannot_hide_its_size_behind_a_marker_without_a_length():
    data = photo("JPEG")
    hidden = b"\xff\xd8\xff\x01" + data[2:]
    assert probe(hidden) == ("jpeg", 67, 41)
    with pytest.raises(ImageError) as e:
        read_image(hidden, Limits(max_pixels=2000))
    assert "67 x 41 = 2,747" in e.value.found


def with_entries(data: bytes, before: list[bytes], after: list[bytes]) -> bytes:
    """A TIFF with more entries in its directory, which is moved to the end."""
    start = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, start)[0]
    entries = [*before, *(data[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)), *after]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return data[:4] + struct.pack("<I", len(data)) + data[8:] + directory


@pytest.mark.parametrize("compression", ["raw", "tiff_deflate"])
def test_a_tiff_of_two_sizes_is_decoded_with_the_size_that_was_checked(compression):
    data, limits = photo("TIFF", compression=compression), Limits(max_pixels=10_000)
    large = struct.pack("<HHII", 256, 4, 1, 60_000)  # a second width
    with pytest.raises(ImageError):
        read_image(with_entries(data, [large], []), limits)
    assert_same(read_image(with_entries(data, [], [large]), limits), PHOTO)


def test_a_tiff_of_huge_tiles_is_refused_before_it_is_decoded():
    tiles = [struct.pack("<HHII", tag, 4, 1, 1 << 15) for tag in (322, 323)]
    with pytest.raises(ImageError) as e:
        read_image(with_entries(photo("TIFF"), [], tiles))
    assert "tiles" in e.value.found


def bombs() -> dict[str, bytes]:
    jpeg = bytearray(photo("JPEG"))
    at = jpeg.find(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 50_000, 50_000)
    bmp = bytearray(LOSSLESS["bmp"])
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    tiff = Image.new("1", (9, 9))
    tiff_data = bytearray(saved(tiff, "TIFF"))
    for tag in (256, 257):
        tag_at = tiff_data.find(struct.pack("<HH", tag, 4))
        tag_at = tag_at if tag_at >= 0 else tiff_data.find(struct.pack("<HH", tag, 3))
        tiff_data[tag_at + 2 : tag_at + 12] = struct.pack("<HII", 4, 1, 50_000)
    webp = bytearray(photo("WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (67, 41))]))
    webp[24:30] = (12_000 - 1).to_bytes(3, "little") * 2  # a valid animation of small frames on a large canvas
    return {
        "png": png(50_000, 50_000, 8, 2, bytes(1000)),
        "png-zip": png(50_000, 50_000, 8, 0, bytes(50_000_000)),
        "jpeg": bytes(jpeg),
        "bmp": bytes(bmp),
        "tiff": bytes(tiff_data),
        "webp": bytes(webp),
    }


@pytest.mark.parametrize("kind", bombs())
def test_bombs_are_refused_by_their_header(kind):
    data = bombs()[kind]
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(ImageError) as e:
        read_image(data)
    assert "64,000,000" in e.value.expected
    took_s = time.perf_counter() - begin
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert took_s < 0.1 and peak_bytes < 1_000_000


@pytest.mark.fault
@pytest.mark.parametrize("thread", [False, True])
def test_bombs_take_no_memory(tmp_path, thread):
    """In a process of its own, by its resident memory: decoders in C don't ask Python for theirs."""
    kinds = {**bombs(), "png of no pixels": png(8000, 8000, 8, 2, bytes(1000))}
    for number, data in enumerate(kinds.values()):
        (tmp_path / f"{number}.png").write_bytes(data)
    script = """
import resource, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from roadseg.errors import ImageError
from roadseg.images.decode import read_image, read_label

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)

def refuse(path):
    for read in (read_image, read_label):
        try:
            read(path)
        except ImageError:
            continue
        raise SystemExit(f"{path} was read")

with ThreadPoolExecutor(1) as threads:
    for path in sorted(Path(sys.argv[1]).iterdir()):
        before, begin = most(), time.perf_counter()
        threads.submit(refuse, path).result() if sys.argv[2] == "True" else refuse(path)
        print((most() - before) / 1024, time.perf_counter() - begin)
"""
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path), str(thread)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(lines) == len(kinds)
    for mebibytes, seconds in lines:
        assert mebibytes < 50 and seconds < 0.2  # 0.1 for each of two readers


def test_bombs_in_png_text_and_profiles_are_never_unpacked():
    zeros = zlib.compress(bytes(200_000_000), 9)
    extra = [png_chunk(b"zTXt", b"a\0\0" + zeros), png_chunk(b"iCCP", b"a\0\0" + zeros)]
    raw = b"".join(b"\0" + row.tobytes() for row in PHOTO)
    data = png(67, 41, 8, 2, raw, *extra)
    tracemalloc.start()
    assert_same(read_image(data), PHOTO)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_jpeg_of_a_thousand_scans_is_refused():
    data = photo("JPEG", progressive=True)
    at = data.rfind(b"\xff\xda")
    with pytest.raises(ImageError):
        read_image(data[:at] + data[at:-2] * 1000 + data[-2:])


def test_limits_are_checked_before_reading(tmp_path):
    path = tmp_path / "large.png"
    with open(path, "wb") as f:
        f.truncate(1 << 40)  # sparse
    with pytest.raises(ImageError) as e:
        read_image(path)
    assert "1,099,511,627,776" in e.value.found
    assert_same(read_image(LOSSLESS["png"], Limits(max_pixels=67 * 41)), PHOTO)
    with pytest.raises(ImageError):
        read_image(LOSSLESS["png"], Limits(max_pixels=67 * 41 - 1))
    with pytest.raises(ImageError):
        read_image(LOSSLESS["png"], Limits(max_bytes=100))


def test_too_long_a_side_is_refused():
    data = png(2_000_000, 1, 8, 0, bytes(2_000_001))
    for read in (read_image, read_label):
        with pytest.raises(ImageError) as e:
            read(data)
        assert "2000000 x 1" in e.value.found and "1,000,000" in e.value.expected


def test_encoded_labels_are_read_back_by_us_and_by_others():
    for label in (IDS, np.array([[255]], np.uint8), RNG.integers(0, 256, (3, 500), dtype=np.uint8)):
        for palette in (None, CITYSCAPES.palette):
            data = encode_label_png(label, palette)
            assert_same(read_label(data), label)
            other = Image.open(io.BytesIO(data))
            assert other.mode == ("L" if palette is None else "P")
            np.testing.assert_array_equal(np.array(other), label)
    colours = np.array(Image.open(io.BytesIO(encode_label_png(IDS, CITYSCAPES.palette))).convert("RGB"))
    np.testing.assert_array_equal(colours, CITYSCAPES.palette[IDS])


def test_encoded_jpeg_is_rgb_and_its_quality_counts():
    pixels = np.array(Image.open(io.BytesIO(encode_jpeg(PHOTO, 95))))
    assert np.abs(pixels.astype(int) - PHOTO).mean() < 4
    assert len(encode_jpeg(PHOTO, 30)) < len(encode_jpeg(PHOTO, 95))


def only_image_errors(data: bytes) -> None:
    for read in (read_image, read_label):
        try:
            assert read(data, Limits(max_pixels=1_000_000)).size <= 3_000_000
        except ImageError as e:
            assert "0x" not in str(e) and "object at" not in str(e)


SEEDS = [*LOSSLESS.values(), *LOSSY.values(), photo("PNG", "P"), photo("PNG", "LA"), photo("BMP", "P")]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
    st.booleans(),
)
def test_mutated_files_raise_only_image_errors(seed, changes, keep, in_header):
    data = bytearray(seed)
    for where, value in changes:
        data[int(where * min(len(data), 300 if in_header else len(data)))] = value
    only_image_errors(bytes(data[: round(len(data) * keep)] if keep < 0.5 else data))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBPVP8X", b"BM", b"II*\0\x08\0\0\0"]),
    st.binary(max_size=400),
)
def test_random_bytes_raise_only_image_errors(magic, data):
    only_image_errors(magic + data)


def test_crafted_png_with_valid_checksums_raises_only_image_errors():
    choose = random.Random(0)
    raw = b"".join(b"\0" + row.tobytes() for row in PHOTO)
    for _ in range(100):
        body = bytearray(zlib.compress(raw))
        body[choose.randrange(len(body))] ^= 1 << choose.randrange(8)
        data = png(67, 41, 8, 2, b"")
        only_image_errors(data.replace(png_chunk(b"IDAT", zlib.compress(b"")), png_chunk(b"IDAT", bytes(body))))


def test_damaged_files_print_nothing():
    """In a process of its own: decoders in C write to file descriptor 2 behind Python's back."""
    script = """
import sys
from roadseg.errors import ImageError
from roadseg.images.decode import read_image
data = sys.stdin.buffer.read()
for at in range(20, len(data), 7):
    for damaged in (data[:at], data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1:]):
        try:
            read_image(damaged)
        except ImageError:
            pass
"""
    for kind in ("png", "jpeg", "tiff-deflate", "tiff-lzw", "webp"):
        data = {**LOSSLESS, **LOSSY}[kind]
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-W", "error", "-c", script], input=data, capture_output=True, cwd=root)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr == b"" and done.stdout == b""
