"""A plan as a picture: stages with their steps and barriers, calls and decisions, and what waits for what. Plain SVG."""

from __future__ import annotations

import html
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from parflow.core.explain import in_words, kept
from parflow.core.history import RunState
from parflow.core.plan import Plan, Stage
from parflow.model import Address

CHAR, LINE, PAD, GAP, ROW = 7.4, 17, 10, 28, 54
"""Width of a letter, height of a line, space in a box, between boxes of a row, and between rows (pixels)."""
ARM = 44
"""Room for each arm of a decision (pixels)."""
LONGEST = 44
"""Letters of a line, at the most; the whole text shows when the pointer rests on it."""
DECISIONS = ("choose", "settle", "race", "quorum")

_STYLE = """<style>
.pf{font:12px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;color:#1f2328;max-width:100%;height:auto}
.pf rect,.pf polygon{fill:#fff;stroke:#57606a}.pf text{fill:#1f2328}.pf .head{font-weight:700}
.pf .stage rect{fill:#eef4fb;stroke:#3572b0}.pf .decision rect{fill:#fdf3e1;stroke:#9a6700;stroke-dasharray:5 3}
.pf .failed rect{stroke:#b2182b;stroke-width:3}.pf .idle{opacity:.45}
.pf path{fill:none;stroke:#57606a}.pf .arm{stroke-dasharray:5 3}.pf .chosen{stroke-width:2.5}.pf .note{fill:#57606a}
@media(prefers-color-scheme:dark){.pf{color:#e6edf3}.pf rect,.pf polygon{fill:#161b22;stroke:#8b949e}.pf text{fill:#e6edf3}
.pf .stage rect{fill:#12263d;stroke:#6ca4dd}.pf .decision rect{fill:#33270c;stroke:#d4a72c}.pf path{stroke:#8b949e}
.pf .note{fill:#9198a1}.pf .failed rect{stroke:#ff7b72}}
</style>"""


@dataclass
class _Box:
    """A stage, a call, or several equal calls of one layer."""

    kind: str
    layer: int
    lines: list[str]
    note: str = ""
    css: str = ""
    calls: list[int] = field(default_factory=list)
    arms: int = 0
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        letters = max(len(_short(line)) for line in (*self.lines, self.note))
        return max(2 * PAD + CHAR * letters, ARM * self.arms)

    @property
    def height(self) -> float:
        return 2 * PAD + LINE * (len(self.lines) + bool(self.note))


@dataclass(frozen=True)
class _Arrow:
    start: int
    end: int
    css: str = ""
    word: str = ""
    place: float = 0.5


def picture(plan: Plan, state: RunState | None = None) -> str:
    """Draw a plan, and how a run of it stands.

    Parameters
    ----------
    plan : Plan
        What is drawn. Equal calls that wait for equal things are one box.
    state : RunState, optional
        Of a run of this plan: chunks, dead letters, branches that were chosen. What the run has grown is left out.

    Returns
    -------
    str
        An SVG element that needs nothing else; all text in it is escaped.

    Examples
    --------
    >>> import parflow as pf
    >>> picture(pf.items([1, 2]).reduce(pf.sum()).plan()).startswith("<svg")
    True
    """
    boxes, places = _boxes(plan, state)
    arrows = _arrows(plan, state, places)
    width, height = _lay_out(boxes, arrows)
    words = f"plan of {plan.name}: {len(plan.stages)} stages and {len(plan.calls)} calls"
    parts = [*(_draw_arrow(boxes, arrow) for arrow in arrows), *map(_draw_box, boxes)]
    return (
        f'<svg class="pf" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(words)}" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">{_STYLE}<defs><marker id="pf-tip" viewBox="0 0 8 8" '
        'refX="8" refY="4" markerWidth="8" markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
        '<polygon points="0 0 8 4 0 8"/></marker></defs>'
        f"{''.join(parts)}</svg>"
    )


# --- what is drawn ------------------------------------------------------------------------------------------------------------


def _inputs(stage: Stage) -> tuple[Address, ...]:
    return stage.needs if stage.base is None else (*stage.needs, stage.base)


def _layers(plan: Plan) -> dict[int, int]:
    """Return how many steps each node is away from where nothing is waited for."""
    needs = {number: {node for node, _ in _inputs(stage)} for number, stage in enumerate(plan.stages)}
    needs |= {~number: {a[0] for a in (*call.facts.needs, *call.facts.arms)} for number, call in enumerate(plan.calls)}
    users: dict[int, list[int]] = {}
    for node, wanted in needs.items():
        for other in wanted:
            users.setdefault(other, []).append(node)
    waiting = {node: len(wanted) for node, wanted in needs.items()}
    ready = deque(node for node, count in waiting.items() if not count)
    layers = dict.fromkeys(needs, 0)
    while ready:
        node = ready.popleft()
        for user in users.get(node, ()):
            layers[user] = max(layers[user], layers[node] + 1)
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    return layers


def _boxes(plan: Plan, state: RunState | None) -> tuple[list[_Box], dict[int, int]]:
    """Return the boxes, and which of them each node is in."""
    layers = _layers(plan)
    boxes: list[_Box] = []
    places: dict[int, int] = {}
    for number, stage in enumerate(plan.stages):
        places[number] = len(boxes)
        boxes.append(_Box("stage", layers[number], [*_stage_lines(plan, number, stage)]))
        if state is not None:
            _mark_stage(boxes[-1], state, number)
    groups: dict[tuple[int, str, str], int] = {}
    for number, call in enumerate(plan.calls):
        key = (layers[~number], call.facts.kind, call.name)
        alone = call.facts.kind in DECISIONS
        if alone or key not in groups:
            groups[key] = len(boxes)
            boxes.append(_Box("decision" if alone else "call", layers[~number], [call.name]))
        places[~number] = groups[key]
        boxes[groups[key]].calls.append(number)
        boxes[groups[key]].arms = len(call.facts.arms)
    for box in boxes:
        if box.calls:
            if len(box.calls) > 1:
                box.lines = [f"{len(box.calls):,} x {box.lines[0]}"]
            if state is not None:
                _mark_calls(box, state)
    return boxes, places


def _stage_lines(plan: Plan, number: int, stage: Stage) -> Iterator[str]:
    yield f"stage {number}: {in_words(plan, stage)}"
    depths = {-1: 0}
    for place, step in enumerate(stage.steps):
        ends = [other.parent for other in stage.steps] + [other.parent for other in stage.outputs]
        forks = ends.count(step.parent) > 1
        depths[place] = depths[step.parent] + forks
        yield f"{'  ' * depths[place]}{step.kind} {step.task.name}"
    for output in stage.outputs:
        yield f"{'  ' * depths[output.parent]}| {output.kind} {output.name}: {kept(output.kind)}"


def _mark_stage(box: _Box, state: RunState, number: int) -> None:
    stage = state.stages[number]
    done = sum(not chunk.pending for chunk in stage.chunks)
    box.note = f"{done:,} of {len(stage.chunks):,} chunks, barrier {'open' if stage.opened else 'closed'}"
    box.note += f", {stage.failed:,} dead letters" if stage.failed else ""
    if stage.cancelled or not (stage.closed or stage.chunks):
        box.css, box.note = "idle", "cancelled" if stage.cancelled else "not run"


def _mark_calls(box: _Box, state: RunState) -> None:
    calls = [state.calls[number] for number in box.calls]
    failed, cancelled = sum(call.failure is not None for call in calls), sum(call.cancelled for call in calls)
    made = sum(call.ended and call.failure is None for call in calls)
    words = [(f"{made:,} of {len(calls):,}" if len(calls) > 1 else "") if made else "not run"]
    words += [f"{failed:,} failed"] * bool(failed) + [f"{cancelled:,} cancelled"] * bool(cancelled)
    box.note = ", ".join(word for word in words if word)
    box.css = "failed" if failed else "" if made else "idle"


def _arrows(plan: Plan, state: RunState | None, places: dict[int, int]) -> list[_Arrow]:
    found: dict[_Arrow, None] = {}
    for number, stage in enumerate(plan.stages):
        for node, _ in _inputs(stage):
            found[_Arrow(places[node], places[number])] = None
    for number, call in enumerate(plan.calls):
        for node, _ in call.facts.needs:
            found[_Arrow(places[node], places[~number])] = None
        taken = None if state is None else _taken(state, number)
        for arm, (node, _) in enumerate(call.facts.arms):
            word = ("then" if arm == 0 else "else") if call.name == "when" else str(arm + 1)
            css = "arm" if taken is None else "arm chosen" if arm in taken else "arm idle"
            place = (arm + 0.5) / len(call.facts.arms)
            found[_Arrow(places[node], places[~number], css, word, place)] = None
    return [*found]


def _taken(state: RunState, number: int) -> tuple[int, ...] | None:
    """Return which arms of a decision were taken."""
    call = state.calls[number]
    if call.choice is not None:
        return (call.choice,)
    return None if call.decided is None else call.decided.picked


# --- where it is drawn --------------------------------------------------------------------------------------------------------


def _lay_out(boxes: list[_Box], arrows: list[_Arrow]) -> tuple[float, float]:
    """Put boxes into rows by their layers, each row in the order of what its boxes wait for (Sugiyama's barycentres)."""
    rows: dict[int, list[int]] = {}
    for number, box in enumerate(boxes):
        rows.setdefault(box.layer, []).append(number)
    before: dict[int, list[int]] = {}
    for arrow in arrows:
        before.setdefault(arrow.end, []).append(arrow.start)
    y, width = float(PAD), 0.0
    for layer in sorted(rows):
        row = rows[layer]
        centre = {number: _centre(boxes, before.get(number, ())) for number in row}
        row.sort(key=lambda number: (centre[number], number))
        x = float(PAD)
        for number in row:
            boxes[number].x, boxes[number].y = x, y
            x += boxes[number].width + GAP
        y += max(boxes[number].height for number in row) + ROW
        width = max(width, x - GAP + PAD)
    for row in rows.values():  # each row in the middle
        shift = (width - PAD - (boxes[row[-1]].x + boxes[row[-1]].width)) / 2
        for number in row:
            boxes[number].x += shift
    return max(width, 2 * PAD), y - ROW + PAD


def _centre(boxes: list[_Box], numbers: Iterable[int]) -> float:
    middles = [boxes[number].x + boxes[number].width / 2 for number in numbers]
    return sum(middles) / len(middles) if middles else 0.0


# --- drawing ------------------------------------------------------------------------------------------------------------------


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _draw_box(box: _Box) -> str:
    lines = []
    for number, line in enumerate((*box.lines, *([box.note] if box.note else []))):
        y = box.y + PAD + LINE * (number + 0.75)
        css = "head" if number == 0 else "note" if number == len(box.lines) else ""
        indent = len(line) - len(line.lstrip())
        x = box.x + PAD + CHAR * indent
        lines.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{html.escape(_short(line).strip())}</text>')
    title = html.escape("\n".join(filter(None, (*box.lines, box.note))))
    return (
        f'<g class="{box.kind} {box.css}"><title>{title}</title><rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="5"/>{"".join(lines)}</g>'
    )


def _draw_arrow(boxes: list[_Box], arrow: _Arrow) -> str:
    start, end = boxes[arrow.start], boxes[arrow.end]
    x1, y1 = start.x + start.width / 2, start.y + start.height
    x2, y2 = end.x + end.width * arrow.place, end.y  # arms of a decision arrive side by side
    bend = max(ROW * 0.6, (y2 - y1) / 2)
    path = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
    word = f'<text class="note" x="{x2 + 4:.1f}" y="{y2 - 6:.1f}">{html.escape(arrow.word)}</text>' if arrow.word else ""
    return f'<path class="{arrow.css}" marker-end="url(#pf-tip)" d="{path}"/>{word}'
