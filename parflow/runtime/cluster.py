"""Where jobs run: an in-process Dask cluster, or one that stands already.

A `Hands` is a connected cluster, ready for batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import platform
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any

import dask
import distributed
from distributed import Client, Scheduler, SpecCluster, Worker
from distributed.diagnostics.plugin import WorkerPlugin

from parflow.errors import ClusterError, ClusterLostError, ParflowError, StoreNotVisibleError, VersionMismatchError
from parflow.model import Receipt
from parflow.runtime.sandbox import Sandbox
from parflow.runtime.worker import Batch
from parflow.storage.store import open_store

PLUGIN = "parflow"
CONNECT_SECONDS = 10.0
WORKERS_SECONDS = 30.0

Settled = Callable[[str, tuple[Receipt | None, ...] | BaseException], None]


class SandboxPlugin(WorkerPlugin):  # type: ignore[misc]
    """Gives a Dask worker its sandbox, and takes it away when the worker closes."""

    name = PLUGIN

    def __init__(self, sandbox: Sandbox | None = None) -> None:
        self.sandbox = sandbox
        self.slots: dict[int, int] = {}

    def __reduce__(self) -> tuple[type[SandboxPlugin], tuple[()]]:
        return type(self), ()

    def setup(self, worker: Any) -> None:
        """Make the sandbox when the worker starts."""
        self.sandbox = self.sandbox or Sandbox()
        self.where = str(worker.address)

    def teardown(self, worker: Any) -> None:  # noqa: ARG002 - Dask's signature
        """Kill the children when the worker closes."""
        if self.sandbox is not None:
            self.sandbox.close()

    def slot(self) -> str:
        """Name the thread that asks: worker address and a small number."""
        number = self.slots.setdefault(threading.get_ident(), len(self.slots))
        return f"{self.where}#{number}"


def run_batch(payload: bytes) -> bytes:
    """Run a pickled `Batch` in the worker's sandbox; the one function that Dask ever calls for a run."""
    plugin: SandboxPlugin = distributed.get_worker().plugins[PLUGIN]
    assert plugin.sandbox is not None
    batch: Batch = pickle.loads(payload)
    return pickle.dumps(plugin.sandbox.run(batch, plugin.slot()), protocol=5)


def _stop(names: tuple[str, ...], dask_worker: Any) -> None:
    plugin = dask_worker.plugins.get(PLUGIN)
    if plugin is not None and plugin.sandbox is not None:
        plugin.sandbox.stop(names)


def _kill(names: tuple[str, ...], dask_worker: Any) -> None:
    plugin = dask_worker.plugins.get(PLUGIN)
    if plugin is not None and plugin.sandbox is not None:
        plugin.sandbox.kill(names)


def _cancel(names: tuple[str, ...], dask_worker: Any) -> None:
    plugin = dask_worker.plugins.get(PLUGIN)
    if plugin is not None and plugin.sandbox is not None:
        plugin.sandbox.cancel(names)


def versions() -> dict[str, str]:
    """Return the versions that driver and workers must share."""
    from parflow import __version__

    return {
        "parflow": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "distributed": distributed.__version__,
    }


def _inspect(url: str, key: str) -> tuple[dict[str, str], str]:
    """Look, on a worker, at its versions and at an object of the driver's store."""
    try:
        open_store(url, create=False).get(key)
    except (ParflowError, OSError) as error:
        return versions(), str(error) or type(error).__name__
    return versions(), ""


class Hands:
    """A connected cluster.

    Parameters
    ----------
    client : distributed.Client
        Connected.
    sandbox : Sandbox, optional
        The sandbox of an in-process worker.
    release : callable, optional
        Called when the run lets go of the cluster.
    """

    def __init__(self, client: Any, *, sandbox: Sandbox | None = None, release: Callable[[], None] | None = None) -> None:
        self.client = client
        self.sandbox = sandbox
        self.release = release
        self.futures: dict[str, tuple[str, Any]] = {}  # of each attempt in flight: its batch's name, and Dask's future
        self.submitted = 0

    @property
    def slots(self) -> int:
        """How many jobs the workers run at once."""
        if self.sandbox is not None:
            return sum(worker.state.nthreads for worker in self.client.cluster.workers.values())
        if self.client.status != "running":  # it looks for its scheduler
            return 0
        return sum(worker["nthreads"] for worker in self.client.scheduler_info(n_workers=-1)["workers"].values())

    def lacking(self, resources: Mapping[str, float]) -> str:
        """Say, as ``NAME=COUNT``, which resources no worker has enough of; nothing if each is to be had somewhere."""
        workers = [] if self.sandbox is not None else self.client.scheduler_info(n_workers=-1)["workers"].values()
        return " ".join(
            f"{name}={count:g}"
            for name, count in resources.items()
            if not any(worker.get("resources", {}).get(name, 0) >= count for worker in workers)
        )

    def check(self, store: Any) -> None:
        """Compare versions with every worker, and see that each reads the driver's store.

        Raises
        ------
        VersionMismatchError, StoreNotVisibleError
            Naming the first worker that can't take part.
        """
        if self.sandbox is not None:
            return
        key = store.put("probe", secrets.token_bytes(16))
        ours = versions()
        try:
            answers = self.client.run(_inspect, store.url, key)
        except (ImportError, AttributeError) as error:
            raise VersionMismatchError("somewhere", "parflow", f"missing or different ({error})", ours["parflow"]) from error
        for worker, (theirs, wrong) in answers.items():
            for name, version in ours.items():
                if theirs.get(name) != version:
                    raise VersionMismatchError(worker, name, theirs.get(name), version)
            if wrong:
                raise StoreNotVisibleError(worker, store.url, wrong)

    def submit(self, batch: Batch, settled: Settled) -> None:
        """Send a batch; ``settled`` is called with its receipts or its loss, on another thread."""
        self.submitted += 1
        try:
            future = self.client.submit(
                run_batch,
                pickle.dumps(batch, protocol=5),
                key=f"parflow-{batch.run_id}/{batch.unit}/{batch.attempt}",
                pure=False,
                retries=0,
                priority=-self.submitted,
                resources=dict(batch.resources) if batch.resources else None,
            )
        except Exception as error:  # noqa: BLE001 - the client closed after it lost its scheduler
            settled(batch.attempt, ClusterLostError(str(error), "RUN"))
            return
        self.futures[batch.attempt] = batch.name, future

        def back(future: Any, attempt: str = batch.attempt) -> None:
            if self.futures.pop(attempt, None) is None:
                return
            try:
                settled(attempt, pickle.loads(future.result()))
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - KilledWorker, cancelled, comm errors
                settled(attempt, self.reason(error))

        future.add_done_callback(back)

    def reason(self, error: BaseException) -> BaseException:
        """Tell the loss of a worker from the loss of the cluster."""
        if self.client.status != "running" or "scheduler" in str(getattr(error, "reason", "")):
            return ClusterLostError("the connection to its scheduler was lost", "RUN")
        return error

    def stop(self, attempts: tuple[str, ...]) -> None:
        """Ask batches to come back at their next record."""
        flying = self.futures.copy()
        names = tuple(flying[attempt][0] for attempt in attempts if attempt in flying)
        if self.sandbox is not None:
            self.sandbox.stop(names)
        else:
            self.client.run(_stop, names, on_error="ignore")

    def cancel(self, attempts: tuple[str, ...]) -> None:
        """End batches that nobody waits for: what has not begun won't, and children that work on them are told, then killed."""
        self._forget({attempt: self.futures.pop(attempt) for attempt in attempts if attempt in self.futures}, gently=True)

    def abandon(self) -> None:
        """Forget everything in flight, and end what works on it."""
        flying, self.futures = self.futures, {}
        self._forget(flying, gently=False)

    def _forget(self, flying: dict[str, tuple[str, Any]], *, gently: bool) -> None:
        if not flying or self.client.status != "running":
            return
        names = tuple(name for name, _ in flying.values())
        if self.sandbox is not None:
            (self.sandbox.cancel if gently else self.sandbox.kill)(names)
        else:
            with contextlib.suppress(Exception):  # a cluster that is gone has nothing to end
                self.client.run(_cancel if gently else _kill, names, on_error="ignore")
        self.client.cancel([future for _, future in flying.values()], force=True)

    def close(self) -> None:
        """Let go of the cluster."""
        self.abandon()
        if self.release is not None:
            self.release()


_SETTINGS: dict[str, Any] = {
    "distributed.scheduler.worker-saturation": float("inf"),  # the window is the coordinator's
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.worker-ttl": None,  # its one worker is in this process: when the clock jumps it is not lost
    "distributed.worker.profile.enabled": False,  # samples the worker thread a hundred times a second
    "distributed.admin.tick.interval": "1s",  # nobody looks at how late its event loops are
    "distributed.admin.tick.limit": "30s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "optimization.fuse.delayed": False,
}


class LocalSession:
    """The in-process cluster of this process: one Dask worker with a thread and a child for each slot.

    Runs share it, so that running a notebook cell again starts nothing anew.
    """

    def __init__(self, slots: int, sandbox: Sandbox) -> None:
        self.slots = slots
        self.sandbox = sandbox
        quiet = logging.getLogger("distributed")
        level = quiet.level
        with dask.config.set(_SETTINGS):
            # What LocalCluster would build, but for its dashboards: they import Bokeh, and listen beyond this machine.
            shared = {"protocol": "inproc://", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
            worker = {"nthreads": slots, "memory_limit": 0, "plugins": (SandboxPlugin(sandbox),), "silence_logs": logging.ERROR}
            self.cluster = SpecCluster(
                scheduler={"cls": Scheduler, "options": shared},
                workers={0: {"cls": Worker, "options": shared | worker}},
                silence_logs=logging.ERROR,
                name=f"parflow-{os.getpid()}-{id(self):x}",
            )
            self.client = Client(self.cluster, set_as_default=False)
        with contextlib.suppress(AttributeError):  # another distributed: it's slower, and works
            self._send_at_once()
        quiet.setLevel(level)

    def _send_at_once(self) -> None:
        """Let no message wait for others, which takes 2 to 10 ms a hop: a chain of calls goes all the way each time."""
        scheduler, workers = self.cluster.scheduler, self.cluster.workers.values()
        streams = [self.client.scheduler_comm, *scheduler.stream_comms.values(), *scheduler.client_comms.values()]
        for stream in (*streams, *(worker.batched_stream for worker in workers)):
            stream.interval = 0

    def hands(self, release: Callable[[], None]) -> Hands:
        """Return a connection for one run."""
        return Hands(self.client, sandbox=self.sandbox, release=release)

    def close(self) -> None:
        """End the cluster and its children."""
        self.sandbox.close()
        self.client.close()
        self.cluster.close()


def connect(where: Any) -> Hands:
    """Connect to a cluster that stands: an address, a ``Client``, or a Dask cluster object.

    Raises
    ------
    ClusterError
        When nothing answers there, or it has no workers.
    """
    if isinstance(where, Client):
        client, release = where, None
    else:
        try:
            client = Client(where, set_as_default=False, timeout=CONNECT_SECONDS)
            release = client.close
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(f"can't reach a Dask scheduler at {where!r}: {error}") from error
    try:
        client.wait_for_workers(1, timeout=WORKERS_SECONDS)
        client.register_plugin(SandboxPlugin(), name=PLUGIN)
    except TimeoutError as error:
        where = client.scheduler.address
        if release is not None:
            release()
        raise ClusterError(f"the cluster at {where} has had no worker for {WORKERS_SECONDS:g} s; start some") from error
    except Exception as error:
        if release is not None:
            release()
        raise ClusterError(f"the workers can't load parflow: {error}. Install the same version on them.") from error
    return Hands(client, release=release)
