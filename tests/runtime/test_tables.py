"""Parquet that is read for a step that wants Arrow tables stays Arrow."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import parflow as pf

ROWS = 1000


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    """A file of a thousand rows in row groups of 100, with a type that Python doesn't have."""
    path = tmp_path / "numbers.parquet"
    table = pa.table({"n": pa.array(range(ROWS), pa.int16()), "kind": pa.array(["a", "b"] * (ROWS // 2)).dictionary_encode()})
    pq.write_table(table, path, row_group_size=100)
    return str(path)


def types(table: pa.Table) -> pa.Table:
    assert [str(field.type) for field in table.schema] == ["int16", "dictionary<values=string, indices=int32, ordered=0>"]
    return table


def test_a_table_comes_as_it_is_in_the_file_and_goes_as_it_is_into_the_next(numbers: str, tmp_path: Path) -> None:
    written = pf.read_parquet(numbers).map_batches(types, 64, "arrow").write_parquet(tmp_path / "out")
    run = written.run(home=tmp_path / "home", workers=1)
    assert run.result()["rows"] == ROWS
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert str(table.schema.field("n").type) == "int16"
    assert table["n"].to_pylist() == list(range(ROWS))


@pytest.mark.parametrize("size", [1, 7, 100, 5000])
def test_every_row_comes_once_and_in_order_whatever_the_size_of_a_batch(numbers: str, size: int, tmp_path: Path) -> None:
    rows = pf.read_parquet(numbers, chunk_bytes=200).map_batches(types, size, "arrow").map(lambda row: row["n"])
    assert list(rows.run(home=tmp_path, isolation="inline").result()) == list(range(ROWS))
    assert rows.compute() == list(range(ROWS))


def test_a_row_that_fails_is_named_by_its_file_and_number(numbers: str, tmp_path: Path) -> None:
    def no_777(table: pa.Table) -> pa.Table:
        if 777 in table["n"].to_pylist():
            raise ValueError("777")
        return table

    run = pf.read_parquet(numbers).map_batches(no_777, 256, "arrow").reduce(pf.count()).run(home=tmp_path, max_failures=1)
    assert run.result() == ROWS - 1
    assert [failure.record for failure in run.dead_letters()] == [f"{numbers}#777"]


def test_a_row_that_kills_its_process_is_found_among_its_batch(numbers: str, tmp_path: Path) -> None:
    def dies_of_777(table: pa.Table) -> pa.Table:
        if 777 in table["n"].to_pylist():
            os.kill(os.getpid(), signal.SIGKILL)
        return table

    run = pf.read_parquet(numbers).map_batches(dies_of_777, 256, "arrow").reduce(pf.count()).run(home=tmp_path, max_failures=1)
    assert run.result() == ROWS - 1
    assert [failure.record for failure in run.dead_letters()] == [f"{numbers}#777"]


def test_a_step_for_rows_beside_one_for_tables_gets_rows(numbers: str, tmp_path: Path) -> None:
    rows = pf.read_parquet(numbers)

    @pf.workflow
    def both() -> Any:
        return rows.map_batches(lambda table: table, 64, "arrow").reduce(pf.count()), rows.reduce(pf.sum("n"))

    assert both().run(home=tmp_path).result() == (ROWS, sum(range(ROWS)))


def test_a_piece_goes_on_in_the_middle_of_a_table_after_its_time_slice(numbers: str, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def slow(table: pa.Table) -> pa.Table:
        if not gate.exists():
            gate.touch()
            import time

            time.sleep(0.3)
        return table

    rows = pf.read_parquet(numbers).map_batches(slow, 50, "arrow").map(lambda row: row["n"])
    assert list(rows.run(home=tmp_path / "home", slice=0.1).result()) == list(range(ROWS))


def test_a_damaged_file_is_one_dead_letter_and_its_siblings_go_on(numbers: str, tmp_path: Path) -> None:
    data = bytearray(Path(numbers).read_bytes())
    data[4:40] = bytes(36)  # the head of the first page
    (tmp_path / "broken.parquet").write_bytes(bytes(data))
    both = pf.read_parquet(str(tmp_path / "*.parquet")).map_batches(lambda table: table, 64, "arrow").reduce(pf.count())
    run = both.run(home=tmp_path / "home", max_failures=5)
    assert run.result() >= ROWS
    assert {Path(failure.record.partition("#")[0]).name for failure in run.dead_letters()} == {"broken.parquet"}
