"""`muonwire train --elastic`: one run with whichever replicas are there.

Every replica has a folder of its own, with metrics, events, checkpoints and result as on one machine, and evaluates alone: the
one of rank 0 during the run, all of them at its end.
"""

import fcntl
import json
import os
import socket
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from typing_extensions import override

from muonwire.errors import StoppedError, UsageError
from muonwire.optim.elastic import Elastic
from muonwire.tasks.base import Task
from muonwire.train.config import TrainConfig
from muonwire.train.launch import set_threads, under_launcher
from muonwire.train.loop import RunResult, Trainer
from muonwire.train.page import print_page
from muonwire.train.single import train_here
from muonwire.transport import SingleReplica, Transport, digest_all
from muonwire.transport.elastic import ElasticSettings, ElasticTransport
from muonwire.transport.secret import Secret

# One JSON object a synchronization: "time_s" (Unix time), "step", "commits", "epoch", "members" and "digest" of the shared weights.
DIGESTS = "digests.jsonl"
LOCK = ".lock"


class ElasticTrainer(Trainer):
    """Trains with whichever replicas are there; see Trainer and Elastic.

    Args:
        config: the settings.
        task: data, model and loss.
        transport: an ElasticTransport that has not met anybody yet.
        folder: of this replica alone.
        device: of the model. Default: a GPU where there is one.
    """

    transport: ElasticTransport

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        transport: Transport,
        folder: Path,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        assert isinstance(transport, ElasticTransport)
        # Probes of the gradients compare the replicas at fixed steps.
        super().__init__(replace(config, probes=0), task, transport, folder, device=device)
        self.elastic = Elastic(self.optimizer, model=self.model)
        self._alone = SingleReplica()
        self._asked_to_stop = False
        self._seen_commits = 0
        transport.stopping = lambda: self._asked_to_stop
        torch.manual_seed(config.seed * 1000 + zlib.crc32(transport.name.encode()) % 1000)

    @override
    def request_stop(self) -> None:
        """Ask this replica to leave after its step; the others go on."""
        self._asked_to_stop = True

    @property
    @override
    def stops(self) -> bool:
        return self._asked_to_stop

    @property
    @override
    def writes(self) -> bool:
        return True

    @property
    @override
    def keepers(self) -> Transport:
        return self._alone

    @override
    def begin(self) -> None:
        """Join the replicas that are there, at their step."""
        self.elastic.say = lambda line: self.say(f"{self.transport.name}: {line}")
        began_s = time.monotonic()
        self.elastic.join()
        self.step = self.optimizer.num_steps
        self._note_synchronization()
        if self.events is not None:
            self.events.members(epoch=self.transport.epoch, seconds=round(time.monotonic() - began_s, 3))

    @override
    def finish(self) -> None:
        """Stay a while for replicas that are away."""
        if not self.stops and self.step >= self.config.steps:
            self.elastic.finish(linger_s=self.transport.how.linger_s)

    @override
    def _step_optimizer(self, step: int) -> int:
        began_s = time.monotonic()
        self.elastic.step()
        if self.optimizer.num_steps >= self.config.steps:
            self.elastic.synchronize()
        if self.transport.commits != self._seen_commits:
            self._note_synchronization()
            if self.events is not None:
                self.events.members(epoch=self.transport.epoch, seconds=round(time.monotonic() - began_s, 3))
        return self.optimizer.num_steps

    def _note_synchronization(self) -> None:
        self._seen_commits = self.transport.commits
        if not self.config.digest_every:
            return
        record = {
            "time_s": round(time.time(), 3),
            "step": self.optimizer.num_steps,
            "commits": self.transport.commits,
            "epoch": self.transport.epoch,
            "members": self.transport.members,
            "digest": digest_all(self.optimizer.shared()).hex(),
        }
        with (self.folder / DIGESTS).open("a") as file:
            file.write(json.dumps(record) + "\n")

    @override
    def _check_replicas(self) -> str:
        # The replicas are compared whenever one has come or gone.
        with self.optimizer.shared_weights():
            return digest_all(self.model).hex()

    @override
    def _evaluate(self) -> tuple[float | None, float | None]:
        recent, self._recent_losses = self._recent_losses, []
        train_loss = sum(recent) / len(recent) if recent else None
        if self.transport.rank > 0 and self.step < self.config.steps:
            return None, train_loss
        with self.optimizer.shared_weights():
            total, terms = self.task.evaluate(self.model, rank=0, world_size=1)
        return total / terms, train_loss


def train_elastic(
    config: TrainConfig,
    folder: Path,
    how: ElasticSettings,
    *,
    resume: bool = False,
    threads: int | None = None,
    secret: Secret | None = None,
    run: str = "",
    allow_public: bool = False,
    page: bool = True,
) -> RunResult:
    """Train with whichever replicas are there; this process is one of them, and every machine starts it by itself.

    Args:
        config: the settings, the same on all replicas; probes are left out.
        folder: of this replica alone: metrics, checkpoints, events and result.json.
        how: see ElasticSettings; without a name, that of the machine and a number that follows from the folder.
        resume: begin with the newest checkpoint in the folder; where the others are further, their state is taken over.
        threads: of the arithmetic. Default: all cores.
        secret: of all replicas of the run. Default: none.
        run: name of the run that the tags stand for. Default: none.
        allow_public: listen without a secret where the internet may reach it. Default: no.
        page: write page.html, where what draws it is installed. Default: True.

    Raises:
        UsageError: bad settings or data, a recipe that is wrong where replicas come and go, a folder that holds another run, or
            replicas that train something else.
        ExchangeError: the lighthouse cannot be reached, or too few replicas came in time.
        StoppedError: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    if under_launcher() and int(os.environ["WORLD_SIZE"]) > 1:
        raise UsageError(
            f"train: --elastic under a launcher with {os.environ['WORLD_SIZE']} processes; start `muonwire train --elastic` on "
            "every machine by itself, without torchrun"
        )
    set_threads(1, threads)
    if not how.name:
        # The same whenever this replica is started again.
        number = zlib.crc32(str(folder.absolute()).encode())
        how = replace(how, name=f"{socket.gethostname()}-{number:08x}".replace(":", "-"))
    with (
        _locked(folder),
        closing(ElasticTransport(how, secret=secret, run=run, allow_public=allow_public)) as transport,
    ):
        result = train_here(config, folder, transport, resume=resume, trainer_type=ElasticTrainer)
        if page:
            print_page(folder)
    if not result.finished:
        raise StoppedError(
            f"{transport.name} left after step {result.steps}; the same command with --resume joins again"
        )
    return result


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Within the block no other process of this machine trains in the folder.

    Raises:
        UsageError: one does already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"train: another replica trains in {folder} already; with --elastic every replica has an --out of its own"
            ) from error
        yield
