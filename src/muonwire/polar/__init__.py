"""Polar factors: from a matrix to the nearest semi-orthogonal one.

>>> import torch
>>> q = polar(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), method="svd")
>>> torch.allclose(q @ q.mT, torch.eye(4), atol=1e-5)
True
"""

from muonwire.polar import quality, schedules
from muonwire.polar.adaptive import Report
from muonwire.polar.auto import METHODS, Explanation, adaptive, explain, polar, polar_list
from muonwire.polar.buffers import clear_buffers
from muonwire.polar.orthonormal import BASES, orthonormal_basis
from muonwire.polar.power import PowerFactors, initial_state, power_iteration
from muonwire.polar.processor import PROCESSORS, Processor, find_processor, set_processor
from muonwire.polar.products import ProductCount, count_products
from muonwire.polar.schedules import SCHEDULES, Schedule

__all__ = [
    "BASES",
    "METHODS",
    "PROCESSORS",
    "SCHEDULES",
    "Explanation",
    "PowerFactors",
    "Processor",
    "ProductCount",
    "Report",
    "Schedule",
    "adaptive",
    "clear_buffers",
    "count_products",
    "explain",
    "find_processor",
    "initial_state",
    "orthonormal_basis",
    "polar",
    "polar_list",
    "power_iteration",
    "quality",
    "schedules",
    "set_processor",
]
