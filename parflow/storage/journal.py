"""The history of all runs in one SQLite file: entries are appended, never changed, by the one coordinator that owns a run.

A coordinator *acquires* a run and gets an epoch, a number that grows with every owner. Each append names its epoch and is
refused once somebody else holds a later one, so a coordinator that was taken for dead can't write into its successor's
history. An owner that is dead is recognised at once on the machine where it ran; otherwise its lease has to expire.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from parflow.errors import FencedError, JournalError, RunNotFoundError, RunOwnedError
from parflow.storage.disk import room
from parflow.storage.trust import check_private, network_type, private_folder, sync_folder

VERSION = 2
"""Of the tables below; kept in the file as its ``user_version``."""

PATIENCE = 60.0
"""Seconds to wait for another process's transaction."""

_SCHEMA = """
CREATE TABLE runs (run_id TEXT PRIMARY KEY, flow TEXT NOT NULL, created REAL NOT NULL, note TEXT NOT NULL);

CREATE TABLE entries (
    run_id TEXT NOT NULL, seq INTEGER NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL,
    PRIMARY KEY (run_id, seq)
) WITHOUT ROWID;

CREATE INDEX entries_by_kind ON entries (run_id, kind, seq);

CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'history is append-only'); END;

CREATE TRIGGER entries_last BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'history is append-only'); END;

CREATE TABLE leases (
    run_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL, expires REAL NOT NULL,
    host TEXT NOT NULL, boot_id TEXT NOT NULL, pid INTEGER NOT NULL, started REAL NOT NULL
) WITHOUT ROWID;
"""

_REQUESTS = """
CREATE TABLE IF NOT EXISTS requests (
    run_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL, at REAL NOT NULL, body TEXT NOT NULL
) WITHOUT ROWID;
"""
"""What others ask of a run's owner, who has that epoch; came with version 2."""

LOOK = 1.0
"""Seconds between two looks of an owner for what is asked of it."""

_RUNS = """
SELECT runs.run_id, flow, created, note, status.kind, status.body, epoch, expires, host, boot_id, pid, started
FROM runs
LEFT JOIN leases ON leases.run_id = runs.run_id
LEFT JOIN entries AS status ON status.run_id = runs.run_id AND status.seq = (
    SELECT max(seq) FROM entries WHERE run_id = runs.run_id AND kind IN (SELECT value FROM json_each(?))
)
ORDER BY created DESC, runs.rowid DESC
"""

_ADVICE = {
    "SQLITE_NOTADB": "It is not a SQLite file: move it away, or set PARFLOW_HOME to another folder.",
    "SQLITE_CORRUPT": "The file is damaged: copy it, then `sqlite3 COPY .recover` saves what can still be read.",
    "SQLITE_FULL": "What was written before is kept. Free some disk space there, then resume the run.",
    "SQLITE_BUSY": f"Another process has been writing to it for {PATIENCE:g} s: is one of them stopped or stuck?",
    "SQLITE_READONLY": "Check that you may write to it and to its folder.",
    "SQLITE_CANTOPEN": "Check that you may write to it and to its folder.",
    "SQLITE_IOERR": "The disk gave an error: check its space and its health, then resume the run.",
}


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that can own runs: ``pid`` among the processes that ``boot_id`` names, started at ``started``.

    ``started`` is in clock ticks since the machine started, which a change of the clock doesn't move.
    """

    host: str
    boot_id: str
    pid: int
    started: float


@dataclass(frozen=True, slots=True)
class Lease:
    """Who owns a run, since which epoch and until when (seconds since 1970; 0: given back); ``alive`` when it was read."""

    epoch: int
    expires: float
    owner: Owner
    alive: bool


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run in a listing. ``status`` and ``status_body`` are its newest entry of the kinds that were asked for."""

    run_id: str
    flow: str
    created: float
    note: dict[str, Any]
    status: str | None
    status_body: bytes | None
    lease: Lease | None


@dataclass(frozen=True, slots=True)
class Row:
    """An entry as it is kept: number ``seq`` of its run (from 1), written ``at`` (seconds since 1970)."""

    seq: int
    at: float
    kind: str
    body: bytes


def this_process() -> Owner:
    """Return the owner that the running process is."""
    pid = os.getpid()
    try:
        # Process ids mean something only within one start of the machine, and within one container.
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        boot_id = os.uname().nodename
    return Owner(os.uname().nodename, boot_id, pid, _started(pid) or 0.0)


class Journal:
    """The history in a file, for any number of processes and threads on one machine.

    Parameters
    ----------
    path : str
        The file, which is created (mode 0600, its folder 0700) when missing.
    mounts : str
        Where the list of mounted file systems is.

    Raises
    ------
    JournalError
        When the file is not a journal of this version of parflow, is damaged, can't be trusted, or lies on a network file
        system, where SQLite's locks don't hold. Every method raises it when the file can't be read or written.

    Examples
    --------
    >>> import os, tempfile
    >>> journal = Journal(os.path.join(tempfile.mkdtemp(), "journal.sqlite"))
    >>> journal.create("run-1", "flow.py:sentiment", at=0.0, note={"source": "data/*.jsonl"})
    >>> epoch = journal.acquire("run-1", this_process(), now=0.0)
    >>> journal.append("run-1", epoch, [("started", b"{}"), ("listed", b"{}")], at=1.0)
    2
    >>> [(row.seq, row.kind) for row in journal.read("run-1")]
    [(1, 'started'), (2, 'listed')]
    >>> journal.find("last").run_id
    'run-1'
    >>> journal.close()
    """

    def __init__(self, path: str, mounts: str = "/proc/mounts") -> None:
        self.path = os.path.abspath(os.path.expanduser(path))
        self._lock = threading.RLock()
        folder = os.path.dirname(self.path)
        _refuse_network(folder, mounts)
        private_folder(folder, JournalError)
        with _translated(self.path):
            if not os.path.exists(self.path):
                _create(self.path)
            check_private(self.path, JournalError)
            self._db = _connect(self.path)
            try:
                self._check_version()
                self._db.execute("PRAGMA synchronous = FULL")  # a commit outlasts a power cut
            except BaseException:
                self._db.close()
                raise

    def create(self, run_id: str, flow: str, at: float, note: dict[str, Any]) -> None:
        """Add a run that started ``at`` (seconds since 1970); ``note`` is what JSON can hold."""
        with self._transaction() as db:
            self._create(db, run_id, flow, at, note)

    def begin(
        self, run_id: str, flow: str, at: float, note: dict[str, Any], owner: Owner, entries: Sequence[tuple[str, bytes]]
    ) -> int:
        """Add a run, make ``owner`` its owner and write its first entries: all of it or nothing; returns the epoch."""
        with self._transaction() as db:
            self._create(db, run_id, flow, at, note)
            epoch = self._acquire(db, run_id, owner, at, 30.0)
            self._append(db, run_id, entries, at)
        return epoch

    def _create(self, db: sqlite3.Connection, run_id: str, flow: str, at: float, note: dict[str, Any]) -> None:
        if db.execute("SELECT 1 FROM runs WHERE run_id = ?", (run_id,)).fetchone():
            raise JournalError(f"there is a run {run_id!r} in {self.path} already: resume it, or choose another name.")
        db.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", (run_id, flow, at, json.dumps(note)))

    def runs(self, status_kinds: Sequence[str] = (), now: float | None = None) -> list[RunRow]:
        """Return all runs, newest first; ``status_kinds`` are the kinds of entries that say what a run's status is."""
        now = time.time() if now is None else now
        return [
            RunRow(run_id, flow, created, json.loads(note), kind, body, _lease(lease, now) if lease[0] else None)
            for run_id, flow, created, note, kind, body, *lease in self._rows(_RUNS, json.dumps(list(status_kinds)))
        ]

    def find(self, name: str, status_kinds: Sequence[str] = (), now: float | None = None) -> RunRow:
        """Return the run with this id, or whose id alone begins so, or the newest one for ``last`` or ``latest``.

        Raises
        ------
        RunNotFoundError
            When there is none.
        JournalError
            When several ids begin so; it lists them.
        """
        rows = self.runs(status_kinds, now)
        found = [row for row in rows if row.run_id == name]
        if not found and name in {"last", "latest"}:
            found = rows[:1]
        if not found and name:
            found = [row for row in rows if row.run_id.startswith(name)]
        if not found:
            raise RunNotFoundError(name, self.path)
        if len(found) > 1:
            ids = ", ".join(row.run_id for row in found[:10]) + (" and more" if len(found) > 10 else "")
            raise JournalError(f"{name!r} begins the names of {len(found)} runs: {ids}. Write more of the name.")
        return found[0]

    def acquire(self, run_id: str, owner: Owner, now: float, ttl: float = 30.0) -> int:
        """Make ``owner`` the owner of a run for ``ttl`` seconds, and return the new epoch.

        Raises
        ------
        RunOwnedError
            When another owner is alive.
        """
        with self._transaction() as db:
            self._must_exist(run_id)
            return self._acquire(db, run_id, owner, now, ttl)

    @staticmethod
    def _acquire(db: sqlite3.Connection, run_id: str, owner: Owner, now: float, ttl: float) -> int:
        query = "SELECT epoch, expires, host, boot_id, pid, started FROM leases WHERE run_id = ?"
        row = db.execute(query, (run_id,)).fetchone()
        lease = _lease(row, now) if row else None
        if lease and lease.alive and lease.owner != owner:
            who = f"process {lease.owner.pid} on {lease.owner.host} (for {lease.expires - now:.0f} s more)"
            raise RunOwnedError(run_id, who)
        epoch = lease.epoch + 1 if lease else 1
        db.execute(
            "INSERT OR REPLACE INTO leases (run_id, epoch, expires, host, boot_id, pid, started) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (run_id, epoch, now + ttl, owner.host, owner.boot_id, owner.pid, owner.started),
        )
        return epoch

    def ask(self, run_id: str, epoch: int, request: dict[str, Any], at: float) -> None:
        """Ask something of a run's owner, in place of what it was asked before; `FencedError` when the run has another one."""
        with self._transaction() as db:
            self._check_epoch(run_id, epoch)
            db.execute("INSERT OR REPLACE INTO requests VALUES (?, ?, ?, ?)", (run_id, epoch, at, json.dumps(request)))

    def asked(self, run_id: str, epoch: int) -> dict[str, Any] | None:
        """Return what is asked of the owner that has this epoch."""
        rows = self._rows("SELECT body FROM requests WHERE run_id = ? AND epoch = ?", run_id, epoch)
        return dict(json.loads(rows[0][0])) if rows else None

    def renew(self, run_id: str, epoch: int, now: float, ttl: float = 30.0) -> None:
        """Keep a run for ``ttl`` seconds from ``now``; raise `FencedError` when it has another owner."""
        self._set_expiry(run_id, epoch, now + ttl)

    def release(self, run_id: str, epoch: int) -> None:
        """Give a run back, so that it can be acquired at once; raise `FencedError` when it has another owner."""
        self._set_expiry(run_id, epoch, 0.0)

    def append(self, run_id: str, epoch: int, entries: Sequence[tuple[str, bytes]], at: float) -> int:
        """Append entries, each a kind and a JSON body, all or none of them, and return the last one's number.

        Raises
        ------
        FencedError
            When the run has another owner: nothing was written.
        """
        with self._transaction() as db:
            self._check_epoch(run_id, epoch)
            return self._append(db, run_id, entries, at)

    @staticmethod
    def _append(db: sqlite3.Connection, run_id: str, entries: Sequence[tuple[str, bytes]], at: float) -> int:
        (last,) = db.execute("SELECT coalesce(max(seq), 0) FROM entries WHERE run_id = ?", (run_id,)).fetchone()
        db.executemany(
            "INSERT INTO entries (run_id, seq, at, kind, body) VALUES (?, ?, ?, ?, ?)",
            ((run_id, seq, at, kind, body) for seq, (kind, body) in enumerate(entries, last + 1)),
        )
        return int(last) + len(entries)

    def read(self, run_id: str, after: int = 0) -> Iterator[Row]:
        """Yield a run's entries in order, from the one that follows number ``after``."""
        with _translated(self.path), self._lock:
            self._must_exist(run_id)
        return self._pages(run_id, after)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _pages(self, run_id: str, after: int) -> Iterator[Row]:
        # Page by page: a reader that takes its time holds up neither a writer nor the cleaning of the write-ahead log.
        query = "SELECT seq, at, kind, body FROM entries WHERE run_id = ? AND seq > ? ORDER BY seq LIMIT 1000"
        while page := [Row(*row) for row in self._rows(query, run_id, after)]:
            yield from page
            after = page[-1].seq

    def _rows(self, query: str, *values: Any) -> list[Any]:
        with _translated(self.path), self._lock:
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _translated(self.path), self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _must_exist(self, run_id: str) -> None:
        if not self._db.execute("SELECT 1 FROM runs WHERE run_id = ?", (run_id,)).fetchone():
            raise RunNotFoundError(run_id, self.path)

    def _check_epoch(self, run_id: str, epoch: int) -> None:
        self._must_exist(run_id)
        held = self._db.execute("SELECT epoch FROM leases WHERE run_id = ?", (run_id,)).fetchone() or (0,)
        if held[0] != epoch:
            raise FencedError(run_id, epoch, held[0])

    def _set_expiry(self, run_id: str, epoch: int, expires: float) -> None:
        with self._transaction() as db:
            self._check_epoch(run_id, epoch)
            db.execute("UPDATE leases SET expires = ? WHERE run_id = ?", (expires, run_id))

    def _check_version(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise JournalError(
                f"the journal {self.path} is of a newer parflow (its version is {version}, this one knows up to {VERSION}). "
                "Upgrade parflow, or set PARFLOW_HOME to another folder."
            )
        if version < 1:
            raise JournalError(f"{self.path} is not a journal of parflow. Move it away, or set PARFLOW_HOME to another folder.")
        if version < VERSION:
            self._db.executescript(f"BEGIN IMMEDIATE; {_REQUESTS} PRAGMA user_version = {VERSION}; COMMIT")


class Writer:
    """Appends to a run from a thread of its own: what is handed in during one commit goes into the next as a whole.

    It also keeps the lease: it renews it three times per ``ttl``, whether or not there is something to write. About
    once a second it looks for what others ask of the run's owner.

    Parameters
    ----------
    journal, run_id, epoch
        Where to append, and with which epoch, which `Journal.acquire` returned.
    on_durable : callable
        Called after each commit, in the writer's thread, with the number of entries that are now durable, counted from the
        first one handed in.
    on_error : callable
        Called once, in the writer's thread, when writing failed for good. Later calls of `append` and `flush` raise the error.
    on_request : callable, optional
        Called in the writer's thread with each thing that is asked of the owner.
    ttl : float
        Seconds that the lease is renewed for.
    clock : callable
        Returns seconds since 1970.

    Examples
    --------
    >>> import os, tempfile
    >>> journal = Journal(os.path.join(tempfile.mkdtemp(), "journal.sqlite"))
    >>> journal.create("run-1", "flow.py:sentiment", at=0.0, note={})
    >>> epoch = journal.acquire("run-1", this_process(), now=time.time())
    >>> writer = Writer(journal, "run-1", epoch, on_durable=lambda count: print(count, "durable"), on_error=print)
    >>> writer.append("started", b"{}")
    1
    >>> writer.close()
    1 durable
    >>> journal.close()
    """

    def __init__(
        self,
        journal: Journal,
        run_id: str,
        epoch: int,
        on_durable: Callable[[int], None],
        on_error: Callable[[BaseException], None],
        ttl: float = 30.0,
        clock: Callable[[], float] = time.time,
        on_request: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self._journal, self._run_id, self._epoch = journal, run_id, epoch
        self._on_durable, self._on_error = on_durable, on_error
        self._ttl, self._clock = ttl, clock
        self._on_request = on_request
        self._request: dict[str, Any] | None = None
        self._changed = threading.Condition()
        self._queue: list[tuple[str, bytes]] = []
        self._tickets = 0
        self._durable = 0
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"parflow-journal-{run_id}", daemon=True)
        self._thread.start()

    def append(self, kind: str, body: bytes) -> int:
        """Hand in an entry, and return its ticket at once: how many were handed in so far."""
        with self._changed:
            if self._error:
                raise self._error
            if self._closing:
                raise JournalError(f"run {self._run_id}: its writer is closed; entry {kind!r} was not written.")
            self._queue.append((kind, body))
            self._tickets += 1
            self._changed.notify_all()
            return self._tickets

    def flush(self) -> None:
        """Wait until all that was handed in is durable and reported; raise the error if it can't be written."""
        with self._changed:
            wanted = self._tickets
            self._changed.wait_for(lambda: self._durable >= wanted or self._error)
            if self._durable < wanted and self._error:
                raise self._error

    def close(self) -> None:
        """Write what was handed in, stop, and release the run. An error was told to ``on_error`` and is not raised again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with suppress(JournalError):  # a lease that can't be given back expires
            self._journal.release(self._run_id, self._epoch)

    def _work(self) -> None:
        try:
            renewed = looked = time.monotonic()
            while True:
                batch, last = self._take()
                if time.monotonic() - renewed >= self._ttl / 3:
                    self._journal.renew(self._run_id, self._epoch, self._clock(), self._ttl)
                    renewed = time.monotonic()
                if time.monotonic() - looked >= LOOK:
                    self._look()
                    looked = time.monotonic()
                if batch:
                    self._journal.append(self._run_id, self._epoch, batch, self._clock())
                    done = self._durable + len(batch)
                    self._on_durable(done)
                    with self._changed:
                        self._durable = done
                        self._changed.notify_all()
                elif last:
                    return
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread has to be told, nobody joins it
            with self._changed:
                self._error = error
                self._changed.notify_all()
            self._on_error(error)

    def _look(self) -> None:
        request = self._journal.asked(self._run_id, self._epoch)
        if request is not None and request != self._request:
            self._request = request
            self._on_request(request)

    def _take(self) -> tuple[list[tuple[str, bytes]], bool]:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing, timeout=min(LOOK, self._ttl / 3))
            batch, self._queue = self._queue, []
            return batch, self._closing


def _connect(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)


def _create(path: str) -> None:
    """Put a complete, empty journal at ``path`` unless another process was faster."""
    unfinished = f"{path}.{os.urandom(8).hex()}"
    os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        with closing(_connect(unfinished)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(f"BEGIN; {_SCHEMA} {_REQUESTS} PRAGMA user_version = {VERSION}; COMMIT")
        with suppress(FileExistsError):
            os.link(unfinished, path)
    finally:
        os.unlink(unfinished)
    sync_folder(os.path.dirname(path))


def _refuse_network(folder: str, mounts: str) -> None:
    try:
        with open(mounts, errors="surrogateescape") as file:
            kind = network_type(os.path.realpath(folder), file.read())
    except OSError:
        return  # not Linux
    if kind:
        raise JournalError(
            f"{folder} is on a network file system ({kind}), where the journal's locks don't hold and its file gets damaged. "
            "Set PARFLOW_HOME to a folder on a local disk."
        )


def _lease(row: Sequence[Any], now: float) -> Lease:
    epoch, expires, *process = row
    owner = Owner(*process)
    return Lease(epoch, expires, owner, alive=expires > now and not _is_gone(owner))


def _is_gone(owner: Owner) -> bool:
    """Tell whether an owner certainly doesn't run any more, which is known only of processes that are visible from here."""
    here = this_process()
    visible = (owner.host, owner.boot_id) == (here.host, here.boot_id)
    return visible and _started(owner.pid) != owner.started


def _started(pid: int) -> float | None:
    """Return when a running process started (clock ticks since the machine did), or None when it doesn't run."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state, *fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None if os.path.exists("/proc/self/stat") else _started_elsewhere(pid)
    return None if state in {b"Z", b"X"} else float(fields[18])


def _started_elsewhere(pid: int) -> float | None:
    import psutil

    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return None


@contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as cause:
        name = "_".join(getattr(cause, "sqlite_errorname", "").split("_")[:2])
        advice = _ADVICE.get(name, "Nothing of this was written.")
        left = room(path) if name in ("SQLITE_FULL", "SQLITE_IOERR") else ""
        raise JournalError(f"can't use the journal {path}: {cause}{left}. {advice}") from cause
    except OSError as cause:
        raise JournalError(f"can't create the journal {path}: {cause.strerror}. Choose another place.") from cause
