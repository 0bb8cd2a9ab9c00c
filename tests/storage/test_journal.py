"""The journal: appended in order by one owner at a time, whatever dies."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from parflow.errors import FencedError, JournalError, RunNotFoundError, RunOwnedError
from parflow.storage.journal import VERSION, Journal, Owner, Writer, this_process

ANN = Owner("ann's machine", "boot 1", 11, 1.0)
BOB = Owner("bob's machine", "boot 2", 22, 2.0)
ONE = [("note", b"{}")]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "home" / "journal.sqlite")


@pytest.fixture
def journal(path: str) -> Iterator[Journal]:
    with closing(Journal(path)) as journal:
        journal.create("run", "flow.py:flow", at=0.0, note={})
        yield journal


def bodies(journal: Journal, run_id: str = "run") -> list[bytes]:
    return [row.body for row in journal.read(run_id)]


# --- entries -----------------------------------------------------------------------------------------------------------


def test_entries_are_read_in_the_order_they_were_appended_numbered_without_gaps(journal: Journal) -> None:
    journal.create("other", "flow", at=0.0, note={})
    other = journal.acquire("other", ANN, now=0.0)
    epoch = journal.acquire("run", ANN, now=0.0)
    assert journal.append("run", epoch, [("a", b'{"x":1}'), ("b", b"")], at=1.0) == 2
    assert journal.append("other", other, ONE, at=1.5) == 1
    assert journal.append("run", epoch, [("c", b"3")], at=2.0) == 3
    assert [(row.seq, row.at, row.kind, row.body) for row in journal.read("run")] == [
        (1, 1.0, "a", b'{"x":1}'),
        (2, 1.0, "b", b""),
        (3, 2.0, "c", b"3"),
    ]
    assert [row.seq for row in journal.read("run", after=2)] == [3]
    assert list(journal.read("run", after=3)) == []


def test_appending_nothing_changes_nothing(journal: Journal) -> None:
    epoch = journal.acquire("run", ANN, now=0.0)
    journal.append("run", epoch, ONE, at=0.0)
    assert journal.append("run", epoch, [], at=0.0) == 1
    assert len(bodies(journal)) == 1


def test_a_long_history_is_read_whole_even_while_it_grows(journal: Journal) -> None:
    epoch = journal.acquire("run", ANN, now=0.0)
    journal.append("run", epoch, [("n", b"%d" % n) for n in range(2500)], at=0.0)
    rows = journal.read("run")
    first = next(rows)
    journal.append("run", epoch, [("n", b"2500")], at=0.0)
    assert [first.body, *(row.body for row in rows)] == [b"%d" % n for n in range(2501)]


def test_an_entry_that_cannot_be_written_takes_its_whole_batch_with_it(journal: Journal) -> None:
    epoch = journal.acquire("run", ANN, now=0.0)
    broken: list[tuple[str, bytes]] = [*ONE, (None, b"")]  # type: ignore[list-item]
    with pytest.raises(JournalError, match="NOT NULL"):
        journal.append("run", epoch, broken, at=0.0)
    assert journal.append("run", epoch, ONE, at=0.0) == 1


def test_history_is_append_only(journal: Journal, path: str) -> None:
    journal.append("run", journal.acquire("run", ANN, now=0.0), ONE, at=0.0)
    with closing(sqlite3.connect(path)) as other:
        for statement in ("DELETE FROM entries", "UPDATE entries SET body = ''"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                other.execute(statement)


def test_entries_outlast_the_journal_that_wrote_them(journal: Journal, path: str) -> None:
    journal.append("run", journal.acquire("run", ANN, now=0.0), ONE, at=0.0)
    with closing(Journal(path)) as other:
        assert bodies(other) == [b"{}"]
    journal.close()
    with closing(Journal(path)) as other:
        assert bodies(other) == [b"{}"]


def test_threads_share_a_journal(journal: Journal) -> None:
    epoch = journal.acquire("run", ANN, now=0.0)

    def append_many(name: str) -> None:
        for number in range(50):
            journal.append("run", epoch, [(name, b"%d" % number)], at=0.0)
            list(journal.read("run"))

    threads = [threading.Thread(target=append_many, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = list(journal.read("run"))
    assert [row.seq for row in rows] == list(range(1, 201))
    for name in "abcd":
        assert [row.body for row in rows if row.kind == name] == [b"%d" % number for number in range(50)]


def test_coordinators_write_to_their_runs_at_the_same_time(path: str) -> None:
    start, failed = threading.Barrier(4), []

    def append_many(run_id: str) -> None:
        try:
            with closing(Journal(path)) as journal:
                journal.create(run_id, "flow", at=0.0, note={})
                epoch = journal.acquire(run_id, ANN, now=0.0)
                start.wait()
                for number in range(100):
                    assert journal.append(run_id, epoch, ONE, at=0.0) == number + 1
        except Exception as error:
            failed.append(error)
            start.abort()

    threads = [threading.Thread(target=append_many, args=(run_id,)) for run_id in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


# --- runs --------------------------------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first_with_note_status_and_owner(journal: Journal) -> None:
    journal.create("newer", "flow.py:other", at=7.0, note={"source": "data/*.jsonl", "ä": [1, None]})
    journal.create("newest", "flow.py:other", at=7.0, note={})
    epoch = journal.acquire("newer", ANN, now=8.0, ttl=30)
    history = [("started", b"1"), ("chunk", b"2"), ("stopped", b"3"), ("chunk", b"4")]
    journal.append("newer", epoch, history, at=8.0)
    newest, newer, run = journal.runs(("started", "stopped", "finished"), now=9.0)
    assert (newest.run_id, newer.run_id, run.run_id) == ("newest", "newer", "run")
    assert (newer.flow, newer.created, newer.note) == ("flow.py:other", 7.0, {"source": "data/*.jsonl", "ä": [1, None]})
    assert (newer.status, newer.status_body) == ("stopped", b"3")
    assert (run.status, run.status_body, run.lease) == (None, None, None)
    assert newer.lease is not None
    assert (newer.lease.epoch, newer.lease.owner, newer.lease.expires, newer.lease.alive) == (1, ANN, 38.0, True)


def test_a_status_is_only_looked_for_among_the_kinds_asked_for(journal: Journal) -> None:
    journal.append("run", journal.acquire("run", ANN, now=0.0), ONE, at=0.0)
    assert [row.status for row in journal.runs()] == [None]
    assert [row.status for row in journal.runs(["note"])] == ["note"]


def test_a_run_is_found_by_id_by_the_start_of_it_and_as_the_last_one(journal: Journal) -> None:
    journal.create("run-20", "flow", at=1.0, note={})
    journal.create("run-21", "flow", at=2.0, note={})
    assert journal.find("run").run_id == "run"
    assert journal.find("run-20").run_id == "run-20"
    assert journal.find("last").run_id == journal.find("latest").run_id == "run-21"
    journal.create("fast", "flow", at=0.5, note={})
    assert journal.find("fa").run_id == "fast"
    with pytest.raises(JournalError, match=r"'run-2' begins the names of 2 runs: run-21, run-20"):
        journal.find("run-2")


@pytest.mark.parametrize("name", ["", "none", "r%", "RUN"])
def test_a_run_that_is_not_there_is_named_with_the_place_that_was_searched(journal: Journal, name: str) -> None:
    lookups: list[Callable[[str], object]] = [journal.find]
    if name != "":
        lookups += [journal.read, lambda name: journal.acquire(name, ANN, 0.0), lambda name: journal.append(name, 1, ONE, 0.0)]
    for look in lookups:
        with pytest.raises(RunNotFoundError) as caught:
            look(name)
        assert repr(name) in str(caught.value)
        assert journal.path in str(caught.value)


def test_an_empty_journal_has_no_last_run(path: str) -> None:
    with closing(Journal(path)) as journal:
        assert journal.runs() == []
        with pytest.raises(RunNotFoundError):
            journal.find("last")


def test_a_run_is_created_once(journal: Journal) -> None:
    with pytest.raises(JournalError, match=r"a run 'run' in .* already"):
        journal.create("run", "flow", at=0.0, note={})
    with pytest.raises(TypeError):
        journal.create("unwritable", "flow", at=0.0, note={"x": object()})
    assert [row.run_id for row in journal.runs()] == ["run"]


# --- leases ------------------------------------------------------------------------------------------------------------


def test_epochs_grow_with_every_owner(journal: Journal) -> None:
    assert journal.acquire("run", ANN, now=0.0, ttl=10) == 1
    assert journal.acquire("run", ANN, now=1.0, ttl=10) == 2
    journal.release("run", 2)
    assert journal.acquire("run", BOB, now=1.0, ttl=10) == 3


def test_a_lease_keeps_others_out_until_it_expires_or_is_given_back(journal: Journal) -> None:
    epoch = journal.acquire("run", ANN, now=0.0, ttl=10)
    with pytest.raises(RunOwnedError, match=r"process 11 on ann's machine \(for 1 s more\)"):
        journal.acquire("run", BOB, now=9.0)
    journal.renew("run", epoch, now=9.0, ttl=10)
    with pytest.raises(RunOwnedError):
        journal.acquire("run", BOB, now=18.0)
    assert journal.acquire("run", BOB, now=19.0) == 2


def test_who_lost_a_run_can_write_renew_and_release_no_more(journal: Journal) -> None:
    lost = journal.acquire("run", ANN, now=0.0, ttl=10)
    held = journal.acquire("run", BOB, now=11.0, ttl=10)
    for act in (
        lambda: journal.append("run", lost, ONE, at=12.0),
        lambda: journal.renew("run", lost, now=12.0),
        lambda: journal.release("run", lost),
    ):
        with pytest.raises(FencedError) as caught:
            act()
        assert caught.value.args == ("run", lost, held)
    assert bodies(journal) == []
    with pytest.raises(RunOwnedError):
        journal.acquire("run", ANN, now=12.0)


def test_nobody_writes_to_a_run_without_owning_it(journal: Journal) -> None:
    with pytest.raises(FencedError):
        journal.append("run", 1, ONE, at=0.0)
    assert bodies(journal) == []


def test_this_process_is_alive_and_another_with_its_number_is_not_it(journal: Journal) -> None:
    me = this_process()
    assert me == this_process()
    journal.acquire("run", me, now=0.0, ttl=10)
    assert [row.lease.alive for row in journal.runs(now=1.0) if row.lease] == [True]
    with pytest.raises(RunOwnedError):
        journal.acquire("run", BOB, now=1.0)
    journal.release("run", 1)
    journal.acquire("run", replace(me, started=me.started - 100), now=1.0, ttl=10)  # as if the number was used again
    assert [row.lease.alive for row in journal.runs(now=1.0) if row.lease] == [False]
    assert journal.acquire("run", BOB, now=1.0) == 3


CHILD = """
import json, sys, time
from parflow.errors import ParflowError
from parflow.storage.journal import Journal, this_process
journal = Journal(sys.argv[1])
epoch = journal.acquire("run", this_process(), now=0.0, ttl=10)
print("owns", flush=True)
for line in sys.stdin:
    try:
        print(journal.append("run", epoch, [("child", line.encode())], at=0.0), flush=True)
    except ParflowError as error:
        print(type(error).__name__, flush=True)
"""


@pytest.fixture
def child(journal: Journal) -> Iterator[subprocess.Popen[str]]:
    """Another process, which owns the run and appends each line that it gets."""
    command = [sys.executable, "-c", CHILD, journal.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert answer(process) == "owns"
        yield process
        process.kill()


def answer(process: subprocess.Popen[str], line: str = "") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        print(line, file=process.stdin)
    return process.stdout.readline().strip()


def test_a_run_of_a_killed_process_is_taken_over_at_once(journal: Journal, child: subprocess.Popen[str]) -> None:
    with pytest.raises(RunOwnedError, match=f"process {child.pid} on "):
        journal.acquire("run", this_process(), now=1.0)
    assert answer(child, "kept") == "1"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, while nobody has asked for its exit code yet
    assert journal.acquire("run", this_process(), now=1.0) == 2
    assert child.wait() == -signal.SIGKILL
    assert journal.acquire("run", this_process(), now=1.0) == 3
    assert bodies(journal) == [b"kept\n"]


def test_a_run_of_a_killed_process_elsewhere_is_taken_over_when_its_lease_expires(
    journal: Journal, child: subprocess.Popen[str], path: str
) -> None:
    child.kill()
    child.wait()
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE leases SET host = 'elsewhere'")
    with pytest.raises(RunOwnedError, match="on elsewhere"):
        journal.acquire("run", this_process(), now=9.0)
    assert journal.acquire("run", this_process(), now=10.0) == 2


def test_a_process_that_came_back_after_its_lease_expired_is_fenced(journal: Journal, child: subprocess.Popen[str]) -> None:
    assert answer(child, "mine") == "1"
    epoch = journal.acquire("run", this_process(), now=11.0)
    assert answer(child, "too late") == "FencedError"
    journal.append("run", epoch, [("parent", b"ours")], at=11.0)
    assert answer(child, "too late") == "FencedError"
    assert bodies(journal) == [b"mine\n", b"ours"]


# --- the model ---------------------------------------------------------------------------------------------------------


@dataclass
class ModelRun:
    entries: list[bytes] = field(default_factory=list)
    epoch: int = 0
    owner: Owner | None = None
    expires: float = 0.0


class JournalMachine(RuleBasedStateMachine):
    """Two connections to one file against plain Python, with owners on other machines and a clock of our own."""

    RUN = st.sampled_from(["a", "b"])
    WHICH = st.integers(0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.journals = [Journal(f"{self.folder.name}/journal.sqlite") for _ in range(2)]
        self.model = {"a": ModelRun(), "b": ModelRun()}
        self.now = 0.0

    @initialize()
    def create(self) -> None:
        for run_id in self.model:
            self.journals[0].create(run_id, "flow", at=0.0, note={})

    @rule(seconds=st.sampled_from([1.0, 5.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(which=WHICH, run_id=RUN, owner=st.sampled_from([ANN, BOB]), ttl=st.sampled_from([3.0, 10.0]))
    def acquire(self, which: int, run_id: str, owner: Owner, ttl: float) -> None:
        run = self.model[run_id]
        if run.owner not in {None, owner} and run.expires > self.now:
            with pytest.raises(RunOwnedError):
                self.journals[which].acquire(run_id, owner, self.now, ttl)
        else:
            run.epoch, run.owner, run.expires = run.epoch + 1, owner, self.now + ttl
            assert self.journals[which].acquire(run_id, owner, self.now, ttl) == run.epoch

    @rule(which=WHICH, run_id=RUN, behind=st.sampled_from([0, 0, 0, 1, 2]), new=st.lists(st.binary(max_size=4), max_size=3))
    def append(self, which: int, run_id: str, behind: int, new: list[bytes]) -> None:
        run, journal = self.model[run_id], self.journals[which]
        entries = [("n", body) for body in new]
        if behind or not run.epoch:
            with pytest.raises(FencedError):
                journal.append(run_id, run.epoch - behind or -1, entries, self.now)
        else:
            run.entries += new
            assert journal.append(run_id, run.epoch, entries, self.now) == len(run.entries)

    @rule(which=WHICH, run_id=RUN, keep=st.booleans(), behind=st.sampled_from([0, 0, 1]))
    def renew_or_release(self, which: int, run_id: str, keep: bool, behind: int) -> None:
        run, journal = self.model[run_id], self.journals[which]
        epoch, error = run.epoch - behind or -1, None
        try:
            if keep:
                journal.renew(run_id, epoch, self.now, ttl=10.0)
            else:
                journal.release(run_id, epoch)
        except FencedError as caught:
            error = caught
        assert (error is None) == (behind == 0 and run.epoch > 0)
        if not error:
            run.expires = self.now + 10.0 if keep else 0.0

    @invariant()
    def agrees(self) -> None:
        for journal in self.journals:
            for row in journal.runs(now=self.now):
                run = self.model[row.run_id]
                entries = list(journal.read(row.run_id))
                assert [entry.body for entry in entries] == run.entries
                assert [entry.seq for entry in entries] == list(range(1, len(run.entries) + 1))
                if row.lease:
                    held = (run.epoch, run.owner, run.expires, run.expires > self.now)
                    assert (row.lease.epoch, row.lease.owner, row.lease.expires, row.lease.alive) == held
                else:
                    assert run.epoch == 0

    def teardown(self) -> None:
        for journal in self.journals:
            journal.close()
        self.folder.cleanup()


TestJournalModel = JournalMachine.TestCase
TestJournalModel.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


# --- the writer --------------------------------------------------------------------------------------------------------


@dataclass
class Told:
    """What a writer told, and where it is asked to stop the show."""

    durable: list[int] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    failed: threading.Event = field(default_factory=threading.Event)

    def error(self, error: BaseException) -> None:
        self.errors.append(error)
        self.failed.set()


def write(journal: Journal, told: Told, ttl: float = 30.0, clock: Callable[[], float] = time.time) -> Writer:
    epoch = journal.acquire("run", this_process(), clock(), ttl)
    return Writer(journal, "run", epoch, told.durable.append, told.error, ttl, clock)


def test_what_was_flushed_is_durable_and_was_reported(journal: Journal, path: str) -> None:
    told = Told()
    writer = write(journal, told)
    assert [writer.append("n", b"%d" % number) for number in range(100)] == list(range(1, 101))
    writer.flush()
    assert told.durable[-1] == 100
    with closing(Journal(path)) as other:
        assert bodies(other) == [b"%d" % number for number in range(100)]
    writer.close()
    assert told.durable == sorted(set(told.durable))
    assert told.errors == []


def test_closing_writes_the_rest_and_gives_the_run_back(journal: Journal) -> None:
    told = Told()
    writer = write(journal, told)
    writer.append("n", b"last")
    writer.close()
    assert told.durable == [1]
    assert bodies(journal) == [b"last"]
    assert [row.lease.alive for row in journal.runs() if row.lease] == [False]
    assert journal.acquire("run", BOB, now=time.time()) == 2
    with pytest.raises(JournalError, match="closed"):
        writer.append("n", b"after")
    writer.close()


def test_what_is_handed_in_during_a_commit_shares_the_next_one(journal: Journal, path: str) -> None:
    told = Told()
    writer = write(journal, told)
    statements: list[str] = []
    journal._db.set_trace_callback(statements.append)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # the writer's first commit has to wait for this one
        for number in range(1000):
            writer.append("n", b"%d" % number)
        other.execute("COMMIT")
    writer.flush()
    assert statements.count("COMMIT") == len(told.durable) <= 2
    writer.close()
    assert bodies(journal) == [b"%d" % number for number in range(1000)]


def test_an_idle_writer_keeps_its_lease(journal: Journal) -> None:
    told, times = Told(), iter(range(10**9))
    ticked = threading.Semaphore(0)

    def clock() -> float:
        ticked.release()
        return float(next(times))

    writer = write(journal, told, ttl=0.03, clock=clock)
    for _ in range(4):
        ticked.acquire()
    (row,) = journal.runs()
    assert row.lease is not None
    assert row.lease.expires >= 2  # the fourth time asked for is under way, the third was written
    writer.close()
    assert told.errors == []
    assert bodies(journal) == []


def test_a_fenced_writer_says_so_once_and_takes_no_more(journal: Journal) -> None:
    told = Told()
    writer = write(journal, told)
    writer.append("n", b"mine")
    writer.flush()
    epoch = journal.acquire("run", this_process(), now=time.time())
    writer.append("n", b"lost")
    told.failed.wait()
    for act in (lambda: writer.append("n", b"more"), writer.flush):
        with pytest.raises(FencedError):
            act()
    writer.close()
    assert [type(error) for error in told.errors] == [FencedError]
    assert told.durable == [1]
    assert bodies(journal) == [b"mine"]
    journal.append("run", epoch, ONE, at=0.0)


def test_an_idle_writer_notices_that_it_was_fenced(journal: Journal) -> None:
    told = Told()
    writer = write(journal, told, ttl=0.03)
    journal.acquire("run", this_process(), now=time.time())
    told.failed.wait()
    writer.close()
    assert [type(error) for error in told.errors] == [FencedError]


def test_a_full_disk_ends_a_writer_and_loses_nothing_that_was_durable(journal: Journal) -> None:
    told = Told()
    writer = write(journal, told)
    writer.append("n", b"kept")
    writer.flush()
    journal._db.execute("PRAGMA max_page_count = 20").fetchall()
    writer.append("n", bytes(10**6))
    with pytest.raises(JournalError, match=r"full.*Free some disk space"):
        writer.flush()
    writer.close()
    assert len(told.errors) == 1
    assert told.durable == [1]
    assert bodies(journal) == [b"kept"]


def test_a_report_that_raises_is_an_error_and_not_a_silent_end(journal: Journal) -> None:
    told = Told()
    epoch = journal.acquire("run", this_process(), time.time())
    writer = Writer(journal, "run", epoch, told.durable.remove, told.error)
    writer.append("n", b"written")
    with pytest.raises(ValueError, match="not in list"):
        writer.flush()
    writer.close()
    assert [type(error) for error in told.errors] == [ValueError]


APPEND_FOR_EVER = """
import sys, time
from parflow.storage.journal import Journal, Writer, this_process
journal = Journal(sys.argv[1])
epoch = journal.acquire("run", this_process(), time.time())
writer = Writer(journal, "run", epoch, lambda count: print(count, flush=True), print)
for number in range(10**9):
    writer.append("n", b"%d" % number)
    if number % 50 == 49:
        writer.flush()
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_process_killed_while_it_appends_leaves_all_it_reported_and_no_gap(journal: Journal, seed: int) -> None:
    command = [sys.executable, "-c", APPEND_FOR_EVER, journal.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(random.Random(seed).randrange(1, 60)):
            reported = int(process.stdout.readline())
        process.kill()
        reported = max([reported, *(int(line) for line in process.stdout.read().split(b"\n")[:-1])])
    found = bodies(journal)
    assert found == [b"%d" % number for number in range(len(found))]
    assert len(found) >= reported
    assert journal.acquire("run", this_process(), time.time()) == 2


# --- the file ----------------------------------------------------------------------------------------------------------


def test_the_file_and_its_folder_are_private(journal: Journal, path: str) -> None:
    journal.append("run", journal.acquire("run", ANN, now=0.0), ONE, at=0.0)
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    names = sorted(os.listdir(os.path.dirname(path)))
    assert names == ["journal.sqlite", "journal.sqlite-shm", "journal.sqlite-wal"]
    assert {os.stat(os.path.join(os.path.dirname(path), name)).st_mode & 0o777 for name in names} == {0o600}


def test_commits_are_flushed_to_the_disk(journal: Journal) -> None:
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_many_may_create_the_journal_at_the_same_time(path: str) -> None:
    code = "import sys; from parflow.storage.journal import Journal; Journal(sys.argv[1]).create(sys.argv[2], '', 0.0, {})"
    starters = [subprocess.Popen([sys.executable, "-c", code, path, f"run-{number}"]) for number in range(6)]
    assert [starter.wait() for starter in starters] == [0] * 6
    with closing(Journal(path)) as journal:
        assert sorted(row.run_id for row in journal.runs()) == [f"run-{number}" for number in range(6)]


def test_who_is_late_in_creating_the_journal_uses_the_one_that_is_there(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late_link(source: str, target: str) -> None:
        monkeypatch.undo()
        with closing(Journal(path)) as faster:
            faster.create("first", "flow", at=0.0, note={})
        link(source, target)

    monkeypatch.setattr(os, "link", late_link)
    with closing(Journal(path)) as journal:
        assert [row.run_id for row in journal.runs()] == ["first"]
    assert os.listdir(os.path.dirname(path)) == ["journal.sqlite"]


@pytest.mark.parametrize("whose", ["folder", "file"])
def test_a_journal_that_others_may_write_to_is_refused(journal: Journal, path: str, whose: str) -> None:
    os.chmod(path if whose == "file" else os.path.dirname(path), 0o770)
    with pytest.raises(JournalError, match=r"mode 0770.*chmod"):
        Journal(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to somebody else")
@pytest.mark.parametrize("whose", ["folder", "file"])
def test_a_journal_of_somebody_else_is_refused(journal: Journal, path: str, whose: str) -> None:
    os.chown(path if whose == "file" else os.path.dirname(path), 12345, 12345)
    with pytest.raises(JournalError, match="belongs to uid 12345"):
        Journal(path)


@pytest.mark.parametrize("content", [b"", b"a text file\n" * 1000, b"SQLite format 3\0" + bytes(5000)])
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "journal.sqlite"
    file.write_bytes(content)
    with pytest.raises(JournalError, match=r"journal\.sqlite.*PARFLOW_HOME"):
        Journal(str(file))
    assert file.read_bytes() == content


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite"
    with closing(sqlite3.connect(file)) as other, other:
        other.execute("CREATE TABLE runs (name TEXT)")
    with pytest.raises(JournalError, match="is not a journal of parflow"):
        Journal(str(file))


def test_a_journal_of_a_newer_parflow_is_refused_with_both_versions(journal: Journal, path: str) -> None:
    with closing(sqlite3.connect(path)) as other, other:
        other.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(JournalError, match=rf"newer parflow \(its version is {VERSION + 1}.*up to {VERSION}\)"):
        Journal(path)


def test_a_damaged_journal_says_so(journal: Journal, path: str) -> None:
    epoch = journal.acquire("run", ANN, now=0.0)
    journal.append("run", epoch, [("n", bytes(1000))] * 500, at=0.0)
    journal.close()
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(50 * 4096)
        file.write(b"\xff" * (size - 60 * 4096))
    with closing(Journal(path)) as damaged, pytest.raises(JournalError, match="damaged") as caught:
        list(damaged.read("run"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_network_file_system_is_refused_before_anything_is_created(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nserver:/x {tmp_path}/home nfs4 rw 0 0\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("home")
    for folder in ("home", "home/new", "link"):
        with pytest.raises(JournalError, match=r"network file system \(nfs4\).*PARFLOW_HOME"):
            Journal(str(tmp_path / folder / "journal.sqlite"), mounts=str(mounts))
    assert list((tmp_path / "home").iterdir()) == []
    Journal(str(tmp_path / "elsewhere" / "journal.sqlite"), mounts=str(mounts)).close()


def test_a_closed_journal_says_so(journal: Journal) -> None:
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.runs()


def test_the_journal_is_opened_without_heavy_imports(path: str) -> None:
    code = (
        "import json, sys; from parflow.storage.journal import Journal; Journal(sys.argv[1]);"
        "print(json.dumps(sorted({'dask', 'fsspec', 'pandas', 'psutil', 'pyarrow', 'sqlalchemy'} & set(sys.modules))))"
    )
    answer = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True)
    assert json.loads(answer.stdout) == []


# --- what others ask of an owner -----------------------------------------------------------------------------------------


def test_what_is_asked_reaches_the_owner_of_that_epoch_alone(journal: Journal) -> None:
    first = journal.acquire("run", ANN, now=0.0)
    assert journal.asked("run", first) is None
    journal.ask("run", first, {"now": False}, at=1.0)
    assert journal.asked("run", first) == {"now": False}
    journal.ask("run", first, {"now": True}, at=2.0)
    assert journal.asked("run", first) == {"now": True}

    second = journal.acquire("run", ANN, now=3.0)
    assert journal.asked("run", second) is None
    with pytest.raises(FencedError):
        journal.ask("run", first, {"now": True}, at=4.0)


def test_an_idle_writer_hears_each_thing_that_is_asked_once(journal: Journal) -> None:
    told, heard = Told(), SimpleQueue[dict[str, Any]]()
    epoch = journal.acquire("run", this_process(), time.time())
    writer = Writer(journal, "run", epoch, told.durable.append, told.error, on_request=heard.put)
    for request in ({"now": False}, {"now": True}):
        journal.ask("run", epoch, request, time.time())
        assert heard.get(timeout=60) == request
    writer.close()
    assert heard.empty()
    assert told.errors == []


def test_a_journal_of_the_first_version_is_brought_up_to_date_with_all_that_is_in_it(journal: Journal, path: str) -> None:
    epoch = journal.acquire("run", ANN, now=0.0)
    journal.append("run", epoch, ONE, at=0.0)
    journal.close()
    with closing(sqlite3.connect(path)) as old, old:
        old.execute("DROP TABLE requests")
        old.execute("PRAGMA user_version = 1")
    for _ in range(2):
        again = Journal(path)
        again.ask("run", epoch, {"now": True}, at=1.0)
        assert again.asked("run", epoch) == {"now": True}
        assert len([*again.read("run")]) == 1
        again.close()
