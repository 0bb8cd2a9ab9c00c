"""What is there and who wants what, told from a run's entries by plain recursion: the audit's own view of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from parflow.core.history import RunState
from parflow.core.state import CallState
from parflow.model import Address

Key = tuple[int | str, ...]


class Wants:
    """Answers from the entries alone.

    Parameters
    ----------
    state : RunState
        The fold of the entries so far.
    settled : callable
        Tells whether the last entry about all of some things is durable.
    """

    def __init__(self, state: RunState, settled: Callable[..., bool]) -> None:
        self.state, self.settled = state, settled

    @property
    def targets(self) -> tuple[Address, ...]:
        """What the run is for."""
        started = self.state.started
        if started is None:
            raise AssertionError("a run begins with RunStarted")
        every = ((number, output) for number, stage in enumerate(started.stages) for output in range(len(stage.kinds)))
        return started.targets or tuple(every)

    def there(self, addresses: Iterable[Address]) -> bool:
        """Tell whether all values at some addresses are there, durably."""
        return all(self._of_stage(*address) if address[0] >= 0 else self._of_call(~address[0]) for address in addresses)

    def _of_stage(self, number: int, output: int) -> bool:
        stage = self.state.stages[number]
        if output < 0:
            return stage.closed and self.settled(("list", number))
        if not stage.opened or not self.settled(("barrier", number)):
            return False
        match stage.facts.kinds[output]:
            case "collect":
                return True
            case "sink":
                return output in stage.published and self.settled(("published", number, output))
        buckets = range(stage.buckets(output))
        roots = [(output, bucket, stage.depth(output, bucket), 0) for bucket in buckets]
        return all(root in stage.merged and self.settled(("node", number, *root)) for root in roots)

    def _of_call(self, number: int) -> bool:
        call = self.state.calls[number]
        if not self._is_written(call, number):
            return False
        if call.results or call.decided is not None:
            return True
        return self.there(call.grown or (call.facts.arms[call.choice or 0],))

    def _is_written(self, call: CallState, number: int) -> bool:
        made = call.results or call.grown or call.choice is not None or call.decided is not None
        return bool(made) and self.settled(("call", number))

    def wanted(self, *, still: bool = False) -> set[int]:
        """Return the nodes that are wanted: the targets and what they need; ``still``: what needs nothing more left out."""
        found: set[int] = set()
        stack = [*self.targets]
        while stack:
            node = stack.pop()[0]
            if node not in found:
                found.add(node)
                stack += () if still and node < 0 and self._of_call(~node) else self.needs(node)
        return found

    def needs(self, node: int) -> tuple[Address, ...]:
        """Return what a node waits for."""
        if node >= 0:
            stage = self.state.stages[node]
            if stage.complete:
                return ()
            return stage.facts.needs if stage.facts.base is None or stage.closed else (*stage.facts.needs, stage.facts.base)
        call = self.state.calls[~node]
        if call.decided is not None:
            return tuple(call.facts.arms[arm] for arm in call.decided.picked)
        if call.results:
            return ()
        if self._is_written(call, ~node):
            return call.grown or (call.facts.arms[call.choice or 0],)
        return call.facts.needs if call.facts.kind in ("call", "choose") else call.facts.arms

    def rests_on(self, node: int) -> set[int]:
        """Return all nodes that a node may rest on, itself among them."""
        found: set[int] = set()
        stack = [node]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if node >= 0:
                facts = self.state.stages[node].facts
                addresses = (*facts.needs, facts.base) if facts.base is not None else facts.needs
            else:
                call = self.state.calls[~node]
                addresses = (*call.facts.needs, *call.facts.arms, *call.grown)
            stack += [address[0] for address in addresses]
        return found
