"""`muonwire train`: one recipe, on one replica or many."""

import os
from pathlib import Path

from muonwire import recipes
from muonwire.errors import StoppedError, UsageError
from muonwire.tasks import make_task
from muonwire.train import checkpoint
from muonwire.train.config import TrainConfig
from muonwire.train.launch import launch, on_stop_signal, process_group, set_threads, under_launcher
from muonwire.train.loop import RESULT, RunResult, Trainer
from muonwire.train.progress import progress_bar
from muonwire.transport import Transport

CONFIG = "config.json"


def prepare_folder(folder: Path, config: TrainConfig, *, resume: bool) -> None:
    """Refuse to overwrite a run that is there already; write the settings of a new one. A run that goes on has its own.

    Raises:
        UsageError: the folder holds a run and ``resume`` was not asked for.
    """
    begun = checkpoint.latest(folder) is not None
    if not resume and (begun or (folder / RESULT).exists()):
        raise UsageError(
            f"train: {folder} holds a run already; continue it with --resume, or choose another --out"
        )
    if not begun:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(folder / CONFIG, config.identity())


def train_here(config: TrainConfig, folder: Path, transport: Transport, *, resume: bool) -> RunResult:
    """One run on this replica: with a progress bar on the first, stopping together when asked to."""
    trainer = Trainer(config, make_task(config.task), transport, folder)
    if resume:
        trainer.resume()
    first = transport.rank == 0
    if first:
        _describe(trainer)
    with on_stop_signal(trainer.request_stop), progress_bar(config.recipe, enabled=first) as show:
        result = trainer.run(show)
    if first and result.finished:
        print(_outcome(result, folder), flush=True)
    return result


def _describe(trainer: Trainer) -> None:
    name, options = recipes.parse_recipe(trainer.config.recipe)
    settings = recipes.find(name).make_options(options)
    if isinstance(settings, recipes.MuonSettings):
        print(settings.routing(trainer.model), end="\n\n")
    print(trainer.optimizer, end="\n\n", flush=True)


def _outcome(result: RunResult, folder: Path) -> str:
    if result.diverged:
        return (
            f"diverged in step {result.steps + 1}: a loss or an update is not finite; a lower --lr may help"
        )
    return (
        f"step {result.steps}: evaluation loss {result.final_eval_loss:.4f}, "
        f"{result.bits_per_parameter_step:.3g} bit per parameter and step, weights {result.weights_digest}; see {folder}"
    )


def _worker(config: TrainConfig, folder: Path, resume: bool, threads: int | None) -> None:
    """What each replica does."""
    with process_group() as make_transport:
        transport = make_transport()
        set_threads(transport.world_size, threads)
        result = train_here(config, folder, transport, resume=resume)
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
) -> None:
    """Train: in this process where a launcher started it or one replica is asked for, in ``replicas`` new ones otherwise.

    Args:
        config: the settings.
        folder: where metrics, checkpoints and result.json go.
        replicas: processes to start on this machine; ignored under torchrun, which says how many there are.
        resume: continue from the newest checkpoint in the folder.
        threads: of each replica's arithmetic. Default: its share of the cores.
        port: of the rendezvous. Default: any free one.

    Raises:
        UsageError: bad settings or data, or a folder that holds another run.
        ReplicaLostError, ExchangeError: a replica was lost; its last checkpoint is kept.
        StoppedError: SIGTERM or Ctrl-C; a checkpoint was written.
    """
    if os.environ.get("RANK", "0") == "0":
        prepare_folder(folder, config, resume=resume)
    if under_launcher() or replicas == 1:
        _worker(config, folder, resume, threads)
    else:
        make_task(config.task)
        launch(_worker, (config, folder, resume, threads), replicas=replicas, port=port)
