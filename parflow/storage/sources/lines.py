"""Lines of text files, and JSON lines: a record is a line, named by the offset of its first byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from sys import maxsize
from typing import Any, BinaryIO

import orjson

from parflow.core.partition import CHUNK_BYTES
from parflow.errors import NotJSONError, RecordTooLargeError, UsageError
from parflow.model import Part
from parflow.storage.sources.base import BOM, BadRecord, Paths, TextSource
from parflow.storage.sources.opening import STEP, go_to, opened

MAX_RECORD = 64 * 1024 * 1024
FRAME = len(BOM) + len(b"\r\n")

# orjson makes floats of integers beyond 64 bits, which have 19 digits or more. Looking for such a run in every line costs
# more than parsing it; but a run of 19 has a digit at two neighbouring places of every ninth byte, and that is cheap to ask.
_NINTH = slice(None, None, 9)
_DIGITS = bytes(ord("0" if chr(byte).isdecimal() and byte < 128 else " ") for byte in range(256))
_LONG_NUMBER = re.compile(rb"[0-9]{19}").search


class LinesSource(TextSource):
    r"""The lines of text files, without their ``\n`` or ``\r\n``; empty lines are records too.

    Parameters
    ----------
    paths : str, path or sequence of them
        Files, or patterns with ``*``, ``?``, ``[...]`` and ``**``; local or fsspec URLs.
    chunk_bytes : int
        Bytes of input in a chunk.
    encoding, fallback : str
        How bytes become text: strictly by ``encoding``, else by ``fallback``, else the line is a dead letter.
    max_record : int
        Bytes in the longest line that is read; a longer one is a dead letter and is passed over.

    Raises
    ------
    UsageError
        For an unknown encoding, or one in which a newline is not one byte (UTF-16).

    Examples
    --------
    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "a.txt").write_bytes(b"one\ntwo\r\n")
    ...     source = LinesSource(f"{folder}/*.txt")
    ...     [chunk] = source.chunks(None)
    ...     [(offset, source.decode(raw)) for offset, raw in source.read(chunk.parts[0], 0, None)]
    [(0, 'one'), (4, 'two')]
    """

    name = "read_lines"
    splittable = True
    _skips_blank = False

    def __init__(
        self,
        paths: Paths,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        encoding: str = "utf-8",
        fallback: str | None = None,
        max_record: int = MAX_RECORD,
    ) -> None:
        super().__init__(paths, chunk_bytes, encoding, fallback, max_record)
        for codec in (self.encoding, self.fallback):
            if codec is not None and "\n".encode(codec) != b"\n":
                raise UsageError(f"{codec} has no one-byte newline, so its lines can't be found; use read_files")

    def read(self, part: Part, offset: int, store: object) -> Iterator[tuple[int, bytes | BadRecord]]:  # noqa: ARG002
        """Yield offset and bytes of each line that begins in the part, at or after ``offset``.

        ``offset`` is the part's start, or the offset of a line.
        """
        limit, skips_blank, has_bom = self.max_record, self._skips_blank, self.encoding == "utf-8"
        stop = maxsize if part.stop is None else part.stop
        with opened(part) as file:
            offset = _go_to_line(file, part, offset, stop)
            if offset >= stop:
                return
            for line in iter(partial(file.readline, limit + FRAME), b""):
                size = len(line)
                if has_bom and not offset and line.startswith(BOM):
                    line = line[len(BOM) :]  # noqa: PLW2901
                    self.count("utf-8-sig")
                if size > limit and content_size(line) > limit:
                    yield offset, BadRecord(RecordTooLargeError(limit))
                    offset = offset + size if line.endswith(b"\n") else pass_line(file, offset + size, stop)
                else:
                    if not (skips_blank and line.isspace()) and line:
                        yield offset, line
                    offset += size
                if offset >= stop:
                    break

    def decode(self, raw: bytes | BadRecord) -> Any:
        """Turn a line into text.

        Raises
        ------
        NotTextError, RecordTooLargeError
            Why the line is no record.
        """
        try:
            text = raw.decode(self.encoding)
        except UnicodeError:
            text = self.to_text(raw)
        return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")

    def record_id(self, part: Part, offset: int) -> str:
        """Name a line: its file and the offset of its first byte."""
        return f"{part.path}#{offset}"


class JSONLinesSource(LinesSource):
    """The values of JSON lines, one a line; blank lines are no records. Parameters as for `LinesSource`.

    Integers are exact whatever their size, and what Python's own ``json`` accepts is accepted: NaN, lone surrogates.

    Examples
    --------
    >>> source = JSONLinesSource("a.jsonl")
    >>> source.decode(b'{"id": 123456789012345678901}')
    {'id': 123456789012345678901}
    """

    name = "read_jsonl"
    _skips_blank = True

    def decode(self, raw: bytes | BadRecord) -> Any:
        """Turn a line into its JSON value.

        Raises
        ------
        NotJSONError, NotTextError, RecordTooLargeError
            Why the line is no record.
        """
        try:
            value = orjson.loads(raw if self.encoding == "utf-8" else raw.decode(self.encoding))  # type: ignore[arg-type]
        except ValueError:
            return self._by_python(raw)
        sample = raw[_NINTH].translate(_DIGITS)  # type: ignore[index]
        place = sample.find(b"00")
        while place >= 0:
            if _LONG_NUMBER(raw, max(0, 9 * place - 18), 9 * place + 28):  # type: ignore[arg-type]
                return self._by_python(raw)
            place = sample.find(b"00", place + 1)
        return value

    def _by_python(self, raw: bytes | BadRecord) -> Any:
        text = self.to_text(raw)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise NotJSONError(f"{error.msg} at column {error.colno}") from None
        except RecursionError:
            raise NotJSONError("nested too deeply") from None
        except ValueError as error:
            raise NotJSONError(str(error)) from None


def content_size(line: bytes) -> int:
    """Return the bytes of a line without its end."""
    return len(line) - (2 if line.endswith(b"\r\n") else line.endswith(b"\n"))


def _go_to_line(file: BinaryIO, part: Part, offset: int, stop: int) -> int:
    """Move to the first line that begins at or after the part's start, or to the exact offset of a line."""
    if offset == part.start > 0:
        # From the byte before: if it is a newline, a line begins right here.
        go_to(file, offset - 1)
        return pass_line(file, offset - 1, stop)
    go_to(file, offset)
    return offset


def pass_line(file: BinaryIO, offset: int, stop: int) -> int:
    """Pass over the rest of a line in bounded memory, no further than ``stop``; return where that ends."""
    while offset < stop and (piece := file.readline(STEP)):
        offset += len(piece)
        if piece.endswith(b"\n"):
            break
    return offset
