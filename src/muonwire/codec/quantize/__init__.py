"""Quantizers: the selected values to bytes and back."""

from muonwire.codec.quantize.base import Layout, Quantize
from muonwire.codec.quantize.codebook import Codebook
from muonwire.codec.quantize.floats import BFloat16, Float32, Float64
from muonwire.codec.quantize.integers import Int
from muonwire.codec.quantize.sign import Sign
from muonwire.codec.quantize.ternary import Ternary

__all__ = ["BFloat16", "Codebook", "Float32", "Float64", "Int", "Layout", "Quantize", "Sign", "Ternary"]
