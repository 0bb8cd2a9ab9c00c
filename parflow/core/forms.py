"""The forms that a step's function may have, beside the plain one: async, in batches, and a class that is built first."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

Batch = Literal["records", "pandas", "arrow"]
BATCHES: tuple[Batch, ...] = get_args(Batch)


@dataclass(frozen=True)
class Concurrent:
    """An async function, and how many calls of it are in flight in a child; the number changes no result."""

    function: Callable[..., Any]
    calls: int = field(compare=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain function."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class Batched:
    """A function of a batch of at most ``size`` records, and what it gets them as; the size changes no result."""

    function: Callable[..., Any]
    size: int = field(compare=False)
    form: Batch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain function."""
        return self.function(*args, **kwargs)


@dataclass(frozen=True)
class More:
    """A function that is given more than its record: values that are the same for all records."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, record: Any) -> Any:
        """Call the function with a record and the values."""
        return self.function(record, *self.args, **self.kwargs)


def inner(function: Any) -> Any:
    """Return the function that the user wrote."""
    return function.function if isinstance(function, (Concurrent, Batched)) else function


def within(function: Any, made: Any) -> Any:
    """Return ``function`` with ``made`` in the place of the function that the user wrote."""
    return replace(function, function=made) if isinstance(function, (Concurrent, Batched)) else made


def is_built(function: Any) -> bool:
    """Tell whether records go to an object that is built first: of a class that says what calling one does.

    A `functools.partial` of such a class holds its arguments. Any other class (`int`, a dataclass) is called with each record.

    >>> class Model:
    ...     def __call__(self, record): ...
    >>> is_built(Model), is_built(functools.partial(Model, "en")), is_built(Model()), is_built(int)
    (True, True, False, False)
    """
    made: Any = inner(function)
    made = made.func if isinstance(made, functools.partial) else made
    return isinstance(made, type) and not issubclass(made, type) and any("__call__" in vars(kind) for kind in made.__mro__)


def is_async(function: Any) -> bool:
    """Tell whether calling the function, or the object that it builds, gives something to await."""
    called: Any = inner(function)
    called = called.function if isinstance(called, More) else called
    if is_built(called):
        kind: Any = called.func if isinstance(called, functools.partial) else called
        called = kind.__call__
    elif not inspect.isroutine(called) and not isinstance(called, (functools.partial, type)):
        called = type(called).__call__
    return inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called)
