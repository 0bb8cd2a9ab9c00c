"""What is lazy: nodes of a graph that users hold. `Value` is one result; all are Dask collections."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, Self

from parflow.api.checks import check_arguments, check_arity, check_captured
from parflow.api.tasks import Bound, as_task, current_workflow, plan_of
from parflow.core.plan import Plan
from parflow.errors import GraphError, LazyValueError
from parflow.nodes import Arguments, CallNode, OutputNode, Slot, Task, Use, replace_in

if TYPE_CHECKING:
    from parflow.api.runs import Run


class Lazy:
    """What `Dataset` and `Value` share: they plan, run, and take part in Dask's own functions."""

    def _use(self) -> Use:
        """Return the node that gives the result, and which of its results it is."""
        raise NotImplementedError

    def _label(self) -> str:
        return self._use().node.name

    def plan(self) -> Plan:
        """Return the stages and calls that a run would have; `print(x.plan().explain())` shows them.

        Raises
        ------
        GraphError
            When the graph makes no sense.
        """
        return plan_of(self._label(), [self._use()])

    def picture(self) -> str:
        """Return a picture of the plan, as SVG; notebooks show it."""
        from parflow.views.picture import picture

        return picture(self.plan())

    def _repr_html_(self) -> str:
        from parflow.views.picture import html_of

        return html_of(self.plan())

    def run(self, **options: Any) -> Run:
        """Run durably: journal, store, isolation. See `parflow.Bound.run` for the options."""
        from parflow.api.starting import start

        return start(self.plan(), shape=0, flow=self._label(), **options)

    @staticmethod
    def __parflow_plan__(made: Any, results: int) -> Plan:
        """Return the plan of what a task returned: lazy results, maybe among others, which are to be ``results`` many."""
        return plan_of("graph", uses_of(made, results))

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise GraphError(
            f"{self!r} is lazy: it stands for a result and can't travel itself. Give it to a step as an argument of its own, "
            "as in docs.map(f, value), or return it from a task."
        )

    # --- Dask's collection protocol: https://docs.dask.org/en/stable/custom-collections.html ---------------------------

    def _graph(self) -> tuple[dict[Any, Any], list[Any]]:
        from parflow.runtime.graph import plain_graph

        if "_built" not in self.__dict__:
            plan = self.plan()
            for stage in plan.stages:
                stage.source.check()
                for output in stage.outputs:
                    if output.kind == "sink":
                        output.body.check()
            self._built = plain_graph(plan, 0)
        return self._built

    def __dask_graph__(self) -> Any:
        """Return the plain Dask graph."""
        from dask.highlevelgraph import HighLevelGraph

        graph, keys = self._graph()
        return HighLevelGraph.from_collections(keys[0][0], graph, dependencies=[])

    def __dask_keys__(self) -> list[Any]:
        """Return the graph's output keys."""
        return list(self._graph()[1])

    def __dask_layers__(self) -> tuple[str]:
        """Return the graph's one layer."""
        return (self._graph()[1][0][0],)

    def __dask_tokenize__(self) -> Any:
        """Return a name for Dask's caches; parflow's own keys never rest on it."""
        return tuple(self._graph()[1])

    @property
    def expr(self) -> Any:
        """Return Dask's expression, which keeps results in their places beside other kinds of collection."""
        try:
            from parflow.runtime.collection import expression
        except ImportError:  # another Dask: it has the graph and the keys
            return None
        return expression(self)

    @property
    def __dask_optimize__(self) -> Any:
        """Optimise as ``dask.delayed`` does: then Dask computes both together and hands results back in order."""
        from dask.delayed import Delayed

        return Delayed.__dask_optimize__

    @property
    def __dask_scheduler__(self) -> Any:
        """Run on threads unless a client or a scheduler is chosen."""
        from dask.threaded import get

        return get

    def __dask_postpersist__(self) -> Any:
        """Rebuild from results that a cluster holds."""
        return self._rebuild, ()

    def _rebuild(self, graph: Any, **_: Any) -> Any:
        raise NotImplementedError

    def to_delayed(self) -> Any:
        """Return the whole graph as one Dask ``Delayed``: plain Dask, in memory, without journal or isolation.

        Returns
        -------
        dask.delayed.Delayed
            Its result is what `compute` returns.
        """
        raise NotImplementedError

    def compute(self, **options: Any) -> Any:
        """Compute as a plain Dask graph, in memory; ``options`` are those of ``dask.compute``."""
        import dask

        return dask.compute(self, **options)[0]

    def visualize(self, filename: str | os.PathLike[str] = "parflow", **options: Any) -> Any:
        """Draw the plain Dask graph; ``options`` are those of ``dask.visualize``."""
        import dask

        return dask.visualize(self, filename=os.fspath(filename), **options)

    def __bool__(self) -> NoReturn:
        raise LazyValueError(repr(self), "truth")

    def __iter__(self) -> Iterator[Any]:
        raise LazyValueError(repr(self), "items")

    def __contains__(self, item: object) -> NoReturn:
        raise LazyValueError(repr(self), "membership")

    def __len__(self) -> int:
        raise LazyValueError(repr(self), "length")

    def __int__(self) -> int:
        raise LazyValueError(repr(self), "number")

    def __float__(self) -> float:
        raise LazyValueError(repr(self), "number")

    def __index__(self) -> int:
        raise LazyValueError(repr(self), "number")

    def __format__(self, spec: str) -> str:
        if spec:
            raise LazyValueError(repr(self), "format")
        return repr(self)


def _operator(function: Callable[..., Any], *, swapped: bool = False) -> Callable[..., Any]:
    """Make a method that adds a call of an operator to the graph."""
    task = Task(function, function.__name__.strip("_"))

    def method(self: Value, *others: Any) -> Value:
        operands = (*others, self) if swapped else (self, *others)
        return Value(CallNode("call", task.name, task, arguments_of(operands, {})))

    method.__name__ = task.name
    return method


class Value(Lazy):
    """One result, not yet computed: of a reduction, a call or a decision, or the manifest of what a sink wrote.

    Given to a task (in a workflow or anywhere else), to a step (``docs.map(f, value)``) or to an operator, it makes another
    value. Comparing and reckoning with it, or taking an item, is a call as well: ``share > 0.3`` is a `Value`.

    Examples
    --------
    >>> import parflow as pf
    >>> total = pf.items([1, 2, 3]).reduce(pf.sum())
    >>> (total * 10 + 1).compute()
    61
    """

    def __init__(self, node: OutputNode, item: int = 0) -> None:
        self._node = node
        self._item = item

    def _use(self) -> Use:
        return Use(self._node, self._item)

    def __repr__(self) -> str:
        many = isinstance(self._node, CallNode) and self._node.results > 1
        return f"Value<{self._node.name}{f'[{self._item}]' if many else ''}>"

    __hash__ = object.__hash__
    __array_ufunc__ = None  # numpy leaves an operator to us, and so does pandas: both would take each item by itself
    __pandas_priority__ = 5000
    __lt__ = _operator(operator.lt)
    __le__ = _operator(operator.le)
    __gt__ = _operator(operator.gt)
    __ge__ = _operator(operator.ge)
    __eq__ = _operator(operator.eq)
    __ne__ = _operator(operator.ne)
    __add__ = _operator(operator.add)
    __sub__ = _operator(operator.sub)
    __mul__ = _operator(operator.mul)
    __truediv__ = _operator(operator.truediv)
    __floordiv__ = _operator(operator.floordiv)
    __mod__ = _operator(operator.mod)
    __pow__ = _operator(operator.pow)
    __and__ = _operator(operator.and_)
    __or__ = _operator(operator.or_)
    __getitem__ = _operator(operator.getitem)
    __neg__ = _operator(operator.neg)
    __pos__ = _operator(operator.pos)
    __abs__ = _operator(operator.abs)
    __invert__ = _operator(operator.invert)
    __radd__ = _operator(operator.add, swapped=True)
    __rsub__ = _operator(operator.sub, swapped=True)
    __rmul__ = _operator(operator.mul, swapped=True)
    __rtruediv__ = _operator(operator.truediv, swapped=True)
    __rfloordiv__ = _operator(operator.floordiv, swapped=True)
    __rmod__ = _operator(operator.mod, swapped=True)
    __rpow__ = _operator(operator.pow, swapped=True)
    __rand__ = _operator(operator.and_, swapped=True)
    __ror__ = _operator(operator.or_, swapped=True)

    def __dask_postcompute__(self) -> Any:
        """Take the one result."""
        return _first, ()

    def _rebuild(self, graph: Any, **_: Any) -> Any:
        from dask.delayed import Delayed

        (key,) = self.__dask_keys__()
        return Delayed(key, graph)

    def to_delayed(self) -> Any:
        """Return the graph as a Dask ``Delayed``."""
        from dask.delayed import Delayed

        (key,) = self.__dask_keys__()
        return Delayed(key, self.__dask_graph__(), layer=key[0])


def _first(results: Sequence[Any]) -> Any:
    return results[0]


# --- from what a user writes to nodes -----------------------------------------------------------------------------------


def arguments_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Put a slot in the place of each lazy result among arguments, however deep in lists, tuples and dicts."""
    uses: list[Use] = []

    def put(lazy: Lazy) -> Slot:
        uses.append(lazy._use())  # noqa: SLF001 - one face
        return Slot(len(uses) - 1)

    kinds = lazy_kinds()
    return Arguments(replace_in(args, kinds, put), replace_in(kwargs, kinds, put), tuple(uses))


def lazy_kinds() -> tuple[type, ...]:
    """Return the classes of what is lazy."""
    from parflow.api.datasets import Dataset

    return Value, Dataset


def make_call(task: Task, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add a call to the graph.

    Returns
    -------
    Value, or a tuple of them when the task has several outputs

    Raises
    ------
    GraphError
        When the task can't be called so.
    """
    check_captured(task.function, Lazy, task.name, None)
    check_arity(task.function, len(args), tuple(kwargs), task.name, None)
    check_arguments((args, kwargs), Lazy, task.name)
    node = CallNode("call", task.name, task, arguments_of(args, kwargs), results=task.outputs)
    return remember(tuple(Value(node, item) for item in range(task.outputs)) if task.outputs > 1 else Value(node))


def remember(made: Any) -> Any:
    """Tell the workflow being built of what was made: it is wanted, whether or not it's returned."""
    workflow = current_workflow()
    if workflow is not None:
        workflow.append(made[0] if isinstance(made, tuple) else made)
    return made


def packed(value: Any) -> Use:
    """Return the use of a lazy result; of anything else, of a call that puts it together."""
    if isinstance(value, Lazy):
        return value._use()  # noqa: SLF001 - one face
    beside: list[Use] = []
    made = arguments_of((_unbound(value, beside),), {})
    return Use(CallNode("call", "value", as_task(same, "value"), replace(made, uses=(*made.uses, *beside))))


def same(value: Any) -> Any:
    """Return what is given."""
    return value


def uses_of(made: Any, results: int) -> list[Use]:
    """Return the uses of what a task with so many results returned.

    Raises
    ------
    GraphError
        When it returned another number of them.
    """
    beside: list[Use] = []
    made = _unbound(made, beside)
    return [*_results(made, results), *beside]


def _unbound(made: Any, beside: list[Use]) -> Any:
    """Put what workflows return in the place of workflows with their arguments; ``beside`` gets what else they do."""

    def put(bound: Bound) -> Any:
        beside.extend(bound.beside)
        return _unbound(bound.unbound, beside)

    return replace_in(made, (Bound,), put)


def _results(made: Any, results: int) -> list[Use]:
    if results == 1:
        return [packed(made)]
    if not isinstance(made, (tuple, list)) or len(made) != results:
        raise GraphError(f"the task has outputs={results}, so the graph that it returns is a tuple of {results} lazy results")
    return [packed(part) for part in made]
