"""Boxes of a drawing never overlap, and its arrows never run through one."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from parflow.views.layout import WIDEST, Layout, Link, lay_out, ranks

Size = tuple[float, float]
Graph = tuple[list[Size], list[Link]]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Make boxes, and arrows from earlier ones to later ones."""
    sizes = draw(st.lists(st.tuples(st.floats(20, 600), st.floats(10, 200)), min_size=1, max_size=14))
    ends = [(start, end) for end in range(len(sizes)) for start in range(end)]
    chosen = draw(st.lists(st.sampled_from(ends), max_size=24, unique=True)) if ends else []
    return sizes, [Link(start, end, draw(st.sampled_from([0.2, 0.5, 0.9]))) for start, end in chosen]


def rectangles(sizes: list[Size], layout: Layout) -> list[tuple[float, float, float, float]]:
    return [(x, y, x + width, y + height) for (width, height), (x, y) in zip(sizes, layout.corners, strict=True)]


@given(graphs())
def test_boxes_stand_apart_and_within_the_drawing(graph: Graph) -> None:
    sizes, links = graph
    layout = lay_out(sizes, links)
    boxes = rectangles(sizes, layout)
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert left > 0
        assert top > 0
        assert right < layout.width
        assert bottom < layout.height
        for other in boxes[number + 1 :]:
            assert left >= other[2] or other[0] >= right or top >= other[3] or other[1] >= bottom


@given(graphs())
def test_an_arrow_leads_down_from_box_to_box_and_through_no_other(graph: Graph) -> None:
    sizes, links = graph
    layout = lay_out(sizes, links)
    boxes = rectangles(sizes, layout)
    for link, way in zip(links, layout.routes, strict=True):
        start, end = boxes[link.start], boxes[link.end]
        assert (way[0].x, way[0].top) == ((start[0] + start[2]) / 2, start[3]) or abs(
            way[0].x - (start[0] + start[2]) / 2
        ) < 1e-6
        assert abs(way[-1].x - (end[0] + (end[2] - end[0]) * link.place)) < 1e-6
        assert way[-1].bottom == end[1]
        for stop in way:
            assert stop.top <= stop.bottom
            for left, top, right, bottom in boxes:  # straight down, beside the boxes of a row
                assert not (left < stop.x < right and top < stop.bottom and stop.top < bottom)
        for before, after in pairwise(way):
            assert before.bottom < after.top
            for _, top, _, bottom in boxes:  # it turns where no row is
                assert bottom <= before.bottom or top >= after.top


@given(graphs())
def test_what_waits_for_something_stands_in_a_row_below_it(graph: Graph) -> None:
    sizes, links = graph
    inputs = [{link.start for link in links if link.end == box} for box in range(len(sizes))]
    rank = ranks(inputs)
    assert all(rank[link.start] < rank[link.end] for link in links)
    tops = [top for _, top, _, _ in rectangles(sizes, lay_out(sizes, links))]
    assert all(tops[link.start] < tops[link.end] for link in links)


def test_what_waits_for_nothing_stands_near_what_waits_for_it() -> None:
    assert ranks([[], [0], [1], [], [2, 3]]) == [0, 1, 2, 2, 3]


def test_arrows_from_one_box_pass_a_row_together_and_so_do_those_to_one() -> None:
    chain = [Link(n, n + 1) for n in range(4)]
    out = lay_out([(50.0, 20.0)] * 5, [*chain, Link(0, 3), Link(0, 4)])
    assert out.routes[4][1] == out.routes[5][1]
    into = lay_out([(50.0, 20.0)] * 5, [*chain, Link(0, 4), Link(1, 4)])
    assert into.routes[4][2:-1] == into.routes[5][1:-1]


def test_rows_that_are_too_wide_are_divided() -> None:
    sizes = [(WIDEST / 4, 20.0)] * 10
    layout = lay_out(sizes, [])
    assert layout.width < 1.2 * WIDEST
    assert len({top for _, top in layout.corners}) == 4


def test_a_drawing_of_nothing_is_small() -> None:
    assert lay_out([], []).corners == []
