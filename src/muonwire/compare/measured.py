"""Time and bytes of training as a link makes them: the clock between evaluations, and the kernel's counters beside the meter's.

Training time of a replica is the sum over its steps of forward and backward pass, optimizer and exchange; start-up, evaluation,
probes and checkpoints are no part of it. All replicas meet at each evaluation, so between two evaluations the time of the run is
that of the slowest replica.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from muonwire.compare.hosts import INTERFACE
from muonwire.train.metrics import read_lines
from muonwire.transport import Traffic, Transport

MEASURED = "measured.jsonl"
# Ethernet, IPv4 and TCP with time stamps, of a packet or of several that the kernel carries as one.
FRAME_HEADER_BYTES = 14 + 20 + 32
# What gloo adds to a message to one peer: it announces it, is told that the receiver is ready, and sends it with a header, 48 bytes
# each; measured.
GLOO_BYTES = 3 * 48


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What the kernel has counted at an interface.

    Args:
        egress_bytes, received_bytes: without the headers of Ethernet, IP and TCP; what TCP sent again included.
        egress_packets, received_packets: several that the kernel carries as one count once.
        retransmitted: segments that TCP sent again.
    """

    egress_bytes: int = 0
    received_bytes: int = 0
    egress_packets: int = 0
    received_packets: int = 0
    retransmitted: int = 0

    @classmethod
    def read(cls, interface: str = INTERFACE) -> Self:
        """Those of this thread's network now; zeros where it has no such interface."""
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            name, colon, rest = line.partition(":")
            if colon and name.strip() == interface:
                received, received_packets, *_ = map(int, rest.split())
                sent, sent_packets = map(int, rest.split()[8:10])
                return cls(
                    egress_bytes=sent - FRAME_HEADER_BYTES * sent_packets,
                    received_bytes=received - FRAME_HEADER_BYTES * received_packets,
                    egress_packets=sent_packets,
                    received_packets=received_packets,
                    retransmitted=_retransmitted(),
                )
        return cls()

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(**{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)})

    def __add__(self, other: "Counters") -> "Counters":
        return Counters(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def _retransmitted() -> int:
    names, values = (
        line.split()
        for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()
        if line.startswith("Tcp:")
    )
    return int(values[names.index("RetransSegs")])


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a replica has spent on training since the run began.

    Args:
        training_s: seconds.
        kernel: counted by the kernel, control traffic between the first and the last step of each part included.
        metered_egress_bytes, metered_received_bytes: counted by the transport in the same parts.
        control_egress_bytes, control_received_bytes: those of them that are control traffic.
        num_messages: exchanges in the same parts, as the transport counts them.
    """

    training_s: float = 0.0
    kernel: Counters = field(default_factory=Counters)
    metered_egress_bytes: int = 0
    metered_received_bytes: int = 0
    control_egress_bytes: int = 0
    control_received_bytes: int = 0
    num_messages: int = 0

    def on_the_wire(self, *, peers: int) -> int:
        """The metered bytes that left, with what gloo adds to each message."""
        return self.metered_egress_bytes + GLOO_BYTES * peers * self.num_messages

    @classmethod
    def of(cls, record: dict[str, Any]) -> Self:
        """As JSON has it."""
        return cls(**{**record, "kernel": Counters(**record["kernel"])})


class Measurement:
    """The time and the counters of one run, on one replica; a line of ``measured.jsonl`` for each evaluation.

    Args:
        folder: of the run; the first replica writes there.
        transport: between the replicas.
        after_step: steps that are done already, whose lines are kept. Default: none.
    """

    def __init__(self, folder: Path, transport: Transport, *, after_step: int = 0) -> None:
        self._path, self._transport = folder / MEASURED, transport
        lines = [line for line in read_lines(self._path) if after_step and line["step"] <= after_step]
        own = [line["replicas"][transport.rank] for line in lines[-1:]]
        self._spent = Spent.of(own[0]) if own else Spent()
        # Time that a run had spent after its last evaluation when it was cut off is in its own totals, from this on.
        self.measured_s: float = lines[-1]["measured_s"] if lines else 0.0
        self._all: list[Spent] = [Spent.of(r) for line in lines[-1:] for r in line["replicas"]]
        self._at: tuple[Counters, Traffic, Traffic] | None = None
        # None has read what others have not read yet.
        transport.gather(b"measured", purpose="control")
        if transport.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._last = lines[-1]["step"] if lines else -1

    @property
    def replicas(self) -> Sequence[Spent]:
        """What each replica had spent at the last evaluation, in rank order."""
        return self._all

    def begin(self) -> None:
        """Training goes on; nothing where it has not been interrupted."""
        if self._at is None:
            self._at = self._now()

    def close(self, step: int, training_s: float) -> None:
        """Training stops for an evaluation; all replicas call it together.

        Args:
            step: done.
            training_s: of this replica since the run began.
        """
        if step == self._last:
            return
        gathered = self._transport.gather(b"done", purpose="control")
        assert gathered
        # What was sent before has arrived everywhere by now.
        if self._at is not None:
            (counters, totals, controls), (counters_before, totals_before, controls_before) = (
                self._now(),
                self._at,
            )
            counted, total = counters - counters_before, totals - totals_before
            control = controls - controls_before
            self._spent = replace(
                self._spent,
                kernel=self._spent.kernel + counted,
                metered_egress_bytes=self._spent.metered_egress_bytes + total.egress_bytes,
                metered_received_bytes=self._spent.metered_received_bytes + total.received_bytes,
                control_egress_bytes=self._spent.control_egress_bytes + control.egress_bytes,
                control_received_bytes=self._spent.control_received_bytes + control.received_bytes,
                num_messages=self._spent.num_messages + total.num_messages,
            )
            self._at = None
        self._spent = replace(self._spent, training_s=training_s)
        message = json.dumps(asdict(self._spent)).encode()
        everybody = [Spent.of(json.loads(m)) for m in self._transport.gather(message, purpose="control")]
        before = self._all or [Spent()] * len(everybody)
        self.measured_s += max(
            now.training_s - then.training_s for now, then in zip(everybody, before, strict=True)
        )
        self._all, self._last = everybody, step
        if self._transport.rank == 0:
            record = {"step": step, "measured_s": self.measured_s, "replicas": [asdict(s) for s in everybody]}
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _now(self) -> tuple[Counters, Traffic, Traffic]:
        meter = self._transport.meter
        return Counters.read(), meter.total, meter.by_purpose.get("control", Traffic())
