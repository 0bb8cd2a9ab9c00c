"""Decisions over branches, and fan-out over what a step made at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from parflow.api.datasets import Dataset
from parflow.api.lazy import Lazy, Value, arguments_of, make_call, packed, remember
from parflow.api.tasks import as_task
from parflow.errors import GraphError, UsageError
from parflow.nodes import CallNode, SourceNode, Task
from parflow.storage.sources.stored import ValueSource


def call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Add a call to the graph, wherever you are: what calling a task does within a workflow.

    Parameters
    ----------
    function : callable or Task
        What to call once its lazy arguments are computed.
    *args, **kwargs
        Any values, lazy ones among them, however deep in lists, tuples and dicts.

    Returns
    -------
    Value, or a tuple of them for a task with several outputs

    Raises
    ------
    GraphError
        When the function can't be called so.

    Examples
    --------
    >>> import parflow as pf
    >>> total = pf.items([1, 2, 3]).reduce(pf.sum())
    >>> pf.call(max, [total, 4]).compute()
    6
    """
    return make_call(as_task(function, None), args, kwargs)


def when(condition: Any, then: Any, otherwise: Any = None) -> Value:
    """Run one of two branches, chosen when the condition is computed; nothing of the other one runs.

    Parameters
    ----------
    condition : Value
        Decides by its truth. The decision is kept: a run that is resumed doesn't decide again.
    then, otherwise : Value, Dataset, or any value
        The branches. Of a dataset, the value is the list of its records.

    Returns
    -------
    Value
        That of the chosen branch.

    Examples
    --------
    >>> import parflow as pf
    >>> share = pf.items([0.2, 0.4]).reduce(pf.mean())
    >>> pf.when(share > 0.25, pf.call("alert: {:.0%}".format, share), "all quiet").compute()
    'alert: 30%'
    """
    return _choose("when", _truth, (condition,), (then, otherwise))


def switch(value: Any, branches: Mapping[Any, Any], default: Any = None) -> Value:
    """Run the branch that belongs to a value; nothing of the others runs.

    Parameters
    ----------
    value : Value
        What decides.
    branches : mapping
        For each value, what to run: a Value, a Dataset, or any value.
    default : Value, Dataset, or any value
        What to run when the value is none of them.

    Examples
    --------
    >>> import parflow as pf
    >>> kind = pf.items(["pdf", "mail", "pdf"]).reduce(pf.top(1))[0]
    >>> pf.switch(kind, {"pdf": "read pages", "mail": "read parts"}).compute()
    'read pages'
    """
    if not isinstance(branches, Mapping) or not branches:
        raise UsageError(f"switch() needs a branch for each value: {{'a': …, 'b': …}}, not {branches!r}")
    return _choose("switch", _place, (value, [*branches]), (*branches.values(), default))


def settle(*branches: Any) -> Value:
    """Wait until all branches have ended, whether they succeeded or failed, so that a later step can judge.

    Parameters
    ----------
    *branches : Value or Dataset
        They run side by side; what fails in one of them doesn't end the run.

    Returns
    -------
    Value
        A list with an `Outcome` for each branch.

    Examples
    --------
    >>> import parflow as pf
    >>> outcomes = pf.settle(pf.call(int, "1"), pf.call(int, "one"))
    >>> [outcome.value if outcome.ok else outcome.failure.error for outcome in outcomes.compute()]
    [1, 'ValueError']
    """
    return _decide("settle", branches, len(branches))


def race(*branches: Any) -> Value:
    """Take the result of the branch that succeeds first; the others are cancelled.

    What a cancelled branch has in hand is ended: its function gets `parflow.Cancelled` raised (a coroutine that waits gets
    `asyncio.CancelledError`, as ever), and two seconds to clean up.

    Parameters
    ----------
    *branches : Value or Dataset
        They run side by side. The race fails when all of them have.

    Returns
    -------
    Value
        The first one's. Which one it was is kept: a run that is resumed doesn't race again.

    Examples
    --------
    >>> import parflow as pf
    >>> pf.race(pf.call(int, "one"), pf.call(int, "2")).compute()
    2
    """
    return _decide("race", branches, 1)


def quorum(n: int, *branches: Any) -> Value:
    """Take the results of the first ``n`` branches that succeed; the others are cancelled.

    Parameters
    ----------
    n : int
        How many are enough.
    *branches : Value or Dataset
        They run side by side. The quorum fails when so many have failed that it can't be reached.

    Returns
    -------
    Value
        A list of ``n`` results, in the order of the branches.

    Examples
    --------
    >>> import parflow as pf
    >>> pf.quorum(2, pf.call(int, "1"), pf.call(int, "two"), pf.call(int, "3")).compute()
    [1, 3]
    """
    if not isinstance(n, int) or not 1 <= n <= len(branches):
        raise UsageError(f"quorum({n!r}, …) of {len(branches)} branches can't be: give a number from 1 to that of the branches")
    return _decide("quorum", branches, n)


def expand(function: Callable[..., Any], value: Any, /, *args: Any, name: str | None = None, **kwargs: Any) -> Dataset:
    """Call a function with each item of a list that an upstream step made: fan-out whose width shows at run time.

    Parameters
    ----------
    function : callable or Task
        Called with one item.
    value : Value or Dataset
        Gives a list, or anything to iterate over. Of a dataset, each record is such a list.
    *args, **kwargs
        More arguments of the function, lazy ones among them.
    name : str, optional
        The step's name; by default the function's.

    Returns
    -------
    Dataset
        What the function returned, in the items' order. What is reduced from it is complete when all items are.

    Raises
    ------
    GraphError
        When ``value`` is not lazy.

    Examples
    --------
    >>> import parflow as pf
    >>> pages = pf.call(range, 3)
    >>> pf.expand(lambda page: page * 10, pages).compute()
    [0, 10, 20]
    """
    if isinstance(value, Dataset):
        return value.flat_map(_items, name="items").map(function, *args, name=name, **kwargs)
    if not isinstance(value, Value):
        raise GraphError(
            f"expand() maps over what an upstream step makes, and {value!r} is there already: use pf.items(…).map(function)"
        )
    source = SourceNode(ValueSource(None), value._use())  # noqa: SLF001 - one face
    return Dataset(source).map(function, *args, name=name, **kwargs)


def _choose(name: str, function: Callable[..., int], given: tuple[Any, ...], branches: tuple[Any, ...]) -> Value:
    arms = tuple(map(packed, branches))
    task = Task(function, name)
    made: Value = remember(Value(CallNode("choose", name, task, arguments_of(given, {}), arms)))
    return made


def _decide(kind: Any, branches: tuple[Any, ...], count: int) -> Value:
    lazy = [branch for branch in branches if isinstance(branch, Lazy)]
    if not branches or len(lazy) < len(branches):
        what = "no branch" if not branches else f"{next(b for b in branches if not isinstance(b, Lazy))!r}, which is not lazy"
        raise GraphError(f"{kind}() waits for branches that run, and was given {what}; write pf.call(function, …) for each")
    made: Value = remember(Value(CallNode(kind, kind, arms=tuple(map(packed, branches)), count=count)))
    return made


def _truth(condition: Any) -> int:
    return 0 if condition else 1


def _place(value: Any, cases: list[Any]) -> int:
    return next((place for place, case in enumerate(cases) if case == value), len(cases))


def _items(record: Any) -> Any:
    return record
