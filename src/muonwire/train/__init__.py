"""One run: loop, checkpoints and resumption, metrics, and replicas as processes."""

from muonwire.train import checkpoint
from muonwire.train.config import TrainConfig
from muonwire.train.loop import RunResult, Trainer
from muonwire.train.single import train

__all__ = ["RunResult", "TrainConfig", "Trainer", "checkpoint", "train"]
