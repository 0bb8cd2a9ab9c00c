"""The documents job over documents of which a few raise, hang or end their process, and what each variant makes of it."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import job
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

import parflow as pf

SHARES = {"raise": 0.01, "hang": 0.001, "crash": 0.0002}
TIMEOUT = 1.0
"""Seconds that a document may take."""


def spoilt(documents: int) -> dict[str, str]:
    """Return what is wrong with which documents, the same for the same number."""
    counts = {kind: round(share * documents) for kind, share in SHARES.items()}
    chosen = random.Random(2611).sample(range(documents), sum(counts.values()))
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    return {f"doc-{number:06}": kind for number, kind in zip(chosen, kinds, strict=True)}


def process(doc: job.Document, wrong: dict[str, str]) -> job.Processed:
    """Process a document, if nothing is wrong with it."""
    match wrong.get(doc["id"]):
        case "raise":
            raise ValueError(f"{doc['id']} can't be processed")
        case "hang":
            time.sleep(10**6)
        case "crash":
            os.abort()
    return job.process(doc)


@pf.workflow
def documents(source: str, out: str, wrong: dict[str, str]) -> Any:
    """Process documents, write a row for each, and sum them up."""
    done = pf.read_jsonl(source).map(pf.task(timeout=TIMEOUT)(lambda doc: process(doc, wrong)))
    totals = pf.reducer(initial=job.initial, step=job.step, merge=job.merge, finish=job.finish)
    return {"totals": done.reduce(totals), "rows": done.map(job.row).write_parquet(out, overwrite=True)}


def process_file(path: str, out: str, wrong: dict[str, str]) -> tuple[job.Totals, int]:
    """Do one file as one writes it for other tools: a document that raises is counted and left out."""
    totals, rows, failed = job.initial(), [], 0
    with open(path, "rb") as lines:
        for line in lines:
            try:
                done = process(orjson.loads(line), wrong)
            except ValueError:
                failed += 1
                continue
            rows.append(job.row(done))
            totals = job.step(totals, done)
    pq.write_table(pa.Table.from_pylist(rows, job.SCHEMA), Path(out, Path(path).stem + ".parquet"))
    return totals, failed
