"""What a record prints stands in its dead letter, and nothing of what others print."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import parflow as pf
from parflow.model import Failure


def letters(function: Any, records: Any = range(4), **options: Any) -> dict[str, Failure]:
    """Run a function on records in one child and return its dead letters by their records' names."""
    run = pf.items(records, chunk_records=100).map(function).run(max_failures=100, workers=1, **options)
    return {failure.record: failure for failure in run.dead_letters()}


def test_a_dead_letter_has_what_its_record_printed_in_every_way() -> None:
    def speak(number: int) -> int:
        print("out", number)
        print("err", number, file=sys.stderr)
        logging.getLogger("flow").warning("logged %d", number)
        sys.stdout.buffer.write(b"bytes\n")
        print("no newline", end="")
        if number == 2:
            raise ValueError(number)
        return number

    found = letters(speak)
    assert found["items[2]"].output == "out 2\nerr 2\nlogged 2\nbytes\nno newline"
    assert len(found) == 1


def test_a_silent_record_has_no_output_whatever_the_others_print() -> None:
    def speak(number: int) -> int:
        if number == 2:
            raise ValueError(number)
        print("out", number)
        return number

    assert letters(speak)["items[2]"].output == ""


def test_what_all_steps_print_of_a_record_is_its_own() -> None:
    def first(number: int) -> int:
        print("first", number)
        return number

    def second(number: int) -> float:
        print("second", number)
        return 1 / number

    run = pf.items([0, 1], chunk_records=2).map(first).map(second).run(max_failures=1, workers=1)
    assert [failure.output for failure in run.dead_letters()] == ["first 0\nsecond 0\n"]


def test_only_the_end_of_what_a_talker_printed_is_kept() -> None:
    def talk(number: int) -> int:
        for line in range(2000):
            print(f"ä{line:09}")
        raise ValueError(number)

    output = letters(talk, [0])["items[0]"].output
    assert len(output) == 2000
    assert output.endswith("ä000001998\nä000001999\n")


def crash(number: int) -> None:
    ctypes.string_at(0)


def hang(number: int) -> None:
    time.sleep(3600)


def leave(number: int) -> None:
    os._exit(3)


@pytest.mark.parametrize(
    ("die", "cause", "trace"), [(crash, "crash", "in crash"), (hang, "timeout", "in hang"), (leave, "crash", "")]
)
def test_the_output_of_a_record_that_ends_its_child_stands_apart_from_the_traceback(
    die: Callable[[int], None], cause: str, trace: str
) -> None:
    @pf.task(timeout="2s")
    def run(number: int) -> int:
        print("this is", number)
        if number == 2:
            print("before the end", end="")
            die(number)
        return number

    (failure,) = letters(run).values()
    assert (failure.cause, failure.output) == (cause, "this is 2\nbefore the end")
    assert trace in failure.traceback
    assert bool(failure.traceback) == bool(trace)
    assert "this is" not in failure.traceback


def test_what_c_code_writes_as_a_record_crashes_is_its_output() -> None:
    def write(number: int) -> int:
        os.write(2, b"free(): invalid pointer\n")
        os.abort()

    assert letters(write, [0])["items[0]"].output == "free(): invalid pointer\n"


def test_coroutines_that_take_turns_keep_their_output_apart() -> None:
    @pf.task(concurrency=8)
    async def speak(number: int) -> int:
        for turn in range(3):
            print(f"{number} in turn {turn}")
            await asyncio.sleep(0)
        raise ValueError(number)

    found = letters(speak, range(8))
    assert len(found) == 8
    for number in range(8):
        assert found[f"items[{number}]"].output == "".join(f"{number} in turn {turn}\n" for turn in range(3))


@pytest.mark.parametrize("die", [None, crash])
def test_a_failed_call_has_its_output_too(die: Callable[[int], None] | None) -> None:
    def call(number: int) -> int:
        print("called with", number)
        if die is not None:
            die(number)
        raise ValueError(number)

    (failure,) = pf.call(call, 3).run(workers=1).dead_letters()
    assert failure.output == "called with 3\n"


def test_jobs_do_not_inherit_each_others_output() -> None:
    def call(number: int) -> int:
        if number % 2:
            raise ValueError(number)
        print("well done", number)
        return number

    calls = [pf.call(call, number) for number in range(4)]
    run = pf.settle(*calls).run(workers=1)
    assert [failure.output for failure in run.dead_letters()] == ["", ""]


def test_inline_steps_print_where_the_worker_prints(capsys: pytest.CaptureFixture[str]) -> None:
    def speak(number: int) -> int:
        print("out", number)
        raise ValueError(number)

    assert letters(speak, [1], isolation="inline")["items[0]"].output == ""
    assert capsys.readouterr().out == "out 1\n"


def test_a_handler_made_while_modules_were_imported_is_heard(tmp_path: Path) -> None:
    (tmp_path / "talker.py").write_text(
        "import logging\nlogging.basicConfig(format='%(message)s')\n\n"
        "def talk(number):\n    logging.error('number %d', number)\n    raise ValueError(number)\n"
    )
    flow = (
        "import parflow as pf, talker\nrun = pf.items([7]).map(talker.talk).run(max_failures=1, workers=1)\n"
        "print(repr(run.dead_letters()[0].output))"
    )
    done = subprocess.run([sys.executable, "-c", flow], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "'number 7\\n'\n"


def test_a_dead_letter_knows_its_place(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("good\nbad\ncrash\n")

    def check(line: str) -> str:
        if line == "bad":
            raise ValueError(line)
        return ctypes.string_at(0).decode() if line == "crash" else line

    run = pf.read_lines(f"{tmp_path}/*.txt").map(check).run(max_failures=4, workers=1)
    places = [(failure.chunk, failure.part, failure.ordinal, failure.offset) for failure in run.dead_letters()]
    assert places == [(0, 0, 1, 5), (0, 0, 2, 9), (0, 1, 4, 5), (0, 1, 5, 9)]
