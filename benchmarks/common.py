"""Measure programs fairly: fresh processes in turns, wall, CPU and memory of the whole process tree, medians and ratios."""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
MIB = 2**20
SAMPLE_SECONDS = 0.05

Answer = dict[str, Any]


@dataclass
class Sample:
    """One program's numbers: seconds to the answer, CPU seconds, peak memory (MiB) of all processes together."""

    wall: float
    cpu: float
    pss: float | None
    rss: float | None
    answer: Answer


@dataclass
class Peak(threading.Thread):
    """The largest sum of memory over a process tree, looked at every ``SAMPLE_SECONDS``.

    PSS counts a page shared by n processes as 1/n in each, so it is what the machine has to give; RSS counts it n times.
    """

    root: int
    pss: int = 0
    rss: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        while not self.over.wait(SAMPLE_SECONDS):
            each = [_memory(pid) for pid in _tree(self.root)]
            self.pss = max(self.pss, sum(pss for pss, _ in each))
            self.rss = max(self.rss, sum(rss for _, rss in each))


def _tree(root: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield root
    try:
        for task in os.listdir(f"/proc/{root}/task"):
            for child in Path(f"/proc/{root}/task/{task}/children").read_text().split():
                yield from _tree(int(child))
    except OSError:  # it ended meanwhile
        return


def _memory(pid: int) -> tuple[int, int]:
    """Return (PSS, RSS) in bytes; zeros when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes["Pss"], sizes["Rss"]


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends, so that their CPU time is counted here and none is overlooked."""
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def reap(patience: float = 10.0) -> None:
    """Wait for every descendant to end; after ``patience`` seconds, name those that were left behind and stop."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.01)
        except ChildProcessError:
            return
    raise SystemExit(f"processes left behind: {list(_tree(os.getpid()))[1:]}")


def measure(command: list[str], memory: bool = False) -> Sample:
    """Run a program in a fresh process; its last line of output is its answer in JSON.

    The wall time runs from the process's start to the arrival of that line, the CPU time to the end of all its processes.
    Memory is sampled on request only, since reading it takes a few per cent of a core.
    """
    adopt_orphans()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = Peak(process.pid)
    if memory:
        peak.start()
    assert process.stdout is not None
    lines = [(line, time.perf_counter() - start) for line in process.stdout]
    code = process.wait()
    reap()
    peak.over.set()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with status {code}")
    last, wall = lines[-1]
    return Sample(
        wall=wall,
        cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        pss=peak.pss / MIB if memory else None,
        rss=peak.rss / MIB if memory else None,
        answer=json.loads(last),
    )


def measure_in_turns(
    commands: dict[str, list[str]],
    rounds: int,
    check: Callable[[str, Sample], None] = lambda _name, _sample: None,
    memory: bool = True,
) -> dict[str, list[Sample]]:
    """Measure several programs, one of each in every round, so that a noisy minute hits all alike.

    After the timed rounds comes one for memory (its times are not used). ``check`` is called with each answer.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for number in range(rounds + memory):
        names = list(commands) if number % 2 == 0 else list(reversed(commands))
        for name in names:
            sample = measure(commands[name], memory=number == rounds)
            check(name, sample)
            samples[name].append(sample)
            print(f"  round {number + 1}: {name} {sample.wall:.2f} s", file=sys.stderr, flush=True)
    return samples


def summary(samples: dict[str, list[Sample]]) -> dict[str, dict[str, float]]:
    """Return the medians of each program's timed rounds, and the memory of its memory round."""
    rows = {}
    for name, all_of_it in samples.items():
        timed = [sample for sample in all_of_it if sample.pss is None]
        rows[name] = {
            "wall": statistics.median(sample.wall for sample in timed),
            "cpu": statistics.median(sample.cpu for sample in timed),
            "pss": max((sample.pss or 0.0 for sample in all_of_it), default=0.0),
            "rss": max((sample.rss or 0.0 for sample in all_of_it), default=0.0),
        }
    return rows


def print_summary(rows: dict[str, dict[str, float]], base: str) -> None:
    """Print the medians, and each program's wall time as a multiple of ``base``'s."""
    print(f"{'':14} {'wall s':>8} {'CPU s':>8} {'PSS MiB':>8} {'RSS MiB':>8} {'wall/' + base:>12}")
    for name, row in rows.items():
        ratio = f"{row['wall'] / rows[base]['wall']:12.2f}" if base in rows else ""
        print(f"{name:14} {row['wall']:8.2f} {row['cpu']:8.2f} {row['pss']:8.0f} {row['rss']:8.0f} {ratio}")


@functools.cache
def machine() -> dict[str, Any]:
    """Return what the numbers hold for: cores, processor, memory, versions, and the load before anything was measured."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpus if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "dask": version("dask"),
        "load": round(os.getloadavg()[0], 2),
    }


def print_machine() -> None:
    """Print the line that names the machine."""
    facts = machine()
    print(
        f"{facts['cores']} cores of {facts['cpu']}, {facts['memory_gib']} GiB; Python {facts['python']}, "
        f"Dask {facts['dask']}; load {facts['load']}"
    )


def write_json(path: str | None, results: dict[str, Any]) -> None:
    """Write the results, and the machine they hold for, to a file when one is named."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are reported (default 3)")
    options.add_argument("--json", metavar="FILE", help="write the numbers to a file too")
    return options


def answer(value: Answer) -> None:
    """Print a program's answer as `measure` expects it."""
    print(json.dumps(value), flush=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """Give a new folder on the checkout's disk, with parflow's home in it, and remove it afterwards."""
    OUT.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=OUT))
    before = os.environ.get("PARFLOW_HOME")
    os.environ["PARFLOW_HOME"] = str(folder / "home")
    try:
        yield folder
    finally:
        if before is None:
            del os.environ["PARFLOW_HOME"]
        else:
            os.environ["PARFLOW_HOME"] = before
        shutil.rmtree(folder, ignore_errors=True)
