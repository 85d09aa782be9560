"""Bytes of a stranger to numbers, text and arrays, within bounds; nothing in them is ever called.

A message is refused before it is unpacked when it is too large, too deeply nested, or made of too
many parts; an array when its size is not what its shape says, or its dtype is not one of numbers.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_pruner._short import short
from vla_pruner.serving.engine import Refused

DIMS = 6
LONGEST = 1 << 24
LARGEST = 1 << 40
"""Dimensions of an array, the largest of them, and entries."""
DTYPE = re.compile(r"[<>=|]?(?:b1|[iu][1248]|f[248])")
WORDS = {name: np.dtype(name).str for name in ("bool", "uint8", "int32", "int64", "float32")}
WORDS |= {name: np.dtype(name).str for name in ("int8", "int16", "uint16", "float16", "float64")}


class TooLarge(Refused):
    """A message of too many bytes."""


@dataclass(frozen=True)
class Bounds:
    """What a message may be made of.

    Args:
        message: bytes of a whole message.
        depth: how deeply maps and lists may lie in each other.
        parts: values in it, those in maps and lists included; an array counts as one.
        text: bytes of a string.
    """

    message: int = 16 << 20
    depth: int = 8
    parts: int = 4096
    text: int = 64 << 10

    def check(self, size: int) -> None:
        """Refuse a message of too many bytes. Errors: TooLarge."""
        if size > self.message:
            raise TooLarge(
                f"the message has {size} bytes; at most {self.message} are read. Send smaller "
                "images: a policy sees a few hundred pixels a side"
            )


BOUNDS = Bounds()


# -- arrays --------------------------------------------------------------------------------------
def array(dtype: Any, shape: Any, data: Any, order: str = "C") -> np.ndarray:
    """An array from its parts, copied, in this machine's byte order.

    Raises:
        Refused: a dtype that holds no plain numbers, an odd shape, or too few or many bytes.
    """
    if isinstance(dtype, bytes | memoryview):
        dtype = bytes(dtype[:32]).decode("ascii", "replace")
    dtype = WORDS.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise Refused(
            f"an array has dtype {short(dtype)}; numbers are expected, such as '|u1' or '<f4'"
        )
    kind = np.dtype(dtype)
    if not isinstance(shape, list | tuple) or len(shape) > DIMS:
        raise Refused(f"an array has the shape {short(shape)}; expected a list of up to {DIMS}")
    if any(type(side) is not int or not 0 <= side <= LONGEST for side in shape):
        raise Refused(f"an array has the shape {short(shape)}; a side is 0 to {LONGEST}")
    if math.prod(side or 1 for side in shape) > LARGEST:  # also of an array that holds nothing
        raise Refused(f"an array has the shape {short(shape)}, which is larger than any memory")
    if not isinstance(data, bytes | memoryview):
        raise Refused(f"the data of an array are {type(data).__name__}; expected bytes")
    if len(data) != math.prod(shape) * kind.itemsize:
        raise Refused(
            f"an array of shape {short(tuple(shape))} and dtype {dtype} takes "
            f"{math.prod(shape) * kind.itemsize} bytes; got {len(data)}"
        )
    if 0 in shape:
        return np.empty(shape, kind.newbyteorder("="))
    found = np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")
    return np.array(found, dtype=kind.newbyteorder("="), order="C")


def npy(data: Any) -> np.ndarray:
    """An array as `numpy.save` writes it. Errors: Refused."""
    if not isinstance(data, bytes | memoryview):
        raise Refused(f"an array in NPY form is {type(data).__name__}; expected bytes")
    stream, form = io.BytesIO(data), np.lib.format
    try:
        version = form.read_magic(stream)
        read = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}[version]
        shape, fortran, dtype = read(stream, max_header_size=1000)
    except Exception as error:  # numpy reads the header with Python's parser of literals
        raise Refused("an array is not in NPY form (version 1 or 2)") from error
    rest = memoryview(data)[stream.tell() :]
    return array(dtype.str, shape, rest, order="F" if fortran else "C")


def scalar(dtype: Any, value: Any) -> np.generic:
    """A number with a dtype. Errors: Refused."""
    if type(value) not in (bool, int, float):
        raise Refused(f"a scalar holds {short(value)}; expected a number")
    zero = array(dtype, (), bytes(np.dtype(dtype).itemsize if _plain(dtype) else 0))
    try:
        found: np.generic = zero.dtype.type(value)
    except (OverflowError, ValueError) as error:
        raise Refused(f"{short(value)} does not fit a {zero.dtype}") from error
    return found


def _plain(dtype: Any) -> bool:
    text = bytes(dtype[:32]).decode("ascii", "replace") if _is_bytes(dtype) else dtype
    return isinstance(text, str) and (text in WORDS or DTYPE.fullmatch(text) is not None)


def _is_bytes(value: Any) -> bool:
    return isinstance(value, bytes | memoryview)


def _special(found: dict[Any, Any]) -> Any:
    """A map that stands for an array or a scalar as that; others as they are."""
    for key in (b"__ndarray__", "__ndarray__"):
        if key in found:
            dtype, shape, data = (_part(found, key, name) for name in ("dtype", "shape", "data"))
            return array(dtype, shape, data)
    for key in (b"__npgeneric__", "__npgeneric__"):
        if key in found:
            return scalar(_part(found, key, "dtype"), _part(found, key, "data"))
    if "__ndarray_class__" in found:
        return npy(_part(found, "__ndarray_class__", "as_npy"))
    return found


def _part(found: Mapping[Any, Any], mark: str | bytes, name: str) -> Any:
    key = name.encode() if isinstance(mark, bytes) else name
    if key not in found:
        raise Refused(f"an array in the message has no {name!r}")
    return found[key]


# -- msgpack -------------------------------------------------------------------------------------
def unpack(message: bytes, bounds: Bounds = BOUNDS) -> Any:
    """A msgpack message: numbers, text, bytes, lists, maps, and arrays in openpi's or GR00T's form.

    Raises:
        Refused: anything else, or more of it than the bounds allow.
    """
    bounds.check(len(message))
    reader = _Reader(memoryview(message), bounds)
    found = reader.value(0)
    if reader.at != len(message):
        raise Refused(f"{len(message) - reader.at} bytes follow the message")
    return found


_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_SIZES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class _Reader:
    """Reads values one after the other, and counts them."""

    def __init__(self, message: memoryview, bounds: Bounds) -> None:
        self.message, self.bounds, self.at, self.parts = message, bounds, 0, 0

    def take(self, count: int) -> memoryview:
        """The next bytes."""
        if count > len(self.message) - self.at:
            raise Refused("the message ends in the middle of a value: it is no msgpack")
        self.at += count
        return self.message[self.at - count : self.at]

    def value(self, depth: int) -> Any:
        """The next value, whatever it is."""
        self.parts += 1
        if depth > self.bounds.depth or self.parts > self.bounds.parts:
            raise Refused(
                f"the message is nested deeper than {self.bounds.depth}, or made of more than "
                f"{self.bounds.parts} parts; send images and states as arrays, not as lists"
            )
        head = self.take(1)[0]
        if head < 0x80 or head >= 0xE0:
            return head if head < 0x80 else head - 256
        if head in _CONSTANTS:
            return _CONSTANTS[head]
        if head in _NUMBERS:
            form = _NUMBERS[head]
            return struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if head < 0x90:
            return self.map(head & 0x0F, depth)
        if head < 0xA0:
            return self.list(head & 0x0F, depth)
        if head < 0xC0:
            return self.text(head & 0x1F)
        if head not in _SIZES:
            raise Refused("the message holds an extension type of msgpack, which is not read")
        size = int.from_bytes(self.take(_SIZES[head]), "big")
        if head <= 0xC6:
            return self.take(size)
        if head <= 0xDB:
            return self.text(size)
        return self.list(size, depth) if head <= 0xDD else self.map(size, depth)

    def text(self, size: int) -> str:
        """A string of so many bytes."""
        if size > self.bounds.text:
            raise Refused(f"a text has {size} bytes; at most {self.bounds.text} are read")
        try:
            return str(self.take(size), "utf-8")
        except UnicodeDecodeError as error:
            raise Refused("a text in the message is not UTF-8") from error

    def list(self, size: int, depth: int) -> list[Any]:
        """So many values. The count is a claim: memory grows only with values that are there."""
        return [self.value(depth + 1) for _ in range(size)]

    def map(self, size: int, depth: int) -> Any:
        """So many keys with their values, or the array that they stand for."""
        found: dict[Any, Any] = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if isinstance(key, memoryview) and len(key) <= 64:
                key = bytes(key)
            if not isinstance(key, str | bytes | int):
                raise Refused(f"a key of a map is {short(key)}; expected a text")
            found[key] = self.value(depth + 1)
        return _special(found)


def pack(message: Any, *, as_npy: bool = False) -> bytes:
    """A message as msgpack; arrays in openpi's form, or in GR00T's."""
    import msgpack

    made: bytes = msgpack.packb(message, default=_npy_form if as_npy else _plain_form)
    return made


def _plain_form(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        whole = np.ascontiguousarray(value)
        mark = {b"__ndarray__": True, b"dtype": whole.dtype.str, b"shape": value.shape}
        return mark | {b"data": whole.tobytes()}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _npy_form(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        stream = io.BytesIO()
        np.save(stream, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": stream.getvalue()}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be sent")


# -- JSON ----------------------------------------------------------------------------------------
def from_json(message: bytes | str, bounds: Bounds = BOUNDS) -> Any:
    """A JSON message with arrays in the form of json_numpy. Errors: Refused."""
    raw = message.encode("utf-8", "surrogatepass") if isinstance(message, str) else message
    bounds.check(len(raw))
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > bounds.parts:
        raise Refused(
            f"the message is made of more than {bounds.parts} parts; send images and states in the "
            "form of json_numpy, not as lists of numbers"
        )
    try:
        return json.loads(raw, object_hook=_json_array, parse_constant=_no_constant)
    except Refused:
        raise
    except (ValueError, RecursionError) as error:
        raise Refused(f"the message is no JSON: {short(str(error))}") from error


def _no_constant(name: str) -> Any:
    raise Refused(f"the message holds the number {name}; send finite ones")


def _json_array(found: dict[str, Any]) -> Any:
    if "__numpy__" not in found:
        return found
    data = found["__numpy__"]
    try:
        raw = base64.b64decode(data, validate=True) if isinstance(data, str) else None
    except (binascii.Error, ValueError) as error:
        raise Refused("the data of an array are not base64") from error
    shape = found.get("shape") or []
    made = array(found.get("dtype"), shape, raw)
    return made if shape else made[()]


def to_json(value: Any) -> bytes:
    """A value as JSON, arrays in the form of json_numpy."""
    return json.dumps(value, default=_json_form, allow_nan=False).encode()


def _json_form(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        raw = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"__numpy__": raw, "dtype": value.dtype.str, "shape": list(value.shape)}
    raise TypeError(f"a {type(value).__name__} cannot be sent")
