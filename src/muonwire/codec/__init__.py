"""Codecs: tensor to bytes and back, with the bytes as they go on the wire."""

from muonwire.codec.base import Codec, Encoded
from muonwire.codec.pack import Ans, Bitmap, Bits, Ranks, Rice
from muonwire.codec.pipeline import Pipeline
from muonwire.codec.quantize import BFloat16, Float32, Sign
from muonwire.codec.select import All, TopK
from muonwire.codec.text import parse
from muonwire.codec.transform import Dct, Rows

__all__ = [
    "All",
    "Ans",
    "BFloat16",
    "Bitmap",
    "Bits",
    "Codec",
    "Dct",
    "Encoded",
    "Float32",
    "Pipeline",
    "Ranks",
    "Rice",
    "Rows",
    "Sign",
    "TopK",
    "parse",
]
