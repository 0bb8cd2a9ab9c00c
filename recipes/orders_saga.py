"""Charge orders, reserve stock, ship: and when shipping fails for good, release the stock and pay the money back.

`python recipes/orders_saga.py orders.jsonl` makes the shop's tables in a throw-away PostgreSQL server (local_postgres.py),
runs, and balances the books; the URL of a database of your own may stand behind it. When that has the tables, write
`parflow run recipes/orders_saga.py --source orders.jsonl --database postgresql://…`. It needs `pip install 'psycopg[binary]'`.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any, Literal

import psycopg
from psycopg.rows import dict_row

import parflow as pf

TABLES = """
CREATE TABLE IF NOT EXISTS ledger (key text PRIMARY KEY, order_id text NOT NULL, kind text NOT NULL, cents bigint NOT NULL);
CREATE TABLE IF NOT EXISTS moves (key text PRIMARY KEY, order_id text NOT NULL, item text NOT NULL, pieces bigint NOT NULL);
CREATE TABLE IF NOT EXISTS parcels (
    key text PRIMARY KEY, order_id text NOT NULL, kind text NOT NULL, pieces bigint NOT NULL, cents bigint NOT NULL
);
CREATE TABLE IF NOT EXISTS stock (item text PRIMARY KEY, pieces bigint NOT NULL CHECK (pieces >= 0));
"""

BOOKS = """
SELECT
    (SELECT coalesce(sum(cents), 0) FROM ledger WHERE kind = 'charge')::bigint AS charged,
    (SELECT coalesce(sum(cents), 0) FROM ledger WHERE kind = 'refund')::bigint AS refunded,
    (SELECT -coalesce(sum(pieces), 0) FROM moves)::bigint AS taken,
    (SELECT coalesce(sum(CASE kind WHEN 'sent' THEN cents ELSE -cents END), 0) FROM parcels)::bigint AS shipped,
    (SELECT coalesce(sum(CASE kind WHEN 'sent' THEN pieces ELSE -pieces END), 0) FROM parcels)::bigint AS left_the_house,
    (SELECT coalesce(sum(CASE kind WHEN 'sent' THEN 1 ELSE -1 END), 0) FROM parcels)::bigint AS parcels
"""

Order = dict[str, Any]


class OutOfStockError(Exception):
    """There is too little of it."""


class UndeliverableError(Exception):
    """Nobody lives there."""


class Shop:
    """What happens outside: each act is a row with an idempotency key, which the table has once.

    A child connects when its first order comes; what travels to it is the URL alone.
    """

    def __init__(self, database: str) -> None:
        self.database = database
        self.link: psycopg.Connection[dict[str, Any]] | None = None

    def connection(self) -> psycopg.Connection[dict[str, Any]]:
        """Return the connection; a new one if it was lost."""
        if self.link is None or self.link.closed:
            self.link = psycopg.connect(self.database, autocommit=True, row_factory=dict_row)
        return self.link

    def once(self, statement: str, *values: Any) -> bool:
        """Insert a row under the key of the effect in hand; False if it is there already."""
        words = f"{statement} ON CONFLICT DO NOTHING"
        return self.connection().execute(words, [pf.context().idempotency_key, *values]).rowcount == 1

    # --- there ---------------------------------------------------------------------------------------------------------

    def charge(self, order: Order) -> Order:
        """Take the money."""
        self.once("INSERT INTO ledger VALUES (%s, %s, 'charge', %s)", order["order"], order["cents"])
        return order

    def reserve(self, order: Order) -> Order:
        """Take the pieces out of the stock, all or none."""
        with self.connection().transaction():
            if self.once("INSERT INTO moves VALUES (%s, %s, %s, %s)", order["order"], order["item"], -order["pieces"]):
                taken = self.connection().execute(
                    "UPDATE stock SET pieces = pieces - %s WHERE item = %s AND pieces >= %s",
                    [order["pieces"], order["item"], order["pieces"]],
                )
                if not taken.rowcount:
                    raise OutOfStockError(f"fewer than {order['pieces']} × {order['item']}")  # takes the row back as well
        return order

    def ship(self, order: Order) -> Order:
        """Send a parcel."""
        if order["address"] == "nowhere":
            raise UndeliverableError(f"nobody lives at {order['address']!r}")
        row = order["order"], order["pieces"], order["cents"]
        self.once("INSERT INTO parcels VALUES (%s, %s, 'sent', %s, %s)", *row)
        return order

    # --- and back: each is given what the act returned -------------------------------------------------------------------

    def refund(self, order: Order) -> None:
        """Pay the money back."""
        self.once("INSERT INTO ledger VALUES (%s, %s, 'refund', %s)", order["order"], order["cents"])

    def release(self, order: Order) -> None:
        """Put the pieces back."""
        with self.connection().transaction():
            if self.once("INSERT INTO moves VALUES (%s, %s, %s, %s)", order["order"], order["item"], order["pieces"]):
                self.connection().execute(
                    "UPDATE stock SET pieces = pieces + %s WHERE item = %s", [order["pieces"], order["item"]]
                )

    def recall(self, order: Order) -> None:
        """Call a parcel back."""
        row = order["order"], order["pieces"], order["cents"]
        self.once("INSERT INTO parcels VALUES (%s, %s, 'recalled', %s, %s)", *row)


@pf.workflow
def orders_saga(source: str, database: str, in_doubt: Literal["stop", "retry"] = "retry") -> Any:
    """Fulfil orders; what was done for one that fails in the end is undone. Returns the number and worth of the others."""
    shop = Shop(database)
    retry = pf.Retry(5, wait="200ms", on=(psycopg.OperationalError, "RecordCrashedError"))

    def step(act: Any, undo: Any) -> Any:
        return pf.task(retry=retry, timeout="30s", compensate=undo, in_doubt=in_doubt)(act)

    orders = pf.read_jsonl(source, chunk_bytes="2kB")
    charged = orders.map(step(shop.charge, shop.refund))
    reserved = charged.map(step(shop.reserve, shop.release))
    shipped = reserved.map(step(shop.ship, shop.recall))
    return {"shipped": shipped.reduce(pf.count()), "cents": shipped.reduce(pf.sum("cents"))}


def set_up(database: str, stock: dict[str, int]) -> None:
    """Make the shop's tables, and fill its stock, unless they are there."""
    with psycopg.connect(database) as connection:
        connection.execute(TABLES)
        for item in stock.items():
            connection.execute("INSERT INTO stock VALUES (%s, %s) ON CONFLICT DO NOTHING", item)


def books(database: str) -> dict[str, int]:
    """Add up what is in the tables: cents that were charged, refunded and shipped, pieces that were taken and left."""
    with psycopg.connect(database, row_factory=dict_row) as connection:
        found = connection.execute(BOOKS).fetchone()
    assert found is not None
    return found


if __name__ == "__main__":
    from local_postgres import server

    with nullcontext(sys.argv[2]) if len(sys.argv) > 2 else server() as url:
        set_up(url, {"lamp": 50, "chair": 30, "desk": 20, "shelf": 50, "vase": 100})
        run = orders_saga(sys.argv[1], url).run(workers=2, max_failures=0.2)
        print(run.result())
        print("set aside:", dict(Counter(f"{failure.step}, {failure.error}" for failure in run.dead_letters())))
        sums = books(url)
        print(f"charged {sums['charged']} - refunded {sums['refunded']} = {sums['charged'] - sums['refunded']} cents")
        print(f"shipped {sums['parcels']} parcels worth {sums['shipped']} cents")
        print(f"taken from stock {sums['taken']} pieces, left the house {sums['left_the_house']}")
