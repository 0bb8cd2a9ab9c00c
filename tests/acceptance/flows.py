"""Workflows that the acceptance tests run through the command line.

Each record leaves a line in the file ``log`` when it begins, so that a test can count how often it ran.
"""

from __future__ import annotations

import ctypes
import lzma
import os
import signal
import time
from pathlib import Path
from typing import Any

import parflow as pf


def note(log: str, what: str) -> None:
    """Add a line to a file in one write of 64 bytes: lines of several processes don't mix, and a page holds whole ones.

    So no reader sees half a line, and no kill leaves one.
    """
    line = f"{what:<63}\n".encode()
    assert len(line) == 64, what
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, line)
    os.close(handle)


@pf.workflow
def documents(source: str, out: str, log: str, chunk: str = "400kB") -> Any:
    """Describe each text in a line of JSON, and sum up what they hold."""

    def describe(doc: pf.Document) -> dict[str, Any]:
        note(log, "/".join(doc.path.split("/")[-2:]))
        packed = lzma.compress(doc.text.encode(), preset=6)
        return {"path": doc.path, "words": len(doc.text.split()), "share": len(packed) / max(1, len(doc.text))}

    rows = pf.read_files(source, chunk_bytes=chunk).map(describe)
    rows.write_jsonl(out)
    words = rows.map(lambda row: row["words"]).reduce(pf.sum())
    share = rows.map(lambda row: row["share"]).reduce(pf.mean())
    return words, share, rows.reduce(pf.count())


@pf.workflow
def gated(source: str, gate: str, log: str, out: str) -> Any:
    """Hold each line up until the file ``gate`` is there."""

    def wait(line: str) -> str:
        note(log, line)
        while not os.path.exists(gate):
            time.sleep(0.005)
        return line

    lines = pf.read_lines(source, chunk_bytes="100kB").map(wait)  # opening costs so much that a chunk is a file
    lines.write_jsonl(out)
    return lines.reduce(pf.count())


@pf.workflow
def numbers(source: str, log: str) -> Any:
    """Sum up lines that should be numbers; what is said of one that isn't, quotes it."""

    def number(line: str) -> int:
        note(log, "run")
        try:
            return int(line)
        except ValueError:
            raise ValueError(f"{line} is no number") from None

    return pf.read_lines(source).map(number).reduce(pf.sum())


@pf.workflow
def killers(source: str, log: str, times: int) -> Any:
    """Kill the process that runs the line "bad", as the kernel does when memory is short, the first so many ``times``."""

    def run(line: str) -> str:
        note(log, line)
        if line == "bad" and Path(log).read_text().split().count("bad") <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    return pf.read_lines(source).map(run).reduce(pf.count())


@pf.workflow
def crashing(source: str) -> Any:
    """Read from where there's nothing, at the line "bad"."""

    def run(line: str) -> str:
        return ctypes.string_at(0).decode() if line == "bad" else line

    return pf.read_lines(source).map(run).reduce(pf.count())


@pf.workflow
def failing(source: str) -> Any:
    """Fail for each line that isn't good, in its own way, having said so."""

    def check(line: str) -> str:
        print("checking", line)
        if line.startswith("bad"):
            raise ValueError(f"no good: {line}\nand a second line")
        if line == "missing":
            raise FileNotFoundError(line)
        return line

    return pf.read_lines(source).map(check).reduce(pf.count())


@pf.workflow
def judging(value: str) -> Any:
    """Call a task that fails."""

    def judge(value: str) -> str:
        print("judging", value)
        raise ValueError(f"{value} is no value")

    return pf.call(judge, value)


@pf.workflow
def settings(count: int, share: float = 0.5, loud: bool = False, name: str | None = None) -> Any:
    """Show what parameters become."""
    return pf.items(range(count)).map(lambda number: (number, share, loud, name))


@pf.workflow
def tally(source: str) -> Any:
    """Count equal lines."""
    return pf.read_lines(source).reduce(pf.counter())


@pf.workflow
def talkative(log: str, gate: str) -> Any:
    """Print a page for each of a hundred records, once the gate is open."""

    def say(number: int) -> None:
        note(log, "run")
        while not os.path.exists(gate):
            time.sleep(0.005)
        print(f"{number}\n" * 1000)

    return pf.items(range(100)).map(say).reduce(pf.count())


@pf.workflow
def odd() -> Any:
    """Give a result that JSON hardly has."""
    things = {("a", 1): 1, "big": 2**80, "broken \udcff": (1, 2), None: None}
    return pf.items([1]).reduce(pf.reducer(dict, lambda state, record: things, lambda a, b: things, name="odd"))


@pf.workflow
def pages(log: str, gate: str, out: str, kept: int = 100_000, written: int = 1) -> Any:
    """Keep ``kept`` bytes of each of 24 chunks, and write a row of ``written``; from the twelfth on they wait for a gate."""

    def page(number: int) -> dict[str, Any]:
        note(log, str(number))
        while number >= 12 and not os.path.exists(gate):
            time.sleep(0.005)
        return {"number": number, "kept": str(number % 10) * kept, "written": str(number % 10) * written}

    def join(left: list[str], right: list[str]) -> list[str]:
        return left + right

    rows = pf.items(range(24), chunk_records=1).map(page)
    rows.map(lambda row: {"number": row["number"], "text": row["written"]}).write_jsonl(out)
    sizes = pf.reducer(list, lambda state, row: [*state, row["kept"]], join, finish=lambda state: sum(map(len, state)))
    return rows.reduce(sizes)


@pf.task(retry=pf.Retry(5, wait=0))
def slowly(number: int) -> int:
    time.sleep(0.004)
    return number


@pf.workflow
def total(count: int) -> Any:
    """Sum up numbers, and count them; each takes its time."""
    numbers = pf.items(range(count), chunk_records=20).map(slowly)
    return numbers.reduce(pf.sum()), numbers.reduce(pf.count())


@pf.workflow
def paying(count: int, log: str, gate: str) -> Any:
    """Pay for each number, and then fail. Paying back is slow when there is a gate."""

    def back(number: int) -> None:
        note(log, f"back-{number}")
        if os.path.exists(gate):
            time.sleep(0.02)

    @pf.task(compensate=back, in_doubt="retry")
    def pay(number: int) -> int:
        note(log, f"pay-{number}")
        return number

    paid = pf.items(range(count), chunk_records=4).map(pay).reduce(pf.count())
    return pf.call(lambda total: 1 // (total - total), paid)
