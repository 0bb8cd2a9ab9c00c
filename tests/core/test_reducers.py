"""Reducers: the same bits for any grouping, and a bad record takes nothing with it."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parflow.core import reducers
from parflow.core.reducers import Reducer, check_reducer, reducer
from parflow.errors import GraphError

from .grouping import CUTS, assert_grouping_is_free, bits, taken

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.one_of(FLOATS, st.integers(), st.integers(-5, 5), st.booleans(), st.sampled_from([0.0, -0.0, 5e-324, 1e308]))
SPECIAL = st.one_of(FLOATS, st.sampled_from([math.inf, -math.inf, math.nan]))
WORDS = st.one_of(st.sampled_from(["a", "b", "c", ""]), st.text(max_size=2))
MIXED = st.one_of(WORDS, st.integers(-3, 3), st.booleans(), st.none(), st.binary(max_size=1), st.sampled_from([0.0, 1.0, 2.5]))


# --- exact sums --------------------------------------------------------------------------------------------------------


def correctly_rounded(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@given(st.lists(NUMBERS, max_size=60), CUTS, st.data())
def test_a_sum_is_correctly_rounded_whatever_the_grouping(values: list[Any], cuts: list[int], data: st.DataObject) -> None:
    exact = sum(map(Fraction, values), Fraction())
    wanted = correctly_rounded(exact) + 0.0 if any(isinstance(value, float) for value in values) else int(exact)
    assert_grouping_is_free(reducers.sum(), values, cuts, wanted, data)


@given(st.lists(NUMBERS, max_size=60), CUTS, st.data())
def test_a_mean_is_rounded_once(values: list[Any], cuts: list[int], data: st.DataObject) -> None:
    exact = sum(map(Fraction, values), Fraction())
    wanted = correctly_rounded(exact / len(values)) if values else None
    assert_grouping_is_free(reducers.mean(), values, cuts, wanted, data)


@given(st.lists(SPECIAL, min_size=1, max_size=30), CUTS, st.data())
def test_infinities_and_nan_give_what_ieee_says(values: list[float], cuts: list[int], data: st.DataObject) -> None:
    strange = {value for value in values if math.isinf(value)}
    if any(map(math.isnan, values)) or len(strange) == 2:
        wanted = math.nan
    elif strange:
        (wanted,) = strange
    else:
        wanted = correctly_rounded(sum(map(Fraction, values), Fraction())) + 0.0
    assert_grouping_is_free(reducers.sum(), values, cuts, wanted, data)


@settings(max_examples=10)
@given(st.integers(0, 2**32))
def test_long_lists_of_floats_are_compacted_without_loss(seed: int) -> None:
    spread = np.random.default_rng(seed)
    values = (spread.standard_normal(3500) * 10.0 ** spread.integers(-300, 300, 3500)).tolist()
    how = reducers.sum()
    state = taken(how, values[:1700], fast=False)
    state = how.extend(state, values[1700:])
    assert len(state.floats) < 100
    assert bits(how.finish(state)) == bits(float(sum(map(Fraction, values))))


def test_a_partial_sum_of_many_records_is_small_on_the_wire() -> None:
    how = reducers.mean()
    state = how.extend(how.initial(), [1.1 * i for i in range(999)])
    assert len(pickle.dumps(state)) < 250


def test_equal_sums_have_equal_states_whatever_the_order() -> None:
    values = [0.1, 1e20, -3.7, 1e-30, 5e15]
    one, other = (taken(reducers.sum(), part, fast=False) for part in (values, values[::-1]))
    assert pickle.dumps(one) == pickle.dumps(other)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([], 0),
        ([True, True, 2], 4),
        ([2**200, 1], 2**200 + 1),
        ([Fraction(1, 3), Fraction(2, 3)], Fraction(1)),
        ([Fraction(1, 3), 1], Fraction(4, 3)),
        ([Fraction(1, 3), 0.0], 1 / 3),
        ([2**53, 1, 1.0], 2.0**53 + 2),
        ([np.int64(3), np.uint8(250)], 253),
        ([np.bool_(True), np.int32(1)], 2),
        ([np.float32(0.5), np.float64(0.25)], 0.75),
        ([np.longdouble(0.5)], 0.5),
        ([np.array(2)], 2),
        ([1e308, 1e308], math.inf),
        ([-1e308, -1e308], -math.inf),
        ([1e308, 1e308, -1e308, 0.1], 1e308),
        ([1e16, 1.0, -1e16], 1.0),
        ([0.1] * 10, 1.0),
        ([10**400, 1.0], math.inf),
    ],
)
def test_the_type_of_a_sum_follows_its_numbers(values: list[Any], wanted: Any) -> None:
    how = reducers.sum()
    assert bits(how.finish(taken(how, values, fast=False))) == bits(wanted)
    assert bits(how.finish(taken(how, values, fast=True))) == bits(wanted)


def test_the_mean_of_numbers_near_the_largest_does_not_overflow() -> None:
    how = reducers.mean()
    assert how.finish(how.extend(how.initial(), [1.7e308] * 3)) == 1.7e308
    assert how.finish(how.initial()) is None


@pytest.mark.parametrize(
    "bad", ["1", Decimal("1.5"), None, [1], 1j, np.array([1.0]), np.datetime64(1, "ns"), np.timedelta64(1, "ns"), b"1", {}]
)
def test_what_is_no_number_raises_a_type_error_that_names_it(bad: Any) -> None:
    with pytest.raises(TypeError, match=type(bad).__name__):
        reducers.sum().step(reducers.sum().initial(), bad)


# --- extremes ----------------------------------------------------------------------------------------------------------

RECORDS = st.lists(st.tuples(st.integers(-3, 3), st.integers()), max_size=40)
GROUPS: list[tuple[Reducer, Callable[[list[Any]], Any]]] = [
    (reducers.min(lambda r: r[0]), lambda rs: min(rs, key=lambda r: r[0]) if rs else None),
    (reducers.max(lambda r: r[0]), lambda rs: max(rs, key=lambda r: r[0]) if rs else None),
    (reducers.top(1, lambda r: r[0]), lambda rs: sorted(rs, key=lambda r: r[0], reverse=True)[:1]),
    (reducers.top(5, lambda r: r[0]), lambda rs: sorted(rs, key=lambda r: r[0], reverse=True)[:5]),
    (reducers.top(1000), lambda rs: sorted(rs, reverse=True)),
    (reducers.concat(), lambda rs: rs),
    (reducers.count(), len),
]


@pytest.mark.parametrize(("how", "reference"), GROUPS, ids=lambda value: getattr(value, "name", ""))
@given(records=RECORDS, cuts=CUTS, data=st.data())
def test_ties_go_to_the_earlier_record_whatever_the_grouping(
    how: Reducer, reference: Callable[[list[Any]], Any], records: list[Any], cuts: list[int], data: st.DataObject
) -> None:
    assert_grouping_is_free(how, records, cuts, reference(records), data)


@pytest.mark.parametrize("make", [reducers.min, reducers.max, lambda: reducers.top(2)])
@pytest.mark.parametrize("bad", [math.nan, None, 1j, {}])
def test_keys_without_an_order_are_refused_even_as_the_first(make: Callable[[], Reducer], bad: Any) -> None:
    how = make()
    for state in (how.initial(), how.step(how.initial(), 1)):
        before = copy.deepcopy(state)
        with pytest.raises((ValueError, TypeError)):
            how.step(state, bad)
        with pytest.raises((ValueError, TypeError)):
            how.extend(state, [2, bad])
        assert state == before


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", None])
def test_top_of_no_whole_number_is_refused(n: Any) -> None:
    with pytest.raises(GraphError, match="whole number"):
        reducers.top(n)


def test_concat_keeps_a_list_as_one_element() -> None:
    how = reducers.concat()
    assert how.merge(how.step(how.initial(), [1, 2]), how.extend(how.initial(), [[3], 4])) == [[1, 2], [3], 4]


# --- counter -----------------------------------------------------------------------------------------------------------


@given(st.lists(WORDS, max_size=50), CUTS, st.data())
def test_a_counter_is_sorted_by_count_and_then_by_value(words: list[str], cuts: list[int], data: st.DataObject) -> None:
    wanted = dict(sorted(Counter(words).items(), key=lambda item: (-item[1], item[0])))
    assert_grouping_is_free(reducers.counter(), words, cuts, wanted, data)


@given(st.lists(st.one_of(MIXED, st.tuples(MIXED, MIXED), st.frozensets(st.integers(0, 3))), max_size=50), CUTS, st.data())
def test_a_counter_of_mixed_types_has_the_same_bits_for_any_grouping(
    values: list[Any], cuts: list[int], data: st.DataObject
) -> None:
    how = reducers.counter()
    whole = how.finish(taken(how, values, fast=False))
    assert whole == Counter(values)
    assert_grouping_is_free(how, values, cuts, whole, data)


def test_a_counter_orders_values_of_any_types() -> None:
    how = reducers.counter()
    values = ["b", None, 2, (2, "x"), b"z", 1.5, ("a",), "a", (1, None), Fraction(1, 2)]
    wanted = [Fraction(1, 2), 1.5, 2, "a", "b", b"z", (1, None), (2, "x"), ("a",), None]
    assert list(how.finish(how.extend(how.initial(), values))) == wanted
    assert list(how.finish(how.extend(how.initial(), values[::-1]))) == wanted


@pytest.mark.parametrize("bad", [math.nan, [], {}])
def test_a_counter_refuses_what_cannot_be_told_apart(bad: Any) -> None:
    how = reducers.counter()
    state = how.step(how.initial(), "a")
    with pytest.raises((ValueError, TypeError)):
        how.step(state, bad)
    with pytest.raises((ValueError, TypeError)):
        how.extend(state, ["a", "b", bad])
    assert state == {"a": 1}


# --- keys --------------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    x: int


@pytest.mark.parametrize("record", [{"x": 3}, Point(3), SimpleNamespace(x=3), Counter({"x": 3})])
@pytest.mark.parametrize("key", ["x", lambda record: record["x"] if isinstance(record, dict) else record.x])
def test_a_key_is_a_field_an_attribute_or_a_function(record: Any, key: Any) -> None:
    for how, wanted in [
        (reducers.sum(key), 6),
        (reducers.mean(key), 3.0),
        (reducers.max(key), record),
        (reducers.top(2, key), [record, record]),
        (reducers.counter(key), {3: 2}),
    ]:
        assert how.finish(how.extend(how.initial(), [record, record])) == wanted
        assert how.finish(how.step(how.step(how.initial(), record), record)) == wanted


def test_a_field_of_dicts_and_objects_mixed_is_found_in_both() -> None:
    how = reducers.sum("x")
    assert how.finish(how.extend(how.initial(), [{"x": 1}, Point(2)])) == 3


def test_a_key_that_is_neither_name_nor_function_is_refused() -> None:
    with pytest.raises(GraphError, match="field's name"):
        reducers.sum(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", [reducers.sum("x"), reducers.top(3, "x"), reducers.count(), reducers.counter()])
def test_built_in_reducers_pickle_and_show_what_they_are(how: Reducer) -> None:
    assert pickle.loads(pickle.dumps(how)) == how
    assert repr(pickle.loads(pickle.dumps(how))) == repr(how)
    assert "0x" not in repr(how)


# --- bad records -------------------------------------------------------------------------------------------------------

BUILT_IN: list[Callable[[], Reducer]] = [
    lambda: reducers.sum("x"),
    lambda: reducers.mean("x"),
    lambda: reducers.min("x"),
    lambda: reducers.max("x"),
    lambda: reducers.top(3, "x"),
    lambda: reducers.counter("x"),
]


def absorbed(how: Reducer, records: list[Any]) -> tuple[Any, list[int]]:
    """Take what can be taken the way a worker does: all at once, or else one by one; return where the bad ones are."""
    state, failed = how.initial(), []
    try:
        return how.extend(state, records), []
    except Exception:
        for position, record in enumerate(records):
            try:
                state = how.step(state, record)
            except Exception:
                failed.append(position)
    return state, failed


BAD: list[Any] = [{}, None, {"x": None}, {"x": [math.nan]}, {"x": "text"}, {"x": math.nan}, 7]


@pytest.mark.parametrize("make", BUILT_IN)
@given(numbers=st.lists(st.integers(-9, 9), max_size=12), places=st.lists(st.tuples(st.integers(0, 12), st.sampled_from(BAD))))
def test_bad_records_are_set_aside_and_the_others_stay(
    make: Callable[[], Reducer], numbers: list[int], places: list[tuple[int, Any]]
) -> None:
    how = make()
    good: list[Any] = [{"x": 0}, *({"x": number} for number in numbers)]
    records = list(good)
    for place, bad in places:
        records.insert(min(place, len(records) - 1) + 1, bad)
    state, failed = absorbed(how, records)
    kept = [record for position, record in enumerate(records) if position not in failed]
    assert all(record in kept for record in good)
    assert bits(how.finish(state)) == bits(how.finish(taken(how, kept, fast=True)))
    assert {id(records[position]) for position in failed} <= {id(bad) for _, bad in places}


@pytest.mark.parametrize("make", BUILT_IN)
@pytest.mark.parametrize("bad", [{}, None, {"x": {}}])
def test_a_record_that_raises_leaves_the_state_as_it_was(make: Callable[[], Reducer], bad: Any) -> None:
    how = make()
    state = how.extend(how.initial(), [{"x": 1}, {"x": 4}])
    before = pickle.dumps(state)
    with pytest.raises((TypeError, KeyError, AttributeError)):
        how.step(state, bad)
    with pytest.raises((TypeError, KeyError, AttributeError)):
        how.extend(state, [{"x": 5}, {"x": 2}, bad])
    assert pickle.dumps(state) == before


# --- reducers of one's own ---------------------------------------------------------------------------------------------


def append(state: list[Any], record: Any) -> list[Any]:
    state.append(record)
    return state


def test_a_reducer_of_functions_starts_every_piece_afresh() -> None:
    how = reducer(list, append, lambda a, b: a + b, finish=tuple)
    first = how.extend(how.initial(), [1, 2])
    second = how.extend(how.initial(), [3])
    assert how.initial() == []
    assert how.finish(how.merge(first, second)) == (1, 2, 3)
    assert how.name == "append"


def test_the_name_of_a_lambda_is_reduce() -> None:
    assert reducer(int, lambda s, r: s + r, lambda a, b: a + b).name == "reduce"
    assert reducer(int, lambda s, r: s + r, lambda a, b: a + b, name="words").name == "words"


def test_a_shared_initial_state_is_refused_with_what_to_write() -> None:
    with pytest.raises(GraphError, match=r"initial=lambda: 0"):
        reducer(0, lambda s, r: s, lambda a, b: a)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match=r"initial=list"):
        reducer([], append, lambda a, b: a)  # type: ignore[arg-type]


def test_a_missing_merge_is_refused_with_the_reason() -> None:
    with pytest.raises(GraphError, match="every chunk is reduced by itself"):
        reducer(list, append)


def test_parts_that_cannot_be_called_are_refused_by_name() -> None:
    with pytest.raises(GraphError, match="step='x'"):
        reducer(list, "x", lambda a, b: a)  # type: ignore[arg-type]
    with pytest.raises(GraphError, match="finish=3"):
        reducer(list, append, lambda a, b: a, finish=3)  # type: ignore[arg-type]


class Longest(Reducer):
    name = "longest"

    def initial(self) -> str:
        return ""

    def step(self, state: str, record: str) -> str:
        return record if len(record) > len(state) else state

    def merge(self, a: str, b: str) -> str:
        return self.step(a, b)


class Unfinished(Reducer):
    def initial(self) -> int:
        return 0


def test_a_subclass_is_a_reducer() -> None:
    how = check_reducer(Longest())
    assert how.finish(how.extend(how.initial(), ["a", "bcd", "ef"])) == "bcd"


def test_a_subclass_that_lacks_a_method_is_refused_by_name() -> None:
    with pytest.raises(GraphError, match="Unfinished lacks step, merge"):
        check_reducer(Unfinished())


@pytest.mark.parametrize(
    ("value", "hint"),
    [(reducers.count, r"pf\.count\(\)"), (sum, "sum is not"), (Longest, "brackets"), ("sum", "'sum'"), (None, "None")],
)
def test_what_is_no_reducer_is_refused_with_what_to_write(value: Any, hint: str) -> None:
    with pytest.raises(GraphError, match=hint):
        check_reducer(value)
