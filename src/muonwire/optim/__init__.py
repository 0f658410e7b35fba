"""The one optimizer type, the routing of parameters to its groups, and local steps around any optimizer."""

from muonwire.optim.around import local_steps
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.routing import Route, Routing, route
from muonwire.optim.settings import Lifecycle, LocalSteps

__all__ = ["ChainOptimizer", "Lifecycle", "LocalSteps", "Route", "Routing", "local_steps", "route"]
