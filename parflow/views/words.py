"""A run's history in words, for a terminal or a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from parflow.core.history import RunState
from parflow.core.state import StageState
from parflow.model import Failure
from parflow.views.numbers import CallNumbers, call_numbers, causes, stage_numbers

if TYPE_CHECKING:
    from parflow.api.runs import Run


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


def counted(count: int, what: str) -> str:
    """Write a number of things.

    >>> counted(1, "chunk"), counted(1200, "chunk")
    ('1 chunk', '1,200 chunks')
    """
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def printable(text: str) -> str:
    """Make a stranger's text harmless in a terminal: control characters are shown, not obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text)


def one_line(text: str, most: int = 200) -> str:
    r"""Write the beginning of a stranger's text on one line.

    >>> one_line("no such\n  column")
    'no such column'
    """
    return printable(" ".join(text.split()))[:most]


def letter_name(failure: Failure) -> str:
    """Name what failed: a record, or the call of a task.

    >>> letter_name(Failure("", "judge", "exception", "ValueError", "no", preview="3, 'x'"))
    "call of judge(3, 'x')"
    """
    if failure.record:
        return printable(failure.record)
    return printable(f"call of {failure.step}" + (f"({failure.preview})" if failure.preview else ""))


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
    lines += _attempt_lines(state)
    lines += map(_call_line, call_numbers(state))
    failed = tally.failed or state.stuck or any(call.failure is not None for call in state.calls)
    letters = run.dead_letters() if failed else []
    if letters:
        lines.append("  " + "\n  ".join(cause_lines(letters)))
    if status == "succeeded" and any(stage.cuts for stage in state.stages):
        lines.append(f"  what came too late is merged by: parflow redrive {run.run_id}")
    return "\n".join([*lines, *_ways_on(run, status, letters)])


def _ways_on(run: Run, status: str, letters: Sequence[Failure]) -> list[str]:
    state = run.state
    if state.compensating is not None:
        again = f"; try again with: parflow resume {run.run_id}" if status in ("compensation_failed", "lost") else ""
        return [f"  {undone_line(run)}{again}"]
    if status not in ("failed", "stopped", "cancelled", "lost"):
        return []
    over = state.ended is not None and state.ended.error == "TooManyFailuresError"
    lines = [f"  go on with: parflow resume {run.run_id}" + (f" --max-failures {state.tally.failed}" if over else "")]
    if over and any(failure.cause != "input" for failure in letters):  # input that changes is this run's no longer
        lines.append(f"  or run what failed again: parflow redrive {run.run_id}")
    return lines


def cause_lines(failures: Sequence[Failure], most: int = 5) -> list[str]:
    """Say what the dead letters have in common, with one example each."""
    lines = []
    grouped = causes(failures)
    for first, count in grouped[:most]:
        what = f"{first.step}: {first.error}: {one_line(first.message)}"
        lines.append(f"{count:,} × {what} ({'for example ' if count > 1 else ''}{letter_name(first)})")
    if len(grouped) > most:
        lines.append(f"… and {len(grouped) - most} more causes")
    return lines


def done_line(run: Run) -> str:
    """Say how much of a run is done, and how to go on."""
    stages = [stage_numbers(stage) for stage in run.state.stages]
    done, chunks = sum(stage.done for stage in stages), sum(stage.chunks for stage in stages)
    return f"{done:,} of {counted(chunks, 'chunk')} done; it goes on with: parflow resume {run.run_id}"


def _begun(stage: StageState) -> bool:
    return stage.closed or bool(stage.chunks) or not (stage.facts.needs or stage.facts.base is not None)


def _cut_line(stage: StageState, output: int) -> str:
    cut = stage.cuts[output]
    places = [printable(stage.place_of(piece)) for piece in cut.late[:3]]
    more = ", …" if len(cut.late) > len(places) else ""
    left = f"{counted(len(cut.late), 'piece')} too late: {', '.join(places)}{more}"
    return f"    {stage.facts.outputs[output]} opened at its deadline with {cut.share:.0%} of the input; {left}"


def undone_line(run: Run) -> str:
    """Say what was undone of a run."""
    state = run.state
    stands = f"; {counted(len(state.stuck), 'effect')} still there: parflow failures {run.run_id}" if state.stuck else ""
    return f"what it did is undone: {counted(state.undone, 'effect')}{stands}"


def _attempt_lines(state: RunState) -> list[str]:
    retried: dict[str, int] = {}
    for stage in state.stages:
        for step, counts in stage.steps.items():
            retried[step] = retried.get(step, 0) + counts.retries
    lines = [f"  {step}: tried again {count:,} times" for step, count in retried.items() if count]
    lines += [f"  {step}: its breaker is {stands}" for (_, step), stands in state.breakers.items() if stands != "closed"]
    if state.trips:
        lines.append(f"  breakers opened {counted(state.trips, 'time')}")
    lines += [
        f"  {stage.facts.name}: {counted(stage.accepted, 'dead letter')} accepted" for stage in state.stages if stage.accepted
    ]
    return lines


def _call_line(calls: CallNumbers) -> str:
    more = f", {calls.failed:,} failed" if calls.failed else ""
    more += f", {calls.cancelled:,} cancelled" if calls.cancelled else ""
    return f"  {calls.name}: {calls.made:,} of {counted(calls.calls, 'call')}{more}, {calls.busy:.2f} s of work"
