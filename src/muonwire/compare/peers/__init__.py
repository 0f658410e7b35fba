"""Other libraries' own data-parallel training, on the same task, data and evaluation as the recipes."""

from muonwire.compare.peers.base import Peer, PeerSettings, Replica
from muonwire.compare.peers.table import PEERS, find_peer, parse_peer

__all__ = ["PEERS", "Peer", "PeerSettings", "Replica", "find_peer", "parse_peer"]
