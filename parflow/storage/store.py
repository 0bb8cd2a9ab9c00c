"""Results by key: an object is written beside its final name, flushed and moved, so it is there whole or not at all.

A key is a relative path such as ``run/stage/chunk``. No segment of it begins with a dot: such names are kept for what is
still being written, which `Store.keys` never shows. Objects are pickles, so a local store is private to its user; who may
write to a bucket may run code wherever parflow reads it.
"""

# ruff: noqa: D102 - what the methods do is said once, in Store

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from parflow.errors import StoreError
from parflow.model import Ref, digest
from parflow.storage.disk import out_of
from parflow.storage.trust import make_folder, private_folder, sync_folder

_UNFINISHED = ".unfinished-"
_ATOMIC_PUT = frozenset(("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory"))


class Store(Protocol):
    """A place for results. Stores are safe to use from several threads and processes, and pickle by their URL.

    A ``prefix`` names whole segments: ``run-1`` is the object ``run-1`` and all below ``run-1/``, never ``run-10``; the
    empty prefix is everything. Methods raise `StoreError` when the place can't be read or written.

    Examples
    --------
    >>> store = open_store("memory://examples")
    >>> store.put("run/stage/chunk", b"a result")
    'run/stage/chunk'
    >>> store.get("run/stage/chunk"), list(store.keys("run"))
    (b'a result', ['run/stage/chunk'])
    >>> store.delete("run")
    """

    url: str

    def put(self, name: str, data: bytes) -> str:
        """Write an object, or replace one as a whole, and return its key, ``name``, once it would outlast a power cut."""
        ...

    def get(self, key: str) -> bytes:
        """Return an object's bytes."""
        ...

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes ``start`` to ``stop`` of an object, at least one; `StoreError` when it doesn't have them all."""
        ...

    def exists(self, key: str) -> bool:
        """Tell whether there is such an object."""
        ...

    def size(self, key: str) -> int:
        """Return an object's size in bytes."""
        ...

    def keys(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys of finished objects, sorted."""
        ...

    def delete(self, prefix: str) -> None:
        """Remove all objects under a prefix; none is no error."""
        ...

    def sweep(self, before: float) -> int:
        """Remove what writers left unfinished before a time (seconds since 1970), and return how many files that were."""
        ...

    def get_checked(self, ref: Ref) -> bytes:
        """Return the bytes that a reference means, inline or fetched, once their size and digest are verified.

        Raises
        ------
        StoreError
            When they are not the bytes that the reference was made of.
        """
        data = ref.inline if ref.inline is not None else self.get(ref.key or "")
        for what, expected, got in (
            ("size", f"{ref.size} bytes", f"{len(data)} bytes"),
            ("digest", ref.digest, digest(data)),
        ):
            if got != expected:
                raise StoreError(damaged(self.url, ref.key, f"its {what} is {got}, expected {expected}"))
        return data


def damaged(url: str, key: str | None, what: str) -> str:
    """Say that an object, or a result at hand (no key), is not what was written, and what to do."""
    place = "an inline result" if key is None else f"object {key!r} of the store {url!r}"
    return (
        f"{place} is not what was written: {what}. The storage damaged it or something else wrote there. Nothing was computed "
        "from it: put a copy of it back and resume the run, or start the run anew, so that what made it runs again."
    )


def open_store(url: str, *, create: bool = True) -> Store:
    """Open a store: a local folder, or any place that fsspec knows.

    Parameters
    ----------
    url : str
        A path or ``file://`` URL; or another URL, such as ``s3://bucket/results``.
    create : bool
        Whether a missing local folder is created (mode 0700). One that has results already is never created anew: an empty
        one in its place would hide that it was moved or is not mounted, and stand in the way when it comes back.

    Raises
    ------
    StoreError
        When the local folder is missing and not to be created, belongs to somebody else or others may write to it, or the
        URL can't be used.

    Examples
    --------
    >>> import tempfile
    >>> store = open_store(tempfile.mkdtemp())
    >>> store.put("answer", b"42"), store.size("answer")
    ('answer', 2)
    """
    path = url.removeprefix("file://")
    return FsspecStore(url) if "://" in path else LocalStore(path, create=create)


class LocalStore(Store):
    """A store in a folder of this machine, or one that all machines mount."""

    def __init__(self, path: str, create: bool = True) -> None:
        self.url = os.path.abspath(os.path.expanduser(path))
        if not create and not os.path.isdir(self.url):
            raise StoreError(_gone(self.url))
        private_folder(self.url, StoreError)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalStore, (self.url, False)

    def put(self, name: str, data: bytes) -> str:
        path = self._path(name)
        folder = os.path.dirname(path)
        unfinished = os.path.join(folder, _UNFINISHED + os.urandom(12).hex())
        with _translated(self.url, f"write {len(data):,} bytes as", name):
            make_folder(folder, within=self.url)
            try:
                with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished)
                raise
            sync_folder(folder)
        return name

    def get(self, key: str) -> bytes:
        with _translated(self.url, "read", key), open(self._path(key), "rb") as file:
            return file.read()

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        with _translated(self.url, "read", key), open(self._path(key), "rb") as file:
            file.seek(_checked_range(key, start, stop))
            return _complete(file.read(stop - start), self.url, key, start, stop)

    def exists(self, key: str) -> bool:
        return os.path.isfile(self._path(key))

    def size(self, key: str) -> int:
        with _translated(self.url, "read", key):
            return os.stat(self._path(key)).st_size

    def keys(self, prefix: str = "") -> Iterator[str]:
        place = self._place(prefix)
        for path in [place] if os.path.isfile(place) else _walk(place):
            if not os.path.basename(path).startswith("."):
                yield os.path.relpath(path, self.url)

    def delete(self, prefix: str) -> None:
        with _translated(self.url, "delete", prefix):
            for path in [self._place(prefix)] if prefix else [entry.path for entry in os.scandir(self.url)]:
                with suppress(FileNotFoundError, NotADirectoryError):
                    if os.path.isdir(path):
                        shutil.rmtree(path)
                    else:
                        os.unlink(path)

    def sweep(self, before: float) -> int:
        removed = 0
        for path in _walk(self.url):
            if os.path.basename(path).startswith(_UNFINISHED):
                with suppress(FileNotFoundError):
                    if os.stat(path).st_mtime < before:
                        os.unlink(path)
                        removed += 1
        return removed

    def _path(self, key: str) -> str:
        return f"{self.url}/{_checked_key(key)}"

    def _place(self, prefix: str) -> str:
        return self._path(prefix.removesuffix("/")) if prefix else self.url


class FsspecStore(Store):
    """A store anywhere that fsspec reaches. Object stores put whole objects; elsewhere the file is written, then moved."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url
        try:
            self._files, self._root = url_to_fs(url)
        except (ImportError, ValueError) as cause:
            raise StoreError(f"can't open the store {url!r}: {cause}") from cause
        self._root = self._root.rstrip("/")
        self._puts_whole = url.partition("://")[0] in _ATOMIC_PUT

    def __reduce__(self) -> tuple[Any, ...]:
        return FsspecStore, (self.url,)

    def put(self, name: str, data: bytes) -> str:
        path = self._path(name)
        with _translated(self.url, f"write {len(data):,} bytes as", name):
            if self._puts_whole:
                self._files.pipe_file(path, data)
                return name
            folder = path.rpartition("/")[0]
            unfinished = f"{folder}/{_UNFINISHED}{os.urandom(12).hex()}"
            self._files.makedirs(folder, exist_ok=True)
            self._files.pipe_file(unfinished, data)
            self._files.mv(unfinished, path)
        return name

    def get(self, key: str) -> bytes:
        with _translated(self.url, "read", key):
            return bytes(self._files.cat_file(self._path(key)))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        with _translated(self.url, "read", key):
            data = self._files.cat_file(self._path(key), start=_checked_range(key, start, stop), end=stop)
            return _complete(bytes(data), self.url, key, start, stop)

    def exists(self, key: str) -> bool:
        self._files.invalidate_cache()
        return bool(self._files.isfile(self._path(key)))

    def size(self, key: str) -> int:
        self._files.invalidate_cache()
        with _translated(self.url, "read", key):
            return int(self._files.size(self._path(key)))

    def keys(self, prefix: str = "") -> Iterator[str]:
        found = [path.removeprefix(self._root).lstrip("/") for path in self._find(prefix)]
        return iter(sorted(key for key in found if not key.rpartition("/")[2].startswith(".")))

    def delete(self, prefix: str) -> None:
        # Object by object, never a folder: removing an empty prefix must not remove a bucket.
        if found := self._find(prefix):
            with _translated(self.url, "delete", prefix):
                self._files.rm(found)

    def sweep(self, before: float) -> int:
        old = [
            path
            for path in self._find("")
            if path.rpartition("/")[2].startswith(_UNFINISHED) and self._files.modified(path).timestamp() < before
        ]
        if old:
            with _translated(self.url, "delete", "unfinished objects"):
                self._files.rm(old)
        return len(old)

    def _find(self, prefix: str) -> list[str]:
        self._files.invalidate_cache()  # other processes write here too
        with _translated(self.url, "list", prefix):
            return list(self._files.find(self._path(prefix.removesuffix("/")) if prefix else self._root))

    def _path(self, key: str) -> str:
        return f"{self._root}/{_checked_key(key)}"


def _checked_key(key: str) -> str:
    if any(not segment or segment.startswith(".") for segment in key.split("/")) or "\\" in key or "\0" in key:
        raise StoreError(f"{key!r} is no key: write a relative path, such as 'run/stage/chunk', without segments like '..'")
    return key


def _checked_range(key: str, start: int, stop: int) -> int:
    if not 0 <= start < stop:  # also because some object stores answer an empty range with all of the object
        raise StoreError(f"can't read bytes {start} to {stop} of {key!r}: a range starts at 0 or later and is not empty.")
    return start


def _complete(data: bytes, url: str, key: str, start: int, stop: int) -> bytes:
    if len(data) != stop - start:
        raise StoreError(damaged(url, key, f"it is shorter, and of bytes {start} to {stop} it has {len(data)}"))
    return data


def _walk(folder: str) -> Iterator[str]:
    """Yield the paths of all files below a folder, sorted as text; a missing or vanishing folder is empty."""
    try:
        with os.scandir(folder) as found:
            entries = [(f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name, entry.path) for entry in found]
    except (FileNotFoundError, NotADirectoryError):
        return
    for name, path in sorted(entries):
        if name.endswith("/"):
            yield from _walk(path) if not name.startswith(".") else ()
        else:
            yield path


@contextmanager
def _translated(url: str, act: str, key: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as cause:
        local = "://" not in url
        if local and not os.path.isdir(url):
            raise StoreError(f"can't {act} {key!r}: {_gone(url)}") from cause
        if act != "read":
            raise StoreError(f"can't {act} {key!r} in the store {url!r}: its folder went away meanwhile.") from cause
        raise StoreError(
            f"the store {url!r} has no object {key!r}. Was it deleted, or is {url!r} another place on this machine?"
        ) from cause
    except OSError as cause:
        raise StoreError(f"can't {act} {key!r} in the store {url!r}: {out_of(cause, url)}") from cause


def _gone(url: str) -> str:
    return (
        f"the folder of the store {url!r} is gone. Was it moved, or is its disk not mounted? Put it back, then resume the run."
    )
