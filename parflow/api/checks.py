"""Mistakes that can be told while a graph is built, or before work starts, each with what to write instead.

Nothing here knows how a graph looks: what is checked is given as functions, names, paths and the class that lazy things have.
"""

from __future__ import annotations

import functools
import inspect
import keyword
import os
import re
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from string import ascii_lowercase
from typing import Any

from parflow.core.forms import inner, is_built
from parflow.errors import GraphError, UsageError
from parflow.storage.sinks.base import MANIFEST, part_names
from parflow.storage.sources.listing import _MAGIC, _next, _rule, _through
from parflow.storage.sources.listing import _split as split_local

# --- lazy values in a step's code ----------------------------------------------------------------------------------------

LOOK = 64
"""Items of a list, a tuple, a set or a dict that are looked at: one that holds lazy values holds little else."""

DEPTH = 3
"""Functions within functions (decorators, partials, bound methods) that are looked into."""

_PLAIN = {int, float, str, bytes, bool, type(None), types.ModuleType, types.BuiltinFunctionType}
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def check_captured(function: Any, lazy: type, name: str, method: str | None = "map") -> None:
    """Refuse a function that brings a lazy value with it: a worker would get the plan of a value, not the value.

    Looked at are the variables of the function and of those that it wraps: its closure, defaults, module globals, the
    arguments of a partial, the attributes of a method's object; and the first items of the lists, tuples, sets and dicts
    there. A variable that gets its value later is seen by a second look, when the plan is made.

    Parameters
    ----------
    function : callable
        A step's function, a class, or an object that holds functions, such as a reducer.
    lazy : type
        The class of lazy values.
    name : str
        The step's name, for the message.
    method : str, optional
        How the function gets its records: "map", "filter", "reduce" …; None for a call.

    Raises
    ------
    GraphError
        Naming the variable, and how to pass it.

    Examples
    --------
    >>> import parflow as pf
    >>> mean = pf.items([1, 3]).reduce(pf.mean())
    >>> check_captured(lambda x: x - mean, pf.Value, "lambda")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    parflow.errors.GraphError: step 'lambda' uses 'mean', which is lazy (Value<mean>): ...
    """
    if (found := _lazy_in(inner(function), lazy, DEPTH)) is None:
        return
    variable, value = found
    if isinstance(value, lazy):
        what = f"is lazy ({value!r})"
    else:
        item = next(item for item in _items(value) if issubclass(type(item), lazy))
        what = f"is a {type(value).__name__} with something lazy in it ({item!r})"
    parameter = variable.rpartition(".")[2].replace(" ", "_")
    step, f = _named(name, method)
    raise GraphError(
        f"{step} uses {variable!r}, which {what}: the code goes to the workers before there is a value. "
        f"{_advice(f, parameter, method)}"
    )


def _named(name: str, method: str | None) -> tuple[str, str]:
    """Name a step in words, and in code."""
    words = f"{'the call of' if method is None else 'step'} {name!r}"
    return words, name if name.isidentifier() and not keyword.iskeyword(name) else "f"


def _advice(f: str, parameter: str, method: str | None) -> str:
    if method is None:
        return f"Pass it as an argument, `{f}(..., {parameter})`, and the call gets what it has become."
    if method == "reduce":
        return f"A reducer gets records alone; put it into them first: `docs.map(f, {parameter}).reduce(...)`."
    record = "batch" if method == "map_batches" else "record"
    return (
        f"Pass it as an extra argument, `docs.{method}({f}, {parameter})`, to a function that takes it after the {record}: "
        f"`def {f}({record}, {parameter})`."
    )


def _lazy_in(holder: Any, lazy: type, depth: int) -> tuple[str, Any] | None:
    """Return name and value of the first variable that is lazy, or has something lazy in it."""
    if type(holder) is types.FunctionType:
        variables, code = holder.__globals__, holder.__code__
        for name in _names(code):
            if (value := variables.get(name)) is not None and _is_lazy(value, lazy) and name in _loaded(code):
                return name, value
        if holder.__closure__ is None and holder.__defaults__ is None and holder.__kwdefaults__ is None:
            return None
    for name, value in _variables(holder):
        if _is_lazy(value, lazy):
            return name, value
        if depth and issubclass(type(value), _FUNCTIONS) and (found := _lazy_in(value, lazy, depth - 1)) is not None:
            return found
    return None


def _is_lazy(value: Any, lazy: type) -> bool:
    kind = type(value)  # not isinstance: proxies answer it with what they stand for, or an error
    if kind in _PLAIN:
        return False
    if kind in _CONTAINERS:
        return any(issubclass(type(item), lazy) for item in islice(_items(value), LOOK))
    return issubclass(kind, lazy)


_CONTAINERS = {list, tuple, dict, set, frozenset}


def _items(value: Any) -> Iterator[Any]:
    return iter(value.values() if isinstance(value, dict) else value)


def _variables(holder: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a function, a partial, a method, a class or an object brings with it, but for a function's globals."""
    if isinstance(holder, types.FunctionType):
        code = holder.__code__
        for name, cell in zip(code.co_freevars, holder.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not bound yet
                continue
        defaults = holder.__defaults__ or ()
        yield from zip(code.co_varnames[code.co_argcount - len(defaults) :], defaults, strict=False)
        yield from (holder.__kwdefaults__ or {}).items()
    elif isinstance(holder, functools.partial):
        yield from ((_parameter(holder.func, place), value) for place, value in enumerate(holder.args))
        yield from holder.keywords.items()
        yield "function", holder.func
    elif isinstance(holder, types.MethodType):
        yield "self", holder.__self__
        yield from _attributes(holder.__self__)
        yield "function", holder.__func__
    elif type(holder) not in _PLAIN:
        yield from _attributes(holder)
        if not isinstance(holder, type):
            yield from _attributes(type(holder))


def _attributes(thing: Any) -> Iterator[tuple[str, Any]]:
    owner = thing.__name__ if isinstance(thing, type) else "self"
    return ((f"{owner}.{name}", value) for name, value in [*getattr(thing, "__dict__", {}).items()])


def _parameter(function: Any, place: int) -> str:
    code = getattr(function, "__code__", None)
    return code.co_varnames[place] if code is not None and place < code.co_argcount else f"argument {place + 1}"


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the global names that code may use, and those of attributes, which no bytecode has to be read for."""
    yield from code.co_names
    for const in code.co_consts:
        if type(const) is types.CodeType:
            yield from _names(const)


_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


def _loaded(code: types.CodeType) -> set[str]:
    """Return the global names that code does use."""
    import dis

    found = {one.argval for one in dis.get_instructions(code) if one.opname in _LOADS}
    return found.union(*(_loaded(const) for const in code.co_consts if isinstance(const, types.CodeType)))


def check_arguments(arguments: Any, lazy: type, name: str) -> None:
    """Refuse lazy values where they wouldn't be found, which a function would get as they are, and lists in themselves.

    Parameters
    ----------
    arguments : list, tuple or dict
        What a call or a step is given, as the user wrote it: `replace_in` walks the same structure.
    lazy : type
        The class of lazy values.
    name : str
        The name of the call or the step.

    Raises
    ------
    GraphError
        Naming the value, and where to put it.

    Examples
    --------
    >>> import parflow as pf
    >>> total = pf.items([1]).reduce(pf.sum())
    >>> check_arguments([1, {"total": total}], pf.Value, "add")
    >>> check_arguments([1, {total}], pf.Value, "add")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    parflow.errors.GraphError: 'add' is given a set with something lazy in it (Value<sum>), which would stay lazy: ...
    """
    _walk(arguments, lazy, name, ())


def _walk(value: Any, lazy: type, name: str, above: tuple[int, ...]) -> None:
    kind: Any = type(value)
    if kind in _PLAIN or issubclass(kind, lazy):
        return
    if kind in (list, dict) or issubclass(kind, tuple):
        if id(value) in above:
            raise GraphError(f"{name!r} is given a {kind.__name__} that contains itself; give a copy: `{kind.__name__}(...)`")
        above = (*above, id(value))
        for item in _items(value):
            if type(item) not in _PLAIN:
                _walk(item, lazy, name, above)
        hidden: Iterable[Any] = value if kind is dict else ()
    else:
        hidden = value if kind in _CONTAINERS else getattr(value, "__dict__", {}).values()
    for item in islice(hidden, LOOK):
        if issubclass(type(item), lazy):
            raise GraphError(
                f"{name!r} is given a {kind.__name__} with something lazy in it ({item!r}), which would stay lazy: lazy values "
                "are found in lists, tuples and the values of dicts. Give it as an argument of its own, or in a list."
            )


# --- functions that can't be called so -----------------------------------------------------------------------------------

_FITTING: weakref.WeakKeyDictionary[Any, set[tuple[int, frozenset[str]]]] = weakref.WeakKeyDictionary()
"""How functions may be called: a signature takes a while to be made, and a workflow may have thousands of calls."""


def check_arity(
    function: Any, positional: int, keywords: Collection[str] = (), name: str = "f", method: str | None = "map"
) -> None:
    """Refuse a function that can't be called with such arguments; one that doesn't say what it takes passes.

    Parameters
    ----------
    function : callable
        A step's function. Of a class that is built first, what builds it and what is then called are checked.
    positional : int
        Arguments without a name, the record among them.
    keywords : collection of str
        The others' names.
    name : str
        The step's name, for the message.
    method : str, optional
        How the function gets its records: "map", "filter" …; None for a call.

    Raises
    ------
    GraphError
        Saying what is missing or too much, and what to write.

    Examples
    --------
    >>> check_arity(str.upper, 1)
    >>> check_arity(lambda record, language: record, 1, name="clean")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    parflow.errors.GraphError: step 'clean' calls clean(record), but its function takes (record, language): missing a ...
    """
    function = inner(function)
    if type(function) is types.FunctionType and not keywords:  # most functions, in no time
        code = function.__code__
        least = code.co_argcount - len(function.__defaults__ or ())
        if least <= positional <= code.co_argcount and not code.co_kwonlyargcount:
            return
    for called, count, names in _calls(function, positional, frozenset(keywords)):
        if (misfit := _misfit(called, count, names)) is not None:
            takes, problem = misfit
            step, f = _named(name, method)
            first = () if method is None else ("batch" if method == "map_batches" else "record",)
            arguments = [*first, *ascii_lowercase[: positional - len(first)], *(f"{word}=..." for word in keywords)]
            raise GraphError(
                f"{step} calls {f}({', '.join(arguments)}), but its function takes {takes}: {problem}. "
                f"{_instead(problem, called, called is function, f, arguments, method)}"
            )


def _calls(function: Any, positional: int, keywords: frozenset[str]) -> Iterator[tuple[Any, int, frozenset[str]]]:
    """Yield what will be called, and how: partials, methods, and classes that are built first are taken apart."""
    if is_built(function):
        bound = function if isinstance(function, functools.partial) else functools.partial(function)
        if (build := _method(bound.func, "__init__")) is not None:
            yield build, 1 + len(bound.args), frozenset(bound.keywords)
        if (call := _method(bound.func, "__call__")) is not None:
            yield call, 1 + positional, keywords
    elif isinstance(function, functools.partial):
        yield from _calls(function.func, len(function.args) + positional, keywords.union(function.keywords))
    elif isinstance(function, types.MethodType):
        yield from _calls(function.__func__, 1 + positional, keywords)
    elif not isinstance(function, type) and (call := _method(type(function), "__call__")) is not None:
        yield call, 1 + positional, keywords
    else:
        yield function, positional, keywords


def _method(kind: Any, name: str) -> Any:
    """Return a method written in Python."""
    found = inspect.getattr_static(kind, name, None)
    return found if type(found) is types.FunctionType else None


def _misfit(function: Any, positional: int, keywords: frozenset[str]) -> tuple[str, str] | None:
    """Return what a function takes, and how it doesn't fit."""
    key = (positional, keywords)
    known = isinstance(function, (types.FunctionType, types.BuiltinFunctionType))
    if known and key in _FITTING.get(function, ()):
        return None
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # a decorator may add arguments of its own
    except (ValueError, TypeError):
        return None
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError as error:
        parameters = (str(one.replace(annotation=one.empty)) for one in signature.parameters.values())
        return f"({', '.join(parameters)})", str(error)
    if known:
        _FITTING.setdefault(function, set()).add(key)
    return None


def _instead(problem: str, called: Any, itself: bool, f: str, arguments: list[str], method: str | None) -> str:
    """Say what to write."""
    names = re.findall(r"'(\w+)'", problem)
    _, kind, method_name = ("", "Class", *getattr(called, "__qualname__", "").split("."))[-3:]
    if method_name == "__init__":
        return f"Bind what it's built with, neither more nor less: `functools.partial({kind}, ...)`."
    if problem.startswith("missing"):
        if itself and next(iter(inspect.signature(called).parameters)) == "self":
            return f"It is a method: give that of an object, `{kind}().{method_name}`."
        write = f"{f}(..., {names[0]}=...)" if method is None else f"docs.{method}({f}, {names[0]}=...)"
        return f"Give it that, too, `{write}`, or give the parameter a default, `{names[0]}=None`."
    if problem.startswith("multiple"):
        return f"Leave out `{names[0]}=`: another argument has its place already."
    parameters = ", ".join(argument.removesuffix("=...") for argument in arguments)
    return f"Write a parameter for each, `def {f}({parameters})`, or leave out what it doesn't take."


# --- items ---------------------------------------------------------------------------------------------------------------


def check_items(iterable: Any) -> None:
    """Refuse what has no items, none any more, others than it seems, or a different order in each process.

    Raises
    ------
    UsageError
        Saying what to give instead.

    Examples
    --------
    >>> check_items(range(3))
    >>> check_items({"b", "a"})
    Traceback (most recent call last):
    parflow.errors.UsageError: items() was given a set, whose order differs from process to process: write items(sorted(...))
    """
    if (problem := _no_items(iterable)) is not None:
        raise UsageError(f"items() was given {problem}")


_INSTEAD: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (str, "text, whose items are its characters: write items([text]) for one record, read_lines(path) for the lines of a file"),
    ((bytes, bytearray), "bytes, whose items are numbers: write items([data]) for one record"),
    ((set, frozenset), "a set, whose order differs from process to process: write items(sorted(...))"),
    (Mapping, "a mapping, whose items are its keys alone: write items(mapping.items()), or items(list(mapping)) for the keys"),
    (os.PathLike, "a path: write read_files(path) or read_lines(path), or items([path]) for one record"),
)
_INSTEAD_BY_NAME = {
    "pandas.DataFrame": "a DataFrame, whose items are its columns' names: write items(frame.to_dict('records')) for its rows",
    "pyarrow.Table": "a Table, whose items are its columns: write items(table.to_pylist()) for its rows",
    "dask.Bag": "a bag: write from_dask(bag)",
    "dask.DataFrame": "a Dask DataFrame: write from_dask(frame)",
    "dask.Delayed": "a Delayed: write from_dask([delayed])",
}


def _no_items(iterable: Any) -> str | None:
    kind = type(iterable)
    for kinds, instead in _INSTEAD:
        if isinstance(iterable, kinds):
            return instead
    if instead := _INSTEAD_BY_NAME.get(f"{kind.__module__.partition('.')[0]}.{kind.__name__}", ""):
        return instead
    if isinstance(iterable, types.GeneratorType) and inspect.getgeneratorstate(iterable) == inspect.GEN_CLOSED:
        return f"the generator {iterable.__name__!r}, which has ended already: make it anew, or write items(list(...)) at first"
    if hasattr(kind, "__iter__") or hasattr(kind, "__getitem__"):
        return None
    if hasattr(kind, "__aiter__"):
        return f"{iterable!r}, which is async: write items([item async for item in ...])"
    if callable(iterable):
        return f"{iterable!r}, which has to be called: write items({getattr(iterable, '__name__', 'f')}())"
    return f"{iterable!r}, which can't be gone through: write items([...]), with the records in the list"


def check_generators(sources: Iterable[Any]) -> None:
    """Refuse two sources that take their items from one iterator: the second would find what the first left.

    Parameters
    ----------
    sources : iterable of sources
        Those that a plan's stages list, one of each; those without an ``iterable`` are passed over.

    Raises
    ------
    GraphError
        Saying what to give instead.

    Examples
    --------
    >>> from parflow.storage.sources.items import ItemsSource
    >>> numbers = iter([1, 2])
    >>> check_generators(ItemsSource(numbers) for _ in range(2))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    parflow.errors.GraphError: an iterator, list_iterator, was passed twice to items(): ...
    """
    takers: dict[int, int] = {}
    for place, source in enumerate(sources):
        iterable = getattr(source, "iterable", None)
        if hasattr(type(iterable), "__next__") and takers.setdefault(id(iterable), place) != place:
            name = getattr(iterable, "__name__", type(iterable).__name__)
            raise GraphError(
                f"an iterator, {name}, was passed twice to items(): what one takes from it, the other misses. Write "
                "items(list(...)), or use one dataset in both branches: docs = pf.items(...), docs.map(f) and docs.map(g)."
            )


# --- paths that inputs and outputs share -----------------------------------------------------------------------------------

_SINK_FILES = 100
"""Names of a sink's files that an input's pattern is tried with."""


def check_sinks(sinks: Iterable[tuple[str, Any]], sources: Iterable[Any]) -> None:
    """Refuse sinks that share a folder, and inputs that would read what a sink writes.

    Patterns match as they do when files are listed; local paths are compared with their links resolved.

    Parameters
    ----------
    sinks : iterable of (str, sink)
        Each output's name and sink: ``path``, a folder, and the ``extension`` of its files.
    sources : iterable of sources
        Those without ``paths`` are passed over.

    Raises
    ------
    GraphError
        Naming both, and what to write instead.

    Examples
    --------
    >>> from parflow.storage.sinks import JSONLinesSink
    >>> from parflow.storage.sources.lines import JSONLinesSource
    >>> check_sinks([("write_jsonl out", JSONLinesSink("out"))], [JSONLinesSource("in/*.jsonl")])
    >>> check_sinks([("write_jsonl out", JSONLinesSink("out"))], [JSONLinesSource("out/*.jsonl")])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    parflow.errors.GraphError: 'write_jsonl out' would write what read_jsonl reads: ...
    """
    folders: dict[tuple[str, ...], tuple[str, Any]] = {}
    for name, sink in sinks:
        folder = _place(sink.path)
        for other, (taken, there) in folders.items():
            if folder[: len(other)] == other or other[: len(folder)] == folder:
                how = "" if folder == other else ", one inside of the other"
                free = min(there.path, sink.path, key=len) + "-2"
                raise GraphError(
                    f"two sinks, {taken} and {name}, write to {there.path!r} and {sink.path!r}{how}; give each a folder of its "
                    f"own, such as {free!r}"
                )
        folders[folder] = name, sink
    if not folders:
        return
    place = functools.cache(_place)  # many inputs are in few folders
    for source in sources:
        for path in getattr(source, "paths", ()):
            for folder, (name, sink) in folders.items():
                if (file := _read_from(path, folder, sink.extension, place)) is not None:
                    free = sink.path + "-2"
                    if _read_from(path, _place(free), sink.extension, place) is not None:
                        free = _split(path)[0] + "-out"
                    raise GraphError(
                        f"{name!r} would write what {source.name} reads: {path!r} names {file!r} in its folder {sink.path!r}. "
                        f"Write to a folder that no input is in, such as {free!r}. To go on with what is "
                        "written, use the dataset that is written, in place of reading it again."
                    )


def _place(path: str) -> tuple[str, ...]:
    """Split a path or URL into names, with links resolved: what is compared."""
    text = path.removeprefix("file://").removeprefix("local://")
    scheme, mark, rest = text.partition("://")
    if not mark:
        scheme, rest = "", os.path.realpath(os.path.expanduser(text))
    return (scheme, *(part for part in rest.split("/") if part))


def _read_from(path: str, folder: tuple[str, ...], extension: str, place: Callable[[str], tuple[str, ...]]) -> str | None:
    """Return the name of a file that a sink writes to its folder and that an input's path names."""
    part = re.compile(rf"part-\d{{5,}}\.{extension}")
    last = path.rpartition("/")[2]
    if not _MAGIC(path) and last != MANIFEST and not part.fullmatch(last):
        return None
    base, pattern = _split(path)
    where = place(base)
    if folder[: len(where)] != where:
        return None
    rules = tuple(_rule(segment) for segment in [*pattern, *(["*"] if last == "**" else [])])
    places = _through(rules, 1)
    for name in folder[len(where) :]:
        places = _next(rules, places, name)
    names = [last] if part.fullmatch(last) else [*part_names(_SINK_FILES, extension), MANIFEST]
    return next((name for name in names if _next(rules, places, name) >> len(rules) & 1), None)


def _split(path: str) -> tuple[str, list[str]]:
    """Split an input's path into a folder, and the pattern or the name in it."""
    if "://" not in path:
        base, pattern = split_local(path)
        return (base, pattern) if pattern else (os.path.dirname(path), [os.path.basename(path)])
    parts = path.rpartition("::")[2].split("/")  # of a chain, the last is what others are in
    first = next((place for place, part in enumerate(parts) if _MAGIC(part)), len(parts) - 1)
    return "/".join(parts[:first]), parts[first:]


# --- graphs without an end -------------------------------------------------------------------------------------------------

DEEPEST = 50
"""Graphs of one workflow that may be built within one another."""

_BUILDING: ContextVar[tuple[Any, ...]] = ContextVar("parflow_building", default=())


class _EndlessError(Exception):
    """Goes up to the workflow that was called first, so that the error shown has no thousand lines of calls."""


@contextmanager
def guard_recursion(function: Any, name: str) -> Iterator[None]:
    """Build a workflow's graph in here; one that calls itself again and again ends in a GraphError.

    Nodes never change, so a graph has no cycle; a graph without an end is the only way to ask for one.

    Parameters
    ----------
    function : callable
        The workflow's function.
    name : str
        The workflow's name, for the message.

    Raises
    ------
    GraphError
        Naming the workflow, and how to decide when there are results.

    Examples
    --------
    >>> def again():
    ...     with guard_recursion(again, "again"):
    ...         again()
    >>> again()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    parflow.errors.GraphError: workflow 'again' calls itself without an end: 50 of its graphs were being built ...
    """
    building = _BUILDING.get()
    if building.count(function) >= DEEPEST:
        raise _EndlessError(name)
    token = _BUILDING.set((*building, function))
    try:
        yield
    except _EndlessError as error:
        if building:
            raise
        raise GraphError(
            f"workflow {str(error)!r} calls itself without an end: {DEEPEST} of its graphs were being built in one another. "
            "A graph is built before anything runs, so no result can end it. Let a task decide, which gets the result and "
            "returns what to go on with: `@pf.task def next_round(value): return value if value > 0.9 else one_more(value)`."
        ) from None
    finally:
        _BUILDING.reset(token)
