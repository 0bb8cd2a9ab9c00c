"""``python -m parflow.runtime.simulator --seeds 5000``: many random worlds, each with its own faults."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence

from parflow.runtime.simulator import random_faults, random_world, simulate


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate many seeds and say how it went in one line; return 1 and the story when a rule was broken."""
    parser = argparse.ArgumentParser(prog="python -m parflow.runtime.simulator", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first one")
    options = parser.parse_args(arguments)
    began, steps, restarts, met = time.perf_counter(), 0, 0, Counter[str]()
    for seed in range(options.first, options.first + options.seeds):
        try:
            outcome = simulate(random_world(seed), seed, random_faults(seed))
        except AssertionError as error:
            sys.stderr.write(f"{error}\n")
            return 1
        steps, restarts = steps + outcome.steps, restarts + outcome.restarts
        met.update(outcome.faults)
    spent = time.perf_counter() - began
    sys.stdout.write(f"{options.seeds} seeds, {steps} steps, {restarts} restarts, {met.total()} faults, {spent:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
