"""Exact sums: the correctly rounded sum and mean of numbers, with the same bits however they are grouped."""

from __future__ import annotations

import math
import numbers
import operator
from decimal import Decimal
from fractions import Fraction
from typing import Any

_BUFFER = 1000
"""So many floats are kept before they are compacted."""

_EXACT = frozenset({float, int, Fraction})


def _number(value: Any) -> int | float | Fraction:
    dtype = getattr(getattr(value, "dtype", None), "kind", "")  # numpy's, without importing it; dates have one too
    if getattr(value, "shape", ()) == () and dtype in {"", "b", "i", "u", "f"} and not isinstance(value, Decimal):
        value = value.item() if dtype else value
        if isinstance(value, float):
            return float(value)
        if hasattr(value, "__index__"):
            return operator.index(value)
        if isinstance(value, numbers.Rational):
            return Fraction(value)
        if hasattr(value, "__float__"):
            return float(value)
    advice = "turn it into a Fraction or a float first" if isinstance(value, Decimal) else "give numbers, or key="
    raise TypeError(f"can't add up a {type(value).__qualname__}: {advice}")


def _expansion(floats: list[float]) -> list[float]:
    """Return few floats, largest first, whose exact sum is that of ``floats``; the first is that sum correctly rounded."""
    parts: list[float] = []
    while part := math.fsum([*floats, *map(operator.neg, parts)]):
        if not math.isfinite(part):
            raise OverflowError
        parts.append(part)
    return parts


def _rounded(value: Fraction | int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


class Total:
    """An exact running sum of ints, floats and fractions, and how many there were.

    The floats are kept as an expansion: a few floats whose exact sum is the sum of all (J. R. Shewchuk, "Adaptive Precision
    Floating-Point Arithmetic and Fast Robust Geometric Predicates", Discrete & Computational Geometry 18, 1997). New ones
    are only appended; `math.fsum`, which implements that paper, rounds the exact sum of the list correctly, and what the
    rounding left over is the next float of the expansion. What is too large for floats on the way goes to a fraction.
    """

    __slots__ = ("count", "exact", "floats", "real", "special")

    def __init__(self) -> None:
        self.count = 0
        self.exact: int | Fraction = 0
        self.floats: list[float] = []
        self.real = False
        self.special = 0.0  # the sum of infinities and NaNs, which outdoes everything else

    def add(self, value: Any) -> None:
        """Add one number, or raise TypeError and change nothing."""
        if type(value) not in _EXACT:
            value = _number(value)
        if type(value) is float:
            self.real = True
            self.floats.append(value)
            if len(self.floats) >= _BUFFER:
                self.compact()
        else:
            self.exact += value
        self.count += 1

    def add_all(self, values: list[Any]) -> None:
        """Add many numbers, or raise TypeError and change nothing."""
        kinds = set(map(type, values))
        if not kinds <= _EXACT:
            values = list(map(_number, values))
            kinds = set(map(type, values))
        if kinds <= {float}:
            floats, others = values, []
        else:
            floats = [value for value in values if type(value) is float]
            others = [value for value in values if type(value) is not float]
        self.exact += sum(others)
        self.floats += floats
        self.real = self.real or bool(floats)
        self.count += len(values)
        if len(self.floats) >= _BUFFER:
            self.compact()

    def merge(self, other: Total) -> Total:
        """Add all of another total."""
        self.count += other.count
        self.exact += other.exact
        self.floats += other.floats
        self.real = self.real or other.real
        self.special += other.special
        return self

    def compact(self) -> None:
        """Shorten the list of floats without changing its sum."""
        try:
            self.floats = _expansion(self.floats)
        except (OverflowError, ValueError):  # too large on the way, or infinities of both signs
            self.special += sum(value for value in self.floats if not math.isfinite(value))
            if not self.special:
                self.exact += sum(map(Fraction, self.floats))
            self.floats = []
        if math.isnan(self.special):
            self.special = math.nan  # always the same bits: inf - inf has the sign set

    def value(self) -> int | float | Fraction:
        """Return the sum: an int of ints, a correctly rounded float as soon as one number was a float."""
        self.compact()
        if self.special:
            return self.special
        if not self.real:
            return self.exact
        if not self.exact:
            return self.floats[0] if self.floats else 0.0
        return _rounded(self.exact + sum(map(Fraction, self.floats)))

    def mean(self) -> float | None:
        """Return the exact sum divided by the count, correctly rounded once; None of nothing."""
        self.compact()
        if not self.count:
            return None
        if self.special:
            return self.special
        return _rounded((self.exact + sum(map(Fraction, self.floats), Fraction())) / self.count)

    def __getstate__(self) -> tuple[Any, ...]:
        self.compact()  # a partial result is a handful of numbers, whatever it was made of
        return self.count, self.exact, self.floats, self.real, self.special

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.count, self.exact, self.floats, self.real, self.special = state
