"""Values in messages: never more than a line, however large or nested they are."""

from __future__ import annotations

import re
import reprlib

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxstring = 3, 4, 80
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = 6
_REPR.maxother = _REPR.maxlong = 60
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def short(value: object, limit: int = 160) -> str:
    """`repr(value)` with at most `limit` characters; the time it takes is bounded, too."""
    try:
        text = _REPR.repr(value)
    except Exception:  # an integer beyond Python's limit, or an object whose repr fails
        text = f"a {type(value).__name__}"
    return cut(text, limit)


def cut(text: str, limit: int) -> str:
    """The text, its middle left out where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def printable(text: str) -> str:
    """The text with what is no plain character written out: line ends, escapes, half characters."""
    return _ODD.sub(lambda found: repr(found.group())[1:-1], text)


def word(value: object) -> str:
    """A name as it is, shortened; anything else as `short` shows it."""
    return cut(value, 80) if isinstance(value, str) else short(value, 80)
