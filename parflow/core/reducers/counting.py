"""Reducers that count or gather: count, concat, counter, distinct, histogram."""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from parflow.core.reducers.base import NO_ORDER, Key, Keyed, Reducer, rank
from parflow.core.reducers.numeric import plain
from parflow.errors import GraphError


@dataclass(frozen=True)
class _Count(Reducer):
    name = "count"

    def initial(self) -> int:
        return 0

    def step(self, state: int, record: Any) -> int:  # noqa: ARG002 - any record counts
        return state + 1

    def extend(self, state: int, records: list[Any]) -> int:
        return state + len(records)

    def merge(self, a: int, b: int) -> int:
        return a + b


@dataclass(frozen=True)
class _Concat(Reducer):
    name = "concat"

    def initial(self) -> list[Any]:
        return []

    def step(self, state: list[Any], record: Any) -> list[Any]:
        state.append(record)
        return state

    def extend(self, state: list[Any], records: list[Any]) -> list[Any]:
        state += records
        return state

    def merge(self, a: list[Any], b: list[Any]) -> list[Any]:
        a += b
        return a


_PLAIN_KEYS = frozenset({str, int, bool, bytes, type(None)})


class _Counter(Keyed):
    """Counts by value. The first of equal values (``1`` and ``True``) stands for all, as the input order has it."""

    name = "counter"

    def initial(self) -> Counter[Any]:
        return Counter()

    def step(self, state: Counter[Any], record: Any) -> Counter[Any]:
        value = self.value(record)
        if value != value:
            raise ValueError(NO_ORDER)
        state[value] = state.get(value, 0) + 1
        return state

    def extend(self, state: Counter[Any], records: list[Any]) -> Counter[Any]:
        values = self.values(records)
        if _PLAIN_KEYS.issuperset(map(type, values)):
            state.update(values)  # hashing these can't fail, so counting straight into the state is atomic
            return state
        batch = Counter(values)
        if any(map(operator.ne, batch, batch)):
            raise ValueError(NO_ORDER)
        return self.merge(state, batch)

    def merge(self, a: Counter[Any], b: Counter[Any]) -> Counter[Any]:
        a.update(b)
        return a

    def finish(self, state: Counter[Any]) -> dict[Any, int]:
        items = list(state.items())
        plain = set(map(type, state)) <= {str}
        items.sort(key=operator.itemgetter(0) if plain else lambda item: rank(item[0]))
        items.sort(key=operator.itemgetter(1), reverse=True)
        return dict(items)


class _Distinct(Keyed):
    """The values seen, as the keys of a dict: unlike a set it pickles the same in every process."""

    name = "distinct"

    def initial(self) -> dict[Any, None]:
        return {}

    def step(self, state: dict[Any, None], record: Any) -> dict[Any, None]:
        value = self.value(record)
        if value != value:
            raise ValueError(NO_ORDER)
        state[value] = None
        return state

    def extend(self, state: dict[Any, None], records: list[Any]) -> dict[Any, None]:
        batch = dict.fromkeys(self.values(records))
        if any(map(operator.ne, batch, batch)):
            raise ValueError(NO_ORDER)
        return self.merge(state, batch)

    def merge(self, a: dict[Any, None], b: dict[Any, None]) -> dict[Any, None]:
        a.update(b)
        return a

    def finish(self, state: dict[Any, None]) -> int:
        return len(state)


# --- histogram -----------------------------------------------------------------------------------------------------------


class Histogram(NamedTuple):
    """How many numbers lie in each bin.

    Attributes
    ----------
    edges : list of float
        Where bins begin and end: one more than there are bins.
    counts : list of int
        ``counts[i]`` numbers lie from ``edges[i]`` up to, but not at, ``edges[i + 1]``; the last bin has its upper edge too.
    below, above : int
        How many lie outside.

    Examples
    --------
    >>> Histogram([0, 1, 2], [3, 4], 0, 1).counts
    [3, 4]
    """

    edges: list[float]
    counts: list[int]
    below: int
    above: int


@dataclass(frozen=True)
class _Histogram(Keyed):
    """The state counts below, in each bin, and above."""

    edges: tuple[Any, ...] = ()

    name = "histogram"

    def initial(self) -> list[int]:
        return [0] * (len(self.edges) + 1)

    def _place(self, value: Any) -> int:
        number = plain(value)
        if number != number:
            raise ValueError(NO_ORDER)
        return len(self.edges) - 1 if number == self.edges[-1] else bisect_right(self.edges, number)

    def step(self, state: list[int], record: Any) -> list[int]:
        state[self._place(self.value(record))] += 1
        return state

    def extend(self, state: list[int], records: list[Any]) -> list[int]:
        for place, count in Counter(map(self._place, self.values(records))).items():
            state[place] += count
        return state

    def merge(self, a: list[int], b: list[int]) -> list[int]:
        return list(map(operator.add, a, b))

    def finish(self, state: list[int]) -> Histogram:
        return Histogram(list(self.edges), state[1:-1], state[0], state[-1])


def _edges(bins: Any) -> tuple[Any, ...]:
    """Return the edges of bins, or raise GraphError."""
    if isinstance(bins, tuple):
        if len(bins) != 3:
            raise GraphError(f"bins={bins!r}: a tuple is (low, high, how many bins); give edges as a list.")
        low, high, n = bins
        if not isinstance(n, int) or n < 1:
            raise GraphError(f"bins={bins!r}: the third is how many bins to cut the range into, a whole number from 1.")
        if not (math.isfinite(low) and math.isfinite(high)):
            raise GraphError(f"bins={bins!r}: an infinite range can't be cut into equal bins; give edges as a list.")
        low, high = Fraction(low), Fraction(high)
        edges: tuple[Any, ...] = tuple(float(low + (high - low) * i / n) for i in range(n + 1))
    else:
        edges = tuple(map(plain, bins))
    if len(edges) < 2 or not all(map(operator.lt, edges, edges[1:])):
        raise GraphError(f"bins={bins!r} makes no bins: give at least two edges, each larger than the one before.")
    return edges


# --- what users call -----------------------------------------------------------------------------------------------------


def count() -> Reducer:
    """Count the records.

    >>> run = count()
    >>> run.extend(run.initial(), ["a", "b"])
    2
    """
    return _Count()


def concat() -> Reducer:
    """Put all records into one list, in input order. A record that is a list stays one element.

    >>> run = concat()
    >>> run.extend(run.initial(), [[1], 2])
    [[1], 2]
    """
    return _Concat()


def counter(key: Key = None) -> Reducer:
    """Count how often each value occurs: a dict, most frequent first, then by value. ``key`` as for `sum`.

    Values must be hashable. Values that are equal count as one, under the first of them; NaN raises ValueError.

    >>> run = counter("lang")
    >>> run.finish(run.extend(run.initial(), [{"lang": x} for x in ("en", "de", "cs", "en")]))
    {'en': 2, 'cs': 1, 'de': 1}
    """
    return _Counter(key)


def distinct(key: Key = None) -> Reducer:
    """Count how many different values there are, exactly. ``key`` as for `sum`.

    Values must be hashable, and equal ones are one; NaN raises ValueError. All different values are held in memory, and
    travel when partial results are merged: for many millions take `approx_distinct`.

    >>> run = distinct(str.lower)
    >>> run.finish(run.extend(run.initial(), ["Be", "be", "to"]))
    2
    """
    return _Distinct(key)


def histogram(bins: Iterable[float] | tuple[float, float, int], key: Key = None) -> Reducer:
    """Count how many numbers lie in each bin, exactly.

    Parameters
    ----------
    bins : list of float, or tuple
        The edges, each larger than the one before; or a tuple ``(low, high, n)`` for ``n`` bins of equal width.
    key : str or callable, optional
        As for `sum`.

    Returns
    -------
    Reducer
        Its value is a `Histogram`. Numbers are compared as they are, without rounding; infinities lie below or above. A
        record with NaN raises ValueError, one without a number TypeError.

    Raises
    ------
    GraphError
        ``bins`` makes no bins.

    Examples
    --------
    >>> run = histogram((0, 1, 2))
    >>> run.finish(run.extend(run.initial(), [-1, 0, 0.3, 0.5, 1, 7]))
    Histogram(edges=[0.0, 0.5, 1.0], counts=[2, 2], below=1, above=1)
    >>> run = histogram([0, 10, 100])
    >>> run.finish(run.extend(run.initial(), [9, 10, 11])).counts
    [1, 2]
    """
    return _Histogram(key, _edges(bins))
