"""Tasks and workflows: functions with policies, and functions that build graphs."""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

from parflow.core.forms import BATCHES, Batch, Batched, Concurrent, is_async
from parflow.core.plan import Plan, make_plan
from parflow.errors import GraphError, UsageError
from parflow.model import OutputNode, Task, nbytes, seconds

if TYPE_CHECKING:
    from parflow.api.datasets import Value
    from parflow.api.runs import Run

_WRITTEN: contextvars.ContextVar[list[Value] | None] = contextvars.ContextVar("parflow_written", default=None)
# Set only while a @workflow function runs: it gathers the sinks that the function writes to without returning them.


def current_workflow() -> list[Value] | None:
    """Return where the workflow being built gathers its sinks; None outside of one."""
    return _WRITTEN.get()


@overload
def task(function: Callable[..., Any], /) -> Task: ...
@overload
def task(
    *,
    timeout: float | str | None = None,
    memory: float | str | None = None,
    concurrency: int | None = None,
    name: str | None = None,
    version: str = "",
) -> Callable[[Callable[..., Any]], Task]: ...
def task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    timeout: float | str | None = None,
    memory: float | str | None = None,
    concurrency: int | None = None,
    name: str | None = None,
    version: str = "",
) -> Task | Callable[[Callable[..., Any]], Task]:
    """Give a function, plain or ``async``, or a class policies. Called, it stays what it is.

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
    concurrency : int, optional
        Calls of an ``async`` function that are in flight at once in each child; by default 1. What follows the step gets its
        results in the records' order, so a slow record holds up those behind it once so many are waiting.
    name : str, optional
        The step's name; by default the function's.
    version : str
        Change it to say that the step does something else now, where its code doesn't show it.

    Returns
    -------
    Task
        To be given to `Dataset.map` and its like.

    Raises
    ------
    UsageError
        When ``concurrency`` is less than 1, or given for a function that is not ``async``.

    Examples
    --------
    >>> @task(timeout="30s")
    ... def double(x):
    ...     return 2 * x
    >>> double(4), double.timeout
    (8, 30.0)

    A class, built once for many records:

    >>> import parflow as pf
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

    def wrap(function: Callable[..., Any]) -> Task:
        if not callable(function):
            raise UsageError(f"@task goes on a function, not on {function!r}; write its options by name: @task(timeout='30s')")
        return Task(
            function if concurrency is None else _concurrent(function, concurrency),
            name or _name(function),
            seconds(timeout) if timeout is not None else None,
            nbytes(memory) if memory is not None else None,
            version,
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
    return Task(function, name or _name(function))


def as_batches(function: Any, size: int, form: Batch, name: str | None) -> Task:
    """Return a task that is called with batches."""
    task = as_task(function, name)
    if is_async(task.function):
        raise GraphError(f"map_batches needs a plain function, and {task.name!r} is async; give it to map with concurrency=")
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


class Bound:
    """A workflow with its arguments: what is to be run.

    Attributes
    ----------
    name : str
        The workflow's name.
    arguments : dict
        What it was called with.
    """

    def __init__(self, name: str, arguments: dict[str, Any], returned: Any, written: Iterable[Value]) -> None:
        self.name = name
        self.arguments = arguments
        self._outputs: list[OutputNode] = []
        self._shape = self._take(returned)
        for value in written:
            self._place(value)

    def _take(self, returned: Any) -> Any:
        """Replace each lazy result by its number, in the structure that the workflow returned."""
        from parflow.api.datasets import Lazy

        if isinstance(returned, Lazy):
            return self._place(returned)
        if isinstance(returned, (tuple, list)):
            return type(returned)(self._take(item) for item in returned)
        if isinstance(returned, dict):
            return {key: self._take(item) for key, item in returned.items()}
        if returned is None:
            return None
        raise GraphError(
            f"workflow {self.name!r} returned {returned!r}; return lazy values and datasets, or tuples and dicts of them"
        )

    def _place(self, lazy: Any) -> int:
        node = lazy._output()  # noqa: SLF001 - the two classes are one face
        if node not in self._outputs:
            self._outputs.append(node)
        return self._outputs.index(node)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({arguments})"

    def plan(self) -> Plan:
        """Return the stages that a run has; ``print(flow(...).plan().explain())`` shows them."""
        return make_plan(self.name, self._outputs)

    def run(self, **options: Any) -> Run:
        """Run durably; the options are those of `Workflow.run`."""
        from parflow.api.runs import start

        return start(self.plan(), shape=self._shape, flow=self.name, **options)

    def compute(self, **options: Any) -> Any:
        """Compute as plain Dask, in memory; ``options`` are those of ``dask.compute``."""
        import dask

        from parflow.api.datasets import Dataset, Value
        from parflow.api.runs import fill
        from parflow.model import CollectNode

        lazies = [Dataset(node.parent) if isinstance(node, CollectNode) else Value(node) for node in self._outputs]
        return fill(self._shape, dask.compute(*lazies, **options))


class Workflow:
    """A function that builds a graph from its arguments. Made by `workflow`."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Bound:
        """Build the graph; nothing is read or run.

        Returns
        -------
        Bound
            With `run`, `compute` and `plan`.

        Raises
        ------
        GraphError
            When the function doesn't return something lazy.
        """
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        written: list[Value] = []
        token = _WRITTEN.set(written)
        try:
            returned = self.function(*args, **kwargs)
        finally:
            _WRITTEN.reset(token)
        return Bound(self.name, dict(bound.arguments), returned, written)


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
