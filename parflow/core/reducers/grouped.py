"""Reductions by key: one state for each key, cut into buckets that are merged, and end, apart from each other."""

# ruff: noqa: D102 - what the methods of a reducer do is said once, in Reducer

from __future__ import annotations

import operator
import pickle
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from numbers import Number
from typing import Any

from parflow.core.reducers.base import Keyed, Reducer, check_reducer
from parflow.core.reducers.counting import count
from parflow.errors import GraphError

GroupKey = Callable[[Any], Any] | str | Sequence[str] | None

MOST_BUCKETS = 1024
FEW = 4
"""When a key has fewer records on average, they are taken one by one: to prepare for many at once would cost more."""

State = dict[Any, Any]
"""The inner state of each key, in the order in which the keys first appeared."""


# --- buckets -------------------------------------------------------------------------------------------------------------


def bucket_of(key: Any, buckets: int) -> int:
    """Return the bucket of a key: the same in every process, and for all keys that equal it.

    Text, bytes, numbers, dates, UUIDs, members of an Enum, and tuples and frozensets of them are spread evenly. Any other
    key is in bucket 0, since nothing tells what makes two of its kind equal.

    Parameters
    ----------
    key : object
        Anything hashable.
    buckets : int
        How many there are.

    Returns
    -------
    int
        From 0 to ``buckets - 1``.

    Examples
    --------
    >>> bucket_of("parflow", 64), bucket_of(1, 64) == bucket_of(1.0, 64) == bucket_of(True, 64)
    (16, True)
    """
    return _mark(key) * buckets >> 32


def _mark(key: Any) -> int:
    """Return 32 bits of a key, of which the upper ones are spread best."""
    if isinstance(key, str):
        return zlib.crc32(key.encode("utf-8", "surrogatepass"))
    if isinstance(key, bytes):
        return zlib.crc32(key)
    if isinstance(key, tuple):
        mark = len(key)
        for item in key:
            mark = _mixed(mark * 31 + _mark(item))
        return mark
    kind = "" if isinstance(key, (int, float)) else getattr(getattr(key, "dtype", None), "kind", "")
    if kind in {"b", "m", "M"}:  # numpy's bools, durations and dates equal Python's
        return _mark(key.item() if kind == "b" else key.astype(f"{kind}8[us]").item())
    if isinstance(key, Number):
        return _mixed(hash(key))  # equal numbers of all types have the same, in every process
    if isinstance(key, frozenset):
        return _mixed(sum(map(_mark, key)))
    if isinstance(key, Enum):
        return _mark(key.name)
    return _mark_of_date(key)


def _mark_of_date(key: Any) -> int:
    """Tell by their methods what this layer doesn't import; of a time zone, equal moments have the same UTC time."""
    if hasattr(key, "utctimetuple"):
        return _mark((*key.utctimetuple()[:6], key.microsecond))
    if hasattr(key, "toordinal"):
        return _mark(key.toordinal())
    if hasattr(key, "total_seconds"):
        return _mark(key.total_seconds())
    return _mark(key.int) if hasattr(key, "bytes_le") else 0  # a UUID


def _mixed(number: int) -> int:
    """Multiply by the golden ratio and keep the upper half of 64 bits (D. E. Knuth, TAOCP 3, 6.4)."""
    return (number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF) >> 32


def _marks(keys: State) -> array[int]:
    """Return the mark of each key, four bytes for each."""
    if set(map(type, keys)) == {str}:
        try:
            return array("I", map(zlib.crc32, map(str.encode, keys)))
        except UnicodeEncodeError:  # lone surrogates
            pass
    return array("I", map(_mark, keys))


# --- keys ----------------------------------------------------------------------------------------------------------------

_PLAIN = frozenset({str, int, bool, bytes, type(None)})
"""A key of these types is hashable and equals its copies."""


def _check(key: Any) -> None:
    """Raise unless a hashable key equals its own pickled copy, or it would miss its equals in other pieces, and has a mark."""
    kind = type(key)
    if kind in _PLAIN or (kind is tuple and _PLAIN.issuperset(map(type, key))):
        return
    _mark(key)
    if key not in {pickle.loads(pickle.dumps(key, protocol=5)): None}:  # by hash and by value
        raise ValueError(
            f"can't group by {key!r:.200}: a copy of it does not equal it, so records of different pieces would never meet. "
            "Filter NaN out first; give a class of your own __eq__ and __hash__, or group by a tuple."
        )


# --- the reducer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class First(Reducer):
    """Keep the first record."""

    name = "first"

    def initial(self) -> Any:
        return First  # no record yet; None may be one

    def step(self, state: Any, record: Any) -> Any:
        return record if state is First else state

    def extend(self, state: Any, records: list[Any]) -> Any:
        return self.step(state, records[0]) if records else state

    def merge(self, a: Any, b: Any) -> Any:
        return self.step(a, b)

    def finish(self, state: Any) -> Any:
        return None if state is First else state


@dataclass(frozen=True)
class Grouped(Reducer):
    """Reduce the records of each key by themselves.

    The first of equal keys (``1`` and ``True``) stands for all. A piece's state is sealed and then `split` into buckets; the
    partial results of one bucket, in input order, are one state again after `join`, and at last its `rows`. So no process
    ever holds all keys.

    Attributes
    ----------
    key : str, callable, list of str, or None
        A field's name (``record[key]``, or an attribute), a function of a record, or names of fields whose values are the key
        together; None for the record itself. A key must be hashable and equal its pickled copy, or its record is set aside.
    reducer : Reducer
        What reduces the records of a key.
    buckets : int
        Into how many a partial state is split, from 1 to 1024.
    columns : tuple of str, optional
        What a row calls the key's fields and the value. Without it: the fields' names, or "key", and the reducer's name.
    whole : bool
        A row is the value alone. With `First` it's the record itself.
    name : str
        What plans and progress call it.

    Raises
    ------
    GraphError
        An attribute makes no sense.

    Examples
    --------
    >>> run = Grouped("lang", count())
    >>> state = run.extend(run.initial(), [{"lang": "en"}, {"lang": "de"}, {"lang": "en"}])
    >>> list(run.rows(state))
    [{'lang': 'en', 'count': 2}, {'lang': 'de', 'count': 1}]
    >>> parts = run.split(run.seal(state))
    >>> list(run.rows(run.join([parts[bucket_of("en", 64)]] * 2)))
    [{'lang': 'en', 'count': 4}]
    """

    key: GroupKey
    reducer: Reducer
    buckets: int = 64
    columns: tuple[str, ...] | None = None
    whole: bool = False
    name: str = "reduce_by"

    def __post_init__(self) -> None:
        check_reducer(self.reducer)
        if not (self.key is None or isinstance(self.key, str) or callable(self.key)):
            several = tuple(self.key) if isinstance(self.key, Sequence) else ()
            if not several or not all(isinstance(name, str) for name in several):
                raise GraphError(
                    f"key={self.key!r} is neither a field's name, nor a list of names, nor a function of a record."
                )
            object.__setattr__(self, "key", several)
        if type(self.buckets) is not int or not 1 <= self.buckets <= MOST_BUCKETS:
            raise GraphError(f"buckets={self.buckets!r}: give a whole number from 1 to {MOST_BUCKETS:,}.")
        names = self.key if isinstance(self.key, tuple) else (self.key if isinstance(self.key, str) else "key",)
        columns = (*names, self.reducer.name) if self.columns is None else self.columns
        if not self.whole and (isinstance(self.columns, str) or len({*columns}) != len(names) + 1):
            raise GraphError(
                f"columns={columns!r} are no {len(names) + 1} different names, which a row needs: of the key's fields, and the "
                f"last one of the value of {self.reducer.name}. Give columns=."
            )
        object.__setattr__(self, "columns", tuple(columns))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # without what is only cached

    @cached_property
    def _parts(self) -> list[Keyed]:
        return [Keyed(name) for name in self.key] if isinstance(self.key, tuple) else [Keyed(self.key)]  # type: ignore[arg-type]

    @cached_property
    def _key_of(self) -> Callable[[Any], Any]:
        gets = [part.value for part in self._parts]
        return (lambda record: tuple([get(record) for get in gets])) if isinstance(self.key, tuple) else gets[0]

    @cached_property
    def _counts(self) -> bool:
        return self.reducer == count()

    @cached_property
    def _in_bulk(self) -> bool:
        """Tell whether the reducer is known to take many at once, and to merge wholly or to raise without a change."""
        kind = type(self.reducer)
        return kind.extend is not Reducer.extend and kind.__module__.startswith("parflow.") and kind is not Grouped

    def _keys(self, records: list[Any]) -> list[Any]:
        if isinstance(self.key, tuple):
            return list(zip(*(part.values(records) for part in self._parts), strict=True))
        return self._parts[0].values(records)

    def initial(self) -> State:
        return Counter() if self._counts else {}

    def step(self, state: State, record: Any) -> State:
        key = self._key_of(record)
        if key in state:
            state[key] = self.reducer.step(state[key], record)
        else:
            _check(key)
            state[key] = self.reducer.step(self.reducer.initial(), record)
        return state

    def extend(self, state: State, records: list[Any]) -> State:
        if not self._in_bulk:
            raise NotImplementedError(f"{self.reducer.name} takes records one by one, so that one which fails leaves no trace")
        keys = self._keys(records)
        plain = _PLAIN.issuperset(map(type, keys))
        if self._counts:
            batch: State = state if plain and isinstance(state, Counter) else Counter()
            batch.update(keys)  # can't fail half-way: plain keys are hashable, others are counted aside
            if batch is state:
                return state
        else:
            batch = self._reduced(keys, records)
        for key in () if plain else batch:
            _check(key)
        return self.merge(state, batch)

    def _reduced(self, keys: list[Any], records: list[Any]) -> State:
        """Return the state of these records alone: should one of them fail, no other state has changed."""
        state: State = {}
        initial, step, extend = self.reducer.initial, self.reducer.step, self.reducer.extend
        if len(set(keys)) * FEW > len(keys):
            for key, record in zip(keys, records, strict=True):
                state[key] = step(state[key] if key in state else initial(), record)
            return state
        groups: dict[Any, list[Any]] = {key: [] for key in keys}
        for key, record in zip(keys, records, strict=True):
            groups[key].append(record)
        return {key: extend(initial(), group) for key, group in groups.items()}

    def merge(self, a: State, b: State) -> State:
        if not a:
            return b
        merge = operator.add if self._counts else self.reducer.merge
        merged = {key: merge(a[key], part) if key in a else part for key, part in b.items()}
        dict.update(a, merged)  # all of them, or none; a Counter's own update would add
        return a

    def seal(self, state: State) -> State:
        if type(self.reducer).seal is not Reducer.seal:
            for key, part in state.items():
                state[key] = self.reducer.seal(part)
        return state

    def finish(self, state: State) -> list[Any]:
        """Return the rows of all keys, bucket after bucket, as when the buckets end apart."""
        order = sorted(zip(_marks(state), state.items(), strict=True), key=lambda item: item[0] * self.buckets >> 32)
        return list(self.rows(dict(item for _, item in order)))

    def split(self, state: State) -> list[bytes]:
        """Cut a sealed state into the pickles of its buckets; an empty bucket is ``b""``."""
        shares: list[tuple[list[Any], list[Any]]] = [([], []) for _ in range(self.buckets)]
        for (key, part), mark in zip(state.items(), _marks(state), strict=True):
            keys, inner = shares[mark * self.buckets >> 32]
            keys.append(key)
            inner.append(part)
        # One bucket's dict at a time: all of them would need as much memory as the state itself, the lists a fifth of it.
        return [pickle.dumps(dict(zip(*share, strict=True)), protocol=5) if share[0] else b"" for share in shares]

    def join(self, parts: Iterable[bytes]) -> State:
        """Merge the pickles of one bucket, in input order, into one state."""
        state = self.initial()
        for part in parts:
            if part:
                state = self.merge(state, pickle.loads(part))
        return state

    def rows(self, state: State) -> Iterator[Any]:
        """Yield the finished row of each key, in the order in which the keys first appeared."""
        *names, result = self.columns or ()
        finish = self.reducer.finish
        if self.whole:
            yield from map(finish, state.values())
        elif isinstance(self.key, tuple):
            for key, part in state.items():
                yield {**dict(zip(names, key, strict=True)), result: finish(part)}
        else:
            (name,) = names
            for key, part in state.items():
                yield {name: key, result: finish(part)}
