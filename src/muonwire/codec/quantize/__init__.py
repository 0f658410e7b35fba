"""Quantizers: the selected values to bytes and back."""

from muonwire.codec.quantize.base import Layout, Quantize
from muonwire.codec.quantize.floats import BFloat16, Float32
from muonwire.codec.quantize.sign import Sign

__all__ = ["BFloat16", "Float32", "Layout", "Quantize", "Sign"]
