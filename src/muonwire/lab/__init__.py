"""The claims of five public notes: each with the measurement that settles it, and a verdict that comes out of a rule."""

from muonwire.lab.engine.catalog import choose, load_claims
from muonwire.lab.engine.check import Check, Interval, Outcome, Reading, Row, Value
from muonwire.lab.engine.claim import Claim, Note, Setting
from muonwire.lab.engine.input import Input
from muonwire.lab.engine.run import LabConfig, run
from muonwire.lab.engine.show import Excerpts, Pivot, Plot
from muonwire.lab.engine.verdict import (
    CONFIRMED,
    DEPENDS,
    REFUTED,
    UNDECIDED,
    Decision,
    all_needed,
    unanimous,
)

__all__ = [
    "CONFIRMED",
    "DEPENDS",
    "REFUTED",
    "UNDECIDED",
    "Check",
    "Claim",
    "Decision",
    "Excerpts",
    "Input",
    "Interval",
    "LabConfig",
    "Note",
    "Outcome",
    "Pivot",
    "Plot",
    "Reading",
    "Row",
    "Setting",
    "Value",
    "all_needed",
    "choose",
    "load_claims",
    "run",
    "unanimous",
]
