"""Many recipes side by side: the same work for each, the bytes counted, one report."""

from muonwire.compare.comparison import compare
from muonwire.compare.config import PRESETS, CompareConfig

__all__ = ["PRESETS", "CompareConfig", "compare"]
