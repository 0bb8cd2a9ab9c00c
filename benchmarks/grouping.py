"""Word count over ten million different words, each there twice: how much memory does a reduction by key take, and how long?

The text is one file of 183 MB, in an order in which a word's second place is far from its first. The limit is 1 GiB for all
processes together; ``loop`` is what one process takes that keeps all words in a ``Counter``.

    python benchmarks/grouping.py                        # all variants in turns, medians, memory
    python benchmarks/grouping.py --variant parflow      # one of them, in this process
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

SEED = 20261125
DIFFERENT = 10_000_000
TIMES = 2
WORKERS = 2
LIMIT_MIB = 1024
BLOCK = 1_000_000
A_LINE = 16
"""Words of a line."""

LETTERS = 6
"""Tell words apart; the next ones, up to ten, repeat them."""

MIXER = 123_456_791
"""Coprime to 26 ** 6, so that different numbers have different letters."""

Answer = dict[str, int]


def text(different: int) -> Path:
    """Return the text; make it first, and beside it what is to be found in it, if it isn't there."""
    path = common.HERE / "data" / f"words-{different}-{SEED}.txt"
    if not path.exists():
        print(f"making {path.relative_to(common.HERE.parent)} (once)", flush=True)
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".part")
        order = np.random.default_rng(SEED).permutation(np.repeat(np.arange(different, dtype=np.int32), TIMES))
        with open(aside, "wb") as file:
            file.writelines(_spell(order[first : first + BLOCK]) for first in range(0, len(order), BLOCK))
        numbers = (np.arange(first, min(first + BLOCK, different)) for first in range(0, different, BLOCK))
        tables = ((_spell(part).decode().split(), np.full(len(part), TIMES)) for part in numbers)
        path.with_suffix(".json").write_text(json.dumps(digest(tables)))
        aside.rename(path)
    return path


def _spell(numbers: np.ndarray[Any, Any]) -> bytes:
    """Return the words of some numbers, sixteen a line."""
    codes = numbers.astype(np.int64) * MIXER % 26**LETTERS
    letters = codes[:, None] // 26 ** np.arange(LETTERS) % 26 + ord("a")
    spaces = np.where(np.arange(1, len(codes) + 1) % A_LINE, ord(" "), ord("\n"))
    longest = np.column_stack([letters, letters[:, :4], spaces]).astype(np.uint8)
    used = np.arange(longest.shape[1]) < (LETTERS + codes % 5)[:, None]
    used[:, -1] = True
    spelt: bytes = longest[used].tobytes()
    return spelt


def digest(tables: Iterator[tuple[Any, Any]]) -> Answer:
    """Sum up tables of words and their counts, in whatever order they are."""
    from pandas.util import hash_array

    rows = total = mark = 0
    for words, counts in tables:
        rows, total = rows + len(words), total + int(counts.sum())
        hashes = hash_array(np.asarray(words, dtype=object), categorize=False)
        mark += int((hashes * counts.astype(np.uint64)).sum())
    return {"rows": rows, "total": total, "mark": mark % 2**64}


def written(folder: Path) -> Answer:
    """Sum up what was written."""
    import pyarrow.parquet as pq

    tables = (pq.read_table(path) for path in sorted(folder.rglob("*.parquet")))
    return digest((table["word"].to_pylist(), table["count"].to_numpy()) for table in tables)


# --- the variants ---------------------------------------------------------------------------------------------------------


def parflow(path: str, out: str) -> None:
    """As it runs by default: isolated and durable."""
    import parflow as pf

    words = pf.read_lines(path).flat_map(str.split)
    words.reduce_by(None, pf.count(), columns=("word", "count")).write_parquet(out).run(workers=WORKERS).result()


def loop(path: str, out: str) -> None:
    """One process that keeps all words."""
    from collections import Counter

    import pyarrow as pa
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    with open(path) as lines:
        for line in lines:
            counts.update(line.split())
    table = pa.table({"word": pa.array(counts.keys()), "count": pa.array(counts.values())})
    pq.write_table(table, Path(out, "words.parquet"), compression="zstd")


def dask(path: str, out: str) -> None:
    """A data frame of words, grouped into as many parts as parflow makes."""
    import dask.bag
    from distributed import Client

    with Client(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None, silence_logs=40):
        words = dask.bag.read_text(path, blocksize="8MiB").map(str.split).flatten()
        frame = words.to_dataframe(meta={"word": "string[pyarrow]"})
        counts = frame.groupby("word").size(split_out=64).rename("count").reset_index()
        counts.to_parquet(out, write_index=False, compression="zstd")


VARIANTS: dict[str, Callable[[str, str], None]] = {"loop": loop, "parflow": parflow, "dask": dask}
DEFAULT = ("loop", "parflow")


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--variant", choices=VARIANTS, help="run this one in this process, without measuring")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=DEFAULT, help="variants to compare")
    parser.add_argument("--words", type=int, default=DIFFERENT, help="different words")
    parser.add_argument("--out", help="folder for the Parquet files (--variant)")
    options = parser.parse_args()
    path = text(options.words)
    with common.scratch() as folder:
        if options.variant:
            out = Path(options.out or folder / "rows")
            out.mkdir(exist_ok=True)
            VARIANTS[options.variant](str(path), str(out))
            common.answer({})
            return
        common.print_machine()
        compare(options.only, path, options, folder)


def compare(names: list[str], path: Path, options: Any, folder: Path) -> None:
    """Measure variants in turns and print the table; stop when one's words or counts are not those of the text."""
    expected = json.loads(path.with_suffix(".json").read_text())

    def check(name: str, _: common.Sample) -> None:
        found = written(folder / name)
        if found != expected:
            raise SystemExit(f"{name} wrote {found}, not {expected}")
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    commands = {
        name: [sys.executable, __file__, "--variant", name, "--words", str(options.words), "--out", str(folder / name)]
        for name in names
    }
    rows = common.summary(common.measure_in_turns(commands, options.rounds, check))
    common.print_summary(rows, "loop")
    print(f"right answers: {expected['rows']:,} words, {expected['total']:,} in all, mark {expected['mark']:016x}")
    if "parflow" in rows:
        print(f"parflow's memory is {rows['parflow']['pss'] / LIMIT_MIB:.2f} of the limit of {LIMIT_MIB:,} MiB (PSS)")
    common.write_json(options.json, rows)


if __name__ == "__main__":
    main()
