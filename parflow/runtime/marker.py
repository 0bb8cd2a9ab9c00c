"""The marker: twelve 64-bit words, shared with whoever supervises, that say which record is in hand."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import TypeAlias

STOP, JOB, ORDINAL, PART, OFFSET, STEP, CALL, HELD, SPOKE, SINCE, ARMED, LATE = range(12)
"""Please stop; number of the job in hand (from 1); the record's place; step in hand; calls begun; who else is in hand; whose
output (ordinal + 1) the child's file ends with, and where it begins there; whether a call may be told that it takes too long;
the number of the call that does.

While ``HELD`` is not 0, other records are in hand and the named one is only the first suspect: what ends the child is
held against none of them before it has run alone.
"""
WORDS = 12

YIELD, LEAVE = 1, 2
"""Values of ``STOP``: come back at the next record; or at once, since nobody waits for the batch any more."""

GUESS, KEPT = 1, 2
"""Bits of ``HELD``: the record may be another one of its batch or window; a step keeps records while the next is read."""

READING, DECODING, CLOSING, WAITING = 0, 2**16, 2**16 + 1, 2**16 + 2
"""Steps that are no step: the next record is being read; the one in hand is being decoded; results are being written; the one
in hand waits for its next attempt, or its turn."""

Marker: TypeAlias = MutableSequence[int]
Place: TypeAlias = tuple[int, int, int, int]
"""Which record something belongs to: its ordinal, part and offset; and whether that is a guess."""


class Late(BaseException):
    """The call in hand takes longer than it may: raised within it. Not an Exception: no step swallows it."""


def late(marker: Marker) -> None:
    """Raise in the call that the supervisor means, if that is still in hand."""
    if marker[ARMED] and marker[CALL] == marker[LATE]:
        raise Late


def take(marker: Marker) -> Place:
    """Return the place in hand, for a record that is kept for later."""
    return marker[ORDINAL], marker[PART], marker[OFFSET], marker[HELD] & GUESS


def put(marker: Marker, place: Place) -> None:
    """Take a record in hand again."""
    marker[ORDINAL], marker[PART], marker[OFFSET], marker[HELD] = place
