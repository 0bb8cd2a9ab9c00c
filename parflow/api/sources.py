"""Where datasets begin: files of several formats, Python objects, and Dask's collections."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from parflow.api.checks import check_items
from parflow.api.datasets import Dataset
from parflow.api.lazy import Value
from parflow.errors import GraphError
from parflow.model import nbytes
from parflow.nodes import SourceNode
from parflow.storage.sources import (
    CSVSource,
    FilesSource,
    ItemsSource,
    JSONLinesSource,
    LinesSource,
    ParquetSource,
    PartitionsSource,
)

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
CHUNK_BYTES = "8MiB"


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


def read_csv(
    paths: Paths,
    *,
    delimiter: str = ",",
    header: bool = True,
    columns: Sequence[str] | None = None,
    quoted_newlines: bool = True,
    encoding: str = "utf-8",
    fallback: str | None = None,
    chunk_bytes: float | str = CHUNK_BYTES,
    max_record: float | str = "64MiB",
) -> Dataset:
    r"""Read CSV files: one record a row. Parameters are those of `read_lines`, and some more.

    Parameters
    ----------
    delimiter : str
        What stands between fields: one ASCII character, such as ``";"`` or ``"\t"``.
    header : bool
        Whether each file's first row names its columns.
    columns : sequence of str, optional
        With a header, the columns to keep, in this order; without one, the names of all columns.
    quoted_newlines : bool
        Whether a field in quotes may hold newlines. Where a row begins can then only be told by reading from the file's
        beginning, so a file is never cut and is one chunk, however large. With False, each newline ends a row and large files
        are cut; a row whose quotes aren't closed on its line is a dead letter, so a broken promise shows.

    Returns
    -------
    Dataset
        A dict for each row, of str by column: no types are guessed, ``.map`` makes them. Empty lines are passed over.

        A row with too few or too many fields, or whose quotes are wrong, is a dead letter that names file and offset. A file
        whose header can't be used (a name twice, a chosen column missing) is one as a whole, or for each part of it. A quote
        that is never closed takes the rest of the file with it, in one dead letter.

    Examples
    --------
    >>> import parflow as pf, tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp(), "a.csv")
    >>> _ = file.write_text("id,score\n1,0.5\n2,0.25\n")
    >>> pf.read_csv(file).map(lambda row: {"id": int(row["id"]), "score": float(row["score"])}).compute()
    [{'id': 1, 'score': 0.5}, {'id': 2, 'score': 0.25}]
    """
    more = {"delimiter": delimiter, "header": header, "columns": columns, "quoted_newlines": quoted_newlines}
    return _files(CSVSource, paths, encoding, fallback, chunk_bytes, max_record, **more)


def read_parquet(paths: Paths, *, columns: Sequence[str] | None = None, chunk_bytes: float | str = CHUNK_BYTES) -> Dataset:
    """Read Parquet files: one record a row.

    Parameters
    ----------
    paths : path-like or sequence of them
        Files, patterns (``**`` matches folders at any depth) or fsspec URLs.
    columns : sequence of str, optional
        The columns to read, in this order; by default all that a file has.
    chunk_bytes : int or str
        Bytes of input that a chunk holds at the most. Larger files are cut, at their row groups only.

    Returns
    -------
    Dataset
        A dict for each row, in the order of files and rows; files may have different columns. Times are Python's, or pandas'
        where they have nanoseconds. A damaged file, or one that lacks a chosen column, is a dead letter that names it.

    Examples
    --------
    >>> import parflow as pf, tempfile, pandas
    >>> folder = tempfile.mkdtemp()
    >>> pandas.DataFrame({"id": [1, 2], "lang": ["en", "cs"]}).to_parquet(f"{folder}/a.parquet")
    >>> pf.read_parquet(f"{folder}/*.parquet", columns=["lang"]).compute()
    [{'lang': 'en'}, {'lang': 'cs'}]
    """
    return Dataset(SourceNode(ParquetSource(paths, columns=columns, chunk_bytes=nbytes(chunk_bytes))))


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
    >>> pf.items(["a", "b", "c"]).map(str.upper).compute()
    ['A', 'B', 'C']
    """
    if isinstance(iterable, Value):
        raise GraphError(f"items() was given {iterable!r}, which is not computed yet; write pf.expand(function, value)")
    if isinstance(iterable, Dataset):
        raise GraphError(f"items() was given {iterable!r}, which is lazy already; use its methods, such as .map()")
    check_items(iterable)
    return Dataset(SourceNode(ItemsSource(iterable, chunk_records=chunk_records)))


def from_dask(collection: Any) -> Dataset:
    """Take the records of a Dask collection; each of its partitions is a chunk.

    A partition is computed in a child, from its part of the graph alone and on one thread: work that partitions share is
    repeated for each, and so is a partition that is gone on with after a crash. So what comes before should be cheap,
    such as reading, and give the same each time. A partition that raises is one dead letter.

    Parameters
    ----------
    collection : dask.bag.Bag, dask.dataframe.DataFrame, or list of dask.delayed.Delayed
        A bag's items are the records, a dataframe's rows are as dicts (without the index), and each Delayed gives a list
        of records or a pandas DataFrame.

    Raises
    ------
    GraphError
        When it's another kind of collection.
    CodeError
        When running, if a partition's graph can't be pickled.

    Examples
    --------
    >>> import parflow as pf, dask.bag
    >>> bag = dask.bag.from_sequence(range(6), npartitions=3).map(lambda n: n * n)
    >>> pf.from_dask(bag).filter(lambda n: n % 2).compute()
    [1, 9, 25]
    """
    from parflow.api.conversions import partitions_of

    partitions, preload = partitions_of(collection)
    return Dataset(SourceNode(PartitionsSource("from_dask", partitions, preload)))
