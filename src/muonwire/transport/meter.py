"""The meter: every byte that a transport sends or receives, by purpose; and for whom it waited, and what it refused."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Totals of one replica.

    Args:
        sent_bytes: bytes of this replica's own messages, frame headers and lengths included; a payload counts once however
            many peers get it.
        egress_bytes: bytes that left this replica: a payload counts once for each peer that got it.
        received_bytes: bytes that arrived from the peers, frame headers and lengths included.
        num_messages: exchanges this replica took part in, each at least one latency of the link.
        wait_s: seconds spent in them.
        overlap_s: seconds that a channel spent in them while the replica went on.
    """

    sent_bytes: int = 0
    egress_bytes: int = 0
    received_bytes: int = 0
    num_messages: int = 0
    wait_s: float = 0.0
    overlap_s: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})


@dataclass
class Meter:
    """Adds up traffic by purpose: "update" for optimizers, "digest" for checks of the weights, "control" for the rest.

    Args:
        by_purpose: the traffic.
        wait_s: seconds of waiting for each replica, by its name (``Transport.members``). Replicas are waited for one after the
            other, so a replica has the seconds that it adds to those before it, and all together are what was waited for.
        overlap_s: seconds that a channel waited for each replica while this one went on.
        rejected: messages that were refused, by kind.
    """

    by_purpose: dict[str, Traffic] = field(default_factory=dict)
    wait_s: dict[str, float] = field(default_factory=dict)
    overlap_s: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)

    def add(self, purpose: str, traffic: Traffic) -> None:
        """Count ``traffic`` under ``purpose``."""
        self.by_purpose[purpose] = self.by_purpose.get(purpose, Traffic()) + traffic

    def waited(self, peer: str, seconds: float) -> None:
        """Count seconds of waiting for the replica of that name."""
        self.wait_s[peer] = self.wait_s.get(peer, 0.0) + seconds

    def overlapped(self, peer: str, seconds: float) -> None:
        """Count seconds that a channel waited for the replica of that name while this one went on."""
        self.overlap_s[peer] = self.overlap_s.get(peer, 0.0) + seconds

    def reject(self, kind: str) -> None:
        """Count a message that was refused, such as "altered" or "replayed"."""
        self.rejected[kind] = self.rejected.get(kind, 0) + 1

    @property
    def total(self) -> Traffic:
        """All purposes together.

        >>> meter = Meter()
        >>> meter.add("update", Traffic(sent_bytes=3)); meter.add("digest", Traffic(sent_bytes=4))
        >>> meter.total.sent_bytes
        7
        """
        return sum(self.by_purpose.values(), Traffic())

    @property
    def training(self) -> Traffic:
        """The traffic of training itself: updates and digests, without evaluation and other control traffic."""
        return sum((t for purpose, t in self.by_purpose.items() if purpose != "control"), Traffic())
