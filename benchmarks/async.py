"""1,000 calls that wait 100 ms each, a hundred at a time in each of two children: async steps beside plain asyncio and Dask.

The calls are HTTP requests to a server that this program starts, which answers after 100 ms. Run it with
`python benchmarks/async.py`.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import common

CALLS = 1_000
CONCURRENCY = 100
WAIT = 0.1


@contextmanager
def server() -> Iterator[int]:
    """Serve HTTP on a port of this machine: each answer takes `WAIT` seconds."""
    ready: list[int] = []
    up = threading.Event()
    loop = asyncio.new_event_loop()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(WAIT)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def serve() -> None:
        listening = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=2 * CALLS)
        ready.append(listening.sockets[0].getsockname()[1])
        up.set()

    def live() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    up.wait()
    try:
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def fetch(port: int) -> int:
    """Ask once; returns the number of bytes that came back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: stub\r\n\r\n")
    data = await reader.read()
    writer.close()
    return len(data.rpartition(b"\r\n\r\n")[2])


def with_parflow(port: int) -> tuple[int, float]:
    """Return how many bytes all calls got, and the seconds from the first call's begin to the last one's end."""
    import parflow as pf

    task = pf.task(concurrency=CONCURRENCY)(fetch)
    run = pf.items([port] * CALLS).map(task).reduce(pf.sum()).run(workers=2)
    receipts = [receipt for _, receipt in run.state.stages[0].receipts()]
    begun = min(receipt.started for receipt in receipts)
    return int(run.result()), max(receipt.started + receipt.tally.seconds for receipt in receipts) - begun


def with_asyncio(port: int) -> tuple[int, float]:
    """The same in one process, twice as many at a time."""
    gate = asyncio.Semaphore(2 * CONCURRENCY)

    async def one() -> int:
        async with gate:
            return await fetch(port)

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(one() for _ in range(CALLS)))

    begun = time.perf_counter()
    total = sum(asyncio.run(all_of_them()))
    return total, time.perf_counter() - begun


def with_dask(port: int) -> tuple[int, float]:
    """Async functions as futures: a Dask worker has as many in flight as it has threads, so it gets a hundred."""
    from distributed import Client

    shape = {"n_workers": 2, "threads_per_worker": CONCURRENCY}
    with Client(processes=True, dashboard_address=None, silence_logs=40, **shape) as client:
        client.gather(client.map(fetch, [port] * 4, pure=False))
        begun = time.perf_counter()
        total = sum(client.gather(client.map(fetch, [port] * CALLS, pure=False)))
        return total, time.perf_counter() - begun


VARIANTS: dict[str, Callable[[int], tuple[int, float]]] = {
    "asyncio": with_asyncio,
    "dask": with_dask,
    "parflow": with_parflow,
}


def main() -> None:
    options = common.parser(__doc__)
    given = options.parse_args()
    common.print_machine()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    with server() as port, common.scratch():
        with_parflow(port)  # what a process does once (importing Dask, starting children) is not what is measured here
        for number in range(given.rounds):
            for name in list(VARIANTS) if number % 2 == 0 else list(reversed(VARIANTS)):
                begun = time.perf_counter()
                total, spent = VARIANTS[name](port)
                assert total == 2 * CALLS, f"{name}: {total} bytes came back"
                seconds[name].append((spent, time.perf_counter() - begun))
                print(f"  round {number + 1}: {name} {spent:.2f} s", file=sys.stderr, flush=True)
    print(f"{'':10} {'calls s':>8} {'with start s':>13}")
    rows = {}
    for name, both in seconds.items():
        calls, whole = (statistics.median(one) for one in zip(*both, strict=True))
        rows[name] = {"calls": calls, "whole": whole}
        print(f"{name:10} {calls:8.2f} {whole:13.2f}")
    common.write_json(given.json, rows)


if __name__ == "__main__":
    main()
