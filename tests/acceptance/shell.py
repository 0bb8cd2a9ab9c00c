"""The command line as a person has it: processes with a home of their own, a terminal where one is wanted, and signals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from parflow.runtime.marker import STOP

FLOWS = str(Path(__file__).with_name("flows.py"))
PARFLOW = [sys.executable, "-m", "parflow.cli"]
LOGIN = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"
"""A session's first process that opens a terminal owns it: from then on Ctrl-C there is its signal."""

PATIENCE = 60.0
"""Seconds after which what was waited for will never come."""


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait until a condition holds, and return what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds:g} s for: {what}"
        time.sleep(0.002)
    return found


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output, which is one JSON value and nothing else."""
        return json.loads(self.out)


@dataclass
class Started:
    """A command that is under way, the leader of a process group of its own."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = PATIENCE) -> Done:
        """Wait for its end."""
        code = self.process.wait(seconds)
        return Done(code, self.out.read_text(), self.err.read_text())

    def press_ctrl_c(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass
class Terminal:
    """A command in a terminal that it owns: what it shows, and keys to press."""

    process: subprocess.Popen[bytes]
    keyboard: int
    seen: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # how Linux says that nobody has the terminal open any more
            while data := os.read(self.keyboard, 1 << 16):
                self.seen += data

    @property
    def text(self) -> str:
        """All that the terminal got, its control sequences too."""
        return self.seen.decode("utf-8", "replace")

    @property
    def shown(self) -> str:
        """What a person could read of it, one line above the other."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.text).replace("\r", "\n")

    def press_ctrl_c(self) -> None:
        os.write(self.keyboard, b"\x03")

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for the end and for all that was shown; returns the exit code."""
        code = self.process.wait(seconds)
        self.reader.join(seconds)
        return code


def _marker(pid: int) -> memoryview:
    """Read what a child of the sandbox shares with its supervisor."""
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "parflow-marker" in str(handle.readlink()):
                return memoryview(handle.read_bytes()).cast("Q")
    return memoryview(bytes(8)).cast("Q")


class Shell:
    """Runs parflow's commands in a folder, with a home of its own, and ends what they leave."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.log = folder / "log"
        self.out = folder / "out"
        self.env = {**os.environ, "PARFLOW_HOME": str(self.home), "COLUMNS": "120", "TERM": "xterm-256color"}
        self.before: list[str] = []  # what runs the commands
        self.begun: list[Started | Terminal] = []

    def start(self, *arguments: object) -> Started:
        """Start a command without a terminal."""
        number = len(self.begun)
        out, err = self.folder / f"{number}.out", self.folder / f"{number}.err"
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [*self.before, *PARFLOW, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=self.env,
                cwd=self.folder,
                start_new_session=True,
            )
        self.begun.append(started := Started(process, out, err))
        return started

    def terminal(self, *arguments: object) -> Terminal:
        """Start a command in a terminal."""
        keyboard, screen = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", LOGIN, *PARFLOW, *map(str, arguments)],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            env=self.env,
            cwd=self.folder,
            start_new_session=True,
        )
        os.close(screen)
        self.begun.append(terminal := Terminal(process, keyboard))
        return terminal

    def __call__(self, *arguments: object, code: int = 0) -> Done:
        """Run a command to its end, which is to be this exit code."""
        done = self.start(*arguments).wait()
        assert done.code == code, f"exit code {done.code}: {done.out}\n{done.err}"
        return done

    def json(self, *arguments: object, code: int = 0) -> Any:
        """Run a command with --json and return what it printed."""
        return self(*arguments, "--json", code=code).json

    def flow(self, name: str, *arguments: object) -> list[object]:
        """Return the words that run a workflow of the tests on two workers."""
        return ["run", f"{FLOWS}:{name}", *arguments, "--workers", 2]

    def ran(self) -> list[str]:
        """Return what the records noted as they began, in that order."""
        return self.log.read_text().split() if self.log.exists() else []

    def processes(self) -> list[psutil.Process]:
        """Return every process that lives with this home, children of children too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PARFLOW_HOME") == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def children(self) -> list[psutil.Process]:
        """Return the sandbox's children: what runs under a fork server, which runs under a command."""
        return [process for process in self.processes() if self._depth(process) == 2]

    def fork_server(self) -> psutil.Process:
        (server,) = (process for process in self.processes() if self._depth(process) == 1)
        return server

    def asked_to_stop(self) -> bool:
        """Tell whether the sandbox has asked all its children to come back at their next record."""
        children = self.children()
        return bool(children) and all(_marker(child.pid)[STOP] for child in children)

    def _depth(self, process: psutil.Process) -> int:
        commands = {started.process.pid for started in self.begun}
        with contextlib.suppress(psutil.Error):
            parents = [parent.pid for parent in process.parents()]
            return next((depth for depth, pid in enumerate(parents, 1) if pid in commands), 0)
        return 0

    def all_gone(self) -> None:
        """Wait until nothing that was started here lives any more."""
        until(lambda: not self.processes(), "the end of all processes", 10)

    def close(self) -> None:
        for started in self.begun:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.process.pid, signal.SIGKILL)
            started.process.wait()
            if isinstance(started, Terminal):
                started.reader.join()
                os.close(started.keyboard)
        self.all_gone()


# --- the run of six files of ten lines that several tests interrupt -------------------------------------------------------

FILES, LINES = 6, 10
ALL = [f"{file}-{line}" for file in range(FILES) for line in range(LINES)]


def has_run(shell: Shell, count: int) -> Callable[[], bool]:
    """Return the condition that so many records have begun."""
    return lambda: len(shell.ran()) == count


def rows(shell: Shell) -> list[str]:
    """Return what the run published, in order."""
    return [json.loads(line) for part in sorted(shell.out.glob("part-*.jsonl")) for line in part.read_text().splitlines()]


def resumed(shell: Shell) -> None:
    """Go on at once, and see that the result is what it would have been without the interruption."""
    answer = shell.json("resume", "last")
    assert (answer["status"], answer["result"]) == ("succeeded", len(ALL))
    assert rows(shell) == ALL
