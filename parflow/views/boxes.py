"""What the picture of a plan consists of: boxes for stages, calls and decisions, and arrows between them.

Calls of one task that stand in one row and have the same users are one box, however many they are; so are many equal stages,
and the rounds of a loop. A plan of ten thousand calls has a handful of boxes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from parflow.core.explain import call_in_words, call_name, kept, label, output_in_words, source_in_words, tree
from parflow.core.history import RunState
from parflow.core.plan import Call, Plan, Stage, Step
from parflow.core.state import CallState, StageState
from parflow.model import Address
from parflow.views.layout import ranks
from parflow.views.words import counted

ALIKE = 4
"""Equal stages, decisions or rounds that are drawn one by one; more of them are drawn once."""
MOST_ARMS = 8
"""Arms of a decision that arrive apart from each other, each with its word."""
MOST_BOXES, MOST_ROWS = 100, 40
"""Boxes of a picture, and rows of a stage's box, at the most; of what is left, only how much it is."""
LONGEST_ROUND = 24
"""Boxes that a round has at the most, to be found again."""

Ends = tuple[int, int, int]
"""Of an arrow: its first box, its second one, and the number of the arm that it is (`NEED`, `ARMS`: none, one of many)."""
NEED, ARMS = -1, -2


@dataclass(frozen=True, slots=True)
class Row:
    """A line in a stage's box: a step, or an output, which is a barrier; ``parent`` is the place of the row before it."""

    text: str
    aside: str
    depth: int
    parent: int
    barrier: bool


@dataclass(slots=True)
class Box:
    """What is drawn as one: ``members`` are its nodes, ``arms`` the words at a decision's arms, if they are told apart."""

    kind: str
    head: str
    aside: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    title: list[str] = field(default_factory=list)
    arms: list[str] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    css: str = ""
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Arrow:
    """What one box waits for from another one."""

    start: int
    end: int
    arm: int
    title: str
    css: str = ""


def boxes_of(plan: Plan, state: RunState | None) -> tuple[list[Box], list[Arrow]]:
    """Return the boxes of a plan, each after what it waits for, and the arrows; both say how a run stands, if one is given."""
    nodes = _Nodes(plan)
    groups, rounds = _rounds(nodes, _groups(nodes))
    rest = [node for group in groups[MOST_BOXES:] for node in group]
    boxes = [_box(nodes, group, rounds.get(group[0], (1, 0))) for group in groups[:MOST_BOXES]]
    if rest:
        boxes.append(_rest(nodes, rest))
    box_of = _box_of([box.members for box in boxes], len(nodes.inputs))
    if state is not None:
        for box in boxes:
            _mark(box, nodes, state)
    return boxes, [*_arrows(nodes, boxes, box_of, state)]


class _Nodes:
    """A plan's stages and calls, numbered in one series, stages first."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.first_call = len(plan.stages)
        self.inputs: list[set[int]] = []
        self.users: list[list[tuple[int, int]]] = [[] for _ in range(self.first_call + len(plan.calls))]
        for stage in plan.stages:
            self._add((*stage.needs, stage.base) if stage.base is not None else stage.needs, ())
        for call in plan.calls:
            self._add(call.facts.needs, call.facts.arms)

    def _add(self, needs: Sequence[Address], arms: Sequence[Address]) -> None:
        node, of = len(self.inputs), self.of
        joined = set(map(of, needs))
        for other in joined:
            self.users[other].append((node, NEED))
        for arm, address in enumerate(arms):
            joined.add(of(address))
            self.users[of(address)].append((node, arm if len(arms) <= MOST_ARMS else ARMS))
        self.inputs.append(joined)

    def of(self, address: Address) -> int:
        return address[0] if address[0] >= 0 else self.first_call + ~address[0]

    def stage(self, node: int) -> Stage | None:
        return self.plan.stages[node] if node < self.first_call else None

    def call(self, node: int) -> Call:
        return self.plan.calls[node - self.first_call]

    def is_call(self, node: int) -> bool:
        """Tell a call from a stage and from a decision."""
        return node >= self.first_call and self.call(node).facts.kind == "call"

    def word(self, node: int) -> tuple[object, ...]:
        """Return what is equal for nodes that look alike."""
        if node < self.first_call:
            stage = self.plan.stages[node]
            return (stage.source.name, *((row.text, row.depth) for row in _rows(self.plan, stage)))
        call = self.call(node)
        return (call.name, call.facts.kind, call.facts.count, len(call.facts.arms))

    def given(self, user: int, node: int) -> str:
        """Name what a node gives to one that uses it."""
        stage = self.stage(user)
        if stage is not None:
            addresses = (*stage.needs, *([stage.base] if stage.base is not None else []))
        else:
            addresses = (*self.call(user).facts.needs, *self.call(user).facts.arms)
        return ", ".join(dict.fromkeys(label(self.plan, address) for address in addresses if self.of(address) == node))


# --- which nodes are drawn as one -----------------------------------------------------------------------------------------


def _box_of(groups: Sequence[Sequence[int]], nodes: int) -> list[int]:
    box_of = [0] * nodes
    for number, group in enumerate(groups):
        for node in group:
            box_of[node] = number
    return box_of


def _groups(nodes: _Nodes) -> list[list[int]]:
    """Put nodes together that are equal, stand in one row and have the same users; return them from the top down."""
    rows: dict[int, list[int]] = {}
    for node, row in enumerate(ranks(nodes.inputs)):
        rows.setdefault(row, []).append(node)
    found: list[list[int]] = []  # from the bottom up: users are known first
    box_of = [0] * len(nodes.inputs)
    for _, row_nodes in sorted(rows.items(), reverse=True):
        alike: dict[object, list[int]] = {}
        for node in row_nodes:
            users = frozenset([(box_of[user], arm) for user, arm in nodes.users[node]])
            alike.setdefault((nodes.word(node), users), []).append(node)
        made: list[list[int]] = []
        for group in alike.values():
            made += [group] if nodes.is_call(group[0]) or len(group) > ALIKE else [[node] for node in group]
        for group in sorted(made, reverse=True):
            for node in group:
                box_of[node] = len(found)
            found.append(group)
    return found[::-1]


def _rounds(nodes: _Nodes, groups: list[list[int]]) -> tuple[list[list[int]], dict[int, tuple[int, int]]]:
    """Put the rounds of a loop together: boxes of calls, one after the other, that come again and again.

    Returns the boxes that are left, and by the first node of those that came again: how often, and the boxes of a round.
    """
    box_of = _box_of(groups, len(nodes.inputs))
    before = [{box_of[other] for node in group for other in nodes.inputs[node]} for group in groups]
    after: list[set[int]] = [set() for _ in groups]
    for box, others in enumerate(before):
        for other in others:
            after[other].add(box)
    words = [(len(group), nodes.word(group[0])) for group in groups]
    gone: set[int] = set()
    rounds: dict[int, tuple[int, int]] = {}
    plain = [nodes.is_call(group[0]) for group in groups]
    onward: dict[int, int] = {}
    for box, others in enumerate(before):
        if len(others) == 1 and plain[box] and plain[other := next(iter(others))] and len(after[other]) == 1:
            onward[other] = box
    for start in {*range(len(groups))} - {*onward.values()}:
        chain = [start]
        while chain[-1] in onward:
            chain.append(onward[chain[-1]])
        for first, period, times in _repeats([words[box] for box in chain]):
            for place in range(period):
                copies = chain[first + place : first + period * times : period]
                gone.update(copies[1:])
                groups[copies[0]] = [node for box in copies for node in groups[box]]
                rounds[groups[copies[0]][0]] = (times, period)
    return [group for box, group in enumerate(groups) if box not in gone], rounds


def _repeats(words: Sequence[object]) -> Iterator[tuple[int, int, int]]:
    """Yield where a part of a series begins that comes more than `ALIKE` times in a row, how long it is, and how many times."""
    at = 0
    while at < len(words):
        for period in range(1, min(LONGEST_ROUND, (len(words) - at) // (ALIKE + 1)) + 1):
            end = at + period
            while end < len(words) and words[end] == words[end - period]:
                end += 1
            times = (end - at) // period
            if times > ALIKE:
                yield at, period, times
                at += period * times
                break
        else:
            at += 1


# --- boxes ----------------------------------------------------------------------------------------------------------------


def _box(nodes: _Nodes, group: list[int], rounds: tuple[int, int]) -> Box:
    plan, first, (times, period) = nodes.plan, group[0], rounds
    stage = nodes.stage(first)
    if stage is not None:
        many = f"{len(group):,} stages: {stage.source.name}"
        head = f"stage {first}: {source_in_words(plan, stage)}" if len(group) == 1 else many
        rows = [*_rows(plan, stage)]
        if len(rows) > MOST_ROWS:
            last = rows[MOST_ROWS - 1]
            more = f"… and {len(rows) - MOST_ROWS + 1:,} more"
            rows[MOST_ROWS - 1 :] = [Row(more, "", last.depth, last.parent, barrier=False)]
        title = [head, *(f"{'  ' * (row.depth + 1)}{row.text} {row.aside}".rstrip() for row in rows)]
        return Box("stage", head, rows=rows, title=title, members=group)
    call = nodes.call(first)
    facts = call.facts
    alone, each = len(group) == 1, len(group) // times
    head = call_name(call) if each == 1 else f"{each:,} x {call_name(call)}"
    box = Box("call" if facts.kind == "call" else "decision", head, members=group)
    if period == 1:
        box.notes.append(f"{times:,} times, one after the other")
    elif times > 1:
        box.notes.append(f"in each of {times:,} rounds")
    if alone:
        box.aside = _given(plan, facts.needs)
        box.title = [f"call {first - nodes.first_call}: {call_in_words(plan, call)}"]
    if facts.kind != "call" and len(facts.arms) <= MOST_ARMS:
        box.arms = _arm_words(call)
    elif facts.arms:
        box.notes.append(counted(len(facts.arms), "arm"))
    return box


def _rest(nodes: _Nodes, members: list[int]) -> Box:
    stages = sum(node < nodes.first_call for node in members)
    counts = {"stage": stages, "call": len(members) - stages}
    words = " and ".join(counted(count, f"more {what}") for what, count in counts.items() if count)
    return Box("call", f"… {words}", members=members)


def _rows(plan: Plan, stage: Stage) -> Iterator[Row]:
    for depth, parent, part in tree(stage):
        if isinstance(part, Step):
            aside = f"{_given(plan, part.needs)}{part.manner}".strip()
            yield Row(f"{part.kind} {part.task.name}", aside, depth, parent, barrier=False)
        else:
            yield Row(output_in_words(part), f"→ {kept(part)}", depth, parent, barrier=True)


def _given(plan: Plan, needs: Iterable[Address]) -> str:
    names = [*dict.fromkeys(label(plan, need).split(" (")[0] for need in needs)]
    return f"({', '.join([*names[:3], *['…'] * (len(names) > 3)])})" if names else ""


def _arm_words(call: Call) -> list[str]:
    """Say at each arm of a decision when it is taken."""
    arms = len(call.facts.arms)
    if call.facts.kind == "choose" and call.name == "when":
        return ["then", "else"][:arms]
    if call.facts.kind == "choose" and len(call.arguments.args) == 2 and isinstance(call.arguments.args[1], list):
        cases = [case if isinstance(case, str) else f"{case!r:.20}" for case in call.arguments.args[1]]
        return [*cases, "else"][:arms] if len(cases) == arms - 1 else []
    return [str(arm + 1) for arm in range(arms)]


# --- arrows ---------------------------------------------------------------------------------------------------------------


def _arrows(nodes: _Nodes, boxes: list[Box], box_of: list[int], state: RunState | None) -> Iterator[Arrow]:
    found: dict[Ends, tuple[int, int]] = {}
    for node, users in enumerate(nodes.users):
        start = box_of[node]
        for user, arm in users:
            if start < (end := box_of[user]):  # else from one round of a loop to the next
                found.setdefault((start, end, arm), (node, user))
    for (start, end, arm), (node, user) in found.items():
        box = boxes[end]
        css = "" if arm == NEED else "arm"
        if css and state is not None and len(box.members) == 1:
            taken = _taken(state.calls[user - nodes.first_call])
            css = "arm" if taken is None or arm == ARMS else "arm chosen" if arm in taken else "arm idle"
        word = f"{box.arms[arm]}: " if arm >= 0 and arm < len(box.arms) else ""
        given = nodes.given(user, node) if len(boxes[start].members) == 1 else boxes[start].head
        yield Arrow(start, end, arm, f"{word}{given} → {box.head}", css)


def _taken(call: CallState) -> tuple[int, ...] | None:
    """Return which arms of a decision were taken; None before it is."""
    if call.choice is not None:
        return (call.choice,)
    return None if call.decided is None else call.decided.picked


# --- how a run stands -----------------------------------------------------------------------------------------------------


def _mark(box: Box, nodes: _Nodes, state: RunState) -> None:
    stages = [state.stages[node] for node in box.members if node < nodes.first_call]
    calls = [state.calls[node - nodes.first_call] for node in box.members if node >= nodes.first_call]
    word = "decided" if box.kind == "decision" else "run"
    never = f"not yet {word}" if state.status == "running" else f"not {word}"
    if stages:
        _mark_stages(box, stages, never, ended=state.status == "failed")
    if calls:
        _mark_calls(box, calls, never)


def _mark_stages(box: Box, stages: list[StageState], never: str, *, ended: bool) -> None:
    begun = [stage for stage in stages if (stage.closed or stage.chunks) and not stage.cancelled]
    if not begun:
        box.css, box.notes = "idle", [*box.notes, "cancelled" if all(stage.cancelled for stage in stages) else never]
        return
    done, chunks = 0, 0
    for stage in begun:
        chunks += len(stage.chunks)
        done += sum(not chunk.pending for chunk in stage.chunks)
    failed = sum(stage.failed for stage in begun)
    opened = sum(stage.opened for stage in begun)
    listed = all(stage.closed for stage in begun)
    gate = ("open" if opened else "closed") if len(stages) == 1 else f"open in {opened:,} of {len(stages):,}"
    box.notes.append(f"{done:,} of {counted(chunks, 'chunk')}{'' if listed else ' so far'}, barrier {gate}")
    if failed:
        box.notes.append(counted(failed, "dead letter"))
    for stage in begun[:ALIKE]:
        box.notes += [f"{stage.facts.outputs[at]}: opened with {cut.share:.0%} of the input" for at, cut in stage.cuts.items()]
    box.share = done / chunks if chunks else float(listed)
    box.css = "failed" if failed and ended and opened < len(stages) else ""


def _mark_calls(box: Box, calls: list[CallState], never: str) -> None:
    failed, cancelled = sum(call.failure is not None for call in calls), sum(call.cancelled for call in calls)
    made = sum(call.ended and call.failure is None for call in calls)
    box.css = "failed" if failed else "" if made else "idle"
    if len(calls) > 1:
        words = [f"{made:,} of {len(calls):,} done"] if made else [never] if not failed + cancelled else []
        words += [f"{failed:,} failed"] * bool(failed) + [f"{cancelled:,} cancelled"] * bool(cancelled)
        box.notes.append(", ".join(words))
        return
    (call,) = calls
    if call.failure is not None:
        box.notes.append(f"failed: {call.failure.error}")
        box.title.append(f"{call.failure.error}: {call.failure.message[:300]}")
    elif made:
        box.notes.append(_outcome(box, call))
    else:
        box.notes.append("cancelled" if cancelled else never)


def _outcome(box: Box, call: CallState) -> str:
    taken = _taken(call)
    if taken is None:
        return "returned a graph" if call.grown else _done(call.seconds)
    if call.facts.kind == "settle":
        return f"{len(taken):,} of {len(call.facts.arms):,} succeeded"
    words = ", ".join(box.arms[arm] if arm < len(box.arms) else str(arm + 1) for arm in taken[:MOST_ARMS])
    more = f" and {len(taken) - MOST_ARMS:,} more" if len(taken) > MOST_ARMS else ""
    return f"took {words}{more}"


def _done(seconds: float) -> str:
    if seconds < 0.001:
        return "done"
    return f"done in {seconds * 1000:.0f} ms" if seconds < 1 else f"done in {seconds:,.1f} s"
