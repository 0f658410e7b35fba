"""Image classifiers from ``transformers`` configurations, built from scratch."""

from collections.abc import Callable
from functools import partial

from torch import nn

from muonwire.errors import UsageError
from muonwire.tasks.base import build_seeded, named

NORM_GROUPS = 8


def _vit(
    shape: tuple[int, int], num_classes: int, *, width: int, depth: int, heads: int, mlp: int, patch: int
) -> nn.Module:
    """A vision transformer.

    Args:
        shape, num_classes: as in ``build_vision_model``.
        width: hidden size.
        depth: number of layers.
        heads: attention heads.
        mlp: width of the MLP.
        patch: side of a patch, in pixels; it divides the side of the image.
    """
    if shape[0] != shape[1] or shape[0] % patch:
        raise UsageError(
            f"vision transformer: images of {shape[0]}×{shape[1]} pixels are not tiled by patches of {patch}; give "
            f"square images whose side is a multiple of {patch}, or a resnet"
        )
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        hidden_dropout_prob=0.1,
        image_size=shape[0],
        patch_size=patch,
        num_channels=1,
        num_labels=num_classes,
        # The library's default, 0.02, is meant for the width 768.
        initializer_range=0.02 * (768 / width) ** 0.5,
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


def _resnet(_: tuple[int, int], num_classes: int, *, channels: tuple[int, ...]) -> nn.Module:
    """A residual network of one basic block a stage, with so many channels; each but the first halves the image's sides."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1,
        embedding_size=channels[0],
        hidden_sizes=list(channels),
        depths=[1] * len(channels),
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


# Each takes the shape of an image and the number of classes.
VISION_MODELS: dict[str, Callable[[tuple[int, int], int], nn.Module]] = {
    "vit": partial(_vit, width=64, depth=4, heads=4, mlp=128, patch=4),
    "vit_pico": partial(_vit, width=16, depth=1, heads=2, mlp=32, patch=7),
    "resnet": partial(_resnet, channels=(32, 64, 128)),
    "resnet_pico": partial(_resnet, channels=(8, 16)),
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
    build = named("vision model", name, VISION_MODELS)
    return build_seeded(lambda: build(shape, num_classes), seed=seed)
