"""The contract of a packer: which items were chosen, to bytes and back."""

from abc import abstractmethod

from muonwire.codec.pack.fields import Ints
from muonwire.codec.part import Part
from muonwire.codec.select.base import Groups


class Pack(Part):
    """Sorted items (int64) to bytes and back. Integer arithmetic alone, so that all machines agree."""

    @abstractmethod
    def encode(self, items: Ints, groups: Groups) -> bytes:
        """The bytes of ``groups.count`` sorted items, ``groups.k`` in each group."""

    @abstractmethod
    def decode(self, data: bytes, groups: Groups) -> tuple[Ints, int]:
        """Read ``groups.count`` items off the front of ``data``; returns them and the number of bytes read.

        Raises:
            PayloadError: the bytes are cut off, or lead to an item outside the groups.
        """

    @abstractmethod
    def estimate_bytes(self, groups: Groups) -> int:
        """Expected bytes of ``encode`` for items chosen uniformly."""
