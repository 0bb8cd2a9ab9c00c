"""Where a sink's files are: the few acts on files that a sink needs, on this machine or wherever fsspec reaches."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import BinaryIO, Protocol, cast


class Place(Protocol):
    """A folder's files. Paths are whole: local ones absolute, others URLs."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Return name and size (bytes) of each entry of a folder; of none when it is missing."""

    def is_file(self, path: str) -> bool:
        """Tell whether something that is no folder is there."""

    def probe(self, folder: str) -> None:
        """Raise unless files can be made in a folder."""

    def create(self, path: str) -> BinaryIO:
        """Open a new file for writing; nothing of it counts before ``commit``."""

    def commit(self, file: BinaryIO, path: str) -> int:
        """Make a created file durable under its path, close it and return its size (bytes)."""

    def read(self, path: str) -> bytes | None:
        """Return a file's bytes, or None when it is missing."""

    def move(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Move files ``(old, new)`` within the place, replacing what stands there."""

    def remove(self, paths: Iterable[str]) -> None:
        """Remove files, those that are there."""

    def remove_folder(self, folder: str) -> None:
        """Remove a folder and all in it, if it is there."""


def open_place(path: str) -> Place:
    """Return what acts on a path or URL."""
    return _Remote(path) if "://" in path else _Local()


class _Local(Place):
    """Files of this machine, or those it mounts."""

    def sizes(self, folder: str) -> dict[str, int]:
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
        except FileNotFoundError:
            return {}

    def is_file(self, path: str) -> bool:
        return os.path.lexists(path) and not os.path.isdir(path)

    def probe(self, folder: str) -> None:
        while not os.path.lexists(folder):  # the nearest one that exists says it too, and nothing is left behind
            folder = os.path.dirname(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass

    def create(self, path: str) -> BinaryIO:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "wb", buffering=1 << 20)

    def commit(self, file: BinaryIO, path: str) -> int:
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
        file.close()
        self._sync(os.path.dirname(path))
        return size

    def read(self, path: str) -> bytes | None:
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def move(self, pairs: Sequence[tuple[str, str]]) -> None:
        for old, new in pairs:
            os.replace(old, new)
        if pairs:
            self._sync(os.path.dirname(pairs[0][1]))

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def remove_folder(self, folder: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def _sync(self, folder: str) -> None:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _Remote(Place):
    """What fsspec reaches. A file is written here first, so nothing half-written arrives there."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.fs = url_to_fs(url)[0]

    def sizes(self, folder: str) -> dict[str, int]:
        root = self._bare(folder)
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(root, detail=True)
        except FileNotFoundError:
            return {}
        named = ((entry["name"].rstrip("/"), entry["size"] or 0) for entry in entries)
        return {name.rpartition("/")[2]: size for name, size in named if name != root}  # a bucket lists the folder itself

    def is_file(self, path: str) -> bool:
        return bool(self.fs.isfile(self._bare(path)))

    def probe(self, folder: str) -> None:
        trial = self._bare(f"{folder}/.parflow-trial-{os.urandom(6).hex()}")
        self.fs.makedirs(self._bare(folder), exist_ok=True)
        self.fs.pipe_file(trial, b"can a file be written here?")
        self.fs.rm_file(trial)

    def create(self, path: str) -> BinaryIO:  # noqa: ARG002 - it gets its name when it is complete
        return cast("BinaryIO", tempfile.TemporaryFile())

    def commit(self, file: BinaryIO, path: str) -> int:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        bare = self._bare(path)
        self.fs.makedirs(bare.rpartition("/")[0], exist_ok=True)
        with file, self.fs.open(bare, "wb") as there:
            shutil.copyfileobj(file, there, 1 << 20)
        return size

    def read(self, path: str) -> bytes | None:
        try:
            return bytes(self.fs.cat_file(self._bare(path)))
        except FileNotFoundError:
            return None

    def move(self, pairs: Sequence[tuple[str, str]]) -> None:
        from fsspec.asyn import AsyncFileSystem

        bare = [(self._bare(old), self._bare(new)) for old, new in pairs]
        if not isinstance(self.fs, AsyncFileSystem):
            for old, new in bare:
                self.fs.mv(old, new)
            return
        for start in range(0, len(bare), 500):  # object stores only copy: many at once, or it takes hours
            olds, news = map(list, zip(*bare[start : start + 500], strict=True))
            self.fs.copy(olds, news)
            self.fs.rm(olds)

    def remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            with suppress(FileNotFoundError):
                self.fs.rm_file(self._bare(path))

    def remove_folder(self, folder: str) -> None:
        self.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self.fs.rm(self._bare(folder), recursive=True)

    def _bare(self, path: str) -> str:
        return str(self.fs._strip_protocol(path)).rstrip("/")  # noqa: SLF001 - the method all file systems define
