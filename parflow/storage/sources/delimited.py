"""Rows of CSV files: a record is a row, named by the offset of its first byte."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from sys import maxsize
from typing import Any, BinaryIO

from parflow.core.partition import CHUNK_BYTES
from parflow.errors import NotCSVError, RecordTooLargeError, UsageError
from parflow.model import Part
from parflow.storage.sources.base import BOM, BadRecord, Paths, TextSource
from parflow.storage.sources.lines import FRAME, MAX_RECORD, content_size, pass_line
from parflow.storage.sources.opening import STEP, go_to, opened

_QUOTE = b'"'
_EDGE, _PLAIN, _QUOTED = range(3)
"""Where a row is cut: where a quote opens a field (at its beginning) or opens it again (behind a quote); in bare text; in
quotes."""


class Row(bytes):
    """The bytes of a row, and the columns of its file."""

    columns: tuple[str, ...]


@dataclass(init=False)
class CSVSource(TextSource):
    r"""The rows of CSV files, as dicts of text by column. Empty lines are no rows.

    Parameters
    ----------
    paths : str, path or sequence of them
        Files, or patterns with ``*``, ``?``, ``[...]`` and ``**``; local or fsspec URLs.
    delimiter : str
        What stands between fields: one ASCII character.
    header : bool
        Whether each file's first row names its columns.
    columns : sequence of str, optional
        With a header, the columns to keep, in this order; without, the names of all columns.
    quoted_newlines : bool
        Whether a field in quotes may hold newlines. Where a row begins can then only be told from the beginning, so files
        are not cut; with False, large ones are.
    chunk_bytes : int
        Bytes of input in a chunk.
    encoding, fallback : str
        How bytes become text: strictly by ``encoding``, else by ``fallback``, else the row is a dead letter.
    max_record : int
        Bytes in the longest row that is read; a longer one is a dead letter and is passed over.

    Raises
    ------
    UsageError
        For a delimiter, columns or an encoding that can't be used.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "a.csv").write_bytes(b'id,text\n1,"two\nlines"\n')
    ...     source = CSVSource(f"{folder}/*.csv")
    ...     [chunk] = source.chunks(None)
    ...     [(offset, source.decode(raw)) for offset, raw in source.read(chunk.parts[0], 0, None)]
    [(8, {'id': '1', 'text': 'two\nlines'})]
    """

    delimiter: str
    header: bool
    columns: tuple[str, ...] | None
    quoted_newlines: bool

    name = "read_csv"

    def __init__(
        self,
        paths: Paths,
        *,
        delimiter: str = ",",
        header: bool = True,
        columns: Any = None,
        quoted_newlines: bool = True,
        chunk_bytes: int = CHUNK_BYTES,
        encoding: str = "utf-8",
        fallback: str | None = None,
        max_record: int = MAX_RECORD,
    ) -> None:
        super().__init__(paths, chunk_bytes, encoding, fallback, max_record)
        if len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
            raise UsageError(f"delimiter={delimiter!r}: give one ASCII character that is no quote and no newline")
        for codec in (self.encoding, self.fallback):
            if codec is not None and (odd := _ambiguous(codec, delimiter)):
                raise UsageError(f"in {codec}, a {odd!r} can't be told from a part of another character; use read_files")
        self.delimiter = delimiter
        self.header = header
        self.columns = chosen(columns)
        if not header and self.columns is None:
            raise UsageError("files without a header need names for their columns: columns=[…]")
        self.quoted_newlines = quoted_newlines
        self.splittable = not quoted_newlines

    # --- reading -------------------------------------------------------------------------------------------------------

    def read(self, part: Part, offset: int, store: object) -> Iterator[tuple[int, Row | BadRecord]]:  # noqa: ARG002
        """Yield offset and bytes of each row that begins in the part, at or after ``offset``.

        ``offset`` is the part's start, or the offset of a row.

        Raises
        ------
        NotCSVError, NotTextError, RecordTooLargeError
            Why the file's header can't be used.
        """
        stop = maxsize if part.stop is None else part.stop
        with opened(part) as file:
            columns, body = self._header(file, first=offset == 0) if self.header else (self.columns, 0)
            if columns is None:
                return
            if offset <= body:
                offset = body
            elif offset == part.start:  # from the byte before: if it is a newline, a row begins right here
                go_to(file, offset - 1, body)
                offset = pass_line(file, offset - 1, stop)
            else:
                go_to(file, offset, body)
            for begin, _, raw in self._rows(file, offset, stop):
                if isinstance(raw, BadRecord):
                    yield begin, raw
                else:
                    row = Row(raw)
                    row.columns = columns
                    yield begin, row

    def _header(self, file: BinaryIO, *, first: bool) -> tuple[tuple[str, ...] | None, int]:
        """Read the columns' names, None in an empty file, and where the rows begin."""
        counted = dict(self.encodings)
        for _, end, raw in self._rows(file, 0, maxsize):
            names = tuple(self._fields(self.to_text(raw)))
            if not first:  # a header is counted once, by whoever reads the file's beginning
                self.encodings = counted
            if twice := {name for name in names if names.count(name) > 1}:
                raise NotCSVError(f"the header has the column {min(twice)!r} {names.count(min(twice))} times")
            if missing := [name for name in self.columns or () if name not in names]:
                raise NotCSVError(f"the header has no column {missing[0]!r}; it has {_list(names)}")
            return names, end
        return None, 0

    def _rows(self, file: BinaryIO, offset: int, stop: int) -> Iterator[tuple[int, int, bytes | BadRecord]]:
        """Yield beginning, end and bytes of each row that begins before ``stop``, from where the file stands."""
        limit, quoted, has_bom = self.max_record, self.quoted_newlines, self.encoding == "utf-8"
        readline = partial(file.readline, limit + FRAME)
        while offset < stop and (line := readline()):
            begin, offset = offset, offset + len(line)
            if has_bom and not begin and line.startswith(BOM):
                line = line[len(BOM) :]
                self.count("utf-8-sig")
            if len(line) <= len(b"\r\n") and not line.strip(b"\r\n"):
                continue
            row: bytes | BadRecord = line
            if len(line) > limit or (quoted and _QUOTE in line and self._scan(line, _EDGE) == _QUOTED):
                row, offset = self._whole(file, line, offset, stop)
            yield begin, offset, row

    def _whole(self, file: BinaryIO, line: bytes, offset: int, stop: int) -> tuple[bytes | BadRecord, int]:
        """Read on to the end of the row that begins with ``line``, in bounded memory; returns it and its end."""
        pieces, size, state = [line], len(line), self._scan(line, _EDGE)
        most = self.max_record + FRAME
        while not line.endswith(b"\n") or state == _QUOTED:
            if size > most and offset >= stop:
                break
            if not (line := file.readline(min(most, STEP))):
                break
            offset, size, state = offset + len(line), size + len(line), self._scan(line, state)
            if size <= most:
                pieces.append(line)
            else:
                pieces.clear()
        row = b"".join(pieces)
        if size > most or content_size(row) > self.max_record:
            return BadRecord(RecordTooLargeError(self.max_record)), offset
        return row, offset

    def _scan(self, piece: bytes, state: int) -> int:
        """Return the state behind a piece of a row. A quote means nothing but at the edge of a field, as in ``csv``."""
        delimiter = self.delimiter.encode()
        at, end = 0, len(piece) if self.quoted_newlines else 0
        while at < end:
            if state == _QUOTED:
                at = piece.find(_QUOTE, at) + 1
                if not at:
                    return _QUOTED
                state = _EDGE
            elif state == _PLAIN:
                at = piece.find(delimiter + _QUOTE, at) + 1
                if not at:
                    return _EDGE if piece.endswith(delimiter) else _PLAIN
                state = _EDGE
            elif piece.startswith(_QUOTE, at):
                at, state = at + 1, _QUOTED
            else:
                state = _PLAIN
        return state

    # --- decoding ------------------------------------------------------------------------------------------------------

    def decode(self, raw: Row | BadRecord) -> dict[str, str]:
        """Turn a row into a dict.

        Raises
        ------
        NotCSVError, NotTextError, RecordTooLargeError
            Why the row is no record.
        """
        try:
            text = raw.decode(self.encoding)
        except UnicodeError:
            text = self.to_text(raw)
        fields = self._fields(text)
        columns: tuple[str, ...] = raw.columns  # type: ignore[union-attr] # a bad record has raised
        if len(fields) != len(columns):
            count = f"{len(fields)} field{'s' if len(fields) != 1 else ''}"
            raise NotCSVError(f"the row has {count}, but there are {len(columns)} columns: {_list(columns)}")
        row = dict(zip(columns, fields, strict=True))
        return {name: row[name] for name in self.columns} if self.header and self.columns is not None else row

    def _fields(self, text: str) -> list[str]:
        dialect = _dialect(self.delimiter)
        try:
            return next(csv.reader((text,), dialect))
        except csv.Error as error:
            if "field larger than" not in str(error):
                raise NotCSVError(self._reason(str(error))) from None
        # The limit is the process's. It's only ever raised: another thread may be relying on it.
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))
        return self._fields(text)

    def _reason(self, said: str) -> str:
        if said == "unexpected end of data":
            return "a quote is not closed" + ("" if self.quoted_newlines else " on its line, and quoted_newlines=False")
        return "a carriage return that ends no line, outside of quotes" if said.startswith("new-line") else said

    def record_id(self, part: Part, offset: int) -> str:
        """Name a row: its file and the offset of its first byte."""
        return f"{part.path}#{offset}"


def chosen(columns: Any) -> tuple[str, ...] | None:
    """Check the names of columns that somebody chose."""
    if columns is None:
        return None
    names = (columns,) if isinstance(columns, str) else tuple(columns)
    if not names or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise UsageError(f"columns={columns!r}: give the names of columns, each once")
    return names


@functools.cache
def _dialect(delimiter: str) -> Any:
    """Make a dialect once: it takes longer than reading a row. What is not well-formed is an error, never a guess."""
    return csv.reader((), delimiter=delimiter, strict=True).dialect


@functools.cache
def _ambiguous(codec: str, delimiter: str) -> str:
    """Return which of newline, quote and delimiter is not one byte of its own, which is no part of another character."""
    others = (
        b"" if codec == "utf-8" else "".join(map(chr, (*range(0x80, 0xD800), *range(0xE000, 0x10000)))).encode(codec, "ignore")
    )
    return next((mark for mark in ("\n", '"', delimiter) if mark.encode(codec) != mark.encode() or mark.encode() in others), "")


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
