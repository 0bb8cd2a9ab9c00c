from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parflow.errors import UsageError
from parflow.policies import Batching, Tolerance


def test_none_is_tolerated_unless_said() -> None:
    assert Tolerance().accepts(0, 10)
    assert not Tolerance().accepts(1, 10)


def test_a_count_does_not_depend_on_the_records() -> None:
    assert Tolerance(3).accepts(3, 3)
    assert not Tolerance(3).accepts(4, 1_000_000)


def test_a_share_is_of_the_records_read() -> None:
    assert Tolerance(0.25).accepts(25, 100)
    assert not Tolerance(0.25).accepts(26, 100)
    assert Tolerance(0.25).accepts(0, 0)


def test_one_is_a_count_and_not_everything() -> None:
    assert not Tolerance(1.0).accepts(2, 100)


@pytest.mark.parametrize("nonsense", [-1, -0.1, 1.5, math.inf, math.nan])
def test_what_is_neither_a_count_nor_a_share_is_refused(nonsense: float) -> None:
    with pytest.raises(UsageError, match="give a count"):
        Tolerance(nonsense)


def test_a_run_is_hopeless_when_nearly_all_of_many_records_fail() -> None:
    assert Tolerance(0).hopeless(200, 200)
    assert not Tolerance(0).hopeless(199, 199)
    assert not Tolerance(0).hopeless(190, 200)


def test_a_run_whose_failures_are_tolerated_is_not_hopeless() -> None:
    assert not Tolerance(1000).hopeless(1000, 1000)
    assert Tolerance(0.5).hopeless(960, 1000)


def test_the_first_jobs_travel_singly() -> None:
    assert Batching().size(10_000, 2) == 1


def test_short_jobs_travel_together_and_long_ones_alone() -> None:
    short, long = Batching(), Batching()
    short.saw(0.01)
    long.saw(10)
    assert short.size(10_000, 2) == 25
    assert long.size(10_000, 2) == 1


def test_the_last_jobs_are_shared_out() -> None:
    batching = Batching()
    batching.saw(0.001)
    assert batching.size(8, 2) == 2
    assert batching.size(1, 2) == 1


def test_jobs_known_to_be_short_are_shared_out_no_further_than_is_worth_a_key() -> None:
    batching = Batching()
    for _ in range(batching.known):
        batching.saw(0.0001)
    assert batching.size(8, 2) == 20


def test_the_mean_follows_what_is_seen() -> None:
    batching = Batching()
    batching.saw(1.0)
    for _ in range(50):
        batching.saw(0.01)
    assert batching.mean == pytest.approx(0.01, rel=0.01)


@given(
    st.lists(st.floats(0, 1e6), max_size=20),
    st.integers(0, 10**6),
    st.integers(0, 10**4),
)
def test_a_batch_is_never_empty_nor_more_than_its_share(seen: list[float], queued: int, slots: int) -> None:
    batching = Batching()
    for seconds in seen:
        batching.saw(seconds)
    size = batching.size(queued, slots)
    assert 1 <= size <= batching.limit
    assert size == 1 or (size - 1) * 2 * slots < queued
    assert size == 1 or batching.mean is None or size * batching.mean <= batching.target * (1 + 1e-9)
