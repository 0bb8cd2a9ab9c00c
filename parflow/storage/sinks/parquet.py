"""Records as rows of Parquet files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from parflow.errors import UsageError
from parflow.storage.sinks.base import Fail, Sink, Writer
from parflow.storage.sinks.places import Place

_COMPRESSIONS = ("zstd", "snappy", "lz4", "gzip", "brotli", "none")


@dataclass(frozen=True)
class ParquetSink(Sink):
    """Records, which must be mappings with text as keys, as rows of Parquet files.

    Without ``schema`` the columns and their types are inferred for each file from its records: nulls take any type, and a
    column with integers and floats becomes float. A record whose value has another type than the column has in the records
    before it is set aside; ``schema`` fixes the types, for all files alike, and is the way to give files of different chunks
    the same columns. A field that the schema lacks is never dropped: its record is set aside. An empty mapping is written as
    null in a column that has nothing else, as Parquet has no type for it.

    Attributes
    ----------
    schema : pyarrow.Schema, optional
        The columns and their types.
    compression : str
        ``zstd`` (the default: about a third smaller than snappy, and nearly as fast), ``snappy``, ``lz4``, ``gzip``,
        ``brotli`` or ``none``.

    Examples
    --------
    >>> import tempfile
    >>> sink = ParquetSink(tempfile.mkdtemp() + "/out")
    >>> writer = sink.open("run-1", "piece-0", print)
    >>> writer.write({"id": 1, "score": 0.5}, 0)
    >>> writer.close()[1]
    1
    """

    schema: Any = field(default=None, kw_only=True)
    compression: str = field(default="zstd", kw_only=True)

    extension = "parquet"
    preload = ("pyarrow.parquet",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compression not in _COMPRESSIONS:
            raise UsageError(f"compression={self.compression!r} is unknown; give one of {', '.join(_COMPRESSIONS)}")
        if self.schema is not None:
            import pyarrow as pa

            if not isinstance(self.schema, pa.Schema):
                raise UsageError(f"schema={self.schema!r} is no pyarrow.Schema; write pyarrow.schema({{'id': 'int64'}})")
            try:
                _check_writable(self.schema)
            except pa.ArrowException as error:
                raise UsageError(f"Parquet can't hold schema={self.schema!r}: {error}") from error

    def _writer(self, place: Place, path: str, fail: Fail) -> Writer:
        return _ParquetWriter(place, path, fail, self.schema, self.compression)


_BATCH_ROWS = 1000
_BATCH_BYTES = 8 * 2**20


class _ParquetWriter(Writer):
    """Collects records, turns them into Arrow tables a batch at a time, and writes these as one file at the end.

    A batch that can't be converted is halved until the records that are to blame stand alone. ``schema`` is what the
    accepted records have in common so far, or what was given.
    """

    def __init__(self, place: Place, path: str, fail: Fail, schema: Any, compression: str) -> None:
        super().__init__(place, path)
        self.fail = fail
        self.schema = schema
        self.fixed = schema is not None
        self.fields = {item.name: item.type for item in schema} if self.fixed else {}
        self.compression: Any = compression
        self.records: list[dict[str, Any]] = []
        self.tags: list[Any] = []
        self.size = 0
        self.tables: list[tuple[Any, list[Any]]] = []

    def write(self, record: Any, tag: Any) -> None:
        if not isinstance(record, Mapping):
            raise TypeError(f"a row of Parquet is made of a mapping, not of a {type(record).__qualname__}")
        row = dict(record)  # the step may go on changing the one it gave
        size = 100
        for key, value in row.items():
            if not isinstance(key, str):
                raise TypeError(f"a column's name is text, not the {type(key).__qualname__} {key!r}")
            if isinstance(value, (str, bytes)):
                size += len(value)
            elif isinstance(value, (list, dict)):
                size += 32 * len(value)
        if self.fixed:
            _check_fields(row, self.fields, "")
        elif not row:
            raise ValueError("a record without a single field makes no row of Parquet")
        self.records.append(row)
        self.tags.append(tag)
        self.size += size
        if len(self.records) >= _BATCH_ROWS or self.size >= _BATCH_BYTES:
            self._convert_batch()

    def write_table(self, table: Any, tags: Sequence[Any]) -> None:
        """Take the rows of an Arrow table as they are, with a tag for each; one by one, when the file has other columns."""
        self._convert_batch()
        try:
            if len(table):
                self.tables.append((self._checked(table), list(tags)))
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - which rows are to blame shows one by one
            for record, tag in zip(table.to_pylist(), tags, strict=True):
                try:
                    self.write(record, tag)
                except OSError:
                    raise
                except Exception as error:  # noqa: BLE001
                    self.fail(tag, record, error)

    def _checked(self, table: Any) -> Any:
        """Return a table that fits the file, or raise."""
        if not self.fixed:
            return self._widened(table)
        if missing := {*table.schema.names} - {*self.fields}:
            raise ValueError(f"columns {missing} are not in the schema")
        return self._without_null(_shaped(table, self.schema))

    def close(self) -> tuple[str, int, int] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._convert_batch()
        fitting: list[Any] = []
        for table, tags in self.tables:
            self._fit(table, tags, fitting)
        self.tables = []
        if not fitting:
            return None
        whole = _without_empty(pa.concat_tables(fitting))
        pq.write_table(whole, self.out(), compression=self.compression)
        self.rows = whole.num_rows
        return super().close()

    def _convert_batch(self) -> None:
        records, tags = self.records, self.tags
        self.records, self.tags, self.size = [], [], 0
        if records:
            self._convert(records, tags)

    def _convert(self, records: list[dict[str, Any]], tags: list[Any]) -> None:
        try:
            self.tables.append((self._table(records), tags))
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a strange value may raise anything
            if len(records) == 1:
                self.fail(tags[0], records[0], self._explained(records[0], error))
                return
            if self.schema is None:
                self.schema = _majority(records)
            half = len(records) // 2
            self._convert(records[:half], tags[:half])
            self._convert(records[half:], tags[half:])

    def _table(self, records: list[dict[str, Any]]) -> Any:
        import pyarrow as pa

        if not self.fixed:
            return self._widened(_inferred(records))
        return self._without_null(pa.Table.from_pylist(records, schema=self.schema))

    def _widened(self, table: Any) -> Any:
        """Let the file's schema take a table in, if it can."""
        schema = table.schema if self.schema is None else _unified(self.schema, table.schema)
        if schema != self.schema:
            _check_writable(schema)
            self.schema = schema
        return table

    def _without_null(self, table: Any) -> Any:
        for item in self.schema:
            if not item.nullable and table[item.name].null_count:
                raise ValueError(f"column {item.name!r} may not be null in this schema")
        return table

    def _fit(self, table: Any, tags: list[Any], fitting: list[Any]) -> None:
        """Give a table the file's columns and types. A large integer, for one, may not be exact as a float."""
        import pyarrow as pa

        try:
            fitting.append(_shaped(table, self.schema))
        except pa.ArrowException:
            if len(table) > 1:
                half = len(table) // 2
                self._fit(table.slice(0, half), tags[:half], fitting)
                self._fit(table.slice(half), tags[half:], fitting)
                return
            record = table.to_pylist()[0]
            try:  # Arrow's cast of nested nulls has bugs (lists of nulls, in 26.0): the long way may still go
                fitting.append(pa.Table.from_pylist([record], schema=self.schema))
            except pa.ArrowException as error:
                self.fail(tags[0], record, self._explained(record, error))

    def _explained(self, record: dict[str, Any], error: Exception) -> Exception:
        """Say which column is to blame, and what to do."""
        import pyarrow as pa

        known = {} if self.schema is None else {item.name: item.type for item in self.schema}
        for name, value in record.items():
            try:
                kind = pa.array([value], known[name] if self.fixed else None).type
                if name in known:
                    _unified(pa.schema([(name, known[name])]), pa.schema([(name, kind)]))
                    pa.array([value], kind).cast(known[name])
            except pa.ArrowTypeError as cause:
                if "Unable to merge" in str(cause):
                    return TypeError(
                        f"column {name!r} is {known[name]} in this file, but {kind} here. Convert the values in a step, or "
                        "fix the types with schema="
                    )
                return ValueError(f"column {name!r}: {cause}")
            except Exception as cause:  # noqa: BLE001 - a strange value may raise anything
                return ValueError(f"column {name!r}: {cause}")
        return error


def _shaped(table: Any, schema: Any) -> Any:
    import pyarrow as pa

    return pa.table([_column(table, item) for item in schema], schema=schema)


def _column(table: Any, item: Any) -> Any:
    import pyarrow as pa

    if item.name not in table.schema.names:
        return pa.nulls(len(table), item.type)
    column = table[item.name]
    return column if column.type == item.type else column.cast(item.type)


def _inferred(records: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_batches([pa.RecordBatch.from_struct_array(pa.array(records))])


def _unified(one: Any, other: Any) -> Any:
    import pyarrow as pa

    return one if one == other else pa.unify_schemas([one, other], promote_options="permissive")


def _majority(records: list[dict[str, Any]]) -> Any:
    """Return the types that most records have, so that one odd record at the start does not decide for all others."""
    import pyarrow as pa

    votes: dict[str, Counter[Any]] = {}
    for record in records:
        for name, value in record.items():
            try:
                kind = pa.array([value]).type
                _check_writable(pa.schema([(name, kind)]))
            except Exception:  # noqa: BLE001, S112 - a value without a type has no vote
                continue
            if not pa.types.is_null(kind):
                votes.setdefault(name, Counter())[kind] += 1
    return pa.schema([(name, kinds.most_common(1)[0][0]) for name, kinds in votes.items()]) if votes else None


def _check_writable(schema: Any) -> None:
    """Raise when Parquet has no way to hold one of the types (empty mappings aside, which `_without_empty` removes)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    known = pa.schema([item for item in schema if "struct<>" not in str(item.type)])
    pq.write_table(known.empty_table(), pa.BufferOutputStream())


def _without_empty(table: Any) -> Any:
    """Write empty mappings as null in columns where no record says what fields there are."""
    import pyarrow as pa

    for place, item in enumerate(table.schema):
        if "struct<>" in str(item.type):
            table = table.set_column(place, item.name, [pa.array(list(map(_pruned, table[place].to_pylist())))])
    return table


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(item) for key, item in value.items()} or None
    return list(map(_pruned, value)) if isinstance(value, list) else value


def _check_fields(value: Any, fields: Mapping[str, Any], where: str) -> None:
    """Raise when a mapping has a field that the schema lacks: Arrow would drop it without a word."""
    for name, item in value.items():
        if name not in fields:
            raise ValueError(f"field {where + str(name)!r} is not in the schema; add it there, or leave it out in a step")
        _check_nested(item, fields[name], f"{where}{name}.")


def _check_nested(value: Any, kind: Any, where: str) -> None:
    if isinstance(value, Mapping) and hasattr(kind, "get_field_index"):  # a struct
        _check_fields(value, {item.name: item.type for item in kind}, where)
    elif isinstance(value, (list, tuple)) and hasattr(kind, "value_type"):
        for item in value:
            _check_nested(item, kind.value_type, where)
