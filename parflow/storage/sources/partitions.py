"""Records that something else computes, partition by partition: each is a function, kept until a child calls it."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from parflow.errors import CodeError, StoreError, UsageError
from parflow.model import Chunk, Part, chunk_id, digest
from parflow.storage.sources.items import INLINE_BYTES, ItemStore


@dataclass
class PartitionsSource:
    """The partitions of a collection of somebody else's.

    Each is given as the pickle of a function that takes nothing and returns the records. They are put into the store when
    they are listed; the source itself travels without them. A partition whose reader leaves in the middle (a time slice, a
    drain) is kept, too, so that it isn't computed again by whoever goes on.

    Parameters
    ----------
    name : str
        What made the source, for plans and dead letters.
    partitions : iterable of bytes, optional
        The pickles, in order.
    preload : sequence of str
        Modules that the functions need, worth importing once before children are forked.

    Examples
    --------
    >>> class Memory(dict):
    ...     get = dict.__getitem__
    >>> import functools
    >>> source = PartitionsSource("letters", [pickle.dumps(functools.partial(list, "ab"))])
    >>> [chunk] = source.chunks(None)
    >>> [(source.record_id(chunk.parts[0], offset), raw) for offset, raw in source.read(chunk.parts[0], 0, Memory())]
    [('partition-0#0', 'a'), ('partition-0#1', 'b')]
    """

    name: str
    partitions: Iterable[bytes] | None = field(compare=False, repr=False)
    preload: tuple[str, ...] = field(default=(), compare=False, repr=False)
    encodings: dict[str, int] = field(default_factory=dict, init=False, compare=False, repr=False)

    splittable = False
    decodes = False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "partitions": None}

    def reset(self) -> None:
        """Do nothing: what is computed has no encoding to count."""

    def check(self) -> None:
        """Raise a UsageError when the partitions are not at hand."""
        if self.partitions is None:
            raise UsageError(f"{self.name}: the partitions were not listed before the run was lost. Start it again.")

    def chunks(self, store: ItemStore) -> Iterator[Chunk]:
        """Keep the partitions; each is a chunk."""
        self.check()
        assert self.partitions is not None
        for index, data in enumerate(self.partitions):
            name, stamp = f"partition-{index}", digest(data)
            if len(data) <= INLINE_BYTES:
                part = Part(name, 0, None, len(data), stamp, data)
            else:
                part = Part(store.put(f"inputs/{name}.{stamp}", data), 0, None, len(data), stamp)
            yield Chunk(index, chunk_id((part,)), (part,), len(data))

    def read(self, part: Part, offset: int, store: Any) -> Iterator[tuple[int, Any]]:
        """Yield position and record, from position ``offset`` of the partition on.

        Raises
        ------
        StoreError
            If the stored partition is not what was put there.
        CodeError
            If it can't be unpickled here.
        """
        kept = f"inputs/{_name(part)}.{part.stamp}.records"
        records = _find(store, kept)
        if records is None:
            records = list(self._compute(part, store))
        try:
            yield from enumerate(records[offset:], offset)
        except GeneratorExit:
            _keep(store, kept, records)
            raise

    def _compute(self, part: Part, store: ItemStore) -> Iterable[Any]:
        data = store.get(part.path) if part.data is None else part.data
        if digest(data) != part.stamp:
            raise StoreError(f"{part.path!r} is not what was stored (digest {digest(data)}, was {part.stamp})")
        try:
            function: Callable[[], Iterable[Any]] = pickle.loads(data)
        except Exception as error:
            message = f"{_name(part)} can't be unpickled here: {type(error).__name__}: {error}"
            raise CodeError(self.name, message) from error
        return function()

    def decode(self, raw: Any) -> Any:
        """Return the record as it is."""
        return raw

    def size(self, part: Part) -> int:
        """Return the bytes of the pickled function."""
        return part.size

    def record_id(self, part: Part, offset: int) -> str:
        """Name a record: its partition and its position there, from 0."""
        return f"{_name(part)}#{offset}"


def _name(part: Part) -> str:
    return part.path.removeprefix("inputs/").partition(".")[0]


def _find(store: ItemStore, key: str) -> list[Any] | None:
    try:
        data = store.get(key)
    except (StoreError, KeyError):
        return None
    records: list[Any] = pickle.loads(data)
    return records


def _keep(store: ItemStore, key: str, records: list[Any]) -> None:
    import cloudpickle

    with contextlib.suppress(Exception):  # whoever goes on computes them again
        store.put(key, cloudpickle.dumps(records))
