"""Image classifiers from ``transformers`` configurations, built from scratch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from muonwire.errors import UsageError

NORM_GROUPS = 8


@dataclass(frozen=True, kw_only=True)
class ViTSize:
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


@dataclass(frozen=True, kw_only=True)
class ResNetSize:
    """A residual convolutional network of basic blocks.

    Args:
        channels: of each stage; each halves the image's sides, but for the first.
        blocks: of each stage. Default: 1.
    """

    channels: tuple[int, ...]
    blocks: int = 1


VISION_MODELS: dict[str, ViTSize | ResNetSize] = {
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
    if name not in VISION_MODELS:
        raise UsageError(f"vision model: {name!r} is unknown; allowed are {', '.join(VISION_MODELS)}")
    size = VISION_MODELS[name]
    make: Callable[[], nn.Module]
    if isinstance(size, ViTSize):
        if shape[0] != shape[1] or shape[0] % size.patch:
            raise UsageError(
                f"vision model {name}: images of {shape[0]}×{shape[1]} pixels are not tiled by patches of {size.patch}; give "
                f"square images whose side is a multiple of {size.patch}, or a resnet"
            )
        make = _vit(size, side=shape[0], num_classes=num_classes)
    else:
        make = _resnet(size, num_classes=num_classes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def _vit(size: ViTSize, *, side: int, num_classes: int) -> Callable[[], nn.Module]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.heads,
        intermediate_size=size.mlp,
        hidden_dropout_prob=size.dropout,
        image_size=side,
        patch_size=size.patch,
        num_channels=1,
        num_labels=num_classes,
        # The library's default, 0.02, is meant for the width 768.
        initializer_range=0.02 * (768 / size.width) ** 0.5,
    )
    return lambda: ViTForImageClassification(config)


def _resnet(size: ResNetSize, *, num_classes: int) -> Callable[[], nn.Module]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1,
        embedding_size=size.channels[0],
        hidden_sizes=list(size.channels),
        depths=[size.blocks] * len(size.channels),
        layer_type="basic",
        num_labels=num_classes,
    )

    def make() -> nn.Module:
        model: nn.Module = ResNetForImageClassification(config)
        # Statistics of a batch would make an image's loss depend on which replica sees it with which others.
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(NORM_GROUPS, child.num_features))
        return model

    return make
