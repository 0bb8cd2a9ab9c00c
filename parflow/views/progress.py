"""Progress in a terminal: one line a stage, from the run's live state."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from parflow.views.words import size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from parflow.api.runs import Run
    from parflow.core.state import StageState


def show_progress(run: Run) -> None:
    """Show bars on standard error and wait for the run's end, as `Run.wait` does.

    Raises
    ------
    KeyboardInterrupt
        When the run has ended, if Ctrl-C was pressed.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeElapsedColumn(),
    )
    since, told = time.monotonic(), 0
    before = [(stage.records, stage.tally.bytes, _done(stage)) for stage in run.state.stages]  # of a run that goes on
    with Progress(*columns, console=Console(stderr=True)) as bars:
        shown: dict[int, TaskID] = {}  # a run may grow, and not all of its stages need run

        def bar(number: int, name: str) -> TaskID:
            if number not in shown:
                shown[number] = bars.add_task(name[:40], total=None, numbers="")
            return shown[number]

        def show(presses: int) -> None:
            nonlocal told
            for number, stage in enumerate([*run.state.stages]):
                if not (stage.closed or stage.chunks) and (stage.facts.needs or stage.facts.base is not None):
                    continue
                total = sum(state.chunk.weight for state in list(stage.chunks)) or None
                done = _done(stage)
                old = before[number] if number < len(before) else (0, 0, 0)
                now = Pace(stage.records - old[0], stage.tally.bytes - old[1], done - old[2], time.monotonic() - since)
                bars.update(
                    bar(number, stage.facts.name),
                    total=total if stage.closed else None,
                    completed=done,
                    numbers=numbers(stage.records, stage.failed, now, (total or 0) - done),
                )
            for (unit, step), stands in [*run.state.breakers.items()]:
                if stands != "closed" and unit in shown:
                    bars.update(shown[unit], numbers=f"breaker of {step} is {stands}")
            if calls := [*run.state.calls]:
                made = sum(call.ended for call in calls)
                bars.update(bar(-1, "calls"), total=len(calls), completed=made, numbers=f"{made:,} of {len(calls):,}")
            if presses > told:
                told = presses
                bars.console.print(stopping(presses), style="yellow")

        run.wait(show)


def stopping(presses: int) -> str:
    """Say what a Ctrl-C does.

    >>> stopping(1)
    'stopping at the next record; Ctrl-C once more to stop at once'
    """
    return "stopping at the next record; Ctrl-C once more to stop at once" if presses == 1 else "stopping at once"


def _done(stage: StageState) -> int:
    return sum(state.chunk.weight for state in list(stage.chunks) if not state.pending)


class Pace(NamedTuple):
    """What was done in this process in so many seconds: records, bytes, and weight of finished chunks."""

    records: int
    bytes: int
    weight: int
    seconds: float


def numbers(records: int, failed: int, now: Pace, left: int) -> str:
    """Write the records so far, the pace, failures, and the time that the weight ``left`` takes at this pace.

    >>> numbers(1000, 1, Pace(1000, 2_000_000, 50, 2.0), 50)
    '1,000 records, 500/s, 1.0 MB/s, 1 failed, 2 s left'
    """
    elapsed = max(now.seconds, 1e-3)
    parts = [f"{records:,} records", f"{now.records / elapsed:,.0f}/s", f"{size(now.bytes / elapsed)}/s"]
    if failed:
        parts.append(f"{failed:,} failed")
    if left > 0 and now.weight:
        parts.append(f"{left * elapsed / now.weight:.0f} s left")
    return ", ".join(parts)
