"""Records that an earlier stage stored, read again; and the items of a list that was made at run time."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from parflow.errors import CodeError, StoreError, UsageError
from parflow.model import Part, digest
from parflow.storage.sources.items import ItemsSource


@dataclass
class StoredSource:
    """The records that an earlier stage's pieces kept, pickled one after the other; the run knows where.

    Parameters
    ----------
    name : str
        What made them, for plans and progress.

    Examples
    --------
    >>> data = pickle.dumps("a") + pickle.dumps("b")
    >>> part = Part("kept", 0, None, len(data), digest(data), data)
    >>> [record for _, record in StoredSource().read(part, 0, None)]
    ['a', 'b']
    """

    name: str = "stored"
    encodings: dict[str, int] = field(default_factory=dict, init=False, compare=False, repr=False)

    splittable = False
    decodes = False

    def reset(self) -> None:
        """Do nothing: stored records have no encoding to count."""

    def check(self) -> None:
        """Do nothing: what it reads is still to be made."""

    def chunks(self, store: object) -> NoReturn:
        """Refuse: the run derives the chunks from what was stored."""
        raise CodeError(self.name, f"a stage that goes on from another one lists nothing (in {store!r})")

    def read(self, part: Part, offset: int, store: Any) -> Iterator[tuple[int, Any]]:
        """Yield place and record, from byte ``offset`` on.

        Raises
        ------
        StoreError
            If what is stored is not what was put there.
        CodeError
            If a record can't be unpickled here.
        """
        data = store.get(part.path) if part.data is None else part.data
        if digest(data) != part.stamp:
            raise StoreError(f"{part.path!r} is not what was stored (digest {digest(data)}, was {part.stamp})")
        stream = io.BytesIO(data)
        stream.seek(offset)
        while (at := stream.tell()) < len(data):
            try:
                record = pickle.load(stream)
            except Exception as error:
                message = f"a record of {part.path!r} can't be unpickled here: {type(error).__name__}: {error}"
                raise CodeError(self.name, message) from error
            yield at, record

    def decode(self, raw: Any) -> Any:
        """Return the record as it is."""
        return raw

    def size(self, part: Part) -> int:
        """Return the bytes of the pickled records."""
        return part.size

    def record_id(self, part: Part, offset: int) -> str:
        """Name a record: what stored it, and the byte where it begins."""
        return f"{part.path}:{offset}"


@dataclass
class ValueSource(ItemsSource):
    """The items of a list that a call or a reduction gave: known when it's there."""

    name = "expand"

    def check(self) -> None:
        """Do nothing: what it goes through is still to be made."""

    def of(self, value: Any) -> ValueSource:
        """Return the source of a value's items.

        Raises
        ------
        UsageError
            When it has none.
        """
        if isinstance(value, (str, bytes)) or not any(hasattr(type(value), name) for name in ("__iter__", "__getitem__")):
            raise UsageError(f"expand() was given {value!r:.80}, which is no list; the step before it has to make one")
        return replace(self, iterable=value)

    def record_id(self, part: Part, offset: int) -> str:  # noqa: ARG002
        """Name an item: its position."""
        return f"item[{offset}]"
