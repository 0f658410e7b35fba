"""`muonwire train`: one recipe, on one replica or many."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from muonwire import recipes
from muonwire.errors import StoppedError, UsageError
from muonwire.train import checkpoint
from muonwire.train.config import TrainConfig
from muonwire.train.folders import WHERE, Place, Together, where
from muonwire.train.launch import launch, on_stop_signal, process_group, set_threads, under_launcher
from muonwire.train.lengths import rate_change
from muonwire.train.loop import RESULT, RunResult, Trainer
from muonwire.train.metrics import METRICS
from muonwire.train.page import print_page
from muonwire.train.progress import progress_bar
from muonwire.train.recording import recording
from muonwire.train.told import raise_told, tell
from muonwire.transport import SiteTransport, Transport
from muonwire.transport.rendezvous import EXCHANGE_TIMEOUT_S
from muonwire.transport.secret import find_secret
from muonwire.transport.site_groups import check_sites

CONFIG = "config.json"
# Where a run leaves the trained model of a user, as transformers opens it.
MODEL = "model"


def check_folder(folder: Path, config: TrainConfig, *, resume: bool) -> None:
    """Refuse to overwrite a run that is in the folder already.

    Raises:
        UsageError: the folder holds a run and ``resume`` was not asked for, or one that finished with other settings and left no
            checkpoint.
    """
    begun = checkpoint.latest(folder) is not None
    if not resume and (begun or (folder / RESULT).exists()):
        raise UsageError(
            f"train: {folder} holds a run already; continue it with --resume, or choose another --out"
        )
    if not begun and _finished_config(folder) not in (None, json.loads(json.dumps(config.identity()))):
        raise UsageError(
            f"train: {folder} holds a run that finished with other settings and left no checkpoint to go on from "
            "(--checkpoint-every 0, or a run of `muonwire compare`); choose another --out"
        )


def _check_folders(folder: Path, config: TrainConfig, transport: Transport, *, resume: bool) -> list[Place]:
    """Check the folders of all replicas before one of them writes; returns where they are.

    Raises:
        UsageError: see check_folder, or only some replicas are to resume; on all of them.
    """
    problem = ""
    try:
        check_folder(folder, config, resume=resume)
    except UsageError as error:
        problem = str(error)
    told = tell({"problem": problem, "resume": resume, "place": asdict(Place.here(folder))}, transport)
    asked = [str(rank) for rank, message in enumerate(told) if message["resume"]]
    if asked and len(asked) < len(told):
        raise UsageError(
            f"train: of {len(told)} replicas, {', '.join(asked)} were started with --resume; start all with it, or none"
        )
    raise_told({rank: message["problem"] for rank, message in enumerate(told)})
    return [Place(**message["place"]) for message in told]


def _finished_config(folder: Path) -> Any:
    try:
        return json.loads((folder / RESULT).read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def train_here(
    config: TrainConfig,
    folder: Path,
    transport: Transport,
    *,
    resume: bool,
    trainer_type: Callable[..., Trainer] = Trainer,
) -> RunResult:
    """One run on this replica: with a progress bar on the first, stopping together when asked to.

    Args:
        config: the settings.
        folder: of this replica's host.
        transport: between all replicas that keep the run together.
        resume: begin with the newest checkpoint that all of them have.
        trainer_type: makes the trainer, of the settings, the task, the transport and the folder. Default: Trainer.
    """
    places = _check_folders(folder, config, transport, resume=resume)
    together = Together.find(folder, transport)
    trainer = trainer_type(config, config.task.make(), transport, folder)
    trainer.together = together
    first = transport.rank == 0
    notes: list[str] = []
    if resume:
        went_on = trainer.resume(new_length=True)
        _check_alike(trainer)
        if not went_on:
            trainer.notes = [f"no replica has a checkpoint of this run: it starts at step 1, in {places[0]}"]
        notes = [*trainer.notes, *(_go_on(trainer) if first and went_on else [])]
    _say_where(folder, places, together)
    if first and not trainer.step:
        checkpoint.write_json(folder / CONFIG, trainer.settings())
    if first:
        _describe(trainer)
    if first or (together.first and 0 not in together.ranks):
        print(*notes, sep="\n", end="\n\n" if notes else "", flush=True)
    with (
        on_stop_signal(trainer.request_stop),
        progress_bar(config.recipe, enabled=first) as show,
        recording(trainer, show),
    ):
        trainer.say = show.say
        trainer.begin()
        result = trainer.run(show)
        trainer.finish()
    written = result.finished and not result.diverged and trainer.export(folder / MODEL)
    if isinstance(trainer.transport, SiteTransport):
        trainer.transport.close()
    if first and result.finished:
        print(_outcome(result, folder), flush=True)
    if written:
        print(f"the trained model is in {folder / MODEL}, for from_pretrained", flush=True)
    return result


def _say_where(folder: Path, places: list[Place], together: Together) -> None:
    """In the folder of every host but replica 0's, say where the rest of the run is."""
    path = folder / WHERE
    if 0 in together.ranks:
        # It came with what was copied from another host.
        if together.first:
            path.unlink(missing_ok=True)
    elif together.first:
        checkpoint.write_json(path, where(places, together, files=(CONFIG, METRICS, RESULT, "tensorboard")))


def _check_alike(trainer: Trainer) -> None:
    """All replicas go on from one step to one length; where one of them refused, the others end here, before a file is changed."""
    own = f"step {trainer.step} of {trainer.config.steps}"
    positions = [text.decode() for text in trainer.everyone.gather(own.encode(), purpose="control")]
    if len(set(positions)) > 1:
        listed = "; ".join(f"replica {rank}: {position}" for rank, position in enumerate(positions))
        raise UsageError(f"train: the replicas would not resume alike ({listed}); give all the same --steps")


def _go_on(trainer: Trainer) -> list[str]:
    """Bring the folder up to the settings that the run has now; returns what a new length does, a line each."""
    checkpoint.write_json(trainer.folder / CONFIG, trainer.settings())
    if trainer.step < trainer.config.steps:
        # A result stands for a run that is finished.
        (trainer.folder / RESULT).unlink(missing_ok=True)
    *past, new = trainer.lengths
    if not past or new.first_step != trainer.step + 1:
        return []
    notes = []
    rate = rate_change(trainer.lengths, trainer.config)
    if rate is not None:
        notes.append(rate)
    local = trainer.optimizer.local
    if (
        local is not None
        and past[-1].steps == trainer.step
        and (local.growth or local.adapts or trainer.step % local.initial)
    ):
        notes.append(
            f"the replicas synchronized after step {trainer.step}, which was the last one; a run that is started with {new.steps} "
            "steps may synchronize at other steps and end with other weights"
        )
    return notes


def _describe(trainer: Trainer) -> None:
    name, options = recipes.parse_recipe(trainer.config.recipe)
    settings = recipes.find(name).make_options(options)
    if isinstance(settings, recipes.RoutedSettings):
        print(settings.routing(trainer.model), end="\n\n")
    print(trainer.optimizer, end="\n\n", flush=True)


def _outcome(result: RunResult, folder: Path) -> str:
    if result.diverged:
        return (
            f"diverged in step {result.steps + 1}: a loss or an update is not finite; a lower --lr may help"
        )
    sites = (
        f" between {result.sites} sites and {result.bytes_inside_per_step / 1e3:.3g} kB inside one"
        if result.sites
        else ""
    )
    return (
        f"step {result.steps}: evaluation loss {result.final_eval_loss:.4f}, "
        f"{result.bits_per_parameter_step:.3g} bit per parameter and step{sites}, weights {result.weights_digest}; see {folder}"
    )


def _worker(
    config: TrainConfig,
    folder: Path,
    resume: bool,
    threads: int | None,
    timeout_s: float,
    page: bool,
    secret_file: Path | None,
    allow_public: bool,
) -> None:
    """What each replica does."""
    with process_group(
        timeout_s=timeout_s,
        secret_file=secret_file,
        allow_public=allow_public,
        inside=config.sites is not None,
    ) as make_transport:
        transport = make_transport()
        set_threads(transport.world_size, threads)
        result = train_here(config, folder, transport, resume=resume)
        if page and transport.rank == 0:
            print_page(folder)
        if not result.finished:
            raise StoppedError(
                f"stopped after step {result.steps}; the same command with --resume continues from {folder}"
            )


def train(
    config: TrainConfig,
    folder: Path,
    *,
    replicas: int = 1,
    resume: bool = False,
    threads: int | None = None,
    port: int = 0,
    timeout_s: float = EXCHANGE_TIMEOUT_S,
    page: bool = True,
    secret_file: Path | None = None,
    allow_public: bool = False,
) -> None:
    """Train: in this process where a launcher started it or one replica is asked for, in ``replicas`` new ones otherwise.

    Args:
        config: the settings.
        folder: where metrics, checkpoints and result.json go; of the replicas on other hosts, their checkpoints.
        replicas: processes to start on this machine; ignored under torchrun, which starts them itself.
        resume: continue from the newest checkpoint in the folder; ``config.steps`` may be another number than the run has so far.
        threads: of each replica's arithmetic. Default: its share of the cores.
        port: of the rendezvous. Default: any free one.
        timeout_s: how long a replica that does not answer is waited for. Default: 600.
        page: write page.html, where what draws it is installed. Default: True.
        secret_file: what all replicas share, so that strangers are refused. Default: what MUONWIRE_SECRET_FILE names, or none.
        allow_public: listen without a secret where the internet may reach it. Default: no.

    Raises:
        UsageError: bad settings or data, a secret that cannot serve, a folder that holds another run, or a new length that leaves
            nothing to train.
        ReplicaLostError, ExchangeError: a replica was lost; its last checkpoint is kept.
        StoppedError: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    if not timeout_s >= 1:
        raise UsageError(
            f"train: timeout_s is {timeout_s}; it is at least 1 second, for as long as a replica may be silent"
        )
    if config.sites is not None:
        check_sites(int(os.environ["WORLD_SIZE"]) if under_launcher() else replicas, config.sites)
    find_secret(secret_file)
    words = (config, folder, resume, threads, timeout_s, page, secret_file, allow_public)
    if under_launcher() or replicas == 1:
        _worker(*words)
    else:
        check_folder(folder, config, resume=resume)
        config.task.make()
        launch(_worker, words, replicas=replicas, port=port, modules=config.task.modules)
