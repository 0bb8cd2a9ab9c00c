"""Tasks and workflows: functions with policies, and functions that build graphs."""

from __future__ import annotations

import contextvars
import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

from parflow.api.checks import guard_recursion
from parflow.core.forms import BATCHES, Batch, Batched, Concurrent, is_async
from parflow.core.plan import Plan
from parflow.core.planner import make_plan, reach
from parflow.errors import GraphError, UsageError
from parflow.model import nbytes, seconds
from parflow.nodes import Task, Use
from parflow.policies import Breaker, Retry, Tolerance, at_least_one, per_second
from parflow.storage.sources.stored import StoredSource

if TYPE_CHECKING:
    from parflow.api.lazy import Value
    from parflow.api.runs import Run

_MADE: contextvars.ContextVar[list[Value] | None] = contextvars.ContextVar("parflow_made", default=None)
# Set only while a @workflow function runs: it gathers the sinks and calls that the function makes without returning them.

LOOK = 64
"""Items of each list among a task's arguments that are looked at to see whether one is lazy."""


def current_workflow() -> list[Value] | None:
    """Return where the workflow being built gathers its sinks and calls; None outside of one."""
    return _MADE.get()


def plan_of(name: str, uses: Iterable[Use]) -> Plan:
    """Plan a graph, and check it as a whole.

    Raises
    ------
    GraphError
        When it makes no sense.
    """
    from parflow.api.checks import check_generators, check_sinks

    plan = make_plan(name, uses, StoredSource)
    sources = [stage.source for stage in plan.stages if stage.base is None]
    check_generators(sources)
    sinks = [(output.name, output.body) for stage in plan.stages for output in stage.outputs if output.kind == "sink"]
    if sinks:
        check_sinks(sinks, sources)
    return plan


class LazyTask(Task):
    """A task as users hold it: called in a workflow, or with something lazy, it adds a call to the graph."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the plain function, or return a `Value` of the call: in a workflow, or when an argument is lazy."""
        from parflow.api.lazy import Lazy, make_call

        if _MADE.get() is not None or any(_has(item, Lazy) for item in (*args, *kwargs.values())):
            return make_call(self, args, kwargs)
        return self.function(*args, **kwargs)


def _has(value: Any, kind: type) -> bool:
    if isinstance(value, kind):
        return True
    if isinstance(value, (list, tuple, dict)):
        items = value.values() if isinstance(value, dict) else value
        return any(_has(item, kind) for item in itertools.islice(items, LOOK))
    return False


@overload
def task(function: Callable[..., Any], /) -> LazyTask: ...
@overload
def task(
    *,
    timeout: float | str | None = None,
    memory: float | str | None = None,
    retry: Retry | int | None = None,
    max_failures: float | None = None,
    breaker: Breaker | None = None,
    limit: int | None = None,
    rate: float | str | None = None,
    resources: dict[str, float] | None = None,
    compensate: Callable[[Any], Any] | None = None,
    in_doubt: Literal["stop", "retry"] = "stop",
    concurrency: int | None = None,
    outputs: int = 1,
    name: str | None = None,
    version: str = "",
) -> Callable[[Callable[..., Any]], LazyTask]: ...
def task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    timeout: float | str | None = None,
    memory: float | str | None = None,
    retry: Retry | int | None = None,
    max_failures: float | None = None,
    breaker: Breaker | None = None,
    limit: int | None = None,
    rate: float | str | None = None,
    resources: dict[str, float] | None = None,
    compensate: Callable[[Any], Any] | None = None,
    in_doubt: Literal["stop", "retry"] = "stop",
    concurrency: int | None = None,
    outputs: int = 1,
    name: str | None = None,
    version: str = "",
) -> LazyTask | Callable[[Callable[..., Any]], LazyTask]:
    """Give a function, plain or ``async``, or a class policies. Called, it stays what it is.

    Called in a workflow function, or anywhere with a lazy argument, a task adds a call to the graph and returns a `Value`.
    Calls that don't wait for each other run in parallel. Lazy arguments may be anywhere in lists, tuples and dicts; a
    `Dataset` is given as the list of its records. A task may return something lazy (what another workflow or call returns),
    which then runs in its place: so a graph may loop, and branch on what it finds.

    A class whose instances can be called is built once in each child, when the first record comes (a model is loaded, a
    connection opened), and its instance is then called with every record of the run. A child that was killed is replaced by
    one that builds anew; a child that ends in peace calls ``close()``, if there is one. When ``__init__`` raises, the step is
    broken and the run ends: no record is to blame. Arguments are bound with `functools.partial`. Without children
    (``isolation="inline"``, plain Dask) a process has one instance, whose calls take turns, and never closes it.

    Parameters
    ----------
    timeout : float or str, optional
        What one call may take: seconds, or text such as ``"30s"``. A record that takes longer becomes a dead letter.
    memory : int or str, optional
        What the child process may use more than it starts with: bytes, or text such as ``"512MiB"``.
    retry : Retry or int, optional
        What is tried again, how often and when; a number of attempts for short.
    max_failures : float, optional
        How many of the step's records may fail, a count or a share; without it they count among the run's.
    breaker : Breaker, optional
        When the step is held back for a while because it fails.
    limit : int, optional
        How many chunks, or calls, of the step run at once.
    rate : float or str, optional
        Calls a second of the whole run, or text such as ``"100/s"``, ``"6000/min"``; attempts count.
    resources : dict, optional
        Dask worker resources that a chunk or call of it takes, such as ``{"GPU": 1}``.
    compensate : callable, optional
        Undoes a call, given what it returned: when a later step of the same record fails for good, or the run does. Each call
        is then made once, as by `once`, and undone once.
    in_doubt : {"stop", "retry"}
        Of a task with ``compensate``: what is done about a call, or its undoing, whose process died. With "stop" the record is
        set aside, so that somebody looks whether it was done; "retry" does it again, where that does no harm.
    concurrency : int, optional
        Calls of an ``async`` function that are in flight at once in each child; by default 1. What follows the step gets its
        results in the records' order, so a slow record holds up those behind it once so many are waiting.
    outputs : int
        How many results a call has: with more than one the function returns a tuple, and the call gives a tuple of values.
    name : str, optional
        The step's name; by default the function's.
    version : str
        Change it to say that the step does something else now, where its code doesn't show it.

    Returns
    -------
    Task
        To be given to `Dataset.map` and its like, or to be called.

    Raises
    ------
    UsageError
        When ``concurrency`` or ``outputs`` is less than 1, or ``concurrency`` given for a function that is not ``async``.

    Examples
    --------
    >>> @task(timeout="30s")
    ... def double(x):
    ...     return 2 * x
    >>> double(4), double.timeout
    (8, 30.0)

    Calls on values:

    >>> import parflow as pf
    >>> @task(outputs=2)
    ... def divide(a, b):
    ...     return divmod(a, b)
    >>> quotient, rest = divide(pf.items([20, 3]).reduce(pf.sum()), 5)
    >>> (quotient + rest).compute()
    7

    A class, built once for many records:

    >>> from functools import partial
    >>> class Stemmer:
    ...     def __init__(self, language="en"):
    ...         self.ending = {"en": "s", "de": "e"}[language]
    ...     def __call__(self, word):
    ...         return word.removesuffix(self.ending)
    >>> pf.items(["cats", "dogs"]).map(Stemmer).compute()
    ['cat', 'dog']
    >>> pf.items(["Hunde"]).map(partial(Stemmer, "de")).compute()
    ['Hund']

    Many calls that wait at the same time:

    >>> import asyncio
    >>> @task(concurrency=100, timeout="10s")
    ... async def fetch(n):
    ...     await asyncio.sleep(0.01)
    ...     return n * n
    >>> pf.items(range(4)).map(fetch).compute()
    [0, 1, 4, 9]
    """

    def wrap(function: Callable[..., Any]) -> LazyTask:
        if not isinstance(outputs, int) or outputs < 1:
            raise UsageError(f"outputs={outputs!r} is no number of results; write 1 or more")
        if in_doubt not in ("stop", "retry"):
            raise UsageError(f"in_doubt={in_doubt!r} is unknown; write 'stop' or 'retry'")
        if not callable(function):
            raise UsageError(f"@task goes on a function, not on {function!r}; write its options by name: @task(timeout='30s')")
        return LazyTask(
            function if concurrency is None else _concurrent(function, concurrency),
            name or _name(function),
            seconds(timeout) if timeout is not None else None,
            nbytes(memory) if memory is not None else None,
            version,
            outputs,
            Retry(retry) if isinstance(retry, int) else retry,
            max_failures if max_failures is None else Tolerance(max_failures).max_failures,
            breaker,
            limit if limit is None else at_least_one("limit", limit),
            per_second(rate) if rate is not None else None,
            resources,
            compensate,
            in_doubt,
        )

    return wrap if function is None else wrap(function)


def _concurrent(function: Callable[..., Any], calls: int) -> Concurrent:
    if not isinstance(calls, int) or calls < 1:
        raise UsageError(f"concurrency={calls!r} is no number of calls; write 1 or more")
    if not is_async(function):
        raise UsageError(
            f"concurrency={calls} is for async functions, and {_name(function)!r} is none. Plain functions run one a child: "
            "give the run more workers, or write `async def`."
        )
    return Concurrent(function, calls)


def as_task(function: Any, name: str | None) -> Task:
    """Return a task for anything that can be called with a record."""
    if isinstance(function, Task):
        return function if name is None else replace(function, name=name)
    if not callable(function):
        raise GraphError(f"a step needs a function, not {function!r}")
    return LazyTask(function, name or _name(function))


def as_batches(function: Any, size: int, form: Batch, name: str | None) -> Task:
    """Return a task that is called with batches."""
    task = as_task(function, name)
    if is_async(task.function):
        raise GraphError(f"map_batches needs a plain function, and {task.name!r} is async; give it to map with concurrency=")
    if task.compensate is not None:
        raise GraphError(
            f"task {task.name!r} has compensate=, which undoes what was done for one record: give it to map, not to map_batches"
        )
    if not isinstance(size, int) or size < 1:
        raise UsageError(f"size={size!r} is no number of records; write 1 or more")
    if form not in BATCHES:
        raise UsageError(f"as_={form!r} is unknown; write one of {', '.join(map(repr, BATCHES))}")
    return replace(task, function=Batched(task.function, size, form))


def _name(function: Any) -> str:
    if isinstance(function, functools.partial):
        return _name(function.func)
    name = str(getattr(function, "__name__", "") or type(function).__name__)
    return "lambda" if name == "<lambda>" else name


def like(kind: Any, items: list[Any]) -> Any:
    """Return a list or tuple of the kind of another one, a named tuple as well."""
    return type(kind)(*items) if hasattr(kind, "_fields") else type(kind)(items)


class Bound:
    """A workflow with its arguments: what is to be run.

    Attributes
    ----------
    name : str
        The workflow's name.
    arguments : dict
        What it was called with.
    """

    def __init__(self, name: str, arguments: dict[str, Any], returned: Any, made: Iterable[Value]) -> None:
        self.name = name
        self.arguments = arguments
        self.unbound = returned
        self.beside: list[Use] = []
        self._uses: dict[tuple[int, int], Use] = {}
        self._places: dict[tuple[int, int], int] = {}
        self._shape = self._take(returned)
        self._want(made)

    def _take(self, returned: Any) -> Any:
        """Replace each lazy result by its number, in the structure that the workflow returned."""
        from parflow.api.lazy import Lazy

        if isinstance(returned, Lazy):
            return self._place(returned)
        if isinstance(returned, (tuple, list)):
            return like(returned, [self._take(item) for item in returned])
        if isinstance(returned, dict):
            return {key: self._take(item) for key, item in returned.items()}
        if returned is None:
            return None
        raise GraphError(
            f"workflow {self.name!r} returned {returned!r}; return lazy values and datasets, or tuples and dicts of them"
        )

    def _place(self, lazy: Any) -> int:
        use = lazy._use()  # noqa: SLF001 - one face
        key = (id(use.node), use.item)
        if key not in self._uses:
            self._places[key] = len(self._uses)
            self._uses[key] = use
        return self._places[key]

    def _want(self, made: Iterable[Value]) -> None:
        """Want also what the workflow made and nothing rests on: files that it writes, calls whose results it leaves alone."""
        left = [value._use() for value in made]  # noqa: SLF001 - one face
        if not left:
            return
        known = {id(node) for node in reach(use.node for use in self._uses.values())}
        alone = self.beside
        for use in reversed(left):  # what rests on another one was made after it
            if id(use.node) not in known:
                alone.append(use)
                known.update(id(node) for node in reach([use.node]))
        for use in reversed(alone):
            self._uses[id(use.node), use.item] = use

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({arguments})"

    def plan(self) -> Plan:
        """Return the stages and calls that a run has; ``print(flow(...).plan().explain())`` shows them.

        Raises
        ------
        GraphError
            When the graph makes no sense.
        """
        return plan_of(self.name, self._uses.values())

    def picture(self) -> str:
        """Return a picture of the plan, as SVG: stages, steps, barriers, calls. Notebooks show it."""
        from parflow.views.picture import picture

        return picture(self.plan())

    def _repr_html_(self) -> str:
        from parflow.views.picture import html_of

        return html_of(self.plan())

    @staticmethod
    def __parflow_plan__(made: Any, results: int) -> Plan:
        """Return the plan of what a task returned, a workflow with its arguments among it."""
        from parflow.api.lazy import uses_of

        return plan_of("graph", uses_of(made, results))

    def run(self, **options: Any) -> Run:
        """Run durably: journal, store, isolation.

        Parameters
        ----------
        workers : int, optional
            Slots of the local cluster; by default the cores.
        cluster : str or object
            ``"local"`` (in this process), the address of a Dask scheduler, a ``Client`` or a Dask cluster.
        max_failures : float
            Dead letters that barriers open over: a count, or a share below 1. Tasks may have limits of their own.
        timeout, memory : float or str, optional
            What a call may take (seconds, ``"30s"``), and a child (bytes, ``"512MiB"``), for tasks that say nothing.
        retry : Retry, int or dict, optional
            What is tried again, for tasks that say nothing; a dict by step name goes before what tasks say.
        compensate : bool
            When the run fails, undo all that its compensable steps did, the newest first.
        grace : float or str
            What is in flight has so long to come to its next record when the run ends early; then it's cancelled.
        isolation : {"process", "inline"}
            Whether records run in children.
        slice : float or str
            How long a chunk may take before it's committed as far as it is.
        home, store : path-like or str, optional
            Where the journal is (by default ``$PARFLOW_HOME`` or ``.parflow``), and where results are kept.
        wait : bool
            Whether to return at the end only.
        progress : bool, optional
            Whether to show progress; by default in a terminal.

        Returns
        -------
        Run
            The run.
        """
        from parflow.api.starting import start

        return start(self.plan(), shape=self._shape, flow=self.name, **options)

    def compute(self, **options: Any) -> Any:
        """Compute as plain Dask, in memory; ``options`` are those of ``dask.compute``."""
        from parflow.api.runs import fill

        return fill(self._shape, self.to_delayed().compute(**options))

    def to_delayed(self) -> Any:
        """Return the whole graph as one Dask ``Delayed``, whose result is the list of all results."""
        from dask.delayed import Delayed

        from parflow.runtime.graph import whole_graph

        graph, key = whole_graph(self.plan())
        return Delayed(key, graph)

    def visualize(self, filename: str | os.PathLike[str] = "parflow", **options: Any) -> Any:
        """Draw the plain Dask graph; ``options`` are those of ``dask.visualize``."""
        return self.to_delayed().visualize(filename=os.fspath(filename), **options)


class Workflow:
    """A function that builds a graph from its arguments. Made by `workflow`."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Build the graph; nothing is read or run.

        Returns
        -------
        Bound
            With `run`, `compute` and `plan`. Within another workflow function: what this one returns, as a part of that graph.

        Raises
        ------
        GraphError
            When the function doesn't return something lazy.
        """
        if current_workflow() is not None:  # a part of another one
            with guard_recursion(self.function, self.name):
                return self.function(*args, **kwargs)
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        made: list[Value] = []
        token = _MADE.set(made)
        try:
            with guard_recursion(self.function, self.name):
                returned = self.function(*args, **kwargs)
        finally:
            _MADE.reset(token)
        return Bound(self.name, dict(bound.arguments), returned, made)


@overload
def workflow(function: Callable[..., Any], /) -> Workflow: ...
@overload
def workflow(*, name: str | None = None) -> Callable[[Callable[..., Any]], Workflow]: ...
def workflow(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None
) -> Workflow | Callable[[Callable[..., Any]], Workflow]:
    """Make a workflow of a function that builds a graph.

    Parameters
    ----------
    name : str, optional
        The workflow's name in listings; by default the function's.

    Returns
    -------
    Workflow
        Called with arguments it gives something to `run`.

    Examples
    --------
    >>> import parflow as pf
    >>> @pf.workflow
    ... def total(n: int = 3):
    ...     return pf.items(range(n)).reduce(pf.sum())
    >>> total(5).compute()
    10
    """

    def wrap(function: Callable[..., Any]) -> Workflow:
        return Workflow(function, name or _name(function))

    return wrap if function is None else wrap(function)
