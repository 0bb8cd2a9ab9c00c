"""Effects that happen once: `once`, and steps that can be undone."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from parflow.core.forms import inner, is_async, within
from parflow.core.plan import Stage, Step
from parflow.errors import EffectInDoubtError, InDoubt, RecordError, UndoFailedError, UndoneError, UsageError
from parflow.model import ChunkJob, Failure, digest
from parflow.nodes import Task
from parflow.runtime.here import INSIDE, TRIES, Inside, Site, ancestors, context, site, with_function
from parflow.runtime.marker import GUESS, STEP, Marker, put, take
from parflow.runtime.values import pickled
from parflow.storage.effects import AGAIN, Effect, Effects, Held

InDoubtWay = Literal["stop", "retry"]
WAYS = ("stop", "retry")
UNDO_TRIES = 3
"""How often an undo that raises is tried in all."""
PATIENCE = 1.0
"""Seconds for which an undo waits for somebody who still works on the effect, perhaps the coroutine whose time was over."""


def _same(made: Any) -> Any:
    return made


@dataclass(frozen=True, slots=True)
class What:
    """An effect that is wanted: where it's kept, what its idempotency key is made of, and what its file says of it.

    ``released`` is called when its function raises. ``redrive`` counts how often its record was run again though it had failed:
    what was undone since is not done anew.
    """

    effects: Effects
    base: str
    effect: Effect
    released: Callable[[], object] = bool
    redrive: int | None = None

    def begin(self, held: Held) -> bool:
        """Claim the effect; False when it's done already.

        Raises
        ------
        EffectInDoubtError
            When nobody knows whether it's done.
        UndoneError
            When its record failed in an earlier attempt.
        """
        was = held.effect
        if was.stands:
            return False
        if was.state == "undoing" and was.in_doubt == "retry":  # its undoing is made again, by whoever sets the record aside
            raise UndoneError(was.name, was.reason or "its undoing was cut off")
        if was.state == "undoing" or (was.doubtful and self.effect.in_doubt == "stop"):
            raise doubt(was)
        generation = was.generation
        if was.state == "undone":
            if self.redrive is not None and generation >= self.redrive:
                raise UndoneError(was.name, was.reason or "its child died")
            generation = was.generation + 1 if self.redrive is None else self.redrive
        key = digest(f"{self.base}/{generation}".encode()) if generation else self.base  # to the service it's another thing
        held.effect = replace(self.effect, generation=generation, key=key)
        held.write("claimed")
        return True

    @contextmanager
    def claimed(self, held: Held) -> Iterator[None]:
        """Be inside of the effect; when that raises, say what is known of it."""
        token = INSIDE.set(Inside(held.effect, held.effect.key, INSIDE.get()))
        try:
            yield
        except InDoubt as error:
            held.write("doubt", reason=f"its function says that it doesn't know: {error}")
            if held.effect.in_doubt == "retry":  # then it's an exception like any other: a retry may want it
                self.released()
                raise
            raise doubt(held.effect) from error
        except Exception as error:
            held.write("released", reason=_said(error))
            self.released()
            raise
        except BaseException as error:
            held.write("doubt", reason=f"it was ended by {_said(error)}")
            raise
        finally:
            INSIDE.reset(token)

    def run(self, call: Callable[[], Any]) -> Any:
        """Do it, unless it's done; returns what it gave the first time."""
        self._check()
        with self.effects.hold(self.effect.id) as held:
            if not self.begin(held):
                return pickle.loads(held.effect.result)
            with self.claimed(held):
                made = call()
                result = _result(made)
            held.write("done", result=result, reason="")
        return made

    async def fly(self, call: Callable[[], Any], shape: Callable[[Any], Any] = _same) -> Any:
        """Do it, as `run` does, and wait for it."""
        import asyncio

        self._check()
        while (held := self.effects.try_hold(self.effect.id)) is None:  # noqa: ASYNC110 - another process has it
            await asyncio.sleep(AGAIN)
        with held:
            if not self.begin(held):
                return pickle.loads(held.effect.result)
            with self.claimed(held):
                made = call()
                made = shape([one async for one in made] if hasattr(made, "__aiter__") else await made)
                result = _result(made)
            held.write("done", result=result, reason="")
        return made

    def _check(self) -> None:
        inside = INSIDE.get()
        if inside is not None and inside.within(self.effect.id):
            raise UsageError(f"the effect {self.effect.name!r} would wait for itself: it's done within its own function")


def doubt(effect: Effect) -> EffectInDoubtError:
    """Return the error that says why an effect is in doubt."""
    doing = "its undoing" if effect.state == "undoing" else "it"
    died = f"{doing} had begun when its process ({effect.owner}) died"
    return EffectInDoubtError(effect.name, effect.reason or died, effect.key)


def _said(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except Exception:  # noqa: BLE001 - a stranger's __str__ may raise anything
        return type(error).__name__


def _result(made: Any) -> bytes:
    if hasattr(made, "__await__"):
        raise InDoubt("it gave something to await: give once the async function itself, and await what once returns")
    try:
        return pickled(made)
    except Exception as error:
        raise InDoubt(f"it was done, but what it returned can't be pickled ({error})") from error


# --- once ------------------------------------------------------------------------------------------------------------------


def once(key: Any, /, *args: Any, in_doubt: InDoubtWay = "stop", **kwargs: Any) -> Any:
    """Call a function that has an effect outside, once: later calls, retries and resumes get what it returned the first time.

    Written ``once(fn, *args)`` or ``once(key, fn, *args)``. The effect is recorded before the function is called, and when it
    has returned. An exception says that nothing was done, and the next attempt calls it again (`InDoubt` says that the function
    doesn't know). A process that dies between the two leaves the effect in doubt.

    Within the function ``context().idempotency_key`` is the effect's: hand it to the service, if that takes one. Outside of a
    run the function is just called.

    Parameters
    ----------
    key : str, optional
        Names the effect within the run; whoever does the same elsewhere waits for it, and gets its result. By default it's this
        call of the step for this record, in which only one effect may go without a key.
    *args, **kwargs
        The function, and what it's called with. An ``async`` one gives something to await.
    in_doubt : {"stop", "retry"}
        What is done about an effect in doubt: raise, so that somebody looks, or call the function again; which is right where
        the service knows the idempotency key, or where twice does no harm.

    Returns
    -------
    object
        What the function returned the first time; it has to be picklable.

    Raises
    ------
    EffectInDoubtError
        When nobody knows whether it happened.
    StoreError
        When the run's store is no folder, or can't be written.
    UsageError
        When ``in_doubt`` is another word, there's no function, or the key is needed.

    Examples
    --------
    >>> import parflow as pf
    >>> def pay(order):
    ...     receipt = pf.once(f"pay-{order}", lambda: f"paid {order}")
    ...     again = pf.once(f"pay-{order}", lambda: "never called")
    ...     return receipt, again
    >>> import tempfile
    >>> [*pf.items([7]).map(pay).run(home=tempfile.mkdtemp(), isolation="inline").result()]
    [('paid 7', 'paid 7')]
    >>> pay(7)
    ('paid 7', 'never called')
    """
    own, function, args = (None, key, args) if callable(key) else (key, args[0] if args else None, args[1:])
    if not callable(function) or not (own is None or isinstance(own, str)):
        raise UsageError(f"once({key!r}, …): write once(function, …) or once('a key', function, …)")
    if in_doubt not in WAYS:
        raise UsageError(f"in_doubt={in_doubt!r} is unknown; write 'stop' or 'retry'")
    here = site()
    if here is None:
        return function(*args, **kwargs)
    what = _asked(here, own, in_doubt)
    return (what.fly if is_async(function) else what.run)(lambda: function(*args, **kwargs))


def _asked(here: Site, own: str | None, way: str) -> What:
    """Say which effect is meant."""
    at = context()
    released: Callable[[], object] = bool
    if own is None:
        base = at.idempotency_key
        again = (base, TRIES.get())
        if again in here.asked:
            raise UsageError(
                f"step {at.step!r} has several effects for one record: give each a key, once('a key', function, …)"
            )
        here.asked.add(again)
        released = partial(here.asked.discard, again)
        place = digest(f"once/{base}".encode())
    else:
        base = digest(f"{here.run_id}/once/{own}".encode())
        place = digest(f"key/{own}".encode())
    effect = Effect(f"{place[:2]}/{place[2:]}/once", name=own or at.step, record=at.record, step=at.step, in_doubt=way)
    return What(Effects(here.store), base, effect, released)


# --- steps and calls that can be undone ---------------------------------------------------------------------------------


def step_effect(here: Site, task: Task) -> What:
    """Say which effect the call of a task is that can be undone, for the record in hand on this thread."""
    call = here.now()
    base = here.key(call)
    label = here.label(call.step)
    name = effect_name(here.record_key(call.place), call.step)
    effect = Effect(
        name, name=label, record=here.record(call.place), step=label, unit=here.unit, number=call.step, in_doubt=task.in_doubt
    )
    return What(Effects(here.store), base, effect, redrive=here.job.redrive if isinstance(here.job, ChunkJob) else None)


def effect_name(record: str, step: int) -> str:
    """Name the effect of a step for a record."""
    return f"{record_folder(record)}/step-{step}"


def record_folder(record: str) -> str:
    """Name what holds the effects of a record, or of a call, given its identity."""
    return f"{record[:2]}/{record[2:]}"


def undoable(stage: Stage, here: Site) -> Stage:
    """Return a stage whose steps that can be undone are done once."""
    if not any(step.task.compensate for step in stage.steps):
        return stage
    return replace(stage, steps=tuple(_once(step, here) if step.task.compensate else step for step in stage.steps))


def _once(step: Step, here: Site) -> Step:
    function, task = inner(step.task.function), step.task
    shape = list if step.kind == "flat_map" else _same
    if is_async(step.task.function):

        async def fly(record: Any) -> Any:
            return await step_effect(here, task).fly(lambda: function(record), shape)

        return with_function(step, within(step.task.function, fly))

    def run(record: Any) -> Any:
        return step_effect(here, task).run(lambda: shape(function(record)))

    return with_function(step, run)


def call_once(task: Task, call: Callable[[], Any]) -> Any:
    """Make a call of a task; once, if it can be undone and this is a run."""
    here = site()
    return call() if here is None or task.compensate is None else step_effect(here, task).run(call)


# --- undoing ---------------------------------------------------------------------------------------------------------------


def undo(effects: Effects, name: str, compensate: Callable[[Any], Any] | None, reason: str = "") -> RecordError | None:
    """Undo an effect, once, for a ``reason``; returns why it is not undone, unless there is nothing (left) to undo."""
    held = effects.try_hold(name, PATIENCE)
    if held is None:
        at_work = effects.look(name)
        return doubt(replace(at_work, reason=f"{at_work.owner} works on it still"))
    with held:
        was = held.effect
        if was.state == "undoing" and was.in_doubt == "retry":
            held.effect = was = replace(was, state="done")
        if was.doubtful:
            return doubt(was)
        if not was.stands:
            return None
        if compensate is None:
            return UndoFailedError(was.name, "its task has no compensate=", was.key)
        for _ in range(UNDO_TRIES):
            held.write("undoing", reason="")
            try:
                _compensated(compensate, held.effect)
            except InDoubt as error:
                held.write("undoing", reason=f"its undoing says that it doesn't know: {error}")
                return doubt(held.effect)
            except Exception as error:  # noqa: BLE001 - user code may raise anything
                held.write("undo failed", reason=_said(error))
            else:
                held.write("undone", reason=reason, result=b"")
                return None
        return UndoFailedError(was.name, f"it was tried {UNDO_TRIES} times, at last: {held.effect.reason}", was.key)


def _compensated(compensate: Callable[[Any], Any], effect: Effect) -> None:
    """Call the function that undoes an effect; its idempotency key is that of the undoing."""
    token = INSIDE.set(Inside(effect, digest(f"undo/{effect.key}".encode())))
    try:
        result = pickle.loads(effect.result)
        if is_async(compensate):
            from parflow.runtime.flights import LOOP

            LOOP.complete(lambda: compensate(result))
        else:
            compensate(result)
    finally:
        INSIDE.reset(token)


def undo_record(stage: Stage, here: Site, step: int, record: str, reason: str = "") -> list[RecordError]:
    """Undo what a record had done up to a step that it failed in, the latest first; returns why some of it is not."""
    effects = Effects(here.store)
    index = step - 1 if step <= len(stage.steps) else stage.outputs[step - 1 - len(stage.steps)].parent
    undos = {1 + above: stage.steps[above].task.compensate for above in ancestors(stage, index)}
    found = [effects.look(effect_name(record, number)) for number, compensate in undos.items() if compensate is not None]
    whys = [undo(effects, effect.id, undos[effect.number], reason) for effect in newest_first(found) if effect.state != "free"]
    return [why for why in whys if why is not None]


def newest_first(effects: Iterable[Effect]) -> list[Effect]:
    """Sort effects into the order in which they are undone."""
    return sorted(effects, key=lambda effect: (effect.at, effect.number), reverse=True)


def after_undoing(letter: Failure, stage: Stage, step: int, marker: Marker) -> Failure:
    """Undo what the record in hand, which failed, had done in the steps before; its dead letter tells what stands."""
    here = site()
    if here is None or not any(one.task.compensate for one in stage.steps):
        return letter
    place = take(marker)
    if place[3] & GUESS:
        return _told(letter, ["what was done for it in earlier steps stands: of its batch, nobody knows which record it is"])
    whys = undo_record(stage, here, step, here.record_key(place), f"{letter.error}: {letter.message}"[:300])
    put(marker, place)  # coroutines that went on meanwhile named theirs
    marker[STEP] = step
    return _told(letter, whys)


def _told(letter: Failure, whys: Sequence[object]) -> Failure:
    return replace(letter, message=" | ".join([letter.message, *map(str, whys)])) if whys else letter
