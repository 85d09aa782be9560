"""What a client may send: sizes, formats, nesting; checked before anything large is made of it."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from typing import Any

import numpy as np

from vla_pruner._short import cut, printable, short
from vla_pruner.serving.metrics import Metrics

_FORMATS = ("PNG", "JPEG")
_KINDS = "biuf"
_LONGEST_DTYPE = 8
_MOST_AXES = 8
_MOST_NAMES = 16
_LONGEST_LINE, _LONGEST_TRACE = 600, 60
_MOST_PIECES, _MOST_SCANS = 4096, 32
"""Chunks of a PNG or segments of a JPEG, and passes over all of its pixels: what decoding costs."""


class RateLimit(logging.Filter):
    """Lets a few lines of log through at a time, each cut; what clients send fills no disk."""

    def __init__(
        self, metrics: Metrics | None = None, lines: int = 50, seconds: float = 10.0
    ) -> None:
        super().__init__()
        self._metrics, self._seconds = metrics, seconds
        self._when: deque[float] = deque(maxlen=lines)
        self._dropped = 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        full = len(self._when) == self._when.maxlen and now - self._when[0] < self._seconds
        if full:
            self._dropped += 1
            if self._metrics is not None:
                self._metrics.add("log_lines_dropped_total")
            return False
        self._when.append(now)
        more = f" ({self._dropped} lines before it were left out)" if self._dropped else ""
        self._dropped = 0
        record.msg = printable(cut(record.getMessage(), _LONGEST_LINE)) + more
        record.args = ()
        if record.exc_info and not record.name.endswith(".connections"):
            record.exc_text = indented(record.exc_info[1])
        else:  # Handshakes that fail are no news of ours.
            record.exc_text = None
        record.exc_info = None
        return True


def indented(error: BaseException | None) -> str:
    """A traceback for a log; what is quoted in it cannot pass for an entry of that log."""
    lines = "".join(traceback.format_exception(error)).splitlines()[-_LONGEST_TRACE:]
    return "\n".join(f"  | {printable(cut(line, _LONGEST_LINE))}" for line in lines)


CONNECTIONS = logging.getLogger(f"{__package__}.listen.connections")
"""Where what happens to single connections is written."""


def limit_logs(metrics: Metrics) -> None:
    """Let clients write only a few lines to each log that they can write to."""
    names = ("engine", "listen", "listen.connections", "server", "worker")
    for logger in (logging.getLogger(f"{__package__}.{name}") for name in names):
        logger.filters[:] = [RateLimit(metrics)]


class Refused(ValueError):
    """An observation or message that the client must change: one sentence, for that client."""


@dataclass(frozen=True)
class Limits:
    """How much a client may ask for.

    Args:
        text: bytes of an instruction in UTF-8.
        frame: bytes of a message.
        pixels: pixels of one image, before it is decoded.
        images: images of an observation; together they have at most four times `pixels`.
        numbers: entries of a robot state.
        depth: containers within containers in a message.
        items: entries of all containers of a message together.
        episodes: episodes that are open at once.
        connections: connections that are open at once.
        idle_s: seconds without a message after which a connection is closed.
        first_s: the same, before its first message.
        error: characters of an error that is sent or logged.

    Raises:
        ValueError: a limit below 1, or not a number.
    """

    text: int = 1024
    frame: int = 64 << 20
    pixels: int = 2048 * 2048
    images: int = 8
    numbers: int = 1024
    depth: int = 16
    items: int = 10_000
    episodes: int = 1024
    connections: int = 256
    idle_s: float = 600.0
    first_s: float = 30.0
    error: int = 500

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"limit {field.name}={short(value)} must be a number")
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"limit {field.name}={short(value)} must be finite and above 0")

    # -- an observation --------------------------------------------------------------------------
    def check(self, observation: Any) -> None:
        """Refuse an observation that is too large, or holds what no policy reads.

        Args:
            observation: as `predict_actions` takes it; images are uint8 arrays.

        Raises:
            Refused: which entry, what was found, what is allowed.
        """
        if not isinstance(observation, Mapping) or len(observation) > _MOST_NAMES:
            raise Refused(f"an observation maps a few names to values; got {short(observation)}")
        self.check_text("instruction", observation.get("instruction"))
        self._check_images(observation.get("images"))
        for name in ("proprio", "state"):
            if observation.get(name) is not None:
                self.check_state(name, observation[name])

    def check_text(self, name: str, text: Any) -> None:
        """Refuse an instruction that is none, or too long. Errors: Refused."""
        if not isinstance(text, str) or not text.strip():
            raise Refused(f"`{name}` must be a sentence; got {short(text)}")
        size = len(text) if len(text) > self.text else _bytes(name, text)
        if size > self.text:
            raise Refused(
                f"`{name}` has {size} bytes; this server reads at most {self.text}: say it shorter"
            )

    def check_state(self, name: str, state: Any) -> None:
        """Refuse a robot state that is no short list of finite numbers. Errors: Refused."""
        if not isinstance(state, np.ndarray | list | tuple) or len(np.shape(state)) != 1:
            raise Refused(f"`{name}` must be a flat list of numbers; got {short(state)}")
        if len(state) > self.numbers:
            raise Refused(f"`{name}` has {len(state)} numbers; at most {self.numbers} are read")
        found = np.asarray(state)
        if found.dtype.kind not in _KINDS or not np.isfinite(found).all():
            raise Refused(f"`{name}` must be finite numbers; got {short(found.tolist())}")

    def _check_images(self, images: Any) -> None:
        if isinstance(images, np.ndarray) and images.ndim in (2, 3):
            images = [images]
        views = list(images.values()) if isinstance(images, Mapping) else images
        if not isinstance(views, list | tuple | np.ndarray) or not len(views):
            raise Refused(f"`images` must hold an image per camera; got {short(images)}")
        if len(views) > self.images:
            raise Refused(f"{len(views)} images; this server reads at most {self.images}")
        total = 0
        for number, view in enumerate(views):
            if view is None:  # A camera that is missing.
                continue
            if (
                not isinstance(view, np.ndarray)
                or view.dtype != np.uint8
                or view.ndim not in (2, 3)
            ):
                shape, dtype = getattr(view, "shape", ""), getattr(view, "dtype", type(view))
                raise Refused(
                    f"image {number} must be a uint8 array (height, width, 3); got "
                    f"{short(dtype)} {short(shape)}"
                )
            total += self.check_pixels(*_sides(view.shape))
        self._check_total(total)

    def check_pixels(self, height: int, width: int) -> int:
        """The pixels of an image of that size. Errors: Refused, there are too many, or none."""
        if height < 1 or width < 1:
            raise Refused(f"an image of {height} x {width} pixels shows nothing")
        if height * width > self.pixels:
            raise Refused(
                f"an image of {short(height)} x {short(width)} pixels; this server reads at most "
                f"{self.pixels} pixels each: send what the policy sees, or less"
            )
        return height * width

    def _check_total(self, pixels: int) -> None:
        if pixels > 4 * self.pixels:
            raise Refused(f"{pixels} pixels in one message; at most {4 * self.pixels} are read")

    # -- bytes -----------------------------------------------------------------------------------
    def image(self, data: Any) -> np.ndarray:
        """A PNG or JPEG file as uint8 [H, W, 3]; nothing else is opened.

        Its header is read first: what is larger than allowed is never unpacked.

        Raises:
            Refused: another format, too many pixels, or damage.
        """
        from PIL import Image

        from vla_pruner.models.given.images import check_image

        if not isinstance(data, bytes) or len(data) > self.frame:
            raise Refused(f"an image file must be bytes; got {short(data)}")
        _check_pieces(data)
        try:
            with Image.open(BytesIO(data), formats=_FORMATS) as file:
                self.check_pixels(file.height, file.width)
                return np.ascontiguousarray(check_image(file, "of a message"))
        except Refused:
            raise
        except Exception as error:  # Decoders raise what they like at damaged files.
            raise Refused(
                f"an image file of {len(data)} bytes cannot be read as PNG or JPEG "
                f"({short(str(error), 80)})"
            ) from None

    def array(self, data: Any, dtype: Any, shape: Any) -> np.ndarray:
        """Raw bytes as an array of numbers, a copy.

        Args:
            data: bytes of the entries in C order.
            dtype: as `np.dtype.str` writes it, of truth values, whole or real numbers.
            shape: list of sizes.

        Raises:
            Refused: what does not fit together, or another kind of entries.
        """
        if not isinstance(dtype, str) or len(dtype) > _LONGEST_DTYPE:
            raise Refused(f"an array needs a dtype such as '<f4'; got {short(dtype)}")
        try:
            kind = np.dtype(dtype)
        except (TypeError, ValueError):
            raise Refused(f"there is no dtype {short(dtype)}") from None
        if kind.kind not in _KINDS:
            raise Refused(f"dtype {short(dtype)}: only truth values and numbers are read")
        if not isinstance(shape, list | tuple) or len(shape) > _MOST_AXES:
            raise Refused(
                f"an array needs a shape of at most {_MOST_AXES} sizes; got {short(shape)}"
            )
        if not all(type(size) is int and size >= 0 for size in shape):
            raise Refused(f"the shape of an array is whole numbers from 0; got {short(shape)}")
        wanted = math.prod(shape) * kind.itemsize
        if not isinstance(data, bytes) or len(data) != wanted:
            held = len(data) if isinstance(data, bytes) else short(data)
            raise Refused(
                f"an array {short(shape)} of {dtype} is {short(wanted)} bytes; got {held}"
            )
        return np.frombuffer(data, kind).reshape(shape).copy()

    def unpack(self, data: Any, decode: Callable[[dict], Any] | None = None) -> Any:
        """A msgpack message, its structure measured before anything is built.

        Args:
            data: one whole message.
            decode: what becomes of each map, innermost first.

        Raises:
            Refused: no msgpack, or larger or deeper than allowed.
        """
        import msgpack

        if not isinstance(data, bytes | bytearray):
            raise Refused("a message is a binary frame of msgpack; got text")
        if len(data) > self.frame:
            raise Refused(f"a message of {len(data)} bytes; at most {self.frame} are read")
        self._measure(data)
        try:
            return msgpack.unpackb(
                data, object_hook=decode, raw=False, strict_map_key=False, use_list=True
            )
        except Refused:
            raise
        except Exception as error:  # Whatever the unpacker or `decode` finds in foreign bytes.
            raise Refused(
                f"a message of {len(data)} bytes is no msgpack that is read here "
                f"({type(error).__name__}: {short(str(error), 120)})"
            ) from None

    def _measure(self, data: bytes | bytearray) -> None:
        open_counts = [1]
        for items, (size, count) in enumerate(_heads(data)):
            while open_counts and open_counts[-1] == 0:
                open_counts.pop()
            if not open_counts:
                raise Refused("bytes behind the end of a message")
            open_counts[-1] -= 1
            if items >= self.items or count > self.items or len(open_counts) > self.depth:
                raise Refused(
                    f"a message may have {self.items} entries in all, {self.depth} deep; send "
                    "images and states as arrays"
                )
            if size < 0:
                open_counts.append(count)
        while open_counts and open_counts[-1] == 0:
            open_counts.pop()
        if open_counts:
            raise Refused(f"a message of {len(data)} bytes ends too early")


def _check_pieces(data: bytes) -> None:
    """Refuse an image file of a great many parts: a small one can take an hour. Errors: Refused."""
    jpeg, pieces = data.startswith(b"\xff\xd8"), 0
    at = 2 if jpeg else 8
    while at + 8 <= len(data) and pieces <= _MOST_PIECES:
        if jpeg and data[at] != 0xFF:
            raise Refused("a JPEG file has bytes between its segments: encode the image again")
        if data[at : at + 2] == b"\xff\xda" if jpeg else data[at + 4 : at + 8] == b"IEND":
            break
        if jpeg:
            at += 1 if data[at + 1] == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        else:
            at += 12 + int.from_bytes(data[at : at + 4], "big")
        pieces += 1
    scans = data.count(b"\xff\xda") if jpeg else 0
    if pieces > _MOST_PIECES or scans > _MOST_SCANS:
        raise Refused(
            f"an image file in more than {_MOST_PIECES} pieces or {_MOST_SCANS} scans: encode the "
            "image again, as a baseline JPEG or a plain PNG"
        )


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of an array, colours in front or behind."""
    if len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (3, 4):
        return shape[1], shape[2]
    return shape[0], shape[1]


def _bytes(name: str, text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise Refused(f"`{name}` is no text: it holds half a character") from None


# First byte of a msgpack entry: bytes of the length behind it, bytes behind that for each unit of
# length (-1: a list, -2: a map).
_SIZED = {
    0xC4: (1, 1), 0xC5: (2, 1), 0xC6: (4, 1), 0xD9: (1, 1), 0xDA: (2, 1), 0xDB: (4, 1),
    0xDC: (2, -1), 0xDD: (4, -1), 0xDE: (2, -2), 0xDF: (4, -2),
}  # fmt: skip
_FIXED = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,
    0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip


def _heads(data: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Each entry of a msgpack message in turn: (bytes of its content, 0), or (-1, entries in it).

    Errors: Refused, where the bytes end within an entry or mean nothing.
    """
    at, end = 0, len(data)
    while at < end:
        first = data[at]
        at += 1
        count = -1
        if first <= 0x7F or first >= 0xE0:
            size = 0
        elif first <= 0x8F:
            size, count = 0, 2 * (first & 0x0F)
        elif first <= 0x9F:
            size, count = 0, first & 0x0F
        elif first <= 0xBF:
            size = first & 0x1F
        elif first in _SIZED:
            width, unit = _SIZED[first]
            length = int.from_bytes(data[at : at + width], "big")
            at += width
            size, count = (length, -1) if unit > 0 else (0, -unit * length)
        elif first in _FIXED:
            size = _FIXED[first]
        else:
            # Of extension types msgpack makes times, and a map of those can take for ever.
            raise Refused(f"byte {first:#x} begins nothing that is read of msgpack")
        at += size
        if at > end:
            raise Refused(f"a message of {end} bytes ends too early")
        yield (size, 0) if count < 0 else (-1, count)
