"""The fold that turns journal entries back into a run's state.

A run *is* its entries: the coordinator decides an entry, applies it here and has it written; a resumed coordinator applies
the written ones again and stands where the first one stood.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from parflow.core.entries import (
    Accepted,
    BarrierOpened,
    Called,
    ChunksListed,
    Compensating,
    Cut,
    Decided,
    Entry,
    Grown,
    Merged,
    Owned,
    PieceEnded,
    Published,
    Redriven,
    RunEnded,
    RunStarted,
    Status,
    Turned,
    Undone,
)
from parflow.core.state import CUT, CallState, StageState, anew, end_piece, list_chunks, pass_barrier, recount, redo
from parflow.model import Address, Failure, GraphFacts, Tally, TaskFacts


@dataclass(slots=True)
class RunState:
    """A run, folded from its entries."""

    started: RunStarted | None = None
    owned: Owned | None = None
    stages: list[StageState] = field(default_factory=list)
    tasks: list[TaskFacts] = field(default_factory=list)
    calls: list[CallState] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    breakers: dict[tuple[int, str], str] = field(default_factory=dict)
    trips: int = 0
    compensating: Compensating | None = None
    undone: int = 0
    stuck: list[Failure] = field(default_factory=list)  # what could not be undone
    status: Status = "running"
    ended: RunEnded | None = None

    def apply(self, entry: Entry) -> None:
        """Take one more entry."""
        match entry:
            case RunStarted():
                self.started = entry
                self._add(GraphFacts(entry.stages, entry.tasks, entry.calls))
            case Owned():
                self.owned, self.status, self.ended = entry, "running", None
                self.breakers.clear()
                self.stuck = [] if self.compensating is not None else self.stuck  # it's tried once more
            case ChunksListed():
                stage = self.stages[entry.stage]
                base = stage.facts.base
                list_chunks(stage, entry, entry.chunks if base is None else self.stages[base[0]].chunks_of(base[1]))
            case PieceEnded():
                end_piece(self.stages[entry.stage], entry)
            case Merged() | BarrierOpened() | Cut() | Published() | Accepted():
                pass_barrier(self.stages[entry.stage], entry)
            case Redriven():
                self._redrive(entry)
            case Compensating():
                self.compensating = entry
            case Undone():
                self.stuck += entry.failures
                self.undone += not entry.failures
                if entry.unit >= 0:
                    self.stages[entry.unit].owed.pop(entry.key, None)
            case Turned():
                self.breakers[entry.unit, entry.step] = entry.to
                self.trips += entry.to == "open"
            case Called() | Grown():
                self._call(self.calls[entry.call], entry)
            case Decided():
                self._decide(entry)
            case RunEnded():
                self.status, self.ended = entry.status, entry

    def _add(self, graph: GraphFacts) -> None:
        fan_in = self.started.fan_in if self.started is not None else 16
        self.stages += [StageState(facts, fan_in) for facts in graph.stages]
        self.tasks += graph.tasks
        self.calls += [CallState(facts) for facts in graph.calls]

    def _redrive(self, entry: Redriven) -> None:
        """Forget what was made of outputs at their deadline or over dead letters, and all that rests on it."""
        for number, output in entry.outputs:
            stage = self.stages[number]
            del stage.cuts[output], stage.leaves[output]
            stage.patient.add(output)
            stage.merged = {node: ref for node, ref in stage.merged.items() if node[:2] != (output, CUT)}
        gone = {*entry.outputs}
        for part in entry.parts:
            redo(self.stages[part.stage], part)
            gone.update((part.stage, output) for output in range(len(self.stages[part.stage].facts.kinds)))
        for number in {part.stage for part in entry.parts}:
            recount(self.stages[number])
            self.stages[number].redrives += 1
        for node in resting_on(self, gone):
            if node < 0:
                self.calls[~node] = CallState(self.calls[~node].facts)
            else:
                self.stages[node] = anew(self.stages[node])

    def _call(self, call: CallState, entry: Called | Grown) -> None:
        call.seconds, call.slot, call.started, call.cancelled = entry.seconds, entry.slot, entry.started, False
        if isinstance(entry, Grown):
            self._add(entry.graph)
            self.codes.append(entry.code)
            call.grown, call.failure = entry.results, None
        else:
            call.results, call.choice, call.failure = entry.results, entry.choice, entry.failure

    def _decide(self, entry: Decided) -> None:
        self.calls[entry.call].decided = entry
        for node in entry.cancelled:
            if node < 0:
                self.calls[~node].cancelled = True
            else:
                self.stages[node].cancelled = True

    @property
    def tally(self) -> Tally:
        """Counts over all stages, dead letters of every kind among the failed."""
        total = Tally()
        for stage in self.stages:
            total += Tally(stage.records, stage.failed, stage.tally.bytes, stage.tally.seconds)
        return total


def resting_on(state: RunState, addresses: set[Address]) -> list[int]:
    """Return the nodes that rest, in any number of steps, on one of some addresses."""
    users: dict[Address, list[int]] = {}
    for number, stage in enumerate(state.stages):
        base = (stage.facts.base,) if stage.facts.base is not None else ()
        for node, item in (*stage.facts.needs, *base):
            users.setdefault((node, item if node >= 0 else 0), []).append(number)
    for number, call in enumerate(state.calls):
        for node, item in (*call.facts.needs, *call.facts.arms, *call.grown):
            users.setdefault((node, item if node >= 0 else 0), []).append(~number)
    found: dict[int, None] = {}
    stack = [*addresses]
    while stack:
        for node in users.get(stack.pop(), ()):
            if node not in found:
                found[node] = None
                outputs = range(-1, len(state.stages[node].facts.kinds)) if node >= 0 else range(1)
                stack += [(node, output) for output in outputs]
    return [*found]


def fold(entries: Iterable[Entry]) -> RunState:
    """Return the state that a sequence of entries leads to."""
    state = RunState()
    for entry in entries:
        state.apply(entry)
    return state
