"""What a graph of many small calls costs: fork-join rounds, and ten thousand calls at once, by Dask and by parflow.

A round is one call, 1,000 that are given its result, joins by tens (100, 10, 1), and a last one: 1,113 calls. Ten rounds follow
one another, each from the last one's result. parflow has all of them in one graph and keeps a durable record of every call;
`dask.delayed` gets a graph a round, since building one of several costs it more than the square of their number
(``delayed-chain`` shows it); its futures are submitted all ahead. The clusters are two processes of one thread, and up.

    python benchmarks/forkjoin.py                                    # all variants in turns, medians
    python benchmarks/forkjoin.py --variant rounds:parflow           # one of them, in this process
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import common

WORKERS = 2
ROUNDS = 10
LEAVES = 1_000
TENS = 10
CALLS = 1_113
"""Of a round."""

CHAINED = 3
"""Rounds that `dask.delayed` builds in a graph to show what each adds."""

FLAT = 10_000
"""Calls that wait for nothing; one more takes all of their results."""

PRIME = 1_000_003

Measured = dict[str, Any]
Make = Callable[..., Any]


def begin(value: int) -> int:
    return value + 1


def leaf(value: int, number: int) -> int:
    return value * 31 + number


def join(parts: list[int]) -> int:
    return sum(parts) % PRIME


def a_round(value: Any, make: Callable[[Callable[..., int]], Make], leaves: int = LEAVES) -> Any:
    """Build a round; ``make`` turns a function into what makes a call of it."""
    new_begin, new_leaf, new_join = make(begin), make(leaf), make(join)
    start = new_begin(value)
    level = [new_leaf(start, number) for number in range(leaves)]
    while len(level) > 1:
        level = [new_join(level[i : i + TENS]) for i in range(0, len(level), TENS)]
    return new_begin(level[0])


def rounds(make: Callable[[Callable[..., int]], Make], count: int) -> Any:
    value: Any = 0
    for _ in range(count):
        value = a_round(value, make)
    return value


def flat(make: Callable[[Callable[..., int]], Make], count: int) -> Any:
    new_leaf = make(leaf)
    return make(join)([new_leaf(1, number) for number in range(count)])


SHAPES: dict[str, Callable[..., Any]] = {"rounds": rounds, "flat": flat}
SIZES = {"rounds": ROUNDS, "flat": FLAT}


def expected(shape: str, size: int) -> int:
    """Return the answer by plain calls."""
    return int(SHAPES[shape](lambda function: function, size))


# --- the variants: each builds and runs a graph on a cluster that is up, and says how long either took -------------------


@contextmanager
def dask_client() -> Iterator[Any]:
    """Give a client of a local cluster of two processes."""
    from distributed import Client

    with Client(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None, silence_logs=40) as client:
        assert client.submit(begin, 0).result() == 1
        client.wait_for_workers(WORKERS)
        yield client


def timed(build: Callable[[], Any], run: Callable[[Any], int]) -> Measured:
    start = time.perf_counter()
    graph = build()
    built = time.perf_counter()
    value = run(graph)
    return {"value": value, "build": built - start, "total": time.perf_counter() - start}


def parflow_on(shape: str, size: int, **where: Any) -> Measured:
    """Build a workflow's graph and its plan, then run it as it runs by default: isolated and durable."""
    import parflow as pf

    task = functools.cache(pf.task)

    @pf.workflow
    def flow(size: int) -> Any:
        return SHAPES[shape](task, size)

    def build() -> Any:
        bound = flow(size)
        bound.plan()  # the run makes its own once more, and the total has both
        return bound

    assert pf.items([1]).reduce(pf.sum()).run(**where).result() == 1  # everything is up
    return timed(build, lambda bound: int(bound.run(**where).result()))


def parflow(shape: str, size: int) -> Measured:
    return parflow_on(shape, size, workers=WORKERS)


def parflow_on_dask(shape: str, size: int) -> Measured:
    """On the very cluster that the others get."""
    with dask_client() as client:
        return parflow_on(shape, size, cluster=client.scheduler.address)


def delayed_task(function: Callable[..., int]) -> Make:
    from dask import delayed

    make: Make = delayed(function, pure=False)
    return make


def delayed(shape: str, size: int) -> Measured:
    """`dask.delayed`; of rounds, a graph each."""

    def build(value: int) -> Any:
        return a_round(value, delayed_task) if shape == "rounds" else flat(delayed_task, size)

    with dask_client():
        value, parts = 0, []
        for _ in range(size if shape == "rounds" else 1):
            parts.append(timed(functools.partial(build, value), lambda graph: int(graph.compute())))
            value = parts[-1]["value"]
    return {"value": value} | {key: sum(part[key] for part in parts) for key in ("build", "total")}


def delayed_chain(shape: str, size: int) -> Measured:
    """`dask.delayed`, with all rounds in one graph."""
    with dask_client():
        return timed(lambda: SHAPES[shape](delayed_task, size), lambda graph: int(graph.compute()))


def futures(shape: str, size: int) -> Measured:
    """Dask futures, all submitted before the first has ended."""
    with dask_client() as client:

        def make(function: Callable[..., int]) -> Make:
            return lambda *args: client.submit(function, *args, pure=False)

        return timed(lambda: SHAPES[shape](make, size), lambda future: int(future.result()))


ENGINES: dict[str, Callable[[str, int], Measured]] = {
    "delayed": delayed,
    "delayed-chain": delayed_chain,
    "futures": futures,
    "parflow": parflow,
    "parflow-on-dask": parflow_on_dask,
}
VARIANTS = [f"{shape}:{engine}" for shape in SHAPES for engine in ENGINES if (shape, engine) != ("flat", "delayed-chain")]


def size_of(variant: str) -> int:
    return CHAINED if variant.endswith("delayed-chain") else SIZES[variant.partition(":")[0]]


# --- measuring -----------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one in this process, without measuring")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="variants to compare")
    options = parser.parse_args()
    if options.variant:
        shape, _, engine = options.variant.partition(":")
        with common.scratch():
            common.answer(ENGINES[engine](shape, size_of(options.variant)))
        return
    common.print_machine()
    commands = {name: [sys.executable, __file__, "--variant", name] for name in options.only}
    answers = {name: expected(name.partition(":")[0], size_of(name)) for name in options.only}

    def check(name: str, sample: common.Sample) -> None:
        if sample.answer["value"] != answers[name]:
            raise SystemExit(f"{name} gave {sample.answer['value']}, not {answers[name]}")

    common.write_json(options.json, report(common.measure_in_turns(commands, options.rounds, check, memory=False)))


def report(samples: dict[str, list[common.Sample]]) -> dict[str, dict[str, float]]:
    """Print and return medians: of rounds for each round, of independent calls for all of them."""
    results: dict[str, dict[str, float]] = {}
    print(f"{'':24} {'build ms':>10} {'total s':>8} {'us a call':>10} {'/ delayed':>10}")
    for name, group in samples.items():
        units = size_of(name) if name.startswith("rounds") else 1
        row = {key: statistics.median(sample.answer[key] for sample in group) / units for key in ("build", "total")}
        results[name] = row
    for name, row in results.items():
        base = results.get(f"{name.partition(':')[0]}:delayed")
        calls = CALLS if name.startswith("rounds") else FLAT + 1
        ratio = f"{row['total'] / base['total']:10.2f}" if base else ""
        print(f"{name:24} {row['build'] * 1e3:10.1f} {row['total']:8.3f} {row['total'] / calls * 1e6:10.0f} {ratio}")
    print("rounds: each; flat: all. The answers are those of plain calls.")
    return results


if __name__ == "__main__":
    main()
