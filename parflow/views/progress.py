"""Progress in a terminal: one line a stage, from the run's live state."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from parflow.views.report import size

if TYPE_CHECKING:
    from parflow.api.runs import Run

INTERVAL = 0.2


def show_progress(run: Run) -> None:
    """Show bars on standard error until the run ends; Ctrl-C asks it to stop, as `Run.wait` does."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeElapsedColumn(),
    )
    presses = 0
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = [bars.add_task(stage.facts.name[:40], total=None, numbers="") for stage in run.state.stages]
        since = time.monotonic()
        while True:
            try:
                alive = run.alive(INTERVAL)
                for task, stage in zip(tasks, run.state.stages, strict=True):
                    total = sum(state.chunk.weight for state in list(stage.chunks)) or None
                    done = sum(state.chunk.weight for state in list(stage.chunks) if not state.pending)
                    bars.update(
                        task,
                        total=total if stage.closed else None,
                        completed=done,
                        numbers=numbers(stage.records, stage.tally.bytes, stage.failed, time.monotonic() - since, done, total),
                    )
                if not alive:
                    break
            except KeyboardInterrupt:
                presses += 1
                what = "stopping at the next record; once more to stop at once" if presses == 1 else "stopping"
                bars.console.print(f"[yellow]{what}")
                run.stop(now=presses > 1)
    if presses:
        raise KeyboardInterrupt


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
