"""The sources' claims: each with the measurement that settles it, and a verdict that comes out of a rule."""

from muonwire.lab.catalog import choose, load_claims
from muonwire.lab.check import Check, Interval, Outcome
from muonwire.lab.claim import Claim, Setting
from muonwire.lab.inputs import INPUTS, captured
from muonwire.lab.run import LabConfig, run
from muonwire.lab.show import Pivot, Plot
from muonwire.lab.verdict import CONFIRMED, DEPENDS, REFUTED, UNDECIDED, Decision, all_needed, unanimous

__all__ = [
    "CONFIRMED",
    "DEPENDS",
    "INPUTS",
    "REFUTED",
    "UNDECIDED",
    "Check",
    "Claim",
    "Decision",
    "Interval",
    "LabConfig",
    "Outcome",
    "Pivot",
    "Plot",
    "Setting",
    "all_needed",
    "captured",
    "choose",
    "load_claims",
    "run",
    "unanimous",
]
