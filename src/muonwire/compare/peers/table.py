"""The peers by name, and how they are written on the command line."""

from typing import Any

from muonwire.compare.peers.base import PeerSettings
from muonwire.compare.peers.ddp import DDPAdamW, DDPMuon
from muonwire.compare.peers.torchft_diloco import TorchftDiLoCo
from muonwire.errors import UsageError
from muonwire.recipes import parse_call

PEERS: dict[str, type[PeerSettings]] = {kind.name: kind for kind in (DDPAdamW, DDPMuon, TorchftDiLoCo)}


def parse_peer(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options in a text such as "torchft_diloco(interval=20)"."""
    return parse_call(text, what="peer", example="torchft_diloco(interval=20)")


def find_peer(text: str) -> PeerSettings:
    """The settings of a peer.

    Raises:
        UsageError: no peer of that name, an option that it does not have, or a value that is not allowed.
    """
    name, options = parse_peer(text)
    if name not in PEERS:
        raise UsageError(f"peer: {name!r} is unknown; allowed are {', '.join(PEERS)}")
    return PEERS[name].read(options)
