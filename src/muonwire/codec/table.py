"""The parts of codecs, a line each, by their slot: what is imported here is known to ``parse`` by its ``name``."""
# ruff: noqa: I001

from muonwire.codec.transform import Rows as Rows
from muonwire.codec.transform import Tiles as Tiles
from muonwire.codec.transform import Dct as Dct
from muonwire.codec.transform import Hadamard as Hadamard
from muonwire.codec.transform import Projection as Projection
from muonwire.codec.transform import LowRank as LowRank

from muonwire.codec.select import All as All
from muonwire.codec.select import TopK as TopK
from muonwire.codec.select import RandomK as RandomK
from muonwire.codec.select import Turns as Turns
from muonwire.codec.select import TopRows as TopRows
from muonwire.codec.select import TopColumns as TopColumns
from muonwire.codec.select import TopBlocks as TopBlocks
from muonwire.codec.select import NOfM as NOfM

from muonwire.codec.quantize import Float32 as Float32
from muonwire.codec.quantize import BFloat16 as BFloat16
from muonwire.codec.quantize import Float64 as Float64
from muonwire.codec.quantize import Sign as Sign
from muonwire.codec.quantize import Int as Int
from muonwire.codec.quantize import Codebook as Codebook
from muonwire.codec.quantize import Ternary as Ternary

from muonwire.codec.pack import Ans as Ans
from muonwire.codec.pack import Ranks as Ranks
