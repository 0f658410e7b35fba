"""The stages an update passes through, from gradient to weight, and the chain they make."""

from muonwire.stages.adam import Adam
from muonwire.stages.anderson import Anderson
from muonwire.stages.base import Context, Stage, State, TalkingStage
from muonwire.stages.by_rate import ByRate
from muonwire.stages.chain import Chain, chain, named_chain
from muonwire.stages.delayed import Delayed
from muonwire.stages.every import Every
from muonwire.stages.exchange import Exchange
from muonwire.stages.feedback import EF14, EF21, Feedback, NoFeedback, ResidualMomentum
from muonwire.stages.keep_norm import KeepNorm
from muonwire.stages.large_only import LargeOnly
from muonwire.stages.layout import MatrixLayout
from muonwire.stages.mean import Mean
from muonwire.stages.momentum import Momentum
from muonwire.stages.plain import Plain, plain
from muonwire.stages.polar import Polar
from muonwire.stages.power import Dion, PowerSGD
from muonwire.stages.predict import Predicted
from muonwire.stages.rounds import Reply, Request, Rounds
from muonwire.stages.row_normalize import RowNormalize
from muonwire.stages.scale import Scale
from muonwire.stages.serve import Serve
from muonwire.stages.sign import Sign
from muonwire.stages.weight_polar import WeightPolar

__all__ = [
    "EF14",
    "EF21",
    "Adam",
    "Anderson",
    "ByRate",
    "Chain",
    "Context",
    "Delayed",
    "Dion",
    "Every",
    "Exchange",
    "Feedback",
    "KeepNorm",
    "LargeOnly",
    "MatrixLayout",
    "Mean",
    "Momentum",
    "NoFeedback",
    "Plain",
    "Polar",
    "PowerSGD",
    "Predicted",
    "Reply",
    "Request",
    "ResidualMomentum",
    "Rounds",
    "RowNormalize",
    "Scale",
    "Serve",
    "Sign",
    "Stage",
    "State",
    "TalkingStage",
    "WeightPolar",
    "chain",
    "named_chain",
    "plain",
]
