"""What a reducer is, how to make one, and how it looks at a part of each record."""

from __future__ import annotations

import copy
import numbers
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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
        return copy.deepcopy(self.make())  # what it hands out may be shared, and pieces change their states

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
    >>> check_reducer(reducer(int, lambda n, text: n + len(text), lambda a, b: a + b, name="size")).name
    'size'
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
class Keyed(Reducer):
    """A reducer that looks at a part of each record."""

    key: Key = None

    def __post_init__(self) -> None:
        if not (self.key is None or isinstance(self.key, str) or callable(self.key)):
            raise GraphError(f"key={self.key!r} is neither a field's name nor a function of a record.")

    @property
    def get(self) -> Callable[[Any], Any]:
        """The key as a function of a record."""
        if self.key is None:
            return _itself
        return _Field(self.key) if isinstance(self.key, str) else self.key

    def value(self, record: Any) -> Any:
        """Return the part of a record that the key names."""
        key = self.key
        if key is None:
            return record
        if type(key) is str and type(record) is dict:
            return record[key]
        return self.get(record)

    def values(self, records: list[Any]) -> list[Any]:
        """Return that part of many records."""
        if self.key is None:
            return records
        if type(self.key) is str and set(map(type, records)) == {dict}:
            return list(map(operator.itemgetter(self.key), records))
        return list(map(self.get, records))


NO_ORDER = "a value that does not equal itself (NaN) can't be compared or counted; filter such records out first"


def check_key(key: Any) -> None:
    """Raise unless a key can be compared and equals itself: with others the result would depend on the grouping."""
    if key != key or key < key:  # the second raises TypeError for what has no order, such as None
        raise ValueError(NO_ORDER)


def check_keys(keys: list[Any]) -> None:
    """Raise unless all of them can be compared and equal themselves."""
    if any(map(operator.ne, keys, keys)) or any(map(operator.lt, keys, keys)):
        raise ValueError(NO_ORDER)


def rank(value: Any) -> tuple[Any, ...]:
    """Return something to sort values of any types by: numbers, then text, bytes, tuples, and the rest by type and repr."""
    if isinstance(value, numbers.Real):
        return (0, value)
    if isinstance(value, str):
        return (1, value)
    if isinstance(value, bytes):
        return (2, value)
    if isinstance(value, tuple):
        return (3, tuple(map(rank, value)))
    return (4, type(value).__qualname__, repr(value))
