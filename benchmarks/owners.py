"""What means by owners send, by the meter and by the kernel's counters; and, by `muonwire compare`, what they cost in loss.

    python benchmarks/owners.py bytes --out evidence/owners/bytes.json
    python benchmarks/owners.py counters --out evidence/owners/counters.json       # as root: each replica has a network of its own
    python benchmarks/owners.py loss --jobs 2 --runs runs/owners --out evidence/owners/loss.json

`bytes`: one synchronization of one_bit_muon by replicas that are threads, of a Llama whose gradients are random, so that the
replicas' signs are independent. Bits are those of all messages of purpose "update", frames and shared scales included, over the
number of parameters; of the replica that sends, or receives, most. Without loss also with gradients of the text task, where signs
agree more often than by chance.

`counters`: the same by processes in network namespaces, whose only traffic beside gloo's is that of the rendezvous. The counters of
their interfaces are read between two barriers before and after some synchronizations. From the bytes 66 are subtracted for each
packet (Ethernet 14, IPv4 20, TCP 32 with its timestamps); segmentation offload is switched off, so that the packets counted are
those of a link. What the meter does not count is told apart: gloo's preambles, 144 bytes for each message to a peer and as many
from it, and what TCP sent again, which each connection counts itself.

`loss`: `muonwire compare --virtual` with one_bit_muon and each kind of mean, 8 replicas.
"""

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from muonwire import recipes
from muonwire.compare.measured import FRAME_HEADER_BYTES, Counters
from muonwire.errors import UsageError
from muonwire.tasks.models import build_llama
from muonwire.tasks.text import TextSettings
from muonwire.transport import Transport, run_threads
from muonwire.transport.meter import Traffic

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PORT = 29463
INTERVAL = 11
VOCABULARY, SEQUENCE = 256, 64
SHARED = "sign(scale=shared)"
FORMS: dict[str, dict[str, Any]] = {
    # Of eight replicas and more the default takes turns.
    "gather": {"parts": 1},
    "lossless": {"means": "lossless", "codec": SHARED, "vector_codec": SHARED},
    "recompressed": {"means": "recompressed"},
}
# gloo's own where two replicas send a message to each other, from each of them: a preamble of six 64-bit words before the message,
# one that says that it is there, and one that says that there is room for the other's (gloo/transport/tcp/pair.cc).
GLOO_BYTES = 3 * 6 * 8
# Where `tcpi_bytes_retrans` (u64) stands in struct tcp_info of linux/tcp.h.
_BYTES_RETRANS = slice(208, 216)


def optimizer_of(
    form: str, transport: Transport, size: str, *, interval: int = 1
) -> tuple[torch.nn.Module, Any]:
    """A Llama, and one_bit_muon with this kind of means, which synchronizes every ``interval`` steps."""
    model = build_llama(size, vocabulary=VOCABULARY, sequence=SEQUENCE, seed=0)
    options = {**FORMS[form], "interval": interval, "lr": 0.014, "transport": transport}
    return model, recipes.build("one_bit_muon", model, **options)


def step(model: torch.nn.Module, optimizer: Any, *, number: int, rank: int) -> None:
    """One step with a random gradient, another on each replica."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def traffic(
    form: str, replicas: int, *, size: str = "nano", synchronizations: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Bits a parameter that leave and reach a replica in one synchronization, of the replica that has most, and the messages.

    Gradients are random, or with ``synchronizations`` those of the text task: then one record for each synchronization of these
    numbers, each of 11 steps.
    """

    def worker(rank: int, make: Any) -> list[tuple[Traffic, int]]:
        transport = make()
        model, optimizer = optimizer_of(form, transport, size, interval=INTERVAL if synchronizations else 1)
        numel = sum(p.numel() for p in model.parameters())
        if not synchronizations:
            step(model, optimizer, number=0, rank=rank)
            return [(transport.meter.by_purpose["update"], numel)]
        spent, before = {}, Traffic()
        for number in text_steps(model, optimizer, size, last=max(synchronizations)):
            after = transport.meter.by_purpose["update"]
            spent[number], before = after - before, after
        return [(spent[number], numel) for number in synchronizations]

    results = zip(*run_threads(worker, replicas=replicas), strict=True)
    return [
        {
            "means": form,
            "replicas": replicas,
            "gradients": f"text, synchronization {number}" if number else "random",
            "parameters": by_rank[0][1],
            "egress_bits": 8 * max(t.egress_bytes / numel for t, numel in by_rank),
            "received_bits": 8 * max(t.received_bytes / numel for t, numel in by_rank),
            "own_message_bits": 8 * max(t.sent_bytes / numel for t, numel in by_rank),
            "messages": max(t.num_messages for t, _ in by_rank),
        }
        for number, by_rank in zip(synchronizations or [0], results, strict=True)
    ]


def text_steps(model: torch.nn.Module, optimizer: Any, size: str, *, last: int) -> Iterator[int]:
    """Take the steps up to the ``last`` synchronization on the text task; yields the number of each synchronization after it."""
    task = TextSettings(model_size=size, sequence=SEQUENCE, batch=4).make()
    transport = optimizer.transport
    for number in range(1, last * INTERVAL + 1):
        batch = task.batch(seed=0, step=number, rank=transport.rank, world_size=transport.world_size)
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model, batch))
        optimizer.step()
        if number % INTERVAL == 0:
            yield number // INTERVAL


def counters(interface: str) -> dict[str, int]:
    """The kernel's counters of this interface."""
    read = Counters.read(interface)
    return {
        "tx_bytes": read.egress_bytes + FRAME_HEADER_BYTES * read.egress_packets,
        "tx_packets": read.egress_packets,
        "rx_bytes": read.received_bytes + FRAME_HEADER_BYTES * read.received_packets,
        "rx_packets": read.received_packets,
    }


def resent_bytes() -> dict[str, int]:
    """By address of the peer: the bytes that TCP sent again on this process's connections to it."""
    found: dict[str, int] = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            connection = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:
            # The folder's own descriptor, which is closed by now, or no socket.
            continue
        with connection, suppress(OSError):
            address = connection.getpeername()[0].removeprefix("::ffff:")
            information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            count = int.from_bytes(information[_BYTES_RETRANS], sys.byteorder)
            found[address] = found.get(address, 0) + count
    return found


def replica(form: str, size: str, synchronizations: int) -> None:
    """One process of `counters`: prints what the kernel and the meter counted, as JSON."""
    import torch.distributed as dist

    from muonwire.transport import ProcessGroupTransport
    from muonwire.transport.rendezvous import join

    interface = join(backend="gloo", allow_public=True)
    transport = ProcessGroupTransport()
    model, optimizer = optimizer_of(form, transport, size)
    step(model, optimizer, number=0, rank=transport.rank)
    transport.gather(b"before", purpose="control")
    kernel, meter, resent = counters(interface.name), transport.meter.total, resent_bytes()
    for number in range(1, synchronizations + 1):
        step(model, optimizer, number=number, rank=transport.rank)
    # All of the last step has arrived everywhere when the last message of this one has.
    transport.gather(b"after", purpose="control")
    spent = transport.meter.total - meter
    after = counters(interface.name)
    print(
        json.dumps(
            {
                **{name: after[name] - kernel[name] for name in kernel},
                "resent_bytes": {to: n - resent.get(to, 0) for to, n in resent_bytes().items()},
                "egress_bytes": spent.egress_bytes,
                "received_bytes": spent.received_bytes,
                "messages": spent.num_messages,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        )
    )
    dist.destroy_process_group()


def counted(form: str, replicas: int, *, size: str, synchronizations: int) -> list[dict[str, Any]]:
    """What each replica's kernel and meter counted."""
    from muonwire.compare.hosts import hosts, namespaces_allowed, replica_environment

    if not namespaces_allowed():
        raise UsageError("owners: counters needs network namespaces: run it as root, with iproute2")
    with hosts(replicas, rate="") as machines:
        for machine in machines:
            words = ["ip", "netns", "exec", machine.namespace, "ethtool", "-K", "wan0"]
            subprocess.run([*words, "tso", "off", "gso", "off", "gro", "off"], capture_output=True)
            # Where there is no ethtool: segments of one packet are all that then leave the sockets.
            gso = ["gso_max_segs", "1"]
            subprocess.run(
                ["ip", "-n", machine.namespace, "link", "set", "dev", "wan0", *gso],
                check=True,
                capture_output=True,
            )
        processes = []
        for rank, machine in enumerate(machines):
            env = replica_environment(machines, rank, port=PORT)
            words = [sys.executable, __file__, "replica", form, size, str(synchronizations)]
            processes.append(machine.start(words, env=env, stdout=subprocess.PIPE))
        texts = [process.communicate(timeout=600)[0] for process in processes]
    return judged(
        [
            {"means": form, "replicas": replicas, "rank": rank, **json.loads(text.splitlines()[-1])}
            for rank, text in enumerate(texts)
        ],
        addresses=[machine.address for machine in machines],
    )


def judged(records: Sequence[dict[str, Any]], *, addresses: Sequence[str]) -> list[dict[str, Any]]:
    """What the replicas printed, with the kernel's bytes over those of the meter, and over what is known of both.

    Args:
        records: by rank.
        addresses: by rank.
    """
    by_way = {
        "tx": ("egress_bytes", [sum(r["resent_bytes"].values()) for r in records]),
        "rx": ("received_bytes", [sum(r["resent_bytes"].get(a, 0) for r in records) for a in addresses]),
    }
    results = []
    for rank, record in enumerate(records):
        own = {**record, "gloo_bytes": GLOO_BYTES * record["messages"] * (len(records) - 1)}
        for way, (of_meter, resent) in by_way.items():
            content = own[f"{way}_bytes"] - FRAME_HEADER_BYTES * own[f"{way}_packets"]
            own[f"{way}_without_headers"] = content
            own[f"{way}_resent_bytes"] = resent[rank]
            own[f"{way}_over_meter"] = content / own[of_meter]
            own[f"{way}_over_known"] = content / (own[of_meter] + own["gloo_bytes"] + resent[rank])
        results.append(own)
    return results


def loss(
    out: Path, *, jobs: int, steps: int, replicas: int, seeds: Sequence[int], lr: float, size: str
) -> list[dict[str, Any]]:
    """The final losses of one_bit_muon with each kind of mean; what is done is not repeated."""
    named = [recipes.format_recipe("one_bit_muon", options) for options in FORMS.values()]
    options: dict[str, Sequence[Any]] = {
        "recipes": named,
        "lr-grid": [lr],
        "seeds": seeds,
        "replicas": [replicas],
        "steps": [steps],
        "evaluate-every": [min(125, steps)],
        "jobs": [jobs],
        "out": [out],
    }
    words = [str(word) for key, values in options.items() for word in (f"--{key}", *values)]
    task = ["--model-size", size, "--batch", "8"]
    subprocess.run([sys.executable, "-m", "muonwire", "compare", "--virtual", *task, *words], check=True)
    summary = json.loads((out / "summary.json").read_text())
    kept = (
        "recipe",
        "options",
        "seed",
        "lr",
        "replicas",
        "steps",
        "final_eval_loss",
        "num_parameters",
        "diverged",
    )
    measured = ("bytes_sent_per_step", "bytes_received_per_step", "bytes_egress_per_step", "weights_digest")
    return [{name: run[name] for name in (*kept, *measured)} for run in summary]


def main() -> None:
    """Measure, print each result, and write all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(dest="what", required=True)
    for name in ("bytes", "counters", "loss"):
        way = ways.add_parser(name)
        way.add_argument("--out", type=Path)
        way.add_argument(
            "--replicas",
            type=int,
            nargs="+",
            default={"bytes": [4, 16, 64], "counters": [4], "loss": [8]}[name],
        )
        sizes = {"bytes": ["nano"], "counters": ["nano", "micro"], "loss": ["pico"]}[name]
        way.add_argument("--model-size", nargs="+", default=sizes)
    ways.choices["bytes"].add_argument("--synchronizations", type=int, nargs="*", default=[1, 2, 5])
    ways.choices["counters"].add_argument("--synchronizations", type=int, default=5)
    ways.choices["loss"].add_argument("--runs", type=Path, default=ROOT / "runs" / "owners")
    ways.choices["loss"].add_argument("--jobs", type=int, default=2)
    ways.choices["loss"].add_argument("--steps", type=int, default=1500)
    ways.choices["loss"].add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ways.choices["loss"].add_argument("--lr", type=float, default=0.014)
    inner = ways.add_parser("replica")
    for name in ("form", "size", "synchronizations"):
        inner.add_argument(name)
    a = parser.parse_args()
    if a.what == "replica":
        return replica(a.form, a.size, int(a.synchronizations))
    results: list[dict[str, Any]] = []
    for replicas, size in itertools.product(a.replicas, a.model_size):
        if a.what == "loss":
            results += loss(
                a.runs, jobs=a.jobs, steps=a.steps, replicas=replicas, seeds=a.seeds, lr=a.lr, size=size
            )
            continue
        for form in FORMS:
            if a.what == "bytes":
                results += traffic(form, replicas, size=size)
                if a.synchronizations and form == "lossless":
                    print(json.dumps(results[-1]), flush=True)
                    results += traffic(form, replicas, size=size, synchronizations=a.synchronizations)
            else:
                results += counted(form, replicas, size=size, synchronizations=a.synchronizations)
            print(json.dumps(results[-1]), flush=True)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
