"""The sixteen bytes before every message, and the errors that follow where replicas are not in lockstep.

Little-endian: magic "M", settings u8, version u8, kind (low 4 bits) and flags (high 4) u8, optimizer step u32, sequence number
u8, check u16, length u40. The length is that of the payload of a gather, of the longest payload of an all-to-all, and of one part
of a mean. The check is a checksum of what else replicas must agree on: the purpose, and in a mean the tensors' shapes and dtypes.
A report stands in the place of any operation: the
replica's site cannot go on, and the check is the number of the lost replica in it, from 1, or 0.
settings is a checksum of the step's rates; one byte is enough, since it is sent again in every step. Step and sequence number
wrap around.
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from muonwire.errors import ExchangeError, ReplicaLostError
from muonwire.transport.base import Flag

HEADER = struct.Struct("<cBBBIBHIB")
MAGIC = b"M"
VERSION = 3
GATHER, REDUCE, SPREAD, ALL_TO_ALL, REPORT = 1, 2, 3, 4, 5
# Their payloads may have any lengths; the headers of other operations agree in theirs.
FREE_LENGTHS = (GATHER, ALL_TO_ALL)
KIND_NAMES = {
    GATHER: "gather",
    REDUCE: "mean",
    SPREAD: "second half of a mean",
    ALL_TO_ALL: "all-to-all",
    REPORT: "report",
}
_FLAGS = int(Flag.STOP | Flag.DIVERGED | Flag.CHANGED | Flag.OBSERVES)
LARGEST_LENGTH = (1 << 40) - 1


class SiteFailedError(ReplicaLostError):
    """A leader has reported that its site cannot go on; a transport between sites says it in their words.

    Args:
        site: that reported it.
        lost: place in it of the replica that it lost; None where it ended for another reason.
    """

    def __init__(self, *, site: int, lost: int | None) -> None:
        what = "failed" if lost is None else f"lost its replica {lost}"
        super().__init__(f"site {site} {what} and cannot go on", rank=site)
        self.site = site
        self.lost = lost


class Header(NamedTuple):
    """What stands before each message: the replica's step and operation, its flags, and the message's length.

    >>> header = Header(kind=GATHER, flags=Flag.STOP, step=4, sequence=9, check=checksum("update"), length=100)
    >>> len(header.pack()), Header.unpack(header.pack(), rank=1) == header
    (16, True)
    """

    kind: int
    flags: Flag
    step: int
    sequence: int
    check: int
    length: int
    settings: int = 0

    def pack(self) -> bytes:
        """The bytes."""
        high, low = divmod(self.length, 1 << 32)
        first = self.kind | int(self.flags)
        return HEADER.pack(
            MAGIC, self.settings, VERSION, first, self.step, self.sequence, self.check, low, high
        )

    @classmethod
    def unpack(cls, data: bytes, *, rank: int) -> "Header":
        """Read what replica ``rank`` sent.

        Raises:
            ExchangeError: it is no header of this version.
        """
        magic, settings, version, first, step, sequence, check, low, high = HEADER.unpack(data)
        if magic != MAGIC or version != VERSION:
            raise ExchangeError(
                f"replica {rank} sent a message with magic {magic!r}, version {version}; here it is {MAGIC!r}, version {VERSION}: "
                "run the same muonwire on all replicas"
            )
        return cls(first & ~_FLAGS, Flag(first & _FLAGS), step, sequence, check, (high << 32) | low, settings)

    @property
    def name(self) -> str:
        """The operation's name, for messages."""
        return KIND_NAMES.get(self.kind, f"an unknown operation {self.kind}")


def checksum(text: str) -> int:
    """The 16 bits that a header carries of what replicas must agree on."""
    return zlib.crc32(text.encode()) & 0xFFFF


def check_lockstep(
    headers: Mapping[int, Header],
    *,
    purposes: Mapping[int, str],
    about: Callable[[], str],
    settings: str = "",
) -> None:
    """Make sure that all replicas are in the same step and operation, and average the same tensors.

    >>> mean = Header(kind=REDUCE, flags=Flag.NONE, step=4, sequence=9, check=0, length=100)
    >>> headers = {0: mean, 1: mean._replace(kind=GATHER, step=5), 2: mean}
    >>> check_lockstep(headers, purposes={}, about=str)
    Traceback (most recent call last):
        ...
    muonwire.errors.ExchangeError: replicas are out of step: replicas 0 and 2 are in step 4 (mean), replica 1 in step 5 \
(gather); every replica must call the optimizer the same number of times (a gradient that zero_grad throws away counts, too)

    Args:
        headers: of all replicas, by rank.
        purposes: known purposes, by their check.
        about: what this replica averages, for the message.
        settings: this replica's, for the message. Default: none.

    Raises:
        ExchangeError: they are not; the same on all replicas.
        SiteFailedError: one of them reports that its site cannot go on.
    """
    for rank, header in headers.items():
        if header.kind == REPORT:
            raise SiteFailedError(site=rank, lost=header.check - 1 if header.check else None)

    def differ(key: Callable[[Header], object]) -> bool:
        return len({key(header) for header in headers.values()}) > 1

    if not differ(lambda h: h._replace(flags=Flag.NONE, length=0 if h.kind in FREE_LENGTHS else h.length)):
        return
    if differ(lambda h: (h.step, h.kind)):
        remedy = (
            "every replica must call the optimizer the same number of times (a gradient that zero_grad throws away counts, too)"
            if differ(lambda h: h.step)
            else "every replica must call the same operations in the same order"
        )
        raise ExchangeError(f"replicas are out of step: {_places(headers, lambda h: h.name)}; {remedy}")
    if differ(lambda h: h.sequence):
        operations = _places(headers, lambda h: f"{h.name}, operation {h.sequence} modulo 256")
        raise ExchangeError(
            f"replicas are out of step: {operations}; replicas must make their transports together, and call the same "
            "operations in the same order"
        )
    if differ(lambda h: h.settings):
        raise ExchangeError(
            f"replicas step with different settings: {_places(headers, lambda h: f'settings {h.settings:02x}')}; this replica has "
            f"{settings}. Give all replicas the same rates and schedule, and none that follows a replica's own loss"
        )
    if next(iter(headers.values())).kind not in FREE_LENGTHS:
        if differ(lambda h: h.length):
            tensors = _places(headers, lambda h: f"{h.name}, in parts of {h.length} bytes")
        else:
            tensors = _places(
                headers, lambda h: f"{h.name}, checksum of shapes, dtypes and purpose {h.check:04x}"
            )
        raise ExchangeError(
            f"replicas average different tensors: {tensors}; their models, parameter groups or dtypes differ. {about()}"
        )
    named = _places(
        headers,
        lambda h: f"{h.name} for {repr(purposes[h.check]) if h.check in purposes else 'another purpose'}",
    )
    raise ExchangeError(
        f"replicas are out of step: {named}; every replica must call the same operations in the same order"
    )


def _places(headers: Mapping[int, Header], describe: Callable[[Header], str]) -> str:
    """Which replicas are in which step and operation, for messages."""
    ranks: dict[str, list[int]] = {}
    for rank, header in sorted(headers.items()):
        ranks.setdefault(f"in step {header.step} ({describe(header)})", []).append(rank)
    parts = [
        f"replica {there[0]}"
        if len(there) == 1
        else f"replicas {', '.join(map(str, there[:-1]))} and {there[-1]}"
        for there in ranks.values()
    ]
    parts[0] += " is" if len(next(iter(ranks.values()))) == 1 else " are"
    return ", ".join(f"{who} {where}" for who, where in zip(parts, ranks, strict=True))
