"""Where records come from: one module a format lists inputs, reads a part from an offset and names each record."""

from __future__ import annotations

from parflow.storage.sources.base import BadRecord
from parflow.storage.sources.delimited import CSVSource
from parflow.storage.sources.documents import Document, FilesSource
from parflow.storage.sources.items import ItemsSource
from parflow.storage.sources.lines import JSONLinesSource, LinesSource
from parflow.storage.sources.parquet import ParquetSource
from parflow.storage.sources.partitions import PartitionsSource

__all__ = [
    "BadRecord",
    "CSVSource",
    "Document",
    "FilesSource",
    "ItemsSource",
    "JSONLinesSource",
    "LinesSource",
    "ParquetSource",
    "PartitionsSource",
]
