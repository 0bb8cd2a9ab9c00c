"""Sinks: records written to a folder of files, one file a piece, all published together when their stage is complete.

A piece writes into a hidden staging folder, ``<path>/.parflow-<run>/``, under a name of its own, so attempts never collide
and readers never see half a result. `Sink.publish` then moves the staged files of the attempts that count to ``part-00000``,
``part-00001``, ... in input order and writes ``_manifest.json`` last: where it stands, the result is complete. Publishing can
be done again after a crash at any point. Readers pass over names that begin with ``_`` or ``.``.
"""

from __future__ import annotations

from parflow.storage.sinks.base import MANIFEST, Sink, Writer
from parflow.storage.sinks.jsonl import JSONLinesSink
from parflow.storage.sinks.parquet import ParquetSink

__all__ = ["MANIFEST", "JSONLinesSink", "ParquetSink", "Sink", "Writer"]
