"""Packers: chosen items and small integers to bits and back."""

from muonwire.codec.pack.ans import Ans
from muonwire.codec.pack.base import Pack
from muonwire.codec.pack.fields import pack_fields, unpack_fields
from muonwire.codec.pack.ranks import Ranks

__all__ = ["Ans", "Pack", "Ranks", "pack_fields", "unpack_fields"]
