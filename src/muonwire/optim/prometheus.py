"""What an optimizer and its transport have done so far, as a text file for Prometheus.

The node exporter's textfile collector reads ``*.prom`` files of a folder, in Prometheus' text format 0.0.4
(https://prometheus.io/docs/instrumenting/exposition_formats). Counters begin at zero in each process, as those of Prometheus may.
"""

import math
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from muonwire.errors import UsageError
from muonwire.optim.chain import ChainOptimizer
from muonwire.transport import Traffic

# The most often that the file is written; a collector reads it every 15 seconds or so.
EVERY_S = 1.0
# What is there from the start; see Meter.
PURPOSES = ("update", "digest", "control")
# Of each metric, without "muonwire_": its type and what it is.
METRICS = {
    "steps_total": ("counter", "Optimizer steps done, those of a checkpoint included."),
    "skipped_steps_total": ("counter", "Steps left out because something was not finite."),
    "loss": ("gauge", "Loss, by kind."),
    "parameters": ("gauge", "Parameters that are trained."),
    "replicas": ("gauge", "Replicas, or sites, that train together at present."),
    "interval_steps": ("gauge", "Local steps from one synchronization to the next; 1 without local steps."),
    "synchronizations_total": ("counter", "Steps in which updates were exchanged."),
    "sent_bytes_total": ("counter", "Bytes of this replica's messages, a payload counted once, by purpose."),
    "egress_bytes_total": (
        "counter",
        "Bytes that left this replica, a payload counted once for each that got it, by purpose.",
    ),
    "received_bytes_total": ("counter", "Bytes that arrived from other replicas, by purpose."),
    "wait_seconds_total": ("counter", "Seconds in which this replica stood still for others."),
    "overlap_seconds_total": ("counter", "Seconds in exchanges in which this replica went on."),
    "peer_wait_seconds_total": ("counter", "Seconds of standing still, by the replica waited for."),
}


def check_path(path: Path) -> None:
    """Raise UsageError where the node exporter would not read the file."""
    if path.suffix != ".prom":
        raise UsageError(
            f"prometheus: {path} does not end in .prom; the node exporter's textfile collector reads no other files"
        )


class PrometheusFile:
    """Writes the file: whole, or not at all. Nothing of the training depends on it; a disk that is full is told of once.

    Args:
        path: ends in ".prom", which the collector asks for. Its folder is made.
        optimizer: of this replica.
        labels: of all samples, so that the files of several replicas or runs do not collide. Default: "replica", the number among
            all.

    >>> import tempfile, torch
    >>> from muonwire import stages
    >>> optimizer = ChainOptimizer([torch.nn.Parameter(torch.eye(2))], chain=stages.Sign(), lr=0.1)
    >>> path = Path(tempfile.mkdtemp()) / "muonwire.prom"
    >>> PrometheusFile(path, optimizer).write({"training": 0.5}, due=True)
    >>> print(path.read_text())  # doctest: +ELLIPSIS
    # HELP muonwire_steps_total Optimizer steps done, those of a checkpoint included.
    # TYPE muonwire_steps_total counter
    muonwire_steps_total{replica="0"} 0
    ...
    # TYPE muonwire_loss gauge
    muonwire_loss{kind="training",replica="0"} 0.5
    ...

    Raises:
        UsageError: the path does not end in ".prom", or a label has no name that Prometheus takes.
    """

    def __init__(
        self, path: Path | str, optimizer: ChainOptimizer, *, labels: Mapping[str, str] | None = None
    ) -> None:
        self.path = Path(path)
        check_path(self.path)
        everyone = optimizer.transport.everyone
        given: Mapping[str, object] = {"replica": everyone.rank} if labels is None else labels
        self._labels = {name: str(value) for name, value in given.items()}
        for name in self._labels:
            if not (name.isascii() and name.isidentifier()) or name in ("kind", "peer", "purpose"):
                raise UsageError(
                    f'prometheus: the label {name!r} is none; give letters, digits and "_", but not "kind", "peer" or "purpose"'
                )
        self._optimizer = optimizer
        self._losses: dict[str, float] = {}
        self._synchronizations = 0
        self._messages = self._update().num_messages
        self._written_s = -math.inf
        self._complained = False

    def _update(self) -> Traffic:
        return self._optimizer.transport.meter.by_purpose.get("update", Traffic())

    def write(self, losses: Mapping[str, float] | None = None, *, due: bool = False) -> None:
        """Call it after every step; the file is written once a second at most.

        Args:
            losses: by kind, such as "training"; those that are not given stay as they were. Default: none.
            due: write it however early it is. Default: False.
        """
        self._losses |= {
            kind: float(value.detach() if isinstance(value, Tensor) else value)
            for kind, value in (losses or {}).items()
        }
        messages = self._update().num_messages
        self._synchronizations += messages != self._messages
        self._messages = messages
        if not due and time.monotonic() - self._written_s < EVERY_S:
            return
        self._written_s = time.monotonic()
        partial = self.path.with_name(self.path.name + ".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(self.text(), encoding="utf-8", errors="replace")
            partial.replace(self.path)
        except OSError as error:
            if not self._complained:
                self._complained = True
                warnings.warn(
                    f"prometheus: {self.path} cannot be written ({error}); the run goes on", stacklevel=2
                )

    def text(self) -> str:
        """What stands in the file."""
        optimizer, transport = self._optimizer, self._optimizer.transport
        total, local = transport.meter.total, optimizer.local
        interval = 1 if local is None else local.initial + local.growth * optimizer.num_steps
        plain: dict[str, float] = {
            "steps_total": optimizer.num_steps,
            "skipped_steps_total": optimizer.skipped_steps,
            "parameters": sum(param.numel() for _, param in optimizer.named_parameters()),
            "replicas": len(transport.members),
            "interval_steps": interval if optimizer.adapting is None else optimizer.adapting.now,
            "synchronizations_total": self._synchronizations,
            "wait_seconds_total": total.wait_s,
            "overlap_seconds_total": total.overlap_s,
        }
        samples: dict[str, list[tuple[dict[str, str], float]]] = {
            name: [({}, value)] for name, value in plain.items()
        }
        by_purpose = {**dict.fromkeys(PURPOSES, Traffic()), **transport.meter.by_purpose}
        for name in ("sent_bytes", "egress_bytes", "received_bytes"):
            samples[f"{name}_total"] = [
                ({"purpose": purpose}, getattr(traffic, name)) for purpose, traffic in by_purpose.items()
            ]
        samples["loss"] = [({"kind": kind}, value) for kind, value in self._losses.items()]
        waits = dict(transport.meter.wait_s)
        samples["peer_wait_seconds_total"] = [({"peer": peer}, seconds) for peer, seconds in waits.items()]
        lines = []
        for name, (kind, about) in METRICS.items():
            lines += [f"# HELP muonwire_{name} {about}", f"# TYPE muonwire_{name} {kind}"]
            for labels, value in samples[name]:
                text = ",".join(f'{k}="{_escaped(v)}"' for k, v in {**labels, **self._labels}.items())
                lines.append(f"muonwire_{name}{{{text}}} {_number(value)}")
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    """As Go reads it.

    >>> _number(3), _number(0.5), _number(float("nan")), _number(float("-inf"))
    ('3', '0.5', 'NaN', '-Inf')
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
