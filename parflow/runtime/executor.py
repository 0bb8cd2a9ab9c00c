"""The one loop: what happened goes into the coordinator, and what it asks for is done, in order.

Listing, publishing, the journal and Dask run on their own threads and report here; the loop itself never waits for any of them.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from parflow.core.bindings import Binding, bind
from parflow.core.coordinator import Coordinator
from parflow.core.entries import ChunksListed, Grown, Published, RunEnded, encode
from parflow.core.forms import is_async
from parflow.core.history import RunState
from parflow.core.rules import FREE
from parflow.core.signals import (
    Append,
    BatchLost,
    BatchReturned,
    Bell,
    Broke,
    Cancel,
    Durable,
    Finish,
    Instruction,
    List,
    Listed,
    Publish,
    Rang,
    Ring,
    SinkPublished,
    SlotsChanged,
    Stands,
    Stimulus,
    StopRequested,
    Submit,
    Survey,
    Yield,
)
from parflow.errors import ClusterLostError, InputsChangedError, ParflowError, ResourcesMissingError
from parflow.model import (
    INLINE_BYTES,
    Address,
    CallJob,
    Chunk,
    ChunkJob,
    Job,
    MergeJob,
    Receipt,
    Rejected,
    UndoJob,
    digest,
    make_ref,
)
from parflow.runtime.attempts import TERMS, Terms
from parflow.runtime.calls import Given, pack_arguments
from parflow.runtime.program import Program, fetch
from parflow.runtime.values import load
from parflow.runtime.worker import Batch, Isolation, adoptable
from parflow.storage.effects import standing

if TYPE_CHECKING:
    from parflow.runtime.cluster import Hands
    from parflow.storage.journal import Writer
    from parflow.storage.store import Store

LIST_BLOCK = 1000
LIST_SECONDS = 0.1
TICK = 1.0
NO_WORKERS_SECONDS = 60.0
NOBODY = (ClusterLostError.__name__, ResourcesMissingError.__name__)
"""Errors after which what is in flight will not come back."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is executed; none of it changes its result.

    ``timeout``, ``slice`` and ``grace`` (for what is in flight when the run ends) are in seconds, ``memory`` in bytes;
    ``retry`` is a packed `Overrides`: it may hold a function.
    """

    timeout: float | None = None
    memory: int | None = None
    slice: float = 30.0
    isolation: Isolation = "process"
    window: int = 2
    inline_bytes: int = INLINE_BYTES
    grace: float = 30.0
    compensate: bool = False
    retry: str = ""


class Executor:
    """Executes one run that this process owns.

    Parameters
    ----------
    run_id : str
        The run.
    program : Program
        Its stages, tasks and calls, and where their code is.
    state : RunState
        Folded from the journal.
    store : Store
        Where results go.
    connect : callable
        Makes the `Hands`; called on a thread of its own, so that listing goes on while a cluster starts.
    options : Options
        How to run.
    began : float
        When the run began, before any resume (seconds since 1970).
    """

    def __init__(
        self,
        run_id: str,
        program: Program,
        state: RunState,
        store: Store,
        connect: Callable[[], Hands],
        options: Options,
        began: float = 0.0,
    ) -> None:
        self.run_id = run_id
        self.program = program
        self.store = store
        self.options = options
        self.began = began
        self.coordinator = Coordinator(
            run_id, state, window=options.window, rules=program.rules, grace=options.grace, compensate=options.compensate
        )
        self.inbox: queue.SimpleQueue[Stimulus | None] = queue.SimpleQueue()
        self.writer: Writer | None = None
        self.hands: Hands | None = None
        self.connect = connect
        self.ended: RunEnded | None = None
        self.first_chunk: float | None = None
        self.problem: BaseException | None = None
        self._stopping = threading.Event()
        self._connecting = threading.Lock()
        self._over = False
        self._bells: list[tuple[float, int, Bell]] = []
        self._rings = 0
        self._idle_since: float | None = None
        self._lacking_since: float | None = None
        self._bound: dict[Address, Binding] = {}

    @property
    def state(self) -> RunState:
        """The run as it stands."""
        return self.coordinator.state

    # --- what others call ------------------------------------------------------------------------------------------------

    def durable(self, count: int) -> None:
        """Take the journal's word that so many entries are on disk."""
        self.inbox.put(Durable(count))

    def broke(self, error: BaseException) -> None:
        """End the run because of an error outside the records' reach."""
        self.problem = self.problem or error
        arguments = error.args if isinstance(error, ParflowError) else (f"{type(error).__name__}: {error}",)
        name = type(error).__name__ if isinstance(error, ParflowError) else "RunError"
        self.inbox.put(Broke(name, tuple(a if isinstance(a, (int, float)) else str(a) for a in arguments)))

    def give_up(self, error: BaseException) -> None:
        """Leave the loop as it stands: the journal can't be written any more, so nothing may be decided."""
        self.problem = error
        self.inbox.put(None)

    def stop(self, request: StopRequested) -> None:
        """Stop the run."""
        self.inbox.put(request)

    # --- the loop --------------------------------------------------------------------------------------------------------

    def run(self, writer: Writer) -> RunEnded:
        """Execute until the coordinator says that nothing is left to do."""
        self.writer = writer
        self._spawn("connect", self._connect)
        try:
            self._obey(self.coordinator.start(self._adopted()))
            looked = time.monotonic()
            while self.ended is None:
                stimulus = self._next()
                if stimulus is not None:
                    self._obey(self.coordinator.handle(stimulus))
                if isinstance(stimulus, Broke) and stimulus.error in NOBODY:
                    for attempt in [*self.coordinator.inflight]:  # nobody is there to send them back
                        self._obey(self.coordinator.handle(BatchLost(attempt, "nobody can run it")))
                if time.monotonic() - looked > TICK:
                    self._tick()
                    looked = time.monotonic()
        finally:
            self._stopping.set()
            with self._connecting:
                self._over = True
                if self.hands is not None:
                    self.hands.close()
        return self.ended

    def _next(self) -> Stimulus | None:
        """Wait for the next stimulus, and for no longer than until the next bell, or the next look at the cluster."""
        wait = TICK
        if self._bells:
            wait = min(TICK, self._bells[0][0] - time.monotonic())
            if wait <= 0:
                return Rang(heapq.heappop(self._bells)[-1])
        try:
            stimulus = self.inbox.get(timeout=wait)
        except queue.Empty:
            return None
        if stimulus is None:
            raise self.problem or RuntimeError("gave up")
        return stimulus

    def _obey(self, instructions: list[Instruction]) -> None:
        assert self.writer is not None
        for instruction in instructions:
            match instruction:
                case Append(entry, _):
                    if isinstance(entry, Grown):
                        self.program.add(fetch(self.store, entry.code))
                    self.writer.append(*encode(entry))
                case Submit():
                    self._submit(instruction)
                case List() | Publish() | Survey():
                    self._spawn_for(instruction)
                case Ring(bell, seconds):
                    self._rings += 1
                    heapq.heappush(self._bells, (time.monotonic() + seconds, self._rings, bell))
                case Yield(attempts):
                    if self.coordinator.ending is not None:
                        self._stopping.set()
                    if self.hands is not None:
                        self._spawn("stop", self.hands.stop, attempts)
                case Cancel(attempts):
                    if self.hands is not None:
                        self._spawn("cancel", self.hands.cancel, attempts)
                case Finish(ended):
                    self.ended = ended

    def _spawn_for(self, instruction: List | Publish | Survey) -> None:
        """Do what takes a while on a thread of its own, which reports."""
        match instruction:
            case List(stage, skip):
                self._spawn("list", self._list, stage, skip)
            case Publish(stage, output):
                self._spawn("publish", self._publish, stage, output)
            case Survey():
                self._spawn("survey", self._survey)

    def _spawn(self, name: str, act: Callable[..., None], *arguments: Any) -> None:
        def guarded() -> None:
            try:
                act(*arguments)
            except Exception as error:  # noqa: BLE001 - whatever it was, the run has to hear of it
                self.broke(error)

        threading.Thread(target=guarded, name=f"parflow-{name}", daemon=True).start()

    def _tick(self) -> None:
        """Look at the cluster now and then: a foreign one grows, shrinks and goes away."""
        if self.hands is None or self.hands.sandbox is not None:
            return
        slots = self.hands.slots
        if slots != self.coordinator.slots:
            self._obey(self.coordinator.handle(SlotsChanged(slots)))
        now = time.monotonic()
        self._idle_since = None if slots else (self._idle_since or now)
        if self._idle_since is not None and now - self._idle_since > NO_WORKERS_SECONDS:
            self.broke(ClusterLostError(f"it has had no worker for {NO_WORKERS_SECONDS:g} s", self.run_id))
        lacking = self.hands.lacking(self.program.resources) if slots and self.program.resources else ""
        self._lacking_since = None if not lacking else (self._lacking_since or now)
        if self._lacking_since is not None and now - self._lacking_since > NO_WORKERS_SECONDS:
            self.broke(ResourcesMissingError(lacking, self.run_id))

    # --- acts ------------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        hands = self.connect()
        try:
            hands.check(self.store)
            self._check_resources(hands)
            slots = hands.slots
        except BaseException:
            hands.close()
            raise
        with self._connecting:
            if self._over:  # the run ended while it connected
                hands.close()
                return
            self.hands = hands
        self.inbox.put(SlotsChanged(slots))

    def _check_resources(self, hands: Hands) -> None:
        if hands.sandbox is not None and (lacking := hands.lacking(self.program.resources)):
            raise ResourcesMissingError(lacking, self.run_id)  # this process's own workers stay as they are

    def _adopted(self) -> Iterator[tuple[int, Any, Receipt]]:
        """Offer what the store holds for pieces that the journal has pending (on a first run: nothing)."""
        if any(stage.chunks for stage in self.state.stages):
            yield from adoptable(self.store, self.state.stages)

    def _submit(self, submit: Submit) -> None:
        assert self.hands is not None
        try:
            batch = self._calls(submit) if submit.unit < 0 else self._chunks(submit)
        except ParflowError as error:  # the store doesn't take what the jobs need
            self.broke(error)
            self.inbox.put(BatchLost(submit.attempt, str(error)))
            return
        self.hands.submit(batch, lambda attempt, outcome: self._settled(attempt, submit.jobs, outcome))

    def _chunks(self, submit: Submit) -> Batch:
        """Say what a worker has to know to run chunks of a stage, or merges."""
        stage, options = self.program.stages[submit.unit], self.options
        numbers = range(1 + len(stage.steps) + len(stage.outputs))
        return Batch(
            self.run_id,
            submit.attempt,
            submit.unit,
            submit.jobs,
            self.store.url,
            self.program.code(submit.unit),
            tuple(stage.label(number) for number in numbers),
            stage.timeouts(options.timeout),
            stage.memory(options.memory),
            options.slice,
            options.isolation,
            stage.preload,
            options.inline_bytes,
            bindings=self._bindings(self.state.stages[submit.unit].facts.needs),
            terms=self._terms(submit),
            resources=self._resources(submit),
            began=self.began,
        )

    def _terms(self, submit: Submit) -> Terms:
        rules = self.program.rules(submit.unit)
        return TERMS if rules is FREE else Terms(self.options.retry, submit.share, submit.probe)

    def _resources(self, submit: Submit) -> Mapping[str, float] | None:
        return None if isinstance(submit.jobs[0], (MergeJob, UndoJob)) else self.program.rules(submit.unit).resources or None

    def _calls(self, submit: Submit) -> Batch:
        """Say what a worker has to know to make calls of a task."""
        task, options = self.program.tasks[~submit.unit], self.options
        return Batch(
            self.run_id,
            submit.attempt,
            submit.unit,
            submit.jobs,
            self.store.url,
            self.program.code(submit.unit),
            ("load", task.name),
            (None, task.timeout or options.timeout),
            task.memory or options.memory,
            options.slice,
            options.isolation,
            ("asyncio",) if is_async(task.function) else (),
            options.inline_bytes,
            given=tuple(self._given(job.call) for job in submit.jobs if isinstance(job, CallJob)),
            terms=self._terms(submit),
            resources=self._resources(submit),
            began=self.began,
        )

    def _given(self, call: int) -> Given:
        facts = self.state.calls[call].facts
        data = pack_arguments(self.program.calls[call].arguments)
        arguments = make_ref(data, lambda body: str(self.store.put(f"arguments/{digest(body)}.pkl", body)))
        return Given(arguments, self._bindings(facts.needs), facts.kind, facts.results)

    def _bindings(self, needs: tuple[Address, ...]) -> tuple[Binding, ...]:
        for address in needs:
            if address not in self._bound:
                self._bound[address] = bind(self.state, address)
        return tuple(self._bound[address] for address in needs)

    def _settled(self, attempt: str, jobs: tuple[Job, ...], outcome: tuple[Receipt | None, ...] | BaseException) -> None:
        if isinstance(outcome, ClusterLostError):
            self.broke(ClusterLostError(outcome.args[0], self.run_id))
        elif isinstance(outcome, BaseException):
            self.inbox.put(BatchLost(attempt, f"{type(outcome).__name__}: {outcome}"))
        else:
            if self.first_chunk is None:
                self.first_chunk = time.time()
            self.inbox.put(BatchReturned(attempt, tuple(map(self._named, jobs, outcome))))

    def _named(self, job: Job, receipt: Receipt | None) -> Receipt | None:
        """Name the record that a dead child had in hand: the supervisor, which opens no user code, knows only its place."""
        if receipt is None or receipt.status != "died" or receipt.failure is None or receipt.cursor is None:
            return receipt
        if not isinstance(job, ChunkJob) or receipt.failure.record:
            return receipt
        at = receipt.cursor
        record = str(self.program.stages[job.stage].source.record_id(job.chunk.parts[at.part], at.offset))
        named = replace(receipt.failure, record=record, chunk=job.chunk.index, part=at.part, offset=at.offset)
        return replace(receipt, failure=named)

    def _list(self, number: int, skip: int) -> None:
        """Report a stage's input in blocks; what an earlier coordinator listed is compared and passed over."""
        known = iter([*self.state.stages[number].chunks])
        items: list[Chunk | Rejected] = []
        since = time.monotonic()
        source = self.program.stages[number].source
        if self.program.stages[number].value is not None:  # the first of what the stage needs
            (binding, *_) = self._bindings(self.state.stages[number].facts.needs)
            source = source.of(load(binding, self.store))
        for count, item in enumerate(source.chunks(self.store)):
            if self._stopping.is_set():
                return
            if count < skip:
                if isinstance(item, Chunk) and (old := next(known, None)) is not None and old.chunk.id != item.id:
                    raise InputsChangedError(self.run_id, 1, item.parts[0].path)
                continue
            items.append(item)
            if len(items) >= LIST_BLOCK or time.monotonic() - since > LIST_SECONDS:
                self.inbox.put(Listed(_listing(number, items, last=False)))
                items, since = [], time.monotonic()
        self.inbox.put(Listed(_listing(number, items, last=True)))

    def _survey(self) -> None:
        """Find what was done outside and can be undone."""
        self.inbox.put(Stands(tuple((effect.unit, effect.id) for effect in standing(self.store) if effect.number)))

    def _publish(self, number: int, output: int) -> None:
        stage = self.state.stages[number]
        sink, files = self.program.stages[number].outputs[output].body, stage.files(output)
        manifest = sink.publish(self.run_id, files, again=stage.redriven, placed=stage.placed.get(output))
        self.inbox.put(SinkPublished(Published(number, output, manifest)))


def _listing(stage: int, items: list[Chunk | Rejected], *, last: bool) -> ChunksListed:
    chunks = tuple(item for item in items if isinstance(item, Chunk))
    rejected = tuple(item for item in items if isinstance(item, Rejected))
    return ChunksListed(stage, chunks, rejected, last)
