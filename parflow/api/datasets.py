"""`Dataset` and `Value`: the lazy nodes that users hold. Both are Dask collections."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from parflow.api.tasks import as_task, current_workflow
from parflow.core.plan import Plan, make_plan
from parflow.core.reducers import Reducer, check_reducer
from parflow.errors import GraphError, LazyValueError
from parflow.model import CollectNode, OutputNode, RecordsNode, ReduceNode, SinkNode, SourceNode, StepNode, nbytes
from parflow.storage.sinks import JSONLinesSink, ParquetSink
from parflow.storage.sources.documents import FilesSource
from parflow.storage.sources.items import ItemsSource
from parflow.storage.sources.lines import JSONLinesSource, LinesSource

if TYPE_CHECKING:
    from parflow.api.runs import Run

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
CHUNK_BYTES = "8MiB"


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

    Made by `read_jsonl`, `read_lines`, `read_files` and `items`. Its methods return new datasets and values; nothing is read
    before `run` or `compute`.

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

    def map(self, function: Callable[[Any], Any], *, name: str | None = None) -> Dataset:
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

    def filter(self, function: Callable[[Any], Any], *, name: str | None = None) -> Dataset:
        """Keep the records for which ``function`` returns something true."""
        return Dataset(StepNode("filter", as_task(function, name), self._records))

    def flat_map(self, function: Callable[[Any], Iterable[Any]], *, name: str | None = None) -> Dataset:
        """Replace each record by those that ``function`` returns or yields for it: all of them or, when it raises, none."""
        return Dataset(StepNode("flat_map", as_task(function, name), self._records))

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

    def _write(self, sink: Any, kind: str) -> Value:
        value = Value(SinkNode(sink, self._records, f"{kind} {os.path.basename(sink.path.rstrip('/'))}"))
        workflow = current_workflow()
        if workflow is not None:
            workflow.append(value)
        return value


def _first(results: Sequence[Any]) -> Any:
    return results[0]


# --- sources ---------------------------------------------------------------------------------------------------------------


def read_lines(
    paths: Paths,
    *,
    encoding: str = "utf-8",
    fallback: str | None = None,
    chunk_bytes: float | str = CHUNK_BYTES,
    max_record: float | str = "64MiB",
) -> Dataset:
    r"""Read text files line by line.

    Parameters
    ----------
    paths : path-like or sequence of them
        Files, patterns (``**`` matches folders at any depth) or fsspec URLs; ``.gz``, ``.bz2``, ``.xz`` and ``.zst`` are read
        as they are. A path that exists is taken literally.
    encoding, fallback : str
        How bytes become text: ``encoding``, else ``fallback``, else the line is a dead letter. Which was used is counted.
    chunk_bytes : int or str
        Bytes of input that a chunk holds at the most, unless one file can't be split.
    max_record : int or str
        Bytes of the longest line; a longer one is a dead letter.

    Returns
    -------
    Dataset
        A str for each line, without its line end (``\n`` or ``\r\n``).

    Examples
    --------
    >>> import parflow as pf, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "a.txt")
    >>> _ = file.write_text("one\ntwo\n")
    >>> pf.read_lines(file).compute()
    ['one', 'two']
    """
    return _files(LinesSource, paths, encoding, fallback, chunk_bytes, max_record)


def read_jsonl(
    paths: Paths,
    *,
    encoding: str = "utf-8",
    fallback: str | None = None,
    chunk_bytes: float | str = CHUNK_BYTES,
    max_record: float | str = "64MiB",
) -> Dataset:
    r"""Read JSON Lines: one JSON value a line, blank lines passed over. Parameters are those of `read_lines`.

    Returns
    -------
    Dataset
        What each line holds; a line that is not JSON is a dead letter that names file and offset.

    Examples
    --------
    >>> import parflow as pf, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "a.jsonl")
    >>> _ = file.write_text('{"lang": "en"}\n{"lang": "cs"}\n')
    >>> pf.read_jsonl(file).map(lambda row: row["lang"]).compute()
    ['en', 'cs']
    """
    return _files(JSONLinesSource, paths, encoding, fallback, chunk_bytes, max_record)


def read_files(
    paths: Paths,
    *,
    mode: str = "text",
    encoding: str = "utf-8",
    fallback: str | None = None,
    chunk_bytes: float | str = CHUNK_BYTES,
    max_record: float | str = "1GiB",
) -> Dataset:
    """Read whole files: one record a file. Parameters are those of `read_lines`.

    Parameters
    ----------
    mode : {"text", "bytes"}
        Whether a document has ``.text`` or ``.data``.

    Returns
    -------
    Dataset
        A `Document` for each file: ``.path``, and ``.text`` or ``.data``.

    Examples
    --------
    >>> import parflow as pf, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "a.txt")
    >>> _ = file.write_text("some text")
    >>> pf.read_files(file).map(lambda document: len(document.text)).compute()
    [9]
    """
    return _files(FilesSource, paths, encoding, fallback, chunk_bytes, max_record, mode=mode)


def _files(
    kind: Any, paths: Paths, encoding: str, fallback: str | None, chunk: float | str, longest: float | str, **more: Any
) -> Dataset:
    source = kind(paths, encoding=encoding, fallback=fallback, chunk_bytes=nbytes(chunk), max_record=nbytes(longest), **more)
    return Dataset(SourceNode(source))


def items(iterable: Iterable[Any], *, chunk_records: int | None = None) -> Dataset:
    """Take Python objects as records.

    Parameters
    ----------
    iterable : iterable
        Anything that can be iterated and whose items pickle; it's taken lazily, chunk by chunk.
    chunk_records : int, optional
        Items in a chunk; by default at most 256 chunks when the number is known.

    Examples
    --------
    >>> import parflow as pf
    >>> pf.items("abc").map(str.upper).compute()
    ['A', 'B', 'C']
    """
    if isinstance(iterable, Lazy):
        raise GraphError(f"items() was given {iterable!r}, which is lazy already; use its methods, such as .map()")
    return Dataset(SourceNode(ItemsSource(iterable, chunk_records=chunk_records)))
