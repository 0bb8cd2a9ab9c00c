"""Estimates in little memory, held against exact counts of real text."""

from __future__ import annotations

import doctest
import importlib.util
import itertools
import math
import os
import pickle
import pydoc_data.topics
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parflow as pf
from parflow.core import reducers
from parflow.core.reducers import Reducer
from parflow.errors import GraphError, UsageError

from .grouping import CUTS, assert_grouping_is_free, bits, grouped, taken

MISSING = importlib.util.find_spec("datasketches") is None
needs_package = pytest.mark.skipif(
    MISSING and not os.environ.get("CI"), reason="datasketches is not installed: pip install 'parflow[sketches]'"
)

WORDS = [word for text in pydoc_data.topics.topics.values() for word in re.findall(r"\w+", text.casefold())]
VALUES = st.one_of(st.sampled_from(["a", "b", "c"]), st.text(max_size=2), st.integers(-9, 9), st.booleans(), st.none())


def five_frequent(key: Any = None) -> Reducer:
    return reducers.frequent_items(5, key)


MAKERS: list[Callable[..., Reducer]] = [reducers.approx_distinct, five_frequent]


def done(how: Reducer, records: list[Any]) -> Any:
    return how.finish(how.extend(how.initial(), records))


def in_pieces(how: Reducer, records: list[Any], size: int) -> Any:
    """Reduce pieces of one size, and merge them from the left."""
    state = taken(how, records[:size], fast=True)
    for at in range(size, len(records), size):
        state = how.merge(state, taken(how, records[at : at + size], fast=True))
    return how.finish(pickle.loads(pickle.dumps(state)))


# --- the package ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS)
def test_a_missing_package_is_said_when_the_reducer_is_made(
    make: Callable[..., Reducer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasketches", None)
    with pytest.raises(UsageError, match=r"pip install 'parflow\[sketches\]'"):
        make()


def test_the_other_reducers_do_not_load_the_package() -> None:
    code = "import sys, parflow as pf; r = pf.quantiles(0.5), pf.distinct(), pf.sample(3)\nprint('datasketches' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@needs_package
def test_the_examples_are_true() -> None:
    """They are skipped where all examples are run, since the package may be missing there."""
    for function in (pf.approx_distinct, pf.frequent_items):
        (test,) = doctest.DocTestFinder().find(function, globs=vars(pf).copy())
        for example in test.examples:
            example.options.clear()
        assert doctest.DocTestRunner().run(test) == (0, 2)


# --- distinct values -----------------------------------------------------------------------------------------------------


@needs_package
@settings(deadline=None)
@given(st.lists(st.one_of(VALUES, st.lists(VALUES, max_size=2)), max_size=60), CUTS, st.data())
def test_an_estimate_has_the_same_bits_for_any_grouping(values: list[Any], cuts: list[int], data: st.DataObject) -> None:
    how = reducers.approx_distinct(error=0.1)  # so few counters that 60 values fill some of them
    assert_grouping_is_free(how, values, cuts, done(how, values), data)


@needs_package
@pytest.mark.parametrize("error", [0.1, 0.03, 0.01])
def test_an_estimate_of_many_values_has_the_same_bits_for_any_grouping_and_order(error: float) -> None:
    how = reducers.approx_distinct(error=error)
    whole = done(how, WORDS)
    assert {in_pieces(how, WORDS, size) for size in (1000, 7919, 50_000)} == {whole}
    assert in_pieces(how, WORDS[::-1], 5000) == whole


@needs_package
def test_a_partial_estimate_is_stored_with_the_same_bytes() -> None:
    how = reducers.approx_distinct()
    one, other = taken(how, WORDS, fast=True), taken(how, WORDS[::-1], fast=False)
    assert pickle.dumps(how.merge(one, how.initial())) == pickle.dumps(how.merge(how.initial(), other))


@needs_package
@pytest.mark.parametrize("error", [0.1, 0.03, 0.01, 0.003])
def test_estimates_are_within_five_standard_errors(error: float) -> None:
    exact = len(set(WORDS))
    assert exact > 3000
    assert done(reducers.approx_distinct(error=error), WORDS) == pytest.approx(exact, rel=5 * error)


@needs_package
def test_estimates_are_off_by_the_standard_error_that_was_asked_for() -> None:
    error, size = 0.05, 2000
    off = [
        done(reducers.approx_distinct(error=error), list(range(start, start + size))) / size - 1
        for start in range(0, 100 * size, size)
    ]
    assert math.sqrt(sum(share**2 for share in off) / len(off)) < 1.3 * error
    assert abs(sum(off) / len(off)) < 0.5 * error


@needs_package
def test_an_estimate_takes_few_bytes() -> None:
    assert len(pickle.dumps(taken(reducers.approx_distinct(), list(range(50_000)), fast=True))) < 6000


@needs_package
def test_a_handful_of_values_is_counted_exactly_and_by_what_they_hold() -> None:
    values = [1, 1.0, True, "1", b"1", (1,), [1], None, {"a": 1}, {"a": 1.0}, np.int64(1)]
    assert done(reducers.approx_distinct(), values) == 7
    assert done(reducers.approx_distinct("x"), [{"x": value} for value in values]) == 7


# --- frequent values -----------------------------------------------------------------------------------------------------


@needs_package
@settings(deadline=None)
@given(
    st.lists(st.one_of(VALUES, st.binary(max_size=1), st.tuples(VALUES, VALUES)), max_size=60),
    st.integers(1, 9),
    CUTS,
    st.data(),
)
def test_few_different_values_are_counted_exactly(values: list[Any], n: int, cuts: list[int], data: st.DataObject) -> None:
    counts = done(reducers.counter(), values)
    found = grouped(reducers.frequent_items(n), values, cuts, data)
    assert list(found.items()) == [(value, (count, count)) for value, count in counts.items()][:n]
    assert bits(found) == bits(done(reducers.frequent_items(n), values))


@needs_package
@pytest.mark.parametrize("error", [0.1, 0.02, 0.005])
@pytest.mark.parametrize("size", [997, 20_000, len(WORDS)])
def test_bounds_hold_for_every_grouping(error: float, size: int) -> None:
    exact, allowed = Counter(WORDS), error * len(WORDS)
    found = in_pieces(reducers.frequent_items(100_000, error=error), WORDS, size)
    assert all(low <= exact[word] <= high for word, (low, high) in found.items())
    assert all(high - low <= allowed for low, high in found.values())
    assert max((count for word, count in exact.items() if word not in found), default=0) <= allowed
    assert all(high > low for low, high in found.values()), "nothing was cut back: this tests too little"


@needs_package
def test_the_most_frequent_words_are_found_in_their_order() -> None:
    found = in_pieces(reducers.frequent_items(3, error=0.001), WORDS, 10_000)
    assert list(found) == [word for word, _ in Counter(WORDS).most_common(3)]


@needs_package
def test_equal_values_are_one_and_come_back_as_plain_ones() -> None:
    class Colour(StrEnum):
        RED = "red"

    found = done(
        reducers.frequent_items(9), [1, 1.0, True, np.int64(1), np.float64(0.5), 0.5, Colour.RED, "red", (True, "x"), (1, "x")]
    )
    assert bits(found) == bits({1: (4, 4), 0.5: (2, 2), "red": (2, 2), (1, "x"): (2, 2)})


@needs_package
@pytest.mark.parametrize(
    "value", ["", "a\0b", "\ud800", "'\"\\\n", "é" * 10_000, b"\0\xff", -(10**30), 1e-300, -0.1, (), ((1,),), None]
)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert bits(in_pieces(reducers.frequent_items(9), [value] * 3, 1)) == bits({value: (3, 3)})


@needs_package
@pytest.mark.parametrize("bad", [[1], {"a": 1}, {1}, math.nan, math.inf, 1j, Fraction(1, 3), (1, [2]), object()])
def test_values_that_can_not_come_back_are_refused(bad: Any) -> None:
    how = reducers.frequent_items(3)
    state = how.extend(how.initial(), ["a", "a"])
    with pytest.raises((TypeError, ValueError), match="can't"):
        how.step(state, bad)
    with pytest.raises((TypeError, ValueError), match="can't"):
        how.extend(state, ["b", bad])
    assert how.finish(state) == {"a": (2, 2)}


# --- both ------------------------------------------------------------------------------------------------------------------


@needs_package
@pytest.mark.parametrize(("make", "nothing"), [(MAKERS[0], 0), (MAKERS[1], {})])
def test_a_reduction_over_nothing_has_a_value(make: Callable[..., Reducer], nothing: Any) -> None:
    how = make()
    assert bits(how.finish(how.initial())) == bits(nothing)
    assert bits(how.finish(how.merge(taken(how, [], True), taken(how, [], False)))) == bits(nothing)
    some = done(how, ["a", "b", "a"])
    for order in itertools.permutations([[], ["a", "b", "a"], []]):
        one, other, third = (taken(how, part, fast=True) for part in order)
        assert bits(how.finish(how.merge(how.merge(one, other), third))) == bits(some)


@needs_package
@pytest.mark.parametrize("make", MAKERS)
def test_a_piece_never_sees_the_state_of_another(make: Callable[..., Reducer]) -> None:
    how = make()
    before = pickle.dumps(how.initial())
    how.merge(how.extend(how.initial(), ["a"]), how.step(how.initial(), "b"))
    assert pickle.dumps(how.initial()) == before


@needs_package
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bad", [{}, None, {"x": math.nan}, {"x": (value for value in "a")}])
def test_a_record_that_raises_leaves_the_state_as_it_was(make: Callable[..., Reducer], bad: Any) -> None:
    how = make("x")
    state = how.extend(how.initial(), [{"x": 1}, {"x": 4}])
    before = pickle.dumps(state)
    with pytest.raises((TypeError, KeyError, AttributeError, ValueError)):
        how.step(state, bad)
    with pytest.raises((TypeError, KeyError, AttributeError, ValueError)):
        how.extend(state, [{"x": 5}, bad])
    assert pickle.dumps(state) == before


@needs_package
@pytest.mark.parametrize("make", MAKERS)
def test_a_sketch_reducer_pickles_and_shows_what_it_is(make: Callable[..., Reducer]) -> None:
    how = make()
    assert pickle.loads(pickle.dumps(how)) == how
    assert repr(pickle.loads(pickle.dumps(how))) == repr(how)


@pytest.mark.parametrize("error", [0, -1, 0.11, 1e-7, math.nan, "0.01", None, True])
def test_errors_out_of_range_are_refused(error: Any) -> None:
    with pytest.raises(GraphError, match="is a share from"):
        reducers.approx_distinct(error=error)
    with pytest.raises(GraphError, match="is a share from"):
        reducers.frequent_items(3, error=error)


@needs_package
@pytest.mark.parametrize("n", [0, -1, 1.5, "3", None])
def test_frequent_items_of_no_whole_number_are_refused(n: Any) -> None:
    with pytest.raises(GraphError, match="whole number"):
        reducers.frequent_items(n)


@needs_package
def test_sketches_cross_a_run_in_children() -> None:
    @pf.workflow
    def flow() -> Any:
        words = pf.items(WORDS[:5000], chunk_records=700)
        return words.reduce(pf.approx_distinct()), words.reduce(pf.frequent_items(3))

    estimate, found = flow().run(workers=2, progress=False).result()
    assert estimate == done(pf.approx_distinct(), WORDS[:5000])
    assert found == {word: (count, count) for word, count in list(done(pf.counter(), WORDS[:5000]).items())[:3]}
