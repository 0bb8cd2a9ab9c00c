"""Where the boxes of a drawing stand and how the arrows between them run: rows from the top down (Sugiyama's way).

What waits for something stands below it. An arrow that passes a row has a place of its own in it, and turns only between rows:
so it never runs through a box.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

MARGIN, ACROSS, BETWEEN = 12.0, 26.0, 46.0
"""Pixels around the drawing, between boxes of a row, and between rows."""
LANE = 6.0
"""Pixels that a passing arrow takes of a row."""
WIDEST = 1500.0
"""Pixels of a row, at the most, if its boxes can stand in several."""
SWEEPS, SETTLES = 8, 32
"""How often rows are put in order, and how often boxes are moved towards what they are joined with."""
STRAIGHT = 24.0
"""How much more it matters that an arrow passes rows in a straight line than that a box stands below what it waits for."""


@dataclass(frozen=True, slots=True)
class Link:
    """An arrow between two boxes; ``place`` is where on the width of the second one it arrives, 0.5 for its middle."""

    start: int
    end: int
    place: float = 0.5


@dataclass(frozen=True, slots=True)
class Stop:
    """A row on an arrow's way, where it runs straight down from ``top`` to ``bottom``."""

    x: float
    top: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Layout:
    """The left upper corner of each box, the way of each link, and the size of the whole (pixels)."""

    corners: list[tuple[float, float]]
    routes: list[list[Stop]]
    width: float
    height: float


def ranks(inputs: Sequence[Collection[int]]) -> list[int]:
    """Return the row of each node: below all that it waits for, and not far above what waits for it.

    Parameters
    ----------
    inputs : sequence of collections
        The numbers of the nodes that each one waits for; without circles.

    Examples
    --------
    >>> ranks([[], [0], [1], [], [2, 3]])
    [0, 1, 2, 2, 3]
    """
    users: list[list[int]] = [[] for _ in inputs]
    for node, others in enumerate(inputs):
        for other in others:
            users[other].append(node)
    waiting = [len(others) for others in inputs]
    order = [node for node, count in enumerate(waiting) if not count]
    rank = [0] * len(inputs)
    for node in order:  # it grows while it is gone through
        after = rank[node] + 1
        for user in users[node]:
            rank[user] = max(rank[user], after)
            waiting[user] -= 1
            if not waiting[user]:
                order.append(user)
    for node in reversed(order):
        if users[node] and len(inputs[node]) <= len(users[node]):  # arrows get no longer by it
            rank[node] = min(rank[user] for user in users[node]) - 1
    return rank


def lay_out(sizes: Sequence[tuple[float, float]], links: Sequence[Link]) -> Layout:
    """Place boxes and arrows.

    Parameters
    ----------
    sizes : sequence of pairs
        Width and height of each box, in pixels.
    links : sequence of Link
        What leads from box to box; without circles.

    Returns
    -------
    Layout
        No box overlaps another one, and no arrow runs through one.

    Examples
    --------
    >>> lay_out([(50, 20), (50, 20)], [Link(0, 1)]).corners
    [(12.0, 12.0), (12.0, 78.0)]
    """
    if not sizes:
        return Layout([], [], 2 * MARGIN, 2 * MARGIN)
    grid = _Grid.of(sizes, links)
    grid.order()
    grid.settle()
    grid.close_up()
    tops = [MARGIN]
    heights = [max(grid.heights[cell] for cell in row) for row in grid.rows]
    for height in heights[:-1]:
        tops.append(tops[-1] + height + BETWEEN)
    left = min(grid.xs[cell] - grid.widths[cell] / 2 for row in grid.rows for cell in row) - MARGIN
    right = max(grid.xs[cell] + grid.widths[cell] / 2 for row in grid.rows for cell in row) + MARGIN
    row_of = grid.row_of

    def top_of(box: int) -> float:
        return tops[row_of[box]] + (heights[row_of[box]] - grid.heights[box]) / 2

    def stop(cell: int, x: float) -> Stop:
        top = tops[row_of[cell]]
        return Stop(x - left, top, top + heights[row_of[cell]])

    routes = []
    for link, lanes in zip(links, grid.lanes, strict=True):
        first, last = stop(link.start, grid.xs[link.start]), stop(link.end, grid.port(link.end, link.place))
        begin = Stop(first.x, top_of(link.start) + grid.heights[link.start], first.bottom)
        end = Stop(last.x, last.top, top_of(link.end))
        routes.append([begin, *(stop(lane, grid.xs[lane]) for lane in lanes), end])
    corners = [(grid.xs[box] - grid.widths[box] / 2 - left, top_of(box)) for box in range(len(sizes))]
    return Layout(corners, routes, right - left, tops[-1] + heights[-1] + MARGIN)


@dataclass
class _Grid:
    """Boxes and lanes (``cells``) in rows; what leads from a row to the next one goes from cell to cell."""

    widths: list[float]
    heights: list[float]
    row_of: list[int]
    boxes: int
    rows: list[list[int]] = field(default_factory=list)
    lanes: list[list[int]] = field(default_factory=list)
    below: list[list[tuple[int, float]]] = field(default_factory=list)
    above: list[list[tuple[int, float]]] = field(default_factory=list)
    xs: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, sizes: Sequence[tuple[float, float]], links: Sequence[Link]) -> _Grid:
        inputs: list[set[int]] = [set() for _ in sizes]
        for link in links:
            inputs[link.end].add(link.start)
        grid = cls([width for width, _ in sizes], [height for _, height in sizes], _narrow(ranks(inputs), sizes), len(sizes))
        grid.rows = [[] for _ in range(max(grid.row_of) + 1)]
        grid.below, grid.above = [[] for _ in sizes], [[] for _ in sizes]
        for box, row in enumerate(grid.row_of):
            grid.rows[row].append(box)
        lanes: dict[tuple[object, int], int] = {}
        leaving, arriving = Counter(link.start for link in links), Counter((link.end, link.place) for link in links)
        for link in links:
            fans_out = leaving[link.start] >= arriving[link.end, link.place]
            bundle: object = link.start if fans_out else (link.end, link.place)
            way = [grid._lane(lanes, bundle, row) for row in range(grid.row_of[link.start] + 1, grid.row_of[link.end])]
            grid.lanes.append(way)
            for start, end in zip([link.start, *way], [*way, link.end], strict=True):
                step = (end, link.place if end == link.end else 0.5)
                if step not in grid.below[start]:
                    grid.below[start].append(step)
                    grid.above[end].append((start, step[1]))
        return grid

    def _lane(self, lanes: dict[tuple[object, int], int], bundle: object, row: int) -> int:
        """Return the cell in which all arrows of a bundle, which come from one box or go to one, pass a row."""
        if (bundle, row) not in lanes:
            lanes[bundle, row] = len(self.widths)
            self.rows[row].append(len(self.widths))
            self.widths.append(LANE)
            self.heights.append(0.0)
            self.row_of.append(row)
            self.below.append([])
            self.above.append([])
        return lanes[bundle, row]

    # --- the order in a row -----------------------------------------------------------------------------------------------

    def order(self) -> None:
        """Order the rows by the middles of what their cells are joined with, and keep the order with the fewest crossings."""
        best, fewest = [row[:] for row in self.rows], self._crossings()
        for sweep in range(SWEEPS):
            if not fewest:
                break
            down = sweep % 2 == 0
            place = self._places()
            for row in self.rows if down else reversed(self.rows):
                middles = {cell: self._middle(cell, place, down) for cell in row}
                row.sort(key=middles.__getitem__)
                place.update((cell, float(at)) for at, cell in enumerate(row))
            if (crossings := self._crossings()) < fewest:
                best, fewest = [row[:] for row in self.rows], crossings
        self.rows = best

    def _places(self) -> dict[int, float]:
        return {cell: float(at) for row in self.rows for at, cell in enumerate(row)}

    def _middle(self, cell: int, place: dict[int, float], down: bool) -> float:
        joined = [place[other] for other, _ in self.above[cell]]
        if not down:
            joined = [place[other] + at - 0.5 for other, at in self.below[cell]]
        return sum(joined) / len(joined) if joined else place[cell]

    def _crossings(self) -> int:
        place, count = self._places(), 0
        for row in self.rows:
            ends: list[float] = []
            for cell in row:
                own = sorted(place[other] + at for other, at in self.below[cell])
                count += sum(len(ends) - bisect_right(ends, end) for end in own)
                for end in own:
                    insort(ends, end)
        return count

    # --- the place in a row -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Move all cells towards what they are joined with, lanes most of all, as far as there is room."""
        self.xs = [0.0] * len(self.widths)
        for row in self.rows:
            self._spread(row, above=False, below=False)
        for turn in range(SETTLES):
            down, last = turn % 2 == 0, turn >= SETTLES - 2
            for row in self.rows if down else reversed(self.rows):
                self._spread(row, above=down or last, below=not down or last)

    def close_up(self) -> None:
        """Take away the space that no row uses."""
        cells = sorted(range(len(self.xs)), key=lambda cell: self.xs[cell] - self.widths[cell] / 2)
        shift, right = 0.0, self.xs[cells[0]]
        for cell in cells:
            left = self.xs[cell] - self.widths[cell] / 2
            shift += max(0.0, left - right - ACROSS)
            right = max(right, left + self.widths[cell])
            self.xs[cell] -= shift

    def port(self, cell: int, place: float) -> float:
        """Return where an arrow arrives at a cell."""
        return self.xs[cell] + (place - 0.5) * self.widths[cell]

    def _wish(self, cell: int, *, above: bool, below: bool) -> tuple[float, float]:
        """Return where a cell would best be, and how much it matters: lanes are to be straight."""
        total, weight = 0.0, 0.0
        wishes = [(o, self.xs[o] - (at - 0.5) * self.widths[cell]) for o, at in self.above[cell]] if above else []
        wishes += [(o, self.port(o, at)) for o, at in self.below[cell]] if below else []
        for other, wish in wishes:
            own = STRAIGHT if cell >= self.boxes and other >= self.boxes else 1.0
            total, weight = total + own * wish, weight + own
        return (total / weight, weight) if weight else (self.xs[cell], 0.5)

    def _spread(self, row: list[int], *, above: bool, below: bool) -> None:
        """Put a row's cells where their squared distances from what they wish for are least (isotonic regression)."""
        offset, offsets = 0.0, []
        for at, cell in enumerate(row):
            if at:
                before = row[at - 1]
                lanes = (before >= self.boxes) + (cell >= self.boxes)
                offset += (self.widths[before] + self.widths[cell]) / 2 + ACROSS / (1 + lanes)
            offsets.append(offset)
        blocks: list[tuple[float, float, int]] = []  # sum of wishes, of weights, and how many cells
        for cell, own in zip(row, offsets, strict=True):
            best, weight = self._wish(cell, above=above, below=below)
            block = ((best - own) * weight, weight, 1)
            while blocks and blocks[-1][0] / blocks[-1][1] >= block[0] / block[1]:
                other = blocks.pop()
                block = (block[0] + other[0], block[1] + other[1], block[2] + other[2])
            blocks.append(block)
        middles = [total / weight for total, weight, count in blocks for _ in range(count)]
        for cell, middle, own in zip(row, middles, offsets, strict=True):
            self.xs[cell] = middle + own


def _narrow(rank: Iterable[int], sizes: Sequence[tuple[float, float]]) -> list[int]:
    """Give rows numbers without gaps, and divide those that are too wide."""
    members: dict[int, list[int]] = {}
    for box, row in enumerate(rank):
        members.setdefault(row, []).append(box)
    rows, row = [0] * len(sizes), -1
    for _, boxes in sorted(members.items()):
        width = WIDEST
        for box in boxes:
            if width + sizes[box][0] > WIDEST:
                row, width = row + 1, 0.0
            rows[box] = row
            width += sizes[box][0] + ACROSS
    return rows
