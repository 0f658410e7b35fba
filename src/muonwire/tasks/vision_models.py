"""Image classifiers from ``transformers`` configurations, built from scratch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn
from typing_extensions import override

from muonwire.errors import UsageError
from muonwire.tasks.base import build_seeded, named

NORM_GROUPS = 8


class VisionModel(ABC):
    """A kind of classifier of images with one channel, in one size."""

    @abstractmethod
    def build(self, *, shape: tuple[int, int], num_classes: int) -> nn.Module:
        """The model with random weights; see ``build_vision_model``."""


@dataclass(frozen=True, kw_only=True)
class ViTSize(VisionModel):
    """A vision transformer.

    Args:
        width: hidden size.
        depth: number of layers.
        heads: attention heads.
        mlp: width of the MLP.
        patch: side of a patch, in pixels; it divides the side of the image.
        dropout: of the embeddings and of what attention and MLP add, in training. Default: 0.1.
    """

    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    dropout: float = 0.1

    @override
    def build(self, *, shape: tuple[int, int], num_classes: int) -> nn.Module:
        if shape[0] != shape[1] or shape[0] % self.patch:
            raise UsageError(
                f"vision transformer: images of {shape[0]}×{shape[1]} pixels are not tiled by patches of {self.patch}; give "
                f"square images whose side is a multiple of {self.patch}, or a resnet"
            )
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=self.mlp,
            hidden_dropout_prob=self.dropout,
            image_size=shape[0],
            patch_size=self.patch,
            num_channels=1,
            num_labels=num_classes,
            # The library's default, 0.02, is meant for the width 768.
            initializer_range=0.02 * (768 / self.width) ** 0.5,
        )
        model: nn.Module = ViTForImageClassification(config)
        return model


@dataclass(frozen=True, kw_only=True)
class ResNetSize(VisionModel):
    """A residual convolutional network of basic blocks.

    Args:
        channels: of each stage; each halves the image's sides, but for the first.
        blocks: of each stage. Default: 1.
    """

    channels: tuple[int, ...]
    blocks: int = 1

    @override
    def build(self, *, shape: tuple[int, int], num_classes: int) -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            num_channels=1,
            embedding_size=self.channels[0],
            hidden_sizes=list(self.channels),
            depths=[self.blocks] * len(self.channels),
            layer_type="basic",
            num_labels=num_classes,
        )
        model: nn.Module = ResNetForImageClassification(config)
        # Statistics of a batch would make an image's loss depend on which replica sees it with which others.
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(NORM_GROUPS, child.num_features))
        return model


VISION_MODELS: dict[str, VisionModel] = {
    "vit": ViTSize(width=64, depth=4, heads=4, mlp=128, patch=4),
    "vit_pico": ViTSize(width=16, depth=1, heads=2, mlp=32, patch=7),
    "resnet": ResNetSize(channels=(32, 64, 128)),
    "resnet_pico": ResNetSize(channels=(8, 16)),
}


def build_vision_model(name: str, *, shape: tuple[int, int], num_classes: int, seed: int) -> nn.Module:
    """A randomly initialized classifier of images with one channel.

    Args:
        name: a key of VISION_MODELS.
        shape: rows and columns of an image, in pixels.
        num_classes: how many kinds of images.
        seed: of the initial weights.

    Raises:
        UsageError: an unknown name, or images that the patches do not tile.
    """
    model = named("vision model", name, VISION_MODELS)
    return build_seeded(lambda: model.build(shape=shape, num_classes=num_classes), seed=seed)
