"""`muonwire train`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from muonwire.cli.arguments import parse
from muonwire.tasks import settings_type
from muonwire.train import TrainConfig, train

EXAMPLES = (
    "muonwire train --recipe muon --replicas 4 --out runs/muon",
    "muonwire train --recipe 'one_bit_muon(interval=20)' --lr 0.012 --replicas 4 --out runs/local",
    "muonwire train --recipe muon --replicas 4 --out runs/muon --resume",
    "muonwire train --recipe muon --replicas 4 --steps 600 --out runs/muon --resume",
    "muonwire train --recipe distro --text book.txt --model-size micro --out runs/book",
    "muonwire train --task vision --recipe muon --model resnet --batch 32 --out runs/digits",
    "torchrun --nproc-per-node 4 -m muonwire train --recipe muon --out runs/muon",
)


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Arguments of `muonwire train`.

    Args:
        task: "text", "vision", or a task of your own; with --help after it, the options of that task.
        config: the run.
        out: folder for metrics.jsonl, checkpoints, TensorBoard events and result.json.
        replicas: processes to start on this machine; under torchrun, which starts them itself, leave it out.
        resume: continue from the newest checkpoint in --out. The options that shape the outcome must be those it was started with,
            except --steps: more steps make a run longer, finished or not. Where the schedule depends on the number of steps, a
            line shows the new rates (docs/train.md).
        threads: of each replica's arithmetic. Default: its share of the cores.
        port: of the rendezvous of the replicas. Default: any free one.
        secret_file: a file that all replicas have (`muonwire secret FILE`): messages of anybody else are refused. Default: the one
            that MUONWIRE_SECRET_FILE names, or none.
        allow_public: listen without a secret where the internet may reach it.
    """

    task: str = "text"
    config: TrainConfig = field(default_factory=TrainConfig)
    out: Path = Path("runs/train")
    replicas: int = 1
    resume: bool = False
    threads: int | None = None
    port: int = 0
    secret_file: Path | None = None
    allow_public: bool = False


def _task_name(args: Sequence[str]) -> str:
    """The value of --task, which decides what other options there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    # A missing value is left to tyro, whose message names the option.
    parser.add_argument("--task", default="text", nargs="?", const="text")
    return str(parser.parse_known_args(list(args))[0].task)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = "Train one recipe on one replica or many, with checkpoints, metrics and every byte counted."
    task = settings_type(_task_name(args))
    default = TrainCommand(config=TrainConfig(task=task()))
    command = parse(TrainCommand, args, command="train", about=about, examples=EXAMPLES, default=default)
    train(
        command.config,
        command.out,
        replicas=command.replicas,
        resume=command.resume,
        threads=command.threads,
        port=command.port,
        secret_file=command.secret_file,
        allow_public=command.allow_public,
    )
    return 0
