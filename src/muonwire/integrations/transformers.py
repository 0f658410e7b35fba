"""transformers' Trainer on every replica, with any recipe between them; see docs/trainer.md.

    replicas = join_replicas()  # before TrainingArguments
    wire = MuonwireCallback("one_bit_muon", replicas=replicas)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=replicas.shard(dataset),
        optimizer_cls_and_kwargs=wire.optimizer_cls_and_kwargs,
        callbacks=wire.callbacks(args),
    )
    trainer.train()

Each replica is a Trainer of its own, with a world of its own processes and a folder of its own. All Trainers take the same steps on
different data.
"""

import json
import re
from collections.abc import Callable
from operator import not_
from pathlib import Path
from typing import Any

from torch import nn

from muonwire import recipes
from muonwire.errors import UsageError
from muonwire.integrations.figures import Figures
from muonwire.integrations.replicas import Replicas, join_replicas
from muonwire.integrations.shards import SameData
from muonwire.optim.chain import ChainOptimizer
from muonwire.transport.base import Flag
from muonwire.transport.digest import check_agreement, check_replicas

try:
    from transformers import TrainerCallback
    from transformers.integrations import get_reporting_integration_callbacks
except ImportError as error:
    raise UsageError(
        f"muonwire.integrations.transformers needs {error.name}, which is not installed; "
        'pip install "muonwire[integrations]"'
    ) from error

__all__ = ["MuonwireCallback"]

# In the Trainer's log: which replica wrote a checkpoint, of how many.
_REPLICA, _REPLICAS = "muonwire_replica", "muonwire_replicas"


class MuonwireCallback(TrainerCallback):  # type: ignore[misc]
    """Makes the optimizer of a Trainer, and keeps its replica in step with the others.

    - The optimizer is the recipe's, with ``learning_rate`` and ``weight_decay`` of the TrainingArguments.
    - At the start the replicas compare what they are about to do, and all their weights.
    - In the first step they compare their data, so that no two train on the same.
    - Before an evaluation, before a checkpoint and at the end the replicas synchronize and compare their weights, so that what is
      evaluated and saved is what all share. Metrics of an evaluation are replaced by their mean over the replicas, so that all
      decide alike which model is the best, and when to stop.
    - What was sent and waited goes into the Trainer's log, under ``muonwire_sent_bytes``, ``muonwire_received_bytes``,
      ``muonwire_bits_per_parameter_step`` and ``muonwire_wait_s``.
    - A replica that is told to stop stops all of them, after the next exchange.

    ``args.output_dir`` becomes a folder of this replica's own below it (Replicas.folder), and only replica 0 pushes to the hub.

    Args:
        recipe: a recipe's name with or without options, such as "one_bit_muon(interval=20)", or the recipe.
        replicas: what ``join_replicas`` gave. Default: ``join_replicas()``; this must then be made before
            TrainingArguments.
        same_data: whether replicas may train on the same data. Default: no.
        **options: the recipe's own, but ``lr``, ``weight_decay`` and ``transport``.

    Raises:
        UsageError: the recipe, an option or a TrainingArgument cannot be used so; the replicas train on the same data, or one
            resumes from another's checkpoint.
        ExchangeError: the replicas are about to do different things.
        DivergedReplicasError: their weights differ.
    """

    def __init__(
        self,
        recipe: str | Callable[..., ChainOptimizer],
        *,
        replicas: Replicas | None = None,
        same_data: bool = False,
        **options: Any,
    ) -> None:
        name, given = recipes.parse_recipe(recipe) if isinstance(recipe, str) else (recipe, {})
        self.recipe = recipes.find(name) if isinstance(name, str) else recipes.recipe_of(name)
        self.options = {**given, **options}
        for key, where in _ELSEWHERE.items():
            if key in self.options:
                raise UsageError(f"MuonwireCallback: {key} is given as the recipe's option; give {where}")
        self.recipe.make_options(self.options)
        self.replicas = join_replicas() if replicas is None else replicas
        self.transport = self.replicas.transport
        self.same_data = same_data
        self.optimizer: ChainOptimizer | None = None
        self.figures: Figures | None = None
        self._args: Any = None
        self._report_to: list[str] | None = None
        self._training = False
        # Whether the epoch has had a batch.
        self._fed = False
        self._synchronized_step: int | None = None
        # Metrics that are means already.
        self._averaged: dict[str, float] | None = None

    # The optimizer

    @property
    def optimizer_cls_and_kwargs(self) -> tuple[Callable[[], Callable[..., ChainOptimizer]], dict[str, Any]]:
        """The argument of this name of the Trainer: a factory, and no further options."""
        return self.factory, {}

    def factory(self) -> Callable[..., ChainOptimizer]:
        """What the Trainer calls for a function from the model to its optimizer."""
        return self._make

    def _make(self, model: nn.Module, **options: Any) -> ChainOptimizer:
        if self._args is None:
            raise UsageError(
                "MuonwireCallback: the Trainer asks for an optimizer and has not told its arguments; give it the same object in "
                "callbacks, too"
            )
        theirs = {"lr": self._args.learning_rate, "weight_decay": self._args.weight_decay}
        self.optimizer = self.recipe.optimizer(
            model, {**self.options, **options, **theirs, "transport": self.transport}
        )
        if self.optimizer.look_ahead and self.replicas.world_size > 1:
            raise UsageError(
                f"MuonwireCallback: {self.recipe.name} trains at weights that differ between replicas even after a "
                "synchronization, and the Trainer would save them; use distro, which sends the same"
            )
        return self.optimizer

    # Arguments

    def callbacks(self, args: Any, *before: Any) -> list[Any]:
        """The argument of this name of the Trainer: callbacks of your own, this one, and then those that ``report_to`` names.

        The Trainer calls reporters before any callback of the user's, and they would not see the bytes. So they are named here, and
        ``args.report_to`` is empty until the Trainer is made. Only replica 0 reports. One more callback, which comes first, lets
        yours see the metrics' means.

        Args:
            args: the TrainingArguments.
            *before: callbacks of your own, called before this one.
        """
        reporters = get_reporting_integration_callbacks(args.report_to) if self.replicas.rank == 0 else []
        self._report_to, args.report_to = args.report_to, []
        return [_MeansFirst(self), *before, self, *(reporter() for reporter in reporters)]

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the arguments, and check that they can hold for replicas."""
        self._args = args
        if self._report_to is not None:
            # For whoever makes another Trainer of the same arguments.
            args.report_to = self._report_to
        if self.replicas.world_size == 1:
            return
        for name, (allowed, remedy) in _REFUSED.items():
            value = getattr(args, name, None)
            if not allowed(value):
                raise UsageError(f"MuonwireCallback: {name} is {value!r}; {remedy}")
        if args.world_size != self.replicas.num_inside:
            raise UsageError(
                f"MuonwireCallback: the Trainer sees {args.world_size} process(es), this replica has {self.replicas.num_inside}; "
                "call join_replicas() before TrainingArguments is made, and on CPUs give use_cpu=True"
            )
        args.output_dir = str(self.replicas.folder(args.output_dir))
        args.push_to_hub = args.push_to_hub and self.replicas.rank == 0

    def newest_checkpoint(self) -> str | None:
        """The folder of the newest checkpoint that all replicas have, for ``resume_from_checkpoint``; None where there is none.

        All replicas call it together, after the Trainer is made. A replica that was killed while it saved has one less.

        Raises:
            UsageError: the Trainer is not made yet; or there are checkpoints, but none of a step that all replicas have.
        """
        if self._args is None:
            raise UsageError(
                "newest_checkpoint: the Trainer is not made yet, which knows the folder; call it afterwards"
            )
        folder = Path(self._args.output_dir)
        # Where a training of one replica, or of several, has left its own; on_train_begin then says whose they are.
        elsewhere = [folder.parent] if self.replicas.world_size > 1 else sorted(folder.glob("replica_*"))
        found = next(filter(None, map(_checkpoints, [folder, *elsewhere])), {})
        step = self.replicas.newest_in_all(list(found))
        return None if step is None else str(found[step])

    # Training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare with the other replicas what is about to be done, and with what weights."""
        model, optimizer = kwargs["model"], self._optimizer()
        self._training, self._synchronized_step = True, state.global_step
        # Of a training before this one.
        self.transport.requested &= ~Flag.STOP
        self.transport.agreed &= ~Flag.STOP
        num_parameters = sum(p.numel() for p in optimizer.trained())
        self.figures = Figures(self.transport, num_parameters, step=state.global_step)
        saved = next((row for row in reversed(state.log_history) if _REPLICA in row), None)
        if saved is not None and state.global_step:
            self.figures.resume(saved, step=state.global_step)
        check_agreement(_plan(args, state), self.transport, what="plans of training")
        mine = {_REPLICA: self.replicas.rank, _REPLICAS: self.replicas.world_size}
        others = {key: (saved or mine)[key] for key in mine}
        wrong = self.transport.everyone.gather(
            b"" if others == mine else json.dumps(others).encode(), purpose="control"
        )
        if any(wrong):
            what = "; ".join(
                f"process {i} goes on from replica {json.loads(w)[_REPLICA]} of {json.loads(w)[_REPLICAS]}"
                for i, w in enumerate(wrong)
                if w
            )
            raise UsageError(
                f"MuonwireCallback: {what}, of {self.replicas.world_size} replica(s) now; what compression left out is each "
                "replica's own, so start as many replicas and let each resume from its own folder, as by "
                "resume_from_checkpoint=wire.newest_checkpoint(), or begin a new run with the weights alone, by "
                "from_pretrained(checkpoint) and another output_dir"
            )
        if self.replicas.world_size == 1:
            return
        if not any(hasattr(p, "to_local") for p in model.parameters()):
            check_replicas(model, self.transport, purpose="control")
        if self.replicas.rank:
            # Who prints and reports.
            state.is_local_process_zero = state.is_world_process_zero = False
        if not self.same_data:
            SameData(self.transport).watch(model, optimizer)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note that the epoch has had no batch yet."""
        self._fed = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Stop where another replica stops."""
        self._fed = True
        return self._share_stop(state, control)

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Stop where another replica stops."""
        return self._share_stop(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After a step: synchronize where the weights are about to be evaluated or saved, and stop where another replica stops."""
        self._share_stop(state, control)
        self._settle(args, state, control)
        # The wish may have come with the message of this synchronization.
        control.should_training_stop |= Flag.STOP in self.transport.agreed
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """As ``on_step_end``, for what is done at the end of an epoch."""
        if self._fed:
            # Without, the Trainer itself stops: there are no data.
            self._share_stop(state, control)
        self._settle(args, state, control)
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Replace the metrics by their means over the replicas, and stop where another replica stops."""
        self.average(kwargs["metrics"])
        if control.should_save:
            self._note(state)
        if not self._training or self.replicas.world_size == 1:
            return control
        stops = self.transport.everyone.gather(b"%d" % bool(control.should_training_stop), purpose="control")
        if b"1" in stops:
            self.transport.agreed |= Flag.STOP
            control.should_training_stop = True
        return control

    def average(self, metrics: dict[str, float]) -> None:
        """Replace the metrics of an evaluation while it trains by their means over the replicas, once."""
        if not self._training or self.replicas.world_size == 1 or self._averaged is metrics:
            return
        self._averaged = metrics
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        told = self.transport.everyone.gather(json.dumps(numbers).encode(), purpose="control")
        everyones = [json.loads(of_one) for of_one in told]
        for key in numbers:
            if all(key in of_one for of_one in everyones):
                metrics[key] = sum(of_one[key] for of_one in everyones) / len(everyones)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Make sure that what was saved is what all replicas share, and stop where another replica stops.

        Raises:
            UsageError: a callback behind this one asked for it.
        """
        if self.replicas.world_size > 1 and self._synchronized_step != state.global_step:
            raise UsageError(
                f"MuonwireCallback: a callback behind this one asked for the checkpoint of step {state.global_step}, before "
                "which the replicas have not synchronized; name it before this one, as by callbacks=wire.callbacks(args, yours)"
            )
        return self._share_stop(state, control)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Add the bytes to a log of training, and stop where another replica stops."""
        logs = kwargs.get("logs")
        if self.figures is not None and logs is not None and {"loss", "train_loss"} & set(logs):
            ends = "train_loss" in logs
            row = (self.figures.in_all if ends else self.figures.since_last)(step=state.global_step)
            logs.update(row)
            state.log_history[-1].update(row)
        return self._share_stop(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make sure that all replicas end with the same weights."""
        self._training = False
        if self.replicas.world_size == 1:
            return
        if self._synchronized_step != state.global_step and not args.load_best_model_at_end:
            self._optimizer().synchronize()
        # Where the best model was loaded, each replica has it from its own folder.
        check_replicas(self._optimizer().named_parameters(), self.transport, purpose="control")

    def _optimizer(self) -> ChainOptimizer:
        if self.optimizer is None:
            raise UsageError(
                "MuonwireCallback: the Trainer has made an optimizer of its own; give it "
                "optimizer_cls_and_kwargs=wire.optimizer_cls_and_kwargs, with this callback"
            )
        return self.optimizer

    def _share_stop(self, state: Any, control: Any) -> Any:
        """Stop all replicas in the same step: the wish travels in the header of the next message."""
        if not self._training or self.replicas.world_size == 1:
            return control
        if Flag.STOP in self.transport.agreed:
            control.should_training_stop = True
        elif control.should_training_stop and state.global_step < state.max_steps:
            control.should_training_stop = False
            self.transport.requested |= Flag.STOP
        return control

    def _settle(self, args: Any, state: Any, control: Any) -> None:
        """Synchronize and compare before an evaluation, a checkpoint or the end."""
        wanted = control.should_evaluate or control.should_save or control.should_training_stop
        if wanted and self._synchronized_step != state.global_step:
            optimizer = self._optimizer()
            optimizer.synchronize()
            self._synchronized_step = state.global_step
            if self.replicas.world_size > 1:
                check_replicas(optimizer.named_parameters(), self.transport)
        # With the strategy "best" it is the evaluation that decides.
        if control.should_save or (control.should_evaluate and args.save_strategy == "best"):
            self._note(state)

    def _note(self, state: Any) -> None:
        """Which replica's checkpoint it will be, and what was sent before, for when the run goes on from it."""
        history = state.log_history
        noted = any(_REPLICA in row and row["step"] == state.global_step for row in history[-8:])
        if self.figures is None or noted:
            return
        mine = {_REPLICA: self.replicas.rank, _REPLICAS: self.replicas.world_size}
        totals = self.figures.in_all(step=state.global_step)
        history.append({**totals, **mine, "step": state.global_step, "epoch": state.epoch})


class _MeansFirst(TrainerCallback):  # type: ignore[misc]
    """Called before callbacks of the user's, which decide by metrics."""

    def __init__(self, wire: MuonwireCallback) -> None:
        self._wire = wire

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Average the metrics."""
        self._wire.average(kwargs["metrics"])


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The whole checkpoints in a folder, by step."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", path.name)
        try:
            # It is written last.
            json.loads((path / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if number:
            found[int(number[1])] = path
    return found


_ELSEWHERE = {
    "lr": "learning_rate in TrainingArguments",
    "weight_decay": "weight_decay in TrainingArguments",
    "transport": "replicas=Replicas(transport)",
}
# TrainingArguments that cannot hold for replicas: what is allowed, and what to do instead.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "auto_find_batch_size": (
        not_,
        "one replica would begin anew with smaller batches and the others would not; give a batch size",
    ),
    "fsdp": (
        not_,
        "the optimizer is made before the weights are sharded; shard the model in a loop of your own",
    ),
    "deepspeed": (
        not_,
        "DeepSpeed makes an optimizer of its own; use the Trainer's DistributedDataParallel inside a replica",
    ),
    "enable_jit_checkpoint": (
        not_,
        "the replica that gets the signal would save alone, before the others have synchronized; let save_steps save",
    ),
    "save_total_limit": (
        lambda limit: limit != 1,
        "if a replica were killed while it saves, no checkpoint would be left that all have; give 2 or more",
    ),
}
_PLANNED = (
    *(
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "gradient_accumulation_steps",
    ),
    *("eval_strategy", "save_strategy", "logging_strategy", "load_best_model_at_end", "bf16", "fp16"),
)


def _plan(args: Any, state: Any) -> str:
    """What must be the same on all replicas."""
    steps = {key: getattr(state, key) for key in ("global_step", "max_steps", "eval_steps", "save_steps")}
    return ", ".join(
        f"{key}={value}" for key, value in {**steps, **{k: getattr(args, k) for k in _PLANNED}}.items()
    )
