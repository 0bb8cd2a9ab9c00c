"""A run's history turned into numbers, sentences and one self-contained page."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from parflow.core.history import CallState, RunState, StageState
from parflow.model import Failure, Receipt

if TYPE_CHECKING:
    from parflow.api.runs import Run

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


def _begun(stage: StageState) -> bool:
    return stage.closed or bool(stage.chunks) or not (stage.facts.needs or stage.facts.base is not None)


def _cut_line(stage: StageState, output: int) -> str:
    cut = stage.cuts[output]
    places = [printable(stage.place_of(piece)) for piece in cut.late[:3]]
    more = ", …" if len(cut.late) > len(places) else ""
    left = f"{counted(len(cut.late), 'piece')} too late: {', '.join(places)}{more}"
    return f"    {stage.facts.outputs[output]} opened at its deadline with {cut.share:.0%} of the input; {left}"


def _call_line(calls: CallNumbers) -> str:
    more = f", {calls.failed:,} failed" if calls.failed else ""
    more += f", {calls.cancelled:,} cancelled" if calls.cancelled else ""
    return f"  {calls.name}: {calls.made:,} of {counted(calls.calls, 'call')}{more}, {calls.busy:.2f} s of work"


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


def size(count: float) -> str:
    """Write a number of bytes for a person.

    >>> size(8_388_608)
    '8.4 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def summary(run: Run) -> str:
    """Say in words how a run stands."""
    state, status = run.state, run.status
    tally = state.tally
    lines = [f"run {run.run_id}: {status}"]
    for begun in state.stages:
        stage = stage_numbers(begun)
        if not _begun(begun) or begun.cancelled:
            lines.append(f"  {stage.name}: {'cancelled' if begun.cancelled else 'not run'}")
            continue
        speed = f" in {stage.wall:.2f} s on {counted(stage.slots, 'slot')}, {stage.share:.0%} busy" if stage.wall else ""
        lines.append(f"  {stage.name}: {counted(stage.records, 'record')}, {size(stage.bytes)}{speed}")
        gate = "open" if stage.opened else "closed"
        done = f"{stage.done:,} of {counted(stage.chunks, 'chunk')} done"
        lines.append(f"    {done}; barrier {gate}; {counted(stage.failed, 'dead letter')}")
        lines += [_cut_line(begun, output) for output in begun.cuts]
        if stage.encodings:
            used = ", ".join(f"{count:,} as {encoding}" for encoding, count in sorted(stage.encodings.items()))
            lines.append(f"    text not in the declared encoding: {used}")
    lines += map(_call_line, call_numbers(state))
    if tally.failed or any(call.failure is not None for call in state.calls):
        lines.append("  " + "\n  ".join(cause_lines(run.failures())))
    if status == "succeeded" and any(stage.cuts for stage in state.stages):
        lines.append(f"  what came too late is merged by: parflow redrive {run.run_id}")
    if status in ("failed", "stopped", "lost"):
        over = state.ended is not None and state.ended.error == "TooManyFailuresError"
        more = f" --max-failures {tally.failed}" if over else ""
        lines.append(f"  go on with: parflow resume {run.run_id}{more}")
    return "\n".join(lines)


def counted(count: int, what: str) -> str:
    """Write a number of things.

    >>> counted(1, "chunk"), counted(1200, "chunk")
    ('1 chunk', '1,200 chunks')
    """
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def cause_lines(failures: Sequence[Failure], most: int = 5) -> list[str]:
    """Say what the dead letters have in common, with one example each."""
    lines = []
    grouped = causes(failures)
    for first, count in grouped[:most]:
        what = f"{first.step}: {first.error}: {printable(first.message)[:200]}"
        lines.append(f"{count:,} × {what} ({'for example ' if count > 1 else ''}{printable(first.record)})")
    if len(grouped) > most:
        lines.append(f"… and {len(grouped) - most} more causes")
    return lines


def printable(text: str) -> str:
    """Make a stranger's text harmless in a terminal: control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text)


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}
table{{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}}
td,th{{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}}
td.n{{text-align:right;font-variant-numeric:tabular-nums}}pre{{white-space:pre-wrap;overflow-wrap:anywhere}}
.failed,.lost{{color:#b2182b}}.succeeded{{color:#1b7837}}</style></head><body>
<h1>{title}</h1><p class="{status}"><strong>{status}</strong></p><pre>{summary}</pre>{picture}{tables}</body></html>
"""


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, (int, float)):
            return f'<td class="n">{value:,.3f}</td>' if isinstance(value, float) else f'<td class="n">{value:,}</td>'
        return f"<td>{html.escape(printable(str(value)))}</td>"

    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    heads = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in head)
    return f"<h2>{html.escape(caption)}</h2><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def write_report(run: Run, path: str) -> str:
    """Write one self-contained HTML page about a run; every text of a document in it is escaped.

    Parameters
    ----------
    run : Run
        The run.
    path : str
        The file to write.

    Returns
    -------
    str
        The path.
    """
    state = run.state
    failures = run.failures()
    stages = [stage_numbers(stage) for stage in state.stages]
    tables = [
        _table(
            "Stages",
            ("stage", "chunks", "records", "dead letters", "bytes", "busy seconds", "wall seconds", "slots"),
            ((s.name, s.chunks, s.records, s.failed, s.bytes, s.busy, s.wall, s.slots) for s in stages),
        ),
        _table(
            "Slowest pieces",
            ("input", "seconds", "records", "bytes", "slot"),
            ((where, r.tally.seconds, r.tally.records, r.tally.bytes, r.slot) for where, r in slowest(state)),
        ),
    ]
    if state.calls:
        rows = ((c.name, c.calls, c.made, c.failed, c.cancelled, c.busy) for c in call_numbers(state))
        tables.append(_table("Calls", ("task", "calls", "made", "failed", "cancelled", "busy seconds"), rows))
    if failures:
        causes_of = ((first.step, first.error, first.message, count) for first, count in causes(failures)[:100])
        tables.append(_table("Causes of dead letters", ("step", "error", "message", "records"), causes_of))
        examples = ((f.record, f.step, f.cause, f"{f.error}: {f.message}", f.preview) for f in failures[:100])
        tables.append(_table("Dead letters (the first 100)", ("record", "step", "cause", "error", "preview"), examples))
    if state.started is not None:
        tables.append(_table("Versions", ("package", "version"), state.started.versions.items()))
    page = _PAGE.format(
        title=html.escape(f"parflow run {run.run_id}"),
        status=html.escape(run.status),
        summary=html.escape(summary(run)),
        picture=run.picture(),
        tables="".join(tables),
    )
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page)
    return path
