"""Bytes between replicas: payloads gathered, tensors averaged, every byte counted, weights compared."""

from muonwire.transport.base import Flag, SingleReplica, Transport
from muonwire.transport.digest import check_agreement, check_replicas, digest, digest_all
from muonwire.transport.link import Link
from muonwire.transport.mesh import MeshTransport, mesh_transport
from muonwire.transport.meter import Meter, Traffic
from muonwire.transport.process_group import ProcessGroupTransport
from muonwire.transport.secret import Secret
from muonwire.transport.site_groups import site_transport
from muonwire.transport.sites import SiteTransport
from muonwire.transport.threads import ThreadTransport, run_threads
from muonwire.transport.waiting import Waits, watching

__all__ = [
    "Flag",
    "Link",
    "MeshTransport",
    "Meter",
    "ProcessGroupTransport",
    "Secret",
    "SingleReplica",
    "SiteTransport",
    "ThreadTransport",
    "Traffic",
    "Transport",
    "Waits",
    "check_agreement",
    "check_replicas",
    "digest",
    "digest_all",
    "mesh_transport",
    "run_threads",
    "site_transport",
    "watching",
]
