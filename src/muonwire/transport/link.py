"""A link between replicas: rates up and down and latency, and the time that given traffic takes on it."""

import re
from dataclasses import dataclass

from muonwire.errors import UsageError

_RATE_MBIT_S = {"kbit": 1e-3, "mbit": 1.0, "gbit": 1e3}
_LATENCY_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"\d+(?:\.\d+)?"
_FORM = re.compile(
    rf"(?P<up>{_NUMBER})(?P<up_unit>[kmg]bit)(?::(?P<down>{_NUMBER})(?P<down_unit>[kmg]bit))?"
    rf"(?:/(?P<latency>{_NUMBER})(?P<latency_unit>us|ms|s))?"
)


@dataclass(frozen=True, kw_only=True)
class Link:
    """The link of each replica to all its peers.

    Args:
        rate_mbit_s: rate at which a replica sends (up), in 10⁶ bits per second.
        latency_s: one-way delay of a message, in seconds; an answer comes after twice as long.
        down_mbit_s: rate at which it receives. Default: the same.

    Raises:
        UsageError: a rate that is not positive, or a negative latency.
    """

    rate_mbit_s: float
    latency_s: float = 0.0
    down_mbit_s: float | None = None

    def __post_init__(self) -> None:
        if not self.rate_mbit_s > 0 or not self.received_mbit_s > 0 or not self.latency_s >= 0:
            raise UsageError(f"link: {self} has a rate that is not positive, or a negative latency")
        if self.down_mbit_s == self.rate_mbit_s:
            object.__setattr__(self, "down_mbit_s", None)

    @property
    def received_mbit_s(self) -> float:
        """The rate down, in 10⁶ bits per second."""
        return self.rate_mbit_s if self.down_mbit_s is None else self.down_mbit_s

    @classmethod
    def parse(cls, text: str) -> "Link":
        """Read "10mbit/50ms", "1gbit", "20mbit:200mbit/40ms" (up and down apart) and the like.

        >>> Link.parse("10mbit/50ms")
        Link(rate_mbit_s=10.0, latency_s=0.05, down_mbit_s=None)
        >>> str(Link.parse("1.5gbit"))
        '1500mbit/0ms'
        >>> str(Link.parse("20mbit:0.2gbit/40ms"))
        '20mbit:200mbit/40ms'

        Raises:
            UsageError: the text has another form.
        """
        match = _FORM.fullmatch(text.strip().lower())
        if match is None:
            raise UsageError(
                f"link: {text!r} does not parse; write a rate and a latency such as '10mbit/50ms', '1gbit/1ms', or the rates up "
                "and down and a latency, '20mbit:200mbit/40ms' (rates in kbit, mbit or gbit; latency in us, ms or s)"
            )

        def rate(name: str) -> float:
            return float(match[name]) * _RATE_MBIT_S[match[f"{name}_unit"]]

        latency_s = float(match["latency"]) * _LATENCY_S[match["latency_unit"]] if match["latency"] else 0.0
        down = rate("down") if match["down"] else None
        return cls(rate_mbit_s=rate("up"), latency_s=latency_s, down_mbit_s=down)

    def __str__(self) -> str:
        down = "" if self.down_mbit_s is None else f":{self.down_mbit_s:g}mbit"
        return f"{self.rate_mbit_s:g}mbit{down}/{self.latency_s * 1e3:g}ms"

    def seconds(self, *, egress_bytes: float, received_bytes: float, num_messages: float) -> float:
        """Modelled time of traffic: one latency a message, and the direction that takes longer at its rate.

        latency · messages + 8 · max(egress / rate up, received / rate down); counts may be means.

        >>> Link.parse("8mbit/10ms").seconds(egress_bytes=1e6, received_bytes=0, num_messages=2)
        1.02
        >>> Link.parse("8mbit:80mbit").seconds(egress_bytes=1e6, received_bytes=3e6, num_messages=2)
        1.0
        """
        up_s = 8 * egress_bytes / (self.rate_mbit_s * 1e6)
        down_s = 8 * received_bytes / (self.received_mbit_s * 1e6)
        return self.latency_s * num_messages + max(up_s, down_s)
