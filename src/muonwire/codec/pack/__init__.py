"""Packers: chosen items and small integers to bits and back."""

from muonwire.codec.pack.base import Pack
from muonwire.codec.pack.fields import pack_fields, unpack_fields
from muonwire.codec.pack.rice import Rice

__all__ = ["Pack", "Rice", "pack_fields", "unpack_fields"]
