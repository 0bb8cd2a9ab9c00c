"""1,000 calls that wait 100 ms each, a hundred at a time in each of two children: async steps beside plain asyncio and Dask.

The calls are HTTP requests to a server that this program starts in a process of its own, which answers after 100 ms; or they
just sleep for 100 ms. 200 calls at a time can't take less than half a second.

    python benchmarks/async.py --rounds 3
    python benchmarks/async.py --calls 200 --rounds 1   # a quick look
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import common

CONCURRENCY = 100
CHILDREN = 2
WAIT = 0.1

Call = Callable[[int], Awaitable[int]]


async def serve() -> None:
    """Serve HTTP on a port of this machine, which is printed: each answer takes `WAIT` seconds and is two bytes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(WAIT)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def serving() -> Iterator[int]:
    """Have a server in another process; gives its port."""
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


async def http(port: int) -> int:
    """Ask once; returns the number of bytes that came back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: stub\r\n\r\n")
    data = await reader.read()
    writer.close()
    return len(data.rpartition(b"\r\n\r\n")[2])


async def sleep(_: int) -> int:
    """Wait as long as the server does."""
    await asyncio.sleep(WAIT)
    return 2


def with_parflow(call: Call, port: int, calls: int) -> tuple[int, float]:
    """Return how many bytes all calls got, and the seconds from the first chunk's begin to the last one's end."""
    import parflow as pf

    task = pf.task(concurrency=CONCURRENCY)(call)
    run = pf.items([port] * calls).map(task).reduce(pf.sum()).run(workers=CHILDREN)
    receipts = [receipt for _, receipt in run.state.stages[0].receipts()]
    begun = min(receipt.started for receipt in receipts)
    return int(run.result()), max(receipt.started + receipt.tally.seconds for receipt in receipts) - begun


def with_asyncio(call: Call, port: int, calls: int) -> tuple[int, float]:
    """The same in one process, twice as many at a time."""

    async def all_of_them() -> int:
        gate = asyncio.Semaphore(CHILDREN * CONCURRENCY)

        async def one() -> int:
            async with gate:
                return await call(port)

        return sum(await asyncio.gather(*(one() for _ in range(calls))))

    begun = time.perf_counter()
    total = asyncio.run(all_of_them())
    return total, time.perf_counter() - begun


def with_dask(call: Call, port: int, calls: int) -> tuple[int, float]:
    """Async functions as futures: a Dask worker has as many in flight as it has threads, so it gets a hundred."""
    from distributed import Client

    shape = {"n_workers": CHILDREN, "threads_per_worker": CONCURRENCY}
    with Client(processes=True, dashboard_address=None, silence_logs=40, **shape) as client:
        client.gather(client.map(call, [port] * 4, pure=False))
        begun = time.perf_counter()
        total = sum(client.gather(client.map(call, [port] * calls, pure=False)))
        return total, time.perf_counter() - begun


VARIANTS: dict[str, Callable[[Call, int, int], tuple[int, float]]] = {
    "asyncio": with_asyncio,
    "dask": with_dask,
    "parflow": with_parflow,
}


def compare(call: Call, port: int, calls: int, rounds: int) -> dict[str, dict[str, float]]:
    """Measure the variants in turns and print the table."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name in list(VARIANTS) if number % 2 == 0 else list(reversed(VARIANTS)):
            begun = time.perf_counter()
            total, spent = VARIANTS[name](call, port, calls)
            whole = time.perf_counter() - begun
            if total != 2 * calls:
                raise SystemExit(f"{name}: {total} bytes came back, not {2 * calls}")
            seconds[name].append((spent, whole))
            print(f"  round {number + 1}: {name} {spent:.2f} s, with start {whole:.2f} s", file=sys.stderr, flush=True)
    rows = {}
    print(f"{call.__name__:10} {'calls s':>8} {'with start s':>13} {'calls/asyncio':>14}")
    for name, both in seconds.items():
        spent, whole = (statistics.median(one) for one in zip(*both, strict=True))
        rows[name] = {"calls": spent, "whole": whole}
        print(f"{name:10} {spent:8.2f} {whole:13.2f} {spent / rows['asyncio']['calls']:14.2f}")
    return rows


def main() -> None:
    """Compare the variants."""
    options = common.parser(__doc__)
    options.add_argument("--calls", type=int, default=1_000, help="calls (default 1,000)")
    options.add_argument("--serve", action="store_true", help="be the server, and nothing else")
    given = options.parse_args()
    if given.serve:
        asyncio.run(serve())
        return
    common.print_machine()
    with serving() as port, common.scratch():
        with_parflow(http, port, given.calls)  # what a process does once (importing Dask, starting children) isn't measured
        found = {call.__name__: compare(call, port, given.calls, given.rounds) for call in (sleep, http)}
    common.write_json(given.json, found)


if __name__ == "__main__":
    main()
