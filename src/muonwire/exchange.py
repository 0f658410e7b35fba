"""The room's name before 0.2, kept for programs that use it: ``muonwire.transport`` has what is here, under the names of now."""

import warnings

from muonwire.transport import (
    Flag,
    Link,
    Meter,
    SingleReplica,
    Traffic,
    check_agreement,
    check_replicas,
    digest,
    run_threads,
)
from muonwire.transport import ProcessGroupTransport as ProcessGroupExchange
from muonwire.transport import ThreadTransport as ThreadExchange
from muonwire.transport import Transport as Exchange

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

warnings.warn(
    "muonwire.exchange is now muonwire.transport, and ProcessGroupExchange is ProcessGroupTransport",
    DeprecationWarning,
    stacklevel=2,
)
