"""What an address stands for in a run: where the value is that a call or a step is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from parflow.core.history import RunState
from parflow.core.state import CallState, StageState
from parflow.model import Address, Outcome, Ref, quick


@quick
@dataclass(frozen=True, slots=True)
class Binding:
    """Where a value is, and how it is made of what is there.

    form
        ``value``: one pickled object. ``records``: a list of those pickled one after the other in ``refs``. ``list``: of the
        values of ``parts``. ``outcome``: an `Outcome` of the one part. ``data``: at hand.
    """

    form: Literal["value", "records", "list", "outcome", "data"]
    refs: tuple[Ref, ...] = ()
    parts: tuple[Binding, ...] = ()
    data: Any = None

    def load(self, read: Callable[[Ref], Any], read_all: Callable[[tuple[Ref, ...]], Any]) -> Any:
        """Return the value; ``read`` opens one pickled object, ``read_all`` the records in several places."""
        match self.form:
            case "value":
                return read(self.refs[0])
            case "records":
                return read_all(self.refs)
            case "list":
                return [part.load(read, read_all) for part in self.parts]
            case "outcome":
                return Outcome(self.parts[0].load(read, read_all))
            case _:
                return self.data


def bind(state: RunState, address: Address) -> Binding:
    """Return where the value at an address is, once it is available."""
    node, item = address
    if node >= 0:
        return _of_stage(state.stages[node], item)
    call = state.calls[~node]
    while (onward := _onward(call, item)) is not None:
        node, item = onward
        if node >= 0:
            return _of_stage(state.stages[node], item)
        call = state.calls[~node]
    if call.decided is None:
        return Binding("value", (call.results[item],))
    if call.facts.kind == "quorum":
        return Binding("list", parts=tuple(bind(state, call.facts.arms[arm]) for arm in call.decided.picked))
    return Binding("list", parts=tuple(_outcomes(state, call)))


def _onward(call: CallState, item: int) -> Address | None:
    """Return the address whose value is the call's own, if it has none itself."""
    if call.grown:
        return call.grown[item]
    if call.choice is not None:
        return call.facts.arms[call.choice]
    if call.decided is not None and call.facts.kind == "race":
        return call.facts.arms[call.decided.picked[0]]
    return None


def _outcomes(state: RunState, call: CallState) -> Iterator[Binding]:
    assert call.decided is not None
    for arm, address in enumerate(call.facts.arms):
        failure = call.decided.failures.get(str(arm))
        if failure is not None:
            yield Binding("data", data=Outcome(failure=failure))
        else:
            yield Binding("outcome", parts=(bind(state, address),))


def _of_stage(stage: StageState, output: int) -> Binding:
    match stage.facts.kinds[output]:
        case "sink":
            return Binding("data", data=stage.published[output])
        case "collect" | "group":
            return Binding("records", stage.kept(output))
        case _:
            root = stage.root(output)
            assert root is not None
            return Binding("value", (root,))
