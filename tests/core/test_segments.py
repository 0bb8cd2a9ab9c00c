"""Segments: each comes back by itself in two reads, and damage is refused wherever it is."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parflow.core.segments import header_size, locate, pack, take
from parflow.errors import StoreError

SEGMENTS = st.lists(st.binary(max_size=30), min_size=1, max_size=12)


class Object:
    """The bytes of an object, and which ranges of it were read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> bytes:
        self.reads.append((start, stop))
        return self.data[start:stop]


@given(SEGMENTS)
def test_every_segment_comes_back_as_it_was_packed(segments: list[bytes]) -> None:
    whole = Object(pack(segments))
    assert [take(whole.read, number, len(segments)) for number in range(len(segments))] == segments


@given(SEGMENTS)
def test_segments_stand_one_after_the_other_behind_the_header(segments: list[bytes]) -> None:
    data, count = pack(segments), len(segments)
    assert data[header_size(count) :] == b"".join(segments)
    places = [locate(data[: header_size(count)], number, count)[:2] for number in range(count)]
    assert [data[start:stop] for start, stop in places] == segments
    assert [start for start, _ in places] == [header_size(count), *(stop for _, stop in places[:-1])]


def test_a_segment_needs_two_reads_and_an_empty_one_only_that_of_the_header() -> None:
    whole = Object(pack([b"one", b"", b"three"]))
    assert take(whole.read, 2, 3) == b"three"
    assert whole.reads == [(0, header_size(3)), (header_size(3) + 3, header_size(3) + 8)]
    whole.reads.clear()
    assert take(whole.read, 1, 3) == b""
    assert whole.reads == [(0, header_size(3))]


def test_the_header_of_a_thousand_segments_is_small() -> None:
    assert header_size(1024) < 25_000


@given(SEGMENTS, st.data())
def test_one_damaged_byte_is_refused_by_whoever_reads_it(segments: list[bytes], data: st.DataObject) -> None:
    count = len(segments)
    packed = bytearray(pack(segments))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    whole = Object(bytes(packed))
    place = header_size(count)
    for number, segment in enumerate(segments):
        if at < header_size(count) or place <= at < place + len(segment):
            with pytest.raises(StoreError, match="not what was written"):
                take(whole.read, number, count)
        else:
            assert take(whole.read, number, count) == segment
        place += len(segment)


@given(SEGMENTS, st.data())
def test_an_object_that_was_cut_never_gives_a_segment_that_was_cut(segments: list[bytes], data: st.DataObject) -> None:
    count, packed = len(segments), pack(segments)
    length = data.draw(st.integers(0, len(packed) - 1))
    whole, place = Object(packed[:length]), header_size(count)
    for number, segment in enumerate(segments):
        place += len(segment)
        if length < header_size(count) or (segment and place > length):
            with pytest.raises(StoreError, match="not what was written"):
                take(whole.read, number, count)
        else:
            assert take(whole.read, number, count) == segment


@given(SEGMENTS, st.integers(1, 12))
def test_an_object_of_another_count_is_refused(segments: list[bytes], count: int) -> None:
    if count != len(segments):
        with pytest.raises(StoreError, match=f"not that of {count} segments"):
            take(Object(pack(segments)).read, 0, count)


@pytest.mark.parametrize("number", [-1, 3, 4])
def test_a_number_that_no_segment_has_is_refused(number: int) -> None:
    with pytest.raises(StoreError, match=f"no segment {number} of 3"):
        take(Object(pack([b"a", b"b", b"c"])).read, number, 3)


def test_the_error_says_which_segment_and_travels() -> None:
    packed = pack([b"abc", b"def"])
    with pytest.raises(StoreError, match=r"segment 1 of 2, bytes 67 to 70, has another digest") as caught:
        take(Object(packed[:-1] + b"g").read, 1, 2)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
