"""The contract of a task: real data, a model and a loss, cut the same way for every recipe and replica.

A task is two classes: frozen settings, whose fields are options of the command line, and the task that they make.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from muonwire.errors import UsageError

T = TypeVar("T")
Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a report says about a task.

    Args:
        task: what is learnt from which data, as part of a sentence.
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
        """What identifies the task, as JSON has it: digest of the data, sizes, model; "tokenizer" where the model reads text.

        Checkpoints carry it, and a run that goes on from one refuses another.
        """

    @property
    @abstractmethod
    def about(self) -> About:
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

    def carried(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        """The tensors by name that checkpoints hold and whose digests replicas compare: the parameters and the buffers.

        A task may leave out those that training does not change, where ``build_model`` gives them again.
        """
        return [*model.named_parameters(), *model.named_buffers()]

    def export(self, model: nn.Module, folder: Path) -> bool:
        """Write the trained model into ``folder`` as other programs open it; False where the task has no such form, as by default.

        Raises:
            UsageError: it cannot be written.
        """
        return False


@dataclass(frozen=True, kw_only=True)
class TaskSettings(ABC):
    """What a task is made from. Subclasses are frozen dataclasses whose fields are the options, each with a default.

    Attributes:
        name: of the task, on the command line and in checkpoints.
        compared: options by name that `muonwire compare` takes where nothing else is given, instead of the defaults. Default: none.
        modules: by name, that are imported once for all replicas' processes, since that takes a while. Default: none.
    """

    name: ClassVar[str]
    compared: ClassVar[Mapping[str, Any]] = {}
    modules: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def make(self) -> Task:
        """The task.

        Raises:
            UsageError: its data is missing, damaged or too small.
        """

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """The settings that ``identity`` wrote, or that a text such as "vision(batch=8)" gives.

        A class whose options are not numbers, texts or truth values makes them from those.

        Raises:
            UsageError: an unknown option, or a value that is not allowed.
        """
        allowed = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in allowed]
        if unknown:
            raise UsageError(
                f"task {cls.name}: {', '.join(unknown)} is not an option; allowed are {', '.join(allowed)}"
            )
        return cls(**values)

    def identity(self) -> dict[str, Any]:
        """The options as JSON has them; a run goes on from a checkpoint only where they are the same."""
        identity: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return identity

    def saved_model(self, description: Mapping[str, Any]) -> nn.Module:
        """The model of a checkpoint, whose weights are loaded next.

        Args:
            description: the task's, as the checkpoint has it. A class that builds the model from it needs no data here.

        Raises:
            UsageError: this version does not know the model, or its data is missing.
        """
        return self.make().build_model(seed=0)


def named(what: str, name: str, table: Mapping[str, T]) -> T:
    """The entry of a table.

    Args:
        what: the table holds, for the message.
        name: of the entry.
        table: by name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in table:
        raise UsageError(f"{what}: {name!r} is unknown; allowed are {', '.join(table)}")
    return table[name]


def check_at_least_one(settings: TaskSettings, *names: str) -> None:
    """Raise UsageError where one of these options is below 1."""
    for name in names:
        value = getattr(settings, name)
        if value < 1:
            raise UsageError(f"{settings.name} task: {name} is {value}; it must be at least 1")


def build_seeded(build: Callable[[], nn.Module], *, seed: int) -> nn.Module:
    """What ``build`` returns with torch's generator at ``seed``; the generator is then as it was before."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block torch's generators, of the CPU and of ``device``, begin at ``seed``; they are then as they were before."""
    with torch.random.fork_rng(
        [] if device.type == "cpu" else [device], device_type=device.type if device.type != "cpu" else "cuda"
    ):
        torch.manual_seed(seed)
        yield


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator for the data of one step, independent of all other steps."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
