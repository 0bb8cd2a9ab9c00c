"""kill -9 at random moments: what was committed is kept, nothing half-written is ever seen, and the result is the same."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from parflow.api.runs import list_runs, open_run
from parflow.core.history import RunState

from .shell import Shell, Started, until

KILLS = int(os.environ.get("PARFLOW_KILLS", "20"))
SEED = 2611
MANIFEST = "_manifest.json"


def noted(path: str) -> str:
    """Return what the workflow notes of a text: its folder and name."""
    return "/".join(path.split("/")[-2:])


def visible(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, but hidden ones; the manifest without the run's name."""
    files = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
    if MANIFEST in files:
        manifest = json.loads(files[MANIFEST])
        del manifest["run_id"]
        files[MANIFEST] = json.dumps(manifest).encode()
    return files


@dataclass
class Victim:
    """A run that is killed again and again, and all that has to hold of it."""

    shell: Shell
    words: list[object]
    texts: set[str]
    expected: dict[str, bytes]
    unfinished: set[str] = field(default_factory=set)
    ran: int = 0

    @property
    def state(self) -> RunState | None:
        """The run as its journal has it; None before it has begun."""
        known = (self.shell.home / "journal.sqlite").exists() and list_runs(self.shell.home)
        state = open_run("last", self.shell.home).state if known else None
        return state if state is not None and state.started is not None else None

    def go_on(self) -> Started:
        """Start the run, or resume it."""
        state = self.state
        self.unfinished = self._unfinished(state)
        self.ran = len(self.shell.ran())
        return self.shell.start(*(["resume", "last"] if state else self.words), "--json")

    def _unfinished(self, state: RunState | None) -> set[str]:
        """Return the records that no entry of the journal says are committed: each is a file, and a chunk's part."""
        if state is None:
            return self.texts
        (stage,) = state.stages
        listed = {noted(part.path) for chunk in stage.chunks for part in chunk.chunk.parts}
        left = self.texts - listed if not stage.closed else set()
        for piece in stage.pending.values():
            parts = stage.chunks[piece.chunk].chunk.parts
            left |= {noted(part.path) for part in parts[piece.first : piece.stop]}
        return left

    def moment(self, chance: random.Random) -> Callable[[], object]:
        """Draw a moment: as the run is taken, after some more records, or as the first output is seen."""
        before, most = self.epoch, len(self.unfinished)
        count = chance.choice((0, chance.randint(1, most), chance.randint(1, most), most + 1)) if most else 0
        if count > most:
            return lambda: list(self.shell.out.glob("part-*"))
        if count:
            return lambda: len(self.shell.ran()) >= self.ran + count
        return lambda: self.epoch != before

    @property
    def epoch(self) -> int:
        """How often the run was taken by a process."""
        known = (self.shell.home / "journal.sqlite").exists() and list_runs(self.shell.home)
        return known[0].lease.epoch if known and known[0].lease else 0

    def check(self) -> None:
        """See that what is visible of the output is whole, and that no record ran that need not have."""
        seen = visible(self.shell.out)
        assert seen.items() <= self.expected.items()
        assert MANIFEST not in seen or seen == self.expected
        again = Counter(self.shell.ran()[self.ran :])
        assert set(again) <= self.unfinished
        assert max(again.values(), default=1) == 1

    def killed(self, started: Started, chance: random.Random) -> bool:
        """Kill the run's process group at a random moment; tell whether it was still alive."""
        reached = self.moment(chance)

        def watch() -> object:
            self.check()
            return reached() or not started.alive

        until(watch, "the moment to kill")
        with contextlib.suppress(subprocess.TimeoutExpired):
            most = chance.choice((0.01, 0.1)) if self.unfinished else 1.0
            started.process.wait(chance.uniform(0, most))  # somewhere between two such moments
        started.kill_group()
        self.shell.all_gone()
        self.check()
        return started.process.returncode == -signal.SIGKILL


@pytest.mark.timeout(600)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_never_been(texts: Path, tmp_path: Path) -> None:
    def place(name: str) -> tuple[Shell, list[object]]:
        (tmp_path / name).mkdir()
        shell = Shell(tmp_path / name)
        given = ["--source", f"{texts}/**/*.txt", "--out", shell.out, "--log", shell.log]
        return shell, shell.flow("documents", *given)

    names = {noted(str(path)) for path in texts.rglob("*.txt")}
    calm, words = place("calm")
    result: Any = calm.json(*words)["result"]
    expected = visible(calm.out)
    assert sorted(calm.ran()) == sorted(names)
    assert len(expected) > 20

    chance, kills, runs = random.Random(SEED), 0, 0
    while kills < KILLS:
        runs += 1
        shell, words = place(f"run-{runs}")
        try:
            victim = Victim(shell, words, names, expected)
            while True:
                started = victim.go_on()
                if kills == KILLS or not victim.killed(started, chance):
                    break
                kills += 1
            done = started.wait()
            victim.check()
            assert (done.code, done.json["status"], done.json["result"]) == (0, "succeeded", result), done.err
            assert visible(shell.out) == expected
            assert not list(shell.out.glob(".*"))
            assert set(shell.ran()) == names
            assert shell.json("failures") == []
        finally:
            shell.close()
