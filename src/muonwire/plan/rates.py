"""The way from one replica to the others: rates up and down, delay, and the seconds that an exchange takes on it."""

import math
from dataclasses import dataclass

from muonwire.errors import UsageError
from muonwire.transport.link import Link

# Ethernet, IPv4 and TCP (with its time stamps) add 66 bytes to each 1448 of a message; a link's rate is that of both together.
SEGMENT_BYTES = 1448
PACKET_SHARE = 1514 / SEGMENT_BYTES
# What TCP sends before the first acknowledgement (RFC 6928), and how long a connection rests until it begins there again
# (RFC 6298's least timeout as Linux has it).
FIRST_WINDOW_BYTES = 10 * SEGMENT_BYTES
REST_S = 0.2
# One-way delays that a message takes. Transports post their receives ahead, so that a message finds its receiver ready and comes
# after one; the first of a run, whose length is not known to it, takes more.
DELAYS_PER_MESSAGE = 1.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What each replica has to all others together.

    Args:
        up_mbit_s: rate of what it sends, in 10⁶ bits per second.
        down_mbit_s: rate of what it receives.
        latency_s: one-way delay of a message, in seconds.
        goodput: the rates are those of messages, as measured, and not of the packets that carry them. Default: False.

    Raises:
        UsageError: a rate that is not positive, or a negative delay.
    """

    up_mbit_s: float
    down_mbit_s: float
    latency_s: float = 0.0
    goodput: bool = False

    def __post_init__(self) -> None:
        for name in ("up_mbit_s", "down_mbit_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(
                    f"plan: {name} is {value}; a rate is positive and finite, in 10⁶ bits per second"
                )
        if not 0 <= self.latency_s < math.inf:
            raise UsageError(f"plan: latency_s is {self.latency_s}; a delay is at least 0 seconds")

    @classmethod
    def parse(cls, *, up: str, down: str, latency: str) -> "Rates":
        """Read texts such as "20mbit", "200mbit" and "40ms".

        >>> Rates.parse(up="20mbit", down="0.2gbit", latency="40ms")
        Rates(up_mbit_s=20.0, down_mbit_s=200.0, latency_s=0.04, goodput=False)

        Raises:
            UsageError: a text of another form, or a rate of 0.
        """
        return cls(up_mbit_s=_rate("up", up), down_mbit_s=_rate("down", down), latency_s=_latency(latency))

    def seconds(
        self,
        *,
        egress_bytes: float,
        received_bytes: float,
        num_messages: int,
        peers: int,
        rested_s: float = 0.0,
    ) -> float:
        """The seconds until all messages of an exchange have come.

        latency · messages · DELAYS_PER_MESSAGE + max(egress / up, received / down), and after a rest what TCP loses until it sends
        at full rate: per round trip it sends a window, which begins at 10 segments for each peer and doubles.

        Args:
            egress_bytes: that leave the replica, to all peers together.
            received_bytes: that come from all peers together.
            num_messages: that wait for one another.
            peers: number of the others.
            rested_s: how long nothing was sent before. Default: no rest.

        >>> Rates(up_mbit_s=8, down_mbit_s=80, goodput=True).seconds(
        ...     egress_bytes=1e6, received_bytes=1e6, num_messages=1, peers=1
        ... )
        1.0
        """
        share = 1.0 if self.goodput else PACKET_SHARE
        per_mbit = 8e-6 * share
        full_s = max(per_mbit * egress_bytes / self.up_mbit_s, per_mbit * received_bytes / self.down_mbit_s)
        lost_s = self._slow_start_s(egress_bytes, full_s, peers) if rested_s > REST_S else 0.0
        return self.latency_s * num_messages * DELAYS_PER_MESSAGE + full_s + lost_s

    def _slow_start_s(self, egress_bytes: float, full_s: float, peers: int) -> float:
        round_trip_s = 2 * self.latency_s
        if not full_s or not round_trip_s:
            return 0.0
        rate = egress_bytes / full_s
        window, left, lost_s = float(FIRST_WINDOW_BYTES * peers), egress_bytes, 0.0
        while window < left and window < rate * round_trip_s:
            lost_s += round_trip_s - window / rate
            left -= window
            window *= 2
        return lost_s

    def __str__(self) -> str:
        return f"{self.up_mbit_s:.4g} Mbit/s up, {self.down_mbit_s:.4g} down, {self.latency_s * 1e3:.3g} ms one way"


def _rate(name: str, text: str) -> float:
    try:
        link = Link.parse(text)
        if {"/", ":"} & set(text):
            raise UsageError("a rate alone has no delay, and is one")
        return link.rate_mbit_s
    except UsageError as error:
        raise UsageError(
            f"plan: {name} is {text!r}; give a positive rate in kbit, mbit or gbit per second, such as 20mbit"
        ) from error


def _latency(text: str) -> float:
    try:
        return Link.parse(f"1mbit/{text}").latency_s
    except UsageError as error:
        raise UsageError(
            f"plan: latency is {text!r}; give the delay one way in us, ms or s, such as 40ms"
        ) from error
