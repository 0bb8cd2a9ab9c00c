"""Many byte strings in one object, any of which can be read by itself.

The object begins with a header: a digest of the header's table, then for each segment where it stops and its digest.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from itertools import accumulate

from parflow.errors import StoreError

_DIGEST = 16
_ROW = struct.Struct(f"<Q{_DIGEST}s")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


def header_size(count: int) -> int:
    """Return how long the header of ``count`` segments is (bytes)."""
    return _DIGEST + count * _ROW.size


def pack(segments: list[bytes]) -> bytes:
    """Lay segments out as one object.

    Examples
    --------
    >>> data = pack([b"one", b"", b"three"])
    >>> take(lambda start, stop: data[start:stop], 2, 3)
    b'three'
    """
    stops = accumulate(map(len, segments), initial=header_size(len(segments)))
    next(stops)
    table = b"".join(_ROW.pack(stop, _digest(segment)) for stop, segment in zip(stops, segments, strict=True))
    return b"".join([_digest(table), table, *segments])


def locate(header: bytes, number: int, count: int) -> tuple[int, int, bytes]:
    """Read from the header of ``count`` segments where one of them starts and stops (bytes), and its digest.

    Raises
    ------
    StoreError
        The header is damaged, or has another count.

    Examples
    --------
    >>> locate(pack([b"one", b""])[: header_size(2)], 0, 2)[:2]
    (64, 67)
    """
    if not 0 <= number < count:
        raise StoreError(f"there is no segment {number} of {count}; they are counted from 0.")
    table = header[_DIGEST:]
    if len(header) != header_size(count) or header[:_DIGEST] != _digest(table):
        raise StoreError(_damaged(f"its header is not that of {count} segments"))
    start = _ROW.unpack_from(table, (number - 1) * _ROW.size)[0] if number else len(header)
    stop, digest = _ROW.unpack_from(table, number * _ROW.size)
    return start, stop, digest


def take(read_range: Callable[[int, int], bytes], number: int, count: int) -> bytes:
    """Read one segment of an object of ``count``: its header, and then, unless it is empty, the segment.

    Parameters
    ----------
    read_range : callable
        ``read_range(start, stop)`` returns these bytes of the object.
    number : int
        Which segment, counted from 0.
    count : int
        How many the object has.

    Raises
    ------
    StoreError
        The header or the segment is not what was packed.
    """
    start, stop, digest = locate(read_range(0, header_size(count)), number, count)
    segment = read_range(start, stop) if start < stop else b""
    if _digest(segment) != digest:
        raise StoreError(_damaged(f"segment {number} of {count}, bytes {start:,} to {stop:,}, has another digest"))
    return segment


def _damaged(what: str) -> str:
    return (
        f"an object of segments is not what was written: {what}. The storage damaged it or something else wrote there; what "
        "made it has to run again."
    )
