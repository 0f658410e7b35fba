"""What a training has sent and waited, as numbers for a framework's log."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from muonwire.transport.base import Transport
from muonwire.transport.meter import Traffic

SENT = "muonwire_sent_bytes"
RECEIVED = "muonwire_received_bytes"
BITS = "muonwire_bits_per_parameter_step"
WAIT = "muonwire_wait_s"


@dataclass
class Figures:
    """The traffic of a replica between two logs, and in all.

    Counted is the traffic of training, as the meter's ``training``: updates and digests, without control messages.

    Args:
        transport: between the replicas.
        num_parameters: trained ones.
        step: steps taken before. Default: 0.
        before: traffic of the run before this process, as after a resume. Default: none.

    >>> from muonwire.transport import SingleReplica
    >>> Figures(SingleReplica(), num_parameters=10).since_last(step=1)["muonwire_sent_bytes"]
    0
    """

    transport: Transport
    num_parameters: int
    step: int = 0
    before: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        self._began = self._last = self.transport.meter.training
        self._last_step = self.step

    @property
    def total(self) -> Traffic:
        """Of the run, with what came before this process."""
        return self.before + (self.transport.meter.training - self._began)

    def resume(self, logged: Mapping[str, float], *, step: int) -> None:
        """Go on from the totals of a log that a run was resumed from."""
        self.before = Traffic(
            sent_bytes=int(logged[SENT]), received_bytes=int(logged[RECEIVED]), wait_s=logged[WAIT]
        )
        self._last_step = step

    def since_last(self, *, step: int) -> dict[str, float]:
        """Bytes sent and received and seconds waited in all; bits per parameter and step since the last call.

        Args:
            step: steps taken by now.
        """
        now = self.transport.meter.training
        sent, steps = (now - self._last).sent_bytes, step - self._last_step
        self._last, self._last_step = now, step
        return self._row(bits=8 * sent / self.num_parameters / steps if steps else 0.0)

    def in_all(self, *, step: int) -> dict[str, float]:
        """The same with the mean bits per parameter and step of the whole run."""
        return self._row(bits=8 * self.total.sent_bytes / self.num_parameters / max(step, 1))

    def _row(self, *, bits: float) -> dict[str, float]:
        total = self.total
        return {
            SENT: total.sent_bytes,
            RECEIVED: total.received_bytes,
            BITS: bits,
            WAIT: total.wait_s,
        }
