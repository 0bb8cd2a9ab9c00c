"""Make up orders of a shop, always the same: `python recipes/make_orders.py orders.jsonl 60`."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

PRICES = {"lamp": 3995, "chair": 12950, "desk": 34900, "shelf": 8999, "vase": 1250, "throne": 250000}
"""In cents."""
ADDRESSES = ("1 Mill Lane", "22 Harbour Street", "7 Station Road", "15 Church Walk", "3 Orchard Close")


def orders(count: int) -> Iterator[dict[str, Any]]:
    """Yield orders: nobody lives where one in eleven is to be sent, and one in seventeen is for what no shop has."""
    chance = random.Random(22)  # noqa: S311 - it decides about examples, not about secrets
    for number in range(1, count + 1):
        item, pieces = chance.choice([*PRICES][:-1]), chance.randint(1, 4)
        item = "throne" if number % 17 == 0 else item
        address = "nowhere" if number % 11 == 0 else chance.choice(ADDRESSES)
        yield {"order": f"A{number:05}", "item": item, "pieces": pieces, "cents": pieces * PRICES[item], "address": address}


if __name__ == "__main__":
    with open(sys.argv[1], "w") as out:
        for order in orders(int(sys.argv[2])):
            print(json.dumps(order), file=out)
