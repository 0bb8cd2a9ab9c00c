"""Which nodes of a run's graph are wanted, which wait, and for what. Pure bookkeeping over the run's state.

A node is a stage (its number) or a call (``~`` its number). Nothing runs unless it's wanted: the targets are, and what a
wanted node needs; of a choice only the branch that was chosen. What a node gives becomes available at addresses. A node fails
when something that it needs has failed, except for decisions (``settle``, ``race``, ``quorum``), which judge failures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from parflow.core.history import RunState
from parflow.core.state import CallState
from parflow.model import Address


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision over branches that can be taken now: those picked, and for those that failed the node that was to blame."""

    call: int
    picked: tuple[int, ...]
    failed: dict[int, int]


def place(address: Address) -> Address:
    """Return the address that stands for one: a call's results become available together."""
    return (address[0], 0) if address[0] < 0 else address


class Dataflow:
    """The graph of a run, while it runs.

    Parameters
    ----------
    state : RunState
        The run; what stands in it is durable when the dataflow is made.
    roots : iterable of Address
        What the run is for.

    Attributes
    ----------
    ready : deque of int
        Nodes that can start: whoever starts them takes them out.
    verdicts : deque of Verdict
        Decisions that can be taken.
    failed : dict
        Of each failed node, the node that was to blame.
    """

    def __init__(self, state: RunState, roots: Iterable[Address]) -> None:
        self.state = state
        self.roots = {place(address) for address in roots}
        self.ready: deque[int] = deque()
        self.verdicts: deque[Verdict] = deque()
        self.failed: dict[int, int] = {}
        self.wanted: set[int] = set()
        self._available: set[Address] = set()
        self._missing: dict[int, int] = {}
        self._waiters: dict[Address, list[int]] = {}
        self._judged: set[int] = set()
        self._news: deque[tuple[Address, int | None]] = deque()

    # --- what is asked --------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether all that the run is for is available."""
        return self.roots <= self._available

    @property
    def lost(self) -> int | None:
        """The node to blame for a target that can't be had any more, if there is one."""
        return next((self.failed[node] for node, _ in self.roots if node in self.failed), None) if self.failed else None

    def has(self, address: Address) -> bool:
        """Tell whether the value at an address is available."""
        return place(address) in self._available

    # --- what is told ---------------------------------------------------------------------------------------------------

    def want(self, addresses: Iterable[Address]) -> None:
        """Want nodes, and what they need."""
        stack = [*addresses]
        while stack:
            node = stack.pop()[0]
            if node in self.wanted:
                continue
            self.wanted.add(node)
            if node < 0 and self._has_value(self.state.calls[~node]):
                self._news.append(((node, 0), None))
                continue
            needs = self._needs(node)
            missing = {place(address) for address in needs} - self._available
            self._missing[node] = len(missing)
            for address in missing:
                self._waiters.setdefault(address, []).append(node)
                if address[0] in self.failed:
                    self._news.append((address, self.failed[address[0]]))
            stack += needs
            if self._decides(node):
                self._judge(node)
            elif not missing:
                self._arrived(node)
        self._spread()

    def provide(self, address: Address) -> None:
        """Take note that the value at an address is there, durably."""
        self._news.append((place(address), None))
        self._spread()

    def fail(self, node: int) -> None:
        """Take note that a node has failed for good."""
        self._fail(node, node)
        self._spread()

    def renew(self, call: int) -> None:
        """Look again at a call that has chosen its branch, or grown a graph, durably."""
        self.wanted.discard(~call)
        self.want([(~call, 0)])

    def sweep(self, verdict: Verdict) -> tuple[int, ...]:
        """Forget the nodes that nobody wants after a decision, and return those that have not given all that they would."""
        arms = self.state.calls[verdict.call].facts.arms
        kept: set[int] = set()
        stack = [node for node, _ in self.roots]
        while stack:
            node = stack.pop()
            if node not in kept and node in self.wanted:
                kept.add(node)
                if node == ~verdict.call:
                    stack += [arms[arm][0] for arm in verdict.picked]
                elif not (node < 0 and (node, 0) in self._available):
                    stack += [address[0] for address in self._needs(node)]
        gone = self.wanted - kept
        self.wanted = kept
        unfinished = sorted(node for node in gone if node not in self.failed and not self._finished(node))
        for node in unfinished:
            for address in {place(address) for address in self._needs(node)}:
                if node in self._waiters.get(address, ()):
                    self._waiters[address].remove(node)
        self.ready = deque(node for node in self.ready if node in kept)
        self.verdicts = deque(other for other in self.verdicts if ~other.call in kept)
        self._judged &= kept
        return tuple(unfinished)

    # --- how news spread ------------------------------------------------------------------------------------------------

    def _spread(self) -> None:
        """Tell those who wait, and those who wait for them: a queue, since a loop of calls may be thousands deep."""
        while self._news:
            address, blamed = self._news.popleft()
            if blamed is None:
                if address in self._available:
                    continue
                self._available.add(address)
            for node in self._waiters.pop(address, ()):
                if self._decides(node):
                    self._judge(node)
                elif blamed is not None:
                    self._fail(node, blamed)
                else:
                    self._missing[node] -= 1
                    if not self._missing[node]:
                        self._arrived(node)

    def _arrived(self, node: int) -> None:
        if node < 0 and _is_alias(self.state.calls[~node]):
            self._news.append(((node, 0), None))
        else:
            self.ready.append(node)

    def _fail(self, node: int, blamed: int) -> None:
        if node not in self.failed:
            self.failed[node] = blamed
            outputs = len(self.state.stages[node].facts.kinds) if node >= 0 else 1
            self._news.extend(((node, output), blamed) for output in range(-1 if node >= 0 else 0, outputs))

    def _needs(self, node: int) -> tuple[Address, ...]:
        """Return what a node waits for as things stand."""
        if node >= 0:
            stage = self.state.stages[node]
            base = (stage.facts.base,) if stage.facts.base is not None and not stage.closed else ()
            return () if stage.complete else (*stage.facts.needs, *base)
        call = self.state.calls[~node]
        if call.grown:
            return call.grown
        if call.choice is not None:
            return (call.facts.arms[call.choice],)
        if call.decided is not None:
            return tuple(call.facts.arms[arm] for arm in call.decided.picked)
        return call.facts.needs if call.facts.kind in ("call", "choose") else call.facts.arms

    @staticmethod
    def _has_value(call: CallState) -> bool:
        return bool(call.results) or call.decided is not None

    def _finished(self, node: int) -> bool:
        if node < 0:
            return (node, 0) in self._available
        return all((node, output) in self._available for output in range(len(self.state.stages[node].facts.kinds)))

    def _decides(self, node: int) -> bool:
        return node < 0 and self.state.calls[~node].facts.kind in ("settle", "race", "quorum")

    def _judge(self, node: int) -> None:
        call = self.state.calls[~node]
        if node in self._judged or call.decided is not None or node not in self.wanted:
            return
        arms = [place(address) for address in call.facts.arms]
        won = [arm for arm, address in enumerate(arms) if address in self._available]
        lost = {arm: self.failed[address[0]] for arm, address in enumerate(arms) if address[0] in self.failed}
        if call.facts.kind == "settle":
            if len(won) + len(lost) < len(arms):
                return
        elif len(arms) - len(lost) < call.facts.count:
            self._fail(node, min(lost.items())[1])
            return
        elif len(won) < call.facts.count:
            return
        else:
            won = won[: call.facts.count]
        self._judged.add(node)
        self.verdicts.append(Verdict(~node, tuple(won), lost))


def _is_alias(call: CallState) -> bool:
    """Tell whether a call's value is that of another node, which it waits for."""
    return bool(call.grown) or call.choice is not None
