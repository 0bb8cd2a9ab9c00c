"""A run's history turned into numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from parflow.core.history import RunState
from parflow.core.state import CallState, StageState
from parflow.model import Failure, Receipt

Cause = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class StageNumbers:
    """A stage in numbers; ``busy`` is seconds of work in all slots, ``wall`` from the first begin to the last end."""

    name: str
    chunks: int
    done: int
    records: int
    failed: int
    bytes: int
    busy: float
    wall: float
    slots: int
    opened: bool
    encodings: dict[str, int]

    @property
    def share(self) -> float:
        """Part of the slots' time that was spent on records."""
        return min(1.0, self.busy / (self.wall * self.slots)) if self.wall and self.slots else 0.0


def stage_numbers(stage: StageState) -> StageNumbers:
    """Count a stage."""
    receipts = [receipt for _, receipt in stage.receipts()]
    begins = [receipt.started for receipt in receipts if receipt.started]
    ends = [receipt.started + receipt.tally.seconds for receipt in receipts if receipt.started]
    return StageNumbers(
        stage.facts.name,
        len(stage.chunks),
        sum(not chunk.pending for chunk in stage.chunks),
        stage.records,
        stage.failed,
        stage.tally.bytes,
        stage.tally.seconds,
        max(ends) - min(begins) if begins else 0.0,
        len({receipt.slot for receipt in receipts}),
        stage.opened,
        dict(stage.encodings),
    )


@dataclass(frozen=True, slots=True)
class CallNumbers:
    """The calls of one task, or the decisions of one kind, in numbers; ``busy`` is seconds of work in all slots."""

    name: str
    calls: int
    made: int
    failed: int
    cancelled: int
    busy: float


def call_numbers(state: RunState) -> list[CallNumbers]:
    """Count the calls of each task, in the order in which the plan has them."""
    groups: dict[str, list[CallState]] = {}
    for call in state.calls:
        name = state.tasks[call.facts.task].name if call.facts.task >= 0 else call.facts.kind
        groups.setdefault(name, []).append(call)
    return [
        CallNumbers(
            name,
            len(calls),
            sum(call.ended and call.failure is None for call in calls),
            sum(call.failure is not None for call in calls),
            sum(call.cancelled for call in calls),
            sum(call.seconds for call in calls),
        )
        for name, calls in groups.items()
    ]


def slowest(state: RunState, most: int = 10) -> list[tuple[str, Receipt]]:
    """Return the pieces that took longest, each with the name of its first input."""
    rows = [
        (stage.chunks[index].chunk.parts[0].path, receipt)
        for stage in state.stages
        for index, receipt in stage.receipts()
        if stage.chunks[index].chunk.parts
    ]
    return sorted(rows, key=lambda row: -row[1].tally.seconds)[:most]


def causes(failures: Iterable[Failure]) -> list[tuple[Failure, int]]:
    """Group dead letters by step, error and message, most frequent first: the first of each group, and how many it has.

    Numbers in messages make no difference.
    """
    groups: dict[Cause, list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.step, failure.error, re.sub(r"\d+", "0", failure.message)), []).append(failure)
    return sorted(((group[0], len(group)) for group in groups.values()), key=lambda cause: -cause[1])
