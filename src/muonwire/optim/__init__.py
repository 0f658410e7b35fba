"""Optimizers out of stages, the routing of parameters to them, and local steps and look-ahead around them."""

from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.estimate import estimate_bytes
from muonwire.optim.local_steps import LocalSteps
from muonwire.optim.look_ahead import LookAhead
from muonwire.optim.routing import Route, Routing, route
from muonwire.optim.shared import shared_weights

__all__ = [
    "ChainOptimizer",
    "LocalSteps",
    "LookAhead",
    "Route",
    "Routing",
    "estimate_bytes",
    "route",
    "shared_weights",
]
