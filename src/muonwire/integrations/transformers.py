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
        self._training = False
        self._synchronized_step: int | None = None

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
        ``args.report_to`` becomes empty. Only replica 0 reports.

        Args:
            args: the TrainingArguments.
            *before: callbacks of your own, called before this one.
        """
        reporters = get_reporting_integration_callbacks(args.report_to) if self.replicas.rank == 0 else []
        args.report_to = []
        return [*before, self, *(reporter() for reporter in reporters)]

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the arguments, and check that they can hold for replicas."""
        self._args = args
        if self.replicas.world_size == 1:
            return
        for name, remedy in _REFUSED.items():
            if getattr(args, name, None):
                raise UsageError(f"MuonwireCallback: {name} is {getattr(args, name)!r}; {remedy}")
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
        """
        if self._args is None:
            raise UsageError(
                "newest_checkpoint: the Trainer is not made yet, which knows the folder; call it afterwards"
            )
        folder = Path(self._args.output_dir)
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
        if self.replicas.world_size == 1:
            return
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
                f"MuonwireCallback: {what}, of {self.replicas.world_size} replicas now; what compression left out is each "
                "replica's own, so let each resume from its own folder, as by resume_from_checkpoint=wire.newest_checkpoint()"
            )
        if not any(hasattr(p, "to_local") for p in model.parameters()):
            check_replicas(model, self.transport, purpose="control")
        if self.replicas.rank:
            # Who prints and reports.
            state.is_local_process_zero = state.is_world_process_zero = False
        if not self.same_data:
            SameData(self.transport).watch(model, optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """After a step: synchronize where the weights are about to be evaluated or saved, and stop where another replica stops."""
        if self.replicas.world_size > 1:
            self._share_stop(state, control)
        self._settle(state, control)
        # The wish may have come with the message of this synchronization.
        control.should_training_stop |= Flag.STOP in self.transport.agreed
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """As ``on_step_end``, for what is done at the end of an epoch."""
        self._settle(state, control)
        return control

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Replace the metrics by their means over the replicas, and stop where another replica stops."""
        if not self._training or self.replicas.world_size == 1:
            return control
        metrics = kwargs["metrics"]
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        told = self.transport.everyone.gather(
            json.dumps([control.should_training_stop, numbers]).encode(), purpose="control"
        )
        stops, everyones = zip(*map(json.loads, told), strict=True)
        for key in numbers:
            if all(key in of_one for of_one in everyones):
                metrics[key] = sum(of_one[key] for of_one in everyones) / len(everyones)
        control.should_training_stop = any(stops)
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make sure that what was saved is what all replicas share.

        Raises:
            UsageError: a callback behind this one asked for it.
        """
        if self.replicas.world_size > 1 and self._synchronized_step != state.global_step:
            raise UsageError(
                f"MuonwireCallback: a callback behind this one asked for the checkpoint of step {state.global_step}, before "
                "which the replicas have not synchronized; name it before this one, as by callbacks=wire.callbacks(args, yours)"
            )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the bytes to a log of training."""
        logs = kwargs.get("logs")
        if self.figures is None or logs is None or not {"loss", "train_loss"} & set(logs):
            return
        ends = "train_loss" in logs
        row = (self.figures.in_all if ends else self.figures.since_last)(step=state.global_step)
        logs.update(row)
        state.log_history[-1].update(row)

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

    def _share_stop(self, state: Any, control: Any) -> None:
        """Stop all replicas in the same step: the wish travels in the header of the next message."""
        if Flag.STOP in self.transport.agreed:
            control.should_training_stop = True
        elif control.should_training_stop and state.global_step < state.max_steps:
            control.should_training_stop = False
            self.transport.requested |= Flag.STOP

    def _settle(self, state: Any, control: Any) -> None:
        """Synchronize and compare before an evaluation, a checkpoint or the end."""
        wanted = control.should_evaluate or control.should_save or control.should_training_stop
        if wanted and self._synchronized_step != state.global_step:
            optimizer = self._optimizer()
            optimizer.synchronize()
            self._synchronized_step = state.global_step
            if self.replicas.world_size > 1:
                check_replicas(optimizer.named_parameters(), self.transport)
        if control.should_save and self.figures is not None:
            # Which replica's checkpoint it is, and what was sent before, for when the run goes on from it.
            mine = {_REPLICA: self.replicas.rank, _REPLICAS: self.replicas.world_size}
            totals = self.figures.in_all(step=state.global_step)
            state.log_history.append({**totals, **mine, "step": state.global_step, "epoch": state.epoch})


_ELSEWHERE = {
    "lr": "learning_rate in TrainingArguments",
    "weight_decay": "weight_decay in TrainingArguments",
    "transport": "replicas=Replicas(transport)",
}
# TrainingArguments that cannot hold for replicas, with what to do instead.
_REFUSED = {
    "auto_find_batch_size": "one replica would begin anew with smaller batches and the others would not; give a batch size",
    "fsdp": "the optimizer is made before the weights are sharded; shard the model in a loop of your own",
    "deepspeed": "DeepSpeed makes an optimizer of its own; use the Trainer's DistributedDataParallel inside a replica",
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
