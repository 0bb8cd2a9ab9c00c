"""The documents job as a parflow workflow: `parflow run benchmarks/documents_flow.py --source 'data/*.jsonl' --out DIR`."""

from __future__ import annotations

import os
from typing import Any

import job

import parflow as pf


@pf.workflow
def documents(source: str, out: str, trace: str = "", poison: str = "") -> Any:
    """Process documents, write a row for each, and sum them up.

    ``trace`` names a file that gets the id of each document as it is begun, ``poison`` the id of one that ends its process.
    """

    def process(doc: job.Document) -> job.Processed:
        if trace:
            with open(trace, "a", encoding="ascii") as file:  # one short write at the end: lines of several processes don't mix
                file.write(doc["id"] + "\n")
        if doc["id"] == poison:
            os._exit(1)
        return job.process(doc)

    done = pf.read_jsonl(source).map(process if trace or poison else job.process)
    totals = pf.reducer(initial=job.initial, step=job.step, merge=job.merge, finish=job.finish)
    return {"totals": done.reduce(totals), "rows": done.map(job.row).write_parquet(out, overwrite=True)}
