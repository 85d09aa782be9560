"""lerobot's pickles read as data: no name in them is ever looked up, so nothing in them can run.

A pickle is a program. Here it may be made of a few thousand instructions of known kinds, and may
name what lerobot's client names: two dataclasses, numpy arrays and scalars, torch tensors. They are
followed by a machine of our own, because Python's would hash whatever is a key. Each name stands
for a record of ours that keeps what it is given; arrays are made of these afterwards.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from vla_pruner._short import short
from vla_pruner.doors.wire import BOUNDS, DIMS, LONGEST, Bounds, array
from vla_pruner.serving.engine import Refused

INSTRUCTIONS = 20_000
T = TypeVar("T")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
"""Instructions that push what stands behind them."""


class _Record:
    """What a name was called with, and what it was given afterwards."""

    __slots__ = ("called", "given")

    def __init__(self, called: tuple[Any, ...] = ()) -> None:
        self.called = called
        self.given: Any = None


class RemotePolicyConfig(_Record):
    """lerobot's, as a record."""


class TimedObservation(_Record):
    """lerobot's, as a record."""


class _Ndarray(_Record):
    pass


class _Dtype(_Record):
    pass


class _Array(_Record):
    pass


class _Buffer(_Record):
    pass


class _Scalar(_Record):
    pass


class _Tensor(_Record):
    pass


class _Storage(_Record):
    pass


class _Empty(_Record):
    pass


_HELPERS = "lerobot.async_inference.helpers"
_ADMITTED: dict[tuple[str, str], type[_Record]] = {
    (_HELPERS, "RemotePolicyConfig"): RemotePolicyConfig,
    (_HELPERS, "TimedObservation"): TimedObservation,
    ("numpy", "ndarray"): _Ndarray,
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
    found = _follow(stream, _admitted)
    if stream.read(1):
        raise Refused("bytes follow the pickle")
    return _Walk(bounds).value(found, 0)


def fields(record: _Record) -> dict[str, Any]:
    """The fields of a dataclass in a pickle. Errors: Refused."""
    if not isinstance(record.given, dict):
        raise Refused(f"a {type(record).__name__} has the state {short(record.given)}")
    return record.given


def pickled_actions(chunk: list[dict[str, Any]]) -> bytes:
    """A list of lerobot's `TimedAction`, each from its fields, without lerobot."""
    parts = [b"\x80\x02](", b"e."]
    name = f"c{_HELPERS}\nTimedAction\n".encode()
    made = [name + b")\x81" + pickle.dumps(each, protocol=2)[2:-1] + b"b" for each in chunk]
    return parts[0] + b"".join(made) + parts[1]


# -- the instructions ----------------------------------------------------------------------------
def _admitted(module: Any, name: Any) -> type[_Record]:
    """The record that stands for a name. Errors: Refused."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise Refused("the pickle names something by what is no text")
    found = _ADMITTED.get((module, name))
    if found is None:
        raise Refused(f"the pickle names {short(f'{module}.{name}', 80)}, which is not admitted")
    return found


def _storage(module: Any, name: Any) -> str:
    """The dtype of a tensor's numbers, in the pickles within its bytes. Errors: Refused."""
    dtype = _STORAGES.get((module, name)) if isinstance(name, str) else None
    if dtype is None:
        raise Refused(f"a tensor's storage is {short(f'{module}.{name}', 80)}")
    return dtype


def _follow(stream: io.BytesIO, named: Callable[[Any, Any], Any], ids: bool = False) -> Any:
    """What the next pickle of a stream leaves on its stack.

    Args:
        stream: stands behind the pickle afterwards.
        named: what stands for a name.
        ids: whether persistent ids are read, as `("storage", id)`.

    Raises:
        Refused: an instruction or a name that is not admitted, or one that makes no sense.
    """
    machine = _Machine(named, ids)
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(stream)):
            if number > INSTRUCTIONS:
                raise Refused(f"the pickle has more than {INSTRUCTIONS} instructions")
            if code.name == "STOP":
                return machine.result()
            machine.do(code.name, argument)
    except Refused:
        raise
    except Exception as error:  # of pickletools, or of a stack that does not hold what is taken
        raise Refused(f"the message is no pickle of lerobot's: {short(str(error), 80)}") from error
    raise Refused("the message is no pickle of lerobot's: it has no end")


class _Machine:
    """Follows instructions. It looks up no name, calls nothing, and hashes nothing but text."""

    def __init__(self, named: Callable[[Any, Any], Any], ids: bool) -> None:
        self.named, self.ids = named, ids
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        """One instruction. Errors: Refused, IndexError, KeyError."""
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            place = len(self.memo) if name == "MEMOIZE" else argument
            if place > INSTRUCTIONS:
                raise Refused("the pickle remembers more than it holds")
            self.memo[place] = stack[-1]
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("TUPLE", "LIST"):
            items = self.marked()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self.taken(int(name[-1]))))
        elif name in ("APPEND", "APPENDS"):
            items = self.taken(1) if name == "APPEND" else self.marked()
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = self.taken(2) if name == "SETITEM" else self.marked()
            if name == "DICT":
                stack.append({})
            self.set(self.top(dict), items)
        elif name == "GLOBAL":
            stack.append(self.named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(self.named(*self.taken(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            record, called = self.taken(2)
            if not (isinstance(record, type) and type(called) is tuple):
                raise Refused("the pickle calls what has no name")
            stack.append(record(called))
        elif name == "BUILD":
            (given,) = self.taken(1)
            self.top(_Record).given = given
        elif name == "BINPERSID" and self.ids:
            stack.append(("storage", *self.taken(1)))
        elif name == "PROTO" and argument > pickle.HIGHEST_PROTOCOL:
            raise Refused(f"the pickle is of protocol {argument}, which does not exist")
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"the pickle has the instruction {name}, which is not admitted")

    def result(self) -> Any:
        """The one thing that is left on the stack."""
        if len(self.stack) != 1 or self.marks:
            raise Refused(f"the pickle ends with {len(self.stack)} things instead of one")
        return self.stack[0]

    def taken(self, count: int) -> list[Any]:
        """The last so many of the stack, without what lies before a mark."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise Refused("the pickle takes more than it holds")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def marked(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def top(self, kind: type[T]) -> T:
        """The last of the stack, which is of this kind."""
        found = self.stack[-1]
        if not isinstance(found, kind):
            raise Refused(f"the pickle fills a {type(found).__name__}")
        return found

    def set(self, target: dict[str, Any], items: list[Any]) -> None:
        """Entries of a dict: to hash a tuple of tuples that are one tuple takes for ever."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise Refused("a dict in the pickle has a key that is no text")
            target[key] = value


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
    for sides in (size, stride):
        if type(sides) is not tuple or len(sides) > DIMS or not all(map(_side, sides)):
            raise Refused(f"a tensor in the pickle has the shape or stride {short(sides)}")
    flat = _stored(_bytes(*storage.called))
    wanted, step = [], 1
    for side in reversed(size):
        wanted.append(step)
        step *= max(side, 1)
    if any(s != w for s, w, side in zip(stride, reversed(wanted), size, strict=True) if side > 1):
        raise Refused("a tensor in the pickle is not contiguous; send `tensor.contiguous()`")
    count = math.prod(size)
    if type(offset) is not int or not 0 <= offset <= len(flat) - count:
        raise Refused("a tensor in the pickle is larger than its storage")
    return array(flat.dtype.str, size, flat[offset : offset + count].tobytes())


def _side(side: Any) -> bool:
    return type(side) is int and 0 <= side <= LONGEST


def _stored(data: bytes) -> np.ndarray:
    """The numbers `[N]` of a storage as torch's pickles hold it. Errors: Refused."""
    stream = io.BytesIO(data)
    _, _, _, told, _ = (_follow(stream, _storage, ids=True) for _ in range(5))
    count = stream.read(8)
    if type(told) is not tuple or told[:1] != ("storage",) or len(count) < 8:
        raise Refused("a tensor's storage is damaged")
    _, kind, *_ = told[1]
    return array(kind, (int.from_bytes(count, "little"),), stream.read())
