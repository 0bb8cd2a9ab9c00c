"""A run as one self-contained page."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from parflow.views.numbers import call_numbers, causes, slowest, stage_numbers
from parflow.views.picture import html_of
from parflow.views.words import letter_name, printable, summary

if TYPE_CHECKING:
    from parflow.api.runs import Run

_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body{{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}}
table{{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}}
td,th{{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top;white-space:pre-wrap}}
td.n{{text-align:right;font-variant-numeric:tabular-nums}}pre{{white-space:pre-wrap;overflow-wrap:anywhere}}
.failed,.lost{{color:#b2182b}}.succeeded{{color:#1b7837}}</style></head><body>
<h1>{title}</h1><p class="{status}"><strong>{status}</strong></p><pre>{summary}</pre>{picture}{tables}</body></html>
"""


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, (int, float)):
            return f'<td class="n">{value:,.3f}</td>' if isinstance(value, float) else f'<td class="n">{value:,}</td>'
        lines = "\n".join(map(printable, str(value).split("\n")))
        return f"<td>{html.escape(lines)}</td>"

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
    failures = run.dead_letters()
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
        head = ("record", "step", "cause", "error", "attempts", "preview", "output")
        rows_of = (
            (letter_name(f), f.step, f.cause, f"{f.error}: {f.message}", f.attempts, f.preview, f.output)
            for f in failures[:100]
        )
        tables.append(_table("Dead letters (the first 100)", head, rows_of))
    if state.started is not None:
        tables.append(_table("Versions", ("package", "version"), state.started.versions.items()))
    page = _PAGE.format(
        title=html.escape(f"parflow run {run.run_id}"),
        status=html.escape(run.status),
        summary=html.escape(summary(run)),
        picture=html_of(run.plan(), state),
        tables="".join(tables),
    )
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page)
    return path
