"""Reducers: how many records become one value, with the same bits however the records are grouped.

A reduction runs in pieces. Each piece of a chunk starts from ``initial()`` and takes its records with ``step`` (or
``extend``, many at once); the partial states of all pieces are then merged in input order, and ``finish`` turns the last
state into the value. So a reducer is right when ``merge`` is associative, and a result never depends on the number of
workers, on the order in which they end, or on a retry.
"""

from parflow.core.reducers.base import Key, Reducer, check_reducer, reducer
from parflow.core.reducers.counting import Histogram, concat, count, counter, distinct, histogram
from parflow.core.reducers.numeric import mean, quantiles, std, sum, var
from parflow.core.reducers.picks import max, min, sample, top
from parflow.core.reducers.sketches import approx_distinct, frequent_items

__all__ = [
    # a reducer of one's own
    "Key",
    "Reducer",
    "check_reducer",
    "reducer",
    # counts and lists
    "Histogram",
    "concat",
    "count",
    "counter",
    "distinct",
    "histogram",
    # numbers
    "mean",
    "quantiles",
    "std",
    "sum",
    "var",
    # records
    "max",
    "min",
    "sample",
    "top",
    # estimates
    "approx_distinct",
    "frequent_items",
]
