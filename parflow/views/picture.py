"""A plan as a picture: stages with their steps and barriers, calls and decisions, and what waits for what.

Plain SVG that needs nothing else: no program to lay it out, no script to show it. `boxes` finds what it consists of, `layout`
where that stands.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

from parflow.core.explain import explain
from parflow.core.history import RunState
from parflow.core.plan import Plan
from parflow.views.boxes import NEED, Arrow, Box, Row, boxes_of
from parflow.views.layout import Link, Stop, lay_out
from parflow.views.words import counted, printable

CHAR, LINE, PAD, INDENT = 7.3, 18.0, 10.0, 16.0
"""Width of a letter, height of a line, space within a box, and how far a branch is moved to the right (pixels)."""
LONGEST = 64
"""Letters of a line, at the most; the whole text shows when the pointer rests on it."""
LONGEST_ARM = 12

# What is drawn: its colours in the light, and in the dark.
_COLOURS = (
    (".pf text", "fill", "#1f2328", "#e6edf3"),
    (".pf .aside,.pf .word", "fill", "#59636e", "#9198a1"),
    (".pf .body", "fill", "#ffffff", "#161b22"),
    (".pf .body", "stroke", "#59636e", "#8b949e"),
    (".pf .stage .body", "fill", "#eef4fb", "#12263d"),
    (".pf .stage .body", "stroke", "#3572b0", "#6ca4dd"),
    (".pf .decision .body", "fill", "#fdf3e1", "#33270c"),
    (".pf .decision .body", "stroke", "#9a6700", "#d4a72c"),
    (".pf .failed .body", "stroke", "#b2182b", "#ff7b72"),
    (".pf .failed .state", "fill", "#b2182b", "#ff7b72"),
    (".pf .twig", "stroke", "#8fb3d9", "#3f6490"),
    (".pf .dot,.pf .done", "fill", "#3572b0", "#6ca4dd"),
    (".pf .bar", "fill", "#8250df", "#bc8cff"),
    (".pf .arrow", "stroke", "#59636e", "#8b949e"),
    (".pf .tip", "fill", "#59636e", "#8b949e"),
)
_STYLE = (
    ".pf{font:12px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}"
    ".pf text{white-space:pre}.pf .head{font-weight:700}.pf .aside{font-weight:400}.pf .middle{text-anchor:middle}"
    ".pf .end{text-anchor:end}.pf .failed .body{stroke-width:2.5}.pf .twig,.pf .arrow{fill:none}"
    ".pf .idle>:not(.body){opacity:.6}.pf .idle .body{stroke-opacity:.4}"
    ".pf .arm .arrow{stroke-dasharray:5 3}.pf .chosen .arrow{stroke-width:2.5;stroke-dasharray:none}"
    "@media all{.pf{max-width:100%;height:auto}}.pf-whole{overflow-x:auto}.pf-whole .pf{max-width:none}"
    + "".join(f"{where}{{{what}:{light}}}" for where, what, light, _ in _COLOURS)
    + "svg.pf:root{color-scheme:light dark}[data-jp-theme-light=false] .pf,.vscode-dark .pf{color-scheme:dark}"
    "@supports(color:light-dark(red,red)){"
    + "".join(f"{where}{{{what}:light-dark({light},{dark})}}" for where, what, light, dark in _COLOURS)
    + "}"
)


def picture(plan: Plan, state: RunState | None = None) -> str:
    """Draw a plan, and how a run of it stands.

    Parameters
    ----------
    plan : Plan
        What is drawn. Equal calls are one box, and a loop's rounds are drawn once.
    state : RunState, optional
        Of a run of this plan: chunks, dead letters, barriers, branches that were taken. What the run has grown is left out.

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
    boxes, arrows = boxes_of(plan, state)
    links = [Link(arrow.start, arrow.end, _port(boxes[arrow.end], arrow.arm)) for arrow in arrows]
    layout = lay_out([_room(box) for box in boxes], links)
    drawn = [_draw_arrow(boxes, arrow, link, way) for arrow, link, way in zip(arrows, links, layout.routes, strict=True)]
    drawn.sort(key=lambda text: ("chosen" in text[:40], "idle" not in text[:40]))  # what was taken on top
    drawn += [_draw_box(box, *corner) for box, corner in zip(boxes, layout.corners, strict=True)]
    return (
        f'<svg class="pf" xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{_text(_words(plan, state))}" '
        f'width="{layout.width:.0f}" height="{layout.height:.0f}" viewBox="0 0 {layout.width:.0f} {layout.height:.0f}">'
        f"<style>{_STYLE}</style>{''.join(drawn)}</svg>"
    )


def html_of(plan: Plan, state: RunState | None = None) -> str:
    """Return the picture for a page or a notebook, with a line of words under it, and all of the plan in words to unfold.

    Parameters
    ----------
    plan : Plan
        What is shown.
    state : RunState, optional
        Of a run of this plan.

    Returns
    -------
    str
        An HTML element; what is wide is scrolled.

    Examples
    --------
    >>> import parflow as pf
    >>> "plan of sum: 1 stage" in html_of(pf.items([1, 2]).reduce(pf.sum()).plan())
    True
    """
    whole = "\n".join(map(_text, explain(plan, state).split("\n")))
    return (
        f'<div class="pf-whole">{picture(plan, state)}<details><summary>{_text(_words(plan, state))}</summary>'
        f'<pre style="text-align:left">{whole}</pre></details></div>'
    )


def _words(plan: Plan, state: RunState | None) -> str:
    counts = {"stage": len(plan.stages), "call": len(plan.calls)}
    words = f"plan of {plan.name}: {' and '.join(counted(count, what) for what, count in counts.items() if count)}"
    if state is None:
        return words
    stages, calls = state.stages[: len(plan.stages)], state.calls[: len(plan.calls)]
    chunks = [chunk for stage in stages for chunk in stage.chunks]
    parts = [f"{sum(not chunk.pending for chunk in chunks):,} of {counted(len(chunks), 'chunk')} done"] * bool(chunks)
    made = sum(call.ended and call.failure is None for call in calls)
    parts += [f"{made:,} of {counted(len(calls), 'call')} done"] * bool(calls)
    counts = {
        "dead letter": sum(stage.failed for stage in stages),
        "failed call": sum(call.failure is not None for call in calls),
        "cancelled call": sum(call.cancelled for call in calls),
        "grown stage": len(state.stages) - len(stages),
        "grown call": len(state.calls) - len(calls),
    }
    parts += [f"{counted(count, what)}{' (not drawn)' * what.startswith('grown')}" for what, count in counts.items() if count]
    return f"{words}; {', '.join(parts)}" if parts else words


# --- text -------------------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    return html.escape(printable(text))


def _cells(text: str) -> int:
    """Count the cells that a text takes: letters of some scripts take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in printable(text))


def _short(text: str, most: int = LONGEST) -> str:
    text = printable(text)
    if _cells(text) <= most:
        return text
    while _cells(text) > most - 1:
        text = text[: most - 1] if len(text) > most else text[:-1]
    return f"{text}…"


def _pair(first: str, second: str) -> tuple[str, str]:
    """Shorten a text and what is said beside it, to one line."""
    first = _short(first)
    room = LONGEST - _cells(first) - 1
    return first, (_short(second, room) if room >= 4 else "") if second else ""


# --- sizes ------------------------------------------------------------------------------------------------------------------


def _line(first: str, second: str = "") -> float:
    first, second = _pair(first, second)
    return CHAR * (_cells(first) + (1 + _cells(second) if second else 0))


def _size(box: Box) -> tuple[float, float]:
    """Return width and height of what is drawn of a box."""
    widths = [_line(box.head, box.aside), *map(_line, box.notes)]
    if box.kind == "decision":
        height = 34.0 + LINE * len(widths)
        offs = (abs(at - (len(widths) - 1) / 2) * LINE + 6 for at in range(len(widths)))
        fit = max(width / (1 - 2 * off / height) for width, off in zip(widths, offs, strict=True))
        return max(fit, _slot(box) * _slots(box)), height
    widths += [INDENT * row.depth + INDENT + _line(row.text, row.aside) for row in box.rows]
    lines = 1 + len(box.rows) + len(box.notes)
    return max(widths) + 2 * PAD, LINE * lines + 2 * PAD + (5 if box.share is not None else 0)


def _room(box: Box) -> tuple[float, float]:
    """Return the size that a box takes, the words at its arms among it."""
    width, height = _size(box)
    beside = max((_line(_arm(word)) + 6 - _slot(box) / 2 for word in box.arms), default=0.0)
    return width + 2 * max(0.0, beside), height


def _arm(word: str) -> str:
    return _short(word, LONGEST_ARM)


def _slot(box: Box) -> float:
    """Return the width of the place in which an arm arrives."""
    return max((_line(_arm(word)) + 14 for word in box.arms), default=0.0)


def _slots(box: Box) -> int:
    return len(box.arms) + bool(box.aside)


def _port(box: Box, arm: int) -> float:
    """Return where on a box's room an arrow arrives: what is needed in the middle, arms of a decision beside each other."""
    if arm < 0 or not box.arms:
        return 0.5
    slots, middle = _slots(box), _slots(box) // 2 if box.aside else len(box.arms)
    place = (arm + (arm >= middle) + 0.5) / slots
    (width, _), (room, _) = _size(box), _room(box)
    return 0.5 + (place - 0.5) * width / room


# --- drawing ----------------------------------------------------------------------------------------------------------------


def _draw_box(box: Box, left: float, top: float) -> str:
    (width, height), (room, _) = _size(box), _room(box)
    x = left + (room - width) / 2
    title = "\n".join(map(_text, box.title or [box.head])) + "".join(f"\n{_text(note)}" for note in box.notes)
    draw = _diamond if box.kind == "decision" else _square
    return f'<g class="{box.kind} {box.css}"><title>{title}</title>{draw(box, x, top, width, height)}</g>'


def _diamond(box: Box, x: float, y: float, width: float, height: float) -> str:
    middle, centre = x + width / 2, y + height / 2
    corners = ((middle, y), (x + width, centre), (middle, y + height), (x, centre))
    at = centre - LINE * len(box.notes) / 2 + 4
    lines = [_say(middle, at, box.head, "", "head middle")]
    lines += [_say(middle, at + LINE * number, note, "", "state middle") for number, note in enumerate(box.notes, 1)]
    return f'<polygon class="body" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"/>{"".join(lines)}'


def _square(box: Box, x: float, y: float, width: float, height: float) -> str:
    parts = [f'<rect class="body" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5"/>']
    line = y + PAD + LINE * 0.72
    parts.append(_say(x + PAD, line, box.head, box.aside, "head"))
    parts += _draw_rows(box.rows, x + PAD, line)
    line += LINE * len(box.rows)
    parts += [_say(x + PAD, line + LINE * number, note, "", "aside state") for number, note in enumerate(box.notes, 1)]
    if box.share is not None:
        full = width - 2 * PAD
        bar = f'x="{x + PAD:.1f}" y="{y + height - PAD:.1f}" height="3" rx="1.5"'
        parts.append(f'<rect class="done" opacity=".25" width="{full:.1f}" {bar}/>')
        parts.append(f'<rect class="done" width="{full * box.share:.1f}" {bar}/>')
    return "".join(parts)


def _draw_rows(rows: Sequence[Row], x: float, y: float) -> Iterator[str]:
    """Draw the tree of a stage's steps: a dot for each, two bars for a barrier, and twigs between them."""
    places = {-1: (x + 4, y + 3)}
    for number, row in enumerate(rows):
        line, mark = y + LINE * (number + 1), x + 4 + INDENT * row.depth
        places[number] = (mark, line)
        above, before = places[row.parent]
        reach = "" if above == mark else f"H{mark - 4:.1f}"
        yield f'<path class="twig" d="M{above:.1f} {before + 2:.1f}V{line - 4 - 6 * (not reach):.1f}{reach}"/>'
        if row.barrier:
            yield "".join(
                f'<rect class="bar" x="{mark + dx:.1f}" y="{line - 10:.1f}" width="2" height="12"/>' for dx in (-3, 1)
            )
        else:
            yield f'<circle class="dot" cx="{mark:.1f}" cy="{line - 4:.1f}" r="3"/>'
        yield _say(mark + INDENT - 4, line, row.text, row.aside, "row")


def _say(x: float, y: float, text: str, aside: str, css: str) -> str:
    text, aside = _pair(text, aside)
    beside = f'<tspan class="aside"> {html.escape(aside)}</tspan>' if aside else ""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}{beside}</text>'


def _draw_arrow(boxes: Sequence[Box], arrow: Arrow, link: Link, way: Iterable[Stop]) -> str:
    first, *between, last = way
    box = boxes[arrow.end]
    y, drop = last.bottom, 0.0
    if box.kind == "decision":  # it arrives at the diamond's side, not at the top of its room
        (width, height), (room, _) = _size(box), _room(box)
        drop = height * min(0.5, abs(link.place - 0.5) * room / width)
        y += drop
    path = [f"M{first.x:.1f} {first.top:.1f}V{first.bottom:.1f}"]
    before = first
    for stop in (*between, last):
        turn = (before.bottom + stop.top) / 2
        path.append(f"C{before.x:.1f} {turn:.1f} {stop.x:.1f} {turn:.1f} {stop.x:.1f} {stop.top:.1f}")
        path.append(f"V{stop.bottom if stop is not last else y - 5:.1f}")
        before = stop
    x, word = last.x, ""
    if arrow.arm != NEED and 0 <= arrow.arm < len(box.arms):
        left = link.place < 0.5
        css = "word end" if left else "word"
        word = _say(x - 5 if left else x + 5, last.top + min(10, drop - 4), _arm(box.arms[arrow.arm]), "", css)
    return (
        f'<g class="{arrow.css or "need"}"><title>{_text(arrow.title)}</title><path class="arrow" d="{"".join(path)}"/>'
        f'<polygon class="tip" points="{x - 4:.1f},{y - 7:.1f} {x + 4:.1f},{y - 7:.1f} {x:.1f},{y:.1f}"/>{word}</g>'
    )
