"""The rules of calls and branches: the part of the audit that knows of the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from parflow.core.entries import Called, Decided, Grown
from parflow.core.history import RunState
from parflow.core.signals import Submit
from parflow.model import Address, CallJob, Failure, Job, Receipt
from parflow.runtime.simulator.rules import must
from parflow.runtime.simulator.truth import Cast, Place, Truth
from parflow.runtime.simulator.wants import Wants
from parflow.runtime.simulator.world import CAUSES, VirtualCall, VirtualStage, World, label_of, task_name


class Branches:
    """Books of what is wanted, and what becomes of calls.

    Parameters
    ----------
    world, state, wants, cast
        The audit's own; ``state`` has no entry yet.
    """

    def __init__(self, world: World, state: RunState, wants: Wants, cast: Cast) -> None:
        self.truth = Truth(world)
        self.state, self.wants, self.cast = state, wants, cast
        self.wanted: set[int] = set()
        self.failed: set[int] = set()  # by this coordinator
        self.suspects: set[int] = set()
        self.cancelled: list[Submit] = []

    def begin(self) -> None:
        """Forget what an earlier coordinator wanted."""
        self.failed.clear()
        self.wanted = self.wants.wanted()

    def look(self) -> None:
        """Note what is wanted now; what was wanted stays so, until it is cancelled."""
        self.wanted |= self.wants.wanted()

    def suspect(self, returned: Iterable[tuple[Job, Receipt]]) -> None:
        """Note the calls that were in hand when their child ended."""
        for job, receipt in returned:
            died = receipt.status == "died" and receipt.cursor is not None and receipt.failure is not None
            if isinstance(job, CallJob) and died and receipt.failure and receipt.failure.cause != "timeout":
                self.suspects.add(job.call)

    # --- calls ------------------------------------------------------------------------------------------------------------

    def may_call(self, job: CallJob) -> None:
        """See that a call may be made."""
        call = self.state.calls[job.call]
        must(call.facts.kind in ("call", "choose") and job.task == call.facts.task, "a call is one of its task", job)
        must(self.wants.there(call.facts.needs), "a call runs on what is durable", job)
        must(not (call.results or call.grown or call.choice is not None), "what has ended is not made again", job)
        must(job.alone == (job.call in self.suspects), "who was in hand when a child ended is tried alone", job)

    def called(self, entry: Called | Grown, receipt: Receipt | None, *, alone: bool) -> None:
        """See that what is written of a call is what came back, and is written once."""
        call, place = self.state.calls[entry.call], self.cast.calls[entry.call]
        virtual, ended = place.node, call.results or call.grown or call.choice is not None or ~entry.call in self.failed
        must(not ended, "a call's result is written once", entry)
        if isinstance(entry, Grown):
            must(receipt is None or (receipt.growth and receipt.growth.code == entry.code), "what grows came back", entry)
            return
        cause = CAUSES.get(virtual.fate)
        if entry.failure is not None:
            must(entry.failure.cause == cause, "only the guilty fail", entry)
            must(receipt is None or alone or cause in ("exception", "timeout"), "a crash fails only when it was alone", entry)
            self.failed.add(~entry.call)
            return
        must(cause is None and virtual.grows is None, "the guilty fail", entry)
        must(receipt is None or (receipt.results, receipt.choice) == (entry.results, entry.choice), "a result came back", entry)
        if virtual.kind == "choose":
            must(entry.choice == virtual.choice and not entry.results, "a choice is what was chosen", entry)
        else:
            must(len(entry.results) == virtual.results and entry.choice is None, "a call has all of its results", entry)

    def grown(self, entry: Grown) -> None:
        """See that what grew has the numbers of what it rests on."""
        virtual, label = self.cast.calls[entry.call].node.grows, self.cast.calls[entry.call].label + "/"
        stages, calls, tasks = len(self.cast.stages), len(self.cast.calls), self.state.tasks
        self.cast.grow(entry.call)
        must(virtual is not None and len(self.state.calls) == len(self.cast.calls), "what grew is added", entry)
        if virtual is None:
            return

        def same(given: tuple[Address, ...], meant: tuple[Address, ...]) -> None:
            named = [(label_of(label, node), item) for node, item in meant]
            must(self.cast.names(given) == named, "what grew is numbered as the run goes on", entry)

        for stage, made in zip(virtual.stages, self.state.stages[stages:], strict=True):
            same(made.facts.needs, stage.needs)
            same((made.facts.base,) if made.facts.base else (), (stage.base,) if stage.base else ())
        for call, state in zip(virtual.calls, self.state.calls[calls:], strict=True):
            same(state.facts.needs, call.needs)
            same(state.facts.arms, call.arms)
            named = call.decides or tasks[state.facts.task].name == task_name(label, call.task)
            must(named, "what grew calls its own tasks", entry)
        same(entry.results, virtual.results)

    # --- decisions ----------------------------------------------------------------------------------------------------------

    def decided(self, entry: Decided, *, live: bool) -> None:
        """See that a decision is taken once, is right, rests on what is durable, and ends what nobody wants any more."""
        call, place = self.state.calls[entry.call], self.cast.calls[entry.call]
        virtual, arms = place.node, call.facts.arms
        must(call.decided is None, "a decision is taken once", entry)
        must(virtual.decides and (not live or ~entry.call in self.wanted), "only what is wanted is decided", entry)
        good = [arm for arm, address in enumerate(virtual.arms) if self.truth.good(place.graph, address)]
        must(set(entry.picked) <= set(good), "only what succeeds is picked", entry)
        must([*entry.picked] == sorted(set(entry.picked)), "branches are picked once, in order", entry)
        must(not live or self.wants.there(arms[arm] for arm in entry.picked), "a decision rests on what is durable", entry)
        if virtual.kind == "settle":
            must([*entry.picked] == good, "to settle is to wait for all", entry)
            must(len(good) + len(entry.failures) == len(arms), "to settle is to tell of all", entry)
        else:
            must(len(entry.picked) == call.facts.count, "as many are picked as asked for", entry)
        for arm, failure in entry.failures.items():
            must(int(arm) not in good, "only what failed is told of as failed", entry)
            must(self._is_of(failure, arms[int(arm)]), "a failure is that of somebody the branch rests on", entry)
        if live:
            self._swept(entry)

    def _is_of(self, failure: Failure, arm: Address) -> bool:
        for node in self.wants.rests_on(arm[0]):
            if node < 0 and self.state.calls[~node].failure == failure:
                return True
            if node >= 0 and failure.error == "TooManyFailuresError" and failure.step == self.state.stages[node].facts.name:
                return not self._is_good(node)
        return False

    def _swept(self, entry: Decided) -> None:
        """See that those are cancelled whom nobody wants any more, and only they."""
        state, call = self.state, self.state.calls[entry.call]
        call.decided = entry  # as it is about to be
        left = self.wants.wanted(still=True)
        call.decided = None
        gone = self.wanted - left
        must(gone >= set(entry.cancelled), "only what nobody wants is cancelled", entry)
        unfinished = {node for node in gone if not self._is_finished(node, any) and self._is_good(node)}
        must(unfinished <= set(entry.cancelled), "what nobody wants any more is cancelled", entry, unfinished)
        must(not any(self._is_finished(node, all) for node in entry.cancelled), "what is finished is not cancelled", entry)
        self.wanted = left
        self.suspects -= {~node for node in entry.cancelled}  # whoever is wanted again begins anew
        must(state.calls[entry.call] is call, "a decision is taken once", entry)

    def _is_good(self, node: int) -> bool:
        place: Place[VirtualStage] | Place[VirtualCall] = self.cast.stages[node] if node >= 0 else self.cast.calls[~node]
        return self.truth.good(place.graph, (place.number, 0))

    def _is_finished(self, node: int, which: Callable[[Iterable[bool]], bool]) -> bool:
        outputs = range(len(self.state.stages[node].facts.kinds)) if node >= 0 else range(1)
        return which(self.wants.there([(node, output)]) for output in outputs)

    def check(self, flying: Iterable[Submit], *, ending: bool, quiet: bool) -> None:
        """See that what runs is wanted, what was cancelled isn't and, when all is durable (``quiet``), all is decided."""
        for submit in self.cancelled:
            idle = [job for job in submit.jobs if job.node not in self.wanted or self._has_failed(job.node)]
            must(idle, "only what nobody wants is cancelled", submit)
        self.cancelled.clear()
        if not ending:
            for submit in flying:
                must(all(job.node in self.wanted for job in submit.jobs), "what nobody wants any more is cancelled", submit)
                must(not any(job.node in self.failed for job in submit.jobs), "what has failed is cancelled", submit)
            for node in self.wanted if quiet else ():
                must(node >= 0 or not self._is_due(~node), "a decision is taken once it can be", node)

    def _is_due(self, number: int) -> bool:
        call = self.state.calls[number]
        if call.facts.kind not in ("race", "quorum") or call.decided is not None:
            return False
        return sum(self.wants.there([arm]) for arm in call.facts.arms) >= call.facts.count

    def _has_failed(self, node: int) -> bool:
        if node < 0:
            return node in self.failed
        return not self._is_good(node)
