"""Lightning trains with muonwire between its replicas, stops and goes on, to the bits of a plain loop on the same batches."""

import copy
import json
import os
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from muonwire import codec, optim, recipes, stages
from muonwire.errors import DivergedReplicasError, NonFiniteUpdateError, ReplicaLostError, UsageError
from muonwire.transport import ProcessGroupTransport, Secret, check_replicas, site_transport
from tests.replicas import run_replicas

MODULES = ("lightning.pytorch",)
EPOCHS, BATCH, ACCUMULATED, CLIP = 2, 4, 2, 0.5
# The checkpoint after the first epoch, of four steps, lies between two synchronizations.
RECIPES = {"one_bit_muon": {"interval": 3}, "muon": {}, "distro": {}, "around": {}}


def around(model, *, transport):
    """Local steps around PyTorch's AdamW."""
    return optim.local_steps(
        torch.optim.AdamW(model.parameters(), lr=0.01),
        outer_chain=stages.Exchange(codec=codec.parse("sign(scale=tensor)"), feedback=stages.EF14()),
        local=optim.LocalSteps(interval=3),
        transport=transport,
        model=model,
    )


def make_optimizer(name, model, transport):
    if name == "around":
        return around(model, transport=transport)
    return recipes.build(name, model, lr=0.01, transport=transport, **RECIPES[name])


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))


def make_data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    return TensorDataset(x, x.roll(1, 1).tanh())


def rate(step):
    return 1 / (1 + 0.1 * step)


def as_under_torchrun():
    """Lightning finds the processes that exist already, as those of torchrun."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    size = str(world_size)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(TORCHELASTIC_RUN_ID="test", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    warnings.filterwarnings("ignore")


def fit(
    optimizer,
    folder,
    *,
    resume=None,
    callbacks=(),
    strategy=None,
    shuffle=True,
    prepare=lambda module: None,
    manual=False,
    **options,
):
    """Train with Lightning; returns the module and the strategy."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    from muonwire.integrations.lightning import ReplicaStrategy

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = make_network()
            self.automatic_optimization = not manual
            self.validated = []

        def on_train_start(self):
            self.wrapped = isinstance(self.trainer.strategy.model, nn.parallel.DistributedDataParallel)

        def loss(self, batch):
            x, y = batch
            return (self.network(x) - y).square().mean()

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            if not manual:
                return loss
            optimizer = self.optimizers()
            self.manual_backward(loss / ACCUMULATED)
            if batch_idx % ACCUMULATED == 1:
                self.clip_gradients(optimizer, gradient_clip_val=CLIP, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()
                self.lr_schedulers().step()
            return None

        def validation_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.own_loss = loss
            self.log("val_loss", loss, sync_dist=True)

        def on_validation_epoch_end(self):
            self.validated.append([p.detach().clone() for p in self.network.parameters()])

        def configure_optimizers(self):
            made = optimizer(self.network, self.trainer.strategy.transport)
            schedule = torch.optim.lr_scheduler.LambdaLR(made, rate)
            return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Module()
    prepare(module)
    strategy = strategy or ReplicaStrategy()
    accumulating = {} if manual else {"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": CLIP}
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        callbacks=[
            ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, monitor="val_loss"),
            *callbacks,
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": EPOCHS, **accumulating, **options},
    )
    loader = DataLoader(make_data(), batch_size=BATCH, shuffle=shuffle)
    trainer.fit(module, loader, DataLoader(make_data(), batch_size=16), ckpt_path=resume)
    return module, strategy


def plain(name):
    """The same training in a loop of one's own; returns the weights at the end, those shared after each epoch, and the bytes."""
    transport = ProcessGroupTransport()
    network = make_network()
    optimizer = make_optimizer(name, network, transport)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    data = make_data()
    sampler = DistributedSampler(data, shuffle=True, seed=0)
    shared = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for number, (x, y) in enumerate(DataLoader(data, batch_size=BATCH, sampler=sampler)):
            ((network(x) - y).square().mean() / ACCUMULATED).backward()
            if number % ACCUMULATED == 1:
                nn.utils.clip_grad_norm_(network.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        with optimizer.shared_weights():
            check_replicas(network.named_parameters(), transport)
            shared.append(copy.deepcopy(list(network.parameters())))
    optimizer.synchronize()
    check_replicas(network.named_parameters(), transport)
    return list(network.parameters()), shared, transport.meter.training


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class PowerCutError(Exception):
    pass


def cut_power():
    import lightning.pytorch as pl

    class Cut(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 5:
                raise PowerCutError

    return Cut()


def raised(kind, function, *args, **options):
    with pytest.raises(kind) as caught:
        function(*args, **options)
    return str(caught.value)


def compare(folder):
    """What each recipe came to on this replica: comparisons with the plain loop, and bytes."""
    as_under_torchrun()
    found = {}
    for name in RECIPES:
        optimizer = partial(make_optimizer, name)
        weights, shared, traffic = plain(name)
        whole, strategy = fit(optimizer, folder / name, num_sanity_val_steps=0)
        with pytest.raises(PowerCutError):
            fit(optimizer, folder / f"{name}_cut", callbacks=[cut_power()])
        # As ModelCheckpoint(save_last="link") has it.
        last = folder / f"{name}_cut" / "last.ckpt"
        if torch.distributed.get_rank() == 0:
            last.symlink_to("epoch=0.ckpt")
        torch.distributed.barrier()
        resumed, again = fit(optimizer, folder / "rest", resume=last)
        logged = whole.trainer.callback_metrics
        found[name] = {
            "whole": same(whole.network.parameters(), weights),
            "resumed": same(resumed.network.parameters(), weights),
            "validated": all(same(a, b) for a, b in zip(whole.validated, shared, strict=True)),
            "sent": (traffic.sent_bytes, strategy.figures()["sent_bytes"], again.figures()["sent_bytes"]),
            "loss": float(logged["val_loss"]),
            "own_loss": float(whole.own_loss),
            "logged": float(logged["muonwire/bits_per_parameter_step"]),
            "num_parameters": sum(p.numel() for p in weights),
        }
        # By itself, Lightning validates a checkpoint's weights.
        loader = DataLoader(make_data(), batch_size=16)
        whole.trainer.validate(whole, loader, ckpt_path=folder / name / "epoch=0.ckpt", verbose=False)
        found[name]["chosen"] = same(whole.validated[-1], shared[0])
        found[name]["kept"] = strategy.figures()["sent_bytes"]
    if torch.distributed.get_rank() == 1:
        # It does not live to return it.
        (folder / "found.json").write_text(json.dumps(found))
    found["lost"] = raised(
        ReplicaLostError, fit, partial(make_optimizer, "one_bit_muon"), folder / "lost", prepare=die
    )
    return found


def die(module):
    """Replica 1 ends in its third step."""

    def check(gradient):
        if torch.distributed.get_rank() == 1 and module.global_step == 2:
            os._exit(1)

    module.network[0].weight.register_hook(check)


def test_a_training_that_was_cut_ends_as_a_plain_loop_to_the_bit_and_a_replica_that_dies_is_named(tmp_path):
    first, _ = run_replicas(compare, 2, tmp_path, expect_lost=(1,), modules=MODULES)
    assert "replica 1" in first["lost"]
    both = [first, json.loads((tmp_path / "found.json").read_text())]
    for found in both:
        for name in RECIPES:
            its = found[name]
            assert its["whole"], name
            assert its["resumed"], name
            assert its["validated"], name
            assert its["chosen"], name
            plain_bytes, whole_bytes, resumed_bytes = its["sent"]
            assert its["kept"] == whole_bytes == plain_bytes > 0
            # Replicas agree once more after a load, and were compared in the sanity check.
            assert 0 <= resumed_bytes - plain_bytes <= 200, name
            # Logged before the last synchronization and the last digests.
            bits = 8 * whole_bytes / its["num_parameters"] / 8
            assert 0.5 * bits < its["logged"] <= bits, name
    for name in RECIPES:
        first, second = (found[name] for found in both)
        # The mean over both replicas' parts of the data.
        assert first["loss"] == second["loss"]
        assert first["own_loss"] != second["own_loss"]
        parts = {p.name for p in (tmp_path / name).iterdir()}
        assert parts == {f"epoch={e}.ckpt{suffix}" for e in range(2) for suffix in ("", ".replica1")}
        first, second = (
            torch.load(tmp_path / name / f"epoch=0.ckpt{suffix}", weights_only=True)
            for suffix in ("", ".replica1")
        )
        # What anybody loads from either part are the weights that replicas share.
        assert same(first["state_dict"].values(), second["state_dict"].values())


def choose_alone(folder):
    """The best two of three epochs are other ones to each replica, which does not average what it logs."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    losses = [[3, 1, 2], [1, 3, 2]][torch.distributed.get_rank()]

    def own_loss(module):
        module.validation_step = lambda batch, batch_idx: module.log(
            "val_loss", float(losses[module.current_epoch])
        )

    keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", monitor="val_loss", mode="max", save_top_k=2)
    options = {"max_epochs": 3, "num_sanity_val_steps": 0, "limit_train_batches": 2}
    fit(partial(make_optimizer, "muon"), folder / "all", prepare=own_loss, callbacks=[keep], **options)


def with_metric(module):
    """A metric of torchmetrics beside the loss; what it says between replicas is heard."""
    import torchmetrics

    module.ranks, module.said = torchmetrics.CatMetric(), []
    step = module.validation_step

    def validation_step(batch, batch_idx):
        step(batch, batch_idx)
        rank = module.trainer.global_rank
        module.ranks.update(torch.full((1 + rank,), float(rank)))

    def on_validation_epoch_end():
        through = module.ranks.dist_sync_fn
        module.said.append(type(through.__self__).__name__)
        module.log("ranks", module.ranks.compute().mean())

    module.validation_step, module.on_validation_epoch_end = validation_step, on_validation_epoch_end


def misuse(folder):
    """What goes wrong, in the words of this replica; and what goes right with other precisions and ways to optimize."""
    as_under_torchrun()
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from muonwire.integrations.lightning import ReplicaStrategy

    rank = torch.distributed.get_rank()
    muon = partial(make_optimizer, "muon")
    said = {}

    def poison(module):
        def damage(gradient):
            return gradient * float("nan") if rank == 1 and module.global_step == 2 else gradient

        module.network[0].weight.register_hook(damage)

    said["not finite"] = raised(NonFiniteUpdateError, fit, muon, folder / "a", prepare=poison)
    said["same data"] = raised(
        UsageError, fit, muon, folder / "a", shuffle=False, use_distributed_sampler=False
    )
    said["foreign"] = raised(
        UsageError, fit, lambda model, _: torch.optim.SGD(model.parameters(), lr=0.1), folder / "a"
    )
    said["alone"] = raised(UsageError, fit, lambda model, _: recipes.muon(model, lr=0.1), folder / "a")
    said["batch norm"] = raised(UsageError, fit, muon, folder / "a", sync_batchnorm=True)

    fit(muon, folder / "b")
    first, second = (folder / "b" / f"epoch={epoch}.ckpt" for epoch in range(2))
    if rank == 1:
        Path(f"{second}.replica1").write_bytes(Path(f"{first}.replica1").read_bytes())
    torch.distributed.barrier()
    said["other steps"] = raised(UsageError, fit, muon, folder / "a", resume=second)
    if rank == 1:
        Path(f"{first}.replica1").rename(folder / "elsewhere")
    torch.distributed.barrier()
    said["no part"] = raised(UsageError, fit, muon, folder / "a", resume=first)
    if rank == 1:
        Path(f"{first}.replica1").write_bytes(first.read_bytes())
    torch.distributed.barrier()
    said["foreign part"] = raised(UsageError, fit, muon, folder / "a", resume=first)
    if rank == 1:
        Path(f"{first}.replica1").write_bytes(b"not what torch.save has written")
    torch.distributed.barrier()
    said["spoiled part"] = raised(UsageError, fit, muon, folder / "a", resume=first)
    said["one resumes"] = raised(UsageError, fit, muon, folder / "a", resume=first if rank == 0 else None)

    # Averages of weights that differ between synchronizations are each replica's own.
    few = {"max_epochs": 1, "limit_train_batches": 4}
    local = partial(make_optimizer, "one_bit_muon")
    said["own average"] = raised(
        DivergedReplicasError, fit, local, folder / "a", callbacks=[EMAWeightAveraging()], **few
    )
    averaged, _ = fit(muon, folder / "a", callbacks=[EMAWeightAveraging()], **few)
    said["average"] = [p.tolist() for p in averaged.network.parameters()]

    said["own choice"] = raised(UsageError, choose_alone, folder / "g")

    weights, _, _ = plain("muon")
    by_hand, _ = fit(muon, folder / "c", manual=True, prepare=with_metric)
    said["metric"] = float(by_hand.trainer.callback_metrics["ranks"])
    said["through"] = {*by_hand.said}
    half, _ = fit(muon, folder / "d", precision="bf16-mixed")
    norms = []

    def watched(network, transport):
        def look(*_):
            norms.append(float(nn.utils.get_total_norm([p.grad for p in network.parameters()])))

        made = muon(network, transport)
        made.register_step_pre_hook(look)
        return made

    from lightning.pytorch.plugins import MixedPrecision

    # Lightning takes bfloat16 on a CPU unless it is given float16's scaler.
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    scaled, _ = fit(watched, folder / "e", plugins=[plugin], gradient_clip_val=0.01)
    said["manual"] = same(by_hand.network.parameters(), weights)
    said["distances"] = {
        name: max(
            float((a - b).abs().max()) for a, b in zip(module.network.parameters(), weights, strict=True)
        )
        for name, module in (("bf16", half), ("fp16", scaled))
    }
    said["norms"] = norms

    def sealed():
        return ProcessGroupTransport(secret=Secret(bytes(range(32))))

    # The last one, since the process group stays sealed.
    guarded, strategy = fit(muon, folder / "f", strategy=ReplicaStrategy(sealed))
    strategy.transport.close()
    said["sealed"] = same(guarded.network.parameters(), weights)
    return said


def test_what_goes_wrong_is_one_error_on_all_replicas_and_precisions_and_manual_steps_work(tmp_path):
    both = run_replicas(misuse, 2, tmp_path, modules=MODULES)
    for said in both:
        assert "not finite" in said["not finite"]
        assert "(step 3, " in said["not finite"]
        assert "replicas 0 and 1 drew the same first batch" in said["same data"]
        assert "returned SGD" in said["foreign"]
        assert "a SingleReplica of 1 replica(s)" in said["alone"]
        assert "sync_batchnorm" in said["batch norm"]
        assert "replica 1 has no" in said["no part"]
        assert "replica 1 has in" in said["foreign part"]
        assert "the part of replica 0 of 2" in said["foreign part"]
        assert "cannot go on from epoch=0.ckpt: replica 1 cannot read" in said["spoiled part"]
        assert "different places" in said["one resumes"]
        assert (
            "cannot go on from epoch=1.ckpt: its parts are of the steps 8, 4 by replica"
            in said["other steps"]
        )
        assert "replica 0: remove epoch=1.ckpt; replica 1: remove epoch=0.ckpt" in said["own choice"]
        assert "monitors, or names files by, with sync_dist=True" in said["own choice"]
        # One value of replica 0, two of replica 1.
        assert said["metric"] == pytest.approx(2 / 3)
        assert said["through"] == {"Collectives"}
        assert said["manual"]
        assert said["sealed"]
        # Eight steps of at most 0.01 times the scale move a weight by less than this; products in half precision round.
        assert 0 < said["distances"]["bf16"] < 0.05
        assert 0 < said["distances"]["fp16"] < 0.05
        # The scale was off before gradients were clipped.
        assert len(said["norms"]) == 8
        assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in said["norms"])
        assert "weights were changed from outside" in said["own average"]
    assert both[0]["average"] == both[1]["average"]
    assert both[0]["distances"] == both[1]["distances"]


def of_sites(folder):
    """Two sites of two processes, which Lightning's DistributedDataParallel joins, beside muonwire's own means inside them."""
    as_under_torchrun()
    from muonwire.integrations.lightning import ReplicaStrategy

    ends = []
    for averages in (False, True):
        strategy = ReplicaStrategy(partial(site_transport, sites=2, averages=averages))
        optimizer = partial(make_optimizer, "one_bit_muon")
        module, _ = fit(optimizer, folder / str(averages), strategy=strategy, gradient_clip_val=None)
        weights = [p.detach() for p in module.network.parameters()]
        ends.append((weights, module.wrapped, strategy.figures()["egress_bytes"]))
    return ends


def test_a_site_is_joined_by_distributed_data_parallel(tmp_path):
    for rank, (wrapped, averaged) in enumerate(run_replicas(of_sites, 4, tmp_path, modules=MODULES)):
        assert (wrapped[1], averaged[1]) == (True, False)
        # Means of two float32 gradients are the same in any order; DistributedDataParallel halves before it adds.
        assert same(wrapped[0], averaged[0])
        # Only what leaves a site is counted, by its leader.
        assert (wrapped[2] > 0) == (rank % 2 == 0)
