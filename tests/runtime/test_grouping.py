"""Reductions by key in the engine: however records are cut into chunks, a run, plain Dask and a loop give the same rows."""

from __future__ import annotations

import math
import operator
import os
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parflow as pf
from parflow.errors import StepError, TooManyFailuresError

Row = dict[str, Any]

# --- how to say it briefly -------------------------------------------------------------------------------------------


def finished(lazy: Any, **options: Any) -> Any:
    """Return the result of a run, by default on two children."""
    return lazy.run(**{"workers": 2} | options).result()


def both(dataset: pf.Dataset, **options: Any) -> list[Any]:
    """Return the rows, which are the same and in the same order in a run and in plain Dask."""
    rows = [*finished(dataset, **options)]
    assert dataset.compute() == rows
    return rows


def folded(how: pf.Reducer) -> Callable[[list[Row]], Any]:
    """Return what reduces records in one go, as a loop would."""

    def fold(records: list[Row]) -> Any:
        state = how.initial()
        for record in records:
            state = how.step(state, record)
        return how.finish(how.seal(state))

    return fold


def numbers_of(records: list[Row]) -> list[int]:
    return [record["n"] for record in records]


REDUCERS: dict[str, tuple[pf.Reducer, Callable[[list[Row]], Any]]] = {
    # name: (the reducer, the same in plain Python)
    "count": (pf.count(), len),
    "sum": (pf.sum("n"), lambda records: sum(numbers_of(records))),
    "exact": (pf.sum("x"), lambda records: math.fsum(record["x"] for record in records)),
    "mean": (pf.mean("n"), lambda records: sum(numbers_of(records)) / len(records)),
    "var": (pf.var("n"), lambda records: float(statistics.pvariance(map(float, numbers_of(records))))),
    "std": (pf.std("n"), lambda records: statistics.pstdev(numbers_of(records))),
    "min": (pf.min("n"), lambda records: min(records, key=operator.itemgetter("n"))),
    "max": (pf.max("n"), lambda records: max(records, key=operator.itemgetter("n"))),
    "top": (pf.top(2, "n"), lambda records: sorted(records, key=operator.itemgetter("n"), reverse=True)[:2]),
    "counter": (pf.counter("n"), lambda records: Counter(numbers_of(records))),
    "distinct": (pf.distinct("n"), lambda records: len(set(numbers_of(records)))),
    "concat": (pf.concat(), list),
    "histogram": (pf.histogram((-9, 9, 3), "n"), folded(pf.histogram((-9, 9, 3), "n"))),
    "quantiles": (pf.quantiles([0.5, 0.9], "n"), folded(pf.quantiles([0.5, 0.9], "n"))),
    "sample": (pf.sample(2), folded(pf.sample(2))),
    "approx": (pf.approx_distinct("n"), lambda records: len(set(numbers_of(records)))),
    "frequent": (pf.frequent_items(3, "k"), folded(pf.frequent_items(3, "k"))),
    "own": (
        pf.reducer(list, lambda state, record: [*state, record["n"]], operator.add, tuple, name="own"),
        lambda records: tuple(numbers_of(records)),
    ),
}

KEYS = st.one_of(st.sampled_from(["a", "b", "", None, 0, 1, 2.5, (1, "a")]), st.integers(-3, 3))
RECORDS = st.lists(
    st.fixed_dictionaries({"k": KEYS, "n": st.integers(-9, 9), "x": st.floats(-1e9, 1e9)}), max_size=40
)  # fmt: skip


def grouped(records: list[Row]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for record in records:
        groups.setdefault(record["k"], []).append(record)
    return groups


@settings(max_examples=15)
@given(RECORDS, st.integers(1, 15), st.integers(1, 5))
def test_every_reducer_gives_for_each_key_what_a_loop_gives(records: list[Row], chunk: int, buckets: int) -> None:
    dataset = pf.items(records, chunk_records=chunk)
    columns = ("key", "value")

    @pf.workflow
    def flow() -> Any:
        return {name: dataset.reduce_by("k", how, buckets=buckets, columns=columns) for name, (how, _) in REDUCERS.items()}

    computed, ran = flow().compute(), finished(flow(), isolation="inline")
    groups = grouped(records)
    for name, (_, plain) in REDUCERS.items():
        rows = computed[name]
        assert [*ran[name]] == rows, name
        assert {row["key"]: row["value"] for row in rows} == {key: plain(group) for key, group in groups.items()}, name
        assert len(rows) == len(groups), name


@settings(max_examples=25)
@given(RECORDS, st.integers(1, 15), st.integers(1, 15), st.sampled_from([1, 3, 64]))
def test_rows_come_in_the_same_order_however_records_are_cut(records: list[Row], one: int, other: int, buckets: int) -> None:
    def rows(chunk: int) -> Any:
        dataset = pf.items(records, chunk_records=chunk)
        return dataset.reduce_by("k", pf.concat(), buckets=buckets).compute(), dataset.distinct("k", buckets=buckets).compute()

    assert rows(one) == rows(other)


@settings(max_examples=15)
@given(RECORDS, st.integers(1, 15))
def test_distinct_keeps_the_first_record_of_each_key(records: list[Row], chunk: int) -> None:
    kept = both(pf.items(records, chunk_records=chunk).distinct("k", buckets=3), isolation="inline")
    firsts = [group[0] for group in grouped(records).values()]
    assert sorted(kept, key=repr) == sorted(firsts, key=repr)


@pytest.mark.parametrize(
    ("key", "columns", "wanted"),
    [
        ("k", None, [{"k": "a", "sum": 4}, {"k": "b", "sum": 2}]),
        (["k", "n"], None, [{"k": "a", "n": n, "sum": n} for n in (1, 3)] + [{"k": "b", "n": 2, "sum": 2}]),
        (lambda row: row["n"] % 2, ("odd", "total"), [{"odd": 0, "total": 2}, {"odd": 1, "total": 4}]),
    ],
    ids=["field", "fields", "function"],
)
def test_a_key_is_a_field_several_or_a_function(key: Any, columns: Any, wanted: list[Row]) -> None:
    rows = pf.items([{"k": "a", "n": 1}, {"k": "b", "n": 2}, {"k": "a", "n": 3}], chunk_records=1)
    assert sorted(both(rows.reduce_by(key, pf.sum("n"), columns=columns)), key=repr) == sorted(wanted, key=repr)


def test_records_themselves_are_counted_without_a_key() -> None:
    words = pf.items(["to", "be", "or", "not", "to", "be"], chunk_records=2)
    rows = both(words.reduce_by(None, pf.count(), columns=("word", "times")))
    assert {row["word"]: row["times"] for row in rows} == {"to": 2, "be": 2, "or": 1, "not": 1}


def test_rows_are_a_dataset_like_any_other(tmp_path: Path) -> None:
    words = pf.items(["to", "be", "or", "not", "to", "be", "that", "is", "the", "question"], chunk_records=3)
    counts = words.reduce_by(len, pf.count(), columns=("letters", "words"))
    often = counts.filter(lambda row, least: row["words"] >= least, pf.call(int, "2"))

    @pf.workflow
    def flow() -> Any:
        counts.write_jsonl(tmp_path / "out")
        again = often.reduce_by("words", pf.max("letters"), columns=("words", "longest"))
        return counts.reduce(pf.count()), often, again.map(operator.itemgetter("words"))

    number, rows, again = finished(flow())
    assert number == 4
    assert sorted(row["letters"] for row in rows) == [2, 3]
    assert sorted(again) == [2, 6]
    assert sum(map(len, (file.read_text().splitlines() for file in (tmp_path / "out").glob("part-*")))) == 4


def test_a_table_is_made_of_the_rows() -> None:
    rows = pf.items([{"k": "a", "n": 1}, {"k": "b", "n": 2}, {"k": "a", "n": 3}], chunk_records=2)
    frame = rows.reduce_by("k", pf.mean("n")).to_pandas(workers=2).sort_values("k", ignore_index=True)
    pd.testing.assert_frame_equal(frame, pd.DataFrame({"k": ["a", "b"], "mean": [2.0, 2.0]}))


def test_a_group_is_given_to_a_call_as_the_list_of_its_rows() -> None:
    rows = pf.items(range(10), chunk_records=2).reduce_by(lambda n: n % 3, pf.concat(), columns=("rest", "numbers"))
    assert finished(pf.call(lambda rows: max(len(row["numbers"]) for row in rows), rows)) == 4
    assert both(rows.flat_map(operator.itemgetter("numbers")).distinct(lambda n: n // 9)) in ([0, 9], [9, 0])


def test_many_keys_in_many_chunks_are_each_there_once() -> None:
    numbers = pf.items(range(30_000), chunk_records=500).map(lambda n: n * 7919 % 10_007)
    rows = both(numbers.reduce_by(None, pf.count(), columns=("n", "times")))
    assert {row["n"]: row["times"] for row in rows} == Counter(n * 7919 % 10_007 for n in range(30_000))
    assert len(rows) == 10_007


def test_nothing_has_no_groups() -> None:
    assert both(pf.items([]).reduce_by("k", pf.count())) == []
    assert both(pf.items([1, 2]).filter(lambda n: n > 2).distinct()) == []


def test_a_record_without_the_key_or_with_a_bad_one_is_set_aside_alone() -> None:
    rows = [{"k": "a"}, {}, {"k": ["a list"]}, {"k": "a"}]
    run = pf.items(rows, chunk_records=4).reduce_by("k", pf.count()).run(workers=2, max_failures=2)
    assert run.result() == [{"k": "a", "count": 2}]
    assert [failure.record for failure in run.dead_letters()] == ["items[1]", "items[2]"]
    with pytest.raises(TooManyFailuresError):
        finished(pf.items(rows).reduce_by("k", pf.count()))


def test_a_merge_that_raises_breaks_the_step_and_is_named() -> None:
    def refuse(a: int, b: int) -> int:
        raise ArithmeticError("no way")

    how = pf.reducer(int, operator.add, refuse, name="mine")
    with pytest.raises(StepError, match=r"mine.*no way"):
        finished(pf.items([1, 1], chunk_records=1).reduce_by(None, how))


def test_a_killed_child_changes_no_group(tmp_path: Path) -> None:
    def once(n: int) -> int:
        if n == 17 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os._exit(1)
        return n

    numbers = pf.items(range(40), chunk_records=10).map(once)
    rows = finished(numbers.reduce_by(lambda n: n % 2, pf.sum(), columns=("odd", "sum")))
    assert sorted(rows, key=operator.itemgetter("odd")) == [{"odd": 0, "sum": 380}, {"odd": 1, "sum": 400}]
