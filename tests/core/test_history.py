from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parflow.core.entries import KINDS, ChunksListed, Entry, Owned, PieceEnded, RunEnded, RunStarted, decode, encode
from parflow.core.history import RunState, fold
from parflow.errors import JournalError
from parflow.model import Chunk, Cursor, Failure, Part, Piece, Receipt, Ref, Rejected, StageFacts, Tally
from parflow.runtime.simulator import ROUGH, random_world
from parflow.runtime.simulator.simulation import Simulation

TEXT = st.text(st.characters(codec="utf-8") | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF), max_size=5)
"""With what stands in a file name for bytes that are not UTF-8."""
NUMBERS = st.integers(-(2**53), 2**53)
LEAVES: dict[Any, st.SearchStrategy[Any]] = {
    Any: TEXT | NUMBERS | st.booleans() | st.none(),
    bool: st.booleans(),
    bytes: st.binary(max_size=5),
    float: st.floats(allow_nan=False, allow_infinity=False),
    int: NUMBERS,
    str: TEXT,
    type(None): st.none(),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotated type, all fields drawn."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        build = typing.cast("type[Any]", hint)
        return st.builds(build, **{field.name: values(hints[field.name]) for field in dataclasses.fields(hint)})
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values, args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.lists(values(args[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, values(args[1]), max_size=2)
    return LEAVES[hint]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_an_entry_survives_its_json_form(kind: type[Any], data: st.DataObject) -> None:
    entry = data.draw(values(kind))
    assert decode(*encode(entry)) == entry


def test_every_kind_of_entry_is_known() -> None:
    assert set(KINDS.values()) == set(typing.get_args(Entry))


def test_an_entry_of_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(JournalError, match=r"'Paused'.*Update parflow"):
        decode("Paused", b"{}")


def test_a_file_name_that_is_not_utf8_can_be_listed() -> None:
    path = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    entry = ChunksListed(0, rejected=(Rejected(path, "UnreadableInputError", "é"),))
    assert decode(*encode(entry)) == entry


def test_fields_with_their_default_are_not_written() -> None:
    kind, body = encode(PieceEnded(0, Piece(3)))
    assert (kind, body) == ("PieceEnded", b'{"stage":0,"piece":{"chunk":3}}')


FACTS = StageFacts("read", ("read",), ("count",), ("reduce",))
STARTED: list[Entry] = [RunStarted("flow", "", (FACTS,), 16), Owned(1, "me", 0)]


def chunk(index: int) -> Chunk:
    return Chunk(index, f"id{index}", (Part(f"f{index}", 0, None, 10, "1"),), 10)


def test_nothing_folds_to_a_run_that_has_not_started() -> None:
    state = fold([])
    assert (state.started, state.stages, state.status) == (None, [], "running")


def test_a_listed_chunk_is_pending_as_one_piece() -> None:
    state = fold([*STARTED, ChunksListed(0, (chunk(0), chunk(1)), (Rejected("x", "E", "m"),), last=True)])
    (stage,) = state.stages
    assert list(stage.pending.values()) == [Piece(0), Piece(1)]
    assert (stage.listed, stage.closed, stage.failed, stage.records, stage.complete) == (3, True, 1, 1, False)


def test_results_stand_in_input_order_whatever_the_order_of_completion() -> None:
    def result(name: str) -> Receipt:
        return Receipt("done", results=(Ref(1, "d", inline=name.encode()),), tally=Tally(1))

    cut = Cursor(2, 0, 2)
    first = Receipt("stopped", cut, results=(Ref(1, "d", inline=b"a"),), tally=Tally(2))
    state = fold(
        [
            *STARTED,
            ChunksListed(0, (chunk(0), chunk(1)), last=True),
            PieceEnded(0, Piece(1), receipt=result("c")),
            PieceEnded(0, Piece(0), rest=(Piece(0, cut, 0, 3), Piece(0, cut, 1)), receipt=first),
            PieceEnded(0, Piece(0, cut, 1), receipt=result("d")),
            PieceEnded(0, Piece(0, cut, 0, 3), receipt=result("b")),
        ]
    )
    assert [ref.inline for ref in state.stages[0].results(0)] == [b"a", b"b", b"d", b"c"]
    assert state.stages[0].complete
    assert state.tally == Tally(5)


def test_failures_of_every_kind_count() -> None:
    failure = Failure("f1:0", "read", "crash", "RecordCrashedError", "died")
    state = fold(
        [
            *STARTED,
            ChunksListed(0, (chunk(0), chunk(1)), (Rejected("x", "E", "m"),), last=True),
            PieceEnded(0, Piece(0), receipt=Receipt("done", tally=Tally(5, failed=2))),
            PieceEnded(0, Piece(1), failure=failure),
        ]
    )
    assert (state.stages[0].failed, state.stages[0].records) == (4, 7)


def test_who_takes_an_ended_run_makes_it_run_again() -> None:
    ended: list[Entry] = [*STARTED, RunEnded("stopped", "RunStoppedError", ("run",))]
    assert fold(ended).status == "stopped"
    again = fold([*ended, Owned(2, "you", 5)])
    assert (again.status, again.ended) == ("running", None)
    assert again.owned == Owned(2, "you", 5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), place=st.floats(0, 1))
def test_a_state_goes_on_from_any_prefix_to_where_the_whole_history_leads(seed: int, place: float) -> None:
    entries = history(seed)
    cut = int(place * len(entries))
    state = fold(entries[:cut])
    for entry in entries[cut:]:
        state.apply(entry)
    assert state == fold(entries)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_prefix_of_a_history_is_a_sound_state(seed: int) -> None:
    state, before = RunState(), Tally()
    for entry in history(seed):
        state.apply(entry)
        for stage in state.stages:
            pieces = [piece.chunk for piece in stage.pending.values()]
            assert [pieces.count(index) for index in range(len(stage.chunks))] == [c.pending for c in stage.chunks]
            assert stage.listed == len(stage.chunks) + len(stage.rejected)
            assert stage.tally.records == sum(receipt.tally.records for _, receipt in stage.receipts())
            assert stage.complete or not stage.opened
            assert stage.failed <= stage.records
        assert state.tally.records >= before.records
        before = state.tally
    assert state.ended is not None
    assert state.status == "succeeded" or state.ended.error in (
        "CallFailedError",
        "TooManyFailuresError",
    )  # a world that has to fail


def history(seed: int) -> list[Entry]:
    """The entries of a simulated run with all kinds of faults."""
    simulation = Simulation(random_world(seed), seed, ROUGH, audit=False)
    simulation.run()
    return [decode(*entry) for entry in simulation.journal]
