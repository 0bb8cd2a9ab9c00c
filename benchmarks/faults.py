"""What bad documents cost, and what is lost with them: the documents job with 1% that raise, 0.1% that hang, 0.02% that crash.

parflow with and without them; beside it Dask, joblib (loky) and Ray, where they are installed, with a task a file, a ``try``
around each document, and what they offer against the rest: retries, time limits, cancelling. They get ``--patience`` seconds.

    python benchmarks/faults.py --rounds 3
    python benchmarks/faults.py --variant joblib      # one of them, in this process
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import corpus
import faults_flow as flow
import psutil
from documents import WORKERS, written

Results = Iterator[int]
"""How many documents each file gave, as they come; raises when the tool gives up."""

RETRIES = 2


def _parflow(documents: int, out: str, wrong: dict[str, str]) -> common.Answer:
    start = time.perf_counter()
    run = flow.documents(corpus.pattern(documents), out, wrong).run(workers=WORKERS, max_failures=len(wrong))
    totals, seconds = run.result()["totals"], time.perf_counter() - start
    causes = Counter(letter.cause for letter in run.dead_letters())
    return {"docs": totals["docs"], "causes": causes, "end": "finished", "seconds": seconds}


def dask(files: list[str], out: str, wrong: dict[str, str], patience: float) -> Results:
    """Futures on a cluster of processes, whose nannies start lost workers anew; Dask's own retries."""
    from distributed import Client, as_completed

    client = Client(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None, silence_logs=50)
    futures = client.map(flow.process_file, files, out=out, wrong=wrong, pure=False, retries=RETRIES)
    for future in as_completed(futures, timeout=patience):
        if future.status == "finished":  # else a document of the file killed a worker too often
            yield future.result()[0]["docs"]


def dask_bag(files: list[str], out: str, wrong: dict[str, str], patience: float) -> Results:  # noqa: ARG001 - it has no time limit
    """A bag with a partition a file on Dask's own pool of processes."""
    import dask.bag

    bag = dask.bag.from_sequence(files, npartitions=len(files)).map(flow.process_file, out=out, wrong=wrong)
    for totals, _ in bag.compute(scheduler="processes", num_workers=WORKERS):
        yield totals["docs"]


def joblib(files: list[str], out: str, wrong: dict[str, str], patience: float) -> Results:
    """Loky's processes, results as they come, and its time limit for a task."""
    from joblib import Parallel, delayed

    parallel = Parallel(n_jobs=WORKERS, timeout=patience / 6, return_as="generator_unordered", batch_size=1)
    for totals, _ in parallel(delayed(flow.process_file)(path, out, wrong) for path in files):
        yield totals["docs"]


def ray(files: list[str], out: str, wrong: dict[str, str], patience: float) -> Results:
    """Tasks with Ray's own retries; one that takes several times what the largest file does is cancelled by force."""
    import ray as tool

    tool.init(num_cpus=WORKERS, include_dashboard=False, logging_level="FATAL", log_to_driver=False)
    remote = tool.remote(num_cpus=1, max_retries=RETRIES)(flow.process_file)
    limit, waiting, flying = patience / 12, list(reversed(files)), {}
    while waiting or flying:
        while waiting and len(flying) < WORKERS:
            flying[remote.remote(waiting.pop(), out, wrong)] = time.monotonic()
        for ref in tool.wait(list(flying), timeout=0.5)[0]:
            del flying[ref]
            try:
                yield tool.get(ref)[0]["docs"]
            except (tool.exceptions.RayError, OSError):  # its worker crashed more often than it is retried
                continue
        for ref, since in [*flying.items()]:
            if time.monotonic() - since > limit:
                tool.cancel(ref, force=True)
                del flying[ref]


OTHERS: dict[str, Callable[[list[str], str, dict[str, str], float], Results]] = {
    "dask": dask,
    "dask-bag": dask_bag,
    "joblib": joblib,
    "ray": ray,
}
NEEDS = {"dask": "distributed", "dask-bag": "dask", "joblib": "joblib", "ray": "ray"}
VARIANTS = ("clean", "parflow", *OTHERS)


def run_variant(name: str, documents: int, out: str, patience: float) -> None:
    """Run one variant in this process, print its answer, and end all that it started."""
    wrong = flow.spoilt(documents) if name != "clean" else {}
    if name in OTHERS:
        # As one runs any program for the night: somebody ends it when it doesn't end itself.
        common.answer(_other(name, documents, out, wrong, patience))
    else:
        common.answer(_parflow(documents, out, wrong))
        return
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


def _other(name: str, documents: int, out: str, wrong: dict[str, str], patience: float) -> common.Answer:
    import threading

    files = corpus.files(documents)
    docs, end, over = 0, f"hung; ended after {patience:.0f} s", threading.Event()

    def work() -> None:
        nonlocal docs, end
        try:
            for count in OTHERS[name](files, out, wrong, patience):
                docs += count
            end = "finished"
        except BaseException as error:
            if not isinstance(error, TimeoutError) or name == "joblib":
                end = f"raised {type(error).__name__}"
        finally:
            over.set()

    start = time.perf_counter()
    threading.Thread(target=work, daemon=True).start()
    over.wait(patience)
    return {"docs": docs, "end": end, "seconds": time.perf_counter() - start}


def main() -> None:
    """Compare the variants."""
    parser = common.parser(__doc__)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one in this process, without measuring")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, help="variants to compare")
    parser.add_argument("--documents", type=int, default=corpus.DOCUMENTS)
    parser.add_argument("--patience", type=float, default=120.0, help="seconds that the others get (default 120)")
    parser.add_argument("--out", help="folder for the Parquet files (--variant)")
    options = parser.parse_args()
    if options.variant:
        with common.scratch() as folder:
            out = options.out or str(folder / "rows")
            Path(out).mkdir(exist_ok=True)
            run_variant(options.variant, options.documents, out, options.patience)
        return
    corpus.files(options.documents)
    common.print_machine()
    with common.scratch() as folder:
        compare(options, folder)


def compare(options: Any, folder: Path) -> None:
    """Measure clean and spoilt runs in turns, the others once, and print what each gave."""
    documents, wrong = options.documents, flow.spoilt(options.documents)

    def command(name: str) -> list[str]:
        given = ["--documents", str(documents), "--out", str(folder / name), "--patience", str(options.patience)]
        return [sys.executable, __file__, "--variant", name, *given]

    def check(name: str, sample: common.Sample) -> None:
        lost = len(wrong) if name == "parflow" else 0
        causes = Counter({"raise": "exception", "hang": "timeout"}.get(kind, kind) for kind in wrong.values())
        assert sample.answer["docs"] == written(str(folder / name))[0] == documents - lost, sample.answer
        assert Counter(sample.answer["causes"]) == (causes if lost else Counter()), sample.answer

    ours = [name for name in ("clean", "parflow") if name in options.only]
    samples = common.measure_in_turns({name: command(name) for name in ours}, options.rounds, check, memory=False)
    results = {name: {"wall": statistics.median(s.wall for s in group), "missing": 0.0} for name, group in samples.items()}
    for name, row in results.items():
        print(f"{name:10} {row['wall']:7.2f} s, every good document has a result", flush=True)
    if len(results) == len(VARIANTS) - len(OTHERS):
        hangs = sum(kind == "hang" for kind in wrong.values()) * flow.TIMEOUT / WORKERS
        ratio = (results["parflow"]["wall"] - hangs) / results["clean"]["wall"]
        print(f"           x{ratio:.2f} of the clean run, beside {hangs:.0f} s that hanging documents hold each slot")
        results["parflow"]["ratio"] = ratio
    for name in options.only:
        if name in OTHERS and importlib.util.find_spec(NEEDS[name]) is None:
            print(f"{name:10} is not installed")
        elif name in OTHERS:
            answer = common.measure(command(name)).answer
            missing = documents - len(wrong) - answer["docs"]
            results[name] = {"wall": answer["seconds"], "missing": missing}
            print(
                f"{name:10} {answer['seconds']:7.2f} s, {missing:,} good documents without a result; {answer['end']}",
                flush=True,
            )
    common.write_json(options.json, results)


if __name__ == "__main__":
    main()
