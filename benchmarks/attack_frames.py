"""Tampered, forged, replayed, foreign and malformed messages against replicas that train.

    python benchmarks/attack_frames.py --frames 10000 --out evidence/attack_frames.json

Two processes train over gloo with a secret. Somebody between them, in both directions, alters messages and adds others; how
many of each kind is known. Each recipe is trained without a secret, with one, and under attack: the weights must be the same to the
last bit, and each replica must have refused exactly what was made for it, kind by kind.
"""

import argparse
import io
import json
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from muonwire.tasks import settings_type
from muonwire.train import TrainConfig
from muonwire.train.single import train_here
from muonwire.transport import ProcessGroupTransport
from muonwire.transport.ahead import InFlight
from muonwire.transport.message import Mark, Message, Place, Refusal
from muonwire.transport.process_group import _SEALED_TAG
from muonwire.transport.secret import Secret

SECRET = Secret(bytes(range(100, 132)))
RECIPES = ("one_bit_muon(interval=2)", "muon")
ADDED = ("malformed", "foreign", "forged", "replayed")
NAMES = {"altered": Refusal.ALTERED, "forged": Refusal.ALTERED, "replayed": Refusal.REPLAYED}
NAMES |= {"foreign": Refusal.FOREIGN, "malformed": Refusal.MALFORMED}


class Attacked(ProcessGroupTransport):
    """A transport whose messages somebody alters on their way, and adds to.

    Args:
        frames: how many to alter or to add in all, from the first message after the greetings on.
        at_once: how many to add before each genuine message.
        seed: of what is done.
    """

    def __init__(self, *, frames: int, at_once: int, seed: int, **options: Any) -> None:
        self.made: Counter[str] = Counter()
        self._left_frames, self._at_once = frames, at_once
        self._chance = random.Random(seed)
        self._delivered: list[bytearray] = []
        self._kept: list[InFlight] = []
        super().__init__(**options)

    @override
    def _start(self, sends: bool, peer: int, buffer: Tensor, tag: int) -> InFlight:
        if sends and tag == _SEALED_TAG and not int(buffer[3]) & (Mark.HELLO | Mark.BYE):
            genuine = bytearray(buffer.numpy().tobytes())
            for _ in range(min(self._at_once, self._left_frames)):
                kind = self._chance.choice(ADDED if self._delivered else ADDED[:3])
                self._count(kind)
                self._kept.append(self._put(peer, self._make(kind, genuine), tag))
            if self._left_frames and self._chance.random() < 0.3:
                self._count("altered")
                at = self._chance.randrange(24, len(genuine))
                genuine[at] ^= (1, 2, 4, 8, 16, 32, 64, 128)[self._chance.randrange(8)]
                buffer = torch.frombuffer(genuine, dtype=torch.uint8)
            else:
                self._delivered.append(genuine)
                self._delivered = self._delivered[-50:]
        return super()._start(sends, peer, buffer, tag)

    def _put(self, peer: int, made: bytes | bytearray, tag: int) -> InFlight:
        return super()._start(True, peer, torch.frombuffer(bytearray(made), dtype=torch.uint8), tag)

    def _count(self, kind: str) -> None:
        self.made[kind] += 1
        self._left_frames -= 1

    def _make(self, kind: str, genuine: bytearray) -> bytes | bytearray:
        chance = self._chance
        if kind == "replayed":
            return chance.choice(self._delivered)
        if kind == "malformed":
            return chance.randbytes(chance.randrange(1, 4000))
        content = chance.randbytes(chance.randrange(2000))
        message = Message(Mark.NONE, 1 << 40, chance.randrange(1 << 20), 0, 1 << 40, content)
        run, epoch = int.from_bytes(genuine[8:12], "little"), int.from_bytes(genuine[12:20], "little")
        place = Place(run, epoch, self.rank, 1 - self.rank)
        if kind == "forged":
            return message.seal(place, Secret(chance.randbytes(32)))
        # Of another run, an epoch before, another sender, or for another receiver; made with the right secret.
        others = (
            place._replace(run=run ^ 1),
            place._replace(epoch=epoch + 1),
            place._replace(sender=2),
            place._replace(receiver=3),
        )
        return message.seal(chance.choice(others), SECRET)


def config_of(recipe: str, steps: int) -> TrainConfig:
    text = settings_type("text")
    small = {"model_size": "pico", "sequence": 16, "batch": 2}
    return TrainConfig(
        task=text(**small), recipe=recipe, lr=0.01, steps=steps, evaluate_every=steps, tensorboard=False
    )


class Names(logging.Handler):
    """Keeps what the log of a replica names."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    @override
    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())

    @property
    def kinds(self) -> list[str]:
        """The kinds whose first message was named."""
        starts = [f"'s and is {kind.value} (number 1 of" for kind in Refusal]
        found = [any(start in text for text in self.said) for start in starts]
        return [kind.value for kind, named in zip(Refusal, found, strict=True) if named]


def train(recipe: str, how: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run on this replica; what it ended with, and what it refused."""
    rank = arguments.rank
    group = dist.new_group([0, 1], timeout=timedelta(seconds=120))
    names = Names()
    log = logging.getLogger("muonwire.transport")
    log.addHandler(names)
    transport: ProcessGroupTransport
    if how == "attacked":
        frames = arguments.frames // 2 + rank * (arguments.frames % 2)
        options = {"frames": frames, "at_once": arguments.at_once, "seed": rank}
        transport = Attacked(**options, group=group, secret=SECRET, run="attack")
    else:
        transport = ProcessGroupTransport(group, secret=SECRET if how == "sealed" else None, run="attack")
    began = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        result = train_here(config_of(recipe, arguments.steps), folder, transport, resume=False)
    transport.close()
    log.removeHandler(names)
    return {
        "weights": result.weights_digest,
        "loss": result.final_eval_loss,
        "made": dict(getattr(transport, "made", {})),
        "refused": dict(transport.refused[1 - rank]),
        "named": names.kinds,
        "egress_bytes": transport.meter.total.egress_bytes,
        "seconds": round(time.perf_counter() - began, 3),
    }


def work(arguments: argparse.Namespace) -> None:
    """One replica: every run, one after the other; prints a line of JSON for each."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = f"tcp://127.0.0.1:{arguments.port}"
    dist.init_process_group("gloo", init_method=place, rank=arguments.rank, world_size=2)
    for recipe in RECIPES:
        for how in (*arguments.ways, "attacked"):
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps(train(recipe, how, arguments, Path(folder))), flush=True)
    dist.destroy_process_group()


def run(arguments: argparse.Namespace) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Both replicas; what each reports of every run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, __file__, *sys.argv[1:], "--port", str(port), "--rank"]
    replicas = [subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    # Each fills less than a pipe holds.
    said = [replica.communicate()[0] for replica in replicas]
    codes = [replica.returncode for replica in replicas]
    if any(codes):
        raise SystemExit(f"the replicas ended with {codes}")
    runs = [(recipe, how) for recipe in RECIPES for how in (*arguments.ways, "attacked")]
    pairs = zip(*(map(json.loads, text.splitlines()) for text in said), strict=True)
    return {which: list(pair) for which, pair in zip(runs, pairs, strict=True)}


def expected(made: dict[str, int]) -> dict[str, int]:
    """What must have been refused, by the names of refusals."""
    counted: Counter[str] = Counter()
    for kind, count in made.items():
        counted[NAMES[kind].value] += count
    return dict(counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000, help="altered or added for each recipe")
    parser.add_argument("--at-once", type=int, default=20, help="added before each genuine message")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument(
        "--ways", nargs="+", default=["plain", "sealed"], help="what the attacked run is compared with"
    )
    parser.add_argument("--out", type=Path)
    for name in ("--port", "--rank"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        work(arguments)
        return
    rows = []
    reports = run(arguments)
    for recipe in RECIPES:
        runs = {how: reports[recipe, how] for how in (*arguments.ways, "attacked")}
        attacked = runs["attacked"]
        weights = {replica["weights"] for replicas in runs.values() for replica in replicas}
        refused = [replica["refused"] for replica in attacked]
        made = [replica["made"] for replica in attacked]
        rows.append(
            {
                "recipe": recipe,
                "steps": arguments.steps,
                "frames": sum(sum(kinds.values()) for kinds in made),
                "made": made,
                "refused": refused,
                "refused_is_made": refused == [expected(kinds) for kinds in reversed(made)],
                "named_in_the_log": [replica["named"] for replica in attacked],
                "weights": sorted(weights),
                "weights_identical": len(weights) == 1,
                "loss": attacked[0]["loss"],
                "egress_bytes": {how: replicas[0]["egress_bytes"] for how, replicas in runs.items()},
                "seconds": {how: max(r["seconds"] for r in replicas) for how, replicas in runs.items()},
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
