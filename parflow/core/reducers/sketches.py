"""Reducers that estimate in little memory, through Apache DataSketches: ``pip install 'parflow[sketches]'``."""

from __future__ import annotations

import ast
import math
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from parflow.core.reducers.base import NO_ORDER, Key, Keyed, Reducer, rank
from parflow.core.reducers.content import digest
from parflow.errors import GraphError, UsageError


def _package(name: str) -> ModuleType:
    """Return the package, or raise for the reducer that needs it."""
    try:
        import datasketches
    except ImportError as error:
        raise UsageError(f"{name} needs the package datasketches: pip install 'parflow[sketches]' ({error})") from error
    module: ModuleType = datasketches
    return module


class _Sketch:
    """A sketch that pickles, in the package's own format."""

    __slots__ = ("body", "kind")

    def __init__(self, kind: str, body: Any) -> None:
        self.kind = kind
        self.body = body

    def __reduce__(self) -> tuple[Callable[[str, bytes], _Sketch], tuple[str, bytes]]:
        return _load, (self.kind, self.body.serialize())


def _load(kind: str, data: bytes) -> _Sketch:
    return _Sketch(kind, getattr(_package(kind), kind).deserialize(data))


@dataclass(frozen=True)
class _Approximate(Keyed):
    """A reducer with a size that follows from the error one accepts."""

    error: float = 0.01

    kind = ""
    most = 0.1
    least = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.error, bool)
            or not isinstance(self.error, (int, float))
            or not self.least <= self.error <= self.most
        ):
            raise GraphError(
                f"{self.name}: error={self.error!r} is a share from {self.least:g} to {self.most:g}, such as 0.01."
            )
        _package(self.name)

    @property
    def log_size(self) -> int:
        """The size of the sketch, as a power of two."""
        raise NotImplementedError

    def initial(self) -> _Sketch:
        return _Sketch(self.kind, getattr(_package(self.name), self.kind)(self.log_size))


# --- distinct values -----------------------------------------------------------------------------------------------------


class _ApproxDistinct(_Approximate):
    """Compressed Probabilistic Counting (K. J. Lang, "Back to the Future: an Even More Nearly Optimal Cardinality
    Estimation Algorithm", 2017). Its state is a set of coupons, so a union of any grouping is the same.

    A sketch that never was merged estimates better, but from the order in which it was filled. The one that is finished
    has therefore always been through a union.
    """  # noqa: D205 - the title is long

    name = "approx_distinct"
    kind = "cpc_sketch"

    @property
    def log_size(self) -> int:
        return math.ceil(2 * math.log2(math.log(2) / self.error))

    def step(self, state: _Sketch, record: Any) -> _Sketch:
        return self.extend(state, [record])

    def extend(self, state: _Sketch, records: list[Any]) -> _Sketch:
        update = state.body.update
        for mark in list(map(self._mark, self.values(records))):
            update(mark)
        return state

    def _mark(self, value: Any) -> str:
        if value != value:
            raise ValueError(NO_ORDER)
        return digest(value, 16).hex()

    def merge(self, a: _Sketch, b: _Sketch) -> _Sketch:
        return self._union(a, b)

    def _union(self, *states: _Sketch) -> _Sketch:
        union = _package(self.name).cpc_union(self.log_size)
        for state in states:
            union.update(state.body)
        return _Sketch(self.kind, union.get_result())

    def finish(self, state: _Sketch) -> int:
        estimate: float = self._union(state).body.get_estimate()
        return round(estimate)


# --- frequent values -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FrequentItems(_Approximate):
    """Misra and Gries' counters, as improved in D. Anderson et al., "A High-Performance Algorithm for Identifying Frequent
    Items in Data Streams", 2017. Values travel as the text that Python writes for them.
    """  # noqa: D205

    n: int = 10

    name = "frequent_items"
    kind = "frequent_strings_sketch"
    least = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.n, int) or self.n < 1:
            raise GraphError(f"frequent_items({self.n!r}): give how many values to show, a whole number from 1.")

    @property
    def log_size(self) -> int:
        return math.ceil(math.log2(3.5 / self.error))

    def step(self, state: _Sketch, record: Any) -> _Sketch:
        state.body.update(_written(self.value(record)))
        return state

    def extend(self, state: _Sketch, records: list[Any]) -> _Sketch:
        update = state.body.update
        for text in list(map(_written, self.values(records))):
            update(text)
        return state

    def merge(self, a: _Sketch, b: _Sketch) -> _Sketch:
        a.body.merge(b.body)
        return a

    def finish(self, state: _Sketch) -> dict[Any, tuple[int, int]]:
        every = _package(self.name).NO_FALSE_NEGATIVES
        rows = [(ast.literal_eval(text), low, high) for text, _, low, high in state.body.get_frequent_items(every)]
        rows.sort(key=lambda row: rank(row[0]))
        rows.sort(key=lambda row: row[1:], reverse=True)
        return {value: (low, high) for value, low, high in rows[: self.n]}


_WRITTEN = frozenset({str, int, bytes, type(None)})


def _written(value: Any) -> str:
    """Return a value as text that reads back as an equal value, the same for all equal ones."""
    if type(value) in _WRITTEN:
        return repr(value)
    return repr(_simple(value))


def _simple(value: Any) -> Any:
    """Return the one that stands for all values that equal this one."""
    if isinstance(value, tuple):
        return tuple(map(_simple, value))
    if isinstance(value, str):
        return str.__str__(value)
    if value is None or isinstance(value, bytes):
        return value
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(NO_ORDER if math.isnan(number) else f"can't count {number!r}; filter such records out first")
        return int(number) if number.is_integer() else number
    kind = type(value).__qualname__
    raise TypeError(f"can't count a {kind}: give text, numbers, bytes, None, or tuples of them (key=), or take counter()")


# --- what users call -----------------------------------------------------------------------------------------------------


def approx_distinct(key: Key = None, error: float = 0.01) -> Reducer:
    """Estimate how many different values there are, in a few KiB whatever their number, with the same bits for any grouping.

    Needs ``pip install 'parflow[sketches]'``. The sketch is Apache DataSketches' CPC, whose standard error after merging is
    ln 2 / sqrt(its size): two estimates of three are within ``error`` of the truth, 95 % within twice that, and 99.7 %
    within three times.

    Parameters
    ----------
    key : str or callable, optional
        As for `sum`. Values are told apart by what they hold; they need not be hashable. Equal numbers are one; NaN raises
        ValueError.
    error : float
        The standard error to accept at most, as a share of the result: from 0.0001 to 0.1. The sketch takes about 2.5 KiB
        for 0.01; half the error takes four times that.

    Returns
    -------
    Reducer
        Its value is an int; 0 of nothing.

    Raises
    ------
    UsageError
        The package is not installed.
    GraphError
        ``error`` is out of range.

    Examples
    --------
    >>> run = approx_distinct()  # doctest: +SKIP
    >>> run.finish(run.extend(run.initial(), [n % 1000 for n in range(10_000)]))  # doctest: +SKIP
    1003
    """
    return _ApproxDistinct(key, error)


def frequent_items(n: int, key: Key = None, error: float = 0.001) -> Reducer:
    """Find the ``n`` most frequent values and between which bounds their counts lie, in little memory whatever their number.

    Needs ``pip install 'parflow[sketches]'``. The sketch is Apache DataSketches' Frequent Items. It counts exactly, with the
    same bits for any grouping, while there are no more than ``2.6 / error`` different values. Beyond that its counters
    are cut back now and then, and *which* rare values keep one, and how tight the bounds are, depends on the grouping. The
    bounds themselves are certain for every grouping: a count lies between them, they are never further apart than ``error``
    times the number of records, and a value without a counter is not more frequent than that. For results that don't depend
    on the grouping take `counter`.

    Parameters
    ----------
    n : int
        How many values.
    key : str or callable, optional
        As for `sum`. Values are text, numbers, bytes, None, and tuples of them; others raise TypeError, NaN and infinities
        ValueError. Equal numbers are one: 1.0 and True count as 1.
    error : float
        How far apart bounds may lie, as a share of all records: from 0.000001 to 0.1.

    Returns
    -------
    Reducer
        Its value is a dict of bounds by value, ``{value: (low, high)}``, most frequent first; both are the exact count while
        nothing was cut back. It is empty of nothing, and may have fewer than ``n`` values.

    Raises
    ------
    UsageError
        The package is not installed.
    GraphError
        ``n`` or ``error`` is out of range.

    Examples
    --------
    >>> run = frequent_items(2)  # doctest: +SKIP
    >>> run.finish(run.extend(run.initial(), ["to", "be", "or", "not", "to", "be", "be"]))  # doctest: +SKIP
    {'be': (3, 3), 'to': (2, 2)}
    """
    return _FrequentItems(key, error, n)
