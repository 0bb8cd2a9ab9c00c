"""Open a part of a file: decompressed, and only while it is the file that was listed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, BinaryIO, cast

from parflow.errors import InputChangedError, UnreadableInputError, UsageError
from parflow.model import Part

BUFFER = 256 * 1024
STEP = 1024 * 1024
"""Bytes read at a time when they are only passed over."""

Version = tuple[int, str]
"""Size and stamp of a file."""

_MARKS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "CRC")
"""What filesystems say of a file that changes with it, best first."""


@contextmanager
def opened(part: Part) -> Iterator[BinaryIO]:
    """Open the file of a part for reading, decompressed, at its beginning.

    Raises
    ------
    InputChangedError
        If size or stamp differ from the part's, on entering or, had all gone well, on leaving.
    UnreadableInputError
        For whatever opening or reading raises: a missing file, a broken disk, a damaged or cut stream.
    """
    try:
        file, version = _open_remote(part) if is_remote(part.path) else _open_local(part.path)
        with file:
            _compare(part, version())
            yield _decompressed(file, part.path)
            _compare(part, version())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UnreadableInputError(part.path, reason(error)) from error


def go_to(file: BinaryIO, offset: int, here: int = 0) -> None:
    """Move to an offset; a stream, which stands at ``here``, passes over what is before it."""
    if file.seekable():
        file.seek(offset)
        return
    offset -= here
    while offset > 0:
        piece = file.read(min(offset, STEP))
        if not piece:
            raise EOFError(f"the file ends {offset} bytes before the place to go on from")
        offset -= len(piece)


def _compare(part: Part, now: Version) -> None:
    size, stamp = now
    if size != part.size:
        raise InputChangedError(part.path, f"it had {part.size:,} bytes, it has {size:,}")
    if stamp != part.stamp:
        raise InputChangedError(part.path, "it was written to since")


def _open_local(path: str) -> tuple[BinaryIO, Callable[[], Version]]:
    file = open(path, "rb", buffering=BUFFER, opener=_opener)  # noqa: SIM115

    def version() -> Version:
        status = os.fstat(file.fileno())
        return status.st_size, local_stamp(status)

    return file, version


def _opener(path: str, flags: int) -> int:
    # Without O_NONBLOCK, a pipe that took the file's place since it was listed would hang us.
    return os.open(path, flags | os.O_NONBLOCK)


def _open_remote(part: Part) -> tuple[BinaryIO, Callable[[], Version]]:
    files, path = filesystem(part.path)

    def version() -> Version:
        files.invalidate_cache()
        info = files.info(path)
        mark = part.stamp.partition("=")[0]
        return info.get("size") or 0, remote_stamp(info, (mark,)) or part.stamp

    return cast("BinaryIO", io.BufferedReader(files.open(path, "rb"), BUFFER)), version


# --- what listing and reading agree on ---------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Say whether fsspec opens the path."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL, and the path there."""
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"can't open {url!r}: {error}") from None
    return files, path


def local_stamp(status: os.stat_result) -> str:
    """Return what tells one version of a local file from the next."""
    return str(status.st_mtime_ns)


def remote_stamp(info: dict[str, Any], marks: Sequence[str] = _MARKS) -> str:
    """Return what tells one version of a remote file from the next, with the mark's name; empty if there is none."""
    for mark in marks:
        if (value := info.get(mark)) is not None:
            return f"{mark}={value.timestamp() if isinstance(value, datetime) else value}"
    return ""


def reason(error: BaseException) -> str:
    """Say in a few words why something couldn't be read."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# --- compression -----------------------------------------------------------------------------------------------------


class _Stream(io.RawIOBase):
    """A decompressor as a raw file that says it can't seek, so that nobody rewinds it by accident."""

    def __init__(self, readinto1: Callable[[Any], int]) -> None:
        self._readinto1 = readinto1

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._readinto1(buffer)


class _Zstd:
    """Zstandard frames, one after the other; a cut frame is an error (``ZstdDecompressor.stream_reader`` says nothing)."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._data = memoryview(b"")
        self._rest = b""

    def readinto1(self, buffer: Any) -> int:
        while not self._data:
            piece = self._rest or self._file.read(1024)  # small: 4 bytes can stand for 128 KiB
            self._rest = b""
            if not piece:
                if self._frame is not None:
                    raise EOFError("the compressed stream is cut short")
                return 0
            self._data = memoryview(self._feed(piece))
        size = min(len(buffer), len(self._data))
        buffer[:size] = self._data[:size]
        self._data = self._data[size:]
        return size

    def _feed(self, piece: bytes) -> bytes:
        import zstandard

        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            data: bytes = self._frame.decompress(piece)
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from None
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return data


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _Zstd,
}
COMPRESSED = tuple(_DECOMPRESSORS)
"""Suffixes of files that are decompressed while they are read, and so can't be split."""


def _decompressed(file: BinaryIO, path: str) -> BinaryIO:
    decompressor = _DECOMPRESSORS.get(path[path.rfind(".") :].lower())
    if decompressor is None:
        return file
    # readinto1 gives what there is; readinto would go on, and lose it all when the stream turns out to be damaged.
    return cast("BinaryIO", io.BufferedReader(_Stream(decompressor(file).readinto1), BUFFER))
