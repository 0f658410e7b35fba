"""Selections: which coefficients go on the wire."""

from muonwire.codec.select.base import Groups, Select
from muonwire.codec.select.blocks import TopBlocks
from muonwire.codec.select.everything import All
from muonwire.codec.select.lines import TopColumns, TopRows
from muonwire.codec.select.n_of_m import NOfM
from muonwire.codec.select.random import RandomK
from muonwire.codec.select.topk import TopK
from muonwire.codec.select.turns import Turns

__all__ = [
    "All",
    "Groups",
    "NOfM",
    "RandomK",
    "Select",
    "TopBlocks",
    "TopColumns",
    "TopK",
    "TopRows",
    "Turns",
]
