"""Rows of Parquet files: a record is a row, named by its number in the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from parflow.core.partition import CHUNK_BYTES, OPEN_COST, partition
from parflow.errors import NotTextError, RecordError, UnreadableInputError
from parflow.model import Chunk, Part, Rejected, chunk_id
from parflow.storage.sources.base import BadRecord, FileSource, Paths
from parflow.storage.sources.delimited import chosen
from parflow.storage.sources.opening import STEP, opened

BATCH_ROWS = 1024
BATCH_BYTES = 4 * 1024 * 1024
"""What is made into records at a time: so many rows, and fewer if they are large (bytes)."""


@dataclass(init=False)
class ParquetSource(FileSource):
    """The rows of Parquet files, as dicts by column. Files may have different columns.

    A part is a range of *rows*. Files larger than ``chunk_bytes`` are cut, at their row groups only; the bytes of such a part
    are in its ``data``.

    Parameters
    ----------
    paths : str, path or sequence of them
        Files, or patterns with ``*``, ``?``, ``[...]`` and ``**``; local or fsspec URLs.
    columns : sequence of str, optional
        The columns to read, in this order; a file without one of them is a dead letter.
    chunk_bytes : int
        Bytes of input in a chunk, as they are in the file; a row group is never cut.

    Raises
    ------
    UsageError
        For columns that make no sense.

    Examples
    --------
    >>> import tempfile, pyarrow, pyarrow.parquet
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", None]}), f"{folder}/a.parquet")
    ...     source = ParquetSource(f"{folder}/*.parquet", columns=["text"])
    ...     [chunk] = source.chunks(None)
    ...     list(source.read(chunk.parts[0], 0, None))
    [(0, {'text': 'a'}), (1, {'text': None})]
    """

    columns: tuple[str, ...] | None

    name = "read_parquet"
    preload = ("pyarrow.parquet",)

    def __init__(self, paths: Paths, *, columns: Any = None, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__(paths, chunk_bytes)
        self.columns = chosen(columns)

    # --- listing -------------------------------------------------------------------------------------------------------

    def chunks(self, store: object) -> Iterator[Chunk | Rejected]:  # noqa: ARG002 - for items only
        """List the files, lazily; pack small ones into chunks, and cut large ones at their row groups."""
        index = 0
        for item in partition(self.files(), chunk_bytes=self.chunk_bytes):
            if isinstance(item, Rejected):
                yield item
                continue
            large = len(item.parts) == 1 and item.parts[0].size > self.chunk_bytes
            for chunk in self._cut(item) if large else (item,):
                yield replace(chunk, index=index)
                index += 1

    def _cut(self, whole: Chunk) -> Iterator[Chunk]:
        try:
            parts = self._parts(whole.parts[0])
        except (RecordError, UnreadableInputError):
            parts = []
        if not parts:  # empty, or unreadable: reading it will say so
            yield whole
        for part in parts:
            yield Chunk(0, chunk_id((part,)), (part,), self.size(part) + OPEN_COST)

    def _parts(self, whole: Part) -> list[Part]:
        """Read a file's footer and put its row groups together to parts."""
        parts: list[Part] = []
        with self._file(whole) as file:
            wanted = self._wanted(file, whole)
            paths = [f"{file.schema.column(leaf).path}." for leaf in range(file.metadata.num_columns)]
            leaves = [leaf for leaf, path in enumerate(paths) if path.startswith(tuple(f"{name}." for name in wanted))]
            start = stop = size = 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                weight = sum(group.column(leaf).total_compressed_size for leaf in leaves)
                if stop > start and size + weight > self.chunk_bytes:
                    parts.append(replace(whole, start=start, stop=stop, data=str(size).encode()))
                    start, size = stop, 0
                stop, size = stop + group.num_rows, size + weight
            if stop > start:
                parts.append(replace(whole, start=start, stop=stop, data=str(size).encode()))
        return parts

    def size(self, part: Part) -> int:
        """Return the bytes of a part, as they are on the disk: of its row groups, in the chosen columns."""
        return part.size if part.data is None else int(part.data)

    # --- reading -------------------------------------------------------------------------------------------------------

    def read(self, part: Part, offset: int, store: object) -> Iterator[tuple[int, Any]]:  # noqa: ARG002
        """Yield number and values of each row of the part, from row ``offset`` of its file on."""
        for first, batch in self.batches(part, offset):
            yield from enumerate(_records(batch), first)

    def batches(self, part: Part, offset: int = 0, most: int = BATCH_ROWS) -> Iterator[tuple[int, Any]]:
        """Yield the part's rows from row ``offset`` of its file on as Arrow record batches, with their first row's number.

        A batch has ``most`` rows, or as many as fit into some megabytes.

        Raises
        ------
        UnreadableInputError
            If the file is no Parquet file, is damaged, or lacks a column.
        """
        with self._file(part) as file:
            wanted = self._wanted(file, part)
            stop = file.metadata.num_rows if part.stop is None else part.stop
            offset = max(offset, part.start)
            first = 0
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                row, first = first, first + group.num_rows
                if first <= offset or row >= stop or not group.num_rows:
                    continue
                rows = max(1, min(most, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
                for batch in file.iter_batches(rows, [number], columns=wanted, use_threads=False):
                    if row + batch.num_rows > offset:
                        passed = max(0, offset - row)
                        yield row + passed, batch.slice(passed)
                    row += batch.num_rows

    def decode(self, raw: Any) -> Any:
        """Return the row as it is.

        Raises
        ------
        RecordError
            Why the row is no record: text that is not UTF-8, or a time that Python can't hold.
        """
        if isinstance(raw, BadRecord):
            raise raw.error
        return raw

    def record_id(self, part: Part, offset: int) -> str:
        """Name a row: its file and its number there, from 0."""
        return f"{part.path}#{offset}"

    @contextmanager
    def _file(self, part: Part) -> Iterator[Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with opened(part) as file, pq.ParquetFile(file, buffer_size=STEP) as parquet:
                yield parquet
        except pa.ArrowException as error:
            raise UnreadableInputError(part.path, str(error)) from error

    def _wanted(self, file: Any, part: Part) -> list[str]:
        """Return the columns to read."""
        names = file.schema_arrow.names
        wanted = list(names if self.columns is None else self.columns)
        if missing := [name for name in wanted if name not in names]:
            has = ", ".join(map(repr, names[:20])) + (" …" if len(names) > 20 else "")
            raise UnreadableInputError(part.path, f"it has no column {missing[0]!r}, but {has}")
        if twice := [name for name in wanted if names.count(name) > 1]:
            raise UnreadableInputError(part.path, f"it has {names.count(twice[0])} columns {twice[0]!r}")
        return wanted


# --- Arrow's values as Python's ------------------------------------------------------------------------------------------


def _records(batch: Any) -> list[Any]:
    """Make dicts of a batch. One bad value in it is found by taking the rows one by one."""
    try:
        columns = [_values(column) for column in batch.columns]
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - Arrow raises anything from UnicodeDecodeError to OverflowError
        if batch.num_rows == 1:
            return [BadRecord(_explained(error))]
        return [record for row in range(batch.num_rows) for record in _records(batch.slice(row, 1))]
    names = batch.schema.names
    return (
        [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        if names
        else [{} for _ in range(batch.num_rows)]
    )


def _explained(error: Exception) -> RecordError:
    if isinstance(error, UnicodeDecodeError):
        return NotTextError("utf-8", f"byte 0x{error.object[error.start]:02x} at position {error.start}: {error.reason}")
    return RecordError(f"the row's values have no form in Python: {error}")


def _values(column: Any) -> list[Any]:
    """Return a column's values. Python's times have microseconds; Arrow's answer to more depends on what is imported."""
    import pyarrow as pa

    kind = _in_microseconds(column.type)
    if kind is column.type:
        return list(column.to_pylist())
    try:
        return list(column.cast(kind).to_pylist())
    except pa.ArrowInvalid:
        if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
            return [_exact(value, kind) for value in column]
        raise


def _exact(value: Any, kind: Any) -> Any:
    """Return a time that may have nanoseconds: those are pandas' own, which are times of Python's, too."""
    import pandas as pd
    import pyarrow as pa

    if not value.is_valid or value.value % 1000 == 0:
        return value.cast(kind).as_py()
    if pa.types.is_duration(kind):
        return pd.Timedelta(value.value, unit="ns")
    return pd.Timestamp(value.value, unit="ns", tz=value.type.tz)


def _in_microseconds(kind: Any) -> Any:
    """Return a type with microseconds where it has nanoseconds, and the very same type where it has none."""
    import pyarrow as pa

    if not str(kind).count("[ns"):
        return kind
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    if pa.types.is_duration(kind):
        return pa.duration("us")
    if pa.types.is_time64(kind):
        return pa.time64("us")
    if pa.types.is_struct(kind):
        return pa.struct([item.with_type(_in_microseconds(item.type)) for item in kind])
    if pa.types.is_map(kind):
        return pa.map_(_in_microseconds(kind.key_type), _in_microseconds(kind.item_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_in_microseconds(kind.value_type)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_in_microseconds(kind.value_type)))
    return kind
