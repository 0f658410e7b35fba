"""What synchronizations cost a replica, while the run lasts: bytes each way, rates reached, waiting and overlap for each peer.

They stand in the lines of metrics.jsonl, and in TensorBoard, once a second at most and with each evaluation, and cover what was
since the last such line:

    synchronization/interval         H, where it changes in the run
    synchronization/count            steps in which an exchange of updates ended
    synchronization/sent_bytes       that left this replica, a payload once for each peer that got it
    synchronization/received_bytes   that arrived
    synchronization/up_mbit_s        8e-6 · sent bytes / seconds in exchanges, waiting for the others' messages included
    synchronization/down_mbit_s      the same of the received ones
    synchronization/wait_s           seconds of them in which this replica stood still
    synchronization/overlap_s        seconds of them in which it went on
    synchronization/wait_s/NAME      seconds for which this replica stood still for that one
    synchronization/overlap_s/NAME   seconds for which its channel waited for that one while it went on
"""

import time

from muonwire.transport import Traffic, Transport

# The most often that figures are given without an evaluation.
EVERY_S = 1.0


class SynchronizationFigures:
    """Adds up what a transport's synchronizations cost between two lines.

    Args:
        transport: of this replica.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._count = 0
        self._seen = self._told = self._update()
        meter = transport.meter
        self._wait_s, self._overlap_s = dict(meter.wait_s), dict(meter.overlap_s)
        self._told_s = time.monotonic()

    def _update(self) -> Traffic:
        return self._transport.meter.by_purpose.get("update", Traffic())

    def stepped(self) -> None:
        """Look at the transport after an optimizer step."""
        now = self._update()
        self._count += now.num_messages != self._seen.num_messages
        self._seen = now

    def take(self, *, due: bool = False) -> dict[str, float]:
        """The figures since they were taken last; empty where nothing was exchanged, or it is too early.

        Args:
            due: give them however early it is. Default: False.
        """
        if not self._count or not (due or time.monotonic() - self._told_s >= EVERY_S):
            return {}
        meter, spent = self._transport.meter, self._seen - self._told
        seconds = spent.wait_s + spent.overlap_s
        figures = {
            "count": float(self._count),
            "sent_bytes": float(spent.egress_bytes),
            "received_bytes": float(spent.received_bytes),
            "wait_s": spent.wait_s,
            "overlap_s": spent.overlap_s,
        }
        if seconds > 0:
            figures["up_mbit_s"] = 8e-6 * spent.egress_bytes / seconds
            figures["down_mbit_s"] = 8e-6 * spent.received_bytes / seconds
        for kind, now, before in (
            ("wait_s", meter.wait_s, self._wait_s),
            ("overlap_s", meter.overlap_s, self._overlap_s),
        ):
            figures |= {f"{kind}/{name}": s - before.get(name, 0.0) for name, s in now.items()}
        self._count, self._told, self._told_s = 0, self._seen, time.monotonic()
        self._wait_s, self._overlap_s = dict(meter.wait_s), dict(meter.overlap_s)
        return {f"synchronization/{name}": value for name, value in figures.items()}
