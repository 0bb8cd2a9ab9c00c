"""Reducers: how many records become one value, with the same bits however the records are grouped.

A reduction runs in pieces. Each piece of a chunk starts from ``initial()`` and takes its records with ``step`` (or
``extend``, many at once); the partial states of all pieces are then merged in input order, and ``finish`` turns the last
state into the value. So a reducer is right when ``merge`` is associative, and a result never depends on the number of
workers, on the order in which they end, or on a retry.
"""

from __future__ import annotations

import builtins
import numbers
import operator
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from parflow.core.exact import Total
from parflow.errors import GraphError

Key = Callable[[Any], Any] | str | None


class Reducer:
    """How records become one value. Subclass it, or make one with `reducer`.

    A state must pickle. ``step``, ``extend`` and ``merge`` may change the state they get (``merge``: both) and return it; the
    returned state replaces the old one. A ``step`` that raises must leave the state as it was: its record is set aside and
    the state goes on.

    Attributes
    ----------
    name : str
        What plans and progress call it.

    Examples
    --------
    >>> class Longest(Reducer):
    ...     name = "longest"
    ...     def initial(self): return ""
    ...     def step(self, state, record): return record if len(record) > len(state) else state
    ...     def merge(self, a, b): return self.step(a, b)
    >>> Longest().extend("", ["a", "bcd", "ef"])
    'bcd'
    """

    name: str = "reduce"

    def initial(self) -> Any:
        """Return a fresh state of no records."""
        raise NotImplementedError

    def step(self, state: Any, record: Any) -> Any:
        """Take one record and return the new state; raise without a change to set the record aside."""
        raise NotImplementedError

    def merge(self, a: Any, b: Any) -> Any:
        """Return the state of all records of ``a`` and then of ``b``, which come later in the input."""
        raise NotImplementedError

    def seal(self, state: Any) -> Any:
        """Make a partial state ready to be stored, such as smaller; called once at a piece's end and after a merge."""
        return state

    def finish(self, state: Any) -> Any:
        """Turn the last state into the value."""
        return state

    def extend(self, state: Any, records: list[Any]) -> Any:
        """Take many records at once: a fast path, used where a subclass overrides it.

        An override takes all records, or raises and leaves the state as it was; they are then taken one by one.
        """
        for record in records:
            state = self.step(state, record)
        return state


@dataclass(frozen=True)
class _Custom(Reducer):
    make: Callable[[], Any]
    take: Callable[[Any, Any], Any]
    join: Callable[[Any, Any], Any]
    end: Callable[[Any], Any] | None
    name: str

    def initial(self) -> Any:
        return self.make()

    def step(self, state: Any, record: Any) -> Any:
        return self.take(state, record)

    def merge(self, a: Any, b: Any) -> Any:
        return self.join(a, b)

    def finish(self, state: Any) -> Any:
        return state if self.end is None else self.end(state)


def reducer(
    initial: Callable[[], Any],
    step: Callable[[Any, Any], Any],
    merge: Callable[[Any, Any], Any] | None = None,
    finish: Callable[[Any], Any] | None = None,
    name: str | None = None,
) -> Reducer:
    """Make a reducer of functions.

    Parameters
    ----------
    initial : callable
        Called without arguments, returns a fresh state: ``list``, ``lambda: 0``.
    step : callable
        ``step(state, record)`` returns the new state (it may be the old one, changed).
    merge : callable
        ``merge(a, b)`` returns the state of both; ``a`` is earlier in the input. It must be associative.
    finish : callable, optional
        ``finish(state)`` returns the value. Without it the value is the last state.
    name : str, optional
        What plans and progress call it; the name of ``step`` without it.

    Returns
    -------
    Reducer

    Raises
    ------
    GraphError
        ``initial`` is not callable, or ``merge`` is missing.

    Examples
    --------
    >>> words = reducer(lambda: 0, lambda n, line: n + len(line.split()), lambda a, b: a + b, name="words")
    >>> words.merge(words.step(words.initial(), "to be"), words.step(words.initial(), "or not"))
    4
    """
    if not callable(initial):
        raise GraphError(
            f"initial is the value {initial!r}, which all pieces would share. Give a function that makes a fresh state: "
            f"initial=lambda: {initial!r}, or a type such as initial=list."
        )
    if merge is None:
        raise GraphError(
            "a reducer needs merge=: every chunk is reduced by itself, and merge(a, b) joins two partial states, a being "
            "earlier in the input; for a running number that is merge=lambda a, b: a + b."
        )
    for word, function in (("step", step), ("merge", merge), ("finish", finish)):
        if function is not None and not callable(function):
            raise GraphError(f"{word}={function!r} can't be called; give a function.")
    own = getattr(step, "__name__", "<lambda>")
    return _Custom(initial, step, merge, finish, name or ("reduce" if own == "<lambda>" else own))


def check_reducer(value: Any) -> Reducer:
    """Return ``value`` when it is a usable reducer.

    Raises
    ------
    GraphError
        It is something else, or a `Reducer` that lacks a method.

    Examples
    --------
    >>> check_reducer(count()).name
    'count'
    """
    if isinstance(value, Reducer):
        needed = ("initial", "step", "merge")
        missing = [name for name in needed if getattr(type(value), name) is getattr(Reducer, name)]
        if missing:
            raise GraphError(f"{type(value).__qualname__} lacks {', '.join(missing)}; a reducer needs {', '.join(needed)}.")
        return value
    if callable(value):
        called = getattr(value, "__name__", type(value).__name__)
        raise GraphError(
            f"{called} is not a reducer. For a built-in one or a class of your own write the brackets, as in "
            "reduce(pf.count()); for a function of your own give all parts: reduce(pf.reducer(initial, step, merge))."
        )
    raise GraphError(
        f"{value!r} is not a reducer. Give a built-in one such as pf.count() or pf.mean('score'), or make one with "
        "pf.reducer(initial, step, merge)."
    )


# --- keys --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    name: str

    def __call__(self, record: Any) -> Any:
        if type(record) is dict or isinstance(record, Mapping):
            return record[self.name]
        return getattr(record, self.name)


def _itself(record: Any) -> Any:
    return record


@dataclass(frozen=True)
class _Keyed(Reducer):
    """A reducer that looks at a part of each record."""

    key: Key = None

    def __post_init__(self) -> None:
        if not (self.key is None or isinstance(self.key, str) or callable(self.key)):
            raise GraphError(f"key={self.key!r} is neither a field's name nor a function of a record.")

    @property
    def get(self) -> Callable[[Any], Any]:
        if self.key is None:
            return _itself
        return _Field(self.key) if isinstance(self.key, str) else self.key

    def value(self, record: Any) -> Any:
        key = self.key
        if key is None:
            return record
        if type(key) is str and type(record) is dict:
            return record[key]
        return self.get(record)

    def values(self, records: list[Any]) -> list[Any]:
        if self.key is None:
            return records
        if type(self.key) is str and set(map(type, records)) == {dict}:
            return list(map(operator.itemgetter(self.key), records))
        return list(map(self.get, records))


_NO_ORDER = "a value that does not equal itself (NaN) can't be compared or counted; filter such records out first"


def _check_key(key: Any) -> None:
    """Raise unless a key can be compared and equals itself: with others the result would depend on the grouping."""
    if key != key or key < key:  # the second raises TypeError for what has no order, such as None
        raise ValueError(_NO_ORDER)


def _check_keys(keys: list[Any]) -> None:
    if any(map(operator.ne, keys, keys)) or any(map(operator.lt, keys, keys)):
        raise ValueError(_NO_ORDER)


# --- counts and lists ----------------------------------------------------------------------------------------------------


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


class _Counter(_Keyed):
    """Counts by value. The first of equal values (``1`` and ``True``) stands for all, as the input order has it."""

    name = "counter"

    def initial(self) -> Counter[Any]:
        return Counter()

    def step(self, state: Counter[Any], record: Any) -> Counter[Any]:
        value = self.value(record)
        if value != value:
            raise ValueError(_NO_ORDER)
        state[value] = state.get(value, 0) + 1
        return state

    def extend(self, state: Counter[Any], records: list[Any]) -> Counter[Any]:
        values = self.values(records)
        if _PLAIN_KEYS.issuperset(map(type, values)):
            state.update(values)  # hashing these can't fail, so counting straight into the state is atomic
            return state
        batch = Counter(values)
        if any(map(operator.ne, batch, batch)):
            raise ValueError(_NO_ORDER)
        return self.merge(state, batch)

    def merge(self, a: Counter[Any], b: Counter[Any]) -> Counter[Any]:
        a.update(b)
        return a

    def finish(self, state: Counter[Any]) -> dict[Any, int]:
        items = list(state.items())
        plain = set(map(type, state)) <= {str}
        items.sort(key=operator.itemgetter(0) if plain else lambda item: _rank(item[0]))
        items.sort(key=operator.itemgetter(1), reverse=True)
        return dict(items)


def _rank(value: Any) -> tuple[Any, ...]:
    """Return something to sort values of any types by: numbers, then text, bytes, tuples, and the rest by type and repr."""
    if isinstance(value, numbers.Real):
        return (0, value)
    if isinstance(value, str):
        return (1, value)
    if isinstance(value, bytes):
        return (2, value)
    if isinstance(value, tuple):
        return (3, tuple(map(_rank, value)))
    return (4, type(value).__qualname__, repr(value))


# --- sums --------------------------------------------------------------------------------------------------------------


class _Sum(_Keyed):
    name = "sum"

    def initial(self) -> Total:
        return Total()

    def step(self, state: Total, record: Any) -> Total:
        state.add(self.value(record))
        return state

    def extend(self, state: Total, records: list[Any]) -> Total:
        state.add_all(self.values(records))
        return state

    def merge(self, a: Total, b: Total) -> Total:
        return a.merge(b)

    def finish(self, state: Total) -> Any:
        return state.value()


class _Mean(_Sum):
    name = "mean"

    def finish(self, state: Total) -> float | None:
        return state.mean()


# --- extremes --------------------------------------------------------------------------------------------------------------

_first = operator.itemgetter(0)
_Entry = tuple[Any, Any]  # a key and its record


class _Min(_Keyed):
    name = "min"

    def best(self, entries: Iterable[_Entry]) -> _Entry:
        return builtins.min(entries, key=_first)

    def initial(self) -> _Entry | None:
        return None

    def step(self, state: _Entry | None, record: Any) -> _Entry | None:
        key = self.value(record)
        _check_key(key)
        return self.merge(state, (key, record))

    def extend(self, state: _Entry | None, records: list[Any]) -> _Entry | None:
        keys = self.values(records)
        _check_keys(keys)
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
class _Top(_Keyed):
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
        _check_key(key)
        if len(state) == self.n and not state[0][0] < key:
            return state
        state.insert(bisect_left(state, key, key=_first), (key, record))
        if len(state) > self.n:
            del state[0]
        return state

    def extend(self, state: list[_Entry], records: list[Any]) -> list[_Entry]:
        keys = self.values(records)
        _check_keys(keys)
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


def sum(key: Key = None) -> Reducer:
    """Add up numbers exactly: the correctly rounded sum, whatever the grouping.

    Parameters
    ----------
    key : str or callable, optional
        A field's name (``record[key]``, or an attribute), or a function of a record; the record itself without it.

    Returns
    -------
    Reducer
        Its value is an int of ints, a float as soon as there is one float; 0 of nothing. An infinity or NaN gives what IEEE
        754 says. Fractions and numpy scalars are taken; text and Decimal raise TypeError.

    Examples
    --------
    >>> run = sum("eur")
    >>> run.finish(run.extend(run.initial(), [{"eur": x} for x in (1e16, 1.0, -1e16)]))
    1.0
    """
    return _Sum(key)


def mean(key: Key = None) -> Reducer:
    """Average numbers: the exact sum by the count, rounded once; None of nothing. ``key`` and numbers as for `sum`.

    >>> run = mean()
    >>> run.finish(run.extend(run.initial(), [1e308, 1e308, 1e308]))
    1e+308
    """
    return _Mean(key)


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


def counter(key: Key = None) -> Reducer:
    """Count how often each value occurs: a dict, most frequent first, then by value. ``key`` as for `sum`.

    Values must be hashable. Values that are equal count as one, under the first of them; NaN raises ValueError.

    >>> run = counter("lang")
    >>> run.finish(run.extend(run.initial(), [{"lang": x} for x in ("en", "de", "cs", "en")]))
    {'en': 2, 'cs': 1, 'de': 1}
    """
    return _Counter(key)
