"""lerobot's pickles read as data: no name in them is ever looked up, so nothing in them can run.

A pickle is a program. Here it may be made of a few thousand instructions of known kinds, and may
name what lerobot's client names: two dataclasses, numpy arrays and scalars, torch tensors. Each
name stands for a record of ours that keeps what it is given; arrays are made of these afterwards.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from vla_pruner._short import short
from vla_pruner.doors.wire import BOUNDS, Bounds, array
from vla_pruner.serving.engine import Refused

INSTRUCTIONS = 20_000
_ALLOWED = """
PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG1 BINFLOAT
BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 BINSTRING
SHORT_BINSTRING EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
EMPTY_DICT DICT SETITEM SETITEMS BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE GLOBAL
STACK_GLOBAL NEWOBJ REDUCE BUILD BINPERSID
"""


class _Record:
    """What a name was called with, and what it was given afterwards."""

    __slots__ = ("called", "given")
    called: tuple[Any, ...]
    given: Any

    def __new__(cls, *called: Any) -> _Record:
        made = object.__new__(cls)
        made.called, made.given = called, None
        return made

    def __init__(self, *called: Any) -> None:
        pass

    def __setstate__(self, given: Any) -> None:
        self.given = given

    def __reduce__(self) -> Any:
        raise TypeError("a record is not pickled")


class RemotePolicyConfig(_Record):
    """lerobot's, as a record."""

    __slots__ = ()


class TimedObservation(_Record):
    """lerobot's, as a record."""

    __slots__ = ()


class _Name(_Record):
    __slots__ = ()


class _Dtype(_Record):
    __slots__ = ()


class _Array(_Record):
    __slots__ = ()


class _Buffer(_Record):
    __slots__ = ()


class _Scalar(_Record):
    __slots__ = ()


class _Tensor(_Record):
    __slots__ = ()


class _Storage(_Record):
    __slots__ = ()


class _Empty(_Record):
    __slots__ = ()


_HELPERS = "lerobot.async_inference.helpers"
_ADMITTED: dict[tuple[str, str], type[_Record]] = {
    (_HELPERS, "RemotePolicyConfig"): RemotePolicyConfig,
    (_HELPERS, "TimedObservation"): TimedObservation,
    ("numpy", "ndarray"): _Name,
    ("numpy", "dtype"): _Dtype,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("collections", "OrderedDict"): _Empty,
} | {
    (f"numpy.{core}.{module}", name): record
    for core in ("core", "_core")
    for module, name, record in (
        ("multiarray", "_reconstruct", _Array),
        ("multiarray", "scalar", _Scalar),
        ("numeric", "_frombuffer", _Buffer),
    )
}
_STORAGES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Float": "<f4", "Double": "<f8", "Half": "<f2", "Byte": "|u1", "Char": "|i1",
        "Short": "<i2", "Int": "<i4", "Long": "<i8", "Bool": "|b1",
    }.items()
}  # fmt: skip


def unpickle(message: bytes, bounds: Bounds = BOUNDS) -> Any:
    """Numbers, text, lists, dicts, arrays and the two dataclasses (as records) in a pickle.

    Raises:
        Refused: anything else in it.
    """
    bounds.check(len(message))
    stream = io.BytesIO(message)
    found = _load(stream, _Reader)
    if stream.read(1):
        raise Refused("bytes follow the pickle")
    return _Walk(bounds).value(found, 0)


def fields(record: _Record) -> dict[str, Any]:
    """The fields of a dataclass in a pickle. Errors: Refused."""
    if not isinstance(record.given, dict) or not all(isinstance(key, str) for key in record.given):
        raise Refused(f"a {type(record).__name__} has the state {short(record.given)}")
    return record.given


def pickled_actions(chunk: list[dict[str, Any]]) -> bytes:
    """A list of lerobot's `TimedAction`, each from its fields, without lerobot."""
    parts = [b"\x80\x02](", b"e."]
    name = f"c{_HELPERS}\nTimedAction\n".encode()
    made = [name + b")\x81" + pickle.dumps(each, protocol=2)[2:-1] + b"b" for each in chunk]
    return parts[0] + b"".join(made) + parts[1]


# -- the instructions ----------------------------------------------------------------------------
class _Reader(pickle.Unpickler):
    """Python's own, without a single name that it could look up."""

    def find_class(self, module: str, name: str) -> Any:
        found = _ADMITTED.get((module, name))
        if found is None:
            raise Refused(
                f"the pickle names {short(f'{module}.{name}', 80)}, which is not admitted"
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("the pickle holds a persistent id, which is not admitted")


class _StorageReader(_Reader):
    """For the pickles within a tensor's bytes."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = _STORAGES.get((module, name))
        if dtype is None:
            raise Refused(f"a tensor's storage is {short(f'{module}.{name}', 80)}")
        return type("_Kind", (_Name,), {"__slots__": (), "dtype": dtype})

    def persistent_load(self, pid: Any) -> Any:
        return ("storage", pid)


def _load(stream: io.BytesIO, reader: type[_Reader]) -> Any:
    """The next pickle of a stream, its instructions looked at before any is followed."""
    start, allowed = stream.tell(), _ALLOWED.split()
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if code.name not in allowed or number > INSTRUCTIONS:
                raise Refused(f"the pickle is too long, or has the instruction {code.name}")
            if code.name in ("LONG_BINPUT", "LONG_BINGET") and int(argument or 0) > INSTRUCTIONS:
                raise Refused("the pickle remembers more than it holds")
        end = stream.tell()
        stream.seek(start)
        found = reader(stream).load()
        stream.seek(end)
        return found
    except Refused:
        raise
    except Exception as error:  # of pickletools, of the unpickler, of a record called wrongly
        raise Refused(f"the message is no pickle of lerobot's: {short(str(error), 80)}") from error


# -- what they made ------------------------------------------------------------------------------
class _Walk:
    """Makes plain values and arrays of what was read; each value is looked at so often as it is
    reached, and counted."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds, self.parts, self.bytes = bounds, 0, 0

    def value(self, found: Any, depth: int) -> Any:
        self.parts += 1
        if depth > self.bounds.depth or self.parts > self.bounds.parts:
            raise Refused(
                f"the pickle is nested deeper than {self.bounds.depth}, or made of more than "
                f"{self.bounds.parts} parts"
            )
        if found is None or type(found) in (bool, float, bytes):
            return found
        if type(found) is int and abs(found) < 1 << 64:
            return found
        if type(found) is str and len(found) <= self.bounds.text:
            return found
        if type(found) in (list, tuple):
            return type(found)(self.value(each, depth + 1) for each in found)
        if type(found) is dict:
            if not all(type(key) is str for key in found):
                raise Refused("a dict in the pickle has a key that is no text")
            return {key: self.value(each, depth + 1) for key, each in found.items()}
        if isinstance(found, RemotePolicyConfig | TimedObservation):
            found.given = self.value(found.given, depth + 1)
            return found
        made = self.array(found)
        self.bytes += made.nbytes
        if self.bytes > self.bounds.message:
            raise Refused("the arrays of the pickle are larger than the pickle may be")
        return made if made.ndim or not isinstance(found, _Scalar) else made[()]

    def array(self, found: Any) -> np.ndarray:
        """An array from its record. Errors: Refused."""
        try:
            if isinstance(found, _Array):
                _, shape, dtype, fortran, data = found.given
                return array(_dtype(dtype), shape, _bytes(data), "F" if fortran else "C")
            if isinstance(found, _Buffer):
                data, dtype, shape, order = found.called
                return array(_dtype(dtype), shape, _bytes(data), "F" if order == "F" else "C")
            if isinstance(found, _Scalar):
                dtype, data = found.called
                return array(_dtype(dtype), (), _bytes(data))
            if isinstance(found, _Tensor):
                return _tensor(*found.called)
        except (TypeError, ValueError, AttributeError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused(f"an array in the pickle is damaged: {short(str(error), 80)}") from error
        raise Refused(f"the pickle holds a {type(found).__name__.strip('_')}, which is not read")


def _bytes(data: Any) -> bytes:
    if not isinstance(data, bytes | bytearray):
        raise Refused(f"the data of an array are {type(data).__name__}; expected bytes")
    return bytes(data)


def _dtype(found: Any) -> str:
    if not isinstance(found, _Dtype) or not found.called or not isinstance(found.called[0], str):
        raise Refused("an array in the pickle has no dtype")
    order = found.given[1] if isinstance(found.given, tuple) and len(found.given) > 1 else "|"
    if order not in ("<", ">", "|", "="):
        raise Refused(f"an array has the byte order {short(order)}")
    return f"{order}{found.called[0]}"


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A contiguous tensor. Errors: Refused."""
    if not isinstance(storage, _Storage):
        raise Refused("a tensor in the pickle has no storage")
    flat = _stored(_bytes(*storage.called))
    wanted, step = [], 1
    for side in reversed(size):
        wanted.append(step)
        step *= max(int(side), 1)
    if any(s != w for s, w, side in zip(stride, reversed(wanted), size, strict=True) if side > 1):
        raise Refused("a tensor in the pickle is not contiguous; send `tensor.contiguous()`")
    count = math.prod(size)
    if type(offset) is not int or not 0 <= offset <= len(flat) - count:
        raise Refused("a tensor in the pickle is larger than its storage")
    return array(flat.dtype.str, tuple(size), flat[offset : offset + count].tobytes())


def _stored(data: bytes) -> np.ndarray:
    """The numbers `[N]` of a storage as torch's pickles hold it. Errors: Refused."""
    stream = io.BytesIO(data)
    pickles: Iterator[Any] = (_load(stream, _StorageReader) for _ in range(5))
    _, _, _, told, _ = pickles
    if not (isinstance(told, tuple) and told[:1] == ("storage",) and isinstance(told[1], tuple)):
        raise Refused("a tensor's storage is damaged")
    dtype = getattr(told[1][1], "dtype", None)
    (count,) = struct.unpack("<q", stream.read(8))
    return array(dtype, (count,), stream.read())
