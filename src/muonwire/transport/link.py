"""A link between replicas: rate and latency, and the time that given traffic takes on it."""

import re
from dataclasses import dataclass

from muonwire.errors import UsageError

_RATE_MBIT_S = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}
_LATENCY_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_FORM = re.compile(
    r"(?P<rate>\d+(?:\.\d+)?)(?P<unit>[kmg]bit)(?:/(?P<latency>\d+(?:\.\d+)?)(?P<latency_unit>us|ms|s))?"
)


@dataclass(frozen=True, kw_only=True)
class Link:
    """A symmetric link of each replica to all its peers.

    Args:
        rate_mbit_s: rate in each direction, in 10⁶ bits per second.
        latency_s: one-way delay of a message, in seconds.
    """

    rate_mbit_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if self.rate_mbit_s <= 0 or self.latency_s < 0:
            raise UsageError(f"link: {self} has a rate that is not positive, or a negative latency")

    @classmethod
    def parse(cls, text: str) -> "Link":
        """Read "10mbit/50ms", "1gbit" and the like.

        >>> Link.parse("10mbit/50ms")
        Link(rate_mbit_s=10.0, latency_s=0.05)
        >>> str(Link.parse("1.5gbit"))
        '1500mbit/0ms'

        Raises:
            UsageError: the text has another form.
        """
        match = _FORM.fullmatch(text.strip().lower())
        if match is None:
            raise UsageError(
                f"link: {text!r} does not parse; write a rate and a latency such as '10mbit/50ms', '1gbit/1ms' "
                "(rate in kbit, mbit or gbit; latency in us, ms or s)"
            )
        latency_s = float(match["latency"]) * _LATENCY_S[match["latency_unit"]] if match["latency"] else 0.0
        return cls(rate_mbit_s=float(match["rate"]) * _RATE_MBIT_S[match["unit"]], latency_s=latency_s)

    def __str__(self) -> str:
        return f"{self.rate_mbit_s:g}mbit/{self.latency_s * 1e3:g}ms"

    def seconds(self, *, egress_bytes: float, received_bytes: float, num_messages: float) -> float:
        """Modelled time of traffic: one latency a message, and the busier direction at the link's rate.

        latency · messages + 8 · max(egress, received) / rate; counts may be means.

        >>> Link.parse("8mbit/10ms").seconds(egress_bytes=1e6, received_bytes=0, num_messages=2)
        1.02
        """
        bits = 8 * max(egress_bytes, received_bytes)
        return self.latency_s * num_messages + bits / (self.rate_mbit_s * 1e6)
