"""Real children: what ends one costs the record in hand, and nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from parflow.core.plan import Stage
from parflow.core.planner import make_plan
from parflow.core.reducers import concat
from parflow.model import Chunk, ChunkJob, Piece, Receipt
from parflow.nodes import ReduceNode, SourceNode, StepNode, Task
from parflow.runtime.code import pack
from parflow.runtime.program import keep_code
from parflow.runtime.sandbox import Sandbox
from parflow.runtime.worker import Batch
from parflow.storage.sources.items import ItemsSource
from parflow.storage.store import open_store


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox()
    yield box
    box.close()


@pytest.fixture
def run(sandbox: Sandbox, tmp_path: Path) -> Callable[..., Receipt]:
    """Run a function over the numbers 0 to 9, chunk of ten, and return the one receipt."""

    def runner(function: Callable[[Any], Any], piece: Piece | None = None, **options: Any) -> Receipt:
        (receipt,) = sandbox.run(batch(tmp_path, function, [piece or Piece(0)], **options), "slot")
        assert receipt is not None
        return receipt

    return runner


def batch(
    folder: Path, function: Callable[[Any], Any], pieces: list[Piece], *, timeout: float | None = None, **more: Any
) -> Batch:
    store = open_store(str(folder / "store"))
    source = ItemsSource(range(10), chunk_records=10)
    (chunk,) = source.chunks(store)
    stage = stage_of(function, source, timeout)
    code = keep_code(store, pack(stage))
    jobs = tuple(ChunkJob(0, piece, chunk) for piece in pieces)
    labels = tuple(stage.label(number) for number in range(3))
    return Batch("run", "1.1", 0, jobs, store.url, code, labels, stage.timeouts(None), **more)


def stage_of(function: Callable[[Any], Any], source: Any, timeout: float | None = None) -> Stage:
    step = StepNode("map", Task(function, "step", timeout), SourceNode(source))
    return make_plan("test", [ReduceNode(concat(), step, "concat")]).stages[0]


def chunk_of(receipt: Receipt) -> Any:
    import pickle

    (ref,) = receipt.results
    assert ref is not None
    assert ref.inline is not None
    return pickle.loads(ref.inline)


def exits(x: int) -> int:
    if x == 7:
        os._exit(3)
    return x


def segfaults(x: int) -> int:
    if x == 7:
        ctypes.string_at(0)
    return x


def holds_the_gil(x: int) -> int:
    if x == 7:  # counts for ever, in C, without letting go of the GIL
        sum(itertools.repeat(0))
    return x


def catches_everything(x: int) -> int:
    while x == 7:
        with contextlib.suppress(BaseException):
            time.sleep(60)
    return x


def sleeps(x: int) -> int:
    if x == 7:
        time.sleep(60)
    return x


def backtracks(x: int) -> int:
    if x == 7:
        re.match(r"(a+)+$", "a" * 64 + "b")
    return x


def tries_again_and_again(x: int) -> int:
    while x == 7:
        with contextlib.suppress(Exception):
            raise ValueError
    return x


def allocates(x: int) -> int:
    if x == 7:
        return len(bytearray(2 << 30))
    return x


def touches_slowly(x: int) -> int:
    """Grow in steps that no allocation limit refuses at once."""
    if x == 7:
        kept = []
        while True:
            kept.append(bytearray(os.urandom(1)) * (16 << 20))
    return x


def closes_its_pipe(x: int) -> int:
    if x == 7:
        os.closerange(3, 256)
        time.sleep(60)
    return x


def floods(x: int) -> int:
    for _ in range(200):
        os.write(1, b"x" * 65536)
    print("y" * 100000)
    return x


def exits_python(x: int) -> int:
    if x == 7:
        sys.exit("enough")
    return x


def test_a_chunk_runs_in_a_child_and_its_partial_result_comes_back(run: Callable[..., Receipt]) -> None:
    receipt = run(lambda x: (x, os.getpid()))
    records = chunk_of(receipt)
    assert [x for x, _ in records] == list(range(10))
    assert os.getpid() not in {pid for _, pid in records}
    assert (receipt.status, receipt.tally.records, receipt.tally.failed) == ("done", 10, 0)


@pytest.mark.parametrize(
    ("function", "options", "cause", "words"),
    [
        (exits, {}, "crash", "exit code 3"),
        (segfaults, {}, "crash", "SIGSEGV"),
        (holds_the_gil, {"timeout": 0.5}, "timeout", "0.5 s"),
        (catches_everything, {"timeout": 0.5}, "timeout", "0.5 s"),
        (allocates, {"memory": 512 << 20}, "memory", "memory"),
        (touches_slowly, {"memory": 256 << 20}, "memory", "memory"),
        (closes_its_pipe, {}, "crash", "closed its connection"),
    ],
    ids=["os._exit", "segfault", "endless sum", "catches everything", "2 GiB under 512 MiB", "slow growth", "closed pipe"],
)
def test_a_record_that_ends_its_child_is_named_and_the_next_job_runs_in_a_fresh_one(
    sandbox: Sandbox, tmp_path: Path, function: Callable[[int], int], options: dict[str, Any], cause: str, words: str
) -> None:
    pieces = [Piece(0), Piece(0, stop=7)]
    died, done = sandbox.run(batch(tmp_path, function, pieces, **options), "slot")
    assert died is not None
    assert died.failure is not None
    assert died.cursor is not None
    assert (died.status, died.cursor.ordinal, died.failure.cause, died.failure.step) == ("died", 7, cause, "step")
    assert words in died.failure.message
    assert done is not None
    assert (done.status, chunk_of(done)) == ("done", list(range(7)))


@pytest.mark.parametrize("function", [sleeps, backtracks, tries_again_and_again])
def test_a_call_that_takes_too_long_is_interrupted_and_its_child_keeps_what_it_has_made(
    sandbox: Sandbox, tmp_path: Path, function: Callable[[int], int]
) -> None:
    pieces = [Piece(0), Piece(0, skip=8)]
    receipt, rest = sandbox.run(batch(tmp_path, lambda x: (function(x), os.getpid()), pieces, timeout=0.3), "slot")
    assert receipt is not None
    assert rest is not None
    assert (receipt.status, receipt.tally.records, receipt.tally.failed) == ("stopped", 8, 1)
    assert receipt.cursor is not None
    assert receipt.cursor.ordinal == 8  # what was waited for is committed, and the rest is for whoever has nothing to do
    records = chunk_of(receipt) + chunk_of(rest)
    assert [x for x, _ in records] == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert len({pid for _, pid in records}) == 1
    assert receipt.failure is not None
    assert (receipt.failure.cause, receipt.failure.error, receipt.failure.ordinal) == ("timeout", "RecordTimeoutError", 7)
    assert receipt.failure.message == "took longer than its timeout of 0.3 s"
    assert f"in {function.__name__}" in receipt.failure.traceback


def test_a_crash_brings_the_interpreters_own_last_words(run: Callable[..., Receipt]) -> None:
    receipt = run(segfaults)
    assert receipt.failure is not None
    assert "Segmentation fault" in receipt.failure.traceback
    assert "segfaults" in receipt.failure.traceback


def test_sys_exit_is_an_ordinary_failure_of_one_record(run: Callable[..., Receipt]) -> None:
    receipt = run(exits_python)
    assert receipt.failure is not None
    assert (receipt.status, receipt.tally.failed, receipt.failure.error) == ("done", 1, "SystemExit")


def test_output_that_floods_blocks_nothing_and_is_kept_short(sandbox: Sandbox, run: Callable[..., Receipt]) -> None:
    receipt = run(floods)
    assert (receipt.status, receipt.tally.records) == ("done", 10)


def test_one_call_may_take_its_timeout_though_the_chunk_takes_longer(run: Callable[..., Receipt]) -> None:
    def naps(x: int) -> int:
        time.sleep(0.15)
        return x

    receipt = run(naps, timeout=1.0)
    assert (receipt.status, receipt.tally.records) == ("done", 10)


def test_a_chunk_ends_at_its_time_slice_and_says_where(run: Callable[..., Receipt]) -> None:
    def naps(x: int) -> int:
        time.sleep(0.1)
        return x

    receipt = run(naps, slice=0.25)
    assert receipt.status == "stopped"
    assert receipt.cursor is not None
    assert 0 < receipt.cursor.ordinal < 10
    assert chunk_of(receipt) == list(range(receipt.cursor.ordinal))
    rest = run(naps, Piece(0, receipt.cursor))
    assert chunk_of(receipt) + chunk_of(rest) == list(range(10))


def test_a_batch_that_is_asked_to_stop_comes_back_at_its_next_record(sandbox: Sandbox, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def naps(x: int) -> int:
        begun.touch()
        time.sleep(0.1)
        return x

    def stop() -> None:
        while not begun.exists():
            time.sleep(0.01)
        sandbox.stop(("run/1.1",))

    thread = threading.Thread(target=stop)
    thread.start()
    first, second = sandbox.run(batch(tmp_path, naps, [Piece(0), Piece(0)]), "slot")
    thread.join()
    assert first is not None
    assert first.status == "stopped"
    assert second is None


def test_a_batch_that_was_stopped_before_it_began_does_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.stop(("run/1.1",))
    for isolation in ("process", "inline"):
        assert sandbox.run(batch(tmp_path, lambda x: x, [Piece(0)], isolation=isolation), "slot") == (None,)


def test_without_isolation_the_records_run_in_the_worker_itself(run: Callable[..., Receipt]) -> None:
    receipt = run(lambda x: os.getpid(), isolation="inline")
    assert set(chunk_of(receipt)) == {os.getpid()}


def test_an_alone_piece_gets_a_child_that_ran_nothing_before(sandbox: Sandbox, tmp_path: Path) -> None:
    pieces = [Piece(0), Piece(0, stop=1, alone=True)]
    used, alone = (sandbox.run(batch(tmp_path, lambda x: os.getpid(), [piece]), "slot")[0] for piece in pieces)
    assert used is not None
    assert alone is not None
    assert set(chunk_of(used)).isdisjoint(chunk_of(alone))


def test_code_that_cannot_be_loaded_breaks_the_step_with_the_module_named(sandbox: Sandbox, tmp_path: Path) -> None:
    module = tmp_path / "gone_helper.py"
    module.write_text("def f(x):\n    return x\n")
    sys.path.insert(0, str(tmp_path))
    try:
        from gone_helper import f  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    (receipt,) = sandbox.run(batch(tmp_path, f, [Piece(0)]), "slot")
    assert receipt is not None
    assert receipt.failure is not None
    assert receipt.status == "broken"
    assert "gone_helper" in receipt.failure.message


def test_code_that_kills_its_child_when_loaded_breaks_the_step(sandbox: Sandbox, tmp_path: Path) -> None:
    module = tmp_path / "deadly_helper.py"
    module.write_text(
        "import os\nif 'parflow.runtime.child' in __import__('sys').modules and os.environ.get('DEADLY'): os._exit(9)\n"
        "def f(x):\n    return x\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        from deadly_helper import f  # type: ignore[import-not-found]

        os.environ["DEADLY"] = "1"
        (receipt,) = sandbox.run(batch(tmp_path, f, [Piece(0)]), "slot")
    finally:
        os.environ.pop("DEADLY", None)
        sys.path.remove(str(tmp_path))
    assert receipt is not None
    assert receipt.failure is not None
    assert receipt.status == "broken"
    assert "loaded" in receipt.failure.message


@pytest.mark.parametrize("fatal", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_children_die_with_their_parent_whatever_kills_it(tmp_path: Path, fatal: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, time
        from parflow.runtime.sandbox import Sandbox
        box = Sandbox()
        box.warm(2, (), None)
        print(box.server.process.pid, *(child.pid for child in box.idle), flush=True)
        time.sleep(60)
        """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert parent.stdout is not None
    family = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(family) == 3
    parent.send_signal(fatal)
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


def test_a_child_stuck_in_c_dies_with_its_parent_too(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import sys, threading
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        from test_sandbox import batch, holds_the_gil
        from parflow.model import Piece
        from parflow.runtime.sandbox import Sandbox
        box = Sandbox()
        thread = threading.Thread(target=box.run, args=(batch(Path(sys.argv[2]), holds_the_gil, [Piece(0)]), "slot"))
        thread.start()
        while not any(child.marker[2] == 7 for child in list(box.busy.values())):
            pass
        print(*(child.pid for child in box.busy.values()), flush=True)
        thread.join()
        """)
    )
    here = str(Path(__file__).parent)
    parent = subprocess.Popen([sys.executable, str(script), here, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert alive == []


def test_the_fork_server_is_started_anew_when_it_was_killed_and_its_idle_children_are_missed_by_nobody(
    sandbox: Sandbox, run: Callable[..., Receipt]
) -> None:
    sandbox.warm(4, (), None)
    assert len(sandbox.idle) == 4
    assert sandbox.server.process is not None
    sandbox.server.process.kill()
    assert chunk_of(run(lambda x: x)) == list(range(10))
    assert len(sandbox.idle) == 1


def test_chunks_name_what_they_hold() -> None:
    assert isinstance(Chunk(0, "id", (), 0).parts, tuple)


def test_arrow_does_not_import_pandas_in_a_child_and_pandas_still_works_there(run: Callable[..., Receipt]) -> None:
    def look(x: int) -> Any:
        import pyarrow as pa

        made = pa.table({"x": [x]})
        before = "pandas" in sys.modules
        frame = made.to_pandas()
        return before, int(frame["x"].sum()), pa.Table.from_pandas(frame).to_pylist()

    receipt = run(look, Piece(0, stop=2), preload=("pyarrow",))
    assert chunk_of(receipt) == [(False, 0, [{"x": 0}]), (True, 1, [{"x": 1}])]
