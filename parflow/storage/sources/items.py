"""Python objects as records: slices of an iterable, kept in the run's store."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

from parflow.errors import CodeError, StoreError, UsageError
from parflow.model import Chunk, Part, chunk_id, digest

CHUNKS = 256
MOST_RECORDS = 1024
INLINE_BYTES = 2048
"""A slice up to this size stands in the list of chunks, a larger one in the store: thousands of tiny objects are slow."""


class ItemStore(Protocol):
    """Where slices are kept."""

    def put(self, name: str, data: bytes, /) -> str:
        """Keep bytes and return their key."""

    def get(self, key: str, /) -> bytes:
        """Return the bytes of a key."""


@dataclass
class ItemsSource:
    """The items of an iterable.

    Items are taken lazily and pickled into the store, chunk by chunk; the source itself travels without them.

    Parameters
    ----------
    iterable : iterable
        The items; anything that pickles, classes of the main script included.
    chunk_records : int, optional
        Items in a chunk. By default 256 chunks when the number of items is known; else 1, 1, 2, 4, … to 1,024 items.
    together : int
        Items that the steps want at once: a chunk of the default size has no fewer.

    Raises
    ------
    UsageError
        If ``chunk_records`` is below 1.

    Examples
    --------
    >>> class Memory(dict):
    ...     def put(self, name, data):
    ...         self[name] = data
    ...         return name
    >>> source, store = ItemsSource("abc", chunk_records=2), Memory()
    >>> [list(source.read(chunk.parts[0], chunk.parts[0].start, store)) for chunk in source.chunks(store)]
    [[(0, 'a'), (1, 'b')], [(2, 'c')]]
    """

    iterable: Iterable[Any] | None = field(compare=False, repr=False)
    chunk_records: int | None = field(default=None, kw_only=True)
    together: int = field(default=1, kw_only=True, compare=False)
    encodings: dict[str, int] = field(default_factory=dict, init=False, compare=False, repr=False)

    name = "items"
    splittable = False
    decodes = False

    def __post_init__(self) -> None:
        if self.chunk_records is not None and self.chunk_records < 1:
            raise UsageError(f"chunk_records={self.chunk_records}: a chunk has at least 1 item")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "iterable": None}

    def reset(self) -> None:
        """Do nothing: items have no encoding to count."""

    def check(self) -> None:
        """Raise a UsageError when there is nothing to go through."""
        if not any(hasattr(type(self.iterable), name) for name in ("__iter__", "__getitem__")):
            raise UsageError(f"items() goes through lists, generators and the like, not through {self.iterable!r}")

    def chunks(self, store: ItemStore) -> Iterator[Chunk]:
        """Take, pickle and keep the items, chunk by chunk.

        Raises
        ------
        CodeError
            If an item can't be pickled: it names the position.
        """
        self.check()
        assert self.iterable is not None
        items, first = iter(self.iterable), 0
        for index, size in enumerate(self._sizes()):
            batch = list(itertools.islice(items, size))
            if not batch:
                return
            data = _dump(batch, first)
            name, stop = digest(data), first + len(batch)
            if len(data) <= INLINE_BYTES:
                part = Part(f"items[{first}:{stop}]", first, stop, len(data), name, data)
            else:
                part = Part(store.put(f"inputs/{name}.pkl", data), first, stop, len(data), name)
            yield Chunk(index, chunk_id((part,)), (part,), len(data))
            first += len(batch)

    def _sizes(self) -> Iterator[int]:
        if self.chunk_records is not None:
            return itertools.repeat(self.chunk_records)
        items: object = self.iterable
        if isinstance(items, Sized):
            return itertools.repeat(max(self.together, -(-len(items) // CHUNKS)))
        growing = (max(self.together, 2**power) for power in range(MOST_RECORDS.bit_length() - 1))
        return itertools.chain([self.together], growing, itertools.repeat(max(self.together, MOST_RECORDS)))

    def read(self, part: Part, offset: int, store: ItemStore) -> Iterator[tuple[int, Any]]:
        """Yield position and item, from position ``offset`` on.

        Raises
        ------
        StoreError
            If the stored slice is not what was put there.
        CodeError
            If the slice can't be unpickled here.
        """
        data = store.get(part.path) if part.data is None else part.data
        if digest(data) != part.stamp:
            raise StoreError(f"{part.path!r} is not what was stored (digest {digest(data)}, was {part.stamp})")
        try:
            batch = pickle.loads(data)
        except Exception as error:
            message = f"items {part.start} to {part.stop} can't be unpickled here: {type(error).__name__}: {error}"
            raise CodeError(self.name, message) from error
        yield from enumerate(batch[offset - part.start :], offset)

    def decode(self, raw: Any) -> Any:
        """Return the item as it is."""
        return raw

    def size(self, part: Part) -> int:
        """Return the bytes of the pickled items."""
        return part.size

    def record_id(self, part: Part, offset: int) -> str:  # noqa: ARG002
        """Name an item: its position."""
        return f"items[{offset}]"


def _dump(batch: list[Any], first: int) -> bytes:
    # cloudpickle as fast as pickle for plain data, and the only one whose classes of the main script load in a child.
    import cloudpickle

    try:
        data: bytes = cloudpickle.dumps(batch)
    except Exception as error:
        for position, item in enumerate(batch, first):
            try:
                cloudpickle.dumps(item)
            except Exception as cause:
                message = f"item {position} can't be pickled: {type(cause).__name__}: {cause}. Give plain data instead."
                raise CodeError("items", message) from cause
        raise CodeError("items", f"items {first} to {first + len(batch)} can't be pickled: {error}") from error
    return data
