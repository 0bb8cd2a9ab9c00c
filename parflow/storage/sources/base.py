"""What all sources of files share: paths, chunks, and the policy for encodings."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from parflow.core.partition import FileInfo, partition
from parflow.errors import NotTextError, RecordError, UsageError
from parflow.model import Chunk, Part, Rejected
from parflow.storage.sources.listing import absolute, check_paths, list_files

BOM = codecs.BOM_UTF8

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class BadRecord:
    """Stands in for a record that couldn't be read whole. ``decode`` raises its error, like bytes that are no text."""

    __slots__ = ("error",)

    def __init__(self, error: RecordError) -> None:
        self.error = error

    def __repr__(self) -> str:
        return f"<{self.error}>"

    def decode(self, *_: str) -> NoReturn:
        """Raise what was wrong."""
        raise self.error


@dataclass(init=False)
class FileSource:
    """Files that paths and patterns name."""

    paths: tuple[str, ...]
    chunk_bytes: int
    encodings: dict[str, int] = field(compare=False, repr=False)

    splittable = False
    decodes = True

    def __init__(self, paths: Paths, chunk_bytes: int) -> None:
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not given:
            raise UsageError("no paths given: name at least one file or pattern")
        if chunk_bytes < 1:
            raise UsageError(f"chunk_bytes={chunk_bytes}: it is in bytes, at least 1")
        self.paths = tuple(absolute(path) for path in given)
        self.chunk_bytes = chunk_bytes
        self.encodings = {}

    def check(self) -> None:
        """Raise an InputError when a path can't be read or a pattern matches nothing."""
        check_paths(self.paths)

    def files(self) -> Iterator[FileInfo | Rejected]:
        """List the files, lazily and always in the same order."""
        return list_files(self.paths, self.splittable)

    def chunks(self, store: object) -> Iterator[Chunk | Rejected]:  # noqa: ARG002 - for items only
        """List the files and pack them into chunks, lazily."""
        return partition(self.files(), chunk_bytes=self.chunk_bytes)

    def size(self, part: Part) -> int:
        """Return the bytes of a part, as they are on the disk."""
        return (part.size if part.stop is None else part.stop) - part.start

    def reset(self) -> None:
        """Begin to count encodings anew; what was counted stays with whoever took it."""
        self.encodings = {}


@dataclass(init=False)
class TextSource(FileSource):
    """Files of text.

    ``encodings`` counts the exceptions since the last `reset`: texts that began with a byte order mark (``utf-8-sig``) and
    records that needed the fallback.
    """

    encoding: str
    fallback: str | None
    max_record: int

    def __init__(self, paths: Paths, chunk_bytes: int, encoding: str, fallback: str | None, max_record: int) -> None:
        super().__init__(paths, chunk_bytes)
        if max_record < 1:
            raise UsageError(f"max_record={max_record}: it is in bytes, at least 1")
        self.encoding = _codec(encoding)
        self.fallback = None if fallback is None else _codec(fallback)
        self.max_record = max_record

    def count(self, encoding: str) -> None:
        """Count one use of an encoding that is not the declared one."""
        self.encodings[encoding] = self.encodings.get(encoding, 0) + 1

    def to_text(self, raw: bytes | BadRecord) -> str:
        """Decode strictly, then by the fallback.

        Raises
        ------
        NotTextError
            If the bytes are text in neither encoding.
        RecordTooLargeError
            If the record was too large to be read.
        """
        try:
            return raw.decode(self.encoding)
        except UnicodeError as error:
            if self.fallback is None:
                raise NotTextError(self.encoding, _where(error)) from None
        try:
            text = raw.decode(self.fallback)
        except UnicodeError as error:
            raise NotTextError(f"{self.encoding} or {self.fallback}", _where(error)) from None
        self.count(self.fallback)
        return text


def _codec(name: str) -> str:
    """Return a codec's own name. A UTF-8 byte order mark is dealt with apart, so utf-8-sig is utf-8."""
    try:
        "".encode(name)
        own = codecs.lookup(name).name
    except LookupError as error:
        raise UsageError(f"{error}. Give a text encoding that Python knows, such as 'utf-8' or 'cp1252'") from None
    return "utf-8" if own == "utf-8-sig" else own


def _where(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at position {error.start}: {error.reason}"
    return str(error)
