"""What a run rests on fails: disk, store, clock, coordinator. Nothing that was committed is lost or done again."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import struct
import subprocess
import tempfile
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from parflow.api.runs import open_run

from .shell import Shell, Started, until

RESULT = 24 * 100_000


class Pages:
    """The workflow of this name in a shell, and what can be seen of it."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.gate, self.store = shell.folder / "gate", shell.folder / "store"

    def words(self, **given: object) -> list[object]:
        named = {"log": self.shell.log, "gate": self.gate, "out": self.shell.out, **given}
        options = [word for name, value in named.items() for word in (f"--{name}", value)]
        return [*self.shell.flow("pages", *options), "--store", self.store, "--json"]

    def committed(self) -> set[int]:
        """Return the chunks of which the journal says that they are done."""
        return {
            number for number, chunk in enumerate(open_run("last", self.shell.home).state.stages[0].chunks) if not chunk.pending
        }

    def held(self) -> bool:
        """Tell whether both children wait at the gate, with something committed before."""
        return sum(int(number) >= 12 for number in self.shell.ran()) == 2 and len(self.committed()) >= 4

    def ends_well(self) -> None:
        """Resume, and see that the result is right, all rows are written once, and nothing that was committed ran again."""
        before, committed = len(self.shell.ran()), self.committed()
        assert len(committed) >= 4
        assert self.shell.json("resume", "last", "--workers", 2)["result"] == RESULT
        self.is_whole()
        self.spared(committed, before)

    def spared(self, committed: set[int], before: int) -> None:
        """See that since the first so many records that ran none ran that was committed, and none twice."""
        again = [*map(int, self.shell.ran()[before:])]
        assert not committed & {*again}
        assert len(again) == len({*again})
        assert {*map(int, self.shell.ran())} == {*range(24)}

    def is_whole(self) -> None:
        rows = [json.loads(line) for part in sorted(self.shell.out.glob("part-*")) for line in part.read_text().splitlines()]
        assert [row["number"] for row in rows] == [*range(24)]
        assert self.shell.json("failures") == []


@pytest.fixture
def pages(shell: Shell) -> Pages:
    return Pages(shell)


# --- a full disk ----------------------------------------------------------------------------------------------------


class Disk:
    """A small file system of its own, which a process of this user has mounted and its commands see."""

    def __init__(self, folder: Path, size: str) -> None:
        folder.mkdir()
        mount = 'mount -t tmpfs -o "size=$1" tmpfs "$0" && echo mounted && exec cat'
        self.keeper = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(folder), size],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"]},
        )
        assert self.keeper.stdout is not None
        assert self.keeper.stderr is not None
        self.reason = "" if self.keeper.stdout.readline() == b"mounted\n" else self.keeper.stderr.read().decode().strip()
        self.inside = ["nsenter", "--target", str(self.keeper.pid), "--user", "--mount", "--preserve-credentials"]
        self.seen = Path(f"/proc/{self.keeper.pid}/root{folder}")
        self.folder = folder

    def fill(self, room: int) -> None:
        """Leave so many bytes free."""
        disk = os.statvfs(self.seen)
        with contextlib.suppress(OSError):  # somebody else was faster: it is full
            (self.seen / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - room))

    def make_room(self) -> None:
        (self.seen / "filler").unlink()

    def close(self) -> None:
        self.keeper.communicate(b"")


@pytest.fixture
def disk(shell: Shell, tmp_path: Path) -> Iterator[Disk]:
    """Give a file system of 64 MB; the shell's commands run where it's mounted."""
    small = Disk(tmp_path / "disk", "64m")
    try:
        if small.reason:
            pytest.skip(f"no file system can be mounted here without more rights: {small.reason}")
        shell.before = small.inside
        yield small
    finally:
        shell.close()
        small.close()


def test_a_full_disk_of_the_store_ends_the_run_with_path_and_room_and_a_resume_goes_on(disk: Disk, pages: Pages) -> None:
    pages.store = disk.folder / "store"
    started = pages.shell.start(*pages.words())
    until(pages.held, "the gate")
    disk.fill(room=50_000)
    pages.gate.touch()
    done = started.wait()
    assert (done.code, done.json["status"]) == (1, "failed")
    said = done.json["error"]
    assert "can't write 100," in said
    assert f"in the store '{disk.folder}/store/" in said
    assert "No space left on device" in said
    assert f"of 67,108,864 bytes are free at {disk.folder}/store" in said
    assert "Make room there, then resume the run" in said
    assert pages.shell.json("runs")[0]["status"] == "failed"
    again = pages.shell.json("resume", "last", code=1)["error"]
    assert "No space left on device" in again
    disk.make_room()
    pages.ends_well()


def test_a_full_disk_of_a_sink_names_its_file_and_a_resume_goes_on(disk: Disk, pages: Pages) -> None:
    pages.shell.out = disk.folder / "out"
    started = pages.shell.start(*pages.words(written=100_000))
    until(pages.held, "the gate")
    disk.fill(room=50_000)
    pages.gate.touch()
    done = started.wait()
    assert (done.code, done.json["status"]) == (1, "failed")
    assert f"can't write '{disk.folder}/out/.parflow-" in done.json["error"]
    assert "No space left on device" in done.json["error"]
    assert "bytes are free" in done.json["error"]
    disk.make_room()
    before, committed = len(pages.shell.ran()), pages.committed()
    assert pages.shell.json("resume", "last", "--workers", 2)["result"] == RESULT
    pages.spared(committed, before)
    parts = [part.read_text() for part in sorted((disk.seen / "out").glob("part-*"))]
    assert [json.loads(line)["number"] for part in parts for line in part.splitlines()] == [*range(24)]


def test_a_full_disk_of_the_journal_ends_the_process_and_all_that_was_decided_before_is_kept(
    disk: Disk, pages: Pages, tmp_path: Path
) -> None:
    shell = pages.shell
    shell.env["PARFLOW_HOME"] = str(disk.folder / "home")

    def look() -> None:
        """Copy the journal to where it can be looked at: SQLite doesn't find it in the other process's tree."""
        shell.home = Path(tempfile.mkdtemp(dir=tmp_path))
        for file in (disk.seen / "home").glob("journal.sqlite*"):
            shutil.copyfile(file, shell.home / file.name)

    started = shell.start(*pages.words(kept=40_000))  # too little for the store: results stand in the journal
    until(lambda: sum(int(number) >= 12 for number in shell.ran()) == 2, "the gate")
    look()
    before = entries(shell)
    disk.fill(room=0)
    pages.gate.touch()
    done = started.wait()
    assert (done.code, done.json["status"]) == (1, "lost")
    assert f"can't use the journal {disk.folder}/home/journal.sqlite" in done.json["error"]
    assert "of 67,108,864 bytes are free" in done.json["error"]
    assert "Free some disk space there, then resume the run." in done.json["error"]
    disk.make_room()
    look()
    assert len(before) > 2
    assert entries(shell)[: len(before)] == before
    ran, committed = len(shell.ran()), pages.committed()
    assert shell.json("resume", "last")["result"] == 24 * 40_000
    pages.is_whole()
    pages.spared(committed, ran)


def test_a_full_folder_for_temporary_files_costs_no_record_that_prints(disk: Disk, shell: Shell, tmp_path: Path) -> None:
    (disk.seen / "tmp").mkdir()
    shell.env["TMPDIR"] = str(disk.folder / "tmp")
    started = shell.start(*shell.flow("talkative", "--log", shell.log, "--gate", tmp_path / "gate"), "--json")
    until(shell.ran, "the first record")
    disk.fill(room=0)
    (tmp_path / "gate").touch()
    assert started.wait().json["result"] == 100
    assert shell.json("failures") == []


def entries(shell: Shell) -> list[tuple[int, str, bytes]]:
    """Return all that the journal has."""
    with closing(sqlite3.connect(f"file:{shell.home}/journal.sqlite?mode=ro", uri=True)) as db:
        return db.execute("SELECT seq, kind, body FROM entries ORDER BY seq").fetchall()


# --- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
def test_a_result_that_was_damaged_is_named_and_never_used_and_once_repaired_the_run_goes_on(
    pages: Pages, harm: Callable[[Path], None]
) -> None:
    killed_at_the_gate(pages)
    state = open_run("last", pages.shell.home).state
    key = next(ref.key for _, receipt in state.stages[0].receipts() for ref in receipt.results if ref is not None)
    (folder,) = pages.store.iterdir()
    victim = folder / str(key)
    copy = victim.read_bytes()
    harm(victim)
    pages.gate.touch()
    failed = pages.shell.json("resume", "last", code=1)
    assert (failed["status"], failed["result"]) == ("failed", None)
    assert str(key) in failed["error"]
    assert "is not what was written" in failed["error"] or "has no object" in failed["error"]
    assert not [*pages.shell.out.glob("part-*")]
    victim.write_bytes(copy)
    pages.ends_well()


@pytest.mark.parametrize("harm", [flip, cut])
def test_damaged_code_is_named_and_not_run(pages: Pages, harm: Callable[[Path], None]) -> None:
    killed_at_the_gate(pages)
    (folder,) = pages.store.iterdir()
    codes = {path: path.read_bytes() for path in (folder / "code").iterdir()}
    for path in codes:
        harm(path)
    pages.gate.touch()
    before = pages.shell.ran()
    refused = pages.shell("resume", "last", code=1)
    assert "object 'code/" in refused.err
    assert "is not what was written" in refused.err
    assert pages.shell.ran() == before
    for path, data in codes.items():
        path.write_bytes(data)
    pages.ends_well()


@pytest.mark.parametrize(("what", "harm"), [*itertools.product(["done", "results"], [flip, cut, Path.unlink])])
def test_what_nobody_knows_of_but_the_store_is_not_adopted_when_it_is_damaged(
    pages: Pages, what: str, harm: Callable[[Path], None]
) -> None:
    killed_at_the_gate(pages)
    forget_the_end(pages.shell, "PieceEnded", keep=3)
    (folder,) = pages.store.iterdir()
    (victim,) = (path for path in (folder / what).iterdir() if path.name.startswith("s0-000007-"))
    harm(victim)
    before = len(pages.shell.ran())
    pages.gate.touch()
    assert pages.shell.json("resume", "last", "--workers", 2)["result"] == RESULT
    pages.is_whole()
    again = sorted(map(int, pages.shell.ran()[before:]))
    assert again == [7, *range(12, 24)]


def killed_at_the_gate(pages: Pages) -> None:
    """Start the run, and kill it when half of it is committed."""
    started = pages.shell.start(*pages.words())
    until(pages.held, "the gate")
    started.kill_group()
    pages.shell.all_gone()


def forget_the_end(shell: Shell, kind: str, keep: int) -> None:
    """Take the last entries from the journal, as a disk does that lied about what it had written."""
    with closing(sqlite3.connect(shell.home / "journal.sqlite")) as db, db:
        db.execute("DROP TRIGGER entries_last")
        kept = db.execute("SELECT seq FROM entries WHERE kind = ? ORDER BY seq LIMIT 1 OFFSET ?", (kind, keep)).fetchone()
        db.execute("DELETE FROM entries WHERE seq >= ? AND kind != 'ChunksListed'", kept)
        db.execute("CREATE TRIGGER entries_last BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END")


@pytest.mark.parametrize("left", [0.6, 0.9, 0.999])
def test_a_journal_whose_end_was_lost_with_the_power_goes_on_from_what_is_left(pages: Pages, left: float) -> None:
    killed_at_the_gate(pages)
    log = pages.shell.home / "journal.sqlite-wal"
    os.truncate(log, int(log.stat().st_size * left))
    with log.open("r+b") as file:  # and the last sector is torn
        file.seek(-100, os.SEEK_END)
        file.write(os.urandom(100))
    pages.gate.touch()
    assert pages.shell.json("resume", "last", "--workers", 2)["result"] == RESULT
    pages.is_whole()
    assert {*pages.shell.ran()} == {*map(str, range(24))}


# --- a store that goes away -----------------------------------------------------------------------------------------


def move(place: Path, aside: Path) -> None:
    place.rename(aside)


def replace_by_a_file(place: Path, aside: Path) -> None:
    place.rename(aside)
    place.touch()


@pytest.mark.parametrize("harm", [move, replace_by_a_file])
def test_a_store_that_goes_away_ends_the_run_and_when_it_is_back_a_resume_goes_on(
    pages: Pages, harm: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    started = pages.shell.start(*pages.words())
    until(pages.held, "the gate")
    (place,) = pages.store.iterdir()
    harm(place, tmp_path / "aside")
    pages.gate.touch()
    done = started.wait()
    assert (done.code, done.json["status"]) == (1, "failed")
    gone = f"the folder of the store '{place}' is gone"
    assert gone in done.json["error"]
    assert "Put it back, then resume the run" in done.json["error"]
    assert gone in pages.shell("resume", "last", code=1).err
    assert not place.is_dir()  # nothing empty stands in its place
    if place.exists():
        place.unlink()
    (tmp_path / "aside").rename(place)
    pages.ends_well()


# --- two coordinators -----------------------------------------------------------------------------------------------


def test_of_two_coordinators_the_one_that_was_taken_for_dead_writes_nothing_more(pages: Pages, clock: Clock) -> None:
    shell = pages.shell
    started = shell.start(*pages.words())
    until(pages.held, "the gate")
    refused = shell("resume", code=1)
    assert "is owned by process" in refused.err
    os.kill(started.process.pid, signal.SIGSTOP)
    clock.jump(60)  # its lease is over
    pages.gate.touch()
    pages.ends_well()
    written = entries(shell)
    os.kill(started.process.pid, signal.SIGCONT)
    done = started.wait()
    assert done.code == 1
    assert "another coordinator took over (epoch 2; ours was 1). Nothing more was written from here" in done.json["error"]
    assert entries(shell) == written
    assert shell.json("resume")["result"] == RESULT
    pages.is_whole()


# --- the clock ------------------------------------------------------------------------------------------------------


CLOCK = """
import mmap, struct, time

_file = open({path!r}, "rb")
_ahead = mmap.mmap(_file.fileno(), 8, prot=mmap.PROT_READ)
_true = time.time
time.time = lambda: _true() + struct.unpack("d", _ahead[:8])[0]
time.time_ns = lambda: int(time.time() * 1e9)
"""


class Clock:
    """The wall clock of all Python processes of a shell."""

    def __init__(self, shell: Shell) -> None:
        self.path = shell.folder / "clock"
        self.jump(0)
        place = shell.folder / "site"
        place.mkdir()
        (place / "sitecustomize.py").write_text(textwrap.dedent(CLOCK.format(path=str(self.path))))
        shell.env["PYTHONPATH"] = f"{place}:{os.environ.get('PYTHONPATH', '')}"

    def jump(self, ahead: float) -> None:
        """Show so many seconds more than it is."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(handle, struct.pack("d", ahead))
        os.close(handle)


@pytest.fixture
def clock(pages: Pages) -> Clock:
    return Clock(pages.shell)


@pytest.mark.parametrize("jumps", [(6 * 3600, 0), (-6 * 3600, 0), (-6 * 3600, 6 * 3600)])
def test_a_clock_that_jumps_changes_no_result_and_ends_no_run(pages: Pages, clock: Clock, jumps: tuple[float, ...]) -> None:
    started: Started = pages.shell.start(*pages.words())
    until(pages.held, "the gate")
    ran = pages.shell.ran()
    for ahead in jumps:
        clock.jump(ahead)
    pages.gate.touch()
    done = started.wait()
    assert (done.code, done.json["result"]) == (0, RESULT), done.err
    pages.is_whole()
    assert Counter(pages.shell.ran()) == Counter(map(str, range(24)))
    assert len(ran) == 14
    receipts = [receipt for _, receipt in open_run("last", pages.shell.home).state.stages[0].receipts()]
    assert all(0 <= receipt.tally.seconds < 60 for receipt in receipts)
    assert "-" not in pages.shell("show").out.partition(" in ")[2].partition(" s ")[0]
