"""How your own flows behave when things go wrong: scripted faults, and chaos."""

from parflow.testing.chaos import Chaos, Kill, Moment, Survived
from parflow.testing.faults import ANY, Fault, Faults, Happened

__all__ = ["ANY", "Chaos", "Fault", "Faults", "Happened", "Kill", "Moment", "Survived"]
