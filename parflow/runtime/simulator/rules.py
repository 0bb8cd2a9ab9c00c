"""How a rule is stated."""

from __future__ import annotations

from collections.abc import Sequence

from parflow.model import Piece


def must(condition: object, rule: str, *what: object) -> None:
    """Raise an AssertionError that states the rule when it is broken."""
    if not condition:
        raise AssertionError(f"{rule}: {', '.join(map(repr, what))}")


def span_of(piece: Piece, records: Sequence[object]) -> range:
    """Return the ordinals of a piece's records."""
    return range(piece.first, max(piece.first, len(records) if piece.stop is None else piece.stop))
