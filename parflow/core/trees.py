"""The trees of merges in which partial results of a reduction come together.

A tree has a fixed shape: node (level, index) covers the chunks [index, index + 1) * fan_in ** level. Its bits therefore never
depend on the order in which chunks end. Level 0 is the chunks themselves. A keyed reduction has a tree for each bucket.
"""

from __future__ import annotations

from collections.abc import Callable

from parflow.core.history import RunState
from parflow.core.state import CUT, StageState
from parflow.model import MergeJob

REDUCTIONS = ("reduce", "group")
Node = tuple[int, int, int, int, int]
"""Stage, output, bucket, level, index."""


class Trees:
    """Asks for each merge of a run once, as soon as all that it covers is durable.

    Parameters
    ----------
    state : RunState
        The run.
    ask : callable
        Called with a merge that can be made.
    opened : callable
        Tells whether a stage's barrier is open, durably: the last merge waits for it.
    """

    def __init__(self, state: RunState, ask: Callable[[MergeJob], None], opened: Callable[[int], bool]) -> None:
        self.state = state
        self.ask = ask
        self.opened = opened
        self._ready: dict[Node, int] = {}
        self._asked: set[Node] = set()

    def resume(self, number: int) -> None:
        """Count what a stage has durably, at the coordinator's start."""
        stage = self.state.stages[number]
        self._asked.update((number, *node) for node in stage.merged)
        for index, chunk in enumerate(stage.chunks):
            if not chunk.pending:
                self.chunk_ready(number, index)
        for output, bucket, level, index in stage.merged:
            self._ready_under((number, output, bucket, level + 1, index // stage.fan_in))

    def again(self, number: int) -> None:
        """Ask again for what was asked of a stage and never made: its jobs were dropped."""
        merged = self.state.stages[number].merged
        self._asked = {node for node in self._asked if node[0] != number or node[1:] in merged}
        for node in [node for node in self._ready if node[0] == number]:
            self._try(node)

    def chunk_ready(self, number: int, index: int) -> None:
        """Count a chunk that is done, durably, for every reduction of its stage."""
        stage = self.state.stages[number]
        for output, bucket in _reductions(stage):
            self._ready_under((number, output, bucket, 1, index // stage.fan_in))

    def node_ready(self, number: int, output: int, bucket: int, level: int, index: int) -> None:
        """Count a merge that is durable."""
        self._ready_under((number, output, bucket, level + 1, index // self.state.stages[number].fan_in))

    def try_edges(self, number: int) -> None:
        """Look at what a longer list may have released: each level's first node, now sure not to be the root, and its last."""
        stage = self.state.stages[number]
        for output, bucket in _reductions(stage):
            for level in range(1, stage.depth(output) + 1):
                last = max(0, len(stage.chunks) - 1) // stage.fan_in**level
                for index in (0, last):
                    self._try((number, output, bucket, level, index))

    def try_roots(self, number: int) -> None:
        """Ask for the last merges of a stage whose barrier is open."""
        stage = self.state.stages[number]
        for output, bucket in _reductions(stage):
            self._try((number, output, bucket, stage.depth(output), 0))

    def cut(self, number: int, output: int) -> None:
        """Ask for the merges of what was there at an output's deadline."""
        stage = self.state.stages[number]
        for index in range(max(1, -(-len(stage.leaves[output]) // stage.fan_in))):
            self._ask((number, output, CUT, 1, index))

    def _ready_under(self, node: Node) -> None:
        self._ready[node] = self._ready.get(node, 0) + 1
        self._try(node)

    def _try(self, node: Node) -> None:
        """Ask for a merge once all that it covers is durable; for the last one, once the barrier is open too."""
        number, output, bucket, level, index = node
        stage = self.state.stages[number]
        fan_in = stage.fan_in
        if bucket == CUT:
            wanted = min(fan_in, -(-len(stage.leaves[output]) // fan_in ** (level - 1)) - index * fan_in)
            if level <= stage.depth(output, CUT) and self._ready.get(node, 0) >= wanted:
                self._ask(node)
            return
        nodes = -(-len(stage.chunks) // fan_in ** (level - 1))
        wanted = min(fan_in, nodes - index * fan_in)
        top = stage.depth(output) if stage.closed else level + 1
        sure = stage.closed or len(stage.chunks) > fan_in**level
        whole = wanted == fan_in or stage.closed
        if level > top or node in self._asked or not (sure and whole) or self._ready.get(node, 0) < wanted:
            return
        if level == top and (output in stage.cuts or not self.opened(number)):
            return
        self._ask(node)

    def _ask(self, node: Node) -> None:
        number, output, bucket, level, index = node
        if node in self._asked:
            return
        self._asked.add(node)
        stage = self.state.stages[number]
        first, stop = index * stage.fan_in, (index + 1) * stage.fan_in
        if level > 1:
            below = ((output, bucket, level - 1, place) for place in range(first, stop))
            inputs = tuple(stage.merged[place] for place in below if place in stage.merged)
        elif bucket == CUT:
            inputs = stage.leaves[output][first:stop]
        else:
            inputs = stage.results(output, range(first, min(stop, len(stage.chunks))))
        last = level == stage.depth(output, bucket) and (bucket == CUT or stage.closed)
        self.ask(MergeJob(number, output, level, index, inputs, last, bucket))


def _reductions(stage: StageState) -> list[tuple[int, int]]:
    kinds = enumerate(stage.facts.kinds)
    return [(output, b) for output, kind in kinds if kind in REDUCTIONS for b in range(stage.buckets(output))]
