"""The contract of a task: real data, a model and a loss, cut the same way for every recipe and replica."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a report says about a task.

    Args:
        task: what is learnt from which data, in a sentence's part.
        model: its kind and size.
        terms: what the loss is a mean over, such as "tokens".
    """

    task: str
    model: str
    terms: str


class Task(ABC):
    """Data + model + loss. Everything is a function of seeds, steps and ranks, so that the data position is the step."""

    @property
    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What identifies the task: data digest, sizes, model. Checkpoints carry it and refuse another."""

    @property
    @abstractmethod
    def about(self) -> "About":
        """What a report says about the task."""

    @abstractmethod
    def build_model(self, *, seed: int) -> nn.Module:
        """A fresh model; the same seed gives the same start on every replica."""

    @abstractmethod
    def batch(self, *, seed: int, step: int, rank: int, world_size: int) -> Batch:
        """What replica ``rank`` trains on in ``step``: its share of the step's joined batch.

        The joined batch depends on (seed, step) and its size only, so that one replica with the whole batch sees what
        ``world_size`` replicas see together.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over the batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module, *, rank: int, world_size: int) -> tuple[float, int]:
        """Sum of losses and number of terms on this replica's share of the validation data."""

    @property
    @abstractmethod
    def batch_terms(self) -> int:
        """Loss terms (tokens, images) of one replica's batch."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator for the data of one step, independent of all other steps."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
