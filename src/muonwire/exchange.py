"""The old name of ``muonwire.transport``, with its old names of classes, for programs that still use it."""

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
    "muonwire.exchange is now muonwire.transport; Exchange, ProcessGroupExchange and ThreadExchange are now Transport, "
    "ProcessGroupTransport and ThreadTransport there",
    DeprecationWarning,
    stacklevel=2,
)
