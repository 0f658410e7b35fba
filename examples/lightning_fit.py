"""Lightning's Trainer with muonwire between the replicas.

    python examples/lightning_fit.py

Lightning starts the two processes itself; under torchrun it takes those that are there. Each replica draws its own part of the
data. Validation sees the weights that all replicas share, and checkpoints go to ``runs/lightning_fit``: a program that was
stopped goes on from the last one when it is started again.
"""

import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from muonwire import recipes
from muonwire.integrations.lightning import ReplicaStrategy

FOLDER = Path("runs/lightning_fit")
strategy = ReplicaStrategy()
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Student(pl.LightningModule):
    """Learns what another network computes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 32)
        )

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        loss: Tensor = (self.net(x) - y).square().mean()
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        """Logs the loss, averaged over the replicas."""
        self.log("loss", self.training_step(batch, index), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Shows it on the first replica."""
        if self.trainer.is_global_zero:
            metrics = self.trainer.callback_metrics
            bits = metrics.get("muonwire/bits_per_parameter_step", 0.0)
            print(
                f"step {self.trainer.global_step}: loss {metrics['loss']:.4f}, {bits:.3f} bit per parameter and step"
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A recipe, over the strategy's way to the other replicas."""
        return recipes.one_bit_muon(self, lr=0.01, interval=5, transport=strategy.transport)


pl.seed_everything(0, verbose=False)
teacher = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32)).requires_grad_(False)
x = torch.randn(4096, 32)
data = TensorDataset(x, teacher(x))
trainer = pl.Trainer(
    strategy=strategy,
    accelerator="cpu",
    devices=2,
    max_epochs=2,
    callbacks=[ModelCheckpoint(dirpath=FOLDER, save_last=True)],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
last = FOLDER / "last.ckpt"
resume = last if last.exists() else None
trainer.fit(Student(), DataLoader(data, 64, shuffle=True), DataLoader(data, 512), ckpt_path=resume)
