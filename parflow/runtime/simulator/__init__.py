"""The coordinator on a virtual cluster: virtual clock, records, disk and store, and seeded faults.

What runs here is the coordinator that runs for real; only what it talks to is made up. A seed decides every fault, so a
failure is repeated by its number: ``python -m parflow.runtime.simulator --first 4711 --seeds 1``.

The "value" of a reduction is the names of the records in it, in order, with a bracket for each merge: a lost record, one
that counts twice, two in the wrong order or another shape of the tree all show in the result.
"""

from parflow.runtime.simulator.audit import Audit
from parflow.runtime.simulator.chance import random_faults, random_world
from parflow.runtime.simulator.simulation import Outcome, simulate
from parflow.runtime.simulator.truth import Truth, expected
from parflow.runtime.simulator.world import (
    BATCH_FAULTS,
    CALM,
    CAUSES,
    FATES,
    ROUGH,
    Fate,
    Faults,
    VirtualCall,
    VirtualGraph,
    VirtualRecord,
    VirtualStage,
    World,
)

__all__ = [
    "BATCH_FAULTS", "CALM", "CAUSES", "FATES", "ROUGH",
    "Audit", "Fate", "Faults", "Outcome", "Truth",
    "VirtualCall", "VirtualGraph", "VirtualRecord", "VirtualStage", "World",
    "expected", "random_faults", "random_world", "simulate",
]  # fmt: skip
