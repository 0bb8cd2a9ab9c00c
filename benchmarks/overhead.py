"""What parflow itself costs: microseconds a record and a chunk, milliseconds to start, beside plain Dask futures.

Run it with `python benchmarks/overhead.py`.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import common

CHUNKS = 10_000
WARM_UP = 100


def noop(value: Any) -> Any:
    return value


def seconds(work: Callable[[int], int], n: int) -> float:
    """Return how long ``work(n)`` takes once everything is up: a small one goes before."""
    assert work(WARM_UP) == WARM_UP
    start = time.perf_counter()
    assert work(n) == n
    return time.perf_counter() - start


def parflow_records(n: int) -> float:
    """No-op records in chunks of the default size."""
    import parflow as pf

    return seconds(lambda k: int(pf.items(range(k)).map(noop).reduce(pf.count()).run(workers=2).result()), n)


def parflow_chunks(n: int) -> float:
    """No-op chunks of one record each."""
    import parflow as pf

    def work(k: int) -> int:
        return int(pf.items(range(k), chunk_records=1).map(noop).reduce(pf.count()).run(workers=2).result())

    return seconds(work, n)


def dask_client(processes: bool) -> Any:
    """Return a client of a local cluster with two slots."""
    from distributed import Client

    shape = {"n_workers": 2, "threads_per_worker": 1} if processes else {"n_workers": 1, "threads_per_worker": 2}
    return Client(processes=processes, dashboard_address=None, silence_logs=40, **shape)


def dask_futures(n: int, processes: bool) -> float:
    """No-op futures, all submitted at once and all results gathered."""
    with dask_client(processes) as client:
        return seconds(lambda k: len(client.gather(client.map(noop, range(k), pure=False))), n)


def parflow_start() -> float:
    """One chunk, from the process's start to its receipt."""
    import psutil

    import parflow as pf

    run = pf.items(range(1)).map(noop).reduce(pf.count()).run(workers=2)
    assert run.result() == 1
    return run.timings()["first_chunk"] - psutil.Process().create_time()


def dask_start(processes: bool) -> float:
    """One future; what counts is the process's time to this answer."""
    assert dask_client(processes).submit(noop, 1).result() == 1
    return 0.0


VARIANTS: dict[str, Callable[[], float]] = {
    "records-10k": functools.partial(parflow_records, 10_000),
    "records-1M": functools.partial(parflow_records, 1_000_000),
    "chunks": functools.partial(parflow_chunks, CHUNKS),
    "dask-threads": functools.partial(dask_futures, CHUNKS, processes=False),
    "dask-processes": functools.partial(dask_futures, CHUNKS, processes=True),
    "start": parflow_start,
    "start-dask-threads": functools.partial(dask_start, processes=False),
    "start-dask-processes": functools.partial(dask_start, processes=True),
}
UNITS = {"records-10k": 10_000, "records-1M": 1_000_000, "chunks": CHUNKS, "dask-threads": CHUNKS, "dask-processes": CHUNKS}
"""Of what each has how many; the others are counted from the process's start to the answer."""

IMPORTS = {"python": "", "import parflow": "import parflow", "import distributed": "import distributed"}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one in this process")
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, *IMPORTS], default=[*VARIANTS, *IMPORTS])
    options = parser.parse_args()
    if options.variant:
        with common.scratch():
            common.answer({"seconds": VARIANTS[options.variant]()})
        return
    commands = {name: [sys.executable, __file__, "--variant", name] for name in VARIANTS}
    commands |= {name: [sys.executable, "-c", f"{code}\nprint('{{}}')"] for name, code in IMPORTS.items()}
    common.print_machine()
    chosen = {name: commands[name] for name in options.only}
    results = report(common.measure_in_turns(chosen, options.rounds, memory=False))
    common.write_json(options.json, results)


def report(samples: dict[str, list[common.Sample]]) -> dict[str, dict[str, float]]:
    """Print and return the medians."""
    results = {}
    for name, group in samples.items():
        median = statistics.median(s.answer.get("seconds") or s.wall for s in group)
        results[name] = {"seconds": median}
        line = f"{name:22} {median:8.3f} s"
        if name in UNITS:
            results[name]["us_each"] = median / UNITS[name] * 1e6
            line += f" {results[name]['us_each']:10.1f} us each"
        print(line)
    dask = min((results[name]["seconds"] for name in ("dask-threads", "dask-processes") if name in results), default=None)
    if dask and "chunks" in results:
        print(f"a chunk costs {results['chunks']['seconds'] / dask:.2f} of a plain Dask future (Dask's faster cluster)")
    return results


if __name__ == "__main__":
    main()
