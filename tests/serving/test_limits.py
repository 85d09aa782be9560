"""What clients may send: sizes, formats and nesting are refused before anything large is made."""

from __future__ import annotations

import logging
import struct
import tracemalloc
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vla_pruner.serving.limits import Limits, RateLimit, Refused
from vla_pruner.serving.metrics import Metrics

msgpack = pytest.importorskip("msgpack", reason="msgpack comes with 'vla-pruner[serve]'")

LIMITS = Limits()


def seen(**changes: Any) -> dict[str, Any]:
    image = np.zeros((48, 48, 3), np.uint8)
    return {
        "images": [image, image],
        "instruction": "pick up the can",
        "proprio": np.zeros(8),
    } | changes


def test_what_fits_is_taken() -> None:
    LIMITS.check(seen())
    LIMITS.check(seen(images=np.zeros((2, 48, 48, 3), np.uint8)))
    LIMITS.check(seen(images={"a": np.zeros((3, 48, 48), np.uint8), "b": None}))
    LIMITS.check(seen(instruction="x" * LIMITS.text))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"instruction": "milk " * 20_000}, "100000 bytes; this server reads at most 1024"),
        ({"instruction": "é" * 600}, "1200 bytes"),
        ({"instruction": "\U0001f95b" * 300}, "1200 bytes"),
        ({"instruction": "\ud800"}, "half a character"),
        ({"instruction": " "}, "must be a sentence"),
        ({"instruction": None}, "must be a sentence"),
        ({"instruction": b"\xff" * 10**7}, "must be a sentence"),
        ({"images": []}, "an image per camera"),
        ({"images": [np.zeros((2, 2, 3), np.uint8)] * 9}, "9 images; this server reads at most 8"),
        ({"images": [np.zeros((4000, 4000, 3), np.uint8)]}, "4000 x 4000 pixels"),
        ({"images": [np.zeros((2000, 2000), np.uint8)] * 5}, "20000000 pixels in one message"),
        ({"images": [np.zeros((0, 4, 3), np.uint8)]}, "shows nothing"),
        ({"images": [np.zeros((4, 4, 3))]}, "must be a uint8 array"),
        ({"images": [[[1, 2, 3]]]}, "must be a uint8 array"),
        ({"images": ["x" * 10**6]}, "must be a uint8 array"),
        ({"proprio": np.full(8, np.nan)}, "finite numbers"),
        ({"proprio": [1e400] * 8}, "finite numbers"),
        ({"state": np.zeros((2, 8))}, "flat list"),
        ({"state": np.zeros(5000)}, "5000 numbers"),
        ({"state": ["a"] * 8}, "finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said) as refused:
        LIMITS.check(seen(**changes))
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "8"])
def test_a_limit_is_a_number_above_zero(value: Any) -> None:
    with pytest.raises(ValueError, match="limit text"):
        Limits(text=value)


# -- images --------------------------------------------------------------------------------------


def stored(image: Image.Image, form: str) -> bytes:
    file = BytesIO()
    image.save(file, format=form)
    return file.getvalue()


def bomb(side: int = 13_300) -> bytes:
    """A PNG of a few hundred kB that unpacks to `3 * side ** 2` bytes."""

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(3 * side + 1) * 8, 9)  # The rest of the rows need not be there.
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", head), chunk(b"IDAT", body), chunk(b"IEND", b""))
    )


def test_png_and_jpeg_are_read() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(LIMITS.image(stored(image, "PNG")), pixels)
    assert LIMITS.image(stored(image, "JPEG")).shape == (40, 30, 3)
    assert np.array_equal(
        LIMITS.image(stored(image.convert("L"), "PNG")),
        np.asarray(image.convert("L").convert("RGB")),
    )


@pytest.mark.parametrize("form", ["GIF", "TIFF", "BMP", "WEBP", "PPM", "EPS", "ICO", "PDF"])
def test_no_other_format_is_opened(form: str) -> None:
    with pytest.raises(Refused, match="PNG or JPEG"):
        LIMITS.image(stored(Image.new("RGB", (16, 16)), form))


def test_pixels_are_counted_before_they_are_unpacked() -> None:
    data = bomb()
    tracemalloc.start()
    with pytest.raises(Refused, match="13300 x 13300 pixels"):
        LIMITS.image(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def chunk(name: bytes, body: bytes = b"") -> bytes:
    full = name + body
    return struct.pack(">I", len(body)) + full + struct.pack(">I", zlib.crc32(full))


def png(*chunks: bytes) -> bytes:
    """A PNG of one pixel with these chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(4))) + chunk(b"IEND")
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body


def jpeg(*, scans: int = 0, segments: bytes = b"", junk: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes so many times more, with more before its first."""
    file = BytesIO()
    Image.new("RGB", (64, 64), (9, 99, 199)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    again = data[data.rindex(b"\xff\xda") : -2]
    return data[:2] + segments + junk + data[2:-2] + again * scans + data[-2:]


PIECES = {
    "scans": lambda count: jpeg(scans=count),
    "comments": lambda count: jpeg(segments=b"\xff\xfe\x00\x02" * count),
    "fill bytes": lambda count: jpeg(segments=b"\xff" * count),
    "empty pixels": lambda count: png(chunk(b"IDAT") * count),
    "private chunks": lambda count: png(chunk(b"abCd") * count),
    "texts": lambda count: png(chunk(b"tEXt", b"k\0v") * count),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_file_in_a_great_many_pieces_is_not_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs a pass over the pixels, or a turn of the decoder: 30 kB take seconds."""
    assert LIMITS.image(PIECES[name](2)).ndim == 3
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    for count in (5000, 200_000):
        with pytest.raises(Refused, match="encode the image again"):
            LIMITS.image(PIECES[name](count))
    with pytest.raises(Refused, match="bytes between its segments"):
        LIMITS.image(jpeg(junk=bytes(100)))


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"%!PS-Adobe-3.0 EPSF-3.0\n" * 9, "text", None])
def test_damaged_images_are_refused(data: Any) -> None:
    with pytest.raises(Refused):
        LIMITS.image(data)


def test_every_cut_of_an_image_is_refused_or_read() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    for form in ("PNG", "JPEG"):
        whole = stored(Image.fromarray(pixels), form)
        for end in range(0, len(whole) - 20, 61):
            with pytest.raises(Refused):
                LIMITS.image(whole[:end])


# -- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "dtype", "shape", "said"),
    [
        (bytes(8), "<f8", [2], "is 16 bytes; got 8"),
        (bytes(8), "<f8", [1, 2**62], "bytes; got 8"),
        (bytes(8), "<f8", [-1], "whole numbers from 0"),
        (bytes(8), "<f8", [True], "whole numbers from 0"),
        (bytes(8), "<f8", "8", "a shape"),
        (bytes(8), "<f8", [1] * 40, "at most 8 sizes"),
        (bytes(8), "|O", [1], "only truth values and numbers"),
        (bytes(8), "|V8", [1], "only truth values and numbers"),
        (bytes(8), "<M8[s]", [1], "only truth values and numbers"),
        (bytes(8), "<c8", [1], "only truth values and numbers"),
        (bytes(8), "f8,f8,f8,f8", [1], "such as '<f4'"),
        (bytes(8), [("a", "O")], [1], "such as '<f4'"),
        (bytes(8), "nope", [1], "no dtype"),
        (None, "<f8", [1], "got None"),
        ("x" * 8, "<f8", [1], "is 8 bytes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(data: Any, dtype: Any, shape: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        LIMITS.array(data, dtype, shape)


def test_an_array_is_a_copy_of_its_own() -> None:
    wanted = np.arange(6, dtype="<i4").reshape(2, 3)
    found = LIMITS.array(wanted.tobytes(), "<i4", [2, 3])
    found[0, 0] = 7
    assert np.array_equal(found[1], wanted[1])


# -- messages ------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb(nested(40)),
        b"\x91" * 10**6,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\x7f\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdc\x27\x10" + b"\x90" * 10_000,
        msgpack.packb([[0] * 5000] * 3),
        msgpack.packb([0]) + b"\x00",
        b"\xc1",
        b"",
        b"\x81\xa1a",
        msgpack.packb(msgpack.Timestamp(5, 6)),
        msgpack.packb({msgpack.ExtType(7, b"1234"): 1}),
        msgpack.packb(msgpack.ExtType(7, bytes(300))),
        "text",
    ],
)
def test_messages_of_hostile_shape_are_refused_cheaply(data: Any) -> None:
    tracemalloc.start()
    with pytest.raises(Refused) as refused:
        LIMITS.unpack(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6
    assert len(str(refused.value)) < 400


def test_a_long_message_is_refused_unread() -> None:
    with pytest.raises(Refused, match="101 bytes; at most 100"):
        Limits(frame=100).unpack(bytes(101))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
    | st.text(max_size=40) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=5)
    | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=30,
)  # fmt: skip


@given(plain)
@settings(max_examples=100, deadline=None)
def test_every_plain_message_is_read_as_msgpack_reads_it(value: Any) -> None:
    wide = Limits(depth=64)
    assert wide.unpack(msgpack.packb(value)) == value


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_refused_or_are_msgpack(data: bytes) -> None:
    try:
        found = LIMITS.unpack(data)
    except Refused:
        return
    assert msgpack.unpackb(data, raw=False, strict_map_key=False) == found or found != found


# -- log -----------------------------------------------------------------------------------------


def test_a_flood_of_errors_is_a_few_short_lines_of_log() -> None:
    metrics, lines = Metrics(), []
    log = logging.Logger("test.connections")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.addFilter(RateLimit(metrics, lines=50, seconds=3600))
    for _ in range(30_000):
        log.warning("bad: %s", "x" * 5000)
    assert len(lines) == 50
    assert max(map(len, lines)) < 700
    assert metrics.get("log_lines_dropped_total") == 29_950
