"""What a fault costs: the documents job killed half-way and resumed, and with a document that kills its process.

Run it with `python benchmarks/recovery.py`.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common
import corpus
from documents import WORKERS, digest, written

PARFLOW = str(Path(sys.executable).with_name("parflow"))
FLOW = str(common.HERE / "documents_flow.py")


class Scenario:
    """One way for the job to go, in a home of its own; the trace has a line for each time a document is begun."""

    def __init__(self, folder: Path, documents: int) -> None:
        self.documents, self.out, self.trace = documents, folder / "rows", folder / "trace"
        source, workers = corpus.pattern(documents), str(WORKERS)
        self.command = [PARFLOW, "run", FLOW, "--source", source, "--out", str(self.out), "--trace", str(self.trace)]
        self.command += ["--workers", workers, "--json"]

    def result(self, finished: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return what is compared: seconds, documents begun more than once, and the answer."""
        begun = self.trace.read_text().split()
        totals = finished["result"]["totals"]
        answer = {"digest": digest(totals), "docs": totals["docs"], "rows": written(str(self.out))}
        return {"seconds": seconds, "repeated": len(begun) - len(set(begun)), "run_id": finished["run_id"], **answer}

    def undisturbed(self) -> dict[str, Any]:
        """Run it through."""
        start = time.perf_counter()
        return self.result(_json(self.command), time.perf_counter() - start)

    def killed(self) -> dict[str, Any]:
        """Kill all of its processes when half of the documents were begun, then resume."""
        start = time.perf_counter()
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, start_new_session=True)
        half = self.documents // 2 * len("doc-000000\n")
        while process.poll() is None and not (self.trace.exists() and self.trace.stat().st_size >= half):
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it was half-way"
        common.reap()
        lost = time.perf_counter() - start
        run = _json([PARFLOW, "runs", "--json"])[0]["run_id"]
        start = time.perf_counter()
        finished = _json([PARFLOW, "resume", run, "--json"])
        return self.result(finished, lost + time.perf_counter() - start)

    def crashing(self) -> dict[str, Any]:
        """Run it with a document that ends the process it is in, and allow for one failure."""
        self.command += ["--poison", f"doc-{self.documents // 2:06}", "--max-failures", "1"]
        return self.undisturbed()


SCENARIOS = ("undisturbed", "killed", "crashing")


def _json(command: list[str]) -> Any:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--documents", type=int, default=corpus.DOCUMENTS)
    options = parser.parse_args()
    corpus.files(options.documents)
    common.adopt_orphans()
    common.print_machine()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in SCENARIOS}
    for number in range(options.rounds):
        for name in SCENARIOS if number % 2 == 0 else reversed(SCENARIOS):
            with common.scratch() as folder:
                runs[name].append(getattr(Scenario(folder, options.documents), name)())
    common.write_json(options.json, report(runs, options.documents))


def report(runs: dict[str, list[dict[str, Any]]], documents: int) -> dict[str, Any]:
    """Print and return the medians; stop when an answer is not what it must be."""
    whole = {(run["digest"], run["rows"]) for run in [*runs["undisturbed"], *runs["killed"]]}
    assert len(whole) == 1, f"the resumed run gave another answer: {whole}"
    assert all(run["docs"] == run["rows"][0] == documents - 1 for run in runs["crashing"]), runs["crashing"]
    results = {
        name: {key: statistics.median(run[key] for run in group) for key in ("seconds", "repeated")}
        for name, group in runs.items()
    }
    base = results["undisturbed"]["seconds"]
    for name, row in results.items():
        ratio, more = row["seconds"] / base, row["seconds"] - base
        print(f"{name:12} {row['seconds']:7.2f} s  x{ratio:.2f}  {more:+.2f} s  {row['repeated']:,.0f} documents repeated")
    return results


if __name__ == "__main__":
    main()
