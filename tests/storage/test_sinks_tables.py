"""Arrow tables on their way into Parquet: as they are, or row by row where they don't fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parflow.storage.sinks import ParquetSink


def write(folder: Path, *items: Any, schema: Any = None) -> tuple[Any, list[tuple[int, str]]]:
    """Write tables and rows with running numbers as tags; returns the file's table, and tag and error of what was refused."""
    refused: list[tuple[int, str]] = []
    sink = ParquetSink(str(folder / "out"), schema=schema)
    writer: Any = sink.open("run", "piece", lambda tag, record, error: refused.append((tag, str(error))))
    tag = 0
    for item in items:
        if isinstance(item, dict):
            writer.write(item, tag)
            tag += 1
        else:
            writer.write_table(item, range(tag, tag + len(item)))
            tag += len(item)
    done = writer.close()
    return (pq.read_table(done[0]) if done else None), refused


def test_tables_and_rows_keep_their_order_and_tables_their_types(tmp_path: Path) -> None:
    small = pa.table({"n": pa.array([1, 2], pa.int16())})
    table, refused = write(tmp_path, small, {"n": 3}, small, small)
    assert table["n"].to_pylist() == [1, 2, 3, 1, 2, 1, 2]
    assert refused == []
    table, _ = write(tmp_path, small, small)
    assert table.schema.field("n").type == pa.int16()


def test_columns_that_only_some_tables_have_are_null_elsewhere(tmp_path: Path) -> None:
    table, refused = write(tmp_path, pa.table({"a": [1]}), pa.table({"b": ["x"]}), {"a": 2, "c": 0.5})
    assert table.to_pylist() == [
        {"a": 1, "b": None, "c": None},
        {"a": None, "b": "x", "c": None},
        {"a": 2, "b": None, "c": 0.5},
    ]
    assert refused == []


def test_rows_of_a_table_with_another_type_are_set_aside_one_by_one(tmp_path: Path) -> None:
    table, refused = write(tmp_path, pa.table({"a": [1]}), pa.table({"a": ["x", None, "y"]}), pa.table({"a": [4]}))
    assert table["a"].to_pylist() == [1, None, 4]
    assert [tag for tag, _ in refused] == [1, 3]
    assert "column 'a' is int64 in this file, but string here" in refused[0][1]


def test_a_given_schema_casts_what_fits_and_refuses_what_does_not(tmp_path: Path) -> None:
    fields: list[Any] = [pa.field("n", pa.int8(), nullable=False), pa.field("s", pa.string())]
    tables = [
        pa.table({"n": [1, 2]}),
        pa.table({"n": [3, 300]}),
        pa.table({"n": pa.array([None, 5], pa.int64())}),
        pa.table({"n": [6], "more": [1]}),
    ]
    table, refused = write(tmp_path, *tables, schema=pa.schema(fields))
    assert table.schema.names == ["n", "s"]
    assert table["n"].to_pylist() == [1, 2, 3, 5]
    assert [tag for tag, _ in refused] == [3, 4, 6]
    assert "'more' is not in the schema" in refused[2][1]


@pytest.mark.parametrize("table", [pa.table({"n": pa.array([], pa.int64())}), pa.table({})])
def test_a_table_without_rows_makes_no_file(tmp_path: Path, table: Any) -> None:
    assert write(tmp_path, table) == (None, [])
    read, refused = write(tmp_path, table, {"n": 1})
    assert read.to_pylist() == [{"n": 1}]
    assert refused == []
