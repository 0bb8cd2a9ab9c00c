"""Cut records into pieces in any way, reduce each by itself, merge in any order: the value must have the same bits."""

from __future__ import annotations

import itertools
import pickle
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from parflow.core.reducers import Reducer

CUTS = st.lists(st.integers(0, 60), max_size=8)


def bits(value: Any) -> Any:
    """Tell a value by type and bits, so that 1, 1.0 and True differ, and NaN equals NaN."""
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, dict):
        return "dict", [(bits(key), bits(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [bits(item) for item in value]
    return type(value).__name__, value


def pieces(records: list[Any], cuts: list[int]) -> list[list[Any]]:
    edges = [0, *sorted(min(cut, len(records)) for cut in cuts), len(records)]
    return [records[start:stop] for start, stop in itertools.pairwise(edges)]


def taken(how: Reducer, records: list[Any], fast: bool) -> Any:
    """Reduce one piece the way a worker does, and send the state over the wire."""
    state = how.initial()
    if fast:
        state = how.extend(state, records)
    else:
        for record in records:
            state = how.step(state, record)
    return pickle.loads(pickle.dumps(how.seal(state)))


def merged(how: Reducer, states: list[Any], shape: Callable[[int], int]) -> Any:
    """Merge neighbours in an order that ``shape`` picks."""
    while len(states) > 1:
        at = shape(len(states) - 1) % (len(states) - 1)
        states[at : at + 2] = [how.merge(states[at], states[at + 1])]
    return how.finish(states[0])


def grouped(how: Reducer, records: list[Any], cuts: list[int], draw: st.DataObject) -> Any:
    """Reduce records in pieces, each in its way, and merge them in any order."""
    states = [taken(how, part, draw.draw(st.booleans())) for part in pieces(records, cuts)]
    return merged(how, states, lambda upper: draw.draw(st.integers(0, upper)))


def assert_grouping_is_free(how: Reducer, records: list[Any], cuts: list[int], wanted: Any, draw: st.DataObject) -> None:
    assert bits(grouped(how, records, cuts, draw)) == bits(wanted)
