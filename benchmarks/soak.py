"""Faults without end: replicas that are killed, frozen, cut off and restarted at random times while they train; what became of it.

    sudo .venv/bin/python -m benchmarks.soak --recipe 'one_bit_muon(interval=5)' --faults 200 --out evidence/soak/one_bit_muon.json

Every replica is `muonwire train --elastic` on a host of its own (a network namespace with a rate-limited link and a folder), a
lighthouse runs on a host that stays. Where namespaces are not allowed, the hosts are loopback addresses, none is cut off, and it
says so. The undisturbed runs beside it have the same replicas, steps and data, with the seeds given.

It fails (exit code 1) where digests differ, a committed step is lost, something hangs longer than the stated time, fewer faults
came than asked for, or the loss at the end lies outside the spread of undisturbed runs of all replicas.
"""

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from muonwire.compare.hosts import Host, hosts, namespaces_allowed
from muonwire.train.elastic import DIGESTS
from muonwire.train.metrics import read_lines

PORT = 29510
# In --keep: what all replicas wrote of their synchronizations, by time.
SEEN = "synchronizations.json"
# Seconds: a replica without a heartbeat counts as dead, and a late one is waited for by the lighthouse.
HEARTBEAT_S, LATE_S = 1.0, 4.0
KINDS = ("kill", "lose", "freeze", "cut", "restart")
MIN_REPLICAS = 2


@dataclass
class Fault:
    """A fault, and when what came after it was seen (seconds since the soak began)."""

    kind: str
    victim: str
    at_s: float
    # When the replica is to be let go on; None: it already is.
    until_s: float | None = None
    mended_s: float = 0.0
    survivors_s: float | None = None
    rejoined_s: float | None = None


@dataclass
class Replica:
    """One replica on its host."""

    name: str
    host: Host
    folder: Path
    command: list[str]
    process: subprocess.Popen[str] | None = None
    fault: Fault | None = None
    seen: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)

    def start(self) -> None:
        """Start it, or start it again."""
        log = self.folder.with_suffix(".log").open("a")
        env = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"} | {"OMP_NUM_THREADS": "1"}
        resume = ["--resume"] if (self.folder / "config.json").exists() else []
        self.process = self.host.start(
            [*self.command, *resume], stdout=log, stderr=subprocess.STDOUT, env=env, cwd=self.folder.parent
        )

    def signal(self, number: signal.Signals) -> None:
        """To all its processes."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def look(self) -> list[dict[str, Any]]:
        """The synchronizations that are new since the last look."""
        lines = read_lines(self.folder / DIGESTS)
        if len(lines) < self.seen:
            # The folder was lost.
            self.seen = 0
        new, self.seen = lines[self.seen :], len(lines)
        self.lines += new
        return new

    @property
    def finished(self) -> bool:
        """Whether it has trained to the end."""
        return (self.folder / "result.json").exists()


def training(args: argparse.Namespace, *, seed: int) -> list[str]:
    """The command of a replica, without what says where it is."""
    sizes = [
        "--model-size",
        "pico",
        "--batch",
        str(args.batch),
        "--sequence",
        "32",
        "--threads",
        "1",
        "--no-page",
    ]
    return [
        *(sys.executable, "-m", "muonwire", "train", "--recipe", args.recipe, "--lr", str(args.lr)),
        *("--steps", str(args.steps), "--seed", str(seed), *sizes, "--evaluate-every", "1000"),
        "--no-tensorboard",
    ]


class Soak:
    """The soak: its replicas, its faults, and its clock."""

    def __init__(self, args: argparse.Namespace, machines: list[Host], folder: Path) -> None:
        *places, self.keeper = machines
        self.args = args
        self.random = random.Random(args.seed)
        self.kinds = KINDS if self.keeper.namespace else tuple(k for k in KINDS if k != "cut")
        self.faults: list[Fault] = []
        self.began_s = time.monotonic()
        self.next_s = 0.0
        self.folder = folder
        lighthouse = f"{self.keeper.address}:{PORT}"
        self.replicas = [
            Replica(
                name=f"host{i}",
                host=host,
                folder=folder / f"host{i}",
                command=[
                    *training(args, seed=args.seed),
                    *("--elastic", "--lighthouse", lighthouse, "--min-replicas", str(MIN_REPLICAS)),
                    *("--name", f"host{i}", "--timeout-s", str(args.timeout_s), "--join-s", str(args.join_s)),
                    *("--digest-every", "1", "--checkpoint-every", "100", "--out", str(folder / f"host{i}")),
                ],
            )
            for i, host in enumerate(places)
        ]

    def now(self) -> float:
        """Seconds since the soak began."""
        return time.monotonic() - self.began_s

    def run(self) -> None:
        """Until all replicas have finished, or nothing happens any more."""
        log = (self.folder / "lighthouse.log").open("w")
        lighthouse = self.keeper.start(
            [
                Path(sys.executable).with_name("torchft_lighthouse"),
                *("--bind", f"{self.keeper.address}:{PORT}", "--min_replicas", "1"),
                *("--join_timeout_ms", str(int(LATE_S * 1000))),
                *("--heartbeat_timeout_ms", str(int(HEARTBEAT_S * 1000))),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            time.sleep(1.0)
            for replica in self.replicas:
                replica.start()
            self._watch()
        finally:
            for replica in self.replicas:
                replica.signal(signal.SIGKILL)
            lighthouse.kill()

    def _watch(self) -> None:
        last_s = self.now()
        said_s = 0.0
        while not all(r.finished for r in self.replicas):
            time.sleep(0.05)
            for replica in self.replicas:
                if replica.look():
                    last_s = self.now()
                    self._came(replica)
                self._mend(replica)
            if any(r.finished for r in self.replicas) and self.now() - last_s > 90:
                # Who was away at the end finds nobody any more.
                break
            if self.now() - last_s > 300:
                raise SystemExit("soak: nothing has happened for 300 s; see the logs in the folder")
            if len(self.faults) < self.args.faults and self.now() >= self.next_s:
                self._strike()
            if self.now() - said_s > 30:
                said_s = self.now()
                step = max((r.lines[-1]["step"] for r in self.replicas if r.lines), default=0)
                print(f"{said_s:.0f} s: step {step}, {len(self.faults)} faults", flush=True)

    def _came(self, replica: Replica) -> None:
        """A replica has synchronized."""
        for fault in self.faults[-8:]:
            if fault.survivors_s is None and replica.name != fault.victim:
                fault.survivors_s = self.now()
        fault_here = replica.fault
        if fault_here is not None and fault_here.until_s is None:
            fault_here.rejoined_s = self.now()
            replica.fault = None

    def _strike(self) -> None:
        """A random fault for a random replica, where enough others are well."""
        well = [
            r
            for r in self.replicas
            if r.fault is None and r.lines and r.process is not None and r.process.poll() is None
        ]
        if len(well) <= MIN_REPLICAS or any(r.finished for r in self.replicas):
            return
        self.next_s = self.now() + self.random.expovariate(1 / self.args.every_s)
        replica = self.random.choice(well)
        fault = Fault(kind=self.random.choice(self.kinds), victim=replica.name, at_s=self.now())
        duration_s = self.random.uniform(0.5, 1.5 * self.args.timeout_s)
        if fault.kind in ("kill", "lose"):
            replica.signal(signal.SIGKILL)
            duration_s = self.random.uniform(0.0, 3.0)
        elif fault.kind == "restart":
            replica.signal(signal.SIGTERM)
            duration_s = 0.0
        elif fault.kind == "freeze":
            replica.signal(signal.SIGSTOP)
        else:
            replica.host.connect(False)
        fault.until_s = self.now() + duration_s
        replica.fault = fault
        self.faults.append(fault)

    def _mend(self, replica: Replica) -> None:
        fault = replica.fault
        if fault is None:
            if replica.process is not None and replica.process.poll() is not None and not replica.finished:
                raise SystemExit(
                    f"soak: {replica.name} ended by itself with {replica.process.poll()}: "
                    + replica.folder.with_suffix(".log").read_text()[-3000:]
                )
            return
        if fault.until_s is None or self.now() < fault.until_s:
            return
        assert replica.process is not None
        if fault.kind in ("kill", "lose", "restart"):
            if replica.process.poll() is None:
                if fault.kind == "restart" and self.now() > fault.until_s + 3 * self.args.timeout_s:
                    replica.signal(signal.SIGKILL)
                return
            if fault.kind == "lose":
                shutil.rmtree(replica.folder, ignore_errors=True)
            if not replica.finished:
                replica.start()
        elif fault.kind == "freeze":
            replica.signal(signal.SIGCONT)
        else:
            replica.host.connect(True)
        fault.until_s = None
        fault.mended_s = self.now()
        # What it wrote before is not its return.
        replica.look()


def judge(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the lines that the replicas wrote say, in the order of their times."""
    by_step: defaultdict[int, set[str]] = defaultdict(set)
    # A committed step is lost where replicas synchronize again at a step before it, later than it takes them to hear of it. One
    # that was frozen writes late of a step whose weights the others have told.
    lost, highest = 0, 0
    done: list[tuple[float, int]] = []
    for line in lines:
        time_s, step, digest = line["time_s"], line["step"], line["digest"]
        while done and done[0][0] < time_s - 1.0:
            highest = max(highest, done.pop(0)[1])
        lost += step < highest and digest not in by_step[step]
        by_step[step].add(digest)
        done.append((time_s, step))
    moments = [line["time_s"] for line in lines]
    stalls = [b - a for a, b in itertools.pairwise(moments)]
    return {
        "synchronizations": len(by_step),
        "digests_that_differ": sum(len(digests) > 1 for digests in by_step.values()),
        "committed_steps_lost": lost,
        "longest_stall_s": round(max(stalls), 2),
        "replicas_present": round(len(lines) / len(by_step), 2),
        "members": dict(Counter(str(len(line["members"])) for line in lines)),
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum, in seconds."""
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "median_s": round(statistics.median(ordered), 2) if ordered else 0.0,
        "p95_s": round(ordered[int(0.95 * (len(ordered) - 1))], 2) if ordered else 0.0,
        "longest_s": round(max(ordered, default=0.0), 2),
    }


def of_kinds(faults: list[Fault], seconds: Callable[[Fault], float | None]) -> dict[str, Any]:
    """A summary for each kind of fault."""
    found = {}
    for kind in KINDS:
        values = [seconds(f) for f in faults if f.kind == kind]
        if values:
            found[kind] = {
                "faults": len(values),
                **summary([v for v in values if v is not None]),
            }
    return found


def undisturbed(args: argparse.Namespace, folder: Path, *, replicas: int) -> dict[str, float]:
    """The final losses of the runs without faults, by seed."""
    losses = {}
    for seed in args.seeds:
        out = folder / (
            f"undisturbed{seed}" if replicas == args.replicas else f"undisturbed{replicas}_{seed}"
        )
        command = [*training(args, seed=seed), "--replicas", str(replicas), "--out", str(out)]
        if not (out / "result.json").exists():
            # Probes are off, as in the soak.
            subprocess.run([*command, "--probes", "0"], check=True, capture_output=True, text=True)
        losses[str(seed)] = json.loads((out / "result.json").read_text())["final_eval_loss"]
        print(f"{replicas} replicas undisturbed, seed {seed}: {losses[str(seed)]:.4f}", flush=True)
    return losses


def compared(report: dict[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The report with the losses of undisturbed runs, and with what is wrong.

    The loss is held against runs of all replicas. Where it lies above these, runs of as many as were there on average, rounded
    down, stand beside it for information: a replica that is away brings no data.
    """
    present = report["replicas_present"]
    losses = undisturbed(args, folder, replicas=args.replicas)
    final = report["final_eval_loss"]
    asks_why = bool(losses) and not within(final, losses) and int(present) < args.replicas
    fewer = undisturbed(args, folder, replicas=int(present)) if asks_why else {}
    problems = {
        f"{report['digests_that_differ']} digests differ": report["digests_that_differ"] > 0,
        f"{report['committed_steps_lost']} committed steps were lost": report["committed_steps_lost"] > 0,
        f"a stall of {report['longest_stall_s']} s": report["longest_stall_s"] > report["stated_time_s"],
        f"{report['faults']} faults instead of {args.faults}": report["faults"] < args.faults,
        "replicas ended with different weights": len(report["weights"]) > 1,
        f"a loss of {final} at the end": bool(losses) and not within(final, losses),
    }
    return report | {
        "undisturbed_eval_loss": losses,
        "undisturbed_eval_loss_of_fewer": fewer,
        "within_the_spread_of_all": within(final, losses) if losses else None,
        "problems": [text for text, is_wrong in problems.items() if is_wrong],
    }


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="one_bit_muon(interval=5)")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--batch", type=int, default=2, help="sequences of 32 tokens a replica and step")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--every-s", type=float, default=3.0, help="mean time from one fault to the next")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="of the replicas")
    parser.add_argument("--join-s", type=float, default=15.0, help="of the replicas")
    parser.add_argument("--rate", default="10mbit", help="of each host's link")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the faults")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the undisturbed runs")
    parser.add_argument("--out", type=Path, help="the report, as JSON")
    parser.add_argument("--keep", type=Path, help="folder for what the replicas write")
    parser.add_argument(
        "--again", type=Path, help="a report that is judged anew, by what --keep holds; nothing is soaked"
    )
    args = parser.parse_args()
    # Whoever ends the soak ends its replicas, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: ended by SIGTERM"))
    folder = args.keep or Path(tempfile.mkdtemp(prefix="muonwire-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    if args.again:
        report = json.loads(args.again.read_text())
        seen = folder / SEEN
        anew = judge(json.loads(seen.read_text())) if seen.exists() else {}
        return finish(report | anew, args, folder)
    with hosts(args.replicas + 1, rate=args.rate) as machines:
        soak = Soak(args, machines, folder)
        soak.run()
        took_s = soak.now()
    lines = sorted(
        ({"replica": r.name, **line} for r in soak.replicas for line in r.lines), key=lambda x: x["time_s"]
    )
    (folder / SEEN).write_text(json.dumps(lines) + "\n")
    (folder / "faults.json").write_text(json.dumps([asdict(f) for f in soak.faults]) + "\n")
    judged = judge(lines)
    results = [json.loads((r.folder / "result.json").read_text()) for r in soak.replicas if r.finished]
    # Detection by heartbeat, one time limit for a message and one to connect anew, the wait for a late one, and for one that joins.
    limit_s = HEARTBEAT_S + 2 * args.timeout_s + LATE_S + args.join_s
    report = {
        "command": f"python -m benchmarks.soak {' '.join(map(shell_word, sys.argv[1:]))}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "recipe": args.recipe,
        "replicas": args.replicas,
        "steps": args.steps,
        "batch": args.batch,
        "rate": args.rate,
        "namespaces": namespaces_allowed(),
        "took_s": round(took_s, 1),
        "faults": len(soak.faults),
        "kinds": dict(Counter(f.kind for f in soak.faults)),
        **judged,
        "stated_time_s": limit_s,
        "others_go_on_after": of_kinds(
            soak.faults, lambda f: None if f.survivors_s is None else f.survivors_s - f.at_s
        ),
        "back_after": of_kinds(
            soak.faults, lambda f: None if f.rejoined_s is None else f.rejoined_s - f.mended_s
        ),
        "finished": sum(r.finished for r in soak.replicas),
        "weights": sorted({r["weights_digest"] for r in results}),
        "final_eval_loss": results[0]["final_eval_loss"],
    }
    return finish(report, args, folder)


def finish(report: dict[str, Any], args: argparse.Namespace, folder: Path) -> int:
    """Compare, write, print."""
    report = compared(report, args, folder)
    text = json.dumps(report, indent=1) + "\n"
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
    print(text, end="")
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if report["problems"] else 0


def within(loss: float, losses: dict[str, float]) -> bool:
    """Whether a loss lies at most a spread (largest minus smallest) above the largest of these, or below it."""
    if not losses:
        return False
    low, high = min(losses.values()), max(losses.values())
    return loss <= high + (high - low)


def shell_word(text: str) -> str:
    """A word of a command line, quoted where a shell would take it apart."""
    return f"'{text}'" if set(text) & set(" ()") else text


if __name__ == "__main__":
    sys.exit(main())
