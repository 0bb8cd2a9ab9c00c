"""Reducers of numbers, exact until they are rounded once: sum, mean, var, std, quantiles."""

from __future__ import annotations

import builtins
import math
import numbers
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

from parflow.core.exact import Total
from parflow.core.reducers.base import NO_ORDER, Key, Keyed, Reducer
from parflow.errors import GraphError


class _Sum(Keyed):
    name = "sum"

    def initial(self) -> Total:
        return Total()

    def step(self, state: Total, record: Any) -> Total:
        state.add(self.value(record))
        return state

    def extend(self, state: Total, records: list[Any]) -> Total:
        state.add_all(self.values(records))
        return state

    def merge(self, a: Total, b: Total) -> Total:
        return a.merge(b)

    def finish(self, state: Total) -> Any:
        return state.value()


class _Mean(_Sum):
    name = "mean"

    def finish(self, state: Total) -> float | None:
        return state.mean()


# --- spread ------------------------------------------------------------------------------------------------------------

_PLAIN = frozenset({int, float, Fraction})
_SAFE = 1e-140, 1e140
"""Between these the square of a float is exactly the sum of two floats."""
_WIDTH = 2 * 53 + 3
"""Bits of a square root that is then rounded to 53, as `statistics` of the standard library does it."""


def plain(value: Any) -> int | float | Fraction:
    """Return a number as an int, a float or a Fraction; raise TypeError for what `sum` refuses."""
    if type(value) in _PLAIN:
        number: int | float | Fraction = value
        return number
    total = Total()  # which knows what a number is
    total.add(value)
    return total.value()


def _square(x: float) -> tuple[float, float]:
    """Return two floats whose sum is exactly ``x * x`` (T. J. Dekker, Numerische Mathematik 18, 1971)."""
    shifted = 134217729.0 * x  # 2**27 + 1 cuts x into halves of 26 bits
    high = shifted - (shifted - x)
    low = x - high
    square = x * x
    return square, ((high * high - square) + 2.0 * high * low) + low * low


def _squares(values: list[Any]) -> list[Any]:
    """Return numbers that add up to the exact sum of squares of the finite ones."""
    squares: list[Any] = []
    least, most = _SAFE
    for value in values:
        if type(value) is not float:
            squares.append(value * value)
        elif least < abs(value) < most:
            squares += _square(value)
        elif value and math.isfinite(value):
            squares.append(Fraction(value) ** 2)
    return squares


def _fraction(total: Total) -> Fraction:
    total.compact()
    return Fraction(total.exact) + builtins.sum(map(Fraction, total.floats))


def _rounded_root(value: Fraction) -> float:
    """Return the correctly rounded square root: enough bits of it, the last one odd if any follow, rounded once."""
    upper, lower = value.numerator, value.denominator
    shift = (upper.bit_length() - lower.bit_length() - _WIDTH) // 2
    scaled, unit = (upper, lower << 2 * shift) if shift >= 0 else (upper << -2 * shift, lower)
    root = math.isqrt(scaled // unit)
    root |= root * root * unit != scaled
    try:
        return float(root << shift) if shift >= 0 else root / (1 << -shift)
    except OverflowError:
        return math.inf


_Moments = tuple[Total, Total]  # of the numbers, and of their squares


@dataclass(frozen=True)
class _Var(Keyed):
    ddof: int = 0

    name = "var"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddof not in (0, 1):
            raise GraphError(f"ddof={self.ddof!r}: give 0 for the variance of all there is, or 1 to estimate it from a sample.")

    def initial(self) -> _Moments:
        return Total(), Total()

    def step(self, state: _Moments, record: Any) -> _Moments:
        return self._take(state, [plain(self.value(record))])

    def extend(self, state: _Moments, records: list[Any]) -> _Moments:
        return self._take(state, list(map(plain, self.values(records))))

    def _take(self, state: _Moments, values: list[Any]) -> _Moments:
        squares = _squares(values)
        state[0].add_all(values)
        state[1].add_all(squares)
        return state

    def merge(self, a: _Moments, b: _Moments) -> _Moments:
        return a[0].merge(b[0]), a[1].merge(b[1])

    def exact(self, state: _Moments) -> Fraction | float | None:
        """Return the exact variance; NaN when a number was infinite or NaN, None when there were too few."""
        values, squares = state
        if values.count <= self.ddof:
            return None
        total = _fraction(values)
        if values.special:
            return math.nan
        return (_fraction(squares) - total * total / values.count) / (values.count - self.ddof)

    def finish(self, state: _Moments) -> float | None:
        exact = self.exact(state)
        try:
            return None if exact is None else float(exact)
        except OverflowError:
            return math.inf


class _Std(_Var):
    name = "std"

    def finish(self, state: _Moments) -> float | None:
        exact = self.exact(state)
        return _rounded_root(exact) if isinstance(exact, Fraction) else exact


# --- quantiles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Quantiles(Keyed):
    """Counts of rounded numbers. Rounding keeps the order, so their quantiles are the rounded quantiles of the numbers."""

    q: float | tuple[float, ...] = 0.5
    digits: int = 3

    name = "quantiles"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.digits, int) or not 1 <= self.digits <= 17:
            raise GraphError(
                f"digits={self.digits!r}: give how many significant digits to keep, from 1 to 17 (all of a float's)."
            )
        given: tuple[Any, ...] = self.q if isinstance(self.q, tuple) else (self.q,)
        for q in given:
            if not isinstance(q, numbers.Real) or not 0 <= float(q) <= 1:
                raise GraphError(
                    f"quantile {q!r} is no share of the records; give numbers from 0 to 1, such as 0.5 for the median."
                )

    def initial(self) -> Counter[float]:
        return Counter()

    def rounded(self, value: Any) -> float:
        """Return a number with so many significant digits."""
        number = float(plain(value))
        if math.isnan(number):
            raise ValueError(NO_ORDER)
        return float(f"{number:.{self.digits - 1}e}") + 0.0  # which turns -0.0 into 0.0

    def step(self, state: Counter[float], record: Any) -> Counter[float]:
        state[self.rounded(self.value(record))] += 1
        return state

    def extend(self, state: Counter[float], records: list[Any]) -> Counter[float]:
        state.update(list(map(self.rounded, self.values(records))))
        return state

    def merge(self, a: Counter[float], b: Counter[float]) -> Counter[float]:
        a.update(b)
        return a

    def finish(self, state: Counter[float]) -> Any:
        values = sorted(state)
        upto = list(accumulate(state[value] for value in values))

        def at(q: float) -> float | None:
            if not values:
                return None
            rank = math.ceil(Fraction(str(q)) * upto[-1])  # 0.1 is a tenth here, not the float next to it
            return values[bisect_left(upto, rank)]

        return list(map(at, self.q)) if isinstance(self.q, tuple) else at(self.q)


# --- what users call -----------------------------------------------------------------------------------------------------


def sum(key: Key = None) -> Reducer:
    """Add up numbers exactly: the correctly rounded sum, whatever the grouping.

    Parameters
    ----------
    key : str or callable, optional
        A field's name (``record[key]``, or an attribute), or a function of a record; the record itself without it.

    Returns
    -------
    Reducer
        Its value is an int of ints, a float as soon as there is one float; 0 of nothing. An infinity or NaN gives what IEEE
        754 says. Fractions and numpy scalars are taken; text and Decimal raise TypeError.

    Examples
    --------
    >>> run = sum("eur")
    >>> run.finish(run.extend(run.initial(), [{"eur": x} for x in (1e16, 1.0, -1e16)]))
    1.0
    """
    return _Sum(key)


def mean(key: Key = None) -> Reducer:
    """Average numbers: the exact sum by the count, rounded once; None of nothing. ``key`` and numbers as for `sum`.

    >>> run = mean()
    >>> run.finish(run.extend(run.initial(), [1e308, 1e308, 1e308]))
    1e+308
    """
    return _Mean(key)


def var(key: Key = None, ddof: int = 0) -> Reducer:
    """Find the variance of numbers exactly: correctly rounded, whatever the grouping, and however far they are from zero.

    Parameters
    ----------
    key : str or callable, optional
        As for `sum`.
    ddof : {0, 1}
        What to take off the count that the squared deviations are divided by: 0 for all there is, 1 to estimate the variance
        of what the records are a sample of.

    Returns
    -------
    Reducer
        Its value is a float, infinite when it is too large for one; NaN when a number is infinite or NaN; None of ``ddof``
        records or fewer.

    Raises
    ------
    GraphError
        ``ddof`` is neither 0 nor 1.

    Examples
    --------
    >>> run = var(ddof=1)
    >>> run.finish(run.extend(run.initial(), [1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16]))
    30.0
    """
    return _Var(key, ddof)


def std(key: Key = None, ddof: int = 0) -> Reducer:
    """Find the standard deviation: the square root of the exact variance, rounded once. ``key`` and ``ddof`` as for `var`.

    >>> run = std()
    >>> run.finish(run.extend(run.initial(), [1e200, 3e200]))
    1e+200
    """
    return _Std(key, ddof)


def quantiles(q: float | Sequence[float], key: Key = None, digits: int = 3) -> Reducer:
    """Find quantiles of numbers: exact ones, of which ``digits`` significant digits are kept.

    The ``q``-quantile is the smallest number that at least the share ``q`` of all does not exceed, so it is one of the
    numbers (``inverted_cdf`` in NumPy). The result has the same bits for any grouping: unlike randomised sketches this counts
    each number rounded to ``digits`` digits, so the quantile is off by at most half a unit in its last digit (0.5 % of it
    for 3 digits), and not at all for numbers that have no more digits. The memory grows with how many different rounded
    numbers there are: for 3 digits up to 900 for each power of ten that the data spans, for 4 up to 9000. With 17 digits
    every float stays as it is.

    Parameters
    ----------
    q : float or sequence of float
        From 0 (the smallest) to 1 (the largest); 0.5 is the median.
    key : str or callable, optional
        As for `sum`.
    digits : int
        Significant decimal digits, from 1 to 17. Numbers that differ little beside their size, such as times since 1970,
        want more of them, or a key that subtracts where they start.

    Returns
    -------
    Reducer
        Its value is a float, or for a sequence a list of them in the same order; None instead of each of nothing. A record with
        NaN raises ValueError, an int too large for a float OverflowError.

    Raises
    ------
    GraphError
        ``q`` or ``digits`` is out of range.

    Examples
    --------
    >>> run = quantiles([0.5, 0.99])
    >>> run.finish(run.extend(run.initial(), [*range(1, 101), 123456]))
    [51.0, 100.0]
    >>> run = quantiles(1)
    >>> run.finish(run.extend(run.initial(), [0.5, 123456]))
    123000.0
    """
    return _Quantiles(key, tuple(q) if isinstance(q, Iterable) else q, digits)
