"""Transforms: tensor to blocks of coefficients, and back."""

from muonwire.codec.transform.base import Transform
from muonwire.codec.transform.dct import Dct
from muonwire.codec.transform.rows import Rows

__all__ = ["Dct", "Rows", "Transform"]
