"""`Dataset` and `Value`: the lazy nodes that users hold. Both are Dask collections."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from parflow.api.tasks import as_batches, as_task, current_workflow
from parflow.core.forms import Batch
from parflow.core.plan import Plan, make_plan
from parflow.core.reducers import Reducer, check_reducer
from parflow.errors import LazyValueError
from parflow.model import CollectNode, OutputNode, RecordsNode, ReduceNode, SinkNode, StepNode
from parflow.storage.sinks import JSONLinesSink, ParquetSink

if TYPE_CHECKING:
    from pandas import DataFrame

    from parflow.api.runs import Run


class Lazy:
    """What `Dataset` and `Value` share: they plan, run, and take part in Dask's own functions."""

    def _output(self) -> OutputNode:
        raise NotImplementedError

    def _label(self) -> str:
        return self._output().name

    def plan(self) -> Plan:
        """Return the stages that a run would have; `print(x.plan().explain())` shows them.

        Raises
        ------
        GraphError
            When the graph makes no sense.
        """
        return make_plan(self._label(), [self._output()])

    def run(self, **options: Any) -> Run:
        """Run durably: journal, store, isolation. See `parflow.Workflow.run` for the options."""
        from parflow.api.runs import start

        return start(self.plan(), shape=0, flow=self._label(), **options)

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
        raise LazyValueError(repr(self), "items")

    def __len__(self) -> int:
        raise LazyValueError(repr(self), "length")


class Value(Lazy):
    """One result, not yet computed: a reduction's value, or the manifest of what a sink wrote.

    Examples
    --------
    >>> import parflow as pf
    >>> pf.items([1, 2, 3]).reduce(pf.sum()).compute()
    6
    """

    def __init__(self, node: OutputNode) -> None:
        self._node = node

    def _output(self) -> OutputNode:
        return self._node

    def __repr__(self) -> str:
        return f"Value<{self._node.name}>"

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


class Dataset(Lazy):
    """Many records, not yet read, in chunks.

    Made by `read_jsonl`, `read_lines`, `read_csv`, `read_parquet`, `read_files`, `items` and `from_dask`. Its methods return
    new datasets and values; nothing is read before `run` or `compute`.

    Examples
    --------
    >>> import parflow as pf
    >>> pf.items(range(5)).filter(lambda x: x % 2).map(lambda x: x * x).compute()
    [1, 9]
    """

    def __init__(self, node: RecordsNode) -> None:
        self._records = node

    def _output(self) -> OutputNode:
        if "_collected" not in self.__dict__:
            self._collected = CollectNode(self._records)
        return self._collected

    def _label(self) -> str:
        node = self._records
        return node.task.name if isinstance(node, StepNode) else str(node.source.name)

    def __repr__(self) -> str:
        names = []
        node = self._records
        while isinstance(node, StepNode):
            names.append(node.task.name)
            node = node.parent
        return "Dataset<" + " → ".join([str(node.source.name), *reversed(names)]) + ">"

    def __dask_postcompute__(self) -> Any:
        """Put the chunks' records together, in input order."""
        from parflow.runtime.graph import concatenate

        return concatenate, ()

    def _rebuild(self, graph: Any, **_: Any) -> Any:
        from dask.bag import Bag

        keys = self.__dask_keys__()
        return Bag(graph, keys[0][0], len(keys))

    def to_delayed(self) -> Any:
        """Return the graph as a Dask ``Delayed``: all records, in a list."""
        from dask.delayed import Delayed

        from parflow.runtime.graph import gathered

        graph, key = gathered(*self._graph())
        return Delayed(key, graph)

    # --- record-wise steps -----------------------------------------------------------------------------------------------

    def map(self, function: Callable[..., Any], *, name: str | None = None) -> Dataset:
        """Replace each record by what ``function`` returns for it.

        Parameters
        ----------
        function : callable or Task
            Called with one record.
        name : str, optional
            The step's name; by default the function's.

        Returns
        -------
        Dataset
            One record for each that didn't fail.
        """
        return Dataset(StepNode("map", as_task(function, name), self._records))

    def filter(self, function: Callable[..., Any], *, name: str | None = None) -> Dataset:
        """Keep the records for which ``function`` returns something true."""
        return Dataset(StepNode("filter", as_task(function, name), self._records))

    def flat_map(self, function: Callable[..., Any], *, name: str | None = None) -> Dataset:
        """Replace each record by those that ``function`` returns or yields for it: all of them or, when it raises, none."""
        return Dataset(StepNode("flat_map", as_task(function, name), self._records))

    def map_batches(
        self, function: Callable[..., Any], size: int = 1024, as_: Batch = "records", *, name: str | None = None
    ) -> Dataset:
        """Replace the records by those that ``function`` returns for many of them at once.

        A batch is of one chunk, and has fewer records at its end. When ``function`` raises, it's called again with each of the
        batch's records alone, so that only the bad ones become dead letters; a batch that crashes or hangs is divided in the
        same way. So what a record becomes must not depend on the batch that it's in, nor on having been tried before.

        Parameters
        ----------
        function : callable or Task
            Called with a batch; or a class, built once a child, whose instance is. It returns the same kind, or any iterable
            of records. As long as these are as many as it got, a later step's dead letter names the record; otherwise, some
            record of the batch.
        size : int
            Records in a batch, at the most.
        as_ : {"records", "pandas", "arrow"}
            What a batch is: a list, a ``pandas.DataFrame`` or a ``pyarrow.Table``. Tables want records that are mappings, fill
            fields that a record lacks, and give dicts. An Arrow table stays one between steps that want one, and on its way to
            `write_parquet`.
        name : str, optional
            The step's name; by default the function's.

        Returns
        -------
        Dataset
            All records that the batches became, in order.

        Raises
        ------
        GraphError
            When ``function`` is async.
        UsageError
            When ``size`` or ``as_`` makes no sense.

        Examples
        --------
        >>> import parflow as pf
        >>> pf.items(range(5)).map_batches(lambda batch: [x * 10 for x in batch], size=2).compute()
        [0, 10, 20, 30, 40]
        >>> rows = pf.items([{"n": 1}, {"n": 2}])
        >>> rows.map_batches(lambda frame: frame.assign(half=frame.n / 2), as_="pandas").compute()
        [{'n': 1, 'half': 0.5}, {'n': 2, 'half': 1.0}]
        """
        return Dataset(StepNode("flat_map", as_batches(function, size, as_, name), self._records))

    # --- barriers --------------------------------------------------------------------------------------------------------

    def reduce(self, reducer: Reducer, *, name: str | None = None) -> Value:
        """Make one value of all records: a barrier.

        Parameters
        ----------
        reducer : Reducer
            One of `count`, `sum`, `mean`, `min`, `max`, `top`, `counter`, `concat`, or your own (`reducer`).
        name : str, optional
            The output's name; by default the reducer's.

        Raises
        ------
        GraphError
            When ``reducer`` is none.
        """
        checked = check_reducer(reducer)
        return Value(ReduceNode(checked, self._records, name or checked.name))

    def write_jsonl(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Value:
        """Write the records as JSON, one a line and one file a chunk, to a folder that appears when all of it is complete.

        Returns
        -------
        Value
            The manifest: a dict with ``files`` and ``rows``. In a workflow the files are written whether or not it's returned.
        """
        return self._write(JSONLinesSink(os.fspath(path), overwrite=overwrite), "write_jsonl")

    def write_parquet(
        self, path: str | os.PathLike[str], *, schema: Any = None, compression: str | None = None, overwrite: bool = False
    ) -> Value:
        """Write the records (dicts) as Parquet, one file a chunk, to a folder that appears when all of it is complete.

        Parameters
        ----------
        path : path-like
            A folder, or a URL of one.
        schema : pyarrow.Schema, optional
            The columns' types; by default inferred, file by file.
        compression : str, optional
            Of the columns: "snappy", "zstd", "none" …
        overwrite : bool
            Whether files of an earlier run there are replaced.
        """
        extra = {} if compression is None else {"compression": compression}
        return self._write(ParquetSink(os.fspath(path), schema=schema, overwrite=overwrite, **extra), "write_parquet")

    # --- conversions: these run -----------------------------------------------------------------------------------------

    def to_pandas(self, **options: Any) -> DataFrame:
        """Run durably, and return the records (dicts) as one DataFrame in input order: for results that fit into memory.

        Parameters
        ----------
        **options
            Those of `parflow.Workflow.run`.

        Raises
        ------
        GraphError
            When a record is no dict, or within a workflow function.
        RunError
            When the run fails or is stopped; what is finished is kept, and `resume` goes on.

        Examples
        --------
        >>> import parflow as pf, tempfile
        >>> squares = pf.items([1, 2, 3]).map(lambda n: {"n": n, "square": n * n})
        >>> squares.to_pandas(home=tempfile.mkdtemp(), isolation="inline")["square"].tolist()
        [1, 4, 9]
        """
        from parflow.api.conversions import to_pandas

        return to_pandas(self, options)

    def to_dask_dataframe(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        schema: Any = None,
        compression: str | None = None,
        overwrite: bool = False,
        **options: Any,
    ) -> Any:
        """Run durably, writing the records (dicts) as Parquet, and return a Dask DataFrame that reads it.

        Parameters
        ----------
        path : path-like, optional
            The folder for the files, or a URL of one; by default a new one under ``frames`` in the run's home or store.
        schema, compression, overwrite
            As for `write_parquet`. Without a schema, the types of all files are brought together at the end.
        **options
            Those of `parflow.Workflow.run`.

        Returns
        -------
        dask.dataframe.DataFrame
            The rows in input order. Types are Arrow's, so that integers with nulls stay integers. It's lazy: the files must
            stay as long as it's used.

        Raises
        ------
        GraphError
            Within a workflow function.
        RunError
            When the run fails or is stopped; what is finished is kept.
        OutputError
            When the files' types don't go together: fix them with ``schema``.

        Examples
        --------
        >>> import parflow as pf, tempfile
        >>> squares = pf.items([1, 2, 3]).map(lambda n: {"n": n, "square": n * n})
        >>> frame = squares.to_dask_dataframe(home=tempfile.mkdtemp(), isolation="inline")
        >>> [*frame.columns]
        ['n', 'square']
        """
        from parflow.api.conversions import to_dask_dataframe

        return to_dask_dataframe(self, path, schema, compression, overwrite, options)

    def _write(self, sink: Any, kind: str) -> Value:
        value = Value(SinkNode(sink, self._records, f"{kind} {os.path.basename(sink.path.rstrip('/'))}"))
        workflow = current_workflow()
        if workflow is not None:
            workflow.append(value)
        return value


def _first(results: Sequence[Any]) -> Any:
    return results[0]
