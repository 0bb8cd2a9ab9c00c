"""The places of many rows are those that a list would have."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parflow.runtime.marker import Place
from parflow.runtime.places import Places

numbers = st.integers(0, 50)
places = st.tuples(numbers, numbers, numbers, st.integers(0, 1))
stretches = st.tuples(places, st.integers(0, 9), st.sampled_from([0, 1]))


def listed(stretch: tuple[Place, int, int]) -> list[Place]:
    (ordinal, part, offset, guess), count, step = stretch
    return [(ordinal + step * number, part, offset + step * number, guess) for number in range(count)]


@given(st.lists(stretches, max_size=6), st.integers(0, 60), st.integers(0, 60))
def test_stretches_are_the_list_of_their_places(given: list[tuple[Place, int, int]], first: int, stop: int) -> None:
    rows = [place for stretch in given for place in listed(stretch)]
    made = Places(given)
    assert len(made) == len(rows)
    assert [*made] == rows
    assert [made[index] for index in range(len(rows))] == rows
    assert [*made[first:stop]] == rows[first:stop]


@given(st.lists(stretches, max_size=4), st.lists(places, max_size=4), st.lists(stretches, max_size=4))
def test_places_are_added_one_by_one_and_many_at_once(
    begin: list[tuple[Place, int, int]], single: list[Place], end: list[tuple[Place, int, int]]
) -> None:
    made = Places(begin)
    for place in single:
        made.append(place)
    made.extend(Places(end))
    made.extend(single)
    rows = [place for stretch in begin for place in listed(stretch)]
    assert [*made] == [*rows, *single, *(place for stretch in end for place in listed(stretch)), *single]
