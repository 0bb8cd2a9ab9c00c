"""Datasets and values are Dask collections: what Dask does with them in memory is what a run does durably."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.bag
import pytest
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import parflow as pf
from parflow.errors import InputError, LazyValueError, NoInputError, OutputError, RecordError

Sync = {"scheduler": "synchronous"}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """A client of an in-process cluster that is not Dask's default."""
    with (
        dask.config.set({"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}),
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0", memory_limit=0
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


def half(number: int) -> float:
    return 1 / number


def numbers(stop: int = 10, chunk: int = 3) -> pf.Dataset:
    return pf.items(range(stop), chunk_records=chunk)


def things() -> dict[str, tuple[Any, Any]]:
    """One of each kind of collection, with its result."""
    return {
        "sum": (numbers().reduce(pf.sum()), 45),
        "count": (pf.items([*"abc"]).reduce(pf.count()), 3),
        "records": (pf.items([*"xyz"], chunk_records=2).map(str.upper), ["X", "Y", "Z"]),
        "delayed": (dask.delayed(max)(7, 77), 77),
        "bag": (dask.bag.from_sequence([100, 200], npartitions=2), [100, 200]),
        "other bag": (dask.bag.from_sequence([1, 2], npartitions=1).map(str), ["1", "2"]),
    }


# --- each result in its own place ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sum", "records"])
def test_a_collection_computes(name: str) -> None:
    lazy, expected = things()[name]
    assert dask.is_dask_collection(lazy)
    assert lazy.compute() == expected
    assert dask.compute(lazy) == (expected,)
    assert lazy.to_delayed().compute() == expected


def test_results_come_back_in_the_order_they_were_asked_for() -> None:
    kinds = things()
    for names in itertools.permutations(["sum", "records", "delayed", "count"]):
        assert dask.compute(*(kinds[name][0] for name in names)) == tuple(kinds[name][1] for name in names)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(st.sampled_from(sorted(things())), min_size=1, max_size=6))
def test_results_stay_in_their_places_beside_every_other_kind(names: list[str]) -> None:
    if not {"sum", "count", "records"} & {*names}:
        names = [*names, "sum"]  # without one of ours it's Dask's own business
    kinds = things()
    assert dask.compute(*(kinds[name][0] for name in names), **Sync) == tuple(kinds[name][1] for name in names)


def test_a_cluster_gives_results_in_their_places_too(client: Client) -> None:
    kinds = things()
    names = ["bag", "sum", "delayed", "other bag", "records"]
    futures = client.compute([kinds[name][0] for name in names])
    assert client.gather(futures) == [kinds[name][1] for name in names]
    assert client.compute(kinds["sum"][0]).result() == 45
    assert client.compute(kinds["records"][0]).result() == ["X", "Y", "Z"]


def test_collections_are_found_inside_lists_and_dicts() -> None:
    kinds = things()
    found = dask.compute({"a": kinds["sum"][0], "b": [kinds["records"][0], 5]})
    assert found == ({"a": 45, "b": [["X", "Y", "Z"], 5]},)


def test_a_delayed_function_takes_collections() -> None:
    kinds = things()
    both = dask.delayed(lambda total, records: (total, records))(kinds["sum"][0], kinds["records"][0])
    assert both.compute() == (45, ["X", "Y", "Z"])


def test_without_optimisation_results_are_the_same() -> None:
    kinds = things()
    names = ["bag", "sum", "other bag", "records"]
    found = dask.compute(*(kinds[name][0] for name in names), optimize_graph=False, **Sync)
    assert found == tuple(kinds[name][1] for name in names)


# --- what else Dask does with collections --------------------------------------------------------------------------------


def test_persisted_collections_are_dasks_own() -> None:
    total, records = dask.persist(numbers().reduce(pf.sum()), pf.items([*"xyz"], chunk_records=2))
    assert total.compute() == 45
    assert records.map(str.upper).compute(**Sync) == ["X", "Y", "Z"]


def test_a_cluster_persists_collections(client: Client) -> None:
    total, records = client.persist([numbers().reduce(pf.sum()), pf.items([*"xyz"], chunk_records=2)])
    assert client.compute(total).result() == 45
    assert client.compute(records).result() == ["x", "y", "z"]


def test_nothing_is_a_collection_too() -> None:
    nothing = pf.items([])
    assert dask.compute(nothing, numbers(), nothing.reduce(pf.count())) == ([], [*range(10)], 0)
    assert nothing.to_delayed().compute() == []
    (bag,) = dask.persist(nothing)
    assert bag.compute(**Sync) == []


def test_optimised_collections_compute_the_same() -> None:
    total, records = dask.optimize(numbers().reduce(pf.sum()), pf.items([*"xyz"], chunk_records=2))
    assert dask.compute(total, records, **Sync) == (45, ["x", "y", "z"])


@pytest.mark.skipif(
    shutil.which("dot") is None and not os.environ.get("CI"),
    reason="Graphviz's dot is not installed (apt-get install graphviz)",
)
def test_graphs_are_drawn(tmp_path: Path) -> None:
    total, records = numbers().reduce(pf.sum()), numbers()
    total.visualize(tmp_path / "value.svg")
    records.visualize(str(tmp_path / "dataset.svg"))
    dask.visualize(total, records, filename=str(tmp_path / "both.svg"))
    nodes = {file.stem: file.read_text().count('class="node"') for file in tmp_path.glob("*.svg")}
    assert nodes == {"value": 10, "dataset": 16, "both": 26}  # 4 chunks and a merge, or 4 chunks and their records; results


def test_the_token_is_stable_and_tells_collections_apart() -> None:
    def token(lazy: Any) -> str:
        return str(dask.base.tokenize(lazy))

    assert token(numbers().reduce(pf.sum())) == token(numbers().reduce(pf.sum()))
    assert token(numbers().map(half)) == token(numbers().map(half))
    different = [
        numbers(),
        numbers(9),
        numbers().map(half),
        numbers().map(str),
        numbers().filter(str),
        numbers().reduce(pf.sum()),
        numbers().reduce(pf.count()),
    ]
    assert len({token(lazy) for lazy in different}) == len(different)


def test_code_that_cannot_travel_computes_on_threads() -> None:
    lock = threading.Lock()

    def guarded(number: int) -> int:
        with lock:
            return number

    assert numbers().map(guarded).reduce(pf.sum()).compute() == 45


def test_equal_looking_functions_of_two_modules_are_told_apart() -> None:
    """Same code, same names, other globals: were their keys the same, Dask would compute one of them for both."""
    made = []
    for name, offset in (("one", 1), ("two", 2)):
        space: dict[str, Any] = {"__name__": name, "helper": {"offset": offset}}
        exec("def shift(x):\n    return x + helper['offset']\n", space)
        made.append(pf.items([0]).map(space["shift"]))
    assert dask.compute(*made) == ([1], [2])


@pytest.mark.parametrize(
    "use",
    [bool, len, list, lambda lazy: 1 in lazy, lambda lazy: "yes" if lazy else "no"],
    ids=["bool", "len", "list", "in", "if"],
)
@pytest.mark.parametrize("lazy", [numbers(), numbers().reduce(pf.sum())], ids=["dataset", "value"])
def test_a_lazy_result_used_as_if_it_were_computed_says_so(lazy: Any, use: Callable[[Any], Any]) -> None:
    with pytest.raises(LazyValueError, match=r"is lazy.*\.compute\(\)"):
        use(lazy)


# --- the same as a run ---------------------------------------------------------------------------------------------------


def inputs(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"n": n, "text": f"document {n}"}) for n in range(40)]
    (folder / "a.jsonl").write_text("\n".join(rows[:30]) + "\n")
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[30:]))
    (folder / "empty.jsonl").write_text("")
    return folder


SOURCES: dict[str, Callable[[Path], pf.Dataset]] = {
    "lines": lambda folder: pf.read_lines(folder / "*.jsonl*", chunk_bytes=200).map(len),
    "json": lambda folder: pf.read_jsonl(folder / "*.jsonl*", chunk_bytes=200).map(lambda row: row["n"]),
    "files": lambda folder: pf.read_files(folder / "*.jsonl").map(lambda document: len(document.text)),
    "items": lambda folder: pf.items(range(50), chunk_records=7),
    "iterator": lambda folder: pf.items(iter([*range(50)])),
    "nothing": lambda folder: pf.items([]),
}

STEPS: dict[str, Callable[[pf.Dataset], pf.Dataset]] = {
    "map": lambda data: data.map(lambda n: n * 2),
    "filter": lambda data: data.filter(lambda n: n % 3),
    "flat_map": lambda data: data.flat_map(lambda n: [n] * (n % 3)),
}

REDUCERS: dict[str, Any] = {
    "concat": pf.concat(),
    "count": pf.count(),
    "counter": pf.counter(),
    "max": pf.max(),
    "mean": pf.mean(),
    "min": pf.min(),
    "sum": pf.sum(),
    "top": pf.top(3),
    "own": pf.reducer(lambda: 0, lambda state, record: state + record, lambda one, other: one + other, name="own"),
}


def same(make: Callable[[], Any]) -> Any:
    """Compute and run; return the result when both are equal. Each has its own source: iterators go through once."""
    plain = make().compute(**Sync)
    durable = make().run(isolation="inline", workers=2).result()
    assert plain == durable
    return plain


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("step", STEPS)
def test_records_are_those_of_a_run(source: str, step: str, tmp_path: Path) -> None:
    folder = inputs(tmp_path / "in")
    records = same(lambda: STEPS[step](SOURCES[source](folder)))
    assert (records == []) == (source == "nothing")


@pytest.mark.parametrize("source", ["json", "nothing"])
@pytest.mark.parametrize("reducer", REDUCERS)
def test_values_are_those_of_a_run(reducer: str, source: str, tmp_path: Path) -> None:
    folder = inputs(tmp_path / "in")
    same(lambda: SOURCES[source](folder).reduce(REDUCERS[reducer]))


@pytest.mark.parametrize("kind", ["write_jsonl", "write_parquet"])
def test_files_are_those_of_a_run(kind: str, tmp_path: Path) -> None:
    def rows() -> pf.Dataset:
        return pf.items(range(20), chunk_records=6).map(lambda n: {"n": n, "text": f"document {n}"})

    plain = getattr(rows(), kind)(tmp_path / "plain").compute()
    durable = getattr(rows(), kind)(tmp_path / "durable").run(isolation="inline").result()
    assert {**plain, "run_id": ""} == {**durable, "run_id": ""}
    assert plain["rows"] == 20
    for entry in plain["files"]:
        assert (tmp_path / "plain" / entry["path"]).read_bytes() == (tmp_path / "durable" / entry["path"]).read_bytes()


def test_a_workflow_computes_what_it_runs() -> None:
    @pf.workflow
    def flow(stop: int) -> Any:
        data = pf.items(range(stop), chunk_records=3)
        return {"sum": data.reduce(pf.sum()), "parts": (data.map(str), [data.reduce(pf.count())]), "nothing": None}

    plain, durable = flow(8).compute(), flow(8).run(isolation="inline").result()
    assert plain == {"sum": 28, "parts": (list("01234567"), [8]), "nothing": None}
    assert durable == plain


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    records=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=60),
    chunk=st.integers(1, 20),
    other=st.integers(1, 20),
)
def test_a_sum_has_the_same_bits_however_it_is_cut(records: list[float], chunk: int, other: int) -> None:
    def total(size: int) -> Any:
        return pf.items(records, chunk_records=size).reduce(pf.sum())

    assert repr(total(chunk).compute(**Sync)) == repr(total(other).to_delayed().compute(**Sync))


# --- without dead letters ------------------------------------------------------------------------------------------------


def test_a_record_that_fails_raises_with_its_name_and_its_step() -> None:
    lazy = pf.items([2, 1, 0, 4], chunk_records=2).map(half)
    with pytest.raises(RecordError, match=r"items\[2\]: step half: ZeroDivisionError"):
        lazy.compute()
    with pytest.raises(RecordError, match=r"items\[2\]: step half: ZeroDivisionError"):
        lazy.reduce(pf.sum()).to_delayed().compute()


def test_a_record_that_fails_on_a_cluster_raises_with_its_name(client: Client) -> None:
    future = client.compute(pf.items([1, 0]).map(half))
    with pytest.raises(RecordError, match=r"items\[1\]: step half"):
        future.result()


def test_a_bad_line_raises_with_its_file_and_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n{"n": \n')
    with pytest.raises(RecordError, match=rf"{file}.*: step read: NotJSONError"):
        pf.read_jsonl(file).compute()


def test_a_file_that_changed_after_it_was_listed_raises(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n")
    lines = pf.read_lines(file)
    assert lines.compute() == ["one"]
    file.write_text("another\n")
    with pytest.raises(RecordError, match="InputChangedError"):
        lines.compute()
    assert pf.read_lines(file).compute() == ["another"]


def test_missing_input_is_said_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(NoInputError):
        pf.read_lines(tmp_path / "*.txt").compute()


def test_an_unusable_input_raises(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"b\.txt"):
        pf.read_lines(tmp_path / "*.txt").compute()


def test_files_are_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = pf.items([{"n": 1}])
    rows.write_jsonl(out).compute()
    with pytest.raises(OutputError, match="has 2 files already"):
        pf.items([{"n": 2}]).write_jsonl(out).compute()
    assert pf.items([{"n": 2}]).write_jsonl(out, overwrite=True).compute()["rows"] == 1
    assert (out / "part-00000.jsonl").read_text() == '{"n":2}\n'
