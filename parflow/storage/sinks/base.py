"""What all sinks share: the folder, its staging, and publishing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar

import orjson

from parflow.errors import OutputError, UsageError
from parflow.model import SinkFile
from parflow.storage.disk import unwritable
from parflow.storage.sinks.places import Place, open_place

Fail = Callable[[Any, Any, Exception], None]

MANIFEST = "_manifest.json"
_PART = re.compile(r"part-\d{5,}\.(jsonl|parquet)")


class Writer:
    """Writes the records of one piece to one staged file."""

    def __init__(self, place: Place, path: str) -> None:
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
            place = open_place(self.path)
            is_file = place.is_file(self.path)
            names = [] if is_file else sorted(name for name in place.sizes(self.path) if not name.startswith("."))
            if not is_file:
                place.probe(self.path)
        except Exception as error:
            raise OutputError(
                f"can't write to {self.path!r}: {error}. Check the path, its permissions and the space there."
            ) from error
        if is_file:
            raise OutputError(f"{self.path!r} is a file, but a sink writes a folder of files. Give another path.")
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
        return self._writer(open_place(self.path), f"{self._staging(run_id)}/{name}.{self.extension}", fail)

    def publish(
        self, run_id: str, files: Sequence[SinkFile], *, again: bool = False, placed: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Move staged files, in input order, to their final names, and say so in a manifest.

        It may be called again after a crash, with the same files, and then finishes what is left to do.

        Parameters
        ----------
        run_id : str
            The run that wrote them.
        files : sequence of SinkFile
            Path, rows and size (bytes) of each file, in input order.
        again : bool
            Whether they take the place of what the same run published before.
        placed : mapping of str to str, optional
            Final names under which some of the files stand since then, by their staged paths.

        Returns
        -------
        dict
            The manifest: ``run_id``, ``rows``, and ``files`` with ``path``, ``rows`` and ``bytes`` each.

        Raises
        ------
        OutputError
            A file is neither staged nor published, another result appeared in the folder since the run began, or the folder
            can't be written.
        """
        try:
            return self._publish(run_id, files, again=again, placed=placed or {})
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _publish(self, run_id: str, files: Sequence[SinkFile], *, again: bool, placed: Mapping[str, str]) -> dict[str, Any]:
        place, staging = open_place(self.path), self._staging(run_id)
        parts = dict(zip(part_names(len(files), self.extension), files, strict=True))
        manifest = {
            "run_id": run_id,
            "rows": sum(file.rows for file in files),
            "files": [{"path": part, "rows": file.rows, "bytes": file.size} for part, file in parts.items()],
        }
        if placed and self._manifest(place).get("run_id") == run_id:
            if self._manifest(place) == manifest:  # all of it was done before a crash
                return manifest
            self._unplace(place, staging, placed)
        staged, present = place.sizes(staging), place.sizes(self.path)
        ours = present if again else {part: file.size for part, file in parts.items()}
        self._check_strangers(run_id, ours, present, place)
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
        if again or self._published_by(place) != run_id:
            place.remove([f"{self.path}/{MANIFEST}"])  # from here to the new one, no manifest claims a complete result
        place.move(moves)
        place.remove(f"{self.path}/{name}" for name in present if _PART.fullmatch(name) and name not in parts)
        aside = f"{staging}/{MANIFEST}"
        with place.create(aside) as out:
            out.write(orjson.dumps(manifest, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
            place.commit(out, aside)
        place.move([(aside, f"{self.path}/{MANIFEST}")])
        place.remove_folder(staging)
        return manifest

    def _unplace(self, place: Place, staging: str, placed: Mapping[str, str]) -> None:
        """Take published files back to where they were staged; the old manifest stands until all are there."""
        staged, present = place.sizes(staging), place.sizes(self.path)
        names = {os.path.basename(path): part for path, part in placed.items()}
        place.move(
            [
                (f"{self.path}/{part}", f"{staging}/{name}")
                for name, part in names.items()
                if name not in staged and part in present
            ]
        )

    def discard(self, run_id: str) -> None:
        """Remove what a run staged and won't publish."""
        open_place(self.path).remove_folder(self._staging(run_id))

    def _writer(self, place: Place, path: str, fail: Fail) -> Writer:
        raise NotImplementedError

    def _staging(self, run_id: str) -> str:
        if not re.fullmatch(r"[\w.-]+", run_id):
            raise UsageError(f"{run_id!r} can't be part of a folder's name; use letters, digits, '_', '.' and '-'")
        return f"{self.path}/.parflow-{run_id}"

    def _published_by(self, place: Place) -> str | None:
        """Return the run that the manifest in the folder names: None without one, "" when it can't be read."""
        data = place.read(f"{self.path}/{MANIFEST}")
        return None if data is None else str(self._manifest(place).get("run_id", ""))

    def _manifest(self, place: Place) -> dict[str, Any]:
        data = place.read(f"{self.path}/{MANIFEST}")
        try:
            found = json.loads(data or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _check_strangers(self, run_id: str, ours: dict[str, int], present: dict[str, int], place: Place) -> None:
        if self.overwrite:
            return
        strangers = sorted(name for name, size in present.items() if _PART.fullmatch(name) and ours.get(name) != size)
        if strangers or self._published_by(place) not in (None, run_id):
            raise OutputError(
                f"{self.path!r} has another result, which came there after run {run_id} began: "
                f"{strangers[0] if strangers else MANIFEST!r}. Nothing was moved. Take it away and resume, or run again with "
                "overwrite=True or another path."
            )


def part_names(count: int, extension: str) -> list[str]:
    """Return the final names of so many files; sorted by name they are in order.

    >>> part_names(2, "jsonl")
    ['part-00000.jsonl', 'part-00001.jsonl']
    """
    digits = max(5, len(str(count - 1)))
    return [f"part-{number:0{digits}d}.{extension}" for number in range(count)]
