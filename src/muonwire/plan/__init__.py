"""A plan before the run: from a model and a link to a table of recipes, with bytes, times, money and what they cost in loss."""

from muonwire.plan.candidates import CANDIDATES, Candidate
from muonwire.plan.loss import Cost, expected_cost
from muonwire.plan.machine import Machine, as_told, measured
from muonwire.plan.model import PlannedModel, of_task, read_model
from muonwire.plan.planner import Line, Planner, Setting
from muonwire.plan.rates import Rates

__all__ = [
    "CANDIDATES",
    "Candidate",
    "Cost",
    "Line",
    "Machine",
    "PlannedModel",
    "Planner",
    "Rates",
    "Setting",
    "as_told",
    "expected_cost",
    "measured",
    "of_task",
    "read_model",
]
