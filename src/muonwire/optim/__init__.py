"""Optimizers out of stages, the routing of parameters to them, and local steps around them."""

from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.local_steps import LocalSteps, shared_weights
from muonwire.optim.routing import Route, Routing, route

__all__ = ["ChainOptimizer", "LocalSteps", "Route", "Routing", "route", "shared_weights"]
