"""Reducers that pick records: min, max, top, sample."""

from __future__ import annotations

import builtins
import operator
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from parflow.core.reducers.base import Key, Keyed, Reducer, check_key, check_keys
from parflow.core.reducers.content import digest
from parflow.errors import GraphError

_first = operator.itemgetter(0)
_Entry = tuple[Any, Any]  # a key and its record


class _Min(Keyed):
    name = "min"

    def best(self, entries: Iterable[_Entry]) -> _Entry:
        return builtins.min(entries, key=_first)

    def initial(self) -> _Entry | None:
        return None

    def step(self, state: _Entry | None, record: Any) -> _Entry | None:
        key = self.value(record)
        check_key(key)
        return self.merge(state, (key, record))

    def extend(self, state: _Entry | None, records: list[Any]) -> _Entry | None:
        keys = self.values(records)
        check_keys(keys)
        return self.merge(state, self.best(zip(keys, records, strict=True))) if records else state

    def merge(self, a: _Entry | None, b: _Entry | None) -> _Entry | None:
        return self.best((a, b)) if a and b else a or b

    def finish(self, state: _Entry | None) -> Any:
        return state and state[1]


class _Max(_Min):
    name = "max"

    def best(self, entries: Iterable[_Entry]) -> _Entry:
        return builtins.max(entries, key=_first)


@dataclass(frozen=True)
class _Top(Keyed):
    """The state is a list of entries, smallest first, and of equal ones the latest first: what is to go is in front."""

    n: int = 1

    name = "top"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n, int) or self.n < 1:
            raise GraphError(f"top({self.n!r}): give how many records to keep, a whole number from 1.")

    def initial(self) -> list[_Entry]:
        return []

    def step(self, state: list[_Entry], record: Any) -> list[_Entry]:
        key = self.value(record)
        check_key(key)
        if len(state) == self.n and not state[0][0] < key:
            return state
        state.insert(bisect_left(state, key, key=_first), (key, record))
        if len(state) > self.n:
            del state[0]
        return state

    def extend(self, state: list[_Entry], records: list[Any]) -> list[_Entry]:
        keys = self.values(records)
        check_keys(keys)
        entries: Iterable[_Entry] = zip(keys, records, strict=True)
        if len(state) == self.n:
            floor = state[0][0]
            entries = (entry for entry in entries if floor < entry[0])
        return self.merge(state, list(entries)[::-1])

    def merge(self, a: list[_Entry], b: list[_Entry]) -> list[_Entry]:
        both = [*reversed(a), *reversed(b)]
        both.sort(key=_first, reverse=True)  # stable also in reverse: of equal ones the earlier stays in front
        return both[: self.n][::-1]

    def finish(self, state: list[_Entry]) -> list[Any]:
        return [record for _, record in reversed(state)]


# --- sample ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample(Keyed):
    """The records with the ``n`` smallest digests; the state is a list of digests and records, smallest first.

    Digests of different content are as good as random numbers, and they are the same in every piece: that makes the sample
    uniform and independent of the grouping. Copies share their digest, so they are one. They couldn't each have a turn: it
    would depend on how many copies came before, so every partial state would have to know of every record.
    """

    n: int = 1
    seed: int = 0

    name = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n, int) or self.n < 1:
            raise GraphError(f"sample({self.n!r}): give how many records to pick, a whole number from 1.")
        if not isinstance(self.seed, int) or abs(self.seed) >= 2**64:
            raise GraphError(f"seed={self.seed!r}: give a whole number of at most 64 bits.")

    def initial(self) -> list[_Entry]:
        return []

    def step(self, state: list[_Entry], record: Any) -> list[_Entry]:
        mark = digest(self.value(record), 16, self.seed)
        if len(state) == self.n and mark >= state[-1][0]:
            return state
        place = bisect_left(state, mark, key=_first)
        if place == len(state) or state[place][0] != mark:
            state.insert(place, (mark, record))
        del state[self.n :]
        return state

    def extend(self, state: list[_Entry], records: list[Any]) -> list[_Entry]:
        marks = [digest(value, 16, self.seed) for value in self.values(records)]
        entries: Iterable[_Entry] = zip(marks, records, strict=True)
        if len(state) == self.n:
            limit = state[-1][0]
            entries = (entry for entry in entries if entry[0] < limit)
        return self.merge(state, list(entries))

    def merge(self, a: list[_Entry], b: list[_Entry]) -> list[_Entry]:
        both = dict(reversed([*a, *b]))  # of equal ones the earliest stays
        return sorted(both.items(), key=_first)[: self.n]

    def finish(self, state: list[_Entry]) -> list[Any]:
        return [record for _, record in state]


# --- what users call -----------------------------------------------------------------------------------------------------


def min(key: Key = None) -> Reducer:
    """Find the record with the smallest key, the earliest of equal ones; None of nothing. ``key`` as for `sum`.

    >>> run = min(len)
    >>> run.finish(run.extend(run.initial(), ["abc", "d", "e"]))
    'd'
    """
    return _Min(key)


def max(key: Key = None) -> Reducer:
    """Find the record with the largest key, the earliest of equal ones; None of nothing. ``key`` as for `sum`.

    >>> run = max(len)
    >>> run.finish(run.extend(run.initial(), ["abc", "d", "efg"]))
    'abc'
    """
    return _Max(key)


def top(n: int, key: Key = None) -> Reducer:
    """Find the ``n`` records with the largest keys, largest first; of equal keys the earlier wins. ``key`` as for `sum`.

    >>> run = top(2)
    >>> run.finish(run.extend(run.initial(), [3, 1, 2]))
    [3, 2]
    """
    return _Top(key, n)


def sample(n: int, key: Key = None, seed: int = 0) -> Reducer:
    """Pick ``n`` different records at random, all equally likely, and the same ones for any grouping and order of the input.

    What tells records apart is what they hold, or what ``key`` finds in them. So copies count as one record, and one that
    occurs often is no more likely than one that occurs once. For a sample of all records, copies included, name a key that
    no two of them share: a number, or where they stand, such as ``"path"``. What is held in memory is the sample.

    Parameters
    ----------
    n : int
        How many; all there are when there are fewer.
    key : str or callable, optional
        What tells records apart: a field's name (``record[key]``, or an attribute), or a function of a record; all of the
        record without it. Equal numbers are the same, whatever their type.
    seed : int
        Another one picks another sample. Records that one seed picks for a smaller ``n`` are the first of a larger one.

    Returns
    -------
    Reducer
        Its value is a list of records in random order, of copies the earliest.

    Raises
    ------
    GraphError
        ``n`` is no whole number from 1, or ``seed`` has more than 64 bits.

    Examples
    --------
    >>> run = sample(3)
    >>> picked = run.finish(run.extend(run.initial(), list(range(1000))))
    >>> picked == run.finish(run.extend(run.initial(), list(reversed(range(1000)))))
    True
    >>> len(picked)
    3
    """
    return _Sample(key, n, seed)
