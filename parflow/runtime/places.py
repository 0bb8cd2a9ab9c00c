"""The places of many rows that came together: a few numbers for each stretch of rows, rather than a tuple for each row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

from parflow.runtime.marker import Place


class Places(Sequence[Place]):
    """The places of rows, in stretches: within one, ordinals and offsets count up by ``step`` (0: one place for all of it).

    Examples
    --------
    >>> rows = Places.counting((100, 0, 7, 0), 1_000_000)
    >>> rows[3], len(rows[10:20]), [*rows[999_998:]]
    ((103, 0, 10, 0), 10, [(1000098, 0, 1000005, 0), (1000099, 0, 1000006, 0)])
    """

    __slots__ = ("_runs", "_starts", "_stop")

    def __init__(self, runs: Iterable[tuple[Place, int, int]] = ()) -> None:
        self._runs: list[tuple[Place, int, int]] = []
        self._starts: list[int] = []
        self._stop = 0
        for run in runs:
            self._add(run)

    @classmethod
    def counting(cls, first: Place, count: int) -> Places:
        """Return the places of so many rows that follow each other."""
        return cls([(first, count, 1)])

    @classmethod
    def same(cls, place: Place, count: int) -> Places:
        """Return one place, for so many rows."""
        return cls([(place, count, 0)])

    def _add(self, run: tuple[Place, int, int]) -> None:
        if run[1] > 0:
            self._starts.append(self._stop)
            self._runs.append(run)
            self._stop += run[1]

    def append(self, place: Place) -> None:
        """Add the place of one more row."""
        self._add((place, 1, 0))

    def extend(self, places: Sequence[Place]) -> None:
        """Add the places of more rows."""
        if isinstance(places, Places):
            for run in places._runs:  # noqa: SLF001 - of the same class
                self._add(run)
        else:
            for place in places:
                self.append(place)

    def __len__(self) -> int:
        return self._stop

    @overload
    def __getitem__(self, index: int) -> Place: ...
    @overload
    def __getitem__(self, index: slice) -> Places: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            first, stop, _ = index.indices(self._stop)
            return Places(self._cut(first, stop))
        if not 0 <= index < self._stop:
            raise IndexError(index)
        number = bisect_right(self._starts, index) - 1
        place, _, step = self._runs[number]
        return _moved(place, (index - self._starts[number]) * step)

    def _cut(self, first: int, stop: int) -> Iterator[tuple[Place, int, int]]:
        for start, (place, count, step) in zip(self._starts, self._runs, strict=True):
            low, high = max(first, start), min(stop, start + count)
            if low < high:
                yield _moved(place, (low - start) * step), high - low, step

    def __iter__(self) -> Iterator[Place]:
        for place, count, step in self._runs:
            for number in range(count):
                yield _moved(place, number * step)


def _moved(place: Place, by: int) -> Place:
    return (place[0] + by, place[1], place[2] + by, place[3]) if by else place
