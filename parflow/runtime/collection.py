"""Our collections beside Dask's other kinds: each result in its own place.

``dask.compute`` and ``client.compute`` group collections by their optimiser and, as of Dask 2026.8, give results back in the
order of the groups: of a bag, a value and another bag, the second bag's result takes the value's place, silently. But an
expression may rewrite what it is a part of. Ours asks, where kinds are mixed, for a computation without those optimisers:
that is one group, in the order in which it was asked for.
"""

from __future__ import annotations

from typing import Any

from dask._expr import HLGExpr, HLGFinalizeCompute, _ExprSequence


class CollectionExpr(HLGExpr):  # type: ignore[misc]
    """What Dask makes of a `Dataset` or a `Value`."""

    def finalize_compute(self) -> Any:
        """Return the expression of the computed result."""
        return ResultExpr(self, self.low_level_optimizer, self.output_keys, self.postcompute)


class ResultExpr(HLGFinalizeCompute):  # type: ignore[misc]
    """A computed result that minds its neighbours."""

    def _simplify_up(self, parent: Any, dependents: Any) -> Any:  # noqa: ARG002 - Dask's signature
        if isinstance(parent, _ExprSequence) and len({_optimizer(part) for part in parent.operands}) > 1:
            return _ExprSequence(*map(_without_optimizer, parent.operands))
        return None


def _optimizer(part: Any) -> Any:
    return part.low_level_optimizer if isinstance(part, HLGExpr) else None


def _without_optimizer(part: Any) -> Any:
    if not isinstance(part, HLGExpr):
        return part
    inner = _without_optimizer(part.dsk) if isinstance(part, HLGFinalizeCompute) else part.dsk
    return type(part)(inner, None, part.output_keys, part.postcompute)


def expression(collection: Any) -> Any:
    """Return the expression of one of our collections."""
    graph, keys = collection.__dask_graph__(), collection.__dask_keys__()
    return CollectionExpr(graph, collection.__dask_optimize__, keys, collection.__dask_postcompute__())
