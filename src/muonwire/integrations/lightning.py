"""Lightning: a strategy under which each replica is a world of its own for Lightning, and muonwire works between the replicas.

    trainer = lightning.Trainer(strategy=ReplicaStrategy(), accelerator="cpu", devices=2)

Processes start as with Lightning's DDPStrategy. Where Lightning itself wants to talk (barriers, agreed decisions, metrics with
``sync_dist=True``), its messages go through the transport, as purpose "control", so that the meter has every byte between replicas.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.integrations.collectives import Collectives
from muonwire.optim.chain import ChainOptimizer
from muonwire.optim.groups import AROUND
from muonwire.transport import (
    ProcessGroupTransport,
    SiteTransport,
    Traffic,
    Transport,
    check_replicas,
)

try:
    import lightning.pytorch as pl
    from lightning.fabric.utilities.cloud_io import get_filesystem
    from lightning.pytorch.plugins.precision import MixedPrecision
    from lightning.pytorch.strategies import DDPStrategy
    from lightning.pytorch.trainer.states import TrainerFn
    from torchmetrics import Metric

    from muonwire.integrations.lightning_precision import Clipping
except ImportError as error:
    raise UsageError(
        f"muonwire.integrations.lightning needs lightning ({error}); install it: pip install 'muonwire[integrations]'"
    ) from error

__all__ = ["ReplicaStrategy"]

# Where replicas choose different checkpoints.
_MONITORED = "log what ModelCheckpoint monitors, or names files by, with sync_dist=True"
# What a replica's checkpoint holds besides Lightning's own entries.
ENTRY = "muonwire"


class ReplicaStrategy(DDPStrategy):
    """Each process trains a replica, alone for Lightning; the optimizers exchange between the replicas.

    ``configure_optimizers`` returns muonwire optimizers made with ``transport=self.trainer.strategy.transport``. Training data are
    divided among all replicas by Lightning's DistributedSampler; the first batches of a fit are compared, and replicas that draw
    the same one are refused. ``trainer.world_size`` is 1, and ``trainer.global_rank`` the replica's number.

    While it trains, validation sees the weights that all replicas share, after their digests were compared; metrics of torchmetrics
    in the module are those of all replicas. When training ends, replicas synchronize and are compared again.

    Every step logs, under "muonwire/": "sent_bytes", "egress_bytes" and "received_bytes" (``Traffic``, of training, since the
    first step), "bits_per_parameter_step" (8 · sent_bytes / trainable parameters / steps), "wait_s" and, where it changes,
    "interval".

    Every replica writes its part of a checkpoint: replica 0 at the path itself, which is an ordinary Lightning checkpoint of the
    shared weights, replica r beside it with the suffix ".replica<r>". ``trainer.fit(ckpt_path=PATH)`` on every replica goes on
    from them, bit for bit.

    Args:
        make_transport: called once the process group is there, on all replicas together. With a SiteTransport whose gradients the
            loop averages, ``lambda: site_transport(averages=False)``, the replicas of a site are wrapped in
            DistributedDataParallel over the site's own group. Default: ProcessGroupTransport.
        same_data: let replicas draw the same batches. Default: False.
        **options: of Lightning's DDPStrategy, such as ``process_group_backend``, ``timeout`` (of the process group) and
            ``start_method``; what it does not know goes to DistributedDataParallel inside a site.

    Raises:
        UsageError: an optimizer that is not muonwire's, or has another transport; ``sync_batchnorm``; replicas that draw the same
            data, or come to different places of Lightning's loop; a checkpoint of other replicas. On all replicas.
        ExchangeError, DivergedReplicasError, NonFiniteUpdateError, ReplicaLostError, PayloadError: from ``trainer.fit``, as the
            optimizer raises them, on all replicas.
    """

    def __init__(
        self,
        make_transport: Callable[[], Transport] = ProcessGroupTransport,
        *,
        same_data: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._make_transport = make_transport
        self._transport: Transport | None = None
        self._data_checked = same_data
        self._same_data = same_data
        # Holds the shared weights in the parameters while it is not None.
        self._holding: ExitStack | None = None
        # Of the fits before, from a checkpoint; and the meter when this fit began.
        self._before = Traffic()
        self._began = Traffic()

    @property
    def transport(self) -> Transport:
        """The way between the replicas, for ``configure_optimizers``.

        Raises:
            UsageError: Lightning has not started the processes yet.
        """
        if self._transport is None:
            raise UsageError(
                "ReplicaStrategy: there is no transport yet, since Lightning has not set up its processes; read "
                "self.trainer.strategy.transport in configure_optimizers, or in hooks from setup() on"
            )
        return self._transport

    @property
    @override
    def world_size(self) -> int:
        """One: Lightning would send a message to all replicas before every batch if it knew of more."""
        return 1

    # Setting up

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._transport is None:
            self._transport = self._make_transport()
            everyone = self._transport.everyone
            if (everyone.rank, everyone.world_size) != tuple(self._placed()):
                raise UsageError(
                    f"ReplicaStrategy: the transport is of replica {everyone.rank} of {everyone.world_size}, but Lightning has "
                    f"started process {self._placed()[0]} of {self._placed()[1]}; make a transport between all processes that "
                    "stay to the end (replicas that come and go need a loop of their own, docs/elastic.md)"
                )

    def _placed(self) -> tuple[int, int]:
        return self.global_rank, self.num_nodes * self.num_processes

    @override
    def setup(self, trainer: "pl.Trainer") -> None:
        if self._layer_sync is not None:
            raise UsageError(
                "ReplicaStrategy: sync_batchnorm would send statistics of every layer between the replicas in every step; leave it "
                "out: floating buffers are averaged when the replicas synchronize"
            )
        precision = self.precision_plugin
        if type(precision) is MixedPrecision:
            self.precision_plugin = Clipping(
                "bf16-mixed" if precision.scaler is None else "16-mixed", precision.device, precision.scaler
            )
        if self._fitting:
            self._data_checked = self._same_data
            self._holding, self._before = None, Traffic()
        # DDPStrategy's own would broadcast the whole model where it does not train.
        super(DDPStrategy, self).setup(trainer)
        if self._fitting:
            self._join_around()
            self._began = self.transport.meter.training
        for metric in self._module.modules():
            # Else they talk through torch.distributed by themselves.
            if isinstance(metric, Metric) and metric.process_group is None:
                theirs = metric.dist_sync_fn
                if theirs is None or isinstance(getattr(theirs, "__self__", None), Collectives):
                    metric.dist_sync_fn = self._said.each

    @override
    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        transport = self.transport
        if not self._fitting or not isinstance(transport, SiteTransport) or transport.num_inside == 1:
            return model
        if transport.averages_inside:
            return model
        self._ddp_kwargs["process_group"] = getattr(transport.inside, "group", None)
        wrapped: nn.Module = super()._setup_model(model)
        return wrapped

    @override
    def setup_optimizers(self, trainer: "pl.Trainer") -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, ChainOptimizer):
                raise UsageError(
                    f"ReplicaStrategy: configure_optimizers returned {type(optimizer).__name__}, which does not talk to the other "
                    "replicas; return a recipe, or wrap it by muonwire.optim.local_steps"
                )
            if optimizer.transport is not self.transport:
                raise UsageError(
                    f"ReplicaStrategy: the optimizer has a {type(optimizer.transport).__name__} of "
                    f"{optimizer.transport.world_size} replica(s) of its own; make it with "
                    "transport=self.trainer.strategy.transport"
                )

    def _join_around(self) -> None:
        """Lightning has replaced the entries of states while it moved them; a wrapped optimizer's are the same as ours again."""
        for optimizer in self._chains():
            if optimizer.around is not None:
                for param, state in optimizer.state.items():
                    optimizer.around.state[param] = state[AROUND]

    def _chains(self) -> list[ChainOptimizer]:
        return [optimizer for optimizer in self.optimizers if isinstance(optimizer, ChainOptimizer)]

    @property
    def _module(self) -> "pl.LightningModule":
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def _trainer(self) -> "pl.Trainer":
        return self._module.trainer

    @property
    def _fitting(self) -> bool:
        """Whether Lightning trains; what it validates or tests by itself are the weights that are there, such as a checkpoint's."""
        return self._trainer.state.fn == TrainerFn.FITTING

    # Training

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self._data_checked:
            return
        self._data_checked = True
        self._said.check_data(
            batch,
            remedy="by Trainer(use_distributed_sampler=True), or where the dataset is iterable by "
            "trainer.strategy.transport.everyone.rank of .world_size; same_data=True lets them",
        )

    @override
    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Any],
        model: "pl.LightningModule | nn.Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        figures = {f"muonwire/{name}": float(value) for name, value in self.figures().items()}
        self._module.log_dict(figures, on_step=True, on_epoch=False, batch_size=1)
        return output

    def figures(self) -> dict[str, float]:
        """What is logged after every step, by name; see the class."""
        spent = self._before + self.transport.meter.training - self._began
        optimizers = self._chains()
        steps = max(optimizer.num_steps for optimizer in optimizers)
        num_parameters = sum(p.numel() for p in self._module.parameters() if p.requires_grad)
        figures = {
            "sent_bytes": float(spent.sent_bytes),
            "egress_bytes": float(spent.egress_bytes),
            "received_bytes": float(spent.received_bytes),
            "bits_per_parameter_step": 8 * spent.sent_bytes / num_parameters / max(steps, 1),
            "wait_s": spent.wait_s,
        }
        adapting = [o.adapting.now for o in optimizers if o.adapting is not None]
        return {**figures, "interval": float(adapting[0])} if adapting else figures

    @override
    def on_train_end(self) -> None:
        for optimizer in self._chains():
            optimizer.synchronize()
        check_replicas(self._module.named_parameters(), self.transport)

    # Validation and checkpoints see the shared weights

    @override
    def on_validation_start(self) -> None:
        if self._fitting:
            self._hold()
            check_replicas(self._module.named_parameters(), self.transport)

    @override
    def on_validation_end(self) -> None:
        self._release()

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._release()

    def _hold(self) -> None:
        if self._holding is None and self._chains():
            self._holding = ExitStack()
            for optimizer in self._chains():
                self._holding.enter_context(optimizer.shared_weights())

    def _release(self) -> None:
        if self._holding is not None:
            self._holding.close()
            self._holding = None

    @contextmanager
    def _own_weights(self) -> Iterator[None]:
        """Within the block the parameters hold this replica's own weights."""
        held = self._holding is not None
        self._release()
        try:
            yield
        finally:
            if held:
                self._hold()

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        with self._own_weights():
            if all(optimizer.synchronized for optimizer in self._chains()):
                return super().lightning_module_state_dict()
            self._hold()
            state = super().lightning_module_state_dict()
            # The parameters hold other weights afterwards.
            state = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            self._release()
            return state

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write this replica's part; all replicas call it together.

        Raises:
            UsageError: a replica cannot write its part; on all of them.
        """
        everyone, whole = self.transport.everyone, "optimizer_states" in checkpoint
        self._said.gather(f"save {Path(filepath).name}", remedy=_MONITORED)
        problem = ""
        with self._own_weights():
            if whole:
                shared = checkpoint["state_dict"]
                checkpoint[ENTRY] = {
                    "replica": everyone.rank,
                    "replicas": everyone.world_size,
                    # Of those that depart from the shared ones.
                    "own_weights": {
                        name: param.detach()
                        for name, param in self._module.named_parameters()
                        if name in shared and not torch.equal(param, shared[name])
                    },
                    "traffic": asdict(self._before + self.transport.meter.training - self._began),
                }
            if whole or everyone.rank == 0:
                try:
                    path = self._own_path(filepath)
                    self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)
                except Exception as error:
                    # The others wait for this replica's word, whatever it is.
                    problem = f"cannot write its part of {filepath} ({type(error).__name__}: {error})"
        self._said.agree(
            f"save {Path(filepath).name}", problem, remedy="see to its disk; the checkpoint before is whole"
        )

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove this replica's part; all replicas call it together.

        Raises:
            UsageError: they are about to remove different ones; on all of them.
        """
        self._said.gather(f"remove {Path(filepath).name}", remedy=_MONITORED)
        path = self._own_path(filepath)
        if get_filesystem(path).exists(path):
            self.checkpoint_io.remove_checkpoint(path)

    def _own_path(self, filepath: str | Path) -> str:
        rank = self.transport.everyone.rank
        return str(filepath) if rank == 0 else f"{filepath}.replica{rank}"

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        """True: a recipe with start="broadcast" gives all replicas the same weights when it is made, which is before."""
        return True

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """This replica's part. For a fit, all replicas call it together.

        Raises:
            UsageError: a replica has no part, or one of another replica, number of replicas, or step; on all of them.
        """
        if Path(checkpoint_path).is_symlink():
            # By ModelCheckpoint(save_last="link"); the parts lie beside what it names.
            checkpoint_path = Path(checkpoint_path).resolve()
        everyone, own = self.transport.everyone, self._own_path(checkpoint_path)
        there = get_filesystem(own).exists(own)
        if not self._fitting:
            return super().load_checkpoint(own if there else checkpoint_path, weights_only)
        loaded: dict[str, Any] = {}
        problem = "" if there else f"has no {own}"
        if there:
            try:
                loaded = super().load_checkpoint(own, weights_only)
            except Exception as error:
                problem = f"cannot read {own} ({type(error).__name__}: {error})"
        if not problem:
            entry = loaded.get(ENTRY, {})
            found = entry.get("replica"), entry.get("replicas")
            if not entry:
                problem = (
                    f"has in {own} a checkpoint that ReplicaStrategy did not write, or one of weights only"
                )
            elif found != (everyone.rank, everyone.world_size):
                problem = f"has in {own} the part of replica {found[0]} of {found[1]}"
        remedy = (
            "go on with as many replicas, in the same order, and where machines share no folder with the path that each has; or "
            "load the weights into the model and begin a new fit"
        )
        what = f"go on from {Path(checkpoint_path).name}"
        self._said.agree(what, problem, remedy=remedy)
        steps = [step.decode() for step in self._said.gather(what, b"%d" % loaded["global_step"])]
        if len(set(steps)) > 1:
            raise UsageError(
                f"ReplicaStrategy: cannot {what}: its parts are of the steps {', '.join(steps)} by replica, as where one was "
                "stopped before it had saved; go on from a checkpoint that is whole"
            )
        return loaded

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        super().load_model_state_dict(checkpoint, strict=strict)
        entry = checkpoint.get(ENTRY)
        if entry is None or not self._fitting:
            return
        self._before = Traffic(**entry["traffic"])
        parameters = dict(self._module.named_parameters())
        with torch.no_grad():
            for name, weight in entry["own_weights"].items():
                parameters[name].copy_(weight)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        super().load_optimizer_state_dict(checkpoint)
        self._join_around()
        # What replicas compare after a load is counted, as it is in a loop of one's own.
        self._began = self.transport.meter.training

    # Lightning's own messages

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if self._transport is not None:
            self._said.gather(f"barrier {name}" if name else "barrier")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj if self._transport is None else self._said.broadcast(obj, source=src)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        decisions = self._said.decisions(decision)
        return sum(decisions) == len(decisions) if all else any(decisions)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The tensor reduced over all replicas, in rank order, by "mean", "sum", "max" or "min"; what is no tensor as it is."""
        if not isinstance(tensor, Tensor):
            return tensor
        self._check_group(group)
        return self._said.reduce(tensor, str(reduce_op).lower().rpartition(".")[2])

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """All replicas' tensors, (...) -> (replicas, ...)."""
        self._check_group(group)
        if sync_grads:
            raise UsageError(
                "ReplicaStrategy: all_gather passes no gradients between replicas; leave out sync_grads"
            )
        return self._said.stack(tensor)

    @staticmethod
    def _check_group(group: Any) -> None:
        if group is not None:
            raise UsageError(
                f"ReplicaStrategy: the group {group!r} was given; Lightning's reductions are over all replicas, leave it out"
            )

    @property
    def _said(self) -> Collectives:
        return Collectives(self.transport.everyone, who="ReplicaStrategy")
