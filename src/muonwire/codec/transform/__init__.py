"""Transforms: tensor to blocks of coefficients, and back."""

from muonwire.codec.transform.base import Transform
from muonwire.codec.transform.chunks import Chunked
from muonwire.codec.transform.dct import Dct
from muonwire.codec.transform.hadamard import Hadamard
from muonwire.codec.transform.low_rank import LowRank
from muonwire.codec.transform.projection import Projection
from muonwire.codec.transform.rows import Rows
from muonwire.codec.transform.tiles import Tiles

__all__ = ["Chunked", "Dct", "Hadamard", "LowRank", "Projection", "Rows", "Tiles", "Transform"]
