"""Steps that are more than a call a record: classes that are built first, calls in flight, batches."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import dask
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parflow as pf
from parflow.core.plan import Stage
from parflow.errors import GraphError, ParflowError, RunError, UsageError
from parflow.model import ChunkJob, Failure, Piece, Receipt
from parflow.nodes import SourceNode
from parflow.runtime.code import pack
from parflow.runtime.graph import MemoryStore
from parflow.runtime.marker import ORDINAL, STOP, WORDS
from parflow.runtime.pipeline import Context, run_piece
from parflow.runtime.program import keep_code
from parflow.runtime.sandbox import Sandbox
from parflow.runtime.values import unpickle_all
from parflow.runtime.worker import Batch
from parflow.storage.sources import ItemsSource
from parflow.storage.store import open_store


def numbers(stop: int, chunk: int | None = None) -> pf.Dataset:
    return pf.items(range(stop), chunk_records=chunk or stop)


def finished(dataset: Any, **options: Any) -> tuple[list[Any], list[Failure]]:
    """Run with real children; returns the records and the dead letters."""
    run = dataset.run(**{"workers": 2, "max_failures": 10**6} | options)
    return [*run.result()], run.dead_letters()


def named(failures: Iterable[Failure]) -> list[tuple[str, str]]:
    return sorted((failure.record, failure.cause) for failure in failures)


def note(file: Path, *words: object) -> None:
    """Write a line that no other process's line gets into."""
    with file.open("a") as out:
        out.write(" ".join(map(str, words)) + "\n")


def noted(file: Path) -> list[str]:
    return file.read_text().split("\n")[:-1] if file.exists() else []


# --- pieces, in this process -----------------------------------------------------------------------------------------------


def piece_of(dataset: pf.Dataset, piece: Piece | None = None, marker: Any = None) -> Receipt:
    """Run a piece of a dataset's one chunk."""
    (stage,) = dataset.plan().stages
    store = MemoryStore()
    (chunk,) = stage.source.chunks(store)
    context = Context("run", "name", store, marker or [0] * WORDS, inline_bytes=2**62)
    return run_piece(stage, ChunkJob(0, piece or Piece(0), chunk), context, stage.timeouts(None))


def records_of(receipt: Receipt) -> list[Any]:
    (ref,) = receipt.results
    assert ref is not None
    assert ref.inline is not None
    return list(unpickle_all(ref.inline))


def failures_of(receipt: Receipt) -> list[Failure]:
    import pickle

    if receipt.failures is None:
        return []
    assert receipt.failures.inline is not None
    failures: list[Failure] = pickle.loads(receipt.failures.inline)
    return failures


@given(
    st.sets(st.integers(0, 39)),
    st.lists(
        st.one_of(
            st.just("map"),
            st.tuples(st.just("async"), st.integers(1, 9)),
            st.tuples(st.just("batches"), st.integers(1, 50), st.sampled_from(["records", "pandas", "arrow"])),
        ),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=60, deadline=None)
def test_whatever_steps_a_record_takes_it_comes_out_in_order_or_is_named(bad: set[int], steps: list[Any]) -> None:
    def once(row: dict[str, int]) -> dict[str, int]:
        if row["n"] in bad:
            raise ValueError(row["n"])
        return {"n": row["n"], "steps": row["steps"] + 1}

    async def waits(row: dict[str, int]) -> dict[str, int]:
        await asyncio.sleep(0.001 * (row["n"] % 3))
        return once(row)

    def batch(rows: Any) -> Any:
        given = rows.to_dict("records") if hasattr(rows, "to_dict") else rows.to_pylist() if hasattr(rows, "schema") else rows
        made = [once(row) for row in given]
        return type(rows).from_pylist(made) if hasattr(rows, "schema") else type(rows)(made)

    dataset = pf.items([{"n": n, "steps": 0} for n in range(40)], chunk_records=40)
    for step in steps:
        if step == "map":
            dataset = dataset.map(once)
        elif step[0] == "async":
            dataset = dataset.map(pf.task(concurrency=step[1])(waits))
        else:
            dataset = dataset.map_batches(batch, step[1], step[2])
    receipt = piece_of(dataset)
    assert records_of(receipt) == [{"n": n, "steps": len(steps)} for n in range(40) if n not in bad]
    assert [(f.record, f.ordinal, f.error) for f in failures_of(receipt)] == [
        (f"items[{n}]", n, "ValueError") for n in sorted(bad)
    ]
    assert receipt.tally.failed == len(bad)


@given(st.integers(0, 19), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_a_piece_that_is_asked_to_stop_finishes_what_it_holds_and_says_where_the_rest_begins(
    stop_at: int, calls: int, size: int
) -> None:
    marker = [0] * WORDS

    def look(n: int) -> int:
        if n == stop_at:
            marker[STOP] = 1
        return n

    async def waits(n: int) -> int:
        await asyncio.sleep(0)
        return n

    dataset = numbers(20).map(look).map(pf.task(concurrency=calls)(waits)).map_batches(list, size)
    first = piece_of(dataset, marker=marker)
    done = min(stop_at + 1, 20)
    assert records_of(first) == [*range(done)]
    assert first.tally.records == done
    if done == 20:
        assert first.status == "done"
        return
    assert first.status == "stopped"
    assert first.cursor is not None
    assert first.cursor.ordinal == done
    rest = piece_of(dataset, Piece(0, first.cursor))
    assert records_of(rest) == [*range(done, 20)]


def test_steps_behind_one_another_each_keep_their_own_records() -> None:
    def twice(n: int) -> list[int]:
        return [n, n]

    async def fails_for_three(n: int) -> int:
        await asyncio.sleep(0)
        if n == 3:
            raise KeyError(n)
        return n

    branches = numbers(8).flat_map(twice).map(pf.task(concurrency=3)(fails_for_three))

    @pf.workflow
    def both() -> Any:
        return branches.map_batches(list, size=5), branches.filter(lambda n: n % 2).reduce(pf.count())

    run = both().run(workers=2, max_failures=2)
    records, odd = run.result()
    assert list(records) == [n for n in range(8) if n != 3 for _ in range(2)]
    assert odd == 6
    assert named(run.dead_letters()) == [("items[3]", "exception")] * 2


# --- classes ---------------------------------------------------------------------------------------------------------------


class Model:
    """Says where and as which it was built."""

    def __init__(self, log: Path, factor: int = 1) -> None:
        self.log = log
        self.factor = factor
        note(log, "built", os.getpid())

    def __call__(self, n: int) -> int:
        if n == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return n * self.factor

    def close(self) -> None:
        note(self.log, "closed", os.getpid())


def in_sandbox(sandbox: Sandbox, folder: Path, dataset: pf.Dataset, **options: Any) -> list[tuple[Receipt | None, ...]]:
    """Run each chunk of a dataset in a batch of its own."""
    (stage,) = dataset.plan().stages
    store = open_store(str(folder / "store"))
    code = keep_code(store, pack(stage))
    labels = tuple(stage.label(number) for number in range(1 + len(stage.steps) + len(stage.outputs)))
    return [
        sandbox.run(
            Batch(
                "run",
                f"1.{chunk.index}",
                0,
                (ChunkJob(0, Piece(chunk.index), chunk),),
                store.url,
                code,
                labels,
                stage.timeouts(None),
                preload=stage.preload,
                **options,
            ),
            "slot",
        )
        for chunk in stage.source.chunks(store)
    ]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    box = Sandbox()
    yield box
    box.close()


def test_a_class_is_built_once_a_child_for_all_batches_and_closed_when_the_child_ends(sandbox: Sandbox, tmp_path: Path) -> None:
    log = tmp_path / "log"
    receipts = in_sandbox(sandbox, tmp_path, numbers(12, 3).map(partial(Model, log, factor=2)))
    assert [records_of(receipt) for (receipt,) in receipts if receipt] == [[0, 2, 4], [6, 8, 10], [12, 14, 16], [18, 20, 22]]
    (child,) = sandbox.idle
    assert noted(log) == [f"built {child.pid}"]
    sandbox.close()
    assert noted(log) == [f"built {child.pid}", f"closed {child.pid}"]


def test_a_class_is_built_anew_in_the_child_that_replaces_a_killed_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    records, failures = finished(numbers(20).map(partial(Model, log)), workers=1)
    assert records == [n for n in range(20) if n != 13]
    assert named(failures) == [("items[13]", "crash")]
    built = [line.split()[1] for line in noted(log) if line.startswith("built")]
    assert len({*built}) == len(built) >= 2


def test_a_decorated_class_takes_its_policies_along_and_stays_a_class() -> None:
    @pf.task(timeout="5s", name="stem")
    class Stemmer:
        """Cuts."""

        def __call__(self, word: str) -> str:
            return word.removesuffix("s")

    assert Stemmer()("cats") == "cat"
    dataset = pf.items(["cats", "dogs"]).map(Stemmer)
    assert "map stem [built once a child, timeout 5 s]" in dataset.plan().explain()
    assert finished(dataset) == (["cat", "dog"], [])


def test_a_class_whose_objects_cannot_be_called_is_called_with_each_record() -> None:
    assert numbers(3).map(str).map(float).compute() == [0.0, 1.0, 2.0]
    assert numbers(3).map(type).map(str).compute() == ["<class 'int'>"] * 3


class NoModel:
    def __init__(self) -> None:
        raise FileNotFoundError("weights.bin")

    def __call__(self, n: int) -> int:
        return n


class Exits(NoModel):
    def __init__(self) -> None:
        sys.exit("no licence")


class Dies(NoModel):
    def __init__(self) -> None:
        os._exit(3)


@pytest.mark.parametrize(
    ("model", "words", "isolation"),
    [
        (NoModel, ["FileNotFoundError: weights.bin", "in __init__", "test_steps.py"], "process"),
        (NoModel, ["FileNotFoundError: weights.bin"], "inline"),
        (Exits, ["SystemExit: no licence"], "process"),
        (Dies, ["loaded"], "process"),
    ],
)
def test_a_class_that_cannot_be_built_breaks_the_step_and_no_record(model: Any, words: list[str], isolation: str) -> None:
    run = numbers(5).map(model).run(workers=1, isolation=isolation)
    with pytest.raises(RunError) as caught:
        run.result()
    assert [word for word in words if word not in str(caught.value)] == []
    assert run.dead_letters() == []


def test_building_may_take_longer_than_a_calls_timeout(sandbox: Sandbox, tmp_path: Path) -> None:
    class Slow:
        def __init__(self) -> None:
            time.sleep(0.5)

        def __call__(self, n: int) -> int:
            return n

    warm = in_sandbox(sandbox, tmp_path, numbers(2).map(pf.task(timeout=0.1)(lambda n: n)))
    slow = in_sandbox(sandbox, tmp_path / "slow", numbers(2).map(pf.task(timeout=0.1)(Slow)))
    assert [receipt.status for (receipt,) in warm + slow if receipt] == ["done", "done"]


class Alone:
    """Notices when two threads call it at once."""

    def __init__(self, log: Path) -> None:
        self.busy = False
        note(log, "built")

    def __call__(self, n: int) -> int:
        assert not self.busy
        self.busy = True
        time.sleep(0.002)
        self.busy = False
        return threading.get_ident()


@pytest.mark.parametrize("way", ["inline", "threads", "synchronous"])
def test_threads_of_one_process_share_an_object_and_take_turns(way: str, tmp_path: Path) -> None:
    dataset = numbers(40, 1).map(partial(Alone, tmp_path / "log"))
    if way == "inline":
        threads, failures = finished(dataset, isolation="inline")
        assert failures == []
    else:
        with dask.config.set(num_workers=2):
            threads = dataset.compute(scheduler=way)
    assert len({*threads}) == (1 if way == "synchronous" else 2)
    assert noted(tmp_path / "log") == ["built"]


def test_the_objects_of_earlier_runs_are_closed_when_later_ones_need_the_child(tmp_path: Path) -> None:
    for run in range(4):
        finished(numbers(4).map(partial(Model, tmp_path / f"log{run}")), workers=1)
    counts = [Counter(line.split()[0] for line in noted(tmp_path / f"log{run}")) for run in range(4)]
    assert counts == [{"built": 1, "closed": 1}] * 2 + [{"built": 1}] * 2


# --- calls in flight ---------------------------------------------------------------------------------------------------------


def test_calls_wait_for_one_another_and_still_come_out_in_order(tmp_path: Path) -> None:
    """Each call waits for the one behind it: that ends only if all of a window are in flight."""
    doors: dict[int, asyncio.Event] = {}

    @pf.task(concurrency=5)
    async def backwards(n: int) -> int:
        mine = doors.setdefault(n, asyncio.Event())
        if n % 5 < 4:
            await doors.setdefault(n + 1, asyncio.Event()).wait()
        mine.set()
        return n

    assert finished(numbers(20).map(backwards)) == ([*range(20)], [])


@pytest.mark.parametrize("calls", [1, 4])
def test_no_more_calls_are_in_flight_than_asked_for(calls: int) -> None:
    flying = 0

    @pf.task(concurrency=calls)
    async def counts(n: int) -> int:
        nonlocal flying
        flying += 1
        now = flying
        await asyncio.sleep(0.001)
        flying -= 1
        return now

    records, _ = finished(numbers(30).map(counts), workers=1)
    assert max(records) == calls


def test_a_filter_and_a_flat_map_may_be_async_too() -> None:
    async def odd(n: int) -> int:
        await asyncio.sleep(0)
        return n % 2

    async def twice(n: int) -> list[int]:
        await asyncio.sleep(0)
        return [n, n]

    async def counts(n: int) -> AsyncIterator[int]:
        for k in range(n):
            yield k

    dataset = numbers(4).filter(odd).flat_map(twice)
    assert finished(dataset) == ([1, 1, 3, 3], [])
    assert numbers(4).flat_map(counts).compute() == [0, 0, 1, 0, 1, 2]


def test_a_call_that_fails_is_one_dead_letter_whatever_it_raises() -> None:
    @pf.task(concurrency=4)
    async def fails(n: int) -> int:
        await asyncio.sleep(0.001)
        if n == 2:
            sys.exit("enough")
        if n == 5:
            raise asyncio.CancelledError
        if n == 7:
            raise LookupError("seven")
        return n

    records, failures = finished(numbers(9).map(fails))
    assert records == [0, 1, 3, 4, 6, 8]
    assert [(f.record, f.error) for f in failures] == [
        ("items[2]", "SystemExit"),
        ("items[5]", "CancelledError"),
        ("items[7]", "LookupError"),
    ]
    assert failures[2].traceback.count("File ") == 1  # the user's line, and none of parflow's
    assert "in fails" in failures[2].traceback


def test_a_call_past_its_timeout_is_a_dead_letter_and_the_others_in_flight_go_on_in_the_same_child() -> None:
    @pf.task(concurrency=10, timeout=0.2)
    async def hangs(n: int) -> int:
        if n in (3, 15):
            await asyncio.sleep(60)
        if n == 7:
            while True:  # it takes no for an answer, but won't go
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(60)
        await asyncio.sleep(0.01)
        return os.getpid()

    children, failures = finished(numbers(30).map(hangs))
    assert len(children) == 27
    assert len({*children}) == 1
    assert named(failures) == [("items[15]", "timeout"), ("items[3]", "timeout"), ("items[7]", "timeout")]
    assert {f.message for f in failures} == {"took longer than its timeout of 0.2 s"}


def test_a_calls_clock_stands_still_while_another_step_works() -> None:
    @pf.task(concurrency=4, timeout=0.3)
    async def fetch(n: int) -> int:
        await asyncio.sleep(0.01)
        return n

    def slow(n: int) -> int:
        time.sleep(0.4)
        return n

    assert finished(numbers(6).map(fetch).map(slow), workers=1) == ([*range(6)], [])


def test_calls_that_end_in_time_one_after_the_other_never_look_like_a_hang() -> None:
    """The step behind has a short timeout, and none of its calls takes it."""

    @pf.task(concurrency=2)
    async def fetch(n: int) -> int:
        await asyncio.sleep(0.5)
        return n

    dataset = numbers(4).map(fetch).map(pf.task(timeout=0.2)(lambda n: n))
    assert finished(dataset, workers=1) == ([*range(4)], [])


def crashes(n: int) -> None:
    os._exit(3)


def blocks(n: int) -> None:
    time.sleep(60)


async def aside(act: Callable[[int], None], n: int) -> None:
    """Do it in a task of its own, which nobody can tell from the others'."""

    async def later() -> None:
        await asyncio.sleep(0.01)
        act(n)

    await asyncio.create_task(later())


@pytest.mark.parametrize("in_a_task", [False, True], ids=["itself", "in a task of its own"])
@pytest.mark.parametrize(("act", "cause"), [(crashes, "crash"), (blocks, "timeout")], ids=["crash", "blocked loop"])
def test_of_many_calls_in_flight_only_the_guilty_one_is_condemned(
    act: Callable[[int], None], cause: str, in_a_task: bool, tmp_path: Path
) -> None:
    log = tmp_path / "children"

    @pf.task(concurrency=8, timeout=0.5)
    async def fetch(n: int) -> int:
        if n == 0 or n == 17:
            note(log, os.getpid())
        await asyncio.sleep(0.001 * (n % 5))
        if n == 17:
            if in_a_task:
                await aside(act, n)
            act(n)
        await asyncio.sleep(0.02)
        return n

    records, failures = finished(numbers(40).map(fetch))
    assert records == [n for n in range(40) if n != 17]
    assert named(failures) == [("items[17]", cause)]
    assert len({*noted(log)}) <= 2 + 8  # as many tries as calls were in flight, at the most


class Slowly(ItemsSource):
    """Takes its time between two items, and so much memory (bytes) for each."""

    weight = 0

    def read(self, part: Any, offset: int, store: Any) -> Iterator[tuple[int, Any]]:
        for place, item in super().read(part, offset, store):
            time.sleep(0.02)
            yield place, (item, bytearray(self.weight))


class Heavily(Slowly):
    """Takes a lot."""

    weight = 8 << 20


def test_a_thread_of_a_call_that_ends_the_child_while_the_next_record_is_read_is_found_too() -> None:
    @pf.task(concurrency=4)
    async def fetch(pair: tuple[int, bytearray]) -> int:
        def later() -> int:
            time.sleep(0.03)
            if pair[0] == 5:
                os._exit(3)
            return pair[0]

        return await asyncio.to_thread(later)

    dataset = pf.Dataset(SourceNode(Slowly(range(16), chunk_records=16))).map(fetch)
    records, failures = finished(dataset)
    assert records == [n for n in range(16) if n != 5]
    assert named(failures) == [("items[5]", "crash")]


def test_an_async_class_is_built_called_and_closed_in_one_loop(sandbox: Sandbox, tmp_path: Path) -> None:
    log = tmp_path / "log"

    @pf.task(concurrency=3)
    class Client:
        def __init__(self) -> None:
            self.loop = asyncio.get_running_loop()

        async def __call__(self, n: int) -> bool:
            await asyncio.sleep(0)
            return self.loop is asyncio.get_running_loop()

        async def close(self) -> None:
            await asyncio.sleep(0)
            note(log, "closed", self.loop is asyncio.get_running_loop())

    dataset = numbers(6, 3).map(Client)
    assert "map Client [built once a child, 3 in flight]" in dataset.plan().explain()
    receipts = in_sandbox(sandbox, tmp_path, dataset)
    assert [records_of(receipt) for (receipt,) in receipts if receipt] == [[True] * 3] * 2
    sandbox.close()
    assert noted(log) == ["closed True"]


@pytest.mark.parametrize("way", ["inline", "plain Dask"])
def test_threads_of_one_process_share_its_loop_and_name_their_own_records(way: str) -> None:
    @pf.task(concurrency=3)
    async def fetch(n: int) -> int:
        await asyncio.sleep(0.001 * (n % 4))
        return n

    def check(n: int) -> int:
        if n % 10 == 7:
            raise ValueError(n)
        return n

    fetched = pf.items(range(100), chunk_records=9).map(fetch)
    if way == "plain Dask":
        assert fetched.compute() == [*range(100)]
        return
    records, failures = finished(fetched.map(check), isolation="inline")
    assert records == [n for n in range(100) if n % 10 != 7]
    assert [(f.record, f.message) for f in failures] == [(f"items[{n}]", str(n)) for n in range(7, 100, 10)]


def test_a_piece_that_is_given_up_leaves_no_call_in_flight() -> None:
    ended: list[int] = []

    @pf.task(concurrency=5)
    async def fetch(n: int) -> None:
        try:
            await asyncio.sleep(60 if n else 0.01)
            raise MemoryError
        finally:
            ended.append(n)

    receipt = piece_of(numbers(5).map(fetch))
    assert receipt.status == "died"
    assert receipt.cursor is not None
    assert receipt.cursor.ordinal == 0
    assert sorted(ended) == [0, 1, 2, 3, 4]


def test_on_a_thread_that_runs_a_loop_async_steps_say_so_at_once() -> None:
    async def fetch(n: int) -> int:
        return n

    async def main() -> None:
        numbers(3).map(fetch).compute(scheduler="synchronous")

    with pytest.raises(ParflowError, match="event loop"):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: pf.task(concurrency=4)(len), UsageError, "async def"),
        (lambda: pf.task(concurrency=0)(crashing), UsageError, "1 or more"),
        (lambda: numbers(3).map_batches(crashing), GraphError, "plain function"),
        (lambda: numbers(3).map_batches(list, 0), UsageError, "1 or more"),
        (lambda: numbers(3).map_batches(list, as_="numpy"), UsageError, "'records', 'pandas', 'arrow'"),  # type: ignore[arg-type]
    ],
)
def test_a_step_that_makes_no_sense_is_refused_when_it_is_written(
    make: Callable[[], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make()


async def crashing(n: int) -> None:
    os._exit(1)


# --- batches -----------------------------------------------------------------------------------------------------------------


def test_a_batch_is_of_one_chunk_and_of_the_asked_size() -> None:
    assert numbers(10, 5).map_batches(lambda batch: [len(batch)], 3).compute() == [3, 2, 3, 2]
    assert numbers(10).map_batches(lambda batch: [len(batch)]).compute() == [10]


def test_small_inputs_are_cut_for_calls_in_flight_and_batches() -> None:
    @pf.task(concurrency=50)
    async def fetch(n: int) -> int:
        return n

    def chunks(dataset: pf.Dataset) -> int:
        (stage,) = dataset.plan().stages
        return len([*stage.source.chunks(MemoryStore())])

    plain = pf.items(range(1000))
    assert [chunks(d) for d in (plain, plain.map(fetch), plain.map_batches(list), plain.map_batches(list, 8))] == [
        250,
        10,
        32,
        125,
    ]
    assert chunks(pf.items(range(1000), chunk_records=500).map(fetch)) == 2


def test_a_batch_that_raises_is_tried_record_by_record() -> None:
    def roots(batch: list[int]) -> Iterator[float]:
        for n in batch:
            yield math.sqrt(n - 3)

    records, failures = finished(pf.items([5, 2, 7, 1, 4]).map_batches(roots))
    assert records == [math.sqrt(2), 2.0, 1.0]
    assert [(f.record, f.step, f.error, f.preview) for f in failures] == [
        ("items[1]", "roots", "ValueError", "2"),
        ("items[3]", "roots", "ValueError", "1"),
    ]


@pytest.mark.parametrize(("act", "cause"), [(crashes, "crash"), (blocks, "timeout")], ids=["crash", "hang"])
@pytest.mark.parametrize("guilty", [0, 77, 99])
def test_of_a_batch_that_ends_its_child_only_the_guilty_record_is_condemned_after_few_tries(
    act: Callable[[int], None], cause: str, guilty: int, tmp_path: Path
) -> None:
    deaths = tmp_path / "deaths"

    @pf.task(timeout=0.3)
    def batch(numbers: list[int]) -> list[int]:
        if guilty in numbers:
            note(deaths, len(numbers))
            act(guilty)
        return numbers

    records, failures = finished(numbers(100).map_batches(batch))
    assert records == [n for n in range(100) if n != guilty]
    assert named(failures) == [(f"items[{guilty}]", cause)]
    sizes = [int(size) for size in noted(deaths)]
    assert sizes[-1] == 1
    assert len(sizes) <= 2 * math.log2(100) + 2


def test_a_batch_may_give_more_records_or_fewer_and_what_ends_a_child_behind_it_is_found_all_the_same(tmp_path: Path) -> None:
    deaths = tmp_path / "deaths"

    def evens_twice(batch: list[int]) -> list[int]:
        return [n for n in batch if n % 2 == 0 for _ in range(2)]

    def check(n: int) -> int:
        if n == 30:
            note(deaths, n)
            os._exit(3)
        return n

    records, failures = finished(numbers(64).map_batches(evens_twice).map(check))
    assert records == [n for n in range(0, 64, 2) if n != 30 for _ in range(2)]
    assert named(failures) == [("items[30]", "crash")]
    assert len(noted(deaths)) <= 2 * math.log2(64) + 2


def test_a_hang_behind_a_batch_of_another_length_condemns_no_innocent() -> None:
    def odd(batch: list[int]) -> list[int]:
        return [n for n in batch if n % 2]

    @pf.task(timeout=0.3)
    def check(n: int) -> int:
        if n == 5:
            time.sleep(60)
        return n

    records, failures = finished(numbers(16).map_batches(odd).map(check))
    assert records == [1, 3, 7, 9, 11, 13, 15]
    assert named(failures) == [("items[5]", "timeout")]


def test_a_batch_that_is_too_much_for_the_childs_memory_is_divided() -> None:
    def big(batch: list[int]) -> list[int]:
        return [len(bytearray(len(batch) * (16 << 20))) and n for n in batch]

    records, failures = finished(numbers(32).map_batches(big), memory="128MiB")
    assert (records, failures) == ([*range(32)], [])


def test_records_that_fill_the_childs_memory_while_a_batch_is_gathered_are_divided_too() -> None:
    heavy = pf.Dataset(SourceNode(Heavily(range(32), chunk_records=32)))
    records, failures = finished(heavy.map_batches(lambda batch: [n for n, _ in batch]), memory="96MiB")
    assert (records, failures) == ([*range(32)], [])


def test_a_model_takes_batches() -> None:
    class Ranks:
        def __init__(self, start: int) -> None:
            self.start = start

        def __call__(self, batch: list[str]) -> list[tuple[int, str]]:
            return [*enumerate(batch, self.start)]

    dataset = pf.items([*"abcd"], chunk_records=4).map_batches(partial(Ranks, 10), 2)
    assert "map_batches Ranks [built once a child, records, 2 at a time]" in dataset.plan().explain()
    assert finished(dataset) == ([(10, "a"), (11, "b"), (10, "c"), (11, "d")], [])


@pytest.mark.parametrize("form", ["pandas", "arrow"])
def test_a_table_has_all_fields_that_any_record_has_and_rows_come_back_as_dicts(form: Any) -> None:
    rows = [{"a": 1}, {"a": 2, "b": "x"}]

    def show(table: Any) -> Any:
        names = [*(table.columns if form == "pandas" else table.column_names)]
        assert names == ["a", "b"]
        return table

    made, failures = finished(pf.items(rows, chunk_records=2).map_batches(show, as_=form))
    assert failures == []
    assert [row["a"] for row in made] == [1, 2]
    assert [type(row["a"]) for row in made] == [int, int]
    assert made[1] == rows[1]


@pytest.mark.parametrize("form", ["pandas", "arrow"])
def test_what_makes_no_row_is_set_aside_alone(form: Any) -> None:
    records, failures = finished(pf.items([{"a": 1}, 5, {"a": 3}], chunk_records=3).map_batches(lambda t: t, as_=form))
    assert records == [{"a": 1}, {"a": 3}]
    assert [(f.record, f.error) for f in failures] == [("items[1]", "TypeError")]
    assert "mapping" in failures[0].message


@pytest.mark.parametrize("made", ["text", b"bytes", {"a": 1}, 7, None])
def test_what_is_no_batch_is_refused(made: object) -> None:
    records, failures = finished(numbers(2).map_batches(lambda batch: made))
    assert records == []
    assert [f.error for f in failures] == ["TypeError"] * 2


def test_a_table_stays_arrow_from_step_to_step_and_into_parquet(tmp_path: Path) -> None:
    """Types that Python's objects don't have get through."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = tmp_path / "sizes"

    def small(table: Any) -> Any:
        return pa.table({"n": table["n"].cast(pa.int8()), "kind": table["kind"].dictionary_encode()})

    def sees(table: Any) -> Any:
        assert [str(item.type) for item in table.schema] == ["int8", "dictionary<values=string, indices=int32, ordered=0>"]
        note(sizes, len(table))
        if 11 in table["n"].to_pylist():
            raise ValueError(11)
        return table

    rows = pf.items([{"n": n, "kind": "ab"[n % 2]} for n in range(25)], chunk_records=25)
    written = rows.map_batches(small, 10, "arrow").map_batches(sees, 7, "arrow").write_parquet(tmp_path / "out")
    run = written.run(workers=1, max_failures=1)
    assert run.result()["rows"] == 24
    assert [f.record for f in run.dead_letters()] == ["items[11]"]
    assert noted(sizes) == ["7", "7", *"3421127", "4"]  # the second batch is tried in halves
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert str(table.schema.field("n").type) == "int8"
    assert table["n"].to_pylist() == [n for n in range(25) if n != 11]


def test_pandas_and_arrow_are_loaded_where_a_step_asks_for_them_and_nowhere_else(sandbox: Sandbox, tmp_path: Path) -> None:
    def loaded(batch: Any) -> list[list[str]]:
        return [[name for name in ("asyncio", "pandas", "pyarrow") if name in sys.modules]]

    rows = pf.items([{"a": 1}])
    seen = []
    for form in ("records", "arrow", "pandas"):
        box = Sandbox()
        ((receipt,),) = in_sandbox(box, tmp_path / form, rows.map_batches(loaded, as_=form))
        box.close()
        assert receipt is not None
        seen += records_of(receipt)
    assert seen[0] == []
    assert seen[1] == ["pyarrow"]
    assert "pandas" in seen[2]
    assert rows.map_batches(loaded, as_="pandas").plan().stages[0].preload.count("pandas") == 1


def test_a_stage_is_what_travels() -> None:
    """Wrappers, classes and bound arguments survive the way to a child."""
    import pickle

    stage: Stage = pickle.loads(pack(numbers(3).map(partial(Model, Path("x"))).map_batches(list, 2, "arrow").plan().stages[0]))
    assert [step.kind for step in stage.steps] == ["map", "map_batches"]
    assert stage.facts() == numbers(3).map(partial(Model, Path("x"))).map_batches(list, 99, "arrow").plan().stages[0].facts()


def test_the_record_in_hand_of_a_batch_is_the_one_in_its_middle() -> None:
    marker = [0] * WORDS
    seen: list[tuple[int, int]] = []

    def look(batch: list[int]) -> list[int]:
        seen.append((len(batch), marker[ORDINAL]))
        return batch

    piece_of(numbers(10).map_batches(look, 8), marker=marker)
    assert seen == [(8, 4), (2, 9)]
