"""`muonwire train`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from muonwire.cli.arguments import parse, task_name
from muonwire.errors import UsageError
from muonwire.tasks import settings_type
from muonwire.train import TrainConfig, train
from muonwire.train.elastic import train_elastic
from muonwire.transport.elastic import ELASTIC_TIMEOUT_S, ElasticSettings
from muonwire.transport.rendezvous import EXCHANGE_TIMEOUT_S

EXAMPLES = (
    "muonwire train --recipe muon --replicas 4 --out runs/muon",
    "muonwire train --recipe 'one_bit_muon(interval=20)' --lr 0.012 --replicas 4 --out runs/local",
    "muonwire train --recipe muon --replicas 4 --out runs/muon --resume",
    "muonwire train --recipe muon --replicas 4 --steps 600 --out runs/muon --resume",
    "muonwire train --recipe distro --text book.txt --model-size micro --out runs/book",
    "muonwire train --model HuggingFaceTB/SmolLM2-135M --dtype bfloat16 --lr 0.002 --clip 1 --out runs/mine",
    "muonwire train --model smollm2 --lora 8 --recipe one_bit_muon --replicas 2 --text docs/*.md --out runs/adapters",
    "muonwire train --model config.json --tokenizer tokenizer.json --dataset Salesforce/wikitext:wikitext-2-raw-v1 --out runs/new",
    "muonwire train --task vision --recipe muon --model resnet --batch 32 --out runs/digits",
    "muonwire train --recipe one_bit_muon --replicas 4 --sites 2 --out runs/sites",
    "torchrun --nproc-per-node 4 -m muonwire train --recipe muon --out runs/muon",
    "muonwire train --recipe one_bit_muon --elastic --lighthouse 10.0.0.1:29510 --min-replicas 2 --out runs/elastic",
    "torchrun --nproc-per-node 8 -m muonwire train --elastic --lighthouse 10.0.0.1:29510 --resume --out runs/site",
)


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Arguments of `muonwire train`.

    Args:
        task: "text", "vision", or a task of your own; with --help after it, the options of that task.
        config: the run.
        out: folder for metrics.jsonl, checkpoints, TensorBoard events, result.json, and with --model the trained one, in model/.
        replicas: processes to start on this machine; under torchrun, which starts them itself, leave it out. With --elastic they
            are one site.
        resume: continue from the newest checkpoint in --out. The options that shape the outcome must be those it was started with,
            except --steps: more steps make a run longer, finished or not. Where the schedule depends on the number of steps, a
            line shows the new rates (docs/train.md).
        threads: of each replica's arithmetic. Default: its share of the cores.
        port: of the rendezvous of the replicas. Default: any free one.
        timeout_s: seconds for which a replica that does not answer is waited for, with a message every minute, before the run ends
            with an error (docs/links.md); with --elastic, before the others go on without it. The same on all replicas. Default:
            600, with --elastic 60.
        page: write page.html to --out when the run ends: loss against steps, bytes and time, and a time line of the replicas.
        elastic: this process is one replica of those that come and go, or with the others that torchrun or --replicas starts one
            site; start each by itself, in any order, with a folder of its own (docs/elastic.md).
        lighthouse: with --elastic, HOST:PORT of a running `torchft_lighthouse --min_replicas 1`.
        min_replicas: with --elastic, how many must be there for a synchronization.
        name: with --elastic, of this replica or site, different on each. Default: the machine's name and a number that follows
            from --out.
        join_s: with --elastic, how long the others wait for a replica that takes over their state, which must fit through the link
            in that time.
        patience_s: with --elastic, how long too few replicas are waited for.
        linger_s: with --elastic, how long replicas that have finished wait for those that were there before and are away.
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
    timeout_s: float | None = None
    page: bool = True
    elastic: bool = False
    lighthouse: str = ""
    min_replicas: int = 2
    name: str = ""
    join_s: float = 600.0
    patience_s: float = 3600.0
    linger_s: float = 60.0
    secret_file: Path | None = None
    allow_public: bool = False


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    about = "Train one recipe on one replica or many, with checkpoints, metrics and every byte counted."
    task = settings_type(task_name(args))
    default = TrainCommand(config=TrainConfig(task=task()))
    command = parse(TrainCommand, args, command="train", about=about, examples=EXAMPLES, default=default)
    if command.elastic:
        if command.config.sites is not None:
            raise UsageError(
                "train: --sites divides replicas that are there from the first step to the last; leave out --elastic, or --sites: "
                "with --elastic the replicas that are started together are one site (torchrun, or --replicas)"
            )
        how = ElasticSettings(
            lighthouse=command.lighthouse,
            min_replicas=command.min_replicas,
            name=command.name,
            timeout_s=ELASTIC_TIMEOUT_S if command.timeout_s is None else command.timeout_s,
            join_s=command.join_s,
            patience_s=command.patience_s,
            linger_s=command.linger_s,
        )
        train_elastic(
            command.config,
            command.out,
            how,
            replicas=command.replicas,
            resume=command.resume,
            threads=command.threads,
            port=command.port,
            secret_file=command.secret_file,
            allow_public=command.allow_public,
            page=command.page,
        )
        return 0
    if command.lighthouse:
        raise UsageError(
            "train: --lighthouse is for replicas that come and go; add --elastic, or leave it out"
        )
    train(
        command.config,
        command.out,
        replicas=command.replicas,
        resume=command.resume,
        threads=command.threads,
        port=command.port,
        timeout_s=EXCHANGE_TIMEOUT_S if command.timeout_s is None else command.timeout_s,
        page=command.page,
        secret_file=command.secret_file,
        allow_public=command.allow_public,
    )
    return 0
