"""Bytes between replicas: payloads gathered, tensors averaged, every byte counted, weights compared."""

from muonwire.exchange.base import Exchange, Flag, SingleReplica
from muonwire.exchange.digest import check_agreement, check_replicas, digest
from muonwire.exchange.link import Link
from muonwire.exchange.meter import Meter, Traffic
from muonwire.exchange.process_group import ProcessGroupExchange
from muonwire.exchange.threads import ThreadExchange, run_threads

__all__ = [
    "Exchange",
    "Flag",
    "Link",
    "Meter",
    "ProcessGroupExchange",
    "SingleReplica",
    "ThreadExchange",
    "Traffic",
    "check_agreement",
    "check_replicas",
    "digest",
    "run_threads",
]
