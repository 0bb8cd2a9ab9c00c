"""How a piece of a chunk is split when it ends early, or around what ended its process."""

from __future__ import annotations

from parflow.model import Cursor, Piece


def rest_of(piece: Piece, at: Cursor) -> tuple[Piece, ...]:
    """Return what of a piece begins at a cursor."""
    return () if piece.stop is not None and at.ordinal >= piece.stop else (Piece(piece.chunk, at, 0, piece.stop),)


def around(piece: Piece, at: Cursor, *, alone: bool, earlier: tuple[tuple[str, str], ...] = ()) -> tuple[Piece, ...]:
    """Split a piece around the record at a cursor: what lies before, the record ``alone`` or not at all, what lies behind."""
    before = (Piece(piece.chunk, piece.start, piece.skip, at.ordinal),) if at.ordinal > piece.first else ()
    passed, here = 0, piece.start
    if at.ordinal < piece.first or (at.part, at.offset) == (here.part, here.offset):
        # It died on its way to its first record, which is the one meant; or the record's number is known but not its place.
        at, passed = here, max(piece.skip, at.ordinal - here.ordinal)
    behind = at.ordinal + passed + 1
    suspect = (Piece(piece.chunk, at, passed, behind, True, earlier),) if alone else ()
    after = () if piece.stop is not None and behind >= piece.stop else (Piece(piece.chunk, at, passed + 1, piece.stop),)
    return before + suspect + after


def without_part(piece: Piece, at: Cursor, parts: int) -> tuple[Piece, ...]:
    """Split a piece around what is left of the part at a cursor: one dead letter stands for it, whatever it holds."""
    before = (Piece(piece.chunk, piece.start, piece.skip, at.ordinal),) if at.ordinal > piece.first else ()
    behind = max(at.ordinal, piece.first) + 1
    ends = at.part + 1 >= parts or (piece.stop is not None and behind >= piece.stop)
    return before + (() if ends else (Piece(piece.chunk, Cursor(behind, at.part + 1), 0, piece.stop),))
