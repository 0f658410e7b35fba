"""`muonwire train --elastic`: one run with whichever replicas are there.

Every member, a replica or a site of several, has a folder of its own, with metrics, events, checkpoints and result as on one
machine, and evaluates alone: the one of rank 0 during the run, all of them at its end.
"""

import fcntl
import json
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from typing_extensions import override

from muonwire.errors import StoppedError
from muonwire.optim.elastic import Elastic
from muonwire.tasks.base import Task
from muonwire.train.config import TrainConfig
from muonwire.train.launch import launch, process_group, set_threads, under_launcher
from muonwire.train.loop import Progress, RunResult, Trainer
from muonwire.train.page import print_page
from muonwire.train.single import check_folder, train_here
from muonwire.train.told import all_or_none
from muonwire.transport import SingleReplica, Transport, digest_all
from muonwire.transport.elastic import ElasticSettings, ElasticTransport
from muonwire.transport.elastic_sites import ElasticSiteTransport, longest_wait_s
from muonwire.transport.frames import FrameTransport
from muonwire.transport.members import MembersTransport
from muonwire.transport.secret import find_secret

# One JSON object a synchronization: "time_s" (Unix time), "step", "commits", "epoch", "members" and "digest" of the shared weights.
DIGESTS = "digests.jsonl"
LOCK = ".lock"


class ElasticTrainer(Trainer):
    """Trains with whichever replicas are there; see Trainer and Elastic.

    Args:
        config: the settings.
        task: data, model and loss.
        transport: an ElasticTransport or ElasticSiteTransport that has not met anybody yet.
        folder: of this replica or site alone.
        home: between the replicas of this site, which keep checkpoints and evaluate together; or of this replica alone.
        device: of the model. Default: a GPU where there is one.
    """

    transport: MembersTransport

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        transport: MembersTransport,
        folder: Path,
        *,
        home: Transport,
        device: torch.device | str | None = None,
    ) -> None:
        # Probes of the gradients compare the replicas at fixed steps.
        super().__init__(replace(config, probes=0), task, transport, folder, device=device)
        self.everyone = home
        given = self.given()
        common = digest_all(given).hex() if given else ""
        self.elastic = Elastic(self.optimizer, model=self.model, common=common)
        self._asked_to_stop = False
        # The same on all replicas of a site.
        self._stops = False
        self._seen_commits = 0
        transport.stopping = lambda: self._asked_to_stop
        who = f"{transport.name}/{home.rank}" if home.rank else transport.name
        torch.manual_seed(config.seed * 1000 + zlib.crc32(who.encode()) % 1000)

    @override
    def request_stop(self) -> None:
        """Ask this replica, and with it its site, to leave after its step; the others go on."""
        self._asked_to_stop = True

    @property
    @override
    def stops(self) -> bool:
        return self._stops

    @property
    @override
    def complete(self) -> bool:
        # Where it was asked to stop while the last synchronization waited, the last local steps are its own still.
        alone = self.optimizer.steps_alone if self.optimizer.local is not None else 0
        return super().complete and not alone

    @property
    @override
    def data_slice(self) -> tuple[int, int]:
        return self.transport.data_slice

    @override
    def begin(self) -> None:
        """Join the replicas that are there, at their step."""
        if self.writes:
            self.elastic.say = lambda line: self.say(f"{self.transport.name}: {line}")
        began_s = time.monotonic()
        self.elastic.join()
        self.step = self.optimizer.num_steps
        self._note_synchronization()
        if self.events is not None:
            self.events.members(epoch=self.transport.epoch, seconds=round(time.monotonic() - began_s, 3))
        self._stops = self.transport.stops()

    @override
    def run(self, on_progress: Callable[[Progress], None] | None = None) -> RunResult:
        """As Trainer's. One that is asked to stop while it waits for others keeps a checkpoint of its steps, too."""
        try:
            if self.step >= self.config.steps and not self.complete:
                # It comes back from the last synchronization, with nobody that was further.
                self._synchronize_last(time.monotonic())
                self.save()
            return super().run(on_progress)
        except StoppedError:
            self._stops, self.step = True, self.optimizer.num_steps
            if self.events is not None:
                self.events.stepped(self.step)
            self.save()
            return self._result(diverged=False, eval_loss=None)

    @override
    def finish(self) -> None:
        """Stay a while for replicas that are away."""
        if not self.stops and self.complete:
            self.elastic.finish(linger_s=self.transport.how.linger_s)

    @override
    def _step_optimizer(self, step: int) -> int:
        began_s = time.monotonic()
        self.elastic.step()
        self._synchronize_last(began_s)
        self._stops = self.transport.stops()
        return self.optimizer.num_steps

    def _synchronize_last(self, began_s: float) -> None:
        """Synchronize after the last step, and note what was synchronized since ``began_s``, on time.monotonic()."""
        if self.optimizer.num_steps >= self.config.steps:
            self.elastic.synchronize()
        if self.transport.commits != self._seen_commits:
            self._note_synchronization()
            if self.events is not None:
                self.events.members(epoch=self.transport.epoch, seconds=round(time.monotonic() - began_s, 3))

    def _note_synchronization(self) -> None:
        self._seen_commits = self.transport.commits
        if not self.config.digest_every or not self.writes:
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
        if self.transport.rank == 0 or self.step >= self.config.steps:
            return super()._evaluate()
        recent, self._recent_losses = self._recent_losses, []
        return None, sum(recent) / len(recent) if recent else None


def train_elastic(
    config: TrainConfig,
    folder: Path,
    how: ElasticSettings,
    *,
    replicas: int = 1,
    resume: bool = False,
    threads: int | None = None,
    port: int = 0,
    secret_file: Path | None = None,
    run: str = "",
    allow_public: bool = False,
    page: bool = True,
) -> None:
    """Train with whichever members are there; every machine starts its own by itself.

    A member is this process. Where a launcher has started it with others, or several replicas are asked for, it is the site that
    they make: it is there as a whole, or not at all.

    Args:
        config: the settings, the same on all members; probes are left out.
        folder: of this member alone: metrics, checkpoints, events and result.json; a site of several machines has one on each.
        how: see ElasticSettings; without a name, that of the machine and a number that follows from the folder.
        replicas: of a site, processes to start on this machine; ignored under torchrun, which starts them itself. Default: 1.
        resume: begin with the newest checkpoint in the folder; where the others are further, their state is taken over.
        threads: of each replica's arithmetic. Default: its share of the cores.
        port: of the rendezvous of a site. Default: any free one.
        secret_file: what all members share, so that strangers are refused. Default: what MUONWIRE_SECRET_FILE names, or none.
        run: name of the run that the tags stand for. Default: none.
        allow_public: listen without a secret where the internet may reach it. Default: no.
        page: write page.html, where what draws it is installed. Default: True.

    Raises:
        UsageError: bad settings or data, a recipe that is wrong where replicas come and go, a folder that holds another run, or
            others that train something else.
        ExchangeError: the lighthouse cannot be reached, or too few came in time.
        ReplicaLostError: this site has lost a replica; its last checkpoint is kept, and the others go on.
        StoppedError: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    if not how.name:
        # The same whenever this member is started again.
        number = zlib.crc32(str(folder.absolute()).encode())
        how = replace(how, name=f"{socket.gethostname()}-{number:08x}".replace(":", "-"))
    find_secret(secret_file)
    words = (config, folder, how, resume, threads, secret_file, run, allow_public, page)
    if under_launcher() or replicas == 1:
        _take_part(*words)
    else:
        check_folder(folder, config, resume=resume)
        config.task.make()
        launch(_take_part, words, replicas=replicas, port=port, modules=config.task.modules)


def _take_part(
    config: TrainConfig,
    folder: Path,
    how: ElasticSettings,
    resume: bool,
    threads: int | None,
    secret_file: Path | None,
    run: str,
    allow_public: bool,
    page: bool,
) -> None:
    """What each replica does."""
    with ExitStack() as ends:
        home: Transport = SingleReplica()
        if under_launcher() and int(os.environ["WORLD_SIZE"]) > 1:
            group = process_group(
                timeout_s=longest_wait_s(how),
                secret_file=secret_file,
                allow_public=allow_public,
                inside=True,
            )
            home = ends.enter_context(group)()
        set_threads(home.world_size, threads)
        ends.enter_context(_locked(folder, home))
        secret = find_secret(secret_file)
        transport: MembersTransport
        if isinstance(home, FrameTransport):
            transport = ElasticSiteTransport(
                how, inside=home, secret=secret, run=run, allow_public=allow_public
            )
        else:
            transport = ElasticTransport(how, secret=secret, run=run, allow_public=allow_public)
        ends.enter_context(closing(transport))

        def trainer(config: TrainConfig, task: Task, home: Transport, folder: Path) -> ElasticTrainer:
            return ElasticTrainer(config, task, transport, folder, home=home)

        result = train_here(config, folder, home, resume=resume, trainer_type=trainer)
        if page and home.rank == 0:
            print_page(folder)
        if not result.finished:
            raise StoppedError(
                f"{transport.name} left after step {result.steps}; the same command with --resume joins again"
            )


@contextmanager
def _locked(folder: Path, home: Transport) -> Iterator[None]:
    """Within the block no other process of this machine trains in the folder; the first replica of a site takes it for all.

    Raises:
        UsageError: one does already; on all replicas of the site.
    """
    problem = ""
    with ExitStack() as files:
        if home.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            file = files.enter_context((folder / LOCK).open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                problem = (
                    f"train: another replica trains in {folder} already ({error.strerror}); with --elastic every replica, or site, "
                    "has an --out of its own"
                )
        all_or_none(problem, home)
        yield
