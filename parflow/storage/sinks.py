"""Sinks: records written to a folder of files, one file a piece, all published together when their stage is complete.

A piece writes into a hidden staging folder, ``<path>/.parflow-<run>/``, under a name of its own, so attempts never collide
and readers never see half a result. `Sink.publish` then moves the staged files of the attempts that count to ``part-00000``,
``part-00001``, ... in input order and writes ``_manifest.json`` last: where it stands, the result is complete. Publishing can
be done again after a crash at any point. Readers pass over names that begin with ``_`` or ``.``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, BinaryIO, ClassVar, Protocol, cast

import orjson

from parflow.errors import OutputError, UsageError

Fail = Callable[[Any, Any, Exception], None]

MANIFEST = "_manifest.json"
_PART = re.compile(r"part-\d{5,}\.(jsonl|parquet)")


class StagedFile(Protocol):
    """What `Sink.publish` wants to know of a staged file (`parflow.model.SinkFile`)."""

    @property
    def path(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def size(self) -> int: ...


# --- places ----------------------------------------------------------------------------------------------------------------


class _Local:
    """The few acts a sink needs, on this machine's files."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Return name and size of each entry of a folder; of none when it is missing."""
        try:
            with os.scandir(folder) as entries:
                return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
        except FileNotFoundError:
            return {}

    def is_file(self, path: str) -> bool:
        return os.path.lexists(path) and not os.path.isdir(path)

    def probe(self, folder: str) -> None:
        """Raise OSError unless files can be made in a folder, or in the nearest one above it that exists."""
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass

    def create(self, path: str) -> BinaryIO:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return open(path, "wb", buffering=1 << 20)

    def commit(self, file: BinaryIO, path: str) -> int:
        """Make a created file durable, close it and return its size."""
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
        """Move files within one file system, replacing what stands there."""
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


class _Remote:
    """The same acts on whatever fsspec reaches. A file is written here first, so nothing half-written arrives there."""

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
        return cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - the writer closes it

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


def _place(path: str) -> _Local | _Remote:
    return _Remote(path) if "://" in path else _Local()


# --- the sink --------------------------------------------------------------------------------------------------------------


class Writer:
    """Writes the records of one piece to one staged file."""

    def __init__(self, place: _Local | _Remote, path: str) -> None:
        self.place = place
        self.path = path
        self.rows = 0
        self.file: BinaryIO | None = None

    def write(self, record: Any, tag: Any) -> None:
        """Take one record; raise when it can't be written. ``tag`` comes back with ``fail`` if that shows later."""
        raise NotImplementedError

    def close(self) -> tuple[str, int, int] | None:
        """Make the file durable; return its path, rows and bytes, or None when there is no row and so no file."""
        if self.file is None:
            return None
        size = self.place.commit(self.file, self.path)
        return self.path, self.rows, size

    def abort(self) -> None:
        """Remove what was written."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
            self.place.remove([self.path])

    def out(self) -> BinaryIO:
        """Return the open file; the first call creates it."""
        if self.file is None:
            self.file = self.place.create(self.path)
        return self.file


@dataclass(frozen=True)
class Sink:
    """A folder that records are written to. Pickles by value.

    Attributes
    ----------
    path : str
        A folder: a local path (made absolute, since workers may run elsewhere) or an fsspec URL.
    overwrite : bool
        Whether an earlier result in the folder is replaced; that happens when the new one is published, not before. Files
        that are no parts of a result are left alone.
    """

    extension: ClassVar[str] = ""

    path: str
    overwrite: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        path = os.fspath(self.path)
        if not isinstance(path, str) or not path:
            raise UsageError(f"{self.path!r} is no folder to write to; give a path or a URL such as 's3://bucket/out'")
        path = path.removeprefix("file://")
        path = path.rstrip("/") if "://" in path else os.path.abspath(os.path.expanduser(path))
        object.__setattr__(self, "path", path)

    def check(self) -> None:
        """Find out before a run whether its result could be written.

        Raises
        ------
        OutputError
            The path is a file, or has files already and may not be overwritten, or can't be written.
        """
        try:
            place = _place(self.path)
            if place.is_file(self.path):
                raise OutputError(f"{self.path!r} is a file; a sink writes a folder of files. Give another path.")
            names = sorted(name for name in place.sizes(self.path) if not name.startswith("."))
            place.probe(self.path)
        except OutputError:
            raise
        except Exception as error:
            raise OutputError(
                f"can't write to {self.path!r}: {error}. Check the path, its permissions and the space there."
            ) from error
        if names and not self.overwrite:
            raise OutputError(
                f"{self.path!r} has {len(names)} files already, first {names[0]!r}. Give another path, remove them, or "
                "replace an earlier result with overwrite=True."
            )

    def open(self, run_id: str, name: str, fail: Fail) -> Writer:
        """Start writing one piece.

        Parameters
        ----------
        run_id : str
            The run, which has a staging folder of its own.
        name : str
            The file's name without extension, unique for each attempt.
        fail : callable
            ``fail(tag, record, error)`` is called for each record that turns out later, up to ``close``, not to be writable.

        Returns
        -------
        Writer
        """
        return self._writer(_place(self.path), f"{self._staging(run_id)}/{name}.{self.extension}", fail)

    def publish(self, run_id: str, files: Sequence[StagedFile]) -> dict[str, Any]:
        """Move staged files, in input order, to their final names, and say so in a manifest.

        It may be called again after a crash, with the same files, and then finishes what is left to do.

        Parameters
        ----------
        run_id : str
            The run that wrote them.
        files : sequence of StagedFile
            Path, rows and size (bytes) of each file, in input order.

        Returns
        -------
        dict
            The manifest: ``run_id``, ``rows``, and ``files`` with ``path``, ``rows`` and ``bytes`` each.

        Raises
        ------
        OutputError
            A file is neither staged nor published, or another result appeared in the folder since the run began.
        """
        place, staging = _place(self.path), self._staging(run_id)
        digits = max(5, len(str(len(files) - 1)))
        parts = {f"part-{number:0{digits}d}.{self.extension}": file for number, file in enumerate(files)}
        staged, present = place.sizes(staging), place.sizes(self.path)
        self._check_strangers(run_id, {part: file.size for part, file in parts.items()}, present, place)
        moves = []
        for part, file in parts.items():
            name = os.path.basename(file.path)
            if staged.get(name) == file.size:
                moves.append((f"{staging}/{name}", f"{self.path}/{part}"))
            elif name in staged or present.get(part) != file.size:
                raise OutputError(
                    f"{file.path!r} ({file.rows} rows) should have {file.size} bytes but "
                    f"{f'has {staged[name]}' if name in staged else f'is gone, and {part!r} is not it'}. Something else "
                    f"changed {self.path!r} during the run; run again into another folder."
                )
        if self._published_by(place) != run_id:
            place.remove([f"{self.path}/{MANIFEST}"])  # from here to the new one, no manifest claims a complete result
        place.move(moves)
        place.remove(f"{self.path}/{name}" for name in present if _PART.fullmatch(name) and name not in parts)
        manifest = {
            "run_id": run_id,
            "rows": sum(file.rows for file in files),
            "files": [{"path": part, "rows": file.rows, "bytes": file.size} for part, file in parts.items()],
        }
        aside = f"{staging}/{MANIFEST}"
        with place.create(aside) as out:
            out.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            place.commit(out, aside)
        place.move([(aside, f"{self.path}/{MANIFEST}")])
        place.remove_folder(staging)
        return manifest

    def discard(self, run_id: str) -> None:
        """Remove what a run staged and won't publish."""
        _place(self.path).remove_folder(self._staging(run_id))

    def _writer(self, place: _Local | _Remote, path: str, fail: Fail) -> Writer:
        raise NotImplementedError

    def _staging(self, run_id: str) -> str:
        if not re.fullmatch(r"[\w.-]+", run_id):
            raise UsageError(f"{run_id!r} can't be part of a folder's name; use letters, digits, '_', '.' and '-'")
        return f"{self.path}/.parflow-{run_id}"

    def _published_by(self, place: _Local | _Remote) -> str | None:
        """Return the run that the manifest in the folder names: None without one, "" when it can't be read."""
        data = place.read(f"{self.path}/{MANIFEST}")
        try:
            return None if data is None else str(json.loads(data)["run_id"])
        except (ValueError, KeyError, TypeError):
            return ""

    def _check_strangers(self, run_id: str, ours: dict[str, int], present: dict[str, int], place: _Local | _Remote) -> None:
        if self.overwrite:
            return
        strangers = sorted(name for name, size in present.items() if _PART.fullmatch(name) and ours.get(name) != size)
        if strangers or self._published_by(place) not in (None, run_id):
            raise OutputError(
                f"{self.path!r} has another result, which came there after run {run_id} began: "
                f"{strangers[0] if strangers else MANIFEST!r}. Nothing was moved. Take it away and resume, or run again with "
                "overwrite=True or another path."
            )


# --- JSON lines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JSONLinesSink(Sink):
    """Records as JSON, one a line, in UTF-8.

    A record may be anything that JSON has, and dates, UUIDs, enums, dataclasses and numpy values, which become text, objects
    and arrays. Integers may have any size, and keys that are numbers become text. What JSON can't say raises, and never
    becomes something else quietly: NaN and infinities, bytes, sets, text that is not valid Unicode (lone surrogates), two
    keys that become the same text.

    Examples
    --------
    >>> import tempfile
    >>> sink = JSONLinesSink(tempfile.mkdtemp() + "/out")
    >>> writer = sink.open("run-1", "piece-0", print)
    >>> writer.write({"id": 1}, 0)
    >>> path, rows, size = writer.close()
    >>> rows, size
    (1, 9)
    """

    extension = "jsonl"

    def _writer(self, place: _Local | _Remote, path: str, fail: Fail) -> Writer:  # noqa: ARG002 - write says it at once
        return _JSONLinesWriter(place, path)


class _JSONLinesWriter(Writer):
    def write(self, record: Any, tag: Any) -> None:  # noqa: ARG002
        line = _json_line(record)
        self.out().write(line)
        self.rows += 1


_OPTIONS = orjson.OPT_SERIALIZE_NUMPY


def _json_line(record: Any) -> bytes:
    try:
        line = orjson.dumps(record, option=_OPTIONS | orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:
        return json.dumps(_plain(record), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
    if b"null" in line:
        _plain(record)  # orjson writes NaN as null: look whether one of them is
    return line


def _plain(value: Any) -> Any:
    """Return a value as the types that the json module has, or raise for what JSON can't say."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"JSON has no {value!r}: write None, or a text of your choice, or leave the record out")
        return value
    if isinstance(value, (str, int)):
        return value
    if isinstance(value, dict):
        plain = {_key(key): _plain(item) for key, item in value.items()}
        if len(plain) < len(value):
            raise ValueError("two keys of a mapping become the same text in JSON")
        return plain
    if isinstance(value, list) or type(value) is tuple:
        return list(map(_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (item.name for item in dataclasses.fields(value))
        return {name: _plain(getattr(value, name)) for name in names if not name.startswith("_")}
    if getattr(getattr(value, "dtype", None), "kind", "") == "f":
        return _plain(value.tolist())
    return orjson.loads(orjson.dumps(value, option=_OPTIONS))  # dates and other single values; raises TypeError for others


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, (int, float)) or key is None:
        return json.dumps(_plain(key))
    raise TypeError(f"a key in JSON is text, not {type(key).__qualname__}")


# --- Parquet ---------------------------------------------------------------------------------------------------------------

_COMPRESSIONS = ("zstd", "snappy", "lz4", "gzip", "brotli", "none")


@dataclass(frozen=True)
class ParquetSink(Sink):
    """Records, which must be mappings with text as keys, as rows of Parquet files.

    Without ``schema`` the columns and their types are inferred for each file from its records: nulls take any type, and a
    column with integers and floats becomes float. A record whose value has another type than the column has in the records
    before it is set aside; ``schema`` fixes the types, for all files alike, and is the way to give files of different chunks
    the same columns. A field that the schema lacks is never dropped: its record is set aside. An empty mapping is written as
    null in a column that has nothing else, as Parquet has no type for it.

    Attributes
    ----------
    schema : pyarrow.Schema, optional
        The columns and their types.
    compression : str
        ``zstd`` (the default: about a third smaller than snappy, and nearly as fast), ``snappy``, ``lz4``, ``gzip``,
        ``brotli`` or ``none``.

    Examples
    --------
    >>> import tempfile
    >>> sink = ParquetSink(tempfile.mkdtemp() + "/out")
    >>> writer = sink.open("run-1", "piece-0", print)
    >>> writer.write({"id": 1, "score": 0.5}, 0)
    >>> writer.close()[1]
    1
    """

    schema: Any = field(default=None, kw_only=True)
    compression: str = field(default="zstd", kw_only=True)

    extension = "parquet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compression not in _COMPRESSIONS:
            raise UsageError(f"compression={self.compression!r} is unknown; give one of {', '.join(_COMPRESSIONS)}")
        if self.schema is not None:
            import pyarrow as pa

            if not isinstance(self.schema, pa.Schema):
                raise UsageError(f"schema={self.schema!r} is no pyarrow.Schema; write pyarrow.schema({{'id': 'int64'}})")

    def _writer(self, place: _Local | _Remote, path: str, fail: Fail) -> Writer:
        from parflow.storage.parquet import ParquetWriter

        return ParquetWriter(place, path, fail, self.schema, self.compression)
