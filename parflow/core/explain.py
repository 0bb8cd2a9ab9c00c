"""A plan in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from parflow.core.history import RunState
from parflow.core.plan import Call, Plan, Stage
from parflow.model import Address

MOST_CALLS = 20
"""Calls that are told one by one; of more, only how many of each."""

KEPT = {
    "reduce": "partial results in the store, merged in input order",
    "group": "partial results in the store, merged bucket by bucket",
    "sink": "one file a chunk, published when the stage is complete",
    "collect": "records in the store",
}


def explain(plan: Plan, state: RunState | None = None) -> str:
    """Describe a plan: stages, fused steps, barriers, calls, what is stored where; with a run's state, how many chunks."""
    parts = [_count(len(plan.stages), "stage"), _count(len(plan.calls), "call")]
    lines = [f"plan of {plan.name}: {', '.join(part for part in parts if not part.startswith('0 ')) or 'nothing'}"]
    for number, stage in enumerate(plan.stages):
        chunks = state.stages[number].chunks if state is not None else ()
        lines += _stage(plan, number, stage, len(chunks))
    if len(plan.calls) > MOST_CALLS:
        counts = Counter((call.facts.kind, call.name) for call in plan.calls)
        lines += [f"{count:,} x {_calls(kind)} {name}" for (kind, name), count in counts.items()]
    else:
        lines += [_call(plan, number, call) for number, call in enumerate(plan.calls)]
    return "\n".join(lines)


def label(plan: Plan, address: Address) -> str:
    """Name the result at an address."""
    node, item = address
    if node >= 0:
        return f"{plan.stages[node].outputs[item].name} (stage {node})" if item >= 0 else f"the input of stage {node}"
    call = plan.calls[~node]
    return f"{call.name} (call {~node})" + (f"[{item}]" if call.facts.results > 1 else "")


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def in_words(plan: Plan, stage: Stage) -> str:
    """Say where a stage's records come from."""
    if stage.base is not None and stage.base[1] < 0:
        return f"the same chunks as stage {stage.base[0]}"
    if stage.base is not None:
        return label(plan, stage.base)
    if stage.value is not None:
        return f"each item of {label(plan, stage.value)}"
    paths: tuple[str, ...] = getattr(stage.source, "paths", ())
    ends = [path if path.count("/") < 3 else "…/" + "/".join(path.rsplit("/", 2)[1:]) for path in paths[:2]]
    return " ".join([stage.source.name, ", ".join([*ends, *(["…"] if len(paths) > 2 else [])])]).strip()


def kept(kind: str) -> str:
    """Say in a word or two what an output of a kind keeps, and where."""
    return {"reduce": "merged, in the store", "group": "merged by bucket", "sink": "files", "collect": "in the store"}[kind]


def _stage(plan: Plan, number: int, stage: Stage, chunks: int) -> Iterator[str]:
    waits = f", after {', '.join(label(plan, need) for need in stage.needs)}" if stage.needs else ""
    counted = f", {_count(chunks, 'chunk')}" if chunks else ""
    yield f"stage {number}: {in_words(plan, stage)}{waits}{counted}"
    for place, step in enumerate(stage.steps):
        after = "" if step.parent == place - 1 else f" (after {stage.label(step.parent + 1)})"
        yield f"  {step.kind} {step.task.name}{after}{step.manner}"
    for output in stage.outputs:
        yield f"  barrier: {output.kind} {output.name} (of {stage.label(output.parent + 1)}): {KEPT[output.kind]}"


def _calls(kind: str) -> str:
    return "" if kind == "call" else kind


def _call(plan: Plan, number: int, call: Call) -> str:
    facts = call.facts
    given = f"({', '.join(label(plan, need) for need in facts.needs)})"
    arms = ", ".join(label(plan, arm) for arm in facts.arms)
    match facts.kind:
        case "call":
            what = f"{call.name}{given}"
        case "choose":
            what = f"{call.name}{given} runs one of: {arms}"
        case "settle":
            what = f"settle, when all have ended: {arms}"
        case "race":
            what = f"race, the first of: {arms}"
        case _:
            what = f"quorum, the first {facts.count} of: {arms}"
    return f"call {number}: {what}"
