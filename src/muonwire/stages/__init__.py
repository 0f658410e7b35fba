"""The stages an update passes through, from gradient to weight, and the chain they make."""

from muonwire.stages.adam import Adam
from muonwire.stages.base import Context, ExchangeStage, Stage, State
from muonwire.stages.chain import Chain, chain, named_chain
from muonwire.stages.exchange import Exchange
from muonwire.stages.feedback import EF14, EF21, Feedback, NoFeedback, ResidualMomentum
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.mean import Mean
from muonwire.stages.momentum import Momentum
from muonwire.stages.polar import Polar
from muonwire.stages.rounds import Reply, Request
from muonwire.stages.scale import Scale
from muonwire.stages.sign import Sign

__all__ = [
    "EF14",
    "EF21",
    "Adam",
    "Chain",
    "Context",
    "Exchange",
    "ExchangeStage",
    "Feedback",
    "MatrixLayout",
    "Mean",
    "Momentum",
    "NoFeedback",
    "Polar",
    "Reply",
    "Request",
    "ResidualMomentum",
    "Scale",
    "Sign",
    "Stage",
    "State",
    "chain",
    "named_chain",
]
