"""Selections: which coefficients go on the wire."""

from muonwire.codec.select.base import Groups, Select
from muonwire.codec.select.everything import All
from muonwire.codec.select.topk import TopK

__all__ = ["All", "Groups", "Select", "TopK"]
