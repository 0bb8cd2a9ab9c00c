"""`Dataset`: many records, lazily."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from parflow.api.checks import check_arguments, check_arity, check_captured
from parflow.api.lazy import Lazy, Value, arguments_of, remember
from parflow.api.tasks import as_batches, as_task
from parflow.core.forms import Batch
from parflow.core.reducers import Reducer, check_reducer
from parflow.core.reducers.grouped import First, Grouped, GroupKey
from parflow.errors import UsageError
from parflow.model import seconds
from parflow.nodes import CollectNode, RecordsNode, ReduceNode, SinkNode, StepNode, StoredNode, Task, Use
from parflow.storage.sinks import JSONLinesSink, ParquetSink

if TYPE_CHECKING:
    from pandas import DataFrame


class Dataset(Lazy):
    """Many records, not yet read, in chunks.

    Made by `read_jsonl`, `read_lines`, `read_csv`, `read_parquet`, `read_files`, `items`, `expand` and `from_dask`. Its methods
    return new datasets and values; nothing is read before `run` or `compute`.

    Examples
    --------
    >>> import parflow as pf
    >>> pf.items(range(5)).filter(lambda x: x % 2).map(lambda x: x * x).compute()
    [1, 9]
    """

    def __init__(self, node: RecordsNode) -> None:
        self._records = node

    def _use(self) -> Use:
        if "_collected" not in self.__dict__:
            self._collected = CollectNode(self._records)
        return Use(self._collected)

    def _names(self) -> list[str]:
        names = []
        node = self._records
        while isinstance(node, StepNode):
            names.append(node.task.name)
            node = node.parent
        names.append(node.output.name if isinstance(node, StoredNode) else str(node.source.name))
        return names[::-1]

    def _label(self) -> str:
        return self._names()[-1]

    def __repr__(self) -> str:
        return f"Dataset<{' → '.join(self._names())}>"

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

    def map(self, function: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Dataset:
        """Replace each record by what ``function`` returns for it.

        Parameters
        ----------
        function : callable or Task
            Called with one record, and with what else is given.
        *args, **kwargs
            More arguments, the same for all records. Lazy ones are computed first: records that were made for them (such as for
            a mean to normalise by) are stored, and go on from there.
        name : str, optional
            The step's name; by default the function's.

        Returns
        -------
        Dataset
            One record for each that didn't fail.

        Raises
        ------
        GraphError
            When the function can't be called so, or holds something lazy that it was not given.

        Examples
        --------
        >>> import parflow as pf
        >>> numbers = pf.items([1, 2, 3])
        >>> numbers.map(lambda n, mean: n - mean, numbers.reduce(pf.mean())).compute()
        [-1.0, 0.0, 1.0]
        """
        return self._step("map", as_task(function, name), args, kwargs)

    def filter(self, function: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Dataset:
        """Keep the records for which ``function`` returns something true; more arguments as for `map`."""
        return self._step("filter", as_task(function, name), args, kwargs)

    def flat_map(self, function: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Dataset:
        """Replace each record by those that ``function`` returns or yields for it: all of them or, when it raises, none.

        More arguments as for `map`.
        """
        return self._step("flat_map", as_task(function, name), args, kwargs)

    def _step(self, kind: Any, task: Task, args: tuple[Any, ...], kwargs: dict[str, Any], method: str = "") -> Dataset:
        check_captured(task.function, Lazy, task.name, method or kind)
        check_arity(task.function, 1 + len(args), tuple(kwargs), task.name, method or kind)
        if not (args or kwargs):
            return Dataset(StepNode(kind, task, self._records))
        check_arguments((args, kwargs), Lazy, task.name)
        return Dataset(StepNode(kind, task, self._records, arguments_of(args, kwargs)))

    def map_batches(
        self,
        function: Callable[..., Any],
        size: int = 1024,
        as_: Batch = "records",
        *args: Any,
        name: str | None = None,
        **kwargs: Any,
    ) -> Dataset:
        """Replace the records by those that ``function`` returns for many of them at once.

        A batch is of one chunk, and has fewer records at its end. When ``function`` raises, it's called again with each half of
        the batch, and so on, until only the bad ones become dead letters; a batch that crashes or hangs is divided in the same
        way. So what the records become together (rows, or partial sums that are merged later) must not depend on how they are
        cut into batches, nor on having been tried before.

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
        *args, **kwargs
            More arguments, as for `map`.
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
        return self._step("flat_map", as_batches(function, size, as_, name), args, kwargs, "map_batches")

    # --- barriers --------------------------------------------------------------------------------------------------------

    def reduce(
        self,
        reducer: Reducer,
        *,
        name: str | None = None,
        deadline: float | str | None = None,
        at_least: float = 0.0,
    ) -> Value:
        """Make one value of all records: a barrier.

        Parameters
        ----------
        reducer : Reducer
            One of `count`, `sum`, `mean`, `min`, `max`, `top`, `counter`, `concat`, or your own (`reducer`).
        name : str, optional
            The output's name; by default the reducer's.
        deadline : float or str, optional
            Seconds, or text such as ``"10m"``, after which the barrier opens over what is there, counted from the stage's begin
            (and again from there when a run is resumed). `Run.missing` tells what was left out, and `redrive` merges it later.
            Plain Dask (`compute`) knows no deadline: it waits for all.
        at_least : float
            The share of the input, by size, without which it doesn't open even then: from 0 to 1.

        Raises
        ------
        GraphError
            When ``reducer`` is none.
        UsageError
            When ``deadline`` or ``at_least`` makes no sense.
        """
        if not 0 <= at_least <= 1 or (at_least and deadline is None):
            raise UsageError(f"at_least={at_least!r} is the share of the input, from 0 to 1, that a deadline= may open over")
        checked = check_reducer(reducer)
        check_captured(checked, Lazy, checked.name, "reduce")
        due = 0.0 if deadline is None else seconds(deadline)
        return Value(ReduceNode(checked, self._records, name or checked.name, due, at_least))

    def reduce_by(
        self,
        key: GroupKey,
        reducer: Reducer,
        *,
        columns: Sequence[str] | None = None,
        buckets: int = 64,
        name: str | None = None,
    ) -> Dataset:
        """Make one row for each key of all records that have it: a barrier.

        Partial results are cut into buckets by a hash of their keys, and the buckets are merged apart from each other, in
        parallel, so that no process ever holds all keys.

        Parameters
        ----------
        key : str, callable, list of str, or None
            A field's name, a function of a record, or the names of several fields; None for the record itself. Keys must be
            hashable and equal their copies; a record whose key is not becomes a dead letter.
        reducer : Reducer
            What reduces the records of a key.
        columns : sequence of str, optional
            What a row calls the key's fields, and the value. By default the fields' names (or "key"), and the reducer's name.
        buckets : int
            Into how many, from 1 to 1,024. Each must fit into memory; the number changes the order of the rows.
        name : str, optional
            The output's name.

        Returns
        -------
        Dataset
            A dict for each key: bucket by bucket, and within one in the order in which keys first appeared. `to_pandas` makes a
            DataFrame of it.

        Raises
        ------
        GraphError
            When something of it makes no sense.

        Examples
        --------
        >>> import parflow as pf
        >>> words = pf.items(["to", "be", "or", "not", "to", "be"])
        >>> rows = words.reduce_by(None, pf.count(), columns=("word", "times")).compute()
        >>> sorted((row["times"], row["word"]) for row in rows)
        [(1, 'not'), (1, 'or'), (2, 'be'), (2, 'to')]
        """
        check_captured(key, Lazy, "key", "reduce")
        check_captured(check_reducer(reducer), Lazy, reducer.name, "reduce")
        named = None if columns is None else tuple(columns)
        grouped = Grouped(key, reducer, buckets, named, name=name or f"{reducer.name} by {_word(key)}")
        return Dataset(StoredNode(ReduceNode(grouped, self._records, grouped.name)))

    def distinct(self, key: GroupKey = None, *, buckets: int = 64) -> Dataset:
        """Keep the first record of each key, whatever their number: a barrier.

        Parameters
        ----------
        key, buckets
            As for `reduce_by`.

        Returns
        -------
        Dataset
            One record for each key, in the order that `reduce_by` gives.

        Examples
        --------
        >>> import parflow as pf
        >>> sorted(pf.items([3, 1, 3, 2, 1]).distinct().compute())
        [1, 2, 3]
        """
        check_captured(key, Lazy, "key", "reduce")
        grouped = Grouped(key, First(), buckets, whole=True, name=f"distinct {_word(key)}")
        return Dataset(StoredNode(ReduceNode(grouped, self._records, grouped.name)))

    def write_jsonl(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Value:
        """Write the records as JSON, one a line and one file a chunk: the files appear together when all are complete.

        Returns
        -------
        Value
            The manifest: a dict with ``files`` and ``rows``. In a workflow the files are written whether or not it's returned.
        """
        return self._write(JSONLinesSink(os.fspath(path), overwrite=overwrite), "write_jsonl")

    def write_parquet(
        self, path: str | os.PathLike[str], *, schema: Any = None, compression: str | None = None, overwrite: bool = False
    ) -> Value:
        """Write the records (dicts) as Parquet, one file a chunk: the files appear together when all are complete.

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
            Those of `parflow.Bound.run`.

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
            Those of `parflow.Bound.run`.

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
        made: Value = remember(Value(SinkNode(sink, self._records, f"{kind} {os.path.basename(sink.path.rstrip('/'))}")))
        return made


def _word(key: Any) -> str:
    if isinstance(key, str):
        return key
    if key is None:
        return "record"
    return ", ".join(key) if isinstance(key, (list, tuple)) else str(getattr(key, "__name__", "key")).strip("<>")
