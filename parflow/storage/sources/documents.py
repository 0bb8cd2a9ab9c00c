"""Whole files as documents: a record is a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, NamedTuple

from parflow.core.partition import CHUNK_BYTES
from parflow.errors import RecordTooLargeError, UsageError
from parflow.model import Part
from parflow.storage.sources.base import BOM, BadRecord, Paths, TextSource
from parflow.storage.sources.opening import STEP, opened

MAX_DOCUMENT = 1024 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Document:
    """One file.

    Attributes
    ----------
    path : str
        Where it was read.
    content : str or bytes
        All of it, decompressed: text when the source was made with ``mode="text"``, bytes with ``mode="bytes"``.
    encoding : str, optional
        What the text was decoded by; None for bytes.

    Examples
    --------
    >>> Document("a.txt", "good morning", "utf-8").text
    'good morning'
    """

    path: str
    content: str | bytes
    encoding: str | None = None

    @property
    def text(self) -> str:
        """The content as text; UsageError when the files were read as bytes."""
        if isinstance(self.content, str):
            return self.content
        raise UsageError(f"{self.path!r} was read as bytes: use .data, or read_files(..., mode='text')")

    @property
    def data(self) -> bytes:
        """The content as bytes; UsageError when the files were read as text."""
        if isinstance(self.content, bytes):
            return self.content
        raise UsageError(f"{self.path!r} was read as text: use .text, or read_files(..., mode='bytes')")


class RawDocument(NamedTuple):
    """A file's path and bytes, before its text is decoded."""

    path: str
    data: bytes | BadRecord


@dataclass(init=False)
class FilesSource(TextSource):
    r"""Whole files, each a `Document`. Newlines are left as they are; an empty file is an empty document.

    Parameters
    ----------
    paths : str, path or sequence of them
        Files, or patterns with ``*``, ``?``, ``[...]`` and ``**``; local or fsspec URLs.
    mode : {"text", "bytes"}
        What documents hold.
    encoding, fallback : str
        How bytes become text: strictly by ``encoding``, else by ``fallback``, else the file is a dead letter.
    chunk_bytes : int
        Bytes of input in a chunk.
    max_record : int
        Bytes in the largest file that is read; a larger one is a dead letter.

    Raises
    ------
    UsageError
        For an unknown mode or encoding.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "a.html").write_bytes(b"<p>\r\n")
    ...     source = FilesSource(f"{folder}/**/*.html")
    ...     [chunk] = source.chunks(None)
    ...     [source.decode(raw).text for _, raw in source.read(chunk.parts[0], 0, None)]
    ['<p>\r\n']
    """

    mode: Literal["text", "bytes"] = "text"

    name = "read_files"

    def __init__(
        self,
        paths: Paths,
        *,
        mode: Literal["text", "bytes"] = "text",
        encoding: str = "utf-8",
        fallback: str | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        max_record: int = MAX_DOCUMENT,
    ) -> None:
        super().__init__(paths, chunk_bytes, encoding, fallback, max_record)
        if mode not in ("text", "bytes"):
            raise UsageError(f"mode is {mode!r}; give 'text' or 'bytes'")
        self.mode = mode

    def read(self, part: Part, offset: int, store: object) -> Iterator[tuple[int, RawDocument]]:  # noqa: ARG002
        """Yield the one file of a part, unless ``offset`` is behind its beginning."""
        if offset > part.start:
            return
        with opened(part) as file:
            data = _read_all(file, part.size, self.max_record)
        yield 0, RawDocument(part.path, data)

    def decode(self, raw: RawDocument) -> Document:
        """Turn a file into a document.

        Raises
        ------
        NotTextError, RecordTooLargeError
            Why the file is no document.
        """
        path, data = raw
        if isinstance(data, BadRecord):
            raise data.error
        if self.mode == "bytes":
            return Document(path, data)
        if self.encoding == "utf-8" and data.startswith(BOM):
            data, named = data[len(BOM) :], "utf-8-sig"
        else:
            named = self.encoding
        try:
            text = data.decode(self.encoding)
        except UnicodeError:
            text = self.to_text(data)
            return Document(path, text, self.fallback)
        if named != self.encoding:
            self.count(named)
        return Document(path, text, named)

    def record_id(self, part: Part, offset: int) -> str:  # noqa: ARG002
        """Name a document: its path."""
        return part.path


def _read_all(file: BinaryIO, size: int, limit: int) -> bytes | BadRecord:
    """Read to the end, in steps: one large ``read`` would reserve its memory whatever the file holds."""
    pieces: list[bytes] = []
    total = 0
    while piece := file.read(min(max(size, 1024), STEP, limit + 1 - total)):
        pieces.append(piece)
        total += len(piece)
        if total > limit:
            return BadRecord(RecordTooLargeError(limit))
    return b"".join(pieces)
