"""What a step's code is, as a digest that is the same in every process: the journal's keys never rest on Dask tokens.

A function's fingerprint covers its bytecode and constants, its defaults, what its closure holds, and the functions, classes
and plain values of its own module that it names, so that a change to a helper counts as a change to the step.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import re
import types
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, cast

from parflow.model import digest

_CONSTANTS = (bool, int, float, str, bytes, tuple, frozenset, re.Pattern)

_SCALARS = {type(None), bool, int, float, complex, str, bytes}


def fingerprint(value: Any) -> str:
    """Return the fingerprint of a function, a class or a plain value.

    Parameters
    ----------
    value : object
        Anything; what has no canonical form is named by its type and, where it pickles, by its pickle.

    Returns
    -------
    str
        32 hexadecimal digits, equal in every process with the same code and Python version.

    Examples
    --------
    >>> fingerprint(lambda x: x + 1) == fingerprint(lambda x: x + 2)
    False
    """
    return digest(repr(_canonical(value, frozenset())).encode("utf-8", "surrogateescape"))


def _canonical(value: Any, seen: frozenset[int]) -> Any:
    if type(value) in _SCALARS or isinstance(value, (int, float, complex, str, bytes)):
        return (type(value).__name__, value)
    if id(value) in seen:
        return "again"
    seen |= {id(value)}
    if isinstance(value, types.CodeType):
        consts = tuple(_canonical(const, seen) for const in value.co_consts)
        return ("code", value.co_code, value.co_names, value.co_varnames, value.co_freevars, consts)
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if isinstance(value, (types.MethodType, functools.partial)):
        parts = (
            (value.__func__, value.__self__)
            if isinstance(value, types.MethodType)
            else (value.func, value.args, value.keywords)
        )
        return (type(value).__name__, tuple(_canonical(part, seen) for part in parts))
    if isinstance(value, types.ModuleType):
        return ("module", value.__name__)
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, tuple(_canonical(item, seen) for item in value))
    if isinstance(value, Mapping):
        items = [(_canonical(key, seen), _canonical(item, seen)) for key, item in value.items()]
        return (type(value).__name__, tuple(sorted(items, key=repr)))
    if isinstance(value, AbstractSet):
        return (type(value).__name__, tuple(sorted((_canonical(item, seen) for item in value), key=repr)))
    return _thing(value, seen)


def _thing(value: Any, seen: frozenset[int]) -> Any:
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, type):
        own = {key: _code_of(item) for key, item in vars(value).items()}
        own = {key: item for key, item in own.items() if isinstance(item, (types.FunctionType, int, str, float, tuple))}
        own = {key: item for key, item in own.items() if not key.startswith("__") or isinstance(item, types.FunctionType)}
        bases = tuple(
            _canonical(base, seen) if base.__module__ == value.__module__ else f"{base.__module__}.{base.__qualname__}"
            for base in value.__bases__
        )
        return ("class", f"{value.__module__}.{value.__qualname__}", bases, _canonical(own, seen))
    if dataclasses.is_dataclass(value):
        fields = _compared(cast("Any", type(value)))
        return (name, fields, tuple(_canonical(getattr(value, field), seen) for field in fields))
    wrapped = getattr(value, "__wrapped__", None)
    if isinstance(wrapped, types.FunctionType):
        return (name, _canonical(wrapped, seen))
    if isinstance(getattr(value, "__dict__", None), dict):
        return (name, _canonical(vars(value), seen), _canonical(type(value), seen))
    if callable(value) and hasattr(value, "__qualname__"):
        return ("builtin", getattr(value, "__module__", ""), value.__qualname__)
    try:
        return (name, pickle.dumps(value, protocol=4))
    except Exception:  # noqa: BLE001 - whatever a stranger's pickling raises, the type's name remains
        return (name,)


@functools.cache
def _compared(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind) if field.compare)


def _code_of(item: Any) -> Any:
    """Return the function in what a class makes of one."""
    if isinstance(item, (staticmethod, classmethod)):
        return item.__func__
    if isinstance(item, property):
        return tuple(part for part in (item.fget, item.fset) if part is not None)
    return getattr(item, "func", item) if isinstance(item, functools.cached_property) else item


def _function(function: types.FunctionType, seen: frozenset[int]) -> Any:
    closure = tuple(_cell(cell, seen) for cell in function.__closure__ or ())
    named = {}
    for name in _names(function.__code__):
        item = function.__globals__.get(name)
        mine = getattr(item, "__module__", None) == function.__module__
        code = isinstance(getattr(item, "__wrapped__", item), (types.FunctionType, type))
        if (mine and code) or isinstance(item, _CONSTANTS):
            named[name] = _canonical(item, seen)
    return (
        "function",
        _canonical(function.__code__, seen),
        _canonical(function.__defaults__, seen),
        _canonical(function.__kwdefaults__, seen),
        closure,
        tuple(sorted(named.items())),
    )


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            names |= _names(const)
    return names


def _cell(cell: Any, seen: frozenset[int]) -> Any:
    try:
        return _canonical(cell.cell_contents, seen)
    except ValueError:  # an empty cell: the name is bound later
        return "empty"
