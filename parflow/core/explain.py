"""A plan in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from parflow.core.history import RunState
from parflow.core.plan import Call, Output, Plan, Stage, Step
from parflow.model import Address

MOST_CALLS = 20
"""Calls that are told one by one; of more, only how many of each."""

THEN = {
    "reduce": ", merged in input order",
    "group": ", merged bucket by bucket",
    "sink": ", published when the stage is complete",
    "collect": "",
}
"""What becomes of what an output of a kind has stored."""


def explain(plan: Plan, state: RunState | None = None) -> str:
    """Describe a plan: stages, fused steps, barriers, calls, what is stored where; with a run's state, how many chunks."""
    parts = [_count(len(plan.stages), "stage"), _count(len(plan.calls), "call")]
    lines = [f"plan of {plan.name}: {', '.join(part for part in parts if not part.startswith('0 ')) or 'nothing'}"]
    for number, stage in enumerate(plan.stages):
        chunks = state.stages[number].chunks if state is not None else ()
        lines += _stage(plan, number, stage, len(chunks))
    if len(plan.calls) > MOST_CALLS:
        counts = Counter(map(call_name, plan.calls))
        lines += [f"{count:,} x {name}" for name, count in counts.items()]
    else:
        lines += [f"call {number}: {call_in_words(plan, call)}" for number, call in enumerate(plan.calls)]
    return "\n".join(lines)


def label(plan: Plan, address: Address) -> str:
    """Name the result at an address."""
    node, item = address
    if node >= 0:
        return f"{plan.stages[node].outputs[item].name} (stage {node})" if item >= 0 else f"the input of stage {node}"
    call = plan.calls[~node]
    return f"{call.name} (call {~node})" + (f"[{item}]" if call.facts.results > 1 else "")


def tree(stage: Stage) -> Iterator[tuple[int, int, Step | Output]]:
    """Yield a stage's steps and outputs, each under the step before it: depth, place of that step (-1: the source), and itself.

    What goes straight on is no deeper; where branches fork, each of them is.
    """
    after: dict[int, list[Step | Output]] = {}
    parts: tuple[Step | Output, ...] = (*stage.outputs, *stage.steps)
    for part in parts:
        after.setdefault(part.parent, []).append(part)
    numbers = {id(step): number for number, step in enumerate(stage.steps)}
    forked = len(after.get(-1, ())) > 1
    left = [(int(forked), -1, part) for part in reversed(after.get(-1, ()))]
    place = 0
    while left:
        depth, parent, part = left.pop()
        yield depth, parent, part
        if isinstance(part, Step):
            onward = after.get(numbers[id(part)], [])
            left += [(depth + (len(onward) > 1), place, other) for other in reversed(onward)]
        place += 1


def source_in_words(plan: Plan, stage: Stage) -> str:
    """Say where a stage's records come from."""
    if stage.base is not None and stage.base[1] < 0:
        return f"the same chunks as stage {stage.base[0]}"
    if stage.base is not None:
        return label(plan, stage.base)
    if stage.value is not None:
        return f"each item of {label(plan, stage.value)}"
    paths: tuple[str, ...] = getattr(stage.source, "paths", ())
    if paths:
        return (
            f"{stage.source.name} {', '.join(map(_end, paths[:2]))}{f' and {len(paths) - 2:,} more' if len(paths) > 2 else ''}"
        )
    items = getattr(stage.source, "iterable", None)
    known = isinstance(items, (list, tuple, range, dict, set, frozenset, str))
    return f"{stage.source.name} ({len(items):,})" if known else f"{stage.source.name}"  # type: ignore[arg-type]


def output_in_words(output: Output) -> str:
    """Say what an output does."""
    if output.kind == "sink" or output.name == output.kind:
        return output.name  # a sink is named by the method that made it and where it writes
    return f"{output.kind} {output.name}"


def kept(output: Output) -> str:
    """Say in a few words what is stored of an output, and where."""
    match output.kind:
        case "reduce":
            words = "partial results in the store"
        case "group":
            words = f"partial results in the store, in {_count(output.body.buckets, 'bucket')}"
        case "sink":
            words = f"a file a chunk in {_end(output.body.path)}"
        case _:
            words = "records in the store"
    if output.deadline:
        words += f"; opens after {output.deadline:g} s with {output.at_least:.0%} of the input"
    return words


def call_name(call: Call) -> str:
    """Name a call or a decision."""
    facts = call.facts
    return f"quorum, {facts.count} of {len(facts.arms)}" if facts.kind == "quorum" else call.name


def call_in_words(plan: Plan, call: Call) -> str:
    """Say what a call is given, or what a decision is between."""
    facts = call.facts
    given = f"({', '.join(label(plan, need) for need in facts.needs)})"
    arms = ", ".join(label(plan, arm) for arm in facts.arms)
    match facts.kind:
        case "call":
            return f"{call.name}{given}"
        case "choose":
            return f"{call.name}{given} runs one of: {arms}"
        case "settle":
            return f"settle, when all have ended: {arms}"
        case "race":
            return f"race, the first of: {arms}"
        case _:
            return f"quorum, the first {facts.count} of: {arms}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _end(path: str) -> str:
    """Return the end of a long path, which tells more than where it begins."""
    return path if path.count("/") < 3 else "…/" + "/".join(path.rsplit("/", 2)[1:])


def _stage(plan: Plan, number: int, stage: Stage, chunks: int) -> Iterator[str]:
    needs = [label(plan, need) for need in stage.needs if need != stage.value]
    waits = f", after {', '.join(needs)}" if needs else ""
    counted = f", {_count(chunks, 'chunk')}" if chunks else ""
    yield f"stage {number}: {source_in_words(plan, stage)}{waits}{counted}"
    for depth, _, part in tree(stage):
        if isinstance(part, Step):
            yield f"{'  ' * (depth + 1)}{part.kind} {part.task.name}{part.manner}"
        else:
            yield f"{'  ' * (depth + 1)}barrier: {output_in_words(part)}: {kept(part)}{THEN[part.kind]}"
