"""Runs on real Dask clusters, and what happens to them there: crashes, lost machines, lost drivers, strangers among workers."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import psutil
import pytest
from distributed import Client, LocalCluster

import parflow as pf
from parflow.errors import (
    ClusterError,
    ClusterLostError,
    RunStoppedError,
    StepError,
    StoreNotVisibleError,
    VersionMismatchError,
)
from parflow.runtime import cluster as clusters
from parflow.runtime import executor
from parflow.runtime.session import SESSIONS
from parflow.runtime.worker import adoptable

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers don't have the tests

ROOT = str(Path(pf.__file__).parents[1])
PATIENCE = 60.0
"""Seconds after which what was waited for will never come."""


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait until a condition holds, and return what it gave."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {PATIENCE:g} s for: {what}"
        time.sleep(0.005)
    return found


def note(log: Path, line: object) -> None:
    """Add a line to a file in one write: lines of several processes don't mix."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, f"{line}\n".encode())
    os.close(handle)


def notes(log: Path) -> list[int]:
    """Return what was noted so far."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []


class Gated:
    """Numbers that are noted as they begin, the first ``free`` of which go right through while the others wait for a gate."""

    def __init__(self, folder: Path, count: int, free: int, *, chunk: int = 1, width: int = 0) -> None:
        self.count, self.free, self.chunk, self.width = count, free, chunk, width
        self.log, self.gate = folder / "log", folder / "gate"

    def value(self) -> pf.Value:
        log, gate, free, width = self.log, self.gate, self.free, self.width

        def step(number: int) -> str:
            note(log, number)
            while number >= free and not gate.exists():
                time.sleep(0.005)
            return str(number).rjust(width)

        return pf.items(range(self.count), chunk_records=self.chunk).map(step).reduce(pf.concat())

    @property
    def result(self) -> list[str]:
        return [str(number).rjust(self.width) for number in range(self.count)]

    def begun(self) -> list[int]:
        return notes(self.log)

    def held(self, slots: int) -> bool:
        """Tell whether so many records wait at the gate."""
        return sum(number >= self.free for number in self.begun()) >= slots

    def open(self) -> None:
        self.gate.touch()


def committed(run: pf.Run) -> set[int]:
    """Return the chunks that the run has finished, and never needs to do again."""
    return {number for number, chunk in enumerate(run.state.stages[0].chunks) if not chunk.pending}


# --- clusters --------------------------------------------------------------------------------------------------------------


class Outside:
    """A scheduler and workers in processes of their own, started by Dask's command line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "scheduler.json"
        self.processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self.start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self.file))

    def start(self, what: str, *options: str, before: tuple[str, ...] = (), path: str = ROOT) -> subprocess.Popen[bytes]:
        home = self.folder / f"{what}-{len(self.processes)}"
        home.mkdir()
        with open(home / "log", "wb") as log:
            process = subprocess.Popen(
                [*before, sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", *options],
                cwd=home,
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    def worker(self, name: str = "good", threads: int = 2, **options: Any) -> subprocess.Popen[bytes]:
        """Start a worker; it joins when it's ready."""
        flags = ["--no-nanny", "--nthreads", str(threads), "--name", name, "--local-directory", str(self.folder)]
        return self.start("worker", "--scheduler-file", str(self.file), *flags, **options)

    @property
    def address(self) -> str:
        until(lambda: self.file.exists() and self.file.read_text().endswith("}"), "the scheduler")
        import json

        return str(json.loads(self.file.read_text())["address"])

    @contextlib.contextmanager
    def client(self, workers: int) -> Iterator[Client]:
        """Connect, once there are so many workers, no more and no fewer."""
        with Client(self.address, set_as_default=False) as client:
            until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == workers, f"{workers} workers")
            yield client

    def close(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Outside]:
    """A cluster that a test may ruin."""
    place = tmp_path / "cluster"
    place.mkdir()
    cluster = Outside(place)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """A cluster that tests leave as they found it: one good worker."""
    cluster = Outside(tmp_path_factory.mktemp("cluster"))
    cluster.worker()
    yield cluster
    cluster.close()


QUIET: dict[str, Any] = {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": []}


@contextlib.contextmanager
def local_client(**options: Any) -> Iterator[Client]:
    with (
        dask.config.set(QUIET),
        LocalCluster(dashboard_address="127.0.0.1:0", memory_limit=0, **options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def four() -> Iterator[Client]:
    """A worker process of four threads, with a nanny that would start it anew."""
    with local_client(n_workers=1, threads_per_worker=4, processes=True) as client:
        yield client


@pytest.fixture(params=["in process", "worker process"])
def where(request: pytest.FixtureRequest) -> Any:
    """Give each kind of cluster."""
    return "local" if request.param == "in process" else request.getfixturevalue("four")


def sandboxes(where: Any, look: Callable[[Any], Any]) -> list[Any]:
    """Look at the sandbox of every worker."""
    if where == "local":
        assert SESSIONS.session is not None
        return [look(SESSIONS.session.sandbox)]
    return [*where.run(lambda dask_worker: look(dask_worker.plugins[clusters.PLUGIN].sandbox)).values()]


# --- one bad record --------------------------------------------------------------------------------------------------------


def exit_now() -> None:
    os._exit(3)


def segfault() -> None:
    ctypes.string_at(0)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def loop() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("deed", "cause", "said"),
    [
        (exit_now, "crash", "exit code 3"),
        (segfault, "crash", "SIGSEGV"),
        (kill_self, "crash", "died"),
        (loop, "timeout", "2 s"),
    ],
)
def test_one_bad_record_costs_itself_alone(four: Client, deed: Callable[[], None], cause: str, said: str) -> None:
    """Dask alone runs it four times, ends the run and condemns its neighbours on the worker's other threads."""

    def step(number: int) -> int:
        if number == 13:
            deed()
        return number

    workers = four.run(os.getpid)
    run = pf.items(range(60), chunk_records=4).map(step).reduce(pf.concat()).run(cluster=four, max_failures=1, timeout="2s")
    assert run.result() == [number for number in range(60) if number != 13]
    (failure,) = run.dead_letters()
    assert (failure.record, failure.step, failure.cause) == ("items[13]", "step", cause)
    assert said in failure.message
    assert four.run(os.getpid) == workers  # the worker process never noticed
    assert four.submit(sum, [1, 2], pure=False).result() == 3  # a client that was handed in is left open


def test_code_that_workers_cannot_import_fails_the_step_and_nothing_else(
    outside: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask alone loses every worker, hangs for ever, and so does all that follows."""
    place = tmp_path / "driver"
    place.mkdir()
    (place / "only_on_the_driver.py").write_text("def work(number):\n    return number\n")
    monkeypatch.syspath_prepend(place)
    import only_on_the_driver  # type: ignore[import-not-found]

    with outside.client(workers=1) as client:
        run = pf.items(range(5)).map(only_on_the_driver.work).reduce(pf.sum()).run(cluster=outside.address)
        with pytest.raises(StepError, match="No module named 'only_on_the_driver'"):
            run.result()
        assert client.submit(sum, [1, 2], pure=False).result() == 3
    assert pf.items(range(5)).reduce(pf.sum()).run(cluster=outside.address).result() == 10


# --- lost workers, schedulers and drivers ----------------------------------------------------------------------------------


def test_a_killed_worker_costs_no_finished_work(tmp_path: Path) -> None:
    """Dask alone does the effects of finished tasks again whose results the lost worker held."""
    flow = Gated(tmp_path, count=80, free=60)
    with local_client(n_workers=2, threads_per_worker=1, processes=True) as client:
        run = flow.value().run(cluster=client, wait=False)
        until(lambda: flow.held(2) and len(committed(run)) >= 12, "both workers at the gate")
        finished = committed(run)
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        flow.open()
        assert run.result() == flow.result
    times = Counter(flow.begun())
    assert {number for number in finished if times[number] != 1} == set()
    assert run.dead_letters() == []


def test_a_killed_scheduler_ends_the_run_which_is_resumed_elsewhere(
    own: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Dask alone all results are gone with the scheduler."""
    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 3600.0)  # the client's hope for its return must not hold the run up
    flow = Gated(tmp_path, count=40, free=25)
    own.worker()
    run = flow.value().run(cluster=own.address, wait=False)
    until(lambda: flow.held(2) and run.state.stages[0].closed, "two records at the gate")
    os.kill(own.scheduler.pid, signal.SIGKILL)
    with pytest.raises(ClusterLostError, match=f"parflow resume {run.run_id}"):
        run.result()
    assert run.status == "failed"
    finished, before = committed(run), flow.begun()
    flow.open()
    again = pf.resume(run.run_id, cluster="local", workers=2)
    assert again.result() == flow.result
    assert sorted(flow.begun()[len(before) :]) == sorted({*range(40)} - finished)
    assert len(finished) > 0


def test_a_killed_driver_is_taken_over_and_what_workers_finished_meanwhile_is_adopted(
    outside: Outside, tmp_path: Path, home: Path
) -> None:
    flow = Gated(tmp_path, count=40, free=25, width=100_000)  # results too large for the journal are in the store
    driver = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_clusters as t; from pathlib import Path\n"
        "t.Gated(Path(sys.argv[2]), 40, 25, width=100_000).value().run(cluster=sys.argv[3])\n"
    )
    arguments = [str(Path(__file__).parent), str(tmp_path), outside.address]
    process = subprocess.Popen([sys.executable, "-c", driver, *arguments], env={**os.environ, "PYTHONPATH": ROOT})
    try:
        until(lambda: flow.held(2), "two records at the gate")
    finally:
        process.kill()
        process.wait()
    run = pf.open_run()
    assert run.status == "lost"
    finished = committed(run)
    with outside.client(workers=1) as client:
        flow.open()
        until(lambda: not any(client.run(lambda dask_worker: len(dask_worker.active_threads)).values()), "an idle worker")
    left = {piece.chunk for _, piece, _ in adoptable(run.store, run.state.stages)}
    assert left  # finished after the driver's death, and known to nobody but the store
    before = flow.begun()
    assert pf.resume(run.run_id, cluster=outside.address).result() == flow.result
    assert sorted(flow.begun()[len(before) :]) == sorted({*range(40)} - finished - left)


def test_a_cluster_without_workers_for_long_ends_the_run(own: Outside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "NO_WORKERS_SECONDS", 0.1)
    flow = Gated(tmp_path, count=8, free=4)
    worker = own.worker()
    run = flow.value().run(cluster=own.address, wait=False)
    until(lambda: flow.held(2) and run.state.stages[0].closed, "two records at the gate")
    worker.kill()
    with pytest.raises(ClusterLostError, match=rf"no worker for 0\.1 s.*parflow resume {run.run_id}"):
        run.result()
    flow.open()
    assert pf.resume(run.run_id, workers=2).result() == flow.result


def test_a_client_that_is_closed_under_a_run_ends_it(tmp_path: Path) -> None:
    flow = Gated(tmp_path, count=8, free=4)
    with local_client(n_workers=1, threads_per_worker=2, processes=False) as client:
        run = flow.value().run(cluster=client, wait=False)
        until(lambda: flow.held(2), "two records at the gate")
        client.close()
        with pytest.raises(ClusterLostError, match=f"parflow resume {run.run_id}"):
            run.result()
    flow.open()
    assert pf.resume(run.run_id, workers=2).result() == flow.result


def test_a_cluster_that_grows_is_used(tmp_path: Path) -> None:
    flow = Gated(tmp_path, count=12, free=0)
    with local_client(n_workers=1, threads_per_worker=1, processes=False) as client:
        run = flow.value().run(cluster=client, wait=False)
        until(lambda: flow.held(1), "the only worker")
        client.cluster.scale(3)
        until(lambda: flow.held(3), "the new workers")
        flow.open()
        assert run.result() == flow.result
    assert Counter(flow.begun()) == Counter(range(12))


# --- workers that can't take part ------------------------------------------------------------------------------------------


def test_a_worker_of_another_version_is_named(outside: Outside, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import parflow\nparflow.__version__ = '0.0.1'\n")
    worker = outside.worker("old", path=f"{tmp_path}:{ROOT}")
    with outside.client(workers=2) as client:
        (old,) = (address for address, facts in client.scheduler_info()["workers"].items() if facts["name"] == "old")
        run = pf.items([1]).reduce(pf.sum()).run(cluster=outside.address)
        with pytest.raises(VersionMismatchError, match=rf"{old} runs parflow 0\.0\.1, the driver {pf.__version__}"):
            run.result()
        worker.kill()
    with outside.client(workers=1):
        assert pf.items([1]).reduce(pf.sum()).run(cluster=outside.address).result() == 1


def may_hide_folders() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_hide_folders(), reason="only root may hide a folder from a process (unshare -m)")
def test_a_worker_that_does_not_see_the_store_is_named(outside: Outside, tmp_path: Path, home: Path) -> None:
    home.mkdir(mode=0o700)
    hide = f'mount -t tmpfs none {home} && exec "$@"'
    worker = outside.worker("elsewhere", before=("unshare", "-m", "sh", "-c", hide, "sh"))
    with outside.client(workers=2) as client:
        (blind,) = (address for address, facts in client.scheduler_info()["workers"].items() if facts["name"] == "elsewhere")
        run = pf.items([1]).reduce(pf.sum()).run(cluster=outside.address)
        with pytest.raises(StoreNotVisibleError, match=rf"{blind} can't see the store '{home}"):
            run.result()
        worker.kill()
    with outside.client(workers=1):
        assert pf.items([1]).reduce(pf.sum()).run(cluster=outside.address).result() == 1


def test_a_scheduler_without_workers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "WORKERS_SECONDS", 0.1)
    with local_client(n_workers=0, processes=False, protocol="tcp") as client:
        before = {*client.cluster.scheduler.clients}
        run = pf.items([1]).reduce(pf.sum()).run(cluster=client.scheduler.address)
        with pytest.raises(ClusterError, match=r"has had no worker for 0\.1 s"):
            run.result()
        until(lambda: {*client.cluster.scheduler.clients} == before, "the run's own client to be gone")


def test_nothing_at_the_address_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    run = pf.items([1]).reduce(pf.sum()).run(cluster=address)
    with pytest.raises(ClusterError, match=f"can't reach a Dask scheduler at '{address}'"):
        run.result()
    assert run.status == "failed"


# --- order, reuse, isolation -----------------------------------------------------------------------------------------------


def test_the_largest_chunk_starts_first_in_every_run(tmp_path: Path) -> None:
    """Dask alone starts independent tasks in an order that is random every run."""
    sizes = [3, 900, 20, 5000, 100, 1, 40, 300, 7, 2000]
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.txt").write_text("x" * size)
    for attempt in range(3):
        log = tmp_path / f"log-{attempt}"

        def step(document: pf.Document, log: Path = log) -> None:
            note(log, len(document.text))

        files = pf.read_files(tmp_path / "*.txt", chunk_bytes=1)
        assert files.map(step).reduce(pf.count()).run(workers=1).result() == len(sizes)
        assert notes(log) == sorted(sizes, reverse=True)


def test_runs_share_a_cluster_until_one_wants_another_size() -> None:
    def children() -> set[int]:
        assert SESSIONS.session is not None
        return {child.pid for child in SESSIONS.session.sandbox.idle}

    def run(workers: int) -> None:
        assert pf.items(range(9)).reduce(pf.sum()).run(workers=workers).result() == 36
        until(lambda: len(children()) == workers, "warm children")

    run(2)
    session, first = SESSIONS.session, children()
    run(2)
    assert SESSIONS.session is session
    assert children() == first
    run(3)
    assert SESSIONS.session is not session
    assert children() & first == set()
    until(lambda: not any(map(psutil.pid_exists, first)), "the old children's end")


def test_inline_code_runs_in_the_worker_itself(where: Any) -> None:
    workers = {os.getpid()} if where == "local" else {*where.run(os.getpid).values()}
    pids = pf.items(range(20)).map(lambda _: os.getpid()).reduce(pf.counter())
    assert {*pids.run(cluster=where, isolation="inline").result()} == workers
    assert {*pids.run(cluster=where).result()} & workers == set()


# --- stopping --------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_at_the_record_where_it_stopped(where: Any, tmp_path: Path) -> None:
    flow = Gated(tmp_path, count=100, free=50, chunk=100)
    run = flow.value().run(cluster=where, wait=False)
    until(lambda: flow.held(1), "a record at the gate")
    stopper = threading.Thread(target=run.stop)
    stopper.start()
    stopper.join()
    marked = f"{run.run_id}/"
    until(lambda: any(sandboxes(where, lambda box: any(n.startswith(marked) for n in box.stopped))), "the request to arrive")
    flow.open()
    with pytest.raises(RunStoppedError, match=f"parflow resume {run.run_id}"):
        run.result()
    assert run.status == "stopped"
    assert flow.begun() == [*range(51)]  # the record in hand was finished, no other begun
    assert pf.resume(run.run_id, cluster=where).result() == flow.result
    assert flow.begun() == [*range(100)]


def test_a_run_stopped_at_once_kills_what_it_has_in_hand(where: Any, tmp_path: Path) -> None:
    """Dask alone lets a cancelled task run to its end, and takes its thread for free meanwhile."""
    log = tmp_path / "log"

    def sleep(_: int) -> None:
        note(log, os.getpid())
        time.sleep(600)

    run = pf.items([1]).map(sleep).reduce(pf.count()).run(cluster=where, wait=False)
    (child,) = until(lambda: notes(log), "the sleeping record")
    run.stop(now=True)
    with pytest.raises(RunStoppedError):
        run.result()
    until(lambda: not psutil.pid_exists(child), "the child's end")


def test_a_run_that_ends_while_it_connects_lets_go_of_the_cluster() -> None:
    def free() -> bool:
        with SESSIONS.lock:
            return SESSIONS.session is not None and SESSIONS.users == 0

    SESSIONS.close()
    run = pf.items([1]).reduce(pf.count()).run(wait=False)
    run.stop(now=True)
    with pytest.raises(RunStoppedError):
        run.result()
    until(free, "the session without users")


def test_a_run_stopped_at_once_leaves_its_neighbour_alone(where: Any, tmp_path: Path) -> None:
    for name in ("stopped", "neighbour"):
        (tmp_path / name).mkdir()
    stopped, neighbour = Gated(tmp_path / "stopped", 1, 0), Gated(tmp_path / "neighbour", 4, 0, chunk=4)
    run = stopped.value().run(cluster=where, workers=2, wait=False)
    until(lambda: stopped.held(1), "the first run")
    other = neighbour.value().run(cluster=where, workers=2, wait=False)
    until(lambda: neighbour.held(1), "its neighbour")
    run.stop(now=True)
    with pytest.raises(RunStoppedError):
        run.result()
    neighbour.open()
    assert other.result() == neighbour.result
    assert neighbour.begun() == [*range(4)]
