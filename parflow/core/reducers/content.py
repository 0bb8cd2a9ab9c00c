"""What a value is, as bytes: the same in every process, so that a digest of it can stand for the value."""

from __future__ import annotations

import hashlib
import numbers
import operator
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from decimal import Decimal
from typing import Any


def digest(value: Any, size: int, seed: int = 0) -> bytes:
    """Return a digest of a value's content: uniformly spread, and with another seed another one.

    Parameters
    ----------
    value : object
        Anything that `content` takes.
    size : int
        Bytes of the digest, up to 64.
    seed : int
        Which of the many digests.

    Raises
    ------
    TypeError
        The value has no content of its own, such as a lock or a generator.

    Examples
    --------
    >>> digest({"a": 1, "b": 2}, 4) == digest({"b": 2.0, "a": True}, 4)
    True
    """
    return hashlib.blake2b(content(value), digest_size=size, key=b"%d" % seed).digest()


def content(value: Any) -> bytes:
    """Return bytes that tell values apart by what they hold: equal numbers, texts and collections of them have the same.

    A pickle wouldn't do: it also tells which parts are one object, in which order a dict was filled, and how a process
    hashes. Objects of other classes hold what they would pickle.

    Raises
    ------
    TypeError
        The value can't be pickled either.
    """
    if isinstance(value, str):
        return _tagged(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, numbers.Integral):  # True is 1
        return _tagged(b"n", b"%d" % operator.index(value))
    if isinstance(value, (numbers.Real, Decimal)):
        return _tagged(b"n", _ratio(value))
    if value is None:
        return b"0"
    if isinstance(value, (bytes, bytearray)):
        return _tagged(b"b", bytes(value))
    if isinstance(value, (tuple, list)):
        return _tagged(b"t" if isinstance(value, tuple) else b"l", b"".join(map(content, value)))
    if isinstance(value, Mapping):
        return _tagged(b"m", b"".join(sorted(content(key) + content(item) for key, item in value.items())))
    if isinstance(value, AbstractSet):
        return _tagged(b"e", b"".join(sorted(map(content, value))))
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return _tagged(b"g", f"{value.__module__}.{value.__qualname__}".encode())
    made = value.__reduce_ex__(2)
    return _tagged(b"o", content(type(value)) + content([*map(_listed, made)] if isinstance(made, tuple) else made))


def _tagged(tag: bytes, body: bytes) -> bytes:
    return b"%b%d:%b" % (tag, len(body), body)


def _ratio(value: Any) -> bytes:
    try:
        rational = isinstance(value, numbers.Rational)
        upper, lower = (value.numerator, value.denominator) if rational else value.as_integer_ratio()
    except (OverflowError, ValueError):
        return repr(float(value)).encode()  # inf, -inf, nan
    return b"%d" % upper if lower == 1 else b"%d/%d" % (upper, lower)


def _listed(part: Any) -> Any:
    """Return a part of a pickle as it is, and the items of an iterator as a list."""
    return list(part) if isinstance(part, Iterable) and hasattr(part, "__next__") else part
