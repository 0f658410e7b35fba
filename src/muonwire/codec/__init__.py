"""Codecs: tensor to bytes and back, with the bytes as they go on the wire."""

from muonwire.codec.base import Codec, Encoded
from muonwire.codec.pack import Ans, Ranks
from muonwire.codec.pipeline import Pipeline
from muonwire.codec.quantize import BFloat16, Codebook, Float32, Float64, Int, Sign, Ternary
from muonwire.codec.select import All, NOfM, RandomK, TopBlocks, TopColumns, TopK, TopRows, Turns
from muonwire.codec.text import parse
from muonwire.codec.transform import Dct, Hadamard, LowRank, Projection, Rows, Tiles

__all__ = [
    "All",
    "Ans",
    "BFloat16",
    "Codebook",
    "Codec",
    "Dct",
    "Encoded",
    "Float32",
    "Float64",
    "Hadamard",
    "Int",
    "LowRank",
    "NOfM",
    "Pipeline",
    "Projection",
    "RandomK",
    "Ranks",
    "Rows",
    "Sign",
    "Ternary",
    "Tiles",
    "TopBlocks",
    "TopColumns",
    "TopK",
    "TopRows",
    "Turns",
    "parse",
]
