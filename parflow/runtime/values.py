"""Values where they are needed: opened from the references that a batch carries, and put among a function's arguments."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from parflow.core.bindings import Binding
from parflow.model import Ref
from parflow.nodes import Arguments


def unpickle_all(data: bytes) -> Iterator[Any]:
    """Yield the objects pickled one after the other into bytes."""
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        yield pickle.load(stream)


def pickled(value: Any) -> bytes:
    """Pickle a value; by value what belongs to a notebook or a script, which other processes can't import."""
    try:
        return pickle.dumps(value, protocol=5)
    except Exception:  # noqa: BLE001 - whatever it was, the slower way may do
        from parflow.runtime.code import dumps

        return dumps(value)


def load(binding: Binding, store: Any) -> Any:
    """Open a value: a new object each time, which whoever gets it may change."""

    def read(ref: Ref) -> Any:
        return pickle.loads(store.get_checked(ref))

    def read_all(refs: tuple[Ref, ...]) -> list[Any]:
        return [record for ref in refs for record in unpickle_all(store.get_checked(ref))]

    return binding.load(read, read_all)


def filled(arguments: Arguments, bindings: Sequence[Binding], store: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a function's arguments with the values that it needs, in the order of their slots, in their places."""
    return arguments.filled([load(binding, store) for binding in bindings])
