"""Run the records of a piece through a stage: the one primitive, "run ``[first, stop)`` and say how far you got".

The same code runs in a child of the sandbox, in the worker's own thread (``isolation="inline"``) and in a plain Dask graph.
"""

from __future__ import annotations

import copy
import pickle
import reprlib
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from parflow.core import segments
from parflow.core.forms import Batched, is_async
from parflow.core.plan import Output, Stage, Step
from parflow.core.reducers import Reducer
from parflow.errors import CodeError, RecordMemoryError, RecordTimeoutError, StoreError
from parflow.model import (
    Cause,
    Chunk,
    ChunkJob,
    Counts,
    Cursor,
    Failure,
    MergeJob,
    Piece,
    Receipt,
    Ref,
    SinkFile,
    Tally,
    make_ref,
)
from parflow.runtime.attempts import TERMS, Attempts, Terms, Unproven, Watch, Windows, policies, tried
from parflow.runtime.here import placed, site
from parflow.runtime.marker import CLOSING, DECODING, HELD, OFFSET, ORDINAL, PART, READING, STEP, STOP, Marker, Place, put, take
from parflow.runtime.once import after_undoing, undoable
from parflow.runtime.places import Places
from parflow.runtime.prints import PRINTS, TRACE
from parflow.runtime.steps import Batches, Door, Fail, Keeps, door, fan_out, plain
from parflow.runtime.values import pickled
from parflow.storage.disk import unwritable

PREVIEW = 200
TRACEBACKS = 100
"""How many dead letters of a piece have their traceback and output."""
TABLE_ROWS = 65_536
"""Rows of the tables that are read for steps that want tables, at the most."""

Timeouts = Sequence[float | None]


class OutOfMemory(BaseException):
    """The record in hand ran out of memory.

    What the piece made so far may hold half of it. Not an Exception: no step swallows it.
    """


class Broken(BaseException):
    """The step can't run at all, whatever the record."""

    def __init__(self, step: str, error: BaseException) -> None:
        super().__init__(step, error)
        self.step = step
        self.error = error


@dataclass(frozen=True, slots=True)
class Context:
    """What a job runs in: the store for results, names for what it writes, the marker, and what its process has seen."""

    run_id: str
    attempt: str
    store: Any
    marker: Marker
    inline_bytes: int
    terms: Terms = TERMS
    windows: Windows = field(default_factory=dict)

    def named(self, suffix: object) -> Context:
        """Return the same context with a name of its own for what is written."""
        return replace(self, attempt=f"{self.attempt}-{suffix}")


# --- failures --------------------------------------------------------------------------------------------------------


def describe(error: BaseException, **known: Any) -> Failure:
    """Turn an exception into a plain record, where it happened, before anything is pickled."""
    kinds = [kind for kind in type(error).__mro__ if kind is not object]
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - a stranger's __str__ may raise anything
        message = "(the error has no message: its __str__ raised)"
    return Failure(
        error=type(error).__qualname__,
        message=message[:2000],
        bases=tuple(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds),
        **known,
    )


def preview(record: Any) -> str:
    """Show the beginning of a record, at little cost whatever its size."""
    try:
        text = repr(record[:PREVIEW]) if isinstance(record, (str, bytes)) else reprlib.repr(record)
    except Exception:  # noqa: BLE001 - a stranger's __repr__ may raise anything
        text = f"<{type(record).__qualname__}, whose repr raises>"
    return text[: 2 * PREVIEW]


def trace_of(error: BaseException) -> str:
    """Format a traceback without parflow's own frames at its top: the user's lines come first."""
    tb = error.__traceback__
    while tb is not None and tb.tb_frame.f_globals.get("__name__", "").startswith("parflow."):
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(error), error, tb))[-TRACE:]


class DeadLetters:
    """The records of one piece that failed.

    After a ``late`` one the piece ends: what was waited for is committed, lest a later record that ends the child makes it wait
    again, and who has nothing to do takes the rest.
    """

    def __init__(self, stage: Stage, chunk: Chunk, marker: Marker, windows: Windows) -> None:
        self.items: list[Failure] = []
        self.watch = Watch(windows)
        self.late = False
        self.stage = stage
        self.chunk = chunk
        self.marker = marker

    def in_hand(self) -> Cursor:
        """Return the place of the record in hand."""
        return Cursor(self.marker[ORDINAL], self.marker[PART], self.marker[OFFSET])

    def name(self, at: Cursor) -> str:
        """Name the record at a place, for a person."""
        return str(self.stage.source.record_id(self.chunk.parts[at.part], at.offset))

    def add(self, step: int, error: BaseException, record: Any, cause: Cause = "exception") -> None:
        """Set the record in hand aside; out of memory, give the whole piece up."""
        if isinstance(error, MemoryError):
            raise OutOfMemory from error
        told = len(self.items) < TRACEBACKS
        trace = trace_of(error) if cause == "exception" and told else ""
        self.watch.count(self.stage.label(step), Counts(failed=1))
        if cause == "exception" and isinstance(error, RecordTimeoutError):  # the trace says where it was
            cause, self.late = "timeout", True
        letter = self.describe(step, error, cause, trace, record, self.in_hand(), told=told)
        self.items.append(after_undoing(letter, self.stage, step, self.marker))

    def describe(
        self, step: int, error: BaseException, cause: Cause, trace: str, record: Any, at: Cursor, *, told: bool = True
    ) -> Failure:
        """Make the dead letter of the record at a place, with what it printed if that is to be ``told``."""
        return describe(
            error,
            record=self.name(at),
            step=self.stage.label(step),
            cause=cause,
            traceback=trace,
            preview="" if record is None else preview(record),
            chunk=self.chunk.index,
            ordinal=at.ordinal,
            part=at.part,
            offset=at.offset,
            output=PRINTS.of(at.ordinal) if told else "",
            **tried(error),
        )


# --- outputs -----------------------------------------------------------------------------------------------------------


class _Reduction:
    """The partial state of one reduction over a piece."""

    def __init__(self, output: Output, number: int, context: Context, fail: Fail) -> None:
        self.output = output
        self.context = context
        reducer, marker = output.body, context.marker
        state = reducer.initial()
        step, extend = reducer.step, reducer.extend

        def push(record: Any) -> None:
            nonlocal state
            marker[STEP] = number
            try:
                state = step(state, record)
            except (Exception, SystemExit) as error:  # noqa: BLE001
                fail(number, error, record)

        def push_many(records: list[Any]) -> None:
            nonlocal state
            marker[STEP] = number
            try:
                state = extend(state, records)
            except (Exception, SystemExit):  # noqa: BLE001 - extend takes all or nothing: find the bad ones
                for record in records:
                    push(record)

        in_bulk = type(reducer).extend is not Reducer.extend
        self.door = door(marker, push, push_many if in_bulk else None)

        def seal() -> Any:
            return reducer.seal(state)

        self.seal: Callable[[], Any] = seal

    def abort(self) -> None:
        """Nothing is written before it is complete."""

    def close(self) -> tuple[Ref | None, SinkFile | None]:
        state = self.seal()
        if self.output.kind == "group":
            return keep_bytes(segments.pack(self.output.body.split(state)), self.context), None
        return keep(self.output.name, state, self.context), None


class _Collection:
    """The records of a piece, pickled one by one, so that a record that can't be is the one in hand."""

    def __init__(self, number: int, context: Context, fail: Fail) -> None:
        self.context = context
        self.out: list[bytes] = []

        def push(record: Any) -> None:
            context.marker[STEP] = number
            try:
                self.out.append(pickled(record))
            except (Exception, SystemExit) as error:  # noqa: BLE001
                fail(number, error, record)

        self.door = door(context.marker, push)

    def close(self) -> tuple[Ref | None, SinkFile | None]:
        return keep_bytes(b"".join(self.out), self.context), None

    def abort(self) -> None:
        """Nothing is written before it is complete."""


class _Writing:
    """One staged file of a sink."""

    def __init__(self, output: Output, number: int, index: int, context: Context, letters: DeadLetters) -> None:
        self.index = index
        self.name = output.name
        marker = context.marker

        def late(place: Place, record: Any, error: BaseException) -> None:
            """Set aside a record that the writer refused after it had buffered it."""
            here = take(marker)
            put(marker, place)
            letters.add(number, error, record)
            put(marker, here)

        self.writer = output.body.open(context.run_id, context.attempt, late)
        write = self.writer.write

        def push(record: Any) -> None:
            marker[STEP] = number
            try:
                write(record, take(marker))
            except OSError as error:  # the disk, not the record
                raise self._broken(error) from error
            except (Exception, SystemExit) as error:  # noqa: BLE001
                letters.add(number, error, record)

        def push_table(rows: Any, places: Sequence[Place]) -> None:
            marker[STEP] = number
            try:
                self.writer.write_table(rows, places)
            except OSError as error:
                raise self._broken(error) from error
            except MemoryError as error:
                letters.add(number, error, None)

        self.door = door(marker, push, table=push_table if hasattr(self.writer, "write_table") else None)

    def close(self) -> tuple[Ref | None, SinkFile | None]:
        try:
            done = self.writer.close()
        except OSError as error:
            raise self._broken(error) from error
        return None, SinkFile(self.index, *done) if done else None

    def abort(self) -> None:
        self.writer.abort()

    def _broken(self, error: OSError) -> Broken:
        return Broken(self.name, unwritable(self.writer.path, error))


def keep_bytes(data: bytes, context: Context) -> Ref:
    """Keep a result, at hand or in the store."""
    return make_ref(data, lambda body: str(context.store.put(f"results/{context.attempt}.pkl", body)), context.inline_bytes)


def keep(step: str, value: Any, context: Context) -> Ref:
    """Keep a value, at hand or in the store.

    Raises
    ------
    Broken
        When it can't be pickled.
    """
    try:
        data = pickled(value)
    except Exception as error:
        raise Broken(step, CodeError(step, f"its result can't be pickled: {error}")) from error
    return keep_bytes(data, context)


# --- running -----------------------------------------------------------------------------------------------------------


def _compile(
    stage: Stage, context: Context, letters: DeadLetters, timeouts: Timeouts, piece: Piece
) -> tuple[Door, list[Keeps], list[Any]]:
    """Build the closures from the outputs back to the source.

    Returns the first one, the steps that keep records (each before those that follow it), and the outputs.
    """
    marker = context.marker
    consumers: dict[int, list[Door]] = {}
    ends: list[Any] = []
    for index, output in enumerate(stage.outputs):
        number = 1 + len(stage.steps) + index
        own = context.named(index)
        if output.kind in ("reduce", "group"):
            end: Any = _Reduction(output, number, own, letters.add)
        elif output.kind == "collect":
            end = _Collection(number, own, letters.add)
        else:
            end = _Writing(output, number, index, own, letters)
        ends.append(end)
        consumers.setdefault(output.parent, []).append(end.door)
    keeps: list[Keeps] = []
    for index in reversed(range(len(stage.steps))):
        step, onward = stage.steps[index], fan_out(marker, consumers[index])
        earlier = sum(name == step.task.name for name, _ in piece.earlier)
        attempts = policies(step.task, index + 1, marker, letters.watch, context.terms, earlier)
        way, keeper = _step(step, index + 1, marker, letters.add, onward, timeouts[index + 1], attempts)
        keeps[:0] = [keeper] if keeper else []
        consumers.setdefault(step.parent, []).append(way)
    return fan_out(marker, consumers[-1]), keeps, ends


def _step(
    step: Step, number: int, marker: Marker, fail: Fail, onward: Door, timeout: float | None, attempts: Attempts | None
) -> tuple[Door, Keeps | None]:
    """Compile a step; also returns what keeps its records for a while, if anything does."""
    if isinstance(step.task.function, Batched):
        batches = Batches(step, number, marker, fail, onward, attempts)
        return batches.door, batches
    if is_async(step.task.function):
        from parflow.runtime.flights import Flights

        flights = Flights(step, number, marker, fail, onward, timeout, attempts)
        return flights.door, flights
    return plain(step, number, marker, fail, onward, timeout, attempts), None


def _read_tables(
    source: Any, chunk: Chunk, piece: Piece, marker: Marker, letters: DeadLetters, door: Door
) -> tuple[bool, Cursor]:
    """Push the piece's records as the Arrow tables that they are read as; returns whether it ended early, and where."""
    import pyarrow as pa

    ordinal, first = piece.start.ordinal, piece.first
    stop = piece.stop if piece.stop is not None else 2**62
    for number in range(piece.start.part, len(chunk.parts)):
        part = chunk.parts[number]
        offset = max(part.start, piece.start.offset) if number == piece.start.part else part.start
        marker[PART], marker[OFFSET] = number, offset
        try:
            for row, batch in source.batches(part, offset, TABLE_ROWS):
                passed = max(0, min(batch.num_rows, first - ordinal))
                rows = batch.slice(passed, max(0, min(batch.num_rows, stop - ordinal) - passed))
                at = row + passed
                ordinal += passed
                if marker[STOP] and ordinal > first:
                    return True, Cursor(ordinal, number, at)
                marker[ORDINAL], marker[OFFSET] = ordinal, at
                if rows.num_rows:
                    door.table(pa.Table.from_batches([rows]), Places.counting((ordinal, number, at, 0), rows.num_rows))
                ordinal += rows.num_rows
                marker[STEP] = READING
                marker[ORDINAL], marker[OFFSET] = ordinal, at + rows.num_rows
                if ordinal >= stop:
                    return False, Cursor(ordinal, number, at + rows.num_rows)
        except Exception as error:  # noqa: BLE001 - the rest of this part can't be read: one dead letter for it
            if ordinal >= first:
                letters.add(0, error, part.path, "input")
            ordinal += 1
            marker[ORDINAL] = max(first, ordinal)
            if ordinal >= stop:
                break
    return False, Cursor(ordinal, len(chunk.parts), 0)


def _read(stage: Stage, chunk: Chunk, piece: Piece, context: Context, letters: DeadLetters, door: Door) -> tuple[bool, Cursor]:
    """Push the piece's records, one after the other; returns whether it ended early, and where."""
    source, marker, push = stage.source, context.marker, door.push
    if door.whole and hasattr(source, "batches"):
        return _read_tables(source, chunk, piece, marker, letters, door)
    decode = source.decode if source.decodes else None
    ordinal, first = piece.start.ordinal, piece.first
    stop = piece.stop if piece.stop is not None else 2**62
    for number in range(piece.start.part, len(chunk.parts)):
        part = chunk.parts[number]
        offset = max(part.start, piece.start.offset) if number == piece.start.part else part.start
        marker[PART], marker[OFFSET] = number, offset
        try:
            for offset, raw in source.read(part, offset, context.store):  # noqa: B020 - where it is now
                if ordinal < first:
                    ordinal += 1
                    continue
                if (marker[STOP] or letters.late) and ordinal > first:  # however far its first record is, a piece gets on
                    return True, Cursor(ordinal, number, offset)
                marker[OFFSET] = offset
                if decode is None:
                    push(raw)
                else:
                    marker[STEP] = DECODING
                    try:
                        record = decode(raw)
                    except Exception as error:  # noqa: BLE001 - whatever a decoder raises, it's this record's
                        letters.add(0, error, raw, "input")
                    else:
                        push(record)
                marker[STEP] = READING
                ordinal += 1
                marker[ORDINAL] = ordinal
                if ordinal >= stop:  # asked before the next one is read, which may be what kills
                    return False, Cursor(ordinal, number, offset)
        except StoreError as error:  # parflow's own object is damaged: no record's fault
            raise Broken("read", error) from error
        except Exception as error:  # noqa: BLE001 - the rest of this part can't be read: one dead letter for it
            if ordinal >= first:
                letters.add(0, error, part.path, "input")
            ordinal += 1
            marker[ORDINAL] = max(first, ordinal)
            if ordinal >= stop:
                break
    return False, Cursor(ordinal, len(chunk.parts), 0)


def _bytes(source: Any, chunk: Chunk, start: Cursor, end: Cursor) -> int:
    """Return the input bytes between two places of a chunk: an estimate for compressed files and items."""

    def position(at: Cursor) -> int:
        before = int(sum(source.size(part) for part in chunk.parts[: at.part]))
        if at.part >= len(chunk.parts):
            return before
        part = chunk.parts[at.part]
        whole = (part.size if part.stop is None else part.stop) - part.start
        share = min(max(0, at.offset - part.start), whole) / (whole or 1)
        inside: int = source.size(part)
        return before + int(share * inside)

    return max(0, position(end) - position(start))


def run_piece(stage: Stage, job: ChunkJob, context: Context, timeouts: Timeouts) -> Receipt:
    """Run a piece of a chunk and commit what it made.

    Parameters
    ----------
    stage : Stage
        The pipeline.
    job : ChunkJob
        Which records of which chunk.
    context : Context
        Store, names and marker.
    timeouts : sequence of float or None
        Seconds that one call of each numbered step may take; whoever watches the marker enforces them.

    Returns
    -------
    Receipt
        ``done``; ``stopped`` at a cursor because the marker asked for it; or ``died`` at a record that ran out of memory.

    Raises
    ------
    Broken
        When the stage can't run whatever the record.
    """
    piece, chunk, marker = job.piece, job.chunk, context.marker
    started, clock = time.time(), time.perf_counter()
    marker[STEP] = 0
    put(marker, (piece.first, piece.start.part, piece.start.offset, 0))
    source = copy.copy(stage.source)  # threads of a worker share the stage; each piece counts its own encodings
    source.reset()
    stage = replace(stage, source=source)
    if (here := site()) is not None:
        stage = placed(undoable(stage, here), here)
    letters = DeadLetters(stage, chunk, marker, context.windows)
    door, keeps, ends = _compile(stage, context, letters, timeouts, piece)
    results: list[Ref | None] = []
    files: list[SinkFile] = []
    try:
        early, end = _read(stage, chunk, piece, context, letters, door)
        for keeper in keeps:
            keeper.flush()
        marker[STEP] = CLOSING
        for output in ends:
            result, file = output.close()
            results.append(result)
            files += [file] if file else []
    except BaseException as error:
        at, step, reading = letters.in_hand(), marker[STEP], marker[STEP] == READING
        if reading and marker[HELD]:  # a step keeps records, which may be too many; where the next one begins is not known
            at, reading = Cursor(at.ordinal, piece.start.part, piece.start.offset), False
        for giving_up in (*keeps, *ends):
            giving_up.abort()
        if isinstance(error, Unproven):
            watch, spent = letters.watch, Tally(seconds=time.perf_counter() - clock)
            return Receipt("stopped", piece.start, tally=spent, steps=watch.steps, tripped=watch.tripped, started=started)
        if not isinstance(error, OutOfMemory):
            raise
        cause: Cause = "input" if reading else "memory"
        failure = letters.describe(step, RecordMemoryError(), cause, trace_of(error.__cause__ or error), None, at)
        return Receipt("died", cursor=at, failure=failure, tally=Tally(seconds=time.perf_counter() - clock), started=started)
    letters.items.sort(key=lambda failure: failure.ordinal)  # late ones come out of order
    return Receipt(
        "stopped" if early else "done",
        cursor=end if early else None,
        results=tuple(results),
        files=tuple(files),
        failures=keep("failures", letters.items, context.named("failures")) if letters.items else None,
        failure=letters.items[0] if letters.items else None,
        tally=Tally(
            end.ordinal - piece.first, len(letters.items), _bytes(source, chunk, piece.start, end), time.perf_counter() - clock
        ),
        encodings=source.encodings,
        started=started,
        steps=letters.watch.steps,
        tripped=letters.watch.tripped,
    )


def run_merge(stage: Stage, job: MergeJob, context: Context) -> Receipt:
    """Merge partial results, in the order given; the last merge of a reduction also finishes it.

    Raises
    ------
    Broken
        When the reducer's own code raises: a merge has no record to set aside.
    """
    started, clock = time.time(), time.perf_counter()
    output = stage.outputs[job.output]
    merge = _merge_buckets if output.kind == "group" else _merge
    try:
        data = merge(output.body, job, context.store)
    except Exception as error:
        raise Broken(output.name, error) from error
    result = keep_bytes(data, context)
    return Receipt("done", results=(result,), tally=Tally(seconds=time.perf_counter() - clock), started=started)


def _merge(reducer: Reducer, job: MergeJob, store: Any) -> bytes:
    state = None
    for number, ref in enumerate(job.inputs):
        partial = pickle.loads(store.get_checked(ref))
        state = partial if number == 0 else reducer.merge(state, partial)
    if not job.inputs:
        state = reducer.initial()
    return pickled(reducer.finish(state) if job.last else reducer.seal(state))


def _merge_buckets(reducer: Any, job: MergeJob, store: Any) -> bytes:
    """Merge one bucket of a keyed reduction; the last merge gives its rows, one after the other."""
    state = reducer.join(_segments(job, store, reducer.buckets))
    if job.last:
        return b"".join(map(pickled, reducer.rows(state)))
    return pickled(reducer.seal(state))


def _segments(job: MergeJob, store: Any, buckets: int) -> Iterator[bytes]:
    for ref in job.inputs:
        if job.level > 1:
            yield store.get_checked(ref)
        elif ref.inline is not None:
            yield segments.take(lambda start, stop, data=ref.inline: data[start:stop], job.bucket, buckets)  # type: ignore[misc]
        else:
            yield segments.take(lambda start, stop, key=ref.key: store.get_range(key, start, stop), job.bucket, buckets)  # type: ignore[misc]
