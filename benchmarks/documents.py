"""The documents job by a plain loop, a process pool, plain Dask and parflow: same answers, what does each cost?

20,000 JSONL documents, 205 MB, in 40 files of skewed sizes: parse, normalise, tokenise, count, hash, write Parquet, reduce.

    python benchmarks/documents.py                     # all variants in turns, medians
    python benchmarks/documents.py --variant pool      # one of them, in this process
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import common
import corpus
import job

WORKERS = 2


def loop(files: list[str], out: str) -> dict[str, Any]:
    """One file after another in this process."""
    return job.finish(functools.reduce(job.merge, (job.process_file(path, out) for path in files)))


def pool(files: list[str], out: str) -> dict[str, Any]:
    """A task a file in a pool of processes."""
    with ProcessPoolExecutor(WORKERS) as executor:
        return job.finish(functools.reduce(job.merge, executor.map(job.process_file, files, [out] * len(files))))


def dask(files: list[str], out: str) -> dict[str, Any]:
    """A future a file on a local cluster of processes, merged as they come; bag and delayed on it are no faster."""
    from distributed import Client, as_completed

    client = Client(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None, silence_logs=40)
    futures = client.map(job.process_file, files, out=out, pure=False)
    return job.finish(functools.reduce(job.merge, (totals for _, totals in as_completed(futures, with_results=True))))


def dask_processes(files: list[str], out: str) -> dict[str, Any]:
    """A bag with a partition a file on Dask's own pool of processes: no cluster, no dashboard, no lost worker made good."""
    import dask.bag

    bag = dask.bag.from_sequence(files, npartitions=len(files)).map(job.process_file, out=out)
    return job.finish(bag.fold(job.merge).compute(scheduler="processes", num_workers=WORKERS))


def parflow(files: list[str], out: str) -> dict[str, Any]:
    """The workflow as it runs by default: isolated and durable."""
    from documents_flow import documents

    source = str(Path(files[0]).with_name("*.jsonl"))
    totals: dict[str, Any] = documents(source, out).run(workers=WORKERS).result()["totals"]
    return totals


VARIANTS: dict[str, Callable[[list[str], str], dict[str, Any]]] = {
    "loop": loop,
    "pool": pool,
    "dask": dask,
    "dask-processes": dask_processes,
    "parflow": parflow,
}
DEFAULT = ("loop", "pool", "dask", "parflow")


def digest(totals: dict[str, Any]) -> str:
    """Return what two runs' answers are compared by."""
    return hashlib.sha256(json.dumps(totals, sort_keys=True).encode()).hexdigest()[:16]


def written(out: str) -> tuple[int, str]:
    """Return the rows in a folder of Parquet files and the sum of their hashes."""
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=["sha"]) for path in Path(out).rglob("*.parquet")]
    hashes = [str(row["sha"]) for table in tables for row in table.to_pylist()]
    return len(hashes), f"{sum(int(sha, 16) for sha in hashes) % 2**64:016x}"


def run_variant(name: str, documents: int, out: str) -> None:
    """Run one variant in this process and print its answer."""
    files = corpus.files(documents)
    start = time.perf_counter()
    totals = VARIANTS[name](files, out)
    common.answer({"digest": digest(totals), "seconds": time.perf_counter() - start, **totals, "top": totals["top"][:3]})


def main() -> None:
    """Compare the variants."""
    parser = common.parser(__doc__)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one in this process, without measuring")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=DEFAULT, help="variants to compare")
    parser.add_argument("--documents", type=int, default=corpus.DOCUMENTS)
    parser.add_argument("--out", help="folder for the Parquet files (--variant)")
    options = parser.parse_args()
    if options.variant:
        with common.scratch() as folder:
            out = options.out or str(folder / "rows")
            Path(out).mkdir(exist_ok=True)
            run_variant(options.variant, options.documents, out)
        return
    corpus.files(options.documents)
    common.print_machine()
    with common.scratch() as folder:
        compare(options.only, options.documents, options.rounds, folder, options.json)


def compare(names: list[str], documents: int, rounds: int, folder: Path, json_file: str | None) -> None:
    """Measure variants in turns and print the table; stop when two give different answers."""
    expected: set[tuple[str, tuple[int, str]]] = set()

    def check(name: str, sample: common.Sample) -> None:
        expected.add((sample.answer["digest"], written(str(folder / name))))
        if len(expected) > 1:
            raise SystemExit(f"{name} gave another answer or wrote other rows: {expected}")

    commands = {
        name: [sys.executable, __file__, "--variant", name, "--documents", str(documents), "--out", str(folder / name)]
        for name in names
    }
    rows = common.summary(common.measure_in_turns(commands, rounds, check))
    ((answer_digest, (count, hashes)),) = expected
    common.print_summary(rows, "pool")
    print(f"equal answers: {answer_digest}, {count:,} rows written, sum of hashes {hashes}")
    common.write_json(json_file, rows)


if __name__ == "__main__":
    main()
