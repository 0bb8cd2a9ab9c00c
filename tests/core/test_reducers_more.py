"""Variance, quantiles, histograms, distinct values and samples: exact, and the same for any grouping."""

from __future__ import annotations

import copy
import datetime as dt
import itertools
import math
import operator
import pickle
import statistics
import subprocess
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import parflow as pf
from parflow.core import reducers
from parflow.core.reducers import Histogram, Reducer, reducer
from parflow.core.reducers.content import content, digest
from parflow.errors import GraphError

from .grouping import CUTS, assert_grouping_is_free, bits, grouped, taken

EDGY = [0.0, -0.0, 5e-324, 2.3e-308, 0.99e-140, 1.01e-140, 1.7e308, -1e308, 0.99e140, 1.01e140, 2**60, 10**30]
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.one_of(FLOATS, st.floats(-9, 9), st.integers(), st.integers(-5, 5), st.fractions(-2, 2), st.sampled_from(EDGY))
SPECIAL = st.one_of(FLOATS, st.sampled_from([math.inf, -math.inf, math.nan]))
WORDS = st.one_of(st.sampled_from(["a", "b", "c", ""]), st.text(max_size=2), st.integers(-2, 2), st.booleans(), st.none())
DDOF = st.sampled_from([0, 1])


def done(how: Reducer, records: list[Any]) -> Any:
    return how.finish(how.extend(how.initial(), records))


# --- variance ------------------------------------------------------------------------------------------------------------


def variance(values: list[Any], ddof: int) -> Fraction | None:
    """Follow the definition, without rounding."""
    exact = list(map(Fraction, values))
    if len(exact) <= ddof:
        return None
    mean = sum(exact, Fraction()) / len(exact)
    return sum(((value - mean) ** 2 for value in exact), Fraction()) / (len(exact) - ddof)


def rounded(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


@settings(deadline=None)
@given(st.lists(NUMBERS, max_size=60), DDOF, CUTS, st.data())
def test_a_variance_is_correctly_rounded_whatever_the_grouping(
    values: list[Any], ddof: int, cuts: list[int], data: st.DataObject
) -> None:
    exact = variance(values, ddof)
    wanted = None if exact is None else rounded(exact)
    assert_grouping_is_free(reducers.var(ddof=ddof), values, cuts, wanted, data)


@settings(deadline=None)
@given(st.lists(NUMBERS, max_size=30), DDOF, CUTS, st.data())
def test_no_float_is_closer_to_the_standard_deviation(
    values: list[Any], ddof: int, cuts: list[int], data: st.DataObject
) -> None:
    exact = variance(values, ddof)
    found = grouped(reducers.std(ddof=ddof), values, cuts, data)
    if exact is None:
        assert found is None
    elif math.isinf(found):
        assert exact >= (Fraction(sys.float_info.max) + Fraction(math.ulp(sys.float_info.max)) / 2) ** 2
    else:
        below, at, above = Fraction(math.nextafter(found, -1.0)), Fraction(found), Fraction(found) + Fraction(math.ulp(found))
        assert max(Fraction(), (below + at) / 2) ** 2 <= exact <= ((at + above) / 2) ** 2


@given(st.lists(SPECIAL, min_size=2, max_size=20), CUTS, st.data())
def test_an_infinity_or_nan_makes_the_variance_nan(values: list[float], cuts: list[int], data: st.DataObject) -> None:
    strange = not all(map(math.isfinite, values))
    for how in (reducers.var(), reducers.std()):
        found = grouped(how, values, cuts, data)
        assert math.isnan(found) == strange
        assert not strange or bits(found) == bits(math.nan)


@pytest.mark.parametrize(
    ("values", "ddof", "wanted"),
    [
        ([], 0, None),
        ([5], 0, 0.0),
        ([5], 1, None),
        ([1, 3], 0, 1.0),
        ([1, 3], 1, 2.0),
        ([0.1] * 10, 0, 0.0),
        ([1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16], 1, 30.0),
        ([np.int64(1), np.float32(3), True, Fraction(3)], 0, 1.0),
        ([1e200, 3e200], 0, math.inf),
        ([10**400, -(10**400)], 0, math.inf),
        ([1e-200, 3e-200], 0, 0.0),
    ],
)
def test_variances_that_are_known(values: list[Any], ddof: int, wanted: float | None) -> None:
    for fast in (False, True):
        how = reducers.var(ddof=ddof)
        assert bits(how.finish(taken(how, values, fast))) == bits(wanted)


@pytest.mark.parametrize(
    ("values", "wanted"), [([1e200, 3e200], 1e200), ([1e-200, 3e-200], 1e-200), ([10**400, -(10**400)], math.inf), ([7], 0.0)]
)
def test_a_standard_deviation_survives_a_variance_that_no_float_can_hold(values: list[Any], wanted: float) -> None:
    assert done(reducers.std(), values) == wanted


@example([1.5, 2.7], 520)
@example([1.1, 3.3], -520)
@given(st.lists(st.floats(1, 1000), min_size=1, max_size=20), st.integers(-900, 900))
def test_a_standard_deviation_is_as_exact_for_tiny_and_huge_numbers(values: list[float], power: int) -> None:
    scaled = [math.ldexp(value, power) for value in values]
    assert done(reducers.std(), scaled) == math.ldexp(done(reducers.std(), values), power)


def test_variance_and_deviation_agree_with_the_standard_library() -> None:
    values = (np.random.default_rng(11).standard_normal(3000) * 1e3 + 1e6).tolist()
    assert done(reducers.var(), values) == statistics.pvariance(values)
    assert done(reducers.var(ddof=1), values) == statistics.variance(values)
    assert done(reducers.std(ddof=1), values) == statistics.stdev(values)


def test_a_partial_variance_of_many_records_is_small_on_the_wire() -> None:
    how = reducers.var()
    assert len(pickle.dumps(how.extend(how.initial(), [1.1 * i for i in range(5000)]))) < 400


@pytest.mark.parametrize("ddof", [2, -1, 0.5, None, "1"])
def test_other_degrees_of_freedom_are_refused(ddof: Any) -> None:
    for make in (reducers.var, reducers.std):
        with pytest.raises(GraphError, match="ddof"):
            make(ddof=ddof)


# --- quantiles -----------------------------------------------------------------------------------------------------------

SHARES = st.one_of(st.floats(0, 1), st.sampled_from([0, 1, 0.1, 0.25, 0.5, 0.9, 0.99]))


def quantile(values: list[Any], q: float) -> Any:
    """Follow the definition: the smallest value that at least the share ``q`` does not exceed."""
    ordered = sorted(values)
    return next(
        value for value in ordered if Fraction(sum(other <= value for other in ordered), len(ordered)) >= Fraction(str(q))
    )


@given(st.lists(st.one_of(FLOATS, st.integers(-99, 99)), min_size=1, max_size=40), SHARES, st.integers(1, 17), CUTS, st.data())
def test_a_quantile_is_the_rounded_exact_one_whatever_the_grouping(
    values: list[Any], q: float, digits: int, cuts: list[int], data: st.DataObject
) -> None:
    wanted = float(f"{float(quantile(values, q)):.{digits - 1}e}") + 0.0
    assert_grouping_is_free(reducers.quantiles(q, digits=digits), values, cuts, wanted, data)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40), SHARES, st.integers(1, 6))
def test_the_error_of_a_quantile_is_half_a_unit_of_its_last_digit(values: list[float], q: float, digits: int) -> None:
    exact = quantile(values, q)
    assert abs(done(reducers.quantiles(q, digits=digits), values) - exact) <= exact * 0.5 * 10.0 ** (1 - digits) * (1 + 1e-9)


def test_quantiles_agree_with_numpy() -> None:
    values = np.random.default_rng(3).lognormal(3, 2, 1001)
    shares = [0, 0.01, 0.25, 0.5, 0.75, 0.9, 0.999, 1]
    wanted = np.quantile(values, shares, method="inverted_cdf").tolist()
    assert done(reducers.quantiles(shares, digits=17), values.tolist()) == wanted
    assert done(reducers.quantiles(shares), values.tolist()) == pytest.approx(wanted, rel=0.005)


def test_a_tenth_of_ten_is_the_first() -> None:
    assert done(reducers.quantiles(0.1), list(range(1, 11))) == 1.0
    assert done(reducers.quantiles(np.array([0.1, 0.5]).tolist()), list(range(1, 11))) == [1.0, 5.0]
    assert done(reducers.quantiles(np.float64(0.1)), list(range(1, 11))) == 1.0


def test_a_quantile_may_be_infinite() -> None:
    assert done(reducers.quantiles([0, 0.5, 1]), [math.inf, 1, -math.inf]) == [-math.inf, 1.0, math.inf]


def test_the_state_of_quantiles_stays_small() -> None:
    how = reducers.quantiles(0.5)
    state = how.extend(how.initial(), np.random.default_rng(5).uniform(1, 1000, 20_000).tolist())
    assert len(state) <= 3 * 900 + 1


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan, "0.5", None, [0.5, 2], True - 0.5j])
def test_quantiles_that_are_no_shares_are_refused(q: Any) -> None:
    with pytest.raises(GraphError, match="no share"):
        reducers.quantiles(q)


@pytest.mark.parametrize("digits", [0, 18, 2.5, None])
def test_digits_that_a_float_has_not_are_refused(digits: Any) -> None:
    with pytest.raises(GraphError, match="significant digits"):
        reducers.quantiles(0.5, digits=digits)


# --- histogram -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.one_of(NUMBERS, st.sampled_from([math.inf, -math.inf])), max_size=50),
    st.lists(st.one_of(st.integers(-6, 6), st.floats(-9, 9)), min_size=2, max_size=7, unique=True),
    CUTS,
    st.data(),
)
def test_a_histogram_counts_each_number_once_whatever_the_grouping(
    values: list[Any], edges: list[float], cuts: list[int], data: st.DataObject
) -> None:
    edges.sort()
    spans = list(itertools.pairwise(edges))
    counts = [sum(low <= value < high for value in values) for low, high in spans]
    counts[-1] += sum(value == edges[-1] for value in values)
    below, above = sum(value < edges[0] for value in values), sum(value > edges[-1] for value in values)
    assert below + sum(counts) + above == len(values)
    assert_grouping_is_free(reducers.histogram(edges), values, cuts, Histogram(edges, counts, below, above), data)


def test_a_histogram_agrees_with_numpy() -> None:
    values = np.random.default_rng(7).normal(0, 1, 2000).round(1)
    found = done(reducers.histogram((-2, 2, 16)), values.tolist())
    counts, edges = np.histogram(values, bins=16, range=(-2, 2))
    assert (found.counts, found.edges) == (counts.tolist(), edges.tolist())
    assert found.below + found.above == 2000 - counts.sum()


def test_edges_of_equal_bins_are_rounded_once() -> None:
    assert done(reducers.histogram((0, 1, 10)), []).edges == [i / 10 for i in range(11)]
    assert done(reducers.histogram(range(0, 40, 10)), [10**30, 2**53 + 1, 29]).counts == [0, 0, 1]


def test_numbers_are_compared_without_rounding() -> None:
    assert done(reducers.histogram([0, 2.0**53, 2.0**54]), [2**53 - 1, np.int64(2**53 + 1), Fraction(2**54) + 1]) == Histogram(
        [0, 2.0**53, 2.0**54], [1, 1], 0, 1
    )


@pytest.mark.parametrize(
    ("bins", "hint"),
    [
        ([], "at least two"),
        ([1], "at least two"),
        ([1, 1], "larger"),
        ([2, 1], "larger"),
        ([0, math.nan], "larger"),
        ((0, 1), "as a list"),
        ((0, 1, 2, 3), "as a list"),
        ((0, 1, 0), "whole number"),
        ((0, 1, 2.5), "whole number"),
        ((0, math.inf, 3), "infinite"),
        ((1, 0, 3), "larger"),
        ((1.0, math.nextafter(1.0, 2.0), 3), "larger"),
    ],
)
def test_bins_that_are_none_are_refused(bins: Any, hint: str) -> None:
    with pytest.raises(GraphError, match=hint):
        reducers.histogram(bins)


# --- distinct values -----------------------------------------------------------------------------------------------------


@given(st.lists(st.one_of(WORDS, st.tuples(WORDS, WORDS)), max_size=50), CUTS, st.data())
def test_distinct_values_are_those_of_a_set(values: list[Any], cuts: list[int], data: st.DataObject) -> None:
    assert_grouping_is_free(reducers.distinct(), values, cuts, len(set(values)), data)


# --- sample --------------------------------------------------------------------------------------------------------------

RECORDS = st.lists(st.one_of(WORDS, st.dictionaries(st.text(max_size=1), st.integers(0, 2), max_size=2)), max_size=40)


@given(RECORDS, st.integers(1, 45), st.integers(-3, 3), CUTS, st.data())
def test_a_sample_has_the_same_bits_for_any_grouping(
    records: list[Any], n: int, seed: int, cuts: list[int], data: st.DataObject
) -> None:
    first: dict[bytes, Any] = {}
    for record in records:
        first.setdefault(digest(record, 16, seed), record)
    wanted = [first[mark] for mark in sorted(first)[:n]]
    assert_grouping_is_free(reducers.sample(n, seed=seed), records, cuts, wanted, data)


@pytest.mark.parametrize("records", [[1, True, 1.0], [True, 1.0, 1], [1.0, 1, True]])
def test_of_copies_the_earliest_is_picked(records: list[Any]) -> None:
    how = reducers.sample(2)
    first, *rest = (taken(how, [record], fast=False) for record in records)
    for state in rest:
        first = how.merge(first, state)
    for found in (how.finish(first), done(how, records), how.finish(taken(how, records, fast=False))):
        assert bits(found) == bits(records[:1])


@given(RECORDS, st.integers(1, 12), CUTS, st.data())
def test_a_sample_is_the_same_for_any_order(records: list[Any], n: int, cuts: list[int], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(records))
    found = grouped(reducers.sample(n), shuffled, cuts, data)
    assert found == done(reducers.sample(n), records)  # as values: of 1 and True either may have come first


@given(RECORDS, st.integers(1, 12), CUTS, st.data())
def test_a_sample_has_no_record_twice_and_none_missing(
    records: list[Any], n: int, cuts: list[int], data: st.DataObject
) -> None:
    found = grouped(reducers.sample(n), records, cuts, data)
    different = [record for at, record in enumerate(records) if record not in records[:at]]
    assert all(record in records for record in found)
    assert len(found) == min(n, len(different))
    assert all(one != other for one, other in itertools.combinations(found, 2))


@given(RECORDS, st.integers(1, 12), CUTS, st.data())
def test_copies_are_all_in_the_running_when_a_key_tells_them_apart(
    records: list[Any], n: int, cuts: list[int], data: st.DataObject
) -> None:
    numbered = list(enumerate(records))
    found = grouped(reducers.sample(n, key=lambda record: record[0]), numbered, cuts, data)
    assert len(found) == min(n, len(records))
    assert all(pair in numbered for pair in found)


@given(st.integers(1, 20), st.integers(0, 20), st.integers(0, 99))
def test_a_smaller_sample_is_the_beginning_of_a_larger_one(n: int, more: int, seed: int) -> None:
    records = list(range(30))
    assert done(reducers.sample(n + more, seed=seed), records)[:n] == done(reducers.sample(n, seed=seed), records)


def test_every_pair_of_records_is_equally_likely() -> None:
    rounds, pairs = 4500, list(itertools.combinations(range(10), 2))
    seen = Counter(tuple(sorted(done(reducers.sample(2, seed=seed), list(range(10))))) for seed in range(rounds))
    mean = rounds / len(pairs)
    assert set(seen) == set(pairs)
    assert sum((seen[pair] - mean) ** 2 / mean for pair in pairs) < 78.7  # chi squared of 44 degrees: 99.9 % are below


def test_a_record_that_occurs_often_is_no_more_likely() -> None:
    often = ["a"] * 1000 + ["b", "c", "d"]
    seen = Counter(done(reducers.sample(1, seed=seed), often)[0] for seed in range(400))
    assert all(60 < seen[word] < 140 for word in "abcd")


@pytest.mark.parametrize("n", [0, -1, 1.5, "3", None])
def test_a_sample_of_no_whole_number_is_refused(n: Any) -> None:
    with pytest.raises(GraphError, match="whole number"):
        reducers.sample(n)


@pytest.mark.parametrize("seed", [2**64, 1.5, "x", None])
def test_a_seed_that_is_no_number_of_64_bits_is_refused(seed: Any) -> None:
    with pytest.raises(GraphError, match="64 bits"):
        reducers.sample(3, seed=seed)


# --- content, which samples and estimates rest on ----------------------------------------------------------------------

LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), FLOATS, st.text(max_size=3), st.binary(max_size=3), st.fractions())
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(max_size=2), inner)),
)


@settings(deadline=None)
@given(VALUES, VALUES)
def test_values_have_the_same_content_when_they_are_equal_and_only_then(one: Any, other: Any) -> None:
    assert (content(one) == content(other)) == (one == other)
    assert content(one) == content(pickle.loads(pickle.dumps(one))) == content(copy.deepcopy(one))


@dataclass(frozen=True, slots=True)
class Place:
    name: str
    at: tuple[float, float]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        (Decimal("1.50"), 1.5),
        (np.float32(0.5), Fraction(1, 2)),
        (np.int64(7), 7),
        (0.0, -0.0),
        ({"a": 1, "b": 2}, OrderedDict([("b", 2), ("a", 1)])),
        ({1, 2}, frozenset({2, 1})),
        ("\ud800", "\ud800"),
        (Place("x", (1, 2)), Place("x", (1.0, 2.0))),
        (dt.date(2026, 1, 2), dt.date(2026, 1, 2)),
        (np.arange(3), np.arange(3)),
        (math.nan, float("nan")),
    ],
)
def test_what_is_equal_has_the_same_content(one: Any, other: Any) -> None:
    assert content(one) == content(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", 1),
        ("a", b"a"),
        ([1], (1,)),
        (["a", "b"], ["ab"]),
        ([["a"], "b"], ["a", ["b"]]),
        ([], {}),
        (None, ""),
        (math.inf, -math.inf),
        (Place("x", (1, 2)), Place("x", (1, 3))),
        (dt.date(2026, 1, 2), dt.date(2026, 1, 3)),
        (int, str),
    ],
)
def test_what_differs_has_another_content(one: Any, other: Any) -> None:
    assert content(one) != content(other)


def test_content_is_the_same_in_a_process_that_hashes_differently() -> None:
    code = (
        "from parflow.core.reducers.content import digest\n"
        "print(digest([{'a', 'b', 'c', 'd'}, {'x': None, 'y': 1e-7}, 'é', b'z'], 16, 5).hex())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != ""


def test_what_can_not_be_pickled_has_no_content() -> None:
    with pytest.raises(TypeError, match="generator"):
        content(number for number in [1])


# --- every reducer -------------------------------------------------------------------------------------------------------

EVERY: dict[str, tuple[Callable[[], Reducer], Any]] = {
    "count": (reducers.count, 0),
    "concat": (reducers.concat, []),
    "counter": (lambda: reducers.counter("x"), {}),
    "distinct": (lambda: reducers.distinct("x"), 0),
    "histogram": (lambda: reducers.histogram([0, 3, 9], "x"), Histogram([0, 3, 9], [0, 0], 0, 0)),
    "sum": (lambda: reducers.sum("x"), 0),
    "mean": (lambda: reducers.mean("x"), None),
    "var": (lambda: reducers.var("x"), None),
    "std": (lambda: reducers.std("x", ddof=1), None),
    "quantiles": (lambda: reducers.quantiles([0, 0.5], "x"), [None, None]),
    "min": (lambda: reducers.min("x"), None),
    "max": (lambda: reducers.max("x"), None),
    "top": (lambda: reducers.top(3, "x"), []),
    "sample": (lambda: reducers.sample(3, "x"), []),
    "reducer": (lambda: reducer(list, lambda state, record: [*state, record], lambda a, b: a + b, finish=len), 0),
}
PARTS: list[list[Any]] = [[], [{"x": 4}, {"x": 1}], [], [], [{"x": 4}, {"x": 2}, {"x": 7}], []]
ALL = list(itertools.chain(*PARTS))


@pytest.mark.parametrize("name", EVERY)
def test_a_reduction_over_nothing_has_a_value(name: str) -> None:
    make, nothing = EVERY[name]
    how = make()
    assert bits(how.finish(how.initial())) == bits(nothing)
    assert bits(done(how, [])) == bits(nothing)
    empty = [taken(how, [], fast) for fast in (True, False, True)]
    assert bits(how.finish(how.merge(how.merge(empty[0], empty[1]), empty[2]))) == bits(nothing)


@pytest.mark.parametrize("name", EVERY)
def test_empty_pieces_change_nothing(name: str) -> None:
    how = EVERY[name][0]()
    state = taken(how, PARTS[0], fast=True)
    for part in PARTS[1:]:
        state = how.merge(state, taken(how, part, fast=False))
    assert bits(how.finish(state)) == bits(done(how, ALL))


@pytest.mark.parametrize("name", EVERY)
def test_a_piece_never_sees_the_state_of_another(name: str) -> None:
    how = EVERY[name][0]()
    before = pickle.dumps(how.initial())
    one, other = how.extend(how.initial(), PARTS[1]), how.step(how.initial(), PARTS[4][0])
    how.merge(one, other)
    assert pickle.dumps(how.initial()) == before


def test_an_initial_value_that_is_shared_is_copied_for_each_piece() -> None:
    shared: dict[str, list[int]] = {"seen": []}

    def take(state: dict[str, list[int]], record: int) -> dict[str, list[int]]:
        state["seen"].append(record)
        return state

    how = reducer(lambda: shared, take, lambda a, b: {"seen": a["seen"] + b["seen"]}, finish=operator.itemgetter("seen"))
    one, other = how.extend(how.initial(), [1, 2]), how.extend(how.initial(), [3])
    assert how.finish(how.merge(one, other)) == [1, 2, 3]
    assert shared == {"seen": []}


@pytest.mark.parametrize("name", [name for name in EVERY if name not in {"count", "concat", "sample", "reducer"}])
@pytest.mark.parametrize("bad", [{}, None, {"x": {}}, {"x": []}])
def test_a_record_that_raises_leaves_the_state_as_it_was(name: str, bad: Any) -> None:
    how = EVERY[name][0]()
    state = how.extend(how.initial(), PARTS[1])
    before = pickle.dumps(state)
    with pytest.raises((TypeError, KeyError, AttributeError, ValueError)):
        how.step(state, bad)
    with pytest.raises((TypeError, KeyError, AttributeError, ValueError)):
        how.extend(state, [{"x": 5}, {"x": 2}, bad])
    assert pickle.dumps(state) == before


@pytest.mark.parametrize("name", ["distinct", "histogram", "quantiles"])
def test_nan_is_refused_where_it_has_no_place(name: str) -> None:
    how = EVERY[name][0]()
    state = how.extend(how.initial(), PARTS[1])
    before = pickle.dumps(state)
    with pytest.raises(ValueError, match="NaN"):
        how.step(state, {"x": math.nan})
    with pytest.raises(ValueError, match="NaN"):
        how.extend(state, [{"x": 5}, {"x": math.nan}])
    assert pickle.dumps(state) == before


@pytest.mark.parametrize("name", [name for name in EVERY if name != "reducer"])
def test_every_reducer_pickles_and_shows_what_it_is(name: str) -> None:
    how = EVERY[name][0]()
    again = pickle.loads(pickle.dumps(how))
    assert (again, repr(again), how.name) == (how, repr(how), name)


@pytest.mark.parametrize("name", EVERY)
def test_plain_dask_reduces_nothing_and_something(name: str) -> None:
    make, nothing = EVERY[name]
    empty = pf.items([]).reduce(make())
    without = pf.items(ALL, chunk_records=1).filter(lambda record: record["x"] < 0).reduce(make())
    some = pf.items(ALL, chunk_records=1).filter(lambda record: record["x"] != 2).reduce(make())
    assert bits(empty.compute()) == bits(nothing)
    assert bits(without.compute()) == bits(nothing)
    assert bits(some.compute()) == bits(done(make(), [record for record in ALL if record["x"] != 2]))


def test_a_run_has_the_same_bits_for_one_worker_and_two() -> None:
    values = [(1 + (number * 7919) % 1000) * 0.1 for number in range(500)]

    @pf.workflow
    def flow(size: int) -> Any:
        numbers = pf.items(values, chunk_records=size)
        makes = [pf.var(), pf.std(ddof=1), pf.histogram((0, 100, 7)), pf.distinct(), pf.sample(5), pf.quantiles([0.1, 0.9])]
        return tuple(numbers.reduce(make, name=f"{make.name}-{at}") for at, make in enumerate(makes))

    one = flow(500).run(workers=1, progress=False).result()
    two = flow(13).run(workers=2, progress=False).result()
    assert bits(one) == bits(two)
    assert one[0] == rounded(variance(values, 0) or Fraction())
