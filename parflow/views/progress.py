"""Progress in a terminal: one line a stage, from the run's live state."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from parflow.views.report import size

if TYPE_CHECKING:
    from parflow.api.runs import Run


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
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = [bars.add_task(stage.facts.name[:40], total=None, numbers="") for stage in run.state.stages]

        def show(presses: int) -> None:
            nonlocal told
            for task, stage in zip(tasks, run.state.stages, strict=True):
                total = sum(state.chunk.weight for state in list(stage.chunks)) or None
                done = sum(state.chunk.weight for state in list(stage.chunks) if not state.pending)
                bars.update(
                    task,
                    total=total if stage.closed else None,
                    completed=done,
                    numbers=numbers(stage.records, stage.tally.bytes, stage.failed, time.monotonic() - since, done, total),
                )
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


def numbers(records: int, count: int, failed: int, elapsed: float, done: int, total: int | None) -> str:
    """Write records and bytes so far, their rates, failures, and the time that is left at this pace.

    >>> numbers(1000, 2_000_000, 1, 2.0, 50, 100)
    '1,000 records, 500/s, 1.0 MB/s, 1 failed, 2 s left'
    """
    elapsed = max(elapsed, 1e-3)
    parts = [f"{records:,} records", f"{records / elapsed:,.0f}/s", f"{size(count / elapsed)}/s"]
    if failed:
        parts.append(f"{failed:,} failed")
    if total and done and done < total:
        parts.append(f"{(total - done) * elapsed / done:.0f} s left")
    return ", ".join(parts)
