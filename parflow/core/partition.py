"""Inputs to chunks: pack small files, cut large ones. Pure arithmetic over paths and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from parflow.errors import UsageError
from parflow.model import Chunk, Part, Rejected, chunk_id

CHUNK_BYTES = 8 * 1024 * 1024
"""Input that one chunk holds (bytes): seconds of work, so that a lost chunk costs little and overhead doesn't show."""

OPEN_COST = 64 * 1024
"""What opening a file is charged (bytes): a thousand tiny files are work too."""

MOST_PARTS = 4096
"""Files in one chunk: a journal entry that lists them stays small."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What listing says of one file. ``size`` is in bytes; a ``splittable`` file may be read from its middle."""

    path: str
    size: int
    stamp: str
    splittable: bool


def partition(
    files: Iterable[FileInfo | Rejected], *, chunk_bytes: int = CHUNK_BYTES, open_cost: int = OPEN_COST
) -> Iterator[Chunk | Rejected]:
    """Pack files into chunks, in the order given.

    Neighbouring small files share a chunk as long as their bytes and opening costs fit into ``chunk_bytes``. A larger file
    is cut into byte ranges of nearly equal size; the record that *begins* in a range belongs to it, so ranges need not be
    cut at records. A larger file that can't be split is a chunk of its own. Chunks come as soon as they are full, so
    listing never runs far ahead, and nothing is held but the chunk being packed.

    Parameters
    ----------
    files : iterable of FileInfo or Rejected
        The files, in order. Rejected inputs pass through.
    chunk_bytes : int
        Weight at which a chunk is full (bytes).
    open_cost : int
        What each file is charged (bytes).

    Yields
    ------
    Chunk or Rejected
        Chunks numbered from 0. Every byte of every file is in exactly one part.

    Raises
    ------
    UsageError
        If ``chunk_bytes`` is below 1 or ``open_cost`` below 0.

    Examples
    --------
    >>> files = [FileInfo("a", 10, "", True), FileInfo("b", 20, "", True), FileInfo("c", 250, "", True)]
    >>> for chunk in partition(files, chunk_bytes=100, open_cost=5):
    ...     print(chunk.index, chunk.weight, [(part.path, part.start, part.stop) for part in chunk.parts])
    0 40 [('a', 0, None), ('b', 0, None)]
    1 88 [('c', 0, 83)]
    2 88 [('c', 83, 166)]
    3 89 [('c', 166, None)]
    """
    if chunk_bytes < 1 or open_cost < 0:
        raise UsageError(f"chunk_bytes={chunk_bytes}, open_cost={open_cost}: give at least 1 and 0 bytes")
    return _number(_group(files, chunk_bytes, open_cost))


def _number(groups: Iterable[tuple[int, tuple[Part, ...]] | Rejected]) -> Iterator[Chunk | Rejected]:
    index = 0
    for group in groups:
        if isinstance(group, Rejected):
            yield group
        else:
            weight, parts = group
            yield Chunk(index, chunk_id(parts), parts, weight)
            index += 1


def _group(
    files: Iterable[FileInfo | Rejected], chunk_bytes: int, open_cost: int
) -> Iterator[tuple[int, tuple[Part, ...]] | Rejected]:
    parts: list[Part] = []
    weight = 0
    for file in files:
        if isinstance(file, Rejected):
            yield file
            continue
        cost = file.size + open_cost
        if parts and weight + cost > chunk_bytes:
            yield weight, tuple(parts)
            parts, weight = [], 0
        if file.splittable and file.size > chunk_bytes:
            yield from _cut(file, chunk_bytes, open_cost)
            continue
        parts.append(Part(file.path, 0, None, file.size, file.stamp))
        weight += cost
        # Full when not even an empty file would fit: known now, so don't wait for the next file to say it.
        if weight + max(open_cost, 1) > chunk_bytes or len(parts) == MOST_PARTS:
            yield weight, tuple(parts)
            parts, weight = [], 0
    if parts:
        yield weight, tuple(parts)


def _cut(file: FileInfo, chunk_bytes: int, open_cost: int) -> Iterator[tuple[int, tuple[Part, ...]]]:
    count = -(-file.size // chunk_bytes)
    for i in range(count):
        start, stop = i * file.size // count, (i + 1) * file.size // count
        part = Part(file.path, start, None if i == count - 1 else stop, file.size, file.stamp)
        yield stop - start + open_cost, (part,)
