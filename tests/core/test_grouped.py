"""Reductions by key: any pieces and any merges give what a plain loop gives, and a bad record takes nothing with it."""

from __future__ import annotations

import copy
import datetime as dt
import math
import os
import pickle
import re
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parflow.core import reducers
from parflow.core.reducers import Reducer, reducer
from parflow.core.reducers.grouped import FEW, First, Grouped, bucket_of
from parflow.errors import GraphError

from .grouping import CUTS, bits, pieces

KEYS = st.one_of(
    st.sampled_from(["a", "b", "c", "", b"a", 1, 1.0, True, 0, False, 0.0, -0.0, None, Decimal(1), Fraction(1), 2.5, "\ud800"]),
    st.tuples(st.sampled_from(["a", 1, True, None]), st.sampled_from([0, 0.0, "b"])),
    st.text(max_size=1),
)
PAIRS = st.lists(st.tuples(KEYS, st.integers(-9, 9)), max_size=60)


class Colour(Enum):
    RED = 1
    BLUE = 2


class Loose:
    """Equal to all of its kind, and each looks different."""

    def __init__(self, look: int) -> None:
        self.look = look

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Loose)

    def __hash__(self) -> int:
        return 7


@dataclass(frozen=True)
class Point:
    x: float
    y: float


def key_of(pair: tuple[Any, int]) -> Any:
    return pair[0]


def number_of(pair: tuple[Any, int]) -> int:
    return pair[1]


def taken(how: Grouped, records: list[Any], batch: int) -> Any:
    """Reduce one piece the way a worker does: one by one, or so many at once, and what is refused then one by one."""
    state = how.initial()
    for start in range(0, len(records), batch or 1):
        part = records[start : start + (batch or 1)]
        try:
            state = how.extend(state, part) if batch else how.step(state, part[0])
        except NotImplementedError:
            for record in part:
                state = how.step(state, record)
    return state


def merged(how: Grouped, parts: list[bytes], draw: st.DataObject) -> list[Any]:
    """Merge one bucket's parts as a tree of any shape, each node pickled, and end it."""
    while len(parts) > 1:
        start = draw.draw(st.integers(0, len(parts) - 2))
        stop = draw.draw(st.integers(start + 2, len(parts)))
        parts[start:stop] = [pickle.dumps(how.seal(how.join(parts[start:stop])), protocol=5)]
    return list(how.rows(how.join(parts)))


def reduced(how: Grouped, records: list[Any], cuts: list[int], draw: st.DataObject) -> list[Any]:
    """Reduce records the way a run does: in pieces, each split into buckets that are merged apart."""
    states = [taken(how, part, draw.draw(st.sampled_from([0, 1, 7, 1000]))) for part in pieces(records, cuts)]
    splits = [how.split(how.seal(state)) for state in states]
    return [row for parts in zip(*splits, strict=True) for row in merged(how, list(parts), draw)]


def by_loop(how: Grouped, records: list[Any], key: Callable[[Any], Any]) -> list[Any]:
    """Put the records of each key together, reduce them alone, and order the rows by bucket and first appearance."""
    groups: dict[Any, list[Any]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    rows = []
    for name in sorted(groups, key=lambda name: bucket_of(name, how.buckets)):
        state = how.reducer.initial()
        for record in groups[name]:
            state = how.reducer.step(state, record)
        rows.append({"key": name, how.reducer.name: how.reducer.finish(state)})
    return rows


# --- any grouping ------------------------------------------------------------------------------------------------------


class Sealed(Reducer):
    """Gathers numbers in a list, and seals the list in a tuple."""

    name = "sealed"

    def initial(self) -> list[int]:
        return []

    def step(self, state: list[int], record: Any) -> list[int]:
        return [*state, record[1]]

    def merge(self, a: Any, b: Any) -> list[int]:
        return [*(a[0] if isinstance(a, tuple) else a), *(b[0] if isinstance(b, tuple) else b)]

    def seal(self, state: Any) -> tuple[list[int]]:
        return state if isinstance(state, tuple) else (state,)

    def finish(self, state: Any) -> list[int]:
        return list(state[0]) if isinstance(state, tuple) else list(state)


INNER: list[Reducer] = [
    reducers.approx_distinct(number_of),
    reducers.concat(),
    reducers.count(),
    reducers.counter(number_of),
    reducers.distinct(number_of),
    reducers.frequent_items(3, number_of),
    reducers.histogram([-9, 0, 9], number_of),
    reducers.max(number_of),
    reducers.mean(number_of),
    reducers.min(number_of),
    reducers.quantiles([0.5], number_of),
    reducers.sample(2, number_of),
    reducers.std(number_of),
    reducers.sum(number_of),
    reducers.top(2, number_of),
    reducers.var(number_of),
    reducer(list, lambda state, pair: [*state, pair[1]], lambda a, b: a + b, name="gather"),
    First(),
    Sealed(),
]


def test_every_built_in_reducer_is_tried_by_key() -> None:
    made = {name for name in reducers.__all__ if name[0].islower()} - {"check_reducer", "reducer"}
    assert made <= {how.name for how in INNER}


@pytest.mark.parametrize("inner", INNER, ids=lambda how: how.name)
@settings(max_examples=25)
@given(records=PAIRS, cuts=CUTS, buckets=st.sampled_from([1, 2, 7, 64]), draw=st.data())
def test_each_key_gets_what_its_records_give_alone(
    inner: Reducer, records: list[Any], cuts: list[int], buckets: int, draw: st.DataObject
) -> None:
    how = Grouped(key_of, inner, buckets)
    assert bits(reduced(how, records, cuts, draw)) == bits(by_loop(how, records, key_of))


@given(PAIRS, CUTS, st.data())
def test_the_first_record_of_each_key_comes_back_whole(records: list[Any], cuts: list[int], draw: st.DataObject) -> None:
    how = Grouped(key_of, First(), 5, whole=True)
    firsts: dict[Any, Any] = {}
    for record in records:
        firsts.setdefault(record[0], record)
    wanted = [firsts[key] for key in sorted(firsts, key=lambda key: bucket_of(key, 5))]
    assert bits(reduced(how, records, cuts, draw)) == bits(wanted)


@given(st.lists(st.one_of(KEYS, st.just("word")), max_size=60), CUTS, st.data())
def test_without_a_key_the_record_is_the_key(records: list[Any], cuts: list[int], draw: st.DataObject) -> None:
    how = Grouped(None, reducers.count(), 3)
    wanted = Counter(records)
    rows = reduced(how, records, cuts, draw)
    assert {row["key"]: row["count"] for row in rows} == wanted
    assert len(rows) == len(wanted)


@given(PAIRS, CUTS, st.data())
def test_merging_whole_states_gives_the_same_rows_as_merging_buckets(
    records: list[Any], cuts: list[int], draw: st.DataObject
) -> None:
    how = Grouped(key_of, reducers.sum(number_of), 9)
    state = how.initial()
    for part in pieces(records, cuts):
        state = how.merge(state, pickle.loads(pickle.dumps(how.seal(taken(how, part, 10)))))
    assert bits(how.finish(state)) == bits(reduced(how, records, cuts, draw))


def test_rows_stand_in_the_order_in_which_keys_first_appeared() -> None:
    how = Grouped(None, reducers.count(), buckets=1)
    parts = [how.split(taken(how, list(text), 100))[0] for text in ("ca", "bc", "da")]
    assert [row["key"] for row in how.rows(how.join(parts))] == ["c", "a", "b", "d"]


def test_a_key_that_only_a_failed_record_had_has_no_place_in_the_order() -> None:
    how = Grouped("k", reducers.sum("n"), buckets=1)
    state = how.initial()
    with pytest.raises(TypeError):
        how.step(state, {"k": "b", "n": "no number"})
    for key in ("a", "b"):
        state = how.step(state, {"k": key, "n": 1})
    assert list(how.rows(state)) == [{"k": "a", "sum": 1}, {"k": "b", "sum": 1}]


def test_what_is_stored_is_sealed_inside() -> None:
    how = Grouped(key_of, Sealed(), buckets=1)
    (part,) = how.split(how.seal(taken(how, [("a", 1), ("b", 2), ("a", 3)], 2)))
    assert pickle.loads(part) == {"a": ([1, 3],), "b": ([2],)}


# --- what a row looks like ---------------------------------------------------------------------------------------------

DOC = {"lang": "en", "year": 2020, "size": 3}


@pytest.mark.parametrize(
    ("how", "wanted"),
    [
        (Grouped("lang", reducers.count()), {"lang": "en", "count": 2}),
        (Grouped(lambda doc: doc["size"] % 2, reducers.count()), {"key": 1, "count": 2}),
        (Grouped(["lang", "year"], reducers.sum("size")), {"lang": "en", "year": 2020, "sum": 6}),
        (Grouped(("lang",), reducers.count()), {"lang": "en", "count": 2}),
        (Grouped("lang", reducers.count(), columns=("language", "n")), {"language": "en", "n": 2}),
        (Grouped(lambda doc: ("x", 1), reducers.count(), columns=("pair", "n")), {"pair": ("x", 1), "n": 2}),
        (Grouped("lang", reducers.top(1, "size")), {"lang": "en", "top": [DOC]}),
        (Grouped("lang", First(), whole=True), DOC),
        (Grouped("lang", Grouped("year", reducers.count())), {"lang": "en", "reduce_by": [{"year": 2020, "count": 2}]}),
    ],
)
def test_a_row_names_the_key_and_the_value(how: Grouped, wanted: Any) -> None:
    assert how.finish(taken(how, [DOC, DOC], 2)) == how.finish(taken(how, [DOC, DOC], 0)) == [wanted]


def test_fields_of_other_records_than_dicts_are_attributes() -> None:
    how = Grouped(["lang", "year"], reducers.count())
    records = [SimpleNamespace(lang="en", year=1), {"lang": "en", "year": 1}]
    assert how.finish(taken(how, records, 2)) == how.finish(taken(how, records, 0)) == [{"lang": "en", "year": 1, "count": 2}]


def test_a_first_record_that_is_none_is_kept() -> None:
    how = Grouped(lambda record: 0, First(), whole=True)
    assert how.finish(how.merge(taken(how, [None, 1], 0), taken(how, [2], 2))) == [None]
    assert First().finish(First().initial()) is None


def test_it_travels_and_equals_its_like() -> None:
    how = Grouped(["lang", "year"], reducers.count())
    unused = pickle.dumps(how)
    how.extend(how.step(how.initial(), DOC), [DOC])
    assert pickle.dumps(how) == unused
    again = pickle.loads(unused)
    assert again == how == Grouped(("lang", "year"), reducers.count(), columns=("lang", "year", "count"))
    assert again.finish(again.step(again.initial(), DOC)) == [{"lang": "en", "year": 2020, "count": 1}]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Grouped(3, reducers.count()), "key=3 is neither"),  # type: ignore[arg-type]
        (lambda: Grouped([], reducers.count()), r"key=\[\] is neither"),
        (lambda: Grouped(["a", 1], reducers.count()), r"key=\['a', 1\] is neither"),  # type: ignore[list-item]
        (lambda: Grouped("a", reducers.count), "count is not a reducer"),  # type: ignore[arg-type]
        (lambda: Grouped("a", reducers.count(), 0), "buckets=0"),
        (lambda: Grouped("a", reducers.count(), 1025), "from 1 to 1,024"),
        (lambda: Grouped("a", reducers.count(), True), "buckets=True"),
        (lambda: Grouped("count", reducers.count()), r"'count', 'count'.* no 2 different names.*Give columns="),
        (lambda: Grouped(["a", "a"], reducers.count()), "no 3 different names"),
        (lambda: Grouped("a", reducers.count(), columns=("n",)), "columns=\\('n',\\) are no 2"),
        (lambda: Grouped("a", reducers.count(), columns=("a", "b", "c")), "no 2 different names"),
        (lambda: Grouped("a", reducers.count(), columns="kn"), "columns='kn'"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_said_at_once(make: Callable[[], Grouped], says: str) -> None:
    with pytest.raises(GraphError, match=says):
        make()


# --- bad records -------------------------------------------------------------------------------------------------------

UNFIT: list[Any] = [
    math.nan,
    (1, math.nan),
    ("a", (2.0, float("nan"))),
    frozenset({math.nan}),
    Decimal("NaN"),
    np.float64("nan"),
    pd.NaT,
    ("a", pd.NaT),
    np.datetime64("NaT"),
    [1],
    {"a": 1},
    ("a", []),
    object(),
    Point(1.0, math.nan),
    lambda: 0,
]


@pytest.mark.parametrize("inner", [reducers.count(), reducers.concat(), First()], ids=lambda how: how.name)
@pytest.mark.parametrize("bad", UNFIT, ids=lambda bad: re.sub(" at 0x[0-9a-f]+", "", repr(bad)))
def test_a_key_that_can_not_meet_its_equals_is_refused(bad: Any, inner: Reducer) -> None:
    how = Grouped(key_of, inner)
    state = taken(how, [("a", 1), (2, 1)], 0)
    before = copy.deepcopy(state)

    def one_by_one(state: Any, records: list[Any]) -> Any:
        return how.step(state, records[0])

    for act, records in ((one_by_one, [(bad, 1)]), (how.extend, [("b", 1), (bad, 1), ("a", 1)])):
        with pytest.raises((TypeError, ValueError, AttributeError, pickle.PicklingError)):
            act(state, records)
        assert state == before


@pytest.mark.parametrize("bad", [math.nan, [1], (math.nan,)], ids=repr)
def test_a_bad_value_of_one_of_several_fields_is_refused(bad: Any) -> None:
    how = Grouped(["lang", "year"], reducers.count())
    state = taken(how, [DOC], 0)
    with pytest.raises((TypeError, ValueError)):
        how.step(state, DOC | {"year": bad})
    with pytest.raises((TypeError, ValueError)):
        how.extend(state, [DOC, DOC | {"year": bad}])
    assert state == {("en", 2020): 1}


def test_the_refusal_says_what_to_do_and_travels() -> None:
    how = Grouped(None, reducers.count())
    with pytest.raises(ValueError, match=r"can't group by nan.*Filter NaN out first") as caught:
        how.step(how.initial(), math.nan)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("good", [Colour.RED, uuid.UUID(int=5), dt.date(2020, 1, 1), (1.5, "a"), Point(1, 2), Loose(1)])
def test_objects_that_equal_their_copies_are_keys(good: Any) -> None:
    how = Grouped(key_of, reducers.count())
    splits = [how.split(taken(how, [(copy.copy(good), 1), (copy.copy(good), 2)], batch)) for batch in (0, 2)]
    rows = [row for parts in zip(*splits, strict=True) for row in how.rows(how.join(parts))]
    assert rows == [{"key": good, "count": 4}]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.one_of(st.integers(-9, 9), st.none())), max_size=30), st.integers(0, 20))
def test_records_that_fail_leave_no_trace(records: list[Any], batch: int) -> None:
    how = Grouped(key_of, reducers.sum(number_of))
    state = how.initial()
    for start in range(0, len(records), batch or 1):
        part = records[start : start + (batch or 1)]
        try:
            state = how.extend(state, part) if batch else how.step(state, part[0])
        except TypeError:
            assert any(number is None for _, number in part)
            for record in part if batch else []:
                try:
                    state = how.step(state, record)
                except TypeError:
                    assert record[1] is None
    good = [(key, number) for key, number in records if number is not None]
    assert list(how.rows(state)) == list(how.rows(taken(how, good, 0)))


@pytest.mark.parametrize("many", [1, 2 * FEW], ids=["few records a key", "many records a key"])
def test_a_batch_of_which_one_record_fails_changes_nothing(many: int) -> None:
    how = Grouped("k", reducers.sum("n"))
    state = how.extend(how.initial(), [{"k": "a", "n": 1}, {"k": "b", "n": 2}])
    before = list(how.rows(state))
    with pytest.raises(TypeError):
        how.extend(state, [*[{"k": "a", "n": 5}, {"k": "c", "n": 5}] * many, {"k": "b", "n": "?"}])
    with pytest.raises(KeyError):
        how.extend(state, [*[{"k": "a", "n": 5}] * many, {"n": 5}])
    assert list(how.rows(state)) == before


def test_a_batch_that_fits_no_earlier_record_changes_nothing() -> None:
    how = Grouped("k", reducers.max("n"))
    state = how.extend(how.initial(), [{"k": "a", "n": 1}, {"k": "b", "n": 1}])
    before = copy.deepcopy(state)
    with pytest.raises(TypeError):
        how.extend(state, [{"k": "a", "n": 2}, {"k": "c", "n": 2}, {"k": "b", "n": "text"}])
    assert state == before


@pytest.mark.parametrize("inner", [Sealed(), Grouped(number_of, reducers.max()), reducer(list, list.__add__, list.__add__)])
def test_reducers_whose_merge_may_fail_half_way_take_no_batches(inner: Reducer) -> None:
    how = Grouped(key_of, inner)
    state = how.initial()
    with pytest.raises(NotImplementedError, match="one by one"):
        how.extend(state, [("a", 1)])
    assert state == {}


# --- buckets -----------------------------------------------------------------------------------------------------------

START = dt.datetime(2020, 1, 1)  # noqa: DTZ001 - documents have dates without a zone, too
EQUALS: list[tuple[Any, ...]] = [
    (1, 1.0, True, Decimal(1), Fraction(1), 1 + 0j, np.int64(1), np.float32(1), np.bool_(True), np.uint8(1)),
    (0, 0.0, -0.0, False, Decimal("-0"), np.bool_(False)),
    (0.5, Fraction(1, 2), Decimal("0.50"), np.float16(0.5)),
    (10**30, Decimal(10) ** 30, Fraction(10**30)),
    (2**70, 2.0**70),
    (math.inf, Decimal("inf")),
    ("é", np.str_("é")),
    (b"a", np.bytes_(b"a")),
    ((1, ("a", 2.0)), (True, ("a", 2)), (Fraction(1), (np.str_("a"), Decimal(2)))),
    (frozenset({1, "a"}), frozenset({"a", 1.0}), frozenset({True, "a"})),
    (
        dt.datetime(2020, 1, 1, 12, tzinfo=dt.UTC),
        dt.datetime(2020, 1, 1, 13, tzinfo=dt.timezone(dt.timedelta(hours=1))),
        pd.Timestamp("2020-01-01T07:00:00-05:00"),
    ),
    (START, START.replace(fold=1), pd.Timestamp("2020-01-01")),
    (dt.timedelta(seconds=1), pd.Timedelta("1s"), np.timedelta64(1000, "ms")),
    (np.datetime64("2020-01-01"), np.datetime64("2020-01-01T00", "ns")),
    (dt.time(12, tzinfo=dt.UTC), dt.time(13, tzinfo=dt.timezone(dt.timedelta(hours=1)))),
    (uuid.UUID(int=9), uuid.UUID("00000000-0000-0000-0000-000000000009")),
    (range(0), range(1, 1)),
    (Loose(1), Loose(2)),
]


@pytest.mark.parametrize("equals", EQUALS, ids=lambda equals: re.sub(" at 0x[0-9a-f]+", "", repr(equals[0])))
def test_equal_keys_share_a_bucket(equals: tuple[Any, ...]) -> None:
    assert len(set(equals)) == 1
    for buckets in (2, 64, 1000, 1024):
        assert len({bucket_of(key, buckets) for key in equals}) == 1
        assert len({bucket_of((key, "more"), buckets) for key in equals}) == 1


@given(KEYS, KEYS, st.integers(1, 1024))
def test_a_bucket_is_one_of_them_and_depends_on_equality_alone(one: Any, other: Any, buckets: int) -> None:
    assert bucket_of(one, buckets) in range(buckets)
    if one == other:
        assert bucket_of(one, buckets) == bucket_of(other, buckets)


@given(st.lists(st.one_of(st.text(max_size=4), st.just("\udfff")), max_size=20), st.sampled_from([2, 64]))
def test_splitting_puts_every_key_into_its_bucket(words: list[str], buckets: int) -> None:
    how = Grouped(None, reducers.count(), buckets)
    for keys in (words, [*words, 1, (2, "a")]):
        parts = how.split(how.extend(how.initial(), list(keys)))
        assert len(parts) == buckets
        for number, part in enumerate(parts):
            wanted = {key: count for key, count in Counter(keys).items() if bucket_of(key, buckets) == number}
            assert (pickle.loads(part) if part else {}) == wanted
            assert bool(part) is bool(wanted)


SHOW = """
import datetime as dt, uuid
from decimal import Decimal
from parflow.core.reducers.grouped import bucket_of
keys = ["a", "", b"a", "\\ud800", 1, -1, 2**80, 0.1, Decimal("0.1"), None, ("a", 1, None), frozenset("abc"), uuid.UUID(int=7),
        dt.date(2020, 1, 2), dt.datetime(2020, 1, 2, 3, tzinfo=dt.timezone.utc), dt.timedelta(1)]
print([bucket_of(key, 1024) for key in keys])
"""


def test_buckets_are_the_same_in_every_process() -> None:
    shown = {
        subprocess.run(
            [sys.executable, "-c", SHOW], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(shown) == 1


MANY: dict[str, Callable[[int], Any]] = {
    "numbers": lambda i: i,
    "negative numbers": lambda i: -i,
    "multiples of 1024": lambda i: i << 10,
    "large multiples": lambda i: i << 40,
    "fractions": lambda i: i / 1024,
    "tenths": lambda i: i * 0.1,
    "numbers as text": str,
    "padded ids": lambda i: f"user-{i:08}",
    "hexadecimal": lambda i: f"{i:x}",
    "URLs": lambda i: f"https://example.org/pages/{i}.html",
    "bytes": lambda i: b"%d" % i,
    "pairs of numbers": lambda i: (i % 100, i // 100),
    "text and number": lambda i: (f"u{i % 97}", i // 97),
    "days": lambda i: dt.date(1900, 1, 1) + dt.timedelta(i),
    "seconds": lambda i: START + dt.timedelta(seconds=i),
    "UUIDs": lambda i: uuid.uuid5(uuid.NAMESPACE_URL, str(i)),
    "sets": lambda i: frozenset({i, "a"}),
}


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.parametrize("buckets", [2, 64, 100])
def test_keys_are_spread_evenly(kind: str, buckets: int) -> None:
    sizes = Counter(bucket_of(MANY[kind](i), buckets) for i in range(20_000))
    mean = 20_000 / buckets
    # Random keys lie within 4.5 standard deviations of the mean in all but one of a thousand such tests.
    assert max(sizes.values()) < mean + 4.5 * mean**0.5
    assert min(sizes[number] for number in range(buckets)) > mean - 4.5 * mean**0.5


def test_members_of_an_enum_are_spread_by_name() -> None:
    assert bucket_of(Colour.RED, 64) == bucket_of("RED", 64) != bucket_of(Colour.BLUE, 64)


# --- size --------------------------------------------------------------------------------------------------------------


def test_a_counted_word_takes_few_bytes_more_than_itself_in_a_split() -> None:
    how = Grouped(None, reducers.count())
    words = [f"{i:x}" for i in range(100_000)]
    parts = how.split(how.extend(how.initial(), words))
    assert sum(map(len, parts)) < sum(map(len, words)) + 7 * len(words)
