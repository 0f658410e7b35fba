"""Packers: chosen items and small integers to bits and back."""

from muonwire.codec.pack.ans import Ans
from muonwire.codec.pack.base import Pack
from muonwire.codec.pack.bitmap import Bitmap
from muonwire.codec.pack.bits import Bits
from muonwire.codec.pack.fields import pack_fields, unpack_fields
from muonwire.codec.pack.ranks import Ranks
from muonwire.codec.pack.rice import Rice

__all__ = ["Ans", "Bitmap", "Bits", "Pack", "Ranks", "Rice", "pack_fields", "unpack_fields"]
