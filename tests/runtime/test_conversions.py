"""Real runs over CSV, Parquet and Dask's collections, and their results as frames of pandas and Dask."""

from __future__ import annotations

import functools
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.bag
import dask.dataframe
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster

import parflow as pf
from parflow.api.conversions import Partitions
from parflow.errors import CodeError, GraphError, OutputError, RecordError, StoreError, TooManyFailuresError, UsageError
from parflow.model import Chunk
from parflow.storage.sources import PartitionsSource
from parflow.storage.store import LocalStore

pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")  # Dask's own business with pandas


def result(dataset: pf.Dataset, **options: Any) -> list[Any]:
    return list(dataset.run(workers=2, **options).result())


# --- files -----------------------------------------------------------------------------------------------------------------


def test_a_run_over_csv_names_its_dead_letters_by_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,"one\ntwo"\n2\n3,three\nx,four\n')
    run = pf.read_csv(path).map(lambda row: {**row, "id": int(row["id"])}).run(max_failures=2, workers=1)
    assert run.result() == [{"id": 1, "text": "one\ntwo"}, {"id": 3, "text": "three"}]
    few, word = run.dead_letters()
    assert (few.record, few.step, few.error, few.cause, few.preview) == (
        f"{path}#20",
        "read",
        "NotCSVError",
        "input",
        r"b'2\n'",
    )
    assert few.message == "not CSV: the row has 1 field, but there are 2 columns: 'id', 'text'"
    assert (word.record, word.error) == (f"{path}#30", "ValueError")


def test_a_run_over_cut_csv_gives_every_row_once_although_a_row_ends_its_child(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(f"{n},{'x' * (n % 50)}\n" for n in range(2000)))

    def number(row: dict[str, str]) -> int:
        if row["id"] == "1234":
            os._exit(3)
        return int(row["id"])

    data = pf.read_csv(path, quoted_newlines=False, chunk_bytes="8KiB")
    run = data.map(number).run(workers=2, max_failures=1)
    assert run.result() == [n for n in range(2000) if n != 1234]
    [failure] = run.dead_letters()
    assert failure.cause == "crash"
    offset = int(failure.record.removeprefix(f"{path}#"))
    assert path.read_bytes()[offset:].startswith(b"1234,")


def test_a_run_over_parquet_goes_on_inside_row_groups(tmp_path: Path) -> None:
    table = pa.table({"n": range(500), "text": [f"document {n}" for n in range(500)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=200)
    (tmp_path / "b.parquet").write_bytes(b"no Parquet")

    def number(row: dict[str, Any]) -> int:
        if row["n"] == 333:
            os._exit(3)
        return int(row["n"])

    data = pf.read_parquet(f"{tmp_path}/*.parquet", columns=["n"], chunk_bytes=100)
    run = data.map(number).run(workers=2, max_failures=2)
    assert run.result() == [n for n in range(500) if n != 333]
    crash, damaged = run.dead_letters()
    assert (crash.record, crash.cause) == (f"{tmp_path}/a.parquet#333", "crash")
    assert (damaged.record, damaged.error, damaged.cause) == (f"{tmp_path}/b.parquet#0", "UnreadableInputError", "input")


# --- from Dask: what each kind gives ---------------------------------------------------------------------------------------


def frame(rows: int = 10) -> pd.DataFrame:
    return pd.DataFrame({"n": range(rows), "text": [f"document {n}" for n in range(rows)]}, index=range(5, 5 + rows))


def test_the_items_of_a_bag_are_records() -> None:
    bag = dask.bag.from_sequence(range(10), npartitions=4).map(lambda n: n * n)
    data = pf.from_dask(bag).map(lambda n: n + 1)
    assert result(data) == data.compute() == [n * n + 1 for n in range(10)]
    assert pf.from_dask(bag).reduce(pf.sum()).run().result() == 285


def test_the_rows_of_a_dataframe_are_dicts() -> None:
    lazy = dask.dataframe.from_pandas(frame(), npartitions=3)
    lazy["double"] = lazy["n"] * 2
    data = pf.from_dask(lazy)
    expected = [{"n": n, "text": f"document {n}", "double": 2 * n} for n in range(10)]
    assert result(data) == data.compute(scheduler="synchronous") == expected
    assert type(result(data)[0]["n"]) is int


def test_a_list_of_delayed_gives_lists_and_frames() -> None:
    parts = [dask.delayed(range)(3), dask.delayed(frame)(2), dask.delayed(iter)([7, 8])]
    rows = [{"n": 0, "text": "document 0"}, {"n": 1, "text": "document 1"}]
    assert result(pf.from_dask(parts)) == [0, 1, 2, *rows, 7, 8]
    assert result(pf.from_dask([])) == []
    assert result(pf.from_dask([dask.delayed(list)(), dask.delayed(list)("ab")])) == ["a", "b"]


def test_each_partition_of_a_shuffled_dataframe_is_computed_by_itself() -> None:
    lazy = dask.dataframe.from_pandas(frame(40), npartitions=4).shuffle("text")
    found = result(pf.from_dask(lazy))
    assert sorted(row["n"] for row in found) == [*range(40)]
    assert found == result(pf.from_dask(lazy))


def test_a_partition_carries_its_own_part_of_the_graph() -> None:
    def largest(partitions: int) -> int:
        bag = dask.bag.from_sequence([b"x" * 1000] * partitions, npartitions=partitions).map(len)
        source = PartitionsSource("from_dask", Partitions(bag.to_delayed()))
        kept: dict[str, bytes] = {}

        class Store:
            put = staticmethod(lambda name, data: kept.update({name: data}) or name)
            get = kept.__getitem__

        return max(chunk.weight for chunk in source.chunks(Store()))

    assert abs(largest(200) - largest(2)) < 100


def test_dead_letters_name_partition_and_position() -> None:
    bag = dask.bag.from_sequence(range(9), npartitions=3)
    run = pf.from_dask(bag).map(lambda n: 1 // (n - 4)).run(max_failures=1, workers=1)
    run.result()
    assert [failure.record for failure in run.dead_letters()] == ["partition-1#1"]


# --- from Dask: partitions that fail -----------------------------------------------------------------------------------------


def broken(number: int) -> list[int]:
    if number == 1:
        raise ConnectionError("no line to the database")
    return [number]


def test_a_partition_that_raises_is_one_dead_letter() -> None:
    run = pf.from_dask([dask.delayed(broken)(n) for n in range(3)]).run(max_failures=1, workers=1)
    assert run.result() == [0, 2]
    [failure] = run.dead_letters()
    assert (failure.record, failure.step, failure.cause) == ("partition-1#0", "read", "input")
    assert (failure.error, failure.message) == ("ConnectionError", "no line to the database")


@pytest.mark.parametrize("value", [5, "text", {"a": 1}, None])
def test_a_partition_that_gives_no_records_says_what_it_gave(value: Any) -> None:
    run = pf.from_dask([dask.delayed(value)]).run(max_failures=1, workers=1)
    assert run.result() == []
    [failure] = run.dead_letters()
    assert failure.message == f"a partition is a list of records or a pandas DataFrame, not a {type(value).__name__}"


def test_a_frame_with_two_columns_of_one_name_is_refused() -> None:
    twice = pd.DataFrame([[1, 2]], columns=["x", "x"])
    with pytest.raises(RecordError, match="two columns have the same name"):
        pf.from_dask([dask.delayed(lambda: twice)()]).compute(scheduler="synchronous")


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: dask.delayed(list)(), "Wrap it in a list"),
        (lambda: dask.dataframe.from_pandas(frame(), npartitions=1)["n"], r"\.to_frame\(\)"),
        (lambda: [1, 2], "not a builtins.list"),
        (lambda: frame(), "DataFrame"),
        (lambda: dask.bag.from_sequence([1]).sum(), "Item"),
    ],
)
def test_other_kinds_of_collection_are_refused(make: Any, hint: str) -> None:
    with pytest.raises(GraphError, match=rf"takes a dask\.bag, .*{hint}"):
        pf.from_dask(make())


def test_a_graph_that_cannot_travel_names_its_partition() -> None:
    lock = threading.Lock()
    bag = dask.bag.from_sequence([1, 2], npartitions=2).map(lambda n: (n, lock.locked()))
    with pytest.raises(CodeError, match=r"partition 0 can't be pickled: .*lock"):
        pf.from_dask(bag).compute()


@pytest.fixture
def client() -> Iterator[Client]:
    with (
        dask.config.set({"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}),
        LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", memory_limit=0
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def test_data_that_a_cluster_holds_is_refused(client: Client) -> None:
    bag = dask.bag.from_sequence([1, 2], npartitions=2)
    for collection in (bag, dask.dataframe.from_pandas(frame(), npartitions=2), bag.to_delayed()):
        held = client.persist(collection)
        with pytest.raises(GraphError, match="before persist"):
            pf.from_dask(held).compute(scheduler="synchronous")


# --- from Dask: going on -----------------------------------------------------------------------------------------------------


def computed(log: Path, number: int) -> list[int]:
    """Tell that a partition is computed, and give its records."""
    with log.open("a") as file:
        file.write(f"{number}\n")
    return [10 * number + n for n in range(3)]


def test_a_run_is_resumed_from_its_journal_and_computes_no_finished_partition_again(tmp_path: Path) -> None:
    log, broken, home = tmp_path / "log", tmp_path / "broken", tmp_path / "home"
    broken.touch()

    def check(number: int) -> int:
        if broken.exists() and number == 1:
            raise ValueError(number)
        return number

    parts = [dask.delayed(computed)(log, number) for number in range(20)]
    run = pf.from_dask(parts).map(check).run(home=home, workers=1)
    with pytest.raises(TooManyFailuresError):
        run.result()
    listed = [progress.chunk.id for progress in run.state.stages[0].chunks]
    broken.unlink()
    again = pf.resume(run.run_id, home=home, workers=1, max_failures=1)
    assert again.result() == [10 * number + n for number in range(20) for n in range(3) if (number, n) != (0, 1)]
    assert [progress.chunk.id for progress in again.state.stages[0].chunks][: len(listed)] == listed
    assert sorted(map(int, log.read_text().split())) == [*range(20)]


def slow(log: Path, number: int) -> list[int]:
    began = time.process_time()
    while time.process_time() - began < 0.2:
        pass
    return computed(log, number)


def test_a_partition_that_takes_longer_than_a_time_slice_is_computed_once(tmp_path: Path) -> None:
    """Were it not kept, it would be computed in each slice anew, and none would ever come to its first record."""
    log = tmp_path / "log"
    parts = [dask.delayed(slow)(log, number) for number in range(2)]
    assert result(pf.from_dask(parts), slice=0.05) == [0, 1, 2, 10, 11, 12]
    assert sorted(log.read_text().split()) == ["0", "1"]


def source_of(*partitions: Any) -> PartitionsSource:
    return PartitionsSource("from_dask", [pickle.dumps(functools.partial(*partition)) for partition in partitions])


def chunks_of(source: PartitionsSource, store: Any) -> list[Chunk]:
    return list(source.chunks(store))


@pytest.mark.parametrize("size", [1, 5000])
def test_reading_goes_on_from_any_record_with_the_same_rest(tmp_path: Path, size: int) -> None:
    store = LocalStore(str(tmp_path / "store"))
    [first, second] = chunks_of(source_of((list, ["a" * size, "b"]), (list, [])), store)
    assert (first.parts[0].data is None) == (size == 5000)
    source = pickle.loads(pickle.dumps(source_of((list, []))))
    whole = list(source.read(first.parts[0], 0, store))
    assert whole == [(0, "a" * size), (1, "b")]
    assert list(source.read(first.parts[0], 1, store)) == whole[1:]
    assert list(source.read(second.parts[0], 0, store)) == []
    assert [source.record_id(chunk.parts[0], 1) for chunk in (first, second)] == ["partition-0#1", "partition-1#1"]
    assert first.id != second.id


def test_a_partition_that_its_reader_left_is_not_computed_again(tmp_path: Path) -> None:
    store, log = LocalStore(str(tmp_path / "store")), tmp_path / "log"
    source = source_of((computed, log, 1))
    [chunk] = chunks_of(source, store)
    [part] = chunk.parts
    reading = source.read(part, 0, store)
    assert next(reading) == (0, 10)
    reading.close()  # type: ignore[attr-defined]
    assert list(source.read(part, 1, store)) == [(1, 11), (2, 12)]
    assert log.read_text() == "1\n"


def test_a_stored_partition_that_is_damaged_is_noticed(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "store"))
    source = source_of((list, ["a" * 5000]))
    [chunk] = chunks_of(source, store)
    store.put(chunk.parts[0].path, b"something else")
    with pytest.raises(StoreError, match="is not what was stored"):
        list(source.read(chunk.parts[0], 0, store))


def test_a_source_that_travelled_cannot_list_and_says_so() -> None:
    again = pickle.loads(pickle.dumps(source_of((list, "ab"))))
    with pytest.raises(UsageError, match=r"from_dask: .*Start it again"):
        again.check()


# --- to pandas ---------------------------------------------------------------------------------------------------------------


def squares(count: int = 25) -> pf.Dataset:
    return pf.items(range(count), chunk_records=2).map(lambda n: {"n": n, "square": n * n})


def test_a_dataframe_has_the_records_in_input_order(home: Path) -> None:
    found = squares().to_pandas(workers=2)
    assert found.to_dict("list") == {"n": [*range(25)], "square": [n * n for n in range(25)]}
    assert pf.open_run().status == "succeeded"


def test_columns_come_in_the_order_in_which_records_have_them() -> None:
    rows = pf.items([{"b": 1}, {"a": 2.5, "b": 3}, {}])
    found = rows.to_pandas(isolation="inline")
    assert [*found.columns] == ["b", "a"]
    assert found["b"].tolist()[:2] == [1, 3]
    assert found["a"].isna().tolist() == [True, False, True]


def test_no_records_are_an_empty_dataframe() -> None:
    assert pf.items([]).to_pandas(isolation="inline").empty


def test_records_that_are_no_dicts_are_refused_with_a_hint() -> None:
    with pytest.raises(GraphError, match=r"record 1 is a int. Make it one: \.map\("):
        pf.items([{"a": 1}, 2]).to_pandas(isolation="inline")


def test_a_run_that_fails_gives_no_dataframe() -> None:
    with pytest.raises(TooManyFailuresError):
        squares().map(lambda row: 1 // row["n"]).to_pandas(isolation="inline")


@pytest.mark.parametrize("name", ["to_pandas", "to_dask_dataframe"])
def test_a_conversion_runs_so_it_is_no_part_of_a_workflow(name: str) -> None:
    @pf.workflow
    def flow() -> Any:
        return getattr(squares(), name)()

    with pytest.raises(GraphError, match=rf"{name}\(\) runs at once"):
        flow().plan()


# --- to Dask -----------------------------------------------------------------------------------------------------------------


def test_a_dask_dataframe_reads_what_was_written_durably(home: Path) -> None:
    lazy = squares().to_dask_dataframe(workers=2)
    assert isinstance(lazy, dask.dataframe.DataFrame)
    assert lazy.compute(scheduler="synchronous").to_dict("list") == squares().to_pandas(workers=2).to_dict("list")
    assert int(lazy["square"].sum().compute(scheduler="synchronous")) == 4900
    [folder] = (home / "frames").iterdir()
    assert len([*folder.glob("part-*.parquet")]) == 13


def test_a_dask_dataframe_is_written_where_it_is_asked_to(tmp_path: Path) -> None:
    out = tmp_path / "out"
    types: dict[str, Any] = {"n": pa.int16(), "square": pa.float32()}
    schema = pa.schema(types)
    options: dict[str, Any] = {"schema": schema, "compression": "none", "isolation": "inline"}
    lazy = squares(4).to_dask_dataframe(out, **options)
    assert lazy.dtypes.to_dict() == {"n": pd.ArrowDtype(pa.int16()), "square": pd.ArrowDtype(pa.float32())}
    assert pq.read_metadata(out / "part-00000.parquet").row_group(0).column(0).compression == "UNCOMPRESSED"
    with pytest.raises(OutputError, match="files already"):
        squares(4).to_dask_dataframe(out, **options)
    assert len(squares(3).to_dask_dataframe(out, overwrite=True, **options).compute(scheduler="synchronous")) == 3


def test_files_with_different_types_are_brought_together() -> None:
    """Each chunk's file has the types of its own records: nulls alone, another column, integers beside floats."""
    rows: list[dict[str, Any]] = [
        {"a": None, "n": 2**60 + 1},
        {"a": "x", "n": None},
        {"a": "y", "b": True},
        {"a": "z", "b": None},
    ]
    lazy = pf.items(rows, chunk_records=1).to_dask_dataframe(isolation="inline")
    found = lazy.compute(scheduler="synchronous")
    assert found.dtypes.to_dict() == lazy.dtypes.to_dict()
    assert [*found.columns] == ["a", "n", "b"]
    values = found.astype(object).where(found.notna(), None).to_dict("list")
    assert values == {"a": [None, "x", "y", "z"], "n": [2**60 + 1, None, None, None], "b": [None, None, True, None]}
    assert lazy["b"].count().compute(scheduler="synchronous") == 1


def test_files_with_one_schema_keep_integers_beside_nulls() -> None:
    rows = pf.items([{"n": 2**60 + 1}, {"n": None}, {"n": None}, {"n": 3}], chunk_records=2)
    found = rows.to_dask_dataframe(isolation="inline").compute(scheduler="synchronous")
    assert found["n"].dropna().tolist() == [2**60 + 1, 3]


def test_types_that_do_not_go_together_say_what_to_do() -> None:
    rows = pf.items([{"a": 1}, {"a": "x"}], chunk_records=1)
    with pytest.raises(OutputError, match=r"don't go together: .*give schema="):
        rows.to_dask_dataframe(isolation="inline")


@pytest.mark.parametrize("schema", [None, pa.schema([("n", pa.int64())])])
def test_no_records_are_an_empty_dask_dataframe(schema: Any) -> None:
    lazy = pf.items([]).to_dask_dataframe(schema=schema, isolation="inline")
    assert [*lazy.columns] == ([] if schema is None else ["n"])
    assert len(lazy.compute(scheduler="synchronous")) == 0


def test_a_partition_that_kills_its_reader_is_one_dead_letter_and_the_others_are_read() -> None:
    import os

    import dask

    def partition(number: int) -> list[int]:
        if number == 2:
            os._exit(5)
        return [10 * number, 10 * number + 1]

    parts = [dask.delayed(partition)(number) for number in range(4)]
    run = pf.from_dask(parts).run(workers=2, max_failures=1)
    assert list(run.result()) == [0, 1, 10, 11, 30, 31]
    (letter,) = run.dead_letters()
    assert (letter.step, letter.cause) == ("read", "input")
    assert "exit code 5" in letter.message
