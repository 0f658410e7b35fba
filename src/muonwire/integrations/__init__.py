"""Training frameworks: each replica is a world of its own to them, and muonwire works between the replicas.

``muonwire.integrations.transformers`` is for transformers' Trainer, ``muonwire.integrations.accelerate`` for accelerate, and
``muonwire.integrations.lightning`` for Lightning. Each imports its framework; this module imports none.
"""

from muonwire.integrations.figures import Figures
from muonwire.integrations.replicas import Replicas, join_replicas
from muonwire.integrations.shards import Shard, StreamShard

__all__ = ["Figures", "Replicas", "Shard", "StreamShard", "join_replicas"]
