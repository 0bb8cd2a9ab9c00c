"""Parquet files: rows in their order, cuts at row groups, values as Python's, and files that are none."""

from __future__ import annotations

import datetime as dt
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parflow.core.fingerprint import fingerprint
from parflow.core.partition import OPEN_COST
from parflow.errors import InputChangedError, NotTextError, RecordError, UnreadableInputError, UsageError
from parflow.model import Chunk, Part
from parflow.nodes import Source
from parflow.storage.sources import ParquetSource


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "file.parquet"


def chunks_of(source: ParquetSource) -> list[Chunk]:
    return [chunk for chunk in source.chunks(None) if isinstance(chunk, Chunk)]


def parts_of(source: ParquetSource) -> list[Part]:
    return [part for chunk in chunks_of(source) for part in chunk.parts]


def rows(source: ParquetSource) -> list[tuple[int, Any]]:
    return [(number, source.decode(raw)) for part in parts_of(source) for number, raw in source.read(part, part.start, None)]


def records(source: ParquetSource) -> list[Any]:
    return [record for _, record in rows(source)]


def write(path: Path, table: Any, **options: Any) -> Path:
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path, **options)
    return path


def numbered(count: int) -> Any:
    return pa.table({"n": range(count), "text": [f"document {n}" for n in range(count)]})


# --- rows ----------------------------------------------------------------------------------------------------------------


@given(count=st.integers(0, 60), group=st.integers(1, 25), chunk_bytes=st.integers(1, 2000))
def test_all_parts_together_give_every_row_once_with_its_number(
    scratch: Path, count: int, group: int, chunk_bytes: int
) -> None:
    table = numbered(count)
    write(scratch, table, row_group_size=group)
    assert rows(ParquetSource(scratch, chunk_bytes=chunk_bytes)) == list(enumerate(table.to_pylist()))


@given(count=st.integers(1, 40), group=st.integers(1, 25), chunk_bytes=st.integers(1, 2000))
def test_reading_goes_on_from_any_row_with_the_same_rest(scratch: Path, count: int, group: int, chunk_bytes: int) -> None:
    write(scratch, numbered(count), row_group_size=group)
    source = ParquetSource(scratch, chunk_bytes=chunk_bytes)
    for part in parts_of(source):
        whole = list(source.read(part, part.start, None))
        for i, (number, _) in enumerate(whole):
            assert list(source.read(part, number, None)) == whole[i:]


def test_a_long_row_group_is_read_batch_by_batch_and_gone_on_with_inside(tmp_path: Path) -> None:
    source = ParquetSource(write(tmp_path / "a.parquet", numbered(5000)))
    [part] = parts_of(source)
    sizes = [(first, batch.num_rows) for first, batch in source.batches(part)]
    assert sizes == [(0, 1024), (1024, 1024), (2048, 1024), (3072, 1024), (4096, 904)]
    rest = [(first, batch.num_rows) for first, batch in source.batches(part, 1500)]
    assert rest == [(1500, 548), (2048, 1024), (3072, 1024), (4096, 904)]
    assert [number for number, _ in source.read(part, 4998, None)] == [4998, 4999]


def test_large_rows_come_in_small_batches(tmp_path: Path) -> None:
    texts = [os.urandom(50_000).hex() for _ in range(200)]
    source = ParquetSource(write(tmp_path / "a.parquet", {"text": texts}), chunk_bytes=2**40)
    [part] = parts_of(source)
    batches = [batch for _, batch in source.batches(part)]
    assert max(batch.nbytes for batch in batches) < 8 * 2**20
    assert pa.Table.from_batches(batches).column("text").to_pylist() == texts


def test_batches_are_arrow_tables_of_the_chosen_columns(tmp_path: Path) -> None:
    table = numbered(10)
    source = ParquetSource(write(tmp_path / "a.parquet", table), columns=["text", "n"])
    [part] = parts_of(source)
    assert pa.Table.from_batches([batch for _, batch in source.batches(part)]).equals(table.select(["text", "n"]))


def test_files_may_have_different_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": [1], "y": ["a"]})
    write(tmp_path / "b.parquet", {"y": [2.5], "z": [True]})
    source = ParquetSource(f"{tmp_path}/*.parquet")
    assert records(source) == [{"x": 1, "y": "a"}, {"y": 2.5, "z": True}]
    assert records(ParquetSource(f"{tmp_path}/*.parquet", columns="y")) == [{"y": "a"}, {"y": 2.5}]


def test_files_without_rows_or_columns_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"x": pa.array([], pa.int64())})
    write(tmp_path / "b.parquet", numbered(2))
    assert len(records(ParquetSource(f"{tmp_path}/*.parquet", chunk_bytes=1))) == 2
    assert records(ParquetSource(f"{tmp_path}/a.parquet")) == []


# --- cuts ------------------------------------------------------------------------------------------------------------------


def test_a_large_file_is_cut_at_row_groups_only_and_parts_know_their_bytes(tmp_path: Path) -> None:
    random = [os.urandom(1000) for _ in range(100)]
    path = write(tmp_path / "a.parquet", {"data": random}, row_group_size=10, compression="none", use_dictionary=False)
    source = ParquetSource(path, chunk_bytes=25_000)
    chunks = chunks_of(source)
    assert [(part.start, part.stop) for chunk in chunks for part in chunk.parts] == [(n, n + 20) for n in range(0, 100, 20)]
    assert all(20_000 < source.size(chunk.parts[0]) < 25_000 for chunk in chunks)
    assert sum(source.size(chunk.parts[0]) for chunk in chunks) <= path.stat().st_size
    assert [(chunk.index, chunk.weight) for chunk in chunks] == [
        (i, source.size(chunk.parts[0]) + OPEN_COST) for i, chunk in enumerate(chunks)
    ]
    assert len({chunk.id for chunk in chunks}) == len(chunks)
    assert chunks_of(ParquetSource(path, chunk_bytes=25_000)) == chunks
    [one, *_] = chunks_of(ParquetSource(path, chunk_bytes=1))
    assert (one.parts[0].start, one.parts[0].stop) == (0, 10)


def test_only_the_chosen_columns_weigh(tmp_path: Path) -> None:
    table = {"big": [os.urandom(1000) for _ in range(100)], "n": range(100), "n.x": range(100), "s": [{"n": 1}] * 100}
    path = write(tmp_path / "a.parquet", table, row_group_size=10, use_dictionary=False, compression="none")
    source = ParquetSource(path, columns=["n"], chunk_bytes=25_000)
    [part] = parts_of(source)
    assert (part.start, part.stop) == (0, 100)
    assert 800 < source.size(part) < 4_000
    assert records(source) == [{"n": n} for n in range(100)]


def test_small_files_share_a_chunk_beside_large_ones_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("a", "b", "d"):
        write(tmp_path / f"{name}.parquet", numbered(3))
    write(tmp_path / "c.parquet", {"n": [3] * 4, "data": [os.urandom(40_000) for _ in range(4)]}, row_group_size=2)
    source = ParquetSource(f"{tmp_path}/*.parquet", chunk_bytes=140_000)
    chunks = chunks_of(source)
    shape = [(c.index, [(os.path.basename(p.path)[0], p.start, p.stop) for p in c.parts]) for c in chunks]
    assert shape == [(0, [("a", 0, None), ("b", 0, None)]), (1, [("c", 0, 2)]), (2, [("c", 2, 4)]), (3, [("d", 0, None)])]
    assert [record["n"] for record in records(source)] == [0, 1, 2, 0, 1, 2, 3, 3, 3, 3, 0, 1, 2]


def test_listing_small_files_opens_none(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no Parquet at all")
    code = f"""
import sys
from parflow.storage.sources import ParquetSource
print(len(list(ParquetSource({str(tmp_path / "*.parquet")!r}).chunks(None))), "pyarrow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "False"]


# --- values ----------------------------------------------------------------------------------------------------------------


def test_values_are_pythons_own(tmp_path: Path) -> None:
    record = {
        "i": 2**62,
        "f": 0.1,
        "none": None,
        "b": True,
        "bytes": b"\xff",
        "text": "é",
        "day": dt.date(2020, 2, 29),
        "time": dt.datetime.fromisoformat("2020-02-29T01:02:03.000004"),
        "list": [1, None],
        "struct": {"x": [{"y": "z"}]},
    }
    path = write(tmp_path / "a.parquet", pa.Table.from_pylist([record]))
    [found] = records(ParquetSource(path))
    assert found == record
    assert {name: type(value) for name, value in found.items()} == {name: type(value) for name, value in record.items()}


WHOLE, BROKEN = 1_600_000_000_123_456_000, 1_600_000_000_123_456_789


@pytest.mark.parametrize("pandas", ["as it is", "never imported"])
def test_nanoseconds_are_kept_whether_or_not_pandas_is_imported(tmp_path: Path, pandas: str) -> None:
    """Arrow's own answer depends on it: an error, or Timestamps for all."""
    table = {
        "at": pa.array([WHOLE, BROKEN, None], pa.timestamp("ns", "Europe/Prague")),
        "for": pa.array([WHOLE, BROKEN, None], pa.duration("ns")),
        "deep": pa.array([[{"at": WHOLE}], [], None], pa.list_(pa.struct([("at", pa.timestamp("ns"))]))),
        "clock": pa.array([1000, 2000, None], pa.time64("ns")),
    }
    path = write(tmp_path / "a.parquet", table, version="2.6")
    if pandas == "as it is":
        found = records(ParquetSource(path))
    else:
        code = f"""
import pickle, sys
import pyarrow.parquet
from parflow.runtime.child import _leave_pandas_out
from parflow.storage.sources import ParquetSource
_leave_pandas_out()
source = ParquetSource({str(path)!r})
[chunk] = source.chunks(None)
sys.stdout.buffer.write(pickle.dumps([raw for _, raw in source.read(chunk.parts[0], 0, None)]))
"""
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        found = pickle.loads(done.stdout)
    whole, broken, empty = found
    moment = dt.datetime.fromisoformat("2020-09-13T12:26:40.123456")
    assert type(whole["at"]) is dt.datetime
    assert whole["at"].isoformat() == "2020-09-13T14:26:40.123456+02:00"
    assert type(whole["for"]) is dt.timedelta
    assert whole["deep"] == [{"at": moment}]
    assert whole["clock"] == dt.time(microsecond=1)
    assert broken["at"] == pd.Timestamp(BROKEN, unit="ns", tz="Europe/Prague")
    assert broken["for"] == pd.Timedelta(BROKEN, unit="ns")
    assert broken["at"].value == broken["for"].value == BROKEN
    assert set(empty.values()) == {None}


def test_a_value_that_python_cannot_hold_sets_its_row_aside_and_no_other(tmp_path: Path) -> None:
    times = pa.array([0, 10**12, 1], pa.timestamp("s"))
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    clocks = pa.array([0, 1000, 1], pa.time64("ns"))
    for name, column, bad, error in (
        ("time", times, 1, RecordError),
        ("text", texts, 1, NotTextError),
        ("clock", clocks, 2, RecordError),
    ):
        source = ParquetSource(write(tmp_path / f"{name}.parquet", {"n": [0, 1, 2], "value": column}, version="2.6"))
        [part] = parts_of(source)
        found = list(source.read(part, 0, None))
        assert [number for number, _ in found] == [0, 1, 2]
        assert [source.decode(raw)["n"] for number, raw in found if number != bad] == [n for n in range(3) if n != bad]
        with pytest.raises(error):
            source.decode(found[bad][1])


# --- what is wrong -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [2**20, 10])
def test_a_file_that_is_no_parquet_is_one_part_that_says_so(tmp_path: Path, chunk_bytes: int) -> None:
    good = write(tmp_path / "good.parquet", numbered(50)).read_bytes()
    bad = {"text": b"id,name\n" * 10, "empty": b"", "cut": good[:-20], "footer": good[:-60] + b"\xff" * 52 + good[-8:]}
    for name, data in bad.items():
        path = tmp_path / f"{name}.bad"
        path.write_bytes(data)
        source = ParquetSource(path, chunk_bytes=chunk_bytes)
        source.check()
        [part] = parts_of(source)
        with pytest.raises(UnreadableInputError, match=str(path)):
            list(source.read(part, 0, None))


def test_a_damaged_row_group_leaves_those_before_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"data": [os.urandom(1000) for _ in range(30)]}, row_group_size=10, compression="zstd")
    data = bytearray(path.read_bytes())
    middle = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    data[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(data)
    source = ParquetSource(path)
    [part] = parts_of(source)
    found = source.read(part, 0, None)
    assert [number for number, _ in itertools.islice(found, 10)] == [*range(10)]
    with pytest.raises(UnreadableInputError):
        next(found)


def test_a_file_without_a_chosen_column_says_what_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"x": [1], "y": [{"z": 2}]})
    for column in ("z", "y.z"):
        with pytest.raises(UnreadableInputError, match=f"it has no column '{column}', but 'x', 'y'"):
            records(ParquetSource(path, columns=["x", column]))


def test_columns_of_one_name_are_refused_as_a_dict_has_room_for_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.table([pa.array([1]), pa.array([2]), pa.array([3])], names=["x", "y", "x"]))
    with pytest.raises(UnreadableInputError, match="2 columns 'x'"):
        records(ParquetSource(path))
    assert records(ParquetSource(path, columns=["y"])) == [{"y": 2}]


def test_a_file_that_changed_after_it_was_listed_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbered(5))
    source = ParquetSource(path)
    [part] = parts_of(source)
    write(path, numbered(6))
    with pytest.raises(InputChangedError):
        list(source.read(part, 0, None))


@pytest.mark.parametrize("arguments", [{"columns": []}, {"columns": ["a", "a"]}, {"columns": [1]}, {"chunk_bytes": 0}])
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ParquetSource("unused", **arguments)


def test_a_source_travels_names_its_rows_and_is_what_its_options_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", numbered(2))
    source: Source = ParquetSource(path, columns=["n"])
    again = pickle.loads(pickle.dumps(source))
    assert records(again) == [{"n": 0}, {"n": 1}]
    assert source.record_id(parts_of(again)[0], 1) == f"{path}#1"
    assert fingerprint(again) == fingerprint(source) != fingerprint(ParquetSource(path))


def test_remote_files_are_read_and_cut(tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    path = write(tmp_path / "a.parquet", numbered(50), row_group_size=10)
    files.pipe_file("/parquet/a.parquet", path.read_bytes())
    source = ParquetSource("memory://parquet/*.parquet", chunk_bytes=100)
    source.check()
    assert len(parts_of(source)) == 5
    assert records(source) == records(ParquetSource(path))
