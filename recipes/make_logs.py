"""Make web-server logs to try logs.py on: made up, the same each time, with a few broken rows as real ones have.

Run it with `python recipes/make_logs.py logs`; a number behind it asks for more requests a day.
"""

from __future__ import annotations

import csv
import random
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

COLUMNS = ["time", "method", "path", "status", "bytes", "seconds"]
PAGES = [
    "/",
    "/about",
    "/search?q=fork",
    "/search?q=join",
    "/docs/install.html",
    "/docs/guide.html",
    "/files/manual.pdf",
    "/login",
]
DAYS = 3
BROKEN = {1: ("status", "-"), 2: ("seconds", ""), 3: ("bytes", "12e")}
"""What stands in one field of one row of each day: an aborted request, a timer that was off, a line cut short."""


def requests(day: int, number: int) -> list[dict[str, str]]:
    """Return the requests of a day, in order."""
    chance = random.Random(day)  # noqa: S311 - it decides about examples, not about secrets
    begin = datetime(2026, 3, day, tzinfo=UTC)
    rows = []
    for second in sorted(chance.uniform(0, 86_400) for _ in range(number)):
        path = PAGES[int(len(PAGES) * chance.random() ** 2)]
        status = 200 if (dice := chance.random()) < 0.9 else 404 if dice < 0.97 else 503
        size = 512 if status != 200 else 2_000_000 if path.endswith("pdf") else 1_000 + int(30_000 * chance.random())
        taken = 10 ** chance.uniform(-3, -1) * (20 if status == 503 else 1)
        when = begin + timedelta(seconds=second)
        values = [when.isoformat(timespec="milliseconds"), "GET", path, str(status), str(size), f"{taken:.4f}"]
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def make_logs(folder: Path, number: int = 2_000) -> None:
    """Write a file a day."""
    folder.mkdir(parents=True, exist_ok=True)
    for day in range(1, DAYS + 1):
        rows = requests(day, number)
        field, text = BROKEN[day]
        rows[number // 2][field] = text
        with (folder / f"2026-03-0{day}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    make_logs(Path(sys.argv[1] if len(sys.argv) > 1 else "logs"), int(sys.argv[2]) if len(sys.argv) > 2 else 2_000)
