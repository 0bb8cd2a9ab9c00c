"""The documents job that every variant runs: what is done with one document, and how the documents are summed up."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

TOP = 1000
"""How many of the most frequent words the answer lists."""

WORD = re.compile(r"\w+")

TEXTS = ("id", "sha", "lang", "date", "top")
COUNTS = ("n_tokens", "n_unique")
SCHEMA = pa.schema([pa.field(name, pa.string()) for name in TEXTS] + [pa.field(name, pa.int64()) for name in COUNTS])

Document = dict[str, Any]
Row = dict[str, Any]


class Processed(TypedDict):
    """One document's part: its row for the Parquet file and its words' counts."""

    row: Row
    counts: Counter[str]


class Totals(TypedDict):
    """What is known of the documents so far."""

    docs: int
    tokens: int
    counts: Counter[str]


def process(doc: Document) -> Processed:
    """Normalise, tokenise, count and hash one parsed document."""
    text = " ".join(unicodedata.normalize("NFKC", doc["text"]).lower().split())
    tokens = WORD.findall(text)
    counts = Counter(tokens)
    row = {
        "id": doc["id"],
        "sha": hashlib.sha256(text.encode()).hexdigest(),
        "lang": doc["lang"],
        "date": doc["date"],
        "n_tokens": len(tokens),
        "n_unique": len(counts),
        "top": max(counts, key=counts.__getitem__, default=""),
    }
    return {"row": row, "counts": counts}


def row(done: Processed) -> Row:
    """Return what is written to Parquet of a processed document."""
    return done["row"]


def initial() -> Totals:
    """Return the totals of no documents."""
    return {"docs": 0, "tokens": 0, "counts": Counter()}


def step(totals: Totals, done: Processed) -> Totals:
    """Add one document."""
    totals["docs"] += 1
    totals["tokens"] += done["row"]["n_tokens"]
    totals["counts"].update(done["counts"])
    return totals


def merge(left: Totals, right: Totals) -> Totals:
    """Add the totals of other documents."""
    left["docs"] += right["docs"]
    left["tokens"] += right["tokens"]
    left["counts"].update(right["counts"])
    return left


def finish(totals: Totals) -> dict[str, Any]:
    """Return the answer: documents, tokens and the most frequent words, in an order without ties."""
    ranked = sorted(totals["counts"].items(), key=lambda item: (-item[1], item[0]))
    return {"docs": totals["docs"], "tokens": totals["tokens"], "top": [list(pair) for pair in ranked[:TOP]]}


def process_file(path: str, out: str) -> Totals:
    """Do one file: write its rows to a Parquet file of the same name in ``out``, return its totals."""
    totals, rows = initial(), []
    with open(path, "rb") as lines:
        for line in lines:
            done = process(orjson.loads(line))
            rows.append(row(done))
            totals = step(totals, done)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), Path(out, Path(path).stem + ".parquet"))
    return totals
