"""From paths and patterns to files, in one order that never varies.

Local folders are walked lazily: a folder's names are sorted, its files are looked at one by one. Other URLs go through
fsspec, which lists at once. Nothing is opened here except by `check_paths`, and only regular files.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from parflow.core.partition import FileInfo
from parflow.errors import InputError, NoInputError, NotAFileError, UnreadableInputError
from parflow.model import Rejected
from parflow.storage.sources.opening import COMPRESSED, filesystem, is_remote, local_stamp, reason, remote_stamp

_MAGIC = re.compile(r"[*?\[]").search
_KINDS: dict[int, str] = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def absolute(path: str | os.PathLike[str]) -> str:
    """Return a path that means the same everywhere: a URL as it is, else an absolute path with ``~`` expanded.

    >>> absolute("s3://bucket/*.txt"), absolute("file:///tmp/./a.txt")
    ('s3://bucket/*.txt', '/tmp/a.txt')
    """
    text = os.fsdecode(path)
    for scheme in ("file://", "local://"):
        text = text.removeprefix(scheme)
    return text if is_remote(text) else os.path.abspath(os.path.expanduser(text))


# --- what a source calls ---------------------------------------------------------------------------------------------


def list_files(paths: Sequence[str], splittable: bool) -> Iterator[FileInfo | Rejected]:
    """Yield the files that absolute paths and patterns name, each once.

    The order is that of ``paths``, then folder by folder, by name. What can't be a file (a pipe, a device, a link to
    nothing, a folder that can't be listed) comes as Rejected; folders that a pattern matches are passed over. Links are
    followed, but not back into a folder that led there. Hidden names are met only by patterns that begin with a dot.
    """
    seen: set[str] = set()
    for path in paths:
        for found in _list_remote(path) if is_remote(path) else _list_local(path):
            if len(paths) > 1:
                if found.path in seen:
                    continue
                seen.add(found.path)
            if isinstance(found, FileInfo) and splittable and not found.path.lower().endswith(COMPRESSED):
                found = FileInfo(found.path, found.size, found.stamp, splittable=True)  # noqa: PLW2901
            yield found


def check_paths(paths: Sequence[str]) -> None:
    """Raise the InputError of the first path or pattern that gives nothing."""
    for path in paths:
        if is_remote(path):
            _check_remote(path)
        else:
            _check_local(path)


def _check_local(path: str) -> None:
    base, pattern = _split(path)
    try:
        if pattern:
            os.scandir(base).close()
        else:
            _refuse_other_kinds(path, os.stat(path).st_mode)
            os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        if pattern and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise NoInputError(path, base) from None
        raise UnreadableInputError(base, reason(error)) from None
    if pattern and next(_list_local(path), None) is None:
        raise NoInputError(path, base)


def _refuse_other_kinds(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        folder = path if stat.S_ISDIR(mode) else os.path.dirname(path)
        raise NotAFileError(path, _KINDS.get(stat.S_IFMT(mode), "something else"), os.path.join(folder, "*"))


def _reject(path: str, error: InputError) -> Rejected:
    return Rejected(path, type(error).__name__, str(error))


# --- local folders ---------------------------------------------------------------------------------------------------

Rule = Callable[[str], object] | None
"""Whether a name fits one segment of a pattern; None stands for ``**``."""


def _list_local(path: str) -> Iterator[FileInfo | Rejected]:
    base, pattern = _split(path)
    if not pattern:
        yield _look(path)
        return
    if pattern[-1] == "**":
        pattern.append("*")
    rules = tuple(_rule(segment) for segment in pattern)
    yield from _walk(base, _through(rules, 1), rules, ())


def _split(path: str) -> tuple[str, list[str]]:
    """Split an absolute path before its first pattern segment. What exists literally is no pattern."""
    base, segments = "/", path.strip("/").split("/")
    for i, segment in enumerate(segments):
        here = os.path.join(base, segment)
        if _MAGIC(segment) and not os.path.lexists(here):
            return base, segments[i:]
        base = here
    return base, []


@functools.cache
def _rule(segment: str) -> Rule:
    if segment == "**":
        return None
    fits = re.compile(fnmatch.translate(segment)).match
    return fits if segment.startswith(".") else lambda name: not name.startswith(".") and fits(name)


# A pattern may be read in several ways at once ("**/a/**/a/*"), so a walk stands at a set of places in it: bit i is set
# when the next name may fit rule i, and the bit behind the last rule when the whole pattern has been used up.


def _through(rules: Sequence[Rule], places: int) -> int:
    """Add the place behind each ``**``, which may stand for no folder at all."""
    for i, rule in enumerate(rules):
        if rule is None and places >> i & 1:
            places |= 1 << i + 1
    return places


def _next(rules: Sequence[Rule], places: int, name: str) -> int:
    """Return the places in the pattern after ``name``."""
    after = 0
    for i, rule in enumerate(rules):
        if places >> i & 1:
            if rule is not None:
                after |= bool(rule(name)) << i + 1
            elif not name.startswith("."):
                after |= 1 << i
    return _through(rules, after)


def _walk(folder: str, places: int, rules: Sequence[Rule], above: tuple[tuple[int, int], ...]) -> Iterator[FileInfo | Rejected]:
    """Yield what a folder and those below it hold for the pattern; ``above`` are the folders that led here."""
    found: list[tuple[str, int, bool]] = []
    end = 1 << len(rules)
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link to a folder that it is in
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                after = _next(rules, places, entry.name)
                if after and ((is_folder := _is_folder(entry)) or after & end):
                    found.append((entry.name, after, is_folder))
    except OSError as error:
        yield _reject(folder, UnreadableInputError(folder, reason(error)))
        return
    found.sort()
    for name, after, is_folder in found:
        path = os.path.join(folder, name)
        if not is_folder:
            yield _look(path)
        elif after & ~end:
            yield from _walk(path, after, rules, (*above, here))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _look(path: str) -> FileInfo | Rejected:
    try:
        status = os.stat(path)
        _refuse_other_kinds(path, status.st_mode)
    except OSError as error:
        return _reject(path, UnreadableInputError(path, reason(error)))
    except NotAFileError as error:
        return _reject(path, error)
    return FileInfo(path, status.st_size, local_stamp(status), splittable=False)


# --- everything else -------------------------------------------------------------------------------------------------


def _check_remote(url: str) -> None:
    info = _remote_info(url)
    if info is None:
        if not _MAGIC(url):
            raise UnreadableInputError(url, "no such file")
        if next(_list_remote(url), None) is None:
            raise NoInputError(url, re.split(r"[*?\[]", url, maxsplit=1)[0])
    elif info["type"] != "file":
        raise NotAFileError(url, f"a {info['type']}", url.rstrip("/") + "/*")


def _list_remote(url: str) -> Iterator[FileInfo | Rejected]:
    if (info := _remote_info(url)) is not None:
        found = {url: info}
    elif _MAGIC(url):
        files, path = filesystem(url)
        found = {_rejoin(url, files.unstrip_protocol(name)): info for name, info in files.glob(path, detail=True).items()}
        if "/." not in url:
            found = {name: info for name, info in found.items() if "/." not in name}
    else:
        found = {}
        yield _reject(url, UnreadableInputError(url, "no such file"))
    for name, info in sorted(found.items()):
        if info["type"] == "file":
            if info.get("size") is None:  # listing web pages gives names only
                info = _remote_info(name) or info  # noqa: PLW2901
            yield FileInfo(name, info.get("size") or 0, remote_stamp(info), splittable=False)
        elif info["type"] != "directory" or name == url:
            yield _reject(name, NotAFileError(name, f"a {info['type']}", name.rstrip("/") + "/*"))


def _remote_info(url: str) -> dict[str, Any] | None:
    files, path = filesystem(url)
    try:
        info: dict[str, Any] = files.info(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableInputError(url, reason(error)) from None
    return info


def _rejoin(url: str, name: str) -> str:
    """Put a listed name into a chained URL (``zip://*.txt::s3://bucket/all.zip``) in place of the pattern."""
    links = url.split("::")
    links[0 if "://" in links[0] else 1] = name
    return "::".join(links)
