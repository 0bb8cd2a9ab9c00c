"""Files become chunks: every byte once, in order, no heavier than asked, and as early as possible."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parflow.core.partition import MOST_PARTS, FileInfo, partition
from parflow.errors import UsageError
from parflow.model import Chunk, Part, Rejected, chunk_id

sizes = st.integers(0, 400)
listings = st.lists(st.tuples(sizes, st.booleans()), max_size=40).map(
    lambda files: [FileInfo(f"f{i}", size, f"v{i}", splittable) for i, (size, splittable) in enumerate(files)]
)
chunk_sizes = st.integers(1, 200)
costs = st.integers(0, 50)


def chunked(files: list[FileInfo], chunk_bytes: int, open_cost: int) -> list[Chunk]:
    chunks = list(partition(files, chunk_bytes=chunk_bytes, open_cost=open_cost))
    return [chunk for chunk in chunks if isinstance(chunk, Chunk)]


def length(part: Part) -> int:
    return (part.size if part.stop is None else part.stop) - part.start


@given(listings, chunk_sizes, costs)
def test_every_byte_of_every_file_is_in_exactly_one_part_and_order_is_kept(
    files: list[FileInfo], chunk_bytes: int, open_cost: int
) -> None:
    parts = [part for chunk in chunked(files, chunk_bytes, open_cost) for part in chunk.parts]
    for file, group in zip(files, itertools.groupby(parts, lambda part: part.path), strict=True):
        path, ranges = group[0], list(group[1])
        assert (path, ranges[0].start, ranges[-1].stop) == (file.path, 0, None)
        assert all(left.stop == right.start for left, right in itertools.pairwise(ranges))
        assert sum(length(part) for part in ranges) == file.size
        assert {(part.size, part.stamp) for part in ranges} == {(file.size, file.stamp)}


@given(listings, chunk_sizes, costs)
def test_a_chunk_is_no_heavier_than_asked_unless_it_is_one_part(
    files: list[FileInfo], chunk_bytes: int, open_cost: int
) -> None:
    splittable = {file.path for file in files if file.splittable}
    for chunk in chunked(files, chunk_bytes, open_cost):
        assert chunk.weight == sum(length(part) + open_cost for part in chunk.parts)
        assert chunk.weight <= chunk_bytes or len(chunk.parts) == 1
        assert all(length(part) <= chunk_bytes for part in chunk.parts if part.path in splittable)


@given(listings, chunk_sizes, costs)
def test_neighbouring_chunks_of_whole_files_would_not_have_fit_together(
    files: list[FileInfo], chunk_bytes: int, open_cost: int
) -> None:
    for left, right in itertools.pairwise(chunked(files, chunk_bytes, open_cost)):
        if all((part.start, part.stop) == (0, None) for part in (left.parts[-1], right.parts[0])):
            assert left.weight + max(length(right.parts[0]) + open_cost, 1) > chunk_bytes


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_the_ranges_of_a_large_file_are_nearly_equal(size: int, chunk_bytes: int) -> None:
    chunks = chunked([FileInfo("f", size, "", splittable=True)], max(chunk_bytes, size // 1000 + 1), 0)
    lengths = [length(chunk.parts[0]) for chunk in chunks]
    assert max(lengths) - min(lengths) <= 1


@given(listings, chunk_sizes, costs)
def test_chunks_are_numbered_from_zero_and_named_by_their_parts(
    files: list[FileInfo], chunk_bytes: int, open_cost: int
) -> None:
    chunks = chunked(files, chunk_bytes, open_cost)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.id for chunk in chunks] == [chunk_id(chunk.parts) for chunk in chunks]
    assert len({chunk.id for chunk in chunks}) == len(chunks)


def test_a_chunks_identity_does_not_depend_on_what_else_is_read() -> None:
    large = FileInfo("large", 1000, "v", splittable=True)
    alone = chunked([large], 100, 10)
    behind = chunked([FileInfo("other", 95, "", splittable=True), large], 100, 10)
    assert [chunk.id for chunk in behind[1:]] == [chunk.id for chunk in alone]
    assert [chunk.index for chunk in behind[1:]] == [chunk.index + 1 for chunk in alone]


def test_a_changed_stamp_is_another_chunk() -> None:
    before, after = (chunked([FileInfo("f", 5, stamp, splittable=True)], 100, 10) for stamp in ("1", "2"))
    assert before[0].id != after[0].id


def test_a_large_file_that_cannot_be_split_is_a_chunk_of_its_own() -> None:
    files = [FileInfo(name, size, "", splittable=False) for name, size in (("a", 10), ("big", 5000), ("b", 10))]
    assert [[part.path for part in chunk.parts] for chunk in chunked(files, 100, 0)] == [["a"], ["big"], ["b"]]


def test_a_full_chunk_is_given_before_the_next_file_is_listed() -> None:
    listed = 0

    def endless() -> Iterator[FileInfo]:
        nonlocal listed
        for listed in itertools.count(1):
            yield FileInfo(f"f{listed}", 30, "", splittable=True)

    chunks = partition(endless(), chunk_bytes=100, open_cost=20)
    assert listed == 0
    for wanted in range(1, 50):
        chunk = next(chunks)
        assert isinstance(chunk, Chunk)
        assert listed == 2 * wanted


def test_a_large_file_is_cut_lazily() -> None:
    huge = FileInfo("f", 10**18, "", splittable=True)
    first = list(itertools.islice(partition([huge], chunk_bytes=1000), 3))
    assert [chunk.index for chunk in first if isinstance(chunk, Chunk)] == [0, 1, 2]


def test_a_chunk_holds_a_limited_number_of_files() -> None:
    files = [FileInfo(f"f{i}", 0, "", splittable=True) for i in range(2 * MOST_PARTS + 1)]
    assert [len(chunk.parts) for chunk in chunked(files, 10**9, 0)] == [MOST_PARTS, MOST_PARTS, 1]


def test_rejected_inputs_pass_through_and_take_no_number() -> None:
    rejected = Rejected("pipe", "NotAFileError", "a pipe")
    small = FileInfo("a", 1, "", splittable=True)
    items = list(partition([rejected, small, rejected], chunk_bytes=100, open_cost=10))
    assert items[:2] == [rejected, rejected]
    assert [item.index for item in items if isinstance(item, Chunk)] == [0]


def test_no_files_are_no_chunks() -> None:
    assert list(partition([])) == []


@pytest.mark.parametrize(("chunk_bytes", "open_cost"), [(0, 1), (-1, 1), (1, -1)])
def test_senseless_sizes_are_refused_at_once(chunk_bytes: int, open_cost: int) -> None:
    with pytest.raises(UsageError, match="chunk_bytes"):
        partition([], chunk_bytes=chunk_bytes, open_cost=open_cost)
